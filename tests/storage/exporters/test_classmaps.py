"""Class maps: Pillow reads back the class of every pixel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage import exporters, rle, settings
from storage.objects import open_store
from storage.results import masks
from tests.storage.exporters.support import Mill, download, failed, found, provenance, shards


@pytest.fixture
def mill(tmp_path: Path) -> Iterator[Mill]:
    made = Mill(f"sqlite:///{tmp_path / 'index.db'}", open_store((tmp_path / "results").as_uri()))
    yield made
    made.db.close()


def result(painted: list[tuple[int, float, tuple[int, int, int, int]]], size: tuple[int, int]) -> masks.Result:
    """Masks that are boxes: (class id, score, (x1, y1, x2, y2))."""
    pixels = np.zeros((len(painted), *size), bool)
    for mask, (_, _, (x1, y1, x2, y2)) in zip(pixels, painted, strict=True):
        mask[y1:y2, x1:x2] = True
    return masks.Result(
        np.float32([box for _, _, box in painted]).reshape(-1, 4),
        np.float32([score for _, score, _ in painted]),
        np.int32([number for number, _, _ in painted]),
        tuple(f"class {number}" for number, _, _ in painted),
        tuple(rle.encode(mask) for mask in pixels),
        size,
        pixels.sum((1, 2)),
    )


def exported(mill: Mill, outcomes: list[Any], url: str, folder: Path, **options: Any) -> tuple[Path, Any]:
    job = mill.run(shards(outcomes, 2), kind="masks")
    place = {"job": provenance(job), "settings": settings.load(), "options": options}
    report = exporters.export(mill.db, mill.store, job.recipe_id, "classmaps", open_store(url), **place)
    return download(url, folder), report


def test_every_pixel_has_its_class(mill: Mill, store_url: str, tmp_path: Path) -> None:
    painted = [(1, 0.9, (0, 0, 4, 3)), (0, 0.5, (2, 1, 7, 5))]
    outcomes = [found("a/b.jpg", result(painted, (5, 7))), found("none.jpg", result([], (3, 2))), failed("c.jpg")]
    folder, report = exported(mill, outcomes, store_url + "/out", tmp_path / "read")
    names = json.loads((folder / "classes.json").read_text())["classes"]
    value = {name: int(number) for number, name in names.items()}
    expected = np.zeros((5, 7), np.uint8)
    expected[1:5, 2:7] = value["class 0"]
    expected[0:3, 0:4] = value["class 1"]
    picture = Image.open(folder / "maps" / "a" / "b.jpg.png")
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), expected)
    assert not np.asarray(Image.open(folder / "maps" / "none.jpg.png")).any()
    assert [json.loads(line)["key"] for line in (folder / "failures.jsonl").read_text().splitlines()] == ["c.jpg"]
    assert (report.items, report.failures, report.files, report.notes) == (3, 1, 4, [])


def test_many_classes_need_sixteen_bits(mill: Mill, store_url: str, tmp_path: Path) -> None:
    outcomes = [found("a.png", result([(700, 0.9, (0, 0, 2, 2))], (4, 4)))]
    folder, report = exported(mill, outcomes, store_url + "/8", tmp_path / "8")
    assert not np.asarray(Image.open(folder / "maps" / "a.png.png")).any()
    assert "bits=16" in report.notes[0]
    folder, report = exported(mill, outcomes, store_url + "/16", tmp_path / "16", bits=16)
    value = next(
        int(n)
        for n, name in json.loads((folder / "classes.json").read_text())["classes"].items()
        if name == "class 700"
    )
    picture = np.asarray(Image.open(folder / "maps" / "a.png.png"))
    assert value > 255
    assert (picture[:2, :2] == value).all()
    assert picture.sum() == 4 * value
