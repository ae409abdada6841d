"""Class maps: one PNG for each image of a mask job, whose grey value is the class of each pixel, 0 where there is none.

maps/<key>.png     8-bit grey, or 16-bit where there are more than 255 classes; where masks overlap the one with the
                   higher score is on top
classes.json       grey value -> label, and where everything came from
failures.jsonl     items without a result
"""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from storage import rle
from storage.exporters import Classes
from storage.shardfile import Outcome
from storage.staging import Output

KINDS = frozenset({"masks"})
OPTIONS: Mapping[str, tuple[Any, ...]] = {"bits": (8, 16)}


@contextlib.contextmanager
def writer(
    output: Output, labels: Sequence[str], provenance: Mapping[str, Any], options: Mapping[str, Any]
) -> Iterator[_Writer]:
    """Maps are put as they come, the lists at the end."""
    failures = output.scratch / "failures.jsonl"
    with failures.open("w") as lines:
        writing = _Writer(output, Classes(labels), lines, options["bits"])
        yield writing
    output.put_file("failures.jsonl", failures)
    names = {str(number + 1): name for number, (name, _) in enumerate(writing.classes.table()) if name is not None}
    output.put("classes.json", json.dumps({"classes": names, "imagemill": dict(provenance)}, default=str).encode())


class _Writer:
    def __init__(self, output: Output, classes: Classes, failures: IO[str], bits: int) -> None:
        self._output, self.classes, self._failures, self._bits = output, classes, failures, bits
        self.notes: list[str] = []

    def append(self, outcome: Outcome) -> None:
        if outcome.failure is not None:
            told = {"key": outcome.key, **{n: getattr(outcome.failure, n) for n in ("stage", "reason", "message")}}
            self._failures.write(json.dumps(told) + "\n")
            return
        result: Any = outcome.result
        pixels = np.zeros(result.size, np.uint16)
        for i in np.argsort(result.scores, kind="stable"):
            number = self.classes.number(int(result.class_ids[i]), result.labels[i]) + 1
            if number >= 1 << self._bits:
                self._refuse(outcome.key)
                continue
            pixels[rle.decode(result.rles[i], result.size)] = number
        self._output.put(f"maps/{outcome.key}.png", _png(pixels, self._bits))

    def _refuse(self, key: str) -> None:
        if not self.notes:
            self.notes.append(f"more than 255 classes, first in {key!r}: they are left out; take --option bits=16")


def _png(pixels: npt.NDArray[np.uint16], bits: int) -> bytes:
    """A grey PNG (ISO/IEC 15948): rows of big-endian samples, each behind a filter byte of 0, deflated."""
    height, width = pixels.shape
    rows = pixels.astype(">u2" if bits == 16 else "u1").reshape(height, -1).view(np.uint8)
    raw = np.concatenate([np.zeros((height, 1), np.uint8), rows.reshape(height, -1)], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
