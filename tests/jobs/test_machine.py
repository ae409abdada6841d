"""Random histories of jobs, workers and shards against a model in memory, on both databases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jobs import leases, lifecycle, statements, states
from jobs.leases import Claim
from jobs.lifecycle import NewShard, Planned
from storage.database import Database
from storage.errors import Conflict
from storage.shardfile import Written
from storage.tables import event, item, item_label, job, recipe, shard, worker
from tests.support import age, new_worker, opened, outcomes_of, spec, written

SIZE = 2
SETTINGS = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@dataclasses.dataclass
class Shard:
    """What the model knows of a shard."""

    id: int
    job_id: int
    number: int
    state: str = states.READY
    fence: int = 0
    owner: str | None = None
    errors: int = 0
    crashes: int = 0
    checkpoint: dict[str, Any] = dataclasses.field(default_factory=dict)
    at_claim: dict[str, Any] = dataclasses.field(default_factory=dict)
    resting: bool = False
    result_key: str | None = None


@dataclasses.dataclass
class ModelJob:
    """What the model knows of a job."""

    id: int
    dataset: str
    priority: int
    state: str = states.RUNNING
    paused: bool = False
    cancelled: bool = False

    @property
    def ended(self) -> bool:
        return self.state in states.JOB_FINAL


@dataclasses.dataclass
class Attempt:
    """A claim that some worker holds or believes to hold, and where it would write."""

    claim: Claim
    worker: str
    written: Written


picks = st.integers(0, 1 << 30)


class Machine(RuleBasedStateMachine):
    """Every rule does one verb to the database and to the model, and compares the answers."""

    db: Database

    def __init__(self) -> None:
        super().__init__()
        self.shards: dict[int, Shard] = {}
        self.jobs: dict[int, ModelJob] = {}
        self.workers: dict[str, str] = {}
        self.attempts: list[Attempt] = []
        self.rows: dict[int, int] = {}  # shard id -> fence of its committed rows
        tables = (item_label, item, shard, job, recipe, worker, event)
        self.db.transact(lambda tx: [tx.execute(sa.delete(table)) for table in tables] and None)

    # --- helpers

    def of(self, job_id: int, *wanted: str) -> list[Shard]:
        return [s for s in self.shards.values() if s.job_id == job_id and (not wanted or s.state in wanted)]

    def pick(self, values: list[Any], number: int) -> Any:
        """One of the values, the newest ones more often."""
        return values[-1 - number % min(len(values), 4)]

    def mine(self, attempt: Attempt) -> Shard | None:
        """The attempt's shard where its lease still holds."""
        found = self.shards[attempt.claim.shard_id]
        holds = found.state == states.LEASED and found.fence == attempt.claim.fence and found.owner == attempt.worker
        return found if holds else None

    def settle(self, job_id: int) -> str | None:
        """What finish answers, and what it does."""
        found = self.jobs[job_id]
        if found.ended:
            return None if self.of(job_id, states.READY, states.LEASED) else found.state
        if self.of(job_id, states.READY, states.LEASED):
            return None
        found.state = states.CANCELLED if found.cancelled else states.DONE
        found.paused = False
        return found.state

    # --- rules

    @initialize(shards=st.integers(1, 2))
    def begin(self, shards: int) -> None:
        # Few shards and few workers, so that they meet again.
        self.submit(0, shards, 0)
        self.register()

    @rule(number=st.integers(0, 1), shards=st.integers(0, 2), priority=st.integers(0, 1))
    def submit(self, number: int, shards: int, priority: int) -> None:
        dataset = f"/d{number}"
        open_job = next((j for j in self.jobs.values() if j.dataset == dataset and not j.ended), None)
        found, is_new = lifecycle.submit(self.db, spec(dataset), priority=priority)
        assert is_new == (open_job is None)
        if open_job is not None:
            assert found.id == open_job.id
            return
        self.jobs[found.id] = ModelJob(found.id, dataset, priority)
        assert lifecycle.start_planning(self.db, found.id, "p")
        new = [NewShard(f"m{i}", SIZE, SIZE) for i in range(shards)]
        lifecycle.add_shards(self.db, found.id, "p", 0, new, Planned(SIZE * shards, 0, 0))
        lifecycle.end_planning(self.db, found.id, "p", pruned=0)
        for row in self.db.query(sa.select(shard.c.id, shard.c.number).where(shard.c.job_id == found.id)):
            self.shards[row.id] = Shard(row.id, found.id, row.number)

    @precondition(lambda self: list(self.workers.values()).count(leases.LIVE) < 2)
    @rule()
    def register(self) -> None:
        self.workers[new_worker(self.db)] = leases.LIVE

    @precondition(lambda self: self.workers)
    @rule(number=picks)
    def claim(self, number: int) -> None:
        worker_id = self.pick(list(self.workers), number)
        if self.workers[worker_id] != leases.LIVE:
            with pytest.raises(Conflict):
                leases.claim(self.db, worker_id, "cpu", None)
            return
        found = leases.claim(self.db, worker_id, "cpu", None)
        expected = self._best()
        assert (found and found.shard_id) == (expected and expected.id)
        if found is None or expected is None:
            return
        expected.fence += 1
        expected.state, expected.owner = states.LEASED, worker_id
        expected.at_claim = dict(expected.checkpoint)
        assert (found.fence, found.errors, found.crashes) == (expected.fence, expected.errors, expected.crashes)
        assert dict(found.checkpoint) == expected.checkpoint
        self.attempts.append(Attempt(found, worker_id, written(found)))

    def _best(self) -> Shard | None:
        open_jobs = [j for j in self.jobs.values() if not (j.ended or j.paused or j.cancelled)]
        for found in sorted(open_jobs, key=lambda j: (-j.priority, len(self.of(j.id, states.LEASED)), j.id)):
            ready = [s for s in self.of(found.id, states.READY) if not s.resting]
            if ready:
                return min(ready, key=lambda s: s.id)
        return None

    @precondition(lambda self: self.attempts)
    @rule(number=picks)
    def commit(self, number: int) -> None:
        attempt = self.pick(self.attempts, number)
        found = self.mine(attempt)
        before = self.shards[attempt.claim.shard_id]
        repeated = before.fence == attempt.claim.fence and before.result_key == attempt.written.key
        done = leases.commit(self.db, attempt.claim, attempt.worker, attempt.written, outcomes_of(attempt.claim))
        assert done == (found is not None or repeated)
        if found is not None:
            found.state, found.result_key, found.checkpoint = states.DONE, attempt.written.key, {}
            self.rows[found.id] = found.fence

    @precondition(lambda self: self.attempts)
    @rule(number=picks, kept=st.booleans())
    def release(self, number: int, kept: bool) -> None:
        attempt = self.pick(self.attempts, number)
        found = self.mine(attempt)
        checkpoint = {"partial": f"of {attempt.claim.fence}"} if kept else None
        assert leases.release(self.db, attempt.claim, attempt.worker, checkpoint) == (found is not None)
        if found is not None:
            cancelled = self.jobs[found.job_id].cancelled
            found.state, found.owner = states.CANCELLED if cancelled else states.READY, None
            found.checkpoint = found.at_claim if checkpoint is None else checkpoint
            self.settle(found.job_id)

    @precondition(lambda self: self.attempts)
    @rule(number=picks)
    def release_and_claim_again(self, number: int) -> None:
        """What makes an old claim and a new one of the same worker meet."""
        attempt = self.pick(self.attempts, number)
        self.release(number, False)
        self.claim(list(self.workers)[::-1].index(attempt.worker))

    @precondition(lambda self: self.attempts)
    @rule(number=picks)
    def fail(self, number: int) -> None:
        attempt = self.pick(self.attempts, number)
        found = self.mine(attempt)
        assert leases.fail(self.db, attempt.claim, attempt.worker, "broken") == (found is not None)
        if found is not None:
            found.state, found.owner, found.resting, found.checkpoint = states.READY, None, True, found.at_claim
            found.errors += 1

    @precondition(lambda self: self.attempts)
    @rule(number=picks, position=st.integers(0, SIZE - 1))
    def suspect(self, number: int, position: int) -> None:
        attempt = self.pick(self.attempts, number)
        found = self.mine(attempt)
        assert leases.suspect(self.db, attempt.claim, attempt.worker, [position]) == (found is not None)
        if found is not None:
            found.checkpoint = {**found.at_claim, "suspect": [position]}

    @precondition(lambda self: self.workers)
    @rule(number=picks)
    def beat(self, number: int) -> None:
        worker_id = self.pick(list(self.workers), number)
        orders = leases.beat(self.db, worker_id, progress={}, items=0, rate=0, model="")
        if self.workers[worker_id] != leases.LIVE:
            assert orders == leases.Orders(alive=False)
            return
        held = [s for s in self.shards.values() if s.state == states.LEASED and s.owner == worker_id]
        assert orders.leased == {s.id: s.fence for s in held}
        stopped = {s.job_id for s in held if self.jobs[s.job_id].paused or self.jobs[s.job_id].cancelled}
        assert orders.dropped == stopped

    @precondition(lambda self: self.workers)
    @rule(number=picks)
    def expire(self, number: int) -> None:
        worker_id = self.pick(list(self.workers), number)
        live = self.workers[worker_id] == leases.LIVE
        age(self.db, worker_id, 1000)
        assert leases.expire_workers(self.db, 60) == ([worker_id] if live else [])
        if live:
            self.workers[worker_id] = leases.LOST
        lost = [s for s in self.shards.values() if s.state == states.LEASED and s.owner == worker_id]
        assert leases.expire_shards(self.db) == len(lost)
        for found in lost:
            found.state, found.owner, found.resting = states.READY, None, True
            found.crashes += 1

    @precondition(lambda self: self.workers)
    @rule(number=picks)
    def retire(self, number: int) -> None:
        worker_id = self.pick(list(self.workers), number)
        leases.retire(self.db, worker_id)
        if self.workers[worker_id] == leases.LIVE:
            self.workers[worker_id] = leases.GONE
        for found in self.shards.values():
            if found.state == states.LEASED and found.owner == worker_id:
                found.state, found.owner = states.READY, None
                found.checkpoint = {k: v for k, v in found.checkpoint.items() if k != "suspect"}

    @rule()
    def time_passes(self) -> None:
        self.db.transact(lambda tx: tx.execute(sa.update(shard).values(not_before=0)) and None)
        for found in self.shards.values():
            found.resting = False

    @precondition(lambda self: self.jobs)
    @rule(number=picks)
    def cancel(self, number: int) -> None:
        found = self.pick(list(self.jobs.values()), number)
        assert lifecycle.cancel(self.db, found.id) == (not found.ended)
        if not found.ended:
            found.cancelled = True
            for part in self.of(found.id, states.READY):
                part.state = states.CANCELLED
            self.settle(found.id)

    @precondition(lambda self: self.jobs)
    @rule(number=picks, paused=st.booleans())
    def pause(self, number: int, paused: bool) -> None:
        found = self.pick(list(self.jobs.values()), number)
        assert lifecycle.pause(self.db, found.id, paused=paused) == (not found.ended)
        if not found.ended:
            found.paused = paused

    @precondition(lambda self: self.jobs)
    @rule(number=picks)
    def finish(self, number: int) -> None:
        found = self.pick(list(self.jobs.values()), number)
        answer = lifecycle.finish(self.db, found.id)
        assert answer == self.settle(found.id)

    # --- what must hold at any time

    @invariant()
    def shards_are_as_in_the_model(self) -> None:
        columns = (shard.c.id, shard.c.state, shard.c.fence, shard.c.errors, shard.c.crashes, shard.c.result_key)
        rows = self.db.query(sa.select(*columns, shard.c.checkpoint))
        assert {r.id: tuple(r[1:6]) for r in rows} == {
            s.id: (s.state, s.fence, s.errors, s.crashes, s.result_key) for s in self.shards.values()
        }
        assert {r.id: r.checkpoint or {} for r in rows} == {s.id: s.checkpoint for s in self.shards.values()}

    @invariant()
    def jobs_are_as_in_the_model(self) -> None:
        rows = self.db.query(sa.select(job.c.id, job.c.state, job.c.paused, job.c.cancelled, job.c.reason))
        assert {r.id: (r.state, r.paused, r.cancelled, r.reason) for r in rows} == {
            j.id: (j.state, j.paused, j.cancelled, "") for j in self.jobs.values()
        }

    @invariant()
    def every_done_shard_has_its_rows_once_with_its_fence(self) -> None:
        per_shard = sa.select(item.c.shard_id, sa.func.count(), sa.func.min(item.c.fence), sa.func.max(item.c.fence))
        rows = self.db.query(per_shard.group_by(item.c.shard_id))
        assert {r[0]: tuple(r[1:]) for r in rows} == {i: (SIZE, fence, fence) for i, fence in self.rows.items()}
        doubled = sa.select(item.c.key).where(item.c.current).group_by(item.c.recipe_id, item.c.key)
        assert self.db.query(doubled.having(sa.func.count() > 1)) == []


