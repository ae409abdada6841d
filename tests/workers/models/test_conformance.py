"""What every model family must do, whatever it computes; a new file in the folder is picked up by itself.

A new family needs one thing here: an entry in `WEIGHTS` that builds its smallest weights, without network; or says how
itself, in a function `example_weights(folder)` of its file, which may return None. A family
of several kinds is tested once for each; where one of them needs other weights, "family/kind" names them.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import storage.results
from storage.errors import BadInput
from storage.results import image
from workers import inflight, models, runtimes
from workers.models import Card, Item, Prepared, Site

RUN_ON = "cpu"


def _yolo(folder: Path) -> Path:
    import torch

    from workers import ultralytics_checkpoints

    with ultralytics_checkpoints.library():
        from ultralytics import YOLO

        torch.manual_seed(0)
        model = YOLO("yolov8n.yaml")
        for conv in model.model.model[-1].cv3:
            conv[-1].bias.data.fill_(-1.0)  # so that random weights find boxes
        model.save(folder / "yolo.pt")
    return folder / "yolo.pt"


def _onnxfile(folder: Path) -> Path:
    import warnings

    from workers import ultralytics_checkpoints

    path = _yolo(folder)
    with ultralytics_checkpoints.library(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tracing says of the library's own code
        from ultralytics import YOLO

        return Path(YOLO(path).export(format="onnx", imgsz=64, dynamic=True, simplify=False, verbose=False))


def _rtdetr(folder: Path) -> Path:
    import torch
    import yaml

    from workers import ultralytics_checkpoints

    backbone = [[-1, 1, "HGStem", [8, 8]], [-1, 1, "DWConv", [16, 3, 2]], [-1, 1, "DWConv", [32, 3, 2]]]
    description = {"nc": 3, "backbone": backbone, "head": [[[1, 2], 1, "RTDETRDecoder", ["nc", 16, 8, 2, 2, 1, 32]]]}
    with ultralytics_checkpoints.library():
        from ultralytics import RTDETR

        torch.manual_seed(0)
        (folder / "rtdetr.yaml").write_text(yaml.safe_dump(description))
        model = RTDETR(str(folder / "rtdetr.yaml"))
        head = model.model.model[-1]
        for linear in (head.enc_score_head, *head.dec_score_head):
            linear.weight.data.normal_(0, 0.5)  # so that random weights find boxes whose scores differ
        model.save(folder / "rtdetr.pt")
    return folder / "rtdetr.pt"


def _detr(folder: Path) -> Path:
    import torch
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False, backbone_config=backbone, d_model=32, num_queries=8, num_labels=5, **sizes, **heads
        )
    )
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # large enough that scores differ by more than rounding
            weight.data.normal_(0, 1 if "embed" in name else weight[0].numel() ** -0.5)
    model.save_pretrained(folder / "detr")
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 1333}).save_pretrained(folder / "detr")
    return folder / "detr"


def _torchvision_detection(folder: Path) -> Path:
    import torch
    from torchvision.models import detection

    torch.manual_seed(0)
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(list(torch.rand(4, 3, 48, 64)))  # without it every number of the last layers is nearly the same
    for layer in model.head.classification_head.module_list:
        layer[1].weight.data.mul_(30)  # so that scores differ by more than rounding
    torch.save(model.state_dict(), folder / "ssdlite.pth")
    return folder / "ssdlite.pth"


def _dinov2(folder: Path) -> Path:
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 56, "patch_size": 14}
    transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    transformers.BitImageProcessor(**size).save_pretrained(folder)
    return folder


def _diffusion(folder: Path) -> Path:
    from tests.workers.models import tinydiffusion

    return tinydiffusion.sd(folder)


def _sam(folder: Path) -> Path:
    import torch

    from tests.workers.models.tinysam import tiny

    torch.save(tiny().state_dict(), folder / "sam.pth")
    return folder / "sam.pth"


def _sam2(folder: Path) -> Path:
    from tests.workers.models.tinysam2 import save, tiny

    return save(tiny(), folder / "sam2")


def _timm(folder: Path) -> Path:
    import timm

    sizes = {"img_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 10}
    given = {"input_size": (3, 32, 32), "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=given, **sizes)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


def _torchvision_models(folder: Path) -> Path:
    import torch
    from torchvision.models import resnet18

    torch.save(resnet18(num_classes=10).state_dict(), folder / "resnet.pth")
    return folder / "resnet.pth"


def _yoloseg(folder: Path) -> Path:
    import torch

    from workers import ultralytics_checkpoints

    with ultralytics_checkpoints.library():
        from ultralytics import YOLO

        torch.manual_seed(0)
        model = YOLO("yolov8n-seg.yaml")
        head = model.model.model[-1]
        for conv in head.cv3:
            conv[-1].bias.data.fill_(-1.0)  # so that random weights find boxes
        head.proto.cv3.act = torch.nn.Identity()  # and masks that do not fill them
        model.save(folder / "yoloseg.pt")
    return folder / "yoloseg.pt"


def _torchvision_segmentation(folder: Path) -> Path:
    import torch
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(0)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    model.classifier.low_classifier.weight.data.mul_(100)  # large enough that classes differ by more than rounding
    torch.save(model.state_dict(), folder / "lraspp.pth")
    return folder / "lraspp.pth"


def _maskrcnn(folder: Path) -> Path:
    import torch
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    torch.save(model.state_dict(), folder / "maskrcnn.pth")
    return folder / "maskrcnn.pth"


# family or "family/kind" -> builds tiny weights in a folder; None for a family without weights
WEIGHTS: dict[str, Callable[[Path], Path] | None] = {
    "stub": None,
    "transform": None,
    "diffusion": _diffusion,
    "yolo": _yolo,
    "onnxfile": _onnxfile,
    "detr": _detr,
    "rtdetr": _rtdetr,
    "torchvision_detection": _torchvision_detection,
    "dinov2": _dinov2,
    "sam": _sam,
    "sam2": _sam2,
    "yoloseg": _yoloseg,
    "torchvision_segmentation": _torchvision_segmentation,
    "maskrcnn": _maskrcnn,
    "timm": _timm,
    "torchvision_models": _torchvision_models,
}
SMALL: dict[str, dict[str, Any]] = {  # the same -> parameters that make it quick
    "diffusion": {"prompt": "a cat", "steps": 4},
    "yolo": {"imgsz": 64},
    "detr": {"conf": 0.0},
    "rtdetr": {"imgsz": 64, "conf": 0.1},
    "torchvision_detection": {"max_det": 10},
    "sam": {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0},
    "sam2": {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0},
    "yoloseg": {"imgsz": 64, "max_det": 5},
    "torchvision_segmentation": {"imgsz": 64},
    "maskrcnn": {"imgsz": 128, "max_det": 5},
    "torchvision_models": {"imgsz": 32},
}


def _open(network: Any) -> Any:
    from workers.runtimes import torch

    return torch.open(network, RUN_ON, "fp32")


# One family of each kind in every run, and those without weights; of the others, their own tests by default.
EVERY_RUN = {"dinov2", "diffusion", "sam", "stub", "transform", "yolo"}


def _pairs() -> list[Any]:
    """Every family with every kind it yields."""
    return [
        pytest.param((name, kind), marks=pytest.mark.slow if name in WEIGHTS.keys() - EVERY_RUN else [])
        for name in models.families()
        for kind in sorted({c.kind for c in models.family(name).CARDS})
    ]


@dataclasses.dataclass
class Subject:
    """A family with its first card of a kind, its weights and its model."""

    family: Any
    card: Card
    weights: Path | None
    model: Any


@pytest.fixture(scope="module", params=_pairs(), ids="/".join)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    name, kind = request.param
    pair = f"{name}/{kind}"
    family = models.family(name)
    only = getattr(family, "RUNTIME", None)
    if only and not runtimes.precisions(only, RUN_ON):
        pytest.skip(f"the runtime {only} alone runs it, which does not run on the {RUN_ON}")
    if name not in WEIGHTS and pair not in WEIGHTS and not hasattr(family, "example_weights"):
        pytest.fail(f"family {name!r} has no entry in WEIGHTS; add one that builds its smallest weights")
    build = WEIGHTS.get(pair) or WEIGHTS.get(name) or getattr(family, "example_weights", None)
    weights = build(tmp_path_factory.mktemp(name)) if build else None
    card = next(card for card in family.CARDS if card.kind == kind)
    params = card.params(**(SMALL[pair] if pair in SMALL else SMALL.get(name, {})))
    return Subject(family, card, weights, family.load(card, params, weights, Site(RUN_ON, _open)))


def pictures(count: int = 3, shape: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(count)]


def prepared(model: Any, images: list[np.ndarray]) -> list[Prepared]:
    return [model.prepare(image, Item(f"key-{i}")) for i, image in enumerate(images)]


def same(one: Any, other: Any, tolerance: float = 1e-4) -> bool:
    """Whether two results of any kind agree, field by field."""
    if type(one) is not type(other):
        return False
    if isinstance(one, image.Result):
        return _same_image(one, other, 2 if tolerance else 0)
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            if a.shape != b.shape or not np.allclose(a, b, rtol=tolerance, atol=tolerance * 100):
                return False
        elif a != b:
            return False
    return True


def _same_image(one: image.Result, other: image.Result, levels: int) -> bool:
    """Whether two files have pixels that differ by so many grey levels at most; with none the files are the same."""
    if levels == 0 or one.data is None or other.data is None:
        return one == other
    from PIL import Image

    a, b = (np.asarray(Image.open(io.BytesIO(result.data))).astype(int) for result in (one, other))
    return a.shape == b.shape and bool((abs(a - b) <= levels).all()) and one.meta == other.meta


def test_cards_are_complete(subject: Subject) -> None:
    kinds = {m.name for m in pkgutil.iter_modules(storage.results.__path__)}
    for card in subject.family.CARDS:
        assert card.kind in kinds
        assert card.family == subject.family.__name__.rpartition(".")[2]
        assert card.licence
        assert card.memory_gb >= 0
        assert dataclasses.is_dataclass(card.params)
        assert card.params.__dataclass_params__.frozen


def test_card_names_are_unique() -> None:
    names = [(card.name, card.kind) for card in models.cards()]
    assert len(names) == len(set(names))


def test_every_model_is_found_by_its_name() -> None:
    for card in models.cards():
        if not card.weights and Path(card.name).suffix:  # it stands for files that the user has
            with pytest.raises(BadInput, match="there is no model file"):
                models.resolve(card.name, card.kind, {}, lambda card: Path())
        else:
            assert models.resolve(card.name, card.kind, {}, lambda card: Path()).card == card


def test_defaults_are_valid_and_survive_json(subject: Subject) -> None:
    for card in subject.family.CARDS:
        filled = models.fill(card, {})
        assert models.fill(card, json.loads(json.dumps(filled))) == filled
    with pytest.raises(BadInput, match="has no parameter 'nonsense'"):
        models.fill(subject.card, {"nonsense": 1})


def test_results_are_as_many_and_in_order(subject: Subject) -> None:
    batch = prepared(subject.model, pictures())
    assert len({item.group for item in batch}) == 1
    together = subject.model.infer(batch)
    alone = [subject.model.infer([item])[0] for item in batch]
    assert len(together) == len(batch)
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert all(same(a, b) for a, b in zip(subject.model.infer(batch[::-1]), alone[::-1], strict=True))


def test_the_same_twice(subject: Subject) -> None:
    batch = prepared(subject.model, pictures())
    again = prepared(subject.model, pictures())
    assert all(same(a, b, 0) for a, b in zip(subject.model.infer(batch), subject.model.infer(again), strict=True))


def test_answers_may_come_while_the_next_batch_computes(subject: Subject) -> None:
    model = inflight.staged(subject.model)
    if model is None:
        pytest.skip("it works in one step")
    batches = [prepared(subject.model, pictures(3)), prepared(subject.model, pictures(5)[::-1])]
    raw = [model.compute(batch) for batch in batches]
    with ThreadPoolExecutor(1) as pool:
        answers = list(pool.map(model.answer, raw, batches))
    for found, batch in zip(answers, batches, strict=True):
        assert all(same(a, b, 0) for a, b in zip(found, subject.model.infer(batch), strict=True))


def test_an_empty_batch(subject: Subject) -> None:
    assert subject.model.infer([]) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (37, 53)])
def test_odd_pictures(subject: Subject, shape: tuple[int, int]) -> None:
    (result,) = subject.model.infer(prepared(subject.model, pictures(1, shape)))
    module = importlib.import_module(f"storage.results.{subject.card.kind}")
    assert isinstance(result, module.Result)


def test_results_are_stored_and_read_back(subject: Subject) -> None:
    import pyarrow as pa

    module = importlib.import_module(f"storage.results.{subject.card.kind}")
    found = [*subject.model.infer(prepared(subject.model, pictures())), None]
    back = module.results(pa.table(module.columns(found)))
    assert all(same(a, b, 0) for a, b in zip(found[:-1], back[:-1], strict=True))
    assert back[-1] is None
    assert all(module.summary(result) for result in found[:-1])


def test_an_empty_result_is_valid(subject: Subject) -> None:
    module = importlib.import_module(f"storage.results.{subject.card.kind}")
    if hasattr(module, "empty"):
        assert module.summary(module.empty()).labels == {}


def test_pictures_are_prepared_from_threads(subject: Subject) -> None:
    images = pictures(8)
    with ThreadPoolExecutor(4) as pool:
        batch = list(pool.map(lambda i: subject.model.prepare(images[i], Item(f"key-{i}")), range(len(images))))
    results = subject.model.infer(batch)
    assert all(
        same(a, b, 0) for a, b in zip(results, subject.model.infer(prepared(subject.model, images)), strict=True)
    )


def test_preparing_leaves_the_picture_alone(subject: Subject) -> None:
    (image,) = pictures(1)
    before = image.copy()
    item = subject.model.prepare(image, Item("key"))
    subject.model.infer([item])
    assert np.array_equal(image, before)
    assert item.nbytes > 0
    hash(item.group)


def test_nothing_heavy_is_imported_before_load(subject: Subject, tmp_path: Path) -> None:
    """Cards, claims and describe work on a machine without torch; text files are claimed by nobody."""
    (tmp_path / "text.pt").write_text("hello")
    code = f"""
