"""Nobody's own wall clock decides anything: by reading the code, and by running a worker an hour ahead or behind."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.collect import collect
from storage.database import Database
from storage.objects import open_store
from storage.settings import Settings
from tests.flow import check_all, pictures, run, run_json, wait_until, workers
from tests.invariants import rows
from tests.services import SCRIPTS
from tests.support import opened, planned_job

ROOT = Path(__file__).resolve().parents[2]
WALL_CLOCKS = {
    *("time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.strftime"),
    *("datetime.now", "datetime.utcnow", "datetime.today", "date.today"),
    *("datetime.datetime.now", "datetime.datetime.utcnow", "datetime.date.today"),
}

# Where the wall clock may be read, and why it decides nothing that could lose or double an item.
ALLOWED = {
    ("jobs/collect.py", "_clock"): "only on a disk too full to hold a mark of its own clock",
    ("storage/folder.py", "_walk"): "temporary files of writers killed a day ago; a writer needs seconds",
    ("storage/s3.py", "credentials"): "how long obstore keeps credentials before it asks again",
    ("cli.py", "list_engines"): "how old an engine is, for people",
    ("storage/exporters/__init__.py", "_provenance"): "the date written into an export, for people",
}


def readings(path: Path) -> Iterator[tuple[str, str]]:
    """(function, clock) of each call that reads a wall clock."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        inner = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else name
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in WALL_CLOCKS:
            yield inner, ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            assert not {a.name for a in node.names} & {"time", "time_ns"}, f"{path}: import time, so that readings show"
    yield from visit(tree, "")


@pytest.mark.parametrize("package", ["jobs", "workers", "storage", "cli.py"])
def test_the_wall_clock_is_read_in_the_listed_places_only(package: str) -> None:
    paths = [ROOT / package] if package.endswith(".py") else sorted((ROOT / package).rglob("*.py"))
    found = {(str(path.relative_to(ROOT)), name) for path in paths for name, _ in readings(path)}
    assert found <= set(ALLOWED), "compare the database's or the store's clock, or time.monotonic()"
    assert found == {place for place in ALLOWED if place[0].startswith(package)}, "take what is gone off the list"


_SITE = """
import os, time
_real = time.time
_shift = float(os.environ.get("SHIFT_CLOCK", "0"))
time.time = lambda: _real() + _shift
time.time_ns = lambda: int(time.time() * 1e9)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shift_s", [3600, -3600])
def test_a_worker_whose_clock_is_wrong(
    home: Path, tmp_path: Path, postgres_url: str, s3_url: str, broker_url: str, shift_s: int
) -> None:
    """A worker and its reconciler have another time than the database, the store and the other worker."""
    keys = pictures(tmp_path / "images", 96)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_SITE)
    stack = {
        **os.environ,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "IMAGEMILL_DATABASE_URL": postgres_url,
        "IMAGEMILL_STORE_URL": s3_url,
        "IMAGEMILL_BROKER_URL": broker_url,
        "IMAGEMILL_LEASE_SECONDS": "3",
        "IMAGEMILL_RECONCILE_SECONDS": "0.5",
    }
    wrong = {**stack, "PYTHONPATH": str(tmp_path / "site"), "SHIFT_CLOCK": str(shift_s)}
    run(stack, "db", "upgrade")
    with workers(stack, log=tmp_path / "right.log"), workers(wrong, log=tmp_path / "wrong.log"):
        run(stack, "annotate", str(tmp_path / "images"), "--model", "stub", "--device", "cpu", "--shard-size", "8",
            "--param", "delay_ms=250", "--detach")  # fmt: skip
        wait_until(lambda: len(owners(postgres_url, "claim")) == 2, "both workers to have claimed")
        run(wrong, "watch", "--quiet")
    done = run_json(stack, "status")
    assert (done["state"], done["complete"]) == ("done", True)
    assert (done["errors"], done["crashes"]) == (0, 0)
    assert abs(done["finished_at"] - done["created_at"]) < 300
    assert len(owners(postgres_url, "commit")) == 2
    assert run_json({**wrong, "IMAGEMILL_ORPHAN_HOURS": "0.5"}, "gc")["objects"] == 0
    check_all(stack, keys)


def owners(url: str, action: str) -> set[str]:
    """The workers that have done this."""
    return {row.worker_id for row in rows(url, "SELECT worker_id FROM event WHERE action = :action", action=action)}


@pytest.mark.parametrize("shift_s", [7200, -7200])
def test_the_collector_asks_the_store_what_time_it_is(
    tmp_path: Path, store_url: str, monkeypatch: pytest.MonkeyPatch, shift_s: int
) -> None:
    """An hour is spared: with the machine's clock two hours ahead, a young object must stay all the same."""
    import time

    settings = Settings(orphan_hours=1)
    store = open_store(store_url)
    with opened(f"sqlite:///{tmp_path / 'index.db'}") as db:
        job = planned_job(db)
        key = f"jobs/{job.id}/0000000/a1-deadbeef/items.parquet"
        store.put(key, b"written a moment ago")
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + shift_s)
        assert collect(db, store, settings).objects == 0
        assert store.get(key) == b"written a moment ago"
        assert [stat.key for stat in store.list()] == [key], "the mark is taken away"


def test_the_database_clock_is_the_servers(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    import sqlalchemy as sa

    from storage.database import db_now

    database = Database(database_url)
    try:
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 3600)
        assert abs(float(database.query(sa.select(db_now()))[0][0]) - real()) < 60
    finally:
        database.close()
