"""Images that were made: the result of generate and transform jobs.

The bytes lie as a blob in the store (storage.shardfile); the columns name it and tell its content.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from storage.results import Summary

FORMATS = ("jpeg", "png", "webp")

# Every shard's object has a width and height of the original already, so those of what was made say whose they are.
SCHEMA = pa.schema(
    [
        pa.field("blob", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("nbytes", pa.int64()),
        pa.field("format", pa.string()),
        pa.field("image_width", pa.int32()),
        pa.field("image_height", pa.int32()),
        pa.field("meta", pa.string()),
    ]
)

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Result:
    """One made image.

    Attributes:
        data: the encoded file, or None when it lies in the store; not compared, `sha256` stands for it.
        sha256: of the encoded file, in hex.
        nbytes: size of the encoded file.
        format: one of FORMATS.
        width, height: pixels.
        meta: how it was made and what is known of it, JSON values: prompt, seed, and `boxes` (xyxy in pixels of this
            image, x right, y down) with their `labels`, where it has them.
        blob: where the file lies: its key in the store, or "blobs/..." beside the shard's object; not compared. "" is
            the latter. Equal images share one.
    """

    data: bytes | None = field(compare=False, repr=False)
    sha256: str
    nbytes: int
    format: str
    width: int
    height: int
    meta: Mapping[str, Any]
    blob: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"expected a format of {', '.join(FORMATS)}, but got {self.format!r}")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"expected a sha256 of 64 hex digits, but got {self.sha256!r}")
        if min(self.nbytes, self.width, self.height) < 1:
            raise ValueError(f"expected bytes and pixels, but got {self.nbytes} bytes, {self.width}x{self.height}")
        if self.data is not None and len(self.data) != self.nbytes:
            raise ValueError(f"expected {self.nbytes} bytes, but got {len(self.data)}")
        object.__setattr__(self, "blob", self.blob or f"blobs/{self.sha256[:32]}.{self.format}")


def made(data: bytes, format: str, width: int, height: int, meta: Mapping[str, Any]) -> Result:
    """The result for an encoded file. Raises ValueError or TypeError when `meta` is not JSON."""
    digest = hashlib.sha256(data).hexdigest()
    return Result(data, digest, len(data), format, width, height, json.loads(_json(meta)))


def columns(results: Sequence[Result | None]) -> dict[str, pa.Array]:
    """The results as arrow columns, without their bytes; a None (failed item) is a null in every column."""
    values = {
        "blob": [r and r.blob for r in results],
        "sha256": [r and r.sha256 for r in results],
        "nbytes": [r and r.nbytes for r in results],
        "format": [r and r.format for r in results],
        "image_width": [r and r.width for r in results],
        "image_height": [r and r.height for r in results],
        "meta": [r and _json(r.meta) for r in results],
    }
    return {name: pa.array(column, SCHEMA.field(name).type) for name, column in values.items()}


def results(table: pa.Table) -> list[Result | None]:
    """The inverse of `columns`; data is None."""
    return [None if row["blob"] is None else _row(row) for row in table.select(SCHEMA.names).to_pylist()]


def _row(row: Mapping[str, Any]) -> Result:
    size = (row["image_width"], row["image_height"])
    return Result(None, row["sha256"], row["nbytes"], row["format"], *size, json.loads(row["meta"]), row["blob"])


def _json(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, sort_keys=True, allow_nan=False)


def summary(result: Result) -> Summary:
    """One image; its boxes, where it has them, stay in `meta`."""
    return Summary(1)
