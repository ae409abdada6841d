"""A job's life: submit, plan, pause, cancel, finish. Each verb is one transaction and safe to repeat.

What a worker does to a shard is in leases.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from jobs import processes, statements, states
from jobs.spec import JobSpec
from storage import index
from storage.database import Database, Tx, bulk_insert, db_now
from storage.errors import BadInput, Conflict, NotFound, one_line
from storage.tables import item, job, recipe, shard

# A planner that has added nothing for so long is taken for dead; another process may go on with the job.
PLANNER_LEASE_S = 60.0

_MAX_PRIORITY = 1_000_000  # well within what a 32-bit column holds


@dataclass(frozen=True, slots=True)
class Job:
    """A job's row, for those who act on it."""

    id: int
    recipe_id: int
    name: str
    spec: JobSpec
    state: str
    reason: str
    paused: bool
    cancelled: bool
    priority: int
    force: bool
    only: str
    created_at: float


@dataclass(frozen=True, slots=True)
class NewShard:
    """A shard that the planner has written the manifest of."""

    manifest_key: str
    items: int
    replaces: int


def get(db: Database, job_id: int) -> Job:
    """One job. Raises NotFound."""
    rows = db.query(sa.select(job).where(job.c.id == job_id))
    if not rows:
        raise NotFound(f"there is no job {job_id}; list them with: imagemill jobs")
    return _job(rows[0])


def submit(
    db: Database,
    spec: JobSpec,
    *,
    name: str = "",
    priority: int = 0,
    force: bool = False,
    token: str | None = None,
    only: str = "",
    max_failures: float = 1.0,
) -> tuple[Job, bool]:
    """Store a job that brings the spec's recipe up to date; returns (job, whether it is new).

    A recipe has one unfinished job at most: submitting it again returns that one, so the same command continues. A
    repeated client token returns its job even when that has ended.

    Args:
        force: compute fresh items too.
        only: "" for the whole dataset; "failures" or "retry" for those rows of the recipe, without listing it.
        max_failures: the job is paused when more than this share of its items (after a hundred) has failed.

    Raises:
        BadInput: a priority, share or token that cannot be stored; a token of a job of another recipe.
    """
    _check_priority(priority)
    for label in spec.labels:
        if "\0" in label or label != label.encode(errors="replace").decode():
            raise BadInput(f"the model's class name {label!r} cannot be stored; save the model again without it")
    if not 0 <= max_failures <= 1:
        raise BadInput(f"the share of failures must be from 0 to 1, but got {max_failures:g}")
    if token is not None and token != one_line(token, 200):
        raise BadInput("a token must be at most 200 letters in one line")

    def work(tx: Tx) -> tuple[Job, bool]:
        if token is not None:
            row = tx.execute(sa.select(job).where(job.c.client_token == token)).first()
            if row is not None:
                return _of_token(_job(row), spec, token), False
        recipe_id = _recipe(tx, spec)
        row = tx.execute(sa.select(job).where(job.c.recipe_id == recipe_id, job.c.finished_at.is_(None))).first()
        if row is not None:
            return _job(row), False
        values = {
            "recipe_id": recipe_id,
            "name": one_line(name),
            "spec": spec.to_json(),
            "state": states.PLANNING,
            "priority": priority,
            "force": force,
            "only": only,
            "max_failures": max_failures,
            "queue": spec.queue,
            "model_key": spec.model_key,
            "client_token": token,
            "created_at": db_now(),
        }
        job_id = tx.execute(sa.insert(job).values(values).returning(job.c.id)).scalar_one()
        log(tx, "submit", job_id=job_id)
        return _job(tx.execute(sa.select(job).where(job.c.id == job_id)).one()), True

    done: tuple[Job, bool] = _again_on_race(db, work)
    return done


def _of_token(found: Job, spec: JobSpec, token: str) -> Job:
    if found.spec.digest != spec.digest:
        raise BadInput(
            f"the token {token!r} was given to job {found.id}, which computes something else; take a new one"
        )
    return found


