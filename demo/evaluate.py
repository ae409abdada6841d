"""Knows how good detections are: mean average precision (mAP) of boxes against the truth, as COCO computes it.

Boxes are `(x1, y1, x2, y2)` in pixels of one common frame. Predictions map an item key to `(label, score, box)` rows;
the truth maps an item key to `{"label": name, "box": [x1, y1, x2, y2]}` rows, as `scenes.py` writes it. Numpy only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Box = Sequence[float]
Prediction = tuple[str, float, Box]
TrueObject = Mapping[str, object]
Predictions = Mapping[str, Sequence[Prediction]]
Truth = Mapping[str, Sequence[TrueObject]]

COCO_IOUS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
RECALL_POINTS = np.linspace(0, 1, 101)


def iou_matrix(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the intersection over union of each box of `first` (n, 4) with each of `second` (m, 4), shape (n, m)."""
    corner1 = np.maximum(first[:, None, :2], second[None, :, :2])
    corner2 = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.prod(np.clip(corner2 - corner1, 0, None), axis=2)
    areas1 = np.prod(first[:, 2:] - first[:, :2], axis=1)
    areas2 = np.prod(second[:, 2:] - second[:, :2], axis=1)
    union = areas1[:, None] + areas2[None, :] - shared
    # Two empty boxes have no union; they count as not overlapping.
    return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))


def as_boxes(boxes: Iterable[object]) -> NDArray[np.float64]:
    """Return boxes as an array of shape (n, 4), also when there are none."""
    return np.array(list(boxes), dtype=np.float64).reshape(-1, 4)


def match(predicted: NDArray[np.float64], true: NDArray[np.float64], iou: float) -> NDArray[np.bool_]:
    """Return which predicted boxes (n, 4), sorted by falling score, are hits on the true boxes (m, 4) of one item.

    Greedy: each prediction in turn takes the true box that it overlaps most, of those with at least `iou` that no
    earlier prediction has taken. So a second box on the same object is a miss.
    """
    overlaps = iou_matrix(predicted, true)
    hits = np.zeros(len(predicted), dtype=bool)
    free = np.ones(len(true), dtype=bool)
    for row in range(len(predicted)):
        candidates = np.where(free, overlaps[row], -1.0)
        if len(true) and candidates.max() >= iou:
            free[candidates.argmax()] = False
            hits[row] = True
    return hits


def average_precision(scores: NDArray[np.float64], hits: NDArray[np.bool_], true_count: int) -> float:
    """Return the area under the precision-recall curve, 0 to 1, by COCO's 101-point interpolation.

    `scores` and `hits` have shape (n,): one entry for each prediction of one class over all items, in any order.
    `true_count` is how many true objects of that class there are; it must be at least 1.
    """
    order = np.argsort(-scores, kind="stable")
    true_positives = np.cumsum(hits[order])
    recall = true_positives / true_count
    precision = true_positives / np.arange(1, len(order) + 1)
    # The interpolated precision at a recall is the best precision at that recall or a higher one.
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    # COCO's rule: the first prediction at which the recall is reached; past the highest recall it is 0.
    where = np.searchsorted(recall, RECALL_POINTS, side="left")
    reached = where < len(order)
    return float(best_from_here[where[reached]].sum() / len(RECALL_POINTS))


def class_average_precision(predictions: Predictions, truth: Truth, label: str, iou: float) -> float:
    """Return the average precision of one class, 0 to 1; the truth must hold at least one object of it.

    Only items named in the truth count: a prediction for another key has nothing to be judged by.
    """
    scores: list[NDArray[np.float64]] = []
    hits: list[NDArray[np.bool_]] = []
    true_count = 0
    for key, objects in truth.items():
        true = as_boxes(thing["box"] for thing in objects if thing["label"] == label)
        rows = [(score, box) for name, score, box in predictions.get(key, ()) if name == label]
        rows.sort(key=lambda row: -row[0])
        scores.append(np.array([score for score, _ in rows], dtype=np.float64))
        hits.append(match(as_boxes(box for _, box in rows), true, iou))
        true_count += len(true)
    return average_precision(np.concatenate(scores), np.concatenate(hits), true_count)


def labels_of(truth: Truth) -> list[str]:
    """Return the class names that occur in the truth, sorted."""
    return sorted({str(thing["label"]) for objects in truth.values() for thing in objects})


def mean_average_precision(predictions: Predictions, truth: Truth, iou: float = 0.5) -> float:
    """Return the mean over the classes in the truth of their average precision at one IoU threshold, 0 to 1.

    A class that is predicted but never true is left out, as COCO does. An empty truth gives NaN.
    """
    labels = labels_of(truth)
    if not labels:
        return float("nan")
    return float(np.mean([class_average_precision(predictions, truth, label, iou) for label in labels]))


def mean_average_precision_50_95(predictions: Predictions, truth: Truth) -> float:
    """Return the mean of the mAP at the ten IoU thresholds 0.50, 0.55 ... 0.95, 0 to 1."""
    return float(np.mean([mean_average_precision(predictions, truth, iou) for iou in COCO_IOUS]))


def read_predictions(path: Path) -> dict[str, list[Prediction]]:
    """Read predictions from JSON: item key to `[label, score, [x1, y1, x2, y2]]` rows."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {key: [(label, float(score), box) for label, score, box in found] for key, found in rows.items()}


def main() -> None:
    """Read predictions and truth from JSON files and print the figures."""
    parser = argparse.ArgumentParser(description="Measure the mAP of detections.")
    parser.add_argument("predictions", type=Path, help="JSON: key -> [[label, score, [x1, y1, x2, y2]], ...]")
    parser.add_argument("truth", type=Path, help="JSON: key -> [{label, box}, ...], as scenes.py writes it")
    args = parser.parse_args()
    predictions = read_predictions(args.predictions)
    truth: Truth = json.loads(args.truth.read_text(encoding="utf-8"))
    for label in labels_of(truth):
        print(f"{label:>10}  AP50 {class_average_precision(predictions, truth, label, 0.5):.4f}")
    print(f"mAP50    {mean_average_precision(predictions, truth):.4f}")
    print(f"mAP50-95 {mean_average_precision_50_95(predictions, truth):.4f}")


if __name__ == "__main__":
    main()
