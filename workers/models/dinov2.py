"""Knows DINOv2, with and without registers: folders of transformers, and the checkpoints of the original repository.

Both run as the transformers network. An original checkpoint (facebookresearch/dinov2) is renamed to what transformers
saves, and keeps its own way of fitting position embeddings to the input's size, which transformers does differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput
from workers import backbones, checkpoints, models
from workers.backbones import Backbone, EmbeddingParams, Input, LabelsParams
from workers.models import Card, Image, Site
from workers.pixels import Pixels

REQUIRES = ("torch", "torchvision", "transformers", "safetensors", "PIL")
EXTRA = "models"

_TYPES = ("dinov2", "dinov2_with_registers")  # model_type in config.json
_SIZES = {"s": ("small", 1.0), "b": ("base", 1.5), "l": ("large", 2.5), "g": ("giant", 6.0)}  # name, memory in GB


def _cards(kind: str, params: type) -> list[Card]:
    return [
        Card(
            name=f"dinov2_vit{letter}14{suffix}",
            family="dinov2",
            kind=kind,
            params=params,
            weights=f"hf:facebook/dinov2-{registers}{size}{head}",
            memory_gb=memory_gb,
            licence="Apache-2.0",
        )
        for suffix, registers in (("", ""), ("_reg", "with-registers-"))
        for letter, (size, memory_gb) in _SIZES.items()
        for head in ["-imagenet1k-1-layer" if kind == "labels" else ""]
    ]


CARDS: tuple[Card, ...] = (*_cards("embedding", EmbeddingParams), *_cards("labels", LabelsParams))

# The evaluation transform of the original (dinov2/data/transforms.py), for checkpoints that come without one.
_RESIZE, _CROP = 256, 224  # pixels
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, which a processor keeps -> torchvision's names

# What tells an original checkpoint from other vision transformers: LayerScale, and a mask token.
_ORIGINAL = {"cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "blocks.0.ls1.gamma", "norm.weight"}
_HEAD_DIM = 64  # of all four sizes (dinov2/models/vision_transformer.py)
_OFFSET = 0.1  # patches added to the size that position embeddings are scaled to, without registers (the same file)


def claims(path: Path) -> bool:
    """Whether it is a transformers folder of DINOv2, or a state dict of the original."""
    if path.is_dir():
        return backbones.read_json(path / "config.json").get("model_type") in _TYPES
    return bool(_state_keys(path) >= _ORIGINAL)


def _state_keys(path: Path) -> set[str]:
    """The names in a state dict; none for any other file."""
    try:
        found = checkpoints.peek(path)
    except BadInput:
        return set()
    return {str(key) for key in found} if isinstance(found, dict) else set()


def describe(path: Path) -> tuple[str, ...]:
    """The class names of a folder with a linear head; none without one."""
    if not path.is_dir() or not _has_head(path):
        return ()
    names = backbones.read_json(path / "config.json").get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _has_head(folder: Path) -> bool:
    classes = backbones.read_json(folder / "config.json").get("architectures") or []
    return any(str(name).endswith("ForImageClassification") for name in classes)


def check(card: Card, params: EmbeddingParams | LabelsParams, weights: Path | None) -> None:
    """Raises BadInput for a size that is no multiple of the patch, and for labels without a linear head."""
    if weights is None:
        return
    if card.kind == "labels" and not describe(weights):
        raise BadInput(
            f"{weights.name} has no linear head, so it yields embeddings only; use: imagemill embed, or give a folder "
            "of Dinov2ForImageClassification"
        )
    patch = (
        backbones.read_json(weights / "config.json").get("patch_size", 14) if weights.is_dir() else 14
    )  # of the original
    if isinstance(patch, int) and params.imgsz % patch:
        raise _no_multiple(params.imgsz, patch)


def _no_multiple(size: int, patch: int) -> BadInput:
    fit = max(patch, round(size / patch) * patch)
    return BadInput(f"imgsz must be a multiple of the patch of {patch} pixels, but got {size}; try {fit}")


def load(card: Card, params: EmbeddingParams | LabelsParams, weights: Path, site: Site) -> Backbone:
    """Open the network of a transformers folder or of an original checkpoint (.pth) on the device.

    Raises:
        BadInput: weights of another form, a size that is no multiple of the patch, or labels without a linear head.
    """
    check(card, params, weights)
    names = describe(weights)
    given = _input_of_folder(weights, params.imgsz) if weights.is_dir() else _input_of_original(params.imgsz)

    def build() -> Any:
        model = _from_folder(weights, card.kind) if weights.is_dir() else _from_original(weights)
        return _network(model, card.kind, given.size, params, original=not weights.is_dir())

    session = site.open_network(backbones.network("dinov2", build, given))
    if isinstance(params, LabelsParams):
        models.check_labels({"classes": params.classes}, names)
        return Backbone(given, session, site.device, backbones.softmax_labels(params, names))
    return Backbone(given, session, site.device, backbones.vectors(params))


# ------------------------------------------------------------------------------------------------ pictures


def _input_of_folder(folder: Path, imgsz: int) -> Input:
    """The folder's own image processor up to the bytes, at its own size or another one of the same proportions."""
    from transformers import AutoImageProcessor

    if not (folder / "preprocessor_config.json").is_file():
        return _input_of_original(imgsz)
    processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    crop = processor.crop_size if processor.do_center_crop else processor.size
    side, edge = crop.height, processor.size.shortest_edge
    if not side or side != crop.width or not (processor.do_resize and processor.do_normalize):
        raise BadInput(f"{folder.name}/preprocessor_config.json does not make a square, normalised input; correct it")
    size = imgsz or side
    scale = processor.rescale_factor * 255 if processor.do_rescale else 255.0
    mean, std = (tuple(float(v) / scale for v in values) for values in (processor.image_mean, processor.image_std))
    if edge and processor.do_center_crop and edge >= side and int(processor.resample) in _INTERPOLATIONS:
        cropped = _shorter_side(round(size * edge / side), size, _INTERPOLATIONS[int(processor.resample)])
    else:
        cropped = _through(processor, {"shortest_edge": imgsz} if edge else {"height": imgsz, "width": imgsz}, imgsz)
    return Input(cropped, (size, size), Pixels(mean, std))  # type: ignore[arg-type]


