"""Puts a batch of host arrays onto the device as one tensor, on a GPU beside what it computes.

A GPU copies from pinned memory by itself, on a stream of its own: the copy of a batch goes on while the batch before it
computes, and only what uses the batch waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def pictures(arrays: Sequence[npt.NDArray[np.uint8]], device: str) -> Any:
    """Pictures (height, width, 3) of one size -> (batch, 3, height, width) uint8 on the device, channels last."""
    return stacked(arrays, device).permute(0, 3, 1, 2)


def stacked(arrays: Sequence[npt.NDArray[Any]], device: str) -> Any:
    """Arrays of one shape and dtype -> a tensor (batch, *shape) of that dtype on the device.

    On a GPU it is ready for torch's current stream; the call returns before the copy is done.
    """
    import torch

    if not device.startswith("cuda"):
        return torch.from_numpy(np.stack(arrays))
    dtype = torch.from_numpy(arrays[0]).dtype
    pinned = torch.empty((len(arrays), *arrays[0].shape), dtype=dtype, pin_memory=True)
    np.stack(arrays, out=pinned.numpy())
    computing, copying = torch.cuda.current_stream(), _copying(device)
    with torch.cuda.stream(copying):
        placed = pinned.to(device, non_blocking=True)
    computing.wait_stream(copying)
    placed.record_stream(computing)  # its memory belongs to the stream that copied, and is used on this one
    return placed


@functools.cache
def _copying(device: str) -> Any:
    """The stream that copies to a device."""
    import torch

    made: Any = torch.cuda.Stream
    return made(device)
