"""The soak: jobs run without end on real servers while faults are injected at random, then everything must add up.

    python -P tests/soak.py --minutes 20 --seed 1        (or: make soak MINUTES=20)

Prints faults injected, items, lost, doubled, mismatched, rescue times, work done in vain, and how memory and
descriptors of a long-lived process grew. Exit code 1 when anything is lost, doubled or mismatched, or a job is open.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage.settings import Settings
from tests import invariants
from tests.faultproxy import HttpFaultProxy
from tests.flow import pictures
from tests.services import SCRIPTS, Postgres, SeaweedFS, Valkey

LEASE_S = 4.0
DATASETS, PICTURES = 4, 320
WORKERS = 2
SHARD_SIZE = 16
ENDING_S = 240  # for the last jobs to end once the faults have stopped


@dataclass
class Soak:
    """The servers, the processes and what has happened to them."""

    rng: random.Random
    folder: Path
    valkey: Valkey
    postgres: Postgres
    seaweed: SeaweedFS
    proxy: HttpFaultProxy
    env: dict[str, str]
    faults: Counter[str] = field(default_factory=Counter)
    workers: list[subprocess.Popen[bytes] | None] = field(default_factory=list)
    reconcilers: list[subprocess.Popen[bytes] | None] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    submitted: int = 0

    # ------------------------------------------------------------------------------------------------ processes

    def launch(self, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        """A long-lived imagemill process with a log of its own."""
        with (self.folder / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                ["imagemill", *arguments], env=self.env, stdout=output, stderr=output, start_new_session=True
            )

    def tend(self) -> None:
        """Start again what was killed, as a fleet's supervisor would."""
        for i, process in enumerate(self.workers):
            if process is None or process.poll() is not None:
                self.workers[i] = self.launch("worker", "--device", "cpu", log=f"worker-{i}")
        for i, process in enumerate(self.reconcilers):
            if process is None or process.poll() is not None:
                self.reconcilers[i] = self.launch("reconcile", log=f"reconcile-{i}")

    def call(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A short command; servers may be away, so its failure is not an error here."""
        try:
            return subprocess.run(
                ["imagemill", *arguments], env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            return subprocess.CompletedProcess(arguments, 124, "", str(error))

    def family(self) -> list[psutil.Process]:
        """Every process of the workers: supervisors, Celery's parents, their children."""
        found = []
        for process in self.workers:
            if process is not None and process.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    top = psutil.Process(process.pid)
                    found += [top, *top.children(recursive=True)]
        return found

    def measure(self) -> None:
        """Memory and descriptors of the process that nobody kills: the first reconciler."""
        process = self.reconcilers[0]
        if process is not None and process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                p = psutil.Process(process.pid)
                self.memory.append((time.monotonic(), p.memory_info().rss, p.num_fds()))

    # ------------------------------------------------------------------------------------------------ work

    def feed(self, stop: threading.Event) -> None:
        """Keep every dataset busy: a job that has ended is followed by one that computes all of it again."""
        for i in itertools.cycle(range(DATASETS)):
            if stop.wait(0.5):
                return
            self.submitted += self.submit(i)

    def submit(self, i: int) -> bool:
        """Compute a dataset, or go on with the planning of its job that an outage has stopped."""
        folder, delay = str(self.folder / f"images-{i}"), f"delay_ms={60 + 40 * i}"
        what = ("annotate", folder, "--model", "stub", "--param", delay, "--shard-size", str(SHARD_SIZE))
        return self.call(*what, *("--device", "cpu", "--force", "--detach", "--max-failures", "1")).returncode == 0

    # ------------------------------------------------------------------------------------------------ faults

    def inject(self) -> None:
        """One fault, chosen by chance."""
        name, fault = self.rng.choice(FAULTS)
        self.faults[name] += 1
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            fault(self)

    def kill_child(self) -> None:
        """SIGKILL one process of a worker, whichever."""
        family = self.family()
        if family:
            self.rng.choice(family).kill()

    def kill_worker(self) -> None:
        """SIGKILL a whole worker at once."""
        process = self.rng.choice(self.workers)
        if process is None or process.poll() is not None:
            return
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.suspend()
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()

    def freeze_worker(self) -> None:
        """SIGSTOP one process for less or more than its lease, then SIGCONT."""
        family = self.family()
        if family:
            victim = self.rng.choice(family)
            victim.suspend()
            time.sleep(self.rng.uniform(0.2, 2) * LEASE_S)
            victim.resume()

    def drain_worker(self) -> None:
        """SIGTERM to a worker."""
        process = self.rng.choice(self.workers)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)

    def kill_reconciler(self) -> None:
        """SIGKILL a reconciler, never the first: its memory is watched to the end."""
        process = self.reconcilers[self.rng.randrange(1, len(self.reconcilers))]
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()

    def kill_valkey(self) -> None:
        """Valkey loses everything."""
        self.valkey.kill()
        time.sleep(self.rng.uniform(0, 2))
        self.valkey.restart(empty=True)

    def flush_valkey(self) -> None:
        """All tickets vanish."""
        self.valkey.flush()

    def freeze_valkey(self) -> None:
        """Valkey is there and does not answer."""
        self.valkey.freeze()
        time.sleep(self.rng.uniform(0.5, 4))
        self.valkey.thaw()

    def crash_postgres(self) -> None:
        """Postgres is ended without a shutdown, and recovers."""
        self.postgres.stop(mode="immediate")
        time.sleep(self.rng.uniform(0, 1.5))
        self.postgres.start()

    def cut_backends(self) -> None:
        """Every connection to Postgres is cut, whatever it is doing."""
        self.postgres.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'imagemill%'"
        )

    def tired_s3(self) -> None:
        """S3 answers a third of the requests with 503."""
        self.proxy.add("slowdown", chance=0.33)
        time.sleep(self.rng.uniform(0.5, 4))
        self.proxy.heal()

    def lost_answers(self) -> None:
        """S3 does what it is asked, and a third of its answers are lost."""
        self.proxy.add("lost", method="PUT", chance=0.33)
        time.sleep(self.rng.uniform(0.5, 4))
        self.proxy.heal()

    def cut_bodies(self) -> None:
        """Bodies from S3 break off."""
        self.proxy.add("truncate", method="GET", chance=0.33)
        time.sleep(self.rng.uniform(0.5, 3))
        self.proxy.heal()

    def s3_away(self) -> None:
        """No connection to S3 for a while."""
        self.proxy.refuse()
        time.sleep(self.rng.uniform(0.5, 3))
        self.proxy.heal()

    def double_tickets(self) -> None:
        """Tickets nobody needs."""
        from jobs import queue

        queue.publish(Settings(broker_url=self.valkey.url), "cpu", 5)

    def pause_resume(self) -> None:
        """Pause whatever runs, and let it go on."""
        self.call("pause", "latest")
        time.sleep(self.rng.uniform(0, 2))
        self.call("resume", "latest")

    def cancel(self) -> None:
        """Cancel the newest job; the next feed computes its dataset again."""
        self.call("cancel", "latest")

    def collect(self) -> None:
        """Collect orphans while jobs run."""
        self.call("gc")


