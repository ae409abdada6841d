"""Tickets lost, doubled, late or forged, and a broker that dies, freezes, flaps or is full: no work is lost."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from jobs import queue
from tests import flow
from tests.faults import support
from tests.faults.support import Stack, Template
from tests.services import Postgres, SeaweedFS, Valkey
from tests.times import soon

COUNT = 256  # eight shards of nearly a second each, of which a worker has three in hand at most
QUEUE = "imagemill:cpu"  # a list, with the prefix that every key of the app has


@pytest.fixture(scope="module")
def own() -> Iterator[Valkey]:
    """A server of this file's own, since it is hurt."""
    with Valkey() as server:
        yield server


@pytest.fixture(scope="module")
def template(postgres: Postgres, seaweed: SeaweedFS, own: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Template:
    options = ("--param", "delay_ms=200")
    return support.make_template(postgres, seaweed, tmp_path_factory.mktemp("planned"), own.url, COUNT, *options)


@pytest.fixture
def stack(template: Template, own: Valkey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stack]:
    """Tickets that last a second, so that a worker needs the broker again and again."""
    own.flush()
    with template.copy(own.url, monkeypatch) as stack:
        yield support.with_ledger({**stack, "IMAGEMILL_TICKET_SECONDS": "1"}, tmp_path / "ledger")


@contextlib.contextmanager
def broker(stack: Stack) -> Iterator[redis.Redis]:
    """A client of the stack's broker."""
    with redis.Redis.from_url(stack["IMAGEMILL_BROKER_URL"], socket_timeout=15) as client:
        yield client


def ring(stack: Stack, times: int, **changes: Any) -> None:
    """Put tickets into the queue as any publisher would; `changes` go into the message's headers."""
    with broker(stack) as client:
        for _ in range(times):
            client.lpush(QUEUE, json.dumps(message(**changes)))


def message(body: Any = None, content_type: str = "application/json", **headers: Any) -> dict[str, Any]:
    """A Celery message of protocol 2, as it lies in the list."""
    number = str(uuid.uuid4())
    raw = body if isinstance(body, bytes) else json.dumps([["cpu"], {}, {}]).encode()
    return {
        "body": base64.b64encode(raw).decode(),
        "content-encoding": "utf-8" if content_type == "application/json" else "binary",
        "content-type": content_type,
        "headers": {"lang": "py", "task": queue.TASK, "id": number, "root_id": number, "argsrepr": "-", **headers},
        "properties": {
            "correlation_id": number,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "cpu"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }


def proven_once(template: Template, stack: Stack, log: Path) -> None:
    """Everything holds, and every picture was computed exactly once."""
    support.prove(stack, template.keys, log)
    assert support.crashes(stack) == 0
    assert support.executions(stack) == COUNT


# ------------------------------------------------------------------------------------------------ tickets


def test_doubled_late_and_forged_tickets(template: Template, stack: Stack, tmp_path: Path) -> None:
    """Every ticket three times, tickets of last week, a pickle, an unknown task, an unknown queue, no JSON at all."""
    bomb = tmp_path / "exploded"
    with broker(stack) as client, support.worker(stack, tmp_path / "log"):
        week_old = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 7 * 86400))
        forged = (
            message(pickle.dumps(Bomb(str(bomb))), "application/x-python-serialize"),
            message(task="imagemill.unknown"),
            message(json.dumps([["no-such-queue"], {}, {}]).encode()),
            message(b"{not json"),
            *(message(eta=week_old) for _ in range(5)),
        )
        client.rpush(QUEUE, *map(json.dumps, forged))
        seen: set[bytes] = set()
        while support.one(stack, "SELECT count(*) FROM job WHERE finished_at IS NULL"):
            for ticket in set(client.lrange(QUEUE, 0, -1)) - seen:
                client.lpush(QUEUE, ticket, ticket)
                seen.add(ticket)
            time.sleep(0.05)
        flow.wait_until(lambda: not client.llen(QUEUE), "the last ticket to be taken", 30)
    assert len(seen) > len(forged), "tickets were doubled"
    assert not bomb.exists()
    text = (tmp_path / "log").read_text()
    assert "Refusing to deserialize" in text or "ContentDisallowed" in text
    assert "unregistered task" in text
    proven_once(template, stack, tmp_path / "log")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_all_tickets_deleted(template: Template, stack: Stack, own: Valkey, tmp_path: Path, busy: bool) -> None:
    with support.worker(stack, tmp_path / "log"):
        if busy:
            support.wait_some(stack)
            for _ in range(4):
                own.flush()
                time.sleep(0.4)
        else:
            support.wait_for(stack, "SELECT count(*) FROM worker", "a worker")
            own.flush()
        support.wait_done(stack)
    proven_once(template, stack, tmp_path / "log")


@pytest.mark.slow
def test_tickets_redelivered_while_they_run(template: Template, stack: Stack, own: Valkey, tmp_path: Path) -> None:
    """Another program on the same broker has a visibility timeout of a second: tickets come back while they run."""
    from kombu import Connection

    options = {"visibility_timeout": 1, "global_keyprefix": "imagemill:"}
    stack = {**stack, "IMAGEMILL_TICKET_SECONDS": "30"}
    restored: set[str] = set()
    with support.worker(stack, tmp_path / "log"), Connection(own.url, transport_options=options) as other:
        qos: Any = other.default_channel.qos  # type: ignore[attr-defined]
        restore = qos.restore_by_tag

        def noted(tag: str, *args: Any, **kwargs: Any) -> None:
            restored.add(tag)
            restore(tag, *args, **kwargs)

        qos.restore_by_tag = noted
        while support.one(stack, "SELECT count(*) FROM job WHERE finished_at IS NULL"):
            qos.restore_visible(interval=1)
            time.sleep(0.2)
    assert restored
    proven_once(template, stack, tmp_path / "log")


