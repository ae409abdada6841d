"""The moves that the verbs make are those that states.py allows; words and pauses."""

from __future__ import annotations

import pytest

from jobs import states


def test_every_state_has_its_moves() -> None:
    for moves, final in ((states.JOB_MOVES, states.JOB_FINAL), (states.SHARD_MOVES, states.SHARD_FINAL)):
        assert set().union(*moves.values()) <= set(moves)
        assert {state for state, there in moves.items() if not there} == final
        reached, todo = set(), [next(iter(moves))]
        while todo:
            state = todo.pop()
            reached.add(state)
            todo += moves[state] - reached
        assert reached == set(moves), "every state can be reached from the first"


@pytest.mark.parametrize(
    ("failures", "cancelled", "complete", "expected"),
    [
        (0, False, True, "done"),
        (3, False, True, "done with failures"),
        (0, False, False, "failed"),
        (3, False, False, "failed"),
        (0, True, True, "cancelled"),
        (3, True, False, "cancelled"),
    ],
)
def test_ending(failures: int, cancelled: bool, complete: bool, expected: str) -> None:
    assert states.ending(failures=failures, cancelled=cancelled, complete=complete) == expected
    assert expected in states.JOB_FINAL


@pytest.mark.parametrize(
    ("state", "paused", "cancelled", "expected"),
    [
        ("running", False, False, "running"),
        ("planning", True, False, "paused"),
        ("running", True, True, "cancelling"),
        ("done", True, True, "done"),
    ],
)
def test_shown(state: str, paused: bool, cancelled: bool, expected: str) -> None:
    assert states.shown(state, paused=paused, cancelled=cancelled) == expected


def test_backoff_doubles_up_to_a_cap() -> None:
    assert [states.backoff_s(n) for n in (0, 1, 2, 3, 4)] == [2, 2, 4, 8, 16]
    assert 30 <= states.backoff_s(50) == states.backoff_s(5000) <= 300
    assert states.backoff_s(1, base_s=1) == 1
