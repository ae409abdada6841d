"""Knows the COCO run-length code of masks: bool pixels <-> runs <-> the compressed text that pycocotools reads.

A mask is read column by column, top to bottom, as runs of equal pixels, the first one of background (of length 0 where
the first pixel is set). The text holds each run as a signed number, from the fourth run on as the difference to the run
two before, in little groups of 5 bits: bit 5 says that another group follows, the highest bit of the last group is the
sign, and each group is shifted to printable letters by 48. (cocodataset/cocoapi, common/maskApi.c)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Runs = npt.NDArray[np.int64]

_GROUPS = 8  # of 5 bits: a run of up to 2^39 pixels
_WORD = 8  # bytes looked at together for changes


def encode(mask: npt.NDArray[Any]) -> bytes:
    """A mask (height, width), bool or 0/1, as compressed text."""
    if mask.ndim != 2:
        raise ValueError(f"expected a mask of shape (height, width), but got {mask.shape}")
    return compress([runs_of(mask)])[0]


def decode(counts: bytes, size: tuple[int, int]) -> Bools:
    """The mask (height, width) of compressed text. Raises ValueError when it is no text for a mask of that size."""
    return paint(checked(counts, size), size)


def area(counts: bytes) -> int:
    """How many pixels are set."""
    return int(expand(counts)[1::2].sum())


def bbox(counts: bytes, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box x1, y1, x2, y2 around the set pixels, in pixel corners, so that x2 - x1 is its width; zeros for none."""
    return box_of(expand(counts), size)


def runs_of(mask: npt.NDArray[Any]) -> Runs:
    """The lengths of the runs of a mask (height, width)."""
    height, width = mask.shape
    pixels = np.ascontiguousarray(mask, np.bool_)
    if not pixels.size:
        return np.zeros(1, np.int64)
    # Down the columns by comparing whole rows, which needs no transposed copy; few places change, so sorting is cheap.
    place = _places((pixels[1:] ^ pixels[:-1]).reshape(-1))
    within = place % width * height + place // width + 1
    at_top = (np.flatnonzero(pixels[0, 1:] != pixels[-1, :-1]) + 1) * height
    changes = np.concatenate([within, at_top])
    changes.sort()
    return from_changes(changes, height * width, bool(pixels[0, 0]))


def _places(changed: Bools) -> Runs:
    """Where a mostly false array is true; words without any are skipped at once."""
    whole = len(changed) // _WORD * _WORD
    words = np.flatnonzero(changed[:whole].view(np.uint64))
    if len(words) * 4 > whole // _WORD:
        return np.flatnonzero(changed)
    row, column = np.nonzero(changed[:whole].reshape(-1, _WORD)[words])
    return np.concatenate([words[row] * _WORD + column, np.flatnonzero(changed[whole:]) + whole])


def from_changes(changes: npt.NDArray[Any], pixels: int, first: bool) -> Runs:
    """The runs of a mask whose pixels, in order of the columns, differ from the one before at the sorted `changes`.

    Args:
        pixels: of the whole mask.
        first: whether the first pixel is set.
    """
    edges = np.concatenate([[0, 0] if first else [0], changes, [pixels]])
    return np.diff(edges).astype(np.int64, copy=False)


def paint(runs: Runs, size: tuple[int, int]) -> Bools:
    """The mask (height, width) of its runs."""
    height, width = size
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def box_of(runs: Runs, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box x1, y1, x2, y2 of runs, as `bbox` gives it."""
    height = size[0]
    ends = np.cumsum(runs)
    start, last = ends[0:-1:2], ends[1::2] - 1
    filled = last >= start
    start, last = start[filled], last[filled]
    if not len(start):
        return (0, 0, 0, 0)
    left, right = start // height, last // height
    over = (left < right).any()  # a run that goes on in the next column touches the bottom and the top
    top = 0 if over else int((start % height).min())
    bottom = height if over else int((last % height).max()) + 1
    return (int(left.min()), top, int(right.max()) + 1, bottom)


def compress(runs: Sequence[Runs]) -> list[bytes]:
    """The runs of several masks as text, one for each; all at once, since a mask alone is short."""
    if not runs:
        return []
    numbers = np.concatenate([_differences(r) for r in runs])
    magnitude = np.where(numbers < 0, ~numbers, numbers)
    # Groups that hold the number and its sign: one, and one more for each 5 bits that the magnitude passes 4 bits by.
    limits = 1 << (4 + 5 * np.arange(_GROUPS - 1, dtype=np.int64))
    groups = 1 + np.searchsorted(limits, magnitude, side="right")
    index = np.arange(int(groups.max(initial=1)))
    letters = (numbers[:, None] >> (5 * index)) & 31
    letters |= (index < groups[:, None] - 1) << 5
    text = (letters + 48).astype(np.uint8)[index < groups[:, None]].tobytes()
    ends = np.cumsum(groups)[np.cumsum([len(r) for r in runs]) - 1].tolist()
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _differences(runs: Runs) -> Runs:
    if len(runs) <= 3:
        return runs
    return np.concatenate([runs[:3], runs[3:] - runs[1:-2]])


def expand(counts: bytes) -> Runs:
    """The runs of compressed text. Raises ValueError for what is no such text."""
    letters = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(letters) or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        raise ValueError(f"expected the compressed counts of a COCO mask, but got {counts[:20]!r}")
    last = np.flatnonzero(letters & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    groups = last - first + 1
    if groups.max() > _GROUPS:
        raise ValueError(f"expected numbers of at most {_GROUPS} letters in a COCO mask, but got {int(groups.max())}")
    shift = 5 * (np.arange(len(letters)) - np.repeat(first, groups))
    numbers = np.add.reduceat((letters & 31) << shift, first)
    numbers -= np.where(letters[last] & 16, 1 << (5 * groups), 0)  # the sign
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def checked(counts: bytes, size: tuple[int, int]) -> Runs:
    """The runs of compressed text, which must cover a mask of (height, width) exactly. Raises ValueError."""
    runs = expand(counts)
    height, width = size
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"expected runs of {height} x {width} pixels in all, but got {int(runs.sum())}")
    return runs