def start_planning(db: Database, job_id: int, planner: str) -> bool:
    """Become the one who plans this job; False when it is planned already or another process is at it.

    Args:
        planner: from `processes.new_name`, so that a planner whose process is gone is seen to be.
    """

    def work(tx: Tx) -> bool:
        now = tx.execute(sa.select(job.c.planner).where(job.c.id == job_id)).scalar()
        stale = sa.or_(
            job.c.planner.is_(None),
            job.c.planner == planner,
            job.c.planner_beat_at < db_now() - PLANNER_LEASE_S,
            job.c.planner == (now if now and processes.is_gone(now) else None),
        )
        mine = sa.and_(job.c.id == job_id, job.c.state == states.PLANNING, ~job.c.cancelled, stale)
        return _changed(tx, sa.update(job).where(mine).values(planner=planner, planner_beat_at=db_now(), reason=""))

    return db.transact(work)


def abandoned_planning(db: Database) -> list[int]:
    """Jobs whose planner was killed or has been silent for too long; one stopped in order is not among them.

    Nor is one just submitted; but when its planner does not begin for as long, the submitter was killed in between.
    """
    _set_back(db)
    last = sa.func.coalesce(job.c.planner_beat_at, job.c.created_at)
    columns = (job.c.id, job.c.planner, (last < db_now() - PLANNER_LEASE_S).label("silent"))
    begun_by = sa.or_(job.c.planner.is_not(None), job.c.planner_beat_at.is_(None))
    rows = db.query(sa.select(*columns).where(job.c.state == states.PLANNING, ~job.c.cancelled, begun_by))
    return [row.id for row in rows if row.silent or processes.is_gone(row.planner or "")]


def _set_back(db: Database) -> None:
    """A planner's beat from the future is from before the clock was set back: it counts from now on."""
    ahead = sa.and_(job.c.state == states.PLANNING, job.c.planner_beat_at > db_now() + PLANNER_LEASE_S)
    if db.query(sa.select(job.c.id).where(ahead)):
        db.transact(lambda tx: tx.execute(sa.update(job).where(ahead).values(planner_beat_at=db_now())))


@dataclass(frozen=True, slots=True)
class Planned:
    """How far planning has come, in items since its beginning."""

    planned: int
    fresh: int
    duplicates: int


def add_shards(
    db: Database, job_id: int, planner: str, first: int, shards: Sequence[NewShard], totals: Planned
) -> None:
    """Record planned shards and the totals so far. Raises Conflict when this planner no longer plans the job.

    Args:
        first: number of the first of these shards; a repeat of the same call finds them there and changes nothing.
    """

    def work(tx: Tx) -> None:
        _still_planning(tx, job_id, planner)
        there = sa.select(shard.c.id).where(shard.c.job_id == job_id, shard.c.number >= first).limit(1)
        if shards and tx.execute(there).first() is None:
            bulk_insert(tx, shard, _SHARD_COLUMNS, [_shard_row(job_id, first + i, new) for i, new in enumerate(shards)])
        tx.execute(sa.update(job).where(job.c.id == job_id).values(dataclasses.asdict(totals)))

    db.transact(work)


_SHARD_COLUMNS = ("job_id", "number", "state", "size", "replaces", "manifest_key")


def _shard_row(job_id: int, number: int, new: NewShard) -> tuple[Any, ...]:
    return job_id, number, states.READY, new.items, new.replaces, new.manifest_key


def keep_planning(db: Database, job_id: int, planner: str) -> None:
    """Say that this planner is at work though it adds nothing. Raises Conflict when it no longer plans the job."""
    db.transact(lambda tx: _still_planning(tx, job_id, planner))


def prune(db: Database, job_id: int, planner: str, ids: Sequence[int]) -> None:
    """Mark items as gone from the dataset. Raises Conflict when this planner no longer plans the job."""

    def work(tx: Tx) -> None:
        _still_planning(tx, job_id, planner)
        index.mark_pruned(tx, ids, pruned=True)

    db.transact(work)


def put_back(db: Database, job_id: int, planner: str, ids: Sequence[int]) -> set[int]:
    """Mark pruned items as back in the dataset; returns those that the collector has not taken away meanwhile.

    Raises Conflict when this planner no longer plans the job.
    """

    def work(tx: Tx) -> set[int]:
        _still_planning(tx, job_id, planner)
        return index.mark_pruned(tx, ids, pruned=False)

    return db.transact(work)


