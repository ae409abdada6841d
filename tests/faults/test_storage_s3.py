"""Whole jobs while S3 is slow, wrong, full, frozen or gone: nothing is lost, nothing doubled, nobody is blamed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faultproxy import HttpFaultProxy
from tests.flow import check_all, committed, pictures, run, run_json, store_url, wait_until
from tests.invariants import rows
from tests.services import SCRIPTS, SeaweedFS, frozen

Stack = dict[str, str]
COUNT = 120


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[HttpFaultProxy]:
    with HttpFaultProxy(seaweed.port) as made:
        yield made


@pytest.fixture
def stack(home: Path, s3_url: str, proxy: HttpFaultProxy) -> Stack:
    """A laptop whose results go to S3 through the proxy, with short leases."""
    return on_s3(s3_url, proxy)


def on_s3(url: str, proxy: HttpFaultProxy) -> Stack:
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    quick = {"IMAGEMILL_LEASE_SECONDS": "3", "IMAGEMILL_RECONCILE_SECONDS": "0.5", "IMAGEMILL_LOG_LEVEL": "info"}
    return {**os.environ, "PATH": path, "IMAGEMILL_STORE_URL": url, "IMAGEMILL_S3_ENDPOINT_URL": proxy.url, **quick}


def annotate(source: object, *more: str) -> tuple[str, ...]:
    return ("annotate", str(source), "--model", "stub", "--shard-size", "16", "--device", "cpu", *more)


def uploaded(seaweed: SeaweedFS, folder: Path, count: int = COUNT) -> tuple[str, list[str]]:
    """Pictures in a bucket: (dataset URL, keys)."""
    url, keys = seaweed.new_prefix(), pictures(folder, count)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = seaweed.client()
    for key in keys:
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=(folder / key).read_bytes())
    return url, keys


class Job:
    """An `annotate` that runs while the test breaks things."""

    def __init__(self, stack: Stack, *arguments: str, folder: Path) -> None:
        self.stack, self.out, self.err = stack, folder / "out.json", folder / "err.log"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                ["imagemill", *arguments, "--json"], env=stack, stdout=out, stderr=err, start_new_session=True
            )

    def wait_for_items(self, count: int = 1) -> None:
        """Until something is committed."""
        database = Path(self.stack["IMAGEMILL_HOME"]) / "imagemill.db"
        with contextlib.suppress(AssertionError):
            wait_until(lambda: database.exists() and has_tables(self.stack), "tables", 60)
        wait_until(lambda: committed(self.stack) >= count or self.process.poll() is not None, f"{count} items", 90)

    def end(self, timeout_s: float = 120) -> dict[str, Any]:
        """What it printed; it must end well."""
        try:
            code = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end: {self.logs()}") from None
        assert code == 0, self.err.read_text()
        assert "Traceback" not in self.err.read_text()
        return dict(json.loads(self.out.read_text()))

    def logs(self) -> str:
        """What it and its worker have logged."""
        worker = Path(self.stack["IMAGEMILL_HOME"]) / "logs" / "worker.log"
        return self.err.read_text() + (worker.read_text(errors="replace") if worker.exists() else "")

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def has_tables(stack: Stack) -> bool:
    from sqlalchemy.exc import DBAPIError

    try:
        committed(stack)
    except DBAPIError:
        return False
    return True


@contextlib.contextmanager
def running(stack: Stack, *arguments: str, folder: Path) -> Iterator[Job]:
    job = Job(stack, *arguments, folder=folder)
    try:
        yield job
    finally:
        job.close()


def proven(stack: Stack, done: dict[str, Any], keys: list[str], *, failures: int = 0) -> None:
    """The job is whole, nobody was blamed, and every invariant holds."""
    assert done["complete"] is True
    assert (done["results"], done["failures"]) == (len(keys) - failures, failures)
    assert (done["errors"], done["crashes"]) == (0, 0)
    assert run_json(stack, "status")["complete"] is True
    check_all(stack, keys)


@pytest.mark.slow
@pytest.mark.parametrize(("action", "chance"), [("slowdown", 0.1), ("slowdown", 0.5), ("error", 0.1), ("error", 0.5)])
def test_refusals_at_random(
    stack: Stack, proxy: HttpFaultProxy, seaweed: SeaweedFS, tmp_path: Path, action: Any, chance: float
) -> None:
    source, keys = uploaded(seaweed, tmp_path / "images")
    # What workers read and write; what the command itself meets while it plans is the next test's.
    rules = [proxy.add(action, path=path, chance=chance) for path in (".jpg", "/jobs/1/0")]
    with running(stack, *annotate(source), folder=tmp_path) as job:
        job.wait_for_items(COUNT)
        proxy.heal()
        done = job.end()
    assert sum(rule.hits for rule in rules) >= 5
    proven(stack, done, keys)


@pytest.mark.slow
def test_refusals_while_planning(stack: Stack, proxy: HttpFaultProxy, seaweed: SeaweedFS, tmp_path: Path) -> None:
    source, keys = uploaded(seaweed, tmp_path / "images", 64)
    rule = proxy.add("slowdown", chance=0.1)
    done = run_json(stack, *annotate(source))
    proxy.heal()
    assert rule.hits > 0
    proven(stack, done, keys)


@pytest.mark.parametrize("images_too", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_outage_blames_nobody(
    stack: Stack, proxy: HttpFaultProxy, seaweed: SeaweedFS, tmp_path: Path, images_too: bool
) -> None:
    source: object = tmp_path / "images"
    keys = [] if images_too else pictures(tmp_path / "images", COUNT)
    if images_too:
        source, keys = uploaded(seaweed, tmp_path / "images")
    with running(stack, *annotate(source, "--param", "delay_ms=100"), folder=tmp_path) as job:
        job.wait_for_items()
        proxy.refuse()
        proxy.reset()
        time.sleep(12)
        assert job.process.poll() is None, job.logs()
        before = committed(stack)
        assert before < COUNT
        proxy.heal()
        done = job.end()
    proven(stack, done, keys)


def test_lost_answers_to_puts(stack: Stack, proxy: HttpFaultProxy, seaweed: SeaweedFS, tmp_path: Path) -> None:
    keys = pictures(tmp_path / "images", COUNT)
    rule = proxy.add("lost", "PUT", chance=0.2)
    done = run_json(stack, *annotate(tmp_path / "images", "--shard-size", "4"))
    proxy.heal()
    assert rule.hits >= 3
    proven(stack, done, keys)
    bucket, _, prefix = store_url(stack).removeprefix("s3://").partition("/")
    listed = seaweed.client().list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    results = [entry["Key"] for entry in listed if entry["Key"].endswith("items.parquet")]
    assert len(results) == len(set(results)) >= 30


def test_bodies_cut_short(stack: Stack, proxy: HttpFaultProxy, seaweed: SeaweedFS, tmp_path: Path) -> None:
    source, keys = uploaded(seaweed, tmp_path / "images")
    rule = proxy.add("truncate", "GET", ".jpg", chance=0.1)
    manifests = proxy.add("truncate", "GET", "manifests", times=2)
    done = run_json(stack, *annotate(source))
    proxy.heal()
    assert rule.hits >= 3
    assert manifests.hits == 2
    proven(stack, done, keys)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_server_that_hangs_or_dies(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    from storage import settings

    with SeaweedFS() as server, HttpFaultProxy(server.port) as proxy:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        settings.load.cache_clear()
        stack = on_s3(server.new_prefix(), proxy)
        source, keys = uploaded(server, tmp_path / "images")
        with running(stack, *annotate(source, "--param", "delay_ms=100"), folder=tmp_path) as job:
            job.wait_for_items()
            if how == "frozen":
                with frozen(server):
                    time.sleep(10)
            else:
                server.kill()
                time.sleep(1)
                server.start()
            done = job.end()
        proven(stack, done, keys)


@pytest.mark.parametrize("broken", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_objects_that_never_come_are_rows(
    stack: Stack, proxy: HttpFaultProxy, seaweed: SeaweedFS, tmp_path: Path, broken: int
) -> None:
    source, keys = uploaded(seaweed, tmp_path / "images", 64)
    bad = keys[-broken:]
    for key in bad:
        proxy.add("error", "GET", key)
    done = run_json(stack, *annotate(source))
    assert (done["state"], done["errors"], done["crashes"]) == ("done with failures", 0, 0)
    url = f"sqlite:///{stack['IMAGEMILL_HOME']}/imagemill.db"
    failed = rows(url, "SELECT key, stage, reason, retry FROM item WHERE NOT ok")
    assert {(r.key, r.stage, r.reason, bool(r.retry)) for r in failed} == {
        (k, "fetch", "unavailable", True) for k in bad
    }
    proxy.heal()
    proven(stack, done, keys, failures=broken)
    again = run_json(stack, *annotate(source))
    assert (again["planned"], again["results"], again["fresh"]) == (broken, broken, 64 - broken)
    check_all(stack, keys)


_UPLOAD = """
import sys
from pathlib import Path
from storage import settings
from storage.objects import open_store
found = settings.load()
open_store(found.store, found).put_file("weights/0/big.pt", Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_an_upload_that_was_broken_off_is_aborted(
    stack: Stack, proxy: HttpFaultProxy, seaweed: SeaweedFS, tmp_path: Path
) -> None:
    (tmp_path / "big.pt").write_bytes(os.urandom(1 << 20) * 40)
    bucket, _, prefix = store_url(stack).removeprefix("s3://").partition("/")
    client = seaweed.client()

    def uploads() -> list[Any]:
        return client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])  # type: ignore[no-any-return]

    proxy.rate = 4_000_000
    command = [sys.executable, "-c", _UPLOAD, str(tmp_path / "big.pt")]
    with subprocess.Popen(command, env={**stack, "PYTHONPATH": str(Path(__file__).parents[2])}) as process:
        wait_until(lambda: bool(uploads()), "the upload to begin", 30)
        process.kill()
    proxy.heal()
    assert len(uploads()) == 1
    aged = {**stack, "IMAGEMILL_ORPHAN_HOURS": "0", "IMAGEMILL_LEASE_SECONDS": "0.5"}
    assert run_json(aged, "gc")["uploads"] == 0  # young: somebody may still be at it
    time.sleep(6)
    assert run_json(aged, "gc", "--dry-run")["uploads"] == 1
    assert len(uploads()) == 1
    assert run_json(aged, "gc")["uploads"] == 1
    assert uploads() == []


