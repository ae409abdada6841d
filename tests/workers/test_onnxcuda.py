"""ONNX Runtime with tensors that are said to be on a GPU: what is bound where; its CUDA provider is not real."""

from __future__ import annotations

import ctypes
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.workers import test_runtimes as shared
from tests.workers.pretended import pretended_gpu
from workers import onnxcuda, onnxgraph

__all__ = ["pretended_gpu"]


class Session:
    """An InferenceSession on the CPU that takes addresses for those of a GPU."""

    def __init__(self, path: Path) -> None:
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs
        self.runs = 0
        self.fails = ""

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding) -> None:
        self.runs += 1
        if self.fails:
            raise RuntimeError(self.fails)
        found = self._session.run(list(binding.to), {name: at.copy() for name, at in binding.given.items()})
        for (name, place), array in zip(binding.to.items(), found, strict=True):
            if place is not None:
                assert place.shape == array.shape
                assert place.dtype == array.dtype
                place[...] = array
            binding.to[name] = array


class Binding:
    """What a run takes and where it writes."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.to: dict[str, Any] = {}

    def bind_input(self, name: str, device: str, number: int, dtype: Any, shape: Any, address: int) -> None:
        assert (device, number) == ("cuda", 0)
        self.given[name] = memory(address, dtype, shape)

    def bind_output(
        self, name: str, device: str, number: int = 0, dtype: Any = None, shape: Any = None, address: int | None = None
    ) -> None:
        assert (device, number) == ("cuda", 0)
        self.to[name] = None if address is None else memory(address, dtype, shape)

    def synchronize_outputs(self) -> None: ...

    def get_outputs(self) -> list[Any]:
        return [types.SimpleNamespace(shape=lambda array=array: list(array.shape)) for array in self.to.values()]


def memory(address: int, dtype: Any, shape: Any) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(onnxgraph.exported(shared.network(shared.copied), shared.Kept(tmp_path)))


def given(batch: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(batch)
    return {"images": torch.rand(batch, 3, 8, 8), "bias": torch.rand(batch)}


def test_inputs_and_outputs_are_tensors_on_the_device(session: Session, pretended_gpu: Any) -> None:
    with pretended_gpu():
        bound = onnxcuda.Bound(session, "cuda")
        kept = []
        for batch in (2, 5, 2):
            inputs = given(batch)
            expected = shared.two()(**inputs)
            inputs["images"] = inputs["images"].contiguous(memory_format=torch.channels_last)
            found = bound(**inputs)
            kept.append((found, expected))
        assert session.runs == 3 + 2, "shapes are learnt once"
        for found, (out, best) in kept:
            assert found["out"].device.type == "cuda"
            assert torch.allclose(found["out"].cpu(), out, atol=1e-5)
            assert torch.equal(found["best"].cpu(), best)


def test_memory_that_runs_out_is_told_as_such(session: Session, pretended_gpu: Any) -> None:
    session.fails = "Failed to allocate memory for requested buffer of size 1"
    with pretended_gpu(), pytest.raises(MemoryError):
        onnxcuda.Bound(session, "cuda")(**given(1))
