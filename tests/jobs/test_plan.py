"""Planning: every image of a dataset in exactly one shard, whatever interrupts it, and nothing pruned by accident."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jobs import collect, leases, lifecycle, plan, sources, states
from jobs.lifecycle import Job
from jobs.plan import Report, Seen
from storage import index, objects
from storage.database import Database
from storage.errors import Conflict, ItemFailed, Unavailable
from storage.objects import Store
from storage.settings import Settings
from storage.shardfile import Outcome, read_manifest
from storage.tables import item, job, shard
from tests.support import (
    commit,
    count,
    execute,
    fill,
    job_row,
    new_worker,
    opened,
    python,
    result,
    spec,
    written,
)


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database with tables."""
    with opened(database_url) as database:
        yield database


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An object store in a folder."""
    return objects.open_store((tmp_path / "store").as_uri())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of 20 images, some of them in subfolders."""
    return fill(tmp_path / "data", [f"{i % 3}/{i:02d}.jpg" if i % 2 else f"{i:02d}.jpg" for i in range(20)])


def submitted(db: Database, folder: Path, **changes: Any) -> Job:
    force = changes.pop("force", False)
    return lifecycle.submit(db, spec(str(folder), **{"shard_size": 4, **changes}), force=force)[0]


def planned(db: Database, store: Store, found: Job, **options: Any) -> Report:
    report = plan.plan(db, store, Settings(), found, **options)
    assert report is not None
    return report


def manifest_keys(db: Database, store: Store, found: Job) -> list[str]:
    """The keys of all shards, in order."""
    rows = db.query(sa.select(shard).where(shard.c.job_id == found.id).order_by(shard.c.number))
    assert [row.number for row in rows] == list(range(len(rows)))
    manifests = [read_manifest(store, row.manifest_key) for row in rows]
    assert [len(m) for m in manifests] == [row.size for row in rows]
    return [key for m in manifests for key, *_ in m]


def compute(db: Database, store: Store, worker_id: str, failed: dict[str, bool] | None = None) -> str | None:
    """Compute everything claimable. `failed` maps keys to whether their failure may be tried again."""
    ending = None
    while (claim := leases.claim(db, worker_id, "cpu", None)) is not None:
        outcomes = []
        for i, (key, uri, fingerprint, _) in enumerate(read_manifest(store, claim.manifest_key)):
            failure = ItemFailed("fetch", "gone", "x", retry=failed[key]) if failed and key in failed else None
            found = None if failure else result(0.5)
            outcomes.append(Outcome(i, key, uri, fingerprint, 1, 1, found, failure))
        assert leases.commit(db, claim, worker_id, written(claim), outcomes)
        ending = lifecycle.finish(db, claim.job_id)
    return ending


def brought_up_to_date(db: Database, store: Store, folder: Path, **options: Any) -> Report:
    """Submit, plan and compute."""
    changes = {name: options.pop(name) for name in ("force", "shard_size") if name in options}
    failed = options.pop("failed", None)
    found = submitted(db, folder, **changes)
    report = planned(db, store, found, **options)
    compute(db, store, new_worker(db), failed)
    ended = lifecycle.get(db, found.id)
    assert ended.state in (states.DONE, states.DONE_WITH_FAILURES), ended.reason
    return report


def numbers(report: Report) -> tuple[int, int, int, int]:
    return report.listed, report.planned, report.fresh, report.pruned


# --- fresh, stale, deleted ------------------------------------------------------------------------------------------


def test_a_folder_becomes_shards(db: Database, store: Store, data: Path) -> None:
    found = submitted(db, data)
    told: list[int] = []
    assert numbers(planned(db, store, found, on_shards=lambda: told.append(1))) == (20, 20, 0, 0)
    listed = [ref.key for ref in sources.refs(str(data), Settings())]
    assert manifest_keys(db, store, found) == listed
    assert [row.size for row in db.query(sa.select(shard.c.size))] == [4] * 5
    row = job_row(db, found)
    assert (row.state, row.planned, row.fresh, row.duplicates, row.planner) == (states.RUNNING, 20, 0, 0, None)
    assert told


