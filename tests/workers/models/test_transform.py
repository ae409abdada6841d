"""Transformations: filters against OpenCV and SciPy, geometry with the objects that follow it, seeded augmentations."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image
from ultralytics.utils import ASSETS

from storage import rle
from storage.errors import BadInput, ItemFailed
from storage.results.image import Result
from workers import augmentations, models, transformparams
from workers.models import Item, Site, transform

SITE = Site("cpu", lambda network: pytest.fail("no runtime is asked for"))


def photo(name: str = "bus.jpg", factor: int = 3) -> np.ndarray:
    """A real photograph, upright RGB, smaller."""
    return np.asarray(Image.open(ASSETS / name).convert("RGB").reduce(factor))


def model(name: str, **params: Any) -> transform.Transformer:
    card = next(card for card in transform.CARDS if card.name == name)
    return transform.load(card, card.params(**models.fill(card, params)), None, SITE)


def done(of: transform.Transformer, image: np.ndarray, key: str = "k", **data: Any) -> Result:
    (result,) = of.infer([of.prepare(image, Item(key, data=data))])
    assert isinstance(result, Result), result
    return result


def pixels(result: Result) -> np.ndarray:
    assert result.data is not None
    with Image.open(io.BytesIO(result.data)) as picture:
        return np.asarray(picture)


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference in grey levels."""
    assert one.shape == other.shape
    return int(abs(one.astype(int) - other.astype(int)).max())


def grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def three(image: np.ndarray) -> np.ndarray:
    return np.dstack([image] * 3)


# ------------------------------------------------------------------------------------------------ filters

SHAPES = [None, (1, 1), (1, 50), (3, 2), (31, 17)]


