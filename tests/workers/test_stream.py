"""The stream in one process: pictures that wait for the device take bounded memory, whatever their shapes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from jobs import leases, lifecycle, plan, progress, states
from storage import shardfile, tables
from storage.database import Database
from storage.objects import open_store
from storage.settings import Settings
from tests.support import opened
from workers import submit, ticket, tuning
from workers.choosing import Choosing
from workers.incarnation import Incarnation
from workers.loaded import Models
from workers.models import Prepared, stub
from workers.stream import Stream

SIDE = 400
PICTURE_BYTES = SIDE * SIDE // 2 * 3


class Held:
    """How many bytes the stub's prepared pictures take between `prepare` and the end of `infer`, and their most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.batches: list[int] = []
        self._lock = threading.Lock()

    def change(self, nbytes: int) -> None:
        with self._lock:
            self.now += nbytes
            self.most = max(self.most, self.now)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held()
    prepare, infer = stub.Stub.prepare, stub.Stub.infer

    def prepared(self: stub.Stub, *given: Any) -> Prepared:
        made = prepare(self, *given)
        held.change(made.nbytes)
        return made

    def inferred(self: stub.Stub, batch: Sequence[Prepared]) -> list[Any]:
        held.batches.append(len(batch))
        answers = infer(self, batch)
        held.change(-sum(one.nbytes for one in batch))
        return answers

    monkeypatch.setattr(stub.Stub, "prepare", prepared)
    monkeypatch.setattr(stub.Stub, "infer", inferred)
    return held


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with opened(f"sqlite:///{tmp_path / 'index.db'}") as database:
        yield database


def pictures(folder: Path, count: int) -> str:
    """Wide and tall ones by turns, which are of two batches."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        shape = (SIDE, SIDE // 2, 3) if i % 2 else (SIDE // 2, SIDE, 3)
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(folder / f"{i:03d}.jpg")
    return str(folder)


def run(db: Database, tmp_path: Path, count: int, **limits: Any) -> progress.Status:
    dataset = pictures(tmp_path / "pictures", count)
    with working(db, tmp_path, **limits) as work:
        return work(dataset, 8)


@contextlib.contextmanager
def working(db: Database, tmp_path: Path, **limits: Any) -> Iterator[Callable[[str, int], progress.Status]]:
    """A worker in this process, which does a job of a dataset in batches of a size."""
    settings = Settings(home=tmp_path / "home", **limits)
    store = open_store((tmp_path / "store").as_uri(), settings)
    me = Incarnation(db, settings, "cpu", "cpu", lambda: False)
    me.start()
    stream = Stream(db, store, settings, me, "cpu")

    def work(dataset: str, batch: int) -> progress.Status:
        spec = submit.resolve(
            db, store, settings, dataset=dataset, kind="detections", model="stub", params={"delay_ms": 5.0},
            device="cpu", batch=batch, shard_size=20,
        )  # fmt: skip
        job, _ = lifecycle.submit(db, spec, force=True)
        plan.plan(db, store, settings, job)
        stream.run(spec.queue)
        return progress.status(db, job.id)

    try:
        yield work
    finally:
        me.stop()
        stream.close()


def test_each_job_of_a_model_has_the_batch_that_it_asks_for(db: Database, tmp_path: Path, held: Held) -> None:
    dataset = pictures(tmp_path / "pictures", 120)
    with working(db, tmp_path) as work:
        for batch in (4, 16, 8):
            held.batches.clear()
            assert work(dataset, batch).results == 120
            assert max(held.batches) == batch


@pytest.mark.parametrize("pictures_held", [0.5, 1, 3, 100])
def test_prepared_pictures_take_bounded_memory(db: Database, tmp_path: Path, held: Held, pictures_held: float) -> None:
    room = int(pictures_held * PICTURE_BYTES)
    done = run(db, tmp_path, 60, buffer_bytes=room * 8 // 3 + 8, decode_threads=2)
    assert (done.state, done.results) == ("done", 60)
    assert held.now == 0
    # Beside what is in the room, each decoder holds one more while it waits.
    assert held.most <= max(room, PICTURE_BYTES) + 2 * PICTURE_BYTES
    if pictures_held == 100:
        assert max(held.batches) == 8, "with room enough batches are full"


def test_a_batch_leaves_room_for_those_after_it(db: Database, tmp_path: Path, held: Held) -> None:
    dataset = pictures(tmp_path / "pictures", 120)
    with working(db, tmp_path, buffer_bytes=24 * PICTURE_BYTES * 8 // 3 + 8, decode_threads=2) as work:
        assert work(dataset, 64).results == 120
    assert max(held.batches) == 24 // 3
    assert len(held.batches) <= 120 // 8 + 4, "they are full, but for the last of each kind and shard"


def test_a_slow_store_holds_up_the_claims(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a fast model would lease shard after shard, and hold all their results until the store has taken them."""
    leased: list[int] = []
    write = shardfile.write

    def slow(*given: Any) -> Any:
        ours = sa.select(sa.func.count()).select_from(tables.shard).where(tables.shard.c.state == states.LEASED)
        leased.append(db.query(ours)[0][0])
        time.sleep(0.2)
        return write(*given)

    monkeypatch.setattr(shardfile, "write", slow)
    done = run(db, tmp_path, 400, decode_threads=2)
    assert (done.state, done.results) == ("done", 400)
    under_way = 64 // 20 + 1  # slots, of a shard's size; another is claimed ahead
    assert len(leased) == 20
    assert max(leased) <= ticket._UNWRITTEN + under_way + 1
    assert max(leased) >= ticket._UNWRITTEN, "two are written while others are computed"