def end_planning(db: Database, job_id: int, planner: str, *, pruned: int) -> None:
    """The dataset has been listed to its end: from now on the job may finish."""

    def work(tx: Tx) -> None:
        state = tx.execute(sa.select(job.c.state).where(job.c.id == job_id)).scalar_one()
        if state != states.PLANNING:
            return
        _still_planning(tx, job_id, planner)
        values = {"state": states.RUNNING, "planner": None, "pruned": job.c.pruned + pruned}
        tx.execute(sa.update(job).where(job.c.id == job_id).values(**values))
        log(tx, "planned", job_id=job_id)

    db.transact(work)


def stop_planning(db: Database, job_id: int, planner: str, reason: str) -> None:
    """Leave the job half planned, for a later process to go on with."""

    def work(tx: Tx) -> None:
        mine = sa.and_(job.c.id == job_id, job.c.planner == planner, job.c.state == states.PLANNING)
        tx.execute(sa.update(job).where(mine).values(planner=None, reason=one_line(reason)))

    db.transact(work)


def pause(db: Database, job_id: int, *, reason: str = "", paused: bool = True) -> bool:
    """Set or clear the pause flag: no shard of the job is claimed while it is set. False when the job has ended."""

    def work(tx: Tx) -> bool:
        open_job = sa.and_(job.c.id == job_id, job.c.finished_at.is_(None))
        values: dict[str, Any] = {"paused": paused, "reason": one_line(reason)}
        if not paused:
            values["max_failures"] = 1.0  # who resumes has seen the failures and goes on in spite of them
        if not _changed(tx, sa.update(job).where(open_job).values(values)):
            return False
        log(tx, "pause" if paused else "resume", job_id=job_id, detail=reason)
        return True

    return db.transact(work)


def cancel(db: Database, job_id: int) -> bool:
    """Set the cancel flag and cancel what nobody works on; what is done stays. False when the job has ended."""

    def work(tx: Tx) -> bool:
        open_job = sa.and_(job.c.id == job_id, job.c.finished_at.is_(None))
        first = sa.and_(open_job, ~job.c.cancelled)
        if _changed(tx, sa.update(job).where(first).values(cancelled=True)):
            log(tx, "cancel", job_id=job_id)
        elif tx.execute(sa.select(job.c.id).where(open_job)).first() is None:
            return False
        waiting = sa.and_(shard.c.job_id == job_id, shard.c.state == states.READY)
        tx.execute(sa.update(shard).where(waiting).values(state=states.CANCELLED, finished_at=db_now()))
        return True

    done = db.transact(work)
    finish(db, job_id)
    return done


def set_priority(db: Database, job_id: int, priority: int) -> bool:
    """Change the priority; higher runs first. False when the job has ended."""
    _check_priority(priority)
    open_job = sa.and_(job.c.id == job_id, job.c.finished_at.is_(None))
    return db.transact(lambda tx: _changed(tx, sa.update(job).where(open_job).values(priority=priority)))


def _check_priority(priority: int) -> None:
    if abs(priority) > _MAX_PRIORITY:
        raise BadInput(f"a priority must be from {-_MAX_PRIORITY} to {_MAX_PRIORITY}, but got {priority}")


def finish(db: Database, job_id: int) -> str | None:
    """End the job if no shard of it is open; returns its final state, or None while there is work.

    The proof of completeness is taken here, once: planned items = items of the shards = rows in the index.
    """

    def work(tx: Tx) -> str | None:
        row = tx.execute(sa.select(job).where(job.c.id == job_id).with_for_update()).one()
        if row.finished_at is not None:
            return str(row.state)
        if (row.state != states.RUNNING and not row.cancelled) or _has_open_shards(tx, job_id):
            return None
        state, reason = _ending(tx, row)
        values: dict[str, Any] = {"state": state, "finished_at": db_now(), "paused": False, "planner": None}
        if reason:
            values["reason"] = reason
        tx.execute(sa.update(job).where(job.c.id == job_id).values(**values))
        log(tx, "finish", job_id=job_id, detail=state)
        return state

    if not _may_finish(db, job_id):
        return None
    return db.transact(work)