def picture(shape: tuple[int, int] | None) -> np.ndarray:
    if shape is None:
        return photo("zidane.jpg", 4)
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("sigma", "ksize"), [(1.5, 0), (0.4, 0), (6.0, 0), (0, 5), (2.0, 9)])
def test_gaussian_is_that_of_opencv(shape: tuple[int, int] | None, sigma: float, ksize: int) -> None:
    image = picture(shape)
    ours = pixels(done(model("gaussian", sigma=sigma, ksize=ksize), image))
    side = ksize or round(sigma * 6 + 1) | 1  # what it takes for 8 bits
    exact = cv2.GaussianBlur(image.astype(np.float32), (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)
    assert apart(ours, exact.reshape(image.shape).round()) <= 1
    assert apart(ours, cv2.GaussianBlur(image, (ksize, ksize), sigma, borderType=cv2.BORDER_REFLECT_101)) <= 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ksize", [1, 3, 15])
def test_average_is_that_of_opencv(shape: tuple[int, int] | None, ksize: int) -> None:
    image = picture(shape)
    ours = pixels(done(model("average", ksize=ksize), image))
    assert apart(ours, cv2.blur(image, (ksize, ksize), borderType=cv2.BORDER_REFLECT_101)) <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ksize", [1, 3, 5, 7])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_sobel_and_laplacian_are_those_of_opencv(shape: tuple[int, int] | None, ksize: int, scale: float) -> None:
    image = picture(shape)
    x, y = (cv2.Sobel(grey(image), cv2.CV_32F, dx, 1 - dx, ksize=ksize) for dx in (1, 0))
    expected = {"x": abs(x), "y": abs(y), "both": np.hypot(x, y)}
    for direction, values in expected.items():
        ours = pixels(done(model("sobel", ksize=ksize, direction=direction, scale=scale), image))
        assert apart(ours, three((values * scale).round().clip(0, 255))) <= (1 if direction == "both" else 0)
    laplacian = abs(cv2.Laplacian(grey(image), cv2.CV_32F, ksize=ksize))
    ours = pixels(done(model("laplacian", ksize=ksize, scale=scale), image))
    assert apart(ours, three((laplacian * scale).round().clip(0, 255))) == 0


def test_channels_are_filtered_apart_when_asked() -> None:
    image = photo()
    ours = pixels(done(model("laplacian", grey=False), image))
    assert apart(ours, cv2.convertScaleAbs(cv2.Laplacian(image, cv2.CV_32F))) == 0
    assert apart(ours[..., 0], ours[..., 1]) > 0


def test_filters_are_those_of_scipy() -> None:
    image = photo()
    values = image.astype(np.float64)
    smooth = scipy.ndimage.gaussian_filter(values, (2, 2, 0), mode="mirror", radius=6)
    assert apart(pixels(done(model("gaussian", sigma=2.0, ksize=13), image)), smooth.round()) <= 1
    plain = grey(image).astype(np.float64)
    edges = np.hypot(*(scipy.ndimage.sobel(plain, axis, mode="mirror") for axis in (0, 1)))
    assert apart(pixels(done(model("sobel"), image)), three(edges.round().clip(0, 255))) <= 1
    second = abs(scipy.ndimage.laplace(plain, mode="mirror"))
    assert apart(pixels(done(model("laplacian"), image)), three(second.clip(0, 255))) == 0


@pytest.mark.parametrize("name", ["gaussian", "sobel"])
def test_a_filtered_picture_does_not_depend_on_its_batch(name: str) -> None:
    of = model(name)
    batch = [of.prepare(np.roll(photo(), 7 * i, axis=1), Item(f"{i}")) for i in range(5)]
    assert {item.group for item in batch} == {photo().shape[:2]}
    alone = [of.infer([item])[0] for item in batch]
    together = of.infer(batch)
    assert max(apart(pixels(a), pixels(b)) for a, b in zip(alone, together, strict=True)) <= 1
    assert len({result.sha256 for result in together}) == 5


# ------------------------------------------------------------------------------------------------ geometry

COLOURS = ((250, 0, 0), (0, 250, 0), (0, 0, 250))
BOXES = [[10.0, 20.0, 60.0, 50.0], [70.0, 10.0, 110.0, 80.0], [120.0, 60.0, 150.0, 90.0]]


def scene() -> tuple[np.ndarray, dict[str, Any]]:
    """Three coloured rectangles on white, 160x100, with their boxes, masks, labels and scores."""
    image = np.full((100, 160, 3), 255, np.uint8)
    masks = []
    for (x1, y1, x2, y2), colour in zip(np.int32(BOXES), COLOURS, strict=True):
        image[y1:y2, x1:x2] = colour
        mask = np.zeros((100, 160), bool)
        mask[y1:y2, x1:x2] = True
        masks.append({"size": [100, 160], "counts": rle.encode(mask).decode()})
    known = {"labels": ["red", "green", "blue"], "scores": [0.9, 0.8, 0.7], "class_ids": [4, 5, 6]}
    return image, {"boxes": BOXES, "masks": masks, **known}


def seen(image: np.ndarray, label: str) -> list[float]:
    """The box around all pixels of nearly a rectangle's colour."""
    colour = np.array(COLOURS[["red", "green", "blue"].index(label)])
    rows, columns = np.nonzero((abs(image.astype(int) - colour) < 100).all(-1))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


FLIPS = {"transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": []}}


