"""The torchvision_models family gives what torchvision gives, and knows which network a state dict is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image as pil
from torchvision.models import get_model, get_model_weights

from storage.errors import BadInput
from tests.workers.models.backbone_support import cosines, photographs, results, spread, vectors
from workers.backbones import EmbeddingParams, LabelsParams
from workers.models import Site, card_for, resolve
from workers.models import torchvision_models as family
from workers.runtimes import torch as torch_runtime

# One network of each series; the ViT, which has no small one, for small pictures.
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "vit_b_32": {"image_size": 64},
    "swin_t": {},
    "convnext_tiny": {},
    "efficientnet_b0": {},
}
CLASSES = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks on a shared machine: threads that wait for each other cost more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return list(photographs().values())


def transforms(name: str, size: int = 0) -> Any:
    """torchvision's own transform of a network's default weights."""
    if size == 64:
        return get_model_weights(name).DEFAULT.transforms(resize_size=73, crop_size=64)
    return get_model_weights(name).DEFAULT.transforms()


def given_to(name: str, images: list[np.ndarray], size: int = 0) -> torch.Tensor:
    return torch.stack([transforms(name, size)(pil.fromarray(image)) for image in images])


BY_DEFAULT = ("resnet18", "vit_b_32")  # without class token and with


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[] if n in BY_DEFAULT else pytest.mark.slow) for n in NETWORKS]
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """(torchvision's name, its network, its state dict's path)."""
    name, options = request.param, NETWORKS[request.param]
    model = get_model(name, weights=None, num_classes=CLASSES, **options)
    spread(model, given_to(name, list(photographs().values())) if name in ("resnet18", "efficientnet_b0") else None)
    path = tmp_path_factory.mktemp(name) / "mine.pth"
    torch.save(model.state_dict(), path)
    return name, model, path


def opened(weights: Path, params: Any = None, sha256: str = "") -> Any:
    params = params or EmbeddingParams()
    kind = "labels" if isinstance(params, LabelsParams) else "embedding"
    site = Site("cpu", lambda network: torch_runtime.open(network, "cpu", "fp32"), weights_sha256=sha256)
    return family.load(card_for("m", "torchvision_models", kind), params, weights, site)


def upstream(name: str, model: Any, images: list[np.ndarray]) -> tuple[np.ndarray, torch.Tensor]:
    """(what goes into the last layer, what comes out of it)."""
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    features: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    with torch.inference_mode():
        logits = model(given_to(name, images, 64 if name.startswith("vit") else 0))
    hook.remove()
    return features[0].numpy(), logits


class TestParity:
    """What torchvision computes."""

    def test_vectors_and_scores(self, saved: tuple[str, Any, Path], photos: list[np.ndarray]) -> None:
        name, model, path = saved
        photos = photos[:3] if name in ("swin_t", "convnext_tiny") else photos  # they are slow
        features, logits = upstream(name, model, photos)
        found = vectors(opened(path), photos)
        assert found.shape == features.shape
        assert cosines(found, features).min() > 0.9999
        assert cosines(found[:1], found[1:2]).max() < 0.995  # else the test would see nothing
        for one, row in zip(results(opened(path, LabelsParams(topk=4)), photos), logits, strict=True):
            scores, ids = row.softmax(0).topk(4)
            assert np.allclose(one.scores, scores, atol=1e-3)
            assert one.class_ids.tolist() == ids.tolist()
            assert one.labels == tuple(f"class {i}" for i in ids.tolist())

    def test_batches_change_nothing(self, saved: tuple[str, Any, Path], photos: list[np.ndarray]) -> None:
        images, model = [*photos, *photos][:8], opened(saved[2], EmbeddingParams(imgsz=64))
        alone = vectors(model, images, 1)
        for batch in (3, 8):
            assert cosines(vectors(model, images, batch), alone).min() > 0.99999

    def test_pools(self, saved: tuple[str, Any, Path], photos: list[np.ndarray]) -> None:
        name, model, path = saved
        mean = vectors(opened(path, EmbeddingParams(pool="mean")), photos[:2])
        if not name.startswith("vit"):
            assert np.array_equal(mean, vectors(opened(path), photos[:2]))
            with pytest.raises(BadInput, match=f"{name} has no class token; leave the parameter pool at default"):
                opened(path, EmbeddingParams(pool="cls"))
            return
        tokens: list[torch.Tensor] = []
        hook = model.encoder.register_forward_hook(lambda module, inputs, output: tokens.append(output))
        upstream(name, model, photos[:2])
        hook.remove()
        assert cosines(mean, tokens[0][:, 1:].mean(1).numpy()).min() > 0.9999
        found = vectors(opened(path, EmbeddingParams(pool="cls")), photos[:2])
        assert cosines(found, tokens[0][:, 0].numpy()).min() > 0.9999

    def test_another_size(self, saved: tuple[str, Any, Path], photos: list[np.ndarray]) -> None:
        name, model, path = saved
        if name.startswith("vit"):
            from torchvision.models.vision_transformer import interpolate_embeddings

            state = interpolate_embeddings(96, 32, model.state_dict())
            model = get_model(name, weights=None, num_classes=CLASSES, image_size=96).eval()
            model.load_state_dict(state)
            with pytest.raises(BadInput, match="multiple of the patch of 32 pixels, but got 100; try 96"):
                opened(path, EmbeddingParams(imgsz=100))
        preset = transforms(name)
        edge = round(96 * preset.resize_size[0] / preset.crop_size[0])
        scaled = get_model_weights(name).DEFAULT.transforms(resize_size=edge, crop_size=96)
        with torch.inference_mode():
            logits = model(torch.stack([scaled(pil.fromarray(image)) for image in photos]))
        found = results(opened(path, LabelsParams(imgsz=96, topk=CLASSES)), photos)
        for one, row in zip(found, logits, strict=True):
            assert np.allclose(one.scores, row.softmax(0)[one.class_ids.tolist()], atol=1e-3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = get_model("resnet18", weights=None).eval()
    path = tmp_path_factory.mktemp("plain") / "resnet.pth"
    torch.save(model.state_dict(), path)
    return model, path


class TestStateDicts:
    """Files of tensors, and what they are taken for."""

    @pytest.mark.parametrize(
        "name",
        [
            *("resnet50", "resnext50_32x4d"),
            *(pytest.param(n, marks=pytest.mark.slow) for n in ("wide_resnet50_2", "swin_v2_t", "efficientnet_b1")),
        ],
    )
    def test_networks_of_a_series_are_told_apart(self, name: str) -> None:
        with torch.device("meta"):
            state = get_model(name, weights=None, num_classes=7).state_dict()
        found = family._recognised(state, "", "file")
        assert found == family._recognised(state, f"{name}_mine", "file")
        assert (found.name, found.classes, found.size) == (name, 7, 0)

    @pytest.mark.parametrize(("name", "size"), [("vit_b_16", 224), ("vit_b_16", 384), ("vit_l_32", 224)])
    def test_a_vits_size_is_seen(self, name: str, size: int) -> None:
        with torch.device("meta"):
            state = get_model(name, weights=None, image_size=size).state_dict()
        assert family._recognised(state, "", "file").size == size
        assert family._recognised(state, "", "file").name == name

    def test_old_files_and_half_precision(
        self, plain: tuple[Any, Path], tmp_path: Path, photos: list[np.ndarray]
    ) -> None:
        """Before torch 1.6 a file was no zip, and before torch 0.4.1 a batch norm had no counter."""
        model, path = plain
        expected = vectors(opened(path), photos[:2])
        old, half = tmp_path / "old.pth", tmp_path / "half.pth"
        less = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
        torch.save(less, old, _use_new_zipfile_serialization=False)
        torch.save({name: value.half() for name, value in less.items()}, half)
        assert np.array_equal(vectors(opened(old), photos[:2]), expected)
        assert family.describe(old) == family.describe(path)
        assert cosines(vectors(opened(half), photos[:2]), expected).min() > 0.9999

    def test_a_training_scripts_checkpoint(
        self, plain: tuple[Any, Path], tmp_path: Path, photos: list[np.ndarray]
    ) -> None:
        model, path = plain
        torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "model_9.pth")
        assert family.claims(tmp_path / "model_9.pth")
        assert np.array_equal(vectors(opened(tmp_path / "model_9.pth"), photos[:1]), vectors(opened(path), photos[:1]))

    def test_what_is_refused(self, plain: tuple[Any, Path], tmp_path: Path) -> None:
        model, _ = plain
        changed = dict(model.state_dict())
        changed["layer2.0.conv1.weight"] = torch.zeros(100, 64, 3, 3)
        torch.save(changed, tmp_path / "changed.pth")
        with pytest.raises(BadInput, match=r"the tensors of changed.pth are those of none of torchvision's networks"):
            opened(tmp_path / "changed.pth")
        torch.save(model, tmp_path / "whole.pth")
        assert not family.claims(tmp_path / "whole.pth")
        with pytest.raises(BadInput, match=r"whole.pth refused"):
            opened(tmp_path / "whole.pth")
        torch.save(model, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        with pytest.raises(BadInput, match=r"old.pth is no state dict"):
            opened(tmp_path / "old.pth")
        torch.save([1, 2], tmp_path / "list.pth", _use_new_zipfile_serialization=False)
        with pytest.raises(BadInput, match=r"list.pth is no state dict"):
            opened(tmp_path / "list.pth")
        for name in ("backbone.body.conv1.weight", "cls_token", "model.0.weight"):
            torch.save({name: torch.zeros(1)}, tmp_path / "other.pth")
            assert not family.claims(tmp_path / "other.pth")

    def test_the_sha256_tells_the_transform(self, plain: tuple[Any, Path]) -> None:
        """resnet50's older weights were trained for another scale than the newer ones."""
        found = family._Found("resnet50", 1000)
        for weights in get_model_weights("resnet50"):
            hash8 = weights.url[-12:-4]
            data = weights.transforms()
            image = photographs()["landscape"]
            crop = torch.from_numpy(family._input(found, 0, f"{hash8}{'0' * 56}").crop(image))
            expected = data(pil.fromarray(image))
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
            assert torch.allclose((crop.permute(2, 0, 1) / 255 - mean) / std, expected, atol=1e-6)


class TestNames:
    """Class names and cards."""

    def test_imagenets(self, plain: tuple[Any, Path]) -> None:
        names = family.describe(plain[1])
        assert list(names) == get_model_weights("resnet18").DEFAULT.meta["categories"]
        assert names[654] == "minibus"
        assert resolve(str(plain[1]), "labels", {"classes": ["minibus"]}, lambda card: plain[1]).labels == names

    def test_cards_are_torchvisions_own(self) -> None:
        for card in family.CARDS:
            published = {weights.url: weights for weights in get_model_weights(card.name)}
            assert card.weights in published
            assert published[card.weights] == get_model_weights(card.name).DEFAULT
            assert card.weights.endswith(f"-{card.sha256}.pth")
            assert len(card.sha256) == 8
            assert "license" not in published[card.weights].meta
            assert len(published[card.weights].meta["categories"]) == 1000
        assert {card.name for card in family.CARDS} < set(torchvision.models.list_models())

    def test_old_files_must_be_imagenets(self, tmp_path: Path) -> None:
        state = get_model("resnet18", weights=None, num_classes=3).state_dict()
        torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        with pytest.raises(BadInput, match="names 1000 classes, but its classifier has 3"):
            opened(tmp_path / "old.pth", LabelsParams())
