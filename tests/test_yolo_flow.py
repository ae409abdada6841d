"""A trained YOLO through both stacks: equal rows, and the boxes of ultralytics' own predict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.flow import check_all, prepare, run_json, workers
from tests.flow import run_script as run

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "shapes-yolov8.pt"
FLEET_VARIABLES = ("IMAGEMILL_DATABASE_URL", "IMAGEMILL_STORE_URL", "IMAGEMILL_BROKER_URL")


def scenes(folder: Path, count: int) -> Path:
    """So many rendered scenes."""
    script = [
        sys.executable,
        "-P",
        str(ROOT / "demo" / "scenes.py"),
        str(folder),
        "--count",
        str(count),
        "--seed",
        "11",
    ]
    subprocess.run(script, check=True)
    return folder / "images"


def boxes(stack: dict[str, str], folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """key -> (boxes xyxy, scores, labels) of the newest job, through the COCO export."""
    run(stack, "export", "--format", "coco", "--to", str(folder))
    coco: dict[str, Any] = json.loads((folder / "annotations.json").read_text())
    names = {c["id"]: c["name"] for c in coco["categories"]}
    found: dict[int, list[Any]] = {image["id"]: [] for image in coco["images"]}
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        found[a["image_id"]].append(((x, y, x + w, y + h), a["score"], names[a["category_id"]]))
    return {
        image["file_name"]: (
            np.array([f[0] for f in found[image["id"]]], np.float64).reshape(-1, 4),
            np.array([f[1] for f in found[image["id"]]], np.float64),
            [f[2] for f in found[image["id"]]],
        )
        for image in coco["images"]
    }


@pytest.mark.parametrize("count", [10, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_both_stacks_agree_with_each_other_and_with_ultralytics(
    home: Path, postgres_url: str, s3_url: str, broker_url: str, count: int, tmp_path: Path
) -> None:
    source = scenes(tmp_path / "scenes", count)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    laptop = {**os.environ, "PATH": path}
    fleet = {**laptop, **dict(zip(FLEET_VARIABLES, (postgres_url, s3_url, broker_url), strict=True))}
    command = ("annotate", str(source), "--model", str(MODEL), "--imgsz", "320", "--device", "cpu")
    prepare(fleet)
    with workers(fleet, log=tmp_path / "worker.log"):
        theirs_status = run_json(fleet, *command)
    mine_status = run_json(laptop, *command)
    keys = [f"scene-{i:06d}.jpg" for i in range(count)]
    for stack, status in ((laptop, mine_status), (fleet, theirs_status)):
        assert (status["planned"], status["results"], status["failures"]) == (count, count, 0)
        check_all(stack, keys)
    mine, theirs = boxes(laptop, tmp_path / "mine"), boxes(fleet, tmp_path / "theirs")
    assert mine.keys() == theirs.keys() == set(keys)
    for key in keys:
        _assert_close(mine[key], theirs[key], pixels=0.01, score=1e-5)
    assert index_rows(laptop) == index_rows(fleet)
    _assert_like_ultralytics(source, mine)


def index_rows(stack: dict[str, str]) -> list[Any]:
    """The index's rows; scores to five digits, since a forward pass in another batch differs in the seventh."""
    lines = [json.loads(line) for line in run(stack, "results", "--limit", "0", "--json").stdout.splitlines()]
    return [{**line, "top_score": line["top_score"] and round(line["top_score"], 4)} for line in lines]


def _assert_like_ultralytics(scenes: Path, mine: dict[str, Any]) -> None:
    from ultralytics import YOLO

    model = YOLO(str(MODEL))
    for key in sorted(mine):
        result = model.predict(str(scenes / key), imgsz=320, verbose=False, device="cpu")[0]
        theirs = (
            result.boxes.xyxy.numpy().astype(np.float64),
            result.boxes.conf.numpy().astype(np.float64),
            [result.names[int(c)] for c in result.boxes.cls.tolist()],
        )
        _assert_close(mine[key], theirs, pixels=0.5, score=0.001)


def _assert_close(one: Any, other: Any, *, pixels: float, score: float) -> None:
    assert sorted(one[2]) == sorted(other[2])
    order, order2 = np.argsort(-one[1], kind="stable"), np.argsort(-other[1], kind="stable")
    assert np.abs(one[1][order] - other[1][order2]).max(initial=0) <= score
    assert np.abs(one[0][order] - other[0][order2]).max(initial=0) <= pixels
