"""Batches decode as single pictures do, whatever is among them; on the CPU, by the code that a GPU would run."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from storage.errors import ItemFailed, Misconfigured
from tests.services import wait_until
from workers import batchdecode, images
from workers.batchdecode import OnDevice
from workers.images import Limits

LIMITS = Limits()


def picture(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    """Smooth colours with one corner unlike the others."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def coded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return coded(picture(), exif=exif)


def rgb_inside() -> bytes:
    """A JPEG that holds red, green and blue instead of brightness and colour, as Adobe's mark says."""
    return coded(picture(), keep_rgb=True)


GOOD = {
    "plain": coded(picture()),
    "grey": coded(picture().convert("L")),
    "cmyk": coded(picture().convert("CMYK")),
    "rgb-inside": rgb_inside(),
    "progressive": coded(picture(), progressive=True),
    "odd": coded(picture(31, 17), subsampling="4:4:4"),
    "png": coded(picture(), "PNG"),
    "webp": coded(picture(), "WEBP", lossless=True),
    **{f"turned-{i}": turned(i) for i in range(1, 9)},
}
BAD = {
    "empty": b"",
    "text": b"no picture at all",
    "cut": coded(picture())[:300],
    "cut-png": coded(picture(), "PNG")[:80],
    "header-only": coded(picture())[:20] + b"\xff\xd9",
}


def same(found: Any, data: bytes) -> bool:
    expected = images.decode(data, LIMITS).pixels
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    return found.shape == (3, *expected.shape[:2]) and bool((found.permute(1, 2, 0).numpy() == expected).all())


def test_each_is_what_it_is_alone_in_any_company() -> None:
    names = [name for pair in zip([*GOOD], [*BAD, *BAD, *BAD, "empty"], strict=True) for name in pair]
    data = [{**GOOD, **BAD}[name] for name in names]
    found = batchdecode.decode(data, LIMITS, "cpu")
    for name, one, given in zip(names, found, data, strict=True):
        if name in GOOD:
            assert same(one, given), name
            continue
        with pytest.raises(ItemFailed) as alone:
            images.decode(given, LIMITS)
        assert isinstance(one, ItemFailed)
        assert (one.stage, one.reason, str(one)) == (alone.value.stage, alone.value.reason, str(alone.value)), name


def test_which_pictures_the_device_decodes() -> None:
    plain = {name for name, data in GOOD.items() if images.plain_jpeg(data, LIMITS) is not None}
    assert plain == set(GOOD) - {"cmyk", "rgb-inside", "png", "webp"}
    assert [images.plain_jpeg(turned(i), LIMITS) for i in (1, 6)] == [
        images.PlainJpeg(40, 24, 1),
        images.PlainJpeg(40, 24, 6),
    ]
    whole = coded(picture())
    noted = whole[:20] + b"rubbish" + whole[20:]  # after the JFIF segment
    assert images.plain_jpeg(noted, LIMITS) is None


def test_limits_hold() -> None:
    small = Limits(max_bytes=200, max_pixels=10**9)
    few = Limits(max_pixels=40 * 24 - 1)
    for limits, reason in ((small, "too-many-bytes"), (few, "too-many-pixels")):
        (found,) = batchdecode.decode([coded(picture())], limits, "cpu")
        assert (found.stage, found.reason) == ("decode", reason)


