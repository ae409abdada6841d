"""How far two results agree: pairs of like objects, and what a threshold may have cut off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import agreement, rle
from storage.results import detections, embedding, labels, masks


def found(*objects: tuple[float, float, int]) -> detections.Result:
    """Boxes 100 pixels wide, by their left edge, score and class."""
    boxes = np.array([(x, 0, x + 100, 100) for x, _, _ in objects], np.float32).reshape(-1, 4)
    ids = np.array([c for _, _, c in objects], np.int32)
    scores = np.array([s for _, s, _ in objects], np.float32)
    return detections.Result(boxes, scores, ids, tuple(f"class {c}" for c in ids.tolist()))


CASES: dict[str, tuple[detections.Result, detections.Result, float | None]] = {
    "nothing in either": (found(), found(), None),
    "the same": (found((0, 0.9, 1), (300, 0.5, 2)), found((0, 0.9, 1), (300, 0.5, 2)), 1.0),
    "a little moved": (found((0, 0.9, 1)), found((2, 0.88, 1)), 98 / 102),
    "one moved a little": (found((0, 0.9, 1), (300, 0.5, 1)), found((2, 0.9, 1), (300, 0.5, 1)), (98 / 102 + 1) / 2),
    "moved too far": (found((0, 0.9, 1), (300, 0.5, 1)), found((40, 0.9, 1), (300, 0.5, 1)), 0.5),
    "another class": (found((0, 0.9, 1), (300, 0.5, 1)), found((0, 0.9, 2), (300, 0.5, 1)), 0.5),
    "another score": (found((0, 0.9, 1), (300, 0.5, 1)), found((0, 0.8, 1), (300, 0.5, 1)), 0.5),
    "one lost near the threshold": (found((0, 0.9, 1), (300, 0.26, 1)), found((0, 0.9, 1)), 1.0),
    "only one, lost near the threshold": (found((300, 0.26, 1)), found(), None),
    "one lost far above it": (found((0, 0.9, 1), (300, 0.7, 1), (600, 0.3, 1)), found((0, 0.9, 1), (600, 0.3, 1)), 0.8),
    "all lost": (found((0, 0.9, 1), (300, 0.29, 1)), found(), 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_detections(name: str) -> None:
    one, other, expected = CASES[name]
    agreed = detections.agreement(one, other, 0.25)
    assert agreed == (None if expected is None else pytest.approx(expected))
    assert detections.agreement(other, one, 0.25) == (None if agreed is None else pytest.approx(agreed))


def test_without_a_threshold_every_object_counts() -> None:
    assert detections.agreement(found((0, 0.9, 1), (300, 0.01, 1)), found((0, 0.9, 1))) == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.integers(0, 400), st.floats(0.1, 1), st.integers(0, 2)), max_size=8))
def test_everything_agrees_with_itself(objects: list[tuple[float, float, int]]) -> None:
    assert detections.agreement(found(*objects), found(*objects)) in ((1.0,) if objects else (None,))


def test_overlap_of_boxes() -> None:
    one = np.array([[0, 0, 10, 10], [5, 5, 5, 9]], np.float32)
    other = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], np.float32)
    assert agreement.of_boxes(one, other) == pytest.approx(np.array([[1, 1 / 3, 0], [0, 0, 0]]))


def masked(*columns: int) -> masks.Result:
    """A mask for each number: so many columns of a 20 x 20 picture."""
    pixels = [np.arange(20)[None].repeat(20, 0) < n for n in columns]
    n = len(columns)
    boxes = np.array([(0, 0, c, 20) for c in columns], np.float32).reshape(-1, 4)
    return masks.Result(
        boxes,
        np.full(n, 0.9, np.float32),
        np.zeros(n, np.int32),
        ("object",) * n,
        tuple(rle.encode(one) for one in pixels),
        (20, 20),
        np.array([one.sum() for one in pixels], np.int64),
    )


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [((), (), None), ((10, 18), (10, 18), 1.0), ((10, 20), (10, 19), 0.975), ((10,), (5,), 0.0), ((0,), (0,), 1.0)],
)
def test_masks(one: tuple[int, ...], other: tuple[int, ...], expected: float | None) -> None:
    agreed = masks.agreement(masked(*one), masked(*other))
    assert agreed == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((3, 4), (3, 4), 1.0),
        ((3, 4), (6, 8), 1.0),
        ((3, 4), (4, 3), 0.0),
        ((0, 0), (0, 0), None),
        ((0, 0), (0, 1), 0.0),
    ],
)
def test_vectors(one: Any, other: Any, expected: float | None) -> None:
    vectors = (embedding.Result(np.array(v, np.float32)) for v in (one, other))
    assert embedding.agreement(*vectors) == expected


def labelled(**scores: float) -> labels.Result:
    ids = np.array([ord(name) for name in scores], np.int32)
    return labels.Result(tuple(scores), np.array(list(scores.values()), np.float32), ids)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (labelled(), labelled(), None),
        (labelled(a=0.9, b=0.05), labelled(a=0.88, c=0.06), 1.0),
        (labelled(a=0.9), labelled(b=0.9), 0.0),
        (labelled(a=0.5, b=0.4), labelled(a=0.5, b=0.3), 0.5),
        (labelled(a=0.02, b=0.01), labelled(a=0.02, c=0.01), 1.0),
    ],
)
def test_labels(one: labels.Result, other: labels.Result, expected: float | None) -> None:
    assert labels.agreement(one, other) == expected
