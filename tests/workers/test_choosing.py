"""Choosing: how long a job is shows while it is listed, and only long ones are measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import lifecycle
from jobs.leases import Claim
from jobs.lifecycle import NewShard, Planned
from jobs.spec import AUTO
from storage.database import Database
from tests import support
from tests.support import claimed, new_worker, opened, planned_job
from workers import choosing
from workers.choosing import LEAST_ITEMS, Choosing
from workers.loaded import Loaded
from workers.models import Prepared


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database with tables."""
    with opened(database_url) as database:
        yield database


def chooser(db: Database) -> Choosing:
    """Of a worker whose every model has a network."""
    models: Any = SimpleNamespace(get=lambda spec, in_use: SimpleNamespace(networks=True))
    return Choosing(db, models, "cpu", 15, lambda: None)


def test_the_end_of_a_listing_is_waited_for(db: Database) -> None:
    """The first shard is claimed when little is planned; what comes a moment later counts too."""
    job = planned_job(db, shards=1, size=64, end=False, runtime=AUTO)
    claim = claimed(db, new_worker(db))
    more = [NewShard(f"more-{i}", 64, 0) for i in range(5)]
    later = threading.Timer(0.3, lambda: lifecycle.add_shards(db, job.id, "planner", 64, more, Planned(384, 0, 0)))
    later.start()
    assert chooser(db).settled(claim, set) is None, "it must be measured"
    later.join()
    assert 64 < LEAST_ITEMS <= 384


def test_a_job_that_stays_small_is_run_as_usual(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "LISTING_S", 0.5)
    for end in (True, False):
        planned_job(db, shards=1, size=64, end=end, runtime=AUTO)
        claim = claimed(db, new_worker(db))
        chosen = chooser(db).settled(claim, set)
        assert chosen is not None
        assert chosen.runtime == "torch"


def test_a_model_is_timed_once_for_all_short_jobs(db: Database) -> None:
    """That a job is too short to be tuned shows without another look at its pictures when the model's pace is known."""
    pace, looks = 0.001, []

    def infer(batch: Sequence[Prepared]) -> list[Any]:
        time.sleep(pace * len(batch))
        return [support.result(1) for _ in batch]

    def sample(claim: Claim, loaded: Loaded, count: int) -> list[Prepared]:
        looks.append(claim.job_id)
        return [Prepared("g", number, 0) for number in range(8)]

    model = SimpleNamespace(infer=infer, close=lambda: None)
    models: Any = SimpleNamespace(
        get=lambda spec, in_use: SimpleNamespace(networks=True),
        apart=lambda spec, keeping=False: SimpleNamespace(model=model),
    )
    choosing = Choosing(db, models, "cpu", 15, lambda: None)
    first, second = (planned_job(db, shards=1, size=LEAST_ITEMS, runtime=AUTO, model="same") for _ in range(2))
    worker = new_worker(db)
    for job in (first, second):
        claim = claimed(db, worker)
        assert claim.job_id == job.id
        spec = choosing.settled(claim, set) or choosing.measure(claim, sample)
        assert (spec.runtime, spec.precision) == ("torch", "fp32")
    assert looks == [first.id]
