"""Knows torchvision's networks for semantic segmentation: DeepLabV3, FCN and LR-ASPP, a class for each pixel.

The network ends at its small map of logits. The map is enlarged here in float32, a few classes at a time, so that a
large picture costs no more memory than a few of its masks. Each class that is in the picture becomes one mask.

Defaults and arithmetic follow torchvision 0.29 (models/segmentation, transforms/_presets.py), against which they are
tested: the picture is scaled, the map enlarged to the scaled picture, and that to the original.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput, ItemFailed
from storage.results.masks import Result
from workers import masks, statedicts, uploading
from workers.models import Card, Image, Item, Prepared, Site, check_labels
from workers.pixels import Pixels
from workers.runtimes import Network, Session

REQUIRES = ("torch", "torchvision", "PIL")

_MEAN = (0.485, 0.456, 0.406)  # RGB 0..1, torchvision/transforms/_presets.py
_STD = (0.229, 0.224, 0.225)
_MAX_SIDE = 4096  # pixels of the scaled picture, which else could be a hundred times longer than wide

# The categories of the published weights by class id, torchvision's _VOC_CATEGORIES (models/_meta.py).
_VOC = (
    "__background__,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,"
    "person,pottedplant,sheep,sofa,train,tvmonitor"
)
VOC: tuple[str, ...] = tuple(_VOC.split(","))


@dataclass(frozen=True, slots=True)
class Params:
    """What a user may set.

    Attributes:
        imgsz: pixels of the scaled picture's shorter side (SemanticSegmentation, resize_size).
        classes: names of the labels to keep; none means all but the background.
    """

    imgsz: int = 520
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.imgsz, bool) or not isinstance(self.imgsz, int):
            raise TypeError(f"imgsz must be a whole number, but got {self.imgsz!r}")
        if not 32 <= self.imgsz <= _MAX_SIDE:
            raise ValueError(f"imgsz must be from 32 to {_MAX_SIDE}, but got {self.imgsz}")
        names: Any = self.classes
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"classes must be a list of label names, but got {names!r}")
        object.__setattr__(self, "classes", tuple(names))


def _card(name: str, file: str, memory_gb: float) -> Card:
    return Card(
        name=name,
        family="torchvision_segmentation",
        kind="masks",
        params=Params,
        weights=f"https://download.pytorch.org/models/{file}.pth",
        sha256=file.rpartition("-")[2],
        memory_gb=memory_gb,
        licence="BSD-3-Clause",
    )


CARDS: tuple[Card, ...] = (
    _card("deeplabv3_resnet50", "deeplabv3_resnet50_coco-cd0a2569", 2.0),
    _card("deeplabv3_resnet101", "deeplabv3_resnet101_coco-586e9e4e", 2.5),
    _card("deeplabv3_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large-fc3c493d", 1.0),
    _card("fcn_resnet50", "fcn_resnet50_coco-1167a1af", 2.0),
    _card("fcn_resnet101", "fcn_resnet101_coco-7ecb50ca", 2.5),
    _card("lraspp_mobilenet_v3_large", "lraspp_mobilenet_v3_large-d234d4ea", 1.0),
)

# Where the last layer is, by the builder's beginning; its first axis counts the classes.
_LAST = {"deeplabv3": "classifier.4.weight", "fcn": "classifier.4.weight", "lraspp": "classifier.low_classifier.weight"}


def claims(path: Path) -> bool:
    """Whether the file is the state dict of a network that torchvision builds for semantic segmentation."""
    try:
        return bool(_builder(statedicts.shapes(path)))
    except BadInput:
        return False


def describe(path: Path) -> tuple[str, ...]:
    """The labels of a state dict, VOC's where it has as many classes as VOC; a label's place is its class id."""
    return _recognised(path)[1]


def _recognised(path: Path) -> tuple[str, tuple[str, ...]]:
    """(builder, labels). Raises BadInput when no builder makes such a network."""
    shapes = statedicts.shapes(path)
    builder = _builder(shapes)
    if not builder:
        known = ", ".join(card.name for card in CARDS)
        raise BadInput(f"{path.name} is no state dict of torchvision's semantic segmentation; known: {known}")
    count = shapes[_LAST[builder.partition("_")[0]]][0]
    if count == len(VOC):
        return builder, VOC
    return builder, ("__background__", *(f"class_{i}" for i in range(1, count)))


def _builder(shapes: statedicts.Shapes) -> str:
    """The function of torchvision.models.segmentation whose state dict has these keys, "" for none."""
    if _LAST["lraspp"] in shapes and "classifier.cbr.0.weight" in shapes:
        return "lraspp_mobilenet_v3_large"
    if _LAST["fcn"] not in shapes:
        return ""
    if "classifier.0.convs.0.0.weight" in shapes:
        head = "deeplabv3"
    elif "classifier.0.weight" in shapes and "backbone.conv1.weight" in shapes:
        head = "fcn"
    else:
        return ""
    if "backbone.conv1.weight" not in shapes:
        return f"{head}_mobilenet_v3_large" if "backbone.0.0.weight" in shapes else ""
    return f"{head}_resnet{101 if 'backbone.layer3.22.conv1.weight' in shapes else 50}"


def load(card: Card, params: Params, weights: Path, site: Site) -> Segmenter:
    """Build the network that the state dict belongs to, and open it on the device."""
    import torch

    builder, labels = _recognised(weights)
    check_labels({"classes": params.classes}, labels)
    maps = {0: "batch", 2: "map height", 3: "map width"}
    network = Network(
        name="segmentation",
        build=functools.partial(_built, builder, labels, weights),
        example={"images": torch.zeros(2, 3, params.imgsz, params.imgsz)},  # exporters take one for a constant
        outputs=("logits",),
        dynamic_axes={"images": {0: "batch", 2: "height", 3: "width"}, "logits": maps},
        pixels={"images": Pixels(_MEAN, _STD)},
    )
    return Segmenter(params, labels, site.open_network(network), site.device)


def _built(builder: str, labels: Sequence[str], weights: Path) -> Any:
    """The network with its weights, ending at the small map of logits."""
    from torchvision.models import segmentation

    found = statedicts.shapes(weights)
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": len(labels)}
    if not builder.startswith("lraspp"):
        options["aux_loss"] = any(name.startswith("aux_classifier.") for name in found)
    model = getattr(segmentation, builder)(**options)
    statedicts.fill(model, weights, f"torchvision's {builder}")
    model.forward = functools.partial(_small_map, model)
    return model.eval()


def _small_map(model: Any, images: Any) -> Any:
    """Images (batch, 3, height, width) -> logits (batch, classes, map height, map width)."""
    features = model.backbone(images)
    return model.classifier(features if "high" in features else features["out"])


class Segmenter:
    """A network for semantic segmentation on one device."""

    def __init__(self, params: Params, labels: tuple[str, ...], session: Session, device: str) -> None:
        self._params, self._labels, self._device = params, labels, device
        self._session: Session | None = session
        wanted = params.classes or labels[1:]
        self._keep = [i for i, label in enumerate(labels) if label in wanted]

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """Scale one picture; data is (height, width, 3) uint8 RGB, meta the original's (height, width)."""
        from PIL import Image as Pictures

        if image is None:
            raise ItemFailed("prepare", "no-image", "a model for masks looks at pictures, and this item has none")
        size = (image.shape[0], image.shape[1])
        scaled = _scaled(size, self._params.imgsz)
        picture = Pictures.fromarray(image).resize(scaled[::-1], Pictures.Resampling.BILINEAR)
        data = np.array(picture)
        return Prepared(data.shape[:2], data, data.nbytes, size)

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """A mask for each class in each picture, by class id; its score is the mean probability of its pixels.

        ItemFailed "not-finite" for a picture whose numbers are NaN or infinite.
        """
        return self.answer(self.compute(batch), batch) if batch else []

    def compute(self, batch: Sequence[Prepared]) -> Any:
        """The network's map (batch, classes, map height, map width)."""
        import torch

        if self._session is None:
            raise RuntimeError("expected an open model, but it was closed")
        with torch.inference_mode():
            pictures = uploading.pictures([item.data for item in batch], self._device)
            return self._session(images=pictures)["logits"]

    def answer(self, logits: Any, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The masks of each picture, from what `compute` gave."""
        import torch

        with torch.inference_mode():
            finite = logits.flatten(1).sum(1).isfinite().tolist()
            return [
                self._result(of_image, image) if ok else _not_finite()
                for of_image, image, ok in zip(logits, batch, finite, strict=True)
            ]

    def close(self) -> None:
        """Let go of the network."""
        self._session = None

    def _result(self, logits: Any, image: Prepared) -> Result:
        """The masks of one picture from its map (classes, map height, map width)."""
        size: tuple[int, int] = image.meta
        classes, probability = _best(logits, image.data.shape[:2], size)
        there = [i for i in classes.unique().tolist() if i in self._keep]
        coded: list[masks.Mask] = []
        scores: list[float] = []
        for i in there:  # one at a time: each is as large as the picture
            mask = classes == i
            coded += masks.coded(mask[None])
            scores.append(float(probability[mask].double().mean()))
        return masks.result(coded, scores, there, [self._labels[i] for i in there], size)


def _scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) with `side` as the shorter one (torchvision functional, _compute_resized_output_size).

    Of a picture so thin that the longer one would pass the limit, the longer one becomes the limit.
    """
    height, width = size
    if max(size) * side > _MAX_SIDE * min(size):
        scale = _MAX_SIDE / max(size)
        return max(1, int(height * scale)), max(1, int(width * scale))
    return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)


def _best(logits: Any, scaled: tuple[int, int], size: tuple[int, int]) -> tuple[Any, Any]:
    """Each pixel's best class (height, width) int64 and its probability, float32.

    Args:
        logits: (classes, map height, map width).
        scaled, size: (height, width) of the scaled and of the original picture.
    """
    import torch

    best = torch.full(size, -torch.inf, device=logits.device)
    total = best.clone()  # logarithm of the sum of the exponentials so far
    classes = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for piece in masks.pieces(len(logits), scaled, size):
        enlarged = _enlarged(_enlarged(logits[piece], scaled), size)
        top, which = enlarged.max(0)
        better = top > best
        best = torch.where(better, top, best)
        classes = torch.where(better, which + piece.start, classes)
        total = torch.logaddexp(total, enlarged.logsumexp(0))
    return classes, (best - total).exp()


def _enlarged(logits: Any, size: tuple[int, int]) -> Any:
    from torch.nn.functional import interpolate

    return interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the network gave NaN or infinity; try precision fp32")
