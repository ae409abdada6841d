"""What a worker does to shards: register, claim, beat, commit, release, fail, and how its leases expire.

Each verb is one transaction. A claim raises the shard's fence; every later write is conditional on that fence, so a
worker that lost its lease, however late it wakes, changes nothing. A lease holds as long as its worker's incarnation
beats; only the database's clock is compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from jobs import lifecycle, processes, statements, states
from jobs.lifecycle import log
from jobs.spec import JobSpec
from jobs.statements import is_in
from storage import index
from storage.database import Database, Tx, db_now
from storage.errors import Conflict, one_line
from storage.tables import job, shard, worker

if TYPE_CHECKING:
    from storage.shardfile import Outcome, Written

_logger = logging.getLogger("imagemill.leases")

LIVE, LOST, GONE = "live", "lost", "gone"
RUN, DRAIN = "run", "drain"

# Careful after the first crash: before each micro-batch the worker writes down what it is about to touch.
CAREFUL_AFTER = 1


@dataclass(frozen=True, slots=True)
class Claim:
    """A leased shard: what to do, and the fence that proves it is ours."""

    shard_id: int
    fence: int
    number: int
    items: int
    replaces: int
    manifest_key: str
    checkpoint: Mapping[str, Any]
    crashes: int
    errors: int
    job_id: int
    recipe_id: int
    digest: str
    spec: JobSpec

    @property
    def careful(self) -> bool:
        """Whether an earlier attempt at this shard died, so that one of its items may kill the process."""
        return self.crashes >= CAREFUL_AFTER


@dataclass(frozen=True, slots=True)
class Orders:
    """The answer to a beat.

    Attributes:
        alive: False when this incarnation was declared dead: drop everything, write nothing, start anew.
        drain: finish the batch, release the rest, exit.
        dropped: jobs that were cancelled or paused.
        leased: shard id -> fence of every shard the database thinks is ours.
    """

    alive: bool
    drain: bool = False
    dropped: frozenset[int] = frozenset()
    leased: Mapping[int, int] = field(default_factory=dict)


def register(
    db: Database, worker_id: str, *, name: str, host: str, device: str, queue: str, pid: int, version: str
) -> None:
    """Announce a new incarnation. Its id must never have been used before.

    Args:
        host: as `processes.host` gives it, so that a reconciler beside it can see at once that its process is gone.
    """
    values = {
        "id": worker_id,
        "name": name,
        "host": host,
        "device": device,
        "queue": queue,
        "pid": pid,
        "version": version,
    }

    def work(tx: Tx) -> None:
        if tx.execute(sa.select(worker.c.id).where(worker.c.id == worker_id)).first() is None:
            state = {"state": LIVE, "desired": RUN, "progress": {}, "started_at": db_now(), "heartbeat_at": db_now()}
            tx.execute(sa.insert(worker).values(**values, **state))

    db.transact(work)


def retire(db: Database, worker_id: str) -> None:
    """Say goodbye. Shards still leased are given back without blame."""

    def work(tx: Tx) -> None:
        tx.execute(sa.update(worker).where(worker.c.id == worker_id, worker.c.state == LIVE).values(state=GONE))
        _release_all(tx, worker_id)

    db.transact(work)


def release_all(db: Database, worker_id: str) -> int:
    """Give back without blame whatever is leased to a worker that has nothing in hand; returns how many shards."""
    return db.transact(lambda tx: _release_all(tx, worker_id))


def _release_all(tx: Tx, worker_id: str) -> int:
    ours = sa.and_(shard.c.worker_id == worker_id, is_in(states.LEASED))
    released = 0
    columns = (shard.c.id, shard.c.job_id, shard.c.fence, shard.c.checkpoint)
    for row in tx.execute(sa.select(*columns).where(ours)).fetchall():
        # Nothing crashed, so none of the items that were about to be touched is suspect.
        kept = {name: value for name, value in (row.checkpoint or {}).items() if name not in ("suspect", "alone")}
        values = {"state": states.READY, "worker_id": None, "checkpoint": kept or None}
        if tx.execute(sa.update(shard).where(ours, shard.c.id == row.id).values(values)).rowcount:
            log(tx, "release", job_id=row.job_id, shard_id=row.id, fence=row.fence, worker_id=worker_id)
            released += 1
    return released


def claim(db: Database, worker_id: str, queue: str, model_key: str | None) -> Claim | None:
    """Lease the best ready shard of a queue, or None when there is none.

    Jobs come in the order of priority, then those of the loaded model, then those with the fewest shards in flight
    (fair share), then the oldest.

    Args:
        model_key: of the model this worker holds, None when it holds none or has run it for its share.

    Raises:
        Conflict: this incarnation was declared dead or told to drain.
    """

    def work(tx: Tx) -> Claim | None:
        me = tx.execute(statements.me(), {"me": worker_id}).first()
        if me is None or me.state != LIVE or me.desired != RUN:
            found = "unknown" if me is None else "told to drain" if me.state == LIVE else me.state
            raise Conflict(f"worker {worker_id} may not claim: it is {found}")
        for candidate in _candidates(tx, queue, model_key):
            mine = {"of": candidate.id, "me": worker_id}
            row = tx.execute(statements.lease_one(tx.dialect.name), mine).first()
            if row is not None:
                log(tx, "claim", job_id=candidate.id, shard_id=row.id, fence=row.fence, worker_id=worker_id)
                return _claim(tx, row)
        return None

    return db.transact(work)


def _candidates(tx: Tx, queue: str, model_key: str | None) -> Sequence[Any]:
    rows = tx.execute(statements.open_jobs(), {"from": queue}).fetchall()
    return sorted(rows, key=lambda row: (-row.priority, row.model_key != model_key, row.leased, row.id))


def _claim(tx: Tx, row: Any) -> Claim:
    owner = tx.execute(statements.owner(), {"of": row.job_id}).one()
    if owner.started_at is None:
        tx.execute(statements.start(), {"of": row.job_id})
    return Claim(
        shard_id=row.id,
        fence=row.fence,
        number=row.number,
        items=row.size,
        replaces=row.replaces,
        manifest_key=row.manifest_key,
        checkpoint=row.checkpoint or {},
        crashes=row.crashes,
        errors=row.errors,
        job_id=row.job_id,
        recipe_id=owner.recipe_id,
        digest=owner.digest,
        spec=JobSpec.from_json(owner.spec),
    )


def beat(
    db: Database,
    worker_id: str,
    *,
    progress: Mapping[int, int],
    items: int,
    rate: float,
    model: str,
    doing: str = "",
) -> Orders:
    """Renew every lease of this worker, record its progress, and ask for orders.

    Args:
        progress: shard id -> items finished but not committed.
        items: finished since the worker started.
        rate: items a second, lately.
        doing: what else it does while no item gets done, for people.
    """

    def work(tx: Tx) -> Orders:
        values = {
            "heartbeat_at": db_now(),
            "progress": {str(k): v for k, v in progress.items()},
            "done_items": items,
            "rate": rate,
            "model": model,
            "doing": doing,
        }
        mine = sa.and_(worker.c.id == worker_id, worker.c.state == LIVE)
        row = tx.execute(sa.update(worker).where(mine).values(**values).returning(worker.c.desired)).first()
        if row is None:
            return Orders(alive=False)
        query = sa.select(shard.c.id, shard.c.fence, shard.c.job_id, job.c.paused, job.c.cancelled)
        query = query.join(job, job.c.id == shard.c.job_id)
        rows = tx.execute(query.where(shard.c.worker_id == worker_id, is_in(states.LEASED))).fetchall()
        return Orders(
            alive=True,
            drain=row.desired == DRAIN,
            dropped=frozenset(r.job_id for r in rows if r.paused or r.cancelled),
            leased={r.id: r.fence for r in rows},
        )

    return db.transact(work)


def commit(
    db: Database,
    claim: Claim,
    worker_id: str,
    written: Written,
    outcomes: Sequence[Outcome],
    *,
    seconds: Mapping[str, float] | None = None,
    state: str = states.DONE,
) -> bool:
    """Set the shard done and record its items, in one transaction, where the fence is still ours.

    Args:
        seconds: stage -> time this attempt spent in it; "device" is what the device took.

    Returns True also when an earlier try of this very commit went through and only its answer was lost; False when the
    lease is not ours any more, so that the work must be thrown away.
    """
    if sorted(o.position for o in outcomes) != list(range(claim.items)):
        raise ValueError(
            f"shard {claim.shard_id}: expected {claim.items} outcomes, one a position, got {len(outcomes)}"
        )
    failures = sum(o.failure is not None for o in outcomes)
    values = {
        "state": state,
        "result_key": written.key,
        "result_sha256": written.sha256,
        "result_bytes": written.nbytes,
        "results": len(outcomes) - failures,
        "failures": failures,
        "device_s": (seconds or {}).get("device", 0.0),
        "seconds": {name: round(value, 4) for name, value in (seconds or {}).items()},
        "checkpoint": None,
        "finished_at": True,
    }

    rows = index.rows_of(
        recipe_id=claim.recipe_id,
        job_id=claim.job_id,
        shard_id=claim.shard_id,
        fence=claim.fence,
        kind=claim.spec.kind,
        outcomes=outcomes,
    )

    def work(tx: Tx) -> bool:
        if not _move(tx, claim, worker_id, values):
            before = _committed_before(tx, claim, written)
            if before:
                _logger.warning("shard %d was committed already: the answer to that was lost", claim.shard_id)
            return before
        if claim.replaces:
            index.supersede(tx, claim.recipe_id, claim.job_id, [o.key for o in outcomes])
        index.record(tx, rows)
        all_failed = failures == len(outcomes) and failures > 1
        tx.execute(statements.blame(all_failed), {"me": worker_id})
        _log(tx, "commit", claim, worker_id)
        return True

    return db.transact(work)


def release(db: Database, claim: Claim, worker_id: str, checkpoint: Mapping[str, Any] | None = None) -> bool:
    """Give a shard back without blame: a drain, a paused or cancelled job, a store that does not answer.

    Args:
        checkpoint: for the next attempt; None leaves it what it was when the shard was claimed.
    """

    def work(tx: Tx) -> bool:
        flags = tx.execute(sa.select(job.c.cancelled).where(job.c.id == claim.job_id)).one()
        state = states.CANCELLED if flags.cancelled else states.READY
        kept = claim.checkpoint if checkpoint is None else checkpoint
        values: dict[str, Any] = {"state": state, "worker_id": None, "checkpoint": dict(kept) or None}
        if state == states.CANCELLED:
            values["finished_at"] = True
        done = _move(tx, claim, worker_id, values)
        if done:
            _log(tx, "release", claim, worker_id)
        return done

    done = db.transact(work)
    if done:
        lifecycle.finish(db, claim.job_id)
    return done


def fail(db: Database, claim: Claim, worker_id: str, message: str) -> bool:
    """The shard as a whole could not be done: count an error and let it rest for a while."""

    def work(tx: Tx) -> bool:
        pause = states.backoff_s(claim.errors + 1)
        values = {
            "state": states.READY,
            "worker_id": None,
            "errors": claim.errors + 1,
            "not_before": pause,
            "message": one_line(message),
            "checkpoint": dict(claim.checkpoint) or None,  # without this attempt's suspects: none of them crashed it
        }
        done = _move(tx, claim, worker_id, values)
        if done:
            tx.execute(statements.blame(True), {"me": worker_id})
            _log(tx, "fail", claim, worker_id, message)
        return done

    return db.transact(work)


def suspect(
    db: Database,
    claim: Claim,
    worker_id: str,
    positions: Sequence[int],
    killers: Sequence[int] = (),
    alone: int = 0,
) -> bool:
    """Careful mode: write down which items are about to be touched, before they are. False when the lease is lost.

    Args:
        killers: positions that have been found out to end the process; they are not touched again.
        alone: the how-manieth time it is that this one position is touched with nothing else in hand.
    """
    checkpoint: dict[str, Any] = {**claim.checkpoint, "suspect": list(positions)}
    checkpoint.pop("alone", None)
    if alone:
        checkpoint["alone"] = alone
    if killers:
        checkpoint["killers"] = sorted(killers)
    return db.transact(lambda tx: _move(tx, claim, worker_id, {"checkpoint": checkpoint}))


def set_desired(db: Database, worker_id: str, desired: str) -> bool:
    """Tell a worker to run or to drain; it reads that at its next beat. False when there is no such live worker."""
    if desired not in (RUN, DRAIN):
        raise ValueError(f"expected {RUN!r} or {DRAIN!r}, but got {desired!r}")
    live = sa.and_(worker.c.id == worker_id, worker.c.state == LIVE)

    def work(tx: Tx) -> bool:
        done = bool(tx.execute(sa.update(worker).where(live).values(desired=desired)).rowcount)
        if done:
            log(tx, desired, worker_id=worker_id)
        return done

    return db.transact(work)


def expire_workers(db: Database, lease_s: float) -> list[str]:
    """Declare dead every incarnation that has not beaten for a lease; returns those this call declared."""

    def work(tx: Tx) -> list[str]:
        # A beat from the future is from before the clock was set back; it counts from now on, or it would never end.
        ahead = sa.and_(worker.c.state == LIVE, worker.c.heartbeat_at > db_now() + lease_s)
        tx.execute(sa.update(worker).where(ahead).values(heartbeat_at=db_now()))
        late = sa.and_(worker.c.state == LIVE, worker.c.heartbeat_at < db_now() - lease_s)
        rows = tx.execute(sa.update(worker).where(late).values(state=LOST).returning(worker.c.id)).fetchall()
        for (worker_id,) in rows:
            log(tx, "lost", worker_id=worker_id)
        return [worker_id for (worker_id,) in rows]

    return db.transact(work)


def end_sessions(db: Database, worker_ids: Sequence[str]) -> int:
    """End the transactions that lost workers have open on Postgres; returns how many.

    A frozen process keeps its locks, and where the server waits for the rest of a message no timeout frees them. One
    that was only slow does its work again, and finds that its lease is lost.
    """
    if db.is_sqlite or not worker_ids:
        return 0
    rows = db.query(sa.select(worker.c.host, worker.c.pid).where(worker.c.id.in_(worker_ids)))
    names = [processes.session_of(row.host, row.pid) for row in rows]
    theirs = sa.text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = ANY(:names) AND datname = current_database() AND xact_start IS NOT NULL"
    )
    return len(db.query(theirs, {"names": names}))


def expire_dead_processes(db: Database) -> list[str]:
    """Declare dead every incarnation whose process is gone from this very host, without waiting for its lease."""
    where = (worker.c.state == LIVE, worker.c.host == processes.host())
    rows = db.query(sa.select(worker.c.id, worker.c.pid).where(*where))
    dead = [row.id for row in rows if not processes.exists(row.pid)]

    def work(tx: Tx) -> list[str]:
        still = sa.and_(worker.c.state == LIVE, worker.c.id.in_(dead))
        gone = tx.execute(sa.update(worker).where(still).values(state=LOST).returning(worker.c.id)).fetchall()
        for (worker_id,) in gone:
            log(tx, "lost", worker_id=worker_id, detail="its process is gone")
        return [worker_id for (worker_id,) in gone]

    return db.transact(work) if dead else []


def expire_shards(db: Database, limit: int = 100) -> int:
    """Take back the shards of incarnations that are not live: crashes + 1, ready again after a backoff.

    Args:
        limit: shards at once; so few that their rows are on their way before they are read, since a server that waits
            for a frozen client to read keeps what is locked.
    """
    columns = (shard.c.id, shard.c.job_id, shard.c.fence, shard.c.worker_id, shard.c.crashes, shard.c.crash_workers)

    def work(tx: Tx) -> int:
        live = sa.exists().where(worker.c.id == shard.c.worker_id, worker.c.state == LIVE)
        orphaned = sa.select(*columns).where(is_in(states.LEASED), ~live).limit(limit)
        if tx.dialect.name == "postgresql":
            orphaned = orphaned.with_for_update(skip_locked=True, of=shard)
        return sum(_expire_one(tx, row) for row in tx.execute(orphaned).fetchall())

    return db.transact(work)


def _expire_one(tx: Tx, row: Any) -> bool:
    values = {
        "state": states.READY,
        "worker_id": None,
        "crashes": row.crashes + 1,
        "crash_workers": [*(row.crash_workers or []), row.worker_id],
        "not_before": db_now() + states.backoff_s(row.crashes + 1, base_s=1),
    }
    same = sa.and_(shard.c.id == row.id, shard.c.fence == row.fence, is_in(states.LEASED))
    done = bool(tx.execute(sa.update(shard).where(same).values(**values)).rowcount)
    if done:
        log(tx, "expire", job_id=row.job_id, shard_id=row.id, fence=row.fence, worker_id=row.worker_id)
    return done


def _move(tx: Tx, claim: Claim, worker_id: str, values: Mapping[str, Any]) -> bool:
    return statements.change(tx, values, claim.shard_id, claim.fence, worker_id)


def _committed_before(tx: Tx, claim: Claim, written: Written) -> bool:
    query = sa.select(shard.c.fence, shard.c.result_key).where(shard.c.id == claim.shard_id)
    row = tx.execute(query).one()
    return bool(row.fence == claim.fence and row.result_key == written.key)


def _log(tx: Tx, action: str, claim: Claim, worker_id: str, detail: str = "") -> None:
    log(
        tx,
        action,
        job_id=claim.job_id,
        shard_id=claim.shard_id,
        fence=claim.fence,
        worker_id=worker_id,
        detail=detail,
    )
