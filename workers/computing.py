"""Knows when networks run: for how long, and that decoders on the same CPU wait meanwhile.

On a CPU decoding and computing use the same cores. At once, they would wait for each other at every barrier of the
network's parallel loops; so no picture is begun while a network runs, and all that one can reach is the sum of both.
On a GPU nobody waits for anybody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Computing:
    """Runs of networks on one device. `running` and `take_s` are called from the device's thread only.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self._on_cpu = device == "cpu"
        self._free = threading.Event()
        self._free.set()
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []  # of CUDA: a call returns before the device is done

    def wait(self) -> None:
        """Before a picture is decoded."""
        self._free.wait()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around every call of a network."""
        if not self._on_cpu:
            with self._between_events():
                yield
            return
        self._free.clear()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started
            self._free.set()

    @contextmanager
    def _between_events(self) -> Iterator[None]:
        import torch

        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def take_s(self) -> float:
        """Seconds that networks ran since the last call, once their results have been read."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
