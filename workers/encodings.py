"""Keeps what costly encoders have made of images, in the object store, so that each image is encoded once for all jobs.

It is a cache: anything in it may go at any time, and an error of the store means only that the image is encoded again.
"""

from __future__ import annotations

import logging
import random

from storage.errors import ImagemillError
from storage.objects import Store

log = logging.getLogger("imagemill.worker")

_FOLDER = "encodings/"
_LOOK_EVERY = 64  # puts on average between two looks at the size of the whole
_KEEP = 0.8  # of the limit, after it was passed


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
