"""The dinov2 family gives what transformers gives for its folders, and what the original gives for its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as pil

from storage.errors import BadInput, ItemFailed
from tests.workers.models.backbone_support import cosines, photographs, results, spread, vectors
from workers import backbones
from workers.backbones import EmbeddingParams, LabelsParams
from workers.models import Item, Prepared, Site, card_for, dinov2, resolve
from workers.pixels import Pixels
from workers.runtimes import torch as torch_runtime

WIDTH, LAYERS, PATCH = 128, 2, 14
NAMES = ("cat", "dog", "minibus", "suit", "tie", "tree")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks on a shared machine: threads that wait for each other cost more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos() -> dict[str, np.ndarray]:
    return photographs()


def config(registers: bool, **changes: Any) -> Any:
    made = transformers.Dinov2WithRegistersConfig if registers else transformers.Dinov2Config
    options = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "patch_size": PATCH}
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    return made(**{**options, "image_size": 8 * PATCH, **labels, **changes})


def folder_of(path: Path, model: Any, **changes: Any) -> Path:
    """A model and the processor of the published ones, at a smaller size."""
    model.save_pretrained(path)
    size = {"size": {"shortest_edge": 128}, "crop_size": {"height": 112, "width": 112}}
    mean_std = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    transformers.BitImageProcessor(**{**size, **mean_std, **changes}).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["plain", "registers", pytest.param("swiglu", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    registers = request.param == "registers"
    wanted = (
        transformers.Dinov2WithRegistersForImageClassification
        if registers
        else transformers.Dinov2ForImageClassification
    )
    model = spread(wanted(config(registers, use_swiglu_ffn=request.param == "swiglu")))
    return folder_of(tmp_path_factory.mktemp(request.param), model)


def opened(weights: Path, params: Any = None, precision: str = "fp32") -> Any:
    params = params or EmbeddingParams()
    kind = "labels" if isinstance(params, LabelsParams) else "embedding"
    site = Site("cpu", lambda network: torch_runtime.open(network, "cpu", precision), precision)
    return dinov2.load(card_for("m", "dinov2", kind), params, weights, site)


def upstream(folder: Path, images: list[np.ndarray], **size: Any) -> Any:
    """transformers' own processor and model, one PIL picture after the other: (hidden states, logits)."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    states, logits = [], []
    with torch.inference_mode():
        for image in images:
            given = processor(images=pil.fromarray(image), return_tensors="pt", **size)
            states.append(model.base_model(**given).last_hidden_state[0])
            logits.append(model(**given).logits[0])
    return torch.stack(states), torch.stack(logits)


class TestFolders:
    """What transformers saves."""

    def test_the_class_token_is_transformers(self, folder: Path, photos: dict[str, np.ndarray]) -> None:
        images = list(photos.values())
        states, _ = upstream(folder, images)
        found = vectors(opened(folder), images)
        assert found.shape == (len(images), WIDTH)
        assert cosines(found, states[:, 0].numpy()).min() > 0.9999
        assert np.allclose(found, states[:, 0].numpy(), atol=1e-4)
        assert cosines(found[:1], found[1:2]).max() < 0.95  # else the test would see nothing

    def test_the_mean_is_over_the_patches(self, folder: Path, photos: dict[str, np.ndarray]) -> None:
        images = list(photos.values())
        states, _ = upstream(folder, images)
        patches = states[:, -64:].mean(1).numpy()
        assert cosines(vectors(opened(folder, EmbeddingParams(pool="mean")), images), patches).min() > 0.9999

    def test_labels_are_those_of_the_linear_head(self, folder: Path, photos: dict[str, np.ndarray]) -> None:
        images = list(photos.values())
        _, logits = upstream(folder, images)
        for found, row in zip(results(opened(folder, LabelsParams(topk=4)), images), logits, strict=True):
            scores, ids = row.softmax(0).topk(4)
            assert found.class_ids.tolist() == ids.tolist()
            assert np.allclose(found.scores, scores, atol=1e-3)
            assert found.labels == tuple(NAMES[i] for i in ids)

    def test_another_size(self, folder: Path, photos: dict[str, np.ndarray]) -> None:
        images = list(photos.values())
        size = {"size": {"shortest_edge": 96}, "crop_size": {"height": 84, "width": 84}}
        states, _ = upstream(folder, images, **size)
        assert cosines(vectors(opened(folder, EmbeddingParams(imgsz=84)), images), states[:, 0].numpy()).min() > 0.9999

    @pytest.mark.parametrize("batch", [1, 3, 8])
    def test_batches_change_nothing(self, folder: Path, photos: dict[str, np.ndarray], batch: int) -> None:
        images, model = [*photos.values(), *photos.values()][:8], opened(folder)
        assert np.allclose(vectors(model, images, batch), vectors(model, images, 1), atol=1e-4)

    def test_classes_are_the_folders(self, folder: Path) -> None:
        assert dinov2.describe(folder) == NAMES
        assert resolve(str(folder), "labels", {"classes": ["dog"]}, lambda card: folder).card.family == "dinov2"
        with pytest.raises(BadInput, match="did you mean 'minibus'"):
            resolve(str(folder), "labels", {"classes": ["minbus"]}, lambda card: folder)


