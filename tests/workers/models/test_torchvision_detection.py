"""The torchvision_detection family gives what torchvision's own models give, and knows each by its state dict."""

from __future__ import annotations

import argparse
import collections
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import detection, get_model_weights

from storage.errors import BadInput, ItemFailed
from storage.results.detections import Result
from workers.models import Item, Site, fill
from workers.models import torchvision_detection as family
from workers.models.torchvision_detection import _BUILDERS, CARDS, COCO, Params

CLASSES = 7
SMALL = 128  # shorter side of the input, for speed
MOBILE = "fasterrcnn_mobilenet_v3_large_320_fpn"
LITE = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small inputs on a shared machine: threads that wait for each other cost more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def pictures() -> dict[str, np.ndarray]:
    """RGB photographs of several shapes."""
    import cv2

    from workers import ultralytics_checkpoints

    with ultralytics_checkpoints.library():
        from ultralytics.utils import ASSETS
    bus, zidane = (cv2.imread(str(Path(ASSETS) / n))[:, :, ::-1] for n in ("bus.jpg", "zidane.jpg"))
    return {
        "portrait": np.ascontiguousarray(bus),
        "landscape": np.ascontiguousarray(zidane),
        "small": cv2.resize(bus, (23, 37)),
    }


_LAST = re.compile(r".*(cls_logits|cls_score|bbox_pred|bbox_reg|bbox_ctrness|_head\.module_list\.\d(\.1)?)")


@functools.lru_cache(maxsize=3)  # nobody changes them: tests load copies from files
def built(name: str, **options: Any) -> Any:
    """torchvision's own model with random weights whose scores and boxes differ."""
    torch.manual_seed(0)
    options = {"num_classes": CLASSES, **options}
    model = few_proposals(getattr(detection, name)(weights=None, weights_backbone=None, **options)).eval()
    _spread(model)
    return model


