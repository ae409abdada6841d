"""The loop: tickets made good, leases expired but not after an outage, jobs ended, broken workers drained."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobs import leases, lifecycle, queue, reconcile, states
from jobs.reconcile import Reconciler, claimable
from storage.database import Database
from storage.errors import Misconfigured, Unavailable
from storage.settings import Settings
from storage.tables import job, shard, worker
from tests.services import HOST, free_ports
from tests.support import (
    actions,
    age,
    claimed,
    commit,
    count,
    execute,
    fill,
    job_row,
    make_due,
    new_worker,
    opened,
    planned_job,
    row_of,
    run_out,
    shard_row,
    shard_states,
    spec,
    together,
)


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database with tables."""
    with opened(database_url) as database:
        yield database


@pytest.fixture
def settings(broker_url: str, tmp_path: Path) -> Settings:
    """Settings with a real, empty broker."""
    return Settings(broker_url=broker_url, store_url=(tmp_path / "store").as_uri(), reconcile_seconds=0.1)


@pytest.fixture
def loop(db: Database, settings: Settings) -> Reconciler:
    """One copy of the loop."""
    return Reconciler(db, settings)


# --- tickets --------------------------------------------------------------------------------------------------------


def test_a_window_of_tickets_is_kept(db: Database, settings: Settings, loop: Reconciler) -> None:
    planned_job(db, shards=30)
    loop.round()
    assert queue.waiting(settings, "cpu") == 1, "one while no worker is known"
    for _ in range(3):
        new_worker(db)
    loop.round()
    assert queue.waiting(settings, "cpu") == 6
    loop.round()
    assert queue.waiting(settings, "cpu") == 6, "no more than the window"


def test_lost_tickets_are_made_good(db: Database, settings: Settings, loop: Reconciler) -> None:
    planned_job(db, shards=30)
    new_worker(db)
    loop.round()
    with queue.client(settings) as redis:
        redis.flushdb()
    assert queue.waiting(settings, "cpu") == 0
    loop.round()
    assert queue.waiting(settings, "cpu") == 2


def test_no_more_tickets_than_shards_and_none_for_what_cannot_be_claimed(
    db: Database, settings: Settings, loop: Reconciler
) -> None:
    for _ in range(4):
        new_worker(db)
    paused, cancelled, resting = (planned_job(db, shards=5) for _ in range(3))
    lifecycle.pause(db, paused.id)
    lifecycle.cancel(db, cancelled.id)
    execute(db, sa.update(shard).where(shard.c.job_id == resting.id).values(not_before=time.time() + 100))
    loop.round()
    assert queue.waiting(settings, "cpu") == 0
    make_due(db)
    execute(db, sa.update(shard).where(shard.c.number > 0).values(not_before=time.time() + 100))
    loop.round()
    assert queue.waiting(settings, "cpu") == 1


def test_each_queue_has_its_own_window(db: Database, settings: Settings) -> None:
    planned_job(db, shards=9, queue="gpu")
    planned_job(db, shards=9, queue="cpu")
    new_worker(db, "gpu-40g")
    new_worker(db, "gpu")
    assert reconcile.refill(db, settings) == 5
    assert (queue.waiting(settings, "gpu"), queue.waiting(settings, "cpu")) == (4, 1)
    assert reconcile.refill(db, settings, at_least=3) == 2
    assert reconcile.refill(db, settings) == 0


def test_dead_and_draining_workers_count_for_nothing(db: Database, settings: Settings) -> None:
    planned_job(db, shards=9)
    gone, draining = new_worker(db), new_worker(db)
    leases.retire(db, gone)
    leases.set_desired(db, draining, leases.DRAIN)
    assert reconcile.refill(db, settings) == 1


