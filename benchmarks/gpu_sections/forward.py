"""Times one network in each way that torch can run it, and holds each against torch in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_sections.bench import Bench, expect

HEAD = ("network", "how", "batch", "a second", "largest difference from fp32")


@dataclass(frozen=True, slots=True)
class Way:
    """How a module is run.

    Attributes:
        compiled: mode of torch.compile, "" for none.
        tf32: whether convolutions and products of float32 may round to ten bits.
    """

    name: str
    dtype: str
    channels_last: bool = True
    compiled: str = ""
    tf32: bool = False


FP32 = Way("fp32", "float32")
PLAIN = (FP32, Way("bf16", "bfloat16"), Way("fp16", "float16"))


def ways(bench: Bench) -> tuple[Way, ...]:
    """All that are worth a try here."""
    if not bench.on_gpu:  # without fp16, in which CPUs crawl; compiling is tried without a compiler
        return (
            FP32,
            PLAIN[1],
            Way("fp32 contiguous", "float32", channels_last=False),
            Way("fp32 compiled", "float32", compiled="eager"),
        )
    return (
        *PLAIN,
        Way("tf32", "float32", tf32=True),
        Way("fp16 contiguous", "float16", channels_last=False),
        Way("fp16 compiled", "float16", compiled="default"),
        Way("bf16 compiled", "bfloat16", compiled="default"),
        Way("fp16 compiled, CUDA graphs", "float16", compiled="reduce-overhead"),
    )


def table(
    bench: Bench,
    name: str,
    network: Any,
    batches: Sequence[int],
    chosen: Sequence[Way] | None = None,
    per_call: Callable[[int], float] = lambda batch: batch,
) -> None:
    """Rows for a network, whose table has begun with HEAD.

    Args:
        network: a workers.runtimes.Network.
        per_call: batch -> items of one call, for networks whose batch is not their items.
    """
    inputs = {batch: floats(network, batched(network, batch, bench.device)) for batch in batches}
    with numbers(FP32):
        expected = check_alive(session(bench, network, FP32), inputs[batches[0]])
    for way in chosen if chosen is not None else ways(bench):
        run: list[Any] = []

        def opened(way: Way = way, run: list[Any] = run) -> Any:
            if not run:
                run.append(session(bench, network, way))
            return run[0]

        for batch in batches:

            def take(batch: int = batch, way: Way = way, opened: Any = opened) -> tuple[object, ...]:
                with numbers(way):
                    forward, given = opened(), inputs[batch]
                    found = bench.rate(lambda: per_call(len(forward(given)) and batch))
                    off = difference(forward(inputs[batches[0]]), expected) if batch == batches[0] else None
                return found, "" if off is None else f"{off:.1e}"

            bench.attempt(name, way.name, batch, take=take)


def session(bench: Bench, network: Any, way: Way) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A module on the device, called with its inputs by name; outputs as a tuple."""
    import torch

    dtype = getattr(torch, way.dtype)
    module = network.build().eval().requires_grad_(False).to(device=bench.device, dtype=dtype)
    if way.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if way.compiled == "eager":
        module = torch.compile(module, backend="eager")
    elif way.compiled:
        module = torch.compile(module, mode=way.compiled, dynamic=False)  # anew for each batch, as a job has one

    def forward(inputs: dict[str, Any]) -> tuple[Any, ...]:
        with torch.inference_mode():
            given = [_placed(inputs[name], dtype, way.channels_last) for name in network.example]
            out = module(*given)
        return out if isinstance(out, tuple) else (out,)

    return forward


def _placed(tensor: Any, dtype: Any, channels_last: bool) -> Any:
    import torch

    tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.ndim == 4 else tensor


@contextlib.contextmanager
def numbers(way: Way) -> Iterator[None]:
    """Whether float32 is float32."""
    import torch

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = way.tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def batched(network: Any, batch: int, device: str) -> dict[str, Any]:
    """Inputs as a job gives them, pictures as bytes; drawn at random, so many of each that may vary."""
    import torch

    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, example in network.example.items():
        size = (batch, *example.shape[1:]) if 0 in network.dynamic_axes.get(name, {}) else tuple(example.shape)
        if name in network.pixels:
            drawn = torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)
        elif example.is_floating_point():
            drawn = torch.randn(size, generator=draw)
        else:
            drawn = example[:1].expand(size)
        found[name] = drawn.to(device)
    return found


def floats(network: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs as the network's module takes them: the numbers that it makes of bytes."""
    return {
        name: network.pixels[name].floats(tensor) if name in network.pixels else tensor
        for name, tensor in inputs.items()
    }


def difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference of any output, as a share of that output's largest number; NaN where there is one.

    Whole numbers, such as the class whose logit is largest, are not looked at: they jump where rounding decides.
    """
    import torch

    off = [
        (one.double() - right.double()).abs().max() / right.double().abs().max().clamp(min=1e-30)
        for one, right in zip(found, expected, strict=True)
        if right.is_floating_point()
    ]
    return float(torch.stack(off).max())  # which is NaN when any is


def check_alive(run: Callable[[dict[str, Any]], tuple[Any, ...]], inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What a module gives, once it is sure that this depends on what it is given; else equal outputs say nothing."""
    import torch

    found = run(inputs)
    other = run({n: torch.zeros_like(t) if t.is_floating_point() else t for n, t in inputs.items()})
    least = min(difference([a], [b]) for a, b in zip(found, other, strict=True) if b.is_floating_point())
    expect(least > 1e-2, f"the network gives the same whatever it is given, or NaN: {least:.1e} apart")
    return found
