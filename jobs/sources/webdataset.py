"""Datasets that are tars in the WebDataset layout: each image in one is an item, and the .json beside it its data.

    photos/train-000000.tar                      one tar, on a disk or s3://
    s3://bucket/train-{000000..000123}.tar       many; every number of the range must be there

A sample is what has the same name up to the first dot of its last part, and its members lie next to each other (the
WebDataset format). The members `0001.jpg`, `0001.mask.png` and `0001.json` give two items, each with the JSON object
as its data when that has at most 64 KB. An item's bytes are read later, from the tar, at the place that its URI names.

Only headers are read here. Links, devices and hidden files are passed over; a name cannot lead anywhere, since nothing
is ever unpacked. A tar that is cut short, damaged or compressed is refused as a whole.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from jobs.sources import IMAGE_SUFFIXES, ImageRef, escaped_key, is_under, stat_fingerprint
from storage.errors import BadInput, NotFound
from storage.folder import open_file, translated
from storage.objects import local_path, part_of
from storage.settings import Settings, masked

_COMPRESSED = (".tgz", ".tar.gz")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_MOST_TARS = 1_000_000
_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_HEADER_LIMIT = 1 << 20  # bytes of one member's headers, extended ones included; real ones have a few blocks
_TAIL_BLOCK = 1 << 20
_DATA_LIMIT = 64 * 1024  # bytes of a sample's JSON
_SAMPLE_LIMIT = 1000  # images of one sample that wait for its JSON
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class _Tar:
    """One tar: its URI, and its name without suffix, relative to what all tars of the dataset have in common."""

    uri: str
    name: str


def claims(uri: str) -> bool:
    """A name that ends like a tar's, on S3 or local, and is no folder; whether it exists is seen when it is opened."""
    if "\0" in uri or not uri.rstrip("/").lower().endswith((".tar", *_COMPRESSED)):
        return False
    if uri[:5].lower() == "s3://":
        return True
    path = _path(uri)
    return path is not None and not os.path.isdir(path)


def canonical(uri: str) -> str:
    """The absolute path or s3:// URI with its braces as they are. Raises BadInput for local tars that are missing."""
    spelled = _on_s3(uri) if uri[:5].lower() == "s3://" else _local(uri)
    if spelled.lower().endswith(_COMPRESSED):
        raise _compressed(spelled, "gzip")
    for tar in _tars(spelled):
        path = _path(tar.uri)
        if path is not None and not os.path.isfile(path):
            raise BadInput(f"tar {path!r} does not exist or is not a file; check the spelling")
    return spelled


def refs(uri: str, settings: Settings) -> Iterator[ImageRef]:
    """Every image of every tar, in the tars' order.

    Raises:
        BadInput: a tar is missing, compressed, damaged or cut short.
        Unavailable: a tar could not be read to its end, or changed meanwhile.
    """
    return _listed(canonical(uri), settings)


def _path(uri: str) -> str | None:
    """The local path that a URI or a shell word names, or None."""
    path = local_path(uri)
    if path is not None:
        return str(path)
    return None if _SCHEME.match(uri) else os.path.expanduser(uri)


def _on_s3(uri: str) -> str:
    bucket, _, key = uri[5:].partition("/")
    if not bucket or not key.strip("/") or "@" in bucket:
        raise BadInput(f"cannot read {masked(uri)!r}: expected s3://bucket/a.tar; credentials go into AWS_ variables")
    return f"s3://{bucket}/{key.strip('/')}"


def _local(uri: str) -> str:
    path = _path(uri)
    if path is None or "\0" in path:
        raise BadInput(f"cannot read {masked(uri)!r}: expected a .tar, such as train-{{000000..000123}}.tar")
    # "link/.." is the parent of the link's target, which only realpath knows; abspath keeps a leading "//".
    path = os.path.realpath(path) if ".." in path.split("/") else "/" + os.path.abspath(path).lstrip("/")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise BadInput(f"tar {path!r} has a name that is not UTF-8; rename it or its folder") from None
    return path


