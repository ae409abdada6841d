"""Knows a pretended detector: no weights, no libraries, results that follow from the pixels; for tests and load."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage.errors import BadInput, ItemFailed
from storage.results.detections import Result
from workers.models import Card, Image, Item, Prepared, Site

REQUIRES = ()
LABELS = ("bird", "cat", "dog")


@dataclass(frozen=True, slots=True)
class Params:
    """How the pretended model behaves.

    Attributes:
        delay_ms: time each batch takes, in milliseconds.
        objects: boxes found in each picture.
        fail_every: pictures whose checksum is a multiple of this fail in `infer`; 0 for none.
        oom_above: larger batches raise MemoryError, as a device out of memory would; 0 for no limit.
    """

    delay_ms: float = 0.0
    objects: int = 2
    fail_every: int = 0
    oom_above: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.delay_ms, bool) or not isinstance(self.delay_ms, int | float) or not self.delay_ms >= 0:
            raise ValueError(f"delay_ms must be a number of 0 or more, but got {self.delay_ms!r}")
        for name in ("objects", "fail_every", "oom_above"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number of 0 or more, but got {value!r}")


CARDS: tuple[Card, ...] = (
    Card(name="stub", family="stub", kind="detections", params=Params, memory_gb=0.0, licence="AGPL-3.0-or-later"),
)


def claims(path: Path) -> bool:
    """Never: there are no weights."""
    return False


def describe(path: Path | None = None) -> tuple[str, ...]:
    """The labels, whatever the file."""
    return LABELS


def check_labels(params: Params, labels: Sequence[str]) -> None:
    """Nothing names a label."""


def load(card: Card, params: Params, weights: Path | None, site: Site | None) -> Stub:
    """Nothing is read; `weights` and `site` are not used."""
    if not isinstance(params, Params):
        raise BadInput(f"model {card.name!r} takes stub parameters, but got {type(params).__name__}")
    return Stub(params)


def expected(image: Image, params: Params | None = None) -> Result:
    """What the stub finds in a picture: a pure function of its size and pixels."""
    return _found(_checksum(image), image.shape[0], image.shape[1], (params or Params()).objects)


def fails(image: Image, params: Params) -> bool:
    """Whether the stub fails on this picture."""
    return bool(params.fail_every) and _checksum(image) % params.fail_every == 0


class Stub:
    """The pretended model."""

    def __init__(self, params: Params) -> None:
        self._params = params

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """Keeps the checksum; wide and tall pictures make two groups, as a detector's padded shapes would."""
        if image is None:
            raise ItemFailed("prepare", "no-image", "the stub looks at pictures, and this item has none")
        height, width = image.shape[:2]
        group = "wide" if width >= height else "tall"
        return Prepared(group, _checksum(image), image.nbytes, (height, width))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """Waits, then finds what `expected` says."""
        if self._params.oom_above and len(batch) > self._params.oom_above:
            raise MemoryError(f"pretended: a batch of {len(batch)} is over {self._params.oom_above}")
        if batch and self._params.delay_ms:
            time.sleep(self._params.delay_ms / 1000)
        return [self._one(item) for item in batch]

    def close(self) -> None:
        """Nothing is held."""

    def _one(self, item: Prepared) -> Result | ItemFailed:
        if self._params.fail_every and item.data % self._params.fail_every == 0:
            return ItemFailed("infer", "pretended", f"checksum {item.data} is a multiple of {self._params.fail_every}")
        height, width = item.meta
        return _found(item.data, height, width, self._params.objects)


def _checksum(image: Image) -> int:
    """CRC-32 of the size and the pixels."""
    size = f"{image.shape[0]}x{image.shape[1]}:".encode()
    return zlib.crc32(np.ascontiguousarray(image).data, zlib.crc32(size))


def _found(checksum: int, height: int, width: int, objects: int) -> Result:
    """Boxes, scores in 0.3..1 and labels drawn from the checksum, best first."""
    # PCG64 seeded by one integer: numpy promises the stream of a bit generator.
    draws = np.random.Generator(np.random.PCG64(checksum)).random((objects, 6))
    draws = draws[np.argsort(-draws[:, 4], kind="stable")]
    corners = np.sort(draws[:, :4].reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    boxes = (corners * [width, height, width, height]).astype(np.float32)
    ids = (draws[:, 5] * len(LABELS)).astype(np.int32)
    return Result(boxes, (0.3 + 0.7 * draws[:, 4]).astype(np.float32), ids, tuple(LABELS[i] for i in ids.tolist()))
