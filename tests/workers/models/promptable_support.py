"""What the tests of promptable families share: photographs, prompts, running a model, comparing masks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from storage import rle
from storage.results.masks import Result
from workers import ultralytics_checkpoints
from workers.models import Item, Prepared
from workers.promptable import Segmenter


def photographs() -> list[np.ndarray]:
    """Photographs, wide, tall and square, larger and smaller than the input."""
    import cv2

    with ultralytics_checkpoints.library():
        from ultralytics.utils import ASSETS
    bus, zidane = (cv2.imread(str(Path(ASSETS) / name))[:, :, ::-1] for name in ("bus.jpg", "zidane.jpg"))
    sizes = [(bus, 202, 270), (zidane, 320, 180), (bus[200:700, 100:600], 180, 180), (zidane, 600, 337)]
    return [cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture, *size in sizes]


def prepared(model: Segmenter, picture: np.ndarray, data: dict[str, Any], key: str = "key") -> Prepared:
    return model.prepare(picture, Item(key, f"file:///{key}", "etag:1", data))


def run(model: Segmenter, picture: np.ndarray, data: dict[str, Any]) -> Result:
    (result,) = model.infer([prepared(model, picture, data)])
    assert isinstance(result, Result), result
    return result


def pixels(result: Result) -> np.ndarray:
    """(n, height, width) bool."""
    return np.array([rle.decode(counts, result.size) for counts in result.rles]).reshape(-1, *result.size)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


def some_boxes(picture: np.ndarray, count: int, seed: int = 0) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    size = np.array(picture.shape[1::-1])
    low = rng.uniform(0, 0.6, (count, 2)) * size
    high = low + rng.uniform(0.1, 0.4, (count, 2)) * size
    return np.hstack([low, np.minimum(high, size)]).round(1).tolist()


def agree(result: Result, expected: list[tuple[np.ndarray, float]], tolerance: float = 0.01) -> None:
    """Same masks and ratings, and areas and boxes that belong to the masks."""
    got = pixels(result)
    assert len(got) == len(expected)
    for mask, score, area, box, (wanted, rating) in zip(
        got, result.scores, result.areas, result.boxes_xyxy, expected, strict=True
    ):
        assert 0.005 < wanted.mean() < 0.995
        assert iou(mask, wanted) >= 0.99
        assert abs(score - np.clip(rating, 0, 1)) <= tolerance
        assert area == mask.sum()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


class Shelf:
    """Encodings kept in a dictionary."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        with self.lock:
            self.asked.append(name)
        return self.kept.get(name)

    def recent(self, name: str) -> bytes | None:
        return self.kept.get(name)

    def put(self, name: str, data: bytes) -> None:
        with self.lock:
            self.kept[name] = data
