"""Knows ONNX files: a network is exported to one and compared with torch, and ONNX Runtime opens one on the CPU."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage.errors import BadInput, one_line
from workers.runtimes import Files, Network, NotRunnable, Session

log = logging.getLogger("imagemill.worker")

OPSET = 20  # what both exporters of torch 2.14 write without converting; ONNX Runtime 1.17 and OpenVINO 2024 read it
_EXPORTERS = ("torch", "onnx", "onnxscript", "onnx-ir")  # what the file depends on besides the network

# Largest difference between the file and torch, as a share of the largest output. In float32 the two round
# differently by some 1e-6 a layer; what is wrong in an export differs in the first digits.
_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
# Calls that make a number of Python's, or an array of numpy's, from what is in a tensor.
_LOOKS = (
    *("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "__array__"),
    *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero"),
)
_MOST_BYTES = 2_000_000_000  # of a file of protobuf
_ROUNDING = 10  # a network that magnifies rounding may differ by so many times what torch's float32 is off by itself

Case = tuple[Mapping[str, Any], Sequence[Any]]  # inputs of a network by name, and its outputs in their order


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
        "network": network.name,
        "file": "onnx",
        "exporter": "trace, else capture",
        "opset": str(OPSET),
        "precision": precision,
        "inputs": "; ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in network.example.items()),
        "outputs": ", ".join(network.outputs),
        "axes": "; ".join(f"{name} {dict(axes)}" for name, axes in sorted(network.dynamic_axes.items())),
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
        cases = _cases(network, module)
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    given = tuple(t.to(dtype) if t.is_floating_point() else t for t in cases[0][0].values())
    try:
        write(_positional(module.to(dtype)), given, network, path)
    except Exception as error:  # torch raises whatever running the module its way raises
        text = one_line(f"{type(error).__name__}: {error}", 400)
        raise NotRunnable(f"the network {network.name} cannot be exported to ONNX: {text}") from error
    _check_cases(path, network, precision, cases)


def _cases(network: Network, module: Any) -> list[Case]:
    """What a file is compared on: inputs, and what torch makes of them.

    Random ones as the example; the first of them alone; others, of another sign and size, so that what depends on
    numbers shows; and one with each side doubled. Sides are axes that may vary, other than the batch's; doubled, since
    they may have to be a multiple of something, as those of the example are.
    """
    given = _random(network)
    right = _outputs(module, given.values())
    cases: list[Case] = [(given, right)]
    if all(0 in network.dynamic_axes.get(name, {}) for name in (*network.example, *network.outputs)):
        given = {name: tensor[:1] for name, tensor in given.items()}
        cases.append((given, [tensor[:1] for tensor in right]))
    sides = {axis for name in network.example for number, axis in network.dynamic_axes.get(name, {}).items() if number}
    for other in (
        {name: -3 * t if t.is_floating_point() else t for name, t in given.items()},
        *({name: _doubled(network, name, t, side) for name, t in given.items()} for side in sides),
    ):
        cases.append((other, _outputs(module, other.values())))
    return cases


def _doubled(network: Network, name: str, tensor: Any, axis: str) -> Any:
    import torch

    for number in [number for number, its in network.dynamic_axes.get(name, {}).items() if its == axis]:
        tensor = torch.cat([tensor, tensor.flip(number)], number)
    return tensor


def _outputs(module: Any, inputs: Iterable[Any]) -> Sequence[Any]:
    found = module(*inputs)
    return found if isinstance(found, tuple) else (found,)


def _check_cases(path: Path, network: Network, precision: str, cases: Sequence[Case]) -> None:
    """Raise NotRunnable when the file does not give what torch gave."""
    import torch

    run = opened(path, torch.get_num_threads())
    for given, right in cases:
        got = _ran(run, network, given)
        allowed = [_allowed(one, precision) for one in right]
        try:
            _compare(network, got, right, allowed)
        except NotRunnable:
            if precision != "fp32":
                raise
            off = _rounding(network, given, right)
            _compare(network, got, right, [max(a, _ROUNDING * b) for a, b in zip(allowed, off, strict=True)])


def _allowed(right: Any, precision: str) -> float:
    """The difference from an output that is rounding."""
    if precision != "fp32" and not right.is_floating_point():
        return math.inf  # whole numbers, such as the place of a largest one, jump where rounding is coarse
    return _TOLERANCE[precision] * _largest(right)


def _largest(tensor: Any) -> float:
    """The largest number of a tensor, whatever its sign."""
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _rounding(network: Network, inputs: Mapping[str, Any], given: Sequence[Any]) -> list[float]:
    """How far each output in float32 is from that in float64; 0 for a module that cannot compute in it."""
    import torch

    doubled = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs.values()]
    try:
        with torch.no_grad():
            exact = _outputs(network.build().eval().double(), doubled)
    except RuntimeError:
        return [0.0] * len(given)
    return [_largest(one.double() - right.double()) for one, right in zip(given, exact, strict=True)]


def check(path: Path, network: Network, session: Session, precision: str) -> None:
    """Raise NotRunnable when what was built from a file does not compute what ONNX Runtime does on the CPU."""
    import torch

    inputs = _random(network)
    right = opened(path, torch.get_num_threads())(**inputs)
    found = {name: tensor.cpu() for name, tensor in session(**inputs).items()}
    expected = [right[name] for name in network.outputs]
    _compare(network, found, expected, [_allowed(one, precision) for one in expected])


def _random(network: Network) -> dict[str, Any]:
    """Inputs as the example's, floats drawn from a standard normal: zeros would hide what a wrong layer does."""
    import torch

    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(t.shape, generator=draw, dtype=t.dtype) if t.is_floating_point() else t
        for name, t in network.example.items()
    }


def _positional(module: Any) -> Any:
    """The module under a forward of positional tensors only, whatever the signature of its own."""
    import torch

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *inputs: Any) -> Any:
            return self.inner(*inputs)

    return Positional().eval()


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


def _ran(run: Session, network: Network, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return run(**inputs)
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime's have no root of their own
        raise NotRunnable(f"the network {network.name} as a file does not run: {one_line(str(error), 400)}") from error


def _compare(network: Network, got: Mapping[str, Any], expected: Sequence[Any], allowed: Sequence[float]) -> None:
    for name, right, most in zip(network.outputs, expected, allowed, strict=True):
        found = got[name]
        if found.shape != right.shape:
            raise NotRunnable(
                f"the network {network.name} gives {name} in the shape {tuple(found.shape)}, "
                f"but should in {tuple(right.shape)}"
            )
        difference = _largest(found.double() - right.double())
        if not difference <= most:
            raise NotRunnable(
                f"the network {network.name} built for another runtime differs by up to {difference:.3g} in {name}, "
                f"whose largest number is {_largest(right):.3g}; at most {most:.3g} is rounding"
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
    """A tensor in the type that an input of a graph has, such as "tensor(float16)"."""
    import torch

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
