"""Reads lists: the rows of a .txt, .csv, .jsonl or .parquet file, local or on S3, one after the other.

A .txt file holds one value a line; blank lines and lines that start with # are skipped.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from jobs.references import short
from jobs.sources import MANIFEST_SUFFIXES
from storage.errors import BadInput, NotFound, Unavailable
from storage.objects import local_path
from storage.settings import Settings, masked

LINE_LIMIT = 1 << 20  # bytes; a file without line ends must not be read into memory whole

_PARQUET_ROWS = 4096  # in memory at a time

T = TypeVar("T")
Names = tuple[str | None, ...]
Values = tuple[Any, ...]
# (all columns' names, where they are said) -> names of the wanted ones in their order, None for one that is not there;
# raises BadInput when what must be there is not.
Choose = Callable[[tuple[str, ...], str], Names]
Row = tuple[int, Names, Values]  # number of the line or row from 1, the names that were chosen, their values or None


def canonical(uri: str, what: str) -> str:
    """The one spelling of a list's URI. Raises BadInput when there is no such local file, or not of a known form.

    Args:
        what: "manifest", or what else it is to its user.
    """
    if not uri.rstrip("/").lower().endswith(MANIFEST_SUFFIXES):
        raise BadInput(f"cannot read {masked(uri)!r} as a {what}: expected one of {', '.join(MANIFEST_SUFFIXES)}")
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
        raise BadInput(f"{what} {path!r} does not exist or is not a file; check the spelling")
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).as_uri()
    return path


def each(
    uri: str,
    settings: Settings,
    what: str,
    choose: Choose,
    make: Callable[[Names, Values], T],
    *,
    column: str,
    text: bool = False,
) -> Iterator[T]:
    """What `make` makes of each row, in the list's order, streamed.

    Args:
        uri: in its canonical spelling.
        what: "manifest", or what else it is to its user.
        make: (names, values) of the chosen columns -> one thing; raises BadInput, without the row's number.
        column: the column that the lines of a .txt file are.
        text: take only columns of text and whole numbers from Parquet, and those as text.

    Raises:
        BadInput: a row is not what it should be; says which.
        Unavailable: the list could not be read to its end.
    """
    suffix = os.path.splitext(uri)[1].lower()
    unit = "row" if suffix == ".parquet" else "line"
    with _opened(uri, settings, what) as file:
        try:
            for number, names, values in _rows(file, suffix, choose, column, text):
                try:
                    made = make(names, values)
                except BadInput as error:
                    raise BadInput(f"{unit} {number}: {error}") from None
                yield made
        except BadInput as error:
            raise BadInput(f"{what} {uri!r}, {error}") from None
        except OSError as error:
            raise _unreadable(uri, what, error) from error


def pairs(uri: str, settings: Settings, what: str, first: str, second: str) -> dict[str, str]:
    """What a list of two columns of text says: first -> second. Raises BadInput for rows that contradict each other."""

    def choose(names: tuple[str, ...], where: str) -> tuple[str, str]:
        if not {first, second} <= set(names):
            raise BadInput(f"{where}: expected the columns {first!r} and {second!r}, but got {', '.join(names)[:200]}")
        return first, second

    found: dict[str, str] = {}
    for one, other in each(canonical(uri, what), settings, what, choose, lambda _, row: row, column=first, text=True):
        if found.setdefault(one, other) != other:
            raise BadInput(f"{what} {uri!r} says two things of {one!r}: {found[one]!r} and {other!r}")
    return found


@contextlib.contextmanager
def _opened(uri: str, settings: Settings, what: str) -> Iterator[BinaryIO]:
    """The list's bytes. One from S3 is downloaded and its name removed at once: nothing is left behind."""
    try:
        file = _downloaded(uri, settings) if uri.startswith("s3://") else (local_path(uri) or Path(uri)).open("rb")
    except (NotFound, FileNotFoundError):
        raise BadInput(f"{what} {uri!r} does not exist; check the spelling") from None
    except OSError as error:
        raise _unreadable(uri, what, error) from error
    with file:
        yield file


