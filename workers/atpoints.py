"""Computes the last convolutions of a network at a few points of its feature maps, and nowhere else.

A detector's head has convolutions that say where a box is, of which all but the few where something was found are
thrown away. On a CPU they take a seventh of YOLOv8 n's time. At a point, the last convolution needs the points around
it from the one before, and so on down to the feature map; points that lie together share most of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Points. With 320 channels, as YOLOv8 x has, what lies around those that lie around them takes 106 MB at most.
_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A convolution of stride 1 that keeps the size, as a product of matrices.

    Attributes:
        weight: (side * side * channels in, channels out) float32.
        bias: (channels out,) float32.
        side: of the kernel, odd.
        activation: of each number by itself.
    """

    weight: Any
    bias: Any
    side: int
    activation: Any


class Branch:
    """A stack of convolutions for each of several feature maps.

    Args:
        stacks: of each map, finest first; first layer first.
    """

    def __init__(self, stacks: Sequence[Sequence[_Layer]]) -> None:
        self._stacks = stacks

    @classmethod
    def of(cls, modules: Iterable[Any]) -> Branch | None:
        """One module for each map, batch norms fused, as ultralytics builds them; None for what is no such stack.

        The weights are copied, since a runtime may change the modules.
        """
        stacks = [[_layer(module) for module in stack] for stack in modules]
        whole = [[layer for layer in stack if layer is not None] for stack in stacks]
        return cls(whole) if [*map(len, whole)] == [*map(len, stacks)] else None

    def at(self, maps: Sequence[Any], image: Any, point: Any) -> Any:
        """The numbers at some points.

        Args:
            maps: (batch, channels, height, width) float32 each, on the CPU.
            image: (n,) which picture of the batch.
            point: (n,) which point of it, row by row, those of the first map first.

        Returns:
            (n, channels out) float32, as the stacks give them when they are computed everywhere.
        """
        found = image.new_zeros((len(image), len(self._stacks[0][-1].bias)), dtype=maps[0].dtype)
        first = 0
        for stack, features in zip(self._stacks, maps, strict=True):
            size = features.shape[2] * features.shape[3]
            (mine,) = ((point >= first) & (point < first + size)).nonzero(as_tuple=True)
            for some in mine.split(_AT_ONCE) if len(mine) else ():
                found[some] = _values(stack, features, image[some] * size + point[some] - first)
            first += size
        return found


def _layer(module: Any) -> _Layer | None:
    """A convolution with or without an activation; None for anything else."""
    import torch
    from torch import nn

    conv = getattr(module, "conv", module)
    activation = nn.Identity() if conv is module else getattr(module, "act", None)
    if not isinstance(conv, nn.Conv2d) or conv.bias is None or hasattr(module, "bn"):
        return None
    side = conv.kernel_size[0]
    kept = (conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    same = kept == ((side, side), (1, 1), (1, 1), 1, "zeros") and conv.padding == (side // 2, side // 2)
    if not (same and side % 2 and isinstance(activation, nn.SiLU | nn.ReLU | nn.Identity)):
        return None
    weight = conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 2).to(torch.float32, copy=True).contiguous()
    return _Layer(weight, conv.bias.detach().to(torch.float32, copy=True), side, activation)


def _values(stack: Sequence[_Layer], features: Any, places: Any) -> Any:
    """What a stack gives at places (n,) of a map: (picture * height + row) * width + column."""
    batch, _, height, width = features.shape
    if not stack:
        image, within = places // (height * width), places % (height * width)
        return features[image, :, within // width, within % width]
    *before, last = stack
    if last.side > 1:
        needed, taken = _around(places, last.side, batch, height, width)
        # One row more, of zeros: what a convolution is given outside of its map.
        values = _padded(_values(before, features, needed)).index_select(0, taken).reshape(len(places), -1)
    else:
        values = _values(before, features, places)
    return last.activation(values @ last.weight + last.bias)


def _around(places: Any, side: int, batch: int, height: int, width: int) -> tuple[Any, Any]:
    """Which places lie around some, each once, and for every place which of those, (n * side * side,).

    What lies outside of the map is the one after the last.
    """
    import torch

    steps = torch.arange(side) - side // 2
    row, column = places // width % height, places % width
    rows, columns = row[:, None, None] + steps[:, None], column[:, None, None] + steps
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    all_places = batch * height * width
    around = torch.where(inside, places[:, None, None] + steps[:, None] * width + steps, all_places).flatten()
    number = torch.zeros(all_places + 1, dtype=torch.int64)
    number[around] = 1
    needed = number[:-1].nonzero().flatten()
    number[needed] = torch.arange(len(needed))
    number[-1] = len(needed)
    return needed, number[around]


def _padded(values: Any) -> Any:
    """With a row of zeros after the last."""
    import torch

    return torch.nn.functional.pad(values, (0, 0, 0, 1))
