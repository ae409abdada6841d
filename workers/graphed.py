"""Runs a network on a GPU as a CUDA graph where shapes repeat: one launch a batch instead of one a layer.

A small network, or a small batch, is done sooner than the host can launch its hundreds of kernels. What a graph gives
is compared once with what the network itself gives; a network that cannot be captured, that gives other numbers as a
graph, or that leaves no memory for it, runs as ever. Not yet run on a GPU.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

log = logging.getLogger("imagemill.worker")

_AFTER = 3  # calls with the same shapes, before it is worth a capture
_GRAPHS = 4  # shapes whose graphs are kept, those used last
_SHAPES = 1000  # that are counted
_WARM_UPS = 2  # before a capture, as torch's documentation asks for; libraries choose their kernels in the first
_OFF = 1e-2  # of the largest number: more than rounding

Call = Callable[..., tuple[Any, ...]]


class Graphed:
    """A network's call, replayed for shapes that it has been called with often enough. For one thread.

    Args:
        call: tensors on the device -> tensors there.
        capture: makes the graph of a call; raises when that cannot be.
    """

    def __init__(self, call: Call, capture: Callable[[Call, Sequence[Any]], Call] | None = None) -> None:
        self._call, self._capture = call, capture or captured
        self._seen: Counter[Hashable] = Counter()
        self._graphs: OrderedDict[Hashable, Call] = OrderedDict()
        self._off = False

    def __call__(self, *given: Any) -> tuple[Any, ...]:
        shapes = tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in given)
        graph = self._graphs.get(shapes)
        if graph is not None:
            self._graphs.move_to_end(shapes)
            return graph(*given)
        outputs = self._call(*given)
        if not self._off:
            self._count(shapes, given, outputs)
        return outputs

    def _count(self, shapes: Hashable, given: Sequence[Any], outputs: Sequence[Any]) -> None:
        if len(self._seen) >= _SHAPES:
            self._seen.clear()
        self._seen[shapes] += 1
        if self._seen[shapes] < _AFTER:
            return
        try:
            graph = self._capture(self._call, given)
            if not _alike(graph(*given), outputs):
                raise RuntimeError("a graph of it gives other numbers")
        except Exception as error:  # noqa: BLE001 (whatever it is, the network runs without)
            log.warning("no CUDA graphs for this network: %s: %s", type(error).__name__, error)
            self._off = True
            self._graphs.clear()
            return
        self._graphs[shapes] = graph
        while len(self._graphs) > _GRAPHS:
            self._graphs.popitem(last=False)


def captured(call: Call, given: Sequence[Any]) -> Call:
    """The graph of a call with tensors of these shapes. Raises RuntimeError when it cannot be captured.

    It has an input and output memory of its own: what it is given is copied in, what it gives is a copy.
    """
    import torch

    made: Any = torch.cuda  # whose classes carry no types
    free, total = made.mem_get_info()
    if free < total / 2:
        raise RuntimeError(f"only {free / 1e9:.1f} of {total / 1e9:.1f} GB of the device's memory are free")
    inputs = [tensor.clone() for tensor in given]
    beside = _capturing()
    beside.wait_stream(made.current_stream())
    with made.stream(beside):
        for _ in range(_WARM_UPS):
            call(*inputs)
    made.current_stream().wait_stream(beside)
    graph = made.CUDAGraph()
    # Other threads copy and make results meanwhile; only what this thread does belongs to the graph.
    with made.graph(graph, stream=beside, capture_error_mode="thread_local"):
        outputs = call(*inputs)

    def replay(*given: Any) -> tuple[Any, ...]:
        for mine, tensor in zip(inputs, given, strict=True):
            mine.copy_(tensor)
        graph.replay()
        return tuple(tensor.clone() for tensor in outputs)

    return replay


@functools.cache
def _capturing() -> Any:
    """The stream of all captures. One only: torch has 32 and gives them out in turns, and what another thread did on
    the stream that is captured would become part of the graph.
    """
    import torch

    made: Any = torch.cuda.Stream
    return made()


def _alike(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether two lists of tensors are the same but for rounding."""
    import torch

    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            return False
        a, b = one.float(), other.float()
        largest = float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()) if b.numel() else 0.0
        if not torch.allclose(a, b, rtol=0, atol=_OFF * largest, equal_nan=True):
            return False
    return True
