"""Pictures of every kind become upright RGB; broken and hostile bytes become one error with the right reason."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from storage.errors import ItemFailed
from tests.times import soon
from workers import images
from workers.images import Limits

LIMITS = Limits(max_bytes=5_000_000, max_pixels=1_000_000)
REASONS = {"empty", "too-many-bytes", "too-many-pixels", "unknown-format", "truncated", "corrupt"}
WIDTH, HEIGHT = 40, 24


def scene(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """A smooth picture (kind to lossy formats) in which no mirror image equals another."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1)
    return np.stack([red, green, (x + 2 * y + seed) % 256 // 4], axis=2).astype(np.uint8)


def encoded(picture: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def reason(data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(ItemFailed) as caught:
        images.decode(data, limits)
    assert caught.value.stage == "decode"
    assert "\n" not in caught.value.message
    return caught.value.reason


LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "PPM": {}, "WEBP": {"lossless": True}}
ALL = {**LOSSLESS, "GIF": {}, "JPEG": {"quality": 95, "subsampling": 0}, "AVIF": {"quality": 95}}


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_formats_give_the_very_pixels(form: str) -> None:
    decoded = images.decode(encoded(scene(), form, **LOSSLESS[form]), LIMITS)
    assert np.array_equal(decoded.pixels, scene())
    assert (decoded.width, decoded.height) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("form", ALL)
def test_every_format_gives_contiguous_writable_rgb(form: str) -> None:
    data = encoded(scene(), form, **ALL[form])
    pixels = images.decode(data, LIMITS).pixels
    assert pixels.dtype == np.uint8
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert np.abs(pixels.astype(int) - scene()).mean() < 8
    assert images.header(data) == images.Header(form, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"quality": 20},
        {"optimize": True},
    ],
)
def test_jpeg_pixels_are_those_of_opencv_and_pillow(options: dict[str, Any]) -> None:
    data = encoded(scene(333, 211), "JPEG", **options)
    pixels = images.decode(data, LIMITS).pixels
    assert np.array_equal(pixels[:, :, ::-1], cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_applied_once(form: str, orientation: int) -> None:
    upright = scene()
    exif = Image.Exif()
    exif[274] = orientation
    # The stored picture is the upright one with the orientation undone, so that decoding must give it back.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Image.Transpose
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    decoded = images.decode(encoded(stored, form, exif=exif, **ALL[form]), LIMITS)
    assert (decoded.width, decoded.height) == (WIDTH, HEIGHT)
    assert np.abs(decoded.pixels.astype(int) - upright).mean() < 8


def test_compressed_tiff_is_oriented_once_too() -> None:
    exif = Image.Exif()
    exif[274] = 6
    stored = Image.fromarray(scene()).transpose(Image.Transpose.ROTATE_90)
    data = encoded(stored, "TIFF", exif=exif, compression="tiff_lzw")
    assert np.array_equal(images.decode(data, LIMITS).pixels, scene())


def test_broken_exif_does_not_spoil_the_picture() -> None:
    data = encoded(scene(), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert np.array_equal(images.decode(data, LIMITS).pixels, scene())


def png(depth: int, colour: int, rows: list[bytes], width: int, extra: bytes = b"") -> bytes:
    """A PNG by hand, for kinds that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


SIXTEEN = np.array([0, 255, 256, 0x8000, 0xFFFF], np.uint16)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_png_keeps_its_high_byte(colour: int, channels: int) -> None:
    row = np.repeat(SIXTEEN, channels).astype(">u2").tobytes()
    pixels = images.decode(png(16, colour, [row], len(SIXTEEN)), LIMITS).pixels
    assert pixels[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_grey_tiff_in_both_byte_orders(order: str) -> None:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    tags = [(256, 4, 5), (257, 4, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1), (279, 4, 10)]
    packed = b"".join(
        struct.pack(order + "HHI", tag, kind, 1)
        + (struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value))
        for tag, kind, value in tags
    )
    data = mark + struct.pack(order + "IH", 8, len(tags)) + packed + struct.pack(order + "I", 0)
    data = data.ljust(200, b"\0") + SIXTEEN.astype(order + "u2").tobytes()
    assert images.decode(data, LIMITS).pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_sixteen_bit_ppm() -> None:
    data = b"P5 5 1 65535\n" + SIXTEEN.astype(">u2").tobytes()
    assert images.decode(data, LIMITS).pixels[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_alpha_is_ignored_as_opencv_does() -> None:
    colours = np.dstack([scene(), np.tile(np.array([0, 128], np.uint8), (HEIGHT, WIDTH // 2))])
    data = encoded(Image.fromarray(colours, "RGBA"), "PNG")
    pixels = images.decode(data, LIMITS).pixels
    assert np.array_equal(pixels, scene())
    assert np.array_equal(pixels[:, :, ::-1], cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))


def test_grey_with_alpha_is_grey() -> None:
    grey = scene()[:, :, 0]
    data = encoded(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey)]), "PNG")
    assert np.array_equal(images.decode(data, LIMITS).pixels, np.repeat(grey[:, :, None], 3, 2))


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette_gives_its_colours(transparency: Any) -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    pixels = images.decode(encoded(picture, "PNG", **options), LIMITS).pixels
    assert pixels.tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


def test_rgb_png_with_a_transparent_colour() -> None:
    data = encoded(Image.fromarray(scene()), "PNG", transparency=(0, 0, 0))
    assert np.array_equal(images.decode(data, LIMITS).pixels, scene())


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "PPM"])
def test_one_bit(form: str) -> None:
    picture = Image.new("1", (9, 1))
    picture.putpixel((3, 0), 1)
    assert images.decode(encoded(picture, form), LIMITS).pixels[0, :, 2].tolist() == [0, 0, 0, 255, 0, 0, 0, 0, 0]


def test_cmyk_jpeg_looks_like_its_rgb() -> None:
    data = encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert np.abs(images.decode(data, LIMITS).pixels.astype(int) - scene()).mean() < 8


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation(form: str) -> None:
    first, second = Image.new("RGB", (16, 16), (200, 30, 30)), Image.new("RGB", (16, 16), (30, 200, 30))
    data = encoded(first, form, save_all=True, append_images=[second])
    assert np.abs(images.decode(data, LIMITS).pixels.astype(int) - [200, 30, 30]).max() < 12


@pytest.mark.parametrize("form", ALL)
def test_one_pixel(form: str) -> None:
    data = encoded(np.full((1, 1, 3), 128, np.uint8), form, **ALL[form])
    assert np.abs(images.decode(data, LIMITS).pixels.astype(int) - 128).max() < 8


def test_samples_without_an_agreed_scale_are_not_guessed() -> None:
    assert reason(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")) == "unknown-format"
    assert reason(encoded(Image.fromarray(np.zeros((2, 2), np.int32)), "TIFF")) == "unknown-format"


def test_empty() -> None:
    assert reason(b"") == "empty"


@pytest.mark.parametrize(
    "data", [b"x", b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"8BPS" + b"\0" * 60, b"\0" * 100, b"P9 1 1", b"\xff\xd8"]
)
def test_unknown_formats(data: bytes) -> None:
    assert reason(data) == "unknown-format"


def test_bytes_are_counted_before_anything_is_read() -> None:
    assert reason(b"not a picture at all", Limits(max_bytes=10)) == "too-many-bytes"


@pytest.mark.parametrize("form", ALL)
def test_pixels_are_counted_before_decoding(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(scene(), form, **ALL[form])
    images.decode(data, Limits(max_pixels=WIDTH * HEIGHT))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr("cv2.imdecode", lambda *_: pytest.fail("decoded"))
    assert reason(data, Limits(max_pixels=WIDTH * HEIGHT - 1)) == "too-many-pixels"


def test_bombs_allocate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    big = Limits(max_pixels=100_000_000)
    assert reason(png(8, 2, [b""], 2**31 - 1), big) in {"too-many-pixels", "corrupt"}
    webp = bytearray(encoded(scene(), "WEBP", lossless=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff\x3f\x00" * 2
    with monkeypatch.context() as patch:  # opening one makes room for its canvas
        patch.setattr("PIL.WebPImagePlugin.WebPImageFile.__init__", lambda *_: pytest.fail("opened"))
        assert reason(bytes(webp), big) == "too-many-pixels"
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0," + struct.pack("<HHHHB", 0, 0, 9, 9, 0) + b"\x02\0;"
    assert reason(gif, big) == "too-many-pixels"
    gif = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\0\0\0," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\0;"
    assert reason(gif, big) == "too-many-pixels"


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_say_so(form: str, share: float) -> None:
    rng = np.random.default_rng(0)
    noisy = (scene(120, 90) // 2 + rng.integers(0, 100, (90, 120, 3))).astype(np.uint8)
    data = encoded(noisy, form, **ALL[form])
    assert reason(data[: int(len(data) * share)]) == "truncated"


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV before 5 fills what a cut JPEG lacks with grey, and says nothing."""
    monkeypatch.setattr("cv2.imdecode", lambda *_: np.full((HEIGHT, WIDTH, 3), 128, np.uint8))


@pytest.mark.usefixtures("lenient")
def test_jpeg_without_its_end_marker_is_truncated() -> None:
    data = encoded(scene(), "JPEG")
    assert reason(data[:-2]) == "truncated"
    assert reason(data[: data.index(b"\xff\xda")]) == "truncated"


def test_the_end_marker_of_a_thumbnail_does_not_count(request: pytest.FixtureRequest) -> None:
    thumbnail = encoded(scene(8, 8), "JPEG")
    data = encoded(scene(), "JPEG")
    block = b"Exif\0\0" + thumbnail
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    assert np.array_equal(images.decode(data, LIMITS).pixels, images.decode(encoded(scene(), "JPEG"), LIMITS).pixels)
    request.getfixturevalue("lenient")
    assert reason(data[:-2]) == "truncated"


def test_bytes_after_the_end_are_no_harm() -> None:
    data = encoded(scene(), "JPEG")
    assert np.array_equal(images.decode(data + b"\0" * 999, LIMITS).pixels, images.decode(data, LIMITS).pixels)


@pytest.mark.parametrize("form", ALL)
def test_garbage_behind_the_magic_bytes(form: str) -> None:
    data = encoded(scene(), form, **ALL[form])
    assert reason(data[:12] + b"\xaa" * 200) in {"truncated", "corrupt", "too-many-pixels"}


def test_png_with_a_broken_checksum_is_corrupt() -> None:
    data = bytearray(encoded(scene(), "PNG"))
    data[data.index(b"IDAT") + 10] ^= 0xFF
    assert reason(bytes(data)) == "corrupt"


def test_no_memory_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cv2.imdecode", none_left)
    with pytest.raises(ItemFailed) as caught:
        images.decode(encoded(scene(), "JPEG"), LIMITS)
    assert (caught.value.reason, caught.value.retry) == ("too-many-pixels", True)


@settings(max_examples=300, deadline=None)
@given(form=st.sampled_from(sorted(ALL)), data=st.data())
def test_damaged_files_decode_or_fail_with_a_known_reason(form: str, data: st.DataObject) -> None:
    whole = bytearray(encoded(scene(), form, **ALL[form]))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(1, len(whole)))])
    outcome: images.Decoded | ItemFailed
    try:
        outcome = images.decode(damaged, LIMITS)
    except ItemFailed as error:
        outcome = error
    try:
        again = images.decode(damaged, LIMITS, images.header(damaged)).pixels.tobytes()
    except ItemFailed as error:
        again = error.message.encode()
    assert again == (outcome.message.encode() if isinstance(outcome, ItemFailed) else outcome.pixels.tobytes())
    if isinstance(outcome, ItemFailed):
        assert outcome.reason in REASONS
        assert pickle.loads(pickle.dumps(outcome)).reason == outcome.reason  # noqa: S301
    else:
        assert outcome.pixels.dtype == np.uint8
        assert outcome.pixels.shape == (outcome.height, outcome.width, 3)


