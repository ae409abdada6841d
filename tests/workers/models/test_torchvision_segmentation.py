"""The families torchvision_segmentation and maskrcnn give what torchvision's own models give."""

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
from workers import masks, ultralytics_checkpoints
from workers.models import Item, Site, maskrcnn
from workers.models import torchvision_segmentation as semantic
from workers.runtimes import torch as torch_runtime


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Photographs, tall and wide."""
    import cv2

    with ultralytics_checkpoints.library():
        from ultralytics.utils import ASSETS
    bus, zidane = (cv2.imread(str(Path(ASSETS) / name))[:, :, ::-1] for name in ("bus.jpg", "zidane.jpg"))
    sizes = [(bus, 240, 320), (zidane, 300, 169)]
    return [cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture, *size in sizes]


def _fit(model: Any, images: list[np.ndarray], take: Callable[[Any], Any]) -> None:
    """Fit the batch norms to pictures, without which random weights tell no picture from another."""
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = None
    model.train()
    with torch.no_grad():
        take(torch.stack([torch.from_numpy(i[:128, :224].copy()).permute(2, 0, 1) / 255 for i in images]))
    model.eval()


def _spread(model: Any, picture: np.ndarray, layers: dict[Any, float]) -> None:
    """Scale layers so that the numbers they give for a picture spread as much as is said."""
    seen: dict[Any, list[torch.Tensor]] = {layer: [] for layer in layers}
    hooks = [layer.register_forward_hook(lambda m, _, out: seen[m].append(out.flatten())) for layer in seen]
    with torch.no_grad():
        model([torch.from_numpy(picture).permute(2, 0, 1) / 255])
        for layer, outputs in seen.items():
            layer.weight.mul_(layers[layer] / float(torch.cat(outputs).std()))
            layer.bias.zero_()
    for hook in hooks:
        hook.remove()


def _few_proposals(model: Any) -> Any:
    """A second stage that looks at fewer boxes, for speed."""
    model.rpn._post_nms_top_n = {"training": 40, "testing": 40}
    return model


def site() -> Site:
    return Site("cpu", lambda network: torch_runtime.open(network, "cpu", "fp32"))


def run(model: Any, picture: np.ndarray) -> Result:
    (result,) = model.infer([model.prepare(picture, Item("key"))])
    assert isinstance(result, Result), result
    return result


def pixels(result: Result) -> np.ndarray:
    return np.array([rle.decode(counts, result.size) for counts in result.rles]).reshape(-1, *result.size)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


class TestSemantic:
    """A class for each pixel."""

    SIZE = 128

    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory: pytest.TempPathFactory, images: list[np.ndarray]) -> Callable[[str], Any]:
        """builder -> (torchvision's model, the file of its state dict)."""
        folder = tmp_path_factory.mktemp("semantic")

        @functools.cache
        def get(builder: str, classes: int = 21) -> tuple[Any, Path]:
            from torchvision.models import segmentation

            torch.manual_seed(0)
            more = {} if builder.startswith("lraspp") else {"aux_loss": builder == "fcn_resnet50"}
            model = getattr(segmentation, builder)(weights=None, weights_backbone=None, num_classes=classes, **more)
            _fit(model, images, model)
            last = dict(model.named_parameters())
            last[semantic._LAST[builder.partition("_")[0]]].data.mul_(20)  # sure of its classes
            torch.save(model.state_dict(), folder / f"{builder}{classes}.pth")
            return model, folder / f"{builder}{classes}.pth"

        return get

    def load(self, path: Path, **params: Any) -> semantic.Segmenter:
        return semantic.load(semantic.CARDS[0], semantic.Params(**{"imgsz": self.SIZE, **params}), path, site())

    def expected(self, model: Any, picture: np.ndarray) -> torch.Tensor:
        """Probabilities (classes, height, width) of the original's pixels."""
        from PIL import Image
        from torchvision.transforms._presets import SemanticSegmentation

        given = SemanticSegmentation(resize_size=self.SIZE)(Image.fromarray(picture))
        with torch.inference_mode():
            out = model(given[None])["out"]
            return torch.nn.functional.interpolate(out, picture.shape[:2], mode="bilinear")[0].softmax(0)

    @pytest.mark.parametrize("builder", [card.name for card in semantic.CARDS])
    def test_each_is_known_by_its_keys(self, builder: str) -> None:
        from torchvision.models import segmentation

        with torch.device("meta"):
            state = getattr(segmentation, builder)(weights=None, weights_backbone=None).state_dict()
        assert semantic._builder({name: tuple(value.shape) for name, value in state.items()}) == builder

    @pytest.mark.parametrize(
        "builder",
        [
            pytest.param(card.name, marks=pytest.mark.slow if "resnet" in card.name else [])
            for card in semantic.CARDS
            if "101" not in card.name
        ],
    )
    def test_same_as_torchvision(self, builder: str, made: Any, images: list[np.ndarray]) -> None:
        theirs, path = made(builder)
        model, seen = self.load(path), set()
        for picture in images[: 1 if "resnet" in builder else 2]:
            probability, wanted = self.expected(theirs, picture).max(0)
            result = run(model, picture)
            there = sorted(set(wanted.unique().tolist()) - {0})
            large = [i for i in there if (wanted == i).sum() > 50]
            seen |= {*large, *({0} if (wanted == 0).any() else ())}
            assert set(large) <= set(result.class_ids.tolist()) <= set(there)
            masks_of = dict(zip(result.class_ids.tolist(), pixels(result), strict=True))
            got = np.zeros(wanted.shape, np.int64)
            for i, mask in masks_of.items():
                assert not got[mask].any()  # no pixel has two classes
                got[mask] = i
            assert (got == wanted.numpy()).mean() >= 0.99
            for i, score, label in zip(result.class_ids.tolist(), result.scores.tolist(), result.labels, strict=True):
                assert label == semantic.VOC[i]
                if i in large:
                    assert iou(masks_of[i], (wanted == i).numpy()) >= 0.99
                    assert abs(score - float(probability[wanted == i].mean())) <= 0.01
        assert len(seen) >= 2

    def test_together_alone_and_in_pieces(
        self, made: Any, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = self.load(made("deeplabv3_mobilenet_v3_large")[1])
        batch = [images[0], np.ascontiguousarray(images[0][:, ::-1]), images[0] // 2]
        together = model.infer([model.prepare(picture, Item("key")) for picture in batch])
        monkeypatch.setattr(masks, "_PIXELS", images[0].shape[0] * images[0].shape[1])
        for picture, result in zip(batch, together, strict=True):
            alone = run(model, picture)
            assert len(result.labels) > 1
            both = zip(pixels(alone), pixels(result), strict=True)
            assert all(iou(a, b) > 0.99 for a, b in both if a.sum() > 50)

    def test_classes(self, made: Any, images: list[np.ndarray]) -> None:
        _, path = made("deeplabv3_mobilenet_v3_large")
        everything = run(self.load(path), images[0])
        wanted = everything.labels[-1]
        some = run(self.load(path, classes=[wanted]), images[0])
        assert some.labels == (wanted,)
        assert some.rles == everything.rles[-1:]
        with pytest.raises(BadInput, match="no label 'persn'; did you mean 'person'"):
            self.load(path, classes=["persn"])

    def test_another_number_of_classes(self, made: Any, images: list[np.ndarray]) -> None:
        _, path = made("lraspp_mobilenet_v3_large", 3)
        assert semantic.describe(path) == ("__background__", "class_1", "class_2")
        assert set(run(self.load(path), images[0]).labels) <= {"class_1", "class_2"}

    def test_not_finite_alone(self, made: Any, images: list[np.ndarray]) -> None:
        model = self.load(made("lraspp_mobilenet_v3_large")[1])
        network = model._session
        assert network is not None

        def broken(**inputs: Any) -> Any:
            out = network(**inputs)
            out["logits"][1, 0, 0, 0] = float("nan")
            return out

        model._session = broken
        first, second = model.infer([model.prepare(images[0], Item("key"))] * 2)
        assert isinstance(first, Result)
        assert isinstance(second, ItemFailed)
        assert second.reason == "not-finite"

    def test_thin_pictures(self, made: Any) -> None:
        model = self.load(made("lraspp_mobilenet_v3_large")[1])
        for shape in [(10, 900), (1, 5000), (300, 1)]:
            item = model.prepare(np.full((*shape, 3), 90, np.uint8), Item("key"))
            assert max(item.group) == 4096
            (result,) = model.infer([item])
            assert isinstance(result, Result)
            assert result.size == shape
        with pytest.raises(ItemFailed, match="none"):
            model.prepare(None, Item("key"))

    def test_the_labels_are_torchvisions(self) -> None:
        from torchvision.models._meta import _VOC_CATEGORIES

        assert list(semantic.VOC) == _VOC_CATEGORIES

    def test_the_defaults_and_files_are_torchvisions(self) -> None:
        from torchvision.models import get_model_weights

        for card in semantic.CARDS:
            weights = get_model_weights(card.name).DEFAULT
            assert weights.url == card.weights
            assert weights.transforms().resize_size == [semantic.Params().imgsz]


class TestMaskRcnn:
    """A mask for each box."""

    SIZE = 128

    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory: pytest.TempPathFactory, images: list[np.ndarray]) -> Callable[[str], Any]:
        """builder -> (torchvision's model, the file of its state dict)."""
        folder = tmp_path_factory.mktemp("maskrcnn")

        @functools.cache
        def get(builder: str, frozen: bool = False) -> tuple[Any, Path]:
            from torchvision.models import detection
            from torchvision.models.detection._utils import overwrite_eps
            from torchvision.ops import FrozenBatchNorm2d

            torch.manual_seed(0)
            size = {"min_size": self.SIZE, "max_size": round(self.SIZE * 1333 / 800)}
            model = getattr(detection, builder)(weights=None, weights_backbone=None, num_classes=4, **size)
            _fit(model.backbone, images, model.backbone)
            if frozen:
                self.freeze(model.backbone.body, FrozenBatchNorm2d)
                overwrite_eps(model, 0.0)
            _few_proposals(model.eval())
            rpn, roi = model.rpn.head, model.roi_heads
            _spread(model, images[0], {rpn.cls_logits: 1, rpn.bbox_pred: 1})
            _spread(model, images[0], {roi.box_predictor.cls_score: 3, roi.box_predictor.bbox_pred: 1})
            _spread(model, images[0], {roi.mask_predictor.mask_fcn_logits: 2})
            torch.save(model.state_dict(), folder / f"{builder}{frozen}.pth")
            return model, folder / f"{builder}{frozen}.pth"

        return get

    def freeze(self, module: Any, frozen: Any) -> None:
        """Put frozen batch norms in place of the others, as published models have them."""
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                new = frozen(child.num_features)
                new.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
                new.running_var.mul_(1e-4)  # so small that eps matters
                new.weight.mul_(1e-2)
                setattr(module, name, new)
            else:
                self.freeze(child, frozen)

    def load(self, path: Path, **params: Any) -> maskrcnn.Segmenter:
        model = maskrcnn.load(maskrcnn.CARDS[0], maskrcnn.Params(**{"imgsz": self.SIZE, **params}), path, site())
        _few_proposals(model._heads)
        return model

    @pytest.mark.parametrize(
        ("builder", "frozen"),
        [
            ("maskrcnn_resnet50_fpn", False),
            pytest.param("maskrcnn_resnet50_fpn", True, marks=pytest.mark.slow),
            pytest.param("maskrcnn_resnet50_fpn_v2", False, marks=pytest.mark.slow),
        ],
    )
    def test_same_as_torchvision(self, builder: str, frozen: bool, made: Any, images: list[np.ndarray]) -> None:
        theirs, path = made(builder, frozen)
        model = self.load(path)
        for picture in images[: 1 if frozen else 2]:
            with torch.inference_mode():
                wanted = theirs([torch.from_numpy(picture).permute(2, 0, 1) / 255])[0]
            result = run(model, picture)
            assert len(result.labels) == len(wanted["scores"]) > 5
            assert np.allclose(result.scores, wanted["scores"], rtol=0, atol=1e-3)
            assert (np.diff(result.scores) <= 0).all()
            boxes, ids = wanted["boxes"].numpy(), wanted["labels"].numpy()
            found = (wanted["masks"][:, 0] > 0.5).numpy()
            got, free, shares = pixels(result), np.ones(len(ids), bool), []
            for i, mask in enumerate(got):  # objects of nearly one score may change places
                close = (np.abs(boxes - result.boxes_xyxy[i]).max(1) <= 0.5) & (ids == result.class_ids[i]) & free
                best = max(np.flatnonzero(close), key=lambda j: iou(mask, found[j]))
                free[best] = False
                assert iou(mask, found[best]) >= 0.99
                x1, y1, x2, y2 = result.boxes_xyxy[i]
                shares.append(mask.sum() / max(1, (x2 - x1) * (y2 - y1)))
            assert np.mean([0.05 < share < 0.95 for share in shares]) > 0.5

    def test_classes_and_limit(self, made: Any, images: list[np.ndarray]) -> None:
        _, path = made("maskrcnn_resnet50_fpn")
        assert maskrcnn.describe(path) == ("__background__", "class_1", "class_2", "class_3")
        everything = run(self.load(path, max_det=40, conf=0.2), images[0])
        some = run(self.load(path, classes=["class_2"], max_det=3, conf=0.2), images[0])
        expected = [i for i, label in enumerate(everything.labels) if label == "class_2"][:3]
        assert some.labels == ("class_2",) * len(expected)
        assert np.allclose(some.scores, everything.scores[expected], atol=1e-4)

    def test_together_alone_and_in_pieces(
        self, made: Any, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = self.load(made("maskrcnn_resnet50_fpn")[1], max_det=8)
        batch = [images[0], np.ascontiguousarray(images[0][:, ::-1])]
        together = model.infer([model.prepare(picture, Item("key")) for picture in batch])
        monkeypatch.setattr(masks, "_PIXELS", 2 * images[0].shape[0] * images[0].shape[1])
        for picture, result in zip(batch, together, strict=True):
            alone = run(model, picture)
            assert len(alone.labels) == len(result.labels) == 8
            assert np.allclose(alone.scores, result.scores, atol=1e-4)
            assert all(iou(a, b) > 0.99 for a, b in zip(pixels(alone), pixels(result), strict=True))

    def test_pictures_of_one_batch_have_one_padded_shape(self, made: Any) -> None:
        model = self.load(made("maskrcnn_resnet50_fpn")[1])
        for height, width in [(37, 53), (128, 128), (240, 320), (1, 2)]:
            picture = np.zeros((height, width, 3), np.uint8)
            inside, _ = model._heads.transform([model._tensor(model.prepare(picture, Item("key")))])
            assert model.prepare(picture, Item("key")).group == tuple(inside.tensors.shape[2:])
        with pytest.raises(ItemFailed, match="nothing would be left"):
            model.prepare(np.zeros((1, 900, 3), np.uint8), Item("key"))

    def test_not_finite_alone(self, made: Any, images: list[np.ndarray]) -> None:
        model = self.load(made("maskrcnn_resnet50_fpn")[1])
        network = model._session
        assert network is not None

        def broken(**inputs: Any) -> Any:
            out = network(**inputs)
            out["map_2"][1, 0, 0, 0] = float("inf")
            return out

        model._session = broken
        first, second = model.infer([model.prepare(images[0], Item("key"))] * 2)
        assert isinstance(first, Result)
        assert isinstance(second, ItemFailed)
        assert second.reason == "not-finite"

    def test_the_defaults_labels_and_files_are_torchvisions(self) -> None:
        import inspect

        from torchvision.models import get_model_weights
        from torchvision.models.detection import MaskRCNN

        theirs = inspect.signature(MaskRCNN).parameters
        params = maskrcnn.Params()
        assert (params.conf, params.iou, params.max_det, params.imgsz) == tuple(
            theirs[name].default
            for name in ("box_score_thresh", "box_nms_thresh", "box_detections_per_img", "min_size")
        )
        for card in maskrcnn.CARDS:
            weights = get_model_weights(card.name).DEFAULT
            assert weights.url == card.weights
            assert tuple(weights.meta["categories"]) == maskrcnn.COCO


class TestFiles:
    """Each state dict has one family, and what fits none is refused with one line."""

    def test_others_are_not_claimed(self, tmp_path: Path) -> None:
        torch.save({"roi_heads.box_predictor.cls_score.weight": torch.zeros(3, 4)}, tmp_path / "a.pth")
        torch.save({"classifier.4.weight": torch.zeros(3, 4)}, tmp_path / "b.pth")
        for name in ("a.pth", "b.pth", "missing.pth"):
            assert not semantic.claims(tmp_path / name)
            assert not maskrcnn.claims(tmp_path / name)
        with pytest.raises(BadInput, match="no state dict of torchvision's Mask R-CNN"):
            maskrcnn.describe(tmp_path / "a.pth")
        with pytest.raises(BadInput, match="no state dict of torchvision's semantic"):
            semantic.describe(tmp_path / "b.pth")

    def test_tensors_of_another_shape(self, tmp_path: Path) -> None:
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        state = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).state_dict()
        state["classifier.cbr.0.weight"] = torch.zeros(3, 3)
        torch.save({"model": state, "epoch": 3}, tmp_path / "odd.pth")
        assert semantic.claims(tmp_path / "odd.pth")
        with pytest.raises(BadInput, match=r"odd.pth does not fit .*classifier.cbr.0.weight"):
            semantic.load(semantic.CARDS[0], semantic.Params(), tmp_path / "odd.pth", site())

    @pytest.mark.parametrize(
        ("params", "given", "says"),
        [
            (semantic.Params, {"imgsz": 8}, "from 32"),
            (semantic.Params, {"classes": "dog"}, "a list of label names"),
            (maskrcnn.Params, {"conf": 2}, "from 0 to 1"),
            (maskrcnn.Params, {"mask_threshold": "a"}, "a number"),
            (maskrcnn.Params, {"max_det": 0}, "from 1"),
            (maskrcnn.Params, {"classes": [1]}, "a list of label names"),
        ],
    )
    def test_wrong_parameters(self, params: Any, given: dict[str, Any], says: str) -> None:
        with pytest.raises((TypeError, ValueError), match=says):
            params(**given)
