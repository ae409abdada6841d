"""Non-maximum suppression: drops the boxes that a better one overlaps too much.

torchvision does it, but importing torchvision takes seconds (three on two cores), in which a new worker's device
would wait for its first boxes. A picture usually has a few dozen, which are held against each other here, as
torchvision does on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_FEW = 200  # of which holding each against each takes less than a millisecond


def ready(device: str) -> None:
    """Import now what `nms` needs on a GPU, which would else wait for it with its first boxes."""
    if device != "cpu":
        import torchvision.ops  # noqa: F401


def nms(boxes: Any, scores: Any, iou: float) -> Any:
    """Indices of the boxes that stay, best first; of equal scores the earlier box is the better one.

    Args:
        boxes: (n, 4) float32 tensor of x1, y1, x2, y2, in any unit.
        scores: (n,) float32 tensor.
        iou: of two boxes that overlap by more than this, intersection over union, the worse goes.
    """
    import torch

    if boxes.is_cuda or len(boxes) > _FEW:
        from torchvision import ops

        return ops.nms(boxes, scores, iou)
    order = scores.argsort(descending=True, stable=True)
    over = _overlapping(boxes[order].numpy(), iou)
    gone, kept = np.zeros(len(order), bool), list[int]()
    for i in range(len(order)):
        if not gone[i]:
            kept.append(i)
            gone |= over[i]
    return order[torch.tensor(kept, dtype=torch.int64)]


def _overlapping(boxes: Any, iou: float) -> Any:
    """(n, n) bool: whether two boxes overlap by more than `iou`; two without an area do not."""
    x1, y1, x2, y2 = boxes.T
    area = (x2 - x1) * (y2 - y1)
    width = np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1)
    height = np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1)
    both = np.maximum(width, 0) * np.maximum(height, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return both / (area[:, None] + area - both) > np.float64(iou)  # not rounded to float32, as in torchvision
