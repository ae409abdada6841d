"""Datasets that are a list: a .parquet, .csv, .jsonl or .txt file, local or on S3, with one image a row.

Columns: `uri` (or path, image, file, url), and if wanted `key` and `fingerprint` (or etag). A .txt file holds one URI a
line; blank lines and lines that start with # are skipped. A URI is s3://bucket/key in any bucket (what the credentials
may read decides), or a plain path: relative ones start at the manifest's own folder or prefix, and a local file must
really lie there or under IMAGEMILL_LOCAL_ROOTS. A list may come from anyone, so nothing else is read.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import itertools
import json
import os
import posixpath
import re
import stat
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from jobs.sources import MANIFEST_SUFFIXES, ImageRef, is_under, safe_key, stat_fingerprint
from storage.errors import BadInput, NotFound, Unavailable
from storage.objects import local_path
from storage.settings import Settings, masked

LINE_LIMIT = 1 << 20  # bytes; a file without line ends must not be read into memory whole

_URI_NAMES = ("uri", "path", "image", "file", "url")
_FINGERPRINT_NAMES = ("fingerprint", "etag")
_FINGERPRINT_LIMIT = 256
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_UNTIDY = re.compile(r"(?:^\.|/\.?)/")  # "./a", "a//b", "a/./b"
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PARQUET_ROWS = 4096  # in memory at a time

Row = tuple[int, Any, Any, Any]  # number of the line or row from 1, uri, key or None, fingerprint or None


def claims(uri: str) -> bool:
    """A name that ends like a manifest's, on S3 or local; whether it exists is seen when it is opened."""
    if not uri.rstrip("/").lower().endswith(MANIFEST_SUFFIXES):
        return False
    scheme = _SCHEME.match(uri)
    if scheme is not None:
        return scheme.group(1).lower() in ("s3", "file")
    return not os.path.isdir(os.path.expanduser(uri))


def canonical(uri: str) -> str:
    if uri[:5].lower() == "s3://":
        bucket, _, key = uri[5:].partition("/")
        if not bucket or not key.strip("/") or "@" in bucket:
            raise BadInput(
                f"cannot read {masked(uri)!r}: expected s3://bucket/list.csv; credentials go into AWS_ names"
            )
        return f"s3://{bucket}/{key.strip('/')}"
    path = str(local_path(uri) or os.path.expanduser(uri))
    # "link/.." is the parent of the link's target, which only realpath knows; abspath keeps a leading "//".
    path = os.path.realpath(path) if ".." in path.split("/") else "/" + os.path.abspath(path).lstrip("/")
    if not os.path.isfile(path):
        raise BadInput(f"manifest {path!r} does not exist or is not a file; check the spelling")
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).as_uri()
    return path


def refs(uri: str, settings: Settings) -> Iterator[ImageRef]:
    """Every row, in the manifest's order."""
    return _listed(canonical(uri), settings)


def _listed(uri: str, settings: Settings) -> Iterator[ImageRef]:
    resolve = _Resolver(uri, settings).resolve
    suffix = os.path.splitext(uri)[1].lower()
    unit = "row" if suffix == ".parquet" else "line"
    with _opened(uri, settings) as file:
        try:
            for number, given, key, fingerprint in _READERS[suffix](file):
                try:
                    ref = resolve(given, key, fingerprint)
                except BadInput as error:
                    raise BadInput(f"{unit} {number}: {error}") from None
                yield ref
        except BadInput as error:
            raise BadInput(f"manifest {uri!r}, {error}") from None
        except OSError as error:
            raise _unreadable(uri, error) from error


@contextlib.contextmanager
def _opened(uri: str, settings: Settings) -> Iterator[BinaryIO]:
    """The manifest's bytes. One from S3 is downloaded and its name removed at once: nothing is left behind."""
    try:
        file = _downloaded(uri, settings) if uri.startswith("s3://") else (local_path(uri) or Path(uri)).open("rb")
    except (NotFound, FileNotFoundError):
        raise BadInput(f"manifest {uri!r} does not exist; check the spelling") from None
    except OSError as error:
        raise _unreadable(uri, error) from error
    with file:
        yield file


def _downloaded(uri: str, settings: Settings) -> BinaryIO:
    from storage import s3

    bucket, _, key = uri[5:].partition("/")
    with tempfile.TemporaryDirectory(prefix="imagemill-manifest-") as folder:
        path = Path(folder) / "manifest"
        s3.store(bucket, "", settings).get_file(key, path)
        return path.open("rb")


def _unreadable(uri: str, error: OSError) -> Unavailable:
    return Unavailable(
        f"cannot read {error.filename or uri!r} for manifest {uri!r}: {error.strerror or error}; the list was not read "
        "to its end, so nothing was pruned: make it readable and run again"
    )


