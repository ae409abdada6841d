"""Choices: settled once for a job and a kind of device, measured once for all jobs, on SQLite and Postgres."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from jobs import choices, lifecycle, progress
from jobs.choices import Choice
from storage.database import Database
from tests.support import claimed, commit, new_worker, opened, planned_job, together

SLOW, FAST = Choice("torch", "fp32", 8, "as asked"), Choice("openvino", "bf16", 16, "tuned: 3.0 times fp32 torch")


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database with tables."""
    with opened(database_url) as database:
        yield database


def test_the_first_choice_of_a_job_holds(db: Database) -> None:
    job = planned_job(db)
    assert choices.of_job(db, job.id) == {}
    assert choices.settle(db, job.id, "CPU", SLOW) == SLOW
    assert choices.settle(db, job.id, "CPU", FAST) == SLOW
    assert choices.settle(db, job.id, "GPU", FAST) == FAST
    assert choices.of_job(db, job.id) == {"CPU": SLOW, "GPU": FAST}
    assert progress.status(db, job.id).choices == {"CPU": SLOW, "GPU": FAST}


def test_many_workers_settle_on_one(db: Database) -> None:
    job = planned_job(db)
    found = together(lambda n: choices.settle(db, job.id, "CPU", dataclasses.replace(FAST, batch=n + 1)))
    assert set(found) == {choices.of_job(db, job.id)["CPU"]}


def test_what_was_measured_serves_the_same_question_only(db: Database) -> None:
    about = {"weights": "ab", "device": "CPU", "params": {"conf": 0.5}}
    assert choices.measured(db, about) is None
    choices.keep(db, about, SLOW, [{"rate": 1.0}])
    choices.keep(db, about, FAST, [{"rate": 2.0}])
    assert choices.measured(db, about) == FAST
    assert choices.measured(db, {**about, "device": "GPU"}) is None


def test_items_left_are_those_not_committed(db: Database) -> None:
    job = planned_job(db, shards=3, size=2)
    assert choices.items_left(db, job.id) == (6, False)
    worker = new_worker(db)
    claim = claimed(db, worker)
    assert choices.items_left(db, job.id) == (6, False)
    commit(db, claim, worker)
    assert choices.items_left(db, job.id) == (4, False)


def test_while_a_job_is_planned_more_items_may_come(db: Database) -> None:
    job = planned_job(db, shards=3, size=2, end=False)
    assert choices.items_left(db, job.id) == (6, True)
    lifecycle.cancel(db, job.id)
    assert choices.items_left(db, job.id) == (0, False)
