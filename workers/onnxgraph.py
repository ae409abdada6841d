"""Knows ONNX files: a network is exported to one and compared with torch, and ONNX Runtime opens one on the CPU."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage.errors import BadInput, one_line
from workers import parity, torchcall
from workers.runtimes import Files, Network, NotRunnable, Session

log = logging.getLogger("imagemill.worker")

OPSET = 20  # what both exporters of torch 2.14 write without converting; ONNX Runtime 1.17 and OpenVINO 2024 read it
_EXPORTERS = ("torch", "onnx", "onnxscript", "onnx-ir")  # what the file depends on besides the network

# Calls that make a number of Python's, or an array of numpy's, from what is in a tensor.
_LOOKS = (
    *("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "__array__"),
    *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero"),
)
_MOST_BYTES = 2_000_000_000  # of a file of protobuf


def installed() -> bool:
    """Whether networks can be exported and compared here."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "onnx", "onnxscript", "onnxruntime"))


def exported(network: Network, files: Files, precision: str = "fp32") -> Path:
    """The network as a local ONNX file, exported and compared with torch by whoever needs it first.

    Args:
        precision: "fp32" or "fp16", of the weights and of everything between.

    Raises:
        NotRunnable: it cannot be exported, or the file does not compute what torch does.
        BadInput: the network is a file of another precision.
    """
    if network.onnx is not None:
        if precision != "fp32":
            raise BadInput(f"{network.onnx.name} runs in the precision it was written in; take --precision fp32")
        return network.onnx
    about = {
        **files.model,
        **network.about(),
        "file": "onnx",
        "exporter": "trace, else capture",
        "opset": str(OPSET),
        "precision": precision,
        "versions": " ".join(f"{name}-{version(name)}" for name in _EXPORTERS),
    }
    return files.get(about, f"{network.name}-{precision}.onnx", functools.partial(files.export, network, precision))


def export(network: Network, precision: str, path: Path) -> None:
    """Write a network to an ONNX file, and compare the file with torch on random numbers. Raises NotRunnable.

    No other thread may compute in torch meanwhile: exporting replaces the call of every module in the process.
    """
    try:
        trace(network, precision, path)
    except NotRunnable as error:
        log.info("the network %s is captured, as tracing it failed: %s", network.name, one_line(str(error), 200))
        _export(_captured, network, precision, path)


def trace(network: Network, precision: str, path: Path) -> None:
    """As `export`, in the quicker of its two ways only, which not every network can go."""
    _export(_traced, network, precision, path)


def _export(
    write: Callable[[Any, tuple[Any, ...], Network, Path], None], network: Network, precision: str, path: Path
) -> None:
    import torch

    module = network.build().eval().requires_grad_(False)
    with torch.no_grad():  # not inference_mode: a module may keep tensors, and such ones cannot be traced
        cases = parity.cases(network, module)
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    given = tuple(t.to(dtype) if t.is_floating_point() else t for t in cases[0][0].values())
    try:
        write(torchcall.positional(module.to(dtype)), given, network, path)
    except Exception as error:  # torch raises whatever running the module its way raises
        text = one_line(f"{type(error).__name__}: {error}", 400)
        raise NotRunnable(f"the network {network.name} cannot be exported to ONNX: {text}") from error
    parity.check(network, opened(path, torch.get_num_threads()), precision, cases)


def check(path: Path, network: Network, session: Session, precision: str) -> None:
    """Raise NotRunnable when what was built from a file does not compute what ONNX Runtime does on the CPU."""
    import torch

    inputs = parity.random(network)
    right = opened(path, torch.get_num_threads())(**inputs)
    found = {name: tensor.cpu() for name, tensor in session(**inputs).items()}
    expected = [right[name] for name in network.outputs]
    parity.compare(network, found, expected, [parity.allowed(one, precision) for one in expected])


