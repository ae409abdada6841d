"""Files that were made are put while their shard is worked on: bounded in bytes, under the attempt's own prefix."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storage import objects, shardfile
from storage.errors import Misconfigured, Unavailable
from storage.objects import Store
from storage.results import image
from storage.shardfile import Outcome
from tests.services import wait_until
from tests.support import outcome
from workers import blobs
from workers.blobs import Blobs, Kept
from workers.inhand import Run

A, B = "jobs/1/0000000/a1-aaaa/", "jobs/1/0000000/a2-bbbb/"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return objects.open_store((tmp_path / "store").as_uri())


def run_at(prefix: str) -> Run:
    claim: Any = SimpleNamespace(shard_id=7, items=100)
    loaded: Any = None
    return Run(claim, loaded, [], prefix)


def made(i: int, nbytes: int = 1000) -> image.Result:
    return image.made(bytes([i]) * nbytes, "png", 8, 8, {"seed": i})


def never() -> bool:
    return False


def keys(store: Store) -> list[str]:
    return [stat.key for stat in store.list("")]


def test_no_more_bytes_wait_than_there_is_room_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device thread stops when the store is slow, and goes on when a file is put."""
    put, go = store.put, threading.Semaphore(0)
    monkeypatch.setattr(store, "put", lambda key, data: (go.acquire(), put(key, data)))
    keeping, run = Blobs(store, 3500), run_at(A)
    handed: list[int] = []
    done: list[Kept] = []

    def device() -> None:
        for i in range(6):
            keeping.put(run, made(i), never, done.append)
            handed.append(i)

    thread = threading.Thread(target=device, daemon=True)
    thread.start()
    for finished in range(4):
        wait_until(lambda: len(handed) == min(3 + finished, 6), "the device thread to hand over what fits", 5)  # noqa: B023
        thread.join(0.05)
        assert len(handed) == min(3 + finished, 6)
        go.release()
        wait_until(lambda: len(done) == finished + 1, "a file to be put", 5)  # noqa: B023
    for _ in range(2):
        go.release()
    wait_until(lambda: len(done) == 6, "all files to be put", 5)
    results = sorted((kept.result for kept in done), key=lambda result: result.meta["seed"])
    assert [result.data for result in results] == [None] * 6
    assert results == [made(i) for i in range(6)]
    assert sorted(result.blob for result in results) == keys(store)
    assert all(key.startswith(f"{A}blobs/") for key in keys(store))
    keeping.close()


def test_a_file_larger_than_the_room_goes_alone(store: Store) -> None:
    keeping = Blobs(store, 10)
    done: list[Kept] = []
    for i in range(3):
        keeping.put(run_at(A), made(i), never, done.append)
    wait_until(lambda: len(done) == 3, "all files to be put", 5)
    assert len(keys(store)) == 3
    keeping.close()


def test_a_store_that_is_away_for_a_moment_costs_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put, answers = store.put, iter([Unavailable("away"), Unavailable("away"), None, None])

    def sometimes(key: str, data: bytes) -> None:
        if error := next(answers):
            raise error
        put(key, data)

    monkeypatch.setattr(store, "put", sometimes)
    monkeypatch.setattr(blobs, "_PAUSE_S", 0.01)
    keeping = Blobs(store, 1000)
    assert keeping.put_now(run_at(A), made(1), never).result == made(1)
    assert keeping.put_now(run_at(A), made(2), never).result == made(2)
    assert len(keys(store)) == 2
    keeping.close()


def test_a_store_that_stays_away_gives_the_item_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without blame, and at once when the worker has to stop; what waiting cannot mend is said."""
    tries: list[str] = []
    error: list[Exception] = [Unavailable("away")]

    def refuse(key: str, data: bytes) -> None:
        tries.append(key)
        raise error[0]

    monkeypatch.setattr(store, "put", refuse)
    monkeypatch.setattr(blobs, "_PAUSE_S", 0.01)
    monkeypatch.setattr(blobs, "_PATIENCE_S", 0.05)
    keeping = Blobs(store, 1000)
    assert keeping.put_now(run_at(A), made(1), never) == Kept(None, "")
    assert len(tries) > 1
    tries.clear()
    assert keeping.put_now(run_at(A), made(1), lambda: True) == Kept(None, "")
    assert tries == [], "it was away just now, and there is no time"
    error[0] = Misconfigured("no right to write")
    assert keeping.put_now(run_at(A), made(1), never) == Kept(None, "a file could not be put: no right to write")
    done: list[Kept] = []
    error[0] = RuntimeError("odd")
    keeping.put(run_at(A), made(1), never, done.append)
    wait_until(lambda: bool(done), "the item to come back whatever happens", 5)
    assert done == [Kept(None, "a file could not be put: RuntimeError: odd")]
    keeping.close()


def partial(store: Store) -> tuple[str, list[Outcome]]:
    """What a drained attempt left: its object's key, and the outcomes as they are read from it."""
    found = [outcome(i, f"{i}", result=shardfile.put_blob(store, A, made(i))) for i in range(5)]
    found.append(outcome(5, "5", failed=True))
    key = shardfile.write(store, f"{A}try-partial/", "image", found, {}, A).key
    return key, shardfile.read(store, key)[0]


def test_what_an_earlier_attempt_made_is_taken_over(store: Store) -> None:
    """As files of one's own: the earlier attempt's may then go away. A damaged one is made again."""
    key, done = partial(store)
    store.delete([done[1].result.blob])
    store.put(done[2].result.blob, b"other")
    keeping, run = Blobs(store, 1000), run_at(B)
    moved: list[int] = []
    mine = keeping.take_over(run, key, done, never, lambda: moved.append(1))
    assert [o.position for o in mine] == [0, 3, 4, 5]
    assert len(moved) == 5
    store.delete([name for name in keys(store) if name.startswith(A)])
    written = shardfile.write(store, f"{B}try/", "image", mine, {}, B)
    back, _ = shardfile.read(store, written.key)
    data = [o.result.data for o in shardfile.filled(store, written.key, back) if o.result]
    assert data == [made(i).data for i in (0, 3, 4)]
    keeping.close()


@pytest.mark.parametrize("name", ["get", "put"])
def test_a_store_that_is_away_leaves_what_was_made_to_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    key, done = partial(store)

    def away(*arguments: Any) -> Any:
        raise Unavailable("away")

    keeping = Blobs(store, 1000)
    with monkeypatch.context() as changed:
        changed.setattr(store, name, away)
        changed.setattr(store, "stat", away)
        with pytest.raises(Unavailable, match="away"):
            keeping.take_over(run_at(B), key, done, never, lambda: None)
    with pytest.raises(Unavailable, match="has to stop"):
        keeping.take_over(run_at(B), key, done, lambda: True, lambda: None)
    assert len(keeping.take_over(run_at(B), key, done, never, lambda: None)) == 6
    keeping.close()
