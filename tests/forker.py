"""Runs commands of the console script in fresh processes that are quick to make.

The parent has imported what `imagemill` does, and forks: the child is then what the console script is, without paying
its imports each time. The script itself is run by tests.flow.run_script.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# It gets one line of JSON a command, and answers with the child's id, then with its exit code.
_PARENT = """
import gc, json, os, sys, traceback
import cli
import click, celery, sqlalchemy, alembic.command, pydantic_settings, pyarrow.parquet, boto3, obstore, psycopg, redis
import jobs.plan, jobs.queue, jobs.reconcile, storage.s3, storage.folder, storage.migrate, workers.submit
import workers.runjob, workers.local, workers.models.yolo, workers.models.stub, storage.exporters.coco
gc.freeze()
for line in sys.stdin:
    call = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.clear()
        os.environ.update(call["env"])
        os.chdir(call["cwd"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(call["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["imagemill", *call["arguments"]]
        code = 1
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forker:
    """One parent; runs one command at a time."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="im-forker-"))
        # Not with a test's own home: what still runs in that is killed at the test's end.
        env = {name: value for name, value in os.environ.items() if not name.startswith(("IMAGEMILL_", "AWS_"))}
        command = [sys.executable, "-P", "-c", _PARENT]
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )

    def run(
        self, stack: Mapping[str, str], arguments: Sequence[str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """One command to its end. Raises TimeoutExpired when that takes too long; it is killed then."""
        assert self._process.stdin is not None
        call = {"env": dict(stack), "cwd": os.getcwd(), "folder": str(self._folder), "arguments": arguments}
        self._process.stdin.write(json.dumps(call).encode() + b"\n")
        child = self._answer(60)
        assert child is not None, "the forking parent does not answer"
        code = self._answer(timeout_s)
        if code is None:
            os.kill(child, signal.SIGKILL)
            self._answer(60)
            raise subprocess.TimeoutExpired(["imagemill", *arguments], timeout_s)
        out, err = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
        return subprocess.CompletedProcess(["imagemill", *arguments], code, out, err)

    def _answer(self, timeout_s: float) -> int | None:
        """The next number the parent says; None when it says none for so long."""
        assert self._process.stdout is not None
        until, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            read = self._process.stdout.read(1)
            assert read, "the forking parent has ended"
            line += read
        return int(line)

    def close(self) -> None:
        """End the parent."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)
        shutil.rmtree(self._folder, ignore_errors=True)
