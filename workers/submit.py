"""Turns what a user asked for into a resolved JobSpec: model found, parameters checked, weights pinned."""

from __future__ import annotations

import dataclasses
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs import progress, sources
from jobs.spec import AUTO, JobSpec
from storage.database import Database
from storage.errors import BadInput, Misconfigured
from storage.objects import Store
from storage.settings import Settings
from storage.tables import MAX_SHARD_ITEMS
from workers import devices, models, runtimes, weights
from workers.models import Card, Resolved


def resolve(
    db: Database,
    store: Store,
    settings: Settings,
    *,
    dataset: str,
    kind: str,
    model: str,
    params: Mapping[str, Any],
    device: str = "auto",
    runtime: str = AUTO,
    precision: str = AUTO,
    batch: int | None = None,
    shard_size: int | None = None,
    on_download: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> JobSpec:
    """A spec that can be run again in a year. Raises BadInput for anything the user got wrong, before anything is made.

    Args:
        on_download: called with (model name, bytes so far, bytes in all) while weights are fetched.
    """
    if shard_size is not None and not 1 <= shard_size <= MAX_SHARD_ITEMS:
        raise BadInput(f"--shard-size must be from 1 to {MAX_SHARD_ITEMS}, but got {shard_size}")
    if batch is not None and batch < 1:
        raise BadInput(f"--batch must be at least 1, but got {batch}")
    if precision not in (AUTO, *runtimes.PRECISIONS):
        raise BadInput(f"unknown precision {precision!r}; known: {AUTO}, {', '.join(runtimes.PRECISIONS)}")
    if runtime != AUTO:
        runtimes.get(runtime)
    uri = sources.canonical(dataset)
    resolved = _found(settings, model, kind, params, on_download)
    card = resolved.card
    if card.needs_image and uri.startswith("prompts:"):
        raise BadInput(f"model {card.name!r} works on images, and {dataset!r} is a list of prompts; give it images")
    queue = _queue(db, settings, device, card)
    spec = _pinned(store, resolved, "cpu" if queue == "cpu" else "cuda", runtime, precision)
    size = shard_size or card.shard_size
    return dataclasses.replace(spec, dataset=uri, batch=batch or 0, shard_size=size, queue=queue)


def resolve_model(
    store: Store,
    settings: Settings,
    *,
    kind: str,
    model: str,
    params: Mapping[str, Any],
    device: str,
    runtime: str,
    precision: str,
    on_download: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> JobSpec:
    """The spec of a job as `resolve` makes it, but for its dataset, which is "". Raises BadInput.

    Args:
        device: "cpu" or "cuda".
    """
    return _pinned(store, _found(settings, model, kind, params, on_download), device, runtime, precision)


def _found(
    settings: Settings,
    model: str,
    kind: str,
    params: Mapping[str, Any],
    on_download: Callable[[str, int, int], None],
) -> Resolved:
    def fetch(card: Card) -> Path:
        _check_libraries(settings, card)
        report = lambda done, total: on_download(card.name, done, total)  # noqa: E731
        return weights.download(card.weights, settings.cache_folder, card.sha256, report)

    resolved = models.resolve(model, kind, params, fetch)
    _check_libraries(settings, resolved.card)
    return resolved


def _pinned(store: Store, resolved: Resolved, device: str, runtime: str, precision: str) -> JobSpec:
    """The spec of a model whose weights lie in the store, once it is sure that the runtime takes it."""
    card = resolved.card
    only = getattr(models.family(card.family), "RUNTIME", "")
    if only and runtime == AUTO:
        runtime = only
    if only and runtime != only:
        raise BadInput(f"{card.name} runs in the runtime {only} alone; give --runtime {only}")
    if runtime != AUTO:
        runtimes.check(runtime, device, precision if precision != AUTO else runtimes.usual_precision(runtime, device))
    sha256 = key = ""
    if resolved.weights_path is not None:
        sha256 = weights.sha256_of(resolved.weights_path)
        key = weights.publish(store, resolved.weights_path, sha256)
    return JobSpec(
        dataset="",
        kind=card.kind,
        family=card.family,
        weights_sha256=sha256,
        params=_plain(resolved.params),
        model=card.name,
        weights=key,
        labels=resolved.labels,
        runtime=runtime,
        precision=precision,
    )


def _check_libraries(settings: Settings, card: Card) -> None:
    """A machine that computes its own jobs must be able to. Raises Misconfigured, naming the extra that is missing."""
    for library in models.missing(card.family) if settings.embedded else ():
        raise Misconfigured(models.lacking(card.family, library))


def results_of(db: Database, job: str, source: str, shown: str, label: str, min_score: float) -> str:
    """The dataset of what an earlier job found in SOURCE. Raises BadInput when it looked at something else.

    Args:
        shown: "boxes" or "crops" (jobs/sources/results.py).
    """
    found = progress.status(db, progress.find_job(db, job))
    if sources.canonical(source) != found.dataset:
        raise BadInput(f"job {found.id} looked at {found.dataset!r}, not at {source!r}; give that dataset")
    labels = found.spec["labels"]
    if label and labels and label not in labels:
        raise BadInput(f"job {found.id} knows no label {label!r}{models.nearest(label, labels)}")
    given = {"as": shown, "label": label, "min_score": f"{min_score:g}" if min_score else ""}
    query = urllib.parse.urlencode({name: value for name, value in given.items() if value})
    return sources.canonical(f"results:{found.id}?{query}")


def prompted(source: str, file: str) -> str:
    """The dataset of those images of SOURCE that a file has prompts for."""
    return f"prompted:?{urllib.parse.urlencode({'of': sources.canonical(source), 'from': file})}"


def prompts(file: str, images: int) -> str:
    """The dataset of so many images for each prompt of a file."""
    return f"prompts:{file}?n={images}"


def variants(source: str, count: int) -> str:
    """The dataset of so many variants of each item of SOURCE."""
    return (
        source if count == 1 else f"variants:?{urllib.parse.urlencode({'of': sources.canonical(source), 'n': count})}"
    )


def _queue(db: Database, settings: Settings, device: str, card: Card) -> str:
    """The capability a job asks for: the CPU, or a GPU with enough memory. Raises BadInput for a device not there."""
    if settings.embedded:
        devices.find(device)
    elif device not in ("auto", "cpu", "gpu"):
        raise BadInput(f"unknown device {device!r}: expected auto, cpu or gpu, since the fleet's workers choose theirs")
    if device == "cpu":
        return "cpu"
    if device == "auto":
        where = (
            devices.find("auto")[0].queue
            if settings.embedded
            else next((w.queue for w in progress.workers(db) if w.queue != "cpu"), "cpu")
        )
        if where == "cpu":
            return "cpu"
    for least, name in ((40, "gpu-80g"), (24, "gpu-40g"), (16, "gpu-24g")):
        if card.memory_gb > least:
            return name
    return "gpu"


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as JSON has them, so that a spec read back from the database has the same digest."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in params.items()}
