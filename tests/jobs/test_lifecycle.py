"""Jobs: submitted once however often it is asked, flags at any time, and ended once, with a proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from jobs import collect, leases, lifecycle, states
from jobs.lifecycle import Job, NewShard, Planned
from jobs.spec import JobSpec
from storage.database import Database
from storage.errors import BadInput, Conflict, NotFound
from storage.tables import event, item, job, recipe, shard
from tests.support import (
    actions,
    add_shards,
    claimed,
    commit,
    count,
    execute,
    job_row,
    new_worker,
    opened,
    planned_job,
    run_out,
    shard_row,
    shard_states,
    spec,
    together,
)


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database with tables."""
    with opened(database_url) as database:
        yield database


# --- submit ---------------------------------------------------------------------------------------------------------


def test_submit_stores_what_was_asked(db: Database) -> None:
    asked = spec(params={"conf": 0.25}, labels=("cat", "dog"), queue="gpu")
    found, is_new = lifecycle.submit(db, asked, name="pets", priority=5, force=True)
    assert is_new
    assert found.spec == asked
    assert (found.name, found.priority, found.force, found.state) == ("pets", 5, True, states.PLANNING)
    assert lifecycle.get(db, found.id) == found
    row = job_row(db, found)
    assert (row.queue, row.model_key, row.finished_at) == ("gpu", asked.model_key, None)
    assert actions(db, found.id) == ["submit"]


def test_submitting_twice_joins_the_open_job(db: Database) -> None:
    first, _ = lifecycle.submit(db, spec())
    again, is_new = lifecycle.submit(db, spec(batch=64), name="other")
    assert (again.id, is_new) == (first.id, False)
    assert count(db, job) == count(db, recipe) == 1


def test_after_the_end_a_new_job_of_the_same_recipe_begins(db: Database) -> None:
    first = planned_job(db, shards=0, dataset="/d")
    assert lifecycle.finish(db, first.id) == states.DONE
    second, is_new = lifecycle.submit(db, spec("/d"))
    assert is_new
    assert second.recipe_id == first.recipe_id
    assert count(db, recipe) == 1


def test_a_token_returns_its_job_even_when_that_has_ended(db: Database) -> None:
    first = planned_job(db, shards=0, dataset="/d", token="t")
    lifecycle.finish(db, first.id)
    again, is_new = lifecycle.submit(db, spec("/d"), token="t")
    assert (again.id, is_new, again.state) == (first.id, False, states.DONE)
    other, is_new = lifecycle.submit(db, spec("/d"), token="u")
    assert is_new
    assert other.id != first.id


@pytest.mark.parametrize("token", [None, "t"])
def test_clients_submitting_at_the_same_moment_end_with_one_job(database_url: str, token: str | None) -> None:
    with opened(database_url) as db:
        for round_ in range(10):
            dataset = f"/d{round_}"
            name = token and f"{token}{round_}"
            found = together(lambda n, d=dataset, t=name: lifecycle.submit(db, spec(d), token=t), 6)  # type: ignore[misc]
            assert len({f.id for f, _ in found}) == 1
            assert sum(is_new for _, is_new in found) == 1
        assert count(db, job) == count(db, recipe) == 10


def tried(db: Database, wanted: JobSpec, token: str) -> Job | None:
    """A job of exactly what was wanted, or none."""
    try:
        found, _ = lifecycle.submit(db, wanted, token=token)
    except BadInput:
        return None
    assert found.spec == wanted
    return found


def test_one_token_for_two_recipes_at_the_same_moment(db: Database) -> None:
    for round_ in range(5):
        found = together(lambda n, r=round_: tried(db, spec(f"/d{r}-{n}"), f"t{r}"), 4)  # type: ignore[misc]
        assert len([f for f in found if f]) == 1, "a job that computes something else was given for the token"
    assert count(db, job) == 5
    with pytest.raises(BadInput, match="which computes something else"):
        lifecycle.submit(db, spec("/other"), token="t0")


