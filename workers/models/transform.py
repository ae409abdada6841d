"""Makes new pictures of old ones, without weights: resized, cropped, padded, filtered, augmented with albumentations.

What earlier jobs said of the objects in a picture goes along: it comes in the item's data and comes out, moved as the
pixels were, in the result's meta (workers/placing.py). An object of which too little is left is dropped.

The filters run on the device, where they are tested against OpenCV's; all else is done by the threads that prepare
pictures. What is random has a generator for each item, seeded from the job's seed, the item's key and its "variant".
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import BadInput, ItemFailed
from storage.results.image import Result
from workers import filters, imagefiles, placing
from workers.models import Card, Image, Item, Prepared, Site
from workers.placing import INTERPOLATIONS, Objects, Place

REQUIRES = ("torch", "cv2", "PIL")
EXTRA = "models"  # for the augmentations, which need albumentations

FITS = ("inside", "pad", "cover", "stretch")
NORMALISATIONS = ("stretch", "equalise", "clahe", "grey-world")

_MOST_PIXELS = 100_000_000  # of a new picture
_ENCODERS = 4  # threads that turn a batch of filtered pictures into files
_PIPELINE_LIMIT = 50_000  # bytes of JSON, so that it fits into a file's metadata
_SEEDS = 2**63

Floats = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------------------------ parameters


@dataclass(frozen=True, slots=True)
class _File:
    """What every operation has.

    Attributes:
        format, quality: of the files, see workers.imagefiles.encode.
    """

    format: str = "png"
    quality: int = 95

    def __post_init__(self) -> None:
        imagefiles.check_format(self.format, self.quality)


@dataclass(frozen=True, slots=True)
class _Moved(_File):
    """What every operation has that moves pixels.

    Attributes:
        min_visibility: objects of whose box a smaller share is left are dropped, 0..1.
    """

    min_visibility: float = 0.1

    def __post_init__(self) -> None:
        _File.__post_init__(self)
        _number("min_visibility", self.min_visibility, 0, 1)


@dataclass(frozen=True, slots=True)
class Resize(_Moved):
    """To another size.

    Attributes:
        width, height: pixels; 0 for one of them means that it follows from the other and the picture's shape.
        fit: where width and height are given: "inside" keeps the shape and one side may be shorter; "pad" fills that up
            with grey; "cover" cuts off the middle's surroundings; "stretch" changes the shape.
        interpolation: "auto" takes area for shrinking and linear for enlarging.
        enlarge: False leaves pictures that are small enough as they are; not for "cover" and "stretch".
        grey: 0..255, of what is added.
    """

    width: int = 640
    height: int = 640
    fit: str = "inside"
    interpolation: str = "auto"
    enlarge: bool = True
    grey: int = 114

    def __post_init__(self) -> None:
        _Moved.__post_init__(self)
        _size(self.width, self.height)
        _one_of("fit", self.fit, FITS)
        _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        _flag("enlarge", self.enlarge)
        _whole("grey", self.grey, 0, 255)


@dataclass(frozen=True, slots=True)
class Crop(_Moved):
    """A part of the picture, as it is.

    Attributes:
        width, height: pixels; of a smaller picture what there is.
        at: "centre", or "random": another place for each variant.
        seed: of the job, for random places.
    """

    width: int = 224
    height: int = 224
    at: str = "centre"
    seed: int = 0

    def __post_init__(self) -> None:
        _Moved.__post_init__(self)
        _whole("width", self.width, 1, 65_535)
        _whole("height", self.height, 1, 65_535)
        _one_of("at", self.at, ("centre", "random"))
        _whole("seed", self.seed, 0, _SEEDS - 1)


@dataclass(frozen=True, slots=True)
class Pad(_Moved):
    """Grey around the picture.

    Attributes:
        width, height: pixels at least; 0 for the picture's own.
        multiple: of which both sides become multiples.
        at: "centre", or "corner": the picture lies in the upper left one.
        grey: 0..255.
    """

    width: int = 0
    height: int = 0
    multiple: int = 32
    at: str = "centre"
    grey: int = 114

    def __post_init__(self) -> None:
        _Moved.__post_init__(self)
        for name in ("width", "height"):
            _whole(name, getattr(self, name), 0, 65_535)
        _whole("multiple", self.multiple, 1, 4096)
        _one_of("at", self.at, ("centre", "corner"))
        _whole("grey", self.grey, 0, 255)


@dataclass(frozen=True, slots=True)
class Normalise(_File):
    """Brightness and colours made comparable.

    Attributes:
        method: "stretch" spreads each channel from its low to its high percentile over 0..255; "equalise" makes all
            brightnesses alike often; "clahe" does that within tiles; "grey-world" makes the channels' means equal.
        low, high: percentiles for "stretch".
        clip: limit of contrast for "clahe".
        tiles: along each side, for "clahe".
    """

    method: str = "stretch"
    low: float = 1.0
    high: float = 99.0
    clip: float = 2.0
    tiles: int = 8

    def __post_init__(self) -> None:
        _File.__post_init__(self)
        _one_of("method", self.method, NORMALISATIONS)
        _number("low", self.low, 0, 100)
        _number("high", self.high, self.low, 100)
        _number("clip", self.clip, 0.1, 1000)
        _whole("tiles", self.tiles, 1, 64)


@dataclass(frozen=True, slots=True)
class Gaussian(_File):
    """A blur, as cv2.GaussianBlur.

    Attributes:
        sigma: standard deviation in pixels; 0 means that it follows from ksize.
        ksize: pixels of the kernel's side, odd; 0 means that it follows from sigma.
    """

    sigma: float = 1.5
    ksize: int = 0

    def __post_init__(self) -> None:
        _File.__post_init__(self)
        _number("sigma", self.sigma, 0, 100)
        if self.ksize or not self.sigma:
            _odd("ksize", self.ksize, 999)


@dataclass(frozen=True, slots=True)
class Average(_File):
    """The mean of each pixel's surroundings, as cv2.blur.

    Attributes:
        ksize: pixels of the kernel's side, odd.
    """

    ksize: int = 3

    def __post_init__(self) -> None:
        _File.__post_init__(self)
        _odd("ksize", self.ksize, 999)


@dataclass(frozen=True, slots=True)
class Sobel(_File):
    """Edges: how fast the brightness changes, as cv2.Sobel.

    Attributes:
        ksize: pixels of the kernel's side: 1, 3, 5 or 7.
        direction: "x" or "y", of which the magnitude is taken, or "both": the length of the gradient.
        scale: what the numbers are multiplied with before they are cut off at 255.
        grey: of the brightness; False takes each channel by itself.
    """

    ksize: int = 3
    direction: str = "both"
    scale: float = 1.0
    grey: bool = True

    def __post_init__(self) -> None:
        _File.__post_init__(self)
        _odd("ksize", self.ksize, 7)
        _one_of("direction", self.direction, ("both", "x", "y"))
        _number("scale", self.scale, 0, 1000)
        _flag("grey", self.grey)


@dataclass(frozen=True, slots=True)
class Laplacian(_File):
    """Edges: how much a pixel differs from its surroundings, as the magnitude of cv2.Laplacian.

    Attributes:
        ksize: pixels of the kernel's side: 1, 3, 5 or 7; 1 is the cross of four neighbours.
        scale: what the numbers are multiplied with before they are cut off at 255.
        grey: of the brightness; False takes each channel by itself.
    """

    ksize: int = 1
    scale: float = 1.0
    grey: bool = True

    def __post_init__(self) -> None:
        _File.__post_init__(self)
        _odd("ksize", self.ksize, 7)
        _number("scale", self.scale, 0, 1000)
        _flag("grey", self.grey)


@dataclass(frozen=True, slots=True)
class Augment(_Moved):
    """A pipeline of albumentations, another outcome for each variant.

    Attributes:
        pipeline: one of PRESETS, or what A.to_dict gives: as JSON, or the path of a JSON file. It is read when the job
            is made, so that the recipe holds the pipeline itself.
        seed: of the job.
    """

    pipeline: str = "light"
    seed: int = 0

    def __post_init__(self) -> None:
        _Moved.__post_init__(self)
        _whole("seed", self.seed, 0, _SEEDS - 1)
        object.__setattr__(self, "pipeline", _pipeline(self.pipeline))


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value}")


def _odd(name: str, value: object, high: int) -> None:
    _whole(name, value, 1, high)
    if isinstance(value, int) and value % 2 == 0:
        raise ValueError(f"{name} must be odd, but got {value}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number from {low} to {high}, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value!r}")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, but got {value!r}")


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, but got {value!r}")


def _size(width: int, height: int) -> None:
    _whole("width", width, 0, 65_535)
    _whole("height", height, 0, 65_535)
    if not width and not height:
        raise ValueError("give width, height or both")
    if width * height > _MOST_PIXELS:
        raise ValueError(f"width x height must be at most {_MOST_PIXELS} pixels, but got {width}x{height}")


def _step(name: str, p: float, **values: Any) -> dict[str, Any]:
    return {"__class_fullname__": name, "p": p, **values}


def _steps(*transforms: dict[str, Any]) -> dict[str, Any]:
    return {"transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": list(transforms)}}


_LIGHT = (
    _step("HorizontalFlip", 0.5),
    _step("Affine", 0.7, scale=[0.9, 1.1], translate_percent=[-0.05, 0.05], rotate=[-10, 10]),
    _step("RandomBrightnessContrast", 0.7, brightness_limit=[-0.2, 0.2], contrast_limit=[-0.2, 0.2]),
    _step("HueSaturationValue", 0.5, hue_shift_limit=[-10, 10], sat_shift_limit=[-20, 20], val_shift_limit=[-10, 10]),
)
_DAMAGE = (
    _step("GaussNoise", 0.5, std_range=[0.02, 0.1]),
    _step("MotionBlur", 0.4, blur_limit=[3, 9]),
    _step("ImageCompression", 0.5, quality_range=[30, 90]),
)
PRESETS: dict[str, dict[str, Any]] = {
    "flips": _steps(_step("HorizontalFlip", 0.5), _step("VerticalFlip", 0.5), _step("RandomRotate90", 0.5)),
    "light": _steps(*_LIGHT),
    "damage": _steps(*_DAMAGE),
    "strong": _steps(*_LIGHT, *_DAMAGE, _step("RandomGamma", 0.5, gamma_limit=[70, 140]), _step("CLAHE", 0.3)),
}


def _pipeline(given: object) -> str:
    """A pipeline in its one spelling as JSON. Raises ValueError or TypeError for what is none."""
    text = json.dumps(given) if isinstance(given, Mapping) else given
    if not isinstance(text, str) or not text:
        raise TypeError(f"pipeline must be JSON, a file or one of {', '.join(PRESETS)}, but got {given!r:.200}")
    if text in PRESETS:
        return json.dumps(PRESETS[text], sort_keys=True)
    if not text.lstrip().startswith("{"):
        text = _read_pipeline(text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"pipeline is not JSON: {error}; write what albumentations' A.to_dict gives") from None
    transform = found.get("transform") if isinstance(found, dict) else None
    if not isinstance(transform, dict) or not isinstance(transform.get("__class_fullname__"), str):
        raise ValueError("pipeline is not what albumentations' A.to_dict gives: it has no transform.__class_fullname__")
    spelled = json.dumps({"transform": transform}, sort_keys=True)
    if len(spelled) > _PIPELINE_LIMIT:
        raise ValueError(f"pipeline may have {_PIPELINE_LIMIT} bytes of JSON at most, but has {len(spelled)}")
    return spelled


def _read_pipeline(name: str) -> str:
    try:
        return Path(name).expanduser().read_text()
    except (OSError, ValueError) as error:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"pipeline {name!r} is no preset and no readable file ({error}){hint}") from None


_BY_NAME: dict[str, type[_File]] = {
    "resize": Resize,
    "crop": Crop,
    "pad": Pad,
    "normalise": Normalise,
    "gaussian": Gaussian,
    "average": Average,
    "sobel": Sobel,
    "laplacian": Laplacian,
    "albumentations": Augment,
}
_FILTERS = (Gaussian, Average, Sobel, Laplacian)

CARDS: tuple[Card, ...] = tuple(
    Card(name, "transform", "image", params, memory_gb=0.5 if params in _FILTERS else 0.0, licence="AGPL-3.0-or-later")
    for name, params in _BY_NAME.items()
)


def claims(path: Path) -> bool:
    """Never: there are no weights."""
    return False


def describe(path: Path) -> tuple[str, ...]:
    """No labels."""
    return ()


def load(card: Card, params: _File, weights: Path | None, site: Site) -> Transformer:
    """Nothing is read; raises BadInput for an albumentations pipeline that cannot be built."""
    if type(params) is not _BY_NAME.get(card.name):
        raise BadInput(f"there is no transformation {card.name!r} with {type(params).__name__} parameters")
    augment = _Augmenter(params) if isinstance(params, Augment) else None
    return Transformer(card.name, params, site.device, augment)


# ------------------------------------------------------------------------------------------------ the model


class Transformer:
    """One operation on one device."""

    def __init__(self, name: str, params: _File, device: str, augment: _Augmenter | None) -> None:
        self._name, self._params, self._device, self._augment = name, params, device, augment
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="image-file")

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """For a filter the picture with its margins, else the finished result.

        Raises:
            ItemFailed: there is no picture, or what the item says of its objects is wrong.
        """
        if image is None:
            raise ItemFailed("prepare", "no-image", f"{self._name} works on pictures, and this item has none")
        objects = placing.read(item.data, image.shape[:2])
        if isinstance(self._params, _FILTERS):
            data = filters.with_margin(image, _kernels(self._params))
            return Prepared(image.shape[:2], data, data.nbytes, objects)
        seed = seed_of(getattr(self._params, "seed", 0), item)
        result = self._encoded(*self._changed(image, objects, seed), seed)
        return Prepared("made", result, result.nbytes)

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The new pictures."""
        if not isinstance(self._params, _FILTERS):
            return [item.data for item in batch]
        if not batch:
            return []
        pictures = filters.run(
            np.stack([item.data for item in batch]),
            _kernels(self._params),
            length=isinstance(self._params, Sobel),
            grey=getattr(self._params, "grey", False),
            scale=getattr(self._params, "scale", 1.0),
            device=self._device,
        )
        return list(self._encoders.map(self._encoded, pictures, (item.meta for item in batch)))

    def close(self) -> None:
        """Stop the threads."""
        self._encoders.shutdown(wait=False)

    def _changed(self, image: Image, objects: Objects, seed: int) -> tuple[Image, Objects]:
        params = self._params
        if self._augment is not None:
            return self._augment(image, objects, seed)
        if isinstance(params, Normalise):
            return normalised(image, params), objects
        if isinstance(params, Resize):
            place, interpolation, grey = _resize(image.shape[:2], params), params.interpolation, params.grey
        elif isinstance(params, Crop):
            place, interpolation, grey = _crop(image.shape[:2], params, seed), "auto", 0
        else:
            assert isinstance(params, Pad)
            place, interpolation, grey = _pad(image.shape[:2], params), "auto", params.grey
        return place.picture(image, interpolation, grey), place.objects(objects, params.min_visibility)

    def _encoded(self, pixels: Image, objects: Objects, seed: int | None = None) -> Result:
        params = asdict(self._params)
        file = {name: params.pop(name) for name in ("format", "quality")}
        params.pop("seed", None)
        random = isinstance(self._params, Augment) or (isinstance(self._params, Crop) and self._params.at == "random")
        how = {"operation": self._name, "params": params, **({"seed": seed} if random else {})}
        return imagefiles.encode(pixels, file["format"], file["quality"], how, objects.told())