def steps(*named: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    transforms = [{"__class_fullname__": name, "p": 1.0, **values} for name, values in named]
    return {"transform": {**FLIPS["transform"], "transforms": transforms}}


MOVES: dict[str, tuple[str, dict[str, Any]]] = {
    "half": ("resize", {"width": 80, "height": 0}),
    "larger": ("resize", {"width": 500, "height": 250}),
    "stretched": ("resize", {"width": 90, "height": 130, "fit": "stretch"}),
    "cover": ("resize", {"width": 60, "height": 60, "fit": "cover"}),
    "letterbox": ("resize", {"width": 128, "height": 128, "fit": "pad"}),
    "centre": ("crop", {"width": 100, "height": 70}),
    "somewhere": ("crop", {"width": 90, "height": 60, "at": "random"}),
    "padded": ("pad", {"multiple": 64}),
    "corner": ("pad", {"width": 200, "height": 150, "at": "corner", "multiple": 1}),
    "flip": ("albumentations", {"pipeline": steps(("HorizontalFlip", {}))}),
    "turn": ("albumentations", {"pipeline": steps(("RandomRotate90", {}), ("VerticalFlip", {}))}),
    "chance": ("albumentations", {"pipeline": steps(("RandomCrop", {"height": 70, "width": 90}))}),
    "scaled": ("albumentations", {"pipeline": steps(("Resize", {"height": 50, "width": 240}))}),
}


@pytest.mark.parametrize("move", MOVES)
def test_boxes_and_masks_follow_the_pixels(move: str) -> None:
    name, params = MOVES[move]
    image, data = scene()
    result = done(model(name, min_visibility=0.2, **params), image, **data)
    new, meta = pixels(result), result.meta
    assert (result.width, result.height) == new.shape[1::-1]
    assert 1 <= len(meta["boxes"]) == len(meta["labels"]) == len(meta["masks"])
    for box, mask, label, score in zip(*(meta[n] for n in ("boxes", "masks", "labels", "scores")), strict=True):
        assert np.abs(np.array(box) - seen(new, label)).max() <= 1.5
        assert mask["size"] == list(new.shape[:2])
        around = rle.bbox(mask["counts"].encode(), new.shape[:2])
        assert np.abs(np.array(box) - around).max() <= 1.5
        assert score == dict(zip(data["labels"], data["scores"], strict=True))[label]
    assert [{4: "red", 5: "green", 6: "blue"}[i] for i in meta["class_ids"]] == meta["labels"]


def test_objects_that_are_cut_away_are_dropped() -> None:
    image, data = scene()
    for least, labels in {0.0: ["red", "green"], 0.35: ["red", "green"], 0.5: ["green"], 1.0: ["green"]}.items():
        # Of the red box the right 20 of 50 columns are left, the green one is whole, the blue one is gone.
        result = done(model("crop", width=80, height=100, min_visibility=least), image, **data)
        assert result.meta["labels"] == labels
    assert done(model("crop", width=10, height=10), image, **data).meta["boxes"] == []


def test_a_mask_alone_has_a_box() -> None:
    image, data = scene()
    meta = done(model("resize", width=320, height=0), image, masks=data["masks"]).meta
    assert meta["boxes"] == [[2 * side for side in box] for box in BOXES]


def test_nothing_is_said_of_objects_where_nothing_was() -> None:
    image, _ = scene()
    assert "boxes" not in done(model("resize"), image).meta
    assert done(model("resize"), image, boxes=[], labels=[]).meta["boxes"] == []
    assert done(model("sobel"), image, boxes=BOXES, labels=["a"] * 3).meta["boxes"] == BOXES
    assert done(model("albumentations"), image, boxes=[], labels=[]).meta["labels"] == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"boxes": [[1, 2, 3]]}, "expected boxes as"),
        ({"boxes": "all"}, "expected boxes as"),
        ({"boxes": 3}, "expected boxes as"),
        ({"boxes": [1, 2, 3, 4]}, "expected boxes as"),
        ({"boxes": [[0, 0, 1, float("nan")]]}, "expected boxes as"),
        ({"boxes": BOXES, "labels": ["a"]}, "expected 3 labels, one for each box"),
        ({"boxes": BOXES, "labels": "abc"}, "expected 3 labels"),
        ({"masks": [{"size": [5, 5], "counts": "0"}]}, "expected masks as COCO RLE of this picture"),
        ({"masks": [{"size": [100, 160], "counts": "~~"}]}, "expected masks as COCO RLE"),
        ({"masks": 3}, "expected masks"),
    ],
)
def test_wrong_objects_fail_the_item(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ItemFailed, match=message) as caught:
        model("resize").prepare(scene()[0], Item("k", data=data))
    assert (caught.value.stage, caught.value.reason) == ("prepare", "bad-objects")


def test_resized_pixels_are_those_of_opencv() -> None:
    image = photo()
    height, width = image.shape[:2]
    small = cv2.resize(image, (100, round(height * 100 / width)), interpolation=cv2.INTER_AREA)
    assert np.array_equal(pixels(done(model("resize", width=100, height=0), image)), small)
    flags = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}
    for name, flag in flags.items():
        ours = done(model("resize", width=500, height=90, fit="stretch", interpolation=name), image)
        assert np.array_equal(pixels(ours), cv2.resize(image, (500, 90), interpolation=flag))
    boxed = pixels(done(model("resize", width=64, height=64, fit="pad", grey=7), image))
    assert boxed.shape == (64, 64, 3)
    assert (boxed[:, 0] == 7).all()


def test_sizes() -> None:
    image = np.zeros((100, 200, 3), np.uint8)

    def size(name: str, **params: Any) -> tuple[int, int]:
        result = done(model(name, **params), image)
        return result.width, result.height

    assert size("resize", width=100, height=100) == (100, 50)
    assert size("resize", width=0, height=300) == (600, 300)
    assert size("resize", width=1000, height=1000, enlarge=False) == (200, 100)
    assert size("resize", width=50, height=70, fit="cover") == (50, 70)
    assert size("crop", width=500, height=30) == (200, 30)
    assert size("pad", multiple=64) == (256, 128)
    assert size("pad", multiple=1, width=201, height=5) == (201, 100)
    with pytest.raises(ItemFailed, match="would be"):
        model("resize", width=60_000, height=0).prepare(image, Item("k"))


