"""Masks with a box, a score and a label: the result of mask jobs.

Of one object each (instances), or of all pixels of one class each (semantic segmentation, a mask for each class that
is in the picture).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage import agreement as agreement_of
from storage import rle
from storage.results import Summary

SCHEMA = pa.schema(
    [
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("class_ids", pa.list_(pa.int32())),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("rles", pa.list_(pa.large_binary())),
        pa.field("areas", pa.list_(pa.int64())),
        pa.field("mask_height", pa.int32()),
        pa.field("mask_width", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The masks of one image, in columns of one length n, in the order the model gives them.

    Attributes:
        boxes_xyxy: (n, 4) float32, pixels of the original image after EXIF orientation, x right, y down,
            (0, 0) the upper left corner of the upper left pixel; zeros for an empty mask.
        scores: (n,) float32 in 0..1.
        class_ids: (n,) int32, the model's own numbering.
        labels: n names, the model's name for each class id.
        rles: n masks as COCO's compressed counts (storage.rle), all of `size`.
        size: (height, width) of the masks, which is that of the image.
        areas: (n,) int64, pixels set in each mask.
    """

    boxes_xyxy: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    class_ids: npt.NDArray[np.int32]
    labels: tuple[str, ...]
    rles: tuple[bytes, ...]
    size: tuple[int, int]
    areas: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        n = len(self.labels)
        shapes = (self.boxes_xyxy.shape, self.scores.shape, self.class_ids.shape, self.areas.shape, len(self.rles))
        if shapes != ((n, 4), (n,), (n,), (n,), n):
            raise ValueError(f"expected {n} boxes, scores, class ids, areas and rles for {n} labels, but got {shapes}")
        if not (np.isfinite(self.boxes_xyxy).all() and np.isfinite(self.scores).all()):
            raise ValueError("expected finite boxes and scores, but got NaN or infinity")


def empty(size: tuple[int, int] = (0, 0)) -> Result:
    """The result of an image of (height, width) in which nothing was found."""
    none = np.zeros(0, np.float32)
    return Result(none.reshape(0, 4), none, np.zeros(0, np.int32), (), (), size, np.zeros(0, np.int64))


def columns(results: Sequence[Result | None]) -> dict[str, pa.Array]:
    """The results as arrow columns; a None (failed item) is a null in every column."""
    present = [r for r in results if r is not None]
    nulls = pa.array([r is None for r in results], pa.bool_())
    offsets = pa.array(np.cumsum([0, *(0 if r is None else len(r.labels) for r in results)]), pa.int32())
    of_none = empty()
    boxes = np.concatenate([r.boxes_xyxy for r in (of_none, *present)])
    lists = {
        "boxes": pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1), pa.float32()), 4),
        "scores": pa.array(np.concatenate([r.scores for r in (of_none, *present)]), pa.float32()),
        "class_ids": pa.array(np.concatenate([r.class_ids for r in (of_none, *present)]), pa.int32()),
        "labels": pa.array([label for r in present for label in r.labels], pa.string()),
        "rles": pa.array([counts for r in present for counts in r.rles], pa.large_binary()),
        "areas": pa.array(np.concatenate([r.areas for r in (of_none, *present)]), pa.int64()),
    }
    sizes = [(None, None) if r is None else r.size for r in results]
    return {
        name: pa.ListArray.from_arrays(offsets, values, type=SCHEMA.field(name).type, mask=nulls)
        for name, values in lists.items()
    } | {
        "mask_height": pa.array([height for height, _ in sizes], pa.int32()),
        "mask_width": pa.array([width for _, width in sizes], pa.int32()),
    }


def results(table: pa.Table) -> list[Result | None]:
    """The inverse of `columns`."""
    rows = [table.column(name).combine_chunks() for name in SCHEMA.names]
    return [_row(*(column[i] for column in rows)) for i in range(table.num_rows)]


def _row(
    boxes: pa.Scalar,
    scores: pa.Scalar,
    class_ids: pa.Scalar,
    labels: pa.Scalar,
    rles: pa.Scalar,
    areas: pa.Scalar,
    height: pa.Scalar,
    width: pa.Scalar,
) -> Result | None:
    if not boxes.is_valid:
        return None
    return Result(
        boxes.values.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4).astype(np.float32, copy=False),
        scores.values.to_numpy(zero_copy_only=False),
        class_ids.values.to_numpy(zero_copy_only=False),
        tuple(labels.as_py()),
        tuple(rles.as_py()),
        (height.as_py(), width.as_py()),
        areas.values.to_numpy(zero_copy_only=False),
    )


def summary(result: Result) -> Summary:
    """How many masks of which label, and the highest score of each."""
    labels: dict[str, tuple[int, float]] = {}
    for label, score in zip(result.labels, result.scores.tolist(), strict=True):
        count, top = labels.get(label, (0, 0.0))
        labels[label] = (count + 1, max(top, score))
    top_score = max((top for _, top in labels.values()), default=None)
    return Summary(len(result.labels), top_score, labels)


def agreement(expected: Result, found: Result, least: float = 0.0) -> float | None:
    """How well the masks of two results overlap, 0..1, those without a like with 0; None when neither has any.

    Args:
        least: the job's score threshold.
    """
    if expected.labels and found.labels and expected.size != found.size:
        return 0.0
    overlap = agreement_of.of_masks(expected.rles, found.rles, lambda counts: rle.decode(counts, expected.size))
    return agreement_of.of_objects(
        overlap, (expected.scores, found.scores), (expected.class_ids, found.class_ids), least
    )
