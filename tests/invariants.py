"""What must hold after anything that may happen, from raw SQL and a full listing, without the product's readers."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow.parquet as pq
import sqlalchemy as sa

from storage.errors import ImagemillError
from storage.objects import Store, open_store
from storage.settings import Settings

_POSITION_BITS = 16


def rows(url: str, sql: str, **values: Any) -> list[Any]:
    """The rows of one SELECT on a database URL."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.connect() as connection:
            return list(connection.execute(sa.text(sql), values).fetchall())
    finally:
        engine.dispose()


Keys = Collection[str] | Mapping[str, Collection[str]]


def check(
    database_url: str,
    store_url: str,
    settings: Settings,
    *,
    keys: Keys,
    ended: bool = True,
    lost: Collection[int] = (),
) -> None:
    """Assert the invariants over every job of a database.

    Args:
        keys: of the dataset as it is now, when all jobs are over one dataset; else by dataset.
        ended: every job must have ended, and completely.
        lost: shards whose object somebody has deleted or changed.
    """
    store = open_store(store_url, settings)
    listed = {stat.key for stat in store.list("jobs/")}
    shards = rows(database_url, "SELECT * FROM shard ORDER BY id")
    items = rows(database_url, "SELECT * FROM item ORDER BY id")
    by_shard: dict[int, list[Any]] = {}
    for item in items:
        by_shard.setdefault(item.shard_id, []).append(item)
    for shard in [shard for shard in shards if shard.id not in lost]:
        _check_shard(store, listed, shard, by_shard.get(shard.id, []))
    _check_once(items)
    if not lost:
        _check_labels(database_url, store, shards)
    if ended:
        for job in rows(database_url, "SELECT * FROM job"):
            _check_job(job, [s for s in shards if s.job_id == job.id], items)
        _check_current(database_url, items, keys)
    _check_orphans(listed, shards)
    check_history(database_url, shards)


def _check_current(database_url: str, items: list[Any], keys: Keys) -> None:
    """A recipe that has been brought to its end has one current row for each image; one that has not, one at most."""
    ended = "SELECT 1 FROM job WHERE recipe_id = recipe.id AND \"only\" = '' AND state LIKE 'done%'"
    for recipe in rows(database_url, f"SELECT id, dataset, EXISTS ({ended}) AS complete FROM recipe"):  # noqa: S608
        wanted = Counter(keys[recipe.dataset] if isinstance(keys, Mapping) else keys)
        found = Counter(i.key for i in items if i.recipe_id == recipe.id and i.current and i.pruned_at is None)
        assert not found - wanted, f"recipe {recipe.id} has current rows of no image, or twice"
        assert found == wanted or not recipe.complete, f"recipe {recipe.id}: an image has no current row"


def mismatches(database_url: str, store_url: str, settings: Settings) -> list[str]:
    """What does not agree, one line each, over every job of a database, whether it has ended or not."""
    store = open_store(store_url, settings)
    listed = {stat.key for stat in store.list("jobs/")}
    shards = rows(database_url, "SELECT * FROM shard ORDER BY id")
    items = rows(database_url, "SELECT * FROM item ORDER BY id")
    by_shard: dict[int, list[Any]] = {}
    for item in items:
        by_shard.setdefault(item.shard_id, []).append(item)
    checks: list[tuple[Any, ...]] = [(_check_once, items), (_check_labels, database_url, store, shards)]
    checks += [(_check_shard, store, listed, shard, by_shard.get(shard.id, [])) for shard in shards]
    checks.append((_check_orphans, listed, shards))
    found = []
    for check_one, *arguments in checks:
        try:
            check_one(*arguments)
        except (AssertionError, ImagemillError) as error:
            found.append(f"{check_one.__name__}: {error}"[:500])
    return found


def _check_shard(store: Store, listed: set[str], shard: Any, items: list[Any]) -> None:
    """A committed shard: its object is there, is what was written, and says what the rows say."""
    if shard.state not in ("done", "quarantined"):
        assert not items, f"shard {shard.id} is {shard.state} and has {len(items)} rows"
        return
    assert shard.result_key in listed, f"object {shard.result_key} of shard {shard.id} is missing"
    data = store.get(shard.result_key)
    same = (hashlib.sha256(data).hexdigest(), len(data)) == (shard.result_sha256, shard.result_bytes)
    assert same, f"object {shard.result_key} is not what was committed"
    table = pq.read_table(io.BytesIO(data)).to_pylist()
    _check_blobs(store, listed, shard, table)
    manifest = pq.read_table(io.BytesIO(store.get(shard.manifest_key))).to_pylist()
    assert (
        [r["position"] for r in table]
        == list(range(shard.size))
        == [i.id - (shard.id << _POSITION_BITS) for i in items]
    )
    assert [r["key"] for r in table] == [m["key"] for m in manifest] == [i.key for i in items]
    assert [r["ok"] for r in table] == [bool(i.ok) for i in items]
    assert [r["fingerprint"] for r in table] == [i.fingerprint for i in items]
    assert {i.fence for i in items} == {shard.fence}, "all rows of a shard carry the committed fence"
    assert shard.results + shard.failures == shard.size
    assert shard.results == sum(bool(i.ok) for i in items)