def _tars(spelled: str) -> Iterator[_Tar]:
    """The tars that a canonical spelling stands for, the last range counting fastest."""
    pieces = _RANGE.split(spelled)
    ranges = list(zip(pieces[1::3], pieces[2::3], strict=True))
    _check_ranges(spelled, ranges)
    base = len(pieces[0].rpartition("/")[0]) + 1
    for numbers in itertools.product(*(_numbers(first, last) for first, last in ranges)):
        uri = "".join(itertools.chain(*itertools.zip_longest(pieces[::3], numbers, fillvalue="")))
        yield _Tar(uri, re.sub(r"\.tar$", "", uri[base:], flags=re.IGNORECASE))


def _check_ranges(spelled: str, ranges: list[tuple[str, str]]) -> None:
    count = 1
    for first, last in ranges:
        if int(first) > int(last):
            raise BadInput(f"{spelled!r} counts down from {first} to {last}; put the smaller number first")
        count *= int(last) - int(first) + 1
    if count > _MOST_TARS:
        raise BadInput(f"{spelled!r} stands for {count} tars, more than {_MOST_TARS}; take a smaller range")


def _numbers(first: str, last: str) -> Iterator[str]:
    """From first to last, with as many digits as the first has."""
    return (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))


def _listed(spelled: str, settings: Settings) -> Iterator[ImageRef]:
    allowed = _allowed(spelled, settings)
    for tar in _tars(spelled):
        try:
            with _opened(tar, allowed, settings) as found:
                yield from _items(tar, found)
        except NotFound:
            raise BadInput(f"tar {tar.uri!r} does not exist; check the spelling, or the range") from None


def _allowed(spelled: str, settings: Settings) -> list[str] | None:
    """The folders that a pattern's tars must really lie in; None where any will do.

    One tar that was named may be a link to anywhere; those that a pattern finds must not lead out of their folder.
    """
    path = _path(spelled)
    if path is None or not _RANGE.search(path):
        return None
    folder = _RANGE.split(path)[0].rpartition("/")[0]
    return [os.path.realpath(root) for root in (folder or "/", *map(str, settings.local_roots))]


@dataclass(frozen=True, slots=True)
class _Open:
    """A tar that is being read: its file, how many bytes it has, the URI that its parts have, its fingerprint."""

    file: BinaryIO
    size: int
    uri: str
    fingerprint: str


@contextlib.contextmanager
def _opened(tar: _Tar, allowed: list[str] | None, settings: Settings) -> Iterator[_Open]:
    path = _path(tar.uri)
    if path is None:
        with _opened_on_s3(tar.uri, settings) as found:
            yield found
        return
    # The target's own name goes into the URIs, so that moving a link later leads nobody elsewhere.
    real = os.path.realpath(path)
    if allowed is not None and not any(is_under(real, root) for root in allowed):
        raise BadInput(
            f"tar {path!r} may not be read: it is a link that leads out of its folder; name the folder it leads to in "
            "IMAGEMILL_LOCAL_ROOTS to allow it"
        )
    with translated(path), open_file(Path(real)) as file:
        info = os.fstat(file.fileno())
        yield _Open(file, info.st_size, Path(real).as_uri(), stat_fingerprint(info))


@contextlib.contextmanager
def _opened_on_s3(uri: str, settings: Settings) -> Iterator[_Open]:
    from storage import s3

    bucket, _, key = uri[5:].partition("/")
    store = s3.store(bucket, "", settings)
    there = store.stat(key)
    if there is None:
        raise NotFound(f"{uri} does not exist")
    with store.open_file(there) as file:
        yield _Open(file, there.size, uri, f"etag:{there.etag}+{there.size}")


def _items(tar: _Tar, found: _Open) -> Iterator[ImageRef]:
    """The images of one tar in its order. A name that came before gets its offset, so that both are items."""
    taken: set[int] = set()  # hashes: a tar may have millions of members
    for member, data in _images(tar, found):
        name = member.name.removeprefix("./")
        key = escaped_key(f"{tar.name}/{name}")
        while hash(key) in taken:
            stem, suffix = os.path.splitext(name)
            name = f"{stem}~{member.offset}{suffix}"
            key = escaped_key(f"{tar.name}/{name}")
        taken.add(hash(key))
        uri = part_of(found.uri, member.offset_data, member.size)
        if member.issparse():  # its bytes do not lie together
            yield ImageRef(key, f"refused:{uri}", "refused")
            continue
        yield ImageRef(key, uri, f"{found.fingerprint}@{member.offset_data}+{member.size}", data)


