"""Where in the new picture the old one comes to lie when it is resized, cropped or padded. Pure arithmetic."""

from __future__ import annotations

import numpy as np

from storage.errors import ItemFailed
from workers.placing import MOST_PIXELS, Place
from workers.transformparams import Crop, Pad, Resize


def resized(shape: tuple[int, int], params: Resize) -> Place:
    """A picture of a shape (height, width) in its new size. Raises ItemFailed where that has too many pixels."""
    height, width = shape
    wanted = (params.width, params.height)
    whole = (0, 0, width, height)
    if all(wanted) and params.fit == "stretch":
        return Place(whole, wanted, wanted)
    if all(wanted) and params.fit == "cover":
        gain = max(wanted[0] / width, wanted[1] / height)
        cut = (max(min(round(wanted[0] / gain), width), 1), max(min(round(wanted[1] / gain), height), 1))
        x, y = (width - cut[0]) // 2, (height - cut[1]) // 2
        return Place((x, y, x + cut[0], y + cut[1]), wanted, wanted)
    gain = min(side / own for side, own in zip(wanted, (width, height), strict=True) if side)
    gain = gain if params.enlarge else min(gain, 1.0)
    scaled = (max(round(width * gain), 1), max(round(height * gain), 1))
    if scaled[0] * scaled[1] > MOST_PIXELS:
        raise ItemFailed("prepare", "too-many-pixels", f"the new picture would be {scaled[0]}x{scaled[1]}")
    if not all(wanted) or params.fit == "inside":
        return Place(whole, scaled, scaled)
    return Place(whole, scaled, wanted, ((wanted[0] - scaled[0]) // 2, (wanted[1] - scaled[1]) // 2))


def cropped(shape: tuple[int, int], params: Crop, seed: int) -> Place:
    """The part of a picture of a shape (height, width) that is kept; the seed says which, where it is random."""
    height, width = shape
    size = (min(params.width, width), min(params.height, height))
    if params.at == "centre":
        x, y = (width - size[0]) // 2, (height - size[1]) // 2
    else:
        place = np.random.default_rng(seed)
        x, y = (int(place.integers(0, room + 1)) for room in (width - size[0], height - size[1]))
    return Place((x, y, x + size[0], y + size[1]), size, size)


def padded(shape: tuple[int, int], params: Pad) -> Place:
    """A picture of a shape (height, width) with what is added around it."""
    height, width = shape
    sides = (max(width, params.width), max(height, params.height))
    canvas = (-(-sides[0] // params.multiple) * params.multiple, -(-sides[1] // params.multiple) * params.multiple)
    room = (canvas[0] - width, canvas[1] - height)
    return Place(
        (0, 0, width, height),
        (width, height),
        canvas,
        (0, 0) if params.at == "corner" else (room[0] // 2, room[1] // 2),
    )
