"""Batches given ahead: the device has the next one before the first is answered, and nothing is lost by that.

As on a GPU, where one thread starts all batches, and as on a CPU in lanes, where two batches are computed at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from jobs import leases, lifecycle, plan, progress
from storage import index, shardfile, tables
from storage.database import Database
from storage.objects import open_store
from storage.settings import Settings
from tests.services import wait_until
from tests.support import execute, opened
from workers import images, inhand, submit
from workers.batchdecode import OnDevice
from workers.incarnation import Incarnation
from workers.loaded import Loaded, Models
from workers.models import Prepared, stub
from workers.stream import Stream

COUNT, BATCH, SHARD = 60, 8, 20


class Staged:
    """Makes the stub work in two steps, and writes down when which began and ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, int, int]] = []  # (what, number of the batch, its size)
        self.before_compute: Callable[[Sequence[Prepared]], None] = lambda batch: None
        self.before_answer: Callable[[Sequence[Prepared]], None] = lambda batch: None
        self.numbers = itertools.count()
        self.alone = 0  # batches that went through `infer`
        self.late = 0  # items recorded in a shard that is given back
        infer = stub.Stub.infer

        def compute(model: stub.Stub, batch: Sequence[Prepared]) -> tuple[int, list[Any]]:
            number = next(self.numbers)
            self.log.append(("compute", number, len(batch)))
            self.before_compute(batch)
            return number, infer(model, batch)

        def answer(model: stub.Stub, raw: tuple[int, list[Any]], batch: Sequence[Prepared]) -> list[Any]:
            number, found = raw
            self.before_answer(batch)
            self.log.append(("answer", number, len(batch)))
            return found

        def alone(model: stub.Stub, batch: Sequence[Prepared]) -> list[Any]:
            self.alone += 1
            self.before_compute(batch)
            self.before_answer(batch)
            return infer(model, batch)

        monkeypatch.setattr(stub.Stub, "compute", compute, raising=False)
        monkeypatch.setattr(stub.Stub, "answer", answer, raising=False)
        monkeypatch.setattr(stub.Stub, "infer", alone)
        record = inhand.Run.record

        def checked(run: inhand.Run, *given: Any) -> None:
            self.late += run.dropped
            record(run, *given)

        monkeypatch.setattr(inhand.Run, "record", checked)


