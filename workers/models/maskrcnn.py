"""Knows torchvision's Mask R-CNN: a detector that gives a small mask for each box, pasted into the picture here.

Only the backbone runs as a network of a runtime. Proposals, boxes and small masks are made by torchvision's own modules
in float32; the masks are pasted a few at a time, since a hundred of them in the size of a photograph take gigabytes.
Pictures are batched only when their padded shape is the same, so that nobody's padding depends on its neighbours.

Defaults and arithmetic follow torchvision 0.29 (models/detection/mask_rcnn.py), against which they are tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput, ItemFailed
from storage.results.masks import Result
from workers import masks, statedicts
from workers.models import Card, Image, Item, Prepared, Site, check_labels
from workers.runtimes import Network, Session

REQUIRES = ("torch", "torchvision")

# The categories of the published weights by class id, torchvision's _COCO_CATEGORIES (models/_meta.py): COCO numbers
# them up to 90 and uses 80, the ids it does not use are "N/A".
_COCO = (
    "__background__,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,N/A,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,N/A,backpack,"
    "umbrella,N/A,N/A,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,"
    "skateboard,surfboard,tennis racket,bottle,N/A,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,"
    "orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,N/A,dining table,N/A,N/A,"
    "toilet,N/A,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,N/A,book,"
    "clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO: tuple[str, ...] = tuple(_COCO.split(","))


@dataclass(frozen=True, slots=True)
class Params:
    """What a user may set; the defaults are those of torchvision's MaskRCNN.

    Attributes:
        conf: boxes score higher than this, 0..1.
        iou: of two boxes of one class that overlap more than this, 0..1, the lower one goes.
        max_det: objects of an image at most, the best ones.
        mask_threshold: a pixel belongs to an object that it shows with a probability above this, 0..1.
        classes: names of the labels to keep; none means all.
        imgsz: pixels of the input's shorter side; the limit of the longer one grows with it, 1333 for 800.
    """

    conf: float = 0.05
    iou: float = 0.5
    max_det: int = 100
    mask_threshold: float = 0.5
    classes: tuple[str, ...] = ()
    imgsz: int = 800

    def __post_init__(self) -> None:
        for name in ("conf", "iou", "mask_threshold"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float):
                raise TypeError(f"{name} must be a number from 0 to 1, but got {share!r}")
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be from 0 to 1, but got {share!r}")
            object.__setattr__(self, name, float(share))
        for name, low, high in (("max_det", 1, 100_000), ("imgsz", 32, 8192)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, but got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, but got {value}")
        names: Any = self.classes
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"classes must be a list of label names, but got {names!r}")
        object.__setattr__(self, "classes", tuple(names))


def _card(name: str, file: str) -> Card:
    return Card(
        name=name,
        family="maskrcnn",
        kind="masks",
        params=Params,
        weights=f"https://download.pytorch.org/models/{file}.pth",
        sha256=file.rpartition("-")[2],
        memory_gb=3.0,
        licence="BSD-3-Clause",
    )


CARDS: tuple[Card, ...] = (
    _card("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_coco-bf2d0c1e"),
    _card("maskrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2_coco-73cbd019"),
)

_CLASSES = "roi_heads.box_predictor.cls_score.weight"
_LEVELS = {f"map_{level}": level for level in ("0", "1", "2", "3", "pool")}  # output -> map's name, finest first


def claims(path: Path) -> bool:
    """Whether the file is the state dict of a Mask R-CNN of torchvision."""
    try:
        return bool(_builder(statedicts.shapes(path)))
    except BadInput:
        return False


def describe(path: Path) -> tuple[str, ...]:
    """The labels of a state dict, COCO's where it has as many classes as COCO; a label's place is its class id."""
    return _recognised(path)[1]


def _recognised(path: Path) -> tuple[str, tuple[str, ...]]:
    """(builder, labels). Raises BadInput when no builder makes such a model."""
    shapes = statedicts.shapes(path)
    builder = _builder(shapes)
    if not builder:
        known = ", ".join(card.name for card in CARDS)
        raise BadInput(f"{path.name} is no state dict of torchvision's Mask R-CNN; known: {known}")
    count = shapes[_CLASSES][0]
    return builder, COCO if count == len(COCO) else ("__background__", *(f"class_{i}" for i in range(1, count)))


def _builder(shapes: statedicts.Shapes) -> str:
    """The function of torchvision.models.detection whose state dict has these keys, "" for none."""
    needed = {_CLASSES, "roi_heads.mask_predictor.mask_fcn_logits.weight", "backbone.body.layer1.0.conv1.weight"}
    if not needed <= shapes.keys():
        return ""
    return f"maskrcnn_resnet50_fpn{'_v2' if 'roi_heads.box_head.0.0.weight' in shapes else ''}"


def load(card: Card, params: Params, weights: Path, site: Site) -> Segmenter:
    """Build the model that the state dict belongs to, and open its backbone on the device."""
    import torch

    builder, labels = _recognised(weights)
    check_labels({"classes": params.classes}, labels)
    heads = _built(builder, params, labels, weights)
    first, heads.backbone = [heads.backbone], None
    side = math.ceil(params.imgsz / 32) * 32
    network = Network(
        name="backbone",
        # The module just loaded serves the first runtime; one that runs next gets its own, as runtimes change theirs.
        build=lambda: _maps_only(first.pop() if first else _built(builder, params, labels, weights).backbone),
        example={"images": torch.zeros(2, 3, side, side)},  # two: exporters take a batch of one for a constant
        outputs=tuple(_LEVELS),
        dynamic_axes={name: {0: "batch", 2: f"{name} height", 3: f"{name} width"} for name in ("images", *_LEVELS)},
    )
    return Segmenter(heads.to(site.device), labels, params, site.open_network(network), site.device)


def _built(builder: str, params: Params, labels: Sequence[str], weights: Path) -> Any:
    """The model with its weights and thresholds, on the CPU."""
    from torchvision.models import detection

    model = getattr(detection, builder)(
        weights=None,
        weights_backbone=None,
        num_classes=len(labels),
        box_score_thresh=params.conf,
        box_nms_thresh=params.iou,
        # With chosen classes the limit is for the boxes of those, so it is applied after they are chosen.
        box_detections_per_img=1_000_000 if params.classes else params.max_det,
        min_size=params.imgsz,
        max_size=round(params.imgsz * 1333 / 800),
    )
    tensors = statedicts.fill(model, weights, f"torchvision's {builder}")
    if builder == "maskrcnn_resnet50_fpn" and "backbone.body.bn1.num_batches_tracked" not in tensors:
        _without_eps(model.backbone.body)
    return model.eval().requires_grad_(False)


def _without_eps(body: Any) -> None:
    """Frozen batch norms divide by the standard deviation alone.

    So torchvision does with the published weights (overwrite_eps in models/detection/_utils.py), from which those
    tuned on other data start. Batch norms that were trained, which count their batches, keep their eps.
    """
    from torch import nn

    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0


def _maps_only(backbone: Any) -> Any:
    """The backbone with its maps in a tuple, finest first."""
    forward = backbone.forward
    backbone.forward = lambda images: tuple(forward(images).values())
    return backbone


class Segmenter:
    """A Mask R-CNN on one device."""

    def __init__(self, heads: Any, labels: tuple[str, ...], params: Params, session: Session, device: str) -> None:
        self._heads, self._labels, self._params, self._device = heads, labels, params, device
        self._session: Session | None = session
        self._keep = [i for i, label in enumerate(labels) if not params.classes or label in params.classes]

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """One picture as it is; data is (height, width, 3) uint8 RGB, group the padded (height, width) of its input.

        Raises:
            ItemFailed: "too-thin" when nothing is left of the shorter side once the longer one fits.
        """
        if image is None:
            raise ItemFailed("prepare", "no-image", "a model for masks looks at pictures, and this item has none")
        height, width = image.shape[:2]
        return Prepared(self._padded(height, width), image, image.nbytes, (height, width))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The objects of each picture, best first; ItemFailed "not-finite" for one whose numbers are NaN or infinite.

        An object whose every pixel is below the threshold keeps its box and has an empty mask.
        """
        import torch

        if not batch:
            return []
        if self._session is None:
            raise RuntimeError("expected an open model, but it was closed")
        with torch.inference_mode():
            images, _ = self._heads.transform([self._tensor(image) for image in batch])
            raw = self._session(images=images.tensors)
            maps = {level: raw[name] for name, level in _LEVELS.items()}
            # A sum shows any NaN or infinity in it, in one pass and without a mask as large as the map.
            finite = sum(one.flatten(1).sum(1) for one in maps.values()).isfinite().tolist()
            proposals, _ = self._heads.rpn(images, maps)
            found, _ = self._heads.roi_heads(maps, proposals, images.image_sizes)
            return [
                self._result(one, shape, image) if ok else _not_finite()
                for one, shape, image, ok in zip(found, images.image_sizes, batch, finite, strict=True)
            ]

    def close(self) -> None:
        """Let go of the network."""
        self._session = self._heads = None

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the input for a picture of that size, as GeneralizedRCNNTransform resizes and pads it."""
        transform = self._heads.transform
        scale = min(transform.min_size[-1] / min(height, width), transform.max_size / max(height, width))
        resized = [math.floor(side * scale) for side in (height, width)]
        if not all(resized):
            text = f"of a picture of {width}x{height} pixels nothing would be left once it fits {transform.max_size}"
            raise ItemFailed("prepare", "too-thin", text)
        unit = transform.size_divisible
        down, across = (-(-side // unit) * unit for side in resized)
        return down, across

    def _tensor(self, image: Prepared) -> Any:
        """(3, height, width) float32 in 0..1 on the device; the copy there is of bytes."""
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(image.data)).to(self._device)
        return pixels.permute(2, 0, 1).contiguous().float().div_(255)

    def _result(self, found: Mapping[str, Any], scaled: tuple[int, int], image: Prepared) -> Result:
        """The objects of one picture.

        Args:
            found: boxes (n, 4) in pixels of the scaled picture, scores (n,), labels (n,), masks (n, 1, 28, 28).
            scaled: (height, width) of the scaled picture.
        """
        import torch
        from torchvision.models.detection.roi_heads import paste_masks_in_image
        from torchvision.models.detection.transform import resize_boxes

        size: tuple[int, int] = image.meta
        keep = torch.tensor(self._keep, device=found["labels"].device)
        wanted = torch.isin(found["labels"], keep).nonzero()[:, 0][: self._params.max_det]
        boxes = resize_boxes(found["boxes"][wanted], list(scaled), list(size))
        small = found["masks"][wanted]
        coded: list[masks.Mask] = []
        for piece in masks.pieces(len(boxes), size):
            pasted = paste_masks_in_image(small[piece], boxes[piece], size)[:, 0]
            coded += masks.coded(pasted > self._params.mask_threshold)
        ids = found["labels"][wanted].tolist()
        scores = found["scores"][wanted].cpu().numpy()
        return masks.result(coded, scores, ids, [self._labels[i] for i in ids], size, boxes.float().cpu().numpy())


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the network gave NaN or infinity; try precision fp32")
