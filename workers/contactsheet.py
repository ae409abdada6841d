"""A picture of a job's results: a grid of its images with boxes, masks and labels drawn, or of those it made."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from storage import index, objects, rle, shardfile
from storage.database import Database
from storage.errors import ImagemillError
from storage.objects import Store
from storage.settings import Settings
from storage.shardfile import Outcome
from storage.tables import shard
from workers import images, videos

_MASKS = 50  # of one image at most
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


@dataclass(frozen=True, slots=True)
class _Chosen:
    """An item that may be shown: its outcome, what the job said of it alone, and its result object's key."""

    outcome: Outcome
    data: dict[str, Any]
    object_key: str


def draw(db: Database, store: Store, settings: Settings, recipe_id: int, path: Path) -> Path | None:
    """Write a JPEG of up to twelve images of a recipe, those with objects in them first; None when it has no images.

    Raises ImportError where Pillow is not installed.
    """
    from PIL import Image

    chosen = _choose(db, store, recipe_id, _COLUMNS * _ROWS)
    cells = [cell for one in chosen if (cell := _cell(one, store, settings)) is not None]
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


def _choose(db: Database, store: Store, recipe_id: int, count: int) -> Sequence[_Chosen]:
    """Items with something in them first; reads as few result objects as will do."""
    full: list[_Chosen] = []
    empty: list[_Chosen] = []
    for chosen in _items(db, store, recipe_id):
        (full if len(getattr(chosen.outcome.result, "labels", ())) else empty).append(chosen)
        if len(full) >= count or len(full) + len(empty) > 2000:
            break
    return (full + empty)[:count]


def _items(db: Database, store: Store, recipe_id: int) -> Iterator[_Chosen]:
    for entry in index.objects(db, recipe_id):
        current = index.current_positions(db, entry.shard_id)
        done, _ = shardfile.read(store, entry.key, entry.sha256)
        ((manifest,),) = db.query(sa.select(shard.c.manifest_key).where(shard.c.id == entry.shard_id))
        rows = shardfile.read_manifest(store, manifest)
        for outcome in done:
            if outcome.result is not None and outcome.position in current:
                data = rows[outcome.position].data
                yield _Chosen(outcome, json.loads(data) if data else {}, entry.key)


def _picture(chosen: _Chosen, store: Store, settings: Settings) -> images.Pixels:
    """What was looked at, or what was made. Raises ImagemillError when it is not there any more."""
    limits = images.Limits(settings.max_image_bytes, settings.max_image_pixels)
    result: Any = chosen.outcome.result
    if shardfile.has_blob(result):
        return images.decode(store.get(shardfile.blob_key(chosen.object_key, result)), limits).pixels
    uri = chosen.outcome.uri
    frame = uri.startswith("frame:")
    data = videos.read(uri, settings) if frame else objects.read(uri, settings, settings.max_image_bytes)
    pixels = images.decode(data, limits).pixels
    return images.crop(pixels, chosen.data["crop"]) if "crop" in chosen.data else pixels


def _cell(chosen: _Chosen, store: Store, settings: Settings):  # type: ignore[no-untyped-def]  # a PIL image
    from PIL import Image, ImageDraw

    try:
        pixels = _picture(chosen, store, settings)
    except ImagemillError:
        return None  # gone since; the sheet shows what is still there
    result: Any = chosen.outcome.result
    pixels = _tinted(pixels, result) if hasattr(result, "rles") else pixels
    height, width = pixels.shape[:2]
    scale = min(_CELL / width, _CELL / height, 4.0)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    cell = Image.new("RGB", (_CELL, _CELL), "#eeeeee")
    left, top = (_CELL - size[0]) // 2, (_CELL - size[1]) // 2
    cell.paste(image, (left, top))
    pen = ImageDraw.Draw(cell)
    if hasattr(result, "boxes_xyxy"):
        moved = result.boxes_xyxy * np.float32(scale) + np.array([left, top, left, top], np.float32)
        for box, score, number, label in zip(moved, result.scores, result.class_ids, result.labels, strict=True):
            x1, y1, x2, y2 = (float(v) for v in box)
            pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=_colour(number), width=2)
            _write(pen, x1, y1, f"{label} {score:.2f}", _colour(number))
    elif hasattr(result, "labels"):
        for line, (label, score) in enumerate(zip(result.labels[:3], result.scores, strict=False)):
            _write(pen, 0, 12 * (line + 1), f"{label} {score:.2f}", _colour(line))
    return cell


def _colour(number: Any) -> str:
    return _COLOURS[int(number) % len(_COLOURS)]


def _write(pen: Any, x: float, y: float, text: str, colour: str) -> None:
    """A label whose lower left corner is at x, y, or as near as the cell allows."""
    y = max(12.0, y)
    pen.rectangle((x, y - 12, x + pen.textlength(text) + 4, y), fill=colour)
    pen.text((x + 2, y - 12), text, fill="white")


def _tinted(pixels: images.Pixels, result: Any) -> images.Pixels:
    """A copy with each mask half covered by its colour."""
    tinted = pixels.copy()
    for number, counts in enumerate(result.rles[:_MASKS]):
        mask = rle.decode(counts, result.size)
        rgb = np.array([int(_colour(number)[i : i + 2], 16) for i in (1, 3, 5)])
        tinted[mask] = (tinted[mask] // 2 + rgb // 2).astype(np.uint8)
    return tinted
