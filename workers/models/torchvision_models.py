"""Knows torchvision's networks of whole images: ResNet, ViT, Swin, ConvNeXt and EfficientNet, from their state dicts.

A state dict does not say which network it is. That is found by comparing the names and shapes of its tensors with
those of torchvision's networks, built without memory for the purpose.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import BadInput, one_line
from workers import backbones, models, statedicts
from workers.backbones import Backbone, EmbeddingParams, Input, LabelsParams
from workers.models import Card, Site
from workers.pixels import Pixels

REQUIRES = ("torch", "torchvision", "PIL")

_URL = "https://download.pytorch.org/models/"
# Name, file at _URL (its eight last letters begin the sha256 of its content), memory in GB. Where torchvision has
# several weights, its DEFAULT; those that may not be used commercially (SWAG) are left out.
_KNOWN = (
    ("resnet50", "resnet50-11ad3fa6.pth", 1.0),
    ("resnet18", "resnet18-f37072fd.pth", 1.0),
    ("resnet34", "resnet34-b627a593.pth", 1.0),
    ("resnet101", "resnet101-cd907fc2.pth", 1.0),
    ("resnet152", "resnet152-f82ba261.pth", 1.5),
    ("resnext50_32x4d", "resnext50_32x4d-1a0047aa.pth", 1.0),
    ("resnext101_32x8d", "resnext101_32x8d-110c445d.pth", 1.5),
    ("wide_resnet50_2", "wide_resnet50_2-9ba9bcbe.pth", 1.5),
    ("vit_b_16", "vit_b_16-c867db91.pth", 1.5),
    ("vit_b_32", "vit_b_32-d86f8d99.pth", 1.5),
    ("vit_l_16", "vit_l_16-852ce7e3.pth", 2.5),
    ("vit_l_32", "vit_l_32-c7638314.pth", 2.5),
    ("swin_t", "swin_t-704ceda3.pth", 1.0),
    ("swin_s", "swin_s-5e29d889.pth", 1.5),
    ("swin_b", "swin_b-68c6b09e.pth", 1.5),
    ("swin_v2_t", "swin_v2_t-b137f0e2.pth", 1.0),
    ("swin_v2_s", "swin_v2_s-637d8ceb.pth", 1.5),
    ("swin_v2_b", "swin_v2_b-781e5279.pth", 1.5),
    ("convnext_tiny", "convnext_tiny-983f1562.pth", 1.0),
    ("convnext_small", "convnext_small-0c510722.pth", 1.0),
    ("convnext_base", "convnext_base-6075fbad.pth", 1.5),
    ("convnext_large", "convnext_large-ea097f82.pth", 2.0),
    ("efficientnet_b0", "efficientnet_b0_rwightman-7f5810bc.pth", 1.0),
    ("efficientnet_b1", "efficientnet_b1-c27df63c.pth", 1.0),
    ("efficientnet_b2", "efficientnet_b2_rwightman-c35c1473.pth", 1.0),
    ("efficientnet_b3", "efficientnet_b3_rwightman-b3899882.pth", 1.0),
    ("efficientnet_b4", "efficientnet_b4_rwightman-23ab8bcd.pth", 1.5),
    ("efficientnet_v2_s", "efficientnet_v2_s-dd5fe13b.pth", 1.0),
    ("efficientnet_v2_m", "efficientnet_v2_m-dc08266a.pth", 1.5),
    ("efficientnet_v2_l", "efficientnet_v2_l-59c71312.pth", 2.0),
)
_HASH = re.compile(r"-([0-9a-f]{8})\.pth$")

CARDS: tuple[Card, ...] = tuple(
    Card(
        name=name,
        family="torchvision_models",
        kind=kind,
        params=params,
        weights=_URL + file,
        sha256=file[-len("11ad3fa6.pth") : -len(".pth")],
        memory_gb=memory_gb,
        licence="BSD-3-Clause",
    )
    for kind, params in (("embedding", EmbeddingParams), ("labels", LabelsParams))
    for name, file, memory_gb in _KNOWN
)

Series = tuple[str, ...]

# How the names of a series begin -> tensors that it has and no other; the last one is the classifier's.
_SERIES: dict[Series, tuple[str, ...]] = {
    ("resnet", "resnext", "wide_resnet"): ("conv1.weight", "bn1.weight", "layer4.0.conv1.weight", "fc.weight"),
    ("vit",): ("class_token", "conv_proj.weight", "encoder.pos_embedding", "heads.head.weight"),
    ("swin",): ("features.0.0.weight", "features.1.0.attn.qkv.weight", "head.weight"),
    ("convnext",): ("features.0.0.weight", "features.1.0.layer_scale", "classifier.2.weight"),
    ("efficientnet",): ("features.0.0.weight", "features.1.0.block.0.0.weight", "classifier.1.weight"),
}
_COUNTER = "num_batches_tracked"  # of a batch norm; used in training only, and lacking in old files

# ------------------------------------------------------------------------------------------------ what a file is


def claims(path: Path) -> bool:
    """Whether it is a state dict (.pth) with the tensors of one of the series."""
    return path.is_file() and path.suffix != ".safetensors" and _series(_shapes(path)) is not None


def describe(path: Path) -> tuple[str, ...]:
    """ImageNet's class names for a thousand classes, numbers for any other.

    A file of the format before torch 1.6, which cannot be looked into, is taken for one trained on ImageNet; `load`
    refuses it when it has another number of classes.
    """
    shapes = _shapes(path)
    series = _series(shapes)
    count = shapes[_SERIES[series][-1]][0] if series else 1000
    return _imagenet() if count == 1000 else backbones.class_names(count)


def _shapes(path: Path) -> statedicts.Shapes:
    try:
        return statedicts.shapes(path)
    except BadInput:
        return {}


def _series(shapes: statedicts.Shapes) -> Series | None:
    """How the names of the file's series begin, or None."""
    return next((names for names, tensors in _SERIES.items() if all(shapes.get(t) for t in tensors)), None)


