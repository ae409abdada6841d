"""The demo's models score on the demo's pictures as their cards say, whichever way those go through the system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo import evaluate, measure_chain
from demo import scenes as rendered
from tests.flow import run, run_json, workers

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "shapes-yolov8.pt"
COUNT = 24
IMGSZ = "320"
CHAIN_COUNT = 40


@pytest.fixture
def laptop(home: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered scenes on canvases of one size, since the frames of a video have one, and their truth."""
    folder = tmp_path_factory.mktemp("scenes")
    script = [sys.executable, "-P", str(ROOT / "demo" / "scenes.py"), str(folder), "--count", str(COUNT), "--seed", "5"]
    subprocess.run(script, check=True)
    pictures = {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())}
    height, width = (max(p.shape[axis] for p in pictures.values()) + 1 & ~1 for axis in (0, 1))
    (folder / "same").mkdir()
    for name, pixels in pictures.items():
        canvas = np.full((height, width, 3), 114, np.uint8)
        canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
        Image.fromarray(canvas).save(folder / "same" / f"{Path(name).stem}.png")
    return folder


def as_video(folder: Path) -> Path:
    """The pictures as a video without loss, one a second."""
    import av

    path = folder / "scenes.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.pix_fmt = "rgb24"
        stream.width, stream.height = Image.open(next((folder / "same").iterdir())).size
        for picture in sorted((folder / "same").iterdir()):
            frame = av.VideoFrame.from_ndarray(np.asarray(Image.open(picture)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def map50(stack: dict[str, str], scenes: Path, out: Path, source: Path, *more: str) -> float:
    """mAP50 of the detector over a dataset whose items, sorted by key, are the scenes in their order."""
    command = ("annotate", str(source), "--model", str(MODEL), "--imgsz", IMGSZ, "--device", "cpu", "--conf", "0.05")
    run(stack, *command, "--quiet", *more, "--out", str(out))
    coco: dict[str, Any] = json.loads((out / "annotations.json").read_text())
    stems = [Path(path).stem for path in sorted((scenes / "same").iterdir())]
    names = {c["id"]: c["name"] for c in coco["categories"]}
    images = sorted(coco["images"], key=lambda image: image["file_name"])
    assert len(images) == COUNT
    stem_of = {image["id"]: stem for image, stem in zip(images, stems, strict=True)}
    truth = {Path(key).stem: objects for key, objects in json.loads((scenes / "truth.json").read_text()).items()}
    found: dict[str, list[Any]] = {stem: [] for stem in stems}
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        found[stem_of[a["image_id"]]].append((names[a["category_id"]], a["score"], [x, y, x + w, y + h]))
    return evaluate.mean_average_precision(found, truth)


def test_every_way_through_the_system_scores_the_same(laptop: dict[str, str], scenes: Path, tmp_path: Path) -> None:
    video = as_video(scenes)
    ways: dict[str, tuple[Path, tuple[str, ...]]] = {
        "single": (scenes / "same", ("--batch", "1")),
        "batched": (scenes / "same", ("--batch", "8", "--force")),
        "sharded": (scenes / "same", ("--batch", "8", "--shard-size", "7", "--force")),
        "video frames": (video, ("--batch", "8")),
    }
    with workers(laptop):
        scores = {name: map50(laptop, scenes, tmp_path / name, source, *more) for name, (source, more) in ways.items()}
    print(scores)
    assert scores["single"] > 0.9
    for name, score in scores.items():
        assert score == pytest.approx(scores["single"], abs=1e-4), name


def test_true_masks_are_what_the_true_boxes_are_around(tmp_path: Path) -> None:
    truth = json.loads(rendered.write_scenes(tmp_path, 6, 5, with_masks=True).read_text())
    for key, things in truth.items():
        masks = measure_chain.read_masks(tmp_path, key)
        assert [list(rendered.tight_box(mask) or ()) for mask in masks] == [thing["box"] for thing in things]
        assert masks[0].shape == np.asarray(Image.open(tmp_path / "images" / key)).shape[:2]


@pytest.mark.slow
def test_masks_and_vectors_of_what_the_detector_found(laptop: dict[str, str], tmp_path: Path) -> None:
    rendered.write_scenes(tmp_path / "scenes", CHAIN_COUNT, 5, with_masks=True)
    figures = measure_chain.measure(tmp_path / "scenes", tmp_path, laptop)
    print(figures)
    assert figures.box_mask_iou > 0.72  # an ellipse that fills the box reaches 0.63
    assert figures.true_box_mask_iou > 0.72
    assert figures.point_mask_iou > 0.68
    assert figures.recall_at_1 > 0.9
    assert figures.knn_accuracy > 0.9
    near = measure_chain.nearest_others(laptop, "vectors")
    key = "scene-000000.jpg#0"
    assert [row["key"] for row in run_json(laptop, "similar", key, "vectors", "-k", "2")] == [key, near[key]]
