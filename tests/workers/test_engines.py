"""Engines are built once for the whole fleet, never half, whatever dies while building; damage is noticed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.errors import Unavailable
from storage.objects import Store, open_store
from storage.settings import load
from tests.times import soon
from workers import engines, onnxgraph
from workers.engines import Engines, Pace
from workers.runtimes import NotRunnable, inductor

ABOUT = {"network": "two", "shapes": "1x3x8x8"}
QUICK = Pace(renew=0.02, dead=0.4, patience=20, look=0.02)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri(), load())


def machine(store: Store, folder: Path, limit_bytes: int = engines.LIMIT_BYTES, pace: Pace = QUICK) -> Engines:
    return Engines(
        store, folder, {"weights": "w"}, onnxgraph.export, inductor.compile, limit_bytes=limit_bytes, pace=pace
    )


def writes(data: bytes, calls: list[bytes] | None = None) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        (calls if calls is not None else []).append(data)
        path.write_bytes(data)

    return build


def never(path: Path) -> None:
    raise AssertionError("it is there already")


def test_one_machine_builds_and_the_others_fetch(store_url: str, tmp_path: Path) -> None:
    store = open_store(store_url, load())
    first = machine(store, tmp_path / "one").get(ABOUT, "two.onnx", writes(b"graph"))
    assert (first.name, first.read_bytes()) == ("two.onnx", b"graph")
    second = machine(store, tmp_path / "two").get(ABOUT, "two.onnx", never)
    assert second.read_bytes() == b"graph"
    assert second != first
    assert machine(store, tmp_path / "two").get(ABOUT, "two.onnx", never) == second
    (entry,) = engines.entries(store)
    assert (entry.name, entry.about, entry.size, entry.digest) == ("two.onnx", ABOUT, 5, engines.digest_of(ABOUT))
    assert engines.remove(store, [entry.digest, "0" * 64]) == 1
    assert engines.entries(store) == []
    assert list(store.list(engines.FOLDER)) == []


@pytest.mark.parametrize("change", [{"network": "three"}, {"shapes": "2x3x8x8"}, {"versions": "torch-3"}])
def test_everything_that_is_said_of_it_names_it(change: dict[str, str], store: Store, tmp_path: Path) -> None:
    here = machine(store, tmp_path / "one")
    one = here.get(ABOUT, "a", writes(b"one"))
    other = here.get({**ABOUT, **change}, "a", writes(b"other"))
    assert (one.read_bytes(), other.read_bytes()) == (b"one", b"other")


def test_a_fleet_that_starts_at_once_builds_once(store: Store, tmp_path: Path) -> None:
    calls: list[bytes] = []

    def slow(path: Path) -> None:
        time.sleep(0.6)  # longer than what makes a builder that says nothing dead
        writes(b"graph", calls)(path)

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(machine(store, tmp_path / "0").get, ABOUT, "a", slow)]
        time.sleep(0.2)
        waiting += [pool.submit(machine(store, tmp_path / str(i)).get, ABOUT, "a", slow) for i in range(1, 8)]
        paths = [future.result() for future in waiting]
    assert len(calls) == 1
    assert {path.read_bytes() for path in paths} == {b"graph"}


def test_two_that_build_at_once_both_leave_whole_files(store: Store, tmp_path: Path) -> None:
    barrier = threading.Barrier(2)

    def together(data: bytes) -> Callable[[Path], None]:
        def build(path: Path) -> None:
            barrier.wait(10)
            path.write_bytes(data)

        return build

    both = [machine(store, tmp_path / str(i), pace=Pace(look=0.01, renew=60, patience=0)) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: both[i].get(ABOUT, "a", together(b"%d" % i * 1000)), range(2)))
    fetched = machine(store, tmp_path / "three").get(ABOUT, "a", never).read_bytes()
    assert fetched in (b"0" * 1000, b"1" * 1000)


def test_a_builder_that_is_killed_stops_nobody(store: Store, tmp_path: Path) -> None:
    """The killed one has announced itself and written half a file."""
    code = f"""
import time
from pathlib import Path
from storage.objects import open_store
from storage.settings import load
from workers.engines import Engines, Pace
def build(path):
    path.write_bytes(b"half")
    print("building", flush=True)
    time.sleep(60)
store = open_store({store.url!r}, load())
here = Engines(store, Path({str(tmp_path / "shared")!r}), {{}}, print, print, pace=Pace(0.02, 0.4, 20, 0.02))
here.get({ABOUT!r}, "a", build)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == b"building\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [stat.key for stat in store.list(engines.FOLDER)] == [f"engines/{engines.digest_of(ABOUT)}/building"]
    started = time.monotonic()
    # The same machine's folder, where the half file lies.
    assert machine(store, tmp_path / "shared").get(ABOUT, "a", writes(b"whole")).read_bytes() == b"whole"
    took_s = time.monotonic() - started
    assert took_s > 0.3
    assert soon(took_s, 5)
    assert machine(store, tmp_path / "other").get(ABOUT, "a", never).read_bytes() == b"whole"