def _downloaded(uri: str, settings: Settings) -> BinaryIO:
    from storage import s3

    bucket, _, key = uri[5:].partition("/")
    with tempfile.TemporaryDirectory(prefix="imagemill-list-") as folder:
        path = Path(folder) / "list"
        s3.store(bucket, "", settings).get_file(key, path)
        return path.open("rb")


def _unreadable(uri: str, what: str, error: OSError) -> Unavailable:
    return Unavailable(
        f"cannot read {error.filename or uri!r} for {what} {uri!r}: {error.strerror or error}; the list was not read "
        "to its end, so nothing was pruned: make it readable and run again"
    )


def _rows(file: BinaryIO, suffix: str, choose: Choose, column: str, text: bool) -> Iterator[Row]:
    if suffix == ".txt":
        return _txt_rows(file, choose((column,), "its lines"))
    if suffix == ".parquet":
        return _parquet_rows(file, choose, text)
    return {".csv": _csv_rows, ".jsonl": _jsonl_rows}[suffix](file, choose)


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


def _txt_rows(file: BinaryIO, names: Names) -> Iterator[Row]:
    others = (None,) * (len(names) - 1)
    for number, text in _lines(file):
        value = text.strip()
        if value and not value.startswith("#"):
            yield number, names, (value, *others)


def _jsonl_rows(file: BinaryIO, choose: Choose) -> Iterator[Row]:
    for number, text in _lines(file):
        if not text or text.isspace():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"line {number}: not JSON ({error}); expected one object a line") from None
        if not isinstance(record, dict):
            raise BadInput(f"line {number}: expected a JSON object, but got {short(record)}")
        names = choose(tuple(record), f"line {number}")
        yield number, names, tuple(None if name is None else record[name] for name in names)


def _csv_rows(file: BinaryIO, choose: Choose) -> Iterator[Row]:
    # strict: an open quote would otherwise swallow the lines up to the next one.
    reader = csv.reader((text for _, text in _lines(file)), strict=True)
    try:
        header = next((row for row in reader if row), None)
        if header is None:
            return
        names = choose(tuple(header), f"line {reader.line_num}")
        places = [header.index(name) if name is not None else len(header) for name in names]
        for row in reader:
            if not row:
                continue
            if len(row) > len(header):
                raise BadInput(
                    f"line {reader.line_num}: {len(row)} values under {len(header)} columns; quote values with commas"
                )
            row += [""] * (len(header) + 1 - len(row))
            yield reader.line_num, names, tuple(row[place] for place in places)
    except csv.Error as error:
        raise BadInput(f"line {reader.line_num}: not CSV ({error}); quote values that hold quotes or commas") from None


def _parquet_rows(file: BinaryIO, choose: Choose, text: bool) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Without a buffer size, and with pre-buffering, whole column chunks would be read at once.
        table = parquet.ParquetFile(file, buffer_size=LINE_LIMIT, pre_buffer=False, page_checksum_verification=True)
        names = choose(tuple(table.schema_arrow.names), "its schema")
        wanted = [name for name in names if name is not None]
        if text:
            for name in wanted:
                _check_text(table.schema_arrow.field(name))
        number = 1
        for batch in table.iter_batches(_PARQUET_ROWS, columns=wanted, use_threads=False):
            columns = [_values(batch, name, text) for name in names]
            for values in zip(*columns, strict=True):
                yield number, names, values
                number += 1
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise BadInput(f"not readable as Parquet ({str(error).splitlines()[0]}); write the file again") from None


def _values(batch: Any, name: str | None, text: bool) -> list[Any]:
    import pyarrow

    if name is None:
        return [None] * len(batch)
    column = batch.column(name)
    values: list[Any] = (column.cast(pyarrow.string()) if text else column).to_pylist()
    return values


def _check_text(field: Any) -> None:
    from pyarrow import types

    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_integer", "is_null")
    if not any(getattr(types, test)(kind) for test in tests):
        raise BadInput(
            f"column {field.name!r} is {str(field.type)[:100]}; expected text, or another column named 'uri'"
        )
