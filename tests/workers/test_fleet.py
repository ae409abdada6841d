"""What a worker's process leaves behind: nothing, once another one starts on its machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

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
