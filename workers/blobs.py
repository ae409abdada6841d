"""Puts the files that a shard's items became while the shard is still worked on, so that they do not wait in memory.

    device thread   put: waits for room in bytes, then hands the file over
    putters         put it under the attempt's own prefix; the item then comes back to the device thread, as Kept

So the memory does not depend on how many items a shard has, and a slow store slows the device down instead of filling
the memory. A file whose shard is then lost or given back before its item is recorded is an orphan of its attempt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from storage import shardfile
from storage.errors import ImagemillError, Unavailable
from storage.objects import Store
from storage.shardfile import Outcome
from workers import faults
from workers.inhand import Room, Run

log = logging.getLogger("imagemill.worker")

_THREADS = 8
_PATIENCE_S = 60  # for a store that does not take a file, before the shard is given back
_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Kept:
    """What came of a file that was to be put.

    Attributes:
        result: names the blob and holds no bytes; None when it could not be put.
        broken: why not, where waiting would not help.
    """

    result: Any | None
    broken: str = ""


class Blobs:
    """Puts files for one worker process.

    Args:
        nbytes: of files that may wait to be put; one that is larger waits alone.
    """

    def __init__(self, store: Store, nbytes: int) -> None:
        self._store, self._room = store, Room(nbytes)
        self._putters = ThreadPoolExecutor(_THREADS, thread_name_prefix="blob")
        self._down = False  # whether the last put found no store

    def close(self) -> None:
        """Stop the threads."""
        self._putters.shutdown(wait=False, cancel_futures=True)

    def put(self, run: Run, result: Any, must_stop: Callable[[], bool], kept: Callable[[Kept], None]) -> None:
        """Put a result's file in another thread, once there is room for it; then `kept` is called there.

        Args:
            must_stop: asked before a put that failed is tried again.
        """
        nbytes = len(result.data)
        self._room.take(nbytes)
        self._putters.submit(self._put, run, result, nbytes, must_stop, kept)

    def _put(
        self, run: Run, result: Any, nbytes: int, must_stop: Callable[[], bool], kept: Callable[[Kept], None]
    ) -> None:
        try:
            answer = self.put_now(run, result, lambda: run.dropped or must_stop())
        except Exception as error:  # the item must come back, whatever went wrong with it
            log.exception("a file of shard %d could not be put", run.claim.shard_id)
            answer = Kept(None, f"a file could not be put: {type(error).__name__}: {error}")
        finally:
            self._room.give(nbytes)
        kept(answer)

    def put_now(self, run: Run, result: Any, must_stop: Callable[[], bool]) -> Kept:
        """Put a result's file in this thread, again and again while the store does not answer."""
        until = time.monotonic() + _PATIENCE_S
        while not (self._down and must_stop()):
            try:
                with run.timed("write"):
                    kept = shardfile.put_blob(self._store, run.prefix, result)
                self._down = False
                faults.point("kept")
                return Kept(kept)
            except Unavailable as error:
                self._down = True
                if time.monotonic() > until:
                    break
                log.warning("a file of shard %d could not be put, trying again: %s", run.claim.shard_id, error)
                time.sleep(_PAUSE_S)
            except ImagemillError as error:
                return Kept(None, f"a file could not be put: {error}")
        return Kept(None)

    def take_over(
        self, run: Run, key: str, done: Sequence[Outcome], must_stop: Callable[[], bool], moved: Callable[[], None]
    ) -> list[Outcome]:
        """Outcomes of an earlier attempt at a shard, with their files put under this one's prefix, in their order.

        No two attempts share a file, so that the collector can take the earlier one's away. An item whose file is gone
        or damaged is left out, and computed again.

        Args:
            key: of the object that the earlier attempt left.
            moved: called for each file, to show that the process lives.

        Raises:
            Unavailable: the store does not answer, or this was to stop.
        """

        def copy(outcome: Outcome) -> Outcome | None:
            if not shardfile.has_blob(outcome.result):
                return outcome
            if must_stop():
                raise Unavailable("this worker has to stop")
            moved()
            try:
                full = shardfile.get_blob(self._store, key, outcome.result)
            except ImagemillError as error:
                self._store.stat(key)  # raises Unavailable when it is the store, not this file
                log.warning("%r is computed again: %s", outcome.key, error)
                return None
            return replace(outcome, result=shardfile.put_blob(self._store, run.prefix, full))

        return [outcome for outcome in self._putters.map(copy, done) if outcome is not None]
