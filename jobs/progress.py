"""The read-only questions: which jobs there are, how far each is, how fast, what failed and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import sqlalchemy as sa

from jobs import choices, statements, states
from jobs.choices import Choice
from jobs.leases import LIVE
from storage import index
from storage.database import Database, db_now
from storage.errors import BadInput, NotFound, one_line
from storage.tables import job, recipe, shard, worker

_MANY = 1_000_000  # rows nobody reads to their end


@dataclass(frozen=True, slots=True)
class Status:
    """How far a job is. Committed and live counts are kept apart; all counts are items unless they say shards.

    Attributes:
        planned: to be computed by this job; grows while it is planned.
        fresh: found up to date already, not computed again.
        results, failures: committed; when the job has ended, planned = results + failures.
        live: finished by workers but not committed yet.
        rate: items a second of the workers that hold its shards.
        time_left_s: at that rate, or None where it cannot be told.
        doing: what one of its workers does while no item gets done, such as loading the model; "" where none says so.
        choices: kind of device -> how the model is run there; only of one job that is asked for alone.
    """

    id: int
    name: str
    state: str
    reason: str
    dataset: str
    kind: str
    model: str
    priority: int
    planned: int
    fresh: int
    duplicates: int
    pruned: int
    results: int
    failures: int
    live: int
    rate: float
    time_left_s: float | None
    workers: int
    doing: str
    shards: dict[str, int]
    errors: int
    crashes: int
    device_s: float
    created_at: float
    started_at: float | None
    finished_at: float | None
    recipe_id: int
    spec: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Items with an outcome, committed or not."""
        return self.results + self.failures + self.live

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.state in states.JOB_FINAL


def status(db: Database, job_id: int) -> Status:
    """One job. Raises NotFound."""
    rows = db.query(_one_job(), {"of": job_id})
    if not rows:
        raise NotFound(f"there is no job {job_id}; list them with: imagemill jobs")
    return replace(_statuses(db, rows)[0], choices=choices.of_job(db, job_id))


def jobs(db: Database, *, limit: int = 50, active: bool = False) -> list[Status]:
    """The newest jobs, newest first."""
    if limit < 0:
        raise BadInput(f"the limit must be 0 or more, but got {limit}")
    limit = min(limit, _MANY)
    query = _some_jobs().order_by(job.c.id.desc()).limit(limit)
    if active:
        query = query.where(job.c.finished_at.is_(None))
    return _statuses(db, db.query(query))


def find_job(db: Database, text: str) -> int:
    """The id of a job given as its number, its name (the newest of that name), or "latest". Raises NotFound."""
    if text.isdecimal() and len(text) < 19:  # more digits than a row's number can have make it a name
        where: Any = job.c.id == int(text)
    elif text == "latest":
        where = sa.true()
    elif text:
        where = job.c.name == one_line(text)
    else:
        raise BadInput("expected a job's number, its name, or 'latest', but got nothing")
    rows = db.query(sa.select(job.c.id).where(where).order_by(job.c.id.desc()).limit(1))
    if not rows:
        raise NotFound(f"there is no job {text!r}; list them with: imagemill jobs")
    return int(rows[0].id)


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process as the database knows it."""

    id: str
    name: str
    device: str
    queue: str
    state: str
    desired: str
    model: str
    doing: str
    items: int
    rate: float
    heartbeat_age_s: float
    shards: int


def workers(db: Database, *, live_only: bool = True) -> list[Worker]:
    """The workers, newest first."""
    leased = sa.select(sa.func.count()).where(shard.c.worker_id == worker.c.id, shard.c.state == states.LEASED)
    age = (db_now() - worker.c.heartbeat_at).label("age")
    query = sa.select(worker, age, leased.scalar_subquery().label("shards")).order_by(worker.c.started_at.desc())
    if live_only:
        query = query.where(worker.c.state == LIVE)
    return [
        Worker(
            id=row.id,
            name=row.name,
            device=row.device,
            queue=row.queue,
            state=row.state,
            desired=row.desired,
            model=row.model,
            doing=row.doing,
            items=row.done_items,
            rate=row.rate,
            heartbeat_age_s=max(0.0, row.age),
            shards=row.shards,
        )
        for row in db.query(query)
    ]


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of a job's committed shards went.

    Attributes:
        items: of those shards.
        seconds: stage -> seconds. Fetch, decode, prepare and write are summed over their threads. Of the device, or the
            thread that drives it: device, while networks ran; post, for what made results of their outputs; start, idle
            and gap, while it waited: for the first batch of a ticket, within a shard, and from one shard to the next.
            On a GPU results are made beside the next batch, which is answer instead of post.
    """

    items: int
    seconds: dict[str, float]

    @property
    def busy(self) -> float | None:
        """The share of its time that the device worked, or None when nothing has run."""
        whole = sum(self.seconds.get(stage, 0.0) for stage in ("device", "post", "start", "idle", "gap"))
        return self.seconds.get("device", 0.0) / whole if whole else None


