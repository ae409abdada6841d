"""The detr family gives what transformers gives for the same folder and image, and refuses what it cannot run."""

from __future__ import annotations

import functools
import json
import math
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.errors import BadInput, ItemFailed
from storage.results.detections import Result
from workers.models import Item, Site, detr, fill
from workers.models.detr import Params
from workers.runtimes import Network, Session
from workers.runtimes import torch as torch_runtime

LABELS = ("N/A", "person", "bus", "tie", "N/A", "wheel")
QUERIES = 20
KEEP_RATIO = {"shortest_edge": 96, "longest_edge": 160}
SQUARE = {"height": 128, "width": 128}


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

    from workers import ultralytics_checkpoints

    with ultralytics_checkpoints.library():
        from ultralytics.utils import ASSETS
    bus, zidane = (cv2.imread(str(Path(ASSETS) / n))[:, :, ::-1] for n in ("bus.jpg", "zidane.jpg"))
    return {
        "portrait": np.ascontiguousarray(bus),
        "landscape": np.ascontiguousarray(zidane),
        "odd": np.ascontiguousarray(bus[:613, :407]),
        "small": cv2.resize(bus, (23, 37)),
        "three rows": np.ascontiguousarray(zidane[300:303, :12]),
    }


# ---------------------------------------------------------------- tiny checkpoints of each architecture


def _backbone(stages: list[str], kind: str = "ResNetConfig") -> Any:
    import transformers

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    return getattr(transformers, kind)(**sizes, layer_type="basic", out_features=stages)


def _detr_like(name: str, stages: list[str], **more: Any) -> tuple[Any, Any]:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=QUERIES,
        id2label=dict(enumerate(LABELS)),
        **{"use_timm_backbone": False, "backbone_config": _backbone(stages) if stages else None, **more},
    )
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    return model, getattr(transformers, f"{name}ImageProcessor")(size=KEEP_RATIO)


def _rtdetr_like(name: str) -> tuple[Any, Any]:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        backbone_config=_backbone(["stage2", "stage3", "stage4"], "RTDetrResNetConfig"),
        d_model=32,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_queries=QUERIES,
        id2label=dict(enumerate(LABELS)),
    )
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    return model, transformers.RTDetrImageProcessor(size=SQUARE)


def _yolos() -> tuple[Any, Any]:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[96, 160],
        num_detection_tokens=QUERIES,
        id2label=dict(enumerate(LABELS)),
    )
    return YolosForObjectDetection(config), YolosImageProcessor(size=KEEP_RATIO)


def _rfdetr() -> tuple[Any, Any]:
    from transformers import RfDetrConfig, RfDetrDinov2Config, RfDetrForObjectDetection, RfDetrImageProcessor

    backbone = RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=1,
        image_size=128,
        patch_size=16,
        num_windows=2,
        out_features=["stage2", "stage4"],
    )
    config = RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_queries=QUERIES,
        group_detr=2,
        id2label=dict(enumerate(LABELS)),
    )
    return RfDetrForObjectDetection(config), RfDetrImageProcessor(size=SQUARE)


BUILD: dict[str, Callable[[], tuple[Any, Any]]] = {
    "detr": lambda: _detr_like("Detr", ["stage4"]),
    "detr-timm": lambda: _detr_like(
        "Detr", [], use_timm_backbone=True, backbone="resnet18", use_pretrained_backbone=False
    ),
    "conditional": lambda: _detr_like("ConditionalDetr", ["stage4"]),
    "deformable": lambda: _detr_like("DeformableDetr", ["stage2", "stage3", "stage4"], num_feature_levels=4),
    "rtdetr": lambda: _rtdetr_like("RTDetr"),
    "rtdetr-v2": lambda: _rtdetr_like("RTDetrV2"),
    "dfine": lambda: _rtdetr_like("DFine"),
    "rfdetr": _rfdetr,
    "yolos": _yolos,
}


def _spread(model: Any) -> None:
    """Random weights large enough that queries, scores and boxes differ; the usual ones make them nearly equal."""
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                learnt = any(word in name for word in ("embed", "token"))
                weight.normal_(0, 1.0 if learnt else 1 / math.sqrt(weight[0].numel()), generator=numbers)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("detr")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            torch.manual_seed(0)
            model, processor = BUILD[name]()
            if name not in ("rtdetr", "rtdetr-v2", "rfdetr"):  # the anchors of these spread by themselves
                _spread(model)
            model.save_pretrained(folder / name)
            processor.save_pretrained(folder / name)
        return folder / name

    return get


# ---------------------------------------------------------------- what transformers says


