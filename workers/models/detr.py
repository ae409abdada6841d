"""Knows the detectors of transformers (DETR and its kin, RT-DETR, D-FINE, RF-DETR, YOLOS): a folder in, boxes out.

A checkpoint is a folder as `save_pretrained` writes it: config.json, preprocessor_config.json and model.safetensors.
The image processor that belongs to the checkpoint makes the input and reads the output, so that size, mean, padding
and the meaning of the scores are the checkpoint's own. The network between them ends at class logits and boxes.

Each image is prepared alone and images of one shape make a batch: the padding that transformers gives a batch of
unequal images changes what DETR finds in them.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from storage.errors import BadInput, ItemFailed
from storage.results.detections import Result
from workers import uploading
from workers.models import Card, Image, Item, Prepared, Site, check_labels
from workers.runtimes import Network, Session

REQUIRES = ("torch", "torchvision", "transformers", "safetensors", "timm")  # timm: the backbones of DETR's own
EXTRA = "models"

_SUFFIX = "ForObjectDetection"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Architectures of that suffix whose input or output is another one, by their beginning.
_OTHERS = {
    "OwlViT": "detects what a text names",
    "Owlv2": "detects what a text names",
    "GroundingDino": "detects what a text names",
    "MMGroundingDino": "detects what a text names",
    "OmDetTurbo": "detects what a text names",
    "PPOCR": "finds text in documents",
    "PPDocLayout": "reads the layout of documents",
}


@dataclass(frozen=True, slots=True)
class Params:
    """What a user may set.

    Attributes:
        conf: boxes score higher than this, 0..1; transformers' post_process_object_detection has 0.5 too.
        max_det: boxes of an image at most, the best ones. Conditional and Deformable DETR give 100 of themselves
            (top_k of their image processors), the others one for each query.
        classes: names of the labels to keep; none means all.
        imgsz: pixels of the input's shorter side, or of both sides where the checkpoint stretches images to a square;
            0 takes the checkpoint's own.
    """

    conf: float = 0.5
    max_det: int = 300
    classes: tuple[str, ...] = ()
    imgsz: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.conf, bool) or not isinstance(self.conf, int | float):
            raise TypeError(f"conf must be a number from 0 to 1, but got {self.conf!r}")
        if not 0 <= self.conf <= 1:
            raise ValueError(f"conf must be from 0 to 1, but got {self.conf!r}")
        for name, low, high in (("max_det", 1, 100_000), ("imgsz", 0, 8192)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, but got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, but got {value}")
        if 0 < self.imgsz < 32:
            raise ValueError(f"imgsz must be 0 for the checkpoint's own size, or from 32 to 8192, but got {self.imgsz}")
        names: Any = self.classes
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"classes must be a list of label names, but got {names!r}")
        object.__setattr__(self, "conf", float(self.conf))
        object.__setattr__(self, "classes", tuple(names))


_HUB = {  # name -> repository on the hub, GB of device memory with one image, half a GB of it for CUDA itself
    "detr-resnet-50": ("facebook/detr-resnet-50", 1.5),
    "detr-resnet-101": ("facebook/detr-resnet-101", 2.0),
    "conditional-detr-resnet-50": ("microsoft/conditional-detr-resnet-50", 1.5),
    "deformable-detr": ("SenseTime/deformable-detr", 2.5),
    "rtdetr_r18vd": ("PekingU/rtdetr_r18vd", 1.0),
    "rtdetr_r34vd": ("PekingU/rtdetr_r34vd", 1.0),
    "rtdetr_r50vd": ("PekingU/rtdetr_r50vd", 1.5),
    "rtdetr_r101vd": ("PekingU/rtdetr_r101vd", 1.5),
    "rtdetr_r50vd_coco_o365": ("PekingU/rtdetr_r50vd_coco_o365", 1.5),
    "rtdetr_v2_r18vd": ("PekingU/rtdetr_v2_r18vd", 1.0),
    "rtdetr_v2_r50vd": ("PekingU/rtdetr_v2_r50vd", 1.5),
    "rtdetr_v2_r101vd": ("PekingU/rtdetr_v2_r101vd", 1.5),
    "dfine-nano": ("ustc-community/dfine-nano-coco", 1.0),
    "dfine-small": ("ustc-community/dfine-small-coco", 1.0),
    "dfine-medium": ("ustc-community/dfine-medium-coco", 1.0),
    "dfine-large": ("ustc-community/dfine-large-coco", 1.5),
    "dfine-xlarge": ("ustc-community/dfine-xlarge-coco", 1.5),
    "rf-detr-base": ("Roboflow/rf-detr-base", 1.5),
    "yolos-tiny": ("hustvl/yolos-tiny", 1.5),
    "yolos-small": ("hustvl/yolos-small", 2.5),
}

CARDS: tuple[Card, ...] = tuple(
    Card(
        name=name,
        family="detr",
        kind="detections",
        params=Params,
        weights=f"hf:{repository}",
        memory_gb=memory_gb,
        licence="Apache-2.0",
    )
    for name, (repository, memory_gb) in _HUB.items()
)


def claims(path: Path) -> bool:
    """Whether the folder's config.json names an architecture of transformers for object detection."""
    try:
        return _architecture(_config(path)).endswith(_SUFFIX)
    except BadInput:
        return False


