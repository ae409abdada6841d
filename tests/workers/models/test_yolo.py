"""The yolo family gives what ultralytics' own predict gives, and refuses what it cannot run with one clear line."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.spec import JobSpec
from storage.errors import BadInput, ItemFailed
from storage.results.detections import Result
from workers import checkpoints, exporting, onnxgraph, ultralytics_checkpoints, uploading, yolohead, yolonetwork
from workers.models import Card, Item, Site, fill, yolo
from workers.models.yolo import Params
from workers.runtimes import Network, Session
from workers.runtimes import torch as torch_runtime

Fit = Callable[[torch.Tensor], tuple[float, float]]  # all numbers of a layer -> scale, shift
SERIES = ("yolov8n", "yolov10n", "yolo11n", "yolo26n")
NMS_FREE = ("yolov10n", "yolo26n")
SIZE = 320  # of the network's input, smaller than the default for speed
LABELS = ("person", "bicycle", "car", "motorcycle", "airplane")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks on a shared machine: threads that wait for each other cost more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def assets() -> Path:
    with ultralytics_checkpoints.library():
        from ultralytics.utils import ASSETS

        return Path(ASSETS)


def pictures(assets: Path) -> dict[str, np.ndarray]:
    """RGB pictures of every shape the letterbox treats differently."""
    import cv2

    bus, zidane = (cv2.imread(str(assets / n))[:, :, ::-1] for n in ("bus.jpg", "zidane.jpg"))
    return {
        "portrait": np.ascontiguousarray(bus),
        "landscape": np.ascontiguousarray(zidane),
        "odd": np.ascontiguousarray(bus[:613, :407]),
        "square": np.ascontiguousarray(zidane[:640, :640]),
        "tiny": cv2.resize(bus, (23, 37)),
        "thin": np.ascontiguousarray(zidane[300:309]),
        "grey": np.repeat(bus[:500, :700].mean(2).astype(np.uint8)[:, :, None], 3, axis=2),
    }


def checkpoint(folder: Path, series: str, samples: list[np.ndarray]) -> Path:
    """A nano model with random weights whose scores and boxes spread, so that threshold and NMS have work to do."""
    with ultralytics_checkpoints.library():
        from ultralytics import YOLO

        torch.manual_seed(0)
        model = YOLO(f"{series}.yaml")
        head = model.model.model[-1]
        model.model.names = dict(enumerate([*LABELS, *(f"class {i}" for i in range(5, 80))]))
        _spread(model.model, head, samples)
        path = folder / f"{series}.pt"
        model.save(path)
        return path


def _spread(module: Any, head: Any, samples: list[np.ndarray]) -> None:
    """Fit the batch norms to pictures, then give the last layers the spread that training would."""
    boxed = [yolohead.letterbox(sample, SIZE, 32) for sample in samples]
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = None  # running statistics become plain means
    with torch.no_grad():
        module.train()
        for picture in boxed:
            module(_tensor([picture]))
        module.eval()
        branches = (head.one2many, head.one2one) if hasattr(head, "one2one_cv2") else (head.one2many,)
        fits = {conv[-1]: _scores_spread for branch in branches for conv in branch["cls_head"]}
        fits |= {conv[-1]: _distances_spread(head.reg_max) for branch in branches for conv in branch["box_head"]}
        _refit(module, boxed, fits)


def _tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def _scores_spread(out: torch.Tensor) -> tuple[float, float]:
    """The highest logit becomes 2.5, and 50 a picture pass -1.1, the threshold of 0.25: no score saturates."""
    top = out.topk(50 * 7).values
    scale = 3.6 / float(top[0] - top[-1])
    return scale, 2.5 - float(top[0]) * scale


def _distances_spread(bins: int) -> Fit:
    """Distances of about four strides, or distributions that are neither flat nor one peak."""
    return lambda out: (1.5 / float(out.std()), 4.0 if bins == 1 else 0.0)


def _refit(module: Any, boxed: list[np.ndarray], fits: dict[Any, Fit]) -> None:
    """Scale and shift layers by what their fit says of all the numbers they give."""
    seen: dict[Any, list[torch.Tensor]] = {layer: [] for layer in fits}
    hooks = [layer.register_forward_hook(lambda m, _, out: seen[m].append(out.flatten())) for layer in fits]
    for picture in boxed:
        module(_tensor([picture]))
    for hook in hooks:
        hook.remove()
    for layer, fit in fits.items():
        scale, shift = fit(torch.cat(seen[layer]))
        layer.weight.mul_(scale)
        layer.bias.mul_(scale).add_(shift)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("yolo")
    samples = list(pictures(assets).values())

    def get(series: str) -> Path:
        path = folder / f"{series}.pt"
        return path if path.exists() else checkpoint(folder, series, samples)

    return get


def card(series: str) -> Card:
    return next(c for c in yolo.CARDS if c.name == series)


def opened(network: Network) -> Session:
    return torch_runtime.open(network, "cpu", "fp32")


def loaded(path: Path, params: Params = Params(imgsz=SIZE)) -> yolo.Detector:
    return yolo.load(card(path.stem), params, path, Site("cpu", opened))


def alone(model: yolo.Detector, image: np.ndarray) -> Result:
    (result,) = model.infer([model.prepare(image, Item("key"))])
    assert isinstance(result, Result)
    return result


@functools.cache
def _upstream_model(path: Path) -> Any:
    from ultralytics import YOLO

    return YOLO(path)


def upstream(path: Path, image: np.ndarray, **options: Any) -> Any:
    with ultralytics_checkpoints.library():
        return (
            _upstream_model(path)
            .predict(image[:, :, ::-1], verbose=False, device="cpu", **{"imgsz": SIZE, **options})[0]
            .boxes
        )


def assert_same(ours: Result, theirs: Any) -> None:
    """Same count; each box has a partner of its class within 0.5 px and 0.1 % of the score, best first on both sides.

    Boxes of nearly one score may change places, so partners are looked for, not taken from the same row.
    """
    scores, ids, boxes = (t.cpu().numpy() for t in (theirs.conf, theirs.cls, theirs.xyxy))
    assert len(ours.labels) == len(scores)
    assert (np.diff(ours.scores) <= 0).all()
    np.testing.assert_allclose(ours.scores, scores, rtol=1e-3)
    free = np.ones(len(scores), bool)
    for box, score, class_id in zip(ours.boxes_xyxy, ours.scores, ours.class_ids, strict=True):
        close = (
            (np.abs(boxes - box).max(1) <= 0.5) & (np.abs(scores - score) <= 1e-3 * score) & (ids == class_id) & free
        )
        assert close.any(), (box, score, class_id)
        free[close.argmax()] = False


def with_candidates(model: yolo.Detector, image: np.ndarray, count: int) -> yolo.Detector:
    """The same model with its threshold between the scores of the picture's best `count` anchor points and the rest."""
    raw = model._session(images=uploading.pictures([model.prepare(image, Item("key")).data], "cpu"))
    best = raw["best"] if "best" in raw else raw["logits"].amax(1)
    best = best.flatten().sigmoid().sort(descending=True).values
    count = min(count, len(best) // 2)
    picky = copy.copy(model)
    picky._params = replace(model._params, conf=float(best[count - 1 : count + 1].mean()))
    return picky


BOTH_HEADS = [*((s, True) for s in SERIES), *((s, False) for s in NMS_FREE)]
BY_DEFAULT = {("yolov8n", True), ("yolo26n", False)}  # the oldest head and the newest


@pytest.mark.parametrize(
    ("series", "nms"), [pytest.param(*p, marks=[] if p in BY_DEFAULT else pytest.mark.slow) for p in BOTH_HEADS]
)
def test_boxes_are_those_of_ultralytics_predict(
    series: str, nms: bool, models: Callable[[str], Path], assets: Path
) -> None:
    model = loaded(models(series), Params(imgsz=SIZE, nms=nms))
    for image in pictures(assets).values():
        picky = with_candidates(model, image, 100)
        options = {"conf": picky._params.conf, **({} if nms else {"nms": False})}
        ours = alone(picky, image)
        assert len(ours.labels) > 10  # else the comparison says little
        assert_same(ours, upstream(models(series), image, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"iou": 0.1},
        {"iou": 0.95},
        {"max_det": 7},
        {"agnostic_nms": True, "iou": 0.3},
        {"classes": ["car", "class 7", "class 20", "class 33"]},
    ],
)
@pytest.mark.parametrize(("series", "nms"), [("yolov8n", True), pytest.param("yolo26n", False, marks=pytest.mark.slow)])
def test_every_parameter_means_what_it_means_upstream(
    series: str, nms: bool, options: dict[str, Any], models: Callable[[str], Path], assets: Path
) -> None:
    image = pictures(assets)["odd"]
    model = with_candidates(loaded(models(series), Params(imgsz=SIZE, nms=nms, **options)), image, 300)
    ids = [yolo.describe(models(series)).index(name) for name in options.get("classes", [])]
    theirs = {**options, "classes": ids or None, "conf": model._params.conf, **({} if nms else {"nms": False})}
    assert_same(alone(model, image), upstream(models(series), image, **theirs))


