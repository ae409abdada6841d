"""Files of made images: readable by others, exact where the format allows it, and saying how they were made."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.errors import ItemFailed
from workers import imagefiles

HOW = {"prompt": "ein Bär 日本 \U0001f43b", "seed": 2**62, "guidance": 7.5, "params": {"a": [1, None]}}


def noise(height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def told_by(data: bytes) -> dict[str, Any]:
    """What a reader of metadata finds in a file."""
    with Image.open(io.BytesIO(data)) as picture:
        comment = picture.getexif().get_ifd(0x8769).get(0x9286, b"")
        text = picture.info.get("imagemill") or comment.removeprefix(b"ASCII\0\0\0").decode()
    return json.loads(text)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_file_says_how_it_was_made(format: str) -> None:
    result = imagefiles.encode(noise(), format, 90, HOW, {"boxes": [[0.0, 1.0, 2.0, 3.0]]})
    assert result.data is not None
    assert told_by(result.data) == {**HOW, "imagemill": imagefiles.product()}
    assert result.meta == {**HOW, "imagemill": imagefiles.product(), "boxes": [[0.0, 1.0, 2.0, 3.0]]}
    with Image.open(io.BytesIO(result.data)) as picture:
        assert (picture.format, picture.size) == (format.upper(), (50, 40))
        assert (result.width, result.height, result.format) == (50, 40, format)


def test_png_loses_nothing_and_quality_counts() -> None:
    png = imagefiles.encode(noise(), "png", 1, {})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png.data or b""))), noise())
    sizes = [[imagefiles.encode(noise(), f, q, {}).nbytes for q in (30, 60, 95)] for f in ("jpeg", "webp")]
    assert all(a < b < c for a, b, c in sizes)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_exif_holds_no_novel(format: str) -> None:
    assert (
        told_by(imagefiles.encode(noise(), format, 90, {"prompt": "a" * 60_000}).data or b"")["prompt"] == "a" * 60_000
    )
    with pytest.raises(ItemFailed, match="use png") as caught:
        imagefiles.encode(noise(), format, 90, {"prompt": "a" * 70_000})
    assert (caught.value.stage, caught.value.reason) == ("write", "metadata-too-long")
    assert told_by(imagefiles.encode(noise(), "png", 90, {"prompt": "a" * 70_000}).data or b"")


@pytest.mark.parametrize(("format", "quality"), [("gif", 90), ("png", 0), ("png", 101), ("png", True), (None, 90)])
def test_other_formats_and_qualities_are_refused(format: Any, quality: Any) -> None:
    with pytest.raises(ValueError, match=r"(format|quality) must be"):
        imagefiles.check_format(format, quality)
