"""Runs a batch on a CPU in lanes: each core computes pictures of its own, and none waits for another.

With all cores on one picture, they meet at a barrier after every layer, hundreds of times, and each time all wait for
the one that something else has held up. On two shared cores, interleaved, 6 x 1.5 s, medians of images/s with all cores
on a batch, and in lanes: YOLOv8 n at 640 x 448 in ONNX Runtime 12.6 and 16.7, in OpenVINO 13.5 and 15.8; DINOv2
ViT-S/14 at 224 in ONNX Runtime 8.1 and 9.5, in OpenVINO 7.8 and 8.5.

torch keeps all cores on a batch. Lanes were tried there, each with a copy of the module over the same weights and half
of a batch: whole jobs of DINOv2 ran at 1.05 times the speed, of YOLOv8 n at the same, which is not worth the copies.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from workers.runtimes import Network, Session

_MOST = 8  # on a machine of more cores, several work in a lane


def opened(network: Network, threads: int, open_for: Callable[[int], Session]) -> Session:
    """A session that runs a batch in lanes where the network's inputs and outputs are batches, else as it is.

    Args:
        threads: of all lanes together.
        open_for: so many calls at once that share all threads -> a session that may be called from as many threads.
            Where it is more than one, what the session gives may be overwritten by the next call of the same thread.
    """
    each = math.ceil(threads / _MOST)
    lanes = threads // each
    return _Lanes(lanes, open_for, each == 1) if lanes > 1 and _is_batched(network) else open_for(1)


def alone(session: Session) -> bool:
    """Whether no core waits for another in it: several threads may call it, and cores do other work, at no cost."""
    return isinstance(session, _Lanes) and session.alone


def _is_batched(network: Network) -> bool:
    """Whether every input and output has the pictures of a batch, and nothing else, along its first axis."""
    names = (*network.example, *network.outputs)
    return {network.dynamic_axes.get(name, {}).get(0) for name in names} == {"batch"}


class _Lanes:
    """A picture at a time to whichever lane is free. May be called from several threads."""

    def __init__(self, lanes: int, open_for: Callable[[int], Session], alone: bool) -> None:
        self._lanes, self._open_for, self.alone = lanes, open_for, alone
        self._narrow = open_for(lanes)
        self._wide: Session | None = None  # opened when it is asked for: it is the network a second time
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(lanes, thread_name_prefix="lane")

    def __call__(self, **tensors: Any) -> dict[str, Any]:
        count = len(next(iter(tensors.values())))
        if 2 * count <= self._lanes:  # too few pictures for half of the cores
            with self._lock:
                self._wide = self._wide or self._open_for(1)
            return self._wide(**tensors)
        each = [{name: tensor[i : i + 1] for name, tensor in tensors.items()} for i in range(count)]
        whole = _Whole(count)
        for _ in self._pool.map(lambda place: whole.put(place, self._narrow(**each[place])), range(count)):
            pass
        return whole.outputs


class _Whole:
    """The outputs of a batch, to which each lane adds the rows of its pictures."""

    def __init__(self, count: int) -> None:
        self._count, self._lock = count, threading.Lock()
        self.outputs: dict[str, Any] = {}

    def put(self, place: int, rows: dict[str, Any]) -> None:
        """Copy one picture's outputs, (1, ...) each, to its place."""
        with self._lock:
            self.outputs = self.outputs or {
                name: row.new_empty((self._count, *row.shape[1:])) for name, row in rows.items()
            }
        for name, row in rows.items():
            if row.shape[1:] != self.outputs[name].shape[1:]:  # which torch might stretch
                raise RuntimeError(f"expected {name} of one shape for all pictures, but got {tuple(row.shape[1:])}")
            self.outputs[name][place] = row[0]