@pytest.fixture(params=["gpu", "lanes"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a device takes a batch while it computes another."""
    if request.param == "lanes":
        load = Models._load

        def loaded(models: Models, *given: Any) -> Loaded:
            return dataclasses.replace(load(models, *given), lanes=True)

        monkeypatch.setattr(Models, "_load", loaded)
    return str(request.param)


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch, way: str) -> Iterator[Staged]:
    staged = Staged(monkeypatch)
    yield staged
    assert staged.late == 0


class Site:
    """A job over pictures and a worker's stream in this process, whose device takes two batches."""

    def __init__(
        self, db: Database, folder: Path, way: str, count: int = COUNT, buffer_bytes: int = 1 << 30, **params: Any
    ) -> None:
        self.db = db
        settings = Settings(home=folder / "home", decode_threads=2, buffer_bytes=buffer_bytes)
        self.store = open_store((folder / "store").as_uri(), settings)
        (folder / "pictures").mkdir()
        rng = np.random.default_rng(0)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).save(folder / "pictures" / f"{i:03d}.jpg")
        spec = submit.resolve(
            db, self.store, settings, dataset=str(folder / "pictures"), kind="detections", model="stub",
            params=params, device="cpu", batch=BATCH, shard_size=SHARD,
        )  # fmt: skip
        self.job, _ = lifecycle.submit(db, spec)
        plan.plan(db, self.store, settings, self.job)
        self.me = Incarnation(db, settings, "cpu", spec.queue, lambda: False)
        self.me.start()
        self.stream = Stream(db, self.store, settings, self.me, "cpu")
        self.stream.computing.ahead = way == "gpu"

    def work(self) -> progress.Status:
        """Work until there is nothing to do."""
        self.stream.run("cpu")
        return progress.status(self.db, self.job.id)

    def failed(self) -> dict[str, str]:
        """Key -> message of the pictures that failed."""
        found = index.find(self.db, self.job.recipe_id, ok=False)
        return {one.key: one.message or "" for one in found}

    def close(self) -> None:
        self.me.stop()
        self.stream.close()


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with opened(f"sqlite:///{tmp_path / 'index.db'}") as database:
        yield database


@pytest.fixture
def make(db: Database, tmp_path: Path, way: str) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(**params: Any) -> Site:
        sites.append(Site(db, tmp_path, way, **params))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


def test_the_next_batch_is_given_before_the_first_is_answered(
    staged: Staged, make: Callable[..., Site], way: str
) -> None:
    staged.before_answer = lambda batch: time.sleep(0.02)
    done = make().work()
    assert (done.state, done.results, done.failures) == ("done", COUNT, 0)
    assert staged.alone == 0
    at = {entry[:2]: place for place, entry in enumerate(staged.log)}
    batches = max(number for _, number, _ in staged.log) + 1
    ahead = [number for number in range(batches - 1) if at["compute", number + 1] < at["answer", number]]
    if way == "lanes":  # they may begin and end by twos, in whichever order
        assert len(ahead) >= batches // 4, staged.log
        return
    assert len(ahead) >= batches // 2, staged.log
    two = [number for number in range(batches - 2) if at["compute", number + 2] < at["answer", number]]
    assert not two, f"the device had three batches: {staged.log}"
    assert [number for what, number, _ in staged.log if what == "answer"] == list(range(batches)), "in order"


def test_every_result_is_its_pictures(
    staged: Staged, make: Callable[..., Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make()
    site.work()
    with opened(f"sqlite:///{tmp_path / 'other.db'}") as other:
        (tmp_path / "plain").mkdir()
        monkeypatch.undo()
        plain = Site(other, tmp_path / "plain", "none")
        plain.work()
        plain.close()
        expected = {one.key: one.labels for one in index.find(other, plain.job.recipe_id)}
    assert {one.key: one.labels for one in index.find(site.db, site.job.recipe_id)} == expected
    assert len(expected) == COUNT


def test_pictures_decoded_in_batches_are_the_same(make: Callable[..., Site], tmp_path: Path) -> None:
    site = make()
    site.stream._pictures = OnDevice(images.Limits(), "cpu")
    done = site.work()
    assert (done.state, done.results) == ("done", COUNT)
    for (shard,) in site.db.query(sa.select(tables.shard.c.result_key)):
        assert shardfile.read(site.store, shard)[1]["decoder"] == "nvjpeg"
    counts = index.label_counts(site.db, site.job.recipe_id)
    with opened(f"sqlite:///{tmp_path / 'other.db'}") as other:
        (tmp_path / "plain").mkdir()
        plain = Site(other, tmp_path / "plain", "none")
        plain.work()
        plain.close()
        assert index.label_counts(other, plain.job.recipe_id) == counts
        for (shard,) in other.query(sa.select(tables.shard.c.result_key)):
            assert shardfile.read(plain.store, shard)[1]["decoder"] == "host"


@pytest.mark.parametrize("pictures_held", [1, BATCH - 1, 2 * BATCH])
def test_room_is_given_back(staged: Staged, make: Callable[..., Site], pictures_held: int) -> None:
    site = make(buffer_bytes=(pictures_held * 24 * 32 * 3 + 1) * 8 // 3)
    worker = threading.Thread(target=site.work, daemon=True)
    worker.start()
    worker.join(30)
    assert not worker.is_alive(), "it waits for room for ever"
    assert progress.status(site.db, site.job.id).results == COUNT


def test_time_is_counted_once(staged: Staged, make: Callable[..., Site]) -> None:
    staged.before_answer = lambda batch: time.sleep(0.01)
    site = make()
    site.work()
    spent = progress.profile(site.db, site.job.id).seconds
    assert spent["answer"] >= 0.01 * COUNT / BATCH
    assert spent.get("post", 0) == 0


def test_the_device_works_no_longer_than_time_passes(staged: Staged, make: Callable[..., Site], way: str) -> None:
    site, times = make(), list[float]()

    def network(batch: Sequence[Prepared]) -> None:
        times.append(time.perf_counter())
        with site.stream.computing.running(barriers=way == "gpu"):
            time.sleep(0.05)
        times.append(time.perf_counter())

    staged.before_compute = network
    site.work()
    spent = progress.profile(site.db, site.job.id).seconds
    # The clock is read around what is timed here. Counted twice, it would be nearly twice as long.
    assert 0.05 <= spent["device"] <= 1.2 * (max(times) - min(times))


@pytest.mark.parametrize("where", ["before_compute", "before_answer"])
def test_a_picture_that_fails_costs_only_itself(staged: Staged, make: Callable[..., Site], where: str) -> None:
    bad: set[int] = set()

    def check(batch: Sequence[Prepared]) -> None:
        bad.update(item.data for item in batch if item.data % 7 == 0)
        if any(item.data in bad for item in batch):
            raise ValueError("pretended")

    setattr(staged, where, check)
    site = make()
    done = site.work()
    assert done.state == "done with failures"
    assert 0 < len(bad) < COUNT / 2
    assert (done.results, done.failures) == (COUNT - len(bad), len(bad))
    assert all("pretended" in message for message in site.failed().values())


@pytest.mark.parametrize("where", ["before_compute", "before_answer"])
def test_a_batch_that_does_not_fit_is_halved(staged: Staged, make: Callable[..., Site], where: str) -> None:
    def check(batch: Sequence[Prepared]) -> None:
        if len(batch) > 3:
            raise MemoryError("pretended")

    setattr(staged, where, check)
    done = make().work()
    assert (done.state, done.results) == ("done", COUNT)
    assert max(size for what, _, size in staged.log[-3:]) <= 3, "later batches are as large as fits"


def test_a_wrong_number_of_answers_is_not_taken(
    staged: Staged, make: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub.Stub, "answer", lambda model, raw, batch: [], raising=False)
    done = make().work()
    assert (done.state, done.results) == ("done", COUNT)
    assert staged.alone >= COUNT / BATCH


@pytest.mark.parametrize("what", ["cancelled", "lost", "drained"])
def test_what_is_given_up_meanwhile_is_not_recorded(
    staged: Staged, make: Callable[..., Site], db: Database, what: str
) -> None:
    """Its shard is given back while a batch of it is being answered: what comes then changes nothing."""
    site = make(count=2 * BATCH)  # all of them given: the device's thread is free to obey
    answering, go_on = threading.Event(), threading.Event()

    def wait(batch: Sequence[Prepared]) -> None:
        answering.set()
        assert go_on.wait(10)

    staged.before_answer = wait
    worker = threading.Thread(target=site.work)
    worker.start()
    assert answering.wait(10)
    if what == "cancelled":
        lifecycle.cancel(db, site.job.id)
    elif what == "lost":
        execute(db, sa.update(tables.worker).values(state=leases.LOST))
    else:
        site.me.drain_asked = lambda: True
    site.me._soon.set()
    wait_until(lambda: what == "drained" or not site.me.orders.alive or site.me.orders.dropped, "the news")
    time.sleep(0.1)
    go_on.set()
    worker.join(30)
    assert not worker.is_alive()
    if what == "cancelled":
        assert progress.status(db, site.job.id).state == "cancelled"
        return
    if what == "lost":
        assert len(list(index.find(db, site.job.recipe_id))) == 0, "nothing was written after the lease"
        leases.expire_shards(db)
        execute(db, sa.update(tables.shard).values(not_before=0))
    else:
        site.me.drain_asked = lambda: False
    assert site.me.ensure()
    done = site.work()
    assert (done.state, done.results) == ("done", 2 * BATCH)
    assert len(list(index.find(db, site.job.recipe_id))) == 2 * BATCH


def test_two_batches_are_under_way_and_no_third(staged: Staged, make: Callable[..., Site]) -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def begun(batch: Sequence[Prepared]) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.01)

    def done(batch: Sequence[Prepared]) -> None:
        nonlocal under_way
        time.sleep(0.01)
        with lock:
            under_way -= 1

    staged.before_compute, staged.before_answer = begun, done
    assert make().work().results == COUNT
    assert most == 2


def test_failures_in_results_are_rows(staged: Staged, make: Callable[..., Site]) -> None:
    site = make(fail_every=5)
    done = site.work()
    assert done.failures == len(site.failed()) > 0
    assert done.results + done.failures == COUNT
    assert all("is a multiple of 5" in message for message in site.failed().values())