def test_other_input_sizes_and_the_default(models: Callable[[str], Path], assets: Path) -> None:
    image = pictures(assets)["landscape"]
    for size in (640, 160):
        model = with_candidates(loaded(models("yolov8n"), Params(imgsz=size)), image, 100)
        assert_same(alone(model, image), upstream(models("yolov8n"), image, imgsz=size, conf=model._params.conf))


def test_a_batch_gives_what_each_picture_gives_alone(models: Callable[[str], Path], assets: Path) -> None:
    images = [np.ascontiguousarray(np.roll(pictures(assets)["odd"], 37 * i, 1)) for i in range(8)]
    model = with_candidates(loaded(models("yolo11n")), images[0], 100)
    prepared = [model.prepare(image, Item(str(i))) for i, image in enumerate(images)]
    together = model.infer(prepared)
    assert len({len(r.labels) for r in together}) > 1  # eight different pictures
    for item, result in zip(prepared, together, strict=True):
        (single,) = model.infer([item])
        assert single.labels == result.labels
        np.testing.assert_allclose(single.boxes_xyxy, result.boxes_xyxy, atol=0.01)
        np.testing.assert_allclose(single.scores, result.scores, rtol=1e-4)


def fake(head: yolohead.Head, distances: torch.Tensor, logits: torch.Tensor, **params: Any) -> yolo.Detector:
    """A detector whose network always gives these numbers."""
    labels = tuple(f"class {i}" for i in range(logits.shape[1]))
    out = {"distances": distances, "logits": logits}
    return yolo.Detector(Params(imgsz=32, **params), labels, head, lambda **_: out, "cpu")


