"""Finds the fastest way to run a model on this device that gives the results of fp32 torch, by measuring it.

Every runtime and precision that runs here is measured on the job's own pictures, from what is usually fastest on, for
as long as there is time; the fastest is then tried with other batches. A candidate is admitted only when its results
agree with those of fp32 torch: `agreement` of the result kind, averaged over the pictures.

A processor that others use too is half as fast one moment and twice the next. So there the fastest way so far is kept,
and each other one is measured by turns with it: only how they compare within those moments counts.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.choices import Choice
from jobs.spec import AUTO, JobSpec
from storage import results
from storage.errors import ImagemillError, ItemFailed, one_line
from workers import batches, devices, provenance, runtimes
from workers.batches import BatchSize
from workers.loaded import Loaded
from workers.models import Model, Prepared

log = logging.getLogger("imagemill.worker")

REFERENCE = ("torch", "fp32")
PICTURES = 24  # of the job, on which candidates are measured
AGREEMENT = 0.98  # mean over the pictures, from which a candidate is admitted
_UNSURE = 0.05  # confidence of a detector that is asked again, since it found nothing at the one that the job asks for
_SAMPLE = 8  # pictures that are timed together: of fewer, the luckiest would be luckier
_MEASURE_S = 0.7  # for each candidate at least, after its first batch
_REFERENCE_S = 2.5  # in which fp32 torch must have done the pictures; fewer are taken of a slow model
_FASTEST = 4  # times fp32 torch: what a way that was not measured yet may do
USUAL_BATCH = {"cpu": 8, "cuda": 32}  # pictures in one forward pass where nobody says and nothing is measured
OTHER_BATCHES = {"cpu": (4, 16), "cuda": (64, 128)}  # that the fastest way is tried with, too

# What is usually fastest first, so that little time goes a long way; what is not named comes last.
_ORDER = {
    "cpu": (("openvino", "bf16"), ("torch", "bf16"), ("onnx", "fp32"), ("openvino", "fp32")),
    "cuda": (("tensorrt", "fp16"), ("torch", "fp16"), ("torch", "bf16"), ("onnx", "fp16"), ("tensorrt", "fp32")),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One way to run a model, and how it did.

    Attributes:
        rate: items a second of `Model.infer`; 0 when it was not measured.
        agreement: of its results with those of fp32 torch, mean over the pictures, 0..1; None when they had nothing.
        refused: why it cannot be taken, "" when it can.
    """

    runtime: str
    precision: str
    batch: int
    rate: float = 0.0
    agreement: float | None = None
    refused: str = ""


Load = Callable[[JobSpec], Loaded]  # loads a model that the caller closes


def open_questions(spec: JobSpec) -> bool:
    """Whether the spec leaves anything to be chosen here."""
    return AUTO in (spec.runtime, spec.precision) or not spec.batch


def plain(spec: JobSpec, device: str) -> JobSpec:
    """The spec with what it leaves open filled in without measuring: torch, fp32, the usual batch."""
    runtime = spec.runtime
    if runtime == AUTO:
        able = [n for n in ("torch", *runtimes.names()) if spec.precision in (AUTO, *runtimes.precisions(n, device))]
        runtime = able[0]
    precision = spec.precision if spec.precision != AUTO else runtimes.usual_precision(runtime, device)
    batch = spec.batch or USUAL_BATCH[device]
    return dataclasses.replace(spec, runtime=runtime, precision=precision, batch=batch)


def reference(usual: JobSpec) -> JobSpec:
    """The spec run as what every way is held against."""
    return dataclasses.replace(usual, runtime=REFERENCE[0], precision=REFERENCE[1])


def chosen(spec: JobSpec, choice: Choice) -> JobSpec:
    """The spec run as it was chosen."""
    return dataclasses.replace(spec, runtime=choice.runtime, precision=choice.precision, batch=choice.batch)


def as_is(spec: JobSpec, why: str) -> Choice:
    """The choice of a spec that leaves nothing open."""
    return Choice(spec.runtime, spec.precision, spec.batch, why)


