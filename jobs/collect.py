"""Takes away what nobody needs: objects of attempts that never committed, broken-off uploads, rows of pruned images.

Never an object that a row refers to or a blob of its attempt, never one young enough to belong to an attempt that still
runs, never one of a job that this database does not know, or whose number another database has given too (several
may share a bucket).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from jobs import owners, states
from storage import shardfile
from storage.database import Database, Tx, db_now
from storage.errors import StoreFull
from storage.objects import Stat, Store
from storage.settings import Settings
from storage.tables import MAX_SHARD_ITEMS, item, item_label, job, shard

log = logging.getLogger("imagemill.collect")


@dataclass
class Report:
    """What was taken away, or with dry_run would be."""

    objects: int = 0
    bytes: int = 0
    uploads: int = 0
    rows: int = 0


def collect(db: Database, store: Store, settings: Settings, *, dry_run: bool = False) -> Report:
    """One pass over all jobs."""
    report = Report()
    now = _clock(store)
    age_s = max(settings.orphan_hours * 3600, 10 * settings.lease_seconds)
    for job_id, created_at in db.query(sa.select(job.c.id, job.c.created_at).order_by(job.c.id)):
        _collect_objects(db, store, job_id, created_at, now - age_s, report, dry_run)
    _collect_rows(db, age_s, report, dry_run)
    abort = getattr(store, "abort_uploads", None)
    if abort is not None:
        report.uploads = abort(now - age_s, dry_run=dry_run)
    return report


def _clock(store: Store) -> float:
    """Now, by the clock that stamps the store's objects: this machine's own may be wrong."""
    key = f"clock/{uuid.uuid4().hex}"
    try:
        store.put(key, b"")
        stat = store.stat(key)
    except StoreFull:
        return time.time()  # a full disk takes no mark, and needs this collection most
    finally:
        store.delete([key])
    return stat.modified if stat is not None else 0.0


def _collect_objects(
    db: Database, store: Store, job_id: int, created_at: float, before: float, report: Report, dry_run: bool
) -> None:
    # What is there is listed first and what is referred to is read after: an attempt that commits between the two is
    # then seen as referred to. In the other order its object could be taken away.
    old = [stat for stat in store.list(f"jobs/{job_id}/") if stat.modified < before]
    if not old:
        return
    if owners.is_shared(store, job_id, created_at):
        log.warning("another database has a job %d in %s: what lies there is left alone", job_id, store.url)
        return
    kept, blobs, busy = _referred(db, job_id)
    orphans = [
        stat for stat in old if stat.key not in kept and _folder(stat.key) not in blobs and not _may_run(stat, busy)
    ]
    report.objects += len(orphans)
    report.bytes += sum(stat.size for stat in orphans)
    if orphans and not dry_run:
        store.delete(stat.key for stat in orphans)


def _referred(db: Database, job_id: int) -> tuple[set[str], set[str], set[str]]:
    """(manifests and objects, folders of their blobs, prefixes of attempts that hold a lease now)."""
    columns = (
        shard.c.number,
        shard.c.fence,
        shard.c.state,
        shard.c.manifest_key,
        shard.c.result_key,
        shard.c.checkpoint,
    )
    kept: set[str] = set()
    blobs: set[str] = set()
    busy: set[str] = set()
    for row in db.query(sa.select(*columns).where(shard.c.job_id == job_id)):
        kept.add(row.manifest_key)
        for key in (row.result_key, (row.checkpoint or {}).get("partial")):
            if key is not None:
                kept.add(key)
                blobs |= shardfile.blob_folders(key)
        if row.state == states.LEASED:
            busy.add(f"jobs/{job_id}/{row.number:07d}/a{row.fence}-")
    return kept, blobs, busy


def _folder(key: str) -> str:
    return f"{key.rpartition('/')[0]}/"


def _may_run(stat: Stat, busy: set[str]) -> bool:
    return any(stat.key.startswith(prefix) for prefix in busy)


def _collect_rows(db: Database, age_s: float, report: Report, dry_run: bool) -> None:
    """Rows of images that left the dataset long ago."""
    for ids in _pruned(db, age_s):
        report.rows += len(ids) if dry_run else db.transact(lambda tx, ids=ids: _delete_rows(tx, ids, age_s))  # type: ignore[misc]


def _pruned(db: Database, age_s: float) -> Iterator[list[int]]:
    after = -1
    while True:
        where = (_long_gone(age_s), item.c.id > after)
        rows = db.query(sa.select(item.c.id).where(*where).order_by(item.c.id).limit(2000))
        if not rows:
            return
        yield [row.id for row in rows]
        after = rows[-1].id


def _long_gone(age_s: float) -> sa.ColumnElement[bool]:
    return item.c.pruned_at < db_now() - age_s


def _delete_rows(tx: Tx, ids: list[int], age_s: float) -> int:
    """Delete rows; returns how many. Each shard remembers its own, so that an audit can tell this from a loss."""
    # Asked again in the DELETE itself: an image may have come back since its row was listed.
    where = (item.c.id.in_(ids), _long_gone(age_s))
    gone = [row.id for row in tx.execute(sa.delete(item).where(*where).returning(item.c.id))]
    tx.execute(sa.delete(item_label).where(item_label.c.item_id.in_(gone)))
    counts: dict[int, int] = {}
    for row_id in gone:
        counts[row_id // MAX_SHARD_ITEMS] = counts.get(row_id // MAX_SHARD_ITEMS, 0) + 1
    for shard_id, count in counts.items():
        tx.execute(sa.update(shard).where(shard.c.id == shard_id).values(collected=shard.c.collected + count))
    return len(gone)
