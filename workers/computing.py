"""Knows when networks run: for how long, that decoders on the same CPU wait meanwhile, and what may go on beside them.

On a CPU decoding and computing use the same cores. At once, they would wait for each other at every barrier of the
network's parallel loops; so no picture is begun while a network runs, and all that one can reach is the sum of both.
Where each core computes pictures of its own (workers/lanes.py) there are no barriers, and nobody waits. Nor on a GPU:
it gets its next batch while it computes one, and what it gave for the one before is turned into answers on a stream of
its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spell:
    """The runs of networks for one batch.

    Attributes:
        runs: beginning and end of each, seconds of time.perf_counter on a CPU, events of CUDA on a GPU.
        given: an event of CUDA after all that was asked of the GPU for the batch, None on a CPU.
    """

    runs: tuple[tuple[Any, Any], ...]
    given: Any = None

    def seconds(self, earlier: Spell | None = None) -> float:
        """How long networks ran; on a CPU, since an earlier batch ended. On a GPU it waits for the last of them."""
        runs = self.runs
        if earlier is not None and earlier.runs and runs and isinstance(runs[0][0], float):
            over = earlier.runs[-1][1]
            runs = tuple((max(first, over), max(last, over)) for first, last in runs)
        return sum(_seconds(first, last) for first, last in runs)

    def after(self, earlier: Spell | None) -> float:
        """Seconds between the last run of an earlier batch and the first of this one; 0 where one had none."""
        if earlier is None or not earlier.runs or not self.runs:
            return 0.0
        return max(0.0, _seconds(earlier.runs[-1][1], self.runs[0][0]))


def _seconds(first: Any, last: Any) -> float:
    if isinstance(first, float):
        return float(last - first)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


class Computing:
    """Runs of networks on one device. `take` and `take_s` tell of the runs of the thread that calls them.

    Args:
        device: "cpu" or "cuda".

    Attributes:
        ahead: whether the device takes a batch while it computes another.
    """

    def __init__(self, device: str) -> None:
        self._on_cpu = device == "cpu"
        self.ahead = not self._on_cpu
        self._free = threading.Event()
        self._free.set()
        self._mine = threading.local()
        self._beside: Any = None  # the stream of what is done beside the computing

    def wait(self) -> None:
        """Before a picture is decoded."""
        self._free.wait()

    @contextmanager
    def running(self, barriers: bool = True) -> Iterator[None]:
        """Around every call of a network.

        Args:
            barriers: whether cores wait for each other in it, and so for whoever else takes one.
        """
        if not self._on_cpu:
            first = _event()  # a call returns before the device is done, so a clock of the host would tell nothing
            yield
            self._runs().append((first, _event()))
            return
        if barriers:
            self._free.clear()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._runs().append((started, time.perf_counter()))
            if barriers:
                self._free.set()

    def take(self) -> Spell:
        """The runs since the last call."""
        return Spell(self._taken(), None if self._on_cpu else _event())

    def take_s(self) -> float:
        """Seconds that networks ran since the last call."""
        return Spell(self._taken()).seconds()

    def _runs(self) -> list[tuple[Any, Any]]:
        """Of this thread."""
        if not hasattr(self._mine, "runs"):
            self._mine.runs = []
        runs: list[tuple[Any, Any]] = self._mine.runs
        return runs

    def _taken(self) -> tuple[tuple[Any, Any], ...]:
        runs = tuple(self._runs())
        self._runs().clear()
        return runs

    @contextmanager
    def answering(self, spell: Spell) -> Iterator[None]:
        """Around what is done with a batch's results in another thread: it waits for that batch, not for later ones.

        What was made within it is there at its end.
        """
        if spell.given is None:
            yield
            return
        import torch

        if self._beside is None:
            made: Any = torch.cuda.Stream
            self._beside = made()
        with torch.cuda.stream(self._beside):
            self._beside.wait_event(spell.given)
            try:
                yield
            finally:
                self._beside.synchronize()  # before memory that it reads goes to somebody else


def _event() -> Any:
    """An event of CUDA, recorded now on the current stream."""
    import torch

    made: Any = torch.cuda.Event
    event = made(enable_timing=True)
    event.record()
    return event
