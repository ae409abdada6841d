"""Makes the brightness and colours of pictures comparable, on the CPU with OpenCV."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.models import Image
from workers.transformparams import Normalise


def normalised(image: Image, params: Normalise) -> Image:
    """The picture with its brightness and colours spread, see Normalise."""
    import cv2

    if params.method == "stretch":
        low, high = np.percentile(image, [params.low, params.high], axis=(0, 1))
        return _rounded((image - low) * (255 / np.maximum(high - low, 1)))
    if params.method == "grey-world":
        means = image.mean((0, 1))
        return _rounded(image * (means.mean() / np.maximum(means, 1)))
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    if params.method == "equalise":
        light = cv2.equalizeHist(np.ascontiguousarray(lab[..., 0]))
    else:
        light = cv2.createCLAHE(params.clip, (params.tiles, params.tiles)).apply(np.ascontiguousarray(lab[..., 0]))
    done: Image = cv2.cvtColor(np.dstack([light, lab[..., 1:]]), cv2.COLOR_LAB2RGB)
    return done


def _rounded(values: npt.NDArray[np.float64]) -> Image:
    rounded: Image = values.round().clip(0, 255).astype(np.uint8)
    return rounded