# ------------------------------------------------------------------------------------------------ brightness


def test_normalised_pictures() -> None:
    image = (photo() // 3 + np.uint8([40, 20, 0])).astype(np.uint8)
    stretched = pixels(done(model("normalise", low=0, high=100), image))
    assert stretched.min((0, 1)).tolist() == [0] * 3
    assert stretched.max((0, 1)).tolist() == [255] * 3
    balanced = pixels(done(model("normalise", method="grey-world"), image)).mean((0, 1))
    assert np.ptp(image.mean((0, 1))) > 10
    assert np.ptp(balanced) < 1
    for method in ("equalise", "clahe"):
        light = grey(pixels(done(model("normalise", method=method), image)))
        assert light.std() > 1.3 * grey(image).std()
    flat = np.full((5, 5, 3), 9, np.uint8)
    for method in transformparams.NORMALISATIONS:
        assert pixels(done(model("normalise", method=method), flat)).shape == (5, 5, 3)


# ------------------------------------------------------------------------------------------------ augmentations


def test_augmentations_are_those_of_albumentations() -> None:
    """The same serialised pipeline under the same seed, boxes and all."""
    pipeline = A.Compose(
        [A.Affine(rotate=(-20, 20), p=1), A.ColorJitter(p=1), A.RandomCrop(80, 120, p=1), A.GaussNoise(p=1)],
        bbox_params=A.BboxParams(format="pascal_voc", label_fields=["labels"], min_visibility=0.3, clip=True),
    )
    of = model("albumentations", pipeline=json.loads(json.dumps(A.to_dict(pipeline))), seed=3)
    image, data = scene()
    for i in range(5):
        result = done(of, image, f"key {i}", boxes=data["boxes"], labels=data["labels"])
        pipeline.set_random_seed(transform.seed_of(3, Item(f"key {i}")))
        theirs = pipeline(image=image, bboxes=np.array(BOXES), labels=data["labels"])
        assert np.array_equal(pixels(result), theirs["image"])
        np.testing.assert_allclose(result.meta["boxes"], theirs["bboxes"], atol=1e-4)
        assert result.meta["labels"] == theirs["labels"]


@pytest.mark.parametrize("preset", augmentations.PRESETS)
def test_presets_give_the_same_in_any_thread_and_order(preset: str) -> None:
    of, again = model("albumentations", pipeline=preset, seed=5), model("albumentations", pipeline=preset, seed=5)
    image, data = scene()
    items = [Item(f"{i // 3}", data={**data, "variant": i % 3}) for i in range(18)]
    first = [of.infer([of.prepare(image, item)])[0] for item in items]
    with ThreadPoolExecutor(6) as pool:
        turned = list(pool.map(lambda item: again.prepare(image, item), items[::-1]))
    assert again.infer(turned)[::-1] == first
    assert len({result.sha256 for result in first}) >= (8 if preset == "flips" else 17)
    other = model("albumentations", pipeline=preset, seed=6)
    assert [other.infer([other.prepare(image, item)])[0] for item in items] != first


def test_variants_and_random_crops_differ() -> None:
    of = model("crop", width=60, height=40, at="random")
    image = photo()
    results = [done(of, image, key, variant=variant) for key in ("a", "b") for variant in range(4)]
    assert len({result.sha256 for result in results}) == 8
    assert results[3] == done(of, image, "a", variant=3)
    assert "seed" in results[0].meta
    assert "seed" not in done(model("crop"), image).meta


def test_a_pipeline_comes_from_a_file_or_inline_and_is_kept_itself(tmp_path: Path) -> None:
    """So that the recipe changes when the file does, and workers need no file."""
    card = next(card for card in transform.CARDS if card.name == "albumentations")
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps({"__version__": "2.0.8", **steps(("HorizontalFlip", {}))}, indent=2))
    filled = [
        models.fill(card, {"pipeline": given}) for given in (str(path), path.read_text(), steps(("HorizontalFlip", {})))
    ]
    assert filled[0] == filled[1] == filled[2]
    path.unlink()
    assert models.fill(card, filled[0]) == filled[0]
    single = model("albumentations", pipeline=A.to_dict(A.HorizontalFlip(p=1)))
    image = photo()
    assert np.array_equal(pixels(done(single, image)), image[:, ::-1])


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("lihgt", "is no preset and no readable file.*did you mean 'light'"),
        ("/nowhere/p.json", "is no preset and no readable file"),
        ("{", "is not JSON"),
        ("{}", r"no transform\.__class_fullname__"),
        ({"transform": {"p": 1}}, r"no transform\.__class_fullname__"),
        ("", "pipeline must be JSON"),
        (3, "pipeline must be JSON"),
        (steps(("NoSuchThing", {})), "has no transform 'NoSuchThing'"),
        (steps(("HorizontalFlip", {"probability": 1})), "cannot build the pipeline: .*probability"),
        (steps(("RandomCrop", {"height": -1, "width": 5})), "cannot build the pipeline"),
        (steps(("Blur", {"blur_limit": "much"})), "cannot build the pipeline"),
        ({"transform": {"__class_fullname__": "Lambda", "__name__": "f"}}, "cannot build the pipeline"),
        (steps(*[("HorizontalFlip", {})] * 2000), "50000 bytes of JSON at most"),
    ],
)
def test_wrong_pipelines_say_so(pipeline: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        model("albumentations", pipeline=pipeline)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason", "message"),
    [
        ("Normalize", "not-an-image", "makes float32.*leave out Normalize"),
        ("ToGray", "", ""),
        ("CropNonEmptyMaskIfExists", "augmentation-failed", "albumentations: "),
    ],
)
def test_what_a_pipeline_cannot_do_fails_the_item(name: str, reason: str, message: str) -> None:
    sides = {"height": 9, "width": 9} if name.startswith("Crop") else {}
    of = model("albumentations", pipeline=steps((name, sides)))
    if not reason:
        np.testing.assert_allclose(done(of, scene()[0], boxes=BOXES).meta["boxes"], BOXES, atol=1e-4)
        return
    with pytest.raises(ItemFailed, match=message) as caught:
        of.prepare(scene()[0], Item("k"))
    assert caught.value.reason == reason