@pytest.mark.parametrize("size", [1, 3, 20, 1000])
def test_any_shard_size(db: Database, store: Store, data: Path, size: int) -> None:
    found = submitted(db, data, shard_size=size)
    planned(db, store, found)
    assert len(manifest_keys(db, store, found)) == 20
    assert count(db, shard) == -(-20 // size)


def test_planning_on_s3(database_url: str, s3_url: str, data: Path) -> None:
    from storage import settings

    with opened(database_url) as db:
        store = objects.open_store(s3_url, settings.load())
        found = submitted(db, data)
        planned(db, store, found)
        assert len(set(manifest_keys(db, store, found))) == 20


def test_the_second_run_computes_nothing(db: Database, store: Store, data: Path) -> None:
    assert numbers(brought_up_to_date(db, store, data)) == (20, 20, 0, 0)
    assert numbers(brought_up_to_date(db, store, data)) == (20, 0, 20, 0)
    newest = lifecycle.get(db, 2)
    assert newest.state == states.DONE
    assert (job_row(db, newest).fresh, job_row(db, newest).planned) == (20, 0)


def test_changed_new_and_deleted_images(db: Database, store: Store, data: Path) -> None:
    brought_up_to_date(db, store, data)
    fill(data, ["00.jpg"], b"changed")
    fill(data, ["new.jpg"])
    (data / "02.jpg").unlink()
    report = brought_up_to_date(db, store, data)
    assert numbers(report) == (20, 2, 18, 1)
    assert job_row(db, lifecycle.get(db, 2)).pruned == 1
    assert count(db, item, item.c.current, item.c.pruned_at.is_(None)) == 20
    assert count(db, item, item.c.current, item.c.key == "00.jpg") == 1
    assert [r.replaces for r in db.query(sa.select(shard.c.replaces).where(shard.c.job_id == 2))] == [1]
    assert "02.jpg" not in {found.key for found in index.find(db, 1)}


def test_an_image_that_comes_back_is_not_computed_again(db: Database, store: Store, data: Path) -> None:
    brought_up_to_date(db, store, data)
    away = data / "02.jpg"
    stat = away.stat()
    away.unlink()
    assert brought_up_to_date(db, store, data).pruned == 1
    fill(data, ["02.jpg"])
    os.utime(away, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert numbers(brought_up_to_date(db, store, data)) == (20, 0, 20, 0)
    assert "02.jpg" in {found.key for found in index.find(db, 1)}


def away_for_long(db: Database, store: Store, data: Path) -> None:
    """One image has left the dataset, and its row is due to be collected; then the image is back, as it was."""
    brought_up_to_date(db, store, data)
    stat = (data / "02.jpg").stat()
    (data / "02.jpg").unlink()
    assert brought_up_to_date(db, store, data).pruned == 1
    execute(db, sa.update(item).where(item.c.pruned_at.is_not(None)).values(pruned_at=1.0))
    fill(data, ["02.jpg"])
    os.utime(data / "02.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def after(real: Any, then: Any) -> Any:
    """A function that lets something happen between what it read and what its caller does with that."""

    def answered(*args: Any, **more: Any) -> Any:
        answer = real(*args, **more)
        then()
        return answer

    return answered


def test_an_image_that_comes_back_while_its_row_is_collected_is_computed(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away_for_long(db, store, data)
    monkeypatch.setattr(index, "known", after(index.known, lambda: collect.collect(db, store, Settings())))
    assert numbers(brought_up_to_date(db, store, data)) == (20, 1, 19, 0)
    assert "02.jpg" in {found.key for found in index.find(db, 1)}


def test_the_collector_leaves_an_image_that_comes_back_meanwhile(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away_for_long(db, store, data)

    def listed(*args: Any) -> Iterator[list[int]]:
        for ids in real(*args):
            assert numbers(brought_up_to_date(db, store, data)) == (20, 0, 20, 0)
            yield ids

    real = collect._pruned
    monkeypatch.setattr(collect, "_pruned", listed)
    assert collect.collect(db, store, Settings()).rows == 0
    found = [row for row in index.find(db, 1) if row.key == "02.jpg"]
    assert found[0].labels == {"dog": 1}


def test_a_planner_that_was_taken_over_puts_nothing_back(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away_for_long(db, store, data)
    found = submitted(db, data)
    other = lambda: execute(db, sa.update(job).where(job.c.id == found.id).values(planner="other"))  # noqa: E731
    monkeypatch.setattr(index, "known", after(index.known, other))
    with pytest.raises(Conflict):
        plan.plan(db, store, Settings(), found)
    assert count(db, item, item.c.pruned_at.is_not(None)) == 1


def test_an_image_that_comes_back_changed_is_computed(db: Database, store: Store, data: Path) -> None:
    brought_up_to_date(db, store, data)
    (data / "02.jpg").unlink()
    brought_up_to_date(db, store, data)
    fill(data, ["02.jpg"], b"another")
    assert numbers(brought_up_to_date(db, store, data)) == (20, 1, 19, 0)
    assert count(db, item, item.c.key == "02.jpg", item.c.current, item.c.pruned_at.is_(None)) == 1


def test_force_computes_everything_again(db: Database, store: Store, data: Path) -> None:
    brought_up_to_date(db, store, data)
    assert numbers(brought_up_to_date(db, store, data, force=True)) == (20, 20, 0, 0)
    assert count(db, item, item.c.current) == 20
    assert count(db, item) == 40


def test_failures_that_may_pass_are_stale_and_others_fresh(db: Database, store: Store, data: Path) -> None:
    brought_up_to_date(db, store, data, failed={"00.jpg": True, "02.jpg": False, "04.jpg": True})
    assert numbers(brought_up_to_date(db, store, data)) == (20, 2, 18, 0)
    assert index.totals(db, 1) == (19, 1)


def test_another_recipe_starts_from_nothing(db: Database, store: Store, data: Path) -> None:
    brought_up_to_date(db, store, data)
    found = submitted(db, data, params={"conf": 0.9})
    assert numbers(planned(db, store, found)) == (20, 20, 0, 0)


def test_duplicates_are_counted_and_planned_once(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sources.refs
    twice = lambda uri, settings: (ref for _ in range(2) for ref in real(uri, settings))  # noqa: E731
    monkeypatch.setattr(sources, "refs", twice)
    monkeypatch.setattr(plan, "_CHUNK", 7)
    found = submitted(db, data)
    report = planned(db, store, found)
    assert (report.listed, report.planned, report.duplicates) == (40, 20, 20)
    assert len(set(manifest_keys(db, store, found))) == 20
    assert job_row(db, found).duplicates == 20
    assert "20 entries of the dataset have the key of an earlier one" in report.notes[0]


def test_chunks_grow_and_what_has_arrived_does_not_wait() -> None:
    made = [sources.ImageRef(str(i), "file:///a", "1") for i in range(20)]
    sizes = lambda refs, *limits: [len(chunk) for chunk in plan._arriving(refs, *limits)]  # noqa: E731
    assert sizes(made, 2, 8) == [2, 4, 8, 6]
    assert sizes(made, 16, 8) == [8, 8, 4]
    assert sizes([*made[:3], None, None, *made[3:8]], 2, 8) == [2, 1, 0, 4, 1]
    assert sizes([], 2, 8) == []


def test_the_first_shards_do_not_wait_for_the_others(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_FIRST_CHUNK", 4)
    found = submitted(db, data, shard_size=2)
    claimable: list[int] = []
    plan.plan(db, store, Settings(), found, on_shards=lambda: claimable.append(count(db, shard)))
    assert claimable == [2, 6, 10]


# --- pruning --------------------------------------------------------------------------------------------------------


def test_nothing_is_pruned_when_the_dataset_is_empty(db: Database, store: Store, data: Path) -> None:
    brought_up_to_date(db, store, data)
    for path in data.rglob("*.jpg"):
        path.unlink()
    for prune_all in (False, True):
        report = brought_up_to_date(db, store, data, prune_all=prune_all)
        assert report.pruned == 0
        assert "empty" in report.notes[0]
    assert index.totals(db, 1) == (20, 0)


def test_losing_more_than_a_fifth_asks_first(db: Database, store: Store, data: Path) -> None:
    brought_up_to_date(db, store, data)
    for name in ("00", "02", "04", "06", "08"):
        (data / f"{name}.jpg").unlink()
    report = brought_up_to_date(db, store, data)
    assert report.pruned == 0
    assert "5 of 20 images are gone" in report.notes[0]
    assert "--prune-all" in report.notes[0]
    assert brought_up_to_date(db, store, data, prune_all=True).pruned == 5
    assert index.totals(db, 1) == (15, 0)


def test_a_fifth_is_pruned(db: Database, store: Store, data: Path) -> None:
    brought_up_to_date(db, store, data)
    for name in ("00", "02", "04", "06"):
        (data / f"{name}.jpg").unlink()
    assert brought_up_to_date(db, store, data).pruned == 4


def break_off(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let the listing end with an error after some images."""
    real = sources.refs

    def refs(uri: str, settings: Settings) -> Iterator[sources.ImageRef]:
        for number, ref in enumerate(real(uri, settings)):
            if number == after:
                raise error
            yield ref

    monkeypatch.setattr(sources, "refs", refs)


def test_nothing_is_pruned_when_the_listing_breaks_off(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought_up_to_date(db, store, data)
    found = submitted(db, data)
    break_off(monkeypatch, 18, Unavailable("the share went away"))
    with pytest.raises(Unavailable):
        planned(db, store, found, prune_all=True)
    assert count(db, item, item.c.pruned_at.is_not(None)) == 0
    stopped = lifecycle.get(db, found.id)
    assert (stopped.state, stopped.reason) == (states.PLANNING, "the share went away")
    monkeypatch.undo()
    assert planned(db, store, stopped).fresh == 20


# --- interrupted and taken over -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Unavailable("x"), KeyboardInterrupt(), MemoryError()])
def test_interrupted_planning_goes_on_with_a_changed_dataset(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    found = submitted(db, data, shard_size=3)
    monkeypatch.setattr(plan, "_CHUNK", 2)
    break_off(monkeypatch, 11, error)
    with pytest.raises(type(error)):
        planned(db, store, found)
    monkeypatch.undo()
    monkeypatch.setattr(lifecycle, "PLANNER_LEASE_S", -1 if isinstance(error, MemoryError) else 60)
    before = manifest_keys(db, store, found)
    assert len(before) == 9
    worker_id = new_worker(db)
    claim = leases.claim(db, worker_id, "cpu", None)
    assert claim is not None, "what is planned may be computed meanwhile"
    (data / before[0]).unlink()
    (data / "18.jpg").unlink()
    fill(data, ["000-before-the-cursor.jpg", "1/zzz.jpg"])
    report = planned(db, store, found)
    keys = manifest_keys(db, store, found)
    there = {ref.key for ref in sources.refs(str(data), Settings())}
    assert len(keys) == len(set(keys)) == 21
    assert set(keys) == there | {before[0]}
    assert (report.planned, job_row(db, found).planned) == (21, 21)
    assert commit(db, claim, worker_id)


def test_totals_of_planning_that_went_on_are_those_of_the_whole(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought_up_to_date(db, store, data)
    fill(data, [f"{i:02d}.jpg" for i in range(0, 20, 2)], b"changed")
    found = submitted(db, data, shard_size=1)
    monkeypatch.setattr(plan, "_CHUNK", 3)
    break_off(monkeypatch, 13, Unavailable("x"))
    with pytest.raises(Unavailable):
        planned(db, store, found)
    compute(db, store, new_worker(db))
    monkeypatch.undo()
    report = planned(db, store, found)
    row = job_row(db, found)
    assert (report.planned, report.fresh) == (row.planned, row.fresh) == (10, 10)
    compute(db, store, new_worker(db))
    assert lifecycle.get(db, found.id).state == states.DONE


KILLED = """
import sys, time
from jobs import lifecycle, plan, sources
from storage import database, objects
from storage.settings import Settings
real = sources.refs
def slow(uri, settings):
    for number, ref in enumerate(real(uri, settings)):
        if number == 12:
            print("there", flush=True)
            time.sleep(60)
        yield ref
sources.refs, plan._CHUNK = slow, 4
db = database.Database(sys.argv[1])
plan.plan(db, objects.open_store(sys.argv[2]), Settings(), lifecycle.get(db, int(sys.argv[3])))
"""


def test_a_killed_planner_is_gone_on_with(db: Database, store: Store, data: Path) -> None:
    found = submitted(db, data)
    process: subprocess.Popen[str] = python(KILLED, db.url, store.url, str(found.id))
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    assert plan.plan(db, store, Settings(), found) is None, "another process is planning it"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    fill(data, ["000.jpg"])
    planned(db, store, found)
    keys = manifest_keys(db, store, found)
    assert len(keys) == len(set(keys)) == 21


def test_a_planner_that_was_taken_over_stops(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = submitted(db, data, shard_size=2)
    monkeypatch.setattr(plan, "_CHUNK", 4)
    monkeypatch.setattr(lifecycle, "PLANNER_LEASE_S", -1)
    real, taken = sources.refs, []

    def refs(uri: str, settings: Settings) -> Iterator[sources.ImageRef]:
        for number, ref in enumerate(real(uri, settings)):
            if number == 10 and not taken:
                taken.append(1)
                assert planned(db, store, found).planned == 20
            yield ref

    monkeypatch.setattr(sources, "refs", refs)
    with pytest.raises(Conflict):
        plan.plan(db, store, Settings(), found)
    keys = manifest_keys(db, store, found)
    assert len(keys) == len(set(keys)) == 20
    assert job_row(db, found).planned == 20
    assert lifecycle.get(db, found.id).state == states.RUNNING


def test_a_planner_whose_dataset_names_nothing_for_long_is_not_taken_over(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = submitted(db, data)
    monkeypatch.setattr(lifecycle, "PLANNER_LEASE_S", 0.6)
    real = sources.refs

    def refs(uri: str, settings: Settings) -> Iterator[sources.ImageRef | None]:
        for _ in range(8):
            time.sleep(0.2)
            assert lifecycle.abandoned_planning(db) == []
            assert not lifecycle.start_planning(db, found.id, "another")
        yield from real(uri, settings)

    monkeypatch.setattr(sources, "refs", refs)
    assert planned(db, store, found).planned == 20
    assert not [thread for thread in threading.enumerate() if thread.name == "planner-beat"]


def test_a_cancelled_job_stops_its_planner(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = submitted(db, data, shard_size=2)
    monkeypatch.setattr(plan, "_CHUNK", 4)
    with pytest.raises(Conflict, match="cancelled"):
        plan.plan(db, store, Settings(), found, on_shards=lambda: lifecycle.cancel(db, found.id) and None)
    assert lifecycle.get(db, found.id).state == states.CANCELLED


def test_a_long_prune_keeps_the_planner_s_lease(
    db: Database, store: Store, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought_up_to_date(db, store, data)
    (data / "00.jpg").unlink()
    found = submitted(db, data)
    real = index.current_keys

    def slow(*args: Any, **kwargs: Any) -> Iterator[list[tuple[str, int]]]:
        for page in real(*args, **kwargs):
            back = lifecycle.PLANNER_LEASE_S / 2 + 5
            execute(db, sa.update(job).values(planner_beat_at=job.c.planner_beat_at - back))
            assert not lifecycle.start_planning(db, found.id, "other")
            yield page

    monkeypatch.setattr(index, "current_keys", lambda db_, recipe, page=1: slow(db_, recipe, page=3))
    assert planned(db, store, found).pruned == 1


# --- the set of keys ------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.text(max_size=3) | st.sampled_from(["a", "b", "c", "\x00", "é"]), max_size=20), max_size=12)
)
def test_seen_is_a_set(batches: list[list[str]]) -> None:
    seen, truth = Seen(), set[str]()
    for batch in batches:
        expected = []
        for key in batch:
            expected.append(key not in truth)
            truth.add(key)
        assert seen.add(batch).tolist() == expected
        assert seen.contains(batch).tolist() == [True] * len(batch)
        others = [key + "!" for key in batch]
        assert seen.contains(others).tolist() == [key in truth for key in others]


def test_seen_of_nothing() -> None:
    assert Seen().add([]).tolist() == []
    assert Seen().contains(["a"]).tolist() == [False]


@pytest.mark.parametrize("count", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_million_keys_fit_in_little_memory(count: int) -> None:
    seen = Seen()
    tracemalloc.start()
    new = 0
    for first in range(0, count, 8192):
        new += int(seen.add(_keys(range(first, min(first + 8192, count)))).sum())
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"\n{count:,} keys: {kept / 1e6:.1f} MB kept, {peak / 1e6:.1f} MB at most")
    assert new == count
    assert kept < 20 * count
    assert peak < 60 * count
    assert seen.contains(_keys(range(0, count, 997))).all()
    assert not seen.contains([f"other/{i}" for i in range(10_000)]).any()
    assert not seen.add(_keys(range(count // 2, count // 2 + 100))).any()


def _keys(numbers: Sequence[int]) -> list[str]:
    return [f"train/{i:09d}.jpg" for i in numbers]