def test_a_slow_model_leaves_shards_to_other_workers(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However quickly its pictures come: what it has in hand at a job's end, others cannot help with."""
    leased: list[int] = []
    infer = stub.Stub.infer

    def slow(self: stub.Stub, batch: Sequence[Prepared]) -> list[Any]:
        ours = sa.select(sa.func.count()).select_from(tables.shard).where(tables.shard.c.state == states.LEASED)
        leased.append(db.query(ours)[0][0])
        time.sleep(0.1)
        return infer(self, batch)

    monkeypatch.setattr(stub.Stub, "infer", slow)
    assert run(db, tmp_path, 400).results == 400
    assert max(leased) <= 64 // 20 + 3, "those of 64 items, one that ends and one claimed ahead"


@pytest.mark.parametrize("where", ["feeder", "device"])
def test_a_worker_that_builds_for_long_lives_on_and_says_so(
    where: str, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a batch may take; registered late, since what a worker does is counted anew with each life."""
    doing, gave_up = set[str](), list[int]()
    load_model, register = Models._load, leases.register

    def build(moved: Callable[[], None]) -> None:
        for _ in range(40):
            time.sleep(0.1)
            moved()
            doing.update(one.doing for one in progress.workers(db))

    def load(self: Models, *given: Any, **named: Any) -> Any:
        with self._during("loading stub for torch"):
            build(self._moving)
        return load_model(self, *given, **named)

    def measure(self: Choosing, claim: leases.Claim, sample: Any) -> Any:
        build(self._moved)
        return tuning.plain(claim.spec, "cpu")

    def late(*given: Any, **named: Any) -> None:
        time.sleep(0.5)
        register(*given, **named)

    if where == "feeder":
        monkeypatch.setattr(Models, "_load", load)
    else:
        monkeypatch.setattr(Choosing, "settled", lambda *given: None)
        monkeypatch.setattr(Choosing, "measure", measure)
    monkeypatch.setattr(leases, "register", late)
    monkeypatch.setattr(os, "_exit", gave_up.append)
    done = run(db, tmp_path, 20, stall_seconds=1, lease_seconds=2)
    assert gave_up == []
    assert (done.state, done.results, done.errors, done.crashes) == ("done", 20, 0, 0)
    assert len(progress.workers(db, live_only=False)) == 1, "it was never declared dead"
    assert doing == {"", "loading stub for torch" if where == "feeder" else "measuring how stub runs fastest"}
