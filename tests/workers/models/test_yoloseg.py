"""The yoloseg family gives the masks of ultralytics' own predict, in the size of the original picture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage import rle
from storage.errors import BadInput, ItemFailed
from storage.results.masks import Result
from tests.workers.models.test_yolo import LABELS, SIZE, _spread, pictures
from workers import masks, ultralytics_checkpoints, yolonetwork
from workers.models import Item, Site, yolo, yoloseg
from workers.models.yoloseg import Params
from workers.runtimes import torch as torch_runtime

SERIES = ("yolov8n-seg", "yolo11n-seg", "yolo26n-seg")
SHAPES = ("portrait", "landscape", "odd", "tiny", "thin")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    with ultralytics_checkpoints.library():
        from ultralytics.utils import ASSETS
    import cv2

    found = pictures(Path(ASSETS))
    for name in ("portrait", "landscape"):  # smaller, for speed
        found[name] = cv2.resize(found[name], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, images: dict[str, np.ndarray]) -> Callable[[str], Path]:
    """Nano models with random weights whose scores, boxes and masks spread."""
    folder = tmp_path_factory.mktemp("yoloseg")

    @functools.cache
    def get(series: str) -> Path:
        with ultralytics_checkpoints.library():
            from ultralytics import YOLO

            torch.manual_seed(0)
            model = YOLO(f"{series}.yaml")
            head = model.model.model[-1]
            model.model.names = dict(enumerate([*LABELS, *(f"class {i}" for i in range(5, 80))]))
            _spread(model.model, head, list(images.values()))
            # Random maps are of one sign all over: without their mean, the masks follow the picture.
            head.proto.cv3.act = torch.nn.Identity()
            head.proto.cv3.bn.bias.data.zero_()
            model.save(folder / f"{series}.pt")
        return folder / f"{series}.pt"

    return get


def opened(network: Any) -> Any:
    return torch_runtime.open(network, "cpu", "fp32")


def loaded(path: Path, **params: Any) -> yoloseg.Segmenter:
    card = next(card for card in yoloseg.CARDS if card.name == path.stem)
    return yoloseg.load(card, Params(**{"imgsz": SIZE, **params}), path, Site("cpu", opened))


def alone(model: yoloseg.Segmenter, image: np.ndarray) -> Result:
    (result,) = model.infer([model.prepare(image, Item("key"))])
    assert isinstance(result, Result), result
    return result


@functools.cache
def _upstream_model(path: Path) -> Any:
    from ultralytics import YOLO

    return YOLO(path)


def upstream(path: Path, image: np.ndarray, **options: Any) -> tuple[Any, np.ndarray]:
    """Boxes, and masks (n, height, width) bool scaled to the picture."""
    with ultralytics_checkpoints.library():
        from ultralytics.utils import ops

        options = {"imgsz": SIZE, "verbose": False, "device": "cpu", **options}
        found = _upstream_model(path).predict(image[:, :, ::-1], **options)[0]
        if found.masks is None:
            return found.boxes, np.zeros((0, *image.shape[:2]), bool)
        scaled = ops.scale_masks(found.masks.data[None].float(), image.shape[:2])[0]
    return found.boxes, (scaled > 0.5).numpy()


def iou(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


def pixels(result: Result) -> np.ndarray:
    return np.array([rle.decode(counts, result.size) for counts in result.rles]).reshape(-1, *result.size)


def assert_same(ours: Result, theirs: tuple[Any, np.ndarray]) -> None:
    """Each object has a partner of its class: box within 0.5 px, score within 0.1 %, mask of IoU 0.99."""
    boxes, wanted = theirs
    scores, ids, corners = (t.cpu().numpy() for t in (boxes.conf, boxes.cls, boxes.xyxy))
    got = pixels(ours)
    assert len(got) == len(wanted)
    assert (np.diff(ours.scores) <= 0).all()
    assert ours.areas.tolist() == got.sum((1, 2)).tolist()
    free = np.ones(len(wanted), bool)
    for i, mask in enumerate(got):
        close = np.abs(corners - ours.boxes_xyxy[i]).max(1, initial=0) <= 0.5
        close &= (np.abs(scores - ours.scores[i]) <= 1e-3) & (ids == ours.class_ids[i]) & free
        best = max(np.flatnonzero(close), key=lambda j: iou(mask, wanted[j]))
        assert iou(mask, wanted[best]) >= 0.99
        free[best] = False


@pytest.mark.parametrize("retina_masks", [False, True])
@pytest.mark.parametrize("series", [SERIES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SERIES[1:])])
def test_same_as_upstream(
    series: str, retina_masks: bool, weights: Callable[[str], Path], images: dict[str, np.ndarray]
) -> None:
    params = {"retina_masks": retina_masks, "max_det": 30, "conf": 0.01}
    model = loaded(weights(series), **params)
    shares: list[float] = []
    for name in SHAPES:
        ours = alone(model, images[name])
        assert_same(ours, upstream(weights(series), images[name], **params))
        x1, y1, x2, y2 = ours.boxes_xyxy.T
        shares += (ours.areas / ((x2 - x1) * (y2 - y1)).clip(1)).tolist()
    # A test of the test: the masks are not just the boxes.
    assert len(shares) > 60
    assert np.mean([0.1 < share < 0.9 for share in shares]) > 0.2


@pytest.mark.parametrize("params", [{"conf": 0.4, "iou": 0.3}, {"max_det": 3}, {"agnostic_nms": True}], ids=str)
def test_parameters_are_upstreams(
    params: dict[str, Any], weights: Callable[[str], Path], images: dict[str, np.ndarray]
) -> None:
    path = weights("yolo11n-seg")
    ours = alone(loaded(path, **params), images["portrait"])
    assert len(ours.labels) > 0
    assert_same(ours, upstream(path, images["portrait"], **params))


def test_the_nms_free_head(weights: Callable[[str], Path], images: dict[str, np.ndarray]) -> None:
    path = weights("yolo26n-seg")
    ours = alone(loaded(path, nms=False, max_det=40), images["portrait"])
    assert len(ours.labels) > 10
    assert_same(ours, upstream(path, images["portrait"], nms=False, max_det=40))
    with pytest.raises(BadInput, match="no NMS-free head"):
        loaded(weights("yolov8n-seg"), nms=False)


def test_classes(weights: Callable[[str], Path], images: dict[str, np.ndarray]) -> None:
    everything = alone(loaded(weights("yolov8n-seg")), images["portrait"])
    wanted = everything.labels[0]
    some = alone(loaded(weights("yolov8n-seg"), classes=(wanted,)), images["portrait"])
    assert set(some.labels) == {wanted}
    with pytest.raises(BadInput, match="no class 'persn'; did you mean 'person'"):
        loaded(weights("yolov8n-seg"), classes=("persn",))


def test_together_and_alone(weights: Callable[[str], Path], images: dict[str, np.ndarray]) -> None:
    model = loaded(weights("yolov8n-seg"))
    batch = [images["portrait"], np.ascontiguousarray(images["portrait"][::-1]), images["portrait"] // 2]
    together = model.infer([model.prepare(image, Item("key")) for image in batch])
    for image, result in zip(batch, together, strict=True):
        expected = alone(model, image)
        assert isinstance(result, Result)
        assert result.labels == expected.labels
        assert all(iou(a, b) > 0.999 for a, b in zip(pixels(result), pixels(expected), strict=True))


def test_masks_are_made_a_few_at_a_time(
    weights: Callable[[str], Path], images: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    for retina_masks in (False, True):
        model = loaded(weights("yolov8n-seg"), conf=0.1, retina_masks=retina_masks)
        expected = alone(model, images["odd"])
        with monkeypatch.context() as patch:
            patch.setattr(masks, "_PIXELS", 5 * images["odd"].shape[0] * images["odd"].shape[1])
            few = alone(model, images["odd"])
        assert len(expected.rles) > 10
        assert few.rles == expected.rles
        assert np.array_equal(few.boxes_xyxy, expected.boxes_xyxy)


@pytest.mark.parametrize("series", ["yolov8n-seg", pytest.param("yolo26n-seg", marks=pytest.mark.slow)])
def test_a_cpu_leaves_out_what_is_thrown_away(
    series: str, weights: Callable[[str], Path], images: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boxes and coefficients are computed where something passes, and make the masks of the whole head."""
    few = loaded(weights(series))
    assert few._head.branches.keys() == {"distances", "coefficients"}
    monkeypatch.setattr(yolonetwork, "_LEAST_CONF", 2.0)
    whole = loaded(weights(series))
    assert not whole._head.branches
    ours, theirs = alone(few, images["portrait"]), alone(whole, images["portrait"])
    assert ours.labels == theirs.labels
    assert len(ours.labels) > 3
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-4)
    np.testing.assert_allclose(ours.boxes_xyxy, theirs.boxes_xyxy, atol=0.05)
    np.testing.assert_allclose(ours.areas, theirs.areas, rtol=0.02, atol=4)


