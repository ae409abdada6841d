"""imagemill as its users run it: a worker that stays, jobs through the console script, and what each job tells."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import common
from benchmarks.common import Figures, LeftOut

PROGRAM = Path(sys.executable).parent / "imagemill"
COMMANDS = {"detections": "annotate", "embedding": "embed", "image": "transform"}
_START_S = 60
_FOLLOWS_S = 4


class Mill:
    """`imagemill up` in a home folder of its own, on one kind of device.

    Args:
        settings: of imagemill, such as gpu_decode="true".
    """

    def __init__(self, home: Path, device: str = "cpu", **settings: str) -> None:
        self._env = _environment(home) | {f"IMAGEMILL_{name.upper()}": value for name, value in settings.items()}
        self._log = (home.parent / "imagemill.log").open("w")
        command = [str(PROGRAM), "up", "--device", device]
        self._up = subprocess.Popen(command, env=self._env, stdout=self._log, stderr=subprocess.STDOUT)
        self.pid = self._up.pid
        self._has_runtimes = "--runtime" in self.output("annotate", "--help")
        until = time.monotonic() + _START_S
        while not json.loads(self.output("workers", "--json")):
            if time.monotonic() > until or self._up.poll() is not None:
                self.close()
                raise SystemExit(f"imagemill up did not start; see {self._log.name}")
            time.sleep(0.2)

    def output(self, *arguments: str) -> str:
        """What the console script prints. Raises LeftOut with its last line when it fails."""
        done = subprocess.run([PROGRAM, *arguments], env=self._env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LeftOut(common.last_line(done.stderr) or common.last_line(done.stdout))
        return done.stdout

    def job(self, kind: str, dataset: Path | str, model: str, runtime: str = "torch", **options: Any) -> Figures:
        """Run a job to its end.

        Args:
            options: of the command, such as precision="bf16" and shard_size=64.

        Returns:
            rate: items a second, from the first claim to the end, the last write and commit among it.
            idle: share of that time, 0..1, in which the device waited between its first and last batch, if it had any.
            gap: seconds in which it waited from one shard to the next, for each second that it worked.
            claim_s: from the job's row to its first claim.
            whole_s: from the job's row to its end.
            command_s: from the start of the console script to its end.
        """
        if runtime != "torch" and not self._has_runtimes:
            raise LeftOut("imagemill has no --runtime")
        chosen = {**options, "runtime": runtime} if self._has_runtimes else options
        started = time.perf_counter()
        text = self.output(COMMANDS[kind], str(dataset), "--model", model, "--force", "--json", *_flags(chosen))
        command_s = time.perf_counter() - started
        return {**self._figures(json.loads(text)), "command_s": command_s}

    def wait(self, followed: subprocess.Popen[bytes]) -> Figures:
        """The figures of the newest job, once `followed`, an `imagemill watch`, has seen its end."""
        followed.wait()
        return self._figures(json.loads(self.output("status", "latest", "--json")))

    def _figures(self, status: dict[str, Any]) -> Figures:
        if status["failures"] or status["results"] != status["planned"]:
            raise LeftOut(f"only {status['results']} of {status['planned']} items have a result")
        spent = json.loads(self.output("profile", str(status["id"]), "--json"))["seconds"]
        device, gap = spent.get("device", 0.0), spent.get("gap", 0.0)
        waited = spent.get("idle", 0.0) + gap
        seconds = status["finished_at"] - status["started_at"]
        return {
            "rate": status["results"] / seconds,
            "idle": waited / max(1e-9, waited + device + spent.get("post", 0.0)),
            "gap": gap / max(1e-9, device),
            "claim_s": status["started_at"] - status["created_at"],
            "whole_s": status["finished_at"] - status["created_at"],
        }

    def close(self) -> None:
        """Stop the worker and wait for its end."""
        self._up.send_signal(signal.SIGTERM)
        try:
            self._up.wait(60)
        except subprocess.TimeoutExpired:
            self._up.kill()
            self._up.wait()
        self._log.close()

    def __enter__(self) -> Mill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def planned_before(home: Path, kind: str, dataset: Path | str, model: str, **options: Any) -> Figures:
    """A job of a home of its own that is planned to its end before there is a worker: what the worker does alone.

    Raises:
        CalledProcessError: the job could not be made.
    """
    shutil.rmtree(home, ignore_errors=True)
    command = [str(PROGRAM), COMMANDS[kind], str(dataset), "--model", model, "--detach", "--quiet", *_flags(options)]
    subprocess.run(command, env=_environment(home), check=True, stdout=subprocess.DEVNULL)
    # Who follows the job starts before it does: to start takes a core for two seconds.
    follow = [str(PROGRAM), "watch", "latest", "--quiet"]
    followed = subprocess.Popen(follow, env=_environment(home), stdout=subprocess.DEVNULL)
    time.sleep(_FOLLOWS_S)
    try:
        with Mill(home) as mill:
            return mill.wait(followed)
    finally:
        followed.kill()
        followed.wait()


def _environment(home: Path) -> dict[str, str]:
    return {**common.environment(), "IMAGEMILL_HOME": str(home)}


def _flags(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
