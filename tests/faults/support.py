"""How the fault tests run imagemill: quick leases, processes that die on cue, and what is proven afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import queue, sources
from storage.settings import Settings
from tests import flow, invariants
from tests.flow import check_all, database_url, run
from tests.services import SCRIPTS, Postgres, SeaweedFS, Valkey, wait_until

Stack = dict[str, str]

LEASE_S = 2.0
QUICK = {
    "IMAGEMILL_LEASE_SECONDS": str(LEASE_S),
    "IMAGEMILL_RECONCILE_SECONDS": "0.3",
    "IMAGEMILL_STALL_SECONDS": "20",
    "IMAGEMILL_DECODE_THREADS": "2",
    "IMAGEMILL_LOG_LEVEL": "info",
}
INJECT = Path(__file__).parent / "inject"


# ------------------------------------------------------------------------------------------------ stacks


def fleet(postgres_url: str, s3_url: str, broker_url: str) -> Stack:
    """The environment of a fleet with short leases. `home` must have cleaned this process's own before."""
    urls = {
        "IMAGEMILL_DATABASE_URL": postgres_url,
        "IMAGEMILL_STORE_URL": s3_url,
        "IMAGEMILL_BROKER_URL": broker_url,
    }
    return {**laptop(), **urls}


def laptop() -> Stack:
    """The environment of a laptop: nothing has a URL."""
    return {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', os.defpath)}", **QUICK}


def injected(stack: Stack, *changes: str) -> Stack:
    """The stack with changes of inject/sitecustomize.py in its processes."""
    names = [*filter(None, stack.get("INJECT", "").split(",")), *changes]
    return {**stack, "PYTHONPATH": str(INJECT), "INJECT": ",".join(names)}


def crashing(stack: Stack, folder: Path, plan: str) -> Stack:
    """The stack with processes that end or stop at named points; `folder` holds the marks they leave."""
    folder.mkdir(exist_ok=True)
    return {**stack, "IMAGEMILL_CRASH_AT": plan, "IMAGEMILL_CRASH_FOLDER": str(folder)}


@dataclass(frozen=True)
class Template:
    """A planned job that each test gets a copy of: its database is copied, its manifests are shared."""

    database: str
    store_url: str
    keys: list[str]
    seaweed: SeaweedFS
    postgres: Postgres

    @contextlib.contextmanager
    def copy(self, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
        """A fleet's environment with the job planned and no worker; this process gets the store's keys too."""
        for variable, value in self.seaweed.environment.items():
            monkeypatch.setenv(variable, value)
        url = self.postgres.new_database()
        name = url.rpartition("/")[2]
        self.postgres.execute(f"drop database {name}")
        self.postgres.execute(f"create database {name} template {self.database}")
        yield fleet(url, self.store_url, broker_url)
        self.postgres.drop_database(url)


def make_template(
    postgres: Postgres, seaweed: SeaweedFS, folder: Path, broker_url: str, count: int, *arguments: str
) -> Template:
    """Plan a job over `count` pictures through the console script."""
    keys = flow.pictures(folder / "images", count)
    url = postgres.new_database()
    store_url = seaweed.new_prefix()
    stack = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("IMAGEMILL_", "AWS_"))},
        **seaweed.environment,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "IMAGEMILL_HOME": str(folder / "home"),
        "IMAGEMILL_DATABASE_URL": url,
        "IMAGEMILL_STORE_URL": store_url,
        "IMAGEMILL_BROKER_URL": broker_url,
    }
    run(stack, "db", "upgrade")
    run(stack, *annotate(folder / "images", "--detach", *arguments))
    return Template(url.rpartition("/")[2], store_url, keys, seaweed, postgres)


def annotate(source: Path, *more: str) -> tuple[str, ...]:
    """The words of a job of the pretended model; later ones win."""
    return ("annotate", str(source), "--model", "stub", "--shard-size", "32", "--device", "cpu", *more)