def test_unknown_jobs(db: Database) -> None:
    with pytest.raises(NotFound, match="no job 77"):
        lifecycle.get(db, 77)
    for verb in (lifecycle.cancel, lifecycle.pause):
        assert verb(db, 77) is False  # type: ignore[operator]
    assert lifecycle.set_priority(db, 77, 1) is False
    assert lifecycle.finish(db, 77) is None
    assert lifecycle.start_planning(db, 77, "p") is False
    assert actions(db) == []


# --- planning -------------------------------------------------------------------------------------------------------


def test_only_one_planner_at_a_time(db: Database) -> None:
    found, _ = lifecycle.submit(db, spec())
    started = together(lambda n: lifecycle.start_planning(db, found.id, f"planner-{n}"), 6)
    assert sum(started) == 1
    winner = f"planner-{started.index(True)}"
    assert lifecycle.start_planning(db, found.id, winner), "the same planner may ask again"


def test_a_silent_planner_is_taken_over_and_then_changes_nothing(db: Database) -> None:
    found, _ = lifecycle.submit(db, spec())
    assert lifecycle.start_planning(db, found.id, "old")
    lifecycle.add_shards(db, found.id, "old", 0, [NewShard("m0", 2, 0)], Planned(2, 0, 0))
    assert not lifecycle.start_planning(db, found.id, "new")
    execute(db, sa.update(job).values(planner_beat_at=job.c.planner_beat_at - lifecycle.PLANNER_LEASE_S - 1))
    assert lifecycle.start_planning(db, found.id, "new")
    for late in (
        lambda: lifecycle.add_shards(db, found.id, "old", 1, [NewShard("m1", 2, 0)], Planned(4, 0, 0)),
        lambda: lifecycle.end_planning(db, found.id, "old", pruned=3),
        lambda: lifecycle.keep_planning(db, found.id, "old"),
        lambda: lifecycle.prune(db, found.id, "old", [1]),
    ):
        with pytest.raises(Conflict, match="no longer planned by this process"):
            late()
    lifecycle.stop_planning(db, found.id, "old", "never mind")
    row = job_row(db, found)
    assert (row.planner, row.reason, row.planned, row.pruned, row.state) == ("new", "", 2, 0, states.PLANNING)
    assert count(db, shard) == 1


def test_a_job_whose_submitter_was_killed_before_it_planned_is_gone_on_with(db: Database) -> None:
    found, _ = lifecycle.submit(db, spec())
    assert lifecycle.abandoned_planning(db) == []
    execute(db, sa.update(job).values(created_at=job.c.created_at - 2 * lifecycle.PLANNER_LEASE_S))
    assert lifecycle.abandoned_planning(db) == [found.id]
    assert lifecycle.start_planning(db, found.id, "p")
    assert lifecycle.abandoned_planning(db) == []
    lifecycle.stop_planning(db, found.id, "p", "in order")
    assert lifecycle.abandoned_planning(db) == []


