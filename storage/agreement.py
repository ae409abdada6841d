"""How far two lists of scored objects of one image agree: what the result kinds with objects share. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

SAME_OVERLAP = 0.5  # intersection over union above which two boxes or masks are taken for the same object
SAME_SCORE = 0.05  # and how far their scores may be apart


def of_objects(
    overlap: npt.NDArray[np.floating],
    scores: tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]],
    classes: tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]],
    least: float = 0.0,
) -> float | None:
    """How well the objects of two lists (n and m long) are each other's: 2 overlaps of the pairs / (n + m).

    That is panoptic quality (arXiv 1801.00868): a pair counts as far as its two overlap. So results that are all a
    little off lose by it, and a single box costs little where suppression kept another of nearly the same score, as
    happens in half precision. An object without a like whose score is less than SAME_SCORE above the job's threshold
    counts for nothing: its like may have been cut off.

    Args:
        overlap: (n, m) intersection over union, 0..1.
        least: the score at which the job cuts objects off.

    Returns:
        0..1, or None when there is nothing to compare.
    """
    like = (overlap > SAME_OVERLAP) & (classes[0][:, None] == classes[1][None])
    like &= np.abs(scores[0][:, None] - scores[1][None]) <= SAME_SCORE
    pairs = _pairs(np.where(like, overlap, 0.0))
    alone = sum(
        int((np.delete(own, [pair[side] for pair in pairs]) > (least + SAME_SCORE if least else 0)).sum())
        for side, own in enumerate(scores)
    )
    shared = 2 * sum(float(overlap[pair]) for pair in pairs)
    return shared / (2 * len(pairs) + alone) if pairs or alone else None


def _pairs(weight: npt.NDArray[np.floating]) -> list[tuple[int, int]]:
    """Row and column of the largest weight, then of the largest in other rows and columns, while above 0."""
    weight = weight.copy()
    found = []
    while weight.size and weight.max() > 0:
        row, column = divmod(int(weight.argmax()), weight.shape[1])
        found.append((row, column))
        weight[row], weight[:, column] = 0, 0
    return found


def of_boxes(one: npt.NDArray[np.floating], other: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """(n, m) intersection over union of boxes xyxy (n, 4) and (m, 4); 0 for boxes without an area."""
    a, b = one.astype(np.float64)[:, None], other.astype(np.float64)[None]
    sides = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0)
    both = sides.prod(2)
    area = [(box[..., 2:] - box[..., :2]).clip(0).prod(-1) for box in (a, b)]
    union = area[0] + area[1] - both
    overlap: npt.NDArray[np.float64] = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return overlap


def of_masks(
    one: Sequence[bytes], other: Sequence[bytes], decode: Callable[[bytes], npt.NDArray[np.bool_]]
) -> npt.NDArray[np.float64]:
    """(n, m) intersection over union of masks, 1 for two that are both empty. `decode` gives a mask's pixels."""
    overlap = np.zeros((len(one), len(other)))
    masks = [decode(counts) for counts in other]
    for row, counts in enumerate(one):
        mask = decode(counts)
        for column, second in enumerate(masks):
            union = int((mask | second).sum())
            overlap[row, column] = int((mask & second).sum()) / union if union else 1.0
    return overlap
