"""A new model family, dataset scheme, result kind, export format or runtime is one file, dropped in and picked up.

The suites of a copy of this checkout, with one new file in each folder, run over the newcomers and pass; and they find
what is wrong with broken ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FAMILY = '''"""Knows a pretended detector that finds the whole picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from storage.results.detections import Result
from workers.models import Card, Prepared

REQUIRES = ()
LABELS = ("picture",)


@dataclass(frozen=True, slots=True)
class Params:
    """It has none."""


CARDS = (Card("echo", "echo", "detections", Params, licence="AGPL-3.0-or-later", memory_gb=0.0),)


def example_weights(folder):
    """None are needed."""


def claims(path):
    return False


def describe(path=None):
    return LABELS


def load(card, params, weights, site):
    return Echo()


class Echo:
    def prepare(self, image, item):
        return Prepared("any", None, image.nbytes, image.shape[:2])

    def infer(self, batch):
        found = []
        for item in batch:
            height, width = item.meta
            boxes, ones = np.float32([[0, 0, width, height]]), np.ones(1, np.float32)
            found.append(Result(boxes, ones, np.zeros(1, np.int32), LABELS))
        return found

    def close(self):
        pass
'''

SOURCE = '''"""Knows datasets whose URI says how many images they have: echo:FOLDER?3."""

from __future__ import annotations

from jobs.sources import ImageRef
from storage.errors import BadInput


def example(folder):
    return f"echo:{folder}?3"


def claims(uri):
    return uri.startswith("echo:")


def canonical(uri):
    _count(uri)
    return uri


def refs(uri, settings):
    for i in range(_count(uri)):
        yield ImageRef(f"{i}.png", f"file:///{i}.png", f"mtime:{i}+1")


def _count(uri):
    text = uri.rpartition("?")[2]
    if not text.isdecimal():
        raise BadInput(f"expected echo:FOLDER?COUNT, but got {uri!r}")
    return int(text[:3])
'''

KIND = '''"""A number for each image."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from storage.results import Summary

SCHEMA = pa.schema([pa.field("number", pa.int64())])


@dataclass(frozen=True, slots=True)
class Result:
    number: int


def example(n):
    return Result(n)


def columns(results):
    return {"number": pa.array([None if r is None else r.number for r in results], pa.int64())}


def results(table):
    return [None if n is None else Result(n) for n in table.column("number").to_pylist()]


def summary(result):
    return Summary(result.number)
'''

RUNTIME = '''"""Runs a network in PyTorch, as it is."""

from __future__ import annotations

from workers.runtimes import torch

BUILDS = False


def installed():
    return torch.installed()


def open(network, device, precision, *more, **named):
    return torch.open(network, device, precision)
'''

EXPORTER = '''"""One line an item."""

from __future__ import annotations

import contextlib
import json

KINDS = frozenset({"detections"})
OPTIONS = {}


def example_read(folder):
    first, *rows = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    keys = [row["key"] for row in rows if row["ok"]]
    labels = [(row["key"], label) for row in rows for label in row["labels"]]
    return keys, [row["key"] for row in rows if not row["ok"]], labels, first


@contextlib.contextmanager
def writer(output, labels, provenance, options):
    path = output.scratch / "items.jsonl"
    with path.open("w") as file:
        file.write(json.dumps(dict(provenance)) + "\\n")
        yield Lines(file)
    output.put_file("items.jsonl", path)


class Lines:
    def __init__(self, file):
        self.file, self.notes = file, []

    def append(self, outcome):
        labels = list(outcome.result.labels) if outcome.result else []
        row = {"key": outcome.key, "ok": outcome.failure is None, "labels": labels}
        self.file.write(json.dumps(row) + "\\n")
'''

NEWCOMERS = {
    "workers/models/echo.py": (FAMILY, "tests/workers/models/test_conformance.py"),
    "jobs/sources/echo.py": (SOURCE, "tests/jobs/sources/test_conformance.py"),
    "storage/results/echo.py": (KIND, "tests/storage/results/test_conformance.py"),
    "storage/exporters/echo.py": (EXPORTER, "tests/storage/exporters/test_conformance.py"),
    "workers/runtimes/echo.py": (RUNTIME, "tests/workers/test_runtimes.py"),
}
BROKEN = {
    "workers/models/echo.py": ("return found", "return found[:1]"),
    "jobs/sources/echo.py": ('{i}.png", f"file', 'same.png", f"file'),
    "storage/results/echo.py": ("Result(n) for n in", "Result(n + 1) for n in"),
    "storage/exporters/echo.py": ("list(outcome.result.labels)", "list(outcome.result.labels[1:])"),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout with one new file in each folder of plug-ins."""
    target = tmp_path_factory.mktemp("checkout") / "imagemill"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, target, ignore=left_out)
    for name, (text, _) in NEWCOMERS.items():
        (target / name).write_text(text)
    return target


def suite(copy: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Run the conformance suite of a newcomer, for it alone."""
    # How much memory an exporter needs is told by hundreds of shards; a newcomer's few lines need not be.
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-k", "echo and not memory", "-rA")
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", NEWCOMERS[name][1], *options]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.parametrize("name", NEWCOMERS)
def test_one_file_is_enough(copy: Path, name: str) -> None:
    done = suite(copy, name)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("PASSED") >= 1, done.stdout[-3000:]


@pytest.mark.parametrize("name", BROKEN)
def test_the_suite_finds_what_is_wrong(copy: Path, name: str) -> None:
    good = (copy / name).read_text()
    old, new = BROKEN[name]
    assert old in good
    (copy / name).write_text(good.replace(old, new))
    try:
        done = suite(copy, name)
    finally:
        (copy / name).write_text(good)
    assert done.returncode == 1, done.stdout[-3000:]
    assert "FAILED" in done.stdout


def test_the_command_line_knows_the_newcomers(copy: Path, tmp_path: Path) -> None:
    from tests.flow import pictures

    pictures(tmp_path / "images", 5)
    environment = {**os.environ, "PYTHONPATH": str(copy), "IMAGEMILL_HOME": str(tmp_path / "home")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["imagemill", "annotate", str(tmp_path / "images"), "--model", "echo", "--device", "cpu", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "5 results + 0 failures = 5 of 5 planned" in done.stdout
