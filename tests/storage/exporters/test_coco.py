"""What is COCO's own: pycocotools reads the file back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from storage import exporters, rle, settings
from storage.objects import open_store
from tests.storage.exporters.support import LABELS, Mill, detection, failed, found, masked, mixed, provenance, shards


@pytest.fixture
def mill(tmp_path: Path) -> Iterator[Mill]:
    made = Mill(f"sqlite:///{tmp_path / 'index.db'}", open_store((tmp_path / "results").as_uri()))
    yield made
    made.db.close()


def exported(mill: Mill, job: Any, tmp_path: Path) -> Path:
    store = open_store((tmp_path / "out").as_uri())
    exporters.export(mill.db, mill.store, job.recipe_id, "coco", store, job=provenance(job), settings=settings.load())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["annotations.json"]
    return tmp_path / "out" / "annotations.json"


def test_pycocotools_reads_it_back(mill: Mill, tmp_path: Path) -> None:
    outcomes = mixed(50)
    coco = COCO(str(exported(mill, mill.run(shards(outcomes, 8)), tmp_path)))
    good = [o for o in outcomes if o.result is not None]
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == [o.key for o in good]
    for image_id, outcome in zip(coco.getImgIds(), good, strict=True):
        image = coco.loadImgs([image_id])[0]
        assert (image["width"], image["height"]) == (640, 480)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        x, y, w, h = np.array([a["bbox"] for a in annotations]).reshape(-1, 4).T
        assert np.allclose(np.stack([x, y, x + w, y + h], 1), outcome.result.boxes_xyxy, rtol=0, atol=1e-3)
        assert np.allclose([a["score"] for a in annotations], outcome.result.scores, rtol=0, atol=1e-6)
        assert np.allclose([a["area"] for a in annotations], w * h, rtol=1e-5)
        classes = coco.loadCats([a["category_id"] for a in annotations])
        assert [c["name"] for c in classes] == list(outcome.result.labels)
        assert [c["class_id"] for c in classes] == outcome.result.class_ids.tolist()
        assert all(a["iscrowd"] == 0 for a in annotations)


def test_a_reader_that_takes_it_as_the_truth_finds_its_own_results(mill: Mill, tmp_path: Path) -> None:
    coco = COCO(str(exported(mill, mill.run(shards(mixed(30), 8)), tmp_path)))
    evaluation = COCOeval(coco, coco.loadRes(list(coco.anns.values())), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] > 0.999


def test_pycocotools_reads_masks_back(mill: Mill, tmp_path: Path) -> None:
    outcomes = [failed("f.jpg"), *(found(f"{i}.jpg", masked(i), size=(40, 30)) for i in range(12))]
    coco = COCO(str(exported(mill, mill.run(shards(outcomes, 5), kind="masks"), tmp_path)))
    read = 0
    for image_id, outcome in zip(coco.getImgIds(), outcomes[1:], strict=True):
        result = outcome.result
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        assert len(annotations) == len(result.labels)
        for i, one in enumerate(annotations):
            mask = rle.decode(result.rles[i], (30, 40))
            assert np.array_equal(coco.annToMask(one), mask)
            assert one["area"] == mask.sum() == result.areas[i]
            x, y, w, h = one["bbox"]
            assert np.allclose([x, y, x + w, y + h], result.boxes_xyxy[i], rtol=0, atol=1e-3)
            assert coco.loadCats([one["category_id"]])[0]["name"] == result.labels[i]
            assert one["iscrowd"] == 0
            read += 1
    assert read > 20


def test_masks_taken_as_the_truth_are_found_again(mill: Mill, tmp_path: Path) -> None:
    outcomes = [found(f"{i}.jpg", masked(i), size=(40, 30)) for i in range(12)]
    coco = COCO(str(exported(mill, mill.run(shards(outcomes, 5), kind="masks"), tmp_path)))
    evaluation = COCOeval(coco, coco.loadRes(list(coco.anns.values())), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] > 0.999


def test_ids_are_dense_from_one(mill: Mill, tmp_path: Path) -> None:
    data = json.loads(exported(mill, mill.run(shards(mixed(50), 8)), tmp_path).read_text())
    for name in ("images", "annotations"):
        assert [entry["id"] for entry in data[name]] == list(range(1, len(data[name]) + 1))
    assert [(c["id"], c["name"], c["class_id"]) for c in data["categories"]] == [
        (i + 1, label, i) for i, label in enumerate(LABELS)
    ]


def test_failures_stand_apart_and_are_complete(mill: Mill, tmp_path: Path) -> None:
    job = mill.run([[failed("a.jpg", "too-many-pixels", 'has "too" many, é')]])
    data = json.loads(exported(mill, job, tmp_path).read_text())
    assert data["images"] == []
    assert data["imagemill_failures"] == [
        {
            "key": "a.jpg",
            "uri": "file:///data/pictures/a.jpg",
            "stage": "decode",
            "reason": "too-many-pixels",
            "message": 'has "too" many, é',
        }
    ]


def test_class_ids_of_a_model_without_a_table(mill: Mill, tmp_path: Path) -> None:
    outcomes = [found("a.jpg", detection("zebra", 17)), found("b.jpg", detection("horse", 17))]
    data = json.loads(exported(mill, mill.run(shards(outcomes, 2), labels=()), tmp_path).read_text())
    assert [(c["id"], c["name"], c["class_id"]) for c in data["categories"]] == [(18, "zebra", 17), (19, "horse", 17)]


def test_the_header_says_where_it_comes_from(mill: Mill, tmp_path: Path) -> None:
    info = json.loads(exported(mill, mill.run([]), tmp_path).read_text())["info"]
    assert info["date_created"].startswith(str(info["year"]))
    assert info["version"] == info["imagemill"]["imagemill"]
    assert "labels" not in info["imagemill"]
