"""Runs batches on the device, one after the other or one ahead, and counts what the device and its thread did when.

Called from the device's thread only.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from workers import batches, faults
from workers.computing import Computing, Spell
from workers.inflight import InFlight, Staged, staged
from workers.inhand import Arrivals, Ready, Run
from workers.models import Prepared

log = logging.getLogger("imagemill.worker")


class Driver:
    """The device, as one ticket uses it.

    Args:
        ready: where batches came from; it is woken when an answer is there, and gets back the room that they took.
        wanted: those of a batch whose shard is still ours; it lets go of the others.
        deliver: takes items and an answer each.
    """

    def __init__(
        self,
        computing: Computing,
        ready: Arrivals,
        wanted: Callable[[list[Ready]], list[Ready]],
        deliver: Callable[[Sequence[Ready], Sequence[Any]], None],
    ) -> None:
        self._computing, self._ready = computing, ready
        self._wanted, self._deliver = wanted, deliver
        self._inflight = InFlight(computing, lambda: ready.put(None))
        self._free_since = time.perf_counter()  # when the device last had nothing to do
        self._begun = False  # whether a batch has been run
        self._spell: Spell | None = None  # of the last batch, if it was given ahead

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return len(self._inflight) == 0

    def run(self, batch: list[Ready]) -> None:
        """Have a batch computed: here and now, or given to a device that takes one more while it computes."""
        batch = self._wanted(batch)
        if not batch:
            return
        loaded = batch[0].run.loaded
        ahead = (self._computing.ahead or loaded.lanes) and len(batch) <= loaded.size.safe
        model = staged(loaded.model) if ahead else None
        if model is None or not self._give(model, batch):
            self._compute(batch)

    def collect(self) -> None:
        """Deliver what is answered."""
        while self._inflight.answered:
            self._collect()

    def collect_all(self) -> None:
        """Deliver everything under way, once it is answered."""
        while not self.idle:
            self._collect()

    def close(self) -> None:
        """Wait for what is under way; its answers are lost."""
        self._inflight.close()

    def _give(self, model: Staged, batch: list[Ready]) -> bool:
        """Start a batch; False when it has to be computed here and now, since the device does not take it."""
        while self._inflight.full:
            self._collect()
        try:
            self._inflight.give(model, batch, _prepared(batch))
        except Exception as error:  # noqa: BLE001 (it is raised again, and then becomes a row)
            _say(batch, error)
            self.collect_all()
            return False
        return True

    def _collect(self) -> None:
        """Wait for the first batch that the device was given, and deliver it."""
        given = self._inflight.take()
        faults.point("inferred")
        try:
            answers = given.answers.result()
        except Exception as error:  # noqa: BLE001 (as above)
            _say(given.items, error)
            self.collect_all()
            if batch := self._wanted(given.items):
                self._compute(batch)
            return
        idle_s = given.started - self._free_since if self._spell is None else given.spell.after(self._spell)
        self._count_idle(given.items[0].run, idle_s)
        _count_work(given.items, given.spell.seconds(self._spell), "answer", given.answer_s)
        self._free_since, self._spell = time.perf_counter(), given.spell
        given.items[0].run.loaded.size.fit.went_well(len(given.items))
        answer_of = {id(item): answer for item, answer in zip(given.items, answers, strict=True)}
        wanted = self._wanted(given.items)
        self._ready.give(wanted)
        self._deliver(wanted, [answer_of[id(item)] for item in wanted])

    def _compute(self, batch: list[Ready]) -> None:
        """Compute a batch here and now, and deliver it."""
        loaded = batch[0].run.loaded
        started = time.perf_counter()
        self._count_idle(batch[0].run, started - self._free_since)
        self._computing.take_s()  # what tuning or careful work has left there is not this batch's
        try:
            answers = batches.infer(loaded.model, _prepared(batch), loaded.size)
            faults.point("inferred")
        finally:
            self._ready.give(batch)
        self._free_since, self._spell = time.perf_counter(), None
        whole_s = self._free_since - started
        device_s = self._computing.take_s() or whole_s  # a model without networks of ours is all device
        _count_work(batch, device_s, "post", max(0.0, whole_s - device_s))
        self._deliver(batch, answers)

    def _count_idle(self, first: Run, seconds: float) -> None:
        first.spent("idle" if first.begun else "gap" if self._begun else "start", seconds)
        first.begun = self._begun = True


def _count_work(batch: Sequence[Ready], device_s: float, stage: str, seconds: float) -> None:
    for run, count in Counter(item.run for item in batch).items():
        run.spent("device", device_s * count / len(batch))
        run.spent(stage, seconds * count / len(batch))


def _say(batch: Sequence[Ready], error: Exception) -> None:
    log.warning(
        "a batch of %d failed and is tried again, now by itself: %s: %s", len(batch), type(error).__name__, error
    )


def _prepared(batch: Sequence[Ready]) -> list[Prepared]:
    return [item.answer for item in batch if isinstance(item.answer, Prepared)]
