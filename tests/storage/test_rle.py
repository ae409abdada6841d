"""The run-length code of masks is COCO's own, letter for letter, and pycocotools reads it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from storage import rle


def theirs(mask: np.ndarray) -> bytes:
    return bytes(coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])


def check(mask: np.ndarray) -> None:
    """Encoded as pycocotools encodes it, and read as pycocotools reads it."""
    size = (mask.shape[0], mask.shape[1])
    counts = rle.encode(mask)
    assert counts == theirs(mask)
    back = rle.decode(counts, size)
    assert back.dtype == bool
    assert back.flags.c_contiguous
    assert np.array_equal(back, mask)
    found = {"size": list(size), "counts": counts}
    assert rle.area(counts) == coco.area(found) == mask.sum()
    x1, y1, x2, y2 = rle.bbox(counts, size)
    if mask.any():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert (x1, y1, x2, y2) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert coco.toBbox(found).tolist() == [x1, y1, x2 - x1, y2 - y1]
    else:
        assert (x1, y1, x2, y2) == (0, 0, 0, 0)


SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)


@settings(max_examples=300, deadline=None)
@given(arrays.arrays(np.bool_, SHAPES))
def test_any_mask(mask: np.ndarray) -> None:
    check(mask)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.floats(0, 1), st.integers(0, 1 << 32))
def test_noise_of_every_density(shape: tuple[int, int], density: float, seed: int) -> None:
    check(np.random.default_rng(seed).random(shape) < density)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 5), (700, 1), (1, 700), (480, 640)])
def test_empty_full_and_single_pixels(shape: tuple[int, int]) -> None:
    check(np.zeros(shape, bool))
    check(np.ones(shape, bool))
    for place in {0, 1, shape[0] * shape[1] // 2, shape[0] * shape[1] - 1}:
        for background in (False, True):
            mask = np.full(shape, background)
            mask.reshape(-1)[place % mask.size] ^= True
            check(mask)


def test_large_shapes() -> None:
    """Runs of every length of text, from one letter to five."""
    y, x = np.mgrid[:1080, :1920]
    check((y - 500) ** 2 + (x - 900) ** 2 < 300**2)
    check(((y - 500) ** 2 + (x - 900) ** 2 < 300**2) ^ (x > 1000) ^ (y % 7 == 0))
    check(x % 640 < 1)
    wide = np.zeros((4000, 9000), bool)
    wide[3999, 8999] = True
    check(wide)


def test_any_memory_layout_and_numbers() -> None:
    mask = np.random.default_rng(0).random((30, 50)) < 0.3
    assert rle.encode(np.asfortranarray(mask)) == rle.encode(mask[::-1][::-1]) == rle.encode(mask.astype(np.uint8))
    assert rle.encode(mask.astype(np.float32)) == rle.encode(mask)


def test_many_at_once_are_the_same_as_alone() -> None:
    masks = [np.random.default_rng(i).random((20 + i, 30)) < i / 10 for i in range(11)]
    runs = [rle.runs_of(mask) for mask in masks]
    assert rle.compress(runs) == [rle.encode(mask) for mask in masks]
    assert rle.compress([]) == []


def test_runs_of_changes_found_elsewhere() -> None:
    mask = np.random.default_rng(3).random((13, 17)) < 0.4
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    assert np.array_equal(rle.from_changes(changes, flat.size, bool(flat[0])), rle.runs_of(mask))


@pytest.mark.parametrize("counts", [b"", b"\x00", b"5~~", b"o", b"PPo", b"o" * 9 + b"0", "é".encode()])
def test_no_such_text(counts: bytes) -> None:
    with pytest.raises(ValueError, match="COCO mask"):
        rle.expand(counts)


@pytest.mark.parametrize("size", [(4, 6), (0, 0), (5, 4)])
def test_text_of_another_size(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"pixels in all, but got 25"):
        rle.decode(rle.encode(np.eye(5, dtype=bool)), size)


def test_runs_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="expected runs"):
        rle.decode(rle.compress([np.array([30, -5])])[0], (5, 5))


@pytest.mark.parametrize("shape", [(5,), (5, 5, 1), ()])
def test_a_mask_has_two_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(height, width\)"):
        rle.encode(np.zeros(shape, bool))
