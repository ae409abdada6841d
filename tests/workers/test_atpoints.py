"""Convolutions at a few points of a map give what they give there when they are computed everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workers import atpoints
from workers.atpoints import Branch


class Fused(nn.Module):
    """A convolution as ultralytics leaves it when its norm is fused."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = conv, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x))


def stack(sides: list[int], channels: int) -> nn.Sequential:
    """Convolutions of these kernels, the last one bare."""
    layers: list[nn.Module] = []
    for i, side in enumerate(sides):
        conv = nn.Conv2d(channels + i, channels + i + 1, side, padding=side // 2)
        layers.append(conv if i == len(sides) - 1 else Fused(conv, nn.SiLU(inplace=True)))
    return nn.Sequential(*layers)


@given(
    sides=st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=3),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    count=st.integers(0, 40),
    at_once=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_points_are_those_of_the_whole_map(
    sides: list[int], sizes: list[tuple[int, int]], batch: int, count: int, at_once: int, seed: int
) -> None:
    """At borders and corners too, one point twice, however many are computed at once, on maps of one point."""
    torch.manual_seed(seed)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(atpoints, "_AT_ONCE", at_once)
        stacks = [stack(sides, channels) for channels in ([2] * len(sizes))]
        maps = [torch.randn(batch, 2, *size) for size in sizes]
        everywhere = torch.cat([one(of).flatten(2) for one, of in zip(stacks, maps, strict=True)], 2)
        image, point = torch.randint(batch, (count,)), torch.randint(everywhere.shape[2], (count,))
        branch = Branch.of(stacks)
        assert branch is not None
        found = branch.at(maps, image, point)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, everywhere[image, :, point], atol=1e-5, rtol=1e-4)


def test_weights_are_those_it_was_made_of() -> None:
    """A runtime may change the module afterwards."""
    module = stack([3, 1], 2)
    maps, none = [torch.ones(1, 2, 4, 4)], torch.zeros(1, dtype=torch.int64)
    branch = Branch.of([module])
    assert branch is not None
    before = branch.at(maps, none, none)
    for parameter in module.parameters():
        parameter.data.zero_()
    assert torch.equal(branch.at(maps, none, none), before)
    assert before.abs().max() > 0


def _conv(*args: Any, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, *args, **options)


class WithNorm(Fused):
    """Not fused yet."""

    def __init__(self) -> None:
        super().__init__(_conv(3, padding=1), nn.SiLU())
        self.bn = nn.BatchNorm2d(4)


@pytest.mark.parametrize(
    "layer",
    [
        _conv(3, padding=1, stride=2),
        _conv(3, padding=2, dilation=2),
        _conv(3, padding=1, groups=4),
        _conv(3),
        _conv((1, 3), padding=(0, 1)),
        _conv(3, padding=1, padding_mode="reflect"),
        _conv(3, padding=1, bias=False),
        Fused(_conv(3, padding=1), nn.Softmax(1)),
        WithNorm(),
        nn.Upsample(scale_factor=1),
    ],
    ids=lambda layer: str(layer).replace("\n", " ")[:60],
)
def test_what_it_cannot_do_it_does_not_take(layer: nn.Module) -> None:
    assert Branch.of([nn.Sequential(layer, _conv(1))]) is None
    assert Branch.of([nn.Sequential(_conv(1)), nn.Sequential(layer)]) is None
    assert Branch.of([nn.Sequential(_conv(1))]) is not None
