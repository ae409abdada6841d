"""A seeded stream of damaged and hostile picture files: small valid pictures of every format, bent in every way.

The file of a number depends on the seed and that number only, so one that does harm is made again by `one`.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, features

Mutation = Callable[[random.Random, str, bytes], bytes]

WIDTH, HEIGHT = 48, 32
HUGE = 60_000  # on a side, in headers that lie: 3.6 billion pixels
UNDER, OVER = 4_400, 4_600  # on a side, of pictures that really are that large: 19.4 and 21.2 million pixels
_INTERESTING = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 64, 127, 128, 255, 256, 32767, 32768, 65535, 65536, HUGE, 2**31 - 1)
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "gif", "PPM": "ppm"}
_SUFFIXES["AVIF"] = "avif"


def generate(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of so many files; names are unique, end in the format's suffix and tell what was done."""
    for number in range(count):
        yield one(number, seed)


def one(number: int, seed: int) -> tuple[str, bytes]:
    """The file of this number."""
    rng = random.Random(f"{seed}/{number}")
    chosen = sorted(seeds())
    seed_name = chosen[number % len(chosen)] if number < len(chosen) else rng.choice(chosen)
    data, form = seeds()[seed_name], seed_name.split("-")[0]
    mutation = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    bent = mutation(rng, form, data)
    if rng.random() < 0.15:  # lies often matter only together
        bent = rng.choice((flip_bits, truncate, lie, overwrite))(rng, form, bent)
    label = mutation.__name__.replace("_", "-")
    return f"{number:06d}-{seed_name.lower()}-{label}.{_SUFFIXES[form]}", bent


# ---------------------------------------------------------------------------------------------------- valid pictures


@functools.cache
def seeds() -> dict[str, bytes]:
    """Small valid pictures by name; a name starts with its format."""
    scene = picture()
    grey16 = Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257)
    frames = [scene.rotate(90 * turn) for turn in range(1, 4)]
    exif = Image.Exif()
    exif[274], exif[305] = 6, "somebody's camera"
    found = {
        "JPEG-baseline": saved(scene, "JPEG"),
        "JPEG-progressive": saved(scene, "JPEG", progressive=True),
        "JPEG-grey": saved(scene.convert("L"), "JPEG"),
        "JPEG-cmyk": saved(scene.convert("CMYK"), "JPEG"),
        "JPEG-exif": saved(scene, "JPEG", exif=exif, icc_profile=b"not a profile" * 20),
        "JPEG-restarts": saved(scene, "JPEG", restart_marker_blocks=2, subsampling=0),
        "PNG-rgb": saved(scene, "PNG"),
        "PNG-rgba": saved(scene.convert("RGBA"), "PNG", exif=exif),
        "PNG-palette": saved(scene.quantize(16), "PNG", transparency=1),
        "PNG-16": saved(grey16, "PNG"),
        "PNG-1": saved(scene.convert("1"), "PNG"),
        "PNG-interlaced": interlaced(),
        "PNG-animated": saved(scene, "PNG", save_all=True, append_images=frames),
        "WEBP-lossy": saved(scene, "WEBP"),
        "WEBP-lossless": saved(scene.convert("RGBA"), "WEBP", lossless=True, exif=exif),
        "WEBP-animated": saved(scene, "WEBP", save_all=True, append_images=frames),
        "BMP-rgb": saved(scene, "BMP"),
        "BMP-palette": saved(scene.quantize(16), "BMP"),
        "BMP-rle": run_length_bmp(),
        "TIFF-raw": saved(scene, "TIFF", exif=exif),
        "TIFF-16": saved(grey16, "TIFF"),
        "TIFF-float": saved(scene.convert("F"), "TIFF"),
        "TIFF-pages": saved(scene, "TIFF", save_all=True, append_images=frames),
        "GIF-one": saved(scene, "GIF"),
        "GIF-animated": saved(scene, "GIF", save_all=True, append_images=frames, transparency=0),
        "PPM-rgb": saved(scene, "PPM"),
        "PPM-grey": saved(scene.convert("L"), "PPM"),
        "PPM-text": b"P3 3 2 255\n" + b"10 20 30 " * 6,
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"):
        if features.check("libtiff"):
            found[f"TIFF-{compression.removeprefix('tiff_')}"] = saved(scene, "TIFF", compression=compression)
    found["TIFF-fax"] = saved(scene.convert("1"), "TIFF", compression="group4")
    if features.check("avif"):
        found["AVIF-one"] = saved(scene, "AVIF", speed=10, max_threads=1)
        found["AVIF-alpha"] = saved(scene.convert("RGBA"), "AVIF", speed=10, max_threads=1, exif=exif)
    return found


def picture() -> Image.Image:
    """A gradient with edges."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return Image.fromarray(np.stack([x * 5, y * 7, (x // 8 + y // 8) % 2 * 200], axis=2).astype(np.uint8))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    image.save(out, form, **options)  # type: ignore[arg-type]
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with a right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, packed: bytes, interlace: int = 0) -> bytes:
    """A PNG file around compressed bytes that may be anything."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def interlaced() -> bytes:
    """An Adam7 PNG, which Pillow reads and does not write."""
    grey, raw = np.asarray(picture().convert("L")), b""
    for y, x, down, right in ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)):
        raw += b"".join(b"\0" + row.tobytes() for row in grey[y::down, x::right])
    raw += b"".join(b"\0" + row.tobytes() for row in grey[1::2])
    return png(WIDTH, HEIGHT, 8, 0, zlib.compress(raw), interlace=1)