def _may_finish(db: Database, job_id: int) -> bool:
    """A cheap look without a lock, so that thousands of commits do not queue up at one row."""
    return bool(db.query(statements.may_finish(), {"of": job_id}))


def _has_open_shards(tx: Tx, job_id: int) -> bool:
    return bool(tx.execute(sa.select(statements.is_open()), {"of": job_id}).scalar())


def _ending(tx: Tx, row: Any) -> tuple[str, str]:
    final = shard.c.state.in_([states.DONE, states.QUARANTINED])
    total = sa.func.coalesce
    sums = sa.select(
        total(sa.func.sum(sa.case((final, shard.c.size), else_=0)), 0),
        total(sa.func.sum(shard.c.results), 0),
        total(sa.func.sum(shard.c.failures), 0),
        total(sa.func.sum(shard.c.collected), 0),  # a job that stood still for days may outlive rows of its own
    )
    items, results, failures, collected = (int(n) for n in tx.execute(sums.where(shard.c.job_id == row.id)).one())
    rows = int(tx.execute(sa.select(sa.func.count()).select_from(item).where(item.c.job_id == row.id)).scalar_one())
    rows += collected
    complete = items == results + failures == rows and (row.cancelled or row.planned == items)
    reason = (
        ""
        if complete
        else (
            f"completeness proof failed: planned {row.planned}, shards hold {items}, results {results} + failures "
            f"{failures}, rows {rows}; run: imagemill verify {row.id}"
        )
    )
    return states.ending(failures=failures, cancelled=row.cancelled, complete=complete), reason


def log(
    tx: Tx,
    action: str,
    *,
    job_id: int | None = None,
    shard_id: int | None = None,
    fence: int | None = None,
    worker_id: str | None = None,
    detail: str = "",
) -> None:
    """Add one line to the history."""
    values = {
        "job_id": job_id,
        "shard_id": shard_id,
        "fence": fence,
        "worker_id": worker_id,
        "detail": one_line(detail),
    }
    tx.execute(statements.add_event(), {"action": action, **values})


def _still_planning(tx: Tx, job_id: int, planner: str) -> None:
    mine = sa.and_(job.c.id == job_id, job.c.planner == planner, job.c.state == states.PLANNING, ~job.c.cancelled)
    if not _changed(tx, sa.update(job).where(mine).values(planner_beat_at=db_now())):
        raise Conflict(f"job {job_id} is no longer planned by this process; it was cancelled or taken over")


def _recipe(tx: Tx, spec: JobSpec) -> int:
    row = tx.execute(sa.select(recipe.c.id).where(recipe.c.digest == spec.digest)).first()
    if row is not None:
        return int(row.id)
    values = {"digest": spec.digest, "dataset": spec.dataset, "kind": spec.kind, "created_at": db_now()}
    return int(tx.execute(sa.insert(recipe).values(values).returning(recipe.c.id)).scalar_one())


def _again_on_race(db: Database, work: Any) -> Any:
    """Two clients may insert the same recipe, token or active job at once: the loser reads the winner's row."""
    for _ in range(5):
        try:
            return db.transact(work)
        except IntegrityError as error:
            last = error
    raise last


def _changed(tx: Tx, statement: Any) -> bool:
    return bool(tx.execute(statement).rowcount)


def _job(row: Any) -> Job:
    return Job(
        id=row.id,
        recipe_id=row.recipe_id,
        name=row.name,
        spec=JobSpec.from_json(row.spec),
        state=row.state,
        reason=row.reason,
        paused=row.paused,
        cancelled=row.cancelled,
        priority=row.priority,
        force=row.force,
        only=row.only,
        created_at=row.created_at,
    )


def recipe_id(db: Database, spec: JobSpec) -> int | None:
    """The id of a spec's recipe, or None when it was never submitted."""
    rows = db.query(sa.select(recipe.c.id).where(recipe.c.digest == spec.digest))
    return int(rows[0].id) if rows else None