def profile(db: Database, job_id: int) -> Profile:
    """Where a job's time went."""
    seconds: dict[str, float] = {}
    items, after = 0, -1
    columns = (shard.c.id, shard.c.size, shard.c.seconds)
    while True:
        where = (shard.c.job_id == job_id, shard.c.seconds.is_not(None), shard.c.id > after)
        rows = db.query(sa.select(*columns).where(*where).order_by(shard.c.id).limit(2000))
        for row in rows:
            items, after = items + row.size, row.id
            for stage, spent in row.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
        if len(rows) < 2000:
            return Profile(items, seconds)


def failures(db: Database, job_id: int) -> list[tuple[str, str, int]]:
    """(stage, reason, images) of a job's recipe, most first."""
    return index.reason_counts(db, status(db, job_id).recipe_id)


def _statuses(db: Database, rows: Sequence[Any]) -> list[Status]:
    ids = [row.id for row in rows]
    shards = _shard_counts(db, ids)
    live = _live(db, ids)
    return [_status(row, shards.get(row.id, []), live.get(row.id, _Live())) for row in rows]


# These are built once, since whoever follows a job asks again and again: to build one takes far longer than to run it.


def _some_jobs() -> sa.Select[Any]:
    query = sa.select(job, recipe.c.dataset, recipe.c.kind, db_now().label("now"))
    return query.join(recipe, recipe.c.id == job.c.recipe_id)


@cache
def _one_job() -> sa.Select[Any]:
    return _some_jobs().where(job.c.id == sa.bindparam("of"))


@cache
def _counting() -> sa.Select[Any]:
    total = sa.func.sum
    columns = (
        shard.c.job_id,
        shard.c.state,
        sa.func.count().label("n"),
        total(shard.c.results).label("results"),
        total(shard.c.failures).label("failures"),
        total(shard.c.errors).label("errors"),
        total(shard.c.crashes).label("crashes"),
        total(shard.c.device_s).label("device_s"),
    )
    return sa.select(*columns).where(_of_these()).group_by(shard.c.job_id, shard.c.state)


@cache
def _leased() -> sa.Select[Any]:
    columns = (shard.c.job_id, shard.c.id, shard.c.worker_id, worker.c.progress, worker.c.rate, worker.c.doing)
    query = sa.select(*columns).join(worker, worker.c.id == shard.c.worker_id)
    return query.where(_of_these(), statements.is_in(states.LEASED), worker.c.state == LIVE)


def _of_these() -> sa.ColumnElement[bool]:
    return shard.c.job_id.in_(sa.bindparam("ids", expanding=True))


def _shard_counts(db: Database, ids: Sequence[int]) -> dict[int, list[Any]]:
    answer: dict[int, list[Any]] = {}
    for row in db.query(_counting(), {"ids": ids}):
        answer.setdefault(row.job_id, []).append(row)
    return answer


@dataclass
class _Live:
    """What the workers' last beats say of a job: items finished but not committed, and the workers' own."""

    items: int = 0
    rate: float = 0.0
    doing: str = ""
    workers: set[str] = field(default_factory=set)


def _live(db: Database, ids: Sequence[int]) -> dict[int, _Live]:
    """By job."""
    answer: dict[int, _Live] = {}
    for row in db.query(_leased(), {"ids": ids}):
        live = answer.setdefault(row.job_id, _Live())
        live.items += int(row.progress.get(str(row.id), 0))
        if row.worker_id not in live.workers:
            live.workers.add(row.worker_id)
            live.rate += row.rate
            live.doing = live.doing or row.doing
    return answer


def _status(row: Any, shards: Sequence[Any], live: _Live) -> Status:
    results = sum(int(s.results) for s in shards)
    failed = sum(int(s.failures) for s in shards)
    rate = live.rate
    left = max(0, row.planned - results - failed - live.items)
    return Status(
        id=row.id,
        name=row.name,
        state=states.shown(row.state, paused=row.paused, cancelled=row.cancelled),
        reason=row.reason,
        dataset=row.dataset,
        kind=row.kind,
        model=row.spec["model"],
        priority=row.priority,
        planned=row.planned,
        fresh=row.fresh,
        duplicates=row.duplicates,
        pruned=row.pruned,
        results=results,
        failures=failed,
        live=live.items,
        rate=rate if row.finished_at is None else _mean_rate(row, results + failed),
        time_left_s=left / rate if rate > 0 and row.finished_at is None else None,
        workers=len(live.workers),
        doing=live.doing,
        shards={s.state: int(s.n) for s in shards},
        errors=sum(int(s.errors) for s in shards),
        crashes=sum(int(s.crashes) for s in shards),
        device_s=sum(float(s.device_s) for s in shards),
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        recipe_id=row.recipe_id,
        spec=row.spec,
    )


def _mean_rate(row: Any, items: int) -> float:
    spent = (row.finished_at or 0) - (row.started_at or row.created_at)
    return float(items / spent) if spent > 0 else 0.0
