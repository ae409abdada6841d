"""Knows albumentations: named pipelines, how one is written and built, and how objects go through it."""

from __future__ import annotations

import copy
import difflib
import json
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput, ItemFailed
from workers.models import Image
from workers.placing import MOST_PIXELS, Objects

_LIMIT = 50_000  # bytes of a pipeline's JSON, so that it fits into a file's metadata


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


def spelled(given: object) -> str:
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
    if len(spelled) > _LIMIT:
        raise ValueError(f"pipeline may have {_LIMIT} bytes of JSON at most, but has {len(spelled)}")
    return spelled


def _read_pipeline(name: str) -> str:
    try:
        return Path(name).expanduser().read_text()
    except (OSError, ValueError) as error:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"pipeline {name!r} is no preset and no readable file ({error}){hint}") from None


class Augmenter:
    """An albumentations pipeline, one copy for each thread, since each copy holds its own state of chance."""

    def __init__(self, pipeline: str, min_visibility: float) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for a newer version of itself
        transform = json.loads(pipeline)["transform"]
        self._templates = {boxed: _composed(transform, min_visibility, boxed) for boxed in (False, True)}
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
    if not 0 < pixels.shape[0] * pixels.shape[1] <= MOST_PIXELS:
        raise ItemFailed("prepare", "too-many-pixels", f"the pipeline makes a picture of {pixels.shape[1::-1]}")
    return np.ascontiguousarray(pixels)


def _left(objects: Objects, done: Mapping[str, Any]) -> Objects:
    numbers = [int(number) for number in done["number"]]
    moved = objects.chosen(numbers)
    masks = None if moved.masks is None else [done["masks"][i].astype(bool) for i in numbers]
    return replace(moved, boxes=np.asarray(done["bboxes"], np.float64).reshape(-1, 4), masks=masks)