def test_a_planner_that_beats_is_not_taken_over(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = lifecycle.submit(db, spec())
    assert lifecycle.start_planning(db, found.id, "old")
    ago = sa.update(job).values(planner_beat_at=job.c.planner_beat_at - lifecycle.PLANNER_LEASE_S - 1)
    for beat in (
        lambda: lifecycle.keep_planning(db, found.id, "old"),
        lambda: lifecycle.add_shards(db, found.id, "old", 0, [], Planned(0, 1, 0)),
        lambda: lifecycle.prune(db, found.id, "old", []),
    ):
        execute(db, ago)
        beat()
        assert not lifecycle.start_planning(db, found.id, "new")


def test_shards_whose_answer_was_lost_are_not_doubled(db: Database) -> None:
    found, _ = lifecycle.submit(db, spec())
    lifecycle.start_planning(db, found.id, "p")
    for first in (0, 0, 2, 2, 0):
        shards = [NewShard(f"m{first}", 3, 1), NewShard(f"m{first + 1}", 3, 0)]
        lifecycle.add_shards(db, found.id, "p", first, shards, Planned(3 * (first + 2), 1, 2))
    rows = db.query(sa.select(shard).order_by(shard.c.number))
    assert [(r.number, r.manifest_key, r.size, r.replaces) for r in rows] == [
        (0, "m0", 3, 1),
        (1, "m1", 3, 0),
        (2, "m2", 3, 1),
        (3, "m3", 3, 0),
    ]
    assert {r.state for r in rows} == {states.READY}


def test_end_planning_repeated_counts_pruned_once(db: Database) -> None:
    found, _ = lifecycle.submit(db, spec())
    lifecycle.start_planning(db, found.id, "p")
    for _ in range(2):
        lifecycle.end_planning(db, found.id, "p", pruned=4)
    row = job_row(db, found)
    assert (row.state, row.pruned, row.planner) == (states.RUNNING, 4, None)
    assert not lifecycle.start_planning(db, found.id, "p")
    with pytest.raises(Conflict):
        lifecycle.add_shards(db, found.id, "p", 0, [NewShard("m", 1, 0)], Planned(1, 0, 0))


def test_a_cancelled_job_is_planned_no_further(db: Database) -> None:
    found = planned_job(db, shards=2, end=False)
    assert lifecycle.cancel(db, found.id)
    assert not lifecycle.start_planning(db, found.id, "planner")
    with pytest.raises(Conflict, match="cancelled"):
        lifecycle.add_shards(db, found.id, "planner", 2, [NewShard("m", 1, 0)], Planned(5, 0, 0))
    assert job_row(db, found).state == states.CANCELLED
    assert shard_states(db, found) == [states.CANCELLED] * 2


def test_cancel_races_with_planning(db: Database) -> None:
    for _ in range(5):
        found, _ = lifecycle.submit(db, spec())
        lifecycle.start_planning(db, found.id, "p")

        def act(number: int, job_id: int = found.id) -> None:
            if number == 0:
                lifecycle.cancel(db, job_id)
                return
            try:
                for first in range(5):
                    lifecycle.add_shards(db, job_id, "p", first, [NewShard("m", 1, 0)], Planned(first + 1, 0, 0))
            except Conflict:
                pass

        together(act, 2)
        assert set(shard_states(db, found)) <= {states.CANCELLED}
        assert job_row(db, found).state == states.CANCELLED


def test_stop_planning_says_why_and_lets_another_go_on(db: Database) -> None:
    found, _ = lifecycle.submit(db, spec())
    lifecycle.start_planning(db, found.id, "p")
    lifecycle.stop_planning(db, found.id, "p", "the share went\naway \0")
    assert lifecycle.get(db, found.id).reason == "the share went away"
    assert lifecycle.start_planning(db, found.id, "q")
    assert lifecycle.get(db, found.id).reason == ""


# --- pause, cancel, priority ----------------------------------------------------------------------------------------


def test_pause_and_resume(db: Database) -> None:
    found, worker_id = planned_job(db), new_worker(db)
    for _ in range(2):
        assert lifecycle.pause(db, found.id, reason="too many failures")
    assert lifecycle.get(db, found.id).paused
    assert lifecycle.get(db, found.id).reason == "too many failures"
    assert leases.claim(db, worker_id, "cpu", None) is None
    assert lifecycle.pause(db, found.id, paused=False)
    assert lifecycle.get(db, found.id).reason == ""
    assert claimed(db, worker_id).job_id == found.id


def test_a_paused_job_still_ends_when_its_last_shard_is_done(db: Database) -> None:
    found, worker_id = planned_job(db, shards=1), new_worker(db)
    claim = claimed(db, worker_id)
    lifecycle.pause(db, found.id)
    assert commit(db, claim, worker_id)
    assert lifecycle.finish(db, found.id) == states.DONE
    assert not lifecycle.get(db, found.id).paused


def test_cancel_takes_what_waits_and_leaves_what_is_done(db: Database) -> None:
    found, worker_id = planned_job(db, shards=4), new_worker(db)
    assert commit(db, claimed(db, worker_id), worker_id)
    held = claimed(db, worker_id)
    for _ in range(2):
        assert lifecycle.cancel(db, found.id)
    assert shard_states(db, found) == [states.DONE, states.LEASED, states.CANCELLED, states.CANCELLED]
    assert job_row(db, found).finished_at is None
    assert leases.claim(db, worker_id, "cpu", None) is None
    assert actions(db, found.id).count("cancel") == 1, "asking again tells nothing new"
    assert leases.release(db, held, worker_id)
    assert shard_row(db, held).state == states.CANCELLED
    assert lifecycle.get(db, found.id).state == states.CANCELLED
    assert count(db, item) == 2
    assert actions(db, found.id)[-1] == "finish"


def test_a_shard_of_a_cancelled_job_may_still_be_committed(db: Database) -> None:
    found, worker_id = planned_job(db, shards=2), new_worker(db)
    held = claimed(db, worker_id)
    lifecycle.cancel(db, found.id)
    assert commit(db, held, worker_id)
    assert lifecycle.finish(db, found.id) == states.CANCELLED
    assert shard_states(db, found) == [states.DONE, states.CANCELLED]


def test_no_shard_of_a_cancelled_job_is_left_by_fail_expire_or_retire(db: Database) -> None:
    found, first, second, third = planned_job(db, shards=3), *(new_worker(db) for _ in range(3))
    held = [claimed(db, w) for w in (first, second, third)]
    lifecycle.cancel(db, found.id)
    assert leases.fail(db, held[0], first, "x")
    leases.retire(db, second)
    execute(db, sa.text(f"update worker set state = 'lost' where id = '{third}'"))  # noqa: S608
    assert leases.expire_shards(db) == 1
    assert lifecycle.cancel(db, found.id), "the reconciler asks again"
    assert shard_states(db, found) == [states.CANCELLED] * 3
    assert job_row(db, found).state == states.CANCELLED


VERBS: dict[str, Callable[[Database, int], Any]] = {
    "pause": lambda db, i: lifecycle.pause(db, i),
    "resume": lambda db, i: lifecycle.pause(db, i, paused=False),
    "cancel": lambda db, i: lifecycle.cancel(db, i),
    "priority": lambda db, i: lifecycle.set_priority(db, i, 9),
    "plan": lambda db, i: lifecycle.start_planning(db, i, "p"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("ending", ["done", "cancelled"])
def test_a_job_that_has_ended_changes_no_more(db: Database, verb: str, ending: str) -> None:
    found = planned_job(db, shards=1)
    lifecycle.cancel(db, found.id) if ending == "cancelled" else run_out(db, found.id, new_worker(db))
    before, told = job_row(db, found), actions(db)
    assert before.state == ending
    assert not VERBS[verb](db, found.id)
    lifecycle.end_planning(db, found.id, "p", pruned=1)
    lifecycle.stop_planning(db, found.id, "p", "x")
    assert lifecycle.finish(db, found.id) == ending if verb == "cancel" else True
    assert job_row(db, found) == before
    assert actions(db) == told


# --- finish ---------------------------------------------------------------------------------------------------------


def test_a_job_does_not_end_while_planned_or_open(db: Database) -> None:
    found, worker_id = planned_job(db, shards=1, end=False), new_worker(db)
    held = claimed(db, worker_id)
    assert lifecycle.finish(db, found.id) is None
    assert commit(db, held, worker_id)
    assert lifecycle.finish(db, found.id) is None, "more may be planned"
    lifecycle.end_planning(db, found.id, "planner", pruned=0)
    assert lifecycle.finish(db, found.id) == states.DONE


def test_failures_show_in_the_ending(db: Database) -> None:
    found, worker_id = planned_job(db, shards=2, size=3), new_worker(db)
    assert commit(db, claimed(db, worker_id), worker_id, failed=[1])
    assert commit(db, claimed(db, worker_id), worker_id)
    assert lifecycle.finish(db, found.id) == states.DONE_WITH_FAILURES
    row = job_row(db, found)
    assert row.reason == ""
    assert row.started_at <= row.finished_at


def test_finish_ends_a_job_once_under_threads(db: Database) -> None:
    for _ in range(5):
        found = planned_job(db, shards=1)
        worker_id = new_worker(db)
        assert commit(db, claimed(db, worker_id), worker_id)
        answers = together(lambda n, i=found.id: lifecycle.finish(db, i), 8)  # type: ignore[misc]
        assert set(answers) <= {states.DONE, None}
        assert states.DONE in answers
        assert actions(db, found.id).count("finish") == 1


BREAKAGES: dict[str, tuple[Any, str]] = {
    "a row deleted": (sa.text("delete from item where id = (select min(id) from item)"), "rows 3"),
    "a shard deleted": (
        [sa.text("delete from item where shard_id = 1"), sa.text("delete from shard where id = 1")],
        "planned 4, shards hold 2",
    ),
    "a count changed": (sa.text("update shard set results = results + 1 where id = 1"), "results 5"),
    "planned changed": (sa.text("update job set planned = planned + 1"), "planned 5"),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_the_proof_of_completeness_fails_loudly(db: Database, what: str) -> None:
    found, worker_id = planned_job(db, shards=2), new_worker(db)
    for _ in range(2):
        assert commit(db, claimed(db, worker_id), worker_id)
    statements, expected = BREAKAGES[what]
    for statement in statements if isinstance(statements, list) else [statements]:
        execute(db, statement)
    assert lifecycle.finish(db, found.id) == states.FAILED
    ended = lifecycle.get(db, found.id)
    assert ended.state == states.FAILED
    assert "completeness proof failed" in ended.reason
    assert expected in ended.reason


def test_rows_that_were_collected_before_the_end_are_no_loss(db: Database) -> None:
    """A job that stood still for days: some of its own images have left the dataset and been taken away meanwhile."""
    found, worker_id = planned_job(db, shards=2), new_worker(db)
    assert commit(db, claimed(db, worker_id), worker_id)
    execute(db, sa.text("update item set pruned_at = 1.0 where id = (select min(id) from item)"))
    db.transact(lambda tx: collect._delete_rows(tx, [row.id for row in tx.execute(sa.select(item.c.id))], 60))
    assert count(db, item) == 1
    assert run_out(db, found.id, worker_id) == states.DONE


def test_history_has_time_and_no_lines(db: Database) -> None:
    found = planned_job(db, shards=0)
    lifecycle.pause(db, found.id, reason="a\nb\0" + "c" * 5000)
    row = db.query(sa.select(event).where(event.c.action == "pause"))[0]
    assert row.at > 0
    assert len(row.detail) == 1000
    assert row.detail.startswith("a b c")


def test_two_jobs_of_different_recipes_do_not_touch_each_other(db: Database) -> None:
    first, second = planned_job(db, shards=1), planned_job(db, shards=1)
    worker_id = new_worker(db)
    lifecycle.cancel(db, first.id)
    assert shard_states(db, second) == [states.READY]
    assert run_out(db, second.id, worker_id) == states.DONE
    assert lifecycle.get(db, first.id).state == states.CANCELLED


def test_an_empty_job_ends_at_once(db: Database) -> None:
    found, _ = lifecycle.submit(db, spec())
    add_shards(db, found, 0, 1)
    assert lifecycle.finish(db, found.id) == states.DONE
