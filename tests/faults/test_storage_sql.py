"""Whole jobs while the database restarts, loses connections and answers, goes away, is locked or has no disk."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faultproxy import Direction, FaultProxy, _Connection, _Reset
from tests.flow import background, check_all, committed, database_url, pictures, run, run_json, wait_until, workers
from tests.invariants import rows
from tests.services import SCRIPTS, Postgres

Stack = dict[str, str]
COUNT = 160
QUICK = {"IMAGEMILL_LEASE_SECONDS": "3", "IMAGEMILL_RECONCILE_SECONDS": "0.5", "IMAGEMILL_LOG_LEVEL": "info"}


def laptop(**more: str) -> Stack:
    return {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", **QUICK, **more}


@pytest.fixture
def server() -> Iterator[Postgres]:
    """A Postgres that this test may hurt."""
    with Postgres() as made:
        yield made


@pytest.fixture
def stack(home: Path, server: Postgres, broker_url: str) -> Stack:
    """A fleet on that Postgres, its store in a folder."""
    store = (home / "store").as_uri()
    return laptop(
        IMAGEMILL_DATABASE_URL=server.new_database(), IMAGEMILL_BROKER_URL=broker_url, IMAGEMILL_STORE_URL=store
    )


def annotate(source: Path, *more: str) -> tuple[str, ...]:
    return ("annotate", str(source), "--model", "stub", "--shard-size", "8", "--device", "cpu", *more)


def proven(stack: Stack, keys: list[str]) -> dict[str, Any]:
    """The job is whole and every invariant holds; returns its status."""
    done: dict[str, Any] = run_json(stack, "status")
    assert (done["state"], done["complete"]) == ("done", True)
    assert (done["results"], done["failures"]) == (len(keys), 0)
    check_all(stack, keys)
    return done


@contextlib.contextmanager
def hurting(hurt: Callable[[], None], every_s: float) -> Iterator[list[int]]:
    """Do harm again and again from a thread; yields a list that grows with each time."""
    stop, times = threading.Event(), list[int]()

    def loop() -> None:
        while not stop.wait(every_s):
            hurt()
            times.append(1)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield times
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
def test_a_database_that_crashes_again_and_again(stack: Stack, server: Postgres, tmp_path: Path) -> None:
    keys = pictures(tmp_path / "images", COUNT)
    run(stack, "db", "upgrade")
    with workers(stack, log=tmp_path / "worker.log"):
        run(stack, *annotate(tmp_path / "images", "--detach", "--param", "delay_ms=200"))
        wait_until(lambda: committed(stack) > 0, "a first shard")
        for _ in range(4):
            server.stop("immediate")
            server.start()
            time.sleep(1.2)
        run(stack, "watch", "--quiet")
    done = proven(stack, keys)
    assert (done["errors"], done["crashes"]) == (0, 0), (tmp_path / "worker.log").read_text()[-3000:]


@pytest.mark.slow
def test_connections_ended_at_random(stack: Stack, server: Postgres, tmp_path: Path) -> None:
    keys = pictures(tmp_path / "images", COUNT)
    run(stack, "db", "upgrade")
    victim = (
        "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity "
        "WHERE application_name LIKE 'imagemill%' ORDER BY random() LIMIT 1) AS one"
    )
    with workers(stack, log=tmp_path / "worker.log"), hurting(lambda: server.execute(victim), 0.2) as times:
        run(stack, *annotate(tmp_path / "images", "--param", "delay_ms=100", "--quiet"))
    assert len(times) > 10
    done = proven(stack, keys)
    assert (done["errors"], done["crashes"]) == (0, 0), (tmp_path / "worker.log").read_text()[-3000:]


class CommitProxy(FaultProxy):
    """Loses the answer to some COMMITs: the server gets them, and the client gets a reset.

    Attributes:
        chance: share of the COMMITs.
        lost: how many answers were lost.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        # One fixed sequence beside the regular calls of a worker can pass over every shard's commit.
        self._random = random.SystemRandom()
        self.chance, self.lost = 0.0, 0
        self._doomed: set[_Connection] = set()

    async def _carry(self, data: bytes, writer: Any, connection: _Connection, way: Direction) -> None:
        if way == "up" and b"COMMIT" in data and self._random.random() < self.chance:
            self._doomed.add(connection)
        elif way == "down" and connection in self._doomed:
            self.lost += 1
            self._doomed.discard(connection)
            connection.reset()
            raise _Reset
        await super()._carry(data, writer, connection, way)