FAULTS: tuple[tuple[str, Callable[[Soak], None]], ...] = (
    *(("kill one process", Soak.kill_child),) * 4,
    *(("kill a worker", Soak.kill_worker),) * 3,
    *(("freeze a process", Soak.freeze_worker),) * 3,
    ("drain a worker", Soak.drain_worker),
    ("kill a reconciler", Soak.kill_reconciler),
    ("kill Valkey", Soak.kill_valkey),
    ("flush Valkey", Soak.flush_valkey),
    ("freeze Valkey", Soak.freeze_valkey),
    ("crash Postgres", Soak.crash_postgres),
    *(("cut database connections", Soak.cut_backends),) * 2,
    ("S3 503", Soak.tired_s3),
    ("S3 lost answers", Soak.lost_answers),
    ("S3 truncated bodies", Soak.cut_bodies),
    ("S3 refuses", Soak.s3_away),
    ("doubled tickets", Soak.double_tickets),
    ("pause and resume", Soak.pause_resume),
    ("cancel", Soak.cancel),
    ("gc", Soak.collect),
)


@contextmanager
def servers(folder: Path, seed: int) -> Iterator[Soak]:
    """Everything started, everything stopped."""
    with ExitStack() as stack:
        valkey = stack.enter_context(Valkey())
        postgres = stack.enter_context(Postgres(fsync=True))
        seaweed = stack.enter_context(SeaweedFS())
        proxy = stack.enter_context(HttpFaultProxy(seaweed.port, seed=seed))
        env = {
            **os.environ,
            **seaweed.environment,
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "IMAGEMILL_HOME": str(folder / "home"),
            "IMAGEMILL_DATABASE_URL": postgres.new_database(),
            "IMAGEMILL_STORE_URL": seaweed.new_prefix(),
            "IMAGEMILL_BROKER_URL": valkey.url,
            "IMAGEMILL_S3_ENDPOINT_URL": proxy.url,
            "IMAGEMILL_LEASE_SECONDS": str(LEASE_S),
            "IMAGEMILL_STALL_SECONDS": "20",
            "IMAGEMILL_RECONCILE_SECONDS": "1",
            "IMAGEMILL_TICKET_SECONDS": "30",
            "IMAGEMILL_ORPHAN_HOURS": "0.02",
        }
        soak = Soak(random.Random(seed), folder, valkey, postgres, seaweed, proxy, env)
        try:
            yield soak
        finally:
            for process in [*soak.workers, *soak.reconcilers]:
                if process is not None and process.poll() is None:
                    for member in psutil.Process(process.pid).children(recursive=True):
                        with suppress(psutil.NoSuchProcess):
                            member.kill()
                    process.kill()
                    process.wait()


