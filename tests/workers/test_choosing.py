"""Choosing: how long a job is shows while it is listed, and only long ones are measured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import lifecycle
from jobs.lifecycle import NewShard, Planned
from jobs.spec import AUTO
from storage.database import Database
from tests.support import claimed, new_worker, opened, planned_job
from workers import choosing
from workers.choosing import LEAST_ITEMS, Choosing


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
