"""Pictures that kill, hang or exhaust the process that touches them: exactly they fail, and all others get a result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.faults import support
from tests.faults.support import Stack
from tests.flow import run

KILLED, MEMORY = "killed-the-process", "out-of-memory"
CRASHES = 4  # that one picture may cost


@pytest.fixture
def stack(postgres_url: str, s3_url: str, broker_url: str, tmp_path: Path) -> Stack:
    stack = support.fleet(postgres_url, s3_url, broker_url)
    stack = support.injected(stack, "poison", "no-backoff")
    run(stack, "db", "upgrade")
    return {**support.with_ledger(stack, tmp_path / "ledger"), "IMAGEMILL_STALL_SECONDS": "3"}


def poisoned_run(stack: Stack, folder: Path, count: int, evils: Mapping[int, str], *more: str) -> dict[str, str]:
    """Annotate pictures of which some are evil; proves everything and returns why which keys failed."""
    keys = support.pictures_with(folder / "images", count, evils)
    run(stack, *support.annotate(folder / "images", "--detach", *more))
    with support.worker(stack, folder / "log"):
        support.wait_done(stack, 280)
    support.prove(stack, keys, folder / "log")
    lines = run(stack, "failures", "--json", "--limit", "0").stdout.splitlines()
    failed = {row["key"]: row["reason"] for row in map(json.loads, lines)}
    assert set(failed) == {keys[number] for number in evils}
    return {next(word for word in evils.values() if word in key): reason for key, reason in failed.items()}


def deaths(stack: Stack) -> int:
    """Worker processes that died with a shard in hand."""
    assert support.crashes(stack) >= 0
    return len({event.worker_id for event in support.events(stack, "expire")})


def test_three_evil_pictures_among_hundreds(stack: Stack, tmp_path: Path) -> None:
    evils = {50: "abort", 166: "hang", 299: "memory"}
    reasons = poisoned_run(stack, tmp_path, 300, evils, "--shard-size", "50")
    assert reasons == {"abort": KILLED, "hang": KILLED, "memory": MEMORY}
    support.say(f"300 pictures, one aborts, one hangs, one exhausts memory: {deaths(stack)} processes died")
    assert deaths(stack) <= 2 * CRASHES


@pytest.mark.slow
def test_three_evil_pictures_among_ten_thousand(stack: Stack, tmp_path: Path) -> None:
    evils = {1234: "abort", 5678: "hang", 9999: "kill"}
    stack = {**stack, "IMAGEMILL_STALL_SECONDS": "8"}
    reasons = poisoned_run(stack, tmp_path, 10_000, evils, "--shard-size", "256", "--batch", "64")
    assert reasons == {"abort": KILLED, "hang": KILLED, "kill": KILLED}
    support.say(f"10,000 pictures, one aborts, one hangs, one is killed for its memory: {deaths(stack)} processes died")
    assert deaths(stack) <= 3 * CRASHES


@pytest.mark.slow
def test_the_first_and_the_last_of_one_shard_are_evil(stack: Stack, tmp_path: Path) -> None:
    reasons = poisoned_run(stack, tmp_path, 40, {0: "abort", 31: "kill"})
    assert reasons == {"abort": KILLED, "kill": KILLED}
    support.say(f"two evil pictures in one shard: {deaths(stack)} processes died")
    assert deaths(stack) <= 2 * CRASHES


@pytest.mark.slow
def test_two_evil_neighbours(stack: Stack, tmp_path: Path) -> None:
    """Both are in one micro-batch, and die in different places: in a decoder's thread and on the device."""
    reasons = poisoned_run(stack, tmp_path, 24, {9: "kill", 10: "abort"}, "--shard-size", "24")
    assert reasons == {"abort": KILLED, "kill": KILLED}
    assert deaths(stack) <= 2 * CRASHES


@pytest.mark.slow
def test_pictures_that_do_not_fit_into_memory(stack: Stack, tmp_path: Path) -> None:
    """No process dies of it: a batch is made smaller until the picture is alone."""
    reasons = poisoned_run(stack, tmp_path, 64, {3: "memory"}, "--shard-size", "64")
    assert reasons == {"memory": MEMORY}
    assert deaths(stack) == 0


def test_deaths_by_chance_accuse_no_picture(stack: Stack, tmp_path: Path) -> None:
    """Three times somebody kills the process, the third time while a picture is alone in it: it is not the killer."""
    keys = support.pictures_with(tmp_path / "images", 24, {})
    dying = support.crashing(stack, tmp_path / "marks", "inferred:3")
    run(stack, *support.annotate(tmp_path / "images", "--detach"))
    with support.worker(dying, tmp_path / "log"):
        support.wait_done(stack, 120)
    assert deaths(stack) == 3
    assert support.one(stack, "SELECT state FROM job") == "done"
    support.prove(stack, keys, tmp_path / "log")
