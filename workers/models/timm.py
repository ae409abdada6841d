"""Knows the models of timm: folders as timm saves and publishes them, and single safetensors files.

timm itself builds the network and the picture's transform, so any of its architectures runs. Weights are read from
safetensors only.
"""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import BadInput
from workers import backbones, models, statedicts
from workers.backbones import Backbone, Input
from workers.models import Card, Site
from workers.pixels import Pixels

REQUIRES = ("torch", "torchvision", "timm", "safetensors", "PIL")
EXTRA = "models"


@dataclass(frozen=True, slots=True)
class EmbeddingParams(backbones.EmbeddingParams):
    """As for every backbone, and

    Attributes:
        architecture: timm's name of the network, with or without a tag, for a single file; a folder names its own.
    """

    architecture: str = ""

    def __post_init__(self) -> None:
        backbones.EmbeddingParams.__post_init__(self)
        _check_name(self.architecture)


@dataclass(frozen=True, slots=True)
class LabelsParams(backbones.LabelsParams):
    """As for every backbone, and

    Attributes:
        architecture: timm's name of the network, with or without a tag, for a single file; a folder names its own.
    """

    architecture: str = ""

    def __post_init__(self) -> None:
        backbones.LabelsParams.__post_init__(self)
        _check_name(self.architecture)


def _check_name(architecture: object) -> None:
    if not isinstance(architecture, str):
        raise TypeError(f"architecture must be a name of timm, such as resnet50, but got {architecture!r}")


_APACHE, _MIT = "Apache-2.0", "MIT"
_KNOWN = (  # name on the hub under timm/, licence as it says there, memory in GB
    ("resnet50.a1_in1k", _APACHE, 1.0),
    ("resnet18.a1_in1k", _APACHE, 1.0),
    ("resnet101.a1_in1k", _APACHE, 1.0),
    ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", _APACHE, 1.0),
    ("vit_small_patch16_224.augreg_in21k_ft_in1k", _APACHE, 1.0),
    ("vit_base_patch16_224.augreg2_in21k_ft_in1k", _APACHE, 1.5),
    ("vit_large_patch16_224.augreg_in21k_ft_in1k", _APACHE, 2.5),
    ("swin_tiny_patch4_window7_224.ms_in1k", _MIT, 1.0),
    ("swin_small_patch4_window7_224.ms_in1k", _MIT, 1.0),
    ("swin_base_patch4_window7_224.ms_in22k_ft_in1k", _MIT, 1.5),
    ("convnext_tiny.fb_in22k_ft_in1k", _APACHE, 1.0),
    ("convnext_small.fb_in22k_ft_in1k", _APACHE, 1.0),
    ("convnext_base.fb_in22k_ft_in1k", _APACHE, 1.5),
    ("efficientnet_b0.ra_in1k", _APACHE, 1.0),
    ("tf_efficientnet_lite0.in1k", _APACHE, 1.0),
    ("tf_efficientnetv2_s.in21k_ft_in1k", _APACHE, 1.0),
    ("mobilenetv3_large_100.ra_in1k", _APACHE, 1.0),
)
_HEADLESS = (  # trained without labels: embeddings only
    ("vit_small_patch14_dinov2.lvd142m", _APACHE, 1.5),
    ("vit_base_patch14_dinov2.lvd142m", _APACHE, 2.0),
    ("vit_large_patch14_dinov2.lvd142m", _APACHE, 3.0),
    ("vit_small_patch14_reg4_dinov2.lvd142m", _APACHE, 1.5),
    ("vit_base_patch14_reg4_dinov2.lvd142m", _APACHE, 2.0),
    ("vit_large_patch14_reg4_dinov2.lvd142m", _APACHE, 3.0),
)


def _cards(kind: str, params: type, known: tuple[tuple[str, str, float], ...]) -> Iterator[Card]:
    for name, licence, memory_gb in known:
        yield Card(name, "timm", kind, params, weights=f"hf:timm/{name}", memory_gb=memory_gb, licence=licence)


CARDS: tuple[Card, ...] = (
    *_cards("embedding", EmbeddingParams, _KNOWN + _HEADLESS),
    *_cards("labels", LabelsParams, _KNOWN),
)