@pytest.mark.slow
def test_the_collector_takes_only_what_nobody_needs(
    stack: Stack, proxy: HttpFaultProxy, seaweed: SeaweedFS, tmp_path: Path
) -> None:
    keys = pictures(tmp_path / "images", COUNT)
    done = run_json(stack, *annotate(tmp_path / "images"))
    bucket, _, prefix = store_url(stack).removeprefix("s3://").partition("/")
    orphan = f"{prefix}/jobs/1/0000000/a1-deadbeef/items.parquet"
    seaweed.client().put_object(Bucket=bucket, Key=orphan, Body=b"of an attempt that died")
    aged = {**stack, "IMAGEMILL_ORPHAN_HOURS": "0", "IMAGEMILL_LEASE_SECONDS": "0.5"}
    time.sleep(7)
    assert run_json(aged, "gc")["objects"] == 1
    assert run_json(aged, "gc")["objects"] == 0
    proven(stack, done, keys)


@pytest.mark.slow
def test_the_collector_beside_a_running_job(stack: Stack, tmp_path: Path) -> None:
    """It runs all the time with no age to spare, while shards are written and committed slowly."""
    keys = pictures(tmp_path / "images", COUNT)
    aged = {**stack, "IMAGEMILL_ORPHAN_HOURS": "0", "IMAGEMILL_LEASE_SECONDS": "0.5"}
    with running(stack, *annotate(tmp_path / "images", "--param", "delay_ms=300"), folder=tmp_path) as job:
        job.wait_for_items()
        while job.process.poll() is None:
            run(aged, "gc")
        done = job.end()
    proven(stack, done, keys)


# ------------------------------------------------------------------------------------------------ a full disk


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A small disk of its own, where the tests may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take every byte that is left."""
    path = folder / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return path


@pytest.mark.slow
def test_a_full_disk_under_the_store(home: Path, tmp_path: Path) -> None:
    keys = pictures(tmp_path / "images", COUNT)
    with disk(tmp_path / "disk", "4m") as folder:
        quick = {"IMAGEMILL_LEASE_SECONDS": "3", "IMAGEMILL_RECONCILE_SECONDS": "0.5", "IMAGEMILL_LOG_LEVEL": "info"}
        stack = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", **quick}
        stack["IMAGEMILL_STORE_URL"] = (folder / "store").as_uri()
        (folder / "store").mkdir()
        filler = fill(folder)
        command = annotate(tmp_path / "images", "--param", "delay_ms=150")
        refused = run(stack, *command, code=1)
        assert "no space left" in refused.stderr
        assert "Traceback" not in refused.stderr
        filler.unlink()
        with running(stack, *command, folder=tmp_path) as job:
            job.wait_for_items()
            filler = fill(folder)
            time.sleep(6)
            assert job.process.poll() is None
            assert "no space left" in job.logs()
            filler.unlink()
            done = job.end()
        proven(stack, done, keys)