@functools.cache
def _imagenet() -> tuple[str, ...]:
    """torchvision's names of ImageNet's classes, read from its source: importing it would import torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return backbones.class_names(1000)
    source = (Path(spec.origin).parent / "models" / "_meta.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_IMAGENET_CATEGORIES":
            return tuple(ast.literal_eval(node.value))
    return backbones.class_names(1000)


# ------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True, slots=True)
class _Found:
    """Which network a state dict is.

    Attributes:
        name: torchvision's.
        classes: of its classifier.
        size: side in pixels of the only input it takes, for a ViT; 0 for any size.
        patch: side in pixels of a ViT's patch; 1 for other networks.
    """

    name: str
    classes: int
    size: int = 0
    patch: int = 1

    def build(self, size: int = 0) -> Any:
        """torchvision's network, without memory for its weights yet."""
        import torch
        from torchvision.models import get_model

        options = {"image_size": size or self.size} if self.size else {}
        with torch.device("meta"):
            return get_model(self.name, weights=None, num_classes=self.classes, **options).eval()


def load(card: Card, params: EmbeddingParams | LabelsParams, weights: Path, site: Site) -> Backbone:
    """Open the network of a state dict (.pth) on the device.

    Raises:
        BadInput: a state dict of no network of torchvision, or a size or pool that the network has not.
    """
    found = _recognised(_state(weights), card.name, weights.name)
    given = _input(found, params.imgsz, site.weights_sha256 or card.sha256)
    names = describe(weights)
    if isinstance(params, LabelsParams):
        backbones.check_names(weights.name, names, found.classes)
        models.check_labels({"classes": params.classes}, names)
    elif params.pool == "cls" and not found.size:
        raise BadInput(f"{found.name} has no class token; leave the parameter pool at default, or set it to mean")

    def build() -> Any:
        return _module(_filled(found, _state(weights), given.size[0]), params)

    session = site.open_network(backbones.network(found.name, build, given))
    if isinstance(params, LabelsParams):
        return Backbone(given, session, site.device, backbones.softmax_labels(params, names))
    return Backbone(given, session, site.device, backbones.vectors(params))


