"""One ticket's work: a feeding thread claims shards and hands out their items, the device thread runs batches.

The next shard is claimed while this one is computed, so that the device does not wait between them.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

from jobs import leases
from jobs.leases import Claim
from jobs.spec import JobSpec
from storage import shardfile
from storage.errors import Conflict, ImagemillError, ItemFailed, Unavailable
from workers import careful, faults, tuning
from workers.batches import Buckets
from workers.blobs import Kept
from workers.driver import Driver
from workers.inhand import Arrivals, Ready, Room, Run, attempt_prefix
from workers.loaded import Loaded
from workers.models import Prepared

if TYPE_CHECKING:
    from workers.stream import Stream

log = logging.getLogger("imagemill.worker")

T = TypeVar("T")

_PATIENCE_S = 0.2  # an unfilled batch waits so long for pictures that are being decoded
_AFFINITY_SHARDS = 16  # of one model in a row, before other jobs are looked at without preference
_SAMPLE = 8  # pictures that are made ready together to measure a model on
_LOOK_S = 0.02  # between two looks at orders
_UNDER_WAY_S = 1.0  # of work for the device, where that is many items
_UNWRITTEN = 2  # shards computed and not yet written: a slow store holds up the claims, not the memory
_CLAIM_S = 0.25  # a claim takes less; where all that is under way is done sooner, the next one is asked for early


class Ticket:
    """One ticket's work: the feeding thread and the device loop, joined by the queue of ready items."""

    def __init__(self, stream: Stream, queue_name: str, started: float) -> None:
        self.stream, self.queue_name, self.me = stream, queue_name, stream.me
        self.until = started + stream.settings.ticket_seconds
        # What is in hand may take longer, but not until Celery's time limit, which would look like a crash: a shard
        # of slow pictures is then given back with what is done of it, and gone on with under the next ticket.
        self.until_in_hand = self.until + stream.settings.stall_seconds / 2
        self.ready = Arrivals(stream.prepared_bytes)
        self.kept: queue.SimpleQueue[tuple[Ready, Kept]] = queue.SimpleQueue()
        self._keeping = 0  # files under way to the store
        self.buckets: Buckets[Ready] = Buckets()
        self.driver = Driver(stream.computing, self.ready, self._wanted, self._deliver)
        self.runs: dict[int, Run] = {}  # by shard id; those with items still under way
        self.finishing: list[Any] = []
        self._told: dict[int, Run] = {}  # by shard id; those whose progress the beat tells
        self._slots = Room(0)  # items between the feeder and their outcome
        self._claimer = ThreadPoolExecutor(1, thread_name_prefix="claim")
        self._ahead: Future[Run | None] | None = None  # the shard after the one that is handed out
        self._looked_at = 0.0
        self._fed_all = threading.Event()
        self._underway = 0  # items between the feeder and the device loop
        self._lock = threading.Lock()
        self._same_model = (0, "")
        self._alone: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # what has the device for itself
        self._broken = False
        self.more = False  # whether work may be left on the queue

    def run(self) -> bool:
        """The device loop; returns whether work may be left."""
        feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        feeder.start()
        try:
            self._loop()
        except BaseException:
            self._broken = True
            for run in list(self.runs.values()):
                run.dropped = True
            raise
        finally:
            feeder.join()
            self._claimer.shutdown()
            self.driver.close()
            for future in self.finishing:
                future.result()
        return self.more

    def _loop(self) -> None:
        waited_since: float | None = None
        while not (
            self._fed_all.is_set()
            and self._underway == self._keeping == 0
            and self.driver.idle
            and not self.buckets
            and self.ready.empty
        ):
            self.me.work.busy = bool(self.runs) or not self._fed_all.is_set()
            try:
                arrived = self.ready.get(timeout_s=0.02)
            except queue.Empty:
                waited_since = waited_since or time.monotonic()
                # What waits for room to be passed on cannot fill a batch.
                in_vain = self._underway == 0 or (self.ready.crowded and self.driver.idle)
                if self.buckets and (in_vain or time.monotonic() - waited_since > _PATIENCE_S):
                    self.driver.run(self.buckets.flush() or [])
                    waited_since = None
                if not self.runs:
                    self.me.work.moved()  # waiting for work is not being stuck
            else:
                waited_since = None
                if arrived:
                    self._arrived(arrived)
            self.driver.collect()
            self._record_kept()
            if not self._alone.empty():
                self.driver.collect_all()
                self._alone.get()()
            self._look()
        self._obey()

    # ---------------------------------------------------------------- the feeding thread

    def _feed(self) -> None:
        try:
            while (run := self._following()) is not None:
                if run.claim.careful:
                    self._hand_over(run)
                else:
                    self._hand_out(run)
            self.more = self.more or not self._may_go_on()
        except Exception:
            log.exception("the feeding thread broke; its shards are given back")
            for run in list(self.runs.values()):
                run.dropped = True
        finally:
            self._fed_all.set()
            self.ready.put(None)

    def _following(self) -> Run | None:
        """The next shard: the one that was claimed ahead, which is in hand even when nothing may go on any more."""
        ahead, self._ahead = self._ahead, None
        run = ahead.result() if ahead is not None else None
        return run or self._next_run()

    def _may_go_on(self) -> bool:
        return time.monotonic() < self.until and not self._must_stop()

    def _must_stop(self) -> bool:
        return self._broken or not self.me.may_write() or self._winding_up()

    def _winding_up(self) -> bool:
        """Whether to give back what is in hand."""
        return self.me.draining() or time.monotonic() > self.until_in_hand

    def _next_run(self) -> Run | None:
        """Claim a shard and make it ready to be handed out; None when there is nothing to do."""
        while self._may_go_on():
            self.stream.wait_for_store()
            if self._must_write_first():
                continue
            try:
                claim = leases.claim(self.stream.db, self.me.id, self.queue_name, self._affinity())
                if claim is None:
                    return None
                faults.point("claimed")
                run = self._opened(claim)
            except Conflict:
                return None
            except Unavailable as error:
                log.warning("no shard could be claimed: %s", error)
                self.more = True
                time.sleep(1)
                continue
            if run is not None:
                return run
        return None

    def _must_write_first(self) -> bool:
        """Whether so many shards wait to be written that none may be added; looks for a moment whether that passes."""
        unwritten = [future for future in list(self.finishing) if not future.done()]
        if len(unwritten) < _UNWRITTEN:
            return False
        return len(wait(unwritten, 0.1, FIRST_COMPLETED).not_done) >= _UNWRITTEN

    def _affinity(self) -> str | None:
        count, key = self._same_model
        return key if 0 < count < _AFFINITY_SHARDS else None

    def _opened(self, claim: Claim) -> Run | None:
        try:
            in_use = {run.loaded.key for run in list(self.runs.values())}
            settled = dataclasses.replace(claim, spec=self._settled(claim, lambda: in_use))
            loaded = self.stream.models.get(settled.spec, lambda: in_use)
            rows = shardfile.read_manifest(self.stream.store, claim.manifest_key)
            run = Run(settled, loaded, rows, attempt_prefix(claim), portion=self.stream.portion_of(claim.job_id))
            self._take_over(run)
        except Unavailable as error:
            log.warning("shard %d is given back: %s", claim.shard_id, error)
            leases.release(self.stream.db, claim, self.me.id, claim.checkpoint)
            time.sleep(1)
            return None
        except ImagemillError as error:
            self.stream.fail(claim, str(error))
            return None
        count, key = self._same_model
        asked = claim.spec.model_key  # by which the database knows it
        self._same_model = (count + 1 if key == asked else 1, asked)
        self.me.work.model = claim.spec.model
        return run

    def _settled(self, claim: Claim, in_use: Callable[[], set[str]]) -> JobSpec:
        """How the claim's model is run here; measured first where that is worth it."""
        spec = self.stream.choosing.settled(claim, in_use)
        if spec is None:
            self._wait_for_others()
            if not self._must_stop():
                with self.me.work.during(f"measuring how {claim.spec.model} runs fastest"):
                    spec = self._on_device(lambda: self.stream.choosing.measure(claim, self._sample))
        return spec or tuning.plain(claim.spec, self.stream.device)

    def _sample(self, claim: Claim, loaded: Loaded, count: int) -> list[Prepared]:
        """Some pictures of a shard, prepared, in order; those that fail are left out. In the device's thread, alone.

        Fewer of large ones.
        """
        rows = shardfile.read_manifest(self.stream.store, claim.manifest_key)[:count]
        run = Run(claim, loaded, rows, "")
        found: list[Prepared] = []
        for start in range(0, len(rows), _SAMPLE):
            positions = range(start, min(start + _SAMPLE, len(rows)))
            arrived = Arrivals()
            for position in positions:
                self.stream.fetch_and_prepare(run, [position], arrived)
            ready = sorted((item for _ in positions for item in arrived.get() or ()), key=lambda item: item.position)
            found += [item.answer for item in ready if isinstance(item.answer, Prepared)]
            if sum(one.nbytes for one in found) > self.stream.prepared_bytes / 2:
                break
        return found

    def _take_over(self, run: Run) -> None:
        """Keep what an earlier attempt had done before it gave the shard back. Raises Unavailable for its files."""
        key = run.claim.checkpoint.get("partial")
        if not key:
            return
        try:
            done, _ = shardfile.read(self.stream.store, key, run.claim.checkpoint.get("sha256"))
        except ImagemillError as error:
            log.warning("shard %d starts from its beginning: %s", run.claim.shard_id, error)
            return
        done = self.stream.blobs.take_over(run, key, done, self._must_stop, self.me.work.moved)
        run.outcomes = {outcome.position: outcome for outcome in done}
        fetched = (outcome.uri for outcome in done if outcome.failure is None)
        self.stream.readable = self.stream.readable or next(fetched, "")

    def _hand_out(self, run: Run) -> None:
        """Start the items of a shard on their way, no more of them than the device can use soon."""
        self.runs[run.claim.shard_id] = run
        todo = [i for i in range(run.claim.items) if i not in run.outcomes]
        if not todo:
            self.ready.put([Ready(run, -1, None, ItemFailed("shard", "complete", "nothing left to do"))])
        at = 0
        while at < len(todo):
            self._widen(run)
            part = todo[at : at + run.portion.size]
            if not self._may_add(run, len(part)):
                run.dropped = True
                break
            with self._lock:
                self._underway += len(part)
            self.stream.fetch_and_prepare(run, part, self.ready)
            at += len(part)
            if self._ahead is None and self._is_short(len(todo) - at):
                self._ahead = self._claimer.submit(self._next_run)
        if run.dropped:
            self.ready.put(None)

    def _may_add(self, run: Run, count: int) -> bool:
        """Wait until so many more items may be under way; False when the shard may not go on."""
        while not (run.dropped or self._must_stop()):
            if self._slots.take(count, timeout_s=0.1):
                return True
        return False

    def _is_short(self, left: int) -> bool:
        """Whether the device will be done with all that is under way and left of this shard before a claim could be.

        A shard claimed ahead is one that no other worker can take, so slow models ask for it late.
        """
        rate = self.me.work.rate
        return rate > 0 and self._underway + left < rate * _CLAIM_S

    def _hand_over(self, run: Run) -> None:
        """A shard that may kill the process runs alone: wait for all others, then let the device thread do it."""
        self._wait_for_others()
        self.runs[run.claim.shard_id] = run
        run.dropped = run.dropped or self._must_stop()
        self._on_device(lambda: self._work_carefully(run))

    def _wait_for_others(self) -> None:
        """Until no shard is in hand, or nothing may go on."""
        while (self.runs or not all(f.done() for f in list(self.finishing))) and not self._must_stop():
            time.sleep(0.02)

    def _on_device(self, work: Callable[[], T]) -> T | None:
        """What `work` returns in the device's thread, where nothing else is going on; None when that has broken."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(work())
            except Exception as error:  # noqa: BLE001 (it is raised where it is waited for)
                answer.set_exception(error)

        self._alone.put(run)
        while not wait([answer], 0.1).done:
            if self._broken:
                return None
        return answer.result()

    def _widen(self, run: Run) -> None:
        """Let enough items be under way for a few batches of this model, and for the threads where it is quick.

        More would be kept from other workers: what is under way is leased.
        """
        soon = int(self.me.work.rate * _UNDER_WAY_S)
        self._slots.widen(max(64, 4 * run.loaded.size.asked, min(8 * run.portion.size, soon)))

    # ---------------------------------------------------------------- the device thread

    def _work_carefully(self, run: Run) -> None:
        try:
            if not run.dropped and careful.work(self.stream, run, self._must_stop):
                self._complete_if(run)
            else:
                run.dropped = True
        except (Conflict, Unavailable) as error:
            log.warning("shard %d is given back: %s", run.claim.shard_id, error)
            run.dropped = True

    def _arrived(self, items: Sequence[Ready]) -> None:
        with self._lock:
            self._underway -= len([item for item in items if item.position >= 0])
        failed: list[Ready] = []
        alike: dict[Hashable, list[Ready]] = {}  # by the batches that they may be in
        for item in items:
            if item.position < 0:
                self._complete_if(item.run)
            elif item.run.dropped:
                self._slots.give(1)
                self.ready.give([item])
            elif isinstance(item.answer, ItemFailed):
                failed.append(item)
            else:
                loaded = item.run.loaded
                alike.setdefault((loaded.key, loaded.size.asked, item.answer.group), []).append(item)
        for group, those in alike.items():
            for full in self.buckets.add(group, those, self._together(those)):
                self._look()  # many that arrived together may keep a slow model busy for long
                self.driver.run(full)
        if failed:
            self._deliver(failed, [item.answer for item in failed])

    def _together(self, those: Sequence[Ready]) -> int:
        """How many such items a batch has: as many as are asked for and fit, of large pictures fewer.

        A device has a batch and may have the next, and meanwhile another is made ready: each takes a third of the room.
        """
        third = self.stream.prepared_bytes // 3
        return max(1, min(those[0].run.loaded.size.safe, third // max(1, *(item.nbytes for item in those))))

    def _wanted(self, batch: list[Ready]) -> list[Ready]:
        """Those of a batch whose shard is still ours; the others are let go."""
        may_write = self.me.may_write()
        wanted: list[Ready] = []
        unwanted: list[Ready] = []
        for item in batch:
            (wanted if may_write and not item.run.dropped else unwanted).append(item)
        self._slots.give(len(unwanted))
        self.ready.give(unwanted)
        return wanted

    def _deliver(self, items: Sequence[Ready], answers: Sequence[Any]) -> None:
        recorded = []
        for item, answer in zip(items, answers, strict=True):
            if shardfile.has_blob(answer):
                self._keep(item, answer)
            else:
                item.run.record(item.position, item.size, answer)
                recorded.append(item)
        self._slots.give(len(recorded))
        self._progressed(recorded)

    def _keep(self, item: Ready, result: Any) -> None:
        """Have a result's file put; its item stays under way until that is done."""
        self._keeping += 1
        item.run.keeping += 1
        self.stream.blobs.put(item.run, result, self._must_stop, lambda kept: self.kept.put((item, kept)))

    def _record_kept(self) -> None:
        """Record the items whose files have been put meanwhile; a shard with one that cannot be put is given back."""
        items = []
        while not self.kept.empty():
            item, kept = self.kept.get()
            items.append(item)
            self._keeping -= 1
            item.run.keeping -= 1
            if kept.result is not None:
                item.run.record(item.position, item.size, kept.result)
            else:
                item.run.dropped, item.run.broken = True, item.run.broken or kept.broken
        if items:
            self._slots.give(len(items))
            self._progressed(items)

    def _progressed(self, items: Sequence[Ready]) -> None:
        self.me.work.moved(len(items))
        runs = {item.run for item in items}
        told = {run.claim.shard_id: run for run in [*self._told.values(), *runs] if not run.ended}
        self._told = told
        self.me.work.progress = {shard_id: len(run.outcomes) for shard_id, run in told.items()}
        for run in runs:
            self._complete_if(run)

    def _complete_if(self, run: Run) -> None:
        if run.complete and not run.dropped and self.runs.pop(run.claim.shard_id, None) is not None:
            self.finishing = [f for f in self.finishing if not f.done()]
            run.ending = self.stream._writers.submit(self.stream.finish, run)
            self.finishing.append(run.ending)

    def _look(self) -> None:
        """Obey, unless that was a moment ago."""
        if time.monotonic() - self._looked_at > _LOOK_S:
            self._obey()

    def _obey(self) -> None:
        """Give back what may not go on: everything on a drain, the shards of cancelled and paused jobs, lost ones."""
        self._looked_at = time.monotonic()
        if not self.me.may_write():
            for run in self.runs.values():
                run.dropped = True
            self.runs.clear()
            return
        winding_up = self._winding_up()
        for shard_id, run in list(self.runs.items()):
            run.dropped = run.dropped or winding_up or run.claim.job_id in self.me.orders.dropped
            if run.dropped and not run.keeping:
                del self.runs[shard_id]
                self.more = True
                run.ending = self.stream._writers.submit(self.stream.give_back, run)
                self.finishing.append(run.ending)
