"""The rtdetr family gives what ultralytics' own RTDETR predict gives, and refuses what it cannot run."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.errors import BadInput, ItemFailed
from storage.results.detections import Result
from workers import checkpoints, ultralytics_checkpoints
from workers.models import Item, Site, fill, rtdetr, yolo
from workers.models.rtdetr import Params
from workers.runtimes import Network, Session
from workers.runtimes import torch as torch_runtime

SIZE = 160
LABELS = ("person", "bicycle", "car", "motorcycle", "airplane", "bus")
QUERIES = 40

# The layers of rtdetr-l, few and narrow.
TINY = {
    "nc": len(LABELS),
    "backbone": [
        [-1, 1, "HGStem", [8, 16]],
        [-1, 1, "HGBlock", [16, 32, 3]],
        [-1, 1, "DWConv", [32, 3, 2, 1, False]],
        [-1, 1, "HGBlock", [16, 32, 3]],
        [-1, 1, "DWConv", [32, 3, 2, 1, False]],
        [-1, 1, "HGBlock", [16, 64, 5, True, False]],
        [-1, 1, "DWConv", [64, 3, 2, 1, False]],
        [-1, 1, "HGBlock", [16, 64, 5, True, False]],
    ],
    "head": [
        [-1, 1, "Conv", [32, 1, 1, None, 1, 1, False]],
        [-1, 1, "AIFI", [64, 2]],
        [-1, 1, "Conv", [32, 1, 1]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [5, 1, "Conv", [32, 1, 1, None, 1, 1, False]],
        [[-2, -1], 1, "Concat", [1]],
        [-1, 1, "RepC3", [32]],
        [-1, 1, "Conv", [32, 3, 2]],
        [[-1, 10], 1, "Concat", [1]],
        [-1, 1, "RepC3", [32]],
        [[14, 17], 1, "RTDETRDecoder", ["nc", 32, QUERIES, 2, 2, 2, 64]],
    ],
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks on a shared machine: threads that wait for each other cost more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def pictures() -> dict[str, np.ndarray]:
    """RGB photographs of several shapes."""
    import cv2

    with ultralytics_checkpoints.library():
        from ultralytics.utils import ASSETS
    bus, zidane = (cv2.imread(str(Path(ASSETS) / n))[:, :, ::-1] for n in ("bus.jpg", "zidane.jpg"))
    return {
        "portrait": np.ascontiguousarray(bus),
        "landscape": np.ascontiguousarray(zidane),
        "odd": np.ascontiguousarray(bus[:613, :407]),
        "square": cv2.resize(bus, (SIZE, SIZE)),
        "tiny": cv2.resize(bus, (23, 37)),
        "thin": np.ascontiguousarray(zidane[300:309]),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RT-DETR with random weights whose scores and boxes differ, saved by ultralytics itself."""
    import yaml

    path = tmp_path_factory.mktemp("rtdetr") / "rtdetr-tiny.pt"
    with ultralytics_checkpoints.library():
        from ultralytics import RTDETR

        torch.manual_seed(0)
        description = path.with_name("rtdetr-tiny.yaml")
        description.write_text(yaml.safe_dump(TINY))
        model = RTDETR(str(description))
        model.model.names = dict(enumerate(LABELS))
        _spread(model.model)
        model.save(path)
    return path


def _spread(module: Any) -> None:
    """Fit the batch norms to pictures, and give the heads numbers that differ between queries."""
    head = module.model[-1]
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = None  # running statistics become plain means
                norm.train()
        for image in list(pictures().values())[:3]:
            module(_tensor(image))
        module.eval()
        heads = [head.enc_score_head, *head.dec_score_head]
        heads += [mlp.layers[-1] for mlp in (head.enc_bbox_head, *head.dec_bbox_head)]
        for linear in heads:
            linear.weight.normal_(0, 0.3)
            linear.bias.normal_(0, 0.3)


def _tensor(image: np.ndarray) -> torch.Tensor:
    import cv2

    return torch.from_numpy(cv2.resize(image, (SIZE, SIZE))).permute(2, 0, 1)[None].float() / 255


def opened(network: Network) -> Session:
    return torch_runtime.open(network, "cpu", "fp32")


def loaded(path: Path, params: Params = Params(imgsz=SIZE)) -> rtdetr.Detector:
    return rtdetr.load(rtdetr.CARDS[0], params, path, Site("cpu", opened))


def alone(model: rtdetr.Detector, image: np.ndarray) -> Result:
    (result,) = model.infer([model.prepare(image, Item("key"))])
    assert isinstance(result, Result)
    return result


@functools.cache
def _upstream_model(path: Path) -> Any:
    from ultralytics import RTDETR

    return RTDETR(str(path))


