"""The loop that makes lost things right again. Any number of copies may run: every step is a conditional update."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa

from jobs import leases, lifecycle, plan, queue, statements, states
from storage.database import Database
from storage.errors import ImagemillError, Unavailable
from storage.objects import open_store
from storage.settings import Settings
from storage.tables import job, shard, worker

log = logging.getLogger("imagemill.reconcile")

JUDGED_AFTER = 100  # items, before a job's failure ratio means anything
PLANNING_AT_ONCE = 4
ADOPT_AGAIN_S = 60.0  # before the same job is tried again, so that one which cannot be listed here holds up no other
BAD_SHARDS = 3  # in a row of one worker
TICKETS_A_WORKER = 2  # lying in the broker for each live worker; lost ones are made good in the next round


class Reconciler:
    """One copy of the loop, with what it must remember between rounds."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self.db, self.settings = db, settings
        self._able_since = -float("inf")  # since when workers could beat, as far as this loop can tell
        self._clocks: tuple[float, float] | None = None  # the database's and this machine's, when a round ended
        self._planning: dict[int, threading.Thread] = {}  # job -> who goes on with its planning
        self._adopted: dict[int, float] = {}  # job -> when this copy last went on with its planning

    def run(self, stop: threading.Event) -> None:
        """Round after round until stopped; an outage is waited out."""
        while not stop.is_set():
            try:
                self.round()
            except Exception:  # nothing else refills tickets or takes back shards here, so this thread must not end
                log.exception("a round broke off, the next one tries again")
            stop.wait(self.settings.reconcile_seconds)

    def round(self) -> None:
        """Every step once; a step that meets an outage does not keep the others from running."""
        try:
            self._round()
        finally:
            self._clocks = self._both_clocks()

    def _both_clocks(self) -> tuple[float, float] | None:
        try:
            return self.db.now(), time.monotonic()
        except ImagemillError:
            return None

    def _notice_jump(self) -> None:
        """Time in which nobody could beat: the database's clock was set forward, or counts what all of us slept.

        The monotonic clock does not count the sleep of a machine, but does count a loop that was stopped with its
        workers.
        """
        if self._clocks is None:
            return
        there, here = self.db.now() - self._clocks[0], time.monotonic() - self._clocks[1]
        if max(there, here) > self.settings.reconcile_seconds + max(10, self.settings.lease_seconds / 2):
            self._able_since = time.monotonic()

    def _round(self) -> None:
        try:
            self._notice_jump()
            self._timed(self.expire_processes)
            self.expire()
            self._timed(self.settle)
            drain_bad_workers(self.db)
            self.adopt()
        except Unavailable as error:
            self._able_since = time.monotonic()
            log.warning("the database does not answer, trying again: %s", error)
            return
        except ImagemillError as error:
            log.error("nothing could be put right, trying again: %s", error)
            return
        try:
            refill(self.db, self.settings)
        except Unavailable as error:
            log.warning("no tickets could be published, trying again: %s", error)
        except ImagemillError as error:
            log.error("no tickets could be published: %s", error)

    def _timed(self, step: Callable[[], None]) -> None:
        """A step that had to wait for the database: it was away for a while, even if the retries have hidden that."""
        started = time.monotonic()
        step()
        if time.monotonic() - started > self.settings.lease_seconds / 4:
            self._able_since = time.monotonic()

    def expire_processes(self) -> None:
        """Declare workers dead whose process, on this machine, has ended."""
        for worker_id in leases.expire_dead_processes(self.db):
            log.warning("the process of worker %s is gone; its shards are free", worker_id)

    def expire(self) -> None:
        """Declare silent workers dead and take their shards back.

        Not within a lease of a database outage or of a sleep: then nobody could beat, and nobody is to blame.
        """
        if time.monotonic() - self._able_since > self.settings.lease_seconds:
            lost = leases.expire_workers(self.db, self.settings.lease_seconds)
            for worker_id in lost:
                log.warning(
                    "worker %s has not beaten for %g s; its shards are free", worker_id, self.settings.lease_seconds
                )
            try:
                leases.end_sessions(self.db, lost)
            except ImagemillError as error:
                log.warning("what lost workers have open in the database could not be ended: %s", error)
        while leases.expire_shards(self.db, limit=100) == 100:
            pass

    def settle(self) -> None:
        """Cancel what cancelled jobs still have waiting; end jobs in which nothing is open; pause failing ones."""
        columns = (job.c.id, job.c.cancelled, job.c.paused, job.c.max_failures)
        for row in self.db.query(sa.select(*columns).where(job.c.finished_at.is_(None))):
            if row.cancelled:
                lifecycle.cancel(self.db, row.id)
            elif lifecycle.finish(self.db, row.id) is None and not row.paused:
                pause_if_failing(self.db, row.id, row.max_failures)

    def adopt(self) -> None:
        """Go on with planning that a process has left half done, each job in a thread of its own.

        Few at a time, since a listing takes memory; but not one alone, since a job over the results of another waits
        until that one has ended.
        """
        self._planning = {job_id: thread for job_id, thread in self._planning.items() if thread.is_alive()}
        for job_id in lifecycle.abandoned_planning(self.db):
            if job_id in self._planning:
                continue  # the database was away while this very copy is at it
            if len(self._planning) >= PLANNING_AT_ONCE:
                return
            if time.monotonic() - self._adopted.get(job_id, -float("inf")) < ADOPT_AGAIN_S:
                continue
            self._adopted[job_id] = time.monotonic()
            self._planning[job_id] = threading.Thread(target=self._plan, args=(job_id,), name="plan", daemon=True)
            self._planning[job_id].start()

    def _plan(self, job_id: int) -> None:
        try:
            store = open_store(self.settings.store, self.settings)
            plan.plan(self.db, store, self.settings, lifecycle.get(self.db, job_id))
        except ImagemillError as error:
            # Perhaps the dataset is a folder of another machine: whoever can list it will go on.
            log.warning("job %d could not be planned here: %s", job_id, error)


