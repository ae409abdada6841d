"""Knows the detectors of torchvision: Faster R-CNN, RetinaNet, FCOS, SSD and SSDlite, from their state dicts.

A state dict names tensors and nothing else. Its keys and shapes say which builder of torchvision makes the model and
how many classes it has; the sizes, thresholds and anchors are the builder's. A model's own forward resizes images on
the device, pads those of a batch to one shape, decodes and suppresses boxes. Images are batched only when their padded
shape is the same, so that nobody's padding depends on its neighbours.

Numbers are those of torchvision 0.29, against which they are tested.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput, ItemFailed
from storage.results.detections import Result
from workers import checkpoints
from workers.models import Card, Image, Item, Prepared, Site, check_labels

REQUIRES = ("torch", "torchvision")

# The categories of every published weights file by class id, torchvision's _COCO_CATEGORIES (models/_meta.py): COCO
# numbers them up to 90 and uses 80, the ids it does not use are "N/A".
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
    """What a user may set; None takes the model's own, which differs from model to model (see `_Builder`).

    Attributes:
        conf: boxes score higher than this, 0..1.
        iou: of two boxes of one class that overlap more than this, 0..1, the lower one goes.
        max_det: boxes of an image at most, the best ones.
        classes: names of the labels to keep; none means all.
        imgsz: pixels of the input's shorter side; the limit of the longer one grows with it. Not for SSD and SSDlite,
            whose input has one size.
    """

    conf: float | None = None
    iou: float | None = None
    max_det: int | None = None
    classes: tuple[str, ...] = ()
    imgsz: int | None = None

    def __post_init__(self) -> None:
        for name in ("conf", "iou"):
            share = getattr(self, name)
            if share is None:
                continue
            if isinstance(share, bool) or not isinstance(share, int | float):
                raise TypeError(f"{name} must be a number from 0 to 1, but got {share!r}")
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be from 0 to 1, but got {share!r}")
            object.__setattr__(self, name, float(share))
        for name, low, high in (("max_det", 1, 100_000), ("imgsz", 32, 8192)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, but got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, but got {value}")
        names: Any = self.classes
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"classes must be a list of label names, but got {names!r}")
        object.__setattr__(self, "classes", tuple(names))


@dataclass(frozen=True, slots=True)
class _Builder:
    """A function of torchvision.models.detection.

    Attributes:
        file: of the published weights; its eight hex digits begin their sha256.
        memory_gb: device memory with one image, half a GB of it for CUDA itself.
        conf, iou, max_det: its own thresholds and limit.
        sizes: shorter and longest side of its input in pixels; None for one fixed size.
        background: whether class 0 is no class of objects.
    """

    file: str
    memory_gb: float
    conf: float = 0.05
    iou: float = 0.5
    max_det: int = 100
    sizes: tuple[int, int] | None = (800, 1333)
    background: bool = True


_BUILDERS = {
    "fasterrcnn_resnet50_fpn": _Builder("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", 2.0),
    "fasterrcnn_resnet50_fpn_v2": _Builder("fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", 2.5),
    "fasterrcnn_mobilenet_v3_large_fpn": _Builder("fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth", 1.5),
    "fasterrcnn_mobilenet_v3_large_320_fpn": _Builder(
        "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth", 1.0, sizes=(320, 640)
    ),
    "retinanet_resnet50_fpn": _Builder("retinanet_resnet50_fpn_coco-eeacb38b.pth", 2.0, max_det=300, background=False),
    "retinanet_resnet50_fpn_v2": _Builder(
        "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth", 2.5, max_det=300, background=False
    ),
    "fcos_resnet50_fpn": _Builder("fcos_resnet50_fpn_coco-99b0c9b7.pth", 2.0, conf=0.2, iou=0.6, background=False),
    "ssd300_vgg16": _Builder("ssd300_vgg16_coco-b556d3b4.pth", 1.0, conf=0.01, iou=0.45, max_det=200, sizes=None),
    "ssdlite320_mobilenet_v3_large": _Builder(
        "ssdlite320_mobilenet_v3_large_coco-a79551df.pth", 1.0, conf=0.001, iou=0.55, max_det=300, sizes=None
    ),
}

CARDS: tuple[Card, ...] = tuple(
    Card(
        name=name,
        family="torchvision_detection",
        kind="detections",
        params=Params,
        weights=f"https://download.pytorch.org/models/{builder.file}",
        sha256=builder.file.removesuffix(".pth").rpartition("-")[2],
        memory_gb=builder.memory_gb,
        licence="BSD-3-Clause",
    )
    for name, builder in _BUILDERS.items()
)

# What a state dict holds, and what the training script of torchvision's references saves beside it.
ALLOWED = frozenset(
    {
        "argparse.Namespace",
        "collections.Counter",
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        *(f"torch.{n}Storage" for n in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool")),
    }
)

_Shapes = Mapping[str, tuple[int, ...]]
_MAX_HEADER = 50_000_000  # bytes of a safetensors file's list of tensors
_BOX_CLASSES = "roi_heads.box_predictor.cls_score.weight"
_MAPS = "head.classification_head."
_ANCHORS = {"retinanet": 9, "fcos": 1, "ssd300": 4, "ssdlite": 6}  # of one point of the first feature map


def claims(path: Path) -> bool:
    """Whether the file is the state dict of a detector that torchvision builds."""
    try:
        return bool(_builder_of(_shapes(path), ""))
    except BadInput:
        return False


def describe(path: Path) -> tuple[str, ...]:
    """The labels of a state dict, COCO's where it has as many classes as COCO; a label's place is its class id."""
    _, labels = _recognised(path, "")
    return labels


def _recognised(path: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """(builder, labels). Raises BadInput when no builder makes such a model."""
    shapes = _shapes(path)
    builder = _builder_of(shapes, f"{name} {path.name}")
    if not builder:
        raise BadInput(f"{path.name} is no state dict of a torchvision detector; known: {', '.join(_BUILDERS)}")
    count = _classes(shapes, builder)
    if count == len(COCO):
        return builder, COCO
    first = ("__background__",) if _BUILDERS[builder].background else ("class_0",)
    return builder, first + tuple(f"class_{i}" for i in range(1, count))


def _builder_of(shapes: _Shapes, name: str) -> str:
    """The builder whose state dict has these keys, "" for none.

    Args:
        name: of model and file: the two Faster R-CNNs on MobileNet differ in the size of their input only, and the
            small one is meant where the name says 320.
    """
    if _BOX_CLASSES in shapes:
        if any(key.startswith(("roi_heads.mask_", "roi_heads.keypoint_")) for key in shapes):
            return ""
        if "backbone.body.0.0.weight" in shapes:
            return f"fasterrcnn_mobilenet_v3_large_{'320_' if '320' in name else ''}fpn"
        return f"fasterrcnn_resnet50_fpn{'_v2' if 'roi_heads.box_head.0.0.weight' in shapes else ''}"
    if "head.regression_head.bbox_ctrness.weight" in shapes:
        return "fcos_resnet50_fpn"
    if f"{_MAPS}cls_logits.weight" in shapes and "backbone.body.conv1.weight" in shapes:
        return f"retinanet_resnet50_fpn{'_v2' if f'{_MAPS}conv.0.1.weight' in shapes else ''}"
    if f"{_MAPS}module_list.0.weight" in shapes and "backbone.scale_weight" in shapes:
        return "ssd300_vgg16"
    if f"{_MAPS}module_list.0.1.weight" in shapes and "backbone.features.0.0.0.weight" in shapes:
        return "ssdlite320_mobilenet_v3_large"
    return ""


def _classes(shapes: _Shapes, builder: str) -> int:
    """How many classes the last layer has, the background among them where the model has one."""
    if _BOX_CLASSES in shapes:
        return shapes[_BOX_CLASSES][0]
    last = {"ssd300": "module_list.0.weight", "ssdlite": "module_list.0.1.weight"}
    kind = next(kind for kind in _ANCHORS if builder.startswith(kind))
    return shapes[_MAPS + last.get(kind, "cls_logits.weight")][0] // _ANCHORS[kind]


def _shapes(path: Path) -> _Shapes:
    """Names and shapes of the tensors in a state dict, read without loading one. Raises BadInput for other files."""
    if path.suffix == ".safetensors":
        return _safetensors_shapes(path)
    top = checkpoints.peek(path)
    if isinstance(top, dict) and isinstance(top.get("model"), dict):
        top = top["model"]  # as the references of torchvision save it
    if not isinstance(top, dict):
        raise BadInput(f"{path.name} holds no state dict")
    return {name: shape for name, value in top.items() if isinstance(name, str) and (shape := _shape(value))}


def _shape(value: Any) -> tuple[int, ...]:
    """Of a tensor as `checkpoints.peek` shows it; () for a number and for anything else."""
    if not isinstance(value, checkpoints.StandIn):
        return ()
    if value.origin == "torch._utils._rebuild_parameter" and value.args:
        return _shape(value.args[0])
    if value.origin != "torch._utils._rebuild_tensor_v2" or len(value.args) < 3:
        return ()
    size = value.args[2]
    return size if isinstance(size, tuple) and all(isinstance(n, int) for n in size) else ()


def _safetensors_shapes(path: Path) -> _Shapes:
    """From the list at the start of the file: eight bytes of length, then JSON (safetensors, format)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise ValueError(f"its list of tensors has {length} bytes")
            header = json.loads(file.read(length))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path.name} is no safetensors file: {error}") from error