def _kernels(params: _File) -> filters.Pairs:
    if isinstance(params, Gaussian):
        return filters.gaussian(params.sigma, params.ksize)
    if isinstance(params, Average):
        return filters.average(params.ksize)
    if isinstance(params, Sobel):
        return filters.sobel(params.ksize, params.direction)
    assert isinstance(params, Laplacian)
    return filters.laplacian(params.ksize)


def seed_of(seed: int, item: Item) -> int:
    """The seed of an item's own generator."""
    digest = hashlib.sha256(json.dumps([seed, item.key, item.data.get("variant", 0)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _SEEDS


# ------------------------------------------------------------------------------------------------ geometry


def _resize(shape: tuple[int, int], params: Resize) -> Place:
    height, width = shape
    wanted = (params.width, params.height)
    whole = (0, 0, width, height)
    if all(wanted) and params.fit == "stretch":
        return Place(whole, wanted, wanted)
    if all(wanted) and params.fit == "cover":
        gain = max(wanted[0] / width, wanted[1] / height)
        cut = (max(min(round(wanted[0] / gain), width), 1), max(min(round(wanted[1] / gain), height), 1))
        x, y = (width - cut[0]) // 2, (height - cut[1]) // 2
        return Place((x, y, x + cut[0], y + cut[1]), wanted, wanted)
    gain = min(side / own for side, own in zip(wanted, (width, height), strict=True) if side)
    gain = gain if params.enlarge else min(gain, 1.0)
    scaled = (max(round(width * gain), 1), max(round(height * gain), 1))
    if scaled[0] * scaled[1] > _MOST_PIXELS:
        raise ItemFailed("prepare", "too-many-pixels", f"the new picture would be {scaled[0]}x{scaled[1]}")
    if not all(wanted) or params.fit == "inside":
        return Place(whole, scaled, scaled)
    return Place(whole, scaled, wanted, ((wanted[0] - scaled[0]) // 2, (wanted[1] - scaled[1]) // 2))


def _crop(shape: tuple[int, int], params: Crop, seed: int) -> Place:
    height, width = shape
    size = (min(params.width, width), min(params.height, height))
    if params.at == "centre":
        x, y = (width - size[0]) // 2, (height - size[1]) // 2
    else:
        place = np.random.default_rng(seed)
        x, y = (int(place.integers(0, room + 1)) for room in (width - size[0], height - size[1]))
    return Place((x, y, x + size[0], y + size[1]), size, size)


def _pad(shape: tuple[int, int], params: Pad) -> Place:
    height, width = shape
    sides = (max(width, params.width), max(height, params.height))
    canvas = (-(-sides[0] // params.multiple) * params.multiple, -(-sides[1] // params.multiple) * params.multiple)
    room = (canvas[0] - width, canvas[1] - height)
    return Place(
        (0, 0, width, height),
        (width, height),
        canvas,
        (0, 0) if params.at == "corner" else (room[0] // 2, room[1] // 2),
    )


# ------------------------------------------------------------------------------------------------ brightness


def normalised(image: Image, params: Normalise) -> Image:
    """The picture with its brightness and colours spread, see Normalise."""
    import cv2

    if params.method == "stretch":
        low, high = np.percentile(image, [params.low, params.high], axis=(0, 1))
        return _rounded((image - low) * (255 / np.maximum(high - low, 1)))
    if params.method == "grey-world":
        means = image.mean((0, 1))
        return _rounded(image * (means.mean() / np.maximum(means, 1)))
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    if params.method == "equalise":
        light = cv2.equalizeHist(np.ascontiguousarray(lab[..., 0]))
    else:
        light = cv2.createCLAHE(params.clip, (params.tiles, params.tiles)).apply(np.ascontiguousarray(lab[..., 0]))
    done: Image = cv2.cvtColor(np.dstack([light, lab[..., 1:]]), cv2.COLOR_LAB2RGB)
    return done


def _rounded(values: Floats) -> Image:
    rounded: Image = values.round().clip(0, 255).astype(np.uint8)
    return rounded


# ------------------------------------------------------------------------------------------------ augmentations


class _Augmenter:
    """An albumentations pipeline, one copy for each thread, since each copy holds its own state of chance."""

    def __init__(self, params: Augment) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for a newer version of itself
        pipeline = json.loads(params.pipeline)["transform"]
        self._templates = {boxed: _composed(pipeline, params.min_visibility, boxed) for boxed in (False, True)}
        self._own = threading.local()
        self._lock = threading.Lock()

    def __call__(self, image: Image, objects: Objects, seed: int) -> tuple[Image, Objects]:
        """The picture and the objects left of it. Raises ItemFailed when the pipeline makes no picture of it."""
        boxed = bool(len(objects.boxes))
        compose = self._copy(boxed)
        compose.set_random_seed(seed)
        given: dict[str, Any] = {"image": image}
        if boxed:
            given |= {"bboxes": objects.boxes, "number": np.arange(len(objects.boxes))}
        if objects.masks:
            given["masks"] = [mask.astype(np.uint8) for mask in objects.masks]
        try:
            done = compose(**given)
        except Exception as error:  # a transform may raise anything; it becomes a row
            raise ItemFailed("prepare", "augmentation-failed", f"albumentations: {error}") from error
        pixels = _checked(done["image"])
        if not boxed:
            return pixels, objects
        return pixels, _left(objects, done)

    def _copy(self, boxed: bool) -> Any:
        copies = self._own.__dict__.setdefault("copies", {})
        if boxed not in copies:
            with self._lock:
                copies[boxed] = copy.deepcopy(self._templates[boxed])
        return copies[boxed]


def _composed(pipeline: Mapping[str, Any], min_visibility: float, boxed: bool) -> Any:
    """The pipeline, with boxes the way this file hands them over. Raises BadInput when it cannot be built."""
    import albumentations

    if pipeline["__class_fullname__"].rpartition(".")[2] != "Compose":
        pipeline = {"__class_fullname__": "Compose", "p": 1.0, "transforms": [pipeline]}
    own = pipeline.get("bbox_params") or {}
    limits = {name: own[name] for name in ("min_area", "min_visibility", "min_width", "min_height") if name in own}
    boxes = {"format": "pascal_voc", "label_fields": ["number"], "clip": True, "filter_invalid_bboxes": True}
    boxes |= {"min_visibility": min_visibility, **limits}
    whole = {**pipeline, "bbox_params": boxes if boxed else None, "keypoint_params": None, "additional_targets": {}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # what it ignores, such as a misspelt parameter
            warnings.filterwarnings("ignore", message="Got processor for bboxes")  # which nothing in it moves
            return albumentations.from_dict({"transform": whole})
    except KeyError as error:
        raise BadInput(
            f"albumentations {albumentations.__version__} has no transform {error}; check its name"
        ) from None
    except (ValueError, TypeError, AttributeError, UserWarning) as error:
        text = " ".join(str(error).split())[:300]
        raise BadInput(f"albumentations {albumentations.__version__} cannot build the pipeline: {text}") from None


def _checked(pixels: Any) -> Image:
    """The picture a pipeline made. Raises ItemFailed when it is none that can be saved."""
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        what = f"{getattr(pixels, 'dtype', type(pixels).__name__)} of {getattr(pixels, 'shape', 'no shape')}"
        raise ItemFailed(
            "prepare",
            "not-an-image",
            f"the pipeline makes {what}, expected RGB of 8 bits; leave out Normalize, ToTensor",
        )
    if not 0 < pixels.shape[0] * pixels.shape[1] <= _MOST_PIXELS:
        raise ItemFailed("prepare", "too-many-pixels", f"the pipeline makes a picture of {pixels.shape[1::-1]}")
    return np.ascontiguousarray(pixels)


def _left(objects: Objects, done: Mapping[str, Any]) -> Objects:
    numbers = [int(number) for number in done["number"]]
    moved = objects.chosen(numbers)
    masks = None if moved.masks is None else [done["masks"][i].astype(bool) for i in numbers]
    return replace(moved, boxes=np.asarray(done["bboxes"], np.float64).reshape(-1, 4), masks=masks)
