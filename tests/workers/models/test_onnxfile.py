"""A detector's ONNX file gives what ultralytics' own predict gives on it; other graphs are refused with one line."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from storage.errors import BadInput, ItemFailed
from storage.results import detections
from tests.workers.models import test_yolo as of_yolo
from workers import models, onnxmeta, runtimes, ultralytics_checkpoints
from workers.models import Item, Site, onnxfile
from workers.runtimes import Network, Session
from workers.runtimes import torch as torch_runtime

SIZE = of_yolo.SIZE
CARD = onnxfile.CARDS[0]

# name -> series, arguments of ultralytics' export
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("yolov8n", {"dynamic": True}),
    "fixed": ("yolov8n", {}),
    "nms-free": ("yolo26n", {"dynamic": True, "nms": False}),
    "nms-inside": ("yolov8n", {"nms": True}),
    "nms-inside-dynamic": ("yolov8n", {"nms": True, "dynamic": True}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    with ultralytics_checkpoints.library():
        from ultralytics.utils import ASSETS
    return of_yolo.pictures(Path(ASSETS))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, pictures: dict[str, np.ndarray]) -> dict[str, Path]:
    """Each export of a nano model whose random weights find boxes."""
    folder = tmp_path_factory.mktemp("exports")
    samples = list(pictures.values())
    found: dict[str, Path] = {}
    checkpoints = {series: of_yolo.checkpoint(folder, series, samples) for series in ("yolov8n", "yolo26n")}
    with ultralytics_checkpoints.library(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tracing says of the library's own code
        from ultralytics import YOLO

        for name, (series, given) in EXPORTS.items():
            made = YOLO(checkpoints[series]).export(format="onnx", imgsz=SIZE, simplify=False, verbose=False, **given)
            found[name] = Path(made).rename(folder / f"{name}.onnx")
    return found


def ours(path: Path, open_network: Any = None, **params: Any) -> onnxfile.Detector:
    def by_torch(network: Network) -> Session:
        return torch_runtime.open(network, "cpu", "fp32")

    return onnxfile.load(CARD, onnxfile.Params(**params), path, Site("cpu", open_network or by_torch))


def theirs(path: Path, image: np.ndarray, **params: Any) -> np.ndarray:
    """(n, 6): xyxy in the picture, score, class id."""
    with ultralytics_checkpoints.library():
        from ultralytics import YOLO

        (found,) = YOLO(path, task="detect").predict(
            np.ascontiguousarray(image[:, :, ::-1]), imgsz=SIZE, verbose=False, device="cpu", **params
        )
    return found.boxes.data.cpu().numpy()


BY_DEFAULT = ("dynamic", "nms-free", "nms-inside-dynamic")
SOME = [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in EXPORTS]


@pytest.mark.parametrize("name", SOME)
def test_what_ultralytics_predicts(name: str, files: dict[str, Path], pictures: dict[str, np.ndarray]) -> None:
    model, boxes = ours(files[name]), 0
    for kind, image in pictures.items():
        if (name, kind) == ("nms-free", "thin"):
            continue  # fewer anchors than the 300 boxes of the graph, which fails in ultralytics too
        (result,) = model.infer([model.prepare(image, Item(kind))])
        expected = theirs(files[name], image)
        assert result.class_ids.tolist() == expected[:, 5].astype(int).tolist(), kind
        np.testing.assert_allclose(result.boxes_xyxy, expected[:, :4], atol=0.02)
        np.testing.assert_allclose(result.scores, expected[:, 4], atol=1e-4)
        boxes += len(expected)
    assert boxes > 20


@pytest.mark.parametrize(
    "params", [{"conf": 0.5}, {"iou": 0.2}, {"max_det": 3}, {"classes": ("car", "class 7")}, {"agnostic_nms": True}]
)
def test_each_parameter(params: dict[str, Any], files: dict[str, Path], pictures: dict[str, np.ndarray]) -> None:
    name, image = "dynamic", pictures["portrait"]
    model = ours(files[name], **params)
    (result,) = model.infer([model.prepare(image, Item("k"))])
    given = dict(params)
    if "classes" in given:
        given["classes"] = [onnxfile.describe(files[name]).index(label) for label in given["classes"]]
    expected = theirs(files[name], image, **given)
    np.testing.assert_allclose(result.boxes_xyxy, expected[:, :4], atol=0.02)
    plain = ours(files[name])
    (other,) = plain.infer([plain.prepare(image, Item("k"))])
    assert len(result.labels) != len(other.labels), "the parameter has work to do"


@pytest.mark.parametrize("name", ["dynamic", "fixed"])
def test_a_batch_gives_what_each_gives_alone(
    name: str, files: dict[str, Path], pictures: dict[str, np.ndarray]
) -> None:
    model = ours(files[name])
    batch = [model.prepare(p[:600, :600], Item("k")) for p in pictures.values() if min(p.shape[:2]) >= 480]
    batch = [item for item in batch if item.group == batch[0].group]
    assert len(batch) >= 2
    for one, together in zip(batch, model.infer(batch), strict=True):
        (alone,) = model.infer([one])
        np.testing.assert_allclose(alone.boxes_xyxy, together.boxes_xyxy, atol=0.01)


class _NoFiles:
    model: ClassVar[dict[str, str]] = {}

    def export(self, *args: object) -> None:
        pytest.fail("there is nothing to export")

    get = export


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("name", SOME)
def test_every_runtime_runs_the_file_itself(
    name: str, runtime: str, files: dict[str, Path], pictures: dict[str, np.ndarray]
) -> None:
    def open_network(network: Network) -> Session:
        assert network.onnx == files[name]
        return runtimes.open_network(runtime, network, "cpu", "fp32", _NoFiles())

    results = []
    for model in (ours(files[name]), ours(files[name], open_network)):
        results += model.infer([model.prepare(pictures["portrait"], Item("k"))])
    assert len(results[0].labels) > 0
    # The random weights of this network magnify rounding a thousandfold, torch's own as well.
    rough = name == "nms-free"
    np.testing.assert_allclose(results[0].scores, results[1].scores, atol=5e-3 if rough else 1e-4)
    if rough:
        return
    # Boxes of nearly one score may change places.
    np.testing.assert_allclose(*(np.sort(r.boxes_xyxy, axis=0) for r in results), atol=0.05)
    assert sorted(results[0].labels) == sorted(results[1].labels)


@pytest.mark.parametrize("runtime", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize("ports", ["half", "whole"])
def test_a_file_in_half_precision(
    ports: str, runtime: str, files: dict[str, Path], pictures: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """As converters write them, with float16 at both ends or only between: it finds what the file in float32 finds."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = tmp_path / "half.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights that are too small for it
        onnx.save(convert_float_to_float16(onnx.load(files["dynamic"]), keep_io_types=ports == "whole"), path)
    assert onnxmeta.read(path).inputs[0].kind == ("float16" if ports == "half" else "float32")

    def open_network(network: Network) -> Session:
        return runtimes.open_network(runtime, network, "cpu", "fp32", _NoFiles())

    found = []
    for model in (ours(files["dynamic"]), ours(path, open_network)):
        found += model.infer([model.prepare(pictures["portrait"], Item("k"))])
    assert len(found[0].labels) > 0
    np.testing.assert_allclose(found[1].scores[:5], found[0].scores[:5], atol=0.01)
    assert detections.agreement(*found) > 0.95


