"""Processes that die, freeze, hang or are told to stop: the job completes, and what it cost is bounded."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests import flow
from tests.faults import support
from tests.faults.support import LEASE_S, Stack, Template
from tests.flow import run
from tests.services import Postgres, SeaweedFS, Valkey
from tests.times import soon
from workers import faults

COUNT, BATCH, BATCH_S = 96, 8, 0.15  # three shards


@pytest.fixture(scope="module")
def template(
    postgres: Postgres, seaweed: SeaweedFS, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Template:
    folder = tmp_path_factory.mktemp("planned")
    delay = f"delay_ms={BATCH_S * 1000:g}"
    return support.make_template(postgres, seaweed, folder, valkey.new_database(), COUNT, "--param", delay)


@pytest.fixture
def stack(template: Template, broker_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stack]:
    with template.copy(broker_url, monkeypatch) as stack:
        yield support.with_ledger(stack, tmp_path / "ledger")


FEW = ("claimed", "inferred", "after-put", "after-commit")


POINTS = tuple(point for point in faults.POINTS if point != "kept")  # only jobs that make files come there


def each(points: Sequence[str], how: str) -> str:
    """A plan in which each of these points is hit once."""
    return ",".join(f"{point}:1:{how}" for point in points)


# ------------------------------------------------------------------------------------------------ killed


@pytest.mark.parametrize("points", [FEW, pytest.param(POINTS, marks=pytest.mark.slow)], ids=["few", "all"])
def test_children_killed_at_points(template: Template, stack: Stack, tmp_path: Path, points: tuple[str, ...]) -> None:
    """One child after another of the same worker dies, at another point each time."""
    fast = support.injected(stack, "no-backoff")
    dying = support.crashing(fast, tmp_path / "marks", each(points, "KILL"))
    with support.worker(dying, tmp_path / "log"):
        support.wait_done(stack, 120)
        flow.wait_until(lambda: len(list((tmp_path / "marks").iterdir())) == len(points), "every point", 20)
    # At most two shards are held at once; a death before the acknowledgement costs none.
    assert len(points) - 2 <= support.crashes(stack) <= 2 * len(points)
    _say_rescues(stack, tmp_path / "marks")
    support.prove(stack, template.keys, tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("points", [FEW, POINTS], ids=["few", "all"])
def test_families_killed_at_points(template: Template, stack: Stack, tmp_path: Path, points: tuple[str, ...]) -> None:
    """One worker after another is killed with all its processes, at another point each time."""
    fast = support.injected(stack, "no-backoff")
    dying = support.crashing(fast, tmp_path / "marks", each(points, "STOP"))
    for number in range(1, len(points) + 1):
        with support.worker(dying, tmp_path / "log"):
            flow.wait_until(lambda n=number: len(list((tmp_path / "marks").iterdir())) == n, "the next point", 60)
    with support.worker(stack, tmp_path / "log"):
        support.wait_done(stack)
    assert len(points) - 2 <= support.crashes(stack) <= 2 * len(points)
    support.prove(stack, template.keys, tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("whole_family", [False, True], ids=["child", "family"])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_one_point(template: Template, stack: Stack, tmp_path: Path, point: str, whole_family: bool) -> None:
    """The same one by one, with the waits as they are, so that a failure names its point."""
    dying = support.crashing(stack, tmp_path / "marks", f"{point}:1:{'STOP' if whole_family else 'KILL'}")
    with support.worker(dying, tmp_path / "log"):
        support.stopped_at(tmp_path / "marks", point)
        if not whole_family:
            support.wait_done(stack)
    if whole_family:
        with support.worker(stack, tmp_path / "log"):
            support.wait_done(stack)
    # One shard is written, items of two are under way and one is claimed ahead, at most; the last ones cost nobody.
    assert (0 if point == "before-ack" else 1 if "after" not in point else 0) <= support.crashes(stack) <= 4
    support.prove(stack, template.keys, tmp_path / "log")


@pytest.mark.parametrize("seen", [pytest.param(True, marks=pytest.mark.slow), False], ids=["seen", "unseen"])
def test_the_rescue_of_a_killed_workers_shards(template: Template, stack: Stack, tmp_path: Path, seen: bool) -> None:
    """At once when another process of the machine can see it is gone, else when the lease has run out."""
    there = stack if seen else support.injected(stack, "hidden")
    dying = support.crashing(there, tmp_path / "marks", "inferred:1:STOP")
    with support.worker(dying, tmp_path / "a.log") as a, support.worker(dying, tmp_path / "b.log") as b:
        support.stopped_at(tmp_path / "marks", "inferred")
        (pid,) = support.wait_stopped([a, b])
        support.wait_for(stack, "SELECT count(*) = 2 FROM worker", "both workers")
        # A lease runs from the last beat, so from when it was stopped; it may be over before it is killed.
        died_at = support.now() if seen else (tmp_path / "marks" / "inferred.0").stat().st_mtime
        support.kill_family(a if support.is_of(pid, a) else b)
        support.wait_done(stack)
    freed_s, claimed_s = support.rescued_after(stack, died_at)
    support.say(f"rescue of a killed worker's shards, {'seen' if seen else 'unseen'}: {freed_s:.1f} s until they were "
                f"free, {claimed_s:.1f} s until one was claimed again (lease {LEASE_S:g} s)")  # fmt: skip
    assert soon(freed_s, LEASE_S if seen else LEASE_S + 15)
    assert soon(claimed_s, LEASE_S + 15)
    support.prove(stack, template.keys)


def test_a_killed_supervisor_takes_its_workers_along(template: Template, stack: Stack, tmp_path: Path) -> None:
    with support.worker(stack, tmp_path / "log") as supervisor:
        flow.wait_until(lambda: support.executions(stack) > 0, "a first batch")
        workers = support.family(supervisor.pid)[1:]
        supervisor.kill()
        ended_s = support.wait_ended(workers)
    support.say(f"workers ended {ended_s:.1f} s after their supervisor was killed")
    assert soon(ended_s, 5 + BATCH_S)
    with support.worker(stack, tmp_path / "log"):
        support.wait_done(stack)
    assert support.crashes(stack) == 0, "they gave their shards back"
    support.prove(stack, template.keys, tmp_path / "log")


@pytest.mark.slow
def test_a_killed_laptop_takes_everything_along(home: Path, tmp_path: Path) -> None:
    """The broker dies with its owner too, and the workers must end although they cannot reach it any more."""
    stack = support.with_ledger(support.laptop(), tmp_path / "ledger")
    keys = flow.pictures(tmp_path / "images", 64)
    run(stack, *support.annotate(tmp_path / "images", "--detach", "--param", "delay_ms=150"))
    with support.worker(stack, tmp_path / "log", "up") as supervisor:
        flow.wait_until(lambda: support.executions(stack) > 0, "a first batch")
        others = support.family(supervisor.pid)[1:]
        supervisor.kill()
        ended_s = support.wait_ended(others)
    support.say(f"everything ended {ended_s:.1f} s after `imagemill up` was killed")
    assert soon(ended_s, 10)
    with support.worker(stack, tmp_path / "log", "up"):
        support.wait_done(stack)
    support.prove(stack, keys, tmp_path / "log")


# ------------------------------------------------------------------------------------------------ frozen and hung


def test_sleepers_beyond_their_lease_write_nothing(template: Template, stack: Stack, tmp_path: Path) -> None:
    """Two workers; at each point one of them is stopped for two leases, and then goes on."""
    points = [point for point in POINTS if point not in ("after-commit", "before-ack")]
    fast = support.injected(stack, "no-backoff")
    freezing = support.crashing(fast, tmp_path / "marks", each(points, "STOP"))
    with (
        support.worker(freezing, tmp_path / "a.log") as a,
        support.worker(freezing, tmp_path / "b.log") as b,
        _thawing([a, b], 2 * LEASE_S) as thawed,
    ):
        support.wait_done(stack, 120)
        # Not counted against the marks: two threads of one process that come to two points stop together.
        flow.wait_until(lambda: not support.stopped([a, b]), "the last to wake", 20)
        support.wait_for(stack, "SELECT count(*) = 2 FROM worker WHERE state = 'live'", "both to live again", 20)
    assert len(thawed) >= 3
    lost = {event.worker_id for event in support.events(stack, "lost")}
    support.say(f"{len(thawed)} sleepers of {2 * LEASE_S:g} s at {len(points)} points; {len(lost)} lost their lease")
    support.prove(stack, template.keys, tmp_path / "a.log")


@contextlib.contextmanager
def _thawing(parents: list[subprocess.Popen[bytes]], after_s: float) -> Iterator[list[int]]:
    """Let every member of these families that a signal has stopped go on after a while; yields their ids."""
    thawed: list[int] = []
    done = threading.Event()

    def look() -> None:
        since: dict[int, float] = {}
        while not done.wait(0.1):
            for member in [m for parent in parents for m in support.family(parent.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if member.status() != psutil.STATUS_STOPPED:
                        since.pop(member.pid, None)
                    elif time.monotonic() - since.setdefault(member.pid, time.monotonic()) > after_s:
                        member.send_signal(signal.SIGCONT)
                        thawed.append(since.pop(member.pid) and member.pid)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield thawed
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(("word", "limit"), [("hang", "stall"), ("seize", "time limit")])
def test_a_device_that_hangs(
    postgres_url: str, s3_url: str, broker_url: str, tmp_path: Path, word: str, limit: str
) -> None:
    """A batch never returns: its process is replaced, by itself or, when no thread of it runs, by the time limit."""
    keys = support.pictures_with(tmp_path / "images", 40, {17: word})
    stack = support.injected(support.fleet(postgres_url, s3_url, broker_url), "poison", "no-backoff")
    stack |= {
        "INJECT_ONCE": str(tmp_path / "once"),
        "IMAGEMILL_STALL_SECONDS": "2",
        "IMAGEMILL_TICKET_SECONDS": "2",
    }
    run(stack, "db", "upgrade")
    run(stack, *support.annotate(tmp_path / "images", "--detach"))
    with support.worker(stack, tmp_path / "log"):
        flow.wait_until((tmp_path / f"once.{word}").exists, "the hang")
        hung_at = support.now()
        support.wait_done(stack)
    freed_s, _ = support.rescued_after(stack, hung_at)
    support.say(f"a hung batch's shards were free after {freed_s:.1f} s ({limit}; stall 2 s, lease {LEASE_S:g} s)")
    assert soon(freed_s, 2 + LEASE_S + 15)
    assert 1 <= support.crashes(stack) <= 2
    assert support.one(stack, "SELECT state FROM job") == "done", "a hang that does not come again fails nothing"
    assert ("gives up and is replaced" if word == "hang" else "Hard time limit") in (tmp_path / "log").read_text()
    support.prove(stack, keys, tmp_path / "log")


def test_slow_pictures_outlive_the_time_limit_of_a_ticket(
    postgres_url: str, s3_url: str, broker_url: str, tmp_path: Path
) -> None:
    """A shard that takes far longer than a ticket may is given back and gone on with, not killed as if it hung."""
    keys = flow.pictures(tmp_path / "images", 32)  # 8 s of work; a ticket ends after 2.5
    stack = support.with_ledger(support.fleet(postgres_url, s3_url, broker_url), tmp_path / "ledger")
    stack |= {"IMAGEMILL_TICKET_SECONDS": "1", "IMAGEMILL_STALL_SECONDS": "2"}
    run(stack, "db", "upgrade")
    run(stack, *support.annotate(tmp_path / "images", "--detach", "--batch", "1", "--param", "delay_ms=250"))
    with support.worker(stack, tmp_path / "log"):
        support.wait_done(stack)
    assert support.crashes(stack) == 0
    assert len(support.events(stack, "claim")) >= 3
    # Each time what was under way, a few batches at most, is done again.
    assert support.executions(stack) <= len(keys) + len(support.events(stack, "release"))
    support.prove(stack, keys, tmp_path / "log")


# ------------------------------------------------------------------------------------------------ told to stop


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_worker_told_to_stop_gives_back_what_it_has(
    template: Template, stack: Stack, tmp_path: Path, times: int
) -> None:
    """SIGTERM once, or twice: it ends within 5 s and a batch, and the next one does not do its work again."""
    with support.worker(stack, tmp_path / "log") as supervisor:
        flow.wait_until(lambda: support.executions(stack) >= BATCH, "a first batch")
        members = support.family(supervisor.pid)
        for _ in range(times):
            supervisor.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        drained_s = support.wait_ended(members)
        assert supervisor.wait() == (0 if times == 1 else -signal.SIGTERM)
    support.say(f"a worker drained in {drained_s:.1f} s (a batch takes {BATCH_S} s)")
    assert soon(drained_s, 5 + BATCH_S)
    partial = [r.checkpoint for r in support.sql(stack, "SELECT checkpoint FROM shard WHERE checkpoint IS NOT NULL")]
    assert any("partial" in checkpoint for checkpoint in partial), "a shard was given back with what was done"
    with support.worker(stack, tmp_path / "log"):
        support.wait_done(stack)
    assert support.executions(stack) <= COUNT + BATCH
    assert support.crashes(stack) == 0
    support.prove(stack, template.keys, tmp_path / "log")


def test_drain_ends_one_worker_and_the_others_go_on(template: Template, stack: Stack, tmp_path: Path) -> None:
    live = "SELECT count(*) FROM worker WHERE state = 'live'"
    with support.worker(stack, tmp_path / "a.log") as a, support.worker(stack, tmp_path / "b.log") as b:
        support.wait_for(stack, f"SELECT ({live}) = 2", "both workers")
        chosen = support.sql(stack, "SELECT id, pid FROM worker ORDER BY started_at")[0]
        drained, other = (a, b) if support.is_of(chosen.pid, a) else (b, a)
        children = support.family(drained.pid)[1:]
        run(stack, "drain", chosen.id[:8])
        ended_s = support.wait_ended(children)
        support.wait_done(stack)
        time.sleep(1.5)
        assert support.family(drained.pid)[1:] == [], "it is not started again"
        assert drained.poll() is None
        assert len(support.family(other.pid)) >= 3
        assert support.one(stack, live) == 1
    support.say(f"a worker ended {ended_s:.1f} s after `imagemill drain` (lease {LEASE_S:g} s)")
    assert support.crashes(stack) == 0
    assert support.executions(stack) <= COUNT + BATCH
    support.prove(stack, template.keys)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_annotate_at_once(home: Path, tmp_path: Path) -> None:
    """The first waits for the batch; the second does not, and the same command still continues."""
    keys = flow.pictures(tmp_path / "images", 24)
    stack = support.laptop()
    command = support.annotate(tmp_path / "images", "--param", "delay_ms=3000", "--shard-size", "8")
    with _annotating(stack, command, tmp_path / "log") as process:
        flow.wait_until(lambda: _leased(stack), "a shard in hand")
        members = support.family(process.pid)
        process.send_signal(signal.SIGINT)
        flow.wait_until(lambda: b"again Ctrl-C" in (tmp_path / "log").read_bytes(), "the word", 10)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert process.wait(timeout=20) == 130
        support.wait_ended(members)
        ended_s = time.monotonic() - started
        support.say(f"annotate ended {ended_s:.1f} s after the second Ctrl-C")
        assert soon(ended_s, 3)
    assert "Traceback" not in (tmp_path / "log").read_text()
    last = flow.run_json(stack, *command)
    assert (last["id"], last["state"], last["results"]) == (1, "done", 24)
    support.prove(stack, keys)


@contextlib.contextmanager
def _annotating(stack: Stack, command: tuple[str, ...], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["imagemill", *command], env=stack, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        support.kill_family(process)


def _leased(stack: Stack) -> bool:
    from sqlalchemy.exc import DBAPIError

    with contextlib.suppress(DBAPIError):
        return bool(support.one(stack, "SELECT count(*) FROM shard WHERE state = 'leased'"))
    return False


def _say_rescues(stack: Stack, marks: Path) -> None:
    """How long after each death the first shard was taken back, where one was held."""
    deaths = [path.stat().st_mtime for path in marks.iterdir() if path.name != "before-ack.0"]
    expired = [event.at for event in support.events(stack, "expire")]
    waits = [min((at - death for at in expired if at >= death), default=0.0) for death in deaths]
    support.say(f"{len(deaths)} children killed; their shards were free after {max(waits):.1f} s at most")
