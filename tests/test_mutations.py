"""Thousands of damaged and hostile pictures: each decodes or fails with a known reason, and a job loses none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests import flow, mutations
from tests.invariants import rows
from tests.services import SCRIPTS

SEED = 20_260_511
REASONS = {"empty", "too-many-bytes", "too-many-pixels", "unknown-format", "truncated", "corrupt"}
MAX_PIXELS = 20_000_000
PATIENCE_S = 60  # for one file, beside other tests
MARK = "@@@ "
# Decodes what a list names, in order, and says of each what came out and how long it took.
DECODE_ALL = f"""
import faulthandler, json, logging, os, re, sys, time
from pathlib import Path
from storage.errors import ItemFailed
from workers import images

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

class Kept(logging.Handler):
    def emit(self, record):
        logged.append(record.msg)

logged = []
logging.getLogger().addHandler(Kept())
limits = images.Limits(5_000_000, {MAX_PIXELS})
import cv2
from PIL import AvifImagePlugin, TiffImagePlugin, WebPImagePlugin
start = peak()  # once the libraries are loaded
for path in map(Path, sys.stdin.read().splitlines()):
    data = path.read_bytes()
    print(json.dumps({{"name": path.name}}), flush=True)
    os.write(2, ("\\n{MARK}" + path.name + "\\n").encode())
    logged.clear()
    faulthandler.dump_traceback_later({PATIENCE_S}, exit=True)
    began = time.perf_counter()
    try:
        picture = images.decode(data, limits)
        height, width, channels = picture.pixels.shape
        good = (picture.width, picture.height, channels, str(picture.pixels.dtype)) == (width, height, 3, "uint8")
        said = "decoded" if good and width * height <= {MAX_PIXELS} else "nonsense"
    except ItemFailed as error:
        said = error.reason if error.stage == "decode" and not error.retry else "nonsense"
    except BaseException as error:
        said = "raised " + repr(error)
    took = time.perf_counter() - began
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({{"said": said, "seconds": took, "peak": peak() - start, "logged": logged}}), flush=True)
"""
# What images.py admits to be written: lines of C libraries about damaged JPEG and TIFF files, and of Python's nothing
# but this.
MAY_WRITE = (b"\xff\xd8\xff", b"II", b"MM")
MAY_LOG: set[str] = set()


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def written(folder: Path, count: int, seed: int = SEED) -> list[Path]:
    """The mutated files in a folder."""
    folder.mkdir()
    paths = []
    for name, data in mutations.generate(count, seed):
        paths.append(folder / name)
        paths[-1].write_bytes(data)
    return paths


def decode_all(paths: list[Path]) -> list[dict[str, Any]]:
    """What each file became in a process that decodes them all, and what that wrote to stderr about it."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", DECODE_ALL],
        input="\n".join(map(str, paths)),
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=280,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"code {done.returncode} at {lines[-1:]}\n{done.stderr[-2000:]}"
    wrote = dict(part.split("\n", 1) for part in done.stderr.split(f"\n{MARK}")[1:])
    found = [{**name, **said, "wrote": wrote[name["name"]]} for name, said in zip(lines[::2], lines[1::2], strict=True)]
    assert [outcome["name"] for outcome in found] == [path.name for path in paths]
    return found


def test_the_same_seed_gives_the_same_files_and_any_file_by_its_number() -> None:
    files = list(mutations.generate(300, 5))
    assert files == list(mutations.generate(300, 5))
    assert files != list(mutations.generate(300, 6))
    assert mutations.one(123, 5) == files[123]
    assert len({name for name, _ in files}) == 300
    assert {name.split("-")[1] for name, _ in files} == {name.split("-")[0].lower() for name in mutations.seeds()}


@LINUX
def test_seeds_are_valid_and_nothing_is_written_about_them(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in sorted(mutations.seeds())]
    for path in paths:
        path.write_bytes(mutations.seeds()[path.name])
    found = decode_all(paths)
    assert {outcome["name"] for outcome in found if outcome["said"] != "decoded"} == {"TIFF-float"}
    assert [outcome["wrote"] for outcome in found if outcome["wrote"].strip() or outcome["logged"]] == []


