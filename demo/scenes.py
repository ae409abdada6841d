"""Knows how to draw the demo pictures: coloured shapes on textured backgrounds, with each shape's true box and mask.

A scene is a pure function of a seed and an index. All chance comes from numpy's legacy `RandomState`, whose stream is
frozen, so scene `index` of `seed` shows the same shapes in the same places on each run and each machine. (The bytes of
the JPEG file can still differ where the JPEG library differs.)

Coordinates are picture pixels: x to the right, y down, the origin at the upper left corner of the upper left pixel. A
box is `(x1, y1, x2, y2)` where `x2` and `y2` are the outer edges of the last pixel, so the width is `x2 - x1`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

LABELS = ("circle", "triangle", "square", "star", "cross", "moon")

# (width, height) in pixels. Not all square, so that mapping boxes back from a padded model input is put to the test.
PICTURE_SIZES = ((320, 256), (256, 320), (288, 288))
MAX_SHAPES = 6
RADIUS_RANGE = (25.0, 56.0)  # of the circle around a shape, in pixels
MIN_BOX_SIDE = 30  # pixels; a smaller visible box is not drawn at all
MAX_HIDDEN = 0.2  # share of a shape's area that later shapes may cover
MAX_BOX_IOU = 0.3  # boxes that share more than this are hard to tell apart
MIN_COLOUR_DISTANCE = 165.0  # see `colour_distance`
SUPERSAMPLE = 4  # each mask is drawn this many times larger, then averaged down
PLACEMENT_TRIES = 30
JPEG_QUALITY = 90

Floats = NDArray[np.float32]
Points = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class TrueObject:
    """One shape of a scene: its class name and the tight box around its visible pixels."""

    label: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """A picture as uint8 RGB of shape (height, width, 3), and the shapes in it from back to front.

    `numbers`, (height, width), says whose each pixel is: 0 the background's, n the n-th object's, counted from 1.
    """

    pixels: NDArray[np.uint8]
    objects: tuple[TrueObject, ...]
    numbers: NDArray[np.uint8]

    @property
    def masks(self) -> tuple[Bools, ...]:
        """The visible pixels of each shape, (height, width); no pixel is in two of them."""
        return tuple(self.numbers == number for number in range(1, len(self.objects) + 1))


@dataclass(frozen=True)
class Placed:
    """A shape on the canvas: its class name, its cover (0 to 1, shape (height, width)) and the pixels it owns."""

    label: str
    cover: Floats
    solid: Bools


def scene_key(index: int) -> str:
    """Return the file name of scene `index`, which is also its item key."""
    return f"scene-{index:06d}.jpg"


# Outlines. Each returns points of shape (n, 2) on or inside the unit circle around (0, 0).


def _on_circle(angles: Points, radius: float | Points = 1.0) -> Points:
    """Return the points at the given angles (radians) and radius."""
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _regular(corners: int) -> Points:
    """Return a regular polygon."""
    return _on_circle(np.arange(corners) * (2 * math.pi / corners))


def _star() -> Points:
    """Return a star with five points."""
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return _on_circle(np.arange(10) * (math.pi / 5), radius)


def _cross() -> Points:
    """Return a plus sign with arms of equal length."""
    arm, half = 0.94, 0.3
    quarter = np.array([(arm, -half), (arm, half), (half, half)])
    turns = (np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]) for a in np.arange(4) * math.pi / 2)
    return np.concatenate([quarter @ turn for turn in turns])


def _moon() -> Points:
    """Return a crescent: a disc without the part that a second, shifted disc covers."""
    shift, inner = 0.45, 0.78  # centre and radius of the second disc
    meet_x = (1 + shift**2 - inner**2) / (2 * shift)
    outer_end = math.acos(meet_x)
    inner_end = math.acos((meet_x - shift) / inner)
    outer_arc = _on_circle(np.linspace(outer_end, 2 * math.pi - outer_end, 40))
    inner_arc = _on_circle(np.linspace(2 * math.pi - inner_end, inner_end, 40), inner) + np.array([shift, 0.0])
    return np.concatenate([outer_arc, inner_arc])


OUTLINES: dict[str, Callable[[], Points]] = {
    "circle": lambda: _regular(72),
    "triangle": lambda: _regular(3),
    "square": lambda: _regular(4),
    "star": _star,
    "cross": _cross,
    "moon": _moon,
}


# Colour.


def colour_distance(colours: Floats, colour: Floats) -> Floats:
    """Return how different RGB colours (n, 3) look from one RGB colour (3,), all 0 to 255.

    This is the "redmean" formula: a weighted RGB distance that follows the eye well and costs little. Black to white
    is about 765.
    """
    red_mean = (colours[:, 0] + colour[0]) / 2
    squared = (colours - colour) ** 2
    weighted = (2 + red_mean / 256) * squared[:, 0] + 4 * squared[:, 1] + (2 + (255 - red_mean) / 256) * squared[:, 2]
    return np.asarray(np.sqrt(weighted), np.float32)


def distinct_colour(rng: np.random.RandomState, taken: Floats) -> Floats:
    """Return an RGB colour (3,) that is far from all taken colours (n, 3), or the farthest that was tried."""
    best, best_distance = np.zeros(3, np.float32), -1.0
    for _ in range(40):
        candidate = rng.uniform(15, 240, 3).astype(np.float32)
        distance = float(colour_distance(taken, candidate).min())
        if distance >= MIN_COLOUR_DISTANCE:
            return candidate
        if distance > best_distance:
            best, best_distance = candidate, distance
    return best


# Background.


def _ramp(rng: np.random.RandomState, width: int, height: int) -> Floats:
    """Return values from 0 to 1, shape (height, width), that rise along a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    x = np.arange(width, dtype=np.float32) * np.float32(math.cos(angle))
    y = np.arange(height, dtype=np.float32) * np.float32(math.sin(angle))
    ramp = y[:, None] + x[None, :]
    return np.asarray((ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6), np.float32)


