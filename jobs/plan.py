"""Brings a recipe's dataset into shards: fresh, stale or deleted, streamed in bounded memory.

A key is fresh when its current row has the same fingerprint, stale when it is new or changed, deleted when a complete
listing did not name it. Interrupted planning is gone on with by listing again and leaving out what the manifests that
were written already hold: that is right whatever changed in the dataset meanwhile, where a position in the listing
would not be.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from jobs import lifecycle, owners, processes, sources
from jobs.lifecycle import Job, NewShard, Planned
from jobs.sources import ImageRef
from storage import index
from storage.database import Database
from storage.errors import BadInput, Conflict, ImagemillError
from storage.objects import Store
from storage.settings import Settings
from storage.shardfile import ManifestRow, read_manifest, write_manifest
from storage.tables import shard

log = logging.getLogger("imagemill.plan")

_CHUNK = 8192  # references looked up and made claimable at once, at most
_FIRST_CHUNK = 1024  # so that the first of many small shards does not wait for the manifests of all others
_MANIFESTS = 256  # read at once
_PRUNE_RATIO = 0.2  # of a recipe's items; losing more than that looks like an accident

T = TypeVar("T")
Progress = Callable[["Report"], None]


@dataclass
class Report:
    """What planning has found so far; all in items."""

    listed: int = 0
    planned: int = 0
    fresh: int = 0
    duplicates: int = 0
    pruned: int = 0
    notes: list[str] = field(default_factory=list)


class Seen:
    """A set of keys in 16 bytes each: sorted runs of hashes, merged as they grow.

    A 128-bit hash makes a false "seen", which would lose an image, less likely than a broken disk: for 10^8 keys about
    10^-23 (the birthday bound n^2 / 2^129).
    """

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.bytes_]] = []

    def add(self, keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Add keys; returns for each whether it was new, the first of two equal ones counting as new."""
        hashes = _hashes(keys)
        old = self._in_runs(hashes)
        _, first = np.unique(hashes, return_index=True)
        new = np.zeros(len(keys), bool)
        new[first] = True
        new &= ~old
        self._merge(np.sort(hashes[new]))
        return new

    def contains(self, keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """For each key whether it has been added."""
        return self._in_runs(_hashes(keys))

    def _in_runs(self, hashes: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(hashes), bool)
        for run in self._runs:
            at = np.searchsorted(run, hashes)
            at[at == len(run)] = 0
            found |= run[at] == hashes
        return found

    def _merge(self, run: npt.NDArray[np.bytes_]) -> None:
        if not len(run):
            return
        # Each run at least twice as long as the next, so there are log2(n) of them.
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        self._runs.append(run)


def _hashes(keys: Sequence[str]) -> npt.NDArray[np.bytes_]:
    # The last byte is never zero: numpy's fixed-length strings do not tell trailing zeros from padding.
    digest = b"".join(hashlib.blake2b(key.encode(), digest_size=15).digest() + b"\x01" for key in keys)
    return np.frombuffer(digest, dtype="S16")


def is_empty(dataset: str, settings: Settings) -> bool:
    """Whether a dataset has no items and will get none: asked before a job is made of it."""
    return not any(True for _ in itertools.islice(sources.refs(dataset, settings), 1))


def plan(
    db: Database,
    store: Store,
    settings: Settings,
    job: Job,
    *,
    prune_all: bool = False,
    on_progress: Progress = lambda report: None,
    on_shards: Callable[[], None] = lambda: None,
    on_wait: Callable[[], None] = lambda: None,
) -> Report | None:
    """Plan a job to its end; None when another process is planning it or has planned it.

    Args:
        prune_all: also mark deleted items when they are more than a fifth of the recipe.
        on_shards: called after shards have become claimable.
        on_wait: called now and then while a dataset that still grows has no more items.

    Raises:
        BadInput, Unavailable: the dataset cannot be listed to its end. The job stays, half planned; nothing is pruned.
        Conflict: the job was cancelled meanwhile.
    """
    planner = processes.new_name()
    if not lifecycle.start_planning(db, job.id, planner):
        return None
    report = Report()
    try:
        owners.sign(store, job.id, job.created_at)
        with _beating(db, job.id, planner):
            with ThreadPoolExecutor(8, thread_name_prefix="manifest") as pool:
                planning = _Planning(db, store, settings, job, planner, report, pool, on_shards, on_wait)
                seen = planning.run(on_progress)
            if report.duplicates:
                report.notes.append(
                    f"{report.duplicates} entries of the dataset have the key of an earlier one and were left out; if "
                    "they are other images, give each a key of its own"
                )
            report.pruned = 0 if job.only else _prune(db, job, planner, seen, report, prune_all)
        lifecycle.end_planning(db, job.id, planner, pruned=report.pruned)
    except (ImagemillError, KeyboardInterrupt) as error:
        lifecycle.stop_planning(db, job.id, planner, str(error))
        raise
    lifecycle.finish(db, job.id)
    on_progress(report)
    return report


@contextlib.contextmanager
def _beating(db: Database, job_id: int, planner: str) -> Iterator[None]:
    """Keep the planner's claim from a thread of its own: a listing may take minutes before it names an image.

    Without it another process would take over, begin the listing anew, and be taken over itself, for ever.
    """
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(max(0.05, lifecycle.PLANNER_LEASE_S / 4)):
            try:
                lifecycle.keep_planning(db, job_id, planner)
            except Conflict:
                return  # the planner meets it itself, at its next write
            except ImagemillError as error:
                log.warning("job %d is planned, but that could not be said: %s", job_id, error)

    thread = threading.Thread(target=run, name="planner-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=1)


@dataclass
class _Planning:
    """One pass over the listing."""

    db: Database
    store: Store
    settings: Settings
    job: Job
    planner: str
    report: Report
    pool: ThreadPoolExecutor
    on_shards: Callable[[], None]
    on_wait: Callable[[], None]
    waiting: list[tuple[ImageRef, bool]] = field(default_factory=list)  # (reference, whether it replaces a row)
    number: int = 0

    def run(self, on_progress: Progress) -> Seen:
        done = self._planned_before()
        seen = Seen()
        compare = index.has_items(self.db, self.job.recipe_id)
        for chunk in _arriving(self._refs(), _FIRST_CHUNK, _CHUNK):
            keys = [ref.key for ref in chunk]
            new = seen.add(keys)
            duplicates = len(chunk) - int(new.sum())
            todo = new & ~done.contains(keys) if done else new
            stale, fresh = self._sorted_out([r for r, t in zip(chunk, todo, strict=True) if t], compare)
            self.waiting += stale
            self._emit(fresh, duplicates, last=False)
            self.report.listed += len(chunk)
            on_progress(self.report)
            if not chunk:
                self.on_wait()
        self._emit(0, 0, last=True)
        return seen

    def _refs(self) -> Iterator[ImageRef | None]:
        """The dataset, or for a retry the recipe's own rows."""
        if not self.job.only:
            return sources.refs(self.job.spec.dataset, self.settings)
        where = {"failures": {"ok": False}, "retry": {"retry": True}}[self.job.only]
        rows = index.find(self.db, self.job.recipe_id, **where)  # type: ignore[arg-type]
        manifest = functools.lru_cache(16)(self._manifest)
        return (ImageRef(*manifest(row.shard_id)[row.position]) for row in rows)

    def _manifest(self, shard_id: int) -> list[ManifestRow]:
        ((key,),) = self.db.query(sa.select(shard.c.manifest_key).where(shard.c.id == shard_id))
        return read_manifest(self.store, key)

    def _planned_before(self) -> Seen | None:
        """The keys in the shards that an interrupted planner wrote."""
        query = sa.select(shard.c.number, shard.c.manifest_key, shard.c.size).where(shard.c.job_id == self.job.id)
        rows = self.db.query(query.order_by(shard.c.number))
        if not rows:
            return None
        done = Seen()
        for part in _chunks(rows, _MANIFESTS):
            for manifest in self.pool.map(lambda row: read_manifest(self.store, row.manifest_key), part):
                done.add([row.key for row in manifest])
            lifecycle.keep_planning(self.db, self.job.id, self.planner)
        self.number = rows[-1].number + 1
        self.report.planned = sum(row.size for row in rows)
        return done

    def _sorted_out(self, refs: list[ImageRef], compare: bool) -> tuple[list[tuple[ImageRef, bool]], int]:
        """The stale ones among references, each with whether it replaces a row, and how many are fresh."""
        if not compare:
            return [(ref, False) for ref in refs], 0
        known = index.known(self.db, self.job.recipe_id, [ref.key for ref in refs])
        stale, back = [], {}
        for ref in refs:
            row = known.get(ref.key)
            if row is None or self.job.force or self.job.only or row.retry or row.fingerprint != ref.fingerprint:
                stale.append((ref, row is not None))
            elif row.pruned:
                back[row.item_id] = ref
        if back:
            there = lifecycle.put_back(self.db, self.job.id, self.planner, list(back))
            stale += [(ref, False) for item_id, ref in back.items() if item_id not in there]
        return stale, len(refs) - len(stale)

    def _emit(self, fresh: int, duplicates: int, *, last: bool) -> None:
        """Write the manifests of full shards (and at the end of the rest), then make them claimable."""
        size = self.job.spec.shard_size
        whole = len(self.waiting) if last else len(self.waiting) // size * size
        parts = [self.waiting[i : min(i + size, whole)] for i in range(0, whole, size)]
        self.waiting = self.waiting[whole:]
        shards = list(self.pool.map(self._write, itertools.count(self.number), parts))
        self.report.planned += sum(len(part) for part in parts)
        self.report.fresh += fresh
        self.report.duplicates += duplicates
        totals = Planned(self.report.planned, self.report.fresh, self.report.duplicates)
        lifecycle.add_shards(self.db, self.job.id, self.planner, self.number, shards, totals)
        self.number += len(shards)
        if shards:
            self.on_shards()

    def _write(self, number: int, part: list[tuple[ImageRef, bool]]) -> NewShard:
        key = f"jobs/{self.job.id}/manifests/{number:07d}-{self.planner[:8]}.parquet"
        write_manifest(self.store, key, [ManifestRow(*ref) for ref, _ in part])
        return NewShard(key, len(part), sum(replaces for _, replaces in part))


def _prune(db: Database, job: Job, planner: str, seen: Seen, report: Report, prune_all: bool) -> int:
    """Mark the items that a complete listing did not name."""
    total = gone = 0
    for page in index.current_keys(db, job.recipe_id):
        total += len(page)
        gone += int((~seen.contains([key for key, _ in page])).sum())
        lifecycle.keep_planning(db, job.id, planner)
    if not gone:
        return 0
    if not report.listed:
        report.notes.append(f"the dataset is empty now; nothing pruned, {total} results kept")
        return 0
    if gone > _PRUNE_RATIO * total and not prune_all:
        report.notes.append(
            f"{gone} of {total} images are gone from the dataset, more than {_PRUNE_RATIO:.0%}; "
            "nothing pruned; if that is right, run again with --prune-all"
        )
        return 0
    for page in index.current_keys(db, job.recipe_id):
        absent = ~seen.contains([key for key, _ in page])
        ids = [row_id for (_, row_id), a in zip(page, absent, strict=True) if a]
        lifecycle.prune(db, job.id, planner, ids)
    return gone


def _arriving(refs: Iterable[ImageRef | None], first: int, most: int) -> Iterator[list[ImageRef]]:
    """References in chunks, each twice as large as the last; a smaller one, even none, when the source waits."""
    chunk: list[ImageRef] = []
    size = min(first, most)
    for ref in refs:
        if ref is not None:
            chunk.append(ref)
        full = len(chunk) == size
        if ref is None or full:
            yield chunk
            chunk, size = [], min(2 * size, most) if full else size
    if chunk:
        yield chunk


def _chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def check_not_empty(dataset: str, recipe_items: bool, settings: Settings) -> None:
    """Raise BadInput for a dataset without images, before anything is made of it."""
    if not is_empty(dataset, settings):
        return
    if recipe_items:
        raise BadInput(f"dataset {dataset!r} is empty now; nothing was pruned, its results are kept")
    suffixes = ", ".join(sorted(sources.IMAGE_SUFFIXES))
    raise BadInput(f"dataset {dataset!r} has no images: expected files ending in {suffixes}")
