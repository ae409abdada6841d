"""Works on a shard whose earlier attempt died with its process: finds the item that kills, and only that one pays.

First crash: nobody knows which item it was. The next attempt goes in micro-batches and writes down each one's positions
before it touches them. Second crash: one of those positions did it; the next attempt touches them one by one. Third
crash: the one that was written down alone may be a killer, or the machine was lost just then; it is touched alone once
more. Fourth crash: it is a killer; it becomes a failure row and is not touched again. So an item costs four crashes at
most, each of another incarnation. (Hadoop's SkipBadRecords narrows down in the same way.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobs import leases
from storage import shardfile
from storage.errors import Conflict, ItemFailed, Unavailable
from workers import batches, faults
from workers.inhand import Arrivals
from workers.models import Prepared

if TYPE_CHECKING:
    from workers.inhand import Ready, Run
    from workers.stream import Stream

_MICRO_BATCH = 16
_ALONE = 2  # crashes with nothing else in hand make an item a killer; a single one may be a coincidence

KILLER = ItemFailed(
    "worker", "killed-the-process", "the worker process died or hung each time this image was touched", retry=False
)


def killers(checkpoint: Any) -> set[int]:
    """The positions that have been found out, counting one that was touched alone each time the process died."""
    found = set(checkpoint.get("killers", ()))
    suspects = checkpoint.get("suspect", ())
    guilty = len(suspects) == 1 and checkpoint.get("alone", 0) >= _ALONE
    return found | set(suspects) if guilty else found


def steps(todo: Sequence[int], suspects: Sequence[int]) -> Iterator[list[int]]:
    """The micro-batches in which positions are touched: suspects first and alone, the rest together.

    Suspects go first, so that a second killer among the rest cannot make them forgotten before they are narrowed down.
    """
    yield from ([position] for position in todo if position in set(suspects))
    rest = [position for position in todo if position not in set(suspects)]
    while rest:
        yield rest[:_MICRO_BATCH]
        rest = rest[_MICRO_BATCH:]


def times_alone(step: Sequence[int], checkpoint: Any) -> int:
    """The how-manieth time it is that this one item is touched alone; 0 when the step has several."""
    if len(step) != 1:
        return 0
    return 1 + (checkpoint.get("alone", 0) if list(step) == list(checkpoint.get("suspect", ())) else 0)


def work(stream: Stream, run: Run, must_stop: Callable[[], bool]) -> bool:
    """Bring a suspect shard to its end in the device thread, alone; False when it has to stop before."""
    checkpoint = run.claim.checkpoint
    found = killers(checkpoint)
    for position in found - set(run.outcomes):
        run.record(position, None, KILLER)
    todo = [position for position in range(run.claim.items) if position not in run.outcomes]
    for step in steps(todo, checkpoint.get("suspect", ())):
        if must_stop() or run.dropped or run.claim.job_id in stream.me.orders.dropped:
            return False
        alone = times_alone(step, checkpoint)
        if not leases.suspect(stream.db, run.claim, stream.me.id, step, sorted(found), alone):
            raise Conflict(f"shard {run.claim.shard_id} is not ours any more")
        _touch(stream, run, step, must_stop)
    leases.suspect(stream.db, run.claim, stream.me.id, [], sorted(found))
    return True


def _touch(stream: Stream, run: Run, positions: Sequence[int], must_stop: Callable[[], bool]) -> None:
    """Fetch, decode, prepare and infer a few items, and nothing else meanwhile."""
    arrived = Arrivals()
    for position in positions:
        stream.fetch_and_prepare(run, [position], arrived)
    ready = [item for _ in positions for item in arrived.get() or ()]
    for item in ready:
        if isinstance(item.answer, ItemFailed):
            run.record(item.position, item.size, item.answer)
    prepared = [item for item in ready if isinstance(item.answer, Prepared)]
    for _, group in itertools.groupby(sorted(prepared, key=_group_name), key=_group_name):
        items = list(group)
        answers = batches.infer(run.loaded.model, [item.answer for item in items], run.loaded.size)  # type: ignore[misc]
        faults.point("inferred")
        for item, answer in zip(items, answers, strict=True):
            kept = _kept(stream, run, answer, must_stop) if shardfile.has_blob(answer) else answer
            run.record(item.position, item.size, kept)
    stream.me.work.moved(len(positions))
    stream.me.work.progress = {run.claim.shard_id: len(run.outcomes)}


def _kept(stream: Stream, run: Run, result: Any, must_stop: Callable[[], bool]) -> Any:
    """The result with its file put. Raises Unavailable when that takes too long."""
    kept = stream.blobs.put_now(run, result, must_stop)
    if kept.broken:
        return result  # it is tried again with the object, and counted as the shard's error there
    if kept.result is None:
        raise Unavailable("the store does not take a file")
    return kept.result


def _group_name(item: Ready) -> str:
    assert isinstance(item.answer, Prepared)
    return repr(item.answer.group)
