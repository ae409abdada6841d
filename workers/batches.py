"""Forms batches of like images, and runs one through a model so that a bad image costs only itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from storage.errors import ImagemillError, ItemFailed
from workers.models import Model, Prepared

log = logging.getLogger("imagemill.worker")

T = TypeVar("T")

_GROW_AFTER = 64  # full batches without trouble before a size that did not fit is tried again


class Buckets(Generic[T]):
    """Prepared images waiting for enough of their group to fill a batch."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, list[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, group: Hashable, items: Sequence[T], size: int) -> list[list[T]]:
        """Put some of a group in, in their order; returns the group's batches that have become full."""
        bucket = [*self._waiting.pop(group, ()), *items]
        full = [bucket[start : start + size] for start in range(0, len(bucket) - size + 1, size)]
        rest = bucket[len(full) * size :]
        if rest:
            self._waiting[group] = rest
        return full

    def flush(self) -> list[T] | None:
        """The fullest unfilled batch, or None when nothing waits."""
        if not self._waiting:
            return None
        return self._waiting.pop(max(self._waiting, key=lambda group: len(self._waiting[group])))


@dataclass
class Fit:
    """How many images of a model fit on this device at once, as far as it is known: whatever job asks."""

    most: float = math.inf
    _fine: int = field(default=0, repr=False)

    def failed(self, size: int) -> None:
        """A batch of so many did not fit: no more than half of it are tried."""
        self.most, self._fine = max(1, min(self.most, size) // 2), 0

    def went_well(self, size: int) -> None:
        """A batch of so many fitted; after many of the largest, twice as many are tried."""
        if size < self.most:
            return
        self._fine += 1
        if self._fine >= _GROW_AFTER:
            self.most, self._fine = self.most * 2, 0


@dataclass
class BatchSize:
    """How many images a job has computed at once: as many as it asks for, or as fit.

    Attributes:
        fit: shared by all jobs of the model.
    """

    asked: int
    fit: Fit = field(default_factory=Fit)

    @property
    def safe(self) -> int:
        return int(min(self.asked, self.fit.most))


Answer = Any  # a result of the model's kind, or ItemFailed


def infer(model: Model, batch: Sequence[Prepared], size: BatchSize) -> list[Answer]:
    """One answer for each image: its result, or the failure that is its own fault.

    Out of memory halves the batch and keeps the images; any other exception splits it until the guilty one is alone.
    """
    answers: list[Answer] = []
    start = 0
    while start < len(batch):
        part = batch[start : start + size.safe]
        try:
            done = _checked(model.infer(part), len(part))
        except Exception as error:  # noqa: BLE001 (a model may raise anything; it becomes a row)
            if _is_out_of_memory(error) and len(part) > 1:
                size.fit.failed(len(part))
                log.warning("out of memory with a batch of %d, going on with %d", len(part), size.safe)
                _empty_cache()
                continue
            done = _apart(model, part, error, size)
        else:
            size.fit.went_well(len(part))
        answers += done
        start += len(part)
    return answers


def _apart(model: Model, part: Sequence[Prepared], error: Exception, size: BatchSize) -> list[Answer]:
    if len(part) == 1:
        return [_failure(error)]
    middle = len(part) // 2
    return infer(model, part[:middle], size) + infer(model, part[middle:], size)


def _checked(done: list[Answer], expected: int) -> list[Answer]:
    if len(done) != expected:
        raise RuntimeError(f"the model returned {len(done)} results for {expected} images")
    return done


def _failure(error: Exception) -> ItemFailed:
    if isinstance(error, ItemFailed):
        return error
    if _is_out_of_memory(error):
        return ItemFailed("infer", "out-of-memory", "the image does not fit into the device's memory even alone")
    text = str(error) if isinstance(error, ImagemillError) else f"{type(error).__name__}: {error}"
    return ItemFailed("infer", "model-error", " ".join(text.split())[:500])


def _is_out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError by its name, since this file works for models without torch too.
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ in ("OutOfMemoryError", "CUDAOutOfMemoryError")
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def _empty_cache() -> None:
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
