"""Knows how the masks of everything in a picture are found: where points are asked, and which masks are kept.

Points lie in a grid over the picture, and over crops of it where that is asked for. Of the masks they give, those stay
that the model rates well, that depend little on the threshold, that no crop cuts off, and that show nothing shown
better by another. Which network answers is the family's affair.

Defaults and arithmetic follow SamAutomaticMaskGenerator of segment-anything 1.0, against which they are tested.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import rle
from workers import masks
from workers.nms import nms

_EDGE = 20  # pixels; a mask that ends so near to the edge of a crop is cut off (is_box_near_crop_edge, atol)

Box = tuple[int, int, int, int]  # x1, y1, x2, y2


@dataclass(frozen=True, slots=True)
class Params:
    """What a user may set of a promptable model.

    Attributes:
        multimask: for each prompt the best of three masks (good for one point), or the one mask that is meant for
            several points or a box.

    For items without prompts:

        points_per_side: points asked about along each side of the picture.
        pred_iou_thresh: masks that the model rates higher are kept, 0..1.
        stability_score_thresh: masks whose size depends little on the threshold are kept: the part that stays between
            stability_score_offset above and below it, 0..1.
        stability_score_offset: in logits.
        box_nms_thresh: of two masks whose boxes overlap more, 0..1, the lower rated one goes.
        crop_n_layers: how often the picture is cut into smaller crops, of which layer i has 4^i.
        crop_nms_thresh: as box_nms_thresh, between crops; the mask of the smaller crop stays.
        crop_overlap_ratio: how much of the shorter side neighbouring crops of the first layer share, 0..1.
        crop_n_points_downscale_factor: layer i has points_per_side / factor^i points along a side.
        min_mask_region_area: smaller holes and islands are removed, in pixels; 0 for none.
    """

    multimask: bool = True
    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.multimask, bool):
            raise TypeError(f"multimask must be true or false, but got {self.multimask!r}")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh", "crop_nms_thresh"):
            object.__setattr__(self, name, _number(name, getattr(self, name), 0, 1))
        object.__setattr__(self, "crop_overlap_ratio", _number("crop_overlap_ratio", self.crop_overlap_ratio, 0, 1))
        offset = _number("stability_score_offset", self.stability_score_offset, 0, 100)
        object.__setattr__(self, "stability_score_offset", offset)
        _whole("points_per_side", self.points_per_side, 1, 256)
        _whole("crop_n_layers", self.crop_n_layers, 0, 3)
        _whole("crop_n_points_downscale_factor", self.crop_n_points_downscale_factor, 1, 16)
        _whole("min_mask_region_area", self.min_mask_region_area, 0, 1 << 30)
        if self.points_per_side < self.crop_n_points_downscale_factor**self.crop_n_layers:
            raise ValueError(
                f"points_per_side must leave a point in the last of {self.crop_n_layers} crop layers, but got "
                f"{self.points_per_side} with crop_n_points_downscale_factor {self.crop_n_points_downscale_factor}"
            )


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number from {low} to {high}, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value!r}")
    return float(value)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value}")


# ------------------------------------------------------------------------------------------------ where to ask


def crops(size: tuple[int, int], params: Params) -> list[tuple[Box, npt.NDArray[np.float64]]]:
    """Where a picture of (height, width) is looked at, itself first, and points (n, 2) xy in pixels of each crop.

    Layer i has 2^i by 2^i crops of one size that overlap (generate_crop_boxes); a picture of a few pixels has fewer,
    since some would be empty.
    """
    height, width = size
    found = [((0, 0, width, height), _grid(params.points_per_side))]
    for layer in range(1, params.crop_n_layers + 1):
        grid = _grid(int(params.points_per_side / params.crop_n_points_downscale_factor**layer))
        count = 2**layer
        overlap = int(params.crop_overlap_ratio * min(size) * (2 / count))
        columns, rows = (_cuts(length, count, overlap) for length in (width, height))
        found += [((x1, y1, x2, y2), grid) for (x1, x2), (y1, y2) in itertools.product(columns, rows)]
    return [((x1, y1, x2, y2), grid * np.array([x2 - x1, y2 - y1])) for (x1, y1, x2, y2), grid in found]


def _cuts(length: int, count: int, overlap: int) -> list[tuple[int, int]]:
    """Beginnings and ends of `count` stretches of one length that share `overlap` pixels with the next."""
    each = math.ceil((overlap * (count - 1) + length) / count)
    ends = [(i * (each - overlap), min(i * (each - overlap) + each, length)) for i in range(count)]
    return [(start, end) for start, end in ends if start < end]


def _grid(side: int) -> npt.NDArray[np.float64]:
    """The middles of `side` by `side` equal parts, (n, 2) xy as shares of the picture (build_point_grid)."""
    middles = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(middles, middles)
    return np.stack([x, y], -1).reshape(-1, 2)


# ------------------------------------------------------------------------------------------------ what to keep


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the masks of everything: its rating, and the crop it was found in."""

    mask: masks.Mask
    rating: float
    crop: Box


