"""Knows YOLO detectors (v8, v10, 11, 26): their checkpoints, and how a batch of pictures becomes boxes.

Defaults and arithmetic follow `predict` of ultralytics 8.4, against which they are tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import ItemFailed
from storage.results.detections import Result
from workers import ultralytics_checkpoints, uploading, yolohead, yolonetwork
from workers.models import Card, Image, Item, Prepared, Site
from workers.runtimes import Session
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
    head, session = yolonetwork.opened("yolo", weights, ALLOWED, labels, params, site)
    return Detector(params, labels, head, session, site.device)


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
            return {**raw, "finite": yolohead.finite(raw)}

    def answer(self, raw: dict[str, Any], batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The boxes of each picture, from what `compute` gave."""
        import torch

        with torch.inference_mode():
            shape = batch[0].data.shape[:2]
            kept = yolohead.kept(raw, (), self._params, self._head, self._labels, shape)
            kept = [rows.cpu().numpy() for rows in kept]
        return [
            self._result(found, image) if ok and np.isfinite(found).all() else _not_finite()
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