def run_length_bmp(width: int = WIDTH, height: int = HEIGHT, rows: int = HEIGHT) -> bytes:
    """A BMP of 8-bit runs: in each of so many rows one run, then nothing to its end, in four bytes."""
    body = bytes((min(width, 255), 7, 0, 0)) * rows + b"\0\1"
    palette = bytes(range(256)) * 4
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    offset = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + head + palette + body


# ------------------------------------------------------------------------------------- mutations that know no format


def flip_bits(rng: random.Random, form: str, data: bytes) -> bytes:
    """A few bits turned, half of the time near the start, where the headers are."""
    out = bytearray(data)
    reach = len(out) if rng.random() < 0.5 else min(len(out), 64)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if out else 0):
        out[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(rng: random.Random, form: str, data: bytes) -> bytes:
    """A run of bytes replaced by zeros, ones or noise."""
    at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 16, 100))
    run = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:at] + run + data[at + length :]


def insert(rng: random.Random, form: str, data: bytes) -> bytes:
    """Bytes that do not belong there, or a piece of the file once more."""
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 3, 32, 500))
    return data[:at] + (rng.randbytes(length) if rng.random() < 0.5 else data[at : at + length]) + data[at:]


def remove(rng: random.Random, form: str, data: bytes) -> bytes:
    """A hole."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 100)) :]


def truncate(rng: random.Random, form: str, data: bytes) -> bytes:
    """The end is missing: from the magic number on, from the header on, from the middle on, from the last bytes on."""
    most = rng.choice((16, 64, len(data), len(data)))
    left = rng.randrange(min(most, len(data)) + 1)
    return data[: len(data) - left] if rng.random() < 0.3 else data[:left]


def splice(rng: random.Random, form: str, data: bytes) -> bytes:
    """The start of one picture and the rest of another."""
    other = seeds()[rng.choice(sorted(seeds()))]
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def concatenate(rng: random.Random, form: str, data: bytes) -> bytes:
    """Two files in one, or one with noise or zeros at its end."""
    return data + rng.choice((seeds()[rng.choice(sorted(seeds()))], rng.randbytes(300), bytes(300)))


def empty(rng: random.Random, form: str, data: bytes) -> bytes:
    """No bytes, or as many zeros as the file had, or zeros after its first bytes."""
    return rng.choice((b"", bytes(len(data)), data[:16] + bytes(max(0, len(data) - 16))))


def text(rng: random.Random, form: str, data: bytes) -> bytes:
    """Something else under a picture's name."""
    return rng.choice((b"<html><body>404 Not Found</body></html>", b"%PDF-1.7\n", "été\n".encode() * 40, b"\xff\xfe"))


# ----------------------------------------------------------------------------------------- mutations that know a format


def lie(rng: random.Random, form: str, data: bytes) -> bytes:
    """A field of the header that says something else, with whatever checksum makes it believed."""
    liar = {
        "PNG": _lie_png,
        "JPEG": _lie_jpeg,
        "TIFF": _lie_tiff,
        "GIF": _lie_gif,
        "WEBP": _lie_webp,
        "BMP": _lie_bmp,
        "PPM": _lie_ppm,
        "AVIF": _lie_avif,
    }[form]
    return liar(rng, data) if len(data) > 40 else data


def _number(rng: random.Random) -> int:
    return rng.choice(_INTERESTING) if rng.random() < 0.8 else rng.getrandbits(32)


def _put(data: bytes, at: int, layout: str, number: int) -> bytes:
    """The bytes with a number at an offset, cut to what its layout holds."""
    size = struct.calcsize(layout)
    if at < 0 or at + size > len(data):
        return data
    raw = (number % (1 << 8 * size)).to_bytes(size, "big" if layout[0] == ">" else "little")
    return data[:at] + raw + data[at + size :]