# Names of first layers and of classifiers: ResNet, ViT and Swin, ConvNeXt, EfficientNet and MobileNet.
_FIRST = ("conv1.weight", "patch_embed.proj.weight", "stem.0.weight", "conv_stem.weight")
_CLASSIFIERS = ("fc.weight", "head.weight", "head.fc.weight", "classifier.weight")
# Which list of ImageNet's classes so many classes are, as timm.data.infer_imagenet_subset; files of timm/data/_info.
_SUBSETS = {
    1000: "imagenet_synsets.txt",
    11221: "imagenet21k_miil_synsets.txt",
    11821: "imagenet12k_synsets.txt",
    21841: "imagenet22k_synsets.txt",
    21842: "imagenet22k_ms_synsets.txt",
    21843: "imagenet21k_goog_synsets.txt",
}


# ------------------------------------------------------------------------------------------------ what a file is


def claims(path: Path) -> bool:
    """Whether it is a folder as timm saves it, or a safetensors file whose first layer has one of timm's names."""
    if path.is_dir():
        return isinstance(backbones.read_json(path / "config.json").get("architecture"), str)
    return path.suffix == ".safetensors" and not set(_FIRST).isdisjoint(_shapes(path))


def _shapes(path: Path) -> statedicts.Shapes:
    try:
        return statedicts.shapes(path)
    except BadInput:
        return {}


def _classes(shapes: statedicts.Shapes) -> int:
    """How many classes a single file's classifier has, 0 without one."""
    return next((shapes[key][0] for key in _CLASSIFIERS if shapes.get(key)), 0)


def describe(path: Path) -> tuple[str, ...]:
    """The class names that the folder gives, else ImageNet's where the number of classes is one of its lists."""
    if not path.is_dir():
        return _default_names(_classes(_shapes(path)))
    config = backbones.read_json(path / "config.json")
    given = {**(config.get("pretrained_cfg") or {}), **config}
    count = given.get("num_classes")
    names, texts = given.get("label_names") or given.get("labels"), given.get("label_descriptions") or {}
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    if isinstance(names, list) and names and count != 0:
        return tuple(str(texts.get(name, name) if isinstance(texts, dict) else name) for name in names)
    return _default_names(count if isinstance(count, int) else 1000)


def _default_names(count: int) -> tuple[str, ...]:
    spec = importlib.util.find_spec("timm") if count in _SUBSETS else None
    if spec is None or spec.origin is None:
        return backbones.class_names(count)
    folder = Path(spec.origin).parent / "data" / "_info"
    synsets = (folder / _SUBSETS[count]).read_text(encoding="utf-8").split()
    with (folder / "imagenet_synset_to_lemma.txt").open(encoding="utf-8", newline="") as file:
        lemmas = {row[0]: row[1] for row in csv.reader(file, delimiter="\t")}
    return _short_names([(synset, lemmas.get(synset, synset)) for synset in synsets])


def _short_names(classes: list[tuple[str, str]]) -> tuple[str, ...]:
    """The first of each class's synonyms; all of them, or the synset too, where two classes share the first."""
    first = [lemmas.split(",")[0] for _, lemmas in classes]
    shared, whole = Counter(first), Counter(lemmas for _, lemmas in classes)
    return tuple(
        name if shared[name] == 1 else lemmas if whole[lemmas] == 1 else f"{lemmas} ({synset})"
        for name, (synset, lemmas) in zip(first, classes, strict=True)
    )


# ------------------------------------------------------------------------------------------------ the model


def load(card: Card, params: EmbeddingParams | LabelsParams, weights: Path, site: Site) -> Backbone:
    """Open the network of a folder or of a single file on the device.

    Raises:
        BadInput: an unknown or missing architecture, weights that do not fit it, no classifier for labels, or a pool
            that the network has not.
    """
    first: list[Any] = [_model(weights, params)]
    given = _input(first[0], params.imgsz)
    names = describe(weights)
    _check(card, params, weights, first[0], names)

    # The model just loaded serves the first runtime; one that runs next gets its own, as runtimes change theirs.
    def build() -> Any:
        return _module(first.pop() if first else _model(weights, params), params)

    session = site.open_network(backbones.network("timm", build, given))
    if isinstance(params, LabelsParams):
        return Backbone(given, session, site.device, backbones.softmax_labels(params, names))
    return Backbone(given, session, site.device, backbones.vectors(params))


