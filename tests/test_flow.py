"""Whole jobs through the console script, on a laptop's stack and on a fleet's."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests import flow
from tests.flow import (
    background,
    check_all,
    committed,
    pictures,
    prepare,
    run,
    run_json,
    run_script,
    wait_until,
    workers,
)
from tests.invariants import rows
from tests.services import Valkey

Stack = dict[str, str]


def annotate(source: Path, *more: str) -> tuple[str, ...]:
    return ("annotate", str(source), "--model", "stub", "--shard-size", "32", "--device", "cpu", *more)


@pytest.fixture
def fast(stack: Stack) -> Stack:
    """The stack with short leases, so that a rescue takes seconds."""
    return {**stack, "IMAGEMILL_LEASE_SECONDS": "3", "IMAGEMILL_RECONCILE_SECONDS": "0.5"}


def finish(stack: Stack, source: Path, *more: str) -> dict[str, object]:
    """Annotate and wait."""
    return dict(json.loads(run_script(stack, *annotate(source, *more), "--json").stdout))


def test_every_item_is_accounted_for_and_a_second_run_does_nothing(stack: Stack, tmp_path: Path) -> None:
    """A laptop starts its own worker for each command; a fleet has one that stays."""
    keys = pictures(tmp_path / "images", 150)
    prepare(stack)
    with workers(stack) if flow.is_fleet(stack) else nullcontext():
        first = finish(stack, tmp_path / "images")
        second = finish(stack, tmp_path / "images")
    assert (first["state"], first["planned"], first["results"], first["failures"]) == ("done", 150, 150, 0)
    assert first["complete"] is True
    assert (second["state"], second["planned"], second["fresh"]) == ("done", 0, 150)
    check_all(stack, keys)


@flow.by_default("laptop")
def test_the_profile_says_where_the_time_went(stack: Stack, tmp_path: Path) -> None:
    """Three shards of ten batches of 20 ms: what the device did and what it waited for, each under its own name."""
    pictures(tmp_path / "images", 120)
    prepare(stack)
    with workers(stack):
        status = finish(stack, tmp_path / "images", "--param", "delay_ms=20", "--batch", "4", "--shard-size", "40")
    found = json.loads(run(stack, "profile", "--json").stdout)
    spent = found["seconds"]
    assert found["items"] == 120
    assert set(spent) == {"fetch", "decode", "prepare", "device", "post", "start", "idle", "gap", "write"}
    assert spent["device"] >= 30 * 0.02
    assert all(spent[name] > 0 for name in ("fetch", "decode", "prepare", "start", "write"))
    device_thread = sum(spent[name] for name in ("device", "post", "idle", "gap"))  # start began before the job
    assert device_thread <= status["finished_at"] - status["started_at"]  # type: ignore[operator]
    assert 0 < found["busy"] <= 1
    text = run(stack, "profile").stdout
    assert "120 items; the device was busy" in text
    assert all(f"\n  {name} " in text for name in spent)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["laptop", "fleet"], indirect=True)
def test_a_beat_tells_of_shards_in_hand_only(stack: Stack, tmp_path: Path) -> None:
    """However many a ticket has done before: else each beat of a long ticket writes more than the last."""
    stack = {**stack, "IMAGEMILL_LEASE_SECONDS": "3"}
    pictures(tmp_path / "images", 320)
    prepare(stack)
    with workers(stack):
        slow = ("--detach", "--param", "delay_ms=100", "--batch", "4", "--shard-size", "4")
        run(stack, *annotate(tmp_path / "images", *slow))
        wait_until(lambda: committed(stack) >= 120, "thirty shards")
        time.sleep(1)  # a beat
        ((told,),) = rows(flow.database_url(stack), "SELECT progress FROM worker WHERE state = 'live'")
        assert committed(stack) < 320
    held = told if isinstance(told, dict) else json.loads(told)  # Postgres' JSON comes parsed, SQLite's as text
    assert 0 < len(held) < 12


@flow.by_default("laptop")
def test_changed_new_and_deleted_pictures_are_told_apart(stack: Stack, tmp_path: Path) -> None:
    source = tmp_path / "images"
    keys = pictures(source, 60)
    prepare(stack)
    with workers(stack):
        finish(stack, source)
        (source / keys[3]).unlink()
        os.utime(source / keys[5], (1, 1))
        pictures(source, 62)  # two more, and the same bytes again under new times
        again = finish(stack, source)
        (source / keys[7]).unlink()
        last = finish(stack, source)
    assert again["planned"] == 62
    assert (last["planned"], last["fresh"], last["pruned"]) == (0, 61, 1)
    keys = sorted(str(p.relative_to(source)) for p in source.rglob("*.jpg"))
    check_all(stack, keys)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["laptop", "fleet"], indirect=True)
def test_a_killed_process_group_loses_and_doubles_nothing(fast: Stack, tmp_path: Path) -> None:
    source = tmp_path / "images"
    keys = pictures(source, 300)
    prepare(fast)
    run(fast, *annotate(source, "--detach", "--param", "delay_ms=100"))
    log = tmp_path / "worker.log"
    with workers(fast, log=log) as first:
        wait_until(lambda: committed(fast) > 0, "a first shard")
        kill_tree(first.pid)
    before = committed(fast)
    assert 0 < before < 300
    with workers(fast, log=log):
        done = run(fast, "watch", "latest", "--quiet")
    assert "300 results + 0 failures of 300" in done.stdout, log.read_text()[-2000:]
    check_all(fast, keys)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and every descendant, the leaves with it: nobody may say goodbye."""
    import psutil

    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=10)


