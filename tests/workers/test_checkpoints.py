"""A checkpoint is looked at, never run: what it would import is found, hostile ones are refused, plain data is read."""

from __future__ import annotations

import collections
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import BadInput
from workers import checkpoints

V4 = b"\x80\x04"  # protocol 4
PLAIN = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.FloatStorage"}


def archive(path: Path, data: bytes, **others: bytes) -> Path:
    """A zip laid out as torch.save does."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", b"3\n")
        for name, body in others.items():
            file.writestr(name, body)
    return path


def text(value: str) -> bytes:
    """The opcode that pushes a short string."""
    body = value.encode()
    return b"X" + len(body).to_bytes(4, "little") + body


class Call:
    """Pickles to a call of any function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def test_names_and_data_of_a_real_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save({"names": {0: "cat"}, "epoch": 3, "weights": torch.zeros(4), "more": collections.OrderedDict(a=1)}, path)
    assert checkpoints.globals_of(path) == PLAIN
    checkpoints.check(path, PLAIN)
    top = checkpoints.peek(path)
    assert (top["names"], top["epoch"], top["more"]) == ({0: "cat"}, 3, {"a": 1})
    assert top["weights"].origin == "torch._utils._rebuild_tensor_v2"
    assert top["weights"].args[2] == (4,)


def test_modules_show_their_state(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save({"model": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), "seen": {1, 2}}, path)
    top = checkpoints.peek(path)
    assert top["seen"] == {1, 2}
    assert top["model"].origin == "torch.nn.modules.container.Sequential"
    conv = top["model"].state["_modules"]["0"]
    assert (conv.origin, conv.state["out_channels"]) == ("torch.nn.modules.conv.Conv2d", 4)
    checkpoints.check(
        path,
        {
            *PLAIN,
            "torch.nn.modules.container.*",
            "torch.nn.modules.conv.*",
            "torch._utils._rebuild_parameter",
            "__builtin__.set",
        },
    )