@pytest.mark.slow
def test_an_idle_worker_killed_under_a_stream_of_tickets(
    template: Template, stack: Stack, own: Valkey, tmp_path: Path
) -> None:
    """A worker that dies while it waits takes a ticket with it; work that comes later is done all the same."""
    with flow.background(stack, "pause", "1") as command:
        assert command.wait(30) == 0
    with support.worker(stack, tmp_path / "log") as worker:
        support.wait_for(stack, "SELECT count(*) FROM worker", "a worker")
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            ring(stack, 3)
        support.kill_family(worker)
    with broker(stack) as client:
        client.delete(QUEUE)
    flow.run(stack, "resume", "1")
    with support.worker(stack, tmp_path / "log"):
        support.wait_done(stack)
    proven_once(template, stack, tmp_path / "log")


# ------------------------------------------------------------------------------------------------ the broker


def resumed_after(stack: Stack, since: float) -> float:
    """Seconds until a shard is claimed after a moment."""
    first = "SELECT min(at) FROM event WHERE action = 'claim' AND at > :since"
    support.wait_for(stack, first, "a claim", 30, since=since)
    return float(support.one(stack, first, since=since)) - since


def test_a_broker_killed_and_restarted_empty(template: Template, stack: Stack, own: Valkey, tmp_path: Path) -> None:
    with support.worker(stack, tmp_path / "log"):
        support.wait_some(stack)
        own.kill()
        _until_idle(stack)
        own.restart(empty=True)
        resumed_s = resumed_after(stack, support.now())
        support.say(f"resumed {resumed_s:.1f} s after Valkey was back, empty")
        assert soon(resumed_s, 15)
        support.wait_done(stack)
    proven_once(template, stack, tmp_path / "log")


@pytest.mark.slow
def test_a_broker_that_freezes(template: Template, stack: Stack, own: Valkey, tmp_path: Path) -> None:
    """Its connections stay open and nothing is answered, for 20 s."""
    with support.worker(stack, tmp_path / "log"):
        support.wait_some(stack)
        own.freeze()
        try:
            time.sleep(20)
        finally:
            own.thaw()
        resumed_s = resumed_after(stack, support.now())
        support.say(f"resumed {resumed_s:.1f} s after Valkey was thawed")
        assert soon(resumed_s, 15)
        support.wait_done(stack)
    proven_once(template, stack, tmp_path / "log")


@pytest.mark.slow
def test_a_worker_that_hears_nothing_is_started_again(
    template: Template, stack: Stack, own: Valkey, tmp_path: Path
) -> None:
    """Its consumer stands still, as Celery's has done after a broker came and went; its child is idle."""
    with broker(stack) as client, support.worker(stack, tmp_path / "log") as worker:
        support.wait_some(stack)
        client.delete(QUEUE)
        own.freeze()  # so that no ticket is there when the running one ends
        try:
            consumer = support.family(worker.pid)[1]
            flow.wait_until(lambda: not _leased(stack), "the ticket's end")
            consumer.suspend()
        finally:
            own.thaw()
        resumed_s = resumed_after(stack, support.now())
        support.say(f"a deaf worker resumed after {resumed_s:.1f} s")
        assert soon(resumed_s, 15)
        support.wait_done(stack)
    assert "none is heard" in (tmp_path / "log").read_text()
    proven_once(template, stack, tmp_path / "log")


@pytest.mark.slow
def test_a_broker_that_flaps(template: Template, stack: Stack, own: Valkey, tmp_path: Path) -> None:
    """Killed four times within about seven seconds, empty each time."""
    with support.worker(stack, tmp_path / "log"):
        support.wait_for(stack, "SELECT count(*) FROM event WHERE action = 'claim'", "a first claim")
        for _ in range(4):
            own.kill()
            time.sleep(0.9)
            own.restart(empty=True)
            time.sleep(0.7)
        done_s = support.wait_done(stack)
        support.say(f"all done {done_s:.1f} s after Valkey's fourth restart")
        assert soon(done_s, 30)  # four outages in a row: Celery waits longer after each
    proven_once(template, stack, tmp_path / "log")


@pytest.mark.slow
def test_a_broker_that_is_full(template: Template, stack: Stack, own: Valkey, tmp_path: Path) -> None:
    """It refuses every write that needs memory; nothing crashes, and work goes on once there is room."""
    with broker(stack) as client, support.worker(stack, tmp_path / "log") as worker:
        support.wait_some(stack)
        client.config_set("maxmemory", "1")
        try:
            _until_idle(stack)
            time.sleep(2)
            assert worker.poll() is None
        finally:
            client.config_set("maxmemory", "0")
        resumed_s = resumed_after(stack, support.now())
        support.say(f"resumed {resumed_s:.1f} s after Valkey had room again")
        assert soon(resumed_s, 15)
        support.wait_done(stack)
    proven_once(template, stack, tmp_path / "log")


def _until_idle(stack: Stack) -> None:
    """Wait until the ticket that runs has ended: nothing is leased, and the rest waits for a broker."""
    flow.wait_until(lambda: not _leased(stack), "the ticket's end")
    assert support.one(stack, "SELECT count(*) FROM shard WHERE state = 'ready'") > 0, "something is left to do"


def _leased(stack: Stack) -> int:
    return int(support.one(stack, "SELECT count(*) FROM shard WHERE state = 'leased'"))
