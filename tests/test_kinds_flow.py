"""Every kind of job through the console script: the same results whatever the batch, the shards and the workers are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage import shardfile
from storage.objects import open_store
from storage.settings import Settings
from tests import flow
from tests.faults import support
from tests.flow import prepare, run, run_json, workers
from tests.invariants import rows
from tests.workers.models.test_conformance import SMALL, WEIGHTS
from workers import images

COUNT = 4
Stack = dict[str, str]


@pytest.fixture
def fleet(home: Path, postgres_url: str, s3_url: str, broker_url: str) -> Stack:
    urls = {
        "IMAGEMILL_DATABASE_URL": postgres_url,
        "IMAGEMILL_STORE_URL": s3_url,
        "IMAGEMILL_BROKER_URL": broker_url,
    }
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **urls}


def photos(folder: Path, count: int) -> Path:
    """Noisy pictures of two shapes."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    for i in range(count):
        size = (96, 64) if i % 3 else (64, 80)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"photo-{i:03d}.png")
    return folder


def weights(tmp_path: Path, family: str) -> str:
    """A tiny model of a family."""
    folder = tmp_path / family
    folder.mkdir()
    build = WEIGHTS[family]
    assert build is not None
    return str(build(folder))


def params(family: str) -> list[str]:
    """The parameters that make it quick."""
    return [
        word for name, value in SMALL.get(family, {}).items() for word in ("--param", f"{name}={json.dumps(value)}")
    ]


def found(stack: Stack, job_id: int) -> dict[str, Any]:
    """key -> result of a job, with the bytes of what it made."""
    settings = Settings(s3_endpoint_url=stack.get("IMAGEMILL_S3_ENDPOINT_URL", ""))
    store = open_store(flow.store_url(stack), settings)
    shards = rows(flow.database_url(stack), f"SELECT result_key FROM shard WHERE job_id = {job_id}")  # noqa: S608
    keys = [shard.result_key for shard in shards]
    outcomes = [o for key in keys for o in shardfile.filled(store, key, shardfile.read(store, key)[0])]
    assert not [o for o in outcomes if o.failure is not None]
    return {outcome.key: outcome.result for outcome in outcomes}


def assert_same(one: Any, other: Any) -> None:
    """Equal but for the last digits of a float; what was made differs by two grey levels at most."""
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3)
        elif field.name == "data":
            before, after = (images.decode(data, images.Limits()).pixels.astype(int) for data in (a, b))
            assert np.abs(before - after).max() <= 2
        elif field.name not in ("sha256", "nbytes", "rles", "blob"):
            assert a == b, field.name


UNFINISHED = "SELECT id FROM job WHERE finished_at IS NULL"


def test_results_do_not_depend_on_batch_shards_and_workers(fleet: Stack, tmp_path: Path) -> None:
    prepare(fleet)
    source = str(photos(tmp_path / "photos", COUNT))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na house by the sea\n")
    dinov2, sam, sd = (weights(tmp_path, family) for family in ("dinov2", "sam", "diffusion"))
    commands: Mapping[str, tuple[str, ...]] = {
        "detections": ("annotate", source, "--model", "stub"),
        "masks": ("mask", source, "--model", sam, "--boxes-from", "boxes"),
        "embedding": ("embed", source, "--model", dinov2),
        "crops": ("embed", source, "--model", dinov2, "--crops-from", "boxes"),
        "labels": ("classify", source, "--model", dinov2),
        "generate": ("generate", str(prompts), "-n", "2", "--model", sd, "--steps", "3", "--seed", "7"),
        "transform": ("transform", source, "--model", "gaussian", "-n", "2"),
    }
    expected = dict.fromkeys(commands, COUNT) | {"crops": 2 * COUNT, "generate": 6, "transform": 2 * COUNT}
    settings = [("--batch", "1", "--shard-size", "64"), ("--batch", "5", "--shard-size", "3", "--force")]
    results: list[dict[str, dict[str, Any]]] = []
    with ExitStack() as running:
        running.enter_context(workers(fleet, log=tmp_path / "first.log"))
        run(fleet, "annotate", source, "--model", "stub", "--device", "cpu", "--quiet", "--name", "boxes")
        for number, how in enumerate(settings):
            if number:
                running.enter_context(workers(fleet, log=tmp_path / "second.log"))
            ids = {
                name: run_json(fleet, *command, "--device", "cpu", "--detach", *how)["id"]
                for name, command in commands.items()
            }
            flow.wait_until(lambda: not rows(flow.database_url(fleet), UNFINISHED), "the jobs' end", 200)
            results.append(
                {name: found(fleet, job_id) for name, job_id in ids.items() if name != "detections" or number}
            )
    for job_id in ids.values():
        run(fleet, "verify", str(job_id))
    for name in commands:
        one, other = (result.get(name) for result in results)
        if one is None:
            continue
        assert len(one) == expected[name], name
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key])


