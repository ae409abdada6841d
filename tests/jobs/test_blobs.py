"""Blobs beside result objects: the collector keeps those that belong to something, and an audit reads each of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import sqlalchemy as sa

from jobs import collect, leases, lifecycle, verify
from jobs.leases import Claim
from jobs.lifecycle import Job
from storage import objects, shardfile
from storage.database import Database
from storage.objects import Store
from storage.results import image
from storage.settings import Settings
from storage.shardfile import Outcome, Written
from storage.tables import item
from tests.support import claimed, count, new_worker, opened, outcome, planned_job


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    with opened(database_url) as found:
        yield found


@pytest.fixture
def store(store_url: str) -> Store:
    return objects.open_store(store_url)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in the store is old."""
    monkeypatch.setattr(collect, "_clock", lambda store: time.time() + 1e6)


def images(claim: Claim, failed: Sequence[int] = ()) -> list[Outcome]:
    """One image for each item of a shard, and failures."""
    found = []
    for i in range(claim.items):
        made = image.made(f"{claim.shard_id}-{i}".encode(), "png", 8, 8, {"prompt": f"a cat {i}"})
        found.append(outcome(i, f"{claim.number}-{i}", failed=i in failed, **({} if i in failed else {"result": made})))
    return found


def write(store: Store, claim: Claim, nonce: str, outcomes: Sequence[Outcome]) -> Written:
    """The object and the blobs of an attempt: the first item's put when it was made, the others with the object."""
    attempt = f"jobs/{claim.job_id}/{claim.number:07d}/a{claim.fence}-{nonce}/"
    first = replace(outcomes[0], result=shardfile.put_blob(store, attempt, outcomes[0].result))
    return shardfile.write(store, f"{attempt}{nonce}/", "image", [first, *outcomes[1:]], {}, attempt)


def finished(db: Database, store: Store, shards: int = 2, size: int = 3) -> tuple[Job, list[Written]]:
    """A job of generated images at its end; the second item of each shard failed."""
    job = planned_job(db, shards=shards, size=size, kind="image")
    worker = new_worker(db)
    written = []
    for _ in range(shards):
        claim = claimed(db, worker)
        outcomes = images(claim, failed=[1])
        written.append(write(store, claim, "00000001", outcomes))
        assert leases.commit(db, claim, worker, written[-1], outcomes)
    lifecycle.finish(db, job.id)
    return job, written


def keys(store: Store) -> set[str]:
    return {stat.key for stat in store.list("jobs/")}


def test_the_collector_takes_blobs_of_orphans_and_no_others(db: Database, store: Store, later: None) -> None:
    job, written = finished(db, store)
    good = keys(store)
    assert len(good) == 2 + 4
    attempt = written[0].key.rpartition("00000001/")[0]
    mine = [key for key in good if key.startswith(attempt)]
    for key in mine:  # an attempt that never committed, and one that broke off before its object
        store.put(key.replace("00000001", "0000dead"), store.get(key))
        if "/blobs/" in key:
            store.put(key.replace("00000001", "0000beef"), store.get(key))
    assert len(keys(store)) == len(good) + 3 + 2
    dry = collect.collect(db, store, Settings(), dry_run=True)
    report = collect.collect(db, store, Settings())
    assert (dry.objects, dry.bytes) == (report.objects, report.bytes)
    assert report.objects == 5
    assert keys(store) == good
    assert list(verify.verify(db, store, job.id)) == []


def test_the_collector_keeps_what_a_drained_shard_goes_on_with(db: Database, store: Store, later: None) -> None:
    planned_job(db, shards=1, size=4, kind="image")
    worker = new_worker(db)
    claim = claimed(db, worker)
    old = write(store, claim, "0000aaaa", images(claim)[:1])
    partial = write(store, claim, "0000bbbb", images(claim)[:3])
    assert collect.collect(db, store, Settings()).objects == 0, "the attempt still holds its lease"
    leases.release(db, claim, worker, {"partial": partial.key, "sha256": partial.sha256})
    assert collect.collect(db, store, Settings()).objects == 2
    assert {key.split("/")[3] for key in keys(store)} == {partial.key.split("/")[3]} != {old.key.split("/")[3]}
    back, _ = shardfile.read(store, partial.key, partial.sha256)
    data = [o.result.data for o in shardfile.filled(store, partial.key, back) if o.result]
    assert data == [f"{claim.shard_id}-{i}".encode() for i in range(3)]


def test_the_collector_takes_other_objects_of_an_attempt_that_committed(
    db: Database, store: Store, later: None
) -> None:
    """A try whose answer was lost has left an object and blobs beside it; those put before are the whole attempt's."""
    _, (written, _) = finished(db, store)
    good = keys(store)
    beside = next(key for key in good if key.startswith(written.key.replace("items.parquet", "blobs")))
    for key in (written.key, beside):
        store.put(key.replace("/00000001/", "/0000cafe/"), store.get(key))
    assert collect.collect(db, store, Settings()).objects == 2
    assert keys(store) == good


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_an_audit_reads_the_blobs_and_repair_has_them_made_again(db: Database, store: Store, damage: str) -> None:
    job, written = finished(db, store)
    assert list(verify.verify(db, store, job.id)) == []
    outcomes, _ = shardfile.read(store, written[1].key)
    blob = shardfile.blob_key(written[1].key, outcomes[2].result)
    if damage == "missing":
        store.delete([blob])
    else:
        store.put(blob, b"other bytes")
    (problem,) = verify.verify(db, store, job.id)
    assert (problem.what, problem.detail) == (f"object-{damage}", blob)
    done = verify.repair(db, store, job.id)
    assert (done.rows, done.again) == (0, 3)
    assert done.job_id is not None
    assert count(db, item, item.c.retry, item.c.shard_id == problem.shard_id) == 3


def test_a_blob_that_nothing_reads_any_more_is_no_problem(db: Database, store: Store) -> None:
    """After a repair the old job's blobs are as good as gone, and its audit says nothing of them."""
    job, written = finished(db, store, shards=1)
    db.transact(lambda tx: tx.execute(sa.update(item).values(current=False)) and None)
    outcomes, _ = shardfile.read(store, written[0].key)
    store.delete([shardfile.blob_key(written[0].key, outcomes[0].result)])
    assert list(verify.verify(db, store, job.id)) == []