def about(spec: JobSpec, device: str) -> dict[str, Any]:
    """What a measurement depends on: model, parameters, what was asked for, device and versions."""
    model = {"weights": spec.weights_sha256, "family": spec.family, "kind": spec.kind, "params": dict(spec.params)}
    asked = {"runtime": spec.runtime, "precision": spec.precision, "batch": spec.batch}
    return {**model, **asked, "device": name_of(device), "versions": provenance.versions()}


def name_of(device: str) -> str:
    """A device's kind, for people and to tell kinds apart: a GPU's name, or the processor with its cores."""
    if device != "cpu":
        import torch

        return str(torch.cuda.get_device_name())
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores" if hasattr(os, "sched_getaffinity") else _processor()


def _processor() -> str:
    return devices.cpuinfo("model name") or platform.processor() or platform.machine()


def candidates(spec: JobSpec, device: str) -> list[tuple[str, str]]:
    """(runtime, precision) of every way that the spec allows and this machine has, what is usually fastest first.

    fp16 is left out on a CPU, which computes it by way of fp32, and so is bf16 on one that is known to do that too.
    """
    flags = devices.cpuinfo("flags") if device == "cpu" else ""
    slow = {"fp16"} | ({"bf16"} if flags and "bf16" not in flags else set()) if device == "cpu" else set()
    found = [
        (name, precision)
        for name in runtimes.names()
        if runtimes.get(name).installed()
        for precision in runtimes.precisions(name, device)
        if spec.runtime in (AUTO, name) and spec.precision in (AUTO, precision)
        if spec.precision != AUTO or precision not in slow
    ]
    order = {pair: place for place, pair in enumerate(_ORDER.get(device, ()))}
    return sorted(found, key=lambda pair: (order.get(pair, len(order)), pair))


@dataclass(frozen=True, slots=True)
class _Rival:
    """The fastest way so far, loaded."""

    measured: Measured
    model: Model


