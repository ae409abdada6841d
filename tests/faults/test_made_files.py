"""Whatever dies while files are made: every row has its file, its own attempt's, and no other stays."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import collect
from storage.database import Database
from storage.objects import Store, open_store
from storage.settings import Settings
from tests import flow
from tests.faults import support
from tests.faults.support import Stack
from tests.flow import run
from tests.invariants import rows


@pytest.fixture
def stack(home: Path) -> Stack:
    return support.laptop()


def photos(folder: Path, count: int) -> list[str]:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(folder / f"{i:03d}.png")
    return [f"{i:03d}.png" for i in range(count)]


def submitted(stack: Stack, folder: Path, count: int, side: int) -> list[str]:
    """A job of one shard that makes a file of every picture."""
    keys = photos(folder, count)
    sides = ("--param", f"width={side}", "--param", f"height={side}")
    run(stack, "transform", str(folder), "--model", "resize", *sides, "--device", "cpu", "--detach")
    return keys


def blobs(stack: Stack) -> list[str]:
    return [stat.key for stat in store_of(stack).list("jobs/") if "/blobs/" in stat.key]


def store_of(stack: Stack) -> Store:
    return open_store(flow.store_url(stack), Settings())


def prove(stack: Stack, keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The invariants hold, and still do when the collector has taken away what it may; then no orphan is left."""
    flow.check_all(stack, keys)
    run(stack, "verify", "1")
    monkeypatch.setattr(collect, "_clock", lambda store: time.time() + 1e6)
    database = Database(flow.database_url(stack))
    collect.collect(database, store_of(stack), Settings())
    database.close()
    flow.check_all(stack, keys)
    run(stack, "verify", "1")
    assert len(blobs(stack)) == len(keys)


def test_a_worker_that_dies_after_a_file_and_before_the_commit(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: in the ordinary way of a shard, and in the careful one that follows. The files left lie about unread."""
    keys = submitted(stack, tmp_path / "photos", 24, 64)
    crashing = support.crashing(support.injected(stack, "no-backoff"), tmp_path / "marks", "kept:1,before-commit:1")
    with support.worker(crashing, tmp_path / "log", "up"):
        support.wait_done(stack, 60)
    assert {mark.name for mark in (tmp_path / "marks").iterdir()} == {"kept.0", "before-commit.0"}
    assert support.crashes(stack) == 2
    assert len(blobs(stack)) > len(keys), "the attempts that died left files"
    prove(stack, keys, monkeypatch)


@pytest.mark.slow
def test_a_drain_in_the_middle_keeps_what_was_made(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt copies those files instead of making them again, and the earlier attempt's go away."""
    keys = submitted(stack, tmp_path / "photos", 60, 700)
    crashing = support.crashing(stack, tmp_path / "marks", "kept:1:STOP")
    with support.worker(crashing, tmp_path / "log", "up") as up:
        support.stopped_at(tmp_path / "marks", "kept")
        (sleeper,) = support.wait_stopped([up])
        members = support.family(up.pid)
        up.send_signal(signal.SIGTERM)
        os.kill(sleeper, signal.SIGCONT)
        support.wait_ended(members)
    (shard,) = rows(flow.database_url(stack), "SELECT state, crashes, checkpoint FROM shard")
    assert (shard.state, shard.crashes) == ("ready", 0)
    assert "partial" in shard.checkpoint
    first = set(blobs(stack))
    assert 0 < len(first) < len(keys)
    counting = support.crashing(stack, tmp_path / "made", "kept:1000:CONT")  # a signal that does nothing: a mark each
    with support.worker(counting, tmp_path / "log", "up"):
        support.wait_done(stack, 60)
    assert len(list((tmp_path / "made").iterdir())) == len(keys) - len(first)
    prove(stack, keys, monkeypatch)
    assert not first & set(blobs(stack)), "those of the attempt that was drained are gone"