def describe(path: Path) -> tuple[str, ...]:
    """The labels of a checkpoint folder; a label's place is its class id.

    The checkpoints of DETR number their classes as COCO does, up to 90, and name the ids COCO never used "N/A".

    Raises:
        BadInput: the folder is no detector that runs here, or lacks the safetensors weights or the image processor.
    """
    config = _config(path)
    architecture = _architecture(config)
    if not architecture.endswith(_SUFFIX):
        raise BadInput(f"{path.name} holds {architecture or 'no architecture'}; expected one that ends in {_SUFFIX}")
    for start, does in _OTHERS.items():
        if architecture.startswith(start):
            raise BadInput(f"{path.name} holds {architecture}, which {does}; the detr family runs detectors of images")
    _complete(path)
    return _labels(path, config)


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {error}; expected a folder written by save_pretrained") from error
    if not isinstance(config, dict):
        raise BadInput(f"{file} holds no JSON object; expected the configuration of a model of transformers")
    return config


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def _complete(path: Path) -> None:
    if not any((path / name).is_file() for name in _WEIGHTS):
        raise BadInput(
            f"{path.name} holds no {_WEIGHTS[0]}; pickled weights (pytorch_model.bin) run code when they are opened, "
            "so they are not. Open them where you trust them and save again with save_pretrained"
        )
    if not any((path / name).is_file() for name in _PROCESSORS):
        raise BadInput(
            f"{path.name} holds no {_PROCESSORS[0]}, which says how images are resized; fetch it from where the "
            "weights come from"
        )


