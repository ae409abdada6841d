"""What lies between a network and TensorRT: profiles, cutting, widening, building; neither is real, nor is the GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.objects import open_store
from tests.workers import test_on_gpu
from tests.workers import test_runtimes as shared
from tests.workers.models import test_conformance as conformance
from tests.workers.models import test_enginefile
from tests.workers.pretended import pretended_gpu
from tests.workers.pretended_tensorrt import Said, said
from workers import devices, engines, onnxgraph, runtimes, tensorrtengine
from workers.models import Item, Site, enginefile
from workers.runtimes import Network, NotRunnable, Session

__all__ = ["pretended_gpu", "said"]


@pytest.fixture
def files(tmp_path: Path) -> shared.Kept:
    """With the graph exported already, which no job does on a GPU."""
    folder = tmp_path / "engines"
    folder.mkdir()
    kept = shared.Kept(folder)
    onnxgraph.exported(net(), kept)
    return kept


def net() -> Network:
    return shared.network(shared.copied)


def opened(files: shared.Kept) -> Session:
    return runtimes.open_network("tensorrt", net(), "cuda", "fp32", files)


def given(batch: int, height: int = 8, width: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(batch)
    return {"images": torch.rand(batch, 3, height, width), "bias": torch.rand(batch)}


def agrees(session: Session, inputs: dict[str, torch.Tensor]) -> None:
    expected = shared.two()(**inputs)
    found = session(**inputs)
    for one, right in zip((found["out"], found["best"]), expected, strict=True):
        assert one.device.type == "cuda"
        assert torch.allclose(one.cpu().double(), right.double(), atol=1e-5)


def test_batches_within_the_profile_and_beyond(said: Said, pretended_gpu: Any, files: shared.Kept) -> None:
    with pretended_gpu():
        session = opened(files)
        said.ran.clear()
        for batch in (1, 8, 32, 70):
            agrees(session, given(batch))
        assert [shapes["bias"][0] for shapes in said.ran] == [1, 8, 32, 32, 32, 6]
        agrees(
            session, {"images": given(4)["images"].contiguous(memory_format=torch.channels_last), "bias": torch.rand(4)}
        )
    assert said.built == 1
    assert said.inside == 0


def test_a_larger_side_has_a_wider_engine_built_once(said: Said, pretended_gpu: Any, files: shared.Kept) -> None:
    with pretended_gpu():
        session = opened(files)
        for sides in ((8, 8), (11, 9), (16, 16), (8, 6)):
            agrees(session, given(3, *sides))
        assert said.built == 2
        again = opened(files)
        agrees(again, given(3, 11, 9))
    assert said.built == 2, "both are kept"
    assert len(said.streams) == 1, "all engines run on one"


def test_what_was_measured_in_a_build_helps_the_next(
    said: Said, pretended_gpu: Any, files: shared.Kept, tmp_path: Path
) -> None:
    with pretended_gpu():
        session = opened(files)
        session(**given(1, 9, 9))
    (timing,) = (tmp_path / "cache" / "tensorrt").glob("*.timing")
    assert timing.read_bytes() == b"timedtimed"


def test_what_cannot_be_built_says_why(said: Said, pretended_gpu: Any, files: shared.Kept) -> None:
    said.cannot = "a layer\nis not known"
    with (
        pretended_gpu(),
        pytest.raises(NotRunnable, match=r"cannot build an engine for bias 1 8 32; .*: a layer is not"),
    ):
        opened(files)
    assert said.inside == 0


def test_an_engine_that_computes_something_else_is_refused(said: Said, pretended_gpu: Any, files: shared.Kept) -> None:
    said.off = 0.1
    with pretended_gpu(), pytest.raises(NotRunnable, match="built for another runtime differs by up to"):
        opened(files)


def test_room_for_a_context_is_looked_for_twice(said: Said, pretended_gpu: Any, files: shared.Kept) -> None:
    said.no_room = 1
    with pretended_gpu():
        agrees(opened(files), given(2))
        said.no_room = 2
        with pytest.raises(
            MemoryError, match=r"out of memory: TensorRT cannot make room for .*two-fp32\.engine: no memory"
        ):
            opened(files)


def test_an_engine_of_elsewhere_is_not_loaded(said: Said, pretended_gpu: Any) -> None:
    wrong = pytest.raises(NotRunnable, match=r"cannot load the engine x\.engine: magic tag does not match")
    with pretended_gpu(), tensorrtengine.context(), wrong:
        tensorrtengine.Engine("x.engine", b"\0\0\0\2{]")


def test_a_file_with_an_engine_of_four_at_once(said: Said, pretended_gpu: Any, tmp_path: Path) -> None:
    shapes = {"images": [[4, 3, 64, 64]] * 3}
    about = json.dumps({"shapes": shapes, "tf32": False}).encode()
    plan = len(about).to_bytes(4, "big") + about + test_enginefile.graph()
    path = test_enginefile.written(tmp_path / "engine", plan=plan)
    on_cpu = test_enginefile.load(test_enginefile.written(tmp_path / "onnx"), conf=0.5)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(6)]
    expected = on_cpu.infer([on_cpu.prepare(picture, Item("a")) for picture in pictures])
    files = shared.Kept(tmp_path)
    with pretended_gpu():
        site = Site("cuda", lambda network: runtimes.open_network("tensorrt", network, "cuda", "fp32", files))
        model = enginefile.load(enginefile.CARDS[0], enginefile.Params(conf=0.5), path, site)
        said.ran.clear()
        found = model.infer([model.prepare(picture, Item("a")) for picture in pictures])
    assert [shapes["images"][0] for shapes in said.ran] == [4, 4]
    for one, right in zip(found, expected, strict=True):
        assert one.labels == right.labels
        assert np.allclose(one.boxes_xyxy, right.boxes_xyxy, atol=1e-4)


def test_a_whole_job(said: Said, pretended_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = conformance.WEIGHTS["yolo"](tmp_path)  # type: ignore[misc]
    dataset = test_on_gpu.dataset(tmp_path / "pictures")
    asked = {"kind": "detections", "model": str(weights), "params": {"imgsz": 64}, "dataset": dataset}
    on_cpu = test_on_gpu.job(tmp_path / "cpu", "cpu", **asked)
    monkeypatch.setattr(devices, "_gpus", lambda: [devices.Device("GPU-1", "none", 24)])
    with pretended_gpu():
        found = test_on_gpu.job(tmp_path / "gpu", "gpu", runtime="tensorrt", **asked)
    store = open_store((tmp_path / "gpu" / "store").as_uri())
    assert sorted(entry.about["file"] for entry in engines.entries(store)) == ["onnx", "tensorrt"]
    assert said.ran
    assert said.inside == 0
    assert len(found) == 30
    assert all(conformance.same(a, b, 1e-3) for a, b in zip(found, on_cpu, strict=True))
