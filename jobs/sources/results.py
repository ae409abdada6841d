"""Knows the dataset that an earlier job left: the images it made, or its images with the boxes it found in them.

    results:JOB?as=images                 the images that a generate or transform job made
    results:JOB?as=photos                 the images that the job looked at
    results:JOB?as=boxes                  the same, each with the boxes found in it as its data
    results:JOB?as=crops                  each box as an item of its own, data holding the crop
    ...&label=dog&min_score=0.5           only what was found of this label, with this score or a higher one

JOB is a job's number or name, or the digest of a recipe, which is the canonical spelling: a later refresh of the same
recipe is the same dataset. While a job of the recipe runs, its shards are listed as they are committed.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from jobs import progress, states
from jobs.sources import ImageRef, safe_key
from storage import index, shardfile
from storage.database import Database
from storage.errors import BadInput, NotFound
from storage.objects import Store, open_store
from storage.settings import Settings, load
from storage.shardfile import Outcome
from storage.tables import job, recipe, shard

_SCHEME = "results:"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_POLL_S = 0.3
_BOXED = ("detections", "masks")
_VIEWS = ("images", "photos", "boxes", "crops")


@dataclass(frozen=True, slots=True)
class View:
    """What of a recipe's results is wanted, as a URI says it."""

    digest: str
    shown: str  # one of _VIEWS
    label: str = ""
    min_score: float = 0.0

    def __str__(self) -> str:
        given = {"as": self.shown, "label": self.label, "min_score": f"{self.min_score:g}" if self.min_score else ""}
        query = urllib.parse.urlencode({name: value for name, value in given.items() if value})
        return f"{_SCHEME}{self.digest}?{query}"


def claims(uri: str) -> bool:
    """Whether it starts with results:."""
    return uri.startswith(_SCHEME)


def canonical(uri: str) -> str:
    """The spelling with the recipe's digest. Raises BadInput for a job that is not there or has no such results."""
    return str(_view(uri, load()))


def of_recipe(digest: str, kind: str, shown: str = "", label: str = "", min_score: float = 0.0) -> str:
    """The canonical URI for a recipe that may not have been stored yet. Raises BadInput as `canonical` does."""
    return str(_checked(digest, kind, shown, label, min_score))


def refs(uri: str, settings: Settings) -> Iterator[ImageRef | None]:
    """The items in the order in which they were committed; None while a job of the recipe still runs.

    Raises:
        BadInput: when what there is has been listed, but the recipe's newest job did not come to its end.
    """
    view = _view(uri, settings)
    db, store = Database(settings.database), open_store(settings.store, settings)
    try:
        yield from _following(db, store, view)
    finally:
        db.close()


def _view(uri: str, settings: Settings) -> View:
    name, _, query = uri.removeprefix(_SCHEME).partition("?")
    given = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(given) - {"as", "label", "min_score"})
    if unknown:
        raise BadInput(f"dataset {uri!r} has an unknown part {unknown[0]!r}: expected as, label or min_score")
    # A digest may be of a recipe that is about to be stored, as in a chain of jobs; `refs` finds out.
    digest, kind = (name, "") if _DIGEST.fullmatch(name) else _recipe(name, settings)
    return _checked(digest, kind, given.get("as", ""), given.get("label", ""), _score(given.get("min_score", "0")))


