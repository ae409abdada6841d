"""Holds a job's rows against its objects, and mends what can be mended without touching a final state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from jobs import lifecycle, states
from jobs.spec import JobSpec
from storage import index, results, shardfile
from storage.database import Database
from storage.errors import NotFound, Unavailable
from storage.objects import Store
from storage.shardfile import Outcome
from storage.tables import MAX_SHARD_ITEMS, item, item_label, job, shard

_FINAL = (states.DONE, states.QUARANTINED)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not agree.

    Attributes:
        what: "object-missing", "object-changed", "rows-missing", "rows-differ", "labels-differ", "count".
        shard_id: 0 when it is about the job as a whole.
    """

    what: str
    shard_id: int
    detail: str


def verify(db: Database, store: Store, job_id: int) -> Iterator[Problem]:
    """Every row of a job against its object and checksum, and planned = results + failures."""
    owner = db.query(sa.select(job).where(job.c.id == job_id))
    if not owner:
        raise NotFound(f"there is no job {job_id}; list them with: imagemill jobs")
    size = results_total = 0
    for row in _shards(db, job_id):
        size += row.size
        results_total += row.results + row.failures
        yield from _verify_shard(db, store, row, JobSpec.from_json(owner[0].spec).kind)
    ended = owner[0].state in (states.DONE, states.DONE_WITH_FAILURES)
    if size != results_total or (ended and owner[0].planned != results_total):
        yield Problem("count", 0, f"planned {owner[0].planned}, shards hold {size}, results + failures {results_total}")


@dataclass(frozen=True, slots=True)
class Repair:
    """What was mended.

    Attributes:
        rows: rows put back into the index from their objects.
        again: items whose object is lost or changed, to be computed again.
        job_id: of the job that does so; None where there is nothing to do, or where another job of the recipe has not
            ended: the next run does it then.
    """

    rows: int
    again: int
    job_id: int | None


def repair(db: Database, store: Store, job_id: int) -> Repair:
    """Put back missing rows from good objects; have the items of lost objects computed again by a new job."""
    owner = lifecycle.get(db, job_id)
    rows = again = 0
    for row in _shards(db, job_id):
        problems = list(_verify_shard(db, store, row, owner.spec.kind))
        if any(p.what.startswith("object") for p in problems):
            again += _mark_lost(db, row)
        elif problems:
            rows += _record_again(db, store, row, owner)
    new = None
    if again:
        new, _ = lifecycle.submit(db, owner.spec, name=f"repair of {job_id}", only="retry", priority=owner.priority)
    return Repair(rows, again, new.id if new and new.only == "retry" else None)


def _shards(db: Database, job_id: int) -> Iterator[Any]:
    after = -1
    while True:
        where = (shard.c.job_id == job_id, shard.c.state.in_(_FINAL), shard.c.number > after)
        rows = db.query(sa.select(shard).where(*where).order_by(shard.c.number).limit(500))
        yield from rows
        if len(rows) < 500:
            return
        after = rows[-1].number


def _verify_shard(db: Database, store: Store, row: Any, kind: str) -> Iterator[Problem]:
    try:
        outcomes, _ = shardfile.read(store, row.result_key, row.result_sha256)
    except NotFound:
        if not _computed_again(db, row):
            yield Problem("object-missing", row.id, row.result_key)
        return
    except Unavailable as error:
        if store.stat(row.result_key) is None:
            raise
        if not _computed_again(db, row):
            yield Problem("object-changed", row.id, str(error))
        return
    damaged = shardfile.damaged_blobs(store, row.result_key, outcomes)
    if damaged and not _computed_again(db, row):
        yield from (Problem(f"object-{state}", row.id, key) for key, state in damaged)
    found = {r.id - row.id * MAX_SHARD_ITEMS: r for r in db.query(sa.select(item).where(_ids(row.id)))}
    missing = [o for o in outcomes if o.position not in found]
    if len(missing) != row.collected:
        yield Problem("rows-missing", row.id, f"{len(missing)} of {len(outcomes)} items have no row")
    there = [o for o in outcomes if o.position in found]
    differ = [o.key for o in there if _differs(found[o.position], o, row.fence)]
    if differ or len(found) > len(there):
        yield Problem("rows-differ", row.id, f"{len(differ)} rows say other than the object, such as {differ[:1]}")
    if _labels(db, row.id) != _expected_labels(kind, row.id, there):
        yield Problem("labels-differ", row.id, "the label counts are not those of the object")


