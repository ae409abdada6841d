"""Knows what an ONNX file says of itself: its inputs, outputs and metadata, read without any library.

An ONNX file is a ModelProto of protocol buffers (onnx/onnx.proto, field numbers below). Nothing in it is code. Only the
fields named here are looked at; weights are stepped over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.errors import BadInput

MAX_BYTES = 2**31 - 1  # protocol buffers hold no more

_GRAPH, _METADATA = 7, 14  # of ModelProto
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12  # of GraphProto
_TENSOR_NAME, _TENSOR_LOCATION = 8, 14  # of TensorProto; a location of 1 means: in another file
_MAX_TEXT = 1_000_000  # bytes of a name or of a value of the metadata

TYPES = {1: "float32", 10: "float16", 11: "float64", 2: "uint8", 6: "int32", 7: "int64", 16: "bfloat16"}  # TensorProto

Axis = int | str  # pixels or elements, or the name of a size that may vary


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output.

    Attributes:
        kind: of its numbers, "float32" and the like; "?" for one not listed in TYPES.
    """

    name: str
    kind: str
    shape: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.kind} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class About:
    """What a file says of itself."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    metadata: dict[str, str]


def read(path: Path) -> About:
    """Raises BadInput for a file that is no ONNX, is too large, or keeps weights in other files."""
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_BYTES:
            raise BadInput(f"{path.name} has {size} bytes; expected an ONNX file of 1 to {MAX_BYTES} bytes")
        with path.open("rb") as file:
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise BadInput(f"cannot read the ONNX file {path}: {error.strerror or error}") from error
    try:
        return _about(whole, path.name)
    except (IndexError, UnicodeDecodeError, ValueError, KeyError) as error:
        raise BadInput(f"{path.name} is no ONNX file, or a damaged one: {error}") from error


def _about(whole: memoryview, name: str) -> About:
    model = list(_fields(whole))
    graphs = [value for number, value in model if number == _GRAPH and isinstance(value, memoryview)]
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} graphs")
    entries = [_texts(value) for number, value in model if number == _METADATA and isinstance(value, memoryview)]
    inputs: list[Port] = []
    outputs: list[Port] = []
    weights: set[str] = set()
    for number, value in _fields(graphs[0]):
        if not isinstance(value, memoryview):
            continue
        if number == _INITIALIZER:
            weights.add(_initializer(value, name))
        elif number in (_INPUT, _OUTPUT):
            (inputs if number == _INPUT else outputs).append(_port(value))
    # Old files list the weights among the inputs.
    given = tuple(port for port in inputs if port.name not in weights)
    return About(given, tuple(outputs), {entry[1]: entry[2] for entry in entries})


def _initializer(tensor: memoryview, file: str) -> str:
    """The name of a weight. Raises BadInput when its numbers are not in this file."""
    name = ""
    for number, value in _fields(tensor):
        if number == _TENSOR_LOCATION and value == 1:
            raise BadInput(f"{file} keeps its weights in another file; save it as one (onnx.save with all in one)")
        if number == _TENSOR_NAME and isinstance(value, memoryview):
            name = _text(value)
    return name


def _port(value: memoryview) -> Port:
    """A ValueInfoProto: 1 name, 2 type: 1 tensor: 1 element type, 2 shape: 1 axis: 1 size, 2 name."""
    fields = dict(_fields(value))
    tensor = dict(_fields(_message(dict(_fields(_message(fields[2])))[1])))
    axes = [dict(_fields(_message(axis))) for number, axis in _fields(_message(tensor[2])) if number == 1]
    shape = tuple(_axis(axis) for axis in axes)
    kind = tensor.get(1, 0)
    return Port(_text(_message(fields[1])), TYPES.get(kind, "?") if isinstance(kind, int) else "?", shape)


def _axis(axis: dict[int, int | memoryview]) -> Axis:
    size = axis.get(1)
    if isinstance(size, int):
        return size
    return _text(_message(axis[2])) if 2 in axis else "?"


def _texts(value: memoryview) -> dict[int, str]:
    """A StringStringEntryProto: 1 key, 2 value."""
    found = {number: _text(text) for number, text in _fields(value) if isinstance(text, memoryview)}
    return {1: found[1], 2: found.get(2, "")}


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _text(value: memoryview) -> str:
    if len(value) > _MAX_TEXT:
        raise ValueError(f"a text of {len(value)} bytes")
    return bytes(value).decode()


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, whole number or bytes) of each field of a message; fields of fixed width are stepped over."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("it ends in the middle")
            yield number, data[at : at + size]
            at += size
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of the kind {wire}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
