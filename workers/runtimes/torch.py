"""Runs a network in PyTorch itself, channels-last, in fp32, bf16 or fp16; on a GPU as a CUDA graph."""

from __future__ import annotations

from typing import Any

from storage.errors import BadInput
from workers.graphed import Graphed
from workers.runtimes import PRECISIONS, Network, Session


def installed() -> bool:
    """Whether PyTorch can be imported."""
    import importlib.util

    return importlib.util.find_spec("torch") is not None


def open(network: Network, device: str, precision: str) -> Session:
    """Move the module to the device in the asked precision; outputs come back as float32.

    Args:
        device: "cpu" or "cuda" (a worker sees one GPU only).
        precision: "fp32", "bf16" or "fp16".
    """
    import torch

    if precision not in PRECISIONS:
        raise BadInput(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.startswith("cuda"):
        torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions: ten bits where fp32 is asked for
    module = network.build().eval().requires_grad_(False).to(device=device, dtype=dtype)
    module = module.to(memory_format=torch.channels_last)

    def call(*given: Any) -> tuple[Any, ...]:
        outputs = module(*given)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    run = Graphed(call) if device.startswith("cuda") else call

    def session(**inputs: Any) -> dict[str, Any]:
        with torch.inference_mode():
            outputs = run(*(_place(inputs[name], device, dtype) for name in network.example))
        return {
            name: value.float() if value.is_floating_point() else value
            for name, value in zip(network.outputs, outputs, strict=True)
        }

    return session


def _place(tensor: Any, device: str, dtype: Any) -> Any:
    import torch

    if tensor.is_floating_point():
        tensor = tensor.to(device=device, dtype=dtype, non_blocking=True)
    else:
        tensor = tensor.to(device=device, non_blocking=True)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