def test_a_box_by_hand() -> None:
    """One anchor point fires: stride 8, third row, second column, so its middle is (12, 20)."""
    logits = torch.full((1, 2, 21), -20.0)
    logits[0, 1, 2 * 4 + 1] = 0.0
    distances = torch.zeros(1, 4, 21)
    distances[0, :, 2 * 4 + 1] = torch.tensor([0.5, 1.0, 1.0, 0.25])
    model = fake(yolohead.Head((8, 16, 32), 1), distances, logits)
    result = alone(model, np.zeros((32, 32, 3), np.uint8))
    assert result.boxes_xyxy.tolist() == [[8.0, 12.0, 20.0, 22.0]]
    assert (result.labels, result.scores.tolist()) == (("class 1",), [0.5])


def test_the_threshold_itself_is_not_kept() -> None:
    logits = torch.full((1, 1, 21), -20.0)
    logits[0, 0, 3] = 0.0
    for conf, count in ((0.5, 0), (0.4999, 1), (0.0, 21), (1.0, 0)):
        model = fake(yolohead.Head((8, 16, 32), 1), torch.ones(1, 4, 21), logits, conf=conf, iou=1.0)
        assert len(alone(model, np.zeros((32, 32, 3), np.uint8)).labels) == count


@pytest.mark.parametrize("nms", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_infinite_number_fails_its_picture_only(nms: bool, bad: float) -> None:
    logits = torch.zeros(3, 2, 21)
    distances = torch.ones(3, 64, 21)
    distances[1, 5, 7] = bad
    model = fake(yolohead.Head((8, 16, 32), 16), distances, logits, nms=nms)
    item = model.prepare(np.zeros((32, 32, 3), np.uint8), Item("key"))
    first, second, third = model.infer([item] * 3)
    assert isinstance(first, Result)
    assert isinstance(third, Result)
    assert len(first.labels) == len(third.labels) > 0
    assert isinstance(second, ItemFailed)
    assert (second.stage, second.reason) == ("infer", "not-finite")


@pytest.mark.parametrize("series", ["yolov8n", *(pytest.param(s, marks=pytest.mark.slow) for s in SERIES[1:])])
def test_a_cpu_leaves_out_what_is_thrown_away(
    series: str, models: Callable[[str], Path], assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boxes are computed where something passes, and are those of the whole head."""
    few = loaded(models(series))
    assert few._head.branches.keys() == {"distances"}
    monkeypatch.setattr(yolonetwork, "_LEAST_CONF", 2.0)
    whole = loaded(models(series))
    assert not whole._head.branches
    for image in pictures(assets).values():
        ours, theirs = alone(with_candidates(few, image, 200), image), alone(with_candidates(whole, image, 200), image)
        assert ours.labels == theirs.labels
        assert len(ours.labels) > 10
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5)
        np.testing.assert_allclose(ours.boxes_xyxy, theirs.boxes_xyxy, atol=0.01)


@pytest.mark.parametrize(
    ("device", "params", "whole"),
    [
        ("cpu", {}, False),
        ("cpu", {"conf": 0.05}, False),
        ("cpu", {"conf": 0.04}, True),
        ("cpu", {"nms": False}, True),
        ("cuda", {}, True),
    ],
)
def test_which_networks_have_the_whole_head(
    device: str, params: dict[str, Any], whole: bool, models: Callable[[str], Path]
) -> None:
    """Also the one that a child builds, on a CPU, for a worker with a GPU."""
    found: list[Network] = []

    def keep(network: Network) -> Session:
        found.append(network)
        return opened(network)

    yolo.load(card("yolo26n"), Params(imgsz=SIZE, **params), models("yolo26n"), Site(device, keep))
    assert (found[0].outputs == ("distances", "logits")) == whole
    assert ("class_id" in found[0].outputs) != whole
    assert found[0].device == device


def test_a_child_builds_the_network_of_its_parents_device(models: Callable[[str], Path], tmp_path: Path) -> None:
    """On a CPU, though that would have another one."""
    path, found = models("yolov8n"), list[Network]()

    def keep(network: Network) -> Session:
        found.append(network)
        return opened(network)

    params = fill(card("yolov8n"), {"imgsz": SIZE})
    yolo.load(card("yolov8n"), Params(imgsz=SIZE), path, Site("cuda", keep))
    base = {"dataset": "file:///x", "kind": "detections", "family": "yolo", "weights_sha256": "", "model": "yolov8n"}
    exporting.export(JobSpec(**base, params=params), path, found[0], "fp32", tmp_path / "net.onnx")
    given = onnxgraph.opened(tmp_path / "net.onnx", 1)(images=torch.zeros(1, 3, 64, 64))
    assert given.keys() == {"distances", "logits"}


def test_a_box_that_is_not_finite_fails_its_picture(models: Callable[[str], Path], assets: Path) -> None:
    """Of a checkpoint whose boxes are broken: its classes and features are not."""
    image = pictures(assets)["odd"]
    model = with_candidates(loaded(models("yolov8n")), image, 20)
    for stack in model._head.branches["distances"]._stacks:
        stack[-1].bias.fill_(float("nan"))
    (result,) = model.infer([model.prepare(image, Item("key"))])
    assert isinstance(result, ItemFailed)
    assert (result.stage, result.reason) == ("infer", "not-finite")


def test_nms_on_the_device_and_on_the_host_agree(
    models: Callable[[str], Path], assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pictures(assets)["odd"]
    model = with_candidates(loaded(models("yolov8n")), image, 300)
    usual = alone(model, image)
    monkeypatch.setattr(yolohead, "_CPU_NMS_BOXES", 0)
    assert alone(model, image).labels == usual.labels


@pytest.mark.parametrize(
    "shape", [(1080, 810), (720, 1280), (37, 23), (1, 1), (1, 3000), (3000, 2), (333, 501), (640, 640)]
)
@pytest.mark.parametrize("size", [640, 320])
def test_letterbox_gives_the_pixels_of_ultralytics(shape: tuple[int, int], size: int) -> None:
    with ultralytics_checkpoints.library():
        from ultralytics.data.augment import LetterBox

    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(
        yolohead.letterbox(image, size, 32), LetterBox((size, size), auto=True, stride=32)(image=image)
    )


@pytest.mark.parametrize("shape", [(1080, 810), (333, 501), (37, 23), (1, 3000)])
def test_boxes_go_back_as_in_ultralytics(shape: tuple[int, int]) -> None:
    with ultralytics_checkpoints.library():
        from ultralytics.utils.ops import scale_boxes

    padded = yolohead.letterbox(np.zeros((*shape, 3), np.uint8), 640, 32).shape[:2]
    boxes = np.random.default_rng(0).uniform(-50, 700, (40, 4)).astype(np.float32)
    theirs = scale_boxes(padded, torch.from_numpy(boxes.copy()), shape).numpy()
    np.testing.assert_allclose(yolohead.to_original(boxes, padded, shape), theirs, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"conf": 1.5}, "conf must be from 0 to 1"),
        ({"conf": float("nan")}, "conf must be from 0 to 1"),
        ({"conf": True}, "conf must be a number"),
        ({"iou": "0.5"}, "iou must be a number"),
        ({"imgsz": 650}, "the nearest is 640"),
        ({"imgsz": 640.0}, "imgsz must be a whole number"),
        ({"imgsz": 0}, "imgsz must be from 32"),
        ({"max_det": True}, "max_det must be a whole number"),
        ({"max_det": 0}, "max_det must be from 1"),
        ({"classes": "person"}, "classes must be a list"),
        ({"classes": [1]}, "classes must be a list"),
        ({"agnostic_nms": 1}, "agnostic_nms must be true or false"),
        ({"size": 640}, "has no parameter 'size'"),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        fill(card("yolov8n"), given)


def test_parameters_survive_json() -> None:
    import json

    filled = fill(card("yolo11n"), {"classes": ["a", "b"], "conf": 1})
    assert fill(card("yolo11n"), json.loads(json.dumps(filled))) == filled


def test_unknown_classes_get_a_hint() -> None:
    with pytest.raises(BadInput, match=r"no class 'persn'; did you mean 'person'\?"):
        yolo.check_labels(Params(classes=("persn",)), LABELS)
    yolo.check_labels(Params(classes=("car",)), LABELS)


def test_describe_and_claims(models: Callable[[str], Path], tmp_path: Path) -> None:
    path = models("yolo11n")
    assert yolo.claims(path)
    assert yolo.describe(path)[:5] == LABELS
    assert len(yolo.describe(path)) == 80
    other = tmp_path / "weights.pt"
    torch.save({"state_dict": {"a": torch.zeros(3)}}, other)
    assert not yolo.claims(other)
    assert not yolo.claims(tmp_path / "absent.pt")
    with pytest.raises(BadInput, match="not a checkpoint of ultralytics"):
        yolo.describe(other)


@pytest.mark.parametrize(("series", "task"), [("yolov8n-pose", "pose"), ("yolov8n-cls", "classify")])
def test_a_model_of_a_task_that_no_family_runs_is_refused_by_name(series: str, task: str, tmp_path: Path) -> None:
    with ultralytics_checkpoints.library():
        from ultralytics import YOLO

        YOLO(f"{series}.yaml").save(tmp_path / "other.pt")
    assert yolo.claims(tmp_path / "other.pt")
    with pytest.raises(BadInput, match=f"is a model to {task}"):
        yolo.load(card("yolov8n"), Params(), tmp_path / "other.pt", Site("cpu", opened))


def test_a_model_of_another_family_is_left_to_it(tmp_path: Path) -> None:
    with ultralytics_checkpoints.library():
        from ultralytics import YOLO

        YOLO("yolov8n-seg.yaml").save(tmp_path / "seg.pt")
    assert not yolo.claims(tmp_path / "seg.pt")
    with pytest.raises(BadInput, match="is a model to segment"):
        yolo.describe(tmp_path / "seg.pt")


def test_a_missing_nms_free_head_is_said(models: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match="no NMS-free head"):
        loaded(models("yolov8n"), Params(nms=False))


def test_weights_named_by_their_digest_load(models: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "3f2a"
    path.write_bytes(models("yolov8n").read_bytes())
    assert yolo.load(card("yolov8n"), Params(imgsz=SIZE), path, Site("cpu", opened))


def test_a_network_can_be_built_again(models: Callable[[str], Path]) -> None:
    """A second runtime gets a module of its own, in float32, whatever the first did to its own."""
    kept: list[Network] = []

    def open_twice(network: Network) -> Session:
        kept.append(network)
        session = torch_runtime.open(network, "cpu", "fp32")
        torch_runtime.open(network, "cpu", "bf16")
        return session

    yolo.load(card("yolov8n"), Params(imgsz=SIZE), models("yolov8n"), Site("cpu", open_twice))
    assert {p.dtype for p in kept[0].build().parameters()} == {torch.float32}


def test_half_precision_keeps_the_boxes(models: Callable[[str], Path], assets: Path) -> None:
    """Decoding in float32: bf16 boxes stay near, although bf16 itself steps by 2 px above 256."""
    image = pictures(assets)["odd"]
    exact = with_candidates(loaded(models("yolov8n")), image, 100)
    site = Site("cpu", lambda n: torch_runtime.open(n, "cpu", "bf16"))
    half = yolo.load(card("yolov8n"), exact._params, models("yolov8n"), site)
    ours, other = alone(exact, image), alone(half, image)
    best = [np.abs(other.boxes_xyxy - box).max(1).min() for box in ours.boxes_xyxy[:10]]
    assert np.median(best) < 3


def test_a_checkpoint_that_runs_code_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    """The same checkpoint with a call of os.mkdir beside its model: refused by name, and nothing was made."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    whole = torch.load(models("yolov8n"), weights_only=False)
    torch.save({**whole, "train_args": {"deep": [Evil()]}}, tmp_path / "evil.pt")
    assert yolo.describe(tmp_path / "evil.pt")[:5] == LABELS
    with pytest.raises(BadInput, match=r"wants to run posix\.mkdir"):
        yolo.load(card("yolov8n"), Params(), tmp_path / "evil.pt", Site("cpu", opened))
    assert not (tmp_path / "made").exists()


def test_allowed_names_are_classes_and_tensor_builders() -> None:
    """Whatever the allow-list reaches through 'module.*' is a class of that library, none a function or a module."""
    import importlib

    for entry in sorted(yolo.ALLOWED):
        if entry.endswith(".*"):
            module = importlib.import_module(entry[:-2])
            for name, value in vars(module).items():
                if checkpoints._CLASS_NAME.fullmatch(name) and callable(value) and isinstance(value, type):
                    assert value.__module__.split(".")[0] in {"torch", "ultralytics", "typing", "collections"}, name
    assert not {e for e in yolo.ALLOWED if e.rpartition(".")[2] in {"eval", "exec", "getattr", "__import__", "open"}}


def test_importing_ultralytics_takes_no_threads_away() -> None:
    code = """
import os, torch
torch.set_num_threads(2)
from workers import ultralytics_checkpoints
with ultralytics_checkpoints.library():
    pass
assert torch.get_num_threads() == 2, torch.get_num_threads()
assert "OMP_NUM_THREADS" not in os.environ
assert os.environ["ULTRALYTICS_SAFE_LOAD"] == "1"
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
