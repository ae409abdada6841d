"""Turns the bytes of a picture into upright RGB uint8 pixels, or into one error with a reason.

The bytes are hostile. They are checked in this order: their number, the format by its first bytes against a list,
the number of pixels from the header, and only then are they decoded.

    picture                            becomes
    ---------------------------------  --------------------------------------------------------------------------------
    JPEG, grey or YCbCr or RGB         RGB, the same pixels as cv2.imdecode, PIL and torchvision.io
    JPEG, CMYK or YCCK                 RGB through Pillow, which knows Adobe's inverted inks
    PNG, WEBP, BMP, TIFF, GIF, PPM,    RGB through Pillow, which is silent and strict
      AVIF (where Pillow has it)
    palette                            its colours
    alpha (LA, RGBA, PA, tRNS)         the colour channels as stored, alpha ignored: what cv2.imread gives, and with it
                                       what detectors were trained on; blending needs a background nobody chose
    16 bits a channel                  the high byte, value // 256: the whole range is kept, nothing is clipped
    1 bit                              0 and 255
    32-bit integers, floating point,   fails with unknown-format: nobody agreed on how they map to 8 bits
      Lab
    animated GIF, WEBP, PNG, AVIF,     the first frame or page
      many-paged TIFF
    EXIF orientation (JPEG, PNG,       applied exactly once, mirrored ones too; a broken EXIF block is ignored;
      WEBP, TIFF, AVIF)                width and height are those of the upright picture
    ICC profile                        ignored, as cv2.imread does

Reasons of failure: empty, too-many-bytes, too-many-pixels, unknown-format, truncated, corrupt. A decoder that finds no
memory gives too-many-pixels with retry set, for on a machine less busy the same picture may fit. A JPEG whose middle is
damaged but whose end is there decodes to what libjpeg could save, as in every other library. In that case, and for any
damaged TIFF, the C library writes lines to stderr itself, which Python cannot stop without swallowing the stderr of
other threads; nothing else here prints.
"""

from __future__ import annotations

import functools
import importlib
import io
import logging
import math
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import ItemFailed

Pixels = npt.NDArray[np.uint8]

# Pillow's plug-in for each format; asking them directly keeps its other formats (EPS, PSD, ...) out of reach.
_PLUGINS = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "PPM": ("PIL.PpmImagePlugin", "PpmImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
}
FORMATS = tuple(_PLUGINS)