class _Parent(NamedTuple):
    """What is known of a folder that holds images: real path, URI with a closing slash, key with one or ""."""

    real: str
    uri: str
    key: str


class _Resolver:
    """What a manifest's rows mean, and whether they may be read."""

    def __init__(self, manifest: str, settings: Settings) -> None:
        self._remote = f"{manifest.rpartition('/')[0]}/" if manifest.startswith("s3://") else ""
        local = [] if self._remote else [os.path.dirname(str(local_path(manifest) or manifest))]
        self._folder = local[0] if local else ""
        self._roots = [*local, *map(str, settings.local_roots)]
        self._real_roots = [os.path.realpath(root) for root in self._roots]
        # The folders of a list's images come in runs, so few are looked at twice.
        self._parent = functools.lru_cache(maxsize=4096)(self._look_at)

    def resolve(self, given: Any, key: Any, fingerprint: Any) -> ImageRef:
        """One row as an image. Raises BadInput, without the row's number."""
        if not isinstance(given, str) or not given:
            raise BadInput(f"expected a URI or path as text, but got {_short(given)}")
        if _CONTROL.search(given):
            raise BadInput(f"{_short(given)} has a control character or half a letter; rename the file")
        if ".." in given and ".." in given.split("/"):
            raise BadInput(f"{_short(given)} has a '..' part; give the path without it")
        known = _fingerprint(fingerprint)
        if given.startswith("s3://"):
            return _on_s3(given, key, given[5:], known)
        if _SCHEME.match(given):
            raise _bad_scheme(given)
        path = posixpath.normpath(given) if _UNTIDY.search(given) else given
        if self._remote and not path.startswith("/"):
            return _on_s3(self._remote + path, key, path, known)
        return self._local(path, key, known)

    def _local(self, path: str, key: Any, known: str | None) -> ImageRef:
        relative = not path.startswith("/")
        folder, _, name = (f"{self._folder}/{path}" if relative else path).rpartition("/")
        parent = self._parent(folder)
        key = _key(key, path if relative else parent.key + name)
        uri = parent.uri + urllib.parse.quote_from_bytes(os.fsencode(name))
        try:
            info = os.lstat(f"{parent.real}/{name}")
            if stat.S_ISLNK(info.st_mode):
                # The target's own name goes into the URI, so that moving the link later leads nobody elsewhere.
                real = self._allowed(os.path.realpath(f"{parent.real}/{name}"), path)
                uri = Path(real).as_uri()
                info = os.stat(real)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            return ImageRef(key, uri, "missing")
        if not stat.S_ISREG(info.st_mode):
            raise BadInput(f"{_short(path)} is not a regular file; list image files only")
        return ImageRef(key, uri, known or stat_fingerprint(info))

    def _look_at(self, folder: str) -> _Parent:
        real = self._allowed(os.path.realpath(folder or "/"), folder)
        pairs = [*((folder, root) for root in self._roots), *((real, root) for root in self._real_roots)]
        key = next((path[len(root) :].strip("/") for path, root in pairs if is_under(path, root)), "")
        uri = Path(real).as_uri()
        return _Parent(real.rstrip("/"), uri if uri.endswith("/") else f"{uri}/", f"{key}/" if key else "")

    def _allowed(self, real: str, given: str) -> str:
        if not any(is_under(real, root) for root in self._real_roots):
            home = "no folder is open to a manifest on S3" if self._remote else "it leads outside the manifest's folder"
            raise BadInput(
                f"{_short(given)} may not be read: {home}; name the images' folder in IMAGEMILL_LOCAL_ROOTS to allow it"
            )
        return real


def _on_s3(uri: str, key: Any, default: str, known: str | None) -> ImageRef:
    bucket, _, name = uri[5:].partition("/")
    if not bucket or not name or "@" in bucket:
        raise BadInput(f"{_short(uri)} is not s3://bucket/key; credentials go into AWS_ variables")
    return ImageRef(_key(key, default), uri, known or f"uri:{hashlib.sha256(uri.encode()).hexdigest()[:16]}")


def _bad_scheme(given: str) -> BadInput:
    remedies = {
        "file": "give a plain path",
        "http": "web addresses are off: copy the images to a folder or bucket first",
        "https": "web addresses are off: copy the images to a folder or bucket first",
    }
    scheme = given.partition("://")[0].lower()
    return BadInput(f"{_short(given)} is not allowed in a manifest: " + remedies.get(scheme, "give s3:// or a path"))


def _key(given: Any, default: str) -> str:
    if given is None or given == "":
        return safe_key(default)
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    if not isinstance(given, str):
        raise BadInput(f"expected the key as text, but got {_short(given)}")
    return safe_key(given)


def _fingerprint(given: Any) -> str | None:
    if given is None or given == "":
        return None
    text = str(given)
    if not isinstance(given, str | int) or len(text) > _FINGERPRINT_LIMIT or _CONTROL.search(text):
        raise BadInput(f"expected a fingerprint of at most {_FINGERPRINT_LIMIT} letters, but got {_short(given)}")
    return f"given:{text}"


