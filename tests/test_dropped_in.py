"""A new model family, dataset scheme, result kind, export format or runtime is one file, dropped in and picked up.

The suites of a copy of this checkout, with one new file in each folder, run over the newcomers and pass; and they find
what is wrong with broken ones.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
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


def suites(copy: Path, names: Iterable[str]) -> tuple[int, dict[str, Counter[str]]]:
    """Run the conformance suites of newcomers, for them alone.

    Returns:
        the exit status, and of each newcomer's suite how many tests had which outcome, such as "PASSED".
    """
    # How much memory an exporter needs is told by hundreds of shards, and how servers differ from a folder and a file
    # is told of our own; a newcomer's few lines need not be.
    chosen = "echo and not memory and not s3 and not postgres"
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen, "-rA", "--tb=line")
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    files = {name: NEWCOMERS[name][1] for name in names}
    command = [sys.executable, "-m", "pytest", *files.values(), *options]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=280)
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) (\S+?)::", done.stdout, re.M)
    print(done.stdout[-5000:])
    return done.returncode, {
        name: Counter(outcome for outcome, where in outcomes if where == file) for name, file in files.items()
    }


# The suites of models and runtimes import every library; the one of models runs in the next test, too.
LIGHT = ("jobs/sources/echo.py", "storage/results/echo.py", "storage/exporters/echo.py")


@pytest.mark.parametrize("names", [LIGHT, pytest.param(NEWCOMERS, marks=pytest.mark.slow)], ids=["light", "all"])
def test_one_file_is_enough(copy: Path, names: Iterable[str]) -> None:
    status, outcomes = suites(copy, names)
    assert status == 0
    for name, of_it in outcomes.items():
        assert set(of_it) == {"PASSED"}, f"{name}: {of_it}"


def test_the_suites_find_what_is_wrong(copy: Path) -> None:
    good = {name: (copy / name).read_text() for name in BROKEN}
    for name, (old, new) in BROKEN.items():
        assert old in good[name]
        (copy / name).write_text(good[name].replace(old, new))
    try:
        status, outcomes = suites(copy, BROKEN)
    finally:
        for name, text in good.items():
            (copy / name).write_text(text)
    assert status == 1
    for name, of_it in outcomes.items():
        assert of_it["FAILED"], f"nothing was found wrong with {name}: {of_it}"
        assert of_it["PASSED"], f"{name} is not what was broken: {of_it}"


def test_the_command_line_knows_the_newcomers(copy: Path, tmp_path: Path) -> None:
    from tests.flow import pictures

    pictures(tmp_path / "images", 5)
    environment = {**os.environ, "PYTHONPATH": str(copy), "IMAGEMILL_HOME": str(tmp_path / "home")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["imagemill", "annotate", str(tmp_path / "images"), "--model", "echo", "--device", "cpu", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "5 results + 0 failures = 5 of 5 planned" in done.stdout
