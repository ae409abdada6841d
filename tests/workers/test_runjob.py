"""What a command does when its recipe has an unfinished job already, and when nobody works on it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs import leases, lifecycle, plan, states
from jobs.lifecycle import Job
from jobs.progress import Status
from storage.database import Database
from storage.errors import Conflict, Misconfigured
from storage.objects import Store, open_store
from storage.settings import Settings
from tests.support import claimed, commit, new_worker, opened, planned_job, run_out, spec
from workers import runjob
from workers.fleet import Fleet
from workers.runjob import How


@dataclass
class Said:
    """A watcher that remembers."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def planning(self, report: plan.Report) -> None: ...

    def status(self, status: Status) -> None: ...


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with opened(f"sqlite:///{tmp_path}/index.db") as database:
        yield database


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def end(db: Database, job: Job) -> None:
    """What workers and a planner would do with what is left of a job."""
    if lifecycle.start_planning(db, job.id, "p"):
        lifecycle.end_planning(db, job.id, "p", pruned=0)
    run_out(db, job.id, new_worker(db))


@pytest.mark.parametrize(
    ("before", "force", "why"),
    [
        ({"only": "failures"}, False, "only computes again what failed"),
        ({"only": "retry"}, False, "only computes again what failed"),
        ({}, True, "was begun without --force"),
    ],
)
def test_an_unfinished_job_that_does_less_is_seen_out_and_then_followed(
    db: Database, before: dict[str, Any], force: bool, why: str
) -> None:
    first, _ = lifecycle.submit(db, spec("/d"), **before)
    with pytest.raises(Conflict, match=f"job {first.id} of the same recipe {why}"):
        runjob.submit(db, spec("/d"), How(force=force, wait=False), Said(), lambda job: None)
    said = Said()
    job, new = runjob.submit(db, spec("/d"), How(force=force), said, lambda job: end(db, job))
    assert (new, job.only, job.force) == (True, "", force)
    assert lifecycle.get(db, first.id).state == states.DONE
    assert why in said.lines[0]


def test_a_cancelled_job_whose_worker_still_has_a_shard_is_followed_too(db: Database) -> None:
    first, worker = planned_job(db, dataset="/d"), new_worker(db)
    claim = claimed(db, worker)
    assert lifecycle.cancel(db, first.id)

    def see_out(job: Job) -> None:
        assert job.id == first.id
        assert commit(db, claim, worker)
        assert lifecycle.finish(db, first.id) == states.CANCELLED

    job, new = runjob.submit(db, spec("/d"), How(), Said(), see_out)
    assert new
    assert job.id != first.id


@pytest.mark.parametrize(("begun", "wanted"), [(False, False), (True, True), (True, False)])
def test_an_unfinished_job_that_does_what_is_asked_is_joined(db: Database, begun: bool, wanted: bool) -> None:
    first, _ = lifecycle.submit(db, spec("/d"), force=begun)
    job, new = runjob.submit(db, spec("/d"), How(force=wanted), Said(), lambda job: pytest.fail("not needed"))
    assert (job.id, new) == (first.id, False)


def test_a_token_of_a_job_that_was_cancelled_still_means_that_job(db: Database) -> None:
    first, _ = lifecycle.submit(db, spec("/d"), token="t")
    lifecycle.cancel(db, first.id)
    job, new = runjob.submit(db, spec("/d"), How(token="t"), Said(), lambda job: pytest.fail("not needed"))
    assert (job.id, new) == (first.id, False)


def test_who_joins_a_job_hears_that_it_may_not_know_the_newest_images(
    db: Database, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(b"x")
    settings = Settings()
    wanted = spec(str(tmp_path / "data"))
    how = How(wait=False)
    assert runjob.run(db, store, settings, wanted, how, Said()).notes == []
    (tmp_path / "data" / "b.jpg").write_bytes(b"x")
    ran = runjob.run(db, store, settings, wanted, how, Said())
    assert ran.status.planned == 1
    assert "run the same command again" in ran.notes[0]


def test_nobody_waits_in_silence_while_no_worker_lives(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said also when the last one has left long after the command began."""
    monkeypatch.setattr(runjob, "_HINT_AFTER_S", 0.3)
    job, worker, said, quiet = planned_job(db, shards=1), new_worker(db), Said(), []

    def tend() -> None:
        if said.lines:
            run_out(db, job.id, new_worker(db))
        elif time.monotonic() - began > 0.8 and not quiet:
            quiet.append("for as long as there was a worker")
            leases.retire(db, worker)

    began = time.monotonic()
    assert runjob.wait(db, job.id, said, tend).state == states.DONE
    assert said.lines == ["no live worker serves queue cpu; start one with: imagemill up"]
    assert quiet


def test_drained_workers_end_the_command_that_started_them(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings()
    job = planned_job(db, shards=1)

    def start(self: Fleet) -> None:
        """Workers that end in order at once, as drained ones do."""
        for slot in self.slots:
            slot.process = subprocess.Popen(["true"])
            slot.process.wait()

    monkeypatch.setattr(Fleet, "start", start)
    with (
        pytest.raises(Misconfigured, match="were drained; the same command goes on"),
        runjob.own_workers(settings, How(device="cpu"), Said()) as tend,
    ):
        runjob.wait(db, job.id, Said(), tend)
