"""Knows what ultralytics writes before a TensorRT engine in its .engine files, read without any library.

Four bytes hold the length of a JSON object, lowest byte first; the object says task, class names, stride and size of
the input; the engine follows. A file that does not begin so is an engine from its first byte, as trtexec writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from storage.errors import BadInput

_LENGTH = 4  # bytes
_MAX_BYTES = 1_000_000  # of the JSON


@dataclass(frozen=True, slots=True)
class About:
    """What a file says of its engine.

    Attributes:
        metadata: name -> value, as Python writes it where it is no text; {} for a file without.
        start: offset of the engine.
    """

    metadata: dict[str, str]
    start: int


def read(path: Path) -> About:
    """Raises BadInput for a file that cannot be read, or that ends before an engine could begin."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            text = file.read(length) if 2 <= length <= _MAX_BYTES else b""
        size = path.stat().st_size
    except OSError as error:
        raise BadInput(f"cannot read the engine {path}: {error.strerror or error}") from error
    metadata = _object(text)
    start = _LENGTH + length if metadata is not None else 0
    if size <= start:
        raise BadInput(f"{path.name} holds no engine: it has {size} bytes, of which {start} are metadata")
    return About(metadata or {}, start)


def plan(path: Path) -> bytes:
    """The engine in a file, as TensorRT reads it. Raises BadInput as `read` does."""
    start = read(path).start
    try:
        return path.read_bytes()[start:]
    except OSError as error:
        raise BadInput(f"cannot read the engine {path}: {error.strerror or error}") from error


def _object(text: bytes) -> dict[str, str] | None:
    """A JSON object with texts for values, None for what is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return {name: given if isinstance(given, str) else repr(given) for name, given in value.items()}
