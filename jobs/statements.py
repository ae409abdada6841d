"""The statements that are run for every shard, each built once: to build one takes ten times as long as to run it.

What changes from one run to the next is bound by name when a statement is run; times are the database's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam

from jobs import states
from jobs.spec import SCHEMA_VERSION
from storage.database import Tx, db_now
from storage.tables import event, job, recipe, shard, worker


def is_in(state: str) -> sa.ColumnElement[bool]:
    """Whether a shard is in a state.

    The state is a literal, not a bound value: only then can the partial indexes of that state serve.
    """
    return shard.c.state == sa.literal_column(f"'{state}'")


def is_due() -> sa.ColumnElement[bool]:
    """Whether a ready shard's pause is over; one longer than any pause shows that the clock has been set back."""
    return sa.or_(shard.c.not_before <= db_now(), shard.c.not_before > db_now() + 2 * states.LONGEST_BACKOFF_S)


# ------------------------------------------------------------------------------------------------ claim


@cache
def me() -> sa.Select[Any]:
    """A worker's state and orders; binds "me".

    Locked, so that it is not declared dead, nor says goodbye, between this look and the commit of what follows.
    """
    return sa.select(worker.c.state, worker.c.desired).where(worker.c.id == bindparam("me")).with_for_update(read=True)


@cache
def open_jobs() -> sa.Select[Any]:
    """The jobs that may have a shard for a worker, and how many are leased of each; binds "from"."""
    leased = sa.select(sa.func.count()).where(shard.c.job_id == job.c.id, is_in(states.LEASED)).scalar_subquery()
    return sa.select(job.c.id, job.c.priority, job.c.model_key, leased.label("leased")).where(
        job.c.finished_at.is_(None),
        job.c.queue == bindparam("from"),
        ~job.c.paused,
        ~job.c.cancelled,
        job.c.spec["schema_version"].as_integer() <= SCHEMA_VERSION,  # a newer worker's jobs are not for us
    )


@cache
def lease_one(dialect: str) -> sa.UpdateBase:
    """Lease a job's first ready shard; binds "of" and "me"."""
    due = sa.select(shard.c.id).where(shard.c.job_id == bindparam("of"), is_in(states.READY), is_due())
    due = due.order_by(shard.c.id).limit(1)
    if dialect == "postgresql":
        due = due.with_for_update(skip_locked=True)
    # The state is asked again in the UPDATE itself, so that nothing depends on how the database orders the two parts.
    mine = sa.and_(shard.c.id == due.scalar_subquery(), is_in(states.READY))
    return (
        sa.update(shard)
        .where(mine)
        .values(
            state=states.LEASED,
            fence=shard.c.fence + 1,
            attempts=shard.c.attempts + 1,
            worker_id=bindparam("me"),
            claimed_at=db_now(),
        )
        .returning(*shard.c)
    )


@cache
def owner() -> sa.Select[Any]:
    """What a shard's job computes; binds "of"."""
    columns = (job.c.spec, job.c.recipe_id, job.c.started_at, recipe.c.digest)
    return sa.select(*columns).join(recipe, recipe.c.id == job.c.recipe_id).where(job.c.id == bindparam("of"))


@cache
def start() -> sa.Update:
    """Note when a job's first shard was claimed; binds "of"."""
    return sa.update(job).where(job.c.id == bindparam("of"), job.c.started_at.is_(None)).values(started_at=db_now())


# ------------------------------------------------------------------------------------------------ change


def change(tx: Tx, values: Mapping[str, Any], shard_id: int, fence: int, worker_id: str) -> bool:
    """The one compare-and-set: change a shard where a worker's lease and its fence still hold. False where not.

    Args:
        values: of columns; "not_before" in seconds from now, "finished_at" as True for now.
    """
    bound = {f"new_{name}": value for name, value in values.items()}
    bound |= {"the_shard": shard_id, "the_fence": fence, "me": worker_id}
    return bool(tx.execute(_change(frozenset(values)), bound).rowcount)


def ours() -> sa.ColumnElement[bool]:
    """Whether a shard is leased to a worker, under the fence that its claim raised."""
    return sa.and_(
        shard.c.id == bindparam("the_shard"),
        shard.c.fence == bindparam("the_fence"),
        shard.c.worker_id == bindparam("me"),
        is_in(states.LEASED),
    )


@cache
def _change(names: frozenset[str]) -> sa.Update:
    values: dict[str, Any] = {name: bindparam(f"new_{name}", type_=shard.c[name].type) for name in sorted(names)}
    if "finished_at" in values:
        values["finished_at"] = db_now()
    if "not_before" in values:
        values["not_before"] = db_now() + values["not_before"]
    return sa.update(shard).where(ours()).values(values)


@cache
def blame(more: bool) -> sa.Update:
    """Count one more failed shard in a row of a worker, or begin anew; binds "me"."""
    count = worker.c.failed_in_a_row + 1 if more else 0
    return sa.update(worker).where(worker.c.id == bindparam("me")).values(failed_in_a_row=count)


# ------------------------------------------------------------------------------------------------ look


@cache
def may_finish() -> sa.Select[Any]:
    """A job whose shards are all planned and none open; binds "of"."""
    planned = sa.or_(job.c.state != states.PLANNING, job.c.cancelled)
    return sa.select(job.c.id).where(job.c.id == bindparam("of"), planned, ~is_open())


def is_open() -> sa.ColumnElement[bool]:
    """Whether a job has an open shard; binds "of"."""
    # One question for each state, in the words of its partial index, which then answers it.
    return sa.or_(
        *(sa.exists().where(shard.c.job_id == bindparam("of"), is_in(state)) for state in (states.READY, states.LEASED))
    )


@cache
def add_event() -> sa.Insert:
    """One line of the history; binds its columns, but for the time."""
    return sa.insert(event).values(at=db_now())
