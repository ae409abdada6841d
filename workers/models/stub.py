"""Knows a pretended detector: no weights, no libraries, results that follow from the pixels; for tests and load."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import BadInput, ItemFailed
from storage.results.detections import Result
from workers.models import Card, Image, Item, Prepared, Site

REQUIRES = ()
LABELS = ("bird", "cat", "dog")
_ROW_WORDS = 512  # of the checksum


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
    Card(
        name="stub",
        family="stub",
        kind="detections",
        params=Params,
        memory_gb=0.0,
        licence="AGPL-3.0-or-later",
        needs_image=False,
    ),
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
    return _found([_checksum(image)], [image.shape[:2]], (params or Params()).objects)[0]


def fails(image: Image, params: Params) -> bool:
    """Whether the stub fails on this picture."""
    return bool(params.fail_every) and _checksum(image) % params.fail_every == 0


class Stub:
    """The pretended model."""

    def __init__(self, params: Params) -> None:
        self._params = params

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """Keeps the checksum; wide and tall pictures make two groups, as a detector's padded shapes would.

        An item without a picture has the checksum of its key: so that what lies around a model can be loaded alone.
        """
        if image is None:
            return Prepared("none", zlib.crc32(item.key.encode()), 0, (1, 1))
        height, width = image.shape[:2]
        group = "wide" if width >= height else "tall"
        return Prepared(group, _checksum(image), image.nbytes, (height, width))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """Waits, then finds what `expected` says."""
        if self._params.oom_above and len(batch) > self._params.oom_above:
            raise MemoryError(f"pretended: a batch of {len(batch)} is over {self._params.oom_above}")
        if batch and self._params.delay_ms:
            time.sleep(self._params.delay_ms / 1000)
        found = _found([item.data for item in batch], [item.meta for item in batch], self._params.objects)
        return [self._failure(item.data) or result for item, result in zip(batch, found, strict=True)]

    def close(self) -> None:
        """Nothing is held."""

    def _failure(self, checksum: int) -> ItemFailed | None:
        if self._params.fail_every and checksum % self._params.fail_every == 0:
            return ItemFailed("infer", "pretended", f"checksum {checksum} is a multiple of {self._params.fail_every}")
        return None


def _checksum(image: Image) -> int:
    """CRC-32 of the size, and of sums over the pixels: every pixel counts, and where it stands.

    The pixels' bytes are taken as rows of 8-byte words; the sums of each row and of each column stand for them all, in
    a fifth of the time of a CRC of the pixels, which would be most of what the stub's workers do beside decoding.
    """
    pixels = np.ascontiguousarray(image).reshape(-1)
    whole = pixels.size - pixels.size % (8 * _ROW_WORDS)
    words = pixels[:whole].view("<u8").reshape(-1, _ROW_WORDS)
    checksum = zlib.crc32(f"{image.shape[0]}x{image.shape[1]}:".encode())
    for part in (pixels[whole:], words.sum(axis=0), words.sum(axis=1)):
        checksum = zlib.crc32(part.data, checksum)
    return checksum


def _found(checksums: Sequence[int], sizes: Sequence[tuple[int, ...]], objects: int) -> list[Result]:
    """For each picture boxes, scores in 0.3..1 and labels drawn from its checksum, best first.

    Args:
        sizes: (height, width) of each.
    """
    draws = _draws(np.array(checksums, np.uint64), objects)
    order = np.argsort(-draws[:, :, 4], axis=1, kind="stable")
    draws = np.take_along_axis(draws, order[:, :, None], axis=1)
    corners = np.sort(draws[:, :, :4].reshape(len(checksums), objects, 2, 2), axis=2)
    extent = np.array([(width, height) for height, width in sizes], np.float64).reshape(-1, 1, 1, 2)
    boxes = (corners * extent).astype(np.float32).reshape(len(checksums), objects, 4)
    scores = (0.3 + 0.7 * draws[:, :, 4]).astype(np.float32)
    ids = (draws[:, :, 5] * len(LABELS)).astype(np.int32)
    labels = [tuple([LABELS[i] for i in row]) for row in ids.tolist()]
    return [Result(*one) for one in zip(boxes, scores, ids, labels, strict=True)]


def _draws(seeds: npt.NDArray[np.uint64], objects: int) -> npt.NDArray[np.float64]:
    """(n, objects, 6) numbers in 0..1, a pure function of each seed: SplitMix64 (Steele and others, OOPSLA 2014)."""
    state: Any = (seeds[:, None] << np.uint64(16)) + np.arange(1, 6 * objects + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = state * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    unit: npt.NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) / 2.0**53
    return unit.reshape(len(seeds), objects, 6)
