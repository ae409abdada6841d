"""Decodes pictures in batches onto a device, JPEGs by the device itself (nvJPEG through torchvision).

The same checks come first as in `workers.images`, and the same pictures fail with the same reasons. What nvJPEG does
not decode as libjpeg does (CMYK, JPEGs that hold RGB, bytes between segments) and every other format is decoded by
`workers.images` and moved to the device. It has not been run on a GPU yet; on device "cpu" torchvision's own libjpeg
decodes, and gives the pixels of `workers.images`. nvJPEG's differ by some grey levels where colour was subsampled.

Pictures are decoded in this process: not for IMAGEMILL_UNTRUSTED.
"""

from __future__ import annotations

import functools
import io
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.errors import ItemFailed, Misconfigured, one_line
from workers import images
from workers.images import Decoded, Header, Limits

log = logging.getLogger("imagemill.worker")

_AT_ONCE = 32  # pictures that wait together become one batch
_PIXELS_AT_ONCE = 64_000_000  # 192 MB decoded; a batch of 64 photographs of a megapixel


class OnDevice:
    """Decodes as `workers.images.Here` does, JPEGs in batches of those that threads ask for at the same time.

    The pixels come back to the host, where families prepare pictures. Where the device decodes no JPEG, this process
    does, and says so once.
    """

    def __init__(self, limits: Limits, device: str) -> None:
        self.limits, self.device = limits, device
        self._asked: queue.SimpleQueue[tuple[bytes, Future[Decoded]] | None] = queue.SimpleQueue()
        self._able: bool | None = None  # None until it was tried
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="decode-batch", daemon=True)
        self._thread.start()

    @property
    def decoder(self) -> str:
        """What turns JPEGs into pixels."""
        return "host" if self._able is False else "nvjpeg"

    def decode(self, data: bytes, known: Header | None = None) -> Decoded:
        """As `images.decode`. Called from many threads."""
        if not self._is_able() or images.plain_jpeg(data, self.limits) is None:
            return images.decode(data, self.limits, known)
        answer: Future[Decoded] = Future()
        self._asked.put((data, answer))
        return answer.result()

    def header(self, data: bytes) -> Header:
        """As `images.header`."""
        return images.header(data)

    def close(self) -> None:
        """Decode what was asked for, then end the thread."""
        self._asked.put(None)
        self._thread.join()

    def _is_able(self) -> bool:
        with self._lock:
            if self._able is None:
                try:
                    check(self.device)
                    self._able = True
                except Misconfigured as error:
                    log.warning("JPEGs are decoded on the CPU: %s", error)
                    self._able = False
            return self._able

    def _run(self) -> None:
        while (first := self._asked.get()) is not None:
            batch, last = [first], False
            while len(batch) < _AT_ONCE and not last:
                try:
                    one = self._asked.get_nowait()
                except queue.Empty:
                    break
                last = one is None
                if one is not None:
                    batch.append(one)
            self._answer(batch)
            if last:
                return

    def _answer(self, batch: Sequence[tuple[bytes, Future[Decoded]]]) -> None:
        try:
            with _stream_of_its_own(self.device):
                found = [_on_host(one) for one in decode([data for data, _ in batch], self.limits, self.device)]
        except Exception as error:  # noqa: BLE001 (somebody waits for each)
            for _, answer in batch:
                answer.set_exception(error)
            return
        for picture, (_, answer) in zip(found, batch, strict=True):
            if isinstance(picture, ItemFailed):
                answer.set_exception(picture)
            else:
                answer.set_result(picture)


@functools.cache
def _stream(device: str) -> Any:
    import torch

    made: Any = torch.cuda.Stream
    return made(device)


def _stream_of_its_own(device: str) -> AbstractContextManager[Any]:
    """On the stream of the networks, pixels would wait for the batch that is being computed."""
    if not device.startswith("cuda"):
        return nullcontext()
    import torch

    return torch.cuda.stream(_stream(device))


