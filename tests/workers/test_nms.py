"""Which boxes stay: torchvision's answer, whether few are asked for or many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import ops

from workers.nms import _FEW, nms


def same(boxes: torch.Tensor, scores: torch.Tensor, iou: float) -> bool:
    return nms(boxes, scores, iou).tolist() == ops.nms(boxes, scores, iou).tolist()


@given(
    # Whole numbers and quarters: overlaps that are exactly the threshold, equal scores, boxes without an area.
    boxes=st.lists(st.tuples(*[st.integers(0, 8)] * 4, st.integers(0, 4)), max_size=12),
    iou=st.sampled_from((0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0)),
    unit=st.sampled_from((1.0, 0.1, 640 / 7)),
)
def test_same_as_torchvision(boxes: list[tuple[int, ...]], iou: float, unit: float) -> None:
    numbers = torch.tensor([[x, y, x + w, y + h, s] for x, y, w, h, s in boxes], dtype=torch.float32).reshape(-1, 5)
    assert same(numbers[:, :4] * unit, numbers[:, 4] / 4, iou)


@pytest.mark.parametrize("count", [1, 30, _FEW, _FEW + 1, 1000])
@pytest.mark.parametrize("iou", [0.05, 0.45, 0.7, 0.95])
def test_boxes_of_classes_moved_apart(count: int, iou: float) -> None:
    draw = np.random.default_rng(count)
    corner, side = draw.uniform(0, 600, (count, 2)), draw.uniform(1, 200, (count, 2))
    apart = 7680 * draw.integers(0, 3, (count, 1))
    boxes = torch.tensor(np.concatenate([corner, corner + side], 1) + apart, dtype=torch.float32)
    assert same(boxes, torch.tensor(draw.uniform(0, 1, count), dtype=torch.float32), iou)