# ------------------------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize("card", transform.CARDS, ids=lambda card: card.name)
def test_every_operation_takes_every_picture(card: models.Card) -> None:
    of = model(card.name, format="jpeg", quality=80)
    for shape in ((1, 1), (1, 90), (90, 1), (37, 53)):
        result = done(of, picture(shape))
        assert pixels(result).shape == (result.height, result.width, 3)
        assert result.format == "jpeg"
        assert result.meta["operation"] == card.name
        assert not {"format", "quality"} & set(result.meta["params"])
    with pytest.raises(ItemFailed, match="works on pictures, and this item has none"):
        of.prepare(None, Item("k"))
    before = photo().copy()
    image = before.copy()
    done(of, image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("resize", {"width": 0, "height": 0}, "give width, height or both"),
        ("resize", {"fit": "crop"}, "fit must be one of inside, pad, cover, stretch"),
        ("resize", {"width": 60_000, "height": 60_000}, "at most 100000000 pixels"),
        ("crop", {"width": 0}, "width must be from 1"),
        ("crop", {"at": "left"}, "at must be one of centre, random"),
        ("pad", {"grey": 256}, "grey must be from 0 to 255"),
        ("sobel", {"ksize": 4}, "ksize must be odd"),
        ("sobel", {"ksize": 9}, "ksize must be from 1 to 7"),
        ("gaussian", {"sigma": 0}, "ksize must be from 1"),
        ("gaussian", {"ksize": 4}, "ksize must be odd"),
        ("average", {"ksize": 3.0}, "ksize must be a whole number"),
        ("laplacian", {"grey": 1}, "grey must be true or false"),
        ("normalise", {"low": 60, "high": 40}, "high must be"),
        ("albumentations", {"seed": -1}, "seed must be from 0"),
        ("resize", {"seed": 1}, "has no parameter 'seed'"),
        ("resize", {"format": "bmp"}, "format must be one of"),
        ("resize", {"min_visibility": 2}, "min_visibility must be from 0 to 1"),
    ],
)
def test_wrong_parameters_say_so(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        model(name, **params)