def test_the_file_says_its_size_and_a_fixed_one_takes_no_other(files: dict[str, Path]) -> None:
    assert ours(files["dynamic"]).prepare(np.zeros((100, 100, 3), np.uint8), Item("k")).group == (SIZE, SIZE)
    assert ours(files["dynamic"], imgsz=96).prepare(np.zeros((50, 100, 3), np.uint8), Item("k")).group == (64, 96)
    assert ours(files["fixed"]).prepare(np.zeros((50, 100, 3), np.uint8), Item("k")).group == (SIZE, SIZE)
    with pytest.raises(BadInput, match="takes pictures of 320 pixels only, but imgsz is 640"):
        ours(files["fixed"], imgsz=640)


def test_the_path_is_enough(files: dict[str, Path]) -> None:
    found = models.resolve(str(files["dynamic"]), "detections", {"conf": 0.5}, lambda card: Path())
    assert (found.card.family, found.card.name, found.weights_path) == ("onnxfile", "dynamic", files["dynamic"])
    assert found.labels[:3] == of_yolo.LABELS[:3]
    assert len(found.labels) == 80
    with pytest.raises(BadInput, match="there is no model file"):
        models.resolve("detector.onnx", "detections", {}, lambda card: Path())
    with pytest.raises(BadInput, match="no label 'persn'; did you mean 'person'"):
        models.resolve(str(files["dynamic"]), "detections", {"classes": ("persn",)}, lambda card: Path())


