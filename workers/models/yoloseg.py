"""Knows YOLO segmenters (v8-seg, 11-seg, 26-seg): how the boxes of a picture become its objects' masks.

The network gives, beside what a detector gives, a number of small maps of the whole picture and for each anchor point
the coefficients that mix them: a mixed map above zero is the object's mask, cut to its box.

Defaults and arithmetic follow `predict` of ultralytics 8.4, against which they are tested; but masks are always given
in the size of the original picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import ItemFailed
from storage.results.masks import Result
from workers import masks, ultralytics_checkpoints, uploading, yolohead, yolonetwork
from workers.models import Card, Image, Item, Prepared, Site
from workers.runtimes import Session
from workers.yolohead import Head, check_labels

REQUIRES = ("torch", "torchvision", "ultralytics", "cv2")


@dataclass(frozen=True, slots=True)
class Params(yolohead.Params):
    """What a user may set; the defaults are those of ultralytics predict (ultralytics/cfg/default.yaml, 8.4).

    Attributes:
        retina_masks: True makes each mask in the size of the original picture, with finer edges where that is larger
            than the network's input; False in the size of the input, then scaled.
    """

    retina_masks: bool = False

    def __post_init__(self) -> None:
        yolohead.Params.__post_init__(self)
        if not isinstance(self.retina_masks, bool):
            raise TypeError(f"retina_masks must be true or false, but got {self.retina_masks!r}")


_RELEASE = "https://github.com/ultralytics/assets/releases/download/v8.4.0/"
_MEMORY_GB = {"n": 1.5, "s": 1.5, "m": 2.0, "l": 2.5, "x": 3.0}  # half a GB of it for CUDA itself

CARDS: tuple[Card, ...] = tuple(
    Card(
        name=f"{series}{size}-seg",
        family="yoloseg",
        kind="masks",
        params=Params,
        weights=f"{_RELEASE}{series}{size}-seg.pt",
        memory_gb=memory_gb,
        licence="AGPL-3.0",
    )
    for series in ("yolov8", "yolo11", "yolo26")
    for size, memory_gb in _MEMORY_GB.items()
)

ALLOWED = (
    ultralytics_checkpoints.ALLOWED
    | ultralytics_checkpoints.names_of("SegmentationModel")
    | {f"ultralytics.utils.loss.{name}" for name in ("v8SegmentationLoss", "SegmentLoss26", "BCEDiceLoss")}
    | {"ultralytics.utils.loss.MultiChannelDiceLoss"}
)


def claims(path: Path) -> bool:
    """Whether the file is a checkpoint that ultralytics wrote, to segment."""
    return ultralytics_checkpoints.family_of(path) == "yoloseg"


def describe(path: Path) -> tuple[str, ...]:
    """The labels of a checkpoint in the order of their class ids. Raises BadInput when it is not a YOLO segmenter."""
    return ultralytics_checkpoints.labels(path, "yoloseg", "segment")


def load(card: Card, params: Params, weights: Path, site: Site) -> Segmenter:
    """Check the local checkpoint (.pt), load it, and open its network on the device."""
    labels = describe(weights)
    check_labels(params, labels)
    head, session = yolonetwork.opened("yoloseg", weights, ALLOWED, labels, params, site)
    return Segmenter(params, labels, head, session, site.device)


class Segmenter:
    """A YOLO network for masks on one device."""

    def __init__(self, params: Params, labels: tuple[str, ...], head: Head, session: Session, device: str) -> None:
        self._params, self._labels, self._head, self._device = params, labels, head, device
        self._session: Session | None = session

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """Letterbox one picture; data is (height, width, 3) uint8 RGB, meta the original's (height, width)."""
        if image is None:
            raise ItemFailed("prepare", "no-image", "a model for masks looks at pictures, and this item has none")
        data = yolohead.letterbox(image, self._params.imgsz, self._head.padding)
        return Prepared(data.shape[:2], data, data.nbytes, (image.shape[0], image.shape[1]))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The objects of each picture, best first; ItemFailed "not-finite" for one whose numbers are NaN or infinite.

        Objects whose mask is empty in the network's input are left out.
        """
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
        """The objects of each picture, from what `compute` gave."""
        import torch

        shape = batch[0].data.shape[:2]
        with torch.inference_mode():
            found = yolohead.kept(raw, ("coefficients",), self._params, self._head, self._labels, shape)
            return [
                self._result(rows, maps, image) if ok and rows.isfinite().all() else _not_finite()
                for rows, maps, image, ok in zip(found, raw["maps"], batch, raw["finite"].tolist(), strict=True)
            ]

    def close(self) -> None:
        """Let go of the network."""
        self._session = None

    def _result(self, rows: Any, maps: Any, image: Prepared) -> Result:
        """The objects of one picture, from the boxes that stay (n, 6 + m) and its maps (m, height / 4, width / 4)."""
        shape, size = image.data.shape[:2], image.meta
        boxes = yolohead.to_original(rows[:, :4].cpu().numpy(), shape, size)
        make = self._fine if self._params.retina_masks else self._coarse
        coded: list[masks.Mask] = []
        kept: list[bool] = []
        for piece in masks.pieces(len(rows), shape, size):
            found, there = make(maps, rows[piece].to(maps.device), boxes[piece], shape, size)
            coded += masks.coded(found)
            kept += there
        rows = rows[:, 4:6].cpu().numpy()[kept]
        ids = rows[:, 1].astype(int)
        return masks.result(coded, rows[:, 0], ids, [self._labels[i] for i in ids.tolist()], size, boxes[kept])

    def _coarse(
        self, maps: Any, rows: Any, boxes: yolohead.Floats, shape: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Any, list[bool]]:
        """Masks (k, height, width) bool, made in the size of the input and scaled; and which of the rows have one."""
        with ultralytics_checkpoints.library():
            from ultralytics.utils import ops
        made = ops.process_mask(maps, rows[:, 6:], rows[:, :4], shape, upsample=True)
        there = made.amax((1, 2)) > 0
        if not there.any():
            return made.new_zeros((0, *size)).bool(), there.tolist()
        return ops.scale_masks(made[there][None].float(), size)[0] > 0.5, there.tolist()

    def _fine(
        self, maps: Any, rows: Any, boxes: yolohead.Floats, shape: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Any, list[bool]]:
        """The same, made in the size of the original; boxes (n, 4) are in its pixels."""
        import torch

        with ultralytics_checkpoints.library():
            from ultralytics.utils import ops
        made = ops.process_mask_native(maps, rows[:, 6:], torch.from_numpy(boxes).to(maps.device), size)
        there = made.amax((1, 2)) > 0
        return made[there].bool(), there.tolist()


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the network gave NaN or infinity; try precision fp32")