def _short(value: Any) -> str:
    """A value for people's eyes: short, and without a URL's password or query."""
    if not isinstance(value, str):
        return f"{value!r:.100}"
    if "://" in value:
        try:
            value = masked(value)
        except ValueError:
            value = f"{value.partition('://')[0]}://..."
    return f"{value[:200]!r}"


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Each line's number and text."""
    pieces = iter(functools.partial(file.readline, LINE_LIMIT), b"")
    for number, raw in enumerate(pieces, 1):
        if len(raw) == LINE_LIMIT and raw[-1:] != b"\n":
            raise BadInput(f"line {number}: longer than {LINE_LIMIT} bytes; is this the right file?")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise BadInput(f"line {number}: not UTF-8; save the file as UTF-8") from None
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _txt_rows(file: BinaryIO) -> Iterator[Row]:
    for number, text in _lines(file):
        uri = text.strip()
        if uri and not uri.startswith("#"):
            yield number, uri, None, None


def _jsonl_rows(file: BinaryIO) -> Iterator[Row]:
    for number, text in _lines(file):
        if not text or text.isspace():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"line {number}: not JSON ({error}); expected one object a line") from None
        if not isinstance(record, dict):
            raise BadInput(f"line {number}: expected a JSON object with 'uri', but got {_short(record)}")
        uri, key, fingerprint = _columns(tuple(record)) or _no_uri(record, f"line {number}")
        yield number, record[uri], record.get(key), record.get(fingerprint)


def _csv_rows(file: BinaryIO) -> Iterator[Row]:
    # strict: an open quote would otherwise swallow the lines up to the next one.
    reader = csv.reader((text for _, text in _lines(file)), strict=True)
    try:
        header = next((row for row in reader if row), None)
        if header is None:
            return
        names = _columns(tuple(header)) or _no_uri(header, f"line {reader.line_num}")
        uri, key, fingerprint = (header.index(name) if name is not None else len(header) for name in names)
        for row in reader:
            if not row:
                continue
            if len(row) > len(header):
                raise BadInput(
                    f"line {reader.line_num}: {len(row)} values under {len(header)} columns; quote values with commas"
                )
            row += [""] * (len(header) + 1 - len(row))
            yield reader.line_num, row[uri], row[key], row[fingerprint]
    except csv.Error as error:
        raise BadInput(f"line {reader.line_num}: not CSV ({error}); quote values that hold quotes or commas") from None


def _parquet_rows(file: BinaryIO) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Without a buffer size, and with pre-buffering, whole column chunks would be read at once.
        table = parquet.ParquetFile(file, buffer_size=LINE_LIMIT, pre_buffer=False, page_checksum_verification=True)
        names = _columns(tuple(table.schema_arrow.names)) or _no_uri(table.schema_arrow.names, "its schema")
        wanted = [name for name in names if name is not None]
        for name in wanted:
            _check_column(table.schema_arrow.field(name))
        number = 1
        for batch in table.iter_batches(_PARQUET_ROWS, columns=wanted, use_threads=False):
            columns = [
                batch.column(name).cast(pyarrow.string()).to_pylist() if name is not None else [None] * len(batch)
                for name in names
            ]
            yield from zip(range(number, number + len(batch)), *columns, strict=True)
            number += len(batch)
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise BadInput(f"not readable as Parquet ({str(error).splitlines()[0]}); write the file again") from None


def _check_column(field: Any) -> None:
    from pyarrow import types

    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_integer", "is_null")
    if not any(getattr(types, test)(kind) for test in tests):
        raise BadInput(
            f"column {field.name!r} is {str(field.type)[:100]}; expected text, or another column named 'uri'"
        )


@functools.lru_cache(maxsize=16)
def _columns(names: tuple[str, ...]) -> tuple[str, str | None, str | None] | None:
    """Names of the columns of uri, key and fingerprint, as they are spelled; None without a uri."""
    spelled = {name.strip().lower(): name for name in reversed(names)}
    uri = next((spelled[name] for name in _URI_NAMES if name in spelled), None)
    fingerprint = next((spelled[name] for name in _FINGERPRINT_NAMES if name in spelled), None)
    return None if uri is None else (uri, spelled.get("key"), fingerprint)


def _no_uri(names: Iterable[str], where: str) -> NoReturn:
    found = ", ".join(repr(name[:50]) for name in itertools.islice(names, 20)) or "none"
    raise BadInput(f"{where}: no column 'uri' (or {', '.join(_URI_NAMES[1:])}); the columns found are {found}")


_READERS: dict[str, Callable[[BinaryIO], Iterator[Row]]] = {
    ".csv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".txt": _txt_rows,
}