def test_a_job_on_a_queue_that_is_not_there_holds_up_no_other(
    db: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    planned_job(db, shards=1, queue="cpu")
    planned_job(db, shards=1, queue="tpu")
    planned_job(db, shards=1, queue="gpu")
    assert reconcile.refill(db, settings) == 2
    assert "tpu" in caplog.text


def test_copies_racing_keep_near_the_window(db: Database, settings: Settings) -> None:
    planned_job(db, shards=100)
    new_worker(db)
    together(lambda n: reconcile.refill(db, settings), 4)
    assert 2 <= queue.waiting(settings, "cpu") <= 8
    assert reconcile.refill(db, settings) == 0


def test_a_dead_broker_stops_nothing_else(db: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    settings = Settings(broker_url=f"redis://{HOST}:{port}/0")
    planned_job(db, shards=2)
    dead = new_worker(db)
    held = claimed(db, dead)
    age(db, dead, 1000)
    with pytest.raises(Unavailable):
        reconcile.refill(db, settings)
    Reconciler(db, settings).round()
    assert "no tickets could be published" in caplog.text
    assert shard_row(db, held).crashes == 1


# --- leases ---------------------------------------------------------------------------------------------------------


def test_expired_shards_are_given_out_again(db: Database, loop: Reconciler) -> None:
    planned_job(db, shards=2)
    dead, live = new_worker(db), new_worker(db)
    held, kept = claimed(db, dead), claimed(db, live)
    age(db, dead, 1000)
    loop.round()
    assert (shard_row(db, held).state, shard_row(db, held).crashes) == (states.READY, 1)
    assert (shard_row(db, kept).state, shard_row(db, kept).crashes) == (states.LEASED, 0)


def test_nobody_is_blamed_within_a_lease_of_an_outage(
    db: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned_job(db, shards=1)
    worker_id = new_worker(db)
    held = claimed(db, worker_id)
    loop = Reconciler(db, settings.model_copy(update={"lease_seconds": 1.0}))
    monkeypatch.setattr(leases, "expire_dead_processes", _unavailable)
    loop.round()
    monkeypatch.undo()
    age(db, worker_id, 1000)
    loop.round()
    assert shard_row(db, held).state == states.LEASED, "nobody could beat"
    leases.beat(db, worker_id, progress={}, items=0, rate=0, model="")
    time.sleep(1.1)
    loop.round()
    age(db, worker_id, 1000)
    loop.round()
    assert shard_row(db, held).crashes == 1, "now it is really silent"


def _unavailable(*args: object, **kwargs: object) -> None:
    raise Unavailable("the database is away")


def test_nobody_is_blamed_after_the_machine_slept_or_the_clock_was_set_forward(
    db: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned_job(db, shards=1)
    worker_id = new_worker(db)
    held = claimed(db, worker_id)
    loop = Reconciler(db, settings)
    loop.round()
    age(db, worker_id, 8 * 3600)
    real = Database.now
    monkeypatch.setattr(Database, "now", lambda self: real(self) + 8 * 3600)
    loop.round()
    assert shard_row(db, held).state == states.LEASED
    leases.beat(db, worker_id, progress={}, items=0, rate=0, model="")
    loop.round()
    assert row_of(db, worker, worker_id).state == leases.LIVE


def test_nothing_waits_for_a_clock_that_was_set_back(
    db: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written by the earlier clock lies hours ahead: a pause, a dead worker's last beat, a dead planner's."""
    planned_job(db, shards=2)
    planning, _ = lifecycle.submit(db, spec("/planning"))
    assert lifecycle.start_planning(db, planning.id, "elsewhere")
    dead, live = new_worker(db), new_worker(db)
    held, resting = claimed(db, dead), claimed(db, live)
    assert leases.fail(db, resting, live, "x")
    assert leases.claim(db, live, "cpu", None) is None, "its pause is not over yet"
    execute(db, sa.update(shard).where(shard.c.id == resting.shard_id).values(not_before=shard.c.not_before + 3600))
    execute(db, sa.update(worker).values(heartbeat_at=worker.c.heartbeat_at + 3600))
    execute(db, sa.update(job).values(planner_beat_at=job.c.planner_beat_at + 3600))
    assert claimable(db) == {"cpu": 1}
    assert claimed(db, live).shard_id == resting.shard_id
    loop = Reconciler(db, settings)
    loop.round()
    assert {row_of(db, worker, w).state for w in (dead, live)} == {leases.LIVE}, "nobody is blamed for the clock"
    assert lifecycle.abandoned_planning(db) == []
    age(db, dead, settings.lease_seconds + 1)
    execute(db, sa.update(job).values(planner_beat_at=job.c.planner_beat_at - lifecycle.PLANNER_LEASE_S - 1))
    assert lifecycle.abandoned_planning(db) == [planning.id]
    loop.expire()
    assert shard_row(db, held).state == states.READY
    assert row_of(db, worker, live).state == leases.LIVE


def test_a_new_loop_takes_back_what_was_left_long_ago(db: Database, settings: Settings) -> None:
    planned_job(db, shards=1)
    worker_id = new_worker(db)
    held = claimed(db, worker_id)
    age(db, worker_id, 1000)
    Reconciler(db, settings).round()
    assert shard_row(db, held).state == states.READY


def test_copies_racing_never_count_one_crash_twice(db: Database, settings: Settings) -> None:
    planned_job(db, shards=12)
    for _ in range(3):
        worker_id = new_worker(db)
        for _ in range(4):
            claimed(db, worker_id)
        age(db, worker_id, 1000)
    loops = [Reconciler(db, settings) for _ in range(4)]
    together(lambda n: [loops[n].round() for _ in range(3)], 4)
    assert {(row.crashes, row.state) for row in db.query(sa.select(shard))} == {(1, states.READY)}
    assert actions(db).count("expire") == 12


# --- jobs -----------------------------------------------------------------------------------------------------------


def test_jobs_are_ended_once_by_many_copies(db: Database, settings: Settings) -> None:
    worker_id = new_worker(db)
    done, cancelled, open_ = planned_job(db, shards=1), planned_job(db, shards=2), planned_job(db, shards=3)
    assert commit(db, claimed(db, worker_id), worker_id)
    execute(db, sa.update(job).where(job.c.id == cancelled.id).values(cancelled=True))
    loops = [Reconciler(db, settings) for _ in range(4)]
    together(lambda n: loops[n].round(), 4)
    assert [lifecycle.get(db, j.id).state for j in (done, cancelled, open_)] == ["done", "cancelled", "running"]
    assert shard_states(db, cancelled) == [states.CANCELLED] * 2
    assert actions(db).count("finish") == 2


def test_a_cancelled_job_with_a_held_shard_does_not_fill_the_history(db: Database, loop: Reconciler) -> None:
    found, worker_id = planned_job(db, shards=2), new_worker(db)
    claimed(db, worker_id)
    lifecycle.cancel(db, found.id)
    before = actions(db)
    for _ in range(3):
        loop.round()
    assert actions(db) == before


def test_a_job_that_fails_too_much_is_paused(db: Database, loop: Reconciler) -> None:
    found = planned_job(db, shards=3, size=60)
    execute(db, sa.update(job).values(max_failures=0.25))
    worker_id = new_worker(db)
    assert commit(db, claimed(db, worker_id), worker_id, failed=range(60))
    loop.round()
    assert not lifecycle.get(db, found.id).paused, "too few to judge by"
    assert commit(db, claimed(db, worker_id), worker_id)
    loop.round()
    paused = lifecycle.get(db, found.id)
    assert paused.paused
    assert "60 of 120 items failed" in paused.reason
    lifecycle.pause(db, found.id, paused=False)
    loop.round()
    assert not lifecycle.get(db, found.id).paused, "who resumes has seen it"
    assert run_out(db, found.id, worker_id) == states.DONE_WITH_FAILURES


def test_a_worker_whose_shards_all_fail_is_drained_if_others_do_not(db: Database, loop: Reconciler) -> None:
    planned_job(db, shards=10)
    bad, good = new_worker(db), new_worker(db)
    for _ in range(reconcile.BAD_SHARDS):
        loop.round()
        assert row_of(db, worker, bad).desired == leases.RUN
        assert commit(db, claimed(db, bad), bad, failed=[0, 1])
    leases.retire(db, good)
    loop.round()
    assert row_of(db, worker, bad).desired == leases.RUN, "perhaps it is the job"
    new_worker(db)
    loop.round()
    assert row_of(db, worker, bad).desired == leases.DRAIN


# --- planning that was left -----------------------------------------------------------------------------------------


def test_abandoned_planning_is_gone_on_with(db: Database, settings: Settings, tmp_path: Path) -> None:
    folder = fill(tmp_path / "data", [f"{i}.jpg" for i in range(5)])
    found, _ = lifecycle.submit(db, spec(str(folder)))
    loop = Reconciler(db, settings)
    loop.round()
    assert job_row(db, found).state == states.PLANNING, "nobody has begun; the client will"
    assert lifecycle.start_planning(db, found.id, "silent")
    loop.round()
    assert job_row(db, found).planner == "silent"
    execute(db, sa.update(job).values(planner_beat_at=job.c.planner_beat_at - 1000))
    loop.round()
    _wait(loop)
    row = job_row(db, found)
    assert (row.state, row.planned) == (states.RUNNING, 5)


def test_planning_that_cannot_be_done_here_holds_up_no_other(
    db: Database, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fill(tmp_path / "data", ["a.jpg"])
    for dataset in ("/not/on/this/machine/", str(folder)):
        found, _ = lifecycle.submit(db, spec(dataset))
        assert lifecycle.start_planning(db, found.id, "silent")
    loop = Reconciler(db, settings)
    for _ in range(4):
        execute(db, sa.update(job).values(planner="silent", planner_beat_at=0))
        loop.round()
        _wait(loop)
    assert [lifecycle.get(db, i).state for i in (1, 2)] == [states.PLANNING, states.RUNNING]
    assert caplog.text.count("could not be planned here") == 1


def _wait(loop: Reconciler) -> None:
    for thread in loop._planning.values():
        thread.join(30)


# --- the loop itself ------------------------------------------------------------------------------------------------


def test_the_loop_goes_on_whatever_a_round_meets(
    db: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    loop, stop, rounds = Reconciler(db, settings), threading.Event(), []

    def settle(self: Reconciler) -> None:
        rounds.append(1)
        if len(rounds) == 1:
            raise Unavailable("away")
        if len(rounds) == 2:
            raise Misconfigured("wrong")
        stop.set()

    monkeypatch.setattr(Reconciler, "settle", settle)
    thread = threading.Thread(target=loop.run, args=(stop,))
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert len(rounds) == 3
    assert "away" in caplog.text
    assert "wrong" in caplog.text
    assert count(db, shard) == 0
