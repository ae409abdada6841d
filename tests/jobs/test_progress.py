"""The read-only questions: committed and live items apart, rates, workers, and jobs by number or name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from jobs import leases, lifecycle, progress, states
from storage.database import Database
from storage.errors import BadInput, NotFound
from storage.tables import job
from tests.support import age, claimed, commit, execute, make_due, new_worker, opened, planned_job, run_out


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database with tables."""
    with opened(database_url) as database:
        yield database


def beat(db: Database, worker_id: str, done: dict[int, int], rate: float, doing: str = "") -> None:
    leases.beat(db, worker_id, progress=done, items=sum(done.values()), rate=rate, model="m", doing=doing)


def test_committed_and_live_items_are_kept_apart(db: Database) -> None:
    found = planned_job(db, shards=5, size=10, name="pets", priority=2)
    first, second = new_worker(db), new_worker(db)
    assert commit(db, claimed(db, first), first, failed=[0, 1])
    one, two, three = claimed(db, first), claimed(db, first), claimed(db, second)
    beat(db, first, {one.shard_id: 4, two.shard_id: 1, 999: 50}, rate=2.0)
    beat(db, second, {three.shard_id: 5}, rate=3.0)
    status = progress.status(db, found.id)
    assert (status.results, status.failures, status.live, status.done) == (8, 2, 10, 20)
    assert (status.planned, status.rate, status.workers) == (50, 5.0, 2)
    assert status.time_left_s == pytest.approx(30 / 5)
    assert status.shards == {"done": 1, "leased": 3, "ready": 1}
    assert (status.name, status.priority, status.model, status.kind) == ("pets", 2, "m", "detections")
    assert (status.state, status.ended, status.dataset) == ("running", False, found.spec.dataset)


def test_workers_that_are_lost_count_for_nothing(db: Database) -> None:
    found, worker_id = planned_job(db), new_worker(db)
    claim = claimed(db, worker_id)
    beat(db, worker_id, {claim.shard_id: 1}, rate=1.0)
    age(db, worker_id, 1000)
    leases.expire_workers(db, 60)
    status = progress.status(db, found.id)
    assert (status.live, status.rate, status.workers, status.time_left_s) == (0, 0.0, 0, None)


def test_what_a_worker_does_meanwhile_is_told_of_its_jobs_only(db: Database) -> None:
    found, idle, worker_id = planned_job(db), planned_job(db), new_worker(db)
    claim = claimed(db, worker_id)
    jobs = {found.id: idle.id, idle.id: found.id}
    beat(db, worker_id, {}, rate=0, doing="loading m for onnx")
    assert progress.status(db, claim.job_id).doing == "loading m for onnx"
    assert progress.status(db, jobs[claim.job_id]).doing == ""
    assert [one.doing for one in progress.workers(db)] == ["loading m for onnx"]
    beat(db, worker_id, {claim.shard_id: 1}, rate=1)
    assert progress.status(db, claim.job_id).doing == ""


def test_errors_and_crashes_add_up(db: Database) -> None:
    found, worker_id = planned_job(db), new_worker(db)
    for _ in range(2):
        assert leases.fail(db, claimed(db, worker_id), worker_id, "x")
        make_due(db)
    claimed(db, worker_id)
    age(db, worker_id, 1000)
    leases.expire_workers(db, 60)
    leases.expire_shards(db)
    status = progress.status(db, found.id)
    assert (status.errors, status.crashes) == (2, 1)


def test_a_job_that_has_ended_shows_its_mean_rate(db: Database) -> None:
    found, worker_id = planned_job(db, shards=2, size=10), new_worker(db)
    run_out(db, found.id, worker_id)
    execute(db, sa.update(job).values(started_at=100, finished_at=110))
    status = progress.status(db, found.id)
    assert (status.state, status.ended, status.rate, status.time_left_s) == ("done", True, 2.0, None)
    assert status.done == status.planned == 20


def test_states_for_people(db: Database) -> None:
    found, worker_id = planned_job(db), new_worker(db)
    claimed(db, worker_id)
    lifecycle.pause(db, found.id, reason="why")
    assert (progress.status(db, found.id).state, progress.status(db, found.id).reason) == ("paused", "why")
    lifecycle.cancel(db, found.id)
    assert progress.status(db, found.id).state == "cancelling"
    empty = planned_job(db, shards=0, end=False)
    assert progress.status(db, empty.id).state == "planning"
    assert progress.status(db, empty.id).shards == {}


def test_lists_of_jobs(db: Database) -> None:
    assert progress.jobs(db) == []
    found = [planned_job(db, shards=0 if i == 1 else 1) for i in range(4)]
    lifecycle.finish(db, found[1].id)
    assert [s.id for s in progress.jobs(db)] == [4, 3, 2, 1]
    assert [s.id for s in progress.jobs(db, limit=2)] == [4, 3]
    assert [s.id for s in progress.jobs(db, active=True)] == [4, 3, 1]
    assert progress.jobs(db)[2].state == states.DONE


def test_jobs_by_number_name_and_latest(db: Database) -> None:
    for name in ("pets", "cars", "pets"):
        planned_job(db, name=name)
    assert [progress.find_job(db, text) for text in ("1", "pets", "cars", "latest")] == [1, 3, 2, 3]
    for text in ("77", "nothing", "-1", "9" * 30, "٣", "1.5", "pets' --"):
        if text == "٣":  # a digit to Python, and so the third job
            assert progress.find_job(db, text) == 3
            continue
        with pytest.raises(NotFound, match="list them with"):
            progress.find_job(db, text)
    with pytest.raises(BadInput):
        progress.find_job(db, "")
    with pytest.raises(NotFound):
        progress.status(db, 77)


def test_latest_of_nothing(db: Database) -> None:
    with pytest.raises(NotFound):
        progress.find_job(db, "latest")


def test_workers(db: Database) -> None:
    planned_job(db)
    first, second = new_worker(db, "gpu"), new_worker(db)
    claimed(db, second)
    beat(db, second, {}, rate=1.5)
    age(db, second, 7)
    found = {w.id: w for w in progress.workers(db)}
    assert set(found) == {first, second}
    assert (found[second].shards, found[second].rate, found[second].model, found[second].state) == (1, 1.5, "m", "live")
    assert 7 <= found[second].heartbeat_age_s < 10
    assert (found[first].shards, found[first].queue) == (0, "gpu")
    leases.retire(db, first)
    assert [w.id for w in progress.workers(db)] == [second]
    assert len(progress.workers(db, live_only=False)) == 2


def test_failures_by_reason(db: Database) -> None:
    found, worker_id = planned_job(db, shards=1, size=3), new_worker(db)
    assert progress.failures(db, found.id) == []
    assert commit(db, claimed(db, worker_id), worker_id, failed=[0, 2])
    assert progress.failures(db, found.id) == [("decode", "truncated", 2)]
