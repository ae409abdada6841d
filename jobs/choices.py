"""How jobs' models are run on each kind of device: what was settled for a job, and what was measured for the fleet.

A job's choice is settled once for each kind of device and holds to the job's end, so that one job is never computed in
two ways on one kind of device. What was measured serves later jobs of the same model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from jobs import states
from storage.database import Database, Tx, db_now
from storage.tables import choice, job, shard, tuning


@dataclass(frozen=True, slots=True)
class Choice:
    """How a model is run.

    Attributes:
        runtime, precision: of its networks.
        batch: images in one forward pass.
        why: for people, such as "tuned: 3.1 times torch fp32".
    """

    runtime: str
    precision: str
    batch: int
    why: str = ""


def of_job(db: Database, job_id: int) -> dict[str, Choice]:
    """Kind of device -> what was settled for the job there."""
    rows = db.query(sa.select(choice.c.device, choice.c.value).where(choice.c.job_id == job_id))
    return {row.device: Choice(**row.value) for row in rows}


def settle(db: Database, job_id: int, device: str, wanted: Choice) -> Choice:
    """Settle a job's choice on a kind of device; the first one settled holds, and is returned."""

    def work(tx: Tx) -> Choice:
        values = {"job_id": job_id, "device": device, "value": dataclasses.asdict(wanted)}
        tx.execute(_insert(tx, choice).values(**values).on_conflict_do_nothing())
        where = (choice.c.job_id == job_id, choice.c.device == device)
        return Choice(**tx.execute(sa.select(choice.c.value).where(*where)).scalar_one())

    return db.transact(work)


def measured(db: Database, about: Mapping[str, Any]) -> Choice | None:
    """The fastest way that was measured for a model, device and versions, if it was."""
    rows = db.query(sa.select(tuning.c.value).where(tuning.c.id == _name(about)))
    return Choice(**rows[0].value) if rows else None


def keep(db: Database, about: Mapping[str, Any], fastest: Choice, found: Sequence[Mapping[str, Any]]) -> None:
    """Keep what was measured, in place of what was kept before.

    Args:
        about: JSON values: model, device, versions; another value is another measurement.
        found: every candidate that was measured, as JSON values.
    """

    def work(tx: Tx) -> None:
        values = {"value": dataclasses.asdict(fastest), "measured": [dict(one) for one in found], "at": db_now()}
        fresh = _insert(tx, tuning).values(id=_name(about), about=dict(about), **values)
        tx.execute(fresh.on_conflict_do_update(index_elements=["id"], set_=values))

    db.transact(work)


def items_left(db: Database, job_id: int) -> tuple[int, bool]:
    """Items of a job's shards that are planned and not committed, and whether more are still being planned."""
    left = (shard.c.job_id == job_id, shard.c.state.in_((states.READY, states.LEASED)))
    # One statement, so that nothing is planned between the two answers.
    items = sa.select(sa.func.coalesce(sa.func.sum(shard.c.size), 0)).where(*left).scalar_subquery()
    more = sa.and_(job.c.state == states.PLANNING, ~job.c.cancelled)
    rows = db.query(sa.select(items.label("items"), more.label("more")).where(job.c.id == job_id))
    return int(rows[0].items), bool(rows[0].more)


def _name(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()


def _insert(tx: Tx, table: sa.Table) -> Any:
    # That of Postgres imports what every other command can do without.
    return importlib.import_module(f"sqlalchemy.dialects.{tx.dialect.name}").insert(table)
