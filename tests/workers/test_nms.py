"""Which boxes stay: torchvision's answer, whether few are asked for or many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchvision import ops

from workers.nms import _FEW, nms


def same(boxes: torch.Tensor, scores: torch.Tensor, iou: float) -> bool:
    return nms(boxes, scores, iou).tolist() == ops.nms(boxes, scores, iou).tolist()


@given(
    # Few numbers: overlaps that are exactly the threshold, equal scores, boxes without an area.
    boxes=st.lists(st.tuples(*[st.integers(0, 3)] * 4, st.integers(0, 4)), max_size=12),
    iou=st.sampled_from((0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0)),
    unit=st.sampled_from((1.0, 0.1, 640 / 7)),
)
@example(boxes=[(0, 0, 1, 3, 0), (0, 0, 1, 1, 0)], iou=1 / 3, unit=1.0)  # rounded to float32, a third is more
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


def test_of_equal_scores_the_earlier_is_better() -> None:
    boxes = torch.arange(_FEW).float()[:, None] % 40 * 10 + torch.tensor([0.0, 0.0, 9.0, 9.0])  # each five times
    assert nms(boxes, torch.full((_FEW,), 0.5), 0.5).tolist() == list(range(40))


def test_few_boxes_do_not_import_torchvision() -> None:
    """It takes seconds, for which the first batch of a new worker would wait; a GPU needs it for any."""
    code = (
        "import sys, torch; from workers.nms import nms, ready; ready('cpu');"
        "print(nms(torch.eye(4), torch.ones(4), 0.5).tolist());"
        "assert 'torchvision' not in sys.modules; ready('cuda'); assert 'torchvision' in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
