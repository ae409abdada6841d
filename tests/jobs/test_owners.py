"""Two databases that share a store: each has a job 1, and neither takes away what belongs to the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import collect, leases, lifecycle, plan, verify
from storage import shardfile
from storage.database import Database
from storage.objects import Store, open_store
from storage.settings import Settings
from storage.shardfile import Outcome, read_manifest
from tests.support import claimed, fill, new_worker, opened, result, spec


@pytest.fixture
def databases(tmp_path: Path) -> Iterator[list[Database]]:
    with opened(f"sqlite:///{tmp_path}/a.db") as a, opened(f"sqlite:///{tmp_path}/b.db") as b:
        yield [a, b]


def brought_up_to_date(db: Database, store: Store, folder: Path) -> None:
    """One job, planned and computed, its objects in the store."""
    job, _ = lifecycle.submit(db, spec(str(folder)))
    plan.plan(db, store, Settings(), job)
    worker = new_worker(db)
    claim = claimed(db, worker)
    rows = read_manifest(store, claim.manifest_key)
    outcomes = [Outcome(i, *row[:3], 1, 1, result(0.5), None) for i, row in enumerate(rows)]
    prefix = f"jobs/{job.id}/{claim.number:07d}/a{claim.fence}-{worker}/"
    done = shardfile.write(store, prefix, "detections", outcomes, {})
    assert leases.commit(db, claim, worker, done, outcomes)
    assert lifecycle.finish(db, job.id) == "done"


def test_the_collector_of_one_leaves_the_results_of_the_other(
    databases: list[Database], tmp_path: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(store_url, Settings())
    folder = fill(tmp_path / "data", ["a.jpg", "b.jpg"])
    for db in databases:
        brought_up_to_date(db, store, folder)
    monkeypatch.setattr(collect, "_clock", lambda store: time.time() + 1e6)
    for db in databases:
        assert collect.collect(db, store, Settings()).objects == 0
    for db in databases:
        assert list(verify.verify(db, store, 1)) == []


def test_orphans_of_a_job_that_only_one_database_has_are_collected(
    databases: list[Database], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store((tmp_path / "store").as_uri())
    brought_up_to_date(databases[0], store, fill(tmp_path / "data", ["a.jpg"]))
    store.put("jobs/1/0000000/a9-dead/items.parquet", b"of an attempt that died")
    monkeypatch.setattr(collect, "_clock", lambda store: time.time() + 1e6)
    assert collect.collect(databases[0], store, Settings()).objects == 1
    assert list(verify.verify(databases[0], store, 1)) == []