def rated(logits: Any, ratings: Any, params: Params) -> tuple[Any, Any]:
    """Those of the masks (n, m, m) that the model rates well."""
    if params.pred_iou_thresh <= 0:
        return logits, ratings
    wanted = ratings > params.pred_iou_thresh
    return logits[wanted], ratings[wanted]


def stable(logits: Any, ratings: Any, params: Params) -> tuple[Any, Any]:
    """Those of the masks (n, height, width) that depend little on the threshold (calculate_stability_score)."""
    if params.stability_score_thresh <= 0:
        return logits, ratings
    offset = params.stability_score_offset
    wanted = (logits > offset).sum((1, 2)) / (logits > -offset).sum((1, 2)) >= params.stability_score_thresh
    return logits[wanted], ratings[wanted]


def candidates(logits: Any, ratings: Any, crop: Box, size: tuple[int, int]) -> list[Candidate]:
    """Masks (n, height, width) of a crop as masks of the picture of (height, width), without empty and cut off ones."""
    import torch

    x1, y1, x2, y2 = crop
    coded = masks.coded(torch.nn.functional.pad(logits > 0, (x1, size[1] - x2, y1, size[0] - y2)))
    return [
        Candidate(mask, rating, crop)
        for mask, rating in zip(coded, ratings.tolist(), strict=True)
        if mask.area and not _cut_off(mask.box, crop, size)
    ]


def _cut_off(box: Box, crop: Box, size: tuple[int, int]) -> bool:
    """Whether a mask ends near an edge of its crop that is no edge of the picture (is_box_near_crop_edge)."""
    sides = zip(_inclusive(box), crop, (0, 0, size[1], size[0]), strict=True)
    return any(abs(at - edge) <= _EDGE < abs(at - end) for at, edge, end in sides)


def _inclusive(box: Box) -> Box:
    """A box between pixel corners as one between pixels, as segment-anything counts (batched_mask_to_box)."""
    return box[0], box[1], box[2] - 1, box[3] - 1


def without_doubles(found: Sequence[Candidate], size: tuple[int, int], params: Params) -> list[Candidate]:
    """Of masks that show the same the best, then that of the smallest crop, then tidied ones."""
    looked_at = list(dict.fromkeys(one.crop for one in found))
    kept = []
    for crop in looked_at:
        mine = [one for one in found if one.crop == crop]
        kept += _suppressed(mine, [one.rating for one in mine], params.box_nms_thresh)
    if params.crop_n_layers:
        sizes = [(one.crop[2] - one.crop[0]) * (one.crop[3] - one.crop[1]) for one in kept]
        kept = _suppressed(kept, [1 / area for area in sizes], params.crop_nms_thresh)
    if params.min_mask_region_area > 0 and kept:
        tidied = [_tidied(one, size, params.min_mask_region_area) for one in kept]
        # What needed no tidying is preferred to a double of it that did.
        untouched = [float(new is old) for new, old in zip(tidied, kept, strict=True)]
        kept = _suppressed(tidied, untouched, max(params.box_nms_thresh, params.crop_nms_thresh))
    return kept


def _suppressed(found: Sequence[Candidate], scores: Sequence[float], threshold: float) -> list[Candidate]:
    """Those that no better one overlaps by more than the threshold, best first."""
    import torch

    if not found:
        return []
    boxes = torch.tensor([_inclusive(one.mask.box) for one in found], dtype=torch.float32)
    return [found[i] for i in nms(boxes, torch.tensor(scores, dtype=torch.float32), threshold).tolist()]


def _tidied(candidate: Candidate, size: tuple[int, int], area: int) -> Candidate:
    """Without holes and islands smaller than `area` pixels; the same object when there were none.

    The largest island stays in any case (remove_small_regions).
    """
    import torch

    pixels = rle.decode(candidate.mask.rle, size)
    holes, sizes = _parts(~pixels)
    filled = pixels | ((sizes > 0) & (sizes < area))[holes]
    islands, sizes = _parts(filled)
    large = sizes >= area
    large[sizes.argmax()] = True
    tidied = large[islands]
    if (tidied == pixels).all():
        return candidate
    (mask,) = masks.coded(torch.from_numpy(tidied)[None])
    return Candidate(mask, candidate.rating, candidate.crop)


def _parts(pixels: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Which connected part each pixel is of, by sides and corners, 0 for none; and the pixels of each, 0 of part 0."""
    import cv2

    _, parts, stats, _ = cv2.connectedComponentsWithStats(pixels.astype(np.uint8), connectivity=8)
    sizes = stats[:, cv2.CC_STAT_AREA].copy()
    sizes[0] = 0
    return parts, sizes