@pytest.mark.parametrize("name", ["distances", "coefficients"])
def test_broken_boxes_or_coefficients_fail_their_picture(
    name: str, weights: Callable[[str], Path], images: dict[str, np.ndarray]
) -> None:
    """Of a checkpoint whose classes and features are whole."""
    model = loaded(weights("yolov8n-seg"))
    for stack in model._head.branches[name]._stacks:
        stack[-1].bias.fill_(float("nan"))
    (result,) = model.infer([model.prepare(images["portrait"], Item("key"))])
    assert isinstance(result, ItemFailed)
    assert (result.stage, result.reason) == ("infer", "not-finite")


def test_nothing_found(weights: Callable[[str], Path], images: dict[str, np.ndarray]) -> None:
    result = alone(loaded(weights("yolov8n-seg"), conf=1.0), images["portrait"])
    assert result.labels == ()
    assert result.size == images["portrait"].shape[:2]


def test_numbers_that_are_not_finite_fail_their_picture_alone(
    weights: Callable[[str], Path], images: dict[str, np.ndarray]
) -> None:
    model = loaded(weights("yolov8n-seg"))
    network = model._session
    assert network is not None

    def broken(**inputs: Any) -> Any:
        out = network(**inputs)
        out["maps"][0, 0, 0, 0] = float("nan")
        return out

    model._session = broken
    first, second = model.infer([model.prepare(images["portrait"], Item("key"))] * 2)
    assert isinstance(first, ItemFailed)
    assert first.reason == "not-finite"
    assert isinstance(second, Result)


def test_each_checkpoint_has_its_family(weights: Callable[[str], Path], tmp_path: Path) -> None:
    path = weights("yolov8n-seg")
    assert yoloseg.claims(path)
    assert not yolo.claims(path)
    assert yoloseg.describe(path)[:2] == LABELS[:2]
    assert not yoloseg.claims(tmp_path / "missing.pt")


@pytest.mark.parametrize(("given", "says"), [({"retina_masks": 1}, "true or false"), ({"imgsz": 33}, "multiple")])
def test_wrong_parameters(given: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        Params(**given)


def test_a_closed_model(weights: Callable[[str], Path], images: dict[str, np.ndarray]) -> None:
    model = loaded(weights("yolov8n-seg"))
    assert model.infer([]) == []
    item = model.prepare(images["tiny"], Item("key"))
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.infer([item])
    with pytest.raises(ItemFailed, match="none"):
        model.prepare(None, Item("key"))
