"""What the benchmarks share: child processes that print figures, interleaved rounds, medians, this machine in words."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
LEFT_OUT = 3  # exit code of a child that cannot run here; its last line says why

Figures = dict[str, float]

PACKAGES = (
    "torch",
    "torchvision",
    "ultralytics-opencv-headless",
    "transformers",
    "timm",
    "onnxruntime",
    "openvino",
    "opencv-python-headless",
    "pillow",
    "numpy",
)


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 itself; else bf16 is slower than fp32 and needs no hours of measuring."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True
    return "bf16" in flags


class LeftOut(Exception):
    """A measure that cannot be taken here; its text is one line that says why."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is measured.

    Attributes:
        workload: what is computed, a name of workloads.WORKLOADS.
        role: which side of the ratios it stands on: forward, decode, prepare, imagemill, or a peer's name.
        name: tells the measures of one role and workload apart.
        precision: "fp32" or "bf16" of the forward pass, "" where there is none.
        take: measures once; its figures, of which "rate" is items a second.
    """

    workload: str
    role: str
    name: str
    precision: str
    take: Callable[[], Figures]

    @property
    def label(self) -> str:
        """Its name for people; one of a kind."""
        return f"{self.workload}: {self.role} {self.name}".rstrip()


@dataclass(frozen=True, slots=True)
class Taken:
    """A measure with the medians of its rounds, and the rates of all of them in the order of the rounds."""

    measure: Measure
    figures: Mapping[str, float]
    rates: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Median items a second."""
        return self.figures["rate"]


def rounds(
    measures: Sequence[Measure],
    count: int,
    say: Callable[[str], None],
    done: Callable[[list[Taken], list[tuple[str, str]]], None] = lambda taken, without: None,
) -> None:
    """Take every measure once a round, so that what disturbs the machine disturbs all alike.

    Args:
        measures: one that stands there several times is taken as often, and the round's figures are the means.
        done: told after each round the medians so far, and (label, reason) of each measure that could not be taken;
            one is not asked twice.
    """
    different = {measure.label: measure for measure in measures}
    found: dict[str, list[Figures]] = {label: [] for label in different}
    without: dict[str, str] = {}
    for number in range(count):
        say(f"round {number + 1} of {count}, load {os.getloadavg()[0]:.1f}")
        here: dict[str, list[Figures]] = {label: [] for label in different}
        for measure in measures:
            if measure.label in without:
                continue
            try:
                figures = measure.take()
            except LeftOut as reason:
                without[measure.label] = str(reason)
                say(f"  {measure.label:<58} left out: {reason}")
                continue
            here[measure.label].append(figures)
            say(f"  {measure.label:<58} {figures['rate']:9.1f} items/s")
        taken = []
        for label, measure in different.items():
            if label not in without:
                found[label].append(means(here[label]))
                taken.append(Taken(measure, medians(found[label]), tuple(f["rate"] for f in found[label])))
        done(taken, list(without.items()))


def means(found: Sequence[Mapping[str, float]]) -> Figures:
    """The mean of each figure, of rates by their times. All of `found`, at least one, have the same names."""
    mean = {"rate": statistics.harmonic_mean}
    return {name: mean.get(name, statistics.fmean)([figures[name] for figures in found]) for name in found[0]}


def medians(found: Sequence[Mapping[str, float]]) -> Figures:
    """The median of each figure. All of `found`, at least one, have the same names."""
    return {name: statistics.median(figures[name] for figures in found) for name in found[0]}


def child(script: str, *arguments: str, python: str = sys.executable, env: Mapping[str, str] | None = None) -> Figures:
    """Run a script of this folder in a process of its own; the figures it printed as JSON on its last line.

    Args:
        script: path below benchmarks/.
        env: variables for it alone, over `environment()`.

    Raises:
        LeftOut: it cannot run here, or it failed.
    """
    command = [python, "-P", str(HERE / script), *arguments]
    done = subprocess.run(command, env={**environment(), **(env or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        text = done.stdout if done.returncode == LEFT_OUT else done.stderr
        raise LeftOut(last_line(text) or f"{script} ended with {done.returncode}")
    figures: Figures = json.loads(last_line(done.stdout))
    return figures


def environment() -> dict[str, str]:
    """Of every child: this checkout importable, no network asked, and nobody's choice of threads but its own."""
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    quiet = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**env, **quiet, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def last_line(text: str) -> str:
    """The last line that is not empty, or ''."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def leave_out(reason: str) -> NoReturn:
    """End a child that cannot run here."""
    print(reason)
    sys.exit(LEFT_OUT)


def need(*modules: str) -> None:
    """End a child that lacks a library."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            leave_out(f"{name} is not installed")


def answer(**figures: float) -> None:
    """A child's last line."""
    print(json.dumps(figures))


def rate_of(work: Callable[[], int], seconds: float, warm: int = 2) -> float:
    """Items a second of `work`, which returns how many it did, over so many seconds after `warm` calls."""
    for _ in range(warm):
        work()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        count += work()
    return count / (time.perf_counter() - started)


class Pace:
    """Items a second after the first batch, which pays for the start."""

    def __init__(self, first: int) -> None:
        self._first, self._count, self._started = first, 0, 0.0

    def add(self, count: int) -> None:
        """So many more are done."""
        self._count += count
        if self._count >= self._first and not self._started:
            self._first, self._started = self._count, time.perf_counter()

    @property
    def rate(self) -> float:
        """Up to now. Raises SystemExit when there was only one batch."""
        if self._count <= self._first:
            leave_out("more pictures are needed than one batch")
        return (self._count - self._first) / (time.perf_counter() - self._started)


def machine() -> list[str]:
    """Date, processor, memory, versions and load, a line each."""
    return [
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        f"{_processor()}, {os.cpu_count()} cores, {_memory_gb():.0f} GB, {platform.system()} {platform.release()}",
        f"Python {platform.python_version()}, " + ", ".join(versions()),
        f"load {' '.join(f'{value:.1f}' for value in os.getloadavg())} (1, 5 and 15 minutes)",
    ]


def versions() -> list[str]:
    """Name and version of each library that is installed."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