def test_who_waits_shows_that_it_lives_and_loses_patience(store: Store, tmp_path: Path) -> None:
    moved: list[float] = []
    stop = threading.Event()

    def hangs() -> None:
        count = 0
        while not stop.wait(0.02):
            store.put(f"engines/{engines.digest_of(ABOUT)}/building", b"alive %d" % count)
            count += 1

    thread = threading.Thread(target=hangs)
    thread.start()
    try:
        time.sleep(0.1)
        waiter = Engines(
            store,
            tmp_path / "one",
            {},
            onnxgraph.export,
            inductor.compile,
            lambda: moved.append(0),
            pace=Pace(renew=9, dead=9, patience=0.5, look=0.05),
        )
        assert waiter.get(ABOUT, "a", writes(b"mine")).read_bytes() == b"mine"
    finally:
        stop.set()
        thread.join()
    assert len(moved) >= 5


def test_who_builds_shows_that_it_lives(store: Store, tmp_path: Path) -> None:
    moved: list[float] = []
    here = Engines(store, tmp_path / "one", {}, onnxgraph.export, inductor.compile, lambda: moved.append(0), pace=QUICK)

    def slow(path: Path) -> None:
        time.sleep(0.3)
        path.write_bytes(b"x")

    here.get(ABOUT, "a", slow)
    assert len(moved) >= 5


def test_a_build_that_fails_leaves_nothing_and_the_next_tries_again(store: Store, tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise NotRunnable("no")

    with pytest.raises(NotRunnable):
        machine(store, tmp_path / "one").get(ABOUT, "a", fails)
    assert list(store.list(engines.FOLDER)) == []
    assert [p for p in (tmp_path / "one").rglob("*") if p.is_file()] == []
    assert machine(store, tmp_path / "one").get(ABOUT, "a", writes(b"whole")).read_bytes() == b"whole"


def test_what_did_not_reach_the_store_is_not_named_there(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_off(*args: object) -> None:
        raise Unavailable("the connection broke")

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_file", breaks_off)
        assert machine(store, tmp_path / "one").get(ABOUT, "a", writes(b"graph")).read_bytes() == b"graph"
    assert engines.entries(store) == []
    assert machine(store, tmp_path / "two").get(ABOUT, "a", writes(b"graph")).read_bytes() == b"graph"
    assert len(engines.entries(store)) == 1


def test_damage_on_the_machine_is_fetched_again(store: Store, tmp_path: Path) -> None:
    path = machine(store, tmp_path / "one").get(ABOUT, "a", writes(b"graph"))
    path.write_bytes(b"grapX")
    assert machine(store, tmp_path / "one").get(ABOUT, "a", never).read_bytes() == b"graph"


def test_damage_in_the_store_is_built_again(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine(store, tmp_path / "one").get(ABOUT, "a", writes(b"graph"))
    (entry,) = engines.entries(store)
    key = f"engines/{entry.digest}/{entry.sha256}"
    store.put(key, b"grapX")
    with caplog.at_level(logging.WARNING):
        assert machine(store, tmp_path / "two").get(ABOUT, "a", writes(b"again")).read_bytes() == b"again"
    assert "damaged" in caplog.text
    assert machine(store, tmp_path / "three").get(ABOUT, "a", never).read_bytes() == b"again"
    store.delete([f"engines/{entry.digest}/{engines.entries(store)[0].sha256}"])
    assert machine(store, tmp_path / "four").get(ABOUT, "a", writes(b"anew")).read_bytes() == b"anew"
    store.put(f"engines/{entry.digest}/engine.json", b"{nonsense")
    assert engines.entries(store) == []
    assert machine(store, tmp_path / "five").get(ABOUT, "a", writes(b"new")).read_bytes() == b"new"


def test_without_the_store_a_machine_builds_for_itself(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*args: object, **kwargs: object) -> None:
        raise Unavailable("the store does not answer")

    for name in ("get", "put", "put_file", "get_file", "list", "delete"):
        monkeypatch.setattr(store, name, away)
    with caplog.at_level(logging.WARNING):
        path = machine(store, tmp_path / "one").get(ABOUT, "a", writes(b"graph"))
    assert path.read_bytes() == b"graph"
    assert "builds for itself" in caplog.text
    assert machine(store, tmp_path / "one").get(ABOUT, "a", never) == path


def test_the_machines_folder_keeps_its_limit_and_the_latest_used(store: Store, tmp_path: Path) -> None:
    here = machine(store, tmp_path / "one", limit_bytes=350)  # each is 100 bytes and the 64 of its sha256
    for i, name in enumerate("abcb"):
        path = here.get({"network": name}, name, writes(name.encode() * 100))
        os.utime(path.parent, (1000 + i, 1000 + i))
    assert sorted(p.name for p in (tmp_path / "one").rglob("?")) == ["b", "c"]
    here.get({"network": "d"}, "d", writes(b"d" * 100))
    assert sorted(p.name for p in (tmp_path / "one").rglob("?")) == ["b", "d"]
    big = here.get({"network": "e"}, "e", writes(b"e" * 1000))
    assert big.exists(), "the one that was asked for stays, however large"
