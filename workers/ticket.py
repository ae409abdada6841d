"""One ticket's work: a feeding thread claims shards and hands out their items, the device thread runs batches.

The next shard is claimed while this one is computed, so that the device does not wait between them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs import leases
from jobs.leases import Claim
from storage import shardfile
from storage.errors import Conflict, ImagemillError, ItemFailed, Unavailable
from workers import batches, careful, faults
from workers.batches import Buckets
from workers.blobs import Kept
from workers.inhand import Ready, Run, attempt_prefix
from workers.models import Prepared

if TYPE_CHECKING:
    from workers.stream import Stream

log = logging.getLogger("imagemill.worker")

_PATIENCE_S = 0.2  # an unfilled batch waits so long for pictures that are being decoded
_AFFINITY_SHARDS = 16  # of one model in a row, before other jobs are looked at without preference


class Ticket:
    """One ticket's work: the feeding thread and the device loop, joined by the queue of ready items."""

    def __init__(self, stream: Stream, queue_name: str, started: float) -> None:
        self.stream, self.queue_name, self.me = stream, queue_name, stream.me
        self.until = started + stream.settings.ticket_seconds
        # What is in hand may take longer, but not until Celery's time limit, which would look like a crash: a shard
        # of slow pictures is then given back with what is done of it, and gone on with under the next ticket.
        self.until_in_hand = self.until + stream.settings.stall_seconds / 2
        self.ready: queue.SimpleQueue[Ready | None] = queue.SimpleQueue()
        self.kept: queue.SimpleQueue[tuple[Ready, Kept]] = queue.SimpleQueue()
        self._keeping = 0  # files under way to the store
        self.buckets: Buckets[Ready] = Buckets()
        self.runs: dict[int, Run] = {}  # by shard id; those with items still under way
        self.finishing: list[Any] = []
        self._slots = threading.Semaphore(0)
        self._slots_given = 0
        self._fed_all = threading.Event()
        self._underway = 0  # items between the feeder and the device loop
        self._lock = threading.Lock()
        self._same_model = (0, "")
        self._careful: queue.SimpleQueue[tuple[Run, threading.Event]] = queue.SimpleQueue()
        self._broken = False
        self._free_since = time.perf_counter()  # when the device last had nothing to do
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
            for future in self.finishing:
                future.result()
        return self.more

    def _loop(self) -> None:
        waited_since: float | None = None
        while not (
            self._fed_all.is_set() and self._underway == self._keeping == 0 and not self.buckets and self.ready.empty()
        ):
            self.me.work.busy = bool(self.runs) or not self._fed_all.is_set()
            try:
                arrived = self.ready.get(timeout=0.02)
            except queue.Empty:
                waited_since = waited_since or time.monotonic()
                if self.buckets and (self._underway == 0 or time.monotonic() - waited_since > _PATIENCE_S):
                    self._infer(self.buckets.flush() or [])
                    waited_since = None
                if not self.runs:
                    self.me.work.moved()  # waiting for work is not being stuck
            else:
                waited_since = None
                if arrived is not None:
                    self._arrived(arrived)
            self._record_kept()
            self._work_carefully()
            self._obey()

    # ---------------------------------------------------------------- the feeding thread

    def _feed(self) -> None:
        try:
            while self._may_go_on():
                run = self._next_run()
                if run is None:
                    return
                if run.claim.careful:
                    self._hand_over(run)
                else:
                    self._hand_out(run)
            self.more = True
        except Exception:
            log.exception("the feeding thread broke; its shards are given back")
            for run in list(self.runs.values()):
                run.dropped = True
        finally:
            self._fed_all.set()
            self.ready.put(None)

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

    def _affinity(self) -> str | None:
        count, key = self._same_model
        return key if 0 < count < _AFFINITY_SHARDS else None

    def _opened(self, claim: Claim) -> Run | None:
        try:
            in_use = {run.loaded.key for run in list(self.runs.values())}
            loaded = self.stream.models.get(claim.spec, lambda: in_use)
            rows = shardfile.read_manifest(self.stream.store, claim.manifest_key)
            run = Run(claim, loaded, rows, attempt_prefix(claim))
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
        self._same_model = (count + 1 if key == loaded.key else 1, loaded.key)
        self.me.work.model = claim.spec.model
        return run

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
            self.ready.put(Ready(run, -1, None, ItemFailed("shard", "complete", "nothing left to do")))
        self._widen(run)
        for position in todo:
            while not self._slots.acquire(timeout=0.1):
                if run.dropped or self._must_stop():
                    break
            if run.dropped or self._must_stop():
                run.dropped = True
                break
            with self._lock:
                self._underway += 1
            self.stream.fetch_and_prepare(run, position, self.ready)
        if run.dropped:
            self.ready.put(None)

    def _hand_over(self, run: Run) -> None:
        """A shard that may kill the process runs alone: wait for all others, then let the device thread do it."""
        while self.runs or not all(f.done() for f in list(self.finishing)):
            if self._must_stop():
                break
            time.sleep(0.02)
        self.runs[run.claim.shard_id] = run
        if self._must_stop():
            run.dropped = True
        done = threading.Event()
        self._careful.put((run, done))
        while not done.wait(0.1) and not self._broken:
            pass

    def _widen(self, run: Run) -> None:
        """Let enough items be under way for a few batches of this model."""
        wanted = max(64, 4 * run.loaded.size.asked)
        for _ in range(wanted - self._slots_given):
            self._slots.release()
        self._slots_given = max(wanted, self._slots_given)

    # ---------------------------------------------------------------- the device thread

    def _work_carefully(self) -> None:
        if self._careful.empty():
            return
        run, done = self._careful.get()
        try:
            if not run.dropped and careful.work(self.stream, run, self._must_stop):
                self._complete_if(run)
            else:
                run.dropped = True
        except (Conflict, Unavailable) as error:
            log.warning("shard %d is given back: %s", run.claim.shard_id, error)
            run.dropped = True
        finally:
            done.set()

    def _arrived(self, item: Ready) -> None:
        if item.position >= 0:
            with self._lock:
                self._underway -= 1
        if item.run.dropped:
            self._free(item)
        elif item.position < 0:
            self._complete_if(item.run)
        elif isinstance(item.answer, ItemFailed):
            self._deliver([item], [item.answer])
        else:
            group = (item.run.loaded.key, item.answer.group)
            full = self.buckets.add(group, item, item.run.loaded.size.safe)
            if full:
                self._infer(full)

    def _infer(self, batch: list[Ready]) -> None:
        batch, dropped = [i for i in batch if not i.run.dropped], [i for i in batch if i.run.dropped]
        for item in dropped:
            self._free(item)
        if not batch or not self.me.may_write():
            for item in batch:
                self._free(item)
            return
        loaded = batch[0].run.loaded
        started = time.perf_counter()
        batch[0].run.spent("idle", started - self._free_since)
        prepared = [item.answer for item in batch if isinstance(item.answer, Prepared)]
        answers = batches.infer(loaded.model, prepared, loaded.size)
        faults.point("inferred")
        self._free_since = time.perf_counter()
        each = (self._free_since - started) / len(batch)
        for item in batch:
            item.run.spent("device", each)
        self._deliver(batch, answers)

    def _free(self, item: Ready) -> None:
        self._slots.release()

    def _deliver(self, items: Sequence[Ready], answers: Sequence[Any]) -> None:
        recorded = []
        for item, answer in zip(items, answers, strict=True):
            if shardfile.has_blob(answer):
                self._keep(item, answer)
            else:
                self._record(item, answer)
                recorded.append(item)
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
                self._record(item, kept.result)
            else:
                self._free(item)
                item.run.dropped, item.run.broken = True, item.run.broken or kept.broken
        if items:
            self._progressed(items)

    def _record(self, item: Ready, answer: Any) -> None:
        self._free(item)
        item.run.outcomes[item.position] = self.stream.outcome(item.run, item.position, item.size, answer)

    def _progressed(self, items: Sequence[Ready]) -> None:
        self.me.work.moved(len(items))
        for run in {id(item.run): item.run for item in items}.values():
            self.me.work.progress = {**self.me.work.progress, run.claim.shard_id: len(run.outcomes)}
            self._complete_if(run)

    def _complete_if(self, run: Run) -> None:
        if run.complete and not run.dropped and self.runs.pop(run.claim.shard_id, None) is not None:
            self.finishing = [f for f in self.finishing if not f.done()]
            self.finishing.append(self.stream._writers.submit(self.stream.finish, run))

    def _obey(self) -> None:
        """Give back what may not go on: everything on a drain, the shards of cancelled and paused jobs, lost ones."""
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
                self.finishing.append(self.stream._writers.submit(self.stream.give_back, run))