def _lie_png(rng: random.Random, data: bytes) -> bytes:
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return data
    which = 0 if rng.random() < 0.5 else rng.randrange(len(chunks))
    kind, body = chunks[which]
    what = rng.randrange(5)
    if what == 0:  # a length that is not so
        return _put(data, data.find(kind) - 4, ">I", _number(rng))
    if what == 1:
        chunks.insert(rng.randrange(len(chunks) + 1), rng.choice(chunks))
    elif what == 2:
        packed = zlib.compress(bytes(2_000_000))
        chunks.insert(1, rng.choice(((b"zTXt", b"k\0\0" + packed), (b"iCCP", b"p\0\0" + packed), (b"tEXt", b"k\0v"))))
    elif which == 0:
        field = rng.choice(((0, ">I"), (4, ">I"), (8, ">B"), (9, ">B"), (10, ">B"), (11, ">B"), (12, ">B")))
        chunks[0] = (kind, _put(body, *field, _number(rng)))
    elif body:
        chunks[which] = (kind, _put(body, rng.randrange(len(body)), rng.choice((">B", ">H", ">I")), _number(rng)))
    return data[:8] + b"".join(chunk(*one_chunk) for one_chunk in chunks)


def _lie_jpeg(rng: random.Random, data: bytes) -> bytes:
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        segments.append(at)
        if data[at + 1] == 0xDA:
            break
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if not segments:
        return data
    frames = [at for at in segments if 0xC0 <= data[at + 1] <= 0xC2]
    at = rng.choice(frames * 2 + segments)
    if at in frames and rng.random() < 0.8:  # precision, height, width, components, sampling
        offset, layout = rng.choice(((4, ">B"), (5, ">H"), (7, ">H"), (9, ">B"), (11, ">B"), (12, ">B"), (14, ">B")))
        return _put(data, at + offset, layout, _number(rng))
    if rng.random() < 0.4:
        return _put(data, at + 2, ">H", _number(rng))
    if rng.random() < 0.3:
        return _put(data, at + 1, ">B", rng.randrange(0xC0, 0x100))
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    return _put(data, at + 4 + rng.randrange(max(1, length - 2)), rng.choice((">B", ">H", ">I")), _number(rng))


def _lie_tiff(rng: random.Random, data: bytes) -> bytes:
    order, way = ("little", "<") if data[:2] == b"II" else ("big", ">")
    at = int.from_bytes(data[4:8], order)  # type: ignore[arg-type]
    entries = int.from_bytes(data[at : at + 2], order) if at + 2 <= len(data) else 0  # type: ignore[arg-type]
    entries = min(entries, (len(data) - at) // 12)
    what = rng.random()
    if entries < 1 or what < 0.1:
        return _put(data, rng.choice((4, at)), way + "I", rng.choice((0, 8, at, len(data) - 1, _number(rng))))
    if what < 0.2:  # the next page is this one
        return _put(data, at + 2 + 12 * entries, way + "I", at)
    entry = at + 2 + 12 * rng.randrange(entries)
    offset, layout = rng.choice(((0, "H"), (2, "H"), (4, "I"), (8, "H"), (8, "I"), (8, "I")))
    number = rng.choice((256, 257, 258, 259, 262, 277, 278, 317, 322, 330, 347, 34675)) if offset == 0 else _number(rng)
    return _put(data, entry + offset, way + layout, number)


def _lie_gif(rng: random.Random, data: bytes) -> bytes:
    frame = data.find(b",", 13)
    screen = ((6, "<H"), (8, "<H"), (10, "<B"), (11, "<B"))
    first = ((1, "<H"), (3, "<H"), (5, "<H"), (7, "<H"), (9, "<B"), (10, "<B"), (11, "<B"))
    if rng.random() < 0.4 or frame < 0:
        return _put(data, *rng.choice(screen), _number(rng))
    offset, layout = rng.choice(first)
    return _put(data, frame + offset, layout, _number(rng))


def _lie_webp(rng: random.Random, data: bytes) -> bytes:
    chunks, at = [], 12
    while at + 8 <= len(data):
        chunks.append(at)
        at += 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1 & ~1)
    what = rng.randrange(4)
    if what == 0:
        return _put(data, 4, "<I", _number(rng))
    at = rng.choice(chunks) if chunks else 12
    if what == 1:
        return _put(data, at + 4, "<I", _number(rng))
    # The sizes and flags of every kind of chunk lie in its first bytes.
    return _put(data, at + 8 + rng.randrange(16), rng.choice(("<B", "<H", "<I")), _number(rng))


def _lie_bmp(rng: random.Random, data: bytes) -> bytes:
    at, layout = rng.choice(
        ((2, "<I"), (10, "<I"), (14, "<I"), (18, "<I"), (22, "<I"), (26, "<H"), (28, "<H"), (30, "<I"), (46, "<I"))
    )
    return _put(data, at, layout, rng.choice((_number(rng), 2**32 - HEIGHT)))


