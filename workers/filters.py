"""Knows the filters that run on the device, Gaussian, average, Sobel and Laplacian, in the terms of OpenCV.

Each is one or two pairs of a row (along x) and a column (along y), whose outer products are its two-dimensional
kernels: so a picture is filtered in two passes with few numbers each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
Pairs = Sequence[tuple[Floats, Floats]]

_LUMA = (9798, 19235, 3735)  # of R, G, B, in 1/32768: ITU-R BT.601 as cv2.COLOR_RGB2GRAY rounds it


def gaussian(sigma: float, ksize: int) -> Pairs:
    """A blur; of sigma and ksize one may be 0 and follows from the other, as in cv2.GaussianBlur for 8 bits.

    OpenCV blurs 8-bit pictures in fixed point, which is up to two grey levels away from this.
    """
    import cv2

    kernel = cv2.getGaussianKernel(ksize or round(sigma * 6 + 1) | 1, sigma or -1, cv2.CV_64F).ravel()
    return [(kernel, kernel)]


def average(ksize: int) -> Pairs:
    """The mean of a square of ksize pixels, as cv2.blur."""
    kernel = np.full(ksize, 1 / ksize)
    return [(kernel, kernel)]


def sobel(ksize: int, direction: str) -> Pairs:
    """The derivative along "x" or "y", or "both" of them, as cv2.Sobel."""
    pairs = {"x": _derivative(1, 0, ksize), "y": _derivative(0, 1, ksize)}
    return list(pairs.values()) if direction == "both" else [pairs[direction]]


def laplacian(ksize: int) -> Pairs:
    """The second derivatives along x and y, whose sum is cv2.Laplacian."""
    return [_derivative(2, 0, ksize), _derivative(0, 2, ksize)]


def _derivative(dx: int, dy: int, ksize: int) -> tuple[Floats, Floats]:
    import cv2

    row, column = cv2.getDerivKernels(dx, dy, ksize, ktype=cv2.CV_64F)
    return row.ravel(), column.ravel()


def _margin(pairs: Pairs) -> int:
    return max(len(kernel) // 2 for pair in pairs for kernel in pair)


def with_margin(image: Pixels, pairs: Pairs) -> Pixels:
    """The picture with what the kernels see beyond its edges: a mirror image without the edge itself, as in OpenCV."""
    margin = _margin(pairs)
    return np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")


def run(pictures: Pixels, pairs: Pairs, *, length: bool, grey: bool, scale: float, device: str) -> Pixels:
    """Filter pictures on the device, in float32.

    Args:
        pictures: (n, height + 2m, width + 2m, 3), with the margins m of `with_margin`.
        length: of two pairs, take the length of the vector they make; else their sum, without its sign.
        grey: filter the brightness; else each channel by itself.

    Returns:
        (n, height, width, 3), multiplied with scale, rounded, cut off at 255.
    """
    import torch

    # TF32 would round products to 10 bits, which may be a grey level.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        planes = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float()
        if grey:
            planes = (planes * planes.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
            planes = ((planes + 16384) / 32768).floor()  # whole numbers below 2^24, so exact
        parts = [_convolved(planes, *pair, _margin(pairs)) for pair in pairs]
        done = torch.hypot(*parts) if length and len(parts) == 2 else torch.stack(parts).sum(0).abs()
        done = (done * scale).round().clamp(0, 255).to(torch.uint8)
        found: Pixels = done.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return found


def _convolved(planes: Any, row: Floats, column: Floats, margin: int) -> Any:
    """(n, channels, height + 2m, width + 2m) -> (n, channels, height, width)."""
    flat = planes.flatten(0, 1)[:, None]
    short = margin - len(row) // 2, margin - len(column) // 2  # margins that this pair does not need
    flat = flat[..., short[1] : flat.shape[-2] - short[1], short[0] : flat.shape[-1] - short[0]]
    flat = _conv(flat, flat.new_tensor(row.tolist())[None, None, None, :])
    flat = _conv(flat, flat.new_tensor(column.tolist())[None, None, :, None])
    return flat[:, 0].unflatten(0, planes.shape[:2])


def _conv(planes: Any, kernel: Any) -> Any:
    import torch

    return torch.nn.functional.conv2d(planes, kernel)
