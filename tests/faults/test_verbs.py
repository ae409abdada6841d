"""Cancel, pause, resume, retry, submit, verify, repair and gc while workers run, at every moment they may come."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from jobs import lifecycle
from storage.database import Database
from storage.objects import Store, open_store
from storage.settings import Settings
from tests import flow, invariants
from tests.faults import support
from tests.faults.support import Stack
from tests.flow import run, run_json
from tests.services import Postgres, SeaweedFS, Valkey

BATCH_S = 0.05


@dataclass
class Mill:
    """A fleet with one worker that all tests of this file share; each has a folder of pictures of its own."""

    stack: Stack
    folder: Path
    keys: dict[str, list[str]] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)  # shards whose objects a test took away

    def pictures(self, name: str, count: int) -> Path:
        """A new dataset."""
        folder = self.folder / name
        self.keys[support.dataset(folder)] = flow.pictures(folder, count, seed=len(self.keys))
        return folder

    def submit(self, source: Path, *more: str) -> int:
        """Submit a job; returns its number."""
        delay = f"delay_ms={BATCH_S * 1000:g}"
        command = support.annotate(source, "--param", delay, "--detach", *more)
        return int(run_json(self.stack, *command)["id"])

    def wait(self, job_id: int) -> Any:
        """Wait for a job's end; returns its row."""
        support.wait_for(self.stack, "SELECT finished_at IS NOT NULL FROM job WHERE id = :id", "its end", id=job_id)
        return self.job(job_id)

    def job(self, job_id: int) -> Any:
        """A job's row."""
        return support.sql(self.stack, "SELECT * FROM job WHERE id = :id", id=job_id)[0]

    def shards(self, job_id: int) -> list[Any]:
        """A job's shards."""
        return support.sql(self.stack, "SELECT * FROM shard WHERE job_id = :id ORDER BY number", id=job_id)

    def store(self) -> Store:
        """The store, to take things away from."""
        settings = Settings(s3_endpoint_url=self.stack["IMAGEMILL_S3_ENDPOINT_URL"])
        return open_store(flow.store_url(self.stack), settings)

    def execute(self, statement: str, **values: Any) -> None:
        """Change the database behind imagemill's back."""
        engine = sa.create_engine(flow.database_url(self.stack).replace("postgresql://", "postgresql+psycopg://"))
        with engine.begin() as connection:
            connection.execute(sa.text(statement), values)
        engine.dispose()

    def prove(self) -> None:
        """Every invariant over all jobs so far, and that cancel and pause held."""
        settings = Settings(s3_endpoint_url=self.stack["IMAGEMILL_S3_ENDPOINT_URL"])
        urls = flow.database_url(self.stack), flow.store_url(self.stack)
        invariants.check(*urls, settings, keys=self.keys, lost=self.lost)
        check_flags_held(self.stack)


@pytest.fixture(scope="module")
def shared(
    postgres: Postgres, seaweed: SeaweedFS, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mill]:
    folder = tmp_path_factory.mktemp("mill")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("IMAGEMILL_", "AWS_"))}
    url = postgres.new_database()
    stack = support.fleet(url, seaweed.new_prefix(), valkey.new_database())
    stack = {**clean, **{n: v for n, v in stack.items() if n.startswith("IMAGEMILL_")}, "PATH": stack["PATH"]}
    stack |= {**seaweed.environment, "IMAGEMILL_HOME": str(folder / "home"), "IMAGEMILL_LEASE_SECONDS": "3"}
    stack = support.with_ledger(stack, folder / "ledger")
    run(stack, "db", "upgrade")
    with support.worker(stack, folder / "log"):
        yield Mill(stack, folder)
    postgres.drop_database(url)


