"""Factories for tests: databases with tables, jobs with shards, workers, and made-up outcomes."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import sqlalchemy as sa

from jobs import leases, lifecycle
from jobs.leases import Claim
from jobs.lifecycle import Job, NewShard, Planned
from jobs.spec import JobSpec
from storage import migrate
from storage.database import Database
from storage.errors import ItemFailed
from storage.results import detections
from storage.shardfile import Outcome, Written
from storage.tables import event, item, job, shard, worker

T = TypeVar("T")
_numbers = itertools.count(1)


@contextlib.contextmanager
def opened(url: str, patience_s: float = 10) -> Iterator[Database]:
    """A database brought to the newest revision, closed afterwards."""
    db = Database(url, patience_s)
    migrate.upgrade(db)
    try:
        yield db
    finally:
        db.close()


def spec(dataset: str = "/data", **changes: Any) -> JobSpec:
    """A spec of a detection job."""
    values: dict[str, Any] = {"kind": "detections", "family": "stub", "weights_sha256": "", "params": {}, "model": "m"}
    return JobSpec(**{"dataset": dataset, **values, **changes})


def planned_job(
    db: Database, shards: int = 3, size: int = 2, *, replaces: int = 0, end: bool = True, **changes: Any
) -> Job:
    """A job of a recipe of its own with so many ready shards."""
    options = {name: changes.pop(name) for name in ("priority", "token", "name", "force") if name in changes}
    changes.setdefault("dataset", f"/data/{next(_numbers)}")
    found, _ = lifecycle.submit(db, spec(**changes), **options)
    add_shards(db, found, shards, size, replaces=replaces, end=end)
    return lifecycle.get(db, found.id)


def add_shards(db: Database, found: Job, shards: int, size: int, *, replaces: int = 0, end: bool = True) -> None:
    """Plan a job without a dataset."""
    assert lifecycle.start_planning(db, found.id, "planner")
    new = [NewShard(f"manifest-{i}", size, replaces) for i in range(shards)]
    lifecycle.add_shards(db, found.id, "planner", 0, new, Planned(shards * size, 0, 0))
    if end:
        lifecycle.end_planning(db, found.id, "planner", pruned=0)


def new_worker(db: Database, queue: str = "cpu", *, pid: int | None = None, host: str = "elsewhere") -> str:
    """Register a worker; returns its id."""
    worker_id = f"worker-{next(_numbers)}"
    leases.register(db, worker_id, name="w", host=host, device="cpu", queue=queue, pid=pid or os.getpid(), version="0")
    return worker_id


def claimed(db: Database, worker_id: str, queue: str = "cpu", model_key: str | None = None) -> Claim:
    """Claim a shard that must be there."""
    claim = leases.claim(db, worker_id, queue, model_key)
    assert claim is not None, "expected a shard to claim"
    return claim


def result(*scores: float, label: str = "dog") -> detections.Result:
    """Detections of one label with these scores."""
    n = len(scores)
    boxes = np.tile(np.float32([0, 0, 1, 1]), (n, 1)).reshape(n, 4)
    return detections.Result(boxes, np.float32(scores), np.zeros(n, np.int32), (label,) * n)


def outcome(position: int, key: str | None = None, *, failed: bool = False, **changes: Any) -> Outcome:
    """The outcome of one item: one dog, or a failure."""
    key = f"{position:06d}.jpg" if key is None else key
    failure = ItemFailed("decode", "truncated", "file ends early") if failed else None
    values: dict[str, Any] = {
        "uri": f"file:///data/{key}",
        "fingerprint": f"mtime:1+{len(key)}",
        "width": None if failed else 640,
        "height": None if failed else 480,
        "result": None if failed else result(0.5),
        "failure": failure,
    }
    return Outcome(position, key, **{**values, **changes})


def outcomes_of(claim: Claim, failed: Sequence[int] = ()) -> list[Outcome]:
    """Outcomes of all items of a shard; keys are those of no other shard of the job."""
    keys = [f"{claim.number:05d}-{i:05d}.jpg" for i in range(claim.items)]
    return [outcome(i, key, failed=i in failed) for i, key in enumerate(keys)]


def written(claim: Claim, nonce: str = "") -> Written:
    """Where an attempt would have put its object."""
    nonce = nonce or str(next(_numbers))
    return Written(f"jobs/{claim.job_id}/{claim.shard_id}/a{claim.fence}-{nonce}/items.parquet", "00" * 32, 10)


def commit(db: Database, claim: Claim, worker_id: str, failed: Sequence[int] = ()) -> bool:
    """Commit a shard with made-up outcomes."""
    return leases.commit(db, claim, worker_id, written(claim), outcomes_of(claim, failed))


def run_out(db: Database, job_id: int, worker_id: str) -> str | None:
    """Compute all that is claimable and end the job."""
    while (claim := leases.claim(db, worker_id, "cpu", None)) is not None:
        assert commit(db, claim, worker_id)
    return lifecycle.finish(db, job_id)


def execute(db: Database, statement: sa.Executable) -> None:
    """One statement in a transaction of its own."""
    db.transact(lambda tx: tx.execute(statement) and None)


def age(db: Database, worker_id: str, seconds: float) -> None:
    """Make a worker's last beat lie further in the past."""
    changed = sa.update(worker).where(worker.c.id == worker_id).values(heartbeat_at=worker.c.heartbeat_at - seconds)
    execute(db, changed)


