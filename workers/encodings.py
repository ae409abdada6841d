"""Keeps what costly encoders have made of images, in the object store, so that each image is encoded once for all jobs.

It is a cache: anything in it may go at any time, and an error of the store means only that the image is encoded again.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from storage.errors import ImagemillError
from storage.objects import Store

log = logging.getLogger("imagemill.worker")

_FOLDER = "encodings/"
_LOOK_EVERY = 64  # puts on average between two looks at the size of the whole
_KEEP = 0.8  # of the limit, after it was passed
_WAITING = 16  # encodings that may wait to be stored
_PATIENCE_S = 5.0  # for one more to be allowed to wait
_RECENT_BYTES = 256_000_000  # remembered by a process: of SAM some 120 images, as many as are under way


class StoredEncodings:
    """Encoded images under the store's encodings/, the oldest out first.

    Args:
        limit_bytes: of all of them together.
    """

    def __init__(self, store: Store, limit_bytes: int) -> None:
        self._store, self._limit = store, limit_bytes

    def get(self, name: str) -> bytes | None:
        """What was put under a name (a key of letters, digits and slashes), or None."""
        try:
            return self._store.get(_FOLDER + name)
        except ImagemillError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """Keep an encoded image, and once in a while make room."""
        try:
            self._store.put(_FOLDER + name, data)
            if random.random() < 1 / _LOOK_EVERY:
                self._make_room()
        except ImagemillError as error:
            log.warning("an encoded image could not be kept: %s", error)

    def _make_room(self) -> None:
        there = sorted(self._store.list(_FOLDER), key=lambda stat: stat.modified, reverse=True)
        total, surplus = 0, []
        over = sum(stat.size for stat in there) > self._limit
        for stat in there:
            total += stat.size
            if over and total > _KEEP * self._limit:
                surplus.append(stat.key)
        self._store.delete(surplus)


class Keeper:
    """Stores encodings in threads of its own, and remembers those that were made last.

    An image may be encoded for one job while another job has made it ready to be encoded too, so a lookup before the
    device is not enough: `recent` is asked again when its turn comes.
    """

    def __init__(self, store: StoredEncodings) -> None:
        self._store = store
        self._waiting = threading.Semaphore(_WAITING)
        self._stuck = False
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="encodings")
        self._lock = threading.Lock()
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        self._recent_bytes = 0

    def get(self, name: str) -> bytes | None:
        """What was put under a name, or None."""
        return self.recent(name) or self._store.get(name)

    def recent(self, name: str) -> bytes | None:
        """What this process has put under a name a short while ago, or None."""
        with self._lock:
            return self._recent.get(name)

    def put(self, name: str, data: bytes) -> None:
        """Remember it, and store it later; the caller waits a little when many wait to be stored.

        To encode an image a second time costs more than to wait. A store that takes nothing for so long costs the fleet
        its use of this one and of those that follow, which are waited for again once it has taken something.
        """
        self._remember(name, data)
        if self._waiting.acquire(timeout=0 if self._stuck else _PATIENCE_S):
            self._threads.submit(self._put, name, data)
        else:
            self._stuck = True

    def close(self) -> None:
        """Wait until what was put is stored."""
        self._threads.shutdown()

    def _remember(self, name: str, data: bytes) -> None:
        with self._lock:
            if name not in self._recent:
                self._recent[name] = data
                self._recent_bytes += len(data)
            while self._recent_bytes > _RECENT_BYTES:
                self._recent_bytes -= len(self._recent.popitem(last=False)[1])

    def _put(self, name: str, data: bytes) -> None:
        try:
            self._store.put(name, data)
        finally:
            self._stuck = False
            self._waiting.release()


class Written:
    """Encodings that can be kept and not looked up, for a model whose encoder is being timed."""

    def __init__(self, keeper: Keeper) -> None:
        self.put = keeper.put

    def get(self, name: str) -> None:
        """Nothing."""

    def recent(self, name: str) -> None:
        """Nothing."""
