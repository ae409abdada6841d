"""The rows that answer questions: record a shard's items in bulk; find and page through them.

A recipe's rows are insert-only. The newest row of a key is `current`; a row whose image left the dataset carries
`pruned_at` and is kept until it is collected.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from storage import results
from storage.database import Database, Tx, bulk_insert, db_now
from storage.errors import BadInput
from storage.tables import MAX_SHARD_ITEMS, item, item_id, item_label, job, shard

if TYPE_CHECKING:
    from storage.shardfile import Outcome

_FEW = 5000  # images with a label, which are then looked up by their ids
_IN_LIMIT = 5000  # values in one IN list; SQLite takes 32,766, Postgres 65,535

_ITEM_COLUMNS = (
    *("id", "recipe_id", "key", "job_id", "shard_id", "fence", "uri", "fingerprint", "current"),
    *("ok", "width", "height", "objects", "top_score", "stage", "reason", "message", "retry"),
)


@dataclass(frozen=True, slots=True)
class Known:
    """What the index holds of a key: enough to call it fresh or stale."""

    fingerprint: str
    retry: bool
    pruned: bool
    item_id: int


@dataclass(frozen=True, slots=True)
class Found:
    """One current item of a recipe, as the index knows it."""

    key: str
    uri: str
    fingerprint: str
    ok: bool
    width: int | None
    height: int | None
    count: int | None
    top_score: float | None
    stage: str | None
    reason: str | None
    message: str | None
    job_id: int
    shard_id: int
    position: int
    labels: dict[str, int]


# ------------------------------------------------------------------------------------------------ record


@dataclass(frozen=True, slots=True)
class Rows:
    """A shard's rows, ready to be inserted."""

    items: list[tuple[Any, ...]]
    labels: list[tuple[Any, ...]]


def rows_of(*, recipe_id: int, job_id: int, shard_id: int, fence: int, kind: str, outcomes: Sequence[Outcome]) -> Rows:
    """The rows of a shard's outcomes; made before the transaction that inserts them, which others wait for."""
    summarise = results.get(kind).summary
    rows = Rows([], [])
    for outcome in outcomes:
        row_id = item_id(shard_id, outcome.position)
        head = (row_id, recipe_id, outcome.key, job_id, shard_id, fence, outcome.uri, outcome.fingerprint, True)
        # SQLite takes numpy's numbers for bytes and would store those.
        size = (None, None) if outcome.width is None else (int(outcome.width), int(outcome.height))  # type: ignore[arg-type]
        failure = outcome.failure
        if failure is not None:
            reason = (failure.stage, failure.reason, failure.message, failure.retry)
            rows.items.append((*head, False, *size, None, None, *reason))
            continue
        summary = summarise(outcome.result)
        top = None if summary.top_score is None else float(summary.top_score)
        rows.items.append((*head, True, *size, int(summary.count), top, None, None, None, None))
        for label, (objects, score) in summary.labels.items():
            rows.labels.append((row_id, label, recipe_id, int(objects), float(score)))
    return rows


def record(tx: Tx, rows: Rows) -> None:
    """Insert a shard's rows. A second row for the same (job, key) is an error, never an overwrite."""
    bulk_insert(tx, item, _ITEM_COLUMNS, rows.items)
    bulk_insert(tx, item_label, ("item_id", "label", "recipe_id", "objects", "top_score"), rows.labels)


def supersede(tx: Tx, recipe_id: int, job_id: int, keys: Sequence[str], *, older_only: bool = False) -> None:
    """Mark the rows that other (or only older) jobs left for these keys as no longer current."""
    others = item.c.job_id < job_id if older_only else item.c.job_id != job_id
    for part in _parts(keys):
        where = (item.c.recipe_id == recipe_id, item.c.key.in_(part), others, item.c.current)
        tx.execute(sa.update(item).where(*where).values(current=False))


# ------------------------------------------------------------------------------------------------ freshness


