"""The index answers what it was told: current rows only, in the order of bytes, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from jobs import leases, lifecycle
from jobs.lifecycle import Job
from storage import index
from storage.database import Database
from storage.errors import ItemFailed
from storage.results import detections
from storage.shardfile import Outcome
from storage.tables import MAX_SHARD_ITEMS, item, item_id, item_label
from tests.support import claimed, count, execute, new_worker, opened, outcome, planned_job, result, written

# In the order of their UTF-8 bytes: neither a locale's nor UTF-16's order.
KEYS = sorted(
    [*"aABZ_z~éßäöｱ🐕\uffff", "a/b", "a b", "a-b", "a.b", "ab", "e\u0301", "日本"], key=lambda key: key.encode()
)


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database with tables."""
    with opened(database_url) as database:
        yield database


def recorded(db: Database, outcomes: list[Outcome], *, dataset: str = "/d", replaces: int = 0) -> Job:
    """A finished job of one shard with these outcomes."""
    found = planned_job(db, shards=1, size=len(outcomes), replaces=replaces, dataset=dataset)
    worker_id = new_worker(db)
    claim = claimed(db, worker_id)
    assert leases.commit(db, claim, worker_id, written(claim), outcomes)
    lifecycle.finish(db, found.id)
    return lifecycle.get(db, found.id)


def keys(found: Iterator[index.Found]) -> list[str]:
    return [row.key for row in found]


def detected(position: int, key: str, **scores: float) -> Outcome:
    """An item with one object of each label."""
    n = len(scores)
    boxes = np.zeros((n, 4), np.float32)
    found = detections.Result(boxes, np.float32(list(scores.values())), np.zeros(n, np.int32), tuple(scores))
    return outcome(position, key, result=found)


# --- recording ------------------------------------------------------------------------------------------------------


def test_a_row_keeps_what_the_outcome_said(db: Database) -> None:
    failure = ItemFailed("fetch", "timeout", "line\none \0\ud83d", retry=True)
    rows = [
        outcome(0, "a", result=result(0.25, 0.75), width=np.int32(640), height=np.int64(480)),
        outcome(1, "b", result=None, failure=failure, width=None, height=None),
        outcome(2, "c", result=detections.empty()),
    ]
    found = recorded(db, rows)
    a, b, c = index.find(db, found.recipe_id)
    assert (a.key, a.uri, a.ok, a.width, a.height, a.count, a.top_score) == ("a", rows[0].uri, True, 640, 480, 2, 0.75)
    assert (a.labels, a.position, a.shard_id, a.job_id) == ({"dog": 2}, 0, 1, found.id)
    assert (b.ok, b.count, b.top_score, b.width) == (False, None, None, None)
    assert (b.stage, b.reason, b.message, b.labels) == ("fetch", "timeout", "line one ?", {})
    assert (c.ok, c.count, c.top_score, c.labels, c.position) == (True, 0, None, {}, 2)
    assert isinstance(a.ok, bool)


def test_numbers_of_numpy_are_numbers(db: Database) -> None:
    recorded(db, [outcome(0, "a", width=np.int32(640), height=np.uint16(480))])
    assert count(db, item, item.c.width > 639, item.c.height == 480) == 1
    if db.is_sqlite:
        assert db.query(sa.text("select typeof(width), typeof(top_score) from item"))[0] == ("integer", "real")


def test_the_last_position_of_a_shard(db: Database) -> None:
    recorded(db, [outcome(0, "a")])
    last = MAX_SHARD_ITEMS - 1
    execute(db, sa.update(item).values(id=item_id(1, last)))
    assert [row.position for row in index.find(db, 1)] == [last]
    assert index.current_positions(db, 1) == {last}
    for position in (-1, MAX_SHARD_ITEMS):
        with pytest.raises(ValueError, match="expected a position"):
            item_id(1, position)


def test_supersede_leaves_one_current_row_a_key(db: Database) -> None:
    recorded(db, [detected(0, "a", dog=0.9), detected(1, "b", dog=0.9)])
    second = recorded(db, [detected(0, "a", cat=0.5)], replaces=1)
    assert [(r.key, r.job_id, r.labels) for r in index.find(db, 1)] == [
        ("a", second.id, {"cat": 1}),
        ("b", 1, {"dog": 1}),
    ]
    assert index.label_counts(db, 1) == [("cat", 1, 1), ("dog", 1, 1)]
    assert keys(index.find(db, 1, label="dog")) == ["b"]
    assert keys(index.find(db, 1, job_id=1)) == ["b"]
    assert index.current_positions(db, 1) == {1}
    assert count(db) == 3


