"""The pretended detector: what it finds follows from every pixel, and from where each stands."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.results.detections import Result
from workers.models import Image, stub


def _picture(height: int, width: int) -> Image:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def _same(one: Result, other: Result) -> bool:
    return one.scores.tobytes() == other.scores.tobytes()  # the boxes follow from the size too


@given(st.sampled_from([(1, 1), (3, 5), (64, 128), (67, 131), (200, 400)]), st.integers(0, 10**6), st.integers(1, 255))
def test_every_pixel_counts(size: tuple[int, int], at: int, change: int) -> None:
    picture = _picture(*size)
    before = stub.expected(picture)
    assert _same(before, stub.expected(picture.copy()))
    other = picture.copy().reshape(-1)
    other[at % other.size] ^= change
    assert not _same(before, stub.expected(other.reshape(picture.shape)))


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([1, 3, 8, 4096]))
def test_where_pixels_stand_counts(one: int, two: int, nbytes: int) -> None:
    picture = _picture(256, 512)
    other = picture.copy().reshape(-1, nbytes)
    one, two = one % len(other), two % len(other)
    other[[one, two]] = other[[two, one]]
    changed = other.reshape(picture.shape)
    assert _same(stub.expected(picture), stub.expected(changed)) == bool((changed == picture).all())


def test_rows_and_columns_that_change_places_count() -> None:
    picture = _picture(256, 1024)
    for other in (picture[::-1], picture[:, ::-1], np.roll(picture, 1, axis=0), np.roll(picture, 1, axis=1)):
        assert not _same(stub.expected(picture), stub.expected(other))


def test_the_shape_counts() -> None:
    picture = _picture(64, 128)
    assert not _same(stub.expected(picture), stub.expected(picture.reshape(128, 64, 3)))