def has_items(db: Database, recipe_id: int) -> bool:
    """Whether any row of a recipe exists."""
    return bool(db.query(sa.select(item.c.id).where(item.c.recipe_id == recipe_id).limit(1)))


def known(db: Database, recipe_id: int, keys: Sequence[str]) -> dict[str, Known]:
    """What is current for these keys."""
    columns = (item.c.key, item.c.fingerprint, item.c.retry, item.c.pruned_at, item.c.id)
    answer: dict[str, Known] = {}
    for part in _parts(keys):
        where = (item.c.recipe_id == recipe_id, item.c.key.in_(part), item.c.current)
        for key, fingerprint, retry, pruned_at, row_id in db.query(sa.select(*columns).where(*where)):
            answer[key] = Known(fingerprint, bool(retry), pruned_at is not None, row_id)
    return answer


def current_keys(db: Database, recipe_id: int, page: int = 20_000) -> Iterator[list[tuple[str, int]]]:
    """Pages of (key, item id) of every current, unpruned row, sorted by key."""
    after: str | None = None
    where = [item.c.recipe_id == recipe_id, item.c.current, item.c.pruned_at.is_(None)]
    while True:
        more = [] if after is None else [item.c.key > after]
        rows = db.query(sa.select(item.c.key, item.c.id).where(*where, *more).order_by(item.c.key).limit(page))
        if not rows:
            return
        yield [(key, row_id) for key, row_id in rows]
        after = rows[-1][0]


def mark_pruned(tx: Tx, ids: Sequence[int], *, pruned: bool) -> set[int]:
    """Mark rows as gone from the dataset, or as back in it; returns those that are there to be marked."""
    there: set[int] = set()
    for part in _parts(ids):
        value = db_now() if pruned else None
        change = sa.update(item).where(item.c.id.in_(part)).values(pruned_at=value)
        there |= {row.id for row in tx.execute(change.returning(item.c.id))}
    return there


# ------------------------------------------------------------------------------------------------ questions


def find(
    db: Database,
    recipe_id: int,
    *,
    label: str | None = None,
    min_score: float | None = None,
    ok: bool | None = None,
    reason: str | None = None,
    retry: bool | None = None,
    job_id: int | None = None,
    limit: int | None = None,
    page: int = 2000,
) -> Iterator[Found]:
    """Current items of a recipe sorted by key, streamed page by page.

    Args:
        label: only images in which this label was found.
        min_score: the label's (or without one, the image's) highest score is at least this.
        ok: True for results, False for failures.
        retry: True for rows that a next run computes again.
        job_id: only those that this job computed.

    Raises:
        BadInput: a negative limit, or a score that is no number.
    """
    if (limit or 0) < 0 or (min_score is not None and math.isnan(min_score)):
        raise BadInput(f"expected a limit of 0 or more and a score from 0 to 1, but got {limit} and {min_score}")
    wanted = {"ok": ok, "reason": reason, "retry": retry, "job_id": job_id}
    few = None if label is None else _few_with(db, recipe_id, label, min_score)
    if few is not None:
        query = _items(None, **wanted).where(item.c.id.in_(few))
    else:
        query = _labelled(_items(recipe_id, **wanted), recipe_id, label, min_score)
    after: str | None = None
    left = limit
    while left is None or left > 0:
        size = page if left is None else min(page, left)
        more = query if after is None else query.where(item.c.key > after)
        rows = db.query(more.order_by(item.c.key).limit(size))
        labels = _labels_of(db, [row.id for row in rows])
        yield from (_found(row, labels.get(row.id, {})) for row in rows)
        if len(rows) < size:
            return
        after, left = rows[-1].key, None if left is None else left - len(rows)


