"""The runtimes are found by folder; torch runs a network with any sizes, in each precision, and gives float32 back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from storage.errors import BadInput
from workers import runtimes
from workers.runtimes import PRECISIONS, Network
from workers.runtimes import torch as torch_runtime


class Two(torch.nn.Module):
    """Two inputs, two outputs of which one is of whole numbers; remembers what reached it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.seen: list[Any] = []

    def forward(self, images: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append((images.dtype, images.is_contiguous(memory_format=torch.channels_last), self.training))
        out = self.conv(images) + bias[:, None, None, None]
        return out, out.argmax(1)


def network(build: Any = Two) -> Network:
    return Network("two", build, {"images": torch.zeros(2, 3, 8, 8), "bias": torch.zeros(2)}, ("out", "best"))


def test_the_folder_is_the_registry() -> None:
    assert "torch" in runtimes.names()
    assert runtimes.get("torch") is not None
    assert runtimes.get("torch").installed()
    with pytest.raises(BadInput, match=r"unknown runtime 'cuda'; known: .*torch"):
        runtimes.get("cuda")


@pytest.mark.parametrize("name", runtimes.names())
def test_every_runtime_defines_the_contract_without_importing_its_library(name: str) -> None:
    code = f"""
import sys
from workers import runtimes
module = runtimes.get({name!r})
assert callable(module.open) and isinstance(module.installed(), bool)
heavy = {{"torch", "onnx", "onnxruntime", "openvino", "tensorrt"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs_are_float32_and_near_the_exact_ones(precision: str) -> None:
    torch.manual_seed(0)
    module = Two()
    exact = Two()
    exact.load_state_dict(module.state_dict())
    session = torch_runtime.open(network(lambda: module), "cpu", precision)
    for shape in ((1, 3, 8, 8), (5, 3, 12, 20)):
        images, bias = torch.rand(shape), torch.rand(shape[0])
        out = session(images=images, bias=bias)
        assert list(out) == ["out", "best"]
        assert out["out"].dtype == torch.float32
        assert out["best"].dtype == torch.int64
        with torch.no_grad():
            expected = exact(images, bias)[0]
        torch.testing.assert_close(out["out"], expected, atol=1e-6 if precision == "fp32" else 0.03, rtol=0)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(module.seen) == {(wanted, True, False)}


def test_inputs_go_by_name_not_by_order() -> None:
    session = torch_runtime.open(network(), "cpu", "fp32")
    images, bias = torch.rand(2, 3, 8, 8), torch.tensor([1.0, -1.0])
    assert torch.equal(session(images=images, bias=bias)["out"], session(bias=bias, images=images)["out"])


def test_no_gradients_are_kept() -> None:
    out = torch_runtime.open(network(), "cpu", "fp32")(images=torch.rand(1, 3, 8, 8), bias=torch.zeros(1))["out"]
    assert not out.requires_grad
    assert out.grad_fn is None


def test_one_tensor_is_a_tuple_of_one() -> None:
    single = Network("one", lambda: torch.nn.Linear(3, 2), {"x": torch.zeros(1, 3)}, ("y",))
    assert torch_runtime.open(single, "cpu", "fp32")(x=torch.zeros(4, 3))["y"].shape == (4, 2)


def test_a_wrong_number_of_outputs_is_noticed() -> None:
    wrong = Network("one", lambda: torch.nn.Linear(3, 2), {"x": torch.zeros(1, 3)}, ("y", "z"))
    with pytest.raises(ValueError, match="shorter"):
        torch_runtime.open(wrong, "cpu", "fp32")(x=torch.zeros(4, 3))


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(BadInput, match="unknown precision 'int8'; known: fp32, bf16, fp16"):
        torch_runtime.open(network(), "cpu", "int8")