def test_what_the_device_cannot_decode_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header is whole and what follows is none of it; a device then fails the whole batch."""
    batchdecode.check("cpu")  # done once in a process, by whichever test comes first
    refused = coded(picture(seed=9))
    calls: list[int] = []
    really = batchdecode._decoded

    def strict(data: Any, device: str) -> Any:
        calls.append(len(data))
        if refused in data:
            raise RuntimeError("nvJPEG: this one not")
        return really(data, device)

    monkeypatch.setattr(batchdecode, "_decoded", strict)
    data = [coded(picture(seed=i)) for i in range(16)]
    found = batchdecode.decode(data, LIMITS, "cpu")
    assert all(same(one, given) for one, given in zip(found, data, strict=True))
    assert calls[0] == 16
    assert calls.count(1) == 2, "halved until it was alone"


def test_a_part_has_so_many_pixels_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    really = batchdecode._decoded
    monkeypatch.setattr(batchdecode, "_PIXELS_AT_ONCE", 3 * 40 * 24)
    monkeypatch.setattr(batchdecode, "_decoded", lambda data, device: calls.append(len(data)) or really(data, device))
    data = [coded(picture(seed=i)) for i in range(7)] + [coded(picture(400, 240))]
    found = batchdecode.decode(data, LIMITS, "cpu")
    assert calls == [3, 3, 1, 1]
    assert all(same(one, given) for one, given in zip(found, data, strict=True))


def test_no_pictures() -> None:
    assert batchdecode.decode([], LIMITS, "cpu") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_device_that_decodes_nothing_is_no_silent_cpu() -> None:
    with pytest.raises(Misconfigured, match=r"torchvision decodes no JPEG on cuda here: .*; decode on the CPU"):
        batchdecode.decode([coded(picture())], LIMITS, "cuda")


# ------------------------------------------------------------------------------------------------ asked by threads


@pytest.fixture
def on_device() -> Iterator[OnDevice]:
    made = OnDevice(LIMITS, "cpu")
    yield made
    made.close()


def answer(decoder: Any, data: bytes) -> tuple[Any, ...]:
    """The pixels, or the reason of the failure."""
    try:
        found = decoder.decode(data)
    except ItemFailed as failure:
        return (failure.stage, failure.reason)
    assert found.pixels.flags.writeable
    assert found.pixels.flags.c_contiguous
    assert (found.height, found.width, 3) == found.pixels.shape
    return (found.pixels.tobytes(), found.pixels.shape)


def test_threads_get_what_one_process_decodes(on_device: OnDevice) -> None:
    data = [*GOOD.values(), *BAD.values()] * 20
    here = images.Here(LIMITS)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda one: answer(on_device, one), data))
    assert found == [answer(here, one) for one in data]
    assert on_device.decoder == "nvjpeg"
    assert on_device.header(GOOD["odd"]) == images.header(GOOD["odd"])


def test_what_waits_together_is_one_batch(on_device: OnDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    first, go_on = threading.Event(), threading.Event()
    decode = batchdecode.decode

    def slow(data: list[bytes], *rest: Any) -> Any:
        batches.append(len(data))
        first.set()
        assert go_on.wait(10)
        return decode(data, *rest)

    monkeypatch.setattr(batchdecode, "decode", slow)
    count = 2 * batchdecode._AT_ONCE
    with ThreadPoolExecutor(count) as pool:
        one = pool.submit(on_device.decode, GOOD["plain"])
        assert first.wait(10)
        others = [pool.submit(on_device.decode, GOOD["grey"]) for _ in range(count - 1)]
        wait_until(lambda: on_device._asked.qsize() == count - 1, "all to be asked for")
        go_on.set()
        assert all(done.result(10) for done in [one, *others])
    assert batches == [1, batchdecode._AT_ONCE, batchdecode._AT_ONCE - 1]


def test_a_batch_that_breaks_is_told_to_each(on_device: OnDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("pretended")

    monkeypatch.setattr(batchdecode, "decode", broken)
    with pytest.raises(RuntimeError, match="pretended"):
        on_device.decode(GOOD["plain"])
    assert answer(on_device, GOOD["png"]) == answer(images.Here(LIMITS), GOOD["png"]), "no picture for the device"
    monkeypatch.undo()
    assert answer(on_device, GOOD["plain"]) == answer(images.Here(LIMITS), GOOD["plain"])


def test_a_device_that_decodes_nothing_is_said_once(
    on_device: OnDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unable(device: str) -> None:
        raise Misconfigured("torchvision decodes no JPEG on cuda here")

    monkeypatch.setattr(batchdecode, "check", unable)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: answer(on_device, one), [GOOD["plain"]] * 20))
    assert set(found) == {answer(images.Here(LIMITS), GOOD["plain"])}
    assert on_device.decoder == "host"
    assert [record.message.count("decoded on the CPU") for record in caplog.records] == [1]
