"""Makes new pictures of old ones, without weights: resized, cropped, padded, filtered, augmented with albumentations.

What earlier jobs said of the objects in a picture goes along: it comes in the item's data and comes out, moved as the
pixels were, in the result's meta (workers/placing.py). An object of which too little is left is dropped.

The filters run on the device, where they are tested against OpenCV's; all else is done by the threads that prepare
pictures. What is random has a generator for each item, seeded from the job's seed, the item's key and its "variant".
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from storage.errors import BadInput, ItemFailed
from storage.results.image import Result
from workers import brightness, filters, imagefiles, layouts, placing
from workers.augmentations import Augmenter
from workers.models import Card, Image, Item, Prepared, Site
from workers.placing import Objects
from workers.transformparams import (
    SEEDS,
    Augment,
    Average,
    Crop,
    File,
    Gaussian,
    Laplacian,
    Normalise,
    Pad,
    Resize,
    Sobel,
)

REQUIRES = ("torch", "cv2", "PIL")
EXTRA = "models"  # for the augmentations, which need albumentations

_ENCODERS = 4  # threads that turn a batch of filtered pictures into files

_BY_NAME: dict[str, type[File]] = {
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


def check(card: Card, params: File, weights: Path | None) -> None:
    """Raises BadInput for an albumentations pipeline that cannot be built, where albumentations is installed."""
    if isinstance(params, Augment) and importlib.util.find_spec("albumentations"):
        Augmenter(params.pipeline, params.min_visibility)


def load(card: Card, params: File, weights: Path | None, site: Site) -> Transformer:
    """Nothing is read; raises BadInput for an albumentations pipeline that cannot be built."""
    if type(params) is not _BY_NAME.get(card.name):
        raise BadInput(f"there is no transformation {card.name!r} with {type(params).__name__} parameters")
    augment = Augmenter(params.pipeline, params.min_visibility) if isinstance(params, Augment) else None
    return Transformer(card.name, params, site.device, augment)


class Transformer:
    """One operation on one device."""

    def __init__(self, name: str, params: File, device: str, augment: Augmenter | None) -> None:
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
            return brightness.normalised(image, params), objects
        if isinstance(params, Resize):
            place, interpolation, grey = layouts.resized(image.shape[:2], params), params.interpolation, params.grey
        elif isinstance(params, Crop):
            place, interpolation, grey = layouts.cropped(image.shape[:2], params, seed), "auto", 0
        else:
            assert isinstance(params, Pad)
            place, interpolation, grey = layouts.padded(image.shape[:2], params), "auto", params.grey
        return place.picture(image, interpolation, grey), place.objects(objects, params.min_visibility)

    def _encoded(self, pixels: Image, objects: Objects, seed: int | None = None) -> Result:
        params = asdict(self._params)
        file = {name: params.pop(name) for name in ("format", "quality")}
        params.pop("seed", None)
        random = isinstance(self._params, Augment) or (isinstance(self._params, Crop) and self._params.at == "random")
        how = {"operation": self._name, "params": params, **({"seed": seed} if random else {})}
        return imagefiles.encode(pixels, file["format"], file["quality"], how, objects.told())


def _kernels(params: File) -> filters.Pairs:
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
    return int.from_bytes(digest[:8], "big") % SEEDS
