"""The sam2 family gives what transformers' Sam2Processor and Sam2Model give, for any prompts, cached or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage import rle
from storage.errors import BadInput, ItemFailed
from storage.results.masks import Result
from tests.workers.models.promptable_support import Shelf, agree, iou, photographs, pixels, prepared, run, some_boxes
from tests.workers.models.tinysam2 import SIDE, save, sizes, spread, tiny
from workers import onnxgraph
from workers.maskgen import Params
from workers.models import Site, sam2
from workers.runtimes import torch as torch_runtime

TOLERANCE = 1e-3  # of scores


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def weights(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(theirs, tmp_path_factory.mktemp("sam2") / "tiny")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [np.ascontiguousarray(picture) for picture in photographs()]


def load(weights: Path, encodings: Any = None, precision: str = "fp32", **params: Any) -> sam2.Segmenter:
    def open_network(network: Any) -> Any:
        return torch_runtime.open(network, "cpu", precision)

    site = Site("cpu", open_network, precision, weights_sha256="cd" * 32, encodings=encodings)
    return sam2.load(sam2.CARDS[0], Params(**params), weights, site)


@pytest.fixture(scope="module")
def model(weights: Path) -> sam2.Segmenter:
    return load(weights)


def predicted(
    theirs: Any, picture: np.ndarray, multimask: bool = True, rough: np.ndarray | None = None, **prompt: Any
) -> tuple[np.ndarray, float]:
    """What transformers thinks is the best mask of one prompt, and its rating."""
    from transformers import Sam2ImageProcessor, Sam2Processor

    processor = Sam2Processor(Sam2ImageProcessor(size={"height": SIDE, "width": SIDE}))
    inputs = processor(images=picture, return_tensors="pt", **{name: [value] for name, value in prompt.items()})
    if rough is not None:
        inputs["input_masks"] = torch.from_numpy(rough)[None, None]
    with torch.no_grad():
        out = theirs(**inputs, multimask_output=multimask)
    found = processor.post_process_masks(out.pred_masks, inputs["original_sizes"])[0][0].numpy()
    ratings = out.iou_scores[0, 0].numpy()
    return found[ratings.argmax()], float(ratings.max())


class TestPrompts:
    """One mask for each prompt, as Sam2Model gives it."""

    def test_the_tiny_model_listens(self, theirs: Any, pictures: list[np.ndarray]) -> None:
        """A test of the tests: other prompts and other pictures give other masks."""
        boxes = some_boxes(pictures[0], 4)
        found = [predicted(theirs, pictures[0], input_boxes=[box])[0] for box in boxes]
        assert max(iou(found[0], other) for other in found[1:]) < 0.97
        point, beside = (
            predicted(theirs, pictures[0], input_points=[[[50, 60]]], input_labels=[[sign]])[0] for sign in (1, 0)
        )
        assert iou(point, beside) < 0.97
        turned = predicted(theirs, np.ascontiguousarray(pictures[0][::-1]), input_boxes=[boxes[0]])[0]
        assert iou(found[0], turned) < 0.97

    @pytest.mark.parametrize("multimask", [True, False])
    def test_boxes(self, theirs: Any, weights: Path, pictures: list[np.ndarray], multimask: bool) -> None:
        model = load(weights, multimask=multimask)
        for picture in pictures:
            boxes = some_boxes(picture, 3)
            expected = [predicted(theirs, picture, multimask, input_boxes=[box]) for box in boxes]
            agree(run(model, picture, {"boxes": boxes}), expected, TOLERANCE)

    def test_points(self, theirs: Any, model: sam2.Segmenter, pictures: list[np.ndarray]) -> None:
        points = [[[30, 40], [90, 100], [120.5, 60]], [[90, 100], [12, 60]], [[50, 20]]]
        signs = [[1, 0, 1], [1, 0], [1]]
        expected = [
            predicted(theirs, pictures[1], input_points=[p], input_labels=[s])
            for p, s in zip(points, signs, strict=True)
        ]
        agree(run(model, pictures[1], {"points": points, "point_labels": signs}), expected, TOLERANCE)
        agree(run(model, pictures[1], {"points": points[0], "point_labels": signs[0]}), expected[:1], TOLERANCE)

    def test_boxes_with_points(self, theirs: Any, model: sam2.Segmenter, pictures: list[np.ndarray]) -> None:
        boxes = some_boxes(pictures[0], 2)
        data = {"boxes": boxes, "points": [[[60, 70]], []], "point_labels": [[0], []]}
        expected = [
            predicted(theirs, pictures[0], input_boxes=[boxes[0]], input_points=[[[60, 70]]], input_labels=[[0]]),
            predicted(theirs, pictures[0], input_boxes=[boxes[1]]),
        ]
        agree(run(model, pictures[0], data), expected, TOLERANCE)

    @pytest.mark.parametrize("boxed", [True, False])
    def test_rough_masks(self, theirs: Any, model: sam2.Segmenter, pictures: list[np.ndarray], boxed: bool) -> None:
        """Of the decoder's size, with a box or alone."""
        rough = np.zeros((SIDE // 4, SIDE // 4), bool)
        rough[10:40, 5:30] = True
        logits = np.where(rough, 6.9, -6.9).astype(np.float32)
        boxes = some_boxes(pictures[2], 1) if boxed else None
        given = {"input_boxes": boxes} if boxes else {}
        expected = predicted(theirs, pictures[2], rough=logits, **given)
        asked = {"size": [SIDE // 4, SIDE // 4], "counts": rle.encode(rough).decode()}
        data = {"masks": [asked], **({"boxes": boxes} if boxes else {})}
        agree(run(model, pictures[2], data), [expected], TOLERANCE)
        assert iou(expected[0], predicted(theirs, pictures[2], **given)[0]) < 0.97

    def test_rough_masks_of_the_pictures_size(self, model: sam2.Segmenter, pictures: list[np.ndarray]) -> None:
        """Stretched to the decoder's size, they say the same as a mask given in that size."""
        height, width = pictures[0].shape[:2]
        large, small = np.zeros((height, width), bool), np.zeros((SIDE // 4, SIDE // 4), bool)
        large[: height // 2, : width // 2] = True
        small[: SIDE // 8, : SIDE // 8] = True
        as_rle = [{"size": list(m.shape), "counts": rle.encode(m).decode()} for m in (large, small)]
        one, other = (pixels(run(model, pictures[0], {"masks": [mask]}))[0] for mask in as_rle)
        assert iou(one, other) > 0.98

    def test_the_single_answer(self, pictures: list[np.ndarray], tmp_path: Path) -> None:
        """Where it is unsteady another one takes its place, if the checkpoint says so."""
        boxes = some_boxes(pictures[1], 12)
        found = {}
        for steady in (True, False):
            theirs = tiny(dynamic_multimask_via_stability=steady, dynamic_multimask_stability_thresh=0.92)
            found[steady] = [predicted(theirs, pictures[1], False, input_boxes=[box]) for box in boxes]
            model = load(save(theirs, tmp_path / str(steady)), multimask=False)
            agree(run(model, pictures[1], {"boxes": boxes}), found[steady], TOLERANCE)
        same = [one[1] == other[1] for one, other in zip(found[True], found[False], strict=True)]
        assert 0 < sum(same) < len(boxes)

    def test_what_an_earlier_job_said_is_carried(self, model: sam2.Segmenter, pictures: list[np.ndarray]) -> None:
        data = {"boxes": some_boxes(pictures[0], 2), "labels": ["dog", "cat"], "scores": [0.75, 0.5]}
        result = run(model, pictures[0], data)
        assert result.labels == ("dog", "cat")
        assert result.scores.tolist() == [0.75, 0.5]

    def test_nothing_to_mask(self, model: sam2.Segmenter, pictures: list[np.ndarray]) -> None:
        before = model.encoded
        assert run(model, pictures[0], {"boxes": []}).labels == ()
        assert model.encoded == before

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            ({"boxes": [[1, 2, 3, float("nan")]]}, "boxes of four finite"),
            ({"boxes": [[1, 2, 9, 9], [500, 2, 600, 9]]}, r"box 1 \[500, 2, 600, 9\] is not within the picture of 202"),
            ({"points": [[1, 2]], "point_labels": [2]}, "0 or 1"),
            ({"masks": [{"size": [3, 3], "counts": "9"}]}, r"picture's size \[270, 202\] or of \[64, 64\]"),
            ({"boxes": [[1, 2, 9, 9]] * 2, "points": [[1, 2]]}, "2 boxes and 1 lists of points"),
        ],
    )
    def test_bad_prompts(self, model: sam2.Segmenter, pictures: list[np.ndarray], data: Any, says: str) -> None:
        with pytest.raises(ItemFailed, match=says) as caught:
            prepared(model, pictures[0], data)
        assert (caught.value.stage, caught.value.reason) == ("prepare", "bad-prompt")


class TestBatches:
    """What comes out depends on nothing but the item."""

    def test_together_and_alone(self, model: sam2.Segmenter, pictures: list[np.ndarray]) -> None:
        """Different numbers and forms of prompts."""
        items: list[tuple[np.ndarray, dict[str, Any]]] = [
            (pictures[0], {"boxes": some_boxes(pictures[0], 7)}),
            (pictures[1], {"points": [[30, 40]]}),
            (pictures[2], {"boxes": []}),
            (pictures[0], {"points": [[[30, 40]], [[90, 100], [12, 60]], [[50, 20]]]}),
            (pictures[1], {"boxes": some_boxes(pictures[1], 2), "points": [[[9, 9]], [[20, 30]]]}),
        ]
        batch = [prepared(model, picture, data) for picture, data in items]
        assert len({item.group for item in batch}) == 1
        before = model.encoded
        together = model.infer(batch)
        assert model.encoded - before == 4
        for (picture, data), result in zip(items, together, strict=True):
            alone = run(model, picture, data)
            assert isinstance(result, Result)
            assert len(alone.rles) == len(result.rles)
            assert all(iou(a, b) > 0.999 for a, b in zip(pixels(alone), pixels(result), strict=True))
            assert np.allclose(alone.scores, result.scores, rtol=0, atol=1e-4)

    def test_a_bounded_number_of_prompts_is_decoded_at_once(
        self, weights: Path, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, sizes = load(weights), []
        decode = model._networks.decoder

        def decoder(**inputs: Any) -> Any:
            sizes.append(len(inputs["coarse"]))
            return decode(**inputs)

        monkeypatch.setattr(model._networks, "decoder", decoder)
        boxes = some_boxes(pictures[2], 40)
        result = run(model, pictures[2], {"boxes": boxes})
        assert sizes == [16, 16, 8]
        last = run(model, pictures[2], {"boxes": boxes[-1:]})
        assert iou(pixels(last)[0], rle.decode(result.rles[-1], result.size)) > 0.999

    def test_numbers_that_are_not_finite_fail_their_picture_alone(
        self, weights: Path, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In any of the maps."""
        model = load(weights)
        encode = model._networks.encoder

        def encoder(images: Any) -> Any:
            out = encode(images=images)
            out["fine"][1, 0, 0, 0] = float("nan")
            return out

        monkeypatch.setattr(model._networks, "encoder", encoder)
        first, second, third = model.infer([prepared(model, p, {"boxes": some_boxes(p, 2)}) for p in pictures[:3]])
        assert isinstance(second, ItemFailed)
        assert (second.stage, second.reason) == ("infer", "not-finite")
        assert len(first.rles) == len(third.rles) == 2

    def test_half_precision(self, weights: Path, model: sam2.Segmenter, pictures: list[np.ndarray]) -> None:
        data = {"boxes": some_boxes(pictures[0], 3)}
        one, other = run(load(weights, precision="bf16"), pictures[0], data), run(model, pictures[0], data)
        assert all(iou(a, b) > 0.8 for a, b in zip(pixels(one), pixels(other), strict=True))

    @pytest.mark.slow
    def test_in_onnx(self, weights: Path, model: sam2.Segmenter, pictures: list[np.ndarray], tmp_path: Path) -> None:
        """Both networks exported, for any number of prompts and of tokens."""

        def open_network(network: Any) -> Any:
            path = tmp_path / f"{network.name}.onnx"
            onnxgraph.export(network, "fp32", path)
            return onnxgraph.opened(path, 1)

        exported = sam2.load(sam2.CARDS[0], Params(), weights, Site("cpu", open_network))
        for data in ({"boxes": some_boxes(pictures[0], 17)}, {"points": [[[30, 40]], [[90, 100], [12, 60], [7, 8]]]}):
            one, other = run(exported, pictures[0], data), run(model, pictures[0], data)
            assert all(iou(a, b) > 0.999 for a, b in zip(pixels(one), pixels(other), strict=True))
            assert np.allclose(one.scores, other.scores, rtol=0, atol=1e-4)


class TestEverything:
    """Without prompts: the masks that transformers' pipeline for mask generation finds."""

    LOOSE = {"points_per_side": 4, "pred_iou_thresh": 0.2, "stability_score_thresh": 0.3, "stability_score_offset": 0.5}  # noqa: RUF012

    def expected(self, theirs: Any, picture: np.ndarray, params: dict[str, Any]) -> list[tuple[np.ndarray, float]]:
        from PIL import Image
        from transformers import Sam2ImageProcessor
        from transformers.pipelines import MaskGenerationPipeline

        processor = Sam2ImageProcessor(size={"height": SIDE, "width": SIDE})
        names = {
            "points_per_side": "points_per_crop",
            "crop_n_layers": "crops_n_layers",
            "crop_nms_thresh": "crops_nms_thresh",
        }
        given = {names.get(name, name): value for name, value in params.items() if name != "box_nms_thresh"}
        found = MaskGenerationPipeline(model=theirs, image_processor=processor, device="cpu")(
            Image.fromarray(picture), **given
        )
        return [(np.asarray(m), float(s)) for m, s in zip(found["masks"], found["scores"], strict=True)]

    def agree(self, result: Result, expected: list[tuple[np.ndarray, float]], least: int = 3) -> None:
        got = pixels(result)
        assert len(got) == len(expected)
        assert len(expected) >= least
        left = list(range(len(got)))
        for mask, rating in expected:  # masks of one rating may change places
            best = max(left, key=lambda i: iou(got[i], mask))
            left.remove(best)
            assert iou(got[best], mask) >= 0.99
            assert abs(result.scores[best] - rating) <= TOLERANCE

    @pytest.mark.parametrize(
        "params",
        [
            {},  # what random weights find reaches all over the picture: one of them stays
            {"box_nms_thresh": 1.0, "crop_nms_thresh": 1.0, "pred_iou_thresh": 0.6, "stability_score_thresh": 0.6},
            # The pipeline has one look for doubles where there are crops, here there are two; the same where none goes.
            {"box_nms_thresh": 1.0, "crop_nms_thresh": 1.0, "crop_n_layers": 1, "points_per_side": 2},
        ],
        ids=str,
    )
    def test_the_same_masks(
        self, theirs: Any, weights: Path, pictures: list[np.ndarray], params: dict[str, Any]
    ) -> None:
        params = self.LOOSE | params
        result, expected = run(load(weights, **params), pictures[2], {}), self.expected(theirs, pictures[2], params)
        self.agree(result, expected, 3 if "box_nms_thresh" in params else 1)

    def test_pictures_that_are_not_square(
        self, theirs: Any, weights: Path, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The pipeline measures its points as if the shorter side were padded; it gets them where they belong."""
        from transformers.models.sam2 import image_processing_sam2

        def stretched(target: int, points: Any, size: tuple[int, int]) -> Any:
            return points * torch.tensor([target / size[1], target / size[0]])

        monkeypatch.setattr(image_processing_sam2, "_normalize_coordinates", stretched)
        params = self.LOOSE | {"box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}
        self.agree(run(load(weights, **params), pictures[1], {}), self.expected(theirs, pictures[1], params))

    def test_the_defaults_are_the_pipelines(self) -> None:
        import inspect

        from transformers.pipelines import MaskGenerationPipeline as Theirs

        steps = [
            inspect.signature(step).parameters for step in (Theirs.preprocess, Theirs._forward, Theirs.postprocess)
        ]
        theirs = {name: value.default for step in steps for name, value in step.items()}
        ours = Params()
        assert ours.points_per_side == theirs["points_per_crop"]
        assert ours.crop_n_layers == theirs["crops_n_layers"]
        assert ours.box_nms_thresh == ours.crop_nms_thresh == theirs["crops_nms_thresh"]
        for name in ("pred_iou_thresh", "stability_score_thresh", "stability_score_offset", "crop_overlap_ratio"):
            assert getattr(ours, name) == theirs[name]

    def test_with_the_single_answer_asked_for(self, weights: Path, pictures: list[np.ndarray]) -> None:
        """Everything is looked for among all answers in any case."""
        params = self.LOOSE | {"box_nms_thresh": 1.0}
        one, other = (run(load(weights, multimask=m, **params), pictures[2], {}) for m in (True, False))
        assert one.rles == other.rles


class TestEncodings:
    """A picture that was encoded once is not encoded again."""

    def test_a_later_job_encodes_nothing(self, weights: Path, pictures: list[np.ndarray]) -> None:
        shelf = Shelf()
        asked = [(p, {"boxes": some_boxes(p, 3, seed)}, f"k{seed}") for seed, p in enumerate(pictures)]
        first = load(weights, shelf)
        fresh = first.infer([prepared(first, *one) for one in asked])
        assert first.encoded == len(asked)
        first.close()
        assert len(shelf.kept) == len(asked)
        assert all(name.startswith("sam2/") for name in shelf.kept)
        assert {len(data) for data in shelf.kept.values()} == {2 * (4 * 64**2 + 8 * 32**2 + 32 * 16**2)}
        second = load(weights, shelf)
        again = second.infer([prepared(second, *one) for one in asked])
        assert second.encoded == 0
        for one, other in zip(fresh, again, strict=True):
            assert one.rles == other.rles
            assert one.scores.tolist() == other.scores.tolist()

    def test_new_and_kept_ones_in_one_batch(
        self, weights: Path, model: sam2.Segmenter, pictures: list[np.ndarray]
    ) -> None:
        shelf = Shelf()
        asked = [(p, {"boxes": some_boxes(p, 2, seed)}, f"k{seed}") for seed, p in enumerate(pictures[:3])]
        first = load(weights, shelf)
        first.infer([prepared(first, *asked[1])])
        first.close()
        second = load(weights, shelf)
        results = second.infer([prepared(second, *one) for one in asked])
        assert second.encoded == 2
        for one, other in zip(results, model.infer([prepared(model, *one) for one in asked]), strict=True):
            assert all(iou(a, b) > 0.999 for a, b in zip(pixels(one), pixels(other), strict=True))

    def test_damaged_ones_are_made_again(self, weights: Path, pictures: list[np.ndarray]) -> None:
        shelf = Shelf()
        for _ in range(2):
            model = load(weights, shelf)
            run(model, pictures[0], {"points": [[4, 5]]})
            model.close()
            assert model.encoded == 1
            shelf.kept = {name: data[:-1] for name, data in shelf.kept.items()}

    def test_a_closed_model(self, weights: Path, pictures: list[np.ndarray]) -> None:
        model = load(weights)
        model.close()
        model.close()
        with pytest.raises(RuntimeError, match="closed"):
            model.infer([])


class TestCheckpoints:
    """Folders as transformers saves and the hub publishes them; anything else is refused with one line."""

    @pytest.fixture
    def folder(self, weights: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(weights, tmp_path / "copy"))

    def test_folders_of_the_model_for_videos(
        self, tmp_path: Path, pictures: list[np.ndarray], capfd: pytest.CaptureFixture[str]
    ) -> None:
        """As SAM 2.1 is published: more tensors, another model_type, the same masks as of the model for pictures."""
        from transformers import Sam2Model, Sam2VideoConfig, Sam2VideoModel

        memory = {"memory_attention_hidden_size": 32, "memory_encoder_hidden_size": 32, "memory_fuser_embed_dim": 32}
        memory |= {
            "mask_downsampler_embed_dim": 32,
            "memory_fuser_intermediate_dim": 32,
            "memory_attention_num_layers": 1,
        }
        memory |= {"memory_encoder_output_channels": 16, "memory_attention_feed_forward_hidden_size": 32}
        memory |= {"memory_attention_rope_feat_sizes": [16, 16]}
        folder = save(spread(Sam2VideoModel(Sam2VideoConfig(**sizes(), **memory))), tmp_path / "video")
        assert json.loads((folder / "config.json").read_text())["model_type"] == "sam2_video"
        theirs = Sam2Model.from_pretrained(folder).eval()
        capfd.readouterr()
        assert sam2.claims(folder)
        boxes = some_boxes(pictures[0], 2)
        expected = [predicted(theirs, pictures[0], input_boxes=[box]) for box in boxes]
        capfd.readouterr()
        agree(run(load(folder), pictures[0], {"boxes": boxes}), expected, TOLERANCE)
        assert capfd.readouterr().err == ""

    def test_an_image_processor_in_the_processors_file(
        self, folder: Path, model: sam2.Segmenter, pictures: list[np.ndarray]
    ) -> None:
        from transformers import Sam2ImageProcessor, Sam2Processor

        Sam2Processor(Sam2ImageProcessor.from_pretrained(folder)).save_pretrained(folder)
        (folder / "preprocessor_config.json").unlink()
        data = {"boxes": some_boxes(pictures[0], 1)}
        assert run(load(folder), pictures[0], data).rles == run(model, pictures[0], data).rles

    def test_the_published_sizes(self) -> None:
        """What the default configuration, that of the tiny one, is read as; each card names its own folder."""
        from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model

        with torch.device("meta"):
            theirs = Sam2Model(Sam2Config())
        sam2._check("tiny", theirs, Sam2ImageProcessor())
        assert sam2._shapes(theirs) == [(32, 256, 256), (64, 128, 128), (256, 64, 64)]
        assert {card.weights for card in sam2.CARDS} == {f"hf:facebook/{card.name}" for card in sam2.CARDS}

    def test_half_precision_files(self, tmp_path: Path, pictures: list[np.ndarray]) -> None:
        folder = save(tiny().half(), tmp_path / "half")
        assert len(run(load(folder), pictures[0], {"points": [[4, 5]]}).rles) == 1

    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors; pickled"),
            (lambda folder: (folder / "preprocessor_config.json").unlink(), "holds no preprocessor_config.json"),
            (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "image processor cannot be read"),
            (lambda folder: (folder / "model.safetensors").write_bytes(b"1234567890"), "could not be loaded"),
            (lambda folder: _change(folder / "config.json", vision_config={}), "could not be loaded"),
            (lambda folder: _change(folder / "config.json", mask_decoder_config=None), "could not be loaded"),
            (
                lambda folder: _change(folder / "preprocessor_config.json", size={"height": 64, "width": 64}),
                "to 256 x 256 and normalises them, as config.json says, but got 64 x 64",
            ),
            (
                lambda folder: _change(folder / "config.json", vision_config=_coarse(folder)),
                "expected backbone_feature",
            ),
        ],
    )
    def test_damaged_folders(self, folder: Path, damage: Callable[[Path], Any], says: str) -> None:
        damage(folder)
        assert sam2.claims(folder)
        with pytest.raises(BadInput, match=says):
            load(folder)

    def test_a_tensor_too_few(self, theirs: Any, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        del tensors["mask_decoder.conv_s0.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BadInput, match=r"lacks 1 of the tensors .*mask_decoder.conv_s0.weight"):
            load(folder)

    def test_another_model_is_not_claimed(self, folder: Path) -> None:
        _change(folder / "config.json", model_type="sam")
        assert not sam2.claims(folder)
        assert not sam2.claims(folder / "model.safetensors")
        assert not sam2.claims(folder / "missing")


def _coarse(folder: Path) -> dict[str, Any]:
    """Its vision_config, with the sizes that belong to a larger input."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["vision_config"]
    return config | {"backbone_feature_sizes": [[256, 256], [128, 128], [64, 64]]}


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
