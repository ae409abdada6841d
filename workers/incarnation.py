"""This process's identity in the database: one incarnation that registers, beats and obeys.

It beats only while work gets done (or there is none): a device that hangs loses its lease like a process that died. A
process that cannot beat in time stops writing by its own deadline, measured with its own monotonic clock.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version

from jobs import leases, processes
from jobs.leases import Orders
from storage.database import Database
from storage.errors import ImagemillError
from storage.settings import Settings

log = logging.getLogger("imagemill.worker")

_STALLED_EXIT = 70  # EX_SOFTWARE; the parent starts a fresh child


@dataclass
class Work:
    """What is in hand, as the beat reports it. Replaced fields only, so reading needs no lock."""

    progress: dict[int, int] = field(default_factory=dict)  # shard id -> items with an outcome
    items: int = 0
    rate: float = 0.0
    model: str = ""
    doing: str = ""
    busy: bool = False
    moved_at: float = field(default_factory=time.monotonic)

    def moved(self, items: int = 0) -> None:
        """Something got done: the process is not stuck."""
        now = time.monotonic()
        if items:
            seconds = max(1e-3, now - self.moved_at)
            weight = min(1.0, seconds / 5)  # an average over about the last five seconds
            self.rate += weight * (items / seconds - self.rate)
            self.items += items
        self.moved_at = now

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Around something that takes long while no item gets done: what to tell people meanwhile."""
        before, self.doing = self.doing, doing
        try:
            yield
        finally:
            self.doing = before


class Incarnation:
    """One life of a worker process: from its registration until it is retired or declared dead."""

    def __init__(
        self, db: Database, settings: Settings, device: str, queue: str, drain_asked: Callable[[], bool]
    ) -> None:
        self.db, self.settings, self.device, self.queue = db, settings, device, queue
        self.drain_asked = drain_asked
        self.id = ""
        self.work = Work()
        self.orders = Orders(alive=False)
        self._deadline = 0.0
        self._stop = threading.Event()
        self._soon = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._told_parent = False

    def start(self) -> None:
        """Register and beat from a thread of its own; a database that does not answer is waited for there."""
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye: whatever is still leased is given back."""
        self._stop.set()
        self._soon.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
        if self.id and self.orders.alive:
            try:
                leases.retire(self.db, self.id)
            except ImagemillError as error:
                log.warning("could not say goodbye, the lease will run out: %s", error)

    def ensure(self, timeout_s: float = 60) -> bool:
        """Wait until this process is registered and alive."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._stop.is_set():
            if self.may_write():
                return True
            self._soon.set()
            time.sleep(0.02)
        return False

    def moved(self) -> None:
        """Something got done, for who was made before this process was registered: each life has work of its own."""
        self.work.moved()

    def during(self, doing: str) -> AbstractContextManager[None]:
        """As of the work, likewise."""
        return self.work.during(doing)

    def may_write(self) -> bool:
        """Whether the lease certainly still holds."""
        return self.orders.alive and time.monotonic() < self._deadline

    def draining(self) -> bool:
        """Whether to finish the batch, give the rest back and stop."""
        return self.orders.drain or self.drain_asked()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._beat_or_register()
            except ImagemillError as error:
                log.warning("no heartbeat: %s", error)
            except Exception:  # without this thread the process would live on and never work again
                log.exception("no heartbeat")
            self._soon.wait(min(self.settings.lease_seconds / 4, 5 if not self.work.busy else 1))
            self._soon.clear()

    def _beat_or_register(self) -> None:
        stuck_s = time.monotonic() - self.work.moved_at if self.work.busy else 0.0
        if stuck_s > self.settings.stall_seconds + self.settings.lease_seconds:
            log.critical("no batch finished for %.0f s: this process gives up and is replaced", stuck_s)
            os._exit(_STALLED_EXIT)
        if stuck_s > self.settings.stall_seconds:
            return
        if not self.orders.alive:
            if not self.work.busy:  # old work must be thrown away before a new life begins
                self._register()
            return
        self._beat()

    def _register(self) -> None:
        asked_at = time.monotonic()
        worker_id = uuid.uuid4().hex
        leases.register(
            self.db,
            worker_id,
            name=f"{socket.gethostname()}/{self.device}",
            host=processes.host(),
            device=self.device,
            queue=self.queue,
            pid=os.getpid(),
            version=version("imagemill"),
        )
        with self._lock:
            self.id, self.work = worker_id, Work()
            self._extend(asked_at)
            self.orders = Orders(alive=True)

    def _beat(self) -> None:
        asked_at = time.monotonic()
        work = self.work
        orders = leases.beat(
            self.db,
            self.id,
            progress=dict(work.progress),
            items=work.items,
            rate=work.rate,
            model=work.model,
            doing=work.doing,
        )
        with self._lock:
            if orders.alive:
                self._extend(asked_at)
            else:
                log.warning("worker %s was declared dead: dropping its work", self.id)
            self.orders = orders
        if orders.drain and not self._told_parent:
            # The supervisor's process ends in order and is not started again; tickets then go to others.
            self._told_parent = True
            os.kill(os.getppid(), signal.SIGTERM)

    def _extend(self, asked_at: float) -> None:
        # Measured from before the question: the database's clock started the lease no earlier. The margin covers the
        # time between our last look at the deadline and the write that follows it.
        lease_s = self.settings.lease_seconds
        self._deadline = asked_at + lease_s - min(10.0, lease_s / 4)