def _check_blobs(store: Store, listed: set[str], shard: Any, table: list[dict[str, Any]]) -> None:
    """Every file that a committed shard names is there, is what was written, and is its own attempt's."""
    attempt = shard.result_key.split("/")[:4]
    for row in (row for row in table if row.get("blob")):
        beside = row["blob"].startswith("blobs/")
        key = f"{shard.result_key.rpartition('/')[0]}/{row['blob']}" if beside else row["blob"]
        assert key.split("/")[:4] == attempt, f"file {key} of shard {shard.id} is another attempt's"
        assert key in listed, f"file {key} of shard {shard.id} is missing"
        assert hashlib.sha256(store.get(key)).hexdigest() == row["sha256"], f"file {key} is not what was made"


def _check_once(items: list[Any]) -> None:
    doubled = [k for k, n in Counter((i.recipe_id, i.key, i.job_id) for i in items).items() if n > 1]
    assert not doubled, f"counted twice: {doubled[:5]}"
    current = [k for k, n in Counter((i.recipe_id, i.key) for i in items if i.current).items() if n > 1]
    assert not current, f"two current rows: {current[:5]}"


def _check_labels(database_url: str, store: Store, shards: list[Any]) -> None:
    """The label counts of the index are those of the objects."""
    found = {(r.item_id, r.label): r.objects for r in rows(database_url, "SELECT * FROM item_label")}
    expected: Counter[tuple[int, str]] = Counter()
    for shard in shards:
        if shard.result_key is None:
            continue
        for row in pq.read_table(io.BytesIO(store.get(shard.result_key))).to_pylist():
            for label in row.get("labels") or []:
                expected[((shard.id << _POSITION_BITS) | row["position"], label)] += 1
    assert found == dict(expected)


def _check_job(job: Any, shards: list[Any], items: list[Any]) -> None:
    assert job.finished_at is not None, f"job {job.id} is {job.state}: {job.reason}"
    results, failures = sum(s.results for s in shards), sum(s.failures for s in shards)
    own = [i for i in items if i.job_id == job.id]
    assert len(own) == results + failures
    assert failures == sum(not i.ok for i in own)
    if job.state != "cancelled":
        assert job.planned == results + failures, f"planned {job.planned}, results {results}, failures {failures}"
        assert job.state == ("done with failures" if failures else "done")
        assert {s.state for s in shards} <= {"done", "quarantined"}


def _check_orphans(listed: set[str], shards: list[Any]) -> None:
    """What nobody refers to lies under an attempt's own prefix or beside a manifest, never where readers look."""
    referenced = {s.result_key for s in shards} | {s.manifest_key for s in shards}
    for key in listed - referenced:
        parts = key.split("/")
        assert parts[2] == "manifests" or parts[3].startswith("a"), f"unexpected object {key}"


def check_history(database_url: str, shards: list[Any]) -> None:
    """The history of every shard has one owner at a time, and nothing happens after the end of a shard or a job."""
    events: dict[int, list[Any]] = {}
    ends: Counter[int] = Counter()
    for event in rows(database_url, "SELECT * FROM event ORDER BY id"):
        if event.shard_id is not None:
            assert not ends[event.job_id], f"{event.action} of shard {event.shard_id} after its job's end"
            events.setdefault(event.shard_id, []).append(event)
        ends[event.job_id] += event.action == "finish"
    assert max(ends.values(), default=0) <= 1, "a job ended twice"
    for shard in shards:
        _check_owners(shard, events.get(shard.id, []))


_ENDINGS = ("commit", "release", "fail", "expire")


def _check_owners(shard: Any, events: list[Any]) -> None:
    """Claims carry the fences 1, 2, 3 ...; each ends once, by its own owner or by expiry, before the next begins."""
    owner: tuple[int, str] | None = None
    fence = 0
    counts: Counter[str] = Counter()
    for event in events:
        assert not counts["commit"], f"{event.action} of shard {shard.id} after its commit"
        counts[event.action] += 1
        if event.action == "claim":
            assert owner is None, f"shard {shard.id} claimed while {owner} had it"
            fence += 1
            assert event.fence == fence, f"shard {shard.id}: claim {fence} has fence {event.fence}"
            owner = (event.fence, event.worker_id)
        elif event.action in _ENDINGS:
            same = (event.fence, event.worker_id) == owner
            assert same, f"{event.action} of shard {shard.id} by another than its owner {owner}"
            owner = None
    assert (shard.fence, shard.attempts) == (fence, fence)
    assert (owner is not None) == (shard.state == "leased")
    assert counts["commit"] == (shard.state in ("done", "quarantined"))
    crashed = shard.crash_workers or []
    crashed = json.loads(crashed) if isinstance(crashed, str) else crashed  # SQLite keeps JSON as text
    assert counts["expire"] == shard.crashes == len(crashed)
    assert counts["fail"] == shard.errors
