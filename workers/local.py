"""Everything one machine needs to run jobs by itself: the embedded broker, the fleet, the reconciler.

One process at a time runs them for a home folder: the one that holds the lock on run/lock. The system frees the lock
when that process ends, however it ends, and whoever waits for a job then takes over.
"""

from __future__ import annotations

import contextlib
import fcntl
from types import TracebackType
from typing import IO, TYPE_CHECKING

from storage.settings import Settings
from workers import devices

if TYPE_CHECKING:
    from jobs.broker import Broker
    from workers.fleet import Fleet


class Local:
    """The workers of this machine, if nobody else runs them.

    Args:
        device: what `devices.find` takes.
        quiet: send the workers' output to a log file in the home folder, not to this process's stderr.
    """

    def __init__(self, settings: Settings, device: str = "auto", *, quiet: bool = True) -> None:
        self.settings = settings
        self.devices = devices.find(device)
        self.log_file = settings.home / "logs" / "worker.log" if quiet else None
        self._lock: IO[bytes] | None = None
        self._broker: Broker | None = None
        self._fleet: Fleet | None = None

    def __enter__(self) -> Local:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def owner(self) -> bool:
        """Whether this process runs the workers."""
        return self._fleet is not None

    @property
    def drained(self) -> bool:
        """Whether this process runs the workers, and somebody has drained all of them."""
        return self._fleet is not None and self._fleet.drained

    def tend(self) -> None:
        """Start what does not run, unless another process has the lock. Call it a few times a second."""
        if self._lock is None and not self._take_lock():
            return
        # Celery comes with these two, which a run that finds everything fresh never needs.
        from jobs.broker import Broker
        from workers.fleet import Fleet

        if self.settings.embedded and (self._broker is None or not self._broker.alive()):
            self._broker = Broker(self.settings)
        if self._fleet is None:
            self._fleet = Fleet(self.settings, self.devices, self.log_file)
            self._fleet.start()
        self._fleet.watch()

    def close(self) -> None:
        """Drain the workers and stop the broker, the broker last."""
        if self._fleet is not None:
            self._fleet.drain()
        if self._broker is not None:
            self._broker.stop()
        if self._lock is not None:
            self._lock.close()
        self._fleet = self._broker = self._lock = None

    def kill(self) -> None:
        """End the workers without waiting for their batches."""
        if self._fleet is not None:
            self._fleet.kill()

    def _take_lock(self) -> bool:
        folder = self.settings.home / "run"
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with contextlib.suppress(OSError):
                lock.close()
            return False
        self._lock = lock
        return True
