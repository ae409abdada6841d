"""Keeps what costly encoders have made of images, in the object store, so that each image is encoded once for all jobs.

It is a cache: anything in it may go at any time, and an error of the store means only that the image is encoded again.
"""

from __future__ import annotations

import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor

from storage.errors import ImagemillError
from storage.objects import Store
from workers.models import Encodings

log = logging.getLogger("imagemill.worker")

_FOLDER = "encodings/"
_LOOK_EVERY = 64  # puts on average between two looks at the size of the whole
_KEEP = 0.8  # of the limit, after it was passed
_WAITING = 16  # encodings that may wait to be stored; further ones are not kept


class StoredEncodings:
    """Encoded images under the store's encodings/, the oldest out first.

    Args:
        limit_bytes: of all of them together; 0 keeps nothing.
    """

    def __init__(self, store: Store, limit_bytes: int) -> None:
        self._store, self._limit = store, limit_bytes

    def get(self, name: str) -> bytes | None:
        """What was put under a name (a key of letters, digits and slashes), or None."""
        if not self._limit:
            return None
        try:
            return self._store.get(_FOLDER + name)
        except ImagemillError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """Keep an encoded image, and once in a while make room."""
        if not self._limit:
            return
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
    """Stores encodings in threads of its own, so that the device does not wait for a store."""

    def __init__(self, store: Encodings) -> None:
        self._store = store
        self._room = threading.Semaphore(_WAITING)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="encodings")

    def get(self, name: str) -> bytes | None:
        """What was put under a name, or None."""
        return self._store.get(name)

    def put(self, name: str, data: bytes) -> None:
        """Later; not at all when too many wait already."""
        if self._room.acquire(blocking=False):
            self._threads.submit(self._put, name, data)

    def _put(self, name: str, data: bytes) -> None:
        try:
            self._store.put(name, data)
        finally:
            self._room.release()

    def close(self) -> None:
        """Wait until what was put is stored."""
        self._threads.shutdown()
