"""Knows the RT-DETR detectors of ultralytics: images stretched to a square, queries in place of NMS.

A picture is stretched, not letterboxed, so every picture of a job has one shape. The network ends at each query's box
and class logits; the best pairs of query and class are taken here, in float32.

Defaults and arithmetic follow `RTDETR.predict` of ultralytics 8.4, against which they are tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput, ItemFailed
from storage.results.detections import Result
from workers import checkpoints, ultralytics_checkpoints, uploading
from workers.models import Card, Image, Item, Prepared, Site, check_labels
from workers.pixels import Pixels
from workers.runtimes import Network, Session

REQUIRES = ("torch", "torchvision", "ultralytics", "cv2")

_STRIDE = 32  # pixels; the coarsest feature map is made larger again and joined to the next, so sides must divide


@dataclass(frozen=True, slots=True)
class Params:
    """What a user may set; the defaults are those of ultralytics predict (ultralytics/cfg/default.yaml, 8.4).

    Attributes:
        conf: boxes score higher than this, 0..1.
        imgsz: both sides of the network's input in pixels, a multiple of 32.
        max_det: boxes of an image at most, the best ones; the network gives one for each query, 300 of them.
        classes: names of the labels to keep; none means all.
    """

    conf: float = 0.25
    imgsz: int = 640
    max_det: int = 300
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.conf, bool) or not isinstance(self.conf, int | float):
            raise TypeError(f"conf must be a number from 0 to 1, but got {self.conf!r}")
        if not 0 <= self.conf <= 1:
            raise ValueError(f"conf must be from 0 to 1, but got {self.conf!r}")
        for name, low, high in (("imgsz", 32, 8192), ("max_det", 1, 30_000)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, but got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, but got {value}")
        if self.imgsz % _STRIDE:
            fit = max(_STRIDE, round(self.imgsz / _STRIDE) * _STRIDE)
            raise ValueError(f"imgsz must be a multiple of {_STRIDE}, but got {self.imgsz}; the nearest is {fit}")
        names: Any = self.classes
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"classes must be a list of label names, but got {names!r}")
        object.__setattr__(self, "conf", float(self.conf))
        object.__setattr__(self, "classes", tuple(names))


_RELEASE = "https://github.com/ultralytics/assets/releases/download/v8.4.0/"
_MEMORY_GB = {"rtdetr-l": 1.5, "rtdetr-x": 2.0}  # half a GB of it for CUDA itself

CARDS: tuple[Card, ...] = tuple(
    Card(
        name=name,
        family="rtdetr",
        kind="detections",
        params=Params,
        weights=f"{_RELEASE}{name}.pt",
        memory_gb=memory_gb,
        licence="AGPL-3.0",
    )
    for name, memory_gb in _MEMORY_GB.items()
)

ALLOWED = (
    ultralytics_checkpoints.ALLOWED
    | ultralytics_checkpoints.names_of("RTDETRDetectionModel")
    | {
        "torch.nn.modules.sparse.Embedding",
        "ultralytics.models.utils.loss.RTDETRDetectionLoss",
        "ultralytics.models.utils.ops.HungarianMatcher",
    }
)


def claims(path: Path) -> bool:
    """Whether the file is a checkpoint of ultralytics' RT-DETR."""
    return ultralytics_checkpoints.family_of(path) == "rtdetr"


def describe(path: Path) -> tuple[str, ...]:
    """The labels of a checkpoint in the order of their class ids. Raises BadInput when it is no RT-DETR."""
    return ultralytics_checkpoints.labels(path, "rtdetr", "detect with RT-DETR")


def load(card: Card, params: Params, weights: Path, site: Site) -> Detector:
    """Check the local checkpoint (.pt), load it, and open its network on the device."""
    labels = describe(weights)
    check_labels({"classes": params.classes}, labels)
    first = [_raw(weights)]
    classes = int(first[0].model[-1].nc)
    if classes != len(labels):
        raise BadInput(f"the checkpoint names {len(labels)} classes, but its head has {classes}")
    # The module just loaded serves the first runtime; one that runs next gets its own, as runtimes change theirs.
    network = _network(lambda: first.pop() if first else _raw(weights), params.imgsz)
    return Detector(params, labels, site.open_network(network), site.device)


