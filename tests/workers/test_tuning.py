"""Tuning: the fastest way that agrees with fp32 torch is taken, an inaccurate one is not; a job keeps its choice."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.spec import AUTO, JobSpec
from storage.errors import ItemFailed, Misconfigured
from storage.results import detections
from tests import flow
from workers import devices, runtimes, tuning
from workers.batches import BatchSize
from workers.loaded import Loaded
from workers.models import Prepared
from workers.tuning import Measured, Tuning

DEMO = Path(__file__).resolve().parents[2] / "demo"
SPEC = JobSpec(
    dataset="/d", kind="detections", family="yolo", weights_sha256="0", params={}, model="m", runtime=AUTO,
    precision=AUTO, batch=0,
)  # fmt: skip


class Timed:
    """A detector that takes so long for each picture, and moves every box by so much; its scores are one number."""

    def __init__(
        self, each_s: float, moved: float = 0.0, raises: Exception | None = None, boxes: int = 2, score: float = 0.9
    ) -> None:
        self.each_s, self.moved, self.raises, self.boxes, self.score = each_s, moved, raises, boxes, score
        self.loaded, self.conf = 0, 0.25

    def infer(self, batch: Sequence[Prepared]) -> list[Any]:
        time.sleep(self.each_s * len(batch))
        if self.raises is not None:
            raise self.raises
        return [self._one(item.data) for item in batch]

    def _one(self, seed: int) -> detections.Result:
        corners = np.random.default_rng(seed).uniform(0, 100, (self.boxes, 2))
        boxes = np.concatenate([corners, corners + 50], 1).astype(np.float32) + np.float32(self.moved)
        n = self.boxes if self.score > self.conf else 0
        scores = np.full(n, self.score, np.float32)
        return detections.Result(boxes[:n], scores, np.zeros(n, np.int32), ("dog",) * n)

    def close(self) -> None:
        """One use of it less."""
        self.loaded -= 1


def tuned(ways: dict[tuple[str, str], Timed], spec: JobSpec = SPEC, budget_s: float = 60) -> tuple[Any, list[Measured]]:
    """Tune with a model for each (runtime, precision); what is not named cannot be loaded."""

    def load(wanted: JobSpec) -> Loaded:
        way = ways.get((wanted.runtime, wanted.precision))
        if way is None:
            raise Misconfigured(f"the runtime {wanted.runtime} is not installed here")
        way.loaded += 1
        way.conf = wanted.params.get("conf", 0.0)
        return Loaded("key", way, BatchSize(wanted.batch), wanted.runtime, True)  # type: ignore[arg-type]

    work = Tuning(spec, "cpu", load, lambda measured: None, budget_s)
    work.refer(ways["torch", "fp32"], [Prepared("g", seed, 0) for seed in range(12)])  # type: ignore[arg-type]
    best = work.run()
    assert [way.loaded for way in ways.values()] == [0] * len(ways), "every model is closed, once"
    return best, work.found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short measurements, and a CPU that computes in bf16, whichever this is."""
    monkeypatch.setattr(tuning, "_MEASURE_S", 0.05)
    monkeypatch.setattr(devices, "cpuinfo", lambda name: "")


def test_the_fastest_that_agrees_is_taken() -> None:
    best, found = tuned(
        {
            ("torch", "fp32"): Timed(0.004),
            ("torch", "bf16"): Timed(0.002),
            ("openvino", "fp32"): Timed(0.0005, moved=0.2),
            ("openvino", "bf16"): Timed(0.0001, moved=1),
        }
    )
    assert (best.runtime, best.precision) == ("openvino", "fp32")
    refused = {(one.runtime, one.precision): one.refused for one in found if one.refused}
    assert "agree with fp32 torch by 0.9" in refused["openvino", "bf16"]
    assert "not installed" in refused["onnx", "fp32"]
    taken = [one for one in found if not one.refused]
    assert max(taken, key=lambda one: one.rate) == next(
        one for one in taken if (one.runtime, one.precision, one.batch) == (best.runtime, best.precision, best.batch)
    )
    assert best.why.startswith("tuned: ")


