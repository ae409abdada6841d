"""Reads torch `.pt` checkpoints without torch and without running their code: what they import, and their plain data.

A checkpoint is a zip holding one pickle (`<name>/data.pkl`) and the raw tensors. A pickle is a program: it may import
any name and call it. Here it is only looked at. `globals_of` lists the names it would import, `check` refuses those
that a family did not allow, and `peek` rebuilds its plain values with inert stand-ins for everything else.
"""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from storage.errors import BadInput

# The pickle of the largest YOLO model has 0.2 MB; a larger one is not a model of modules and tensors.
_MAX_PICKLE_BYTES = 64_000_000
_CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9_]*")

_STRING_OPS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_PUT_OPS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET_OPS = {"GET", "BINGET", "LONG_BINGET"}
_MARK = object()

# Real classes given to `peek`: they hold values and call nothing. "__builtin__" is how protocol 2 spells builtins.
_HARMLESS: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "frozenset"): frozenset,
}


class StandIn:
    """Takes the place of an object whose class is never imported.

    Attributes:
        origin: "module.name" of the class or function that was asked for.
        args: what it was called with.
        state: what it was restored from: for an nn.Module its `__dict__`.
    """

    origin: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> StandIn:
        self = object.__new__(cls)
        self.args, self.state = args, {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept anything; `__new__` kept it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any) -> StandIn:
        return type(self)(*args)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Accept the items of an unknown mapping, and drop them."""

    def append(self, item: Any) -> None:
        """Accept the items of an unknown list, and drop them."""

    def extend(self, items: Any) -> None:
        """Accept the items of an unknown list, and drop them."""


def globals_of(path: Path) -> set[str]:
    """Every "module.name" that loading the checkpoint would import. Raises BadInput if it is not one."""
    return {f"{module}.{name}" for module, name in _imports(path)}


def check(path: Path, allowed: Collection[str]) -> None:
    """Refuse a checkpoint that would import anything else than the allowed names.

    Args:
        allowed: names "module.name"; "module.*" allows the capitalised names (classes) of exactly that module.

    Raises:
        BadInput: naming the first name that is not allowed.
    """
    exact, modules = {a for a in allowed if not a.endswith(".*")}, {a[:-2] for a in allowed if a.endswith(".*")}
    for module, name in sorted(_imports(path)):
        of_class = module in modules and _CLASS_NAME.fullmatch(name) is not None
        # A dotted name walks attributes ("Conv.forward.__globals__"), which no torch.save writes.
        if "." in name or not (of_class or f"{module}.{name}" in exact):
            raise BadInput(
                f"{path.name} refused: the checkpoint wants to run {module}.{name}; loading a checkpoint runs what it "
                "names, so only names known to be harmless are allowed. Get it from its publisher, or save it again "
                "without that object"
            )


def peek(path: Path) -> Any:
    """The checkpoint's top object: plain values as they are, everything else as StandIn. Imports and runs nothing."""
    try:
        return _Peeker(io.BytesIO(_pickle_of(path))).load()
    except BadInput:
        raise
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise BadInput(_damaged(path, f"{type(error).__name__}: {error}")) from error


class _Peeker(pickle._Unpickler):
    """An unpickler that cannot import.

    Python's own, since the one in C makes room for as many memo entries as the pickle claims: one opcode of five bytes
    takes 64 GB.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self._types: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in _HARMLESS:
            return _HARMLESS[key]
        if key not in self._types:
            self._types[key] = type("StandIn", (StandIn,), {"origin": f"{module}.{name}"})
        return self._types[key]

    def persistent_load(self, pid: Any) -> Any:
        return StandIn(pid)


def _damaged(path: Path, why: str) -> str:
    return f"{path.name} is a damaged or truncated checkpoint ({why}); fetch it again"


def _pickle_of(path: Path) -> bytes:
    """The bytes of the one data.pkl of a checkpoint. Raises BadInput with one line for every other file."""
    _check_start(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(_entry(path, archive))
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise BadInput(_damaged(path, str(error))) from error


def _check_start(path: Path) -> None:
    """torch takes a file for a zip by its first four bytes, and unpickles every other one as it is."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise BadInput(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    if not start:
        raise BadInput(f"{path.name} is empty; expected a torch checkpoint (.pt)")
    if start[:1] == b"\x80":
        raise BadInput(
            f"{path.name} is a checkpoint of the format before torch 1.6, which cannot be checked; open it where you "
            "trust it and torch.save it again"
        )
    if start != b"PK\x03\x04":
        raise BadInput(f"{path.name} is not a torch checkpoint: expected a zip that starts with 'PK', got {start!r}")


def _entry(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The entry data.pkl, when every reader must agree on which one that is.

    torch finds entries by name without regard to case under the first entry's folder; duplicates, several folders or
    several spellings could show us one pickle and torch another.
    """
    names = [info.filename for info in archive.infolist()]
    lowered = [name.lower() for name in names]
    if any(name.endswith("/constants.pkl") for name in lowered):
        raise BadInput(f"{path.name} is a TorchScript archive; expected a checkpoint written by torch.save")
    pickles = [i for i in archive.infolist() if i.filename.lower().rpartition("/")[2] == "data.pkl"]
    if not pickles:
        raise BadInput(f"{path.name} is a zip but not a torch checkpoint: it holds no data.pkl")
    if len(pickles) > 1 or len(set(lowered)) < len(names) or len({name.partition("/")[0] for name in names}) > 1:
        raise BadInput(f"{path.name} refused: its zip holds ambiguous entries, which torch.save never writes")
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise BadInput(f"{path.name} refused: its pickle has {pickles[0].file_size} bytes, over {_MAX_PICKLE_BYTES}")
    return pickles[0]


def _imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of every import in the pickle."""
    found: set[tuple[str, str]] = set()
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for op, arg, _ in pickletools.genops(_pickle_of(path)):
            if op.name in ("GLOBAL", "INST"):
                module, _, name = str(arg).partition(" ")
                found.add((module, name))
            elif op.name == "STACK_GLOBAL":
                found.add(_named_on(stack, path))
            elif op.name.startswith("EXT"):
                raise BadInput(f"{path.name} refused: it imports through a number ({op.name} {arg}), not a name")
            _step(op, arg, stack, memo)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise BadInput(_damaged(path, f"{type(error).__name__}: {error}")) from error
    return found


def _named_on(stack: list[Any], path: Path) -> tuple[str, str]:
    module, name = stack[-2:]
    if not (isinstance(module, str) and isinstance(name, str)):
        raise BadInput(f"{path.name} refused: it computes the name of what it imports")
    return module, name


def _step(op: pickletools.OpcodeInfo, arg: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Follow one opcode on a stack where strings and marks are known and every other object is None."""
    if op.name in _STRING_OPS:
        stack.append(arg)
    elif op.name in _GET_OPS:
        stack.append(memo[arg])
    elif op.name in _PUT_OPS:
        memo[arg] = stack[-1]
    elif op.name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif op.name == "DUP":
        stack.append(stack[-1])
    elif op.name == "MARK":
        stack.append(_MARK)
    else:
        _replace(op, stack)


def _replace(op: pickletools.OpcodeInfo, stack: list[Any]) -> None:
    """Take what an opcode consumes off the stack, and put an unknown for each object it yields."""
    needs = op.stack_before
    if pickletools.markobject in needs:
        while stack.pop() is not _MARK:
            pass
        needs = needs[: needs.index(pickletools.markobject)]
    for _ in needs:
        stack.pop()
    stack.extend(None for _ in op.stack_after)