def _score(text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise BadInput(f"expected a min_score from 0 to 1, but got {text!r}")
    return score


def _checked(digest: str, kind: str, shown: str, label: str, min_score: float) -> View:
    view = View(digest, shown or ("images" if kind == "image" else "photos"), label, min_score)
    if view.shown not in _VIEWS:
        raise BadInput(f"results can be taken as {', '.join(_VIEWS)}, but got {shown!r}")
    if not kind:
        return view
    if view.shown == "images" and kind != "image":
        raise BadInput(f"a job that yields {kind} has made no images; take its results as photos, boxes or crops")
    if view.shown in ("boxes", "crops") and kind not in _BOXED:
        raise BadInput(f"a job that yields {kind} has found no boxes; take the results of an annotate or mask job")
    return view


def _recipe(name: str, settings: Settings) -> tuple[str, str]:
    """(digest, kind) of a job's recipe."""
    db = Database(settings.database)
    try:
        owner = sa.select(job.c.recipe_id).where(job.c.id == progress.find_job(db, name)).scalar_subquery()
        ((digest, kind),) = db.query(sa.select(recipe.c.digest, recipe.c.kind).where(recipe.c.id == owner))
    except NotFound as error:
        raise BadInput(str(error)) from None
    finally:
        db.close()
    return digest, kind


def _following(db: Database, store: Store, view: View) -> Iterator[ImageRef | None]:
    known = db.query(sa.select(recipe.c.id).where(recipe.c.digest == view.digest))
    if not known:
        raise BadInput(f"there is no recipe {view.digest[:16]}... in this database; list the jobs with: imagemill jobs")
    recipe_id = known[0].id
    listed: set[int] = set()
    while True:
        # Asked before the shards are listed: one that is committed between the two is found by the next round.
        running = _running(db, recipe_id)
        for row in _committed(db, running, listed):
            listed.add(row.id)
            yield from _items(db, store, view, row.id, row.result_key, row.result_sha256)
        if not running:
            break
        time.sleep(_POLL_S)
        yield None
    for entry, live in index.snapshot(db, recipe_id):
        if entry.shard_id not in listed:
            yield from _items(db, store, view, entry.shard_id, entry.key, entry.sha256, live)
    _check_ended(db, recipe_id)


def _running(db: Database, recipe_id: int) -> list[int]:
    where = (job.c.recipe_id == recipe_id, job.c.finished_at.is_(None))
    return [row.id for row in db.query(sa.select(job.c.id).where(*where))]


def _committed(db: Database, jobs: Sequence[int], listed: set[int]) -> list[Any]:
    """Committed shards of running jobs that have not been listed, in their order."""
    if not jobs:
        return []
    columns = (shard.c.id, shard.c.result_key, shard.c.result_sha256)
    where = (shard.c.job_id.in_(jobs), shard.c.result_key.is_not(None))
    return [row for row in db.query(sa.select(*columns).where(*where).order_by(shard.c.id)) if row.id not in listed]


def _check_ended(db: Database, recipe_id: int) -> None:
    """What a listing does not name is pruned: so a listing of what was left half done must not look complete."""
    where = (job.c.recipe_id == recipe_id, job.c.only == "")
    rows = db.query(sa.select(job.c.id, job.c.state).where(*where).order_by(job.c.id.desc()).limit(1))
    if rows and rows[0].state not in (states.DONE, states.DONE_WITH_FAILURES):
        raise BadInput(f"job {rows[0].id}, whose results are the dataset, ended {rows[0].state}; run it again first")


def _items(
    db: Database, store: Store, view: View, shard_id: int, key: str, sha256: str, live: set[int] | None = None
) -> Iterator[ImageRef]:
    live = index.current_positions(db, shard_id) if live is None else live
    outcomes, _ = shardfile.read(store, key, sha256)
    for outcome in outcomes:
        if outcome.result is not None and outcome.position in live:
            yield from _shown(outcome, view, store, key)


def _shown(outcome: Outcome, view: View, store: Store, key: str) -> Iterator[ImageRef]:
    result: Any = outcome.result
    if view.shown == "images":
        name = safe_key(f"{outcome.key}.{result.format}")
        yield ImageRef(name, store.url_for(shardfile.blob_key(key, result)), f"sha256:{result.sha256}")
        return
    chosen = _chosen(result, view)
    if view.shown == "photos":
        if chosen or not (view.label or view.min_score):
            yield ImageRef(outcome.key, outcome.uri, outcome.fingerprint)
    elif view.shown == "boxes":
        data = {
            "boxes": [box for box, _, _, _ in chosen],
            "scores": [score for _, score, _, _ in chosen],
            "labels": [label for _, _, label, _ in chosen],
            "class_ids": [number for _, _, _, number in chosen],
        }
        yield _with_data(outcome.key, outcome, data)
    else:
        for i, (box, score, label, _) in enumerate(chosen):
            yield _with_data(f"{outcome.key}#{i}", outcome, {"crop": box, "score": score, "label": label})


def _chosen(result: Any, view: View) -> list[tuple[list[float], float, str, int]]:
    """(box, score, label, class id) of what was found and is wanted; for a kind without boxes the boxes are empty."""
    labels: Sequence[str] = getattr(result, "labels", ())
    scores = result.scores.tolist() if hasattr(result, "scores") else [1.0] * len(labels)
    boxes = result.boxes_xyxy.tolist() if hasattr(result, "boxes_xyxy") else [[] for _ in labels]
    numbers = result.class_ids.tolist() if hasattr(result, "class_ids") else [0] * len(labels)
    found = zip(boxes, scores, labels, numbers, strict=True)
    return [f for f in found if f[1] >= view.min_score and view.label in ("", f[2])]


def _with_data(key: str, outcome: Outcome, data: dict[str, Any]) -> ImageRef:
    text = json.dumps(data, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return ImageRef(safe_key(key), outcome.uri, f"{outcome.fingerprint}+{digest}", text)