def test_commits_whose_answer_is_lost(stack: Stack, server: Postgres, tmp_path: Path) -> None:
    keys = pictures(tmp_path / "images", COUNT)
    run(stack, "db", "upgrade")
    log = tmp_path / "worker.log"
    with CommitProxy(server.port) as proxy:
        direct = stack["IMAGEMILL_DATABASE_URL"]
        through = {**stack, "IMAGEMILL_DATABASE_URL": direct.replace(f":{server.port}/", f":{proxy.port}/")}
        proxy.chance = 0.4
        with workers(through, log=log):
            run(through, *annotate(tmp_path / "images", "--param", "delay_ms=30", "--quiet"))
    assert proxy.lost > 10
    assert log.read_text().count("was committed already") >= 1, "no lost answer met the commit of a shard"
    done = proven(stack, keys)
    assert (done["errors"], done["crashes"]) == (0, 0)
    assert len(rows(direct, "SELECT * FROM job")) == 1


@pytest.mark.slow
def test_a_database_that_does_not_answer_for_a_while(stack: Stack, server: Postgres, tmp_path: Path) -> None:
    """Half-open connections: nothing comes back, and nothing says so."""
    keys = pictures(tmp_path / "images", COUNT)
    run(stack, "db", "upgrade")
    with FaultProxy(server.port) as proxy:
        direct = stack["IMAGEMILL_DATABASE_URL"]
        through = {**stack, "IMAGEMILL_DATABASE_URL": direct.replace(f":{server.port}/", f":{proxy.port}/")}
        with workers(through, log=tmp_path / "worker.log"):
            run(stack, *annotate(tmp_path / "images", "--detach", "--param", "delay_ms=200"))
            wait_until(lambda: committed(stack) > 0, "a first shard")
            proxy.blackhole()
            time.sleep(5)
            proxy.heal()
            run(stack, "watch", "--quiet")
    proven(stack, keys)


def test_a_database_away_for_three_leases(stack: Stack, server: Postgres, tmp_path: Path) -> None:
    keys = pictures(tmp_path / "images", COUNT)
    run(stack, "db", "upgrade")
    log = tmp_path / "worker.log"
    with (
        workers(stack, log=log),
        background(stack, *annotate(tmp_path / "images", "--param", "delay_ms=300", "--quiet")) as job,
    ):
        wait_until(lambda: committed(stack) > 0, "a first shard")
        server.stop("immediate")
        time.sleep(10)
        assert job.poll() is None, "whoever watches waits too"
        server.start()
        assert job.wait(timeout=90) == 0, log.read_text()[-3000:]
    done = proven(stack, keys)
    assert (done["errors"], done["crashes"]) == (0, 0), "nobody is to blame for an outage"


# ------------------------------------------------------------------------------------------------ SQLite


def integrity(home: Path) -> str:
    import sqlite3

    with contextlib.closing(sqlite3.connect(home / "imagemill.db")) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


