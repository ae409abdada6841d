"""What a worker's process leaves in the temporary folder: nothing, once another one starts on its machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests import flow
from workers import fleet

_HOLD = """
from workers.fleet import own_folder
print(own_folder(), flush=True)
input()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_folders_of_the_dead_are_deleted_and_others_left(temporary: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    theirs = Path(holder.stdout.readline().strip())
    assert theirs.parent == temporary
    (theirs / "drain").touch()
    (temporary / "imagemill-worker-file").touch()
    (temporary / "another").mkdir()
    mine = fleet.own_folder()
    assert theirs.is_dir(), "its process lives"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    last = fleet.own_folder()
    left = {entry.name for entry in temporary.iterdir()}
    assert left == {mine.name, last.name, "imagemill-worker-file", "another"}


@pytest.mark.parametrize("stack", ["laptop"], indirect=True)
def test_a_killed_worker_leaves_nothing_in_the_temporary_folder(stack: dict[str, str], tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    stack = {**stack, "TMPDIR": str(temporary)}

    def theirs(without: str = "") -> list[Path]:
        """Folders in which Celery's pool keeps files, so that its worker has come up."""
        return [path.parent for path in temporary.glob("*/*") if path.parent.name != without]

    with flow.background(stack, "up", "--device", "cpu") as up:
        flow.wait_until(lambda: bool(theirs()), "a worker")
        (first,) = theirs()
        (worker,) = [one for one in psutil.Process(up.pid).children() if "workers.fleet" in " ".join(one.cmdline())]
        worker.kill()
        flow.wait_until(lambda: bool(theirs(first.name)), "the next worker")
        assert list(temporary.iterdir()) == theirs(first.name)
        flow.wait_until(lambda: bool(flow.run_json(stack, "workers")), "its child")
        up.terminate()
        up.wait(timeout=60)
    assert list(temporary.iterdir()) == []