def run(minutes: float, seed: int, every_s: float, folder: Path) -> dict[str, Any]:
    """Inject faults for so long, then let everything end and count."""
    for i in range(DATASETS):
        pictures(folder / f"images-{i}", PICTURES, seed=i)
    with servers(folder, seed) as soak:
        assert soak.call("db", "upgrade").returncode == 0
        soak.workers, soak.reconcilers = [None] * WORKERS, [None] * 2
        soak.tend()
        deadline, said = time.monotonic() + 60 * minutes, 0.0
        stop = threading.Event()
        feeder = threading.Thread(target=soak.feed, args=(stop,), daemon=True)
        feeder.start()
        # On a busy machine a command takes many seconds: with fewer than two jobs, little has been tried.
        while time.monotonic() < deadline or (soak.submitted < 2 and time.monotonic() < deadline + 180 * minutes):
            soak.tend()
            soak.inject()
            soak.measure()
            time.sleep(soak.rng.uniform(0, every_s))
            if time.monotonic() - said > 30:
                said = time.monotonic()
                left = max(0, deadline - said)
                print(f"{sum(soak.faults.values())} faults, {soak.submitted} submits, {left:.0f} s left", flush=True)
        stop.set()
        feeder.join()
        return _end(soak)


def _end(soak: Soak) -> dict[str, Any]:
    """No more faults: every job must end, and everything must add up."""
    soak.proxy.heal()
    started = time.monotonic()
    active: list[Any] = [None]
    while active and time.monotonic() - started < ENDING_S:
        soak.tend()
        for job in json.loads(soak.call("jobs", "--active", "--json").stdout or "[null]"):
            if job and job["state"] == "paused":
                soak.call("resume", str(job["id"]))
            if job and job["state"] == "planning" and job["reason"]:  # told to its user, who gives the command again
                soak.submit(int(job["dataset"].rpartition("-")[2]))
        listed = soak.call("jobs", "--active", "--json")
        active = json.loads(listed.stdout or "[null]")
        time.sleep(0.5)
    database, store = soak.env["IMAGEMILL_DATABASE_URL"], soak.env["IMAGEMILL_STORE_URL"]
    if active:
        print(f"still open after {ENDING_S} s:", *active, listed.stderr[-2000:], *_standing(database), sep="\n")
    return {**_counts(database), **_audit(soak, database, store), **_figures(soak, database), "open_jobs": len(active)}


def _standing(database: str) -> list[Any]:
    """What holds a job up may be seen here: jobs, their shards, workers, and what happened last."""
    return [
        row
        for sql in (
            "SELECT id, state, reason, paused, cancelled, planner, planner_beat_at, planned, created_at FROM job",
            "SELECT job_id, state, worker_id, not_before, count(*) FROM shard GROUP BY 1, 2, 3, 4",
            "SELECT id, state, desired, heartbeat_at, progress FROM worker",
            "SELECT * FROM (SELECT * FROM event ORDER BY id DESC LIMIT 40) AS e ORDER BY id",
        )
        for row in invariants.rows(database, sql)
    ]


