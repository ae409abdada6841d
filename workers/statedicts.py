"""Reads state dicts, files that name tensors and nothing else: their shapes without loading them, and their tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.errors import BadInput
from workers import checkpoints

Shapes = Mapping[str, tuple[int, ...]]

# What a state dict holds, and what the training scripts of torchvision's references save beside it.
ALLOWED = frozenset(
    {
        "argparse.Namespace",
        "collections.Counter",
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        *(f"torch.{name}Storage" for name in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool")),
    }
)

_MAX_HEADER = 50_000_000  # bytes of a safetensors file's list of tensors


def shapes(path: Path) -> Shapes:
    """The shapes of the tensors by name, {} for a checkpoint of something else. Raises BadInput for other files."""
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    top = checkpoints.peek(path)
    if isinstance(top, dict) and isinstance(top.get("model"), dict):
        top = top["model"]  # as training scripts save it
    if not isinstance(top, dict):
        return {}
    found = {name: _shape(value) for name, value in top.items() if isinstance(name, str)}
    return {name: shape for name, shape in found.items() if shape is not None}


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of what stands in for a tensor or a parameter, None for anything else."""
    if not isinstance(value, checkpoints.StandIn):
        return None
    if value.origin == "torch._utils._rebuild_parameter" and value.args:
        return _shape(value.args[0])
    if value.origin != "torch._utils._rebuild_tensor_v2" or len(value.args) < 3:
        return None
    size = value.args[2]
    return size if isinstance(size, tuple) and all(isinstance(n, int) for n in size) else None


def _of_safetensors(path: Path) -> Shapes:
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


def tensors(path: Path) -> dict[str, Any]:
    """The tensors by name, on the CPU. Raises BadInput when the file would import anything that is not allowed."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    import argparse

    import torch

    checkpoints.check(path, ALLOWED)
    with torch.serialization.safe_globals([argparse.Namespace]):
        top: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return top["model"] if isinstance(top.get("model"), dict) else top


def fill(module: Any, path: Path, what: str, *, assign: bool = False) -> dict[str, Any]:
    """Load the tensors into a module and return them. Raises BadInput, naming `what` it is, when they do not fit.

    Args:
        assign: take the tensors themselves in place of the module's, which may then be on the meta device.
    """
    found = tensors(path)
    try:
        module.load_state_dict(found, assign=assign)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise BadInput(f"{path.name} does not fit {what}: {text}") from error
    return found
