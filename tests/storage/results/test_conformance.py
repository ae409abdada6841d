"""What every result kind must do: one suite over every file of storage/results."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import results
from storage.errors import BadInput
from storage.results import Summary

N = 4


def _array(name: str, n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(name)).random((n,)).astype(np.float32)


def _detections(n: int) -> Any:
    from storage.results import detections

    boxes = np.random.default_rng(n).random((n, 4)).astype(np.float32) * 500
    labels = tuple(f"label {i % 2} é日" for i in range(n))
    return detections.Result(boxes, _array("s", n), np.arange(n, dtype=np.int32), labels)


def _masks(n: int) -> Any:
    from storage import rle
    from storage.results import masks

    found = _detections(n)
    pixels = np.random.default_rng(n).random((n, 30, 40)) < 0.3
    rles = tuple(rle.encode(mask) for mask in pixels)
    areas = pixels.sum((1, 2))
    return masks.Result(found.boxes_xyxy, found.scores, found.class_ids, found.labels, rles, (30, 40), areas)


def _embedding(n: int) -> Any:
    """A vector of n numbers, in float16 where n is even."""
    from storage.results import embedding

    return embedding.Result(_array("v", n).astype(np.float32 if n % 2 else np.float16))


def _labels(n: int) -> Any:
    from storage.results import labels

    names = tuple(f"label {i} é日" for i in range(n))
    return labels.Result(names, np.sort(_array("s", n))[::-1].copy(), np.arange(n, dtype=np.int32))


def _image(n: int) -> Any:
    """An image as it is read with the columns, with n boxes known of it."""
    from storage.results import image

    meta = {"prompt": "ein Bär 日", "seed": 2**63, "boxes": [[0.5, 1.0, 2.0, 3.0]] * n, "of": {"a": None}}
    return image.Result(None, f"{n:064x}", 100 + n, image.FORMATS[n % 3], 640, 480 + n, meta)


# Makes a result with n objects. A kind that is not named here says how itself, in a function example(n) of its file.
EXAMPLES: dict[str, Callable[[int], Any]] = {
    "detections": _detections,
    "embedding": _embedding,
    "image": _image,
    "labels": _labels,
    "masks": _masks,
}


def example(kind: str, n: int) -> Any:
    if kind in EXAMPLES:
        return EXAMPLES[kind](n)
    return results.get(kind).example(n)  # type: ignore[attr-defined]


def samples(kind: str) -> list[Any]:
    """Results of several sizes, an empty one and failed items among them."""
    return [example(kind, 3), None, example(kind, 0), example(kind, 1), None, example(kind, 7)]


def table_of(kind: str, found: list[Any]) -> pa.Table:
    module = results.get(kind)
    columns = module.columns(found)
    assert list(columns) == module.SCHEMA.names or set(columns) == set(module.SCHEMA.names)
    for field in module.SCHEMA:
        assert len(columns[field.name]) == len(found)
        assert columns[field.name].type == field.type
    return pa.table([columns[field.name] for field in module.SCHEMA], schema=module.SCHEMA)


def fields(found: Any) -> dict[str, Any]:
    names = getattr(found, "__slots__", None) or list(vars(found))
    return {name: getattr(found, name) for name in names}


def same(left: Any, right: Any) -> None:
    """Equal in every field, down to the type of the arrays."""
    assert (left is None) == (right is None)
    if left is None:
        return
    assert type(left) is type(right)
    for name, value in fields(left).items():
        other = getattr(right, name)
        if isinstance(value, np.ndarray):
            assert (value.dtype, value.shape) == (other.dtype, other.shape), name
            np.testing.assert_array_equal(value, other)
        else:
            assert value == other, name


def all_same(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        same(one, other)


@pytest.fixture(params=results.names())
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind there is."""
    return str(request.param)


def test_listing_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in results.names():
        monkeypatch.delitem(sys.modules, f"storage.results.{name}", raising=False)
    assert results.names()
    assert not [m for m in sys.modules if m.startswith("storage.results.")]


def test_unknown_kinds_name_the_known_ones() -> None:
    for name in ("nothing", "", "../detections", "__init__", "os"):
        with pytest.raises(BadInput, match=r"known kinds: .*detections"):
            results.get(name)


def test_round_trip(kind: str) -> None:
    found = samples(kind)
    all_same(found, results.get(kind).results(table_of(kind, found)))


