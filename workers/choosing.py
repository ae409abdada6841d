"""Settles, for each job on this worker's device, in which runtime, precision and batch its model is run.

What the user gave is kept. The rest is what was settled for this job before, else what was measured for this model
before, else measured now when the job is long enough to be worth it, else fp32 torch.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

from jobs import choices
from jobs.choices import Choice
from jobs.leases import Claim
from jobs.spec import JobSpec
from storage.database import Database
from storage.errors import ImagemillError
from workers import tuning
from workers.loaded import Loaded, Models
from workers.models import Prepared
from workers.tuning import Measured, Tuning

log = logging.getLogger("imagemill.worker")

LEAST_ITEMS = 200  # of a job that is worth a look
WORTH = 8  # times as long as tuning may take must be what is left of a job, to be worth it
LISTING_S = 3.0  # for a listing to show that a job is long; a bucket tells about ten thousand keys a second

Sample = Callable[[Claim, Loaded, int], Sequence[Prepared]]  # (claim, model, how many) -> pictures of its shard


class Choosing:
    """The choices of one worker process.

    Args:
        budget_s: for measuring a model; 0 measures none.
        moved: called after each candidate, to show that the process lives.
    """

    def __init__(self, db: Database, models: Models, device: str, budget_s: float, moved: Callable[[], None]) -> None:
        self._db, self._models, self._device = db, models, device
        self._budget_s, self._moved = budget_s, moved
        self._settled: dict[int, Choice] = {}
        self._seconds_each: dict[str, float] = {}  # of fp32 torch for a picture, by model key
        self._name = ""

    def settled(self, claim: Claim, in_use: Callable[[], set[str]]) -> JobSpec | None:
        """The claim's spec as it is run here, or None when it must be measured first.

        Args:
            in_use: keys of models that batches still wait for.
        """
        spec = claim.spec
        if not tuning.open_questions(spec):
            return spec
        choice = self._settled.get(claim.job_id) or self._found(claim, in_use)
        return tuning.chosen(spec, choice) if choice else None

    def measure(self, claim: Claim, sample: Sample) -> JobSpec:
        """Settle a job's choice by measuring. The device must have nothing else to do."""
        usual = tuning.plain(claim.spec, self._device)
        try:
            choice = self._measured(claim, usual, sample)
        except ImagemillError:
            raise
        except Exception:  # a job that could run as usual must not wait for this
            log.exception("tuning %s broke off", claim.spec.model)
            choice = tuning.as_is(usual, "tuning broke off; see the worker's log")
        return tuning.chosen(claim.spec, self._settle_choice(claim, choice))

    def _measured(self, claim: Claim, usual: JobSpec, sample: Sample) -> Choice:
        spec = claim.spec
        work = Tuning(spec, self._device, self._models.apart, self._tell, self._budget_s)
        reference = self._models.apart(tuning.reference(usual), keeping=True)
        try:
            work.refer(reference.model, sample(claim, reference, tuning.PICTURES))
        finally:
            reference.model.close()
        if not work.seconds_each:
            return tuning.as_is(usual, "no picture to measure on")
        self._seconds_each[usual.model_key] = work.seconds_each
        why_not = self._too_little(claim, work.seconds_each)
        if why_not:
            return tuning.as_is(usual, why_not)
        log.info("tuning %s for job %d", spec.model, claim.job_id)
        best = work.run()
        if best is None:
            return tuning.as_is(usual, "tuned: no other way agrees with fp32 torch")
        found = [dataclasses.asdict(one) for one in work.found]
        choices.keep(self._db, tuning.about(spec, self._device), best, found)
        return best

    def _found(self, claim: Claim, in_use: Callable[[], set[str]]) -> Choice | None:
        """What is known without measuring."""
        spec = claim.spec
        here = choices.of_job(self._db, claim.job_id).get(self._device_name())
        if here is not None:
            self._settled[claim.job_id] = here
            return here
        usual = tuning.plain(spec, self._device)
        if not tuning.tunable(spec.kind):
            return self._settle_choice(claim, tuning.as_is(usual, "nothing to tune"))
        known = choices.measured(self._db, tuning.about(spec, self._device))
        if known is not None:
            return self._settle_choice(claim, known)
        if not self._budget_s:
            return self._settle_choice(claim, tuning.as_is(usual, "tuning is switched off"))
        if not self._models.get(usual, in_use).networks:
            return self._settle_choice(claim, tuning.as_is(usual, "nothing to tune"))
        if claim.careful or self._left(claim, LEAST_ITEMS) < LEAST_ITEMS:
            return self._settle_choice(claim, tuning.as_is(usual, "too few items to tune for"))
        each = self._seconds_each.get(usual.model_key)
        why_not = self._too_little(claim, each) if each else ""
        return self._settle_choice(claim, tuning.as_is(usual, why_not)) if why_not else None

    def _too_little(self, claim: Claim, seconds_each: float) -> str:
        """Why what is left of a job is not worth tuning for, "" when it is."""
        worth_s = WORTH * self._budget_s
        left_s = self._left(claim, worth_s / seconds_each) * seconds_each
        return f"about {left_s:.0f} s of work is too little to tune for" if left_s < worth_s else ""

    def _left(self, claim: Claim, enough: float) -> int:
        """Items left of a job. While it is still being listed, a little is waited for as many as would be enough.

        The first shard is claimed moments after the listing begins, and what is settled then holds to the job's end.
        """
        until = time.monotonic() + LISTING_S
        while True:
            left, more = choices.items_left(self._db, claim.job_id)
            if left >= enough or not more or time.monotonic() > until:
                return left
            self._moved()
            time.sleep(0.1)

    def _settle_choice(self, claim: Claim, wanted: Choice) -> Choice:
        choice = choices.settle(self._db, claim.job_id, self._device_name(), wanted)
        self._settled[claim.job_id] = choice
        return choice

    def _device_name(self) -> str:
        self._name = self._name or tuning.name_of(self._device)
        return self._name

    def _tell(self, measured: Measured) -> None:
        self._moved()
