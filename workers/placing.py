"""Knows the objects in a picture, boxes, masks and what is said of them, and how they follow when pixels move.

In an item's data, in pixels of the picture as the model gets it, and in a result's meta, in pixels of the new one:

    boxes                          [[x1, y1, x2, y2], ...]
    masks                          [{"size": [height, width], "counts": text}, ...]    COCO RLE
    labels, scores, class_ids      one an object
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import rle
from storage.errors import ItemFailed

MOST_PIXELS = 100_000_000  # of a new picture
INTERPOLATIONS = ("auto", "nearest", "linear", "cubic", "area", "lanczos")

_CARRIED = ("labels", "scores", "class_ids")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Objects:
    """What is known of the objects in one picture.

    Attributes:
        boxes: (n, 4) float64 xyxy in pixels of the picture, inside it, x1 < x2 and y1 < y2.
        carried: name -> n JSON values.
        masks: n of (height, width) bool, or None.
        known: whether the item said anything of objects at all.
    """

    boxes: Floats
    carried: Mapping[str, list[Any]] = field(default_factory=dict)
    masks: list[npt.NDArray[np.bool_]] | None = None
    known: bool = True

    def chosen(self, indices: Sequence[int]) -> Objects:
        """Those objects only, in that order."""
        carried = {name: [values[i] for i in indices] for name, values in self.carried.items()}
        masks = None if self.masks is None else [self.masks[i] for i in indices]
        return Objects(self.boxes[list(indices)].reshape(-1, 4), carried, masks, self.known)

    def told(self) -> dict[str, Any]:
        """As JSON values."""
        if not self.known:
            return {}
        told: dict[str, Any] = {"boxes": self.boxes.tolist(), **self.carried}
        if self.masks is not None:
            told["masks"] = [{"size": list(mask.shape), "counts": rle.encode(mask).decode()} for mask in self.masks]
        return told


def read(data: Mapping[str, Any], size: tuple[int, int]) -> Objects:
    """What an item says of the objects in a picture of (height, width); empty boxes are left out. Raises ItemFailed."""
    if data.get("boxes") is None and data.get("masks") is None:
        return Objects(np.zeros((0, 4)), known=False)
    masks = None if data.get("masks") is None else _masks(data["masks"], size)
    boxes = _boxes(data["boxes"]) if data.get("boxes") is not None else _boxes_of(masks or [])
    carried = {name: data[name] for name in _CARRIED if data.get(name) is not None}
    for name, values in {**carried, **({} if masks is None else {"masks": masks})}.items():
        if not isinstance(values, list) or len(values) != len(boxes):
            raise _bad(f"expected {len(boxes)} {name}, one for each box, but got {values!r:.100}")
    height, width = size
    boxes = boxes.clip(0, [width, height, width, height])
    there = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    return Objects(boxes, carried, masks).chosen(there.tolist())


def _bad(message: str) -> ItemFailed:
    return ItemFailed("prepare", "bad-objects", message)


def _boxes(given: Any) -> Floats:
    try:
        boxes = np.asarray(given, np.float64).reshape(-1, 4) if len(given) else np.zeros((0, 4))
    except (TypeError, ValueError):
        raise _bad(f"expected boxes as [[x1, y1, x2, y2], ...], but got {given!r:.100}") from None
    if not np.isfinite(boxes).all() or len(boxes) != len(given):
        raise _bad(f"expected boxes as [[x1, y1, x2, y2], ...], but got {given!r:.100}")
    return boxes


def _masks(given: Any, size: tuple[int, int]) -> list[npt.NDArray[np.bool_]]:
    if not isinstance(given, list):
        raise _bad(f"expected masks as a list, but got {given!r:.100}")
    return [_mask(each, size) for each in given]


def _mask(given: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    try:
        if tuple(given["size"]) != tuple(size):
            raise ValueError(f"the mask is of {given['size']}, the picture of {list(size)} (height, width)")
        counts = given["counts"]
        return rle.decode(counts.encode() if isinstance(counts, str) else counts, size)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _bad(f"expected masks as COCO RLE of this picture: {error}") from None


def _boxes_of(masks: Sequence[npt.NDArray[np.bool_]]) -> Floats:
    boxes = [rle.bbox(rle.encode(mask), (mask.shape[0], mask.shape[1])) for mask in masks]
    return np.asarray(boxes, np.float64).reshape(-1, 4)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of a picture goes: cut out, scaled, and put onto a canvas.

    Attributes:
        source: x1, y1, x2, y2 of the part, whole pixels inside the picture.
        scaled: (width, height) that it is scaled to.
        canvas: (width, height) of the new picture.
        offset: (x, y) of the part on the canvas.
    """

    source: tuple[int, int, int, int]
    scaled: tuple[int, int]
    canvas: tuple[int, int]
    offset: tuple[int, int] = (0, 0)

    def picture(self, pixels: npt.NDArray[np.uint8], interpolation: str, grey: int) -> npt.NDArray[np.uint8]:
        """The new picture of (height, width) or (height, width, channels)."""
        import cv2

        x1, y1, x2, y2 = self.source
        part = pixels[y1:y2, x1:x2]
        if self.scaled != (x2 - x1, y2 - y1):
            part = cv2.resize(part, self.scaled, interpolation=_flag_of(interpolation, self.scaled, (x2 - x1, y2 - y1)))
        if self.scaled == self.canvas:
            return np.ascontiguousarray(part)
        new = np.full((self.canvas[1], self.canvas[0], *pixels.shape[2:]), grey, np.uint8)
        x, y = self.offset
        new[y : y + self.scaled[1], x : x + self.scaled[0]] = part
        return new

    def objects(self, objects: Objects, min_visibility: float) -> Objects:
        """The objects in the new picture, without those of which too little is left."""
        x1, y1, x2, y2 = self.source
        gain = np.array([self.scaled[0] / (x2 - x1), self.scaled[1] / (y2 - y1)] * 2)
        inside = objects.boxes.clip([x1, y1, x1, y1], [x2, y2, x2, y2])
        boxes = (inside - [x1, y1, x1, y1]) * gain + np.array(self.offset * 2)
        left = _areas(inside)
        kept = np.flatnonzero((left > 0) & (left >= min_visibility * _areas(objects.boxes)))
        chosen = replace(objects, boxes=boxes).chosen(kept.tolist())
        if chosen.masks is None:
            return chosen
        return replace(
            chosen, masks=[self.picture(mask.astype(np.uint8), "nearest", 0).astype(bool) for mask in chosen.masks]
        )


def _areas(boxes: Floats) -> Floats:
    areas: Floats = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return areas


def _flag_of(interpolation: str, to: tuple[int, int], of: tuple[int, int]) -> int:
    import cv2

    if interpolation == "auto":
        interpolation = "area" if to[0] * to[1] < of[0] * of[1] else "linear"
    flags = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}
    flags |= {"area": cv2.INTER_AREA, "lanczos": cv2.INTER_LANCZOS4}
    return int(flags[interpolation])
