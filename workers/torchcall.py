"""Calls what torch has made of a network as a Session: inputs go to the device, outputs come back as float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from storage.errors import BadInput
from workers import pixels
from workers.runtimes import PRECISIONS, Network, Session


def dtype_of(precision: str) -> Any:
    """torch's type of a precision. Raises BadInput, naming the known ones."""
    import torch

    if precision not in PRECISIONS:
        raise BadInput(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def module_of(network: Network, device: str, precision: str) -> Any:
    """The network's module, on the device in a precision, its weights channels-last."""
    import torch

    if device.startswith("cuda"):
        torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions: ten bits where fp32 is asked for
    module = network.build().eval().requires_grad_(False).to(device=device, dtype=dtype_of(precision))
    return module.to(memory_format=torch.channels_last)


def session(network: Network, call: Callable[..., tuple[Any, ...]], device: str, precision: str) -> Session:
    """A session of a call from tensors in the order of the network's example to as many as it has outputs."""
    import torch

    dtype = dtype_of(precision)

    def run(**inputs: Any) -> dict[str, Any]:
        with torch.inference_mode():
            outputs = call(*(placed(inputs[name], device, dtype) for name in network.example))
        return {
            name: value.float() if value.is_floating_point() else value
            for name, value in zip(network.outputs, outputs, strict=True)
        }

    return pixels.taken(network, run)


def placed(tensor: Any, device: str, dtype: Any) -> Any:
    """A tensor on the device, floats in a type, pictures channels-last."""
    import torch

    if tensor.is_floating_point():
        tensor = tensor.to(device=device, dtype=dtype, non_blocking=True)
    else:
        tensor = tensor.to(device=device, non_blocking=True)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def called(module: Any) -> Callable[..., tuple[Any, ...]]:
    """A module's call, whose outputs are a tuple even where there is one."""

    def call(*given: Any) -> tuple[Any, ...]:
        outputs = module(*given)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def positional(module: Any) -> Any:
    """The module under a forward of positional tensors only, whatever the signature of its own."""
    import torch

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *inputs: Any) -> Any:
            return self.inner(*inputs)

    return Positional().eval()
