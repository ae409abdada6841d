"""Knows what YOLO networks share whatever their task: parameters, letterbox, and which boxes the head's numbers mean.

A network ends at the head's raw numbers, a distance distribution and class logits for each anchor point, or before them
(`workers/yolonetwork.py`). They are turned into boxes here, in float32 and only for the few anchor points that pass
the score threshold: so half precision costs no box accuracy, and a runtime compiles nothing that depends on the
picture's size.

Defaults and arithmetic follow `predict` of ultralytics 8.4.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import BadInput
from workers.atpoints import Branch
from workers.models import Image, nearest
from workers.nms import nms

_STRIDE = 32  # pixels; the coarsest feature map of all but the p6 models, and ultralytics' least padding unit
_PAD_GREY = 114  # ultralytics LetterBox, padding_value
_MAX_NMS = 30_000  # candidates of an image, ultralytics non_max_suppression, max_nms
_CLASS_OFFSET = 7680.0  # pixels that move the classes apart, ultralytics non_max_suppression, max_wh
_HEAD_TOP = 300  # candidates an NMS-free head gives at least, ultralytics Detect.max_det
_CPU_NMS_BOXES = 1000  # a batch with fewer candidates an image is copied to the host first: one copy, no waiting

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Params:
    """What a user may set; the defaults are those of ultralytics predict (ultralytics/cfg/default.yaml, 8.4).

    Attributes:
        conf: boxes score higher than this, 0..1.
        iou: of two boxes of one class that overlap more than this, 0..1, the lower one goes.
        imgsz: longer side of the network's input in pixels, a multiple of 32.
        max_det: boxes of an image at most, the best ones.
        classes: names of the labels to keep; none means all.
        agnostic_nms: boxes of different classes suppress each other too.
        nms: True takes the head trained for NMS; False the NMS-free head, which v10 and 26 have and v8 and 11 lack.
    """

    conf: float = 0.25
    iou: float = 0.7
    imgsz: int = 640
    max_det: int = 300
    classes: tuple[str, ...] = ()
    agnostic_nms: bool = False
    nms: bool = True

    def __post_init__(self) -> None:
        for name in ("conf", "iou"):
            object.__setattr__(self, name, _share(name, getattr(self, name)))
        _whole("imgsz", self.imgsz, 32, 8192)
        _whole("max_det", self.max_det, 1, _MAX_NMS)
        if self.imgsz % _STRIDE:
            fit = max(_STRIDE, round(self.imgsz / _STRIDE) * _STRIDE)
            raise ValueError(f"imgsz must be a multiple of {_STRIDE}, but got {self.imgsz}; the nearest is {fit}")
        for name in ("agnostic_nms", "nms"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, but got {getattr(self, name)!r}")
        object.__setattr__(self, "classes", _names(self.classes))


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number from 0 to 1, but got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, but got {value!r}")
    return float(value)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value}")


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) and v for v in value):
        raise TypeError(f"classes must be a list of label names, but got {value!r}")
    return tuple(value)


def check_labels(params: Params, labels: Sequence[str]) -> None:
    """Raise BadInput when `classes` names a label the model does not have."""
    for name in params.classes:
        if name not in labels:
            shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
            raise BadInput(f"the model has no class {name!r}{nearest(name, labels)}; it has: {shown}")


@dataclass(frozen=True, slots=True)
class Head:
    """What the head's numbers mean.

    Attributes:
        strides: pixels between the anchor points of each feature map, finest first.
        bins: values of each distance's distribution; 1 means the distance itself.
        branches: of numbers that a network does not give, how they are computed at an anchor point from the features.
    """

    strides: tuple[int, ...]
    bins: int
    branches: Mapping[str, Branch] = field(default_factory=dict)

    @property
    def padding(self) -> int:
        """Pixels of which both sides of the input are multiples."""
        return max(_STRIDE, *self.strides)

    @classmethod
    def of(cls, module: Any, labels: Sequence[str], branches: Mapping[str, Branch]) -> Head:
        head = module.model[-1]
        if head.nc != len(labels):
            raise BadInput(f"the checkpoint names {len(labels)} classes, but its head has {head.nc}")
        return cls(tuple(int(s) for s in head.stride.tolist()), int(head.reg_max), branches)

    def at(self, raw: Mapping[str, Any], name: str, image: Any, point: Any) -> Any:
        """(n, m) numbers of a name at anchor points (n,) of pictures (n,): given by the network, or computed here."""
        if name in raw:
            return raw[name][image, :, point]
        return self.branches[name].at([raw[f"features{i}"] for i in range(len(self.strides))], image, point)


def finite(raw: Mapping[str, Any]) -> Any:
    """(batch,) whether all numbers that a network gave for a picture are finite.

    A sum shows any NaN or infinity in it, in one pass and without a mask as large as the output.
    """
    sums: Any = sum(numbers.flatten(1).sum(1) for numbers in raw.values() if numbers.is_floating_point())
    return sums.isfinite()


def kept(
    raw: Mapping[str, Any],
    further: Sequence[str],
    params: Params,
    head: Head,
    labels: Sequence[str],
    shape: tuple[int, int],
) -> Any:
    """The boxes of each picture that stay, best first.

    Args:
        raw: of each anchor point "logits" (batch, classes, anchors), or "best" (batch, anchors), the largest of them,
            and "class_id" (batch, anchors), whose it is; and "distances" (batch, 4 * bins, anchors), or "features0",
            "features1" and so on, finest first, which the head's branches compute them from.
        further: names of further numbers that come with each anchor point, as the distances do.
        shape: (height, width) of the padded input.

    Returns:
        For each picture (n, 6 + m): x1, y1, x2, y2 in pixels of the padded input, score, class id, the further numbers.
    """
    import torch

    choose = _best_of_each_point if params.nms else _best_pairs
    image, point, logit, class_id = choose(raw, params)
    score = logit.sigmoid()
    passed = score > params.conf
    if params.classes:
        wanted = [i for i, label in enumerate(labels) if label in params.classes]
        passed &= torch.isin(class_id, torch.tensor(wanted, device=class_id.device))
    image, point, score, class_id = image[passed], point[passed], score[passed], class_id[passed]
    numbers = [head.at(raw, name, image, point) for name in ("distances", *further)]
    columns = [image[:, None], _decoded(numbers[0], point, head, shape), score[:, None], class_id[:, None]]
    rows, count = torch.cat([*columns, *numbers[1:]], 1), len(next(iter(raw.values())))
    if rows.is_cuda and len(rows) <= _CPU_NMS_BOXES * count:
        rows = rows.cpu()
    return [_suppressed(rows[rows[:, 0] == i, 1:], params) for i in range(count)]


def _suppressed(rows: Any, params: Params) -> Any:
    """The rows of one picture that stay, best first."""
    if not params.nms:
        return rows[: params.max_det]  # the head gave them best first
    if len(rows) > _MAX_NMS:
        rows = rows[rows[:, 4].argsort(descending=True)[:_MAX_NMS]]
    offset = 0.0 if params.agnostic_nms else _CLASS_OFFSET
    return rows[nms(rows[:, :4] + rows[:, 5:6] * offset, rows[:, 4], params.iou)[: params.max_det]]


def _best_of_each_point(raw: Mapping[str, Any], params: Params) -> tuple[Any, Any, Any, Any]:
    """(image, anchor point, logit, class id) of the points whose best class may pass the threshold."""
    import torch

    best = raw["best"] if "best" in raw else raw["logits"].amax(1)
    # A little below the threshold, since rounding the threshold must not lose what the sigmoid would pass.
    image, point = (best > torch.tensor(params.conf).logit().item() - 1e-3).nonzero(as_tuple=True)
    if "class_id" in raw:
        return image, point, best[image, point], raw["class_id"][image, point]
    logit, class_id = raw["logits"][image, :, point].max(1)
    return image, point, logit, class_id


def _best_pairs(raw: Mapping[str, Any], params: Params) -> tuple[Any, Any, Any, Any]:
    """The same for an NMS-free head: each image's best pairs of point and class, best first.

    As ultralytics' Detect.get_topk_index: the best points are found by their best class, then the best pairs among
    them, so that one point may come with several classes; agnostic, each point comes with its best class only.
    """
    import torch

    logits = raw["logits"]
    batch, classes, points = logits.shape
    top = min(max(params.max_det, _HEAD_TOP), points)
    image = torch.arange(batch, device=logits.device)[:, None].expand(-1, top)
    score, point = logits.amax(1).topk(top, dim=1)
    of_points = logits[image, :, point]  # (batch, top, classes)
    if params.agnostic_nms:
        class_id = of_points.argmax(2)
    else:
        score, pair = of_points.flatten(1).topk(top, dim=1)
        point, class_id = point.gather(1, pair // classes), pair % classes
    return image.flatten(), point.flatten(), score.flatten(), class_id.flatten()


def _decoded(distances: Any, point: Any, head: Head, shape: tuple[int, int]) -> Any:
    """Distances (n, 4 * bins) from their anchor points to the four sides -> (n, 4) xyxy in pixels.

    With several bins a distance is the mean of its distribution (Generalized Focal Loss, arXiv 2006.04388).
    """
    import torch

    centres, strides = _points(head.strides, shape, str(distances.device))
    if head.bins > 1:
        weights = torch.arange(head.bins, dtype=distances.dtype, device=distances.device)
        distances = distances.unflatten(1, (4, head.bins)).softmax(2) @ weights
    centre = centres[point]
    return torch.cat([centre - distances[:, :2], centre + distances[:, 2:]], 1) * strides[point]


@functools.lru_cache(maxsize=128)
def _points(strides: tuple[int, ...], shape: tuple[int, int], device: str) -> tuple[Any, Any]:
    """Anchor points of an input of (height, width): (n, 2) xy in units of their stride, and (n, 1) strides.

    One in the middle of each cell, row by row, finest feature map first.
    """
    import torch

    centres, scales = [], []
    for stride in strides:
        rows, columns = shape[0] // stride, shape[1] // stride
        y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        centres.append(torch.stack([x.flatten(), y.flatten()], 1))
        scales.append(torch.full((rows * columns, 1), float(stride)))
    return torch.cat(centres).to(device), torch.cat(scales).to(device)


def _fitted(height: int, width: int, gain: float) -> tuple[int, int]:
    """(height, width) after scaling, at least one pixel each."""
    return max(round(height * gain), 1), max(round(width * gain), 1)


def letterbox(image: Image, size: int, multiple: int) -> Image:
    """Scale a picture to fit into size x size and pad it with grey to multiples, as ultralytics predict does.

    The shorter side is padded to the next multiple only (LetterBox auto=True, what predict does for one picture), so
    that no time is spent on grey; an odd pixel of padding goes to the right and to the bottom.
    """
    import cv2

    height, width = image.shape[:2]
    fitted = _fitted(height, width, min(size / height, size / width))
    if fitted != (height, width):
        image = cv2.resize(image, (fitted[1], fitted[0]), interpolation=cv2.INTER_LINEAR)
    down, right = ((size - side) % multiple for side in fitted)
    padded = np.full((fitted[0] + down, fitted[1] + right, 3), _PAD_GREY, np.uint8)
    top, left = _half(down), _half(right)
    padded[top : top + fitted[0], left : left + fitted[1]] = image
    return padded


def _half(padding: int) -> int:
    """Pixels of padding that go to the left or the top."""
    return round(padding / 2 - 0.1)


def to_original(boxes: Floats, padded: tuple[int, int], original: tuple[int, int]) -> Floats:
    """Boxes xyxy in the padded input -> in the original picture, clipped to it (ultralytics ops.scale_boxes).

    Args:
        boxes: (n, 4) pixels of the padded input.
        padded, original: (height, width) of each.
    """
    height, width = original
    fitted = _fitted(height, width, min(padded[0] / height, padded[1] / width))
    shift = np.array([_half(padded[1] - fitted[1]), _half(padded[0] - fitted[0])] * 2, np.float32)
    gain = np.array([fitted[1] / width, fitted[0] / height] * 2, np.float32)
    moved: Floats = ((boxes - shift) / gain).astype(np.float32)
    return moved.clip(0, np.array([width, height] * 2, np.float32))