def test_many_processes_on_one_sqlite_file(home: Path, tmp_path: Path) -> None:
    stack = laptop()
    keys = {name: pictures(tmp_path / name, 80, seed=i) for i, name in enumerate(("a", "b"))}
    run(stack, "jobs")
    stop, wrong = threading.Event(), list[str]()

    def poll(*command: str) -> None:
        while not stop.is_set():
            done = subprocess.run(["imagemill", *command], env=stack, capture_output=True, text=True)
            if done.returncode not in (0, 2) or "locked" in done.stderr or "Traceback" in done.stderr:
                wrong.append(f"{command}: {done.returncode} {done.stderr}")
            time.sleep(0.2)

    pollers = [threading.Thread(target=poll, args=words) for words in (("status",), ("jobs",), ("workers",))]
    logs = {name: tmp_path / f"{name}.log" for name in ("up", "killed", *keys)}
    with background(stack, "up", "--device", "cpu", log=logs["up"]):
        for poller in pollers:
            poller.start()
        try:
            slow = ("--param", "delay_ms=60", "--quiet")
            with background(stack, *annotate(tmp_path / "a", *slow), log=logs["killed"]) as first:
                wait_until(lambda: len(rows(database_url(stack), "SELECT * FROM shard")) > 0, "a job")
                os.killpg(first.pid, signal.SIGKILL)
            with (
                background(stack, *annotate(tmp_path / "a", *slow), log=logs["a"]) as one,
                background(stack, *annotate(tmp_path / "b", *slow), log=logs["b"]) as two,
            ):
                assert [one.wait(timeout=120), two.wait(timeout=120)] == [0, 0], logs["a"].read_text()
        finally:
            stop.set()
            for poller in pollers:
                poller.join()
    assert wrong == []
    assert not any("locked" in log.read_text() or "Traceback" in log.read_text() for log in logs.values())
    assert integrity(home) == "ok"
    found = rows(database_url(stack), "SELECT id, state, planned FROM job ORDER BY id")
    assert [(row.state, row.planned) for row in found] == [("done", 80), ("done", 80)]
    current = rows(database_url(stack), "SELECT key, uri FROM item WHERE current AND ok")
    assert len(current) == len(set(current)) == len(keys["a"]) + len(keys["b"])


@pytest.mark.slow
def test_a_sqlite_writer_killed_again_and_again(home: Path, tmp_path: Path) -> None:
    stack = laptop()
    keys = pictures(tmp_path / "images", COUNT)
    chance = random.Random(0)
    for _ in range(8):
        with background(stack, *annotate(tmp_path / "images", "--param", "delay_ms=60", "--quiet")) as process:
            time.sleep(chance.uniform(1, 7))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert integrity(home) == "ok"
    done = run_json(stack, *annotate(tmp_path / "images", "--param", "delay_ms=60"))
    assert done["complete"] is True
    check_all(stack, keys)


@pytest.mark.slow
def test_a_full_disk_under_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = pictures(tmp_path / "images", COUNT)
    home = tmp_path / "disk"
    home.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(home)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        stack = laptop(IMAGEMILL_HOME=str(home), IMAGEMILL_STORE_URL=(tmp_path / "store").as_uri())
        out = tmp_path / "out.log"
        with background(stack, *annotate(tmp_path / "images", "--param", "delay_ms=200", "--json"), log=out) as process:
            wait_until(lambda: has_items(stack), "a first shard")
            filler = fill(home)
            time.sleep(6)
            stopped = process.poll()
            filler.unlink()
            if stopped is None:
                assert process.wait(timeout=90) == 0, out.read_text()
            else:
                assert stopped == 1
                assert "no space left" in out.read_text()
        assert "Traceback" not in out.read_text()
        assert integrity(home) == "ok"
        done = run_json(stack, *annotate(tmp_path / "images", "--param", "delay_ms=200"))
        assert done["fresh"] + done["results"] >= COUNT
        check_all(stack, keys)
    finally:
        from tests.services import stop_leftovers

        stop_leftovers(home)
        subprocess.run(["umount", "-l", str(home)], check=True)


def has_items(stack: Stack) -> bool:
    from sqlalchemy.exc import DBAPIError

    with contextlib.suppress(DBAPIError):
        return Path(stack["IMAGEMILL_HOME"], "imagemill.db").exists() and committed(stack) > 0
    return False


def fill(folder: Path) -> Path:
    """Take every byte that is left."""
    path = folder / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return path
