"""Measures a model on this machine at once, for a user who asks, and keeps what it finds for the fleet's next jobs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable

from jobs import choices, progress, sources
from jobs.choices import Choice
from jobs.spec import JobSpec
from storage import objects
from storage.database import Database
from storage.errors import BadInput, ItemFailed
from storage.objects import Store
from storage.settings import Settings
from workers import images, tuning, videos
from workers.loaded import Models
from workers.models import Item, Model, Prepared
from workers.tuning import Measured, Tuning


def dataset_of(db: Database, model: str) -> str:
    """The dataset of the newest job of a model. Raises BadInput when there is none."""
    for job in progress.jobs(db, limit=1000):
        if job.model == model:
            return job.dataset
    raise BadInput(f"no job has run {model!r} yet, so there are no pictures to measure it on; name a dataset: SOURCE")


def tune(
    db: Database,
    store: Store,
    settings: Settings,
    spec: JobSpec,
    tell: Callable[[Measured], None],
    building: Callable[[], None],
) -> tuple[Choice, list[Measured]]:
    """Measure every way the spec leaves open, and keep the fastest that is admitted.

    Args:
        tell: called with each way as it has been measured.
        building: called every few seconds while a runtime builds what it needs.

    Raises:
        BadInput: results of this kind cannot be compared, the model has no networks, or no picture can be read.
    """
    device = "cpu" if spec.queue == "cpu" else "cuda"
    if not tuning.tunable(spec.kind):
        raise BadInput(f"results of the kind {spec.kind} cannot be compared, so {spec.model!r} runs as it is asked to")
    models = Models(store, settings, device, building)
    reference = models.apart(tuning.reference(tuning.plain(spec, device)))
    try:
        if not reference.networks:
            raise BadInput(f"model {spec.model!r} has no network that a runtime could run; there is nothing to tune")
        # Asked for, it has the time it needs: every way is measured.
        work = Tuning(spec, device, models.apart, tell, budget_s=3600)
        work.refer(reference.model, _prepared(settings, spec.dataset, reference.model))
        best = work.run() if work.seconds_each else None
    finally:
        reference.model.close()
        models.close()
    if best is None:
        raise BadInput(f"no picture of {spec.dataset!r} could be read, so there is nothing to measure on")
    choices.keep(db, tuning.about(spec, device), best, [dataclasses.asdict(one) for one in work.found])
    return best, work.found


def _prepared(settings: Settings, dataset: str, model: Model) -> list[Prepared]:
    """The first pictures of a dataset that can be read, made ready."""
    limits = images.Limits(settings.max_image_bytes, settings.max_image_pixels)
    found: list[Prepared] = []
    for ref in itertools.islice(sources.refs(dataset, settings), 4 * tuning.PICTURES):
        if ref is None or len(found) == tuning.PICTURES:
            break
        item = Item(ref.key, ref.uri, ref.fingerprint, json.loads(ref.data) if ref.data else {})
        try:
            pixels = images.decode(_bytes(ref.uri, settings), limits).pixels
            if "crop" in item.data:
                pixels = images.crop(pixels, item.data["crop"])
            found.append(model.prepare(pixels, item))
        except (BadInput, ItemFailed, OSError):
            continue
    return found


def _bytes(uri: str, settings: Settings) -> bytes:
    if uri.startswith("frame:"):
        return videos.read(uri, settings)
    return objects.read(uri, settings, settings.max_image_bytes)