def _computed_again(db: Database, row: Any) -> bool:
    """Whether later jobs, such as that of a repair, have newer rows for all of a shard: nothing reads its object."""
    old = sa.or_(~item.c.current, item.c.pruned_at.is_not(None))
    count = sa.select(sa.func.count()).select_from(item).where(_ids(row.id), old)
    return bool(db.query(count)[0][0] == row.size - row.collected)


def _differs(row: Any, outcome: Outcome, fence: int) -> bool:
    said = (row.key, row.uri, row.fingerprint, row.ok, row.fence, row.width, row.height)
    meant = (outcome.key, outcome.uri, outcome.fingerprint, outcome.failure is None, fence)
    return said != (*meant, outcome.width, outcome.height)


def _labels(db: Database, shard_id: int) -> dict[tuple[int, str], int]:
    first = shard_id * MAX_SHARD_ITEMS
    where = (item_label.c.item_id >= first, item_label.c.item_id < first + MAX_SHARD_ITEMS)
    columns = (item_label.c.item_id, item_label.c.label, item_label.c.objects)
    return {(r.item_id, r.label): r.objects for r in db.query(sa.select(*columns).where(*where))}


def _expected_labels(kind: str, shard_id: int, outcomes: Sequence[Outcome]) -> dict[tuple[int, str], int]:
    summary = results.get(kind).summary
    return {
        (shard_id * MAX_SHARD_ITEMS + o.position, label): count
        for o in outcomes
        if o.failure is None
        for label, (count, _) in summary(o.result).labels.items()
    }


def _mark_lost(db: Database, row: Any) -> int:
    """The rows of a lost object are computed again by whatever runs next."""
    lost = sa.and_(_ids(row.id), item.c.current, item.c.pruned_at.is_(None))
    return db.transact(lambda tx: int(tx.execute(sa.update(item).where(lost).values(retry=True)).rowcount))


def _record_again(db: Database, store: Store, row: Any, owner: lifecycle.Job) -> int:
    """Make a shard's rows anew from its object; which of them are current is derived, not remembered."""
    outcomes, _ = shardfile.read(store, row.result_key, row.result_sha256)
    rows = index.rows_of(
        recipe_id=owner.recipe_id,
        job_id=row.job_id,
        shard_id=row.id,
        fence=row.fence,
        kind=owner.spec.kind,
        outcomes=outcomes,
    )

    def work(tx: Any) -> int:
        first = row.id * MAX_SHARD_ITEMS
        tx.execute(sa.delete(item_label).where(item_label.c.item_id.between(first, first + MAX_SHARD_ITEMS - 1)))
        tx.execute(sa.delete(item).where(_ids(row.id)))
        index.record(tx, rows)
        newer = sa.alias(item)
        superseded = sa.exists().where(
            newer.c.recipe_id == item.c.recipe_id, newer.c.key == item.c.key, newer.c.job_id > item.c.job_id
        )
        tx.execute(sa.update(item).where(_ids(row.id), superseded).values(current=False))
        index.supersede(tx, owner.recipe_id, row.job_id, [o.key for o in outcomes], older_only=True)
        return len(outcomes)

    return db.transact(work)


def _ids(shard_id: int) -> sa.ColumnElement[bool]:
    first = shard_id * MAX_SHARD_ITEMS
    return sa.and_(item.c.id >= first, item.c.id < first + MAX_SHARD_ITEMS)