def _state(weights: Path) -> dict[str, Any]:
    """The tensors of a state dict, in float32."""
    with weights.open("rb") as file:
        before_1_6 = file.read(1) == b"\x80"
    found = _plain(weights) if before_1_6 else statedicts.tensors(weights)
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def _plain(weights: Path) -> dict[str, Any]:
    """A state dict of the format before torch 1.6, by torch's own reader, which lets nothing but tensors in."""
    import torch

    try:
        found = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise BadInput(f"{weights.name} is no state dict: {one_line(str(error), 200)}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise BadInput(
            f"{weights.name} is no state dict: expected a model's tensors by name, as torchvision saves them"
        )
    return found


def _recognised(state: dict[str, Any], hint: str, file: str) -> _Found:
    """The network that has just these tensors; the one that the hint begins with is looked at first."""
    import torchvision

    shapes = _without_counters(state)
    series = _series(shapes)
    if series:
        known = torchvision.models.list_models(module=torchvision.models)
        for name in sorted(known, key=lambda name: not hint.startswith(name)):
            found = _candidate(name, shapes, series) if name.startswith(series) else None
            if found and _without_counters(found.build().state_dict()) == shapes:
                return found
    raise BadInput(f"the tensors of {file} are those of none of torchvision's networks; a changed one cannot be run")


def _candidate(name: str, shapes: statedicts.Shapes, series: Series) -> _Found | None:
    classes = shapes[_SERIES[series][-1]][0]
    if series != ("vit",):
        return _Found(name, classes)
    patch, places = shapes["conv_proj.weight"][-1], shapes["encoder.pos_embedding"][1] - 1
    return _Found(name, classes, math.isqrt(places) * patch, patch) if name.endswith(f"_{patch}") else None


def _without_counters(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith(_COUNTER)}


def _input(found: _Found, imgsz: int, sha256: str) -> Input:
    """The transform of the published weights that these are, by their sha256; of the network's DEFAULT for others."""
    from torchvision.models import get_model_weights
    from torchvision.transforms import functional

    published = get_model_weights(found.name)
    own = [each for each in published if (hash8 := _HASH.search(each.url)) and sha256.startswith(hash8[1])]
    data = (own[0] if sha256 and own else published.DEFAULT).transforms()
    size = imgsz or found.size or data.crop_size[0]
    if size % found.patch:
        fit = max(found.patch, round(size / found.patch) * found.patch)
        raise BadInput(f"imgsz must be a multiple of the patch of {found.patch} pixels, but got {size}; try {fit}")
    edge = round(size * data.resize_size[0] / data.crop_size[0])

    def transform(image: Any) -> Any:
        scaled = functional.resize(image, [edge], interpolation=data.interpolation, antialias=data.antialias)
        return functional.pil_to_tensor(functional.center_crop(scaled, [size, size]))

    crop = backbones.pil_crop(transform)
    return Input(lambda image: crop(backbones.middle(image)), (size, size), Pixels(tuple(data.mean), tuple(data.std)))


def _filled(found: _Found, state: dict[str, Any], size: int) -> Any:
    """The network with its weights, for inputs of a size."""
    import torch
    from torchvision.models.vision_transformer import interpolate_embeddings

    if found.size and size != found.size:
        state = interpolate_embeddings(size, found.patch, state)
    model = found.build(size)
    counters = {name: torch.zeros((), dtype=torch.long) for name in model.state_dict() if name.endswith(_COUNTER)}
    model.load_state_dict({**counters, **state}, assign=True)
    return model


def _module(model: Any, params: Any) -> Any:
    """A module from images to (batch, d) vectors or (batch, classes) logits."""
    import torch

    if isinstance(params, LabelsParams):
        return model
    for name in ("fc", "heads", "head"):
        if hasattr(model, name):
            setattr(model, name, torch.nn.Identity())
    if hasattr(model, "classifier"):
        model.classifier[-1] = torch.nn.Identity()  # ConvNeXt normalises before it
    return _patch_mean(model) if params.pool == "mean" and hasattr(model, "encoder") else model


def _patch_mean(model: Any) -> Any:
    """A ViT that gives the mean of its patch tokens; the other networks take the mean anyway."""
    import torch

    class PatchMean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Any) -> Any:
            patches = self.model._process_input(images)
            tokens = torch.cat([self.model.class_token.expand(len(patches), -1, -1), patches], 1)
            return self.model.encoder(tokens)[:, 1:].mean(1)

    return PatchMean()
