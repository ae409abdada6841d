"""Runs a chain of jobs from one YAML file: each step works on what an earlier one found, while that one still runs.

    steps:
      - name: boxes
        do: annotate
        source: /photos
        model: yolov8n
        params: {conf: 0.4}
      - name: masks
        do: mask
        from: boxes
        as: boxes
        label: dog
        model: sam_vit_b

Everything is checked before anything is submitted. The same file again continues, or finds everything fresh.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from jobs import plan, progress
from jobs.lifecycle import Job
from jobs.progress import Status
from jobs.sources import results
from jobs.spec import AUTO, JobSpec
from storage.database import Database
from storage.errors import BadInput, ImagemillError, Misconfigured
from storage.objects import Store
from storage.settings import Settings
from workers import models, runjob, submit
from workers.runjob import How, Watcher

_KINDS = {
    "annotate": "detections",
    "mask": "masks",
    "embed": "embedding",
    "classify": "labels",
    "generate": "image",
    "transform": "image",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step as the file says it; `from` and `as` are called after and shown here.

    Attributes:
        do: a command, such as "mask".
        source: a dataset, or "" for a step that works on what the step `after` found.
        shown: how its results are taken: images, photos, boxes or crops (jobs/sources/results.py).
        variants: copies of each item; for a file of prompts the images for each prompt.
    """

    name: str
    do: str
    model: str
    source: str = ""
    after: str = ""
    shown: str = ""
    label: str = ""
    min_score: float = 0.0
    variants: int = 1
    params: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    runtime: str = AUTO
    precision: str = AUTO
    batch: int | None = None
    shard_size: int | None = None


_SPELLED = {"after": "from", "shown": "as"}
_TYPES: dict[str, tuple[type, ...]] = {
    "params": (dict,),
    "min_score": (int, float),
    "batch": (int,),
    "variants": (int,),
}


def read(path: Path) -> list[Step]:
    """The steps of a file, each after the one it depends on. Raises BadInput for whatever is wrong with it."""
    import yaml

    try:
        top = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BadInput(f"cannot read the pipeline {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{str(path)!r} is no YAML: {' '.join(str(error).split())}") from None
    steps = top.get("steps") if isinstance(top, dict) else None
    if not isinstance(steps, list) or not steps or set(top) != {"steps"}:
        raise BadInput(f"{str(path)!r} is no pipeline: expected one key, steps, with a list of steps")
    return _ordered([_step(number, value) for number, value in enumerate(steps, 1)])


def _step(number: int, value: Any) -> Step:
    known = {_SPELLED.get(f.name, f.name): f for f in dataclasses.fields(Step)}
    if not isinstance(value, dict):
        raise BadInput(f"step {number}: expected keys such as name, do and model, but got {value!r}")
    for name, given in value.items():
        if name not in known:
            raise BadInput(f"step {number} has an unknown key {name!r}{models.nearest(str(name), list(known))}")
        types = _TYPES.get(name, (int,) if name == "shard_size" else (str,))
        if not isinstance(given, types) or isinstance(given, bool):
            raise BadInput(f"step {number}: {name} must be a {types[0].__name__}, but got {given!r}")
    for name in ("name", "do", "model"):
        if not value.get(name):
            raise BadInput(f"step {number} lacks {name!r}")
    step = Step(**{known[name].name: given for name, given in value.items()})
    if step.do not in _KINDS:
        raise BadInput(f"step {step.name!r}: unknown command {step.do!r}; expected one of {', '.join(_KINDS)}")
    if bool(step.source) == bool(step.after):
        raise BadInput(f"step {step.name!r}: expected either a source or a from, exactly one of them")
    if not step.after and (step.shown or step.label or step.min_score):
        raise BadInput(f"step {step.name!r}: as, label and min_score choose among the results of a from")
    return step


