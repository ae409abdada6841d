"""Reads what an item says of the objects to mask: boxes, points and rough masks, and what earlier jobs said of them.

All in pixels of the picture as the model gets it (x right, y down):

    boxes           [[x1, y1, x2, y2], ...]       one object each
    points          [[x, y], ...]                 all of one object; or a list of such lists, one object each
    point_labels    like points, 1 on the object and 0 beside it; all 1 where it is missing
    masks           [{"size": [height, width], "counts": text}, ...]    COCO RLE, one rough mask an object
    labels, class_ids, scores                     one an object, from an earlier job: become the mask's own

Boxes, lists of points and masks together describe the same objects, in the same order. An item that says nothing of
this asks for the masks of everything in it; one with an empty list has no objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import ItemFailed

Floats = npt.NDArray[np.float32]

_FAR = 1e9  # pixels; no finite coordinate of any use is further away


@dataclass(frozen=True, slots=True)
class Object:
    """What an item says of one object, in pixels of the picture.

    Attributes:
        points: (k, 2) float32 xy, k may be 0.
        signs: (k,) int32, 1 on the object and 0 beside it.
        box: (4,) float32 xyxy, or None.
        rough: a mask as COCO RLE, not checked yet, or None.
    """

    points: Floats
    signs: npt.NDArray[np.int32]
    box: Floats | None
    rough: Mapping[str, Any] | None


def bad(message: str) -> ItemFailed:
    """The failure of an item whose prompts are wrong."""
    return ItemFailed("prepare", "bad-prompt", message)


def read(data: Mapping[str, Any], size: tuple[int, int]) -> list[Object] | None:
    """What an item's data asks about a picture of (height, width); None when it asks nothing. Raises ItemFailed."""
    asked = {name: data[name] for name in ("boxes", "points", "masks") if data.get(name) is not None}
    if not asked:
        return None
    for name, value in asked.items():
        if not isinstance(value, list | tuple):
            raise bad(f"expected a list of {name}, but got {type(value).__name__}")
    points, signs = _points(asked.get("points", ()), data.get("point_labels"), size)
    boxes = _boxes(asked["boxes"], size) if "boxes" in asked else None
    columns = {"boxes": boxes, "points": points if "points" in asked else None, "masks": asked.get("masks")}
    counts = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(counts.values())) > 1:
        said = " and ".join(f"{count} {'lists of points' if n == 'points' else n}" for n, count in counts.items())
        raise bad(f"expected as many of each kind of prompt, one for each object, but got {said}")
    nothing = (np.zeros((0, 2), np.float32), np.zeros(0, np.int32))
    return [
        Object(
            *((points[i], signs[i]) if "points" in asked else nothing),
            None if boxes is None else boxes[i],
            asked["masks"][i] if "masks" in asked else None,
        )
        for i in range(max(counts.values()))
    ]


def _numbers(value: Any, width: int, what: str) -> Floats:
    """A list of rows of numbers as (n, width) float32. Raises ItemFailed when it is something else."""
    try:
        rows = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise bad(f"expected {what}, but got {str(value)[:80]}") from error
    if rows.size == 0:
        return np.zeros((0, width), np.float32)
    if rows.ndim != 2 or rows.shape[1] != width or not (np.abs(rows) < _FAR).all():
        raise bad(f"expected {what}, but got {str(value)[:80]}")
    return rows.astype(np.float32)


def _boxes(value: Any, size: tuple[int, int]) -> Floats:
    """Boxes (n, 4), cut to the picture. Raises ItemFailed for one that is turned over or has no part in it."""
    boxes = _numbers(value, 4, "boxes of four finite numbers [x1, y1, x2, y2]")
    height, width = size
    low, high = boxes[:, :2], boxes[:, 2:]
    outside = (high < low).any(1) | (high < 0).any(1) | (low > [width, height]).any(1)
    if outside.any():
        x1, y1, x2, y2 = boxes[outside][0].tolist()
        raise bad(
            f"box {int(outside.argmax())} [{x1:g}, {y1:g}, {x2:g}, {y2:g}] is not within the picture of "
            f"{width} x {height} pixels; expected x1 <= x2 and y1 <= y2 in the picture's pixels"
        )
    return boxes.clip(0, np.array([width, height] * 2, np.float32))


def _points(value: Any, signs: Any, size: tuple[int, int]) -> tuple[list[Floats], list[npt.NDArray[np.int32]]]:
    """The points of each object (k, 2) and their signs (k,)."""
    if not value:
        return [], []
    flat = all(_is_point(point) for point in value)
    lists = [value] if flat else [one or () for one in value]
    of_lists = [signs] if flat else signs
    if of_lists is None:
        of_lists = [None] * len(lists)
    if not isinstance(of_lists, list | tuple) or len(of_lists) != len(lists):
        raise bad(f"expected point_labels shaped like points, but got {str(signs)[:80]}")
    points = [_inside(_numbers(one, 2, "points of two finite numbers [x, y]"), size) for one in lists]
    return points, [_signs(given, len(one)) for given, one in zip(of_lists, points, strict=True)]


def _is_point(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value)


def _inside(points: Floats, size: tuple[int, int]) -> Floats:
    height, width = size
    outside = (points < 0).any(1) | (points > [width, height]).any(1)
    if outside.any():
        x, y = points[outside][0].tolist()
        raise bad(f"point [{x:g}, {y:g}] is outside the picture of {width} x {height} pixels")
    return points


def _signs(given: Any, count: int) -> npt.NDArray[np.int32]:
    signs = [1] * count if given is None else given
    if not isinstance(signs, list | tuple) or len(signs) != count or not all(s in (0, 1) for s in signs):
        raise bad(f"expected point_labels of 0 or 1, one for each of {count} points, but got {str(given)[:80]}")
    return np.array(signs, np.int32)


def carried(data: Mapping[str, Any], count: int, label: str) -> dict[str, Any]:
    """What an earlier job said of each object: labels (else `label`), class_ids (else 0), scores (else None)."""
    labels = _column(data, "labels", count, lambda v: isinstance(v, str) and bool(v), "names")
    ids = _column(data, "class_ids", count, lambda v: isinstance(v, int) and -(1 << 31) <= v < 1 << 31, "whole numbers")
    scores = _column(data, "scores", count, lambda v: isinstance(v, int | float) and 0 <= v <= 1, "numbers from 0 to 1")
    return {"labels": labels or [label] * count, "class_ids": ids or [0] * count, "scores": scores}


def _column(data: Mapping[str, Any], name: str, count: int, fits: Callable[[Any], bool], what: str) -> Any:
    value = data.get(name)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != count or not all(fits(v) for v in value):
        raise bad(f"expected {name} to be {count} {what}, one for each object, but got {str(value)[:80]}")
    return value
