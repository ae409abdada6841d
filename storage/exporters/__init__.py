"""The export formats: one file a format, listed from this folder, imported when its name is asked for.

A format's file defines

    KINDS: frozenset[str]     the result kinds it can write
    OPTIONS                   option -> the values it may take, the default first
    BLOBS                     True, where results that are files are to come with their bytes
    writer(output, labels, provenance, options)
                              a context manager around a Writer: append(outcome) for every item, and a clean exit puts
                              what is left. It holds no more of a recipe in memory than one shard's worth; what has to
                              wait for the end waits in files in `output.scratch`.

`export` streams a recipe into one of them. An export that fails leaves nothing under the final names (staging.py).
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Protocol, cast

import sqlalchemy as sa

from storage import index, results, shardfile
from storage.database import Database
from storage.errors import BadInput, NotFound, Unavailable
from storage.objects import Store
from storage.settings import Settings
from storage.shardfile import Outcome
from storage.staging import Output, staged
from storage.tables import recipe

# Class ids beyond this get a number of their own at the end rather than a table with so many gaps.
_MAX_CLASS_ID = 1 << 16


@dataclass
class Report:
    """What an export has written so far.

    Attributes:
        items: results and failures, each key once.
        failures: how many of them are failures.
        annotations: objects in the results, as the index counts them.
        files: how many were put, pictures included.
        notes: lines for people.
    """

    items: int = 0
    failures: int = 0
    annotations: int = 0
    files: int = 0
    notes: list[str] = field(default_factory=list)


class Writer(Protocol):
    """One export in the making."""

    notes: list[str]

    def append(self, outcome: Outcome) -> None: ...


class Format(Protocol):
    """What a format's module offers (see the module docstring)."""

    KINDS: frozenset[str]
    OPTIONS: Mapping[str, tuple[Any, ...]]

    def writer(
        self, output: Output, labels: Sequence[str], provenance: Mapping[str, Any], options: Mapping[str, Any]
    ) -> AbstractContextManager[Writer]: ...


def names() -> list[str]:
    """The formats there are, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(format: str) -> Format:
    """Import one format. Raises BadInput, naming the known ones."""
    if format not in names():
        raise BadInput(f"unknown export format {format!r}; known formats: {', '.join(names())}")
    return cast(Format, importlib.import_module(f"{__name__}.{format}"))


def export(
    db: Database,
    store: Store,
    recipe_id: int,
    format: str,
    destination: Store,
    *,
    job: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    settings: Settings,
    on_progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Write the current items of a recipe, each key once, as one dataset of a format.

    Jobs may commit meanwhile: what is written is what was committed when it began.

    Args:
        destination: where to; nothing may be there yet, so that no two exports are ever mixed.
        job: provenance that goes into the files as it is (job, model, weights' sha256, parameters); `labels`, the
            model's class names in the order of its class ids, is taken out of it.
        options: of the format; a value may be given as its lower-case text.
        on_progress: called after each shard.

    Raises:
        BadInput: unknown format or option, a kind that the format cannot write, a destination that is not empty.
        Unavailable: a result object is not what was written, or a disk or server does not answer.
    """
    provenance, labels = _provenance(db, recipe_id, job)
    module = _for_kind(format, provenance["kind"])
    chosen = _chosen(format, module.OPTIONS, options or {})
    summarise = results.get(provenance["kind"]).summary
    report = Report()
    with staged(destination, settings) as output:
        with module.writer(output, labels, provenance, chosen) as writing:
            blobs = bool(getattr(module, "BLOBS", False))
            for outcome in _outcomes(db, store, recipe_id, lambda: on_progress(report), blobs=blobs):
                writing.append(outcome)
                report.items += 1
                report.failures += outcome.failure is not None
                report.annotations += summarise(outcome.result).count if outcome.failure is None else 0
                report.files = output.files
        report.files, report.notes = output.files, list(writing.notes)
    on_progress(report)
    return report


def _provenance(db: Database, recipe_id: int, job: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What goes into every file about where its labels came from, as JSON values, and the class names."""
    rows = db.query(sa.select(recipe.c.digest, recipe.c.dataset, recipe.c.kind).where(recipe.c.id == recipe_id))
    if not rows:
        raise NotFound(f"there is no recipe {recipe_id}; list the jobs with: imagemill jobs")
    given = {name: value for name, value in job.items() if name != "labels"}
    ours = {
        "imagemill": version("imagemill"),
        "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": rows[0].digest,
        "dataset": rows[0].dataset,
        "kind": rows[0].kind,
    }
    return json.loads(json.dumps({**given, **ours}, default=str)), list(job.get("labels", ()))


def _for_kind(format: str, kind: str) -> Format:
    module = get(format)
    if kind not in module.KINDS:
        able = [name for name in names() if kind in get(name).KINDS]
        raise BadInput(
            f"{format!r} cannot hold results of kind {kind!r}; formats that can: {', '.join(able) or 'none'}"
        )
    return module


def _chosen(format: str, known: Mapping[str, tuple[Any, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a format with the value it takes."""
    chosen = {name: values[0] for name, values in known.items()}
    for name, value in given.items():
        if name not in known:
            raise BadInput(f"{format!r} has no option {name!r}; known options: {', '.join(known) or 'none'}")
        spelled = {str(v).lower(): v for v in known[name]}
        if str(value).lower() not in spelled:
            raise BadInput(f"option {name!r} of {format!r}: expected {' or '.join(spelled)}, but got {value!r}")
        chosen[name] = spelled[str(value).lower()]
    return chosen


def _outcomes(
    db: Database, store: Store, recipe_id: int, after_shard: Callable[[], None], *, blobs: bool
) -> Iterator[Outcome]:
    """Every live item; each result object is read once, its sha256 checked, and let go before the next."""
    for found, live in index.snapshot(db, recipe_id):
        try:
            outcomes, _ = shardfile.read(store, found.key, found.sha256)
            chosen = [outcome for outcome in outcomes if outcome.position in live]
            yield from shardfile.filled(store, found.key, chosen) if blobs else chosen
        except NotFound as error:
            raise Unavailable(f"result object {found.key!r} of shard {found.shard_id} is gone: {error}") from error
        after_shard()


# ------------------------------------------------------------------------------------------------ for the formats


class Classes:
    """Numbers the classes from 0: a class keeps the model's id, and no label is ever lost.

    Where a result's label is not the one that the table has for its id (a table that is missing, short or wrong), the
    pair of id and label gets the next free number.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._names: list[str | None] = list(labels)
        self._moved: dict[tuple[int, str], int] = {}

    def number(self, class_id: int, label: str) -> int:
        """The number of a class, the same for every call."""
        if 0 <= class_id < len(self._names) and self._names[class_id] == label:
            return class_id
        moved = self._moved.get((class_id, label))
        return self._add(class_id, label) if moved is None else moved

    def _add(self, class_id: int, label: str) -> int:
        if len(self._names) <= class_id < _MAX_CLASS_ID:
            self._names += [None] * (class_id + 1 - len(self._names))
        if 0 <= class_id < len(self._names) and self._names[class_id] is None:
            self._names[class_id] = label
            return class_id
        self._names.append(label)
        return self._moved.setdefault((class_id, label), len(self._names) - 1)

    def table(self) -> list[tuple[str | None, int]]:
        """By number: the label, None where the number is not used, and the model's class id."""
        ids = {number: class_id for (class_id, _), number in self._moved.items()}
        return [(name, ids.get(number, number)) for number, name in enumerate(self._names)]