def _counts(database: str) -> dict[str, Any]:
    one = lambda sql: int(invariants.rows(database, sql)[0][0] or 0)  # noqa: E731
    lost = """SELECT coalesce(sum(abs(j.planned - s.n)), 0) FROM job j JOIN
              (SELECT job_id, sum(results + failures) AS n FROM shard GROUP BY job_id) s ON s.job_id = j.id
              WHERE j.state IN ('done', 'done with failures', 'failed')"""
    doubled = """SELECT count(*) FROM
                 (SELECT 1 FROM item GROUP BY recipe_id, key, job_id HAVING count(*) > 1) AS d"""
    return {
        "jobs": one("SELECT count(*) FROM job"),
        "ended_incomplete": one("SELECT count(*) FROM job WHERE state = 'failed'"),
        "items": one("SELECT count(*) FROM item"),
        "failed_items": one("SELECT count(*) FROM item WHERE NOT ok"),
        "lost": one(lost),
        "doubled": one(doubled),
        "claims": one("SELECT count(*) FROM event WHERE action = 'claim'"),
        "commits": one("SELECT count(*) FROM event WHERE action = 'commit'"),
        "crashes": one("SELECT sum(crashes) FROM shard"),
        "errors": one("SELECT sum(errors) FROM shard"),
    }


def _audit(soak: Soak, database: str, store: str) -> dict[str, Any]:
    """Every row against its object, read past the proxy."""
    for name, value in soak.seaweed.environment.items():
        os.environ[name] = value
    settings = Settings(s3_endpoint_url=soak.seaweed.url)
    mismatched = invariants.mismatches(database, store, settings)
    return {"mismatched": len(mismatched), "first_mismatches": mismatched[:3]}


def _figures(soak: Soak, database: str) -> dict[str, Any]:
    # From a lost worker's last heartbeat until its shard was free: what a user waits for.
    sql = """SELECT e.at - w.heartbeat_at AS s FROM event e JOIN worker w ON w.id = e.worker_id
             WHERE e.action = 'expire' ORDER BY 1"""
    waits = [float(row.s) for row in invariants.rows(database, sql)]
    ends = invariants.rows(database, "SELECT action, count(*) AS n FROM event WHERE fence > 0 GROUP BY action")
    # The first quarter is warming up: libraries are imported when they are first needed.
    settled = soak.memory[len(soak.memory) // 4 :]
    quarter = max(1, len(settled) // 4)
    mean = lambda rows, column: statistics.mean(row[column] for row in rows)  # noqa: E731
    first, last = settled[:quarter], settled[-quarter:]
    return {
        "faults": sum(soak.faults.values()),
        "by_fault": dict(sorted(soak.faults.items())),
        "lease_s": LEASE_S,
        "rescue_median_s": round(statistics.median(waits), 1) if waits else None,
        "rescue_max_s": round(waits[-1], 1) if waits else None,
        "attempts": {row.action: int(row.n) for row in ends},
        "wasted_items_at_most": len(waits) * SHARD_SIZE,  # a lost attempt costs its shard, nothing else costs any
        "shard_size": SHARD_SIZE,
        "reconciler_lived_s": round(settled[-1][0] - settled[0][0]),
        "reconciler_mb": [round(mean(first, 1) / 1e6, 1), round(mean(last, 1) / 1e6, 1)],
        "reconciler_descriptors": [round(mean(first, 2), 1), round(mean(last, 2), 1)],
    }


def problems(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report must be zero and is not."""
    must_be_zero = ("lost", "doubled", "mismatched", "ended_incomplete", "open_jobs", "errors")
    return {name: report[name] for name in must_be_zero if report[name]}


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, default=2.5, help="longest pause between two faults, in seconds")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-soak-") as folder:
        report = run(arguments.minutes, arguments.seed, arguments.every, Path(folder))
    print(json.dumps({"seed": arguments.seed, "minutes": arguments.minutes, **report}, indent=2))
    return 1 if problems(report) else 0


if __name__ == "__main__":
    sys.exit(main())