def test_threads_agree() -> None:
    files = [encoded(scene(seed=i), form, **ALL[form]) for i in range(8) for form in ALL]
    alone = [images.decode(f, LIMITS).pixels for f in files]
    start = threading.Barrier(4)

    def all_of_them(_: int) -> bool:
        start.wait()
        return all(np.array_equal(images.decode(f, LIMITS).pixels, a) for f, a in zip(files, alone, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(all_of_them, range(4)))


def test_nothing_is_printed_for_broken_files() -> None:
    """In a process of its own, since the decoders' C code writes to file descriptor 2."""
    code = """
import io, sys, numpy as np
from PIL import Image
from storage.errors import ItemFailed
from workers import images
rng = np.random.default_rng(0)
for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF"):
    for kind in ("raw", "tiff_lzw", "tiff_adobe_deflate") if form == "TIFF" else ("",):
        out = io.BytesIO()
        options = {"compression": kind} if kind else {}
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(out, form, **options)
        data = out.getvalue()
        for damaged in (data[: len(data) // 2], data[:-2], data[:30] + data[60:], data[:8] + bytes(50)):
            try:
                images.decode(damaged, images.Limits())
            except ItemFailed:
                pass
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@given(st.lists(st.sampled_from([b"\xff", b"\xda", b"\xff\xda", b"a"]), max_size=12).map(b"".join), st.integers(0, 4))
def test_scans_are_counted_as_bytes_are(data: bytes, start: int) -> None:
    start = min(start, len(data))
    assert images._scans(data, start) == data.count(b"\xff\xda", start)


def test_a_jpeg_made_of_scans_is_refused_before_it_costs_anything() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rfind(b"\xff\xda")
    bomb = data[:-2] + data[last:-2] * 5000 + data[-2:]
    started = time.monotonic()
    with pytest.raises(ItemFailed, match="scans") as failed:
        images.decode(bomb, images.Limits())
    assert failed.value.reason == "corrupt"
    assert soon(time.monotonic() - started, 2)
    assert images.decode(data, images.Limits()).width == 64


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_scans_after_the_only_one_cost_nothing(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (640, 640), "red" if mode == "RGB" else 90).save(buffer, "JPEG")
    data = buffer.getvalue()
    longer = data[:-2] + data[data.rfind(b"\xff\xda") : -2] * 2_000 + data[-2:]
    found = None
    started = time.monotonic()
    with contextlib.suppress(ItemFailed):  # Pillow, which decodes CMYK, takes them for an error
        found = images.decode(longer, images.Limits())
    assert soon(time.monotonic() - started, 1)
    assert found is None if mode == "CMYK" else np.array_equal(found.pixels, images.decode(data, LIMITS).pixels)


@pytest.mark.parametrize("times", [1, 5_000])
def test_scans_of_single_channels_are_counted(times: int) -> None:
    """A sequential picture whose channels come one after another has several scans, and all there are get read."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 90).save(buffer, "JPEG")
    grey = buffer.getvalue()
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    size, codes = grey[frame + 5 : frame + 9], grey[scan + 10 : -2]
    channels = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    three = b"\xff\xc0" + struct.pack(">HB", 17, 8) + size + b"\x03" + channels
    scans = [b"\xff\xda" + struct.pack(">H", 8) + bytes([1, number, 0, 0, 63, 0]) + codes for number in (1, 2, 3)]
    data = grey[:frame] + three + grey[frame + 13 : scan] + b"".join(scans) + scans[2] * (times - 1) + grey[-2:]
    if times == 1:
        assert images.decode(data, LIMITS).width == 64
    else:
        with pytest.raises(ItemFailed, match="more than 100 scans"):
            images.decode(data, LIMITS)
