"""Images that were made come out as files, with what is known of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from storage import exporters, settings
from storage.errors import BadInput
from storage.objects import open_store
from storage.results import image
from tests.storage.exporters.support import Mill, download, failed, found, provenance, shards


@pytest.fixture
def mill(tmp_path: Path) -> Iterator[Mill]:
    made = Mill(f"sqlite:///{tmp_path / 'index.db'}", open_store((tmp_path / "results").as_uri()))
    yield made
    made.db.close()


def drawn(seed: int, format: str = "png") -> image.Result:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + seed, 8), (seed, 0, 0)).save(buffer, format)
    return image.made(buffer.getvalue(), format, 8 + seed, 8, {"prompt": "ein Bär", "seed": seed})


def test_every_image_is_a_file_with_its_line(mill: Mill, store_url: str, tmp_path: Path) -> None:
    made = {"a/1": drawn(1), "b.jpg": drawn(2, "jpeg"), "b.png/0": drawn(3), "c": drawn(1)}
    outcomes = [*(found(key, result) for key, result in made.items()), failed("d")]
    job = mill.run(shards(outcomes, 2), kind="image")
    place = open_store(store_url + "/out")
    common = {"job": provenance(job), "settings": settings.load()}
    report = exporters.export(mill.db, mill.store, job.recipe_id, "images", place, **common)
    folder = download(store_url + "/out", tmp_path / "read")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [
        "images/a/1.png",
        "images/b.jpg",
        "images/b.png/0.png",
        "images/c.png",
    ]
    for line in lines:
        data = (folder / line["file_name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == line["sha256"] == made[line["key"]].sha256
        assert line["meta"] == made[line["key"]].meta
        assert Image.open(io.BytesIO(data)).size == (line["width"], line["height"])
    assert [json.loads(line)["key"] for line in (folder / "failures.jsonl").read_text().splitlines()] == ["d"]
    assert json.loads((folder / "provenance.json").read_text())["kind"] == "image"
    assert (report.items, report.failures, report.files) == (5, 1, 7)


def test_other_kinds_are_refused(mill: Mill, tmp_path: Path) -> None:
    job = mill.run([], kind="detections")
    common = {"job": provenance(job), "settings": settings.load()}
    with pytest.raises(BadInput, match="'images' cannot hold results of kind 'detections'"):
        exporters.export(mill.db, mill.store, job.recipe_id, "images", open_store(tmp_path.as_uri()), **common)
