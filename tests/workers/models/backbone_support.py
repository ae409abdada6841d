"""What tests of models of whole images share: real photographs, random weights that see them, and how to compare."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as pil

from workers.models import Item


def photograph(name: str) -> np.ndarray:
    """A photograph that ultralytics ships, RGB."""
    spec = importlib.util.find_spec("ultralytics")
    assert spec is not None
    assert spec.origin is not None
    return np.array(pil.open(Path(spec.origin).parent / "assets" / name).convert("RGB"))


def photographs() -> dict[str, np.ndarray]:
    """Photographs in shapes that scale and crop differently."""
    bus, zidane = photograph("bus.jpg"), photograph("zidane.jpg")
    small = np.array(pil.fromarray(bus).resize((100, 77)))
    return {"portrait": bus, "landscape": zidane, "odd": bus[:613, 3:410], "small": small, "thin": zidane[300:342]}


def results(model: Any, images: list[np.ndarray], batch: int = 8) -> list[Any]:
    """What a model finds in pictures, in batches of a size."""
    ready = [model.prepare(image, Item(str(i))) for i, image in enumerate(images)]
    return [answer for at in range(0, len(ready), batch) for answer in model.infer(ready[at : at + batch])]


def vectors(model: Any, images: list[np.ndarray], batch: int = 8) -> np.ndarray:
    """The embeddings of pictures, (n, d)."""
    return np.stack([found.vector for found in results(model, images, batch)])


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Row by row, in float64."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def spread(model: Any, samples: torch.Tensor | None = None) -> Any:
    """Random weights so large that different pictures give different vectors.

    Args:
        samples: (n, 3, height, width) that the running statistics of batch norms are taken from.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim <= 1 and name.endswith("weight"):
                value.copy_(1 + noise * 0.1)  # of a norm
            elif value.ndim > 1 and not any(word in name for word in ("token", "pos", "bias_table")):
                value.copy_(noise * 1.5 / value[0].numel() ** 0.5)
            else:
                value.copy_(noise * 0.3)
        if samples is not None:
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 1.0
            model(samples)
    return model.eval()