def _spread(model: Any) -> None:
    """Fit the batch norms to pictures, and scale the last layers so that the numbers they give are spread."""
    images = [torch.from_numpy(image[::4, ::4].copy()).permute(2, 0, 1) / 255 for image in pictures().values()][:2]
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    layers = {m: n for n, m in model.named_modules() if _LAST.fullmatch(n) and hasattr(m, "weight")}
    seen: dict[Any, list[torch.Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # running statistics become plain means
            norm.train()
        if norms:
            model(images)
        model.eval()
        hooks = [layer.register_forward_hook(lambda m, _, out: seen[m].append(out.flatten())) for layer in seen]
        model(images[:1])
        for layer, outputs in seen.items():
            layer.weight.mul_((3 if "cls_score" in layers[layer] else 1) / float(torch.cat(outputs).std()))
            layer.bias.zero_()
    for hook in hooks:
        hook.remove()


def small(name: str) -> dict[str, int]:
    """What makes an input small, in torchvision's words; SSD has one size."""
    sizes = _BUILDERS[name].sizes
    return {"min_size": SMALL, "max_size": round(SMALL * sizes[1] / sizes[0])} if sizes else {}


def few_proposals(model: Any) -> Any:
    """A second stage that looks at fewer boxes, for speed."""
    if hasattr(model, "rpn"):
        model.rpn._post_nms_top_n = {"training": 40, "testing": 40}
    return model


def saved(model: Any, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def loaded(path: Path, name: str = "", precision: str = "fp32", **params: Any) -> family.Detector:
    card = next((card for card in CARDS if card.name == name), CARDS[0])
    model = family.load(card, Params(**params), path, Site("cpu", lambda _: pytest.fail("not used"), precision))
    few_proposals(model._model)
    return model


def shrunk(name: str) -> dict[str, int]:
    return {"imgsz": SMALL} if _BUILDERS[name].sizes else {}


def alone(model: family.Detector, image: np.ndarray) -> Result:
    (result,) = model.infer([model.prepare(image, Item("key"))])
    assert isinstance(result, Result)
    return result


def upstream(model: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        (found,) = model([torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255])
    order = found["scores"].argsort(descending=True, stable=True)
    return {name: values[order].numpy() for name, values in found.items()}


def assert_same(ours: Result, theirs: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    """Same scores in order; each box has a partner of its class and score within 0.2 px, as near scores may swap."""
    assert len(ours.labels) == len(theirs["scores"])
    assert (np.diff(ours.scores) <= 0).all()
    np.testing.assert_allclose(ours.scores, theirs["scores"], atol=tolerance)
    free = np.ones(len(ours.labels), bool)
    for box, score, class_id in zip(ours.boxes_xyxy, ours.scores, ours.class_ids, strict=True):
        near = (np.abs(theirs["boxes"] - box).max(1) < 0.2) & (np.abs(theirs["scores"] - score) < tolerance)
        near &= (theirs["labels"] == class_id) & free
        assert near.any(), (box, score, class_id)
        free[near.argmax()] = False


# Large networks. In every run the smaller ones are tried, and RetinaNet's by its published weights.
LARGE = {
    *("ssd300_vgg16", "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"),
    *("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in _BUILDERS])
def test_boxes_are_those_of_torchvision(name: str, tmp_path: Path) -> None:
    theirs = built(name, **small(name))
    path = saved(theirs, tmp_path / f"{name}.pth")
    assert family.claims(path)
    background = "__background__" if _BUILDERS[name].background else "class_0"
    assert family.describe(path) == (background, *(f"class_{i}" for i in range(1, CLASSES)))
    model = loaded(path, **shrunk(name))
    assert (type(model._model), model._model.transform.min_size) == (type(theirs), theirs.transform.min_size)
    path.unlink()  # 160 MB each
    of, other = (getattr(m, "roi_heads", m) for m in (model._model, theirs))
    for limit in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(of, limit) == getattr(other, limit)
    found = 0
    for image in list(pictures().values())[: 1 if name == "ssd300_vgg16" else 3]:  # a second a picture
        ours = alone(model, image)
        assert_same(ours, upstream(theirs, image))
        found += len(ours.labels)
    assert found > 10  # else the comparison says little


@pytest.mark.parametrize("name", [MOBILE, LITE])
def test_parameters(name: str, tmp_path: Path) -> None:
    image = pictures()["portrait"]
    plain = built(name)
    path = saved(plain, tmp_path / f"{name}.pth")
    scores = upstream(plain, image)["scores"]
    conf = float(scores[len(scores) // 2 : len(scores) // 2 + 2].mean())
    prefix = "box_" if name == MOBILE else ""
    options = {f"{prefix}score_thresh": conf, f"{prefix}nms_thresh": 0.2, f"{prefix}detections_per_img": 9}
    theirs = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=CLASSES, **options).eval()
    few_proposals(theirs).load_state_dict(plain.state_dict())
    ours = alone(loaded(path, conf=conf, iou=0.2, max_det=9), image)
    assert_same(ours, upstream(theirs, image))
    everything = alone(loaded(path, max_det=100_000), image)
    wanted = everything.labels[-1]
    some = alone(loaded(path, classes=(wanted,), max_det=5), image)
    kept = [i for i, label in enumerate(everything.labels) if label == wanted][:5]
    assert set(some.labels) == {wanted}
    assert np.array_equal(some.boxes_xyxy, everything.boxes_xyxy[kept])
    with pytest.raises(BadInput, match=r"no label 'clas_1'; did you mean 'class_1'\?"):
        loaded(path, classes=("clas_1",))


@pytest.mark.parametrize("name", [MOBILE, LITE])
def test_a_batch_gives_what_each_picture_gives_alone(name: str, tmp_path: Path) -> None:
    """Also with pictures of other shapes: 640x480 and 648x480 are both padded to 448x320."""
    model = loaded(saved(built(name), tmp_path / f"{name}.pth"), name)
    bus = pictures()["portrait"]
    shapes = [(640, 480), (648, 480), (640, 480), (1296, 960)]
    images = [np.ascontiguousarray(np.roll(bus, 40 * i, 1)[:h, :w]) for i, (h, w) in enumerate(shapes)]
    images[3] = np.ascontiguousarray(np.pad(bus, ((0, 216), (0, 150), (0, 0)))[:1296, :960])
    prepared = [model.prepare(image, Item(str(i))) for i, image in enumerate(images)]
    assert {item.group for item in prepared} == {(448, 320) if name == MOBILE else (320, 320)}
    together = model.infer(prepared)
    assert len({r.scores.tobytes() for r in together}) == 4  # different pictures
    for item, result in zip(prepared, together, strict=True):
        (single,) = model.infer([item])
        assert_same(result, {"scores": single.scores, "labels": single.class_ids, "boxes": single.boxes_xyxy})


def test_pictures_that_would_be_padded_for_each_other_are_no_batch(tmp_path: Path) -> None:
    model = loaded(saved(built(MOBILE), tmp_path / "weights.pth"), MOBILE)
    groups = {model.prepare(image, Item("key")).group for image in list(pictures().values())[:2]}
    assert len(groups) == 2


@pytest.mark.parametrize("name", [MOBILE, LITE])
def test_groups_are_the_shapes_that_torchvision_pads_to(name: str, tmp_path: Path) -> None:
    model = loaded(saved(built(name), tmp_path / "weights.pth"), name)
    rng = np.random.default_rng(0)
    edges = [(1, 1), (1, 600), (480, 640), (641, 481), (723, 481)]
    for height, width in [*edges, *rng.integers(1, 900, (30, 2)).tolist()]:
        image = np.zeros((height, width, 3), np.uint8)
        padded, _ = model._model.transform([torch.zeros(3, height, width)])
        assert model.prepare(image, Item("key")).group == padded.tensors.shape[2:]


@pytest.mark.parametrize(
    "name", [pytest.param("fasterrcnn_resnet50_fpn", marks=pytest.mark.slow), "retinanet_resnet50_fpn"]
)
def test_published_weights_give_what_torchvision_makes_of_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their batch norms are frozen and have no eps; RetinaNet's keys are those of an earlier version."""
    tensors = built(name, num_classes=len(COCO), **small(name)).state_dict()
    tensors = {key: value for key, value in tensors.items() if "num_batches" not in key}
    # The same function with a first variance near 1e-4, where an eps of 1e-5 shows.
    less = 0.01 / float(tensors["backbone.body.bn1.running_var"].median().sqrt())
    for part, power in (("conv1.weight", 1), ("bn1.running_mean", 1), ("bn1.running_var", 2)):
        tensors[f"backbone.body.{part}"] = tensors[f"backbone.body.{part}"] * less**power
    for i in range(4):
        for part in [key for key in tensors if f"_head.conv.{i}.0." in key]:
            tensors[part.replace(f"conv.{i}.0", f"conv.{2 * i}")] = tensors.pop(part)
    torch.save(tensors, tmp_path / "published.pth")
    weights = get_model_weights(name)
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: tensors)
    theirs = few_proposals(getattr(detection, name)(weights=weights.COCO_V1, **small(name)).eval())
    model = loaded(tmp_path / "published.pth", imgsz=SMALL)
    assert model._labels == COCO
    image = pictures()["landscape"]
    ours = alone(model, image)
    assert ours.labels
    assert_same(ours, upstream(theirs, image), 1e-3)  # a frozen norm multiplies and adds in another order
    for module in model._model.modules():
        module.eps = 1e-5
    other = alone(model, image)
    assert other.scores.shape != ours.scores.shape or not np.allclose(other.scores, ours.scores, atol=3e-3)


def test_cards_are_those_of_torchvision() -> None:
    for card in CARDS:
        (weights,) = get_model_weights(card.name)
        assert card.weights == weights.url
        assert f"-{card.sha256}.pth" in weights.url
        assert tuple(weights.meta["categories"]) == COCO


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(built(LITE), tmp_path_factory.mktemp("lite") / "lite.pth")


def test_the_small_mobilenet_is_known_by_its_name(tmp_path: Path) -> None:
    path = saved(built(MOBILE), tmp_path / "mine.pth")
    assert loaded(path)._model.transform.min_size == (800,)
    assert loaded(path, MOBILE)._model.transform.min_size == (320,)
    path.rename(tmp_path / "mine-320.pth")
    assert loaded(tmp_path / "mine-320.pth")._model.transform.min_size == (320,)


def test_other_files_that_hold_the_same_tensors(lite: Path, tmp_path: Path) -> None:
    """safetensors, parameters in place of tensors, and the checkpoint of torchvision's training script."""
    from safetensors.torch import save_file

    tensors = torch.load(lite, weights_only=True)
    save_file(tensors, tmp_path / "weights.safetensors")
    torch.save({k: torch.nn.Parameter(v, requires_grad=False) for k, v in tensors.items()}, tmp_path / "parameters.pth")
    extra = {"args": argparse.Namespace(lr=0.1), "lr_scheduler": {"milestones": collections.Counter([8])}, "epoch": 3}
    torch.save({"model": tensors, **extra}, tmp_path / "training.pth")
    image = pictures()["small"]
    expected = alone(loaded(lite), image)
    for path in tmp_path.iterdir():
        assert family.claims(path)
        assert family.describe(path) == family.describe(lite)
        assert alone(loaded(path), image).scores.tolist() == expected.scores.tolist()


def test_files_of_others(lite: Path, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 3), "step": 3}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "short.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "absent.pth"):
        assert not family.claims(path)
        with pytest.raises(BadInput):
            family.describe(path)
    masks = torch.load(lite, weights_only=True) | {
        "roi_heads.box_predictor.cls_score.weight": torch.zeros(2, 4),
        "roi_heads.mask_head.0.0.weight": torch.zeros(1),
    }
    torch.save(masks, tmp_path / "masks.pth")
    assert not family.claims(tmp_path / "masks.pth")


def test_tensors_that_do_not_fit(lite: Path, tmp_path: Path) -> None:
    tensors = torch.load(lite, weights_only=True)
    lacking = {key: value for key, value in tensors.items() if not key.startswith("backbone.extra")}
    torch.save(lacking, tmp_path / "lacking.pth")
    with pytest.raises(BadInput, match=f"looks like a {LITE}, but its tensors do not fit"):
        loaded(tmp_path / "lacking.pth")


def test_a_checkpoint_that_runs_code_is_refused(lite: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"model": torch.load(lite, weights_only=True), "args": Evil()}, tmp_path / "evil.pth")
    assert family.claims(tmp_path / "evil.pth")
    with pytest.raises(BadInput, match=r"wants to run posix\.mkdir"):
        loaded(tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", [MOBILE, LITE])
@pytest.mark.parametrize("stage", ["features", "head"])
def test_nan_fails_its_picture_only(name: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision drops boxes of NaN without a word, which would look like an empty picture."""
    model = loaded(saved(built(name), tmp_path / "weights.pth"), name)
    image = pictures()["small"]
    batch = [model.prepare(image, Item(str(i))) for i in range(3)]
    if stage == "features":
        real = model._tensor
        monkeypatch.setattr(model, "_tensor", lambda item: real(item) * (float("nan") if item is batch[1] else 1))
        failed = [False, True, False]
    else:  # the last layer overflows, in every picture
        last = model._model.roi_heads.box_predictor.cls_score if name == MOBILE else _last(model._model)
        last.bias.data[1] = float("inf")
        failed = [True] * 3
    results = model.infer(batch)
    assert [isinstance(r, ItemFailed) for r in results] == failed
    assert {(r.stage, r.reason) for r in results if isinstance(r, ItemFailed)} == {("infer", "not-finite")}


def _last(model: Any) -> Any:
    return model.head.classification_head.module_list[0][1]


def test_a_second_stage_that_fails_in_one_picture(tmp_path: Path) -> None:
    """Its rows are those of all pictures in a line; only the guilty picture's count."""
    model = loaded(saved(built(MOBILE), tmp_path / "weights.pth"), MOBILE)
    predictor = model._model.roi_heads.box_predictor

    def spoil(module: Any, inputs: Any, out: tuple[Any, Any]) -> tuple[Any, Any]:
        out[0][45] = float("nan")  # 40 proposals a picture: the second one's
        return out

    predictor.register_forward_hook(spoil)
    batch = [model.prepare(pictures()["portrait"], Item(str(i))) for i in range(3)]
    assert [isinstance(r, ItemFailed) for r in model.infer(batch)] == [False, True, False]


def test_pictures_that_cannot_be_prepared(lite: Path, tmp_path: Path) -> None:
    model = loaded(saved(built(MOBILE), tmp_path / "weights.pth"), MOBILE)
    with pytest.raises(ItemFailed, match="1x3000 pixels") as caught:
        model.prepare(np.zeros((3000, 1, 3), np.uint8), Item("key"))
    assert caught.value.reason == "too-thin"
    with pytest.raises(ItemFailed, match="has none"):
        model.prepare(None, Item("key"))
    with pytest.raises(BadInput, match="whose input has one size"):
        loaded(lite, imgsz=320)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_keeps_the_anchors(precision: str, tmp_path: Path) -> None:
    """Anchors are placed in float32, since bf16 steps by 4 pixels above 512; scores stay near."""
    path = saved(built(MOBILE), tmp_path / "weights.pth")
    item = loaded(path).prepare(pictures()["portrait"], Item("key"))
    anchors, best = [], []
    for chosen in ("fp32", precision):
        model = loaded(path, MOBILE, chosen)
        model._model.rpn.anchor_generator.register_forward_hook(lambda _, __, out: anchors.append(out[0]))
        (result,) = model.infer([item])
        assert isinstance(result, Result)
        assert result.scores.dtype == result.boxes_xyxy.dtype == np.float32
        best.append(result.scores[:5])
    assert torch.equal(*anchors)
    np.testing.assert_allclose(*best, atol=0.1)
    assert not np.array_equal(*best)  # it did compute in less


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"conf": 1.5}, "conf must be from 0 to 1"),
        ({"conf": float("nan")}, "conf must be from 0 to 1"),
        ({"iou": True}, "iou must be a number"),
        ({"max_det": 0}, "max_det must be from 1"),
        ({"imgsz": 20}, "imgsz must be from 32"),
        ({"imgsz": 640.0}, "imgsz must be a whole number"),
        ({"classes": "person"}, "classes must be a list"),
        ({"nms": 0.5}, "has no parameter 'nms'"),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        fill(CARDS[0], given)
