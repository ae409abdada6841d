"""Shards are claimed in order, held by fences, and given back, failed, expired or committed exactly once."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from jobs import leases, lifecycle, processes, statements, states
from jobs.leases import Claim
from jobs.reconcile import Reconciler
from storage.database import Database, Tx
from storage.errors import Conflict, Unavailable
from storage.settings import Settings
from storage.tables import event, item, item_label, shard, worker
from tests.support import (
    actions,
    age,
    claimed,
    commit,
    count,
    execute,
    job_row,
    make_due,
    new_worker,
    opened,
    outcome,
    outcomes_of,
    planned_job,
    row_of,
    shard_row,
    shard_states,
    together,
    written,
)


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database with tables."""
    with opened(database_url) as database:
        yield database


@pytest.fixture
def me(db: Database) -> str:
    """A live worker."""
    return new_worker(db)


def lose(db: Database, worker_id: str) -> None:
    """Let a worker miss its beats, and take its shards back."""
    age(db, worker_id, 1000)
    assert leases.expire_workers(db, 60) == [worker_id]
    leases.expire_shards(db)


# --- register and claim ---------------------------------------------------------------------------------------------


def test_register_is_safe_to_repeat(db: Database, me: str) -> None:
    age(db, me, 30)
    before = row_of(db, worker, me)
    leases.register(db, me, name="x", host="h", device="d", queue="gpu", pid=1, version="9")
    assert row_of(db, worker, me) == before
    assert before.progress == {}


def test_a_claim_says_all_a_worker_needs(db: Database, me: str) -> None:
    found = planned_job(db, shards=1, size=7, replaces=2, params={"conf": 0.5})
    claim = claimed(db, me)
    assert (claim.fence, claim.number, claim.items, claim.replaces) == (1, 0, 7, 2)
    assert (claim.manifest_key, claim.checkpoint, claim.crashes, claim.errors) == ("manifest-0", {}, 0, 0)
    assert (claim.job_id, claim.recipe_id, claim.digest) == (found.id, found.recipe_id, found.spec.digest)
    assert claim.spec == found.spec
    assert not claim.careful
    row = shard_row(db, claim)
    assert (row.state, row.worker_id, row.attempts) == (states.LEASED, me, 1)
    assert abs(row.claimed_at - time.time()) < 2
    assert job_row(db, found).started_at is not None


def test_nothing_to_claim(db: Database, me: str) -> None:
    assert leases.claim(db, me, "cpu", None) is None
    planned_job(db, shards=1, queue="gpu")
    assert leases.claim(db, me, "cpu", None) is None
    assert claimed(db, me, "gpu").spec.queue == "gpu"


@pytest.mark.parametrize("state", ["unknown", "lost", "gone", "draining"])
def test_who_may_not_claim(db: Database, me: str, state: str) -> None:
    planned_job(db)
    if state == "lost":
        lose(db, me)
    elif state == "gone":
        leases.retire(db, me)
    elif state == "draining":
        execute(db, sa.update(worker).values(desired=leases.DRAIN))
    with pytest.raises(Conflict, match="drain" if state == "draining" else state):
        leases.claim(db, "nobody" if state == "unknown" else me, "cpu", None)
    assert count(db, shard, shard.c.state == states.LEASED) == 0


def test_two_claims_of_one_shard_have_rising_fences(db: Database) -> None:
    planned_job(db, shards=1)
    fences = []
    for _ in range(4):
        worker_id = new_worker(db)
        fences.append(claimed(db, worker_id).fence)
        lose(db, worker_id)
        make_due(db)
    assert fences == [1, 2, 3, 4]


def test_claim_order_priority_affinity_fair_share_age(db: Database, me: str) -> None:
    old = planned_job(db, shards=3, params={"m": 1})
    young = planned_job(db, shards=3, params={"m": 2})
    urgent = planned_job(db, shards=1, params={"m": 3}, priority=1)
    affine = young.spec.model_key
    assert claimed(db, me, model_key=affine).job_id == urgent.id, "priority before affinity"
    assert claimed(db, me, model_key=affine).job_id == young.id, "affinity before age"
    assert claimed(db, me).job_id == old.id, "then the job with the fewest shards in flight"
    assert claimed(db, me).job_id == old.id, "then the oldest"
    assert claimed(db, me).job_id == young.id, "fair share again"
    assert claimed(db, me, model_key=old.spec.model_key).job_id == old.id
    assert claimed(db, me, model_key="unknown").job_id == young.id
    assert leases.claim(db, me, "cpu", None) is None