def test_nan_is_a_failure_of_its_picture_only(files: dict[str, Path]) -> None:
    def open_network(network: Network) -> Session:
        def session(**inputs: Any) -> dict[str, Any]:
            out = torch.zeros(len(inputs["images"]), 84, 10)
            out[1:2, 7, 3] = torch.nan
            return {"output0": out}

        return session

    model = ours(files["dynamic"], open_network)
    results = model.infer([model.prepare(np.zeros((64, 64, 3), np.uint8), Item("k"))] * 3)
    assert isinstance(results[1], ItemFailed)
    assert (results[1].stage, results[1].reason) == ("infer", "not-finite")
    assert [len(r.labels) for r in (results[0], results[2])] == [0, 0]


# ------------------------------------------------------------------------------------------------ files made by hand


def graph(
    folder: Path,
    given: tuple[Any, ...] = ("b", 3, "h", "w"),
    got: tuple[Any, ...] = ("b", 7, "n"),
    metadata: dict[str, str] | None = None,
    kind: int = TensorProto.FLOAT,
    outputs: int = 1,
) -> Path:
    """A file with ports of these shapes; what is between them is of no matter."""
    names = [f"out{i}" for i in range(outputs)]
    nodes = [helper.make_node("Identity", ["images"], [name]) for name in names]
    inputs = [helper.make_tensor_value_info("images", kind, given)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info(name, kind, got) for name in names])
    )
    default = {"names": "{0: 'cat', 1: 'dog', 2: 'it''s'}"}
    helper.set_model_props(model, default if metadata is None else metadata)
    path = folder / "hand.onnx"
    onnx.save(model, path)
    return path


def test_names_come_from_metadata_or_from_a_list_in_the_folder(tmp_path: Path) -> None:
    assert onnxfile.describe(graph(tmp_path)) == ("cat", "dog", "its")
    for text in ('["cat", "dog", "cow"]', '{"0": "cat", "1": "dog", "2": "cow"}'):
        assert onnxfile.describe(graph(tmp_path, metadata={"names": text})) == ("cat", "dog", "cow")
    path = graph(tmp_path, metadata={})
    with pytest.raises(BadInput, match=r"names no classes; put it into a folder of its own with a file labels\.names"):
        onnxfile.describe(path)
    (tmp_path / "labels.names").write_text("cat\n dog \n\ncow\n")
    assert onnxfile.claims(tmp_path)
    assert onnxfile.describe(tmp_path) == ("cat", "dog", "cow")
    (tmp_path / "labels.names").write_text("cat\n")
    with pytest.raises(BadInput, match="scores for 3 classes, but 1 are named"):
        onnxfile.describe(tmp_path)
    (tmp_path / "more.txt").write_text("cat\n")
    with pytest.raises(BadInput, match="holds 2 lists of labels"):
        onnxfile.describe(tmp_path)
    shutil.copy(path, tmp_path / "second.onnx")
    with pytest.raises(BadInput, match=r"holds 2 \.onnx files"):
        onnxfile.describe(tmp_path)
    assert not onnxfile.claims(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"metadata": {"task": "segment", "names": "{0: 'a'}"}},
            "is a model to segment; of ONNX files only those that",
        ),
        (
            {"outputs": 2},
            r"expected one input \(batch, 3, height, width\).* but got images float32 \[b, 3, h, w\], out0",
        ),
        ({"given": ("b", 1, "h", "w")}, "no detector of a known layout"),
        ({"given": ("b", "h", "w", 3)}, "no detector of a known layout"),
        ({"kind": TensorProto.UINT8}, "no detector of a known layout"),
        ({"got": ("b", 1000)}, "no detector of a known layout"),
        ({"got": (1, 25200, 85), "metadata": {}}, "no detector of a known layout"),
        ({"got": ("b", 4, "n")}, "no detector of a known layout"),
        ({"got": ("b", "x", "n"), "metadata": {}}, "no detector of a known layout"),
        ({"got": ("b", 9, "n")}, "scores for 5 classes, but 3 are named"),
        ({"given": (8, 3, 64, 64)}, "takes 8 images at once, no more and no less; export it with dynamic=True"),
        ({"given": (1, 3, 480, 640)}, "takes pictures of 480 x 640 pixels only; export it with a square imgsz"),
        ({"metadata": {"names": "{" * 5000}}, "names no classes"),
        ({"metadata": {"names": "__import__('os').getcwd()"}}, "names no classes"),
        ({"metadata": {"names": "{0: 'a', 2: 'b'}"}}, "names no classes"),
    ],
)
def test_other_graphs_are_refused_with_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = graph(tmp_path, **change)
    with pytest.raises(BadInput, match=message) as caught:
        onnxfile.describe(path)
    assert "\n" not in str(caught.value)