def pause_if_failing(db: Database, job_id: int, max_failures: float) -> bool:
    """Pause a job when more than its allowed share of items has failed, once there are enough to judge by."""
    sums = sa.select(sa.func.sum(shard.c.results), sa.func.sum(shard.c.failures)).where(shard.c.job_id == job_id)
    results, failures = (int(n or 0) for n in db.query(sums)[0])
    done = results + failures
    if done < JUDGED_AFTER or failures <= max_failures * done:
        return False
    reason = (
        f"{failures} of {done} items failed, more than {max_failures:.0%}; see: imagemill failures {job_id}; "
        f"to go on all the same: imagemill resume {job_id}"
    )
    log.warning("job %d is paused: %s", job_id, reason)
    return lifecycle.pause(db, job_id, reason=reason)


def drain_bad_workers(db: Database) -> list[str]:
    """Drain a worker whose last shards all failed while another worker's did not: its device is broken, not the job."""
    live = (worker.c.state == leases.LIVE, worker.c.desired == leases.RUN)
    rows = db.query(sa.select(worker.c.id, worker.c.queue, worker.c.failed_in_a_row).where(*live))
    bad = [row for row in rows if row.failed_in_a_row >= BAD_SHARDS]
    fine = {row.queue for row in rows if row.failed_in_a_row == 0 and row not in bad}
    drained = [row.id for row in bad if row.queue in fine and leases.set_desired(db, row.id, leases.DRAIN)]
    for worker_id in drained:
        log.error("worker %s is drained: its last %d shards all failed, others' did not", worker_id, BAD_SHARDS)
    return drained


def refill(db: Database, settings: Settings, at_least: int = 0) -> int:
    """Publish tickets until each queue with claimable shards has a small window of them; returns how many.

    Args:
        at_least: tickets to keep waiting even where no live worker is known (one may be starting).
    """
    published = 0
    for name, ready in claimable(db).items():
        if name not in queue.QUEUES:
            log.error("shards wait on a queue that does not exist: %r; cancel their jobs", name)
            continue
        live = _live_workers(db, name)
        want = min(ready, max(at_least, 1, TICKETS_A_WORKER * live))
        missing = want - queue.waiting(settings, name)
        if missing > 0:
            queue.publish(settings, name, missing)
            published += missing
    return published


def claimable(db: Database) -> dict[str, int]:
    """Queue -> shards that could be claimed now."""
    ready = sa.and_(statements.is_in(states.READY), statements.is_due())
    open_job = sa.and_(job.c.finished_at.is_(None), ~job.c.paused, ~job.c.cancelled)
    query = sa.select(job.c.queue, sa.func.count()).join(shard, shard.c.job_id == job.c.id)
    rows = db.query(query.where(open_job, ready).group_by(job.c.queue))
    return {name: int(n) for name, n in rows}


def _live_workers(db: Database, name: str) -> int:
    where = (worker.c.state == leases.LIVE, worker.c.desired == leases.RUN, worker.c.queue.in_(queue.servers_of(name)))
    return int(db.query(sa.select(sa.func.count()).select_from(worker).where(*where))[0][0])
