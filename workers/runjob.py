"""Brings a recipe up to date on behalf of a command: submit, plan, keep this machine's workers running, wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from jobs import lifecycle, plan, progress, states
from jobs.lifecycle import Job
from jobs.progress import Status
from jobs.spec import JobSpec
from storage import index
from storage.database import Database
from storage.errors import Conflict, Misconfigured, Unavailable
from storage.objects import Store
from storage.settings import Settings

POLL_S = 0.2
_SLOWEST_POLL_S = 1.0
_POLL_SHARE = 0.02  # of the time that a job has taken: who follows it takes little of the processor that works on it
_HINT_AFTER_S = 10  # without any live worker
_PLANNED_BEFORE = "job {} was planned before; for images that have come or changed since, run the same command again"


class Watcher(Protocol):
    """Who is told how it goes."""

    def say(self, text: str) -> None: ...
    def planning(self, report: plan.Report) -> None: ...
    def status(self, status: Status) -> None: ...


@dataclass(frozen=True, slots=True)
class How:
    """How a job is run; nothing of it changes a result."""

    name: str = ""
    priority: int = 0
    force: bool = False
    token: str | None = None
    max_failures: float = 1.0
    prune_all: bool = False
    wait: bool = True
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Ran:
    """Where the job stands when the command may go on, and what planning had to remark."""

    status: Status
    notes: list[str] = field(default_factory=list)


def run(db: Database, store: Store, settings: Settings, spec: JobSpec, how: How, watcher: Watcher) -> Ran:
    """Submit and plan a job, and with `how.wait` see it to its end.

    Raises:
        BadInput: the dataset is empty; nothing was made.
        Unavailable: the broker does not answer; nothing was made.
        Conflict: as `submit`.
        Misconfigured: the job was paused, or this machine's own workers drained, with the reason and the remedy.
    """
    if how.wait and not settings.embedded:
        from jobs import queue

        queue.check(settings)  # now, rather than to wait in silence for workers that cannot hear
    check_not_empty(db, settings, spec)
    if how.wait and (how.force or lifecycle.recipe_id(db, spec) is None):
        # There will be work, and whoever waits for it should not wait for Celery between the first shard and the bell.
        from jobs import queue, reconcile  # noqa: F401

        queue.load(settings)
    start = starter(settings)
    with own_workers(settings, how, watcher) as tend:

        def see_out(other: Job) -> None:
            _plan(db, store, settings, other, how, watcher, tend)
            wait(db, other.id, watcher, tend, start)

        job, new = submit(db, spec, how, watcher, see_out)
        report = _plan(db, store, settings, job, how, watcher, tend)
        notes = report.notes if report else [] if new else [_PLANNED_BEFORE.format(job.id)]
        if not how.wait:
            return Ran(progress.status(db, job.id), notes)
        return Ran(wait(db, job.id, watcher, tend, start), notes)


def check_not_empty(db: Database, settings: Settings, spec: JobSpec) -> None:
    """Raise BadInput for a dataset without images."""
    known = lifecycle.recipe_id(db, spec)
    plan.check_not_empty(spec.dataset, known is not None and index.has_items(db, known), settings)


def submit(db: Database, spec: JobSpec, how: How, watcher: Watcher, see_out: Callable[[Job], None]) -> tuple[Job, bool]:
    """A new job for the spec, or the unfinished one of its recipe if that does what is asked; and whether it is new.

    Args:
        see_out: brings an unfinished job of the recipe that does less to its end; then a new one is made.

    Raises:
        Conflict: there is such a job, and nobody waits for its end.
    """
    options = {name: getattr(how, name) for name in ("name", "priority", "force", "token", "max_failures")}
    while True:
        job, new = lifecycle.submit(db, spec, **options)
        lacks = "" if new else _lacks(job, how)
        if not lacks:
            watcher.say(f"job {job.id}: {spec.model} over {spec.dataset}" + ("" if new else " (continued)"))
            return job, new
        if not how.wait:
            raise Conflict(f"job {job.id} of the same recipe {lacks}; run this again when it has ended")
        watcher.say(f"job {job.id} of the same recipe {lacks}; a new one follows when it has ended")
        see_out(job)


def _lacks(job: Job, how: How) -> str:
    """Why an unfinished job of the recipe does less than what is asked, or ""."""
    if job.state in states.JOB_FINAL:
        return ""  # a repeated token's
    if job.cancelled:
        return "is being cancelled"
    if job.only:
        return "only computes again what failed"
    return "was begun without --force" if how.force and not job.force else ""


def wait(
    db: Database, job_id: int, watcher: Watcher, tend: Callable[[], None] = lambda: None, start: str = "imagemill up"
) -> Status:
    """Follow a job to its end. Raises Misconfigured when it is paused, with the reason and the remedy.

    Args:
        tend: called at least once a second meanwhile.
        start: the command that starts workers, for when there are none.
    """
    began_at = seen_at = time.monotonic()  # the latter: a live worker
    while True:
        with contextlib.suppress(Unavailable):
            status = progress.status(db, job_id)
            watcher.status(status)
            if status.ended:
                return status
            if status.state == "paused":
                remedy = status.reason or f"go on with: imagemill resume {job_id}"
                raise Misconfigured(f"job {job_id} is paused: {remedy}")
            if time.monotonic() - seen_at > _HINT_AFTER_S:
                seen_at = time.monotonic()
                if not progress.workers(db):
                    seen_at += 5 * _HINT_AFTER_S  # not said again for a minute
                    watcher.say(f"no live worker serves queue {status.spec['queue']}; start one with: {start}")
        tend()
        time.sleep(min(_SLOWEST_POLL_S, max(POLL_S, _POLL_SHARE * (time.monotonic() - began_at))))


def starter(settings: Settings) -> str:
    """The command that starts workers here."""
    return "imagemill up" if settings.embedded else "imagemill worker"


@contextlib.contextmanager
def own_workers(settings: Settings, how: How, watcher: Watcher) -> Iterator[Callable[[], None]]:
    """Yields what keeps this machine's own workers running; with a broker URL the workers are elsewhere."""
    if not settings.embedded or not how.wait:
        yield lambda: None
        return
    from workers.local import Local

    with Local(settings, how.device) as local:

        def tend() -> None:
            local.tend()
            if local.drained:
                raise Misconfigured("the workers of this machine were drained; the same command goes on with the job")

        try:
            yield tend
        except KeyboardInterrupt:
            watcher.say("stopping: what is done is kept; the same command continues (again Ctrl-C: at once)")
            try:
                local.close()
            except KeyboardInterrupt:
                local.kill()
            raise


def ring(db: Database, settings: Settings, tend: Callable[[], None]) -> None:
    """Tell the workers that there is work, after starting those of this machine."""
    tend()
    from jobs import reconcile  # Celery comes with it, which a run that finds everything fresh does not need

    with contextlib.suppress(Unavailable):  # the reconciler rings again
        reconcile.refill(db, settings)


def _plan(
    db: Database,
    store: Store,
    settings: Settings,
    job: Job,
    how: How,
    watcher: Watcher,
    tend: Callable[[], None],
) -> plan.Report | None:
    def on_shards() -> None:
        if how.wait or not settings.embedded:
            ring(db, settings, tend)

    options: dict[str, Any] = {"prune_all": how.prune_all, "on_progress": watcher.planning}
    try:
        return plan.plan(db, store, settings, job, on_shards=on_shards, on_wait=tend, **options)
    except Conflict as error:
        watcher.say(str(error))  # how the job goes on says its status
        return None
