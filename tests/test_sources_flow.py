"""Whole jobs over tars and videos through the console script: every item is a row, and a second run does nothing."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage import objects
from storage.settings import Settings
from tests import flow
from tests.clips import clip, decoded
from tests.flow import prepare, run, run_json, workers
from tests.invariants import check
from workers.models import stub

Stack = dict[str, str]


def annotate(stack: Stack, dataset: object) -> dict[str, Any]:
    arguments = ("annotate", str(dataset), "--model", "stub", "--shard-size", "16", "--device", "cpu")
    return dict(run_json(stack, *arguments))


def scores(stack: Stack) -> dict[str, float]:
    """Key -> highest score, of the job that was last; the stub draws it from all pixels."""
    lines = run(stack, "results", "--limit", "0", "--json").stdout.splitlines()
    return {row["key"]: row["top_score"] for row in map(json.loads, lines)}


def best(pixels: Any) -> Any:
    return pytest.approx(float(stub.expected(np.ascontiguousarray(pixels)).scores.max()), abs=1e-6)


def tars(folder: Path) -> dict[str, Any]:
    """Three tars of pictures with a JSON each, one picture broken; returns what the JSON leaves of the others."""
    folder.mkdir()
    found = {}
    for number in range(3):
        with tarfile.open(folder / f"train-{number:04d}.tar", "w") as tar:
            for i in range(20):
                body = io.BytesIO()
                Image.fromarray(np.full((48, 64, 3), (number * 20 + i) * 4, np.uint8)).save(body, "PNG")
                data = body.getvalue() if (number, i) != (1, 7) else b"broken"
                for name, part in ((f"{i:04d}.json", b'{"crop": [0, 0, 32, 16]}'), (f"{i:04d}.png", data)):
                    member = tarfile.TarInfo(name)
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
                found[f"train-{number:04d}/{i:04d}.png"] = np.full((16, 32, 3), (number * 20 + i) * 4, np.uint8)
    del found["train-0001/0007.png"]
    return found


def frames(path: Path) -> dict[str, Any]:
    """Every second frame of a video, by its key."""
    ticks_a_second = 12_800
    chosen = list(decoded(path).items())[::2]
    return {f"{path.name}/{pts / ticks_a_second:010.3f}.{pts}": pixels for pts, pixels in chosen}


def placed(stack: Stack, request: pytest.FixtureRequest, paths: list[Path]) -> str:
    """The folder, or on a fleet the S3 prefix that the files were put under."""
    if not flow.is_fleet(stack):
        return str(paths[0].parent)
    url = str(request.getfixturevalue("s3_url"))
    for path in paths:
        objects.open_store(url).put_file(path.name, path)
    return url


@flow.by_default("fleet")
def test_tars_and_a_video(stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pictures = tars(tmp_path / "data")
    clip(tmp_path / "data" / "clip.mp4", 130, size=(128, 96))
    shots = frames(tmp_path / "data" / "clip.mp4")
    where = placed(stack, request, sorted((tmp_path / "data").iterdir()))
    prepare(stack)
    with workers(stack, log=tmp_path / "worker.log") if flow.is_fleet(stack) else contextlib.nullcontext():
        video = f"video:{where}/clip.mp4?every=2"
        first = annotate(stack, video)
        assert (first["state"], first["planned"], first["results"], first["failures"]) == ("done", 65, 65, 0)
        assert scores(stack) == {key: best(pixels) for key, pixels in shots.items()}
        archive = f"{where}/train-{{0000..0002}}.tar"
        first = annotate(stack, archive)
        assert (first["planned"], first["results"], first["failures"]) == (60, 59, 1)
        assert scores(stack) == {key: best(pixels) for key, pixels in pictures.items()}
        for dataset, count in ((video, 65), (archive, 60)):
            again = annotate(stack, dataset)
            assert (again["planned"], again["fresh"]) == (0, count)
    settings = Settings(s3_endpoint_url=stack.get("IMAGEMILL_S3_ENDPOINT_URL", ""))
    keys = {video: list(shots), archive: [*pictures, "train-0001/0007.png"]}
    check(flow.database_url(stack), flow.store_url(stack), settings, keys=keys)