import sys
from pathlib import Path
from workers import models
family = models.family({subject.card.family!r})
weights = {str(subject.weights) if subject.weights else None!r}
assert not family.claims(Path({str(tmp_path / "text.pt")!r}))
if weights:
    assert family.claims(Path(weights))
    assert all(isinstance(label, str) for label in family.describe(Path(weights)))
heavy = {{"torch", "torchvision", "ultralytics", "cv2", "transformers", "timm", "diffusers", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_has_one_family(subject: Subject) -> None:
    if subject.weights:
        assert [n for n in models.families() if models.family(n).claims(subject.weights)] == [subject.card.family]


class TestStub:
    """The stub does what tests of the batch system ask of it."""

    def model(self, **params: Any) -> Any:
        from workers.models import stub

        return stub.load(stub.CARDS[0], stub.Params(**params), None, None)

    def test_results_can_be_foretold(self) -> None:
        from workers.models import stub

        images = pictures(20)
        results = self.model(objects=3).infer(prepared(self.model(), images))
        assert all(same(r, stub.expected(i, stub.Params(objects=3)), 0) for r, i in zip(results, images, strict=True))
        assert len({label for r in results for label in r.labels}) == 3
        assert all((np.diff(r.scores) <= 0).all() and r.scores.max() <= 1 for r in results)
        assert all((r.boxes_xyxy[:, 2:] >= r.boxes_xyxy[:, :2]).all() for r in results)
        assert all((r.boxes_xyxy <= [64, 48, 64, 48]).all() and (r.boxes_xyxy >= 0).all() for r in results)

    def test_large_batches_run_out_of_memory(self) -> None:
        model = self.model(oom_above=4)
        batch = prepared(model, pictures(5))
        with pytest.raises(MemoryError, match="batch of 5"):
            model.infer(batch)
        assert len(model.infer(batch[:4])) == 4

    def test_some_pictures_fail_alone(self) -> None:
        from storage.errors import ItemFailed
        from workers.models import stub

        model, images = self.model(fail_every=3), pictures(30)
        results = model.infer(prepared(model, images))
        failed = [isinstance(r, ItemFailed) for r in results]
        assert failed == [stub.fails(i, stub.Params(fail_every=3)) for i in images]
        assert 0 < sum(failed) < 30

    def test_batches_take_their_time(self) -> None:
        import time

        model = self.model(delay_ms=30)
        start = time.perf_counter()
        model.infer(prepared(model, pictures(3)))
        assert time.perf_counter() - start >= 0.03