def _few_with(db: Database, recipe_id: int, label: str, min_score: float | None) -> list[int] | None:
    """The ids of the rows with a label, when they are few; None when they are not.

    Rows come sorted by key. Where a label is rare, to look for it in that order may mean to go through all of them, so
    those with it are looked up instead; where it is not, to sort those with it would take longer than the look.
    """
    columns = item_label.c
    where = [columns.recipe_id == recipe_id, columns.label == label]
    where += [] if min_score is None else [columns.top_score >= min_score]
    rows = db.query(sa.select(columns.item_id).where(*where).limit(_FEW + 1))
    return None if len(rows) > _FEW else [item_id for (item_id,) in rows]


def _items(recipe_id: int | None, **wanted: Any) -> sa.Select[Any]:
    """The current rows of a recipe, or of all of them where what is added names the rows."""
    query = sa.select(item).where(item.c.current, item.c.pruned_at.is_(None))
    if recipe_id is not None:
        query = query.where(item.c.recipe_id == recipe_id)
    for column, value in wanted.items():
        if value is not None:
            query = query.where(item.c[column] == value)
    return query


def _labelled(query: sa.Select[Any], recipe_id: int, label: str | None, min_score: float | None) -> sa.Select[Any]:
    score = item.c.top_score
    if label is not None:
        query = query.join(item_label, item_label.c.item_id == item.c.id)
        query = query.where(item_label.c.recipe_id == recipe_id, item_label.c.label == label)
        score = item_label.c.top_score
    return query if min_score is None else query.where(score >= min_score)


def _labels_of(db: Database, ids: Sequence[int]) -> dict[int, dict[str, int]]:
    answer: dict[int, dict[str, int]] = {}
    for part in _parts(ids):
        columns = (item_label.c.item_id, item_label.c.label, item_label.c.objects)
        for row_id, label, count in db.query(sa.select(*columns).where(item_label.c.item_id.in_(part))):
            answer.setdefault(row_id, {})[label] = count
    return answer


def _found(row: Any, labels: dict[str, int]) -> Found:
    return Found(
        key=row.key,
        uri=row.uri,
        fingerprint=row.fingerprint,
        ok=row.ok,
        width=row.width,
        height=row.height,
        count=row.objects,
        top_score=row.top_score,
        stage=row.stage,
        reason=row.reason,
        message=row.message,
        job_id=row.job_id,
        shard_id=row.shard_id,
        position=row.id - item_id(row.shard_id, 0),
        labels=dict(sorted(labels.items())),
    )


def label_counts(db: Database, recipe_id: int) -> list[tuple[str, int, int]]:
    """(label, images, objects) over the current items of a recipe, most images first."""
    columns = (item_label.c.label, sa.func.count(), sa.func.sum(item_label.c.objects))
    query = (
        sa.select(*columns)
        .join(item, item.c.id == item_label.c.item_id)
        .where(item_label.c.recipe_id == recipe_id, item.c.current, item.c.pruned_at.is_(None))
        .group_by(item_label.c.label)
    )
    rows = [(label, int(images), int(objects)) for label, images, objects in db.query(query)]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def reason_counts(db: Database, recipe_id: int, job_id: int | None = None) -> list[tuple[str, str, int]]:
    """(stage, reason, images) over the current failures of a recipe, most first."""
    where = [item.c.recipe_id == recipe_id, item.c.current, item.c.pruned_at.is_(None), ~item.c.ok]
    if job_id is not None:
        where.append(item.c.job_id == job_id)
    query = sa.select(item.c.stage, item.c.reason, sa.func.count()).where(*where)
    rows = [(stage, reason, int(n)) for stage, reason, n in db.query(query.group_by(item.c.stage, item.c.reason))]
    return sorted(rows, key=lambda row: (-row[2], row[0], row[1]))


def totals(db: Database, recipe_id: int) -> tuple[int, int]:
    """(results, failures) over the current items of a recipe."""
    where = (item.c.recipe_id == recipe_id, item.c.current, item.c.pruned_at.is_(None))
    counts = {
        bool(ok): int(n) for ok, n in db.query(sa.select(item.c.ok, sa.func.count()).where(*where).group_by(item.c.ok))
    }
    return counts.get(True, 0), counts.get(False, 0)