class Tuning:
    """One tuning of one model: `refer`, then `run`.

    Args:
        spec: with open questions.
        load: of a spec without any.
        tell: called after each candidate.
        budget_s: for both; what is begun within it is finished.
    """

    def __init__(
        self, spec: JobSpec, device: str, load: Load, tell: Callable[[Measured], None], budget_s: float
    ) -> None:
        self._spec, self._device, self._load, self._tell = spec, device, load, tell
        self._usual = plain(spec, device)
        self._budget_s, self._until = budget_s, 0.0
        self.found: list[Measured] = []
        self.seconds_each = 0.0  # of fp32 torch, for a picture
        self._pictures: list[Prepared] = []
        self._expected: list[Any] = []
        self._rival: _Rival | None = None  # on a CPU only: a GPU is ours alone, and its memory may not hold two

    def refer(self, reference: Model, prepared: Sequence[Prepared]) -> None:
        """Compute what candidates are held against, by fp32 torch; sets `seconds_each`.

        Args:
            prepared: pictures of the job.
        """
        self._until = time.monotonic() + self._budget_s
        pictures, size = _alike(prepared)[:PICTURES], BatchSize(self._usual.batch)
        if not pictures:
            return
        if len(pictures) == 1:
            pictures *= 2
        # The first call pays for more than itself, and the second may: a library is imported with the first picture of
        # many boxes. No picture is computed twice: what is made of it may be kept.
        once_s = min(self._refer(reference, one, size) for one in (pictures[:1], pictures[1:2]))
        self._pictures = pictures[: max(2, int(_REFERENCE_S / once_s))]
        rest, batch = self._pictures[2:], self._usual.batch
        parts = [rest[at : at + batch] for at in range(0, len(rest), batch)]
        self.seconds_each = min((self._refer(reference, part, size) for part in parts), default=once_s)

    def _refer(self, reference: Model, pictures: Sequence[Prepared], size: BatchSize) -> float:
        """Seconds that the reference took for each of a batch; its answers are kept."""
        started = time.perf_counter()
        self._expected += batches.infer(reference, pictures, size)
        return (time.perf_counter() - started) / len(pictures)

    def run(self) -> Choice | None:
        """Measure what there is time for; the fastest that is admitted, or None when none is."""
        try:
            self._ask_for_less()
            best = self._best()
        finally:
            self._keep(None)
        if best is None:
            return None
        times = best.rate * self.seconds_each
        return Choice(best.runtime, best.precision, best.batch, f"tuned: {times:.1f} times fp32 torch")

    def _ask_for_less(self) -> None:
        """Where the reference found nothing, hold candidates against what it finds with less confidence.

        Most pictures of wildlife or of traffic show nothing; with no evidence, only full precision would be left.
        """
        spec, kind = self._spec, results.get(self._spec.kind)
        if not (spec.params.get("conf") or 0.0) > _UNSURE or self._has_evidence(kind):
            return
        asked = dataclasses.replace(spec, params={**spec.params, "conf": _UNSURE})
        try:
            loaded = self._load(reference(plain(asked, self._device)))
        except ImagemillError as error:
            log.warning("tuning %s: it cannot be asked for less sure results: %s", spec.model, error)
            return
        try:
            expected = batches.infer(loaded.model, self._pictures, BatchSize(self._usual.batch))
        finally:
            loaded.model.close()
        self._spec, self._expected = asked, expected

    def _has_evidence(self, kind: Any) -> bool:
        least = self._spec.params.get("conf") or 0.0
        return any(_agreement(kind, one, one, least) is not None for one in self._expected)

    def _best(self) -> Measured | None:
        for runtime, precision in candidates(self._spec, self._device):
            if (runtime, precision) == REFERENCE:
                self._found(Measured(*REFERENCE, self._usual.batch, 1 / self.seconds_each, 1.0))
                continue
            self._try(Measured(runtime, precision, self._usual.batch))
        best = fastest(self.found)
        if best is not None and not self._spec.batch:
            for batch in OTHER_BATCHES[self._device]:
                self._try(Measured(best.runtime, best.precision, batch))
        return fastest(self.found)

    def _keep(self, rival: _Rival | None) -> None:
        """Have another way for the fastest so far, or none."""
        if self._rival is not None:
            self._rival.model.close()
        self._rival = rival

    def _try(self, candidate: Measured) -> None:
        start_s: float = getattr(runtimes.get(candidate.runtime), "START_S", 0.0)
        if time.monotonic() + start_s + self._least_s(candidate.batch) > self._until:
            measured = dataclasses.replace(candidate, refused="no time was left to measure it")
        else:
            measured = self._measured(candidate)
        self._found(measured)

    def _least_s(self, batch: int) -> float:
        """As fast as the fastest so far, and without what must be built, which nobody knows."""
        rate = max((one.rate for one in self.found), default=0.0) or _FASTEST / self.seconds_each
        return self._count(batch) / rate

    def _count(self, batch: int) -> int:
        """Pictures that are computed at least for a candidate: all, and two batches."""
        return max(len(self._pictures), 2 * batch)

    def _found(self, measured: Measured) -> None:
        log.info("tuning %s: %s", self._spec.model, shown(measured))
        self.found.append(measured)
        self._tell(measured)

    def _measured(self, candidate: Measured) -> Measured:
        spec = chosen(self._spec, Choice(candidate.runtime, candidate.precision, candidate.batch))
        try:
            loaded = self._load(spec)
        except ImagemillError as error:
            return dataclasses.replace(candidate, refused=one_line(str(error), 200))
        if loaded.runtime != candidate.runtime:
            loaded.model.close()
            return dataclasses.replace(candidate, refused=f"it runs in {loaded.runtime} instead")
        model = loaded.model
        try:
            measured = self._timed(candidate, model)
        except BaseException:
            model.close()
            raise
        before = [self._rival.measured] if self._rival else []
        if self._device == "cpu" and fastest([*before, measured]) is measured:
            self._keep(_Rival(measured, model))
        else:
            model.close()
        return measured

    def _timed(self, candidate: Measured, model: Model) -> Measured:
        """Run the pictures, and again until it was long enough; the first batch, which pays for more, is not timed."""
        size, batch, rival = BatchSize(candidate.batch), candidate.batch, self._rival
        if rival is not None and time.monotonic() + 2 * self._least_s(batch) > self._until:
            rival = None
        answers = batches.infer(model, self._part(0, batch), size)
        at, ours, theirs, took_s = batch, list[float](), list[float](), 0.0
        while at < self._count(batch) or took_s < _MEASURE_S:
            more, seconds = self._sample(model, at, size)
            ours.append(seconds / len(more))
            took_s += seconds
            if rival is not None:
                same, seconds = self._sample(rival.model, at, BatchSize(rival.measured.batch))
                theirs.append(seconds / len(same))
            answers += more
            at += len(more)
        rate = 1 / min(ours)  # what else goes on in the machine only ever adds
        if rival is not None:
            rate *= rival.measured.rate * min(theirs)  # as if its quietest moment had been as quiet as this one
        agreement, refused = self._judged(answers[: len(self._pictures)])
        if size.safe < batch:
            refused = f"a batch of {batch} does not fit into the device's memory"
        return dataclasses.replace(candidate, agreement=agreement, refused=refused, rate=0.0 if refused else rate)

    def _sample(self, model: Model, at: int, size: BatchSize) -> tuple[list[Any], float]:
        """(answers, seconds) of some batches."""
        answers: list[Any] = []
        started = time.perf_counter()
        for _ in range(max(1, _SAMPLE // size.asked)):
            answers += batches.infer(model, self._part(at + len(answers), size.asked), size)
        return answers, time.perf_counter() - started

    def _part(self, at: int, count: int) -> list[Prepared]:
        """So many of the pictures, from one on, and from the first again after the last."""
        return [self._pictures[(at + i) % len(self._pictures)] for i in range(count)]

    def _judged(self, answers: Sequence[Any]) -> tuple[float | None, str]:
        """(agreement, why it is refused or "")."""
        kind: Any = results.get(self._spec.kind)
        least = self._spec.params.get("conf") or 0.0
        found = [
            _agreement(kind, expected, answer, least) for expected, answer in zip(self._expected, answers, strict=True)
        ]
        judged = [value for value in found if value is not None]
        if not judged:
            # Nothing was found by either: as good as it gets in full precision, and no evidence for less of it.
            return None, ""
        mean = sum(judged) / len(judged)
        return mean, "" if mean >= AGREEMENT else f"its results agree with fp32 torch by {mean:.3f} only"


def _agreement(kind: Any, expected: Any, found: Any, least: float) -> float | None:
    failed = isinstance(expected, ItemFailed), isinstance(found, ItemFailed)
    if any(failed):
        return None if all(failed) else 0.0
    value: float | None = kind.agreement(expected, found, least)
    return value


def fastest(found: Sequence[Measured]) -> Measured | None:
    """The fastest way that may be taken. One of less than full precision needs results that speak for it."""
    taken = [one for one in found if not one.refused and (one.agreement is not None or one.precision == "fp32")]
    return max(taken, key=lambda one: one.rate, default=None)


def shown(measured: Measured) -> str:
    """One line for people."""
    what = f"{measured.runtime} {measured.precision}, batch {measured.batch}"
    if measured.refused:
        return f"{what}: refused, {measured.refused}"
    agreement = "nothing was found" if measured.agreement is None else f"agreement {measured.agreement:.3f}"
    return f"{what}: {measured.rate:.1f} items/s, {agreement}"


def tunable(kind: str) -> bool:
    """Whether results of a kind can be compared."""
    return hasattr(results.get(kind), "agreement")


def _alike(prepared: Sequence[Prepared]) -> list[Prepared]:
    """Those of the largest group, which can be one batch."""
    groups: dict[Any, list[Prepared]] = {}
    for one in prepared:
        groups.setdefault(one.group, []).append(one)
    return max(groups.values(), key=len, default=[])