@pytest.fixture
def laptop(home: Path, tmp_path: Path) -> Stack:
    return {
        **support.injected(support.laptop(), "count-encodes"),
        "INJECT_LEDGER": str(tmp_path / "ledger"),
        "IMAGEMILL_STALL_SECONDS": "300",
    }


def encodes(stack: Stack) -> int:
    """Images encoded so far, over all workers."""
    path = Path(stack["INJECT_LEDGER"])
    return sum(int(line.split()[2]) for line in path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_several_mask_jobs_encode_each_image_once(laptop: Stack, tmp_path: Path, count: int) -> None:
    """Boxes of every label, then of one label, then points from a file: one encoding an image for all three."""
    source = photos(tmp_path / "photos", count)
    sam = weights(tmp_path, "sam")
    base = ("--device", "cpu", "--quiet")
    run(laptop, "annotate", str(source), "--model", "stub", *base, "--param", "objects=5")
    mask = ("mask", str(source), "--model", sam, *base)
    run(laptop, *mask, "--boxes-from", "1")
    assert encodes(laptop) == count
    run(laptop, *mask, "--boxes-from", "1", "--label", "dog")
    points = tmp_path / "points.jsonl"
    points.write_text(
        "".join(json.dumps({"key": f"photo-{i:03d}.png", "points": [[9, 9]]}) + "\n" for i in range(count))
    )
    run(laptop, *mask, "--prompts", str(points))
    assert encodes(laptop) == count
    masks = rows(
        flow.database_url(laptop), "SELECT job_id, sum(objects) AS n FROM item GROUP BY job_id ORDER BY job_id"
    )
    assert [row.n for row in masks][1:2] == [5 * count]
    assert masks[3].n == count


CHAIN = """
steps:
  - {{name: boxes, do: annotate, source: "{source}", model: "{detector}", device: cpu, params: {{imgsz: 320}}}}
  - {{name: masks, do: mask, from: boxes, as: boxes, model: "{sam}", device: cpu}}
  - {{name: stars, do: mask, from: boxes, as: boxes, label: star, model: "{sam}", device: cpu}}
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_boxes_become_masks_over_five_hundred_scenes(laptop: Stack, tmp_path: Path) -> None:
    """A detector, then masks of all its boxes and of one label's, as one chain: each scene is encoded once."""
    root = Path(__file__).resolve().parent.parent
    script = [sys.executable, "-P", str(root / "demo" / "scenes.py"), str(tmp_path / "scenes"), "--count", "500"]
    subprocess.run([*script, "--seed", "21"], check=True)
    source, detector = tmp_path / "scenes" / "images", root / "demo" / "shapes-yolov8.pt"
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN.format(source=source, detector=detector, sam=weights(tmp_path, "sam")))
    steps = json.loads(run(laptop, "run", str(path), "--json", timeout_s=1100).stdout)
    assert [(step["state"], step["results"]) for step in steps] == [("done", 500)] * 3
    totals = "SELECT job_id, sum(objects) AS n FROM item GROUP BY job_id ORDER BY job_id"
    boxes, masks, stars = (row.n for row in rows(flow.database_url(laptop), totals))
    assert boxes == masks > stars > 0
    assert encodes(laptop) == 500
    times = (
        "SELECT job_id, min(claimed_at) AS began, max(finished_at) AS ended FROM shard GROUP BY job_id ORDER BY job_id"
    )
    first, second, _ = rows(flow.database_url(laptop), times)
    assert second.began < first.ended, "masks waited for all boxes"
    for step in steps:
        run(laptop, "verify", str(step["id"]))
    print(f"500 scenes, {boxes} boxes, {masks} masks, {stars} of one label, {encodes(laptop)} encodings")