@dataclass(frozen=True, slots=True)
class ShardObject:
    """A committed result object and which of its positions are still current."""

    shard_id: int
    job_id: int
    key: str
    sha256: str


def objects(db: Database, recipe_id: int, page: int = 500) -> Iterator[ShardObject]:
    """The committed result objects that hold current items of a recipe, in the order they were planned."""
    live = sa.exists().where(_of_shard(shard.c.id), item.c.current, item.c.pruned_at.is_(None))
    columns = (shard.c.id, shard.c.job_id, shard.c.result_key, shard.c.result_sha256)
    jobs = sa.select(job.c.id).where(job.c.recipe_id == recipe_id)
    after = 0
    while True:
        query = (
            sa.select(*columns)
            .where(shard.c.job_id.in_(jobs), shard.c.result_key.is_not(None), shard.c.id > after, live)
            .order_by(shard.c.id)
            .limit(page)
        )
        rows = db.query(query)
        yield from (ShardObject(*row) for row in rows)
        if len(rows) < page:
            return
        after = rows[-1][0]


def current_positions(db: Database, shard_id: int) -> set[int]:
    """The positions of a shard whose rows are current and not pruned."""
    first = item_id(shard_id, 0)
    where = (_of_shard(shard_id), item.c.current, item.c.pruned_at.is_(None))
    return {row_id - first for (row_id,) in db.query(sa.select(item.c.id).where(*where))}


def snapshot(db: Database, recipe_id: int, page: int = 500) -> Iterator[tuple[ShardObject, set[int]]]:
    """The result objects that were committed when it began, as planned, each with the positions that are live.

    Jobs may commit meanwhile: their shards are left out, and a row that one of them supersedes is still live. So every
    key comes once. Rows that are pruned meanwhile are left out.
    """
    jobs = sa.select(job.c.id).where(job.c.recipe_id == recipe_id)
    where = (shard.c.job_id.in_(jobs), shard.c.result_key.is_not(None))
    committed = array("q", (row.id for row in db.query(sa.select(shard.c.id).where(*where).order_by(shard.c.id))))
    columns = (shard.c.id, shard.c.job_id, shard.c.result_key, shard.c.result_sha256)
    for start in range(0, len(committed), page):
        ids = committed[start : start + page].tolist()
        for row in db.query(sa.select(*columns).where(shard.c.id.in_(ids)).order_by(shard.c.id)):
            if live := _live_positions(db, row.id, committed):
                yield ShardObject(*row), live


def _live_positions(db: Database, shard_id: int, committed: Sequence[int]) -> set[int]:
    """The positions whose rows are not pruned, and superseded by no row of the (sorted) committed shards."""
    newer = item.alias()
    later = (newer.c.recipe_id == item.c.recipe_id, newer.c.key == item.c.key, newer.c.id > item.c.id)
    columns = (item.c.id, newer.c.shard_id)
    query = sa.select(*columns).outerjoin_from(item, newer, sa.and_(~item.c.current, *later))
    rows = db.query(query.where(_of_shard(shard_id), item.c.pruned_at.is_(None)))
    first = item_id(shard_id, 0)
    superseded = {row_id for row_id, by in rows if by is not None and _contains(committed, by)}
    return {row_id - first for row_id, _ in rows if row_id not in superseded}


def _contains(ordered: Sequence[int], value: int) -> bool:
    at = bisect_left(ordered, value)
    return at < len(ordered) and ordered[at] == value


def _of_shard(shard_id: Any) -> sa.ColumnElement[bool]:
    # By the range of ids: the primary key then serves where an index on shard_id would have to be kept.
    return sa.and_(item.c.id >= shard_id * MAX_SHARD_ITEMS, item.c.id < (shard_id + 1) * MAX_SHARD_ITEMS)


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), _IN_LIMIT):
        yield values[start : start + _IN_LIMIT]
