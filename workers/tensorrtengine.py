"""Knows how an engine of TensorRT is loaded and run with torch's own tensors. It has not been run on a GPU yet.

TensorRT is told the memory of torch's tensors, and runs on a stream that waits for torch's current one and is waited
for by it: so nothing is copied, and torch's allocator keeps account of inputs and outputs. pycuda, where installed,
makes torch's context the current one in the calling thread, which TensorRT takes for granted; without it torch does, at
its next call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from storage.errors import one_line
from workers.runtimes import NotRunnable

Shape = tuple[int, ...]


@contextlib.contextmanager
def context() -> Iterator[None]:
    """torch's own CUDA context, made the current one of this thread."""
    if importlib.util.find_spec("pycuda") is None:
        yield
        return
    import pycuda.driver as cuda

    context = _primary()
    context.push()
    try:
        yield
    finally:
        cuda.Context.pop()


@functools.cache
def _primary() -> Any:
    """The device's primary context, the one that torch computes in; a worker sees one GPU."""
    import pycuda.driver as cuda
    import torch

    torch.cuda.current_device()  # torch makes its context
    cuda.init()
    return cuda.Device(0).retain_primary_context()


@functools.cache
def logger() -> Any:
    """Keeps what TensorRT says is wrong, for the message of the error that follows; one for the whole process."""
    import tensorrt

    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= tensorrt.ILogger.Severity.ERROR:
                self.errors.append(message)

    made = Logger()
    tensorrt.init_libnvinfer_plugins(made, "")  # graphs that suppress what overlaps use some
    return made


def said() -> str:
    """What TensorRT has said is wrong since it was asked last."""
    errors = logger().errors
    text = one_line("; ".join(errors[:3]) or "it gives no reason", 400)
    errors.clear()
    return text


class Engine:
    """An engine with one execution context; called from one thread.

    Attributes:
        inputs, outputs: name -> torch's type.
        least, most: name of an input -> the smallest and the largest shape that it takes.
    """

    def __init__(self, name: str, plan: bytes) -> None:
        """Raises NotRunnable for an engine that cannot be loaded here, MemoryError where there is no room for it."""
        import tensorrt
        import torch

        self._runtime = tensorrt.Runtime(logger())
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise NotRunnable(f"TensorRT cannot load the engine {name}: {said()}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            torch.cuda.empty_cache()  # torch may hold what it does not use
            self._context = self._engine.create_execution_context()
        if self._context is None:
            raise MemoryError(f"out of memory: TensorRT cannot make room for {name}: {said()}")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        given = [n for n in names if self._engine.get_tensor_mode(n) == tensorrt.TensorIOMode.INPUT]
        self.inputs = {n: _dtype(self._engine.get_tensor_dtype(n)) for n in given}
        self.outputs = {n: _dtype(self._engine.get_tensor_dtype(n)) for n in names if n not in self.inputs}
        ranges = {n: self._engine.get_tensor_profile_shape(n, 0) for n in given}
        self.least: dict[str, Shape] = {n: tuple(found[0]) for n, found in ranges.items()}
        self.most: dict[str, Shape] = {n: tuple(found[2]) for n, found in ranges.items()}
        self._stream = _computing()

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors on the device -> tensors on the device, not waited for: torch's stream keeps the order.

        Raises:
            ValueError: for a shape that the engine was not built for.
        """
        import torch

        held = {name: inputs[name].to(dtype).contiguous() for name, dtype in self.inputs.items()}
        for name, tensor in held.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise ValueError(
                    f"the engine takes {name} from {self.least[name]} to {self.most[name]}, "
                    f"but got {tuple(tensor.shape)}"
                )
            self._place(name, tensor)
        outputs = {}
        for name, dtype in self.outputs.items():
            shape = tuple(self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise NotRunnable(f"the size of the output {name} depends on the inputs' numbers, got {shape}")
            outputs[name] = torch.empty(shape, dtype=dtype, device=next(iter(held.values())).device)
            self._place(name, outputs[name])
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        logger().errors.clear()
        ran = self._context.execute_async_v3(self._stream.cuda_stream)
        # From here on torch gives the memory of `held` to nobody who would not wait for this stream too.
        current.wait_stream(self._stream)
        if not ran:
            raise RuntimeError(f"TensorRT failed: {said()}")
        return {name: t.float() if t.is_floating_point() else t for name, t in outputs.items()}

    def _place(self, name: str, tensor: Any) -> None:
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise RuntimeError(f"TensorRT does not take the memory of {name}: {said()}")


@functools.cache
def _computing() -> Any:
    """The stream of all engines. On torch's default one TensorRT would wait for the device before and after every call;
    and torch has 32 others, which it gives out in turns: with one an engine, two threads would come to share one.
    """
    import torch

    made: Any = torch.cuda.Stream
    return made()


def cut(batch: int, least: int, most: int) -> list[tuple[int, int, int]]:
    """How a batch goes through an engine that takes so many at once: (start, end, how often the last is repeated)."""
    parts = [(start, min(start + most, batch)) for start in range(0, batch, most)]
    return [(start, end, max(0, least - (end - start))) for start, end in parts]


def _dtype(kind: Any) -> Any:
    """torch's type for one of TensorRT."""
    import tensorrt
    import torch

    known = {
        tensorrt.float32: torch.float32,
        tensorrt.float16: torch.float16,
        tensorrt.bfloat16: torch.bfloat16,
        tensorrt.int64: torch.int64,
        tensorrt.int32: torch.int32,
        tensorrt.int8: torch.int8,
        tensorrt.uint8: torch.uint8,
        tensorrt.bool: torch.bool,
    }
    if kind not in known:
        raise NotRunnable(f"the engine has a tensor of the type {kind}, which torch has not")
    return known[kind]