def _raw(weights: Path) -> Any:
    """A checkpoint as a module that ends at the queries' raw numbers, batch norms fused into the convolutions."""
    checkpoints.check(weights, ALLOWED)
    model = ultralytics_checkpoints.load(weights)
    model.fuse(verbose=False)
    model.forward = functools.partial(_raw_forward, model)
    return model.eval()


def _raw_forward(model: Any, images: Any) -> tuple[Any, Any]:
    """((batch, queries, 4) boxes as middle and size in shares of the input, (batch, queries, classes) logits)."""
    _, (boxes, logits, *_) = model.predict(images)
    return boxes[-1], logits[-1]  # of the last layer of the decoder


def _network(build: Callable[[], Any], imgsz: int) -> Network:
    import torch

    return Network(
        name="rtdetr",
        build=build,
        example={"images": torch.zeros(2, 3, imgsz, imgsz)},  # two: exporters take a batch of one for a constant
        outputs=("boxes", "logits"),
        dynamic_axes={name: {0: "batch"} for name in ("images", "boxes", "logits")},
        pixels={"images": Pixels()},
    )


class Detector:
    """An RT-DETR network on one device."""

    def __init__(self, params: Params, labels: tuple[str, ...], session: Session, device: str) -> None:
        self._params, self._labels, self._device = params, labels, device
        self._session: Session | None = session
        self._keep = [i for i, label in enumerate(labels) if label in params.classes]

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """Stretch one picture; data is (imgsz, imgsz, 3) uint8 RGB, meta the original's (height, width)."""
        if image is None:
            raise ItemFailed("prepare", "no-image", "a detector looks at pictures, and this item has none")
        import cv2

        side = self._params.imgsz
        data = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
        return Prepared(side, data, data.nbytes, (image.shape[0], image.shape[1]))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The boxes of each picture, best first; ItemFailed "not-finite" for one whose numbers are NaN or infinite."""
        return self.answer(self.compute(batch), batch) if batch else []

    def compute(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        """The network's boxes and logits for a batch."""
        import torch

        if self._session is None:
            raise RuntimeError("expected an open model, but it was closed")
        with torch.inference_mode():
            return self._session(images=uploading.pictures([item.data for item in batch], self._device))

    def answer(self, raw: dict[str, Any], batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The boxes of each picture, from what `compute` gave."""
        import torch

        with torch.inference_mode():
            boxes, logits = raw["boxes"], raw["logits"]
            finite = boxes.isfinite().flatten(1).all(1) & logits.isfinite().flatten(1).all(1)
            # One copy to the host for the whole batch: middle x, middle y, width, height, score, class id.
            found = torch.cat([_best(boxes, logits), finite[:, None, None].expand(-1, boxes.shape[1], 1)], 2).cpu()
        return [
            self._result(one[:, :6], image) if one[0, 6] else _not_finite()
            for one, image in zip(found.numpy(), batch, strict=True)
        ]

    def close(self) -> None:
        """Let go of the network."""
        self._session = None

    def _result(self, found: Any, image: Prepared) -> Result:
        """Rows (n, 6), best first -> boxes in the original picture, not clipped to it, as upstream's are not."""
        found = found[found[:, 4] > self._params.conf]
        if self._params.classes:
            found = found[np.isin(found[:, 5], self._keep)]
        found = found[: self._params.max_det]
        height, width = image.meta
        middle, half = found[:, :2], found[:, 2:4] / 2
        boxes = np.concatenate([middle - half, middle + half], 1) * np.array([width, height] * 2, np.float32)
        ids = found[:, 5].astype(np.int32)
        return Result(boxes.astype(np.float32), found[:, 4].copy(), ids, tuple(self._labels[i] for i in ids.tolist()))


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the network gave NaN or infinity; try precision fp32")


def _best(boxes: Any, logits: Any) -> Any:
    """(batch, queries, 6) box, score and class id of the best pairs of query and class, as many as there are queries.

    As ultralytics' RTDETRDecoder.postprocess, so one query may come with several classes.
    """
    import torch

    queries, classes = logits.shape[1:]
    scores, index = logits.sigmoid().flatten(1).topk(queries, dim=1)
    chosen = boxes.gather(1, (index // classes)[:, :, None].expand(-1, -1, 4))
    return torch.cat([chosen, scores[:, :, None], (index % classes)[:, :, None].float()], 2)
