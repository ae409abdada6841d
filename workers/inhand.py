"""What a worker has in hand: a claimed shard on its way, its items, and the room they take."""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jobs.leases import Claim
from storage import shardfile
from storage.errors import ItemFailed
from storage.shardfile import Outcome
from workers.loaded import Loaded
from workers.models import Item, Prepared

_counting = threading.Lock()
_parse = json.JSONDecoder().raw_decode  # of what the planner wrote, without blanks around it


class Room:
    """A budget, of bytes or of items. A request larger than all of it is let in alone."""

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._changed = threading.Condition()

    def take(self, amount: int, timeout_s: float | None = None) -> bool:
        """Wait until there is room; False when there was none for so long."""
        with self._changed:
            there = self._changed.wait_for(lambda: self._used == 0 or self._used + amount <= self._total, timeout_s)
            self._used += amount if there else 0
            return there

    def give(self, amount: int) -> None:
        """Give room back."""
        with self._changed:
            self._used -= amount
            self._changed.notify_all()

    def widen(self, total: int) -> None:
        """Make it at least so large."""
        with self._changed:
            self._total = max(self._total, total)
            self._changed.notify_all()


class Portion:
    """How many items go through the threads together: the more, the less each takes, so that handing over costs little.

    A few pictures of a megapixel at a time, one of those that come from afar, and many items that are there in no time.
    """

    # Work that a hand-over is small against. Its queues take 0.05 ms; but the threads on both sides wake one another
    # and wait for one another to let Python go: one picture at a time made a job of the stub 6 % slower than a few.
    _WORTH_S = 24e-3
    MOST = 64

    def __init__(self) -> None:
        self._each_s = self._WORTH_S

    @property
    def size(self) -> int:
        """Items of the next portion."""
        return max(1, min(self.MOST, int(self._WORTH_S / self._each_s)))

    def took(self, items: int, seconds: float) -> None:
        """So many items kept a thread busy so long. Called from many threads; a lost update does no harm."""
        self._each_s += 0.2 * (max(1e-6, seconds / items) - self._each_s)


@dataclass(eq=False)
class Run:
    """A claimed shard on its way through the stream."""

    claim: Claim
    loaded: Loaded
    rows: list[shardfile.ManifestRow]
    prefix: str
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    dropped: bool = False
    portion: Portion = field(default_factory=Portion)
    begun: bool = False  # whether a batch with an item of it has been run
    keeping: int = 0  # items whose files are being put; counted by the device thread alone
    ending: Future[None] | None = None  # its writing and commit, or its giving back, once that has begun
    broken: str = ""  # what is wrong with the shard as a whole, where waiting would not help
    seconds: defaultdict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # stage -> time spent in it, summed over threads

    @property
    def complete(self) -> bool:
        return len(self.outcomes) == self.claim.items

    @property
    def ended(self) -> bool:
        return self.ending is not None and self.ending.done()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time of a block towards a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spent(stage, time.perf_counter() - started)

    def spent(self, stage: str, seconds: float) -> None:
        """Count time towards a stage. Called from many threads; the lock is the module's, and held for no time."""
        with _counting:
            self.seconds[stage] += seconds

    def item(self, position: int) -> Item:
        """What the model is told of an item."""
        key, uri, fingerprint, data = self.rows[position]
        return Item(key, uri, fingerprint, _parse(data)[0] if data else {})

    def record(self, position: int, size: tuple[int, int] | None, answer: Any) -> None:
        """What came of an item: its result or its failure.

        Args:
            size: (width, height) of the upright original, None when it was never decoded.
        """
        width, height = size or (None, None)
        key, uri, fingerprint, _ = self.rows[position]
        result, failure = (None, answer) if isinstance(answer, ItemFailed) else (answer, None)
        self.outcomes[position] = Outcome(position, key, uri, fingerprint, width, height, result, failure)


@dataclass(slots=True)  # not frozen, as storage.shardfile.Outcome is not
class Ready:
    """An item that left the decoders: prepared, or failed on the way."""

    run: Run
    position: int
    size: tuple[int, int] | None  # width, height of the upright original
    answer: Prepared | ItemFailed
    nbytes: int = 0  # that it takes of the room of Arrivals


class Arrivals:
    """The way from the decoders to the device, with room for so many bytes of prepared pictures.

    Who puts has to take room before; who gets gives it back once the pictures are computed, or will not be.

    Args:
        nbytes: None for any number, where one thread hands out items, waits for all of them, and computes them.
    """

    def __init__(self, nbytes: int | None = None) -> None:
        self._queue: queue.SimpleQueue[list[Ready] | None] = queue.SimpleQueue()
        self._room = None if nbytes is None else Room(nbytes)
        self._waiting = 0

    def put(self, items: list[Ready] | None) -> None:
        """Pass items on together; None only wakes whoever waits."""
        self._queue.put(items)

    def get(self, timeout_s: float | None = None) -> list[Ready] | None:
        """What was put first. Raises queue.Empty when nothing comes for so long."""
        return self._queue.get(timeout=timeout_s)

    @property
    def empty(self) -> bool:
        return self._queue.empty()

    @property
    def crowded(self) -> bool:
        """Whether somebody waits for room."""
        return self._waiting > 0

    def take(self, nbytes: int) -> bool:
        """Take room if there is some now."""
        return self._room is None or self._room.take(nbytes, 0)

    def wait(self, run: Run, nbytes: int) -> bool:
        """Take room once there is some; False when the run is dropped before."""
        assert self._room is not None, "there is always room"
        with _counting:
            self._waiting += 1
        try:
            while not run.dropped:
                if self._room.take(nbytes, 0.1):
                    return True
            return False
        finally:
            with _counting:
                self._waiting -= 1

    def give(self, items: Iterable[Ready]) -> None:
        """Give back what items took."""
        nbytes = sum(item.nbytes for item in items)
        if nbytes and self._room is not None:
            self._room.give(nbytes)


def attempt_prefix(claim: Claim) -> str:
    """Where this attempt at a shard, and no other, writes."""
    return f"jobs/{claim.job_id}/{claim.number:07d}/a{claim.fence}-{uuid.uuid4().hex[:8]}/"