@pytest.mark.parametrize("slow_call", [0, 1, 2])
def test_one_slow_call_of_the_reference_is_not_its_speed(slow_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a library is imported with the first picture of many boxes, or the machine stands still."""
    clock, calls, reference = [0.0], [0], Timed(0)
    monkeypatch.setattr(tuning, "time", types.SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic))
    infer = reference.infer

    def sometimes(batch: Sequence[Prepared]) -> list[Any]:
        clock[0] += 0.05 * len(batch) + (3 if calls[0] == slow_call else 0)
        calls[0] += 1
        return infer(batch)

    monkeypatch.setattr(reference, "infer", sometimes)
    work = Tuning(SPEC, "cpu", lambda wanted: None, lambda measured: None, 60)  # type: ignore[arg-type, return-value]
    work.refer(reference, [Prepared("g", seed, 0) for seed in range(24)])  # type: ignore[arg-type]
    assert work.seconds_each == pytest.approx(0.05)
    assert len(work._pictures) == 24


@pytest.mark.parametrize(
    "broken",
    [
        Timed(0.0, raises=RuntimeError("no kernel")),
        Timed(0.0, raises=MemoryError()),
        Timed(0.0, raises=ItemFailed("infer", "not-finite", "NaN")),
        Timed(0.0, boxes=0),
        Timed(0.0, boxes=5),
    ],
)
def test_a_way_that_fails_or_finds_other_things_is_refused(broken: Timed) -> None:
    best, _ = tuned({("torch", "fp32"): Timed(0.002), ("openvino", "fp32"): broken})
    assert (best.runtime, best.precision) == ("torch", "fp32")


def test_where_nothing_is_found_less_precision_has_no_evidence() -> None:
    ways = {("torch", "fp32"): Timed(0.004, boxes=0), ("torch", "bf16"): Timed(0.0001, boxes=0)}
    assert tuned(ways)[0].precision == "fp32"
    best, _ = tuned({**ways, ("openvino", "fp32"): Timed(0.0005, boxes=0)})
    assert (best.runtime, best.precision) == ("openvino", "fp32")


@pytest.mark.parametrize(("moved", "precision"), [(0.1, "bf16"), (1.0, "fp32")])
def test_where_nothing_is_found_less_sure_boxes_are_the_evidence(moved: float, precision: str) -> None:
    spec = dataclasses.replace(SPEC, params={"conf": 0.25})
    ways = {("torch", "fp32"): Timed(0.004, score=0.15), ("torch", "bf16"): Timed(0.0005, moved, score=0.15)}
    best, found = tuned(ways, spec)
    assert best.precision == precision
    assert all(one.agreement is not None for one in found if one.precision == "bf16" and one.rate)


def test_what_is_found_at_the_jobs_confidence_is_not_asked_again() -> None:
    """What a model is less sure of differs more; it must not speak against a way that gives the job's own results."""
    spec = dataclasses.replace(SPEC, params={"conf": 0.25})
    ways = {("torch", "fp32"): Timed(0.004), ("torch", "bf16"): Timed(0.0005)}
    tuned(ways, spec)
    assert [way.conf for way in ways.values()] == [0.25, 0.25]


class Disturbed(Timed):
    """On a machine that others slow down more and more."""

    since: float | None = None

    def infer(self, batch: Sequence[Prepared]) -> list[Any]:
        Disturbed.since = Disturbed.since or time.perf_counter()
        time.sleep(20 * (time.perf_counter() - Disturbed.since) * self.each_s * len(batch))
        return super().infer(batch)


def test_what_slows_the_machine_meanwhile_favours_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Disturbed, "since", None)
    ways = {("torch", "fp32"): Timed(0.02), ("onnx", "fp32"): Disturbed(0.001), ("openvino", "fp32"): Disturbed(0.0007)}
    best, found = tuned(ways)
    assert best.runtime == "openvino"
    tried = [one.runtime for one in found if not one.refused]
    assert tried[:2] == ["onnx", "openvino"], "the slower one has the quieter moment"


