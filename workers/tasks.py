"""The Celery task body, and what a worker's child process keeps between tickets."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import Any

from celery import shared_task
from celery.signals import worker_process_init, worker_process_shutdown

from jobs import processes, queue
from storage import settings as settings_module
from storage.database import Database
from storage.errors import ImagemillError
from storage.objects import open_store
from workers import deaf, faults
from workers.devices import DEVICE, DRAIN_FILE, QUEUE
from workers.incarnation import Incarnation
from workers.stream import Stream, log

_stream: Stream | None = None
_watch: deaf.Watch | None = None


@shared_task(name=queue.TASK)
def work(queue_name: str) -> None:
    """One ticket: work until there is nothing to do, then ring once more if something may be left."""
    assert _stream is not None
    assert _watch is not None
    with _watch.hearing():
        if _stream.run(queue_name) and not _stream.me.draining():
            with contextlib.suppress(ImagemillError):  # the reconciler rings too
                queue.publish(_stream.settings, queue_name, 1)
        faults.point("before-ack")


@worker_process_init.connect
def _start(**kwargs: Any) -> None:
    """In the fresh child: say who we are. Heavy libraries come with the first ticket; celery allows 4 s here."""
    try:
        _begin()
    except Exception:  # noqa: BLE001 (whatever it is, it must not be swallowed)
        # Celery would only log it, and the child would then take every ticket and do nothing.
        log.exception("this worker could not start")
        deaf.end_parent()


def _begin() -> None:
    global _stream, _watch
    from workers.logs import configure

    settings = settings_module.load()
    configure(settings.log_level)
    # A shard in hand is tens of thousands of objects, none of them in a cycle: looking for those less often is a fifth
    # of the time of items that cost nothing else.
    gc.set_threshold(20_000, 20, 20)
    # So long one thread computes in Python, 5 ms as Python has it, before the next gets its turn: decoders and the
    # device's thread leave Python for each picture and wait for it again. With pictures in shards of 64, the stub was
    # 1.05 times as fast (the median of 13 pairs, in both orders) and its cores were idle a third less; 0.1 ms
    # was no better.
    sys.setswitchinterval(0.5e-3)
    device = os.environ[DEVICE]
    drain_file = Path(os.environ[DRAIN_FILE])
    session = processes.session_of(processes.host(), os.getpid())
    db = Database(settings.database, patience_s=settings.lease_seconds / 2, session=session)
    incarnation = Incarnation(db, settings, device, os.environ[QUEUE], drain_file.exists)
    store = open_store(settings.store, settings)
    incarnation.start()
    _stream = Stream(db, store, settings, incarnation, "cpu" if device == "cpu" else "cuda")
    _watch = deaf.Watch(settings, queue.served_by(os.environ[QUEUE]), _stream.me.draining, _give_up)
    _watch.start()


def _give_up() -> None:
    assert _stream is not None
    _stream.me.stop()
    deaf.end_parent()


@worker_process_shutdown.connect
def _stop(**kwargs: Any) -> None:
    """In the child, at an orderly end."""
    if _watch is not None:
        _watch.stop()
    if _stream is not None:
        _stream.me.stop()
        log.info("worker %s has stopped", _stream.me.id)
        sys.stderr.flush()
