"""Shows that the suite has teeth: with one safety taken off, the same scenario that passes otherwise must fail.

The rare moments are forced with named stops, so that each control fails every time. (Random kills do not find them.)
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import flow
from tests.faults import support
from tests.faults.support import Stack, Template
from tests.services import Postgres, SeaweedFS, Valkey


@pytest.fixture(scope="module")
def template(
    postgres: Postgres, seaweed: SeaweedFS, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Template:
    return support.make_template(postgres, seaweed, tmp_path_factory.mktemp("one"), valkey.new_database(), 16)


@pytest.fixture
def stack(template: Template, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    with template.copy(broker_url, monkeypatch) as stack:
        yield stack


def two_owners(stack: Stack, folder: Path) -> None:
    """One shard, two owners: the first sleeps before its commit beyond its lease, wakes while the second is there too.

    When the first has gone on as far as it can, the second does so; then the job must end.
    """
    folder.mkdir()
    crashing = support.crashing(stack, folder / "marks", "before-commit:2:STOP")
    logs = folder / "a.log", folder / "b.log"
    with support.worker(crashing, logs[0]) as a, support.worker(crashing, logs[1]) as b, support.told(stack, [a, b]):
        support.stopped_at(folder / "marks", "before-commit", 0)
        (first,) = support.wait_stopped([a, b])
        support.stopped_at(folder / "marks", "before-commit", 1)
        (second,) = set(support.wait_stopped([a, b], 2)) - {first}
        wake(first, folder / "a.log" if support.is_of(first, a) else folder / "b.log")
        os.kill(second, signal.SIGCONT)
        support.wait_done(stack, 30)


def late_put(stack: Stack, folder: Path) -> None:
    """One shard, two owners: the first sleeps before it puts its object, and does so after the second has committed."""
    folder.mkdir()
    crashing = support.crashing(stack, folder / "marks", "before-put:1:STOP")
    with support.worker(crashing, folder / "a.log") as a, support.worker(crashing, folder / "b.log") as b:
        support.stopped_at(folder / "marks", "before-put")
        (sleeper,) = support.wait_stopped([a, b])
        support.wait_done(stack, 30)
        wake(sleeper, folder / "a.log" if support.is_of(sleeper, a) else folder / "b.log")


def wake(pid: int, log: Path) -> None:
    """Let a stopped process go on, and wait until its ticket has ended, well or badly."""

    def ended() -> int:
        return len(re.findall(r"Task imagemill.work\[\S+\] (succeeded|raised)", log.read_text(errors="replace")))

    before = ended()
    os.kill(pid, signal.SIGCONT)
    flow.wait_until(lambda: ended() > before, "the sleeper to go on", 20)


def test_a_sleeper_that_wakes_before_the_commit_changes_nothing(
    template: Template, stack: Stack, tmp_path: Path
) -> None:
    two_owners(stack, tmp_path / "run")
    support.prove(stack, template.keys)
    assert "is not ours any more" in "".join(log.read_text() for log in (tmp_path / "run").glob("*.log"))


def test_without_the_fence_the_sleeper_mixes_two_attempts(template: Template, stack: Stack, tmp_path: Path) -> None:
    two_owners(support.injected(stack, "no-fence"), tmp_path / "run")
    with pytest.raises(AssertionError, match=r"committed fence|by another than|after its commit|is ready and has"):
        support.prove(stack, template.keys)


@pytest.mark.slow
def test_a_sleeper_that_puts_late_overwrites_nothing(template: Template, stack: Stack, tmp_path: Path) -> None:
    late_put(stack, tmp_path / "run")
    support.prove(stack, template.keys)


@pytest.mark.slow
def test_without_prefixes_of_their_own_attempts_overwrite_each_other(
    template: Template, stack: Stack, tmp_path: Path
) -> None:
    late_put(support.injected(stack, "same-prefix"), tmp_path / "run")
    with pytest.raises(AssertionError, match="is not what was committed"):
        support.prove(stack, template.keys)


@pytest.mark.slow
def test_without_the_refill_a_lost_ticket_is_the_end(template: Template, stack: Stack, tmp_path: Path) -> None:
    """Its counterpart is every other test on a copy of a planned job: the copy's broker is empty."""
    with support.worker(support.injected(stack, "no-refill"), tmp_path / "log"):
        support.wait_for(stack, "SELECT count(*) FROM worker", "a worker")
        with pytest.raises(AssertionError, match="waited"):
            support.wait_done(stack, 5)
    with pytest.raises(AssertionError, match="job 1 is running"):
        support.prove(stack, template.keys)
