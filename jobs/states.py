"""The states of a job and of a shard, and which moves between them are legal. Pure.

job      planning ──end_planning──▶ running ──finish──▶ done | done with failures | failed | cancelled
             │                                              ▲
             └──────────────────cancel──────────────────────┘
         `paused` and `cancelled` are flags beside the state, read at every claim and beat: a worker never has to
         reach a state for them to hold.

shard    ready ──claim──▶ leased ──commit──▶ done
           ▲                 │ ──commit────▶ quarantined   its items, given up, are failure rows
           │                 │ ──release───▶ ready         drain, store outage: costs nothing; the checkpoint stays
           │                 │ ──fail──────▶ ready         errors + 1, not before a backoff
           │                 │ ──expire────▶ ready         crashes + 1, not before a backoff
           └─────────────────┘
         ready | leased ──cancel──▶ cancelled
"""

from __future__ import annotations

PLANNING, RUNNING = "planning", "running"
DONE, DONE_WITH_FAILURES, FAILED, CANCELLED = "done", "done with failures", "failed", "cancelled"

READY, LEASED, QUARANTINED = "ready", "leased", "quarantined"

JOB_FINAL = frozenset({DONE, DONE_WITH_FAILURES, FAILED, CANCELLED})
JOB_MOVES = {
    PLANNING: frozenset({RUNNING, FAILED, CANCELLED}),
    RUNNING: JOB_FINAL,
    **{state: frozenset[str]() for state in JOB_FINAL},
}

SHARD_FINAL = frozenset({DONE, QUARANTINED, CANCELLED})
SHARD_MOVES = {
    READY: frozenset({LEASED, CANCELLED}),
    LEASED: frozenset({READY, DONE, QUARANTINED, CANCELLED}),
    **{state: frozenset[str]() for state in SHARD_FINAL},
}


def shown(state: str, *, paused: bool, cancelled: bool) -> str:
    """The word for people: a flag that has been set shows before the state has followed it."""
    if state in JOB_FINAL:
        return state
    if cancelled:
        return "cancelling"
    return "paused" if paused else state


def ending(*, failures: int, cancelled: bool, complete: bool) -> str:
    """The final state of a job in which no shard is open."""
    if cancelled:
        return CANCELLED
    if not complete:
        return FAILED
    return DONE_WITH_FAILURES if failures else DONE


LONGEST_BACKOFF_S = 60.0


def backoff_s(times: int, base_s: float = 2, cap_s: float = LONGEST_BACKOFF_S) -> float:
    """Pause before a shard that failed `times` times may run again: doubles each time, up to a cap."""
    return float(min(cap_s, base_s * 2 ** max(0, times - 1)))