def test_a_graph_that_does_not_do_what_its_ports_say(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gives numbers in the shape \(1, 3, 640, 640\) .* expected \(1, 7, anchors\)"):
        ours(graph(tmp_path))


def test_damaged_files_are_no_files_of_ours(files: dict[str, Path], tmp_path: Path) -> None:
    """Cut anywhere, or with any byte changed: read or refused with BadInput, never anything else."""
    small = graph(tmp_path)
    data, path = small.read_bytes(), tmp_path / "x.onnx"
    rng = np.random.default_rng(0)
    for i in range(400):
        broken = bytearray(data[: int(rng.integers(1, len(data)))] if i % 2 else data)
        broken[int(rng.integers(len(broken)))] = int(rng.integers(256))
        path.write_bytes(bytes(broken))
        try:
            onnxfile.describe(path)
        except BadInput:
            continue
    for text in (b"", b"hello", b"\xff" * 100, b"PK\x03\x04"):
        path.write_bytes(text)
        assert not onnxfile.claims(path)
    path.write_bytes(files["dynamic"].read_bytes()[:1000])
    assert not onnxfile.claims(path)
    assert not onnxfile.claims(tmp_path / "none.onnx")


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, (1024,), np.zeros(1024, np.float32).tobytes(), raw=True)
    node = helper.make_node("Add", ["images", "w"], ["out0"])
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("images", "bchw"), ("out0", "bcn"))]
    model = helper.make_model(helper.make_graph([node], "g", ports[:1], ports[1:], [weight]))
    onnx.save(model, tmp_path / "x.onnx", save_as_external_data=True, size_threshold=0, location="w.bin")
    with pytest.raises(BadInput, match="keeps its weights in another file"):
        onnxmeta.read(tmp_path / "x.onnx")


def test_a_file_over_the_limit_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph(tmp_path)
    monkeypatch.setattr(onnxmeta, "MAX_BYTES", 100)
    with pytest.raises(BadInput, match=r"has \d+ bytes; expected an ONNX file of 1 to 100 bytes"):
        onnxfile.describe(path)


def test_what_is_read_is_what_onnx_reads(files: dict[str, Path]) -> None:
    for path in files.values():
        model, about = onnx.load(path), onnxmeta.read(path)
        assert about.metadata == {p.key: p.value for p in model.metadata_props}
        for mine, right in ((about.inputs, model.graph.input), (about.outputs, model.graph.output)):
            assert [port.name for port in mine] == [port.name for port in right]
            for port, value in zip(mine, right, strict=True):
                axes = value.type.tensor_type.shape.dim
                assert port.shape == tuple(
                    a.dim_param or (a.dim_value if a.HasField("dim_value") else "?") for a in axes
                )
                assert port.kind == "float32"


def test_parameters_are_checked() -> None:
    for wrong in ({"conf": 2}, {"imgsz": 33}, {"max_det": 0}, {"classes": "cat"}):
        with pytest.raises(BadInput):
            models.fill(CARD, wrong)
    assert dataclasses.asdict(onnxfile.Params(conf=1))["conf"] == 1.0