# Modes that Pillow turns into RGB without inventing a scale.
_EIGHT_BIT_MODES = frozenset({"1", "L", "P", "PA", "LA", "La", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"})
_ORIENTATION, _TILE_WIDTH, _TILE_HEIGHT = 274, 322, 323  # EXIF and TIFF tags
_MAX_JPEG_SEGMENTS = 10_000
_MAX_JPEG_SCANS = 100  # encoders use about ten; a small file with thousands is made to keep a decoder busy


@dataclass(frozen=True, slots=True)
class Limits:
    """What a picture may have at most: bytes of the file, pixels (width times height) of the decoded picture."""

    max_bytes: int = 100_000_000
    max_pixels: int = 100_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """An upright picture.

    Attributes:
        pixels: (height, width, 3) uint8 RGB, contiguous and writable.
        width: of the upright picture, in pixels.
        height: of the upright picture, in pixels.
    """

    pixels: Pixels
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class _Frame:
    """What the segments of a JPEG before its first scan say."""

    width: int
    height: int
    channels: int
    scan: int  # offset of the first scan
    clean: bool  # nothing between the segments
    one_scan: bool  # decoders read no further than the first scan, whatever follows


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its picture.

    Attributes:
        format: one of FORMATS.
        width, height: as stored, before orientation.
        frame: of a JPEG.
    """

    format: str
    width: int
    height: int
    frame: _Frame | None = field(default=None, compare=False, repr=False)


def decode(data: bytes, limits: Limits, known: Header | None = None) -> Decoded:
    """The picture in the bytes. Safe to call from many threads; the decoders release the GIL.

    Args:
        known: what `header` says of the bytes, which is then not read again.

    Raises:
        ItemFailed: stage "decode", with one of the reasons in the module's docstring.
    """
    _check_bytes(data, limits.max_bytes)
    name = known.format if known else _format(data)
    try:
        if name == "JPEG":
            pixels = _decode_jpeg(data, limits, (known and known.frame) or _jpeg_frame(data))
        else:
            pixels = _decode_pillow(name, data, limits)
    except ItemFailed:
        raise
    except Exception as error:
        raise _item_failed(name, data, error) from error
    return Decoded(pixels, pixels.shape[1], pixels.shape[0])


@dataclass(frozen=True, slots=True)
class PlainJpeg:
    """A JPEG that every decoder decodes alike: grey or YCbCr, nothing between its segments.

    Attributes:
        width, height: as stored, before orientation.
        orientation: of EXIF, 1 to 8; for the decoder's caller to undo.
    """

    width: int
    height: int
    orientation: int


def plain_jpeg(data: bytes, limits: Limits) -> PlainJpeg | None:
    """What a JPEG's header says, for another decoder than `decode`; None for a picture that is best left to that.

    Raises:
        ItemFailed: as `decode`, for what can be told without decoding.
    """
    _check_bytes(data, limits.max_bytes)
    if _format(data) != "JPEG":
        return None
    frame = _jpeg_frame(data)
    _check_jpeg(data, limits, frame)
    if frame.channels not in (1, 3) or not frame.clean:
        return None
    try:
        picture = _opened("JPEG", data)
    except Exception:  # noqa: BLE001 (Pillow cannot read the header; `decode` says why)
        return None
    if frame.channels == 3 and not _is_ycc(picture):
        return None
    return PlainJpeg(frame.width, frame.height, _orientation(picture))


def _is_ycc(picture: Any) -> bool:
    """Whether three channels are YCbCr, by libjpeg's rules: a JFIF header, Adobe's mark, or the channels' numbers."""
    if "jfif" in picture.info:
        return True
    if "adobe" in picture.info:
        return bool(picture.info.get("adobe_transform") == 1)
    return [layer[0] for layer in picture.layer] == [1, 2, 3]


def crop(pixels: Pixels, box: Sequence[float]) -> Pixels:
    """The part of a picture that a box covers, at least one pixel of it.

    Args:
        box: x1, y1, x2, y2 in pixels of the upright picture; what lies outside of it is left out.

    Raises:
        ItemFailed: stage "prepare", reason "outside", for a box that does not touch the picture.
    """
    height, width = pixels.shape[:2]
    try:
        left, top, right, bottom = (float(value) for value in box)
        x1, y1, x2, y2 = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    except (TypeError, ValueError, OverflowError):
        raise ItemFailed("prepare", "bad-prompt", f"expected a crop [x1, y1, x2, y2], but got {box!r}") from None
    x1, y1, x2, y2 = max(0, x1), max(0, y1), min(width, max(x2, x1 + 1)), min(height, max(y2, y1 + 1))
    if x1 >= x2 or y1 >= y2:
        raise ItemFailed("prepare", "outside", f"the crop {list(box)} does not touch the {width} x {height} picture")
    return np.ascontiguousarray(pixels[y1:y2, x1:x2])


class Here:
    """Decodes in this process; `workers.sandbox.Sandbox` does the same in others, `workers.batchdecode` on a GPU."""

    decoder = "host"  # what turns pictures into pixels, as provenance names it

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def decode(self, data: bytes, known: Header | None = None) -> Decoded:
        """As the function."""
        return decode(data, self.limits, known)

    def header(self, data: bytes) -> Header:
        """As the function."""
        return header(data)

    def close(self) -> None:
        """Nothing to end."""


def header(data: bytes) -> Header:
    """What the file says of its picture, without decoding. Raises ItemFailed as `decode` does."""
    name = _format(data)
    try:
        if name == "JPEG":
            frame = _jpeg_frame(data)
            return Header(name, frame.width, frame.height, frame)
        width, height = _webp_size(data) if name == "WEBP" else _opened(name, data).size
        return Header(name, width, height)
    except ItemFailed:
        raise
    except Exception as error:
        raise _item_failed(name, data, error) from error


def _failed(reason: str, message: str, *, retry: bool = False) -> ItemFailed:
    return ItemFailed("decode", reason, message, retry=retry)


def _check_bytes(data: bytes, most: int) -> None:
    if len(data) > most:
        raise _failed("too-many-bytes", f"the file has {len(data)} bytes, over the limit of {most}")


def _format(data: bytes) -> str:
    """The format by its first bytes."""
    if not data:
        raise _failed("empty", "the file has no bytes")
    name = _format_of(data)
    if not name:
        found = "is HEIC; convert it to JPEG" if _is_heic(data) else f"starts {data[:8]!r}"
        raise _failed("unknown-format", f"expected one of {', '.join(FORMATS)}, but the file {found}")
    return name


def _format_of(data: bytes) -> str:
    for name, starts in (
        ("JPEG", (b"\xff\xd8\xff",)),
        ("PNG", (b"\x89PNG\r\n\x1a\n",)),
        ("BMP", (b"BM",)),
        ("TIFF", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
        ("GIF", (b"GIF87a", b"GIF89a")),
    ):
        if data.startswith(starts):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in (b" ", b"\t", b"\r", b"\n"):
        return "PPM"
    brands = _brands(data)
    return "AVIF" if (b"avif" in brands or b"avis" in brands) and _avif() else ""


def _brands(data: bytes) -> bytes:
    """What an ISO media file says it is; "mif1" files are AVIF or HEIC, and the compatible brands that follow tell."""
    return data[8 : min(int.from_bytes(data[:4], "big"), 128)] if data[4:8] == b"ftyp" else b""


def _is_heic(data: bytes) -> bool:
    return any(brand in _brands(data) for brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis"))


@functools.cache
def _avif() -> bool:
    from PIL import features

    return bool(features.check("avif"))


def _item_failed(name: str, data: bytes, error: Exception) -> ItemFailed:
    """What an error of any other kind from a decoder says of the picture."""
    from PIL.Image import DecompressionBombError

    if isinstance(error, MemoryError):
        return _failed("too-many-pixels", f"no memory to decode this {name}", retry=True)
    if isinstance(error, DecompressionBombError):
        return _failed("too-many-pixels", str(error))
    short = isinstance(error, EOFError) or "truncat" in str(error).lower() or _cut_short(name, data)
    reason = "truncated" if short else "corrupt"
    return _failed(reason, f"{reason} {name}: {type(error).__name__}: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _cut_short(name: str, data: bytes) -> bool:
    """Whether a picture that did not decode lacks its end, by what its format says about its length."""
    if name == "PNG":
        return b"IEND" not in data[-64:]
    if name == "WEBP":
        return len(data) < 12 + 8 or int.from_bytes(data[4:8], "little") + 8 > len(data)
    if name == "BMP":
        return len(data) < 26 or int.from_bytes(data[2:6], "little") > len(data)
    if name == "GIF":
        return not data.rstrip(b"\0").endswith(b";")
    if name == "AVIF":
        return _boxes_end(data) > len(data)
    if name == "TIFF":
        return _tiff_ifd(data) + 6 > len(data)
    return False


def _boxes_end(data: bytes) -> int:
    """Where the last top-level box of an ISO media file says it ends."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:
            return len(data)
        at += size
    return at if at >= len(data) else len(data) + 1


def _tiff_ifd(data: bytes) -> int:
    """Offset of the first directory of a classic TIFF; 0 for BigTIFF."""
    if len(data) < 8:
        return len(data)
    order = "little" if data[:2] == b"II" else "big"
    classic = int.from_bytes(data[2:4], order) == 42  # type: ignore[arg-type]
    return int.from_bytes(data[4:8], order) if classic else 0  # type: ignore[arg-type]


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise _failed(
            "too-many-pixels", f"{width} x {height} is {width * height} pixels, over the limit of {limits.max_pixels}"
        )
    if width < 1 or height < 1:
        raise _failed("corrupt", f"expected at least 1 x 1 pixels, but the header says {width} x {height}")


def _jpeg_frame(data: bytes) -> _Frame:
    """Size and channels of a JPEG, from the segments before its first scan (ITU-T T.81, annex B)."""
    at, size, clean, sequential = 2, None, True, False
    for _ in range(_MAX_JPEG_SEGMENTS):
        clean = clean and data[at : at + 1] == b"\xff"
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            raise _failed("truncated", "truncated JPEG: it ends within its header")
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # padding, and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xDA and size:
            # One scan of all channels of a sequential picture is all of it; libjpeg takes a second one for an error.
            one_scan = sequential and data[at + 4 : at + 5] == bytes([size[2]])
            return _Frame(*size, scan=at, clean=clean, one_scan=one_scan)
        if marker in (0xD9, 0xDA):
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and not size:
            if at + 10 > len(data):
                raise _failed("truncated", "truncated JPEG: it ends within its header")
            height, width, channels = struct.unpack_from(">HHB", data, at + 5)
            size, sequential = (width, height, channels), marker in (0xC0, 0xC1)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise _failed("corrupt", "corrupt JPEG: no frame before the first scan")


def _check_jpeg(data: bytes, limits: Limits, frame: _Frame) -> None:
    """Raise ItemFailed for a JPEG that may not be decoded: it is too large, has no end, or has endless scans."""
    _check_pixels(frame.width, frame.height, limits)
    # The end marker cannot occur within a scan. Older OpenCV fills what a cut file lacks with grey and says nothing.
    if data.rfind(b"\xff\xd9", frame.scan) < 0:  # it stands at the end, as a rule
        raise _failed("truncated", "truncated JPEG: it has no end marker")
    if not frame.one_scan and _scans(data, frame.scan) > _MAX_JPEG_SCANS:
        raise _failed("corrupt", f"JPEG with more than {_MAX_JPEG_SCANS} scans: each costs a pass over all pixels")


def _scans(data: bytes, start: int) -> int:
    """How often the bytes FF DA occur from a place on. `bytes.count` takes a twentieth of the time of decoding."""
    counts = {at: (len(data) - at) // 2 for at in (start, start + 1)}
    pairs = (np.frombuffer(data, "<u2", count, at) for at, count in counts.items() if count > 0)
    return sum(int(np.count_nonzero(some == 0xDAFF)) for some in pairs)


def _decode_jpeg(data: bytes, limits: Limits, frame: _Frame) -> Pixels:
    """Through OpenCV: as fast as any, the very pixels ultralytics sees, and without the GIL."""
    _check_jpeg(data, limits, frame)
    # OpenCV's libjpeg writes to stderr about bytes between segments; Pillow's does not.
    if frame.channels in (1, 3) and frame.clean:
        cv2 = _cv2()
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)  # applies EXIF orientation
        if pixels is not None:
            return np.ascontiguousarray(pixels)
    return _decode_pillow("JPEG", data, limits)


@functools.cache
def _cv2() -> Any:
    """OpenCV, silent, and with one thread a call: the caller has threads enough."""
    import cv2

    getattr(cv2, "setLogLevel", cv2.utils.logging.setLogLevel)(0)
    cv2.setNumThreads(1)
    return cv2


def _webp_size(data: bytes) -> tuple[int, int]:
    """Size from a WEBP header (RFC 9649), since Pillow allocates the canvas before it tells the size."""
    kind = data[12:16]
    if len(data) < 30:
        raise _failed("truncated", "truncated WEBP: it ends within its header")
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise _failed("corrupt", f"corrupt WEBP: expected a VP8 chunk, but got {kind!r}")


def _opened(name: str, data: bytes) -> Any:
    """Pillow's lazy picture: its header is read, its pixels are not."""
    _quiet_pillow()
    module, plugin = _PLUGINS[name]
    return getattr(importlib.import_module(module), plugin)(io.BytesIO(data))


@functools.cache
def _quiet_pillow() -> None:
    """Silence warnings about odd tags, once and for good: filters that come and go are not thread safe."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _decode_pillow(name: str, data: bytes, limits: Limits) -> Pixels:
    if name == "WEBP":
        width, height = _webp_size(data)
        _check_pixels(width, height, limits)
    with _opened(name, data) as picture:
        _check_pixels(picture.width, picture.height, limits)
        if name == "TIFF":
            tags = picture.tag_v2
            _check_pixels(int(tags.get(_TILE_WIDTH, 1)), int(tags.get(_TILE_HEIGHT, 1)), limits)
        picture.load()
        return _upright(_rgb(picture), _orientation(picture))


def _rgb(picture: Any) -> Pixels:
    """The loaded picture's colours, alpha ignored."""
    mode = str(picture.mode)
    if mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM")):
        grey = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode not in _EIGHT_BIT_MODES:
        raise _failed("unknown-format", f"a {picture.format} with samples of mode {mode!r} has no agreed 8-bit colours")
    picture.info.pop("transparency", None)
    return np.array(picture.convert("RGB"))


def _orientation(picture: Any) -> int:
    """EXIF orientation 1..8. Only EXIF counts, not XMP, as for JPEG in OpenCV.

    A TIFF has no such block: Pillow turns it while loading.
    """
    from PIL.Image import Exif

    block = picture.info.get("exif")
    if not block:
        return 1
    exif = Exif()
    try:
        exif.load(block)
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # metadata that cannot be read does not spoil the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 2 and 4 mirror, 3 turns by 180 degrees, 5 to 8 also swap rows and columns."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