def pictures_with(folder: Path, count: int, evils: Mapping[int, str]) -> list[str]:
    """Pictures of which some have a word in their names, for the poison of inject/sitecustomize.py; returns the keys.

    Keys are in the order of planning, so that a number says which place in which shard a picture has.
    """
    keys = sorted(flow.pictures(folder, count))
    for number, word in evils.items():
        renamed = f"{keys[number].removesuffix('.jpg')}-{word}.jpg"
        (folder / keys[number]).rename(folder / renamed)
        keys[number] = renamed
    return keys


# ------------------------------------------------------------------------------------------------ processes


@contextlib.contextmanager
def worker(stack: Stack, log: Path, command: str = "worker") -> Iterator[subprocess.Popen[bytes]]:
    """A supervisor with one worker process; at the end its whole family is killed, if it still runs."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["imagemill", command, "--device", "cpu"], env=stack, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    except BaseException:
        print(log.read_text(errors="replace")[-20_000:])
        raise
    finally:
        kill_family(process)


def family(pid: int) -> list[psutil.Process]:
    """A process and every descendant."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def kill_family(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and every descendant at the same moment: nobody may say goodbye."""
    members = family(process.pid)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)
    process.wait(timeout=10)
    psutil.wait_procs(members, timeout=10)


def wait_ended(processes: Sequence[psutil.Process], timeout_s: float = 30) -> float:
    """Wait until these processes are gone; returns how long it took."""
    return flow.wait_until(lambda: not any(map(_runs, processes)), "processes to end", timeout_s)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two
        return False


def wait_stopped(parents: Sequence[subprocess.Popen[bytes]], count: int = 1) -> list[int]:
    """Wait until so many members of these families are stopped by a signal; returns their ids."""
    flow.wait_until(lambda: len(stopped(parents)) >= count, f"{count} processes to stop", 10)
    return stopped(parents)