def _images(tar: _Tar, found: _Open) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Each image with its sample's data. Members of one sample lie next to each other, the JSON first or last."""
    for _, members in itertools.groupby(_members(tar, found), lambda member: _split(member.name)[0]):
        waiting: list[tarfile.TarInfo] = []
        data = ""
        for member in members:
            if _split(member.name)[1].lower() == "json":
                data = data or _data(member, found.file)
            elif os.path.splitext(member.name)[1].lower() in IMAGE_SUFFIXES:
                waiting.append(member)
            if len(waiting) >= _SAMPLE_LIMIT:
                yield from ((image, data) for image in waiting)
                waiting = []
        yield from ((image, data) for image in waiting)


def _split(name: str) -> tuple[str, str]:
    """A member's sample key and extension: its name, parted at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _data(member: tarfile.TarInfo, file: BinaryIO) -> str:
    """A sample's JSON in one line; "" when it is no object or too large, for then it was not meant for this."""
    if member.size > _DATA_LIMIT:
        return ""
    file.seek(member.offset_data)
    try:
        value = json.loads(file.read(member.size), parse_constant=_no_number)
    except (ValueError, RecursionError):
        return ""
    return json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else ""


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _members(tar: _Tar, found: _Open) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar that are not hidden. Raises BadInput unless it is whole.

    Python's own iteration takes a damaged header, and the end of a file that was cut short, for the tar's end.
    """
    headers = _Headers(found.file)
    _check_start(tar, found)
    try:
        context = tarfile.open(fileobj=cast(Any, headers), mode="r:")  # noqa: SIM115 (the file is not its to close)
        at = 0
        while not _is_end(tar, found, at):
            headers.begin(at)
            member = tarfile.TarInfo.fromtarfile(context)
            # fromtarfile leaves where the next header starts in the context.
            at = _after(tar, member, at, context.offset)
            if member.isreg() and not _is_hidden(member.name):
                yield member
    except (tarfile.TarError, ValueError, RecursionError, OverflowError) as error:
        raise _damaged(tar, f"{type(error).__name__}: {error}") from error
    _check_rest(tar, found, at)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


class _Headers:
    """A tar's file as tarfile sees it: no more than a few blocks of headers for each member."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, _HEADER_LIMIT

    def begin(self, offset: int) -> None:
        """Go to a member's headers."""
        self._file.seek(offset)
        self._left = _HEADER_LIMIT

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.HeaderError(f"the headers of one member have more than {_HEADER_LIMIT} bytes")
        self._left -= size
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


def _check_start(tar: _Tar, found: _Open) -> None:
    found.file.seek(0)
    start = found.file.read(8)
    name = next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), "")
    if name:
        raise _compressed(tar.uri, name)


def _is_end(tar: _Tar, found: _Open, offset: int) -> bool:
    """Whether a block of zeros is there, which ends a tar (POSIX.1-2001, pax Interchange Format)."""
    found.file.seek(offset)
    block = found.file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise _damaged(tar, "it has no end mark, so it was cut short")
    return block == _ZEROS


def _after(tar: _Tar, member: tarfile.TarInfo, at: int, after: int) -> int:
    """Where the next header starts, which must not be before this member's end."""
    if member.size < 0 or after < at + _BLOCK:
        raise _damaged(tar, f"its member {member.name[:200]!r} has an impossible size")
    return after


def _check_rest(tar: _Tar, found: _Open, offset: int) -> None:
    """After the end mark only zeros may follow: else zeros in a damaged tar would end the listing."""
    found.file.seek(offset)
    while block := found.file.read(_TAIL_BLOCK):
        if block.strip(b"\0"):
            raise _damaged(tar, f"it goes on after the end mark at {offset}; joined tars have to be listed one by one")


def _damaged(tar: _Tar, what: str) -> BadInput:
    return BadInput(f"tar {tar.uri!r} is damaged: {what}; nothing was pruned: write it again")


def _compressed(uri: str, name: str) -> BadInput:
    return BadInput(
        f"tar {uri!r} is compressed with {name}, so its images cannot be read one by one: unpack it to a plain .tar "
        "(images are compressed already)"
    )