def _blotches(rng: np.random.RandomState, width: int, height: int) -> Floats:
    """Return soft random blotches from about -1 to 1, shape (height, width)."""
    cells = int(rng.randint(4, 24))
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _stripes(rng: np.random.RandomState, width: int, height: int) -> Floats:
    """Return parallel soft stripes from -1 to 1, shape (height, width)."""
    period = rng.uniform(8, 40)
    waves = math.hypot(width, height) / period
    return np.asarray(np.sin(_ramp(rng, width, height) * (2 * math.pi * waves)), np.float32)


def _checks(rng: np.random.RandomState, width: int, height: int) -> Floats:
    """Return a chessboard of -1 and 1, shape (height, width)."""
    cell = int(rng.randint(8, 28))
    x, y = np.arange(width) // cell, np.arange(height) // cell
    return ((x[None, :] + y[:, None]) % 2 * 2 - 1).astype(np.float32)


def background(rng: np.random.RandomState, width: int, height: int) -> Floats:
    """Return a background, shape (height, width, 3), 0 to 255: a gradient of two near colours plus a weak texture."""
    # A full ramp from one free colour to another would leave no colour that stands out everywhere.
    first = rng.uniform(0, 255, 3)
    second = np.clip(first + rng.uniform(-70, 70, 3), 0, 255)
    ramp = _ramp(rng, width, height)[:, :, None]
    canvas = first.astype(np.float32) * (1 - ramp) + second.astype(np.float32) * ramp
    texture = (_blotches, _blotches, _stripes, _checks)[rng.randint(4)](rng, width, height)
    strength = rng.uniform(4, 22) * rng.uniform(0.4, 1.0, 3)
    return np.clip(canvas + texture[:, :, None] * strength.astype(np.float32), 0, 255)


# Shapes.


def shape_cover(
    label: str, centre: tuple[float, float], radius: float, angle: float, width: int, height: int
) -> Floats:
    """Return how much of each pixel a shape covers, 0 to 1, shape (height, width).

    `centre` and `radius` are in pixels and `angle` in radians; the shape must lie inside the picture.
    """
    left, top = math.floor(centre[0] - radius) - 1, math.floor(centre[1] - radius) - 1
    side = 2 * math.ceil(radius) + 4
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = OUTLINES[label]() @ turn * radius + np.array([centre[0] - left, centre[1] - top])
    patch = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
    # PIL counts a point as the centre of a pixel, hence the half.
    ImageDraw.Draw(patch).polygon([(x, y) for x, y in (points * SUPERSAMPLE - 0.5).tolist()], fill=255)
    small = np.asarray(patch.reduce(SUPERSAMPLE), dtype=np.float32) / 255
    cover = np.zeros((height, width), np.float32)
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    cover[y1:y2, x1:x2] = small[y1 - top : y2 - top, x1 - left : x2 - left]
    return cover


def tight_box(mask: Bools) -> Box | None:
    """Return the smallest box around the true pixels of a (height, width) mask; None if there are none."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def box_iou(first: Box, second: Box) -> float:
    """Return the overlap of two boxes as intersection over union."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    area = (first[2] - first[0]) * (first[3] - first[1]) + (second[2] - second[0]) * (second[3] - second[1])
    return shared / (area - shared)


def visible_boxes(shapes: list[Placed]) -> list[Box] | None:
    """Return the visible box of each shape (given back to front), or None if one of them is too hard to tell.

    Too hard means: hidden by more than `MAX_HIDDEN`, a box side under `MIN_BOX_SIDE`, or two boxes that overlap by
    more than `MAX_BOX_IOU`.
    """
    boxes: list[Box] = []
    for i, shape in enumerate(shapes):
        visible = shape.solid.copy()
        for later in shapes[i + 1 :]:
            visible &= ~later.solid
        if visible.sum() < (1 - MAX_HIDDEN) * shape.solid.sum():
            return None
        box = tight_box(visible)
        if box is None or min(box[2] - box[0], box[3] - box[1]) < MIN_BOX_SIDE:
            return None
        if any(box_iou(box, other) > MAX_BOX_IOU for other in boxes):
            return None
        boxes.append(box)
    return boxes


