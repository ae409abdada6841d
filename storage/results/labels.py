"""The best labels of a whole image with their scores: the result of classify jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.results import Summary

SCHEMA = pa.schema(
    [
        pa.field("labels", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("class_ids", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The labels of one image, highest score first.

    Attributes:
        labels: k names, the model's name for each class id; none when no class passes the job's threshold.
        scores: (k,) float32 in 0..1, for most models the softmax over all of their classes.
        class_ids: (k,) int32, the model's own numbering.
    """

    labels: tuple[str, ...]
    scores: npt.NDArray[np.float32]
    class_ids: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        k = len(self.labels)
        if (self.scores.shape, self.class_ids.shape) != ((k,), (k,)):
            raise ValueError(
                f"expected {k} scores and class ids for {k} labels, but got {self.scores.shape}, {self.class_ids.shape}"
            )
        if not np.isfinite(self.scores).all():
            raise ValueError("expected finite scores, but got NaN or infinity")


def empty() -> Result:
    """The result of an image that none of the labels fits well enough."""
    return Result((), np.zeros(0, np.float32), np.zeros(0, np.int32))


def columns(results: Sequence[Result | None]) -> dict[str, pa.Array]:
    """The results as arrow list columns; a None (failed item) is a null in every column."""
    present = [r for r in results if r is not None]
    nulls = pa.array([r is None for r in results], pa.bool_())
    offsets = pa.array(np.cumsum([0, *(0 if r is None else len(r.labels) for r in results)]), pa.int32())
    scores = np.concatenate([r.scores for r in present]) if present else np.zeros(0, np.float32)
    class_ids = np.concatenate([r.class_ids for r in present]) if present else np.zeros(0, np.int32)
    flat = {
        "labels": pa.array([label for r in present for label in r.labels], pa.string()),
        "scores": pa.array(scores, pa.float32()),
        "class_ids": pa.array(class_ids, pa.int32()),
    }
    return {
        name: pa.ListArray.from_arrays(offsets, values, type=SCHEMA.field(name).type, mask=nulls)
        for name, values in flat.items()
    }


def results(table: pa.Table) -> list[Result | None]:
    """The inverse of `columns`."""
    rows = zip(*(table.column(name).to_pylist() for name in SCHEMA.names), strict=True)
    return [None if labels is None else _result(labels, scores, ids) for labels, scores, ids in rows]


def _result(labels: list[str], scores: list[float], class_ids: list[int]) -> Result:
    return Result(tuple(labels), np.array(scores, np.float32), np.array(class_ids, np.int32))


def summary(result: Result) -> Summary:
    """Each label once, with its score. Two classes of one name count as one label, with the higher score."""
    labels: dict[str, tuple[int, float]] = {}
    for label, score in zip(result.labels, result.scores.tolist(), strict=True):
        count, top = labels.get(label, (1, score))
        labels[label] = (count, max(top, score))
    top_score = max((top for _, top in labels.values()), default=None)
    return Summary(len(result.labels), top_score, labels)


_SAME_SCORE = 0.05


def agreement(expected: Result, found: Result, least: float = 0.0) -> float | None:
    """The share of labels that both results have with scores less than 0.05 apart, 0..1; None when neither has any.

    Where some label scores more than 0.1, those that score less count for nothing: a top k may drop any of them.
    """
    one, other = (dict(zip(r.class_ids.tolist(), r.scores.tolist(), strict=True)) for r in (expected, found))
    pairs = [(one.get(i, 0.0), other.get(i, 0.0)) for i in one.keys() | other.keys()]
    judged = [pair for pair in pairs if max(pair) > 2 * _SAME_SCORE] or pairs
    return sum(abs(a - b) <= _SAME_SCORE for a, b in judged) / len(judged) if judged else None