def _labels(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("id2label")
    if named is None:  # transformers leaves out the two names that it gives by default
        named = {str(i): f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    try:
        by_id = {int(class_id): str(name) for class_id, name in named.items()}
        if not by_id or min(by_id) < 0 or max(by_id) >= 100_000:
            raise ValueError("expected class ids of 0, 1, 2, ...")
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{path.name}: id2label of config.json is no list of class names ({error})") from error
    return tuple(by_id.get(i, f"class_{i}") for i in range(max(by_id) + 1))


def load(card: Card, params: Params, weights: Path, site: Site) -> Detector:
    """Load a checkpoint folder and open its network on the device; nothing is fetched and no code of it is run."""
    from transformers import AutoImageProcessor

    labels = describe(weights)
    check_labels({"classes": params.classes}, labels)
    processor = AutoImageProcessor.from_pretrained(weights, local_files_only=True, trust_remote_code=False)
    first = [_built(weights)]
    inputs = [name for name in ("pixel_values", "pixel_mask") if name in inspect.signature(first[0].forward).parameters]
    size = _size(processor, params.imgsz)
    # What the processor gives for a picture says which of them it makes, and in which shape.
    example = _inputs(processor, size, np.zeros((64, 64, 3), np.uint8))
    inputs = [name for name in inputs if name in example]
    # The module just loaded serves the first runtime; one that runs next gets its own, as runtimes change theirs.
    network = _network(lambda: _raw(first.pop() if first else _built(weights), inputs), example, inputs)
    model = Detector(params, labels, processor, size, tuple(inputs), site.open_network(network), site.device)
    if size:
        _try(model, params.imgsz, card.name)
    return model


def _built(weights: Path) -> Any:
    """The checkpoint's module on the CPU in float32. Raises BadInput when its tensors are not those it needs."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForObjectDetection
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, info = AutoModelForObjectDetection.from_pretrained(
            weights,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())[:300]
        raise BadInput(f"{weights.name} could not be loaded by transformers: {text}") from error
    if missing := sorted(info["missing_keys"]):
        raise BadInput(
            f"{weights.name} lacks {len(missing)} of the tensors its config.json asks for, {missing[0]} among them; "
            "fetch the folder again"
        )
    return model.eval()


def _raw(model: Any, inputs: Sequence[str]) -> Any:
    """The module with a forward that gives ((batch, queries, classes) logits, (batch, queries, 4) boxes) only."""
    model.forward = functools.partial(_raw_forward, model.forward, tuple(inputs))
    return model


def _raw_forward(forward: Callable[..., Any], inputs: tuple[str, ...], *tensors: Any) -> tuple[Any, Any]:
    out = forward(**dict(zip(inputs, tensors, strict=True)))
    return out.logits, out.pred_boxes


def _network(build: Callable[[], Any], example: Mapping[str, Any], inputs: Sequence[str]) -> Network:
    axes = {"pixel_values": {0: "batch", 2: "height", 3: "width"}, "pixel_mask": {0: "batch", 1: "height", 2: "width"}}
    outputs = ("logits", "boxes")
    return Network(
        name="detr",
        build=build,
        # two: exporters take a batch of one for a constant
        example={name: example[name].repeat(2, *[1] * (example[name].ndim - 1)) for name in inputs},
        outputs=outputs,
        dynamic_axes={**{name: axes[name] for name in inputs}, **{name: {0: "batch"} for name in outputs}},
    )


def _size(processor: Any, imgsz: int) -> dict[str, int]:
    """What to give the image processor as size; {} for its own."""
    own = processor.size
    if not imgsz:
        return {}
    if own.shortest_edge and own.longest_edge:
        return {"shortest_edge": imgsz, "longest_edge": round(imgsz * own.longest_edge / own.shortest_edge)}
    return {"height": imgsz, "width": imgsz}


def _inputs(processor: Any, size: dict[str, int], image: Image) -> Mapping[str, Any]:
    """Tensors of a batch of one."""
    chosen: dict[str, Any] = {"size": size} if size else {}
    # The layout is said, since a picture three pixels high could be taken for channels first.
    made: Mapping[str, Any] = processor(
        images=[image], input_data_format="channels_last", return_tensors="pt", **chosen
    )
    return made


def _try(model: Detector, imgsz: int, name: str) -> None:
    """Run a grey picture, since not every architecture takes every size. Raises BadInput."""
    try:
        model.infer([model.prepare(np.full((64, 64, 3), 128, np.uint8), Item("size"))])
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{name} does not take imgsz {imgsz} ({text}); give a multiple of 32, or 0 for the checkpoint's own"
        ) from error


class Detector:
    """A detector of transformers on one device."""

    def __init__(
        self,
        params: Params,
        labels: tuple[str, ...],
        processor: Any,
        size: dict[str, int],
        inputs: tuple[str, ...],
        session: Session,
        device: str,
    ) -> None:
        self._params, self._labels, self._processor, self._size = params, labels, processor, size
        self._inputs, self._device = inputs, device
        self._session: Session | None = session

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """One picture through the checkpoint's image processor; data is its tensors, meta the original (height, width).

        Raises:
            ItemFailed: "too-thin" when nothing is left of the shorter side once the longer one fits.
        """
        if image is None:
            raise ItemFailed("prepare", "no-image", "a detector looks at pictures, and this item has none")
        try:
            made = _inputs(self._processor, self._size, image)
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            shape = f"{image.shape[1]}x{image.shape[0]}"
            raise ItemFailed("prepare", "too-thin", f"a picture of {shape} pixels cannot be resized: {text}") from error
        data = {name: made[name][0] for name in self._inputs}
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in data.values())
        return Prepared(tuple(data["pixel_values"].shape), data, nbytes, (image.shape[0], image.shape[1]))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The boxes of each picture, best first; ItemFailed "not-finite" for one whose numbers are NaN or infinite."""
        return self.answer(self.compute(batch), batch) if batch else []

    def compute(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        """The network's boxes and logits for a batch."""
        import torch

        if self._session is None:
            raise RuntimeError("expected an open model, but it was closed")
        with torch.inference_mode():
            return self._session(**{name: self._stacked(batch, name) for name in self._inputs})

    def answer(self, raw: dict[str, Any], batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The boxes of each picture, from what `compute` gave."""
        import torch

        with torch.inference_mode():
            # A few hundred queries a picture: one copy to the host costs less than waiting for each picture's boxes.
            logits, boxes = raw["logits"].cpu(), raw["boxes"].cpu()
            finite = logits.isfinite().flatten(1).all(1) & boxes.isfinite().flatten(1).all(1)
            found = self._processor.post_process_object_detection(
                SimpleNamespace(logits=logits, pred_boxes=boxes),
                threshold=self._params.conf,
                target_sizes=[image.meta for image in batch],
            )
        return [self._result(**one) if ok else _not_finite() for one, ok in zip(found, finite.tolist(), strict=True)]

    def close(self) -> None:
        """Let go of the network."""
        self._session = None

    def _stacked(self, batch: Sequence[Prepared], name: str) -> Any:
        """One input of all images, on the device."""
        return uploading.stacked([item.data[name].numpy() for item in batch], self._device)

    def _result(self, scores: Any, labels: Any, boxes: Any) -> Result:
        """The image processor's boxes (n, 4) xyxy in pixels of the original, not clipped to it, best first."""
        scores, ids, boxes = scores.numpy(), labels.numpy().astype(np.int32), boxes.numpy()
        order = np.argsort(-scores, kind="stable")
        if self._params.classes:
            order = order[[self._labels[i] in self._params.classes for i in ids[order].tolist()]]
        order = order[: self._params.max_det]
        return Result(
            boxes[order].astype(np.float32),
            scores[order].astype(np.float32),
            ids[order],
            tuple(self._labels[i] for i in ids[order].tolist()),
        )


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the network gave NaN or infinity; try precision fp32")
