"""Batches: out of memory halves, an exception splits, and only the guilty image pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ItemFailed
from workers import batches
from workers.batches import BatchSize, Buckets
from workers.models import Prepared


class Model:
    """Doubles its numbers; fails in the ways a test asks for."""

    def __init__(self, fits: int = 1000, guilty: frozenset[int] = frozenset()) -> None:
        self.fits, self.guilty = fits, guilty
        self.sizes: list[int] = []

    def infer(self, batch: Sequence[Prepared]) -> list[Any]:
        self.sizes.append(len(batch))
        if len(batch) > self.fits:
            raise MemoryError
        for one in batch:
            if one.data in self.guilty:
                raise RuntimeError(f"cannot do {one.data}")
        return [2 * one.data for one in batch]


def prepared(count: int) -> list[Prepared]:
    return [Prepared("g", i, 0) for i in range(count)]


def test_out_of_memory_halves_and_loses_nothing() -> None:
    model, size = Model(fits=5), BatchSize(16)
    assert batches.infer(model, prepared(16), size) == [2 * i for i in range(16)]  # type: ignore[arg-type]
    assert model.sizes == [16, 8, 4, 4, 4, 4]
    assert size.safe == 4


def test_the_safe_size_is_remembered_and_grows_back() -> None:
    model, size = Model(fits=5), BatchSize(8)
    batches.infer(model, prepared(8), size)  # type: ignore[arg-type]
    assert size.safe == 4
    model.sizes.clear()
    batches.infer(model, prepared(8), size)  # type: ignore[arg-type]
    assert model.sizes == [4, 4]
    model.fits = 100
    for _ in range(40):
        batches.infer(model, prepared(8), size)  # type: ignore[arg-type]
    assert size.safe == 8


def test_what_fits_is_known_to_every_job_of_the_model() -> None:
    model, large = Model(fits=5), BatchSize(16)
    small, larger = BatchSize(2, large.fit), BatchSize(32, large.fit)
    batches.infer(model, prepared(16), large)  # type: ignore[arg-type]
    assert (small.safe, large.safe, larger.safe) == (2, 4, 4)
    for _ in range(100):
        batches.infer(model, prepared(2), small)  # type: ignore[arg-type]
    assert large.safe == 4, "that two fit says nothing of eight"
    model.fits = 100
    for _ in range(64):
        batches.infer(model, prepared(4), large)  # type: ignore[arg-type]
    assert (small.safe, large.safe, larger.safe) == (2, 8, 8)


def test_one_that_never_fits_fails_alone() -> None:
    answers = batches.infer(Model(fits=0), prepared(3), BatchSize(8))  # type: ignore[arg-type]
    assert [a.reason for a in answers] == ["out-of-memory"] * 3


@given(count=st.integers(0, 40), guilty=st.frozensets(st.integers(0, 39)), asked=st.integers(1, 16))
def test_only_the_guilty_fail_in_their_places(count: int, guilty: frozenset[int], asked: int) -> None:
    answers = batches.infer(Model(guilty=guilty), prepared(count), BatchSize(asked))  # type: ignore[arg-type]
    assert len(answers) == count
    for i, answer in enumerate(answers):
        if i in guilty:
            assert isinstance(answer, ItemFailed)
            assert (answer.stage, answer.reason) == ("infer", "model-error")
        else:
            assert answer == 2 * i


def test_a_model_that_returns_too_few_is_told_apart_from_success() -> None:
    class Short(Model):
        def infer(self, batch: Sequence[Prepared]) -> list[Any]:
            return super().infer(batch)[: -1 or None]

    answers = batches.infer(Short(), prepared(2), BatchSize(8))  # type: ignore[arg-type]
    assert all(isinstance(a, ItemFailed) for a in answers)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried"), RuntimeError("can't allocate memory")]
)
def test_what_counts_as_out_of_memory(error: Exception) -> None:
    assert batches._is_out_of_memory(error)
    assert not batches._is_out_of_memory(RuntimeError("shape mismatch"))


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(), max_size=12), st.integers(1, 5)), max_size=30)
)
def test_buckets_hand_out_each_item_once_and_never_mix_groups(parts: list[tuple[str, list[int], int]]) -> None:
    """Whatever comes together, and though the size changes meanwhile."""
    buckets: Buckets[tuple[str, int]] = Buckets()
    out = []
    for group, values, size in parts:
        full = buckets.add(group, [(group, value) for value in values], size)
        assert all(len(batch) == size for batch in full)
        out += full
    assert len(buckets) == sum(len(values) for _, values, _ in parts) - sum(map(len, out))
    while (rest := buckets.flush()) is not None:
        out.append(rest)
    assert all(len({group for group, _ in batch}) == 1 for batch in out)
    for name in "abc":  # in the order in which they came
        given = [(group, value) for group, values, _ in parts for value in values if group == name]
        assert [item for batch in out for item in batch if item[0] == name] == given
