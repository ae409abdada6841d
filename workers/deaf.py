"""Notices that this worker hears no tickets though some lie in the broker, and has its consumer started again.

Celery's consumer stays silent in some cases after its broker has come and gone, and sleeps up to 30 s between attempts
to connect. So nothing relies on it to come back: a worker that is idle while tickets of its queues lie in the broker
for some seconds ends its parent, and with it itself; the supervisor starts both anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

from jobs import queue
from storage.errors import ImagemillError
from storage.settings import Settings

log = logging.getLogger("imagemill.worker")

_LOOK_S = 1.0
_LOOKS = 5  # in a row with tickets there and none of them heard; a consumer that works takes one at once


class Watch:
    """Looks at the broker while the worker is idle.

    Args:
        draining: whether the worker wants no more tickets.
        give_up: called once, when it is deaf.
    """

    def __init__(
        self,
        settings: Settings,
        queues: Sequence[str],
        draining: Callable[[], bool],
        give_up: Callable[[], None],
    ) -> None:
        self.settings, self.queues = settings, queues
        self.draining, self.give_up = draining, give_up
        self._busy = False
        self._looks = 0
        self._stop = threading.Event()

    def start(self) -> None:
        """Look once a second from a thread of its own."""
        threading.Thread(target=self._run, name="deaf", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        """While a ticket is worked on."""
        self._busy = True
        try:
            yield
        finally:
            self._looks, self._busy = 0, False

    def look(self) -> bool:
        """One look; returns whether the worker is deaf by now."""
        if self._busy or self.draining() or not self._tickets_lie_there():
            self._looks = 0
        else:
            self._looks += 1
        return self._looks >= _LOOKS and not self._busy

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            if self.look():
                log.critical("tickets lie in the broker and none is heard: this worker is started again")
                self.give_up()
                return

    def _tickets_lie_there(self) -> bool:
        try:
            return any(queue.waiting(self.settings, name) for name in self.queues)
        except ImagemillError:
            return False


def end_parent() -> None:
    """End the Celery process that this one belongs to; the kernel ends this one with it."""
    os.kill(os.getppid(), signal.SIGKILL)
