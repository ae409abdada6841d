"""Recipes with results, made as a worker makes them but without models; and what a reader gets back from an export."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs import leases, lifecycle
from jobs.lifecycle import Job, NewShard, Planned
from jobs.spec import JobSpec
from storage import index, migrate, rle, shardfile
from storage.database import Database
from storage.errors import ItemFailed
from storage.objects import Store, open_store
from storage.results import detections, masks
from storage.shardfile import Outcome

LABELS = ("cat", "dog", 'a "quoted": label', "bird, small", "=1+1", "ünïcode 猫 😀", "no")


class Mill:
    """A database and a store, and jobs that have run in them."""

    def __init__(self, database_url: str, store: Store) -> None:
        self.db, self.store = Database(database_url), store
        migrate.upgrade(self.db)
        self.worker = uuid.uuid4().hex
        known = {"name": "w", "host": "nowhere", "device": "cpu", "queue": "cpu", "pid": 1, "version": "0"}
        leases.register(self.db, self.worker, **known)

    def submit(self, kind: str = "detections", labels: Sequence[str] = LABELS, dataset: str = "/data/pictures") -> Job:
        spec = JobSpec(
            dataset=dataset,
            kind=kind,
            family="stub",
            weights_sha256="ab" * 32,
            params={"conf": 0.25},
            model="stub",
            labels=tuple(labels),
        )
        return lifecycle.submit(self.db, spec, force=True)[0]

    def plan(self, job: Job, shards: Sequence[Sequence[Outcome]], *, replaces: int = 0) -> None:
        """Plan shards of these items."""
        assert lifecycle.start_planning(self.db, job.id, "planner")
        new = []
        for number, outcomes in enumerate(shards):
            key = f"jobs/{job.id}/manifests/{number}.parquet"
            shardfile.write_manifest(
                self.store, key, [shardfile.ManifestRow(o.key, o.uri, o.fingerprint) for o in outcomes]
            )
            new.append(NewShard(key, len(outcomes), replaces))
        total = sum(len(outcomes) for outcomes in shards)
        lifecycle.add_shards(self.db, job.id, "planner", 0, new, Planned(total, 0, 0))
        lifecycle.end_planning(self.db, job.id, "planner", pruned=0)

    def commit(self, job: Job, outcomes: Sequence[Outcome]) -> None:
        """Do the next shard, with these outcomes."""
        claim = leases.claim(self.db, self.worker, "cpu", None)
        assert claim is not None
        assert claim.job_id == job.id
        assert claim.items == len(outcomes)
        prefix = f"jobs/{job.id}/{claim.number}/a{claim.fence}-{uuid.uuid4().hex[:8]}/"
        written = shardfile.write(self.store, prefix, job.spec.kind, outcomes, {"recipe": claim.digest})
        assert leases.commit(self.db, claim, self.worker, written, outcomes)

    def run(self, shards: Sequence[Sequence[Outcome]], *, replaces: int = 0, **spec: Any) -> Job:
        """A job from its beginning to its end."""
        job = self.submit(**spec)
        self.plan(job, shards, replaces=replaces)
        for outcomes in shards:
            self.commit(job, outcomes)
        lifecycle.finish(self.db, job.id)
        return job

    def prune(self, job: Job, keys: Sequence[str]) -> None:
        """Mark keys as gone from the dataset."""
        ids = [known.item_id for known in index.known(self.db, job.recipe_id, keys).values()]
        assert len(ids) == len(keys)
        self.db.transact(lambda tx: index.mark_pruned(tx, ids, pruned=True))


def provenance(job: Job) -> dict[str, Any]:
    """What the command line hands to an export."""
    return {"job": job.id, "name": job.name, **job.spec.to_json()}


def shards(outcomes: Sequence[Outcome], size: int) -> list[list[Outcome]]:
    """Outcomes in shards, each numbered from 0."""
    parts = [outcomes[start : start + size] for start in range(0, len(outcomes), size)]
    return [[moved(outcome, position) for position, outcome in enumerate(part)] for part in parts]


def moved(outcome: Outcome, position: int) -> Outcome:
    values = {name: getattr(outcome, name) for name in Outcome.__slots__}
    return Outcome(**{**values, "position": position})


def found(key: str, result: Any, *, uri: str = "", size: tuple[int, int] = (640, 480)) -> Outcome:
    """An item with a result."""
    return Outcome(0, key, uri or f"file:///data/pictures/{key}", "etag:1", *size, result, None)


def failed(key: str, reason: str = "truncated", message: str = "the file ends too early") -> Outcome:
    """An item that could not be done."""
    failure = ItemFailed("decode", reason, message)
    return Outcome(0, key, f"file:///data/pictures/{key}", "etag:1", None, None, None, failure)


def detected(seed: int, objects: int | None = None, size: tuple[int, int] = (640, 480)) -> detections.Result:
    """Boxes within a picture, of LABELS' classes."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 6)) if objects is None else objects
    low = rng.uniform(0, 0.7, (n, 2))
    high = low + rng.uniform(0.01, 0.3, (n, 2))
    boxes = (np.hstack([low, high]) * [*size, *size]).astype(np.float32)
    ids = rng.integers(0, len(LABELS), n).astype(np.int32)
    scores = np.sort(rng.uniform(0.1, 1, n).astype(np.float32))[::-1].copy()
    return detections.Result(boxes, scores, ids, tuple(LABELS[i] for i in ids))


def masked(seed: int, objects: int | None = None) -> masks.Result:
    """Masks of a picture of 40 x 30 pixels, of LABELS' classes, never quite empty."""
    boxes = detected(seed, objects, (40, 30))
    pixels = np.random.default_rng(seed).random((len(boxes.labels), 30, 40)) < 0.3
    rles = tuple(rle.encode(mask) for mask in pixels)
    areas = pixels.sum((1, 2))
    return masks.Result(boxes.boxes_xyxy, boxes.scores, boxes.class_ids, boxes.labels, rles, (30, 40), areas)


def detection(label: str, class_id: int, box: Sequence[float] = (1, 2, 30, 40)) -> detections.Result:
    """One box."""
    boxes = np.array([box], np.float32)
    return detections.Result(boxes, np.array([0.5], np.float32), np.array([class_id], np.int32), (label,))


def download(url: str, folder: Path) -> Path:
    """The files of an export as a local folder."""
    store = open_store(url)
    for stat in store.list():
        path = folder / stat.key
        path.parent.mkdir(parents=True, exist_ok=True)
        store.get_file(stat.key, path)
    return folder


def mixed(count: int) -> list[Outcome]:
    """Results and some failures."""
    return [failed(f"f/{i:05d}.jpg") if i % 7 == 3 else found(f"f/{i:05d}.jpg", detected(i)) for i in range(count)]
