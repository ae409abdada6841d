"""What a worker has in hand: budgets, portions, and decoders that take turns with a computing CPU."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from workers.computing import Computing, Spell
from workers.inhand import Portion, Room


def test_a_room_lets_in_what_fits_and_one_that_is_larger_alone() -> None:
    room = Room(10)
    assert room.take(6)
    assert not room.take(5, timeout_s=0.01)
    assert room.take(4, timeout_s=0.01)
    room.give(10)
    assert room.take(99, timeout_s=0.01)
    assert not room.take(1, timeout_s=0.01)
    room.give(99)
    assert room.take(10, timeout_s=0.01)


def test_a_room_that_grows_lets_in_who_waits() -> None:
    room = Room(1)
    room.take(1)
    let_in = threading.Event()
    waiting = threading.Thread(target=lambda: room.take(3) and let_in.set())
    waiting.start()
    assert not let_in.wait(0.05)
    room.widen(4)
    assert let_in.wait(5)
    waiting.join()
    room.widen(2)
    assert not room.take(1, timeout_s=0.01), "a room never shrinks, and this one is full"


def test_room_that_is_given_back_lets_in_all_who_fit() -> None:
    room = Room(4)
    room.take(4)
    took: queue.SimpleQueue[bool] = queue.SimpleQueue()
    waiting = [threading.Thread(target=lambda: took.put(room.take(2, timeout_s=10))) for _ in range(3)]
    for thread in waiting:
        thread.start()
    time.sleep(0.05)
    assert took.empty()
    room.give(4)
    assert [took.get(timeout=5), took.get(timeout=5)] == [True, True]
    time.sleep(0.05)
    assert took.empty(), "two and two are all there is"
    room.give(2)
    assert took.get(timeout=5)
    for thread in waiting:
        thread.join()


@pytest.mark.parametrize(("each_s", "expected"), [(0.05, 1), (0.004, 6), (0.001, 24), (0.00001, Portion.MOST)])
def test_portions_are_large_where_items_are_quick(each_s: float, expected: int) -> None:
    portion = Portion()
    assert portion.size == 1
    for _ in range(60):
        portion.took(portion.size, portion.size * each_s)
    assert portion.size == pytest.approx(expected, abs=1)


def test_decoders_wait_for_a_computing_cpu() -> None:
    computing = Computing("cpu")
    computing.wait()
    begun = threading.Event()
    with computing.running():
        decoder = threading.Thread(target=lambda: (computing.wait(), begun.set()))
        decoder.start()
        assert not begun.wait(0.05)
    assert begun.wait(5)
    decoder.join()
    assert computing.take_s() >= 0.05
    assert computing.take_s() == 0


def test_nobody_waits_where_cores_do_not_wait_for_each_other() -> None:
    computing = Computing("cpu")
    with computing.running(barriers=False):
        waited = threading.Thread(target=computing.wait)
        waited.start()
        waited.join(5)
        assert not waited.is_alive()
    assert computing.take_s() > 0


def test_each_thread_counts_its_own_runs() -> None:
    computing, taken = Computing("cpu"), list[float]()

    def other() -> None:
        with computing.running(barriers=False):
            time.sleep(0.02)
        taken.append(computing.take_s())

    with computing.running(barriers=False):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        time.sleep(0.02)
    assert taken[0] >= 0.02
    assert computing.take_s() >= taken[0] + 0.02


@pytest.mark.parametrize(
    ("earlier", "runs", "seconds", "idle"),
    [
        (None, ((1.0, 3.0),), 2, 0),
        ((), ((1.0, 3.0),), 2, 0),
        (((0.0, 0.5),), ((1.0, 3.0), (4.0, 5.0)), 3, 0.5),
        (((0.0, 2.0),), ((1.0, 3.0), (4.0, 5.0)), 2, 0),
        (((0.0, 6.0),), ((1.0, 3.0), (4.0, 5.0)), 0, 0),
        (((0.0, 2.0),), (), 0, 0),
    ],
)
def test_time_in_which_two_batches_ran_is_counted_once(
    earlier: tuple[tuple[float, float], ...] | None,
    runs: tuple[tuple[float, float], ...],
    seconds: float,
    idle: float,
) -> None:
    before = None if earlier is None else Spell(earlier)
    assert (Spell(runs).seconds(before), Spell(runs).after(before)) == (seconds, idle)


def test_a_network_that_raises_lets_decoders_go_on() -> None:
    computing = Computing("cpu")
    with pytest.raises(ValueError), computing.running():
        raise ValueError
    computing.wait()
    assert computing.take_s() > 0