def stopped(parents: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The members of these families that a signal has stopped."""
    found: list[int] = []
    for member in [member for parent in parents for member in family(parent.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if member.status() == psutil.STATUS_STOPPED:
                found.append(member.pid)
    return found


def is_of(pid: int, parent: subprocess.Popen[bytes]) -> bool:
    """Whether a process belongs to a supervisor's family."""
    return pid in [member.pid for member in family(parent.pid)]


def stopped_at(folder: Path, point: str, number: int = 0, timeout_s: float = 60) -> None:
    """Wait until a process has come to a named point for the n-th time."""
    wait_until(lambda: (folder / f"{point}.{number}").exists(), f"a process at {point}", timeout_s)


# ------------------------------------------------------------------------------------------------ what has happened


def sql(stack: Stack, statement: str, **values: Any) -> list[Any]:
    """The rows of a SELECT on the stack's database."""
    return invariants.rows(database_url(stack), statement, **values)


@contextlib.contextmanager
def told(stack: Stack, parents: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """When what is done within fails, print how things stand: a log alone does not tell why nobody did anything.

    Processes with a change injected write into their logs where each of their threads is.
    """
    try:
        yield
    except BaseException:
        for query in (
            "SELECT id, state, fence, worker_id, crashes, not_before, extract(epoch FROM now()) FROM shard LIMIT 9",
            "SELECT id, state, desired, pid, heartbeat_at FROM worker",
            "SELECT * FROM event ORDER BY id",
            "SELECT pid, state, wait_event, query, xact_start FROM pg_stat_activity WHERE datname = current_database()",
        ):
            print(f"\n{query}", *sql(stack, query), sep="\n  ")
        with queue.client(Settings(broker_url=stack["IMAGEMILL_BROKER_URL"])) as redis:
            print("\nbroker", *[(key, redis.type(key)) for key in redis.scan_iter()], sep="\n  ")
        if "INJECT" in stack:
            for process in {member.pid for parent in parents for member in family(parent.pid)} - set(stopped(parents)):
                os.kill(process, signal.SIGUSR1)
            time.sleep(1)
        raise


def one(stack: Stack, statement: str, **values: Any) -> Any:
    """The only value of a SELECT."""
    return sql(stack, statement, **values)[0][0]


def wait_for(stack: Stack, statement: str, what: str, timeout_s: float = 60, **values: Any) -> float:
    """Wait until a SELECT's only value is true; returns how long it took."""
    return flow.wait_until(lambda: bool(one(stack, statement, **values)), what, timeout_s)


def wait_done(stack: Stack, timeout_s: float = 60) -> float:
    """Wait until no job is open."""
    return wait_for(stack, "SELECT count(*) = 0 FROM job WHERE finished_at IS NULL", "the end of all jobs", timeout_s)


def wait_some(stack: Stack, items: int = 1, timeout_s: float = 60) -> float:
    """Wait until so many items are committed."""
    return flow.wait_until(lambda: flow.committed(stack) >= items, f"{items} items", timeout_s)


def crashes(stack: Stack) -> int:
    """Leases that ended with their process's death, over all shards; asserts that none was counted as an error."""
    assert one(stack, "SELECT coalesce(sum(errors), 0) FROM shard") == 0
    return int(one(stack, "SELECT coalesce(sum(crashes), 0) FROM shard"))


def events(stack: Stack, action: str) -> list[Any]:
    """The history's lines of one kind."""
    return sql(stack, "SELECT * FROM event WHERE action = :action ORDER BY id", action=action)


def with_ledger(stack: Stack, path: Path) -> Stack:
    """The stack with workers that write down in a file what they touch."""
    return {**injected(stack, "ledger"), "INJECT_LEDGER": str(path)}


def executions(stack: Stack, since: float = 0) -> int:
    """Pictures that the model has computed, each time it has."""
    path = Path(stack["INJECT_LEDGER"])
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return sum(int(count) for _, at, count in lines if float(at) >= since)


def prove(stack: Stack, keys: Any, log: Path | None = None, *, ended: bool = True) -> None:
    """Every invariant, the bound on work done twice, and no secret in a log."""
    check_all(stack, keys, ended=ended)
    if "INJECT_LEDGER" in stack:
        _check_waste(stack)
    if log is not None:
        _check_secrets(stack, log.read_text(errors="replace"))


def _check_waste(stack: Stack) -> None:
    """Executions are at most the items, and once more the items of a shard for each time its lease was lost."""
    lost = one(stack, "SELECT coalesce(sum(crashes * size), 0) FROM shard")
    items = one(stack, "SELECT coalesce(sum(size), 0) FROM shard")
    assert executions(stack) <= items + lost, f"{executions(stack)} executions, {items} items, {lost} lost"


def _check_secrets(stack: Stack, text: str) -> None:
    urls = [stack.get(f"IMAGEMILL_{name}_URL", "") for name in ("DATABASE", "BROKER")]
    secrets = [url.rpartition("@")[0].rpartition(":")[2] for url in urls if "@" in url]
    secrets.append(stack.get("AWS_SECRET_ACCESS_KEY", ""))
    for secret in filter(None, secrets):
        assert secret not in text, "a secret is in the log"


def rescued_after(stack: Stack, died_at: float) -> tuple[float, float]:
    """Seconds from a death until the first shard was taken back, and until one of those was claimed again."""
    expired = [e for e in events(stack, "expire") if e.at >= died_at]
    again = [c for c in events(stack, "claim") if c.shard_id == expired[0].shard_id and c.at >= expired[0].at]
    return expired[0].at - died_at, again[0].at - died_at


def dataset(folder: Path) -> str:
    """The name under which a folder's recipes are stored."""
    return sources.canonical(str(folder))


def say(text: str) -> None:
    """A measured figure; shown with -s."""
    print(f"\n    measured: {text}")


def own_valkey(*options: str) -> Valkey:
    """A Valkey server that a test may hurt."""
    return Valkey(*options)


def remove(folder: Path) -> None:
    """Delete a folder's content."""
    shutil.rmtree(folder, ignore_errors=True)


def now() -> float:
    """The wall clock, which the local database servers share."""
    return time.time()


fleet_only = pytest.mark.parametrize("stack", ["fleet"], indirect=True)
