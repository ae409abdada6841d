"""Bytes under keys: the Store that a URL opens, whatever lies behind it."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage import settings as settings_module
from storage.errors import BadInput, Misconfigured, NotFound
from storage.settings import Settings

_PART = re.compile(r"part:(\d{1,19})\+(\d{1,19}):((?:file|s3)://.+)", re.DOTALL | re.ASCII)


@dataclass(frozen=True, slots=True)
class Stat:
    """What a listing says of one object.

    Attributes:
        key: relative to the store's URL.
        size: bytes.
        etag: the server's tag, or "" on a folder.
        modified: seconds since the epoch, by the store's clock.
    """

    key: str
    size: int
    etag: str
    modified: float


class Store(Protocol):
    """Objects under one URL. Keys are relative, with forward slashes. Safe to use from several threads.

    `put` and `put_file` leave no half-written object for a reader to see. `put(if_absent=True)` raises Conflict when
    the key is taken; nothing in the protocol relies on it, since not every S3 server honours it.
    """

    url: str

    def get(self, key: str) -> bytes: ...
    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None: ...
    def put_file(self, key: str, path: Path) -> None: ...
    def get_file(self, key: str, path: Path) -> None: ...
    def stat(self, key: str) -> Stat | None: ...
    def list(self, prefix: str = "") -> Iterator[Stat]: ...
    def delete(self, keys: Iterable[str]) -> int: ...
    def url_for(self, key: str) -> str: ...


def local_path(uri: str) -> Path | None:
    """The path of a file:// URI, byte for byte, or None for any other. '?' and '#' are letters of a path here."""
    for start in ("file://localhost/", "file:///"):
        if uri[: len(start)].lower() == start:
            return Path(os.fsdecode(urllib.parse.unquote_to_bytes(uri[len(start) - 1 :])))
    return None


def open_store(url: str, settings: Settings | None = None) -> Store:
    """The store at a file:// or s3:// URL. Raises Misconfigured for any other."""
    path = local_path(url)
    if path is not None:
        from storage.folder import FolderStore

        return FolderStore(path)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if url.startswith("s3://") and bucket:
        from storage import s3

        return s3.store(bucket, prefix.strip("/"), settings or settings_module.load())
    raise Misconfigured(
        f"cannot use {settings_module.masked(url)!r} as an object store: expected file:///folder or s3://bucket/prefix"
    )


def read(uri: str, settings: Settings, limit: int | None = None) -> bytes:
    """The bytes at a file:// or s3:// URI, or a range of them at part:OFFSET+SIZE:URI.

    Args:
        limit: refuse more bytes than this with BadInput, before they are read.

    Raises:
        Unavailable: also when there are fewer bytes than a part names.
    """
    if uri.startswith("part:"):
        return _read_part(uri, settings, limit)
    path = local_path(uri)
    if path is not None:
        from storage.folder import read_file

        return read_file(path, limit)
    if uri.startswith("missing:"):
        raise NotFound(f"the dataset has no image {uri.removeprefix('missing:')!r}, which the list of prompts names")
    if uri.startswith("refused:"):
        raise BadInput(
            f"refused to read {uri.removeprefix('refused:')!r}: it is a link that leads outside the dataset, or not a "
            "regular file; put the folder that the link leads to into IMAGEMILL_LOCAL_ROOTS"
        )
    bucket, key = _on_s3(uri)
    from storage import s3

    return s3.store(bucket, "", settings).read(key, limit)


def part_of(uri: str, offset: int, size: int) -> str:
    """The URI of `size` bytes from `offset` on of what lies at a file:// or s3:// URI."""
    return f"part:{offset}+{size}:{uri}"


def _read_part(uri: str, settings: Settings, limit: int | None) -> bytes:
    found = _PART.fullmatch(uri)
    if found is None:
        raise BadInput(
            f"cannot read {settings_module.masked(uri)!r}: expected part:OFFSET+SIZE: before file:///path or "
            "s3://bucket/key"
        )
    offset, size, whole = int(found[1]), int(found[2]), found[3]
    check_limit(size, limit)
    path = local_path(whole)
    if path is not None:
        from storage.folder import read_part

        return read_part(path, offset, size)
    bucket, key = _on_s3(whole)
    from storage import s3

    return s3.store(bucket, "", settings).read_part(key, offset, size)


def _on_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket or not key:
        raise BadInput(f"cannot read {settings_module.masked(uri)!r}: expected file:///path or s3://bucket/key")
    return bucket, key


def check_key(key: str) -> None:
    """Raise BadInput for a key that could lead out of the store."""
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise BadInput(f"unsafe object key {key!r}: expected a relative path without '..' and without empty parts")


def check_limit(size: int, limit: int | None) -> None:
    """Raise BadInput when an object is larger than the caller takes."""
    if limit is not None and size > limit:
        raise BadInput(
            f"the object has {size} bytes and the limit is {limit}; raise IMAGEMILL_MAX_IMAGE_BYTES to take it"
        )
