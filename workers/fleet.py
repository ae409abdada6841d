"""One pinned process a device: start, watch, restart, drain. The supervisor itself never touches a device."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import processes, queue
from jobs.reconcile import Reconciler
from storage.database import Database
from storage.settings import Settings
from workers.devices import DEVICE, DRAIN_FILE, QUEUE, Device

log = logging.getLogger("imagemill.fleet")

_FOLDER = "imagemill-worker-"  # in the temporary folder, one a process
_RESTART_S = (1, 2, 5, 10, 30)  # pause before the n-th restart in a row
_HEALTHY_S = 60  # a process that lived so long starts that count anew
_DRAIN_S = 60  # a drain that takes longer than this is ended by force; its leases run out


@dataclass
class Slot:
    """A device and the process that serves it now."""

    device: Device
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restarts: int = 0
    start_at: float = 0.0  # not before, after a crash


class Fleet:
    """The workers of one machine and a reconciler.

    Args:
        log_file: where the workers' output goes, None for this process's own stderr.
    """

    def __init__(self, settings: Settings, devices: Sequence[Device], log_file: Path | None = None) -> None:
        self.settings, self.log_file = settings, log_file
        self.slots = [Slot(device) for device in devices]
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start every process, and the reconciler in a thread."""
        # From the calling thread, which must outlive them: the kernel ties a child's life to the thread that made it.
        for slot in self.slots:
            self._launch(slot)
        reconciler = Reconciler(Database(self.settings.database, patience_s=5), self.settings)
        self._threads = [threading.Thread(target=reconciler.run, args=(self._stop,), name="reconcile", daemon=True)]
        for thread in self._threads:
            thread.start()

    def watch(self) -> None:
        """Start again what has died, once its pause is over. Call it a few times a second."""
        now = time.monotonic()
        for slot in self.slots:
            if slot.process is not None and slot.process.poll() is not None:
                self._died(slot, now)
            if slot.process is None and now >= slot.start_at and not self._stop.is_set():
                self._launch(slot)

    @property
    def drained(self) -> bool:
        """Whether every worker has ended in order and none is started again."""
        return all(slot.start_at == math.inf for slot in self.slots)

    def drain(self, grace_s: float = _DRAIN_S) -> None:
        """Let every worker finish its batch and give back the rest; end by force what does not stop in time."""
        self._stop.set()
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for slot in self.slots:
            if slot.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    slot.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        self.kill()
        for thread in self._threads:
            thread.join(timeout=5)

    def kill(self) -> None:
        """End everything now; what was leased comes back when the leases run out."""
        self._stop.set()
        for slot in self.slots:
            if slot.process is not None and slot.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(slot.process.pid, signal.SIGKILL)
                slot.process.wait()

    def _signal(self, number: int) -> None:
        for slot in self.slots:
            if slot.process is not None and slot.process.poll() is None:
                slot.process.send_signal(number)

    def _died(self, slot: Slot, now: float) -> None:
        assert slot.process is not None
        if slot.process.returncode == 0:
            log.warning("the worker on %s has drained; it is not started again", slot.device.id)
            slot.process, slot.start_at = None, math.inf
            return
        slot.restarts = 0 if now - slot.started_at > _HEALTHY_S else slot.restarts + 1
        pause = _RESTART_S[min(slot.restarts, len(_RESTART_S) - 1)]
        log.error(
            "the worker on %s ended with code %s; starting again in %d s",
            slot.device.id,
            slot.process.returncode,
            pause,
        )
        slot.process, slot.start_at = None, now + pause

    def _launch(self, slot: Slot) -> None:
        output = None
        if self.log_file is not None:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            output = self.log_file.open("ab")
        # A process group of its own, so that Ctrl-C in the terminal reaches the supervisor alone, which drains.
        slot.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from workers.fleet import serve; serve()"],
            env={**os.environ, **slot.device.environment, DEVICE: slot.device.id, QUEUE: slot.device.queue},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # A supervisor that is killed takes its workers along, so that none works on unseen.
            preexec_fn=functools.partial(processes.end_with_parent, signal.SIGTERM),
        )
        slot.started_at = time.monotonic()
        if output is not None:
            output.close()


def serve() -> None:
    """The process of one device: a Celery worker with one spawned child, pinned by the environment it was given."""
    from multiprocessing.util import Finalize

    from celery.signals import worker_shutting_down

    from storage import settings as settings_module
    from workers.logs import configure

    settings = settings_module.load()
    configure(settings.log_level)
    folder = own_folder()
    # Celery's pool makes a folder for temporary files: within ours, it is found when this process is killed. In an
    # orderly end ours is deleted after it, which multiprocessing does at -100.
    tempfile.tempdir = str(folder)
    Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-200)
    drain_file = folder / "drain"
    os.environ[DRAIN_FILE] = str(drain_file)

    @worker_shutting_down.connect(weak=False)
    def _drain(**kwargs: Any) -> None:
        drain_file.touch()

    app = queue.app(settings)
    app.conf.imports = ("workers.tasks",)
    device, name = os.environ[DEVICE], os.environ[QUEUE]
    app.worker_main(
        [
            "--quiet",
            "worker",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            f"--loglevel={settings.log_level}",
            f"--hostname=imagemill-{device}-{os.getpid()}@%h",
            f"--queues={','.join(queue.served_by(name))}",
        ]
    )


def own_folder() -> Path:
    """A folder for this process alone, which holds a lock on it as long as it lives; those of the dead are deleted.

    A lock and not a process id, since containers that share a temporary folder do not share ids.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):  # another user's, or taken away meanwhile
            lock = _locked(old)
            try:
                shutil.rmtree(old)
            finally:
                os.close(lock)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
        with contextlib.suppress(OSError):  # another process took it for a dead one's before it was locked
            _locked(folder)
            return folder


def _locked(folder: Path) -> int:
    """The open, locked folder. Raises OSError when a process holds it already."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(number).st_ino != folder.stat().st_ino:
            raise FileNotFoundError(folder)
    except OSError:
        os.close(number)
        raise
    return number