def test_shards_of_a_job_come_in_order(db: Database, me: str) -> None:
    planned_job(db, shards=5)
    assert [claimed(db, me).number for _ in range(5)] == [0, 1, 2, 3, 4]


def test_priority_may_change_later(db: Database, me: str) -> None:
    planned_job(db)
    second = planned_job(db)
    assert lifecycle.set_priority(db, second.id, 3)
    assert claimed(db, me).job_id == second.id


def test_not_before_is_respected_by_the_database_s_clock(db: Database, me: str) -> None:
    planned_job(db, shards=1)
    assert leases.fail(db, claimed(db, me), me, "broken")
    assert leases.claim(db, me, "cpu", None) is None
    execute(db, sa.update(shard).values(not_before=time.time() + 0.3))
    assert leases.claim(db, me, "cpu", None) is None
    time.sleep(0.4)
    assert claimed(db, me).errors == 1


def test_shards_of_a_job_still_being_planned_are_claimable(db: Database, me: str) -> None:
    planned_job(db, end=False)
    assert claimed(db, me).number == 0


# --- fences ---------------------------------------------------------------------------------------------------------

LATE: dict[str, Callable[[Database, Claim, str], bool]] = {
    "commit": lambda db, c, w: commit(db, c, w),
    "quarantine": lambda db, c, w: leases.commit(db, c, w, written(c), outcomes_of(c), state=states.QUARANTINED),
    "release": lambda db, c, w: leases.release(db, c, w, {"partial": "late"}),
    "fail": lambda db, c, w: leases.fail(db, c, w, "late"),
    "suspect": lambda db, c, w: leases.suspect(db, c, w, [0]),
}


def _ready_again(db: Database, claim: Claim, me: str) -> None:
    lose(db, me)


def _leased_by_another(db: Database, claim: Claim, me: str) -> None:
    lose(db, me)
    make_due(db)
    assert claimed(db, new_worker(db)).fence == claim.fence + 1


def _done_by_another(db: Database, claim: Claim, me: str) -> None:
    _leased_by_another(db, claim, me)
    owner = shard_row(db, claim).worker_id
    assert commit(db, dataclasses.replace(claim, fence=claim.fence + 1), owner)


def _cancelled(db: Database, claim: Claim, me: str) -> None:
    lose(db, me)
    lifecycle.cancel(db, claim.job_id)


def _leased_by_myself_again(db: Database, claim: Claim, me: str) -> None:
    assert leases.release(db, claim, me)
    assert claimed(db, me).fence == claim.fence + 1


def _failed_by_myself(db: Database, claim: Claim, me: str) -> None:
    assert leases.fail(db, claim, me, "first")


def _quarantined(db: Database, claim: Claim, me: str) -> None:
    assert leases.commit(db, claim, me, written(claim), outcomes_of(claim), state=states.QUARANTINED)


AFTER = [
    *(_ready_again, _leased_by_another, _done_by_another, _cancelled, _leased_by_myself_again),
    *(_failed_by_myself, _quarantined),
]


@pytest.mark.parametrize("verb", LATE)
@pytest.mark.parametrize("happened", AFTER, ids=lambda f: f.__name__.strip("_"))
def test_a_stale_verb_changes_nothing(
    db: Database, me: str, verb: str, happened: Callable[[Database, Claim, str], None]
) -> None:
    planned_job(db, shards=1)
    claim = claimed(db, me)
    happened(db, claim, me)
    before = (shard_row(db, claim), row_of(db, worker, me), count(db), count(db, item_label), actions(db))
    for _ in range(2):
        assert LATE[verb](db, claim, me) is False
    assert (shard_row(db, claim), row_of(db, worker, me), count(db), count(db, item_label), actions(db)) == before