def _on_host(picture: Any) -> Decoded | ItemFailed:
    """A (3, height, width) tensor as what `images.decode` gives; an ItemFailed in its place stays."""
    if isinstance(picture, ItemFailed):
        return picture
    pixels = np.ascontiguousarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    return Decoded(pixels, pixels.shape[1], pixels.shape[0])


@dataclass(frozen=True, slots=True)
class _Jpeg:
    """A JPEG that the device decodes: where it stands in the batch, its bytes, pixels, and EXIF orientation."""

    index: int
    data: bytes
    pixels: int
    orientation: int


def decode(data: Sequence[bytes], limits: Limits, device: str) -> list[Any]:
    """Pictures -> (3, height, width) uint8 RGB tensors on the device, upright, or ItemFailed; same length and order.

    Called from one thread; on a GPU the tensors are ready for torch's current stream.

    Raises:
        Misconfigured: the device decodes no JPEG at all, so that the CPU would do all of it unasked.
    """
    check(device)
    found: list[Any] = [None] * len(data)
    ours = []
    for index, one in enumerate(data):
        try:
            plain = images.plain_jpeg(one, limits)
        except ItemFailed as failure:
            found[index] = failure
            continue
        if plain is None:
            found[index] = _here(one, limits, device)
        else:
            ours.append(_Jpeg(index, one, plain.width * plain.height, plain.orientation))
    for part in _parts(ours):
        for jpeg, picture in zip(part, _by_device(part, limits, device), strict=True):
            found[jpeg.index] = picture
    return found


@functools.cache
def check(device: str) -> None:
    """Raise Misconfigured unless the device decodes a JPEG."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(buffer, "JPEG")
    try:
        (picture,) = _decoded([buffer.getvalue()], device)
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise Misconfigured(f"torchvision decodes no JPEG on {device} here: {reason}; decode on the CPU") from error
    if picture.device.type != device.partition(":")[0] or abs(float(picture.float().mean()) - 200) > 4:
        raise Misconfigured(f"torchvision decodes JPEGs wrongly on {device} here; decode on the CPU")


def _parts(jpegs: Sequence[_Jpeg]) -> Iterator[list[_Jpeg]]:
    """Cut so that the pictures of one part have so many pixels together, or are one."""
    part: list[_Jpeg] = []
    for jpeg in jpegs:
        if part and sum(one.pixels for one in part) + jpeg.pixels > _PIXELS_AT_ONCE:
            yield part
            part = []
        part.append(jpeg)
    if part:
        yield part


def _by_device(part: Sequence[_Jpeg], limits: Limits, device: str) -> list[Any]:
    """Decoded by the device; one that it cannot decode, or has no memory for, is found by halving and decoded here."""
    try:
        pictures = _decoded([jpeg.data for jpeg in part], device)
    except RuntimeError:
        if len(part) == 1:
            return [_here(part[0].data, limits, device)]
        middle = len(part) // 2
        return _by_device(part[:middle], limits, device) + _by_device(part[middle:], limits, device)
    return [_upright(picture, jpeg.orientation) for picture, jpeg in zip(pictures, part, strict=True)]


def _decoded(data: Sequence[bytes], device: str) -> list[Any]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    tensors = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in data]
    pictures: list[Any] = decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device)
    return pictures


def _here(data: bytes, limits: Limits, device: str) -> Any:
    """Decoded by `workers.images` and moved to the device, or ItemFailed."""
    import torch

    try:
        pixels = images.decode(data, limits).pixels
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(device)
    except ItemFailed as failure:
        return failure
    except torch.OutOfMemoryError:
        return ItemFailed("decode", "too-many-pixels", "no memory on the device for this picture", retry=True)


def _upright(picture: Any, orientation: int) -> Any:
    """Undo an EXIF orientation of a (3, height, width) picture, as `workers.images` does."""
    if orientation >= 5:
        picture = picture.transpose(1, 2)
    sides = [2] * (orientation in (2, 3, 6, 7)) + [1] * (orientation in (3, 4, 7, 8))
    return (picture.flip(sides) if sides else picture).contiguous()
