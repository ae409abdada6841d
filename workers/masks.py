"""Turns mask tensors on a device into run-length codes with their areas and boxes, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage import rle
from storage.results.masks import Result

# Mask pixels that are in the making at once: 128 MB as float32, a few times that with what is between.
_PIXELS = 1 << 25


class Mask(NamedTuple):
    """One mask as it is stored: compressed counts, pixels set, and the box x1, y1, x2, y2 around them (zeros: none)."""

    rle: bytes
    area: int
    box: tuple[int, int, int, int]


def pieces(count: int, *shapes: tuple[int, int]) -> Iterator[slice]:
    """Slices of `count` masks, each so short that its masks fit into memory in the largest of the shapes."""
    step = max(1, _PIXELS // max(height * width for height, width in shapes))
    return (slice(start, start + step) for start in range(0, count, step))


def coded(masks: Any) -> list[Mask]:
    """Masks (n, height, width), a bool tensor, coded one by one.

    On a GPU the places where pixels change are found there, so that only they are copied.
    """
    if not len(masks):
        return []
    size = (int(masks.shape[1]), int(masks.shape[2]))
    runs = _runs_on_device(masks) if masks.is_cuda else [rle.runs_of(mask) for mask in masks.numpy()]
    areas = [int(r[1::2].sum()) for r in runs]
    boxes = [rle.box_of(r, size) for r in runs]
    return [Mask(*parts) for parts in zip(rle.compress(runs), areas, boxes, strict=True)]


def _runs_on_device(masks: Any) -> list[rle.Runs]:
    flat = masks.transpose(1, 2).flatten(1)
    which, place = (flat[:, 1:] ^ flat[:, :-1]).nonzero(as_tuple=True)
    changes = (place + 1).cpu().numpy()
    ends = which.bincount(minlength=len(flat)).cumsum(0).tolist()
    parts = (changes[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))
    return [
        rle.from_changes(part, flat.shape[1], first) for part, first in zip(parts, flat[:, 0].tolist(), strict=True)
    ]


def result(
    found: Sequence[Mask],
    scores: Sequence[float] | npt.NDArray[Any],
    class_ids: Sequence[int] | npt.NDArray[Any],
    labels: Sequence[str],
    size: tuple[int, int],
    boxes: npt.NDArray[np.float32] | None = None,
) -> Result:
    """The masks of one image of (height, width) as a result; without boxes of their own they get those around them."""
    if boxes is None:
        boxes = np.array([mask.box for mask in found], np.float32).reshape(-1, 4)
    return Result(
        boxes,
        np.asarray(scores, np.float32),
        np.asarray(class_ids, np.int32),
        tuple(labels),
        tuple(mask.rle for mask in found),
        size,
        np.array([mask.area for mask in found], np.int64),
    )