@pytest.mark.slow
def test_valkey_killed_and_restarted_empty(home: Path, postgres_url: str, s3_url: str, tmp_path: Path) -> None:
    source = tmp_path / "images"
    keys = pictures(source, 300)
    with Valkey() as valkey:
        stack = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "IMAGEMILL_DATABASE_URL": postgres_url,
            "IMAGEMILL_STORE_URL": s3_url,
            "IMAGEMILL_BROKER_URL": valkey.url,
            "IMAGEMILL_TICKET_SECONDS": "2",
            "IMAGEMILL_RECONCILE_SECONDS": "0.5",
        }
        prepare(stack)
        with workers(stack, log=tmp_path / "worker.log"):
            run(stack, *annotate(source, "--detach", "--param", "delay_ms=60"))
            wait_until(lambda: committed(stack) > 0, "a first shard")
            valkey.kill()
            time.sleep(0.5)
            valkey.restart(empty=True)
            run(stack, "watch", "latest", "--quiet")
    check_all(stack, keys)


def test_ctrl_c_leaves_a_job_that_the_same_command_continues(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "images"
    keys = pictures(source, 300)
    stack = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = annotate(source, "--param", "delay_ms=40")
    log = tmp_path / "first.log"
    with background(stack, *command, log=log) as process:
        wait_until(
            lambda: (home / "imagemill.db").exists() and started(stack) and committed(stack) > 0, "a first shard"
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130, log.read_text()
    assert "the same command continues" in log.read_text()
    done = committed(stack)
    assert 0 < done < 300
    last = run_json(stack, *command)
    assert (last["id"], last["state"], last["results"]) == (1, "done", 300)
    check_all(stack, keys)


def started(stack: Stack) -> bool:
    from sqlalchemy.exc import DBAPIError

    try:
        committed(stack)
    except DBAPIError:
        return False
    return True


@flow.by_default("fleet")
def test_two_recipes_on_one_worker_are_never_mixed(stack: Stack, tmp_path: Path) -> None:
    source = tmp_path / "images"
    keys = pictures(source, 120)
    prepare(stack)
    for objects in (1, 3):
        run(stack, *annotate(source, "--detach", "--shard-size", "8", "--param", f"objects={objects}"))
    with workers(stack, log=tmp_path / "worker.log"):
        for job in ("1", "2"):
            run(stack, "watch", job, "--quiet")
    for job, objects in (("1", 1), ("2", 3)):
        rows = [json.loads(line) for line in run(stack, "results", job, "--limit", "0", "--json").stdout.splitlines()]
        assert [row["key"] for row in rows] == sorted(keys)
        assert {row["count"] for row in rows} == {objects}


@pytest.mark.slow
def test_both_stacks_give_identical_rows(home: Path, fleet_stack: Stack, tmp_path: Path) -> None:
    source = tmp_path / "images"
    pictures(source, 200)
    laptop = {k: v for k, v in fleet_stack.items() if k not in FLEET_VARIABLES}
    prepare(fleet_stack)
    finish(laptop, source)
    with workers(fleet_stack):
        finish(fleet_stack, source)
    mine, theirs = (run(s, "results", "--limit", "0", "--json").stdout.splitlines() for s in (laptop, fleet_stack))
    assert len(mine) == 200
    assert [json.loads(line) for line in mine] == [json.loads(line) for line in theirs]


FLEET_VARIABLES = ("IMAGEMILL_DATABASE_URL", "IMAGEMILL_STORE_URL", "IMAGEMILL_BROKER_URL")


@pytest.fixture
def fleet_stack(postgres_url: str, s3_url: str, broker_url: str) -> Stack:
    urls = dict(zip(FLEET_VARIABLES, (postgres_url, s3_url, broker_url), strict=True))
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **urls}