def _lie_ppm(rng: random.Random, data: bytes) -> bytes:
    words = data.split(None, 4)
    words[rng.randrange(min(4, len(words)))] = rng.choice(
        (str(_number(rng)).encode(), b"-1", b"1" * 30, b"# comment", b"P7", b"P6", b"P1", b"1e9")
    )
    return b" ".join(words[:4]) + b"\n" + b"".join(words[4:])


def _lie_avif(rng: random.Random, data: bytes) -> bytes:
    box = rng.choice(
        (b"ispe", b"ftyp", b"meta", b"iloc", b"iinf", b"iprp", b"av1C", b"pixi", b"mdat", b"irot", b"ipma")
    )
    at = data.find(box)
    if at < 0:
        return data
    offset, layout = rng.choice(((-4, ">I"), (4, ">I"), (8, ">I"), (12, ">I"), (4 + rng.randrange(20), ">B")))
    return _put(data, at + offset, layout, _number(rng))


# ---------------------------------------------------------------------------------------------------------------- bombs


def bomb(rng: random.Random, form: str, data: bytes) -> bytes:
    """A small file that says it is huge, of this format if it can be."""
    made = _headers().get(form)
    return made if made is not None else flip_bits(rng, form, data)


def large(rng: random.Random, form: str, data: bytes) -> bytes:
    """A small file that really is large, a little under the limit or a little over it."""
    found = _large()
    return found[rng.choice([name for name in sorted(found) if name.startswith(form)] or sorted(found))]


def bombs() -> dict[str, bytes]:
    """Every one of them by name, which ends in huge, under or over."""
    return {**{f"{form}-huge": data for form, data in _headers().items()}, **_large()}


@functools.cache
def _headers() -> dict[str, bytes]:
    """By format: a header of 60000 x 60000 and next to nothing after it."""
    known = seeds()
    tiff = saved(Image.new("L", (8, 8)), "TIFF", compression="tiff_adobe_deflate")
    directory = int.from_bytes(tiff[4:8], "little")
    for entry in range(directory + 2, directory + 2 + 12 * tiff[directory], 12):
        if tiff[entry : entry + 2] in (b"\0\1", b"\1\1"):  # width, height
            tiff = tiff[: entry + 2] + struct.pack("<HII", 4, 1, HUGE) + tiff[entry + 12 :]
    webp = known["WEBP-animated"]
    found = {
        "PNG": png(HUGE, HUGE, 8, 2, zlib.compress(bytes(100))),
        "GIF": known["GIF-one"][:6] + struct.pack("<HH", HUGE, HUGE) + known["GIF-one"][10:],
        "TIFF": tiff,
        "WEBP": webp[:24] + (HUGE - 1).to_bytes(3, "little") * 2 + webp[30:],
        "BMP": run_length_bmp(HUGE, HUGE),
        "PPM": b"P6 %d %d 255\n" % (HUGE, HUGE) + bytes(100),
    }
    baseline = known["JPEG-baseline"]
    found["JPEG"] = _put(baseline, baseline.find(b"\xff\xc0") + 5, ">I", HUGE << 16 | HUGE)
    if "AVIF-one" in known:
        avif = known["AVIF-one"]
        at = avif.find(b"ispe") + 8
        found["AVIF"] = avif[:at] + struct.pack(">II", HUGE, HUGE) + avif[at + 8 :]
    return found


@functools.cache
def _large() -> dict[str, bytes]:
    """By name: one colour, many pixels, few bytes."""
    found = {}
    for name, side in (("under", UNDER), ("over", OVER)):
        grey = Image.new("L", (side, side), 90)
        found[f"PNG-{name}"] = saved(grey, "PNG", compress_level=1)
        found[f"GIF-{name}"] = saved(grey, "GIF")
        found[f"TIFF-{name}"] = saved(grey, "TIFF", compression="packbits")
        found[f"JPEG-{name}"] = saved(grey, "JPEG", quality=30)
        found[f"BMP-{name}"] = run_length_bmp(side, side, side)
    found["WEBP-under"] = saved(Image.new("RGB", (UNDER, UNDER), (9, 90, 200)), "WEBP", lossless=True, method=0)
    found["JPEG-scans-under"] = many_scans(UNDER, UNDER, 40)
    return found


def many_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG that goes over all its pixels again and again, a few bytes each time."""
    data = saved(Image.new("L", (width, height), 90), "JPEG", progressive=True, quality=30)
    starts = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
    tables = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xc4"]
    last = max(at for at in tables if at < starts[-1])
    return data[:-2] + data[last:-2] * scans + data[-2:]


_WEIGHTS: dict[Mutation, float] = {
    flip_bits: 20,
    overwrite: 10,
    insert: 6,
    remove: 6,
    truncate: 16,
    splice: 5,
    concatenate: 3,
    empty: 1.5,
    text: 1.5,
    lie: 28,
    bomb: 2.5,
    large: 1,
}