def random_shape(rng: np.random.RandomState, width: int, height: int) -> Placed:
    """Return a shape of random class, size, place and rotation that lies wholly inside the picture."""
    label = LABELS[rng.randint(len(LABELS))]
    radius = rng.uniform(*RADIUS_RANGE)
    margin = radius + 1
    centre = (rng.uniform(margin, width - margin), rng.uniform(margin, height - margin))
    cover = shape_cover(label, centre, radius, rng.uniform(0, 2 * math.pi), width, height)
    return Placed(label, cover, cover >= 0.5)


def place_shapes(rng: np.random.RandomState, width: int, height: int) -> tuple[list[Placed], list[Box]]:
    """Return 1 to `MAX_SHAPES` shapes, back to front, and their visible boxes."""
    wanted = int(rng.randint(1, MAX_SHAPES + 1))
    shapes: list[Placed] = []
    boxes: list[Box] = []
    for _ in range(PLACEMENT_TRIES):
        trial = [*shapes, random_shape(rng, width, height)]
        trial_boxes = visible_boxes(trial)
        if trial_boxes is not None:
            shapes, boxes = trial, trial_boxes
        if len(shapes) == wanted:
            break
    return shapes, boxes


def paint(rng: np.random.RandomState, canvas: Floats, shapes: list[Placed]) -> Floats:
    """Return the canvas (height, width, 3) with the shapes painted on it, each in a colour that stands out."""
    canvas = canvas.copy()
    # Every eighth pixel is enough to know which colours the background has.
    taken = canvas[::8, ::8].reshape(-1, 3)
    for shape in shapes:
        colour = distinct_colour(rng, taken)
        taken = np.concatenate([taken, colour[None]])
        # Only the pixels around the shape change; working on all of them would take most of the time.
        x1, y1, x2, y2 = tight_box(shape.cover > 0) or (0, 0, 0, 0)
        shade = (_ramp(rng, x2 - x1, y2 - y1) - 0.5) * np.float32(rng.uniform(0, 40))
        cover = shape.cover[y1:y2, x1:x2, None]
        canvas[y1:y2, x1:x2] = canvas[y1:y2, x1:x2] * (1 - cover) + (colour + shade[:, :, None]) * cover
    return canvas


def make_scene(seed: int, index: int) -> Scene:
    """Return scene `index` (0 or more) of the series `seed` (0 or more)."""
    rng = np.random.RandomState([seed, index])
    width, height = PICTURE_SIZES[rng.randint(len(PICTURE_SIZES))]
    canvas = background(rng, width, height)
    shapes, boxes = place_shapes(rng, width, height)
    painted = paint(rng, canvas, shapes)
    noise = (rng.standard_normal((height, width, 1)) * rng.uniform(1, 9)).astype(np.float32)
    pixels = np.clip(np.rint(painted + noise), 0, 255).astype(np.uint8)
    numbers = np.zeros((height, width), np.uint8)
    for number, shape in enumerate(shapes, 1):
        numbers[shape.solid] = number  # over what lies behind it
    return Scene(pixels, tuple(TrueObject(s.label, box) for s, box in zip(shapes, boxes, strict=True)), numbers)


def write_scenes(
    out_dir: Path, count: int, seed: int, truth_path: Path | None = None, *, with_masks: bool = False
) -> Path:
    """Write `count` scenes into `out_dir/images` and their truth as JSON; return the path of the truth file.

    The truth maps each item key to a list of `{"label": name, "box": [x1, y1, x2, y2]}`. `with_masks` adds
    `out_dir/masks/scene-000000.png` and so on: the numbers of the scene as grey PNGs.
    """
    images = out_dir / "images"
    images.mkdir(parents=True, exist_ok=True)
    truth: dict[str, list[dict[str, object]]] = {}
    for index in range(count):
        scene = make_scene(seed, index)
        Image.fromarray(scene.pixels).save(images / scene_key(index), quality=JPEG_QUALITY)
        truth[scene_key(index)] = [{"label": o.label, "box": list(o.box)} for o in scene.objects]
        if with_masks:
            (out_dir / "masks").mkdir(exist_ok=True)
            Image.fromarray(scene.numbers).save((out_dir / "masks" / scene_key(index)).with_suffix(".png"))
    truth_path = truth_path or out_dir / "truth.json"
    truth_path.write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    return truth_path


def main() -> None:
    """Read the command line and write the scenes."""
    parser = argparse.ArgumentParser(description="Draw demo scenes with known boxes.")
    parser.add_argument("out_dir", type=Path, help="folder to write images/ and truth.json into")
    parser.add_argument("--count", type=int, default=300, help="number of scenes")
    parser.add_argument("--seed", type=int, default=7, help="which series of scenes")
    parser.add_argument("--truth", type=Path, default=None, help="truth file (default: OUT_DIR/truth.json)")
    parser.add_argument("--masks", action="store_true", help="also write OUT_DIR/masks: the pixels of each shape")
    args = parser.parse_args()
    truth_path = write_scenes(args.out_dir, args.count, args.seed, args.truth, with_masks=args.masks)
    print(f"{args.count} scenes in {args.out_dir / 'images'}, truth in {truth_path}")


if __name__ == "__main__":
    main()
