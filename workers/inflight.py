"""Batches that a device was given and that are not answered yet, so that it has its next one when it is done with one.

Two steps of a model make that possible: `compute` starts its networks in the device's thread and returns before a GPU
is done; `answer` waits for them and makes results, in a thread beside it.
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


class Staged(Model, Protocol):
    """A model whose `infer(batch)` is `answer(compute(batch), batch)`."""

    def compute(self, batch: Sequence[Prepared]) -> Any:
        """Start the networks for a batch that is not empty. Called from the device's thread."""
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
    spell: Spell
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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="answer")

    def __len__(self) -> int:
        return len(self._given)

    @property
    def full(self) -> bool:
        """Whether the device has as many batches as it may have."""
        return len(self._given) >= self._computing.depth

    @property
    def answered(self) -> bool:
        """Whether the first batch can be taken without waiting."""
        return bool(self._given) and self._given[0].answers.done()

    def give(self, model: Staged, items: list[Ready], prepared: list[Prepared]) -> None:
        """Start a batch. Raises what `compute` raises, and then has not started it."""
        started = time.perf_counter()
        self._computing.take()  # what others have left there is not this batch's
        raw = model.compute(prepared)
        given = Given(items, prepared, started, self._computing.take())
        given.answers = self._pool.submit(self._answer, given, model, raw)
        given.answers.add_done_callback(lambda future: self._wake())
        self._given.append(given)

    def take(self) -> Given:
        """The first batch, once it is answered."""
        given = self._given.popleft()
        given.answers.exception()  # waits; whoever reads the answers gets it
        return given

    def close(self) -> None:
        """Wait for what is under way; its answers are lost."""
        self._pool.shutdown()
        self._given.clear()

    def _answer(self, given: Given, model: Staged, raw: Any) -> list[Answer]:
        with self._computing.answering(given.spell):
            started = time.perf_counter()
            answers = model.answer(raw, given.prepared)
            given.answer_s = max(0.0, time.perf_counter() - started)
        if len(answers) != len(given.items):
            raise RuntimeError(f"the model returned {len(answers)} results for {len(given.items)} images")
        return answers