def _check(card: Card, params: Any, weights: Path, model: Any, names: tuple[str, ...]) -> None:
    if isinstance(params, LabelsParams):
        if not model.num_classes:
            raise BadInput(f"{weights.name} has no classifier, so it yields embeddings only; use: imagemill embed")
        backbones.check_names(weights.name, names, model.num_classes)
        models.check_labels({"classes": params.classes}, names)
    elif params.pool == "cls" and getattr(model, "cls_token", None) is None:
        raise BadInput(f"{card.name} has no class token; leave the parameter pool at default, or set it to mean")


def _model(weights: Path, params: Any) -> Any:
    """timm's model with its weights, as timm.create_model makes it."""
    import timm

    architecture = _architecture(weights, params)
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise BadInput(f"timm has no architecture {architecture!r}{models.nearest(architecture.split('.')[0], known)}")
    name, options = architecture, {}
    if weights.is_dir():
        name = f"local-dir:{weights}"
    else:
        classes = _classes(_shapes(weights))
        options = {"num_classes": classes, "pretrained_cfg_overlay": {"file": str(weights), "num_classes": classes}}
    if params.imgsz and _one_size_only(weights, architecture):
        options["img_size"] = params.imgsz
    try:
        return timm.create_model(name, pretrained=True, **options).eval()
    except (RuntimeError, AssertionError, TypeError, KeyError) as error:
        raise BadInput(
            f"{weights.name} does not hold timm's {architecture}: {' '.join(str(error).split())[:300]}"
        ) from error


def _architecture(weights: Path, params: Any) -> str:
    if not weights.is_dir():
        if not params.architecture:
            raise BadInput(
                f"{weights.name} does not say which network it is; add --param architecture=NAME, timm's name of it, "
                "or give the whole folder as timm saves it"
            )
        return str(params.architecture)
    if params.architecture:
        raise BadInput(f"the folder {weights.name} names its own architecture; leave the parameter architecture out")
    if not (weights / "model.safetensors").is_file():
        raise BadInput(f"the folder {weights.name} holds no model.safetensors, beside which timm's config.json belongs")
    return str(backbones.read_json(weights / "config.json")["architecture"])


def _one_size_only(weights: Path, architecture: str) -> bool:
    """Whether the network is built for one size of input, and must be told another one."""
    import timm

    own = timm.get_pretrained_cfg(architecture)
    config = backbones.read_json(weights / "config.json") if weights.is_dir() else {}
    default = bool(own and own.fixed_input_size)
    return bool((config.get("pretrained_cfg") or config).get("fixed_input_size", default))


def _input(model: Any, imgsz: int) -> Input:
    """timm's own transform for evaluation, up to the bytes."""
    from timm.data import create_transform, resolve_data_config

    asked = {"input_size": (3, imgsz, imgsz)} if imgsz else {}
    data = resolve_data_config(asked, pretrained_cfg=model.pretrained_cfg)
    channels, height, width = data["input_size"]
    if channels != 3:
        raise BadInput(f"the network takes pictures of {channels} channels; expected 3, for RGB")
    crop = backbones.pil_crop(create_transform(**data, is_training=False, normalize=False))
    whole = data["crop_mode"] != "center"  # squashed or padded: every pixel counts, and none is scaled up much
    pixels = Pixels(tuple(data["mean"]), tuple(data["std"]))
    return Input(crop if whole else lambda image: crop(backbones.middle(image)), (height, width), pixels)


def _module(model: Any, params: Any) -> Any:
    """A module from images to (batch, d) vectors or (batch, classes) logits."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Any) -> Any:
            if isinstance(params, LabelsParams):
                return self.model(images)
            features = self.model.forward_features(images)
            if params.pool == "default":
                return self.model.forward_head(features, pre_logits=True)
            return features[:, 0] if params.pool == "cls" else _mean(self.model, features)

    return Module()


def _mean(model: Any, features: Any) -> Any:
    """The mean over all places: of a map (batch, d, h, w) or (batch, h, w, d), or of tokens (batch, n, d)."""
    if features.ndim == 3:
        return features[:, getattr(model, "num_prefix_tokens", 0) :].mean(1)
    return features.mean((1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3))