def load(card: Card, params: Params, weights: Path, site: Site) -> Detector:
    """Build the model that the state dict belongs to, fill it, and move it to the device."""
    name, labels = _recognised(weights, card.name)
    check_labels({"classes": params.classes}, labels)
    builder = _BUILDERS[name]
    if params.imgsz and not builder.sizes:
        raise BadInput(f"{card.name} is a {name}, whose input has one size; leave imgsz out")
    model = _built(name, params, len(labels))
    _fill(model, name, weights)
    most = params.max_det or builder.max_det
    return Detector(model.eval().requires_grad_(False).to(site.device), labels, params.classes, most, site)


def _built(name: str, params: Params, classes: int) -> Any:
    """The module with random weights on the CPU, its thresholds set."""
    from torchvision.models import detection

    builder = _BUILDERS[name]
    prefix = "box_" if name.startswith("fasterrcnn") else ""
    options: dict[str, Any] = {
        f"{prefix}score_thresh": builder.conf if params.conf is None else params.conf,
        f"{prefix}nms_thresh": builder.iou if params.iou is None else params.iou,
        # With chosen classes the limit is for the boxes of those, so it is applied after they are chosen.
        f"{prefix}detections_per_img": 1_000_000 if params.classes else params.max_det or builder.max_det,
    }
    if params.imgsz and builder.sizes:
        shorter, longest = builder.sizes
        options |= {"min_size": params.imgsz, "max_size": round(params.imgsz * longest / shorter)}
    build = getattr(detection, name)
    return build(weights=None, weights_backbone=None, num_classes=classes, **options)