def test_a_processor_of_another_kind(tmp_path: Path, photos: dict[str, np.ndarray]) -> None:
    """Squashed to a square, with another mean and another scale."""
    model = spread(transformers.Dinov2ForImageClassification(config(False)))
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 98, "width": 98}, rescale_factor=1 / 127.5)
    processor.save_pretrained(tmp_path)
    images = list(photos.values())
    states, _ = upstream(tmp_path, images)
    assert cosines(vectors(opened(tmp_path), images), states[:, 0].numpy()).min() > 0.9999


def original(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a transformers network as the original repository would have saved them."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    embeddings, state = model.embeddings, {}
    state["cls_token"], state["mask_token"] = embeddings.cls_token, embeddings.mask_token
    state["pos_embed"] = embeddings.position_embeddings
    if hasattr(embeddings, "register_tokens"):
        state["register_tokens"] = embeddings.register_tokens
    state["patch_embed.proj.weight"] = embeddings.patch_embeddings.projection.weight
    state["patch_embed.proj.bias"] = embeddings.patch_embeddings.projection.bias
    for i, layer in enumerate(model.encoder.layer):
        parts = [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj]
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat([part.weight for part in parts])
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([part.bias for part in parts])
        state[f"blocks.{i}.ls1.gamma"] = layer.layer_scale1.lambda1
        state[f"blocks.{i}.ls2.gamma"] = layer.layer_scale2.lambda1
        modules = {"norm1": layer.norm1, "norm2": layer.norm2, "attn.proj": layer.attention.o_proj}
        if hasattr(layer.mlp, "fc1"):
            modules |= {"mlp.fc1": layer.mlp.fc1, "mlp.fc2": layer.mlp.fc2}
        else:
            gates = [layer.mlp.gate_proj, layer.mlp.up_proj]
            state[f"blocks.{i}.mlp.w12.weight"] = torch.cat([part.weight for part in gates])
            state[f"blocks.{i}.mlp.w12.bias"] = torch.cat([part.bias for part in gates])
            modules["mlp.w3"] = layer.mlp.down_proj
        for name, module in modules.items():
            state[f"blocks.{i}.{name}.weight"], state[f"blocks.{i}.{name}.bias"] = module.weight, module.bias
    state["norm.weight"], state["norm.bias"] = model.layernorm.weight, model.layernorm.bias
    return {name: value.detach().clone() for name, value in state.items()}


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "tiny_pretrain.pth"
    torch.save(original(folder), path)
    return path


def positions(state: dict[str, torch.Tensor], side: int) -> torch.Tensor:
    """Position embeddings at another size, sample by sample, by the rules of the original.

    Bicubic with a = -0.75; without registers the samples lie a little closer than the size alone would put them.
    """
    grid = state["pos_embed"][0, 1:].reshape(8, 8, -1).double()
    if "register_tokens" in state:
        kind = {"size": (side, side), "antialias": True, "mode": "bicubic"}
        return torch.nn.functional.interpolate(grid.permute(2, 0, 1)[None], **kind)[0].flatten(1).T.float()

    def weight(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    rows = torch.zeros(side, 8, dtype=torch.float64)
    for i in range(side):
        at = (i + 0.5) * 8 / (side + 0.1) - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            rows[i, min(max(j, 0), 7)] += weight(at - j)
    return torch.einsum("ia,jb,abd->ijd", rows, rows, grid).flatten(0, 1).float()


class TestOriginals:
    """State dicts of facebookresearch/dinov2."""

    def test_the_same_weights_give_the_same_vectors(
        self, folder: Path, checkpoint: Path, photos: dict[str, np.ndarray]
    ) -> None:
        """At the size of its own position embeddings, where both sides agree on what those are."""
        from torchvision import transforms

        images = list(photos.values())
        found = vectors(opened(checkpoint, EmbeddingParams(imgsz=112)), images)
        bicubic = transforms.InterpolationMode.BICUBIC
        normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        steps = [transforms.Resize(128, bicubic), transforms.CenterCrop(112), transforms.ToTensor(), normalise]
        given = torch.stack([transforms.Compose(steps)(pil.fromarray(image)) for image in images])
        with torch.inference_mode():
            expected = transformers.AutoModel.from_pretrained(folder).eval()(given).last_hidden_state
        assert cosines(found, expected[:, 0].numpy()).min() > 0.9999
        mean = vectors(opened(checkpoint, EmbeddingParams(imgsz=112, pool="mean")), images)
        assert cosines(mean, expected[:, -64:].mean(1).numpy()).min() > 0.9999

    @pytest.mark.parametrize("side", [5, 16])
    def test_positions_are_scaled_as_the_original_does(self, checkpoint: Path, side: int) -> None:
        state = torch.load(checkpoint)
        model = dinov2._from_original(checkpoint)
        dinov2._fix_positions(model, (side * PATCH, side * PATCH), original=True)
        fitted = model.embeddings.position_embeddings[0]
        assert torch.allclose(fitted[1:], positions(state, side), atol=1e-4)
        assert torch.equal(fitted[:1], state["pos_embed"][0, :1])

    def test_its_own_transform_is_the_default(self, checkpoint: Path, photos: dict[str, np.ndarray]) -> None:
        model = opened(checkpoint)
        assert model.prepare(photos["portrait"], Item("a")).data.shape == (224, 224, 3)

    def test_no_weight_may_be_missing(self, checkpoint: Path, tmp_path: Path) -> None:
        state = torch.load(checkpoint)
        del state["blocks.1.norm2.weight"]
        torch.save(state, tmp_path / "less.pth")
        with pytest.raises(BadInput, match=r"less.pth lacks weights of DINOv2: encoder.layer.1.norm2.weight"):
            opened(tmp_path / "less.pth")

    def test_it_has_no_labels(self, checkpoint: Path) -> None:
        assert dinov2.describe(checkpoint) == ()
        with pytest.raises(BadInput, match="has no linear head, so it yields embeddings only"):
            opened(checkpoint, LabelsParams())


class TestClaims:
    """Only DINOv2 is claimed."""

    def test_others_are_not(self, tmp_path: Path) -> None:
        for model_type in ("vit", "detr", 7, None):
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
            assert not dinov2.claims(tmp_path)
        (tmp_path / "config.json").write_text("[1]")
        assert not dinov2.claims(tmp_path)
        names = dinov2._ORIGINAL - {"blocks.0.ls1.gamma"}
        torch.save({name: torch.zeros(1) for name in names}, tmp_path / "vit.pth")
        assert not dinov2.claims(tmp_path / "vit.pth")
        torch.save([1, 2], tmp_path / "list.pth")
        assert not dinov2.claims(tmp_path / "list.pth")

    def test_a_folder_without_weights(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(BadInput, match=r"holds no \*.safetensors"):
            opened(tmp_path)

    def test_cards_are_of_both_kinds(self) -> None:
        names = {f"dinov2_vit{size}14{suffix}" for size in "sblg" for suffix in ("", "_reg")}
        for kind in ("embedding", "labels"):
            assert {card.name for card in dinov2.CARDS if card.kind == kind} == names


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = spread(transformers.Dinov2ForImageClassification(config(False)))
    return folder_of(tmp_path_factory.mktemp("plain"), model)


class TestVectors:
    """What the parameters of an embedding do."""

    def test_float16_is_float32_rounded(self, plain: Path, photos: dict[str, np.ndarray]) -> None:
        images = list(photos.values())
        half = vectors(opened(plain, EmbeddingParams(dtype="float16")), images)
        assert half.dtype == np.float16
        assert np.array_equal(half, vectors(opened(plain), images).astype(np.float16))

    def test_l2_makes_them_of_length_one(self, plain: Path, photos: dict[str, np.ndarray]) -> None:
        images = list(photos.values())
        found, raw = vectors(opened(plain, EmbeddingParams(l2=True)), images), vectors(opened(plain), images)
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert np.allclose(found, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
        assert np.linalg.norm(raw, axis=1).min() > 2

    def test_vectors_do_not_share_memory(self, plain: Path, photos: dict[str, np.ndarray]) -> None:
        found = results(opened(plain), list(photos.values()))
        assert all(result.vector.base is None for result in found)

    def test_numbers_that_are_none_fail_alone(self, photos: dict[str, np.ndarray]) -> None:
        def session(images: torch.Tensor) -> dict[str, torch.Tensor]:
            output = torch.ones(len(images), 4)
            output[1, 2] = torch.nan
            output[2, 0] = 1e5
            return {"output": output}

        given = backbones.Input(lambda image: image[:16, :16], (16, 16), Pixels())
        for dtype in ("float32", "float16"):
            model = backbones.Backbone(given, session, "cpu", backbones.vectors(EmbeddingParams(dtype=dtype)))
            good, nan, large = results(model, [photos["portrait"]] * 3)
            assert good.vector.tolist() == [1, 1, 1, 1]
            assert isinstance(nan, ItemFailed)
            assert (nan.stage, nan.reason) == ("infer", "not-finite")
            if dtype == "float16":
                assert isinstance(large, ItemFailed)
                assert "too large for float16; set dtype=float32 or l2=true" in large.message
            else:
                assert large.vector[0] == 1e5

    def test_half_precision_is_close(self, plain: Path, photos: dict[str, np.ndarray]) -> None:
        images = list(photos.values())
        assert cosines(vectors(opened(plain, precision="bf16"), images), vectors(opened(plain), images)).min() > 0.99

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"pool": "max"}, "pool must be one of default, cls, mean"),
            ({"dtype": "int8"}, "dtype must be one of float32, float16"),
            ({"l2": 1}, "l2 must be true or false"),
            ({"imgsz": 8}, "imgsz must be 0, for the model's own, or from 16"),
            ({"imgsz": True}, "imgsz must be"),
        ],
    )
    def test_wrong_parameters(self, params: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            EmbeddingParams(**params)

    def test_a_size_that_the_patches_do_not_fill(self, plain: Path) -> None:
        with pytest.raises(BadInput, match="multiple of the patch of 14 pixels, but got 100; try 98"):
            opened(plain, EmbeddingParams(imgsz=100))


class TestLabels:
    """What the parameters of a classification do."""

    def test_topk_and_conf(self, plain: Path, photos: dict[str, np.ndarray]) -> None:
        images = list(photos.values())
        every = results(opened(plain, LabelsParams(topk=99)), images)
        assert all(len(found.labels) == len(NAMES) and abs(found.scores.sum() - 1) < 1e-5 for found in every)
        middle = float(np.median(np.concatenate([found.scores for found in every])))
        for found, all_of in zip(results(opened(plain, LabelsParams(conf=middle)), images), every, strict=True):
            assert found.labels == all_of.labels[: min(5, int((all_of.scores > middle).sum()))]

    def test_classes_choose_and_scores_stay(self, plain: Path, photos: dict[str, np.ndarray]) -> None:
        images = list(photos.values())
        every = results(opened(plain, LabelsParams(topk=99)), images)
        for found, all_of in zip(
            results(opened(plain, LabelsParams(classes=("suit", "cat"))), images), every, strict=True
        ):
            kept = [i for i, label in enumerate(all_of.labels) if label in ("suit", "cat")]
            assert found.labels == tuple(all_of.labels[i] for i in kept)
            assert np.allclose(found.scores, all_of.scores[kept])
            assert [NAMES[i] for i in found.class_ids] == list(found.labels)
        with pytest.raises(BadInput, match="no label 'sit'"):
            opened(plain, LabelsParams(classes=("sit",)))

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"topk": 0}, "topk must be a whole number of 1 or more"),
            ({"conf": 1.5}, "conf must be a number from 0 to 1"),
            ({"classes": "dog"}, "classes must be a list of label names"),
        ],
    )
    def test_wrong_parameters(self, params: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            LabelsParams(**params)


class TestPictures:
    """What happens before the network."""

    def test_a_line_of_pixels_is_cut_first(self) -> None:
        line = np.zeros((2, 100_000, 3), np.uint8)
        line[:, 50_000 - 64 : 50_000 + 64] = 255
        cut = backbones.middle(line)
        assert cut.shape == (2, 128, 3)
        assert cut.min() == 255
        assert backbones.middle(line.transpose(1, 0, 2)).shape == (128, 2, 3)
        wide = np.zeros((10, 640, 3), np.uint8)
        assert backbones.middle(wide).shape == wide.shape

    def test_cutting_changes_nothing_that_is_seen(self, plain: Path, photos: dict[str, np.ndarray]) -> None:
        line = photos["landscape"][300:304]  # 320 times as wide as high
        states, _ = upstream(plain, [line])
        assert cosines(vectors(opened(plain), [line]), states[:, 0].numpy()).min() > 0.999

    def test_no_picture(self, plain: Path) -> None:
        with pytest.raises(ItemFailed, match="looks at pictures"):
            opened(plain).prepare(None, Item("a"))

    def test_a_closed_model(self, plain: Path, photos: dict[str, np.ndarray]) -> None:
        model = opened(plain)
        ready: Prepared = model.prepare(photos["small"], Item("a"))
        model.close()
        with pytest.raises(RuntimeError, match="it was closed"):
            model.infer([ready])
