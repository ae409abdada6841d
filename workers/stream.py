"""The worker's stream: claim -> fetch || decode || prepare -> infer -> write -> commit, across shards, without a gap.

Five kinds of threads, one direction:

    feeder      claims shards, reads their manifests, hands out items while there is room
    fetchers    read an image's bytes; decoders turn them into pixels and prepare them
    device      (the caller of `run`) forms batches and runs them; nothing else touches the device
    putters     put files that items became (workers/blobs.py)
    writers     put a finished shard's object and commit it

The room is counted in bytes of pictures, encoded, decoded and prepared, and in items under way, so that a slow device
stops the feeding. Here is what threads do with one item and at the end of a shard; ticket.py drives them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jobs import leases, lifecycle, states
from jobs.leases import Claim
from storage import objects, shardfile
from storage.database import Database
from storage.errors import BadInput, ImagemillError, ItemFailed, Misconfigured, NotFound, Unavailable
from storage.objects import Store
from storage.settings import Settings
from storage.shardfile import Outcome
from workers import faults, images, provenance, tuning, videos
from workers.batchdecode import OnDevice
from workers.blobs import Blobs
from workers.choosing import Choosing
from workers.computing import Computing
from workers.incarnation import Incarnation
from workers.inhand import Arrivals, Portion, Ready, Room, Run, attempt_prefix
from workers.loaded import Models
from workers.models import Item, Prepared
from workers.sandbox import Sandbox
from workers.ticket import Ticket

log = logging.getLogger("imagemill.worker")

_PORTION_BYTES = 1_000_000  # of encoded pictures that one thread passes on together, and one picture more
_PORTIONS = 1000  # jobs whose portions are remembered
_DEVICE_DECODES = 32  # threads that wait for a GPU to decode, which takes what waits together
_OUTAGE_FETCHES = 5  # failed fetches in a row, with none that worked between them, are the store's fault
_WRITE_PATIENCE_S = 60  # for a store that does not take a result, before the shard is given back

_DROPPED = ItemFailed("fetch", "dropped", "the shard was given back")

UNAVAILABLE = "unavailable"  # reason of an item whose bytes a server or disk did not give


class Stream:
    """What one worker process keeps between tickets: its threads, its models, its incarnation."""

    def __init__(self, db: Database, store: Store, settings: Settings, incarnation: Incarnation, device: str) -> None:
        self.db, self.store, self.settings, self.me = db, store, settings, incarnation
        self.device = device
        self.computing = Computing(device)
        self._portions: dict[int, Portion] = {}
        me = incarnation
        self.models = Models(store, settings, device, me.moved, self.computing.running, me.during)
        self.choosing = Choosing(db, self.models, device, settings.tune_seconds, me.moved)
        # One more than cores, so that none is idle while a decoder waits for Python or for a hand-over.
        threads = settings.decode_threads or max(2, min(16, os.cpu_count() or 2)) + 1
        if settings.gpu_decode and device != "cpu":
            threads = max(threads, _DEVICE_DECODES)
        self._fetchers = ThreadPoolExecutor(max(8, threads), thread_name_prefix="fetch")
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._writers = ThreadPoolExecutor(2, thread_name_prefix="write")
        # Budgets: a decoder that holds encoded bytes waits for decoded room only, which decoders alone hold and always
        # give back, and for room for what it has prepared, which the device gives back; so nobody waits in a circle.
        eighth = settings.buffer_bytes // 8
        self._encoded, self._decoded = Room(eighth), Room(3 * eighth)
        self.prepared_bytes = 3 * eighth  # between decoders and device, of each ticket
        self.blobs = Blobs(store, eighth)
        self._pictures = _pictures(settings, threads, device)
        self._failed_fetches = 0
        self.readable = ""  # the URI of an image that could be read, to tell an outage from broken objects

    def run(self, queue_name: str) -> bool:
        """Work on a queue until nothing is claimable, the ticket's time is over, or a drain. True: work may be left.

        Raises nothing for a job's sake: whatever happens to a shard is recorded or given back.
        """
        started = time.monotonic()
        if not self.me.ensure():
            return True
        try:
            return Ticket(self, queue_name, started).run()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Nothing is in hand any more: give back whatever the database still thinks is ours.

        That is a claim whose answer was lost, or a shard that could not be given back while the database was away.
        """
        self.me.work.busy = False
        self.me.work.progress = {}
        try:
            if self.me.may_write():
                leases.release_all(self.db, self.me.id)
        except ImagemillError as error:
            log.warning("leases could not be given back, they will run out: %s", error)

    def close(self) -> None:
        """Stop the threads and free the device."""
        for pool in (self._fetchers, self._decoders, self._writers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.blobs.close()
        self._pictures.close()
        self.models.close()

    # ---------------------------------------------------------------- one item, in the pools' threads

    def portion_of(self, job_id: int) -> Portion:
        """How many of a job's items go through the threads together."""
        if len(self._portions) > _PORTIONS and job_id not in self._portions:
            self._portions.clear()
        return self._portions.setdefault(job_id, Portion())

    def fetch_and_prepare(self, run: Run, positions: Sequence[int], ready: Arrivals) -> None:
        """Start items on their way; each arrives in `ready` once, whatever happens, together with others or alone."""
        if any(run.rows[position].uri for position in positions):
            self._fetchers.submit(self._fetch, run, positions, ready)
        else:
            self._decoders.submit(self._prepare_bare, run, positions, ready)

    def _fetch(self, run: Run, positions: Sequence[int], ready: Arrivals) -> None:
        started = time.perf_counter()
        fetched: list[tuple[int, bytes]] = []
        nbytes = 0
        for position in positions:
            data = self._fetched(run, position, ready)
            if data is None:
                continue
            fetched.append((position, data))
            nbytes += len(data)
            if nbytes > _PORTION_BYTES:
                self._pass_on(run, fetched, nbytes, started, ready)
                fetched, nbytes, started = [], 0, time.perf_counter()
        if fetched:
            self._pass_on(run, fetched, nbytes, started, ready)

    def _fetched(self, run: Run, position: int, ready: Arrivals) -> bytes | None:
        """An item's bytes, b"" for one without an image; None when it failed, which is then on its way."""
        try:
            uri = run.rows[position].uri
            return b"" if run.dropped or not uri else self._read(run, uri)
        except ItemFailed as error:
            failure = error
        except Exception as error:  # noqa: BLE001 (an item must arrive, whatever went wrong with it)
            failure = _unexpected("fetch", error)
        ready.put([Ready(run, position, None, failure)])
        return None

    def _pass_on(
        self, run: Run, fetched: Sequence[tuple[int, bytes]], nbytes: int, started: float, ready: Arrivals
    ) -> None:
        """Have items decoded that were fetched since `started`, once there is room for their bytes."""
        seconds = time.perf_counter() - started
        run.spent("fetch", seconds)
        self._encoded.take(nbytes)
        self._decoders.submit(self._prepare, run, fetched, seconds, ready)

    def _read(self, run: Run, uri: str) -> bytes:
        try:
            data = self._bytes(uri)
        except NotFound as error:
            raise ItemFailed("fetch", "not-found", str(error)) from error
        except BadInput as error:
            reason = "too-many-bytes" if "MAX_IMAGE_BYTES" in str(error) else "refused"
            raise ItemFailed("fetch", reason, str(error)) from error
        except Misconfigured as error:
            raise ItemFailed("fetch", "refused", str(error), retry=True) from error
        except Unavailable as error:
            self._failed_fetches += 1
            if self._failed_fetches >= _OUTAGE_FETCHES:
                run.dropped = run.dropped or self._is_outage(run)
            raise ItemFailed("fetch", UNAVAILABLE, str(error), retry=True) from error
        self._failed_fetches, self.readable = 0, uri
        faults.point("fetched")
        return data

    def _bytes(self, uri: str) -> bytes:
        if uri.startswith("frame:"):
            return videos.read(uri, self.settings)
        return objects.read(uri, self.settings, self.settings.max_image_bytes)

    def _is_outage(self, run: Run) -> bool:
        """Whether nothing can be read, not even what could be before; else the objects that failed are to blame."""
        try:
            if self.readable:
                self._bytes(self.readable)
            else:
                self.store.get(run.claim.manifest_key)
        except Unavailable:
            return True
        except ImagemillError:
            self.readable = ""  # an answer, though not the image any more
        self._failed_fetches = 0
        return False

    def wait_for_store(self) -> None:
        """After an outage, wait a little before the next claim; one fetch that fails then is enough to wait again."""
        if self._failed_fetches >= _OUTAGE_FETCHES:
            self.me.work.moved()
            time.sleep(min(5.0, self.settings.lease_seconds / 4))
            self._failed_fetches = _OUTAGE_FETCHES - 1

    def _prepare_bare(self, run: Run, positions: Sequence[int], ready: Arrivals) -> None:
        """What the model takes of items without pictures: so little work each that they are timed together."""
        self.computing.wait()
        # In processor time, since these wait for nothing but other threads.
        started = time.thread_time()
        done = [Ready(run, position, None, _bare(run, position)) for position in positions]
        seconds = time.thread_time() - started
        run.spent("prepare", seconds)
        run.portion.took(len(done), seconds)
        ready.put(done)

    def _prepare(self, run: Run, fetched: Sequence[tuple[int, bytes]], fetch_s: float, ready: Arrivals) -> None:
        """Pixels, then what the model takes, of items that were fetched together in `fetch_s` seconds."""
        waited_s = 0.0
        started = time.perf_counter()
        done: list[Ready] = []
        for position, data in fetched:
            before = time.perf_counter()
            self.computing.wait()
            waited_s += time.perf_counter() - before
            item = self._prepared_one(run, position, data)
            nbytes = item.answer.nbytes if isinstance(item.answer, Prepared) else 0
            if nbytes and not ready.take(nbytes):
                if done:
                    ready.put(done)  # they may be what has to be computed for there to be room
                done = []
                before = time.perf_counter()
                if not ready.wait(run, nbytes):
                    item, nbytes = Ready(run, position, item.size, _DROPPED), 0
                waited_s += time.perf_counter() - before
            item.nbytes = nbytes
            done.append(item)
        run.portion.took(len(fetched), fetch_s + time.perf_counter() - started - waited_s)
        self._encoded.give(sum(len(data) for _, data in fetched))
        ready.put(done)

    def _prepared_one(self, run: Run, position: int, data: bytes) -> Ready:
        size, answer = None, None
        try:
            size, answer = self._decode(run, position, data)
        except ItemFailed as error:
            answer = error
        except Misconfigured as error:  # no child process to decode in: this machine's fault, not the picture's
            log.error("shard %d is given back: %s", run.claim.shard_id, error)
            run.dropped = True
            answer = _unexpected("decode", error)
        except Exception as error:  # noqa: BLE001 (as above)
            answer = _unexpected("prepare", error)
        return Ready(run, position, size, answer)

    def _decode(self, run: Run, position: int, data: bytes) -> tuple[tuple[int, int] | None, Prepared | ItemFailed]:
        if run.dropped:
            return None, _DROPPED
        item = run.item(position)
        if not item.uri:
            return None, _prepared(run, None, item)
        known = self._pictures.header(data)
        nbytes = min(known.width * known.height, self.settings.max_image_pixels) * 3
        self._decoded.take(nbytes)
        try:
            with run.timed("decode"):
                pixels = self._pictures.decode(data, known).pixels
            if "crop" in item.data:
                pixels = images.crop(pixels, item.data["crop"])
            with run.timed("prepare"):
                return (pixels.shape[1], pixels.shape[0]), _prepared(run, pixels, item)
        finally:
            self._decoded.give(nbytes)

    # ---------------------------------------------------------------- the end of a shard, in a writer's thread

    def finish(self, run: Run) -> None:
        """Write and commit a complete shard; give it back when the store does not take it."""
        if self._may_work_now(run):
            self.give_back(run)
            return
        outcomes = [run.outcomes[i] for i in range(run.claim.items)]
        deadline = time.monotonic() + _WRITE_PATIENCE_S
        while self.me.may_write():
            try:
                written = self._write(run, outcomes, "")
                if self._commit(run, written, outcomes):
                    lifecycle.finish(self.db, run.claim.job_id)
                return
            except Unavailable as error:
                log.warning("shard %d could not be written, trying again: %s", run.claim.shard_id, error)
                if time.monotonic() > deadline:
                    self.give_back(run)
                    return
                time.sleep(1)
            except Exception as error:
                log.exception("shard %d could not be finished", run.claim.shard_id)
                self.fail(run.claim, f"could not be finished: {type(error).__name__}: {error}")
                return

    def _may_work_now(self, run: Run) -> bool:
        """Whether items that could not be fetched owe it to an outage: then they are tried again by another attempt."""
        failures = [o for o in run.outcomes.values() if o.failure is not None and o.failure.reason == UNAVAILABLE]
        for outcome in 3 * failures[:_OUTAGE_FETCHES]:
            try:
                self._bytes(outcome.uri)
            except Unavailable:
                continue
            except ImagemillError:
                pass  # another answer than before
            return True
        if failures and self._is_outage(run):
            self._failed_fetches = _OUTAGE_FETCHES
            return True
        return False

    def _write(self, run: Run, outcomes: Sequence[Outcome], name: str) -> shardfile.Written:
        batch = run.loaded.size.asked
        meta = provenance.of(run.claim, run.loaded.runtime, batch, self.device, self._pictures.decoder, self.me.id)
        # Each try has a prefix of its own: a put whose answer was lost may still arrive after the next one.
        prefix = f"{run.prefix}{uuid.uuid4().hex[:8]}{name}/"
        faults.point("before-put")
        with run.timed("write"):
            written = shardfile.write(self.store, prefix, run.claim.spec.kind, outcomes, meta, run.prefix)
        faults.point("after-put")
        return written

    def _commit(self, run: Run, written: shardfile.Written, outcomes: Sequence[Outcome]) -> bool:
        if not self.me.may_write():
            return False
        faults.point("before-commit")
        done = leases.commit(self.db, run.claim, self.me.id, written, outcomes, seconds=run.seconds)
        faults.point("after-commit")
        if not done:
            log.warning("shard %d is not ours any more: its work is thrown away", run.claim.shard_id)
        self.me.work.moved()
        return done

    def give_back(self, run: Run) -> None:
        """Release a shard without blame, keeping what is done of it for the next attempt."""
        if not self.me.may_write():
            return
        if run.broken:
            self.fail(run.claim, run.broken)
            return
        checkpoint: dict[str, Any] = dict(run.claim.checkpoint)
        try:
            # What a store's outage made fail is tried again; the rest is kept.
            fresh = [o for _, o in sorted(run.outcomes.items()) if o.failure is None or not o.failure.retry]
            if fresh:
                written = self._write(run, fresh, "-partial")
                checkpoint |= {"partial": written.key, "sha256": written.sha256}
        except ImagemillError as error:
            log.warning("what was done of shard %d could not be kept: %s", run.claim.shard_id, error)
        try:
            leases.release(self.db, run.claim, self.me.id, checkpoint)
        except ImagemillError as error:
            log.warning("shard %d could not be given back, its lease will run out: %s", run.claim.shard_id, error)

    def fail(self, claim: Claim, message: str) -> None:
        """Count an error against a shard as a whole; after too many its items become failures."""
        log.warning("shard %d failed: %s", claim.shard_id, message)
        try:
            if claim.errors + 1 < self.settings.max_errors:
                leases.fail(self.db, claim, self.me.id, message)
            else:
                self._give_up(claim, message)
        except ImagemillError as error:
            log.warning("the error of shard %d could not be recorded: %s", claim.shard_id, error)

    def _give_up(self, claim: Claim, message: str) -> None:
        rows = shardfile.read_manifest(self.store, claim.manifest_key)
        failure = ItemFailed("shard", "shard-failed", message[:500], retry=True)
        outcomes = [Outcome(i, *row[:3], None, None, None, failure) for i, row in enumerate(rows)]
        spec = tuning.plain(claim.spec, self.device)
        claim = dataclasses.replace(claim, spec=spec)
        meta = provenance.of(claim, spec.runtime, spec.batch, self.device, self._pictures.decoder, self.me.id)
        written = shardfile.write(self.store, attempt_prefix(claim), claim.spec.kind, outcomes, meta)
        if leases.commit(self.db, claim, self.me.id, written, outcomes, state=states.QUARANTINED):
            lifecycle.finish(self.db, claim.job_id)


def _pictures(settings: Settings, threads: int, device: str) -> images.Here | Sandbox | OnDevice:
    """What turns bytes into pixels: this process, its GPU, or for pictures nobody vouches for, child processes."""
    limits = images.Limits(settings.max_image_bytes, settings.max_image_pixels)
    if settings.gpu_decode and device != "cpu":
        return OnDevice(limits, device)
    if not settings.untrusted:
        return images.Here(limits)
    return Sandbox(threads, limits, settings.decode_memory_bytes, settings.decode_seconds)


def _prepared(run: Run, image: images.Pixels | None, item: Item) -> Prepared | ItemFailed:
    """What the model makes of an item, or what is wrong with it; never an exception, so that its size is kept."""
    try:
        return run.loaded.model.prepare(image, item)
    except ItemFailed as error:
        return error
    except Exception as error:  # noqa: BLE001 (a model may raise anything)
        return _unexpected("prepare", error)


def _bare(run: Run, position: int) -> Prepared | ItemFailed:
    """What the model makes of an item without an image."""
    if run.dropped:
        return _DROPPED
    try:
        return _prepared(run, None, run.item(position))
    except Exception as error:  # noqa: BLE001 (as above)
        return _unexpected("prepare", error)


def _unexpected(stage: str, error: Exception) -> ItemFailed:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return ItemFailed(stage, "unexpected", text)
