"""How the whole-flow tests run imagemill: as a user does, in processes, with an environment for a stack."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.settings import Settings
from tests.forker import Forker
from tests.invariants import Keys, check, rows
from tests.times import soon


def run(stack: Mapping[str, str], *arguments: str, code: int | None = 0, timeout_s: float = 120) -> Any:
    """Run a command of imagemill to its end; asserts the exit code and that no traceback was shown.

    In a process of its own that was forked, so that it costs no imports; with a PYTHONPATH, as the script is.
    """
    if "PYTHONPATH" in stack or not _one_at_a_time.acquire(blocking=False):
        return run_script(stack, *arguments, code=code, timeout_s=timeout_s)
    try:
        done = forker().run(stack, arguments, timeout_s)
    finally:
        _one_at_a_time.release()
    return _as_expected(done, code)


def run_script(stack: Mapping[str, str], *arguments: str, code: int | None = 0, timeout_s: float = 120) -> Any:
    """The same by the console script, as a user starts it."""
    done = subprocess.run(
        ["imagemill", *arguments], env=dict(stack), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    return _as_expected(done, code)


@cache
def forker() -> Forker:
    """The parent of this test process's commands; it ends with us."""
    made = Forker()
    atexit.register(made.close)
    return made


_one_at_a_time = threading.Lock()


def _as_expected(done: subprocess.CompletedProcess[str], code: int | None) -> subprocess.CompletedProcess[str]:
    assert "Traceback" not in done.stderr, done.stderr
    assert code is None or done.returncode == code, f"{done.args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_json(stack: Mapping[str, str], *arguments: str, **more: Any) -> Any:
    """Run a command with --json and parse what it prints."""
    return json.loads(run(stack, *arguments, "--json", **more).stdout)


@contextmanager
def background(stack: Mapping[str, str], *arguments: str, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, killed at the end if it still runs."""
    output = log.open("ab") if log else subprocess.DEVNULL
    process = subprocess.Popen(
        ["imagemill", *arguments], env=dict(stack), stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def workers(stack: Mapping[str, str], *, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The stack's workers: `worker` on a fleet, `up` on a laptop."""
    with background(stack, "worker" if is_fleet(stack) else "up", "--device", "cpu", log=log) as process:
        yield process


def by_default(one: str) -> pytest.MarkDecorator:
    """One of the stacks in the default run, the other only among the slow tests."""
    both = [pytest.param(name, marks=[] if name == one else [pytest.mark.slow]) for name in ("laptop", "fleet")]
    return pytest.mark.parametrize("stack", both, indirect=True)


def is_fleet(stack: Mapping[str, str]) -> bool:
    """Whether everything is named by URL."""
    return "IMAGEMILL_BROKER_URL" in stack


def pictures(folder: Path, count: int, *, size: tuple[int, int] = (64, 48), seed: int = 0) -> list[str]:
    """Write small noisy JPEGs; returns their keys."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    keys = []
    for i in range(count):
        pixels = np.full((size[1], size[0], 3), rng.integers(0, 255, 3), np.uint8)
        pixels[: size[1] // 2] //= 2
        key = f"{i % 7}/picture-{i:05d}.jpg"
        (folder / key).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / key, quality=85)
        keys.append(key)
    return keys


def database_url(stack: Mapping[str, str]) -> str:
    """Where the stack's index is."""
    return stack.get("IMAGEMILL_DATABASE_URL") or f"sqlite:///{stack['IMAGEMILL_HOME']}/imagemill.db"


def store_url(stack: Mapping[str, str]) -> str:
    """Where the stack's objects are."""
    return stack.get("IMAGEMILL_STORE_URL") or (Path(stack["IMAGEMILL_HOME"]) / "store").as_uri()


def check_all(stack: Mapping[str, str], keys: Keys, *, ended: bool = True) -> None:
    """Every invariant over the stack's index and store."""
    settings = Settings(s3_endpoint_url=stack.get("IMAGEMILL_S3_ENDPOINT_URL", ""))
    check(database_url(stack), store_url(stack), settings, keys=keys, ended=ended)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> float:
    """Wait for a condition; returns how long it took. Beside other tests it waits longer."""
    started = time.monotonic()
    while not condition():
        assert soon(time.monotonic() - started, timeout_s), f"waited {timeout_s} s and more for: {what}"
        time.sleep(0.05)
    return time.monotonic() - started


def committed(stack: Mapping[str, str]) -> int:
    """Items committed so far."""
    return int(rows(database_url(stack), "SELECT coalesce(sum(results + failures), 0) AS n FROM shard")[0].n)


def prepare(stack: Mapping[str, str]) -> None:
    """Make the tables where the stack does not make them itself."""
    if is_fleet(stack):
        run(stack, "db", "upgrade")