def test_round_trip_through_parquet(kind: str) -> None:
    found = samples(kind) * 20
    sink = io.BytesIO()
    pq.write_table(table_of(kind, found), sink, compression="zstd", row_group_size=7)
    table = pq.read_table(io.BytesIO(sink.getvalue()))
    all_same(found, results.get(kind).results(table))


@pytest.mark.parametrize(("start", "length"), [(0, 0), (0, 2), (1, 1), (1, 4), (3, 3), (5, 1)])
def test_slices(kind: str, start: int, length: int) -> None:
    found = samples(kind)
    table = table_of(kind, found).slice(start, length)
    all_same(found[start : start + length], results.get(kind).results(table))


def test_chunks(kind: str) -> None:
    found = samples(kind)
    table = table_of(kind, found)
    parts = pa.concat_tables([table.slice(0, 2), table.slice(2, 0), table.slice(2, 3), table.slice(5)])
    all_same(found, results.get(kind).results(parts))


def test_chosen_rows(kind: str) -> None:
    found = samples(kind)
    chosen = [5, 0, 1, 5]
    all_same([found[i] for i in chosen], results.get(kind).results(table_of(kind, found).take(chosen)))


@pytest.mark.parametrize("size", [0, 1, 3])
def test_nothing_but_failures_or_empty_results(kind: str, size: int) -> None:
    for found in ([None] * size, [example(kind, 0)] * size):
        all_same(found, results.get(kind).results(table_of(kind, found)))


def test_a_failure_is_null_in_every_column(kind: str) -> None:
    table = table_of(kind, [None, example(kind, 2)])
    for name in table.column_names:
        assert table.column(name).is_null().to_pylist() == [True, False], name


def test_an_empty_result_is_no_failure(kind: str) -> None:
    assert results.get(kind).results(table_of(kind, [example(kind, 0)]))[0] is not None


def test_results_own_what_they_hold(kind: str) -> None:
    """Reading back does not need the writer's arrays to stay as they were."""
    found = [example(kind, 2)]
    table = table_of(kind, found)
    back = results.get(kind).results(table)
    again = results.get(kind).results(table)
    all_same(back, again)


def test_summary_is_plain_numbers(kind: str) -> None:
    for n in (0, 1, 5):
        summary = results.get(kind).summary(example(kind, n))
        assert isinstance(summary, Summary)
        assert type(summary.count) is int
        assert summary.top_score is None or type(summary.top_score) is float
        for label, (count, top) in summary.labels.items():
            assert (type(label), type(count), type(top)) == (str, int, float)
            assert count >= 1
            assert summary.top_score is not None
            assert top <= summary.top_score


def test_summary_survives_the_round_trip(kind: str) -> None:
    module = results.get(kind)
    found = samples(kind)
    back = module.results(table_of(kind, found))
    for one, other in zip(found, back, strict=True):
        if one is not None:
            assert module.summary(one) == module.summary(other)


@pytest.mark.parametrize("n", [3, 200])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(kind: str, bad: float, n: int) -> None:
    good = example(kind, n)
    names = [n for n, v in fields(good).items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
    for name in names:
        values = dict(fields(good))
        values[name] = values[name].copy()
        values[name].reshape(-1)[-1] = bad
        with pytest.raises(ValueError):
            type(good)(**values)


def test_the_largest_boxes_are_numbers() -> None:
    """Though their sum is more than 32 bits hold; infinities are none, though those of both signs add up to NaN."""
    from storage.results import detections

    largest = np.full((2, 4), np.finfo(np.float32).max, np.float32)
    rest = (np.ones(2, np.float32), np.zeros(2, np.int32), ("dog", "cat"))
    assert len(detections.Result(largest, *rest).labels) == 2
    largest[0, 0], largest[1, 3] = np.inf, -np.inf
    with pytest.raises(ValueError, match="finite"):
        detections.Result(largest, *rest)


def test_columns_of_different_length_are_refused(kind: str) -> None:
    good = example(kind, 3)
    names = [n for n, v in fields(good).items() if isinstance(v, np.ndarray) and v.ndim and v.shape[0] == 3]
    for name in names if len(names) > 1 else []:
        with pytest.raises(ValueError):
            type(good)(**{**fields(good), name: getattr(good, name)[:-1]})
