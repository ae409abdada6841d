"""TensorRT that is none: the part of its Python API that imagemill calls, over ONNX Runtime on the CPU.

With tests/workers/pretended.py, whose tensors have addresses, all that lies between a network and TensorRT runs. What
the real library takes and answers is as its documentation for version 10 says, and is not tried here.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import json
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest

_KINDS = {"float": "float32", "float16": "float16", "int64": "int64", "int32": "int32", "bool": "bool"}
_NUMPY = {kind: np.dtype(kind) for kind in _KINDS.values()}


class Said:
    """What a test wants to happen, and what did.

    Attributes:
        inside: how often pycuda's context is the current one.
        ran: shapes of each run, inputs by name.
        streams: handles of those that anything ran on.
        no_room: contexts that cannot be made, before one can.
        cannot: a reason why nothing can be built.
        off: added to every number of a result.
    """

    def __init__(self) -> None:
        self.inside = self.built = self.no_room = 0
        self.ran: list[dict[str, tuple[int, ...]]] = []
        self.streams: set[int] = set()
        self.cannot, self.off = "", 0.0


class _Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class _Logger:
    Severity = _Severity

    def log(self, severity: Any, message: str) -> None: ...


class _Mode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class _Flag(enum.IntEnum):
    STRONGLY_TYPED = 1


class _BuilderFlag(enum.Enum):
    TF32 = 1


def module(said: Said) -> types.ModuleType:
    """What `import tensorrt` gives."""

    class Builder:
        def __init__(self, logger: _Logger) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> dict[str, bytes]:
            assert flags == 1 << int(_Flag.STRONGLY_TYPED)
            return {}

        def create_builder_config(self) -> _Config:
            return _Config()

        def create_optimization_profile(self) -> _Profile:
            return _Profile()

        def build_serialized_network(self, network: dict[str, bytes], config: _Config) -> bytearray | None:
            assert said.inside
            if said.cannot:
                self._logger.log(_Severity.ERROR, said.cannot)
                return None
            said.built += 1
            (profile,) = config.profiles
            about = json.dumps({"shapes": profile.shapes, "tf32": config.tf32}).encode()
            return bytearray(len(about).to_bytes(4, "big") + about + network["onnx"])

    class OnnxParser:
        num_errors = 1

        def __init__(self, network: dict[str, bytes], logger: _Logger) -> None:
            self._network = network

        def parse_from_file(self, path: str) -> bool:
            with open(path, "rb") as file:
                self._network["onnx"] = file.read()
            return len(self._network["onnx"]) > 10

        def get_error(self, number: int) -> Any:
            return types.SimpleNamespace(desc=lambda: "no graph")

    class Runtime:
        def __init__(self, logger: _Logger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
            assert said.inside
            try:
                size = int.from_bytes(plan[:4], "big")
                return _Engine(json.loads(plan[4 : 4 + size]), plan[4 + size :], said, self._logger)
            except ValueError:
                self._logger.log(_Severity.ERROR, "magic tag does not match")
                return None

    made: Any = types.ModuleType("tensorrt")
    made.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    made.Builder, made.OnnxParser, made.Runtime = Builder, OnnxParser, Runtime
    made.ILogger, made.TensorIOMode, made.BuilderFlag = _Logger, _Mode, _BuilderFlag
    made.NetworkDefinitionCreationFlag = _Flag
    made.init_libnvinfer_plugins = lambda logger, namespace: True
    for kind in ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"):
        setattr(made, kind, kind)
    return made  # type: ignore[no-any-return]


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
        self.shapes[name] = [list(least), list(usual), list(most)]


class _Config:
    def __init__(self) -> None:
        self.profiles: list[_Profile] = []
        self.tf32, self._timing = True, b""

    def clear_flag(self, flag: _BuilderFlag) -> None:
        self.tf32 = False

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return 0

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self._timing = cache
        return True

    def get_timing_cache(self) -> Any:
        return types.SimpleNamespace(serialize=lambda: self._timing + b"timed")


class _Engine:
    def __init__(self, about: Any, onnx: bytes, said: Said, logger: _Logger) -> None:
        assert about["tf32"] is False
        self.shapes, self.said, self.logger = about["shapes"], said, logger
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.inputs = {one.name: one.type for one in self.session.get_inputs()}
        self.outputs = {one.name: one.type for one in self.session.get_outputs()}
        self._names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, number: int) -> str:
        return self._names[number]

    def get_tensor_mode(self, name: str) -> _Mode:
        return _Mode.INPUT if name in self.inputs else _Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return _KINDS[{**self.inputs, **self.outputs}[name].removeprefix("tensor(").removesuffix(")")]

    def get_tensor_profile_shape(self, name: str, number: int) -> list[list[int]]:
        return list(self.shapes[name])

    def create_execution_context(self) -> _Context | None:
        if self.said.no_room:
            self.said.no_room -= 1
            self.logger.log(_Severity.ERROR, "no memory")
            return None
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._given: dict[str, tuple[int, ...]] = {}
        self._at: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: Any) -> bool:
        least, _, most = self._engine.shapes[name]
        fits = all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
        if fits:
            self._given[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._at[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._given:
            return self._given[name]
        zeros = {n: np.zeros(shape, self._type(n)) for n, shape in self._given.items()}
        (found,) = self._engine.session.run([name], zeros)
        return tuple(found.shape)

    def execute_async_v3(self, stream: int) -> bool:
        said = self._engine.said
        assert said.inside
        said.ran.append(dict(self._given))
        said.streams.add(stream)
        inputs = {name: self._memory(name, shape).copy() for name, shape in self._given.items()}
        for name, found in zip(self._engine.outputs, self._engine.session.run(None, inputs), strict=True):
            self._memory(name, found.shape)[...] = found + np.asarray(said.off, found.dtype)
        return True

    def _type(self, name: str) -> Any:
        return _NUMPY[self._engine.get_tensor_dtype(name)]

    def _memory(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = self._type(name)
        count = int(np.prod(shape))
        raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(self._at[name])
        return np.frombuffer(raw, dtype).reshape(shape)


def _pycuda(said: Said) -> tuple[types.ModuleType, types.ModuleType]:
    """pycuda, and its part `driver`."""

    class Context:
        def push(self) -> None:
            said.inside += 1

        @staticmethod
        def pop() -> None:
            said.inside -= 1

    driver: Any = types.ModuleType("pycuda.driver")
    driver.init = lambda: None
    driver.Context = Context
    driver.Device = lambda number: types.SimpleNamespace(retain_primary_context=Context)
    whole: Any = types.ModuleType("pycuda")
    whole.__spec__ = importlib.machinery.ModuleSpec("pycuda", None)
    whole.driver = driver
    return whole, driver


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Said]:
    """TensorRT and pycuda are there, and a card."""
    import sys

    import torch

    from storage import settings
    from workers import tensorrtengine
    from workers.runtimes import tensorrt

    made = Said()
    whole, driver = _pycuda(made)
    for name, library in (("tensorrt", module(made)), ("pycuda", whole), ("pycuda.driver", driver)):
        monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setattr(tensorrt, "version", lambda package: "10.0")
    monkeypatch.setenv("IMAGEMILL_CACHE", str(tmp_path / "cache"))
    for name, answer in (("is_available", True), ("get_device_name", "none"), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *given, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    kept = (tensorrtengine._primary, tensorrtengine.logger, tensorrtengine._computing, settings.load)
    for one in kept:
        one.cache_clear()
    yield made
    for one in kept:
        one.cache_clear()