def test_supersede_of_more_keys_than_one_list_holds(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_IN_LIMIT", 3)
    names = [f"k{i:02d}" for i in range(10)]
    for replaces in (0, 10):
        recorded(db, [outcome(i, key) for i, key in enumerate(names)], replaces=replaces)
    assert count(db, item, item.c.current) == 10
    assert len(index.known(db, 1, names)) == 10


# --- freshness ------------------------------------------------------------------------------------------------------


def test_known(db: Database) -> None:
    assert not index.has_items(db, 1)
    retry = outcome(1, "b", result=None, failure=ItemFailed("fetch", "x", "x", retry=True))
    recorded(db, [outcome(0, "a", fingerprint="f1"), retry, outcome(2, "c", failed=True)])
    assert index.has_items(db, 1)
    assert not index.has_items(db, 2)
    db.transact(lambda tx: index.mark_pruned(tx, [item_id(1, 2)], pruned=True))
    known = index.known(db, 1, ["a", "b", "c", "nothing"])
    assert known == {
        "a": index.Known("f1", False, False, item_id(1, 0)),
        "b": index.Known(retry.fingerprint, True, False, item_id(1, 1)),
        "c": index.Known("mtime:1+1", False, True, item_id(1, 2)),
    }
    assert index.known(db, 1, []) == {}
    recorded(db, [outcome(0, "a", fingerprint="f2")], replaces=1)
    assert index.known(db, 1, ["a"])["a"].fingerprint == "f2"


def test_pruned_rows_are_kept_but_not_found(db: Database) -> None:
    recorded(db, [detected(0, "a", dog=0.9), outcome(1, "b", failed=True)])
    ids = [item_id(1, 0), item_id(1, 1)]
    db.transact(lambda tx: index.mark_pruned(tx, ids, pruned=True))
    assert keys(index.find(db, 1)) == []
    assert index.label_counts(db, 1) == index.reason_counts(db, 1) == []
    assert index.totals(db, 1) == (0, 0)
    assert list(index.objects(db, 1)) == list(index.current_keys(db, 1)) == []
    assert count(db) == 2
    db.transact(lambda tx: index.mark_pruned(tx, ids, pruned=False))
    assert keys(index.find(db, 1)) == ["a", "b"]


# --- order and pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [1, 2, 3, 7, 100])
def test_pages_are_stable_in_the_order_of_bytes(db: Database, page: int) -> None:
    shuffled = KEYS[::2] + KEYS[1::2]
    recorded(db, [outcome(i, key) for i, key in enumerate(shuffled)])
    assert keys(index.find(db, 1, page=page)) == KEYS
    assert [key for part in index.current_keys(db, 1, page=page) for key, _ in part] == KEYS
    for limit in (0, 1, 5, len(KEYS), 1000):
        assert keys(index.find(db, 1, page=page, limit=limit)) == KEYS[:limit]


def test_pages_neither_lose_nor_double_while_a_job_commits(db: Database) -> None:
    recorded(db, [outcome(i, f"k{i:03d}") for i in range(60)])
    seen = []
    for row in index.find(db, 1, page=7):
        seen.append(row.key)
        if len(seen) == 20:
            recorded(db, [outcome(i, f"k{i:03d}") for i in range(60)], replaces=60)
    assert seen == [f"k{i:03d}" for i in range(60)]


def test_recipes_do_not_mix(db: Database) -> None:
    recorded(db, [detected(0, "a", dog=0.9)], dataset="/one")
    recorded(db, [detected(0, "a", cat=0.9), outcome(1, "b", failed=True)], dataset="/two")
    assert [(r.key, r.labels) for r in index.find(db, 1)] == [("a", {"dog": 1})]
    assert index.label_counts(db, 2) == [("cat", 1, 1)]
    assert (index.totals(db, 1), index.totals(db, 2)) == ((1, 0), (1, 1))
    assert list(index.known(db, 1, ["a", "b"])) == ["a"]
    assert [o.shard_id for o in index.objects(db, 2)] == [2]


# --- questions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def zoo(db: Database) -> Database:
    """Five images: two with dogs, one with a cat, an empty one and a failure."""
    rows = [
        detected(0, "both", dog=0.5, cat=0.9),
        detected(1, "cat", cat=0.25),
        detected(2, "dogs", dog=0.75),
        outcome(3, "empty", result=detections.empty()),
        outcome(4, "failed", failed=True),
    ]
    recorded(db, rows)
    return db


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ({}, ["both", "cat", "dogs", "empty", "failed"]),
        ({"label": "dog"}, ["both", "dogs"]),
        ({"label": "Dog"}, []),
        ({"label": "dog", "min_score": 0.5}, ["both", "dogs"]),
        ({"label": "dog", "min_score": 0.6}, ["dogs"]),
        ({"min_score": 0.6}, ["both", "dogs"]),
        ({"min_score": 0.0}, ["both", "cat", "dogs"]),
        ({"ok": True}, ["both", "cat", "dogs", "empty"]),
        ({"ok": False}, ["failed"]),
        ({"ok": False, "label": "dog"}, []),
        ({"reason": "truncated"}, ["failed"]),
        ({"reason": "other"}, []),
        ({"job_id": 1, "label": "cat"}, ["both", "cat"]),
        ({"job_id": 2}, []),
        ({"label": "cat", "limit": 1}, ["both"]),
        ({"label": "x' or '1'='1"}, []),
    ],
)
@pytest.mark.parametrize("page", [1, 1000])
@pytest.mark.parametrize("few", [0, 5000])
def test_find(
    zoo: Database,
    question: dict[str, Any],
    expected: list[str],
    page: int,
    few: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index, "_FEW", few)
    assert keys(index.find(zoo, 1, page=page, **question)) == expected


