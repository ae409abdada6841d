"""Batches that a device was given and that are not answered yet, so that it has its next one when it is done with one.

Two steps of a model make that possible: `compute` starts its networks in the device's thread and returns before a GPU
is done; `answer` waits for them and makes results, in a thread beside it. On a CPU whose cores compute pictures of
their own (workers/lanes.py), both steps are done beside the device's thread, for two batches at once: the cores that
are done with the one begin with the other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from workers.batches import Answer
from workers.computing import Computing, Spell
from workers.inhand import Ready
from workers.models import Model, Prepared

_MOST = 2  # batches that a device has at once


class Staged(Model, Protocol):
    """A model whose `infer(batch)` is `answer(compute(batch), batch)`."""

    def compute(self, batch: Sequence[Prepared]) -> Any:
        """Start the networks for a batch that is not empty. On a CPU, two threads may call it at once."""
        ...

    def answer(self, raw: Any, batch: Sequence[Prepared]) -> list[Answer]:
        """What `compute` gave for a batch -> a result each. Called from another thread, while the next computes."""
        ...


def staged(model: Model) -> Staged | None:
    """The model if it works in two steps."""
    return cast(Staged, model) if hasattr(model, "compute") else None


@dataclass(eq=False)
class Given:
    """A batch that the device was given."""

    items: list[Ready]
    prepared: list[Prepared]
    started: float  # time.perf_counter
    spell: Spell = field(default_factory=lambda: Spell(()))  # whole once it is answered
    answers: Future[list[Answer]] = field(default_factory=Future)
    answer_s: float = 0.0


class InFlight:
    """The batches under way, first given first. Used by the device's thread.

    Args:
        wake: called from another thread when a batch has been answered.
    """

    def __init__(self, computing: Computing, wake: Callable[[], None]) -> None:
        self._computing, self._wake = computing, wake
        self._given: deque[Given] = deque()
        self._answerer = ThreadPoolExecutor(1, thread_name_prefix="answer")
        self._workers = ThreadPoolExecutor(_MOST, thread_name_prefix="compute")

    def __len__(self) -> int:
        return len(self._given)

    @property
    def full(self) -> bool:
        """Whether the device has as many batches as it may have."""
        return len(self._given) >= _MOST

    @property
    def answered(self) -> bool:
        """Whether the first batch can be taken without waiting."""
        return bool(self._given) and self._given[0].answers.done()

    def give(self, model: Staged, items: list[Ready], prepared: list[Prepared]) -> None:
        """Start a batch. Raises what `compute` raises in the device's thread, and then has not started it."""
        given = Given(items, prepared, time.perf_counter())
        if items[0].run.loaded.lanes:
            given.answers = self._workers.submit(self._whole, given, model)
        else:
            raw = self._compute(given, model)
            given.answers = self._answerer.submit(self._answer, given, model, raw)
        given.answers.add_done_callback(lambda future: self._wake())
        self._given.append(given)

    def take(self) -> Given:
        """The first batch, once it is answered."""
        given = self._given.popleft()
        given.answers.exception()  # waits; whoever reads the answers gets it
        return given

    def close(self) -> None:
        """Wait for what is under way; its answers are lost."""
        self._workers.shutdown()
        self._answerer.shutdown()
        self._given.clear()

    def _whole(self, given: Given, model: Staged) -> list[Answer]:
        """Both steps, in this thread."""
        return self._answer(given, model, self._compute(given, model))

    def _compute(self, given: Given, model: Staged) -> Any:
        self._computing.take()  # what others have left there is not this batch's
        raw = model.compute(given.prepared)
        given.spell = self._computing.take()
        return raw

    def _answer(self, given: Given, model: Staged, raw: Any) -> list[Answer]:
        with self._computing.answering(given.spell):
            started = time.perf_counter()
            answers = model.answer(raw, given.prepared)
            given.answer_s = max(0.0, time.perf_counter() - started)
        if len(answers) != len(given.items):
            raise RuntimeError(f"the model returned {len(answers)} results for {len(given.items)} images")
        return answers
