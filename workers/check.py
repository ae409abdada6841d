"""Tries a model on this machine: resolves it, loads it, runs one picture, and says shapes and times."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import ItemFailed, Misconfigured
from storage.settings import Settings
from workers import models, runtimes, weights
from workers.models import Card, Item, Site

_SIZE = (480, 640)  # height, width of the picture


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What came of it; times in seconds.

    Attributes:
        first_s, again_s: one picture from pixels to result, and once more when everything is warm.
        result: field -> its shape and type, or its value where it is short.
    """

    name: str
    family: str
    kind: str
    device: str
    precision: str
    load_s: float
    first_s: float
    again_s: float
    result: dict[str, str]


def check(
    settings: Settings,
    name: str,
    kind: str,
    params: Mapping[str, Any],
    *,
    device: str = "cpu",
    precision: str = "fp32",
    on_download: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Report:
    """Load a model and run one picture.

    Raises:
        BadInput: no such model or parameter. Misconfigured: a library is missing, or the picture failed.
    """

    def fetch(card: Card) -> Path:
        report = lambda done, total: on_download(card.name, done, total)  # noqa: E731
        return weights.download(card.weights, settings.cache_folder, card.sha256, report)

    resolved = models.resolve(name, kind, params, fetch)
    card = resolved.card
    for library in models.missing(card.family):
        raise Misconfigured(models.lacking(card.family, library))
    sha256 = weights.sha256_of(resolved.weights_path) if resolved.weights_path else ""
    site = Site(device, lambda n: runtimes.get("torch").open(n, device, precision), precision, sha256)
    started = time.perf_counter()
    model = models.family(card.family).load(card, card.params(**resolved.params), resolved.weights_path, site)
    loaded = time.perf_counter()
    try:
        _once(model, card)
        first = time.perf_counter()
        result = _once(model, card)
        again = time.perf_counter()
    finally:
        model.close()
    shown = {field.name: _shown(getattr(result, field.name)) for field in dataclasses.fields(result)}
    load_s, first_s, again_s = (round(t, 4) for t in (loaded - started, first - loaded, again - first))
    return Report(card.name, card.family, card.kind, device, precision, load_s, first_s, again_s, shown)


def _once(model: Any, card: Card) -> Any:
    rng = np.random.default_rng(0)
    # Smooth, so that it is no mere noise to a network: a coarse pattern, enlarged.
    coarse = rng.integers(0, 256, (_SIZE[0] // 40, _SIZE[1] // 40, 3), dtype=np.uint8)
    picture = None if not card.needs_image else np.kron(coarse, np.ones((40, 40, 1), np.uint8))
    item = Item("check", data={"prompt": "a red circle on white"} if picture is None else {})
    try:
        (result,) = model.infer([model.prepare(picture, item)])
    except ItemFailed as error:
        result = error
    if isinstance(result, ItemFailed):
        raise Misconfigured(f"model {card.name!r} was loaded, but failed on a picture: {result.message}")
    return result


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{'x'.join(map(str, value.shape))} {value.dtype}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else text