@pytest.mark.parametrize("verb", LATE)
def test_a_stranger_s_verb_changes_nothing(db: Database, me: str, verb: str) -> None:
    planned_job(db, shards=1)
    claim = claimed(db, me)
    before = shard_row(db, claim)
    assert LATE[verb](db, claim, new_worker(db)) is False
    assert shard_row(db, claim) == before


# --- commit ---------------------------------------------------------------------------------------------------------


def test_commit_records_items_labels_and_totals(db: Database, me: str) -> None:
    planned_job(db, shards=1, size=3)
    claim = claimed(db, me)
    leases.suspect(db, claim, me, [1])
    place = written(claim)
    assert leases.commit(db, claim, me, place, outcomes_of(claim, failed=[1]), seconds={"device": 1.5})
    row = shard_row(db, claim)
    assert (row.state, row.results, row.failures, row.device_s) == (states.DONE, 2, 1, 1.5)
    assert (row.result_key, row.result_sha256, row.result_bytes) == (place.key, place.sha256, place.nbytes)
    assert row.checkpoint is None
    assert row.finished_at is not None
    items = db.query(sa.select(item).order_by(item.c.id))
    assert [(r.fence, r.shard_id, r.job_id, r.current, r.ok) for r in items] == [
        (1, claim.shard_id, claim.job_id, True, ok) for ok in (True, False, True)
    ]
    assert count(db, item_label) == 2


def test_a_commit_whose_answer_was_lost_is_true_again_and_doubles_nothing(db: Database, me: str) -> None:
    planned_job(db, shards=1)
    claim = claimed(db, me)
    place = written(claim)
    for _ in range(3):
        assert leases.commit(db, claim, me, place, outcomes_of(claim))
    assert count(db) == claim.items
    assert actions(db).count("commit") == 1
    other = written(claim)
    assert not leases.commit(db, claim, me, other, outcomes_of(claim)), "another object was not committed"