def upstream(path: Path, image: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    with ultralytics_checkpoints.library():
        boxes = _upstream_model(path).predict(
            image[:, :, ::-1], verbose=False, device="cpu", **{"imgsz": SIZE, **options}
        )[0]
    boxes = boxes.boxes
    return {"scores": boxes.conf.numpy(), "labels": boxes.cls.numpy(), "boxes": boxes.xyxy.numpy()}


def threshold(path: Path, image: np.ndarray, **options: Any) -> float:
    """A threshold in the widest gap of the middle scores, which rounding does not cross."""
    scores = upstream(path, image, conf=0.0001, **options)["scores"]
    middle = scores[len(scores) // 4 : 3 * len(scores) // 4 + 1]
    widest = int(np.argmax(middle[:-1] - middle[1:]))
    return float(middle[widest] + middle[widest + 1]) / 2


def assert_same(ours: Result, theirs: dict[str, np.ndarray]) -> None:
    """Same scores in order; each box has a partner of its class and score within 0.2 px, as near scores may swap."""
    assert len(ours.labels) == len(theirs["scores"])
    assert (np.diff(ours.scores) <= 0).all()
    np.testing.assert_allclose(ours.scores, theirs["scores"], atol=1e-4)
    free = np.ones(len(ours.labels), bool)
    for box, score, class_id in zip(ours.boxes_xyxy, ours.scores, ours.class_ids, strict=True):
        near = (np.abs(theirs["boxes"] - box).max(1) < 0.2) & (np.abs(theirs["scores"] - score) < 1e-4)
        near &= (theirs["labels"] == class_id) & free
        assert near.any(), (box, score, class_id)
        free[near.argmax()] = False


def test_boxes_are_those_of_ultralytics_predict(checkpoint: Path) -> None:
    model = loaded(checkpoint)
    distinct = 0
    for image in pictures().values():
        conf = threshold(checkpoint, image)
        model._params = replace(model._params, conf=conf)
        ours = alone(model, image)
        assert len(ours.labels) >= 8
        assert ours.labels == tuple(LABELS[i] for i in ours.class_ids)
        assert_same(ours, upstream(checkpoint, image, conf=conf))
        distinct = max(distinct, len(np.unique(ours.boxes_xyxy.round(), axis=0)))
    assert distinct > 5  # else the comparison says little


@pytest.mark.parametrize("options", [{"max_det": 7}, {"classes": ["car", "person", "airplane"]}, {"imgsz": 96}])
def test_every_parameter_means_what_it_means_upstream(options: dict[str, Any], checkpoint: Path) -> None:
    image = pictures()["odd"]
    size = options.get("imgsz", SIZE)
    conf = threshold(checkpoint, image, imgsz=size)
    ours = alone(loaded(checkpoint, Params(**{"imgsz": size, "conf": conf, **options})), image)
    ids = [LABELS.index(name) for name in options.get("classes", [])]
    assert ours.labels
    assert_same(ours, upstream(checkpoint, image, **{**options, "conf": conf, "classes": ids or None}))


def test_a_batch_gives_what_each_picture_gives_alone(checkpoint: Path) -> None:
    model = loaded(checkpoint, Params(imgsz=SIZE, conf=0.3))
    prepared = [model.prepare(image, Item(name)) for name, image in pictures().items() if name != "square"]
    assert len({item.group for item in prepared}) == 1
    together = model.infer(prepared)
    assert len({r.scores.tobytes() for r in together}) == len(prepared)  # different pictures
    for item, result in zip(prepared, together, strict=True):
        (single,) = model.infer([item])
        assert_same(result, {"scores": single.scores, "labels": single.class_ids, "boxes": single.boxes_xyxy})


def fake(boxes: torch.Tensor, logits: torch.Tensor, **params: Any) -> rtdetr.Detector:
    """A detector whose network always gives these numbers."""
    labels = tuple(f"class {i}" for i in range(logits.shape[2]))
    return rtdetr.Detector(Params(imgsz=32, **params), labels, lambda **_: {"boxes": boxes, "logits": logits}, "cpu")


def test_a_box_by_hand() -> None:
    """One query, two classes above the threshold: both are results, in pixels of a picture 100 wide and 200 high."""
    boxes = torch.tensor([[[0.5, 0.25, 0.2, 0.1], [0.1, 0.1, 0.1, 0.1]]])
    logits = torch.tensor([[[0.0, -9.0, 1.0], [-9.0, -9.0, -9.0]]])
    result = alone(fake(boxes, logits), np.zeros((200, 100, 3), np.uint8))
    np.testing.assert_allclose(result.boxes_xyxy, [[40, 40, 60, 60]] * 2, atol=1e-4)
    assert result.labels == ("class 2", "class 0")
    assert result.scores[1] == 0.5
    assert alone(fake(boxes, logits, conf=0.5), np.zeros((200, 100, 3), np.uint8)).labels == ("class 2",)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_infinite_number_fails_its_picture_only(bad: float) -> None:
    boxes, logits = torch.full((3, 4, 4), 0.5), torch.zeros(3, 4, 2)
    boxes[1, 2, 3] = bad
    model = fake(boxes, logits)
    item = model.prepare(np.zeros((32, 32, 3), np.uint8), Item("key"))
    first, second, third = model.infer([item] * 3)
    assert isinstance(first, Result)
    assert isinstance(third, Result)
    assert isinstance(second, ItemFailed)
    assert (second.stage, second.reason) == ("infer", "not-finite")
    with pytest.raises(ItemFailed, match="has none"):
        model.prepare(None, Item("key"))


def test_half_precision_stays_near(checkpoint: Path) -> None:
    image = pictures()["odd"]
    exact = alone(loaded(checkpoint, Params(imgsz=SIZE, conf=0.0)), image)
    site = Site("cpu", lambda network: torch_runtime.open(network, "cpu", "bf16"))
    half = alone(rtdetr.load(rtdetr.CARDS[0], Params(imgsz=SIZE, conf=0.0), checkpoint, site), image)
    np.testing.assert_allclose(half.scores, exact.scores, atol=0.03)


def test_a_network_can_be_built_again(checkpoint: Path) -> None:
    """A second runtime gets a module of its own, in float32, whatever the first did to its own."""
    kept: list[Network] = []

    def open_half(network: Network) -> Session:
        kept.append(network)
        return torch_runtime.open(network, "cpu", "bf16")

    rtdetr.load(rtdetr.CARDS[0], Params(imgsz=SIZE), checkpoint, Site("cpu", open_half))
    again = kept[0].build()
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    boxes, logits = again(*kept[0].example.values())
    assert (boxes.shape, logits.shape) == ((2, QUERIES, 4), (2, QUERIES, len(LABELS)))


def test_describe_and_claims(checkpoint: Path, tmp_path: Path) -> None:
    assert rtdetr.claims(checkpoint)
    assert not yolo.claims(checkpoint)
    assert rtdetr.describe(checkpoint) == LABELS
    with pytest.raises(BadInput, match="is a model to detect with RT-DETR; the yolo family"):
        yolo.describe(checkpoint)
    with ultralytics_checkpoints.library():
        from ultralytics import YOLO

        YOLO("yolov8n.yaml").save(tmp_path / "yolo.pt")
    assert not rtdetr.claims(tmp_path / "yolo.pt")
    with pytest.raises(BadInput, match="is a model to detect; the rtdetr family"):
        rtdetr.load(rtdetr.CARDS[0], Params(), tmp_path / "yolo.pt", Site("cpu", opened))
    assert not rtdetr.claims(tmp_path)
    with pytest.raises(BadInput, match="no label 'buss'; did you mean 'bus'"):
        loaded(checkpoint, Params(classes=("buss",)))


def test_a_full_size_checkpoint_and_one_in_training_are_allowed(checkpoint: Path, tmp_path: Path) -> None:
    """What the published layers and a training's loss add to a checkpoint is on the list."""
    with ultralytics_checkpoints.library():
        from ultralytics import RTDETR
        from ultralytics.models.utils.loss import RTDETRDetectionLoss

        RTDETR("rtdetr-l.yaml").save(tmp_path / "large.pt")
    checkpoints.check(tmp_path / "large.pt", rtdetr.ALLOWED)
    whole = torch.load(checkpoint, weights_only=False)
    whole["model"].criterion = RTDETRDetectionLoss(nc=len(LABELS), use_vfl=True)
    torch.save(whole, tmp_path / "training.pt")
    checkpoints.check(tmp_path / "training.pt", rtdetr.ALLOWED)


def test_a_checkpoint_that_runs_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    whole = torch.load(checkpoint, weights_only=False)
    torch.save({**whole, "train_args": {"deep": [Evil()]}}, tmp_path / "evil.pt")
    assert rtdetr.claims(tmp_path / "evil.pt")
    with pytest.raises(BadInput, match=r"wants to run posix\.mkdir"):
        loaded(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"conf": 1.5}, "conf must be from 0 to 1"),
        ({"conf": float("nan")}, "conf must be from 0 to 1"),
        ({"conf": True}, "conf must be a number"),
        ({"imgsz": 650}, "the nearest is 640"),
        ({"imgsz": 640.0}, "imgsz must be a whole number"),
        ({"max_det": 0}, "max_det must be from 1"),
        ({"classes": "person"}, "classes must be a list"),
        ({"iou": 0.5}, "has no parameter 'iou'"),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        fill(rtdetr.CARDS[0], given)