def _fill(model: Any, name: str, weights: Path) -> None:
    """Load the state dict. Raises BadInput when its tensors are not those of the model."""
    tensors = _tensors(weights)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise BadInput(f"{weights.name} looks like a {name}, but its tensors do not fit: {text}") from error
    frozen = "backbone.body.bn1.weight" in tensors and "backbone.body.bn1.num_batches_tracked" not in tensors
    if frozen and name in ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"):
        _without_eps(model.backbone.body)


def _without_eps(body: Any) -> None:
    """Frozen batch norms of these two models divide by the standard deviation alone.

    So torchvision does with the published weights (overwrite_eps in models/detection/_utils.py), from which those
    tuned on other data start. Batch norms that were trained, which count their batches, keep their eps.
    """
    from torch import nn

    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0


def _tensors(weights: Path) -> dict[str, Any]:
    if weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(weights))
    import argparse

    import torch

    checkpoints.check(weights, ALLOWED)
    with torch.serialization.safe_globals([argparse.Namespace]):
        top: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True)
    return top["model"] if isinstance(top.get("model"), dict) else top


class Detector:
    """A detector of torchvision on one device; its weights stay float32, autocast computes in less where asked."""

    def __init__(self, model: Any, labels: tuple[str, ...], classes: tuple[str, ...], max_det: int, site: Site) -> None:
        self._labels, self._max_det, self._site = labels, max_det, site
        self._keep = np.array([i for i, label in enumerate(labels) if not classes or label in classes])
        self._model: Any = model
        self._transform = model.transform
        self._watch = _Watch(model)

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """One picture as it is; data is (height, width, 3) uint8 RGB, group the padded (height, width) of its input.

        Raises:
            ItemFailed: "too-thin" when nothing is left of the shorter side once the longer one fits.
        """
        if image is None:
            raise ItemFailed("prepare", "no-image", "a detector looks at pictures, and this item has none")
        height, width = image.shape[:2]
        return Prepared(self._padded(height, width), image, image.nbytes, (height, width))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The boxes of each picture, best first; ItemFailed "not-finite" for one whose numbers are NaN or infinite."""
        import torch

        if not batch:
            return []
        if self._model is None:
            raise RuntimeError("expected an open model, but it was closed")
        with torch.inference_mode(), self._precision():
            self._watch.start(len(batch), self._site.device)
            found = self._model([self._tensor(image) for image in batch])
            finite = self._watch.finite.tolist()
        return [self._result(one) if ok else _not_finite() for one, ok in zip(found, finite, strict=True)]

    def close(self) -> None:
        """Let go of the network."""
        self._model = None

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the input for a picture of that size, as GeneralizedRCNNTransform resizes and pads it."""
        transform = self._transform
        if transform.fixed_size:
            return transform.fixed_size[1], transform.fixed_size[0]
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

        pixels = torch.from_numpy(np.ascontiguousarray(image.data)).to(self._site.device)
        return pixels.permute(2, 0, 1).contiguous().float().div_(255)

    def _precision(self) -> AbstractContextManager[Any]:
        import torch

        if self._site.precision == "fp32":
            return nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self._site.precision]
        return torch.autocast(self._site.device.partition(":")[0], dtype)

    def _result(self, found: Mapping[str, Any]) -> Result:
        boxes, scores, ids = (found[name].float().cpu().numpy() for name in ("boxes", "scores", "labels"))
        ids = ids.astype(np.int32)
        order = np.argsort(-scores, kind="stable")
        order = order[np.isin(ids[order], self._keep)][: self._max_det]
        labels = tuple(self._labels[i] for i in ids[order].tolist())
        return Result(boxes[order], scores[order], ids[order], labels)