def test_a_commit_whose_connection_breaks_at_the_end(db: Database, me: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned_job(db, shards=1)
    claim = claimed(db, me)
    real, lost = db.transact, [Unavailable("the answer to COMMIT was lost")]

    def transact(work: Callable[[Any], Any]) -> Any:
        answer = real(work)
        return real(work) if lost and lost.pop() else answer

    monkeypatch.setattr(db, "transact", transact)
    assert commit(db, claim, me)
    assert not lost
    assert count(db) == claim.items


@pytest.mark.parametrize("positions", [[], [0], [0, 1, 1], [0, 0], [1, 2], [0, 1, 2], [-1, 0]])
def test_missing_and_doubled_positions_are_refused(db: Database, me: str, positions: list[int]) -> None:
    planned_job(db, shards=1, size=2)
    claim = claimed(db, me)
    with pytest.raises(ValueError, match="expected 2 outcomes"):
        leases.commit(db, claim, me, written(claim), [outcome(p, f"k{i}") for i, p in enumerate(positions)])
    assert shard_row(db, claim).state == states.LEASED
    assert count(db) == 0


def test_outcomes_may_come_in_any_order(db: Database, me: str) -> None:
    planned_job(db, shards=1, size=5)
    claim = claimed(db, me)
    assert leases.commit(db, claim, me, written(claim), outcomes_of(claim)[::-1])


def test_a_key_twice_in_one_job_is_an_error_and_changes_nothing(db: Database, me: str) -> None:
    planned_job(db, shards=2, size=1)
    first, second = claimed(db, me), claimed(db, me)
    assert leases.commit(db, first, me, written(first), [outcome(0, "same")])
    with pytest.raises(IntegrityError):
        leases.commit(db, second, me, written(second), [outcome(0, "same")])
    assert shard_row(db, second).state == states.LEASED
    assert count(db) == 1


def test_commit_supersedes_what_earlier_jobs_left(db: Database, me: str) -> None:
    for number in range(3):
        found = planned_job(db, shards=1, size=2, replaces=2 if number else 0, dataset="/d")
        claim = claimed(db, me)
        assert leases.commit(db, claim, me, written(claim), [outcome(0, "a"), outcome(1, f"b{number}")])
        assert lifecycle.finish(db, found.id) == states.DONE
        assert count(db, item, item.c.current, item.c.key == "a") == 1
    assert count(db, item, item.c.current) == 4
    assert count(db) == 6


def test_shards_that_wholly_fail_are_counted_in_a_row(db: Database, me: str) -> None:
    planned_job(db, shards=5, size=2)
    for failed, expected in (([0, 1], 1), ([0, 1], 2), ([0], 0), ([0, 1], 1), ([], 0)):
        assert commit(db, claimed(db, me), me, failed=failed)
        assert row_of(db, worker, me).failed_in_a_row == expected


def test_a_worker_declared_dead_may_commit_what_nobody_took_yet(db: Database, me: str) -> None:
    planned_job(db, shards=1)
    claim = claimed(db, me)
    age(db, me, 100)
    assert leases.expire_workers(db, 60) == [me]
    assert commit(db, claim, me), "the fence decides, not the clock"
    assert leases.expire_shards(db) == 0


# --- release, fail, suspect -----------------------------------------------------------------------------------------


def test_release_costs_nothing_and_keeps_the_checkpoint(db: Database, me: str) -> None:
    planned_job(db, shards=1)
    assert leases.release(db, claimed(db, me), me, {"partial": "k", "n": [1, 2]})
    claim = claimed(db, me)
    assert claim.checkpoint == {"partial": "k", "n": [1, 2]}
    assert (claim.errors, claim.crashes) == (0, 0)
    leases.suspect(db, claim, me, [0])
    assert leases.release(db, claim, me), "without a checkpoint the one that was found stays, without suspects"
    again = claimed(db, me)
    assert again.checkpoint == claim.checkpoint
    assert leases.release(db, again, me, {})
    assert shard_row(db, again).checkpoint is None


def test_sql_null_and_not_json_null_where_there_is_no_checkpoint(db: Database, me: str) -> None:
    planned_job(db, shards=2)
    assert commit(db, claimed(db, me), me)
    assert leases.release(db, claimed(db, me), me)
    assert count(db, shard, shard.c.checkpoint.is_(sa.null()), shard.c.crash_workers.is_(sa.null())) == 2


def test_release_of_a_paused_job_s_shard_makes_it_ready(db: Database, me: str) -> None:
    found = planned_job(db, shards=1)
    claim = claimed(db, me)
    lifecycle.pause(db, found.id)
    assert leases.release(db, claim, me)
    assert shard_states(db, found) == [states.READY]
    assert leases.claim(db, me, "cpu", None) is None
    lifecycle.pause(db, found.id, paused=False)
    assert claimed(db, me).fence == 2


def test_fail_counts_an_error_and_rests(db: Database, me: str) -> None:
    planned_job(db, shards=1)
    for errors in (1, 2, 3):
        claim = claimed(db, me)
        assert claim.errors == errors - 1
        leases.suspect(db, claim, me, [0])
        before = time.time()
        assert leases.fail(db, claim, me, "line\none \0\ud800" + "x" * 9999)
        row = shard_row(db, claim)
        assert (row.errors, row.crashes, row.state, row.worker_id) == (errors, 0, states.READY, None)
        assert row.checkpoint is None
        assert row.message.startswith("line one ?xxx")
        assert abs(row.not_before - before - states.backoff_s(errors)) < 2
        make_due(db)


def test_suspects_survive_a_crash_and_reach_the_next_attempt(db: Database, me: str) -> None:
    planned_job(db, shards=1)
    claim = claimed(db, me)
    assert leases.suspect(db, claim, me, [3, 4])
    lose(db, me)
    make_due(db)
    again = claimed(db, new_worker(db))
    assert again.checkpoint == {"suspect": [3, 4]}
    assert again.careful


# --- leases run out -------------------------------------------------------------------------------------------------


def test_a_lease_runs_out_only_after_its_time_by_the_database_s_clock(db: Database, me: str) -> None:
    planned_job(db, shards=1)
    claim = claimed(db, me)
    age(db, me, 59)
    assert leases.expire_workers(db, 60) == []
    assert leases.expire_shards(db) == 0
    assert shard_row(db, claim).state == states.LEASED
    age(db, me, 2)
    assert leases.expire_shards(db) == 0, "the incarnation is declared dead first"
    assert leases.expire_workers(db, 60) == [me]
    assert leases.expire_workers(db, 60) == []
    assert leases.expire_shards(db) == 1
    assert leases.expire_shards(db) == 0
    row = shard_row(db, claim)
    assert (row.state, row.crashes, row.errors, row.worker_id) == (states.READY, 1, 0, None)
    assert row.crash_workers == [me]
    assert abs(row.not_before - time.time() - 1) < 1.5


def test_a_beat_renews_the_lease(db: Database, me: str) -> None:
    age(db, me, 1000)
    leases.beat(db, me, progress={}, items=0, rate=0, model="")
    assert leases.expire_workers(db, 1) == []


def test_crashes_back_off_longer_each_time(db: Database) -> None:
    planned_job(db, shards=1)
    pauses, workers = [], []
    for _ in range(4):
        workers.append(new_worker(db))
        claim = claimed(db, workers[-1])
        lose(db, workers[-1])
        pauses.append(round(shard_row(db, claim).not_before - time.time()))
        make_due(db)
    assert pauses == [1, 2, 4, 8]
    assert shard_row(db, claim).crash_workers == workers


def test_shards_of_a_worker_without_a_row_or_a_name_are_taken_back(db: Database, me: str) -> None:
    planned_job(db, shards=3)
    for _ in range(3):
        claimed(db, me)
    execute(db, sa.text("update shard set worker_id = 'deleted' where id = 1"))
    execute(db, sa.text("update shard set worker_id = null where id = 2"))
    assert leases.expire_shards(db) == 2
    assert shard_states(db, lifecycle.get(db, 1)) == [states.READY, states.READY, states.LEASED]


def test_expiring_stops_at_its_limit(db: Database, me: str) -> None:
    planned_job(db, shards=5)
    for _ in range(5):
        claimed(db, me)
    age(db, me, 100)
    leases.expire_workers(db, 60)
    assert [leases.expire_shards(db, limit=2) for _ in range(4)] == [2, 2, 1, 0]


def test_copies_racing_count_one_crash_once(db: Database) -> None:
    planned_job(db, shards=20)
    lost = [new_worker(db) for _ in range(4)]
    for worker_id in lost:
        for _ in range(5):
            claimed(db, worker_id)
        age(db, worker_id, 100)
    declared = together(lambda n: leases.expire_workers(db, 60), 6)
    assert sorted(w for part in declared for w in part) == sorted(lost)
    taken = together(lambda n: [leases.expire_shards(db, limit=3) for _ in range(10)], 6)
    assert sum(map(sum, taken)) == 20
    assert {(r.crashes, r.state) for r in db.query(sa.select(shard))} == {(1, states.READY)}
    assert actions(db).count("expire") == 20
    assert actions(db).count("lost") == 4


def test_retire_gives_back_without_blame(db: Database, me: str) -> None:
    found = planned_job(db, shards=3)
    assert commit(db, claimed(db, me), me)
    claimed(db, me)
    for _ in range(2):
        leases.retire(db, me)
    assert row_of(db, worker, me).state == leases.GONE
    rows = db.query(sa.select(shard).order_by(shard.c.number))
    assert shard_states(db, found) == [states.DONE, states.READY, states.READY]
    assert {(r.crashes, r.errors, r.not_before) for r in rows} == {(0, 0, 0)}
    assert claimed(db, new_worker(db)).fence == 2


def test_what_is_given_back_unharmed_has_no_suspects(db: Database, me: str) -> None:
    planned_job(db, shards=1)
    leases.suspect(db, claimed(db, me), me, [4], killers=[2])
    assert leases.release_all(db, me) == 1
    again = claimed(db, me)
    assert again.checkpoint == {"killers": [2]}
    leases.suspect(db, again, me, [5], killers=[2])
    leases.retire(db, me)
    assert claimed(db, new_worker(db)).checkpoint == {"killers": [2]}


def test_a_worker_that_leaves_while_it_claims_crashed_nothing(
    db: Database, me: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saying goodbye waits for the claim, or the claim for it: no shard stays with somebody who is gone."""
    planned_job(db, shards=1)
    real = leases._candidates
    leaving = threading.Thread(target=leases.retire, args=(db, me))

    def candidates(*args: Any) -> Any:
        leaving.start()
        leaving.join(0.5)
        return real(*args)

    monkeypatch.setattr(leases, "_candidates", candidates)
    claim = claimed(db, me)
    leaving.join(10)
    assert leases.expire_shards(db) == 0
    row = shard_row(db, claim)
    assert (row.state, row.crashes) == (states.READY, 0)


def test_release_all_gives_back_what_a_lost_answer_leased(db: Database, me: str) -> None:
    planned_job(db, shards=3)
    other = new_worker(db)
    claimed(db, me), claimed(db, me)
    kept = claimed(db, other)
    assert leases.release_all(db, me) == 2
    assert leases.release_all(db, me) == 0
    assert shard_row(db, kept).state == states.LEASED
    assert row_of(db, worker, me).state == leases.LIVE


def test_a_dead_process_of_this_host_is_seen_at_once(db: Database) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = new_worker(db, pid=ended.pid, host=processes.host())
    elsewhere = new_worker(db, pid=ended.pid, host="another")
    alive = new_worker(db, pid=os.getpid(), host=processes.host())
    assert leases.expire_dead_processes(db) == [dead]
    assert leases.expire_dead_processes(db) == []
    assert [row_of(db, worker, w).state for w in (dead, elsewhere, alive)] == ["lost", "live", "live"]


# --- beat -----------------------------------------------------------------------------------------------------------


def beat(db: Database, worker_id: str, **changes: Any) -> leases.Orders:
    values: dict[str, Any] = {"progress": {}, "items": 0, "rate": 0.0, "model": ""}
    return leases.beat(db, worker_id, **{**values, **changes})


def test_a_beat_records_progress_and_lists_leases(db: Database, me: str) -> None:
    planned_job(db, shards=2)
    first, second = claimed(db, me), claimed(db, me)
    orders = beat(db, me, progress={first.shard_id: 7}, items=9, rate=1.5, model="m")
    assert orders == leases.Orders(True, False, frozenset(), {first.shard_id: 1, second.shard_id: 1})
    row = row_of(db, worker, me)
    assert row.progress == {str(first.shard_id): 7}
    assert (row.done_items, row.rate, row.model) == (9, 1.5, "m")


def test_orders_drain_drop_and_dead(db: Database, me: str) -> None:
    jobs = [planned_job(db, shards=1) for _ in range(3)]
    claims = [claimed(db, me) for _ in jobs]
    assert beat(db, me).dropped == frozenset()
    lifecycle.pause(db, jobs[0].id)
    lifecycle.cancel(db, jobs[1].id)
    assert beat(db, me).dropped == {jobs[0].id, jobs[1].id}
    execute(db, sa.update(worker).values(desired=leases.DRAIN))
    assert beat(db, me).drain
    assert commit(db, claims[2], me)
    assert set(beat(db, me).leased) == {claims[0].shard_id, claims[1].shard_id}
    lose(db, me)
    before = row_of(db, worker, me)
    assert beat(db, me) == leases.Orders(alive=False)
    assert row_of(db, worker, me) == before, "a dead incarnation stays dead"
    assert beat(db, "unknown") == leases.Orders(alive=False)
    retired = new_worker(db)
    leases.retire(db, retired)
    assert not beat(db, retired).alive


# --- many at once ---------------------------------------------------------------------------------------------------


def test_threads_compute_every_shard_exactly_once(db: Database) -> None:
    found = planned_job(db, shards=200, size=2)
    workers = [new_worker(db) for _ in range(8)]

    def work(number: int) -> list[int]:
        mine = []
        while (claim := leases.claim(db, workers[number], "cpu", None)) is not None:
            assert commit(db, claim, workers[number])
            mine.append(claim.shard_id)
        return mine

    started = time.monotonic()
    done = together(work, 8)
    print(f"\n200 shards by 8 threads in {time.monotonic() - started:.2f} s")
    assert max(Counter(i for part in done for i in part).values()) == 1
    assert sum(map(len, done)) == 200
    assert {r.fence for r in db.query(sa.select(shard.c.fence))} == {1}
    assert count(db) == 400
    assert count(db, event, event.c.action == "claim") == 200
    assert lifecycle.finish(db, found.id) == states.DONE


def test_one_shard_wanted_by_all(db: Database) -> None:
    for _ in range(5):
        planned_job(db, shards=1)
        workers = [new_worker(db) for _ in range(8)]
        claims = together(lambda n, w=workers: leases.claim(db, w[n], "cpu", None), 8)  # type: ignore[misc]
        assert sum(c is not None for c in claims) == 1


def test_zombies_and_owners_race_for_the_commit(db: Database) -> None:
    planned_job(db, shards=10)
    zombie, owner = new_worker(db), new_worker(db)
    old = [claimed(db, zombie) for _ in range(10)]
    lose(db, zombie)
    make_due(db)
    new = [claimed(db, owner) for _ in range(10)]
    answers = together(lambda n: [commit(db, c, (zombie, owner)[n % 2]) for c in (old, new)[n % 2]], 4)
    assert not any(answers[0] + answers[2])
    assert [a + b for a, b in zip(answers[1], answers[3], strict=True)] == [1] * 10
    assert count(db) == 20
    assert {r.fence for r in db.query(sa.select(item.c.fence))} == {2}


def test_the_partial_indexes_serve(db: Database, me: str) -> None:
    planned_job(db, shards=3)
    leased = sa.select(shard.c.id).where(statements.is_in(states.LEASED), shard.c.worker_id == sa.bindparam("me"))
    both = lambda tx: (statements.lease_one(tx.dialect.name), leased)  # noqa: E731
    plans = db.transact(lambda tx: [_plan(tx, one, {"of": 1, "me": me}) for one in both(tx)])
    assert "ix_shard_ready" in plans[0]
    assert "ix_shard_leased" in plans[1]


def _plan(tx: Tx, statement: Any, bound: dict[str, Any]) -> str:
    """How the database would run a statement as the driver gets it, its values bound."""
    compiled = statement.compile(dialect=tx.dialect)
    given = compiled.construct_params(bound)
    if tx.dialect.name == "postgresql":
        tx.exec_driver_sql("set local enable_seqscan = off")  # in a table so small it would be right
        rows = tx.exec_driver_sql(f"explain {compiled}", given)
    else:
        values = tuple(given[name] for name in compiled.positiontup)
        rows = tx.exec_driver_sql(f"explain query plan {compiled}", values)
    return "\n".join(map(str, rows))


def test_a_lost_worker_frozen_within_a_message_keeps_no_lock(postgres_url: str) -> None:
    """Its session waits for the rest of a COPY, which no timeout of the server ends; others' sessions stay."""
    assert len(processes.session_of("h" * 200, 2**31)) < 64, "Postgres would cut the name"
    with opened(postgres_url) as db:
        me, other = new_worker(db), new_worker(db)
        own = db.query(sa.select(worker.c.host, worker.c.pid).where(worker.c.id == me))[0]
        frozen = Database(postgres_url, session=processes.session_of(own.host, own.pid))
        execute(db, sa.update(worker).where(worker.c.id == other).values(pid=1))
        with frozen.engine.connect() as connection:
            raw: Any = connection.connection.driver_connection
            with pytest.raises(Exception, match="terminating connection"), raw.cursor() as cursor:  # noqa: PT012
                cursor.execute("UPDATE worker SET model = 'locked' WHERE id = %s", (other,))
                with cursor.copy("COPY item_label (item_id, label, recipe_id, objects, top_score) FROM STDIN"):
                    assert leases.end_sessions(db, [other]) == 0
                    assert leases.end_sessions(db, []) == 0
                    execute(db, sa.update(worker).where(worker.c.id == me).values(heartbeat_at=0))
                    Reconciler(db, Settings(lease_seconds=1)).expire()
                    execute(db, sa.update(worker).where(worker.c.id == other).values(model="free"))
            connection.invalidate()
        frozen.close()
        assert db.query(sa.select(worker.c.model).where(worker.c.id == other))[0].model == "free"
