"""Runs a network in PyTorch itself, channels-last, in fp32, bf16 or fp16; on a GPU as a CUDA graph."""

from __future__ import annotations

from workers import torchcall
from workers.graphed import Graphed
from workers.runtimes import Network, Session


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
    call = torchcall.called(torchcall.module_of(network, device, precision))
    run = Graphed(call) if device.startswith("cuda") else call
    return torchcall.session(network, run, device, precision)