def make_due(db: Database) -> None:
    """End every backoff."""
    execute(db, sa.update(shard).values(not_before=0))


def row_of(db: Database, table: sa.Table, row_id: int | str) -> Any:
    """One row of a table by its id."""
    return db.query(sa.select(table).where(table.c.id == row_id))[0]


def shard_row(db: Database, claim: Claim) -> Any:
    """A shard as the database has it."""
    return row_of(db, shard, claim.shard_id)


def job_row(db: Database, found: Job) -> Any:
    """A job as the database has it."""
    return row_of(db, job, found.id)


def count(db: Database, table: sa.Table = item, *where: Any) -> int:
    """Rows of a table."""
    return int(db.query(sa.select(sa.func.count()).select_from(table).where(*where))[0][0])


def actions(db: Database, job_id: int | None = None) -> list[str]:
    """What the history tells, oldest first."""
    where = [] if job_id is None else [event.c.job_id == job_id]
    return [row.action for row in db.query(sa.select(event.c.action).where(*where).order_by(event.c.id))]


def shard_states(db: Database, found: Job) -> list[str]:
    """The states of a job's shards, in order of number."""
    query = sa.select(shard.c.state).where(shard.c.job_id == found.id).order_by(shard.c.number)
    return [row.state for row in db.query(query)]


def together(work: Callable[[int], T], threads: int = 8) -> list[T]:
    """Run work(0), work(1), ... in threads that start at the same moment; raises what any of them raised."""
    barrier = threading.Barrier(threads)
    answers: list[Any] = [None] * threads
    errors: list[BaseException] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            answers[number] = work(number)
        except BaseException as error:  # noqa: BLE001 (handed to the test's own thread)
            errors.append(error)

    crowd = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join(120)
    assert not any(thread.is_alive() for thread in crowd), "a thread hangs"
    if errors:
        raise errors[0]
    return answers


def python(code: str, *words: str) -> subprocess.Popen[str]:
    """Start a Python program in this checkout, its words in sys.argv[1:]."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    )


def ended(processes: Sequence[subprocess.Popen[str]], timeout: float = 60) -> list[int]:
    """Wait for programs to end; their exit statuses."""
    for process in processes:
        process.communicate(timeout=timeout)
    return [process.returncode for process in processes]


def fill(folder: Path, names: Sequence[str], content: bytes = b"x") -> Path:
    """Write files that a folder dataset takes for images."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def shared(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A file that is costly to make, made once for all the processes that run these tests at the same time."""
    own = factory.getbasetemp()
    path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            build(path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
    return path