class Cached(Timed):
    """Takes thrice as long for each picture once there are too many for the caches."""

    def infer(self, batch: Sequence[Prepared]) -> list[Any]:
        time.sleep(2 * self.each_s * len(batch) if len(batch) > 4 else 0)
        return super().infer(batch)


class Slow(Timed):
    """Takes long for each batch, however small."""

    def infer(self, batch: Sequence[Prepared]) -> list[Any]:
        time.sleep(0.02)
        return super().infer(batch)


def test_the_fastest_batch_is_taken() -> None:
    best, found = tuned({("torch", "fp32"): Timed(0.004), ("onnx", "fp32"): Cached(0.001)})
    assert (best.runtime, best.batch) == ("onnx", 4)
    assert {one.batch for one in found if one.runtime == "onnx"} == {4, 8, 16}
    best, _ = tuned({("torch", "fp32"): Timed(0.004), ("openvino", "fp32"): Slow(0.0005)})
    assert (best.runtime, best.batch) == ("openvino", 16)


class Counting(Timed):
    """Counts the pictures it computes."""

    pictures = 0

    def infer(self, batch: Sequence[Prepared]) -> list[Any]:
        Counting.pictures += len(batch)
        return super().infer(batch)


def test_no_longer_is_measured_than_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch to warm up and one to time, when that one alone takes long enough."""
    monkeypatch.setattr(Counting, "pictures", 0)
    ways = {("torch", "fp32"): Timed(0.004), ("onnx", "fp32"): Counting(2 * tuning._MEASURE_S / 8)}
    tuned(ways, dataclasses.replace(SPEC, runtime="onnx", batch=8))
    assert Counting.pictures == 16


def test_what_the_user_gave_is_kept() -> None:
    ways = {("torch", "fp32"): Timed(0.004), ("torch", "bf16"): Timed(0.001), ("openvino", "fp32"): Timed(0.0002)}
    best, found = tuned(ways, dataclasses.replace(SPEC, runtime="torch"))
    assert (best.runtime, best.precision) == ("torch", "bf16")
    assert {one.runtime for one in found} == {"torch"}
    best, found = tuned(ways, dataclasses.replace(SPEC, precision="fp32", batch=4))
    assert (best.runtime, best.precision, best.batch) == ("openvino", "fp32", 4)
    assert {(one.precision, one.batch) for one in found} == {("fp32", 4)}


def test_the_time_is_limited() -> None:
    ways = {("torch", "fp32"): Timed(0.002), ("torch", "bf16"): Timed(0.001), ("openvino", "fp32"): Timed(0.0001)}
    best, found = tuned(ways, budget_s=0)
    assert (best.runtime, best.precision) == ("torch", "fp32")
    assert all("no time" in one.refused for one in found if (one.runtime, one.precision) != tuning.REFERENCE)


def test_what_fp32_torch_takes_is_of_that_time() -> None:
    ways = {("torch", "fp32"): Timed(0.05), ("openvino", "fp32"): Timed(0.0001)}
    best, found = tuned(ways, budget_s=0.4)  # its twelve pictures take longer than that
    assert (best.runtime, best.precision) == tuning.REFERENCE
    assert any("no time" in one.refused for one in found if one.runtime == "openvino")


@pytest.mark.parametrize("given", [{"runtime": "onnx"}, {"precision": "bf16"}, {}, {"batch": 3}])
def test_without_measuring_open_questions_have_plain_answers(given: dict[str, Any]) -> None:
    found = tuning.plain(dataclasses.replace(SPEC, **given), "cpu")
    assert not tuning.open_questions(found)
    expected: dict[str, Any] = {"runtime": "torch", "precision": "fp32", "batch": 8} | given
    assert {name: getattr(found, name) for name in expected} == expected


def test_slow_precisions_are_not_measured_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpuinfo", lambda name: "fpu avx2")
    assert {precision for _, precision in tuning.candidates(SPEC, "cpu")} == {"fp32"}
    asked = tuning.candidates(dataclasses.replace(SPEC, precision="bf16"), "cpu")
    assert ("torch", "bf16") in asked


# ------------------------------------------------------------------------------------------------ whole flows


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """240 rendered scenes that the demo's detector knows."""
    monkeypatch.syspath_prepend(str(DEMO))
    import scenes as rendered

    rendered.write_scenes(tmp_path / "scenes", 40, 3, tmp_path / "scenes" / "truth.json")
    for picture in sorted((tmp_path / "scenes" / "images").glob("*.jpg")):
        for copy in range(5):
            (picture.parent / f"{copy}-{picture.name}").write_bytes(picture.read_bytes())
    sys.modules.pop("scenes", None)
    return tmp_path / "scenes" / "images"