class _Watch:
    """Looks at a model's inner numbers while it runs: NaN or infinity in them would only look like few boxes.

    Attributes:
        finite: (batch,) bool on the device, of the last run.
    """

    def __init__(self, model: Any) -> None:
        self.finite: Any = None
        model.backbone.register_forward_hook(self._features)
        if hasattr(model, "roi_heads"):
            model.rpn.head.register_forward_hook(self._objects)
            self._postprocess = model.roi_heads.postprocess_detections
            model.roi_heads.postprocess_detections = self._proposals
        else:
            model.head.register_forward_hook(self._outputs)

    def start(self, count: int, device: str) -> None:
        """Forget the last run; the next has `count` images."""
        import torch

        self.finite = torch.ones(count, dtype=torch.bool, device=device)

    def _see(self, tensor: Any) -> None:
        self.finite &= tensor.isfinite().flatten(1).all(1)

    @staticmethod
    def _features(module: Any, inputs: Any, features: Any) -> Any:
        """Feature maps go on in float32: anchors are made in their type, and bf16 steps by 4 pixels above 512."""
        if not isinstance(features, dict):
            return features.float()
        return type(features)((name, tensor.float()) for name, tensor in features.items())

    def _objects(self, module: Any, inputs: Any, outputs: tuple[list[Any], list[Any]]) -> Any:
        """The first stage's numbers, a list of each feature map's."""
        for tensor in (*outputs[0], *outputs[1]):
            self._see(tensor)
        return tuple([tensor.float() for tensor in tensors] for tensors in outputs)

    def _outputs(self, module: Any, inputs: Any, outputs: Mapping[str, Any]) -> Any:
        for tensor in outputs.values():
            self._see(tensor)
        return {name: tensor.float() for name, tensor in outputs.items()}

    def _proposals(self, logits: Any, boxes: Any, proposals: Sequence[Any], shapes: Any) -> Any:
        """The second stage's numbers: rows of all images, one after the other."""
        counts = [len(one) for one in proposals]
        for i, (one, other) in enumerate(zip(logits.split(counts), boxes.split(counts), strict=True)):
            self.finite[i] &= one.isfinite().all() & other.isfinite().all()
        return self._postprocess(logits.float(), boxes.float(), proposals, shapes)


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the network gave NaN or infinity; try precision fp32")
