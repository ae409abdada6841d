"""Boxes with a score and a label: the result of annotate jobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage import agreement as agreement_of
from storage.results import Summary

_FEW = 25  # boxes

SCHEMA = pa.schema(
    [
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("class_ids", pa.list_(pa.int32())),
        pa.field("labels", pa.list_(pa.string())),
    ]
)


@dataclass(slots=True, eq=False)  # not frozen, as storage.shardfile.Outcome is not
class Result:
    """The objects found in one image, in columns of one length n, highest score first. Never changed.

    Attributes:
        boxes_xyxy: (n, 4) float32, pixels of the original image after EXIF orientation, x right, y down,
            (0, 0) the upper left corner of the upper left pixel.
        scores: (n,) float32 in 0..1.
        class_ids: (n,) int32, the model's own numbering.
        labels: n names, the model's name for each class id.
    """

    boxes_xyxy: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    class_ids: npt.NDArray[np.int32]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.labels)
        shapes = (self.boxes_xyxy.shape, self.scores.shape, self.class_ids.shape)
        if shapes != ((n, 4), (n,), (n,)):
            raise ValueError(f"expected shapes ({n}, 4), ({n},), ({n},) for {n} labels, but got {shapes}")
        if n <= _FEW:
            # The sum of a few in Python takes a quarter of numpy's time; it cannot overflow in 64 bits.
            finite = math.isfinite(sum(self.scores.tolist(), sum(self.boxes_xyxy.ravel().tolist())))
        else:
            finite = bool(np.isfinite(self.boxes_xyxy).all() and np.isfinite(self.scores).all())
        if not finite:
            raise ValueError("expected finite boxes and scores, but got NaN or infinity")


def empty() -> Result:
    """The result of an image in which nothing was found."""
    return Result(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), ())


def columns(results: Sequence[Result | None]) -> dict[str, pa.Array]:
    """The results as arrow list columns; a None (failed item) is a null in every column."""
    present = [r for r in results if r is not None]
    nulls = pa.array([r is None for r in results], pa.bool_())
    offsets = pa.array(np.cumsum([0, *(0 if r is None else len(r.labels) for r in results)]), pa.int32())
    boxes = np.concatenate([r.boxes_xyxy for r in present]) if present else np.zeros((0, 4), np.float32)
    scores = np.concatenate([r.scores for r in present]) if present else np.zeros(0, np.float32)
    class_ids = np.concatenate([r.class_ids for r in present]) if present else np.zeros(0, np.int32)
    flat = {
        "boxes": pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1), pa.float32()), 4),
        "scores": pa.array(scores, pa.float32()),
        "class_ids": pa.array(class_ids, pa.int32()),
        "labels": pa.array([label for r in present for label in r.labels], pa.string()),
    }
    return {
        name: pa.ListArray.from_arrays(offsets, values, type=SCHEMA.field(name).type, mask=nulls)
        for name, values in flat.items()
    }


def results(table: pa.Table) -> list[Result | None]:
    """The inverse of `columns`."""
    rows = [table.column(name).combine_chunks() for name in ("boxes", "scores", "class_ids", "labels")]
    return [_row(*(column[i] for column in rows)) for i in range(table.num_rows)]


def _row(boxes: pa.Scalar, scores: pa.Scalar, class_ids: pa.Scalar, labels: pa.Scalar) -> Result | None:
    if not boxes.is_valid:
        return None
    return Result(
        boxes.values.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4).astype(np.float32, copy=False),
        scores.values.to_numpy(zero_copy_only=False),
        class_ids.values.to_numpy(zero_copy_only=False),
        tuple(labels.as_py()),
    )


def summary(result: Result) -> Summary:
    """How many objects of which label, and the highest score of each."""
    labels: dict[str, tuple[int, float]] = {}
    scores: list[float] = result.scores.tolist()
    for label, score in zip(result.labels, scores, strict=True):
        if label in labels:
            count, top = labels[label]
            labels[label] = (count + 1, top if top >= score else score)
        else:
            labels[label] = (1, score)
    return Summary(len(scores), max(scores) if scores else None, labels)


def agreement(expected: Result, found: Result, least: float = 0.0) -> float | None:
    """How well the boxes of two results overlap, 0..1, those without a like with 0; None when neither has any.

    Args:
        least: the job's score threshold.
    """
    overlap = agreement_of.of_boxes(expected.boxes_xyxy, found.boxes_xyxy)
    return agreement_of.of_objects(
        overlap, (expected.scores, found.scores), (expected.class_ids, found.class_ids), least
    )