def hostile(target: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make a file, each its own way, and the name that must be found in them."""
    mkdir, evaluated = Call(os.mkdir, str(target)), Call(eval, f"__import__('os').mkdir({str(target)!r})")
    called = text(str(target)) + b"\x85R."
    return {
        "a call": (pickle.dumps(mkdir, 2), "posix.mkdir"),
        "eval": (pickle.dumps(evaluated, 2), "__builtin__.eval"),
        "eval of protocol 4": (pickle.dumps(evaluated, 4), "builtins.eval"),
        "deep inside": (pickle.dumps({"a": [{"b": ({"c": mkdir},)}]}, 2), "posix.mkdir"),
        "in an ordered dict": (pickle.dumps(collections.OrderedDict(x=mkdir), 5), "posix.mkdir"),
        "names from the memo": (
            V4 + text("mkdir") + b"\x940" + text("posix") + b"\x940" + b"h\x01h\x00\x93" + called,
            "posix.mkdir",
        ),
        "names around a mark": (
            V4 + text("posix") + b"(" + text("x") + b"K\x021" + text("mkdir") + b"\x93" + called,
            "posix.mkdir",
        ),
        "the INST opcode": (b"(S" + repr(str(target)).encode() + b"\niposix\nmkdir\n.", "posix.mkdir"),
        "a dotted name": (
            V4 + text("collections") + text("OrderedDict.__init__.__self__") + b"\x93.",
            "collections.OrderedDict.__init__.__self__",
        ),
        "an allowed name split elsewhere": (
            V4 + text("torch") + text("_utils._rebuild_tensor_v2") + b"\x93.",
            "torch._utils._rebuild_tensor_v2",
        ),
        "a function of an allowed module": (b"ctorch.nn.modules.conv\n_single\n.", "torch.nn.modules.conv._single"),
    }


@pytest.mark.parametrize("kind", sorted(hostile(Path("x"))))
def test_a_hostile_checkpoint_is_refused_and_never_runs(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "made"
    data, name = hostile(target)[kind]
    path = archive(tmp_path / "evil.pt", data)
    assert name in checkpoints.globals_of(path)
    with pytest.raises(BadInput, match="refused: the checkpoint wants to run") as caught:
        checkpoints.check(path, {*PLAIN, "torch.nn.modules.conv.*"})
    assert name in str(caught.value)
    checkpoints.peek(path)
    assert not target.exists()


def test_the_hostile_samples_do_run_when_loaded(tmp_path: Path) -> None:
    """Otherwise the test above proves nothing."""
    for kind in ("a call", "eval", "eval of protocol 4", "deep inside", "names from the memo", "names around a mark"):
        target = tmp_path / kind.replace(" ", "-")
        pickle.loads(hostile(target)[kind][0])  # noqa: S301
        assert target.exists(), kind


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x80\x04\x82\x01.", "imports through a number"),
        (b"\x80\x04]\x8c\x05mkdir\x93.", "computes the name"),
        (b"\x80\x04\x93.", "damaged"),
        (b"\x80\x04h\x07.", "damaged"),
        (b"\x80\x04", "damaged"),
        (b"", "damaged"),
    ],
)
def test_pickles_that_hide_or_break_are_refused(data: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=says):
        checkpoints.check(archive(tmp_path / "odd.pt", data), PLAIN)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, plain)
    old = tmp_path / "old.pt"
    torch.save({"a": 1}, old, _use_new_zipfile_serialization=False)
    cases = {
        "absent": (None, "cannot read"),
        "empty": (b"", "is empty"),
        "text": (b"<html>404 Not Found</html>", "is not a torch checkpoint"),
        "truncated": (plain.getvalue()[:-700], "damaged or truncated"),
        "beginning": (plain.getvalue()[:40], "damaged or truncated"),
        "old": (old.read_bytes(), "before torch 1.6"),
    }
    for name, (body, says) in cases.items():
        path = tmp_path / f"{name}.pt"
        if body is not None:
            path.write_bytes(body)
        for ask in (checkpoints.globals_of, checkpoints.peek):
            with pytest.raises(BadInput, match=says) as caught:
                ask(path)
            assert "\n" not in str(caught.value)


def test_zips_that_readers_could_disagree_about(tmp_path: Path) -> None:
    safe, evil = pickle.dumps({}, 2), pickle.dumps(Call(print, "x"), 2)
    two = archive(tmp_path / "two.pt", safe, **{"other/data.pkl": evil})
    case = archive(tmp_path / "case.pt", safe, **{"archive/DATA.PKL": evil})
    with pytest.warns(UserWarning, match="Duplicate name"):
        same = archive(tmp_path / "same.pt", safe, **{"archive/data.pkl": evil})
    nested = archive(tmp_path / "nested.pt", safe, **{"first/version": b"3"})
    spelt = archive(tmp_path / "spelt.pt", safe, **{"archive/VERSION": b"2"})
    for path in (two, case, same, nested, spelt):
        with pytest.raises(BadInput, match="ambiguous"):
            checkpoints.check(path, PLAIN)
    with pytest.raises(BadInput, match="TorchScript"):
        checkpoints.check(archive(tmp_path / "script.pt", safe, **{"archive/constants.pkl": safe}), PLAIN)
    with pytest.raises(BadInput, match="TorchScript"):
        checkpoints.check(archive(tmp_path / "shout.pt", safe, **{"archive/CONSTANTS.PKL": safe}), PLAIN)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(BadInput, match=r"no data\.pkl"):
        checkpoints.check(tmp_path / "other.pt", PLAIN)


def test_a_huge_pickle_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_MAX_PICKLE_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 100_000)
    with pytest.raises(BadInput, match="100000 bytes, over 1000"):
        checkpoints.peek(tmp_path / "bomb.pt")


def test_claims_of_size_take_no_memory(tmp_path: Path) -> None:
    """Five bytes that name memo entry 2**31, or a string of 2**40 bytes, must not be taken at their word."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoints.peek(archive(tmp_path / "memo.pt", b"\x80\x02]r\x00\x00\x00\x80."))
    for opcode in (b"\x8d", b"\x8e"):
        path = archive(tmp_path / "long.pt", b"\x80\x04" + opcode + (2**40).to_bytes(8, "little") + b"x.")
        with pytest.raises(BadInput, match="damaged"):
            checkpoints.peek(path)
        with pytest.raises(BadInput, match="damaged"):
            checkpoints.globals_of(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(value=values, protocol=st.integers(0, 5))
def test_plain_values_come_back_and_import_nothing(
    value: Any, protocol: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = archive(tmp_path_factory.mktemp("plain") / "x.pt", pickle.dumps(value, protocol))
    if protocol >= 3:  # older ones spell bytes as a call of _codecs.encode
        assert checkpoints.globals_of(path) == set()
        assert checkpoints.peek(path) == value
    checkpoints.check(path, {"_codecs.encode", "__builtin__.bytes"})


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_ends_in_one_error(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = bytearray(pickle.dumps({"a": [1, "x", (2.0, {"b"})], "m": collections.OrderedDict(k=b"v")}, 4))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = archive(tmp_path_factory.mktemp("damaged") / "x.pt", bytes(whole))
    for ask in (checkpoints.globals_of, checkpoints.peek):
        try:
            ask(path)
        except BadInput:
            continue


@settings(max_examples=200, deadline=None)
@given(
    module=st.sampled_from(["os", "builtins", "collections"]), name=st.sampled_from(["system", "OrderedDict", "x.y"])
)
def test_what_is_found_is_what_python_would_import(
    module: str, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The walk over opcodes and Python's own unpickler name the same imports."""
    asked: set[str] = set()

    class Listening(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            asked.add(f"{module}.{name}")
            return list

    data = V4 + text(name) + b"\x940" + text(module) + b"h\x00\x93)\x81."
    Listening(io.BytesIO(data)).load()
    assert asked == checkpoints.globals_of(archive(tmp_path_factory.mktemp("same") / "x.pt", data))


def test_torch_is_not_needed(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save({"model": torch.nn.Conv2d(3, 4, 1)}, path)
    code = f"""
import sys
from pathlib import Path
from workers import checkpoints
checkpoints.globals_of(Path({str(path)!r}))
checkpoints.peek(Path({str(path)!r}))
assert not {{"torch", "numpy", "ultralytics"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