@functools.cache
def _upstream(path: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    return AutoModelForObjectDetection.from_pretrained(path).eval(), AutoImageProcessor.from_pretrained(path)


def upstream(path: Path, image: np.ndarray, conf: float, **options: Any) -> dict[str, np.ndarray]:
    """Scores, labels and boxes as the library's own object-detection pipeline makes them, best first."""
    from PIL import Image

    model, processor = _upstream(path)
    inputs = processor(
        images=[Image.fromarray(image)], input_data_format="channels_last", return_tensors="pt", **options
    )
    if path.name == "yolos":  # its pipeline gives the mask away too, but the model does not look at it
        inputs.pop("pixel_mask", None)
    with torch.inference_mode():
        found = processor.post_process_object_detection(model(**inputs), conf, [image.shape[:2]])[0]
    order = found["scores"].argsort(descending=True, stable=True)
    return {name: values[order].numpy() for name, values in found.items()}


def threshold(path: Path, image: np.ndarray, **options: Any) -> float:
    """A threshold in the widest gap of the middle scores, which rounding does not cross."""
    scores = upstream(path, image, 0.0, **options)["scores"]
    middle = scores[len(scores) // 4 : 3 * len(scores) // 4 + 1]
    widest = int(np.argmax(middle[:-1] - middle[1:]))
    return float(middle[widest] + middle[widest + 1]) / 2


def opened(network: Network) -> Session:
    return torch_runtime.open(network, "cpu", "fp32")


def loaded(path: Path, params: Params = Params()) -> detr.Detector:
    return detr.load(detr.CARDS[0], params, path, Site("cpu", opened))


def alone(model: detr.Detector, image: np.ndarray) -> Result:
    (result,) = model.infer([model.prepare(image, Item("key"))])
    assert isinstance(result, Result)
    return result


def assert_same(ours: Result, theirs: dict[str, np.ndarray]) -> None:
    """Same scores in order; each box has a partner of its class and score within 0.2 px, as near scores may swap."""
    assert len(ours.labels) == len(theirs["scores"])
    np.testing.assert_allclose(ours.scores, theirs["scores"], atol=1e-4)
    free = np.ones(len(ours.labels), bool)
    for box, score, class_id in zip(ours.boxes_xyxy, ours.scores, ours.class_ids, strict=True):
        near = (np.abs(theirs["boxes"] - box).max(1) < 0.2) & (np.abs(theirs["scores"] - score) < 1e-4)
        near &= (theirs["labels"] == class_id) & free
        assert near.any(), (box, score, class_id)
        free[near.argmax()] = False


BY_DEFAULT = ("detr", "deformable", "rtdetr", "rfdetr")  # the others are variants of these


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in BY_DEFAULT else pytest.mark.slow) for n in BUILD])
def test_boxes_are_those_of_transformers(name: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(name)
    model = loaded(path)
    distinct = 0
    for image in pictures().values():
        conf = threshold(path, image)
        model._params = replace(model._params, conf=conf)
        ours = alone(model, image)
        assert len(ours.labels) >= 4
        assert ours.labels == tuple(LABELS[i] for i in ours.class_ids)
        assert_same(ours, upstream(path, image, conf))
        distinct = max(distinct, len(np.unique(ours.boxes_xyxy.round(), axis=0)))
    assert distinct > 3  # else the comparison says little


@pytest.mark.parametrize("name", ["detr", "rtdetr"])
def test_parameters(name: str, checkpoint: Callable[[str], Path]) -> None:
    path, image = checkpoint(name), pictures()["odd"]
    conf = threshold(path, image)
    everything = alone(loaded(path, Params(conf=conf)), image)
    few = alone(loaded(path, Params(conf=conf, max_det=2)), image)
    assert few.scores.tolist() == everything.scores[:2].tolist()
    wanted = everything.labels[-1]
    some = alone(loaded(path, Params(conf=conf, classes=(wanted,))), image)
    assert set(some.labels) == {wanted}
    kept = [i for i, label in enumerate(everything.labels) if label == wanted]
    assert np.array_equal(some.boxes_xyxy, everything.boxes_xyxy[kept])
    with pytest.raises(BadInput, match=r"no label 'bos'; did you mean 'bus'\?"):
        loaded(path, Params(classes=("bos",)))


@pytest.mark.parametrize(
    ("name", "size"),
    [("detr", {"shortest_edge": 64, "longest_edge": 107}), ("rtdetr", {"height": 64, "width": 64})],
)
def test_another_input_size(name: str, size: dict[str, int], checkpoint: Callable[[str], Path]) -> None:
    path, image = checkpoint(name), pictures()["portrait"]
    conf = threshold(path, image, size=size)
    model = loaded(path, Params(conf=conf, imgsz=64))
    assert min(model.prepare(image, Item("key")).group[1:]) == 64
    assert_same(alone(model, image), upstream(path, image, conf, size=size))


def test_a_size_that_the_network_cannot_take_is_said(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match="does not take imgsz 50"):
        loaded(checkpoint("rtdetr"), Params(imgsz=50))


@pytest.mark.parametrize("name", ["detr", "deformable", "rtdetr", "rfdetr"])
def test_a_batch_gives_what_each_picture_gives_alone(name: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(name)
    images = [np.ascontiguousarray(np.roll(pictures()["odd"], 37 * i, 1)) for i in range(5)]
    model = loaded(path, Params(conf=threshold(path, images[0])))
    prepared = [model.prepare(image, Item(str(i))) for i, image in enumerate(images)]
    assert len({item.group for item in prepared}) == 1
    together = model.infer(prepared)
    assert len({r.scores.tobytes() for r in together}) == 5  # different pictures
    for item, result in zip(prepared, together, strict=True):
        (single,) = model.infer([item])
        assert_same(result, {"scores": single.scores, "labels": single.class_ids, "boxes": single.boxes_xyxy})


def test_images_of_other_shapes_are_no_batch(checkpoint: Callable[[str], Path]) -> None:
    """Padded to one shape DETR finds something else in them, so each shape is a group of its own."""
    model = loaded(checkpoint("detr"))
    groups = {model.prepare(pictures()[name], Item(name)).group for name in ("portrait", "landscape")}
    assert len(groups) == 2


def fake(logits: torch.Tensor, boxes: torch.Tensor, path: Path, **params: Any) -> detr.Detector:
    """A detector whose network always gives these numbers."""
    model = loaded(path, Params(**params))
    model._session = lambda **_: {"logits": logits, "boxes": boxes}
    return model


def test_a_box_by_hand(checkpoint: Callable[[str], Path]) -> None:
    """Class 2 of 6 and "no object" share all but nothing of the first query's softmax; the second is "no object"."""
    logits = torch.full((1, 2, 7), -50.0)
    logits[0, 0, 2] = logits[0, 0, 6] = 0.0
    logits[0, 1, 6] = 9.0
    boxes = torch.tensor([[[0.5, 0.25, 0.2, 0.1], [0.5, 0.5, 1, 1]]])
    result = alone(fake(logits, boxes, checkpoint("detr"), conf=0.4), np.zeros((200, 100, 3), np.uint8))
    np.testing.assert_allclose(result.boxes_xyxy, [[40, 40, 60, 60]], atol=1e-3)
    assert (result.labels, result.scores.tolist()) == (("bus",), [0.5])
    nothing = alone(fake(logits, boxes, checkpoint("detr"), conf=0.6), np.zeros((200, 100, 3), np.uint8))
    assert nothing.labels == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_infinite_number_fails_its_picture_only(bad: float, checkpoint: Callable[[str], Path]) -> None:
    logits, boxes = torch.zeros(3, 4, 7), torch.full((3, 4, 4), 0.5)
    boxes[1, 2, 3] = bad
    model = fake(logits, boxes, checkpoint("detr"), conf=0.0)
    item = model.prepare(np.zeros((32, 32, 3), np.uint8), Item("key"))
    first, second, third = model.infer([item] * 3)
    assert isinstance(first, Result)
    assert isinstance(third, Result)
    assert isinstance(second, ItemFailed)
    assert (second.stage, second.reason) == ("infer", "not-finite")


def test_a_picture_of_which_nothing_would_be_left(checkpoint: Callable[[str], Path]) -> None:
    model = loaded(checkpoint("detr"))
    with pytest.raises(ItemFailed, match="1x3000 pixels") as caught:
        model.prepare(np.zeros((3000, 1, 3), np.uint8), Item("key"))
    assert caught.value.reason == "too-thin"
    with pytest.raises(ItemFailed, match="has none"):
        model.prepare(None, Item("key"))


def test_half_precision_stays_near(checkpoint: Callable[[str], Path]) -> None:
    path, image = checkpoint("detr"), pictures()["odd"]
    exact = alone(loaded(path, Params(conf=0.0)), image)
    site = Site("cpu", lambda network: torch_runtime.open(network, "cpu", "bf16"))
    half = alone(detr.load(detr.CARDS[0], Params(conf=0.0), path, site), image)
    assert len(half.labels) == QUERIES
    np.testing.assert_allclose(half.scores, exact.scores, atol=0.03)


def test_a_network_can_be_built_again(checkpoint: Callable[[str], Path]) -> None:
    """A second runtime gets a module of its own, in float32, whatever the first did to its own."""
    kept: list[Network] = []

    def open_half(network: Network) -> Session:
        kept.append(network)
        return torch_runtime.open(network, "cpu", "bf16")

    detr.load(detr.CARDS[0], Params(), checkpoint("rtdetr"), Site("cpu", open_half))
    again = kept[0].build()
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    logits, boxes = again(*kept[0].example.values())
    assert (logits.shape, boxes.shape) == ((2, QUERIES, len(LABELS)), (2, QUERIES, 4))


# ---------------------------------------------------------------- checkpoints as they come


def changed(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other values in config.json; None takes one out."""
    shutil.copytree(source, target)
    values = {**json.loads((target / "config.json").read_text()), **config}
    (target / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return target


def test_describe_and_claims(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint("detr")
    assert detr.claims(path)
    assert detr.describe(path) == LABELS
    gaps = changed(path, tmp_path / "gaps", id2label={"1": "one", "3": "three"})
    assert detr.describe(gaps) == ("class_0", "one", "class_2", "three")
    bare = changed(path, tmp_path / "bare", id2label=None)
    assert detr.describe(bare) == ("LABEL_0", "LABEL_1")
    assert not detr.claims(changed(path, tmp_path / "other", architectures=["Dinov2Model"]))
    assert not detr.claims(changed(path, tmp_path / "none", architectures=None))
    assert not detr.claims(path / "model.safetensors")
    assert not detr.claims(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert not detr.claims(tmp_path)


def test_pickled_weights_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint("detr"), tmp_path / "pickled")
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    assert detr.claims(path)
    for call in (detr.describe, loaded):
        with pytest.raises(BadInput, match=r"no model\.safetensors"):
            call(path)


def test_a_folder_without_its_image_processor(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint("detr"), tmp_path / "half")
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(BadInput, match=r"no preprocessor_config\.json"):
        detr.describe(path)


def test_weights_that_lack_tensors(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers fills them with random numbers and warns; here they are refused."""
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(checkpoint("detr"), tmp_path / "lacking")
    tensors = load_file(path / "model.safetensors")
    del tensors["class_labels_classifier.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"lacks 1 of the tensors .* class_labels_classifier\.weight"):
        loaded(path)


def test_weights_of_another_shape_and_damaged_ones(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = changed(checkpoint("detr"), tmp_path / "shape", d_model=64)
    with pytest.raises(BadInput, match="could not be loaded by transformers"):
        loaded(path)
    path = shutil.copytree(checkpoint("detr"), tmp_path / "cut")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="could not be loaded by transformers"):
        loaded(path)


def test_detectors_by_text_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = changed(checkpoint("detr"), tmp_path / "owl", architectures=["OwlViTForObjectDetection"])
    with pytest.raises(BadInput, match="detects what a text names"):
        detr.describe(path)


def test_code_of_a_checkpoint_is_not_run(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    made = tmp_path / "made"
    code = {"AutoConfig": "evil.Config", "AutoModelForObjectDetection": "evil.Model"}
    for model_type in ("detr", "mine"):
        path = changed(checkpoint("detr"), tmp_path / model_type, auto_map=code, model_type=model_type)
        (path / "evil.py").write_text(f"open({str(made)!r}, 'w')")
        if model_type == "detr":
            assert loaded(path)
        else:
            with pytest.raises(BadInput):
                loaded(path)
    assert not made.exists()


def test_nothing_is_fetched(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first DETR checkpoints ask for a pretrained backbone of timm; their own tensors take its place."""
    before = checkpoint("detr-timm")
    path = changed(
        before,
        tmp_path / "old",
        backbone_config=None,
        backbone="resnet18",
        use_timm_backbone=True,
        use_pretrained_backbone=True,
    )

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    image = pictures()["odd"]
    old, new = (alone(loaded(p, Params(conf=0.0)), image) for p in (path, before))
    assert np.array_equal(old.boxes_xyxy, new.boxes_xyxy)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"conf": 1.5}, "conf must be from 0 to 1"),
        ({"conf": float("nan")}, "conf must be from 0 to 1"),
        ({"conf": True}, "conf must be a number"),
        ({"max_det": 0}, "max_det must be from 1"),
        ({"max_det": 2.0}, "max_det must be a whole number"),
        ({"imgsz": 8}, "imgsz must be 0 for the checkpoint's own size"),
        ({"imgsz": -1}, "imgsz must be from 0"),
        ({"classes": "bus"}, "classes must be a list"),
        ({"classes": [1]}, "classes must be a list"),
        ({"iou": 0.5}, "has no parameter 'iou'"),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        fill(detr.CARDS[0], given)