@pytest.mark.parametrize("stack", ["laptop"], indirect=True)
def test_a_long_job_is_tuned_once_and_says_so(stack: dict[str, str], scenes: Path) -> None:
    stack["IMAGEMILL_TUNE_SECONDS"] = "0.01"  # so that a job of half a second is long
    command = ("annotate", str(scenes), "--model", str(DEMO / "shapes-yolov8.pt"), "--device", "cpu")
    # Small pictures, and nothing to be exported first; `tune` is tested with every runtime.
    command += ("--runtime", "torch", "--imgsz", "64")
    status = flow.run_json(stack, *command, "--shard-size", "64")
    assert (status["results"], status["failures"]) == (240, 0)
    (choice,) = status["choices"].values()
    assert choice["why"].startswith("tuned: ")
    assert "(tuned: " in flow.run(stack, "status").stdout
    told = provenance(stack, status["id"])
    assert len(told) == 4
    assert {(one["runtime"], one["precision"], one["batch"]) for one in told} == {
        (choice["runtime"], choice["precision"], choice["batch"])
    }
    exact = flow.run_json(stack, *command[:-4], "--force", "--exact", "--imgsz", "64")
    assert {(one["runtime"], one["precision"]) for one in exact["choices"].values()} == {("torch", "fp32")}
    assert {(one["runtime"], one["precision"]) for one in provenance(stack, exact["id"])} == {("torch", "fp32")}
    flow.check_all(stack, [path.name for path in scenes.iterdir()])


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["laptop"], indirect=True)
def test_tune_is_kept_for_later_jobs(stack: dict[str, str], scenes: Path) -> None:
    model = str(DEMO / "shapes-yolov8.pt")
    refused = flow.run(stack, "tune", model, code=2)
    assert "name a dataset: SOURCE" in refused.stderr
    told = flow.run_json(stack, "tune", model, str(scenes), "--param", "imgsz=64", timeout_s=400)
    ways = {(one["runtime"], one["precision"]) for one in told["measured"]}
    assert {("torch", "fp32"), ("onnx", "fp32"), ("openvino", "fp32")} <= ways
    status = flow.run_json(stack, "annotate", str(scenes), "--model", model, "--device", "cpu", "--imgsz", "64")
    assert list(status["choices"].values()) == [told["chosen"]]


@pytest.mark.parametrize("stack", ["laptop"], indirect=True)
def test_what_cannot_be_tuned_is_one_line(stack: dict[str, str], scenes: Path) -> None:
    assert "nothing to tune" in flow.run(stack, "tune", "stub", str(scenes), code=2).stderr
    assert "cannot be compared" in flow.run(stack, "tune", "sobel", str(scenes), code=2).stderr


def provenance(stack: dict[str, str], job: int) -> list[dict[str, Any]]:
    """What is written beside the results of each shard of a job."""
    import pyarrow.parquet as pq

    found = sorted((Path(stack["IMAGEMILL_HOME"]) / "store" / "jobs" / str(job)).rglob("a*/*/items.parquet"))
    return [json.loads(pq.read_schema(path).metadata[b"imagemill"]) for path in found]


def test_a_runtime_that_takes_long_to_start_is_tried_where_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.get("onnx"), "START_S", 60, raising=False)
    ways = {("torch", "fp32"): Timed(0.004), ("onnx", "fp32"): Timed(0.0005)}
    best, found = tuned(ways, budget_s=30)
    assert best.runtime == "torch"
    assert {one.refused for one in found if one.runtime == "onnx"} == {"no time was left to measure it"}
    assert tuned(ways, budget_s=300)[0].runtime == "onnx"