@pytest.fixture
def machine(database_url: str) -> Iterator[type[Machine]]:
    """The machine on a database of its own."""
    with opened(database_url) as db:
        yield type("BoundMachine", (Machine,), {"db": db})


def test_random_histories(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)


def without_fence() -> sa.ColumnElement[bool]:
    """The compare-and-set with its fence left out: any fence will do."""
    fence = shard.c.fence >= 0 * sa.bindparam("the_fence")
    owner = shard.c.worker_id == sa.bindparam("me")
    return sa.and_(shard.c.id == sa.bindparam("the_shard"), fence, owner, statements.is_in(states.LEASED))


def without_owner_and_fence() -> sa.ColumnElement[bool]:
    """The compare-and-set that looks at the state alone."""
    anyone = sa.and_(shard.c.fence >= 0 * sa.bindparam("the_fence"), sa.bindparam("me") != "")
    return sa.and_(shard.c.id == sa.bindparam("the_shard"), anyone, statements.is_in(states.LEASED))


def never_before(tx: Any, claim: Claim, place: Written) -> bool:
    """A commit that does not recognise its own earlier success."""
    return False


def claim_again(machine: Machine) -> None:
    machine.claim(0)
    machine.release_and_claim_again(0)
    machine.commit(1)


def lose_and_commit_late(machine: Machine) -> None:
    machine.claim(0)
    machine.expire(0)
    machine.register()
    machine.time_passes()
    machine.claim(0)
    machine.commit(1)


def commit_twice(machine: Machine) -> None:
    machine.claim(0)
    machine.commit(0)
    machine.commit(0)


@pytest.mark.parametrize(
    ("module", "name", "bug", "history"),
    [
        (statements, "ours", without_fence, claim_again),
        (statements, "ours", without_owner_and_fence, lose_and_commit_late),
        (leases, "_committed_before", never_before, commit_twice),
    ],
    ids=["fence", "owner", "lost answer"],
)
def test_the_machine_has_teeth(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
    bug: Any,
    history: Callable[[Machine], None],
) -> None:
    """A planted bug is seen by the model, in a history that is fine without it."""
    monkeypatch.setattr(statements, "_change", statements._change.__wrapped__)  # built anew, with the bug or without
    with opened(f"sqlite:///{tmp_path}/i.db") as db:
        found = type("BoundMachine", (Machine,), {"db": db})
        for planted in (False, True):
            if planted:
                monkeypatch.setattr(module, name, bug)
            machine = found()
            machine.begin(1)
            if not planted:
                history(machine)
                machine.shards_are_as_in_the_model()
                continue
            with pytest.raises(AssertionError):
                history(machine)