@LINUX
def test_every_mutated_file_decodes_or_fails_with_a_known_reason(tmp_path: Path) -> None:
    paths = written(tmp_path / "files", 600)
    found = decode_all(paths)
    said = Counter(outcome["said"] for outcome in found)
    assert set(said) <= {"decoded", *REASONS}, [o for o in found if o["said"] not in {"decoded", *REASONS}]
    assert min(said[reason] for reason in ("decoded", *REASONS - {"too-many-bytes"})) > 0, "the files are too tame"
    assert max(outcome["seconds"] for outcome in found) < PATIENCE_S
    assert max(outcome["peak"] for outcome in found) < 700e6
    assert {message for outcome in found for message in outcome["logged"]} <= MAY_LOG
    loud = [path for path, outcome in zip(paths, found, strict=True) if outcome["wrote"].strip()]
    assert [path.name for path in loud if not path.read_bytes().startswith(MAY_WRITE)] == []


@LINUX
@pytest.mark.parametrize("end", ["under", "over", "huge"])
def test_bombs_cost_little(end: str, tmp_path: Path) -> None:
    """One process decodes all of a sort: the peak after each is that of the costliest so far."""
    paths = []
    for name, data in sorted(mutations.bombs().items()):
        if name.endswith(end):
            paths.append(tmp_path / name)
            paths[-1].write_bytes(data)
    assert len(paths) > 2
    for outcome in decode_all(paths):
        if end == "under":
            assert outcome["said"] == "decoded", outcome
        elif outcome["name"] == "AVIF-huge":
            assert outcome["said"] in ("corrupt", "too-many-pixels"), outcome  # libavif itself refuses such a size
        else:
            assert outcome["said"] == "too-many-pixels", outcome
        assert outcome["seconds"] < PATIENCE_S, outcome
        assert outcome["peak"] < (700e6 if end == "under" else 60e6), outcome


@pytest.mark.parametrize("untrusted", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_job_over_mutated_files_has_one_row_for_each(
    untrusted: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEMILL_UNTRUSTED", untrusted)
    paths = written(tmp_path / "files", 300)
    report, _ = annotated(home, paths)
    assert report["planned"] == report["results"] + report["failures"] == 300
    assert min(report["results"], report["failures"]) > 50
    assert workers_of(home) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LINUX
@pytest.mark.parametrize("untrusted", ["false", "true"])
def test_ten_thousand_mutated_files_restart_no_worker(
    untrusted: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEMILL_UNTRUSTED", untrusted)
    paths = written(tmp_path / "files", 10_000)
    report, peak = annotated(home, paths)
    log = (home / "logs" / "worker.log").read_text(errors="replace")
    print(
        f"\n10000 files, untrusted {untrusted}: {report['results']} results and {report['failures']} failures in "
        f"{report['seconds']:.0f} s, {workers_of(home)} worker process, peak {peak / 1e6:.0f} MB, {len(log)} B of log"
    )
    assert report["planned"] == report["results"] + report["failures"] == 10_000
    assert workers_of(home) == 1
    assert peak < 2.5e9


def annotated(home: Path, paths: list[Path]) -> tuple[dict[str, Any], int]:
    """The report of a job over a folder, checked against what is stored, and the peak memory of its processes."""
    stack = {
        **os.environ,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "IMAGEMILL_MAX_IMAGE_PIXELS": str(MAX_PIXELS),
    }
    command = ["imagemill", "annotate", str(paths[0].parent), "--model", "stub", "--device", "cpu"]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, "--max-failures", "1", "--json"], env=stack, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with watched(process.pid) as peak:
        out, errors = process.communicate(timeout=1700)
    assert b"Traceback" not in errors, errors.decode(errors="replace")
    report = {**json.loads(out), "seconds": time.monotonic() - started}
    assert report["complete"] is True, report
    flow.check_all(stack, [path.name for path in paths])
    url = flow.database_url(stack)
    assert {row.reason for row in rows(url, "SELECT DISTINCT reason FROM item WHERE ok = 0")} <= REASONS
    return report, max(peak, default=0)


def workers_of(home: Path) -> int:
    """Worker processes that ever registered: more than one means that one was replaced."""
    return int(rows(f"sqlite:///{home / 'imagemill.db'}", "SELECT count(*) AS n FROM worker")[0].n)


@contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """The largest resident size so far of the process and its descendants, each by itself."""
    import psutil

    found, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            with suppress(psutil.Error):
                family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
                for process in family:
                    with suppress(psutil.Error, OSError):
                        found[0] = max(found[0], process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