def _traced(module: Any, inputs: tuple[Any, ...], network: Network, path: Path) -> None:
    """Export what one run of the module does: in a second, and what comes out is up to a fifth faster than captured.

    Whatever Python computes from a shape becomes a constant, which comparing other shapes shows.
    """
    import torch

    if sum(t.numel() * t.element_size() for t in module.state_dict().values()) > _MOST_BYTES:
        raise NotRunnable("it would be written as many files")
    _without_numbers(module, inputs)
    axes = {name: {n: axis.replace(" ", "_") for n, axis in its.items()} for name, its in network.dynamic_axes.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # each constant is one
        torch.onnx.export(
            module,
            inputs,
            path,
            dynamo=False,
            dynamic_axes=axes,
            input_names=list(network.example),
            output_names=list(network.outputs),
            opset_version=OPSET,
        )


def _without_numbers(module: Any, inputs: tuple[Any, ...]) -> None:
    """Raise NotRunnable where Python looks at a number in a tensor: a trace would keep the branch that it took then."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Watching(TorchFunctionMode):
        def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if call.__name__ in _LOOKS:
                raise NotRunnable(f"what it does depends on numbers in its input: {call.__name__}")
            return call(*args, **(kwargs or {}))

    with torch.no_grad(), Watching():
        module(*inputs)


def _captured(module: Any, inputs: tuple[Any, ...], network: Network, path: Path) -> None:
    """Export the program of the module, by torch.export: shapes are symbols, and it takes some twenty seconds."""
    import torch

    dynamic = torch.export.Dim.DYNAMIC  # the export fails where the module fixes such an axis after all
    shapes = tuple(dict.fromkeys(network.dynamic_axes.get(name, {}), dynamic) for name in network.example)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what the exporter deprecates of itself
        torch.onnx.export(
            module,
            inputs,
            path,
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=list(network.example),
            output_names=list(network.outputs),
            opset_version=OPSET,
            external_data=False,  # one file; so networks over 2 GB cannot be exported
            verbose=False,
        )


def opened(path: Path, threads: int) -> Session:
    """A session of ONNX Runtime on the CPU. Raises NotRunnable when it cannot read the file.

    Args:
        threads: that compute one network; the calling thread is one of them.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, options(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no root of their own, and the file may be anything
        raise NotRunnable(f"ONNX Runtime cannot open {path.name}: {one_line(str(error), 400)}") from error
    inputs = {given.name: given.type for given in session.get_inputs()}
    names = [given.name for given in session.get_outputs()]

    def run(**tensors: Any) -> dict[str, Any]:
        feeds = {name: typed(tensors[name], kind).contiguous().numpy() for name, kind in inputs.items()}
        try:
            outputs = session.run(names, feeds)
        except Exception as error:
            raise translated(error) from error
        return {name: plain(value) for name, value in zip(names, outputs, strict=True)}

    return run


def options(threads: int) -> Any:
    """Session options: so many threads for one network at a time, errors in the log only."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads, chosen.inter_op_num_threads = threads, 1
    # Its threads would spin for some milliseconds after each batch, on the cores that decode the next pictures.
    chosen.add_session_config_entry("session.force_spinning_stop", "1")
    chosen.log_severity_level = 3
    return chosen


def typed(tensor: Any, kind: str) -> Any:
    """A tensor in the type that an input of a graph has, such as "tensor(float16)".

    Raises:
        TypeError: bytes, of which only their Pixels know what numbers they are.
    """
    import torch

    if tensor.dtype == torch.uint8 and kind != "tensor(uint8)":
        raise TypeError(f"expected a {kind}, but got bytes")
    floats = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}
    return tensor.to(floats[kind]) if kind in floats else tensor


def plain(array: Any) -> Any:
    """An array that ONNX Runtime gave as a tensor, floats as float32."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.float() if tensor.is_floating_point() else tensor


def translated(error: Exception) -> Exception:
    """ONNX Runtime's error, as MemoryError where it says that memory ran out."""
    return MemoryError(one_line(str(error), 300)) if "failed to allocate memory" in str(error).lower() else error


def sha256_of(path: Path) -> str:
    """Names the content of a file, for what is built from it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
