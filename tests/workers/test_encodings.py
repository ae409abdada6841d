"""Encoded images: what was made last is at hand before it is stored, and a slow store is waited for, not left out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import Unavailable
from storage.objects import Store, open_store
from storage.settings import load
from workers import encodings
from workers.encodings import Keeper, StoredEncodings, Written


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri(), load())


class Slow(StoredEncodings):
    """A store that takes its time, or is away."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, 1_000_000)
        self.gate = threading.Event()

    def put(self, name: str, data: bytes) -> None:
        self.gate.wait()
        time.sleep(0.002)
        super().put(name, data)


@pytest.fixture
def slow(store: Store) -> Iterator[tuple[Slow, Keeper]]:
    under = Slow(store)
    keeper = Keeper(under)
    yield under, keeper
    under.gate.set()
    keeper.close()


def test_what_waits_to_be_stored_is_found(slow: tuple[Slow, Keeper]) -> None:
    under, keeper = slow
    keeper.put("sam/one", b"maps")
    assert under.get("sam/one") is None
    assert keeper.get("sam/one") == keeper.recent("sam/one") == b"maps"
    assert keeper.get("sam/other") is None
    assert keeper.recent("sam/other") is None


def test_everything_is_stored_however_many_wait(slow: tuple[Slow, Keeper]) -> None:
    under, keeper = slow
    threading.Timer(0.2, under.gate.set).start()
    names = [f"sam/{number:03d}" for number in range(100)]
    for name in names:
        keeper.put(name, name.encode())
    keeper.close()
    assert [under.get(name) for name in names] == [name.encode() for name in names]


def test_a_store_that_is_away_is_not_waited_for_for_ever(
    slow: tuple[Slow, Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all that follow, not for each: a batch of many would look like a device that hangs."""
    under, keeper = slow
    monkeypatch.setattr(encodings, "_PATIENCE_S", 1.0)
    started = time.monotonic()
    for number in range(30):
        keeper.put(f"sam/{number}", b"maps")
    assert 1 <= time.monotonic() - started < 10
    assert keeper.recent("sam/29") == b"maps", "it is remembered though it will not be stored"
    under.gate.set()
    keeper.close()
    assert under.get("sam/15") == b"maps"
    assert under.get("sam/29") is None


def test_only_so_much_is_remembered(slow: tuple[Slow, Keeper], monkeypatch: pytest.MonkeyPatch) -> None:
    under, keeper = slow
    under.gate.set()
    monkeypatch.setattr(encodings, "_RECENT_BYTES", 1000)
    for _ in range(3):
        for number in range(30):
            keeper.put(f"sam/{number}", bytes(100))
    remembered = [number for number in range(30) if keeper.recent(f"sam/{number}") is not None]
    assert remembered == list(range(20, 30))


def test_an_error_of_the_store_is_no_error_of_the_job(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise Unavailable("the store is away")

    monkeypatch.setattr(store, "get", away)
    monkeypatch.setattr(store, "put", away)
    kept = StoredEncodings(store, 1000)
    kept.put("sam/one", b"maps")
    assert kept.get("sam/one") is None


def test_the_oldest_make_room(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "_LOOK_EVERY", 1)
    kept = StoredEncodings(store, 1000)
    for number in range(40):
        kept.put(f"sam/{number:02d}", bytes(100))
        time.sleep(0.002)
    there = [number for number in range(40) if kept.get(f"sam/{number:02d}") is not None]
    assert 8 <= len(there) <= 10
    assert there == list(range(40 - len(there), 40))


def test_a_model_that_is_timed_looks_nothing_up(slow: tuple[Slow, Keeper]) -> None:
    under, keeper = slow
    under.gate.set()
    timed = Written(keeper)
    timed.put("sam/one", b"maps")
    assert timed.get("sam/one") is None
    assert timed.recent("sam/one") is None
    assert keeper.get("sam/one") == b"maps"
