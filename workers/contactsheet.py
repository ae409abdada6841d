"""A picture of a job's results: a grid of its images with the boxes drawn."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from storage import index, objects, shardfile
from storage.database import Database
from storage.errors import ImagemillError
from storage.objects import Store
from storage.settings import Settings
from storage.shardfile import Outcome
from workers import images

_COLUMNS, _ROWS, _CELL = 4, 3, 320  # cells are square, in pixels
_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#800000",
    "#000075",
    "#808000",
)


def draw(db: Database, store: Store, settings: Settings, recipe_id: int, path: Path) -> Path | None:
    """Write a JPEG of up to twelve images of a recipe, the first with objects in them; None when it has no images.

    Raises ImportError where Pillow is not installed.
    """
    from PIL import Image

    chosen = _choose(db, store, recipe_id, _COLUMNS * _ROWS)
    cells = [cell for outcome in chosen if (cell := _cell(outcome, settings)) is not None]
    if not cells:
        return None
    rows = -(-len(cells) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL, rows * _CELL), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % _COLUMNS * _CELL, i // _COLUMNS * _CELL))
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=88)
    path.write_bytes(buffer.getvalue())
    return path


def _choose(db: Database, store: Store, recipe_id: int, count: int) -> Sequence[Outcome]:
    """Outcomes with objects first; reads as few result objects as will do."""
    full: list[Outcome] = []
    empty: list[Outcome] = []
    for outcome in _outcomes(db, store, recipe_id):
        (full if len(outcome.result.labels) else empty).append(outcome)  # type: ignore[union-attr]
        if len(full) >= count or len(full) + len(empty) > 2000:
            break
    return (full + empty)[:count]


def _outcomes(db: Database, store: Store, recipe_id: int) -> Iterator[Outcome]:
    for entry in index.objects(db, recipe_id):
        current = index.current_positions(db, entry.shard_id)
        done, _ = shardfile.read(store, entry.key, entry.sha256)
        yield from (o for o in done if o.result is not None and o.position in current)


def _cell(outcome: Outcome, settings: Settings):  # type: ignore[no-untyped-def]  # a PIL image, imported late
    from PIL import Image, ImageDraw

    limits = images.Limits(settings.max_image_bytes, settings.max_image_pixels)
    try:
        picture = images.decode(objects.read(outcome.uri, settings, settings.max_image_bytes), limits)
    except ImagemillError:
        return None  # gone since; the sheet shows what is still there
    scale = min(_CELL / picture.width, _CELL / picture.height, 4.0)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    image = Image.fromarray(picture.pixels).resize(size, Image.Resampling.BILINEAR)
    cell = Image.new("RGB", (_CELL, _CELL), "#eeeeee")
    left, top = (_CELL - size[0]) // 2, (_CELL - size[1]) // 2
    cell.paste(image, (left, top))
    pen = ImageDraw.Draw(cell)
    result = outcome.result
    assert result is not None
    for box, score, number, label in zip(
        result.boxes_xyxy * np.float32(scale), result.scores, result.class_ids, result.labels, strict=True
    ):
        x1, y1, x2, y2 = (float(v) for v in box + np.array([left, top, left, top], np.float32))
        colour = _COLOURS[int(number) % len(_COLOURS)]
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
        text = f"{label} {score:.2f}"
        pen.rectangle((x1, max(0, y1 - 12), x1 + pen.textlength(text) + 4, max(12, y1)), fill=colour)
        pen.text((x1 + 2, max(0, y1 - 12)), text, fill="white")
    return cell
