"""A GPU that is none: torch's tensors on "cuda" lie in the host's memory, and are kept apart from those of the host.

It shows that a model puts every tensor where the others are, and fetches what is read on the host, as on a GPU. It
says nothing of kernels, streams, memory or speed.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_PLACE = torch.device("cuda", 0)
_aten = torch.ops.aten

# Operations that take tensors of both, where the first one's place is the result's.
_OF_THE_FIRST = (_aten.copy_, _aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)


class OnGpu(torch.Tensor):
    """A tensor that is said to be on the GPU.

    Attributes:
        held: the same numbers on the host.
    """

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # results are what operations make them

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        with torch.inference_mode(held.is_inference()):  # type: ignore[no-untyped-call]
            made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=_PLACE,
            )
        made.held = held
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ran(func, args, kwargs or {})

    def numpy(self, *given: Any, **named: Any) -> Any:
        """As torch."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    def data_ptr(self) -> int:
        """Where its numbers really are."""
        return self.held.data_ptr()

    def tolist(self) -> Any:
        """As torch."""
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **named: Any) -> Any:
        """As torch."""
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **named})

    def __repr__(self, **named: Any) -> str:
        return f"OnGpu({self.held!r})"

    def record_stream(self, stream: Any) -> None:
        """Nothing runs later."""


class _Calls(TorchFunctionMode):
    """What of torch asks CUDA itself before it comes to operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, named = tree_map(_numbered, (tuple(args), dict(kwargs or {})))
        first = args[0] if args else None
        if func in (torch.tensor, torch.as_tensor) and not isinstance(first, torch.Tensor):
            device = named.pop("device", None)
            made = func(*args, **named)
            return made if device is None else made.to(device)
        if isinstance(first, OnGpu):
            if func is torch.nn.functional.scaled_dot_product_attention:  # how this card does it best
                return _ran(func, args, named)
            if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                args = (first, _places(args[1]), *args[2:])
        return func(*args, **named)


def _numbered(value: Any) -> Any:
    """Any GPU as this one, so that nobody asks CUDA which is the current one."""
    return _PLACE if isinstance(value, str | torch.device) and str(value) == "cuda" else value


def _places(index: Any) -> Any:
    """An index without lists, of which torch would make tensors on the GPU."""
    if isinstance(index, tuple):
        return tuple(_places(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


class _Mode(TorchDispatchMode):
    """Makes new tensors on the GPU where that is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ran(func, args, kwargs or {})


def _ran(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives, on the GPU if its inputs are or that is asked for. Raises where devices are mixed."""
    leaves = tree_leaves((args, kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    several = len({isinstance(tensor, OnGpu) for tensor in given}) > 1
    if isinstance(func, torch._ops.OpOverload) and (several or any(isinstance(leaf, torch.device) for leaf in leaves)):
        with _Mode():  # in inference mode operations made of others come whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    there = {id(tensor.held): tensor for tensor in given if isinstance(tensor, OnGpu)}
    asked = kwargs.get("device")
    first = getattr(func, "overloadpacket", None) in _OF_THE_FIRST
    if asked is not None:
        on_gpu = torch.device(asked).type == "cuda"
    elif first:
        on_gpu = isinstance(args[0], OnGpu)
    else:
        on_gpu = bool(there)
    # Single numbers may come along.
    here = [tensor for tensor in given if not isinstance(tensor, OnGpu) and tensor.ndim]
    if there and here and not (first and (on_gpu or func.overloadpacket is _aten.copy_)):
        raise RuntimeError(f"expected all tensors on one device, but {func} got some on cuda:0 and some on the cpu")
    if there and torch.Tag.inplace_view in getattr(func, "tags", ()):
        raise NotImplementedError(f"{func} changes the shape of a tensor in its place")
    named = dict(kwargs)
    if on_gpu and asked is not None:
        named["device"] = torch.device("cpu")
    if named.get("pin_memory"):
        named["pin_memory"] = False
    args, named = tree_map_only(OnGpu, lambda tensor: tensor.held, (args, named))
    found = func(*args, **named)

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        known = there.get(id(tensor))
        return known if known is not None else OnGpu(tensor) if on_gpu else tensor

    return tree_map_only(torch.Tensor, placed, found)


_handles = itertools.count(1)


class _Event:
    """When it was recorded, by the host's clock."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, later: Any) -> float:
        return (later._at - self._at) * 1000

    def synchronize(self) -> None: ...


class _Stream:
    """Everything is done when it is asked for."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.cuda_stream = next(_handles)

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


class _Graph:
    """Operations to do again, each with the same memory."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for func, args, kwargs, before in self.steps:
            after = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class _Recording(TorchDispatchMode):
    """Writes down what becomes part of a graph, which nothing can that needs an answer on the host."""

    def __init__(self, graph: _Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        found = func(*args, **named)
        given, made = (
            [t for t in tree_leaves(all_of) if isinstance(t, torch.Tensor)] for all_of in ((args, named), found)
        )
        if any(isinstance(t, OnGpu) for t in given) and not all(isinstance(t, OnGpu) for t in made or [None]):
            raise RuntimeError(f"{func} is not permitted while a stream is captured")
        self._graph.steps.append((func, args, named, found))
        return found


@contextlib.contextmanager
def _capture(graph: _Graph, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
    with _Recording(graph):
        yield


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A context in which the calling thread, and every thread that is started in it, has a GPU."""
    from workers import batchdecode, graphed, uploading

    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    made: Any = torch.cuda
    monkeypatch.setattr(made, "_lazy_init", lambda: None)
    monkeypatch.setattr(made, "Stream", _Stream)
    monkeypatch.setattr(made, "Event", _Event)
    monkeypatch.setattr(made, "current_stream", _Stream)
    monkeypatch.setattr(made, "stream", contextlib.nullcontext)
    monkeypatch.setattr(made, "synchronize", lambda *given: None)
    monkeypatch.setattr(made, "mem_get_info", lambda: (2, 3))
    monkeypatch.setattr(made, "CUDAGraph", _Graph)
    monkeypatch.setattr(made, "graph", _capture)
    kept = (graphed._capturing, uploading._copying, batchdecode._stream, batchdecode.check)
    for one in kept:
        one.cache_clear()
    plain = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with _Calls(), _Mode():
            plain(thread)

    @contextlib.contextmanager
    def there() -> Iterator[None]:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with torch.backends.cudnn.flags(enabled=False), _Calls(), _Mode(), monkeypatch.context() as patch:  # type: ignore[no-untyped-call]
                patch.setattr(threading.Thread, "run", run)
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)

    yield there
    for one in kept:  # streams that are none
        one.cache_clear()
