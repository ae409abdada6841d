"""Knows prompts as a network takes them: columns of one form, in pixels of its input, for any number of objects.

What an item may ask is in workers/prompts.py; here it is moved into the frame in which the network sees the picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import rle
from workers import prompts

_INSIDE = 6.9  # logit of a probability of 0.999, for the pixels of a rough mask given as a prompt

Floats = npt.NDArray[np.float32]
Form = tuple[int, bool, bool]  # points of an object, whether there is a box, and a rough mask


@dataclass(frozen=True, slots=True)
class Frame:
    """How a picture or a crop of it lies in the upper left corner of the network's square input.

    Attributes:
        size: (height, width) of the picture or crop.
        scaled: (height, width) it has in the input.
        side: pixels of the input's side.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    side: int

    def moved(self, points: npt.NDArray[Any]) -> Floats:
        """Points (..., 2) xy of the picture in pixels of the input."""
        gain = np.array([self.scaled[1] / self.size[1], self.scaled[0] / self.size[0]])
        moved: Floats = (points.astype(np.float64) * gain).astype(np.float32)
        return moved


@dataclass(frozen=True, slots=True)
class Queries:
    """Prompts of one form about one view, in columns of one length n, in pixels of the network's input.

    Attributes:
        places: (n,) int, which of the item's objects each is for.
        points: (n, k, 2) float32 xy, with signs (n, k) int32: 1 on the object, 0 beside it.
        boxes: (n, 4) float32 xyxy, or None.
        rough: (n, side^2 / 8) uint8, packed bits of a rough mask of the size of the decoder's masks, or None.
    """

    places: npt.NDArray[np.int64]
    points: Floats
    signs: npt.NDArray[np.int32]
    boxes: Floats | None = None
    rough: npt.NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.places)

    @property
    def form(self) -> Form:
        """What must be equal for prompts to be decoded together."""
        return self.points.shape[1], self.boxes is not None, self.rough is not None

    @property
    def nbytes(self) -> int:
        """Host memory it holds."""
        columns = (self.places, self.points, self.signs, self.boxes, self.rough)
        return sum(column.nbytes for column in columns if column is not None)

    def part(self, which: slice) -> Queries:
        """Some of the prompts."""
        return Queries(
            self.places[which],
            self.points[which],
            self.signs[which],
            None if self.boxes is None else self.boxes[which],
            None if self.rough is None else self.rough[which],
        )

    def tensors(self, device: str, mask_side: int) -> tuple[tuple[Any, Any] | None, Any | None, Any | None]:
        """(points (n, k, 2), signs (n, k)), boxes (n, 4) and logits (n, 1, side, side) of rough masks, or None each."""
        import torch

        points = boxes = rough = None
        if self.points.shape[1]:
            points = (torch.from_numpy(self.points).to(device), torch.from_numpy(self.signs).to(device))
        if self.boxes is not None:
            boxes = torch.from_numpy(self.boxes).to(device)
        if self.rough is not None:
            bits = np.unpackbits(self.rough, axis=1, count=mask_side**2).astype(np.float32)
            rough = (torch.from_numpy(bits).to(device) * 2 - 1).mul_(_INSIDE).view(-1, 1, mask_side, mask_side)
        return points, boxes, rough


def joined(queries: Sequence[Queries]) -> Queries:
    """Prompts of one form, one after the other."""
    boxes = [one.boxes for one in queries if one.boxes is not None]
    rough = [one.rough for one in queries if one.rough is not None]
    return Queries(
        np.concatenate([one.places for one in queries]),
        np.concatenate([one.points for one in queries]),
        np.concatenate([one.signs for one in queries]),
        np.concatenate(boxes) if boxes else None,
        np.concatenate(rough) if rough else None,
    )


def of_points(points: npt.NDArray[Any], frame: Frame) -> Queries:
    """One prompt for each of the points (n, 2) xy in pixels of the picture."""
    count = len(points)
    return Queries(np.arange(count), frame.moved(points[:, None]), np.ones((count, 1), np.int32))


def of_objects(objects: Sequence[prompts.Object], frame: Frame, mask_side: int) -> list[Queries]:
    """Objects of one form together. Raises ItemFailed for a rough mask that is none, or of another picture's size."""
    forms: dict[Form, list[int]] = defaultdict(list)
    for i, one in enumerate(objects):
        forms[len(one.points), one.box is not None, one.rough is not None].append(i)
    return [_columns(indices, [objects[i] for i in indices], frame, mask_side) for indices in forms.values()]


def _columns(indices: list[int], objects: Sequence[prompts.Object], frame: Frame, mask_side: int) -> Queries:
    first = objects[0]
    boxes = None if first.box is None else np.stack([one.box for one in objects if one.box is not None])
    return Queries(
        np.array(indices),
        frame.moved(np.stack([one.points for one in objects])),
        np.stack([one.signs for one in objects]),
        None if boxes is None else frame.moved(boxes.reshape(-1, 2, 2)).reshape(-1, 4),
        None if first.rough is None else np.stack([_rough(one.rough, frame, mask_side) for one in objects]),
    )


def _rough(value: Any, frame: Frame, side: int) -> npt.NDArray[np.uint8]:
    """A mask given as a prompt, in the size of the decoder's masks, as packed bits.

    A mask of the picture's size is scaled as the picture is; one of the decoder's own size is taken as it is.
    """
    from PIL import Image as Pictures

    try:
        size = (int(value["size"][0]), int(value["size"][1]))
        counts = value["counts"]
        if size not in (frame.size, (side, side)):
            raise ValueError(f"its size is {size}")
        mask = rle.decode(counts.encode() if isinstance(counts, str) else bytes(counts), size)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise prompts.bad(
            f'expected a mask as COCO RLE {{"size": [height, width], "counts": "..."}} of the picture\'s size '
            f"{list(frame.size)} or of {[side, side]}, but got {str(value)[:80]} ({error})"
        ) from error
    if size == frame.size:
        height, width = (max(1, round(pixels * side / frame.side)) for pixels in frame.scaled)
        scaled = Pictures.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Pictures.Resampling.BOX)
        mask = np.zeros((side, side), bool)
        mask[:height, :width] = np.asarray(scaled) >= 128
    return np.packbits(mask)