def _ordered(steps: Sequence[Step]) -> list[Step]:
    by_name = {step.name: step for step in steps}
    if len(by_name) < len(steps):
        raise BadInput("two steps have the same name; give each its own")
    for step in steps:
        if step.after and step.after not in by_name:
            hint = models.nearest(step.after, list(by_name))
            raise BadInput(f"step {step.name!r} works on {step.after!r}, but there is no such step{hint}")
    graph = TopologicalSorter({step.name: {step.after} - {""} for step in steps})
    try:
        return [by_name[name] for name in graph.static_order()]
    except CycleError as error:
        raise BadInput(f"the steps wait for each other in a circle: {' -> '.join(error.args[1])}") from None


def resolve(
    db: Database, store: Store, settings: Settings, steps: Sequence[Step], on_download: Callable[[str, int, int], None]
) -> list[JobSpec]:
    """The specs of ordered steps. Raises BadInput, naming the step, before anything is submitted."""
    specs: dict[str, JobSpec] = {}
    for step in steps:
        try:
            specs[step.name] = submit.resolve(
                db,
                store,
                settings,
                dataset=_dataset(step, specs),
                kind=_KINDS[step.do],
                model=step.model,
                params=step.params,
                on_download=on_download,
                device=step.device,
                runtime=step.runtime,
                precision=step.precision,
                batch=step.batch,
                shard_size=step.shard_size,
            )
        except BadInput as error:
            raise BadInput(f"step {step.name!r}: {error}") from error
    return list(specs.values())


def _dataset(step: Step, specs: Mapping[str, JobSpec]) -> str:
    if not step.after:
        prompts = step.do == "generate" and "prompt" not in step.params
        return submit.prompts(step.source, step.variants) if prompts else submit.variants(step.source, step.variants)
    before = specs[step.after]
    dataset = results.of_recipe(before.digest, before.kind, step.shown, step.label, step.min_score)
    return submit.variants(dataset, step.variants)


def run(
    db: Database, store: Store, settings: Settings, steps: Sequence[Step], specs: Sequence[JobSpec], watcher: Watcher
) -> list[Status]:
    """Submit every step and see all of them to their end; the statuses are in the order of the steps.

    Raises:
        BadInput: a dataset is empty or cannot be listed. Misconfigured: a job was paused, with the reason.
    """
    if not settings.embedded:
        from jobs import queue

        queue.check(settings)
    for step, spec in zip(steps, specs, strict=True):
        if step.source:
            runjob.check_not_empty(db, settings, spec)
    with runjob.own_workers(settings, How(), watcher) as tend:

        def see_out(other: Job) -> None:
            _plan(db, store, settings, other, tend, errors)
            _wait(db, [other.id], watcher, tend, errors)

        errors: list[ImagemillError] = []
        jobs = [
            runjob.submit(db, spec, How(name=step.name), watcher, see_out)[0]
            for step, spec in zip(steps, specs, strict=True)
        ]
        lock = threading.Lock()

        def tend_alone() -> None:
            with lock:
                tend()

        threads = [threading.Thread(target=_plan, args=(db, store, settings, job, tend_alone, errors)) for job in jobs]
        for thread in threads:
            thread.daemon = True
            thread.start()
        return _wait(db, [job.id for job in jobs], watcher, tend_alone, errors)


def _plan(
    db: Database, store: Store, settings: Settings, job: Any, tend: Callable[[], None], errors: list[ImagemillError]
) -> None:
    try:
        plan.plan(db, store, settings, job, on_shards=lambda: runjob.ring(db, settings, tend), on_wait=tend)
    except ImagemillError as error:
        errors.append(error)


def _wait(
    db: Database, ids: Sequence[int], watcher: Watcher, tend: Callable[[], None], errors: Sequence[ImagemillError]
) -> list[Status]:
    while True:
        statuses = [progress.status(db, job_id) for job_id in ids]
        open_jobs = [status for status in statuses if not status.ended]
        if errors:
            raise errors[0]
        if not open_jobs:
            return statuses
        watcher.status(open_jobs[0])
        for status in open_jobs:
            if status.state == "paused":
                raise Misconfigured(f"job {status.id} is paused: {status.reason or 'go on with: imagemill resume'}")
        tend()
        time.sleep(runjob.POLL_S)
