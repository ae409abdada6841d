"""A batch in lanes comes out as it went in, whichever lane computes which picture."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch

from workers import lanes
from workers.runtimes import Network

BATCHED = {"images": {0: "batch", 2: "height"}, "output": {0: "batch"}}


class Opened:
    """Sessions that double, and remember how they were opened and with how many pictures at once they were called."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.counts: list[int] = []
        self.most = self._now = 0
        self._lock = threading.Lock()

    def __call__(self, calls: int) -> Any:
        time.sleep(0.01)
        self.calls.append(calls)
        return self._session

    def _session(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        with self._lock:
            self.counts.append(len(images))
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(random.uniform(0, 0.004))
        with self._lock:
            self._now -= 1
        return {"output": 2 * images}


def session(opened: Opened, threads: int, axes: dict[str, dict[int, str]] = BATCHED) -> Any:
    example = {"images": torch.zeros(2, 3, 4, 4)}
    return lanes.opened(Network("n", torch.nn.Identity, example, ("output",), axes), threads, opened)


@pytest.mark.parametrize(("threads", "at_once"), [(2, 2), (3, 3), (12, 6), (64, 8)])
def test_pictures_are_computed_apart_and_come_back_in_order(threads: int, at_once: int) -> None:
    opened = Opened()
    images = torch.arange(40.0).reshape(40, 1, 1, 1).expand(40, 3, 2, 2)
    answer = session(opened, threads)(images=images)
    assert torch.equal(answer["output"], 2 * images)
    assert (opened.calls, set(opened.counts), len(opened.counts)) == ([at_once], {1}, 40)
    assert 1 < opened.most <= at_once


def test_too_few_pictures_get_all_cores() -> None:
    opened = Opened()
    run = session(opened, 4)
    for count in (1, 2, 1):
        assert run(images=torch.ones(count, 3, 4, 4))["output"].shape == (count, 3, 4, 4)
    assert (opened.calls, opened.counts) == ([4, 1], [1, 2, 1]), "the second session is opened once, when it is needed"
    run(images=torch.ones(3, 3, 4, 4))
    assert opened.counts[3:] == [1, 1, 1]


def test_what_a_lane_gives_may_be_overwritten_by_its_next_picture() -> None:
    mine = threading.local()

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        if not hasattr(mine, "output"):
            mine.output = torch.empty(1, 3, 2, 2)
        mine.output.copy_(2 * images)
        time.sleep(random.uniform(0, 0.002))
        return {"output": mine.output}

    images = torch.arange(40.0).reshape(40, 1, 1, 1).expand(40, 3, 2, 2)
    network = Network("n", torch.nn.Identity, {"images": torch.zeros(2, 3, 2, 2)}, ("output",), BATCHED)
    assert torch.equal(lanes.opened(network, 2, lambda calls: run)(images=images)["output"], 2 * images)


def test_outputs_of_unlike_shapes_are_an_error() -> None:
    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"output": torch.ones(1, 1 if images.sum() else 3)}

    network = Network("n", torch.nn.Identity, {"images": torch.zeros(2, 3)}, ("output",), BATCHED)
    with pytest.raises(RuntimeError, match="of one shape for all pictures"):
        lanes.opened(network, 2, lambda calls: run)(images=torch.eye(5, 3))


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"images": {0: "batch"}},
        {"images": {0: "batch"}, "output": {0: "objects"}},
        {"images": {0: "objects"}, "output": {0: "objects"}},
        {"images": {2: "height"}, "output": {0: "batch"}},
    ],
)
def test_what_is_no_batch_is_not_taken_apart(axes: dict[str, dict[int, str]]) -> None:
    opened = Opened()
    session(opened, 4, axes)(images=torch.ones(5, 3, 4, 4))
    assert (opened.calls, opened.counts) == ([1], [5])


def test_one_core_has_no_lanes() -> None:
    opened = Opened()
    session(opened, 1)(images=torch.ones(5, 3, 4, 4))
    assert (opened.calls, opened.counts) == ([1], [5])


@pytest.mark.parametrize(("threads", "alone"), [(1, False), (2, True), (8, True), (9, False), (16, False)])
def test_other_work_may_go_on_beside_lanes_of_one_core(threads: int, alone: bool) -> None:
    assert lanes.alone(session(Opened(), threads)) == alone


@pytest.mark.parametrize("count", [1, 5])
def test_several_threads_may_call_it(count: int) -> None:
    opened = Opened()
    run, found = session(opened, 3), dict[int, Any]()

    def call(number: int) -> None:
        found[number] = run(images=torch.full((count, 3, 2, 2), float(number)))["output"]

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], torch.full((count, 3, 2, 2), 2.0 * number)) for number in range(6))
    assert len(opened.calls) <= 2, "each session is opened once"


def test_an_error_in_a_lane_is_the_sessions() -> None:
    def broken(calls: int) -> Any:
        def run(**tensors: Any) -> Any:
            raise MemoryError("no room")

        return run

    run = lanes.opened(Network("n", torch.nn.Identity, {"images": torch.zeros(2, 3)}, ("output",), BATCHED), 2, broken)
    with pytest.raises(MemoryError):
        run(images=torch.ones(5, 3))