@pytest.fixture
def mill(shared: Mill, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Mill:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return shared


def check_flags_held(stack: Stack, slack_s: float = 1.5) -> None:
    """Nothing is claimed while a job is paused or cancelled, nor committed once every worker must have heard of it."""
    lease_s = float(stack["IMAGEMILL_LEASE_SECONDS"])
    since: dict[tuple[int, str], float] = {}
    for event in support.sql(stack, "SELECT * FROM event ORDER BY id"):
        if event.action in ("pause", "cancel"):
            since.setdefault((event.job_id, event.action), event.at)
        elif event.action == "resume":
            since.pop((event.job_id, "pause"), None)
        told = min((at for (job_id, _), at in since.items() if job_id == event.job_id), default=float("inf"))
        if event.action == "claim":
            assert event.at < told + slack_s, f"job {event.job_id} claimed {event.at - told:.1f} s after it was stopped"
        elif event.action == "commit":
            assert event.at < told + lease_s + slack_s, f"job {event.job_id} went on {event.at - told:.1f} s"


# ------------------------------------------------------------------------------------------------ races


@pytest.mark.parametrize(
    ("seed", "seconds", "count"),
    [(1, 5, 60), *(pytest.param(s, 12, 120, marks=pytest.mark.slow) for s in range(2, 12))],
)
def test_verbs_race_with_workers_and_each_other(mill: Mill, seed: int, seconds: float, count: int) -> None:
    """Three jobs; two clients at each of them give orders at random moments; at last two go on and one is cancelled."""
    source = mill.pictures(f"race-{seed}", count)
    jobs = [
        mill.submit(source, "--shard-size", "4", "--param", f"objects={number}", "--param", "delay_ms=250")
        for number in (1, 2, 3)
    ]
    db = Database(flow.database_url(mill.stack))
    counts = [0]
    clients = [
        threading.Thread(target=_orders, args=(db, job_id, random.Random(f"{seed}-{job_id}-{n}"), seconds, counts))
        for job_id in jobs
        for n in (1, 2)
    ]
    for client in clients:
        client.start()
    time.sleep(random.Random(seed).uniform(0.2, 0.8) * seconds)
    cancelled = lifecycle.cancel(db, jobs[2])
    for client in clients:
        client.join()
    for job_id in jobs:
        lifecycle.pause(db, job_id, paused=False)
    states = [mill.wait(job_id).state for job_id in jobs]
    db.close()
    support.say(f"{counts[0]} orders in {seconds} s; the jobs ended {states}")
    assert states == ["done", "done", "cancelled" if cancelled else "done"]
    mill.prove()


def _orders(db: Database, job_id: int, chance: random.Random, seconds: float, counts: list[int]) -> None:
    """What a client may say to a job, again and again."""
    spec = lifecycle.get(db, job_id).spec
    orders: list[Callable[[], object]] = [
        lambda: lifecycle.pause(db, job_id, reason="for a while"),
        lambda: lifecycle.pause(db, job_id, paused=False),
        lambda: lifecycle.pause(db, job_id, paused=False),
        lambda: lifecycle.set_priority(db, job_id, chance.randint(-5, 5)),
        lambda: lifecycle.finish(db, job_id),
    ]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        chance.choice(orders)()
        if lifecycle.get(db, job_id).state == "running" and chance.random() < 0.2:
            again, new = lifecycle.submit(db, spec, only="failures")
            assert again.id == job_id or not new or _cancel_extra(db, again.id)
        counts[0] += 1
        time.sleep(chance.uniform(0, 0.1))


def _cancel_extra(db: Database, job_id: int) -> bool:
    """The job ended between two questions, so that the retry made a job of its own; it is not part of the race."""
    return lifecycle.cancel(db, job_id)


def test_a_paused_job_stands_still_and_a_cancelled_one_is_over(mill: Mill) -> None:
    source = mill.pictures("stand-still", 160)
    slow = ("--param", "delay_ms=300")  # six seconds in all
    job_id = mill.submit(source, *slow)
    support.wait_for(mill.stack, "SELECT count(*) FROM shard WHERE job_id = :id AND state = 'done'", "one", id=job_id)
    run(mill.stack, "pause", str(job_id))
    support.wait_for(
        mill.stack, "SELECT count(*) = 0 FROM shard WHERE job_id = :id AND state = 'leased'", "a halt", 10, id=job_id
    )
    before = support.executions(mill.stack)
    time.sleep(1)
    assert support.executions(mill.stack) == before
    run(mill.stack, "resume", str(job_id))
    assert mill.wait(job_id).state == "done"
    other = mill.submit(source, "--param", "delay_ms=1500")  # half a minute: the order comes while it runs
    run(mill.stack, "cancel", str(other))
    row = mill.wait(other)
    assert row.state == "cancelled"
    computed = support.executions(mill.stack, since=row.finished_at + 0.05)
    for verb in ("pause", "resume", "cancel"):
        assert "has ended already" in run(mill.stack, verb, str(other)).stdout
    assert mill.job(other).state == "cancelled"
    assert computed == support.executions(mill.stack, since=row.finished_at + 0.05) == 0
    mill.prove()


@pytest.mark.slow
def test_a_job_of_a_newer_version_waits_for_newer_workers(mill: Mill) -> None:
    source = mill.pictures("newer", 40)
    job_id = mill.submit(source, "--param", "objects=0", "--priority", "-9")
    run(mill.stack, "pause", str(job_id))
    spec = json.loads(json.dumps(mill.job(job_id).spec))
    newer = json.dumps({**spec, "schema_version": 99, "sharpness": 3})
    mill.execute("UPDATE job SET spec = cast(:spec AS json) WHERE id = :id", spec=newer, id=job_id)
    run(mill.stack, "resume", str(job_id))
    claims = len(support.events(mill.stack, "claim"))
    time.sleep(1.5)
    assert len(support.events(mill.stack, "claim")) == claims
    mill.execute("UPDATE job SET spec = cast(:spec AS json) WHERE id = :id", spec=json.dumps(spec), id=job_id)
    assert mill.wait(job_id).state == "done"
    mill.prove()


def test_retry_computes_the_failures_again_and_nothing_else(mill: Mill) -> None:
    source = mill.pictures("retry", 100)
    first = mill.wait(mill.submit(source, "--param", "fail_every=3", "--max-failures", "1"))
    failed = sum(shard.failures for shard in mill.shards(first.id))
    assert first.state == "done with failures"
    assert failed > 10
    before = support.executions(mill.stack)
    again = run_json(mill.stack, "retry", str(first.id))
    assert again["planned"] == failed
    assert mill.wait(again["id"]).state == "done with failures"
    assert support.executions(mill.stack) - before == failed
    mill.prove()


def test_a_submit_killed_at_any_moment_is_repeated_with_its_token(mill: Mill) -> None:
    """Killed when the job is there, its first manifest, its shards: one job comes of it, and the job is complete."""
    source = mill.pictures("token", 200)
    store = mill.store()
    moments: list[Callable[[str], object]] = [
        lambda token: _jobs_of(mill, token),
        lambda token: any(list(store.list(f"jobs/{row.id}/manifests/")) for row in _jobs_of(mill, token)),
        lambda token: any(mill.shards(row.id) for row in _jobs_of(mill, token)),
    ]
    planned = []
    for number, moment in enumerate(moments, start=1):
        token = f"once-{number}"
        options = ("--shard-size", "4", "--token", token, "--param", f"objects={number}", "--json")
        command = support.annotate(source, "--detach", *options)
        process = subprocess.Popen(
            ["imagemill", *command], env=mill.stack, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        flow.wait_until(lambda m=moment, t=token: bool(m(t)), "the moment")
        process.send_signal(signal.SIGKILL)
        process.wait()
        planned.append(len(mill.shards(_jobs_of(mill, token)[0].id)))
        again = run_json(mill.stack, *command)
        row = mill.wait(again["id"])
        assert (row.state, row.planned) == ("done", 200)
        assert len(_jobs_of(mill, token)) == 1
    support.say(f"of 50 shards, so many were planned when a submit was killed: {planned}")
    mill.prove()


def _jobs_of(mill: Mill, token: str) -> list[Any]:
    return support.sql(mill.stack, "SELECT id FROM job WHERE client_token = :token", token=token)


# ------------------------------------------------------------------------------------------------ damage and waste


@pytest.mark.slow
def test_a_job_that_fails_too_much_is_paused_until_somebody_resumes_it(mill: Mill) -> None:
    source = mill.pictures("failing", 320)
    job_id = mill.submit(source, "--param", "fail_every=2", "--max-failures", "0.2")
    support.wait_for(mill.stack, "SELECT paused FROM job WHERE id = :id", "the pause", id=job_id)
    said = run_json(mill.stack, "status", str(job_id))
    assert said["state"] == "paused"
    assert "more than 20%" in said["reason"]
    assert f"imagemill resume {job_id}" in said["reason"]
    assert said["results"] + said["failures"] < 320
    run(mill.stack, "resume", str(job_id))
    row = mill.wait(job_id)
    assert (row.state, row.planned) == ("done with failures", 320)
    mill.prove()


def test_verify_finds_damage_and_repair_mends_it(mill: Mill) -> None:
    """A deleted row, a deleted object and an object with other bytes."""
    source = mill.pictures("damage", 96)
    job_id = mill.wait(mill.submit(source)).id
    shards = mill.shards(job_id)
    good = run(mill.stack, "results", str(job_id), "--limit", "0", "--json").stdout
    item = support.one(mill.stack, "SELECT max(id) FROM item WHERE shard_id = :id", id=shards[0].id)
    mill.execute("DELETE FROM item_label WHERE item_id = :id", id=item)
    mill.execute("DELETE FROM item WHERE id = :id", id=item)
    store = mill.store()
    store.delete([shards[1].result_key])
    store.put(shards[2].result_key, store.get(shards[2].result_key) + b"!")
    mill.lost |= {shards[1].id, shards[2].id}
    found = json.loads(run(mill.stack, "verify", str(job_id), "--json", code=1).stdout)
    assert {(p["what"], p["shard_id"]) for p in found} == {
        ("rows-missing", shards[0].id),
        ("object-missing", shards[1].id),
        ("object-changed", shards[2].id),
    }
    done = run_json(mill.stack, "repair", str(job_id))
    assert (done["rows"], done["again"]) == (32, 64)
    mill.wait(done["job_id"])
    run(mill.stack, "verify", str(done["job_id"]))
    run(mill.stack, "verify", str(job_id))
    assert _what(run(mill.stack, "results", str(job_id), "--limit", "0", "--json").stdout) == _what(good)
    mill.prove()


def _what(lines: str) -> list[tuple[str, int, dict[str, int]]]:
    """Key, boxes and labels of each result, whoever computed it."""
    return [(row["key"], row["count"], row["labels"]) for row in map(json.loads, lines.splitlines())]


@pytest.mark.slow
def test_gc_takes_orphans_and_never_what_is_referred_to(mill: Mill) -> None:
    """Also while jobs run. Its safety age is ten leases: ten minutes, then five seconds."""
    source = mill.pictures("orphans", 240)
    job_id = mill.wait(mill.submit(source)).id
    store = mill.store()
    good = mill.shards(job_id)[0]
    orphan = f"jobs/{job_id}/{good.number:07d}/a99-deadbeef/12345678/items.parquet"
    stranger = "jobs/999999/0000000/a1-deadbeef/12345678/items.parquet"
    store.put(orphan, store.get(good.result_key))
    store.put(stranger, b"of another database")
    eager = {**mill.stack, "IMAGEMILL_ORPHAN_HOURS": "0"}
    run({**eager, "IMAGEMILL_LEASE_SECONDS": "60"}, "gc")
    assert store.stat(orphan) is not None, "too young"
    eager["IMAGEMILL_LEASE_SECONDS"] = "0.5"
    other = mill.submit(source, "--force", "--shard-size", "8")
    while mill.job(other).finished_at is None or store.stat(orphan) is not None:
        run(eager, "gc")
        time.sleep(0.3)
    left = {stat.key for stat in store.list("jobs/")}
    assert stranger in left
    assert mill.job(other).state == "done"
    store.delete([stranger])
    mill.prove()
