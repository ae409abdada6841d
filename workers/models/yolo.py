"""Knows YOLO detectors (v8, v10, 11, 26): their checkpoints, and how a batch of pictures becomes boxes.

Defaults and arithmetic follow `predict` of ultralytics 8.4, against which they are tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput, ItemFailed
from storage.results.detections import Result
from workers import checkpoints, ultralytics_checkpoints, uploading, yolohead
from workers.models import Card, Image, Item, Prepared, Site
from workers.pixels import Pixels
from workers.runtimes import Network, Session
from workers.yolohead import Head, Params, check_labels

REQUIRES = ("torch", "torchvision", "ultralytics", "cv2")

_RELEASE = "https://github.com/ultralytics/assets/releases/download/v8.4.0/"
_SIZES = {"yolov8": "nsmlx", "yolov10": "nsmblx", "yolo11": "nsmlx", "yolo26": "nsmlx"}
_MEMORY_GB = {"n": 1.0, "s": 1.0, "m": 1.5, "b": 1.5, "l": 2.0, "x": 2.5}  # half a GB of it for CUDA itself

CARDS: tuple[Card, ...] = tuple(
    Card(
        name=f"{series}{size}",
        family="yolo",
        kind="detections",
        params=Params,
        weights=f"{_RELEASE}{series}{size}.pt",
        memory_gb=_MEMORY_GB[size],
        licence="AGPL-3.0",
    )
    for series, sizes in _SIZES.items()
    for size in sizes
)

ALLOWED = ultralytics_checkpoints.ALLOWED | ultralytics_checkpoints.names_of("DetectionModel", "YOLOv10DetectionModel")


def claims(path: Path) -> bool:
    """Whether the file is a checkpoint that ultralytics wrote, to detect or for a task that no family runs."""
    return ultralytics_checkpoints.family_of(path) == "yolo"


def describe(path: Path) -> tuple[str, ...]:
    """The labels of a checkpoint in the order of their class ids. Raises BadInput when it is not a YOLO detector."""
    return ultralytics_checkpoints.labels(path, "yolo", "detect")


def load(card: Card, params: Params, weights: Path, site: Site) -> Detector:
    """Check the local checkpoint (.pt), load it, and open its network on the device."""
    labels = describe(weights)
    check_labels(params, labels)
    first: list[Any] = [_Raw(weights, params.nms)]
    head = Head.of(first[0].module, labels)
    if params.imgsz % head.padding:
        raise BadInput(f"{card.name} needs imgsz to be a multiple of {head.padding}, but got {params.imgsz}")
    # The module just loaded serves the first runtime; one that runs next gets its own, as runtimes change theirs.
    network = _network(lambda: (first.pop() if first else _Raw(weights, params.nms)).module, params.imgsz)
    return Detector(params, labels, head, site.open_network(network), site.device)


def _network(build: Callable[[], Any], imgsz: int) -> Network:
    import torch

    return Network(
        name="yolo",
        build=build,
        example={"images": torch.zeros(2, 3, imgsz, imgsz)},  # two: exporters take a batch of one for a constant
        outputs=("distances", "logits"),
        dynamic_axes={
            "images": {0: "batch", 2: "height", 3: "width"},
            "distances": {0: "batch", 2: "anchors"},
            "logits": {0: "batch", 2: "anchors"},
        },
        pixels={"images": Pixels()},
    )


class _Raw:
    """A checkpoint as a module that ends at the head's raw numbers, batch norms fused into the convolutions."""

    def __init__(self, weights: Path, nms: bool) -> None:
        checkpoints.check(weights, ALLOWED)
        model = ultralytics_checkpoints.load(weights)
        head = model.model[-1]
        yolohead.branch(head, nms, weights.name)
        model.end2end = not nms  # before fuse, which drops the branch that is not used
        model.fuse(verbose=False)
        head.forward = functools.partial(_raw_forward, head, yolohead.branch(head, nms, weights.name))
        self.module = model.eval()


def _raw_forward(head: Any, branch: dict[str, Any], features: list[Any]) -> tuple[Any, Any]:
    """The head without its decoding: ((batch, 4 * bins, anchors) distances, (batch, classes, anchors) logits)."""
    raw = head.forward_head(features, **branch)
    return raw["boxes"], raw["scores"]


class Detector:
    """A YOLO network on one device."""

    def __init__(self, params: Params, labels: tuple[str, ...], head: Head, session: Session, device: str) -> None:
        self._params, self._labels, self._head, self._device = params, labels, head, device
        self._session: Session | None = session

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """Letterbox one picture; data is (height, width, 3) uint8 RGB, meta the original's (height, width)."""
        if image is None:
            raise ItemFailed("prepare", "no-image", "a detector looks at pictures, and this item has none")
        data = yolohead.letterbox(image, self._params.imgsz, self._head.padding)
        return Prepared(data.shape[:2], data, data.nbytes, (image.shape[0], image.shape[1]))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The boxes of each picture, best first; ItemFailed "not-finite" for one whose numbers are NaN or infinite."""
        return self.answer(self.compute(batch), batch) if batch else []

    def compute(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        """The raw numbers of a batch, "finite" (batch,) among them."""
        import torch

        if self._session is None:
            raise RuntimeError("expected an open model, but it was closed")
        with torch.inference_mode():
            raw = self._session(images=uploading.pictures([item.data for item in batch], self._device))
            # A sum shows any NaN or infinity in it, in one pass and without a mask as large as the output.
            finite = (raw["distances"].flatten(1).sum(1) + raw["logits"].flatten(1).sum(1)).isfinite()
        return {**raw, "finite": finite}

    def answer(self, raw: dict[str, Any], batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The boxes of each picture, from what `compute` gave."""
        import torch

        with torch.inference_mode():
            shape = batch[0].data.shape[:2]
            kept = yolohead.kept(raw, None, self._params, self._head, self._labels, shape)
            kept = [rows.cpu().numpy() for rows in kept]
        return [
            self._result(found, image) if ok else _not_finite()
            for found, ok, image in zip(kept, raw["finite"].tolist(), batch, strict=True)
        ]

    def close(self) -> None:
        """Let go of the network."""
        self._session = None

    def _result(self, found: yolohead.Floats, image: Prepared) -> Result:
        ids = found[:, 5].astype(np.int32)
        boxes = yolohead.to_original(found[:, :4], image.data.shape[:2], image.meta)
        return Result(boxes, found[:, 4].copy(), ids, tuple(self._labels[i] for i in ids.tolist()))


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the network gave NaN or infinity; try precision fp32")