def test_a_rare_label_is_found_without_a_look_at_all_rows(tmp_path: Path) -> None:
    plans: list[str] = []

    def note(connection: Any, _cursor: Any, text: str, values: Any, *_: Any) -> None:
        if text.startswith("SELECT item.id,"):
            rows = connection.connection.driver_connection.execute(f"EXPLAIN QUERY PLAN {text}", values)
            plans.extend(row[3] for row in rows)

    with opened(f"sqlite:///{tmp_path / 'index.db'}") as db:
        recorded(db, [*(detected(i, f"{i:05d}", cat=0.5) for i in range(2000)), detected(2000, "z", dog=0.5)])
        sa.event.listen(db.engine, "before_cursor_execute", note)
        assert keys(index.find(db, 1, label="dog")) == ["z"]
    assert plans, "the plan of the search has been seen"
    assert [plan for plan in plans if plan.startswith(("SEARCH item", "SCAN item")) and "(id=?)" not in plan] == []


def test_counts(zoo: Database) -> None:
    assert index.label_counts(zoo, 1) == [("cat", 2, 2), ("dog", 2, 2)]
    assert index.reason_counts(zoo, 1) == [("decode", "truncated", 1)]
    assert index.reason_counts(zoo, 1, job_id=2) == []
    assert index.totals(zoo, 1) == (4, 1)
    assert index.totals(zoo, 99) == (0, 0)


def test_the_score_of_the_index_is_the_score_of_the_result(db: Database) -> None:
    # 0.6 has no exact float32; asking for the very number that was stored must find it.
    recorded(db, [outcome(0, "a", result=result(0.6))])
    (row,) = index.find(db, 1)
    assert row.top_score == float(np.float32(0.6))
    assert keys(index.find(db, 1, label="dog", min_score=row.top_score)) == ["a"]
    assert keys(index.find(db, 1, label="dog", min_score=0.6)) == ["a"]


def test_objects_are_those_with_current_items_in_order(db: Database) -> None:
    recorded(db, [outcome(0, "a"), outcome(1, "b")])
    second = recorded(db, [outcome(0, "c")])
    assert [o.shard_id for o in index.objects(db, 1, page=1)] == [1, 2]
    recorded(db, [outcome(0, "a"), outcome(1, "b")], replaces=2)
    found = list(index.objects(db, 1, page=2))
    assert [o.shard_id for o in found] == [2, 3]
    assert found[0].job_id == second.id
    assert found[0].key.endswith("/items.parquet")
    assert found[0].sha256 == "00" * 32
    assert index.current_positions(db, 1) == set()
    assert index.current_positions(db, 3) == {0, 1}


def test_shards_of_thousands(db: Database) -> None:
    """More keys and rows than one statement takes."""
    found = planned_job(db, shards=2)
    outcomes = [outcome(i, f"train/{i:06d}.jpg") for i in range(6000)]
    for number in (1, 2):
        made = [Outcome(o.position, f"{number}/{o.key}", *_rest(o)) for o in outcomes]
        rows = index.rows_of(recipe_id=1, job_id=found.id, shard_id=number, fence=1, kind="detections", outcomes=made)
        db.transact(lambda tx, rows=rows: index.record(tx, rows))  # type: ignore[misc]
    assert count(db) == count(db, item_label) == 12_000
    assert len(index.known(db, 1, [f"1/train/{i:06d}.jpg" for i in range(1, 7000)])) == 5999


def _rest(made: Outcome) -> tuple[Any, ...]:
    return made.uri, made.fingerprint, made.width, made.height, made.result, made.failure