def _shorter_side(edge: int, size: int, interpolation: str) -> Callable[[Image], Image]:
    """What the processor of the published folders does, without its detours, which take four times as long.

    Scales the shorter side to `edge` pixels and cuts size x size out of the middle (transformers BitImageProcessor).
    """
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    def cropped(image: Image) -> Image:
        image = backbones.middle(image)
        height, width = image.shape[:2]
        scaled = [int(edge * side / min(height, width)) for side in (height, width)]
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        done = resize(pixels, scaled, InterpolationMode(interpolation), antialias=True)
        top, left = ((side - size) // 2 for side in scaled)
        cut: Image = done[:, top : top + size, left : left + size].permute(1, 2, 0).contiguous().numpy()
        return cut

    return cropped


def _through(processor: Any, size: dict[str, int], imgsz: int) -> Callable[[Image], Image]:
    """A crop by the folder's own image processor, whatever it does."""
    options: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    if imgsz:
        options |= {"size": size, "crop_size": {"height": imgsz, "width": imgsz}}

    def cropped(image: Image) -> Image:
        image = backbones.middle(image) if "shortest_edge" in size else image
        pixels = processor(images=image, input_data_format="channels_last", **options)["pixel_values"][0]
        done: Image = pixels.permute(1, 2, 0).contiguous().numpy()
        return done

    return cropped


def _input_of_original(imgsz: int) -> Input:
    from torchvision import transforms

    size = imgsz or _CROP
    steps = [
        transforms.Resize(round(size * _RESIZE / _CROP), transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.PILToTensor(),
    ]
    crop = backbones.pil_crop(transforms.Compose(steps))
    return Input(lambda image: crop(backbones.middle(image)), (size, size), Pixels(_MEAN, _STD))


# ------------------------------------------------------------------------------------------------ the network


def _network(model: Any, kind: str, size: tuple[int, int], params: Any, *, original: bool) -> Any:
    """A module from images to (batch, d) vectors or (batch, classes) logits."""
    import torch

    trunk = model if kind == "embedding" else model.base_model
    _fix_positions(trunk, size, original=original)
    first = 1 + (getattr(trunk.config, "num_register_tokens", 0) or 0)

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Any) -> Any:
            if kind == "labels":
                return self.model(images).logits
            tokens = self.model(images).last_hidden_state
            return tokens[:, first:].mean(1) if params.pool == "mean" else tokens[:, 0]

    return Module()


def _fix_positions(trunk: Any, size: tuple[int, int], *, original: bool) -> None:
    """Fit the position embeddings to the input once, instead of in every forward."""
    import torch

    embeddings, patch = trunk.embeddings, _patch_size(trunk.config)
    if any(side % patch for side in size):
        raise _no_multiple(size[0], patch)
    rows, columns = (side // patch for side in size)
    with torch.no_grad():
        if original:
            fitted = _fitted(embeddings.position_embeddings, rows, columns, hasattr(embeddings, "register_tokens"))
        else:
            tokens = torch.zeros(1, 1 + rows * columns, trunk.config.hidden_size)
            fitted = embeddings.interpolate_pos_encoding(tokens, *size).clone()
    embeddings.position_embeddings = torch.nn.Parameter(fitted)
    embeddings.interpolate_pos_encoding = lambda tokens, height, width: embeddings.position_embeddings


def _patch_size(config: Any) -> int:
    patch = config.patch_size
    return int(patch if isinstance(patch, int) else patch[0])


def _fitted(positions: Any, rows: int, columns: int, registers: bool) -> Any:
    """(1, 1 + n, d) position embeddings for rows x columns patches, as the original's interpolate_pos_encoding.

    The models with registers scale with antialiasing to the exact size (dinov2/hub/backbones.py).
    """
    import torch

    side = round((positions.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return positions
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resize: Callable[..., Any] = torch.nn.functional.interpolate
    if registers:
        grid = resize(grid, size=(rows, columns), mode="bicubic", antialias=True)
    else:
        scale = ((rows + _OFFSET) / side, (columns + _OFFSET) / side)
        grid = resize(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _from_folder(folder: Path, kind: str) -> Any:
    """The transformers model of a folder, with or without its head; its weights from safetensors only."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    wanted = transformers.AutoModelForImageClassification if kind == "labels" else transformers.AutoModel
    if not any(folder.glob("*.safetensors")):
        raise BadInput(f"the folder {folder.name} holds no *.safetensors; save the model again with save_pretrained")
    options = {"dtype": "float32", "use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    with _quiet():
        model, info = wanted.from_pretrained(str(folder), config=config, output_loading_info=True, **options)
    _check_loaded(folder, info)
    return model


def _from_original(path: Path) -> Any:
    """The transformers model with an original checkpoint's weights."""
    import torch
    import transformers

    state = renamed(torch.load(path, map_location="cpu", weights_only=True))
    registers = "embeddings.register_tokens" in state
    settings = _config_of(state)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(
            **settings, num_register_tokens=state["embeddings.register_tokens"].shape[1]
        )
    else:
        config = transformers.Dinov2Config(**settings)
    wanted = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    with _quiet():
        model, info = wanted.from_pretrained(
            None, config=config, state_dict=state, dtype="float32", output_loading_info=True
        )
    _check_loaded(path, info)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress bars nor a report of the head that is not used: what is missing is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_loaded(path: Path, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys") or ())
    if missing:
        raise BadInput(f"{path.name} lacks weights of DINOv2: {', '.join(missing)[:200]}; fetch it again")


def _config_of(state: dict[str, Any]) -> dict[str, Any]:
    """The settings of a network, read off the shapes of its weights (in transformers' names)."""
    width, _, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
    side = round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    layers = {int(found[1]) for key in state if (found := re.match(r"encoder\.layer\.(\d+)\.", key))}
    hidden = state.get("encoder.layer.0.mlp.fc1.weight")
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": side * patch,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // _HEAD_DIM),
        "mlp_ratio": 4 if hidden is None else hidden.shape[0] // width,
        "use_swiglu_ffn": hidden is None,
    }


_NAMES = (  # the original's -> those that transformers saves
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
    (r"^norm\.", "layernorm."),
)


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    """An original state dict under the names that transformers saves; queries, keys and values come apart."""
    answer: dict[str, Any] = {}
    for key, value in state.items():
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        if ".attn.qkv." in key:
            for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                answer[key.replace(".attn.qkv.", f".attention.attention.{part}.")] = tensor.contiguous()
        else:
            answer[key] = value
    return answer
