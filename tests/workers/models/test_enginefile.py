"""An engine file is read, named and laid out; TensorRT itself, which needs a GPU, is not run here.

The engine in these files is an ONNX graph, which the tests open where a worker opens TensorRT: all but that is real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from storage.errors import BadInput
from workers import enginemeta, models, onnxgraph, pixels, runtimes, submit, tensorrtengine
from workers.models import Item, Site, enginefile, onnxfile
from workers.runtimes import Network, NotRunnable, Session
from workers.runtimes import torch as torch_runtime

LABELS = ("cat", "dog", "cow")
SAID: dict[str, Any] = {"task": "detect", "stride": 32, "imgsz": [64, 64], "names": dict(enumerate(LABELS))}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def graph(rows: int = 4 + len(LABELS), *, columns: int = 0) -> bytes:
    """An ONNX graph that gives each picture the same eight boxes, shifted by its brightness."""
    boxes = np.random.default_rng(0).uniform(0.3, 1, (1, (columns and 8) or rows, columns or 8)).astype(np.float32)
    place = (slice(None), slice(None), slice(4)) if columns else (slice(None), slice(4))
    boxes[place] *= 40
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Squeeze", ["mean", "axis"], ["bright"]),
        helper.make_node("Mul", ["bright", "little"], ["shift"]),
        helper.make_node("Add", ["boxes", "shift"], ["output0"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, "h", "w"])
    out = helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["n", *boxes.shape[1:]])
    weights = [
        helper.make_tensor("axis", TensorProto.INT64, [1], [3]),
        helper.make_tensor("little", TensorProto.FLOAT, [], [0.01]),
        helper.make_tensor("boxes", TensorProto.FLOAT, boxes.shape, boxes.flatten().tolist()),
    ]
    made = helper.make_graph(nodes, "g", [images], [out], weights)
    return onnx.helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def written(folder: Path, said: dict[str, Any] | None = None, plan: bytes | None = None) -> Path:
    """A file as ultralytics writes it; without metadata where `said` is {}."""
    text = json.dumps(SAID if said is None else said).encode()
    head = b"" if said == {} else len(text).to_bytes(4, "little") + text
    folder.mkdir(exist_ok=True)
    path = folder / "detector.engine"
    path.write_bytes(head + (graph() if plan is None else plan))
    return path


def load(path: Path, **params: Any) -> Any:
    """The detector, its engine opened by ONNX Runtime."""

    def open_network(network: Network) -> Session:
        assert network.engine is not None
        plain = network.engine.with_suffix(".onnx")
        plain.write_bytes(enginemeta.plan(network.engine))
        return pixels.taken(network, onnxgraph.opened(plain, 1))

    return enginefile.load(enginefile.CARDS[0], enginefile.Params(**params), path, Site("cpu", open_network))


def test_metadata_and_engine_are_told_apart(tmp_path: Path) -> None:
    about = enginemeta.read(written(tmp_path))
    assert about.metadata["task"] == "detect"
    assert about.metadata["imgsz"] == "[64, 64]"
    assert enginemeta.plan(tmp_path / "detector.engine") == graph()
    for plan in (b"ftrt" + bytes(100), b"\x02\0\0\0[]" + bytes(9), b"\x05\0\0\0{oops" + bytes(9), b"x"):
        path = written(tmp_path, {}, plan)
        assert enginemeta.read(path) == enginemeta.About({}, 0)
        assert enginemeta.plan(path) == plan


def test_a_file_without_an_engine_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, None, b"")
    with pytest.raises(BadInput, match=r"holds no engine: it has \d+ bytes, of which \d+ are metadata"):
        enginefile.describe(path)
    path.write_bytes(b"")
    with pytest.raises(BadInput, match="holds no engine"):
        enginefile.describe(path)
    assert not enginefile.claims(path)
    assert not enginefile.claims(tmp_path / "none.engine")


def test_labels_are_in_the_metadata_or_beside(tmp_path: Path) -> None:
    assert enginefile.describe(written(tmp_path)) == LABELS
    path = written(tmp_path / "bare", {})
    with pytest.raises(BadInput, match=r"names no classes; put it into a folder of its own with a file labels\.names"):
        enginefile.describe(path)
    (path.parent / "labels.names").write_text("cat\ndog\ncow\n")
    assert enginefile.describe(path.parent) == LABELS
    assert models.resolve(str(path.parent), "detections", {}, lambda card: Path()).card.family == "enginefile"
    with pytest.raises(BadInput, match="an engine to segment; of engine files only those that detect"):
        enginefile.describe(written(tmp_path, {**SAID, "task": "segment"}))


def test_boxes_are_those_of_the_same_graph_as_an_onnx_file(tmp_path: Path) -> None:
    of_engine = load(written(tmp_path, {**SAID, "args": {"dynamic": True}}), conf=0.5)
    plain = onnx.load_from_string(graph())
    helper.set_model_props(plain, {"names": repr(dict(enumerate(LABELS))), "imgsz": "[64, 64]"})
    onnx.save(plain, tmp_path / "same.onnx")
    site = Site("cpu", lambda network: torch_runtime.open(network, "cpu", "fp32"))
    of_file = onnxfile.load(onnxfile.CARDS[0], onnxfile.Params(conf=0.5), tmp_path / "same.onnx", site)
    rng = np.random.default_rng(1)
    for shape in ((64, 64), (100, 40), (31, 57)):
        picture = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        (one,) = of_engine.infer([of_engine.prepare(picture, Item("a"))])
        assert len(one.labels) > 0
        (other,) = of_file.infer([of_file.prepare(picture, Item("a"))])
        assert one.labels == other.labels
        assert np.allclose(one.boxes_xyxy, other.boxes_xyxy, atol=1e-4)
        assert np.allclose(one.scores, other.scores)


def test_the_layout_with_six_numbers_a_box(tmp_path: Path) -> None:
    model = load(written(tmp_path, None, graph(columns=6)), conf=0.0)
    (found,) = model.infer([model.prepare(np.zeros((64, 64, 3), np.uint8), Item("a"))])
    assert set(found.labels) <= set(LABELS)
    with pytest.raises(BadInput, match=r"gives numbers in the shape \(1, 9, 8\).*with 3 labels \(1, 7, anchors\)"):
        load(written(tmp_path, None, graph(9)))


def test_sizes_are_those_that_it_takes(tmp_path: Path) -> None:
    fixed = load(written(tmp_path))
    assert fixed.prepare(np.zeros((64, 32, 3), np.uint8), Item("a")).data.shape == (64, 64, 3)
    with pytest.raises(BadInput, match="takes pictures of 64 pixels only, but imgsz is 128"):
        load(written(tmp_path), imgsz=128)
    dynamic = load(written(tmp_path, {**SAID, "args": {"dynamic": True}}), imgsz=128)
    assert dynamic.prepare(np.zeros((64, 32, 3), np.uint8), Item("a")).data.shape == (128, 64, 3)
    with pytest.raises(BadInput, match="takes pictures of 64 x 96 pixels only; export it with a square imgsz"):
        load(written(tmp_path, {**SAID, "imgsz": [64, 96]}))
    folder = written(tmp_path / "bare", {}).parent
    (folder / "labels.txt").write_text("cat\ndog\ncow\n")
    assert load(folder, imgsz=96).prepare(np.zeros((64, 32, 3), np.uint8), Item("a")).data.shape == (96, 96, 3)


def test_another_runtime_says_which_it_takes(tmp_path: Path) -> None:
    path = written(tmp_path)
    resolved = models.resolve(str(path), "detections", {}, lambda card: Path())
    with pytest.raises(BadInput, match="detector runs in the runtime tensorrt alone; give --runtime tensorrt"):
        submit._pinned(None, resolved, "cuda", "torch", "fp32")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="the runtime tensorrt does not run on cpu"):
        submit._pinned(None, resolved, "cpu", "tensorrt", "fp32")  # type: ignore[arg-type]
    site = Site("cpu", lambda network: torch_runtime.open(network, "cpu", "fp32"))
    with pytest.raises(NotRunnable, match="the runtime tensorrt alone runs; give --runtime tensorrt"):
        enginefile.load(enginefile.CARDS[0], enginefile.Params(), path, site)
    assert "tensorrt" in runtimes.names()


def test_a_batch_is_cut_to_what_an_engine_takes() -> None:
    assert tensorrtengine.cut(10, 1, 4) == [(0, 4, 0), (4, 8, 0), (8, 10, 0)]
    assert tensorrtengine.cut(5, 4, 4) == [(0, 4, 0), (4, 5, 3)]
    assert tensorrtengine.cut(1, 1, 1) == [(0, 1, 0)]
    assert tensorrtengine.cut(3, 1, 32) == [(0, 3, 0)]
