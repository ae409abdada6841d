"""Runs a network on a GPU as Inductor, torch.compile's compiler, has compiled it. It has not been run on a GPU yet.

It is compiled ahead of time, in a child process, for all shapes at once: so no worker compiles in the midst of a job,
whatever batch or picture comes, and torch's tracing disturbs no other thread. What comes out is machine code, which no
worker takes from a store that others may write to: each machine compiles for itself, once, and keeps the file.

It compiles for a CPU just as well, and so it is tested. No job takes it there: torch calls what was compiled with the
interpreter's lock held, which for a GPU is as long as it takes to launch kernels, and on a CPU as long as a batch
takes; no thread of the worker could say meanwhile that it lives. And ONNX Runtime is faster there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from storage.errors import one_line
from workers import devices, parity, torchcall
from workers.graphed import Graphed
from workers.runtimes import PRECISIONS, Files, Network, NotRunnable, Session

RUNS = {"cuda": PRECISIONS}
BUILDS = False  # nothing for the fleet
START_S = 60  # that compiling takes, at least: yolov8n on two cores
INSTALL = "apt-get install g++"

# Constants folded and, on a CPU, weights laid out for its convolutions beforehand: yolov8n at 640 in fp32 on two
# cores, by turns with torch, has 0.98 of torch's speed without and 1.13 with it.
_FREEZING = {"freezing": True}


def installed() -> bool:
    """Whether PyTorch can be imported, and there is a C++ compiler, which Inductor calls."""
    return importlib.util.find_spec("torch") is not None and shutil.which(os.environ.get("CXX") or "g++") is not None


def open(network: Network, device: str, precision: str, files: Files) -> Session:
    """Compile the network, or take what this machine compiled before; outputs come back as float32.

    Raises:
        NotRunnable: it cannot be compiled, or computes something else then.
    """
    if network.onnx is not None or network.engine is not None:
        raise NotRunnable(f"the network {network.name} comes as a file, which has no module to compile")
    about = {
        **files.model,
        **network.about(),
        "file": "inductor",
        "precision": precision,
        "device": _device(device),
        "versions": _versions(),
    }
    build = functools.partial(files.compile, network, device, precision)
    return opened(files.here(about, f"{network.name}-{precision}.pt2", build), network, device, precision)


def opened(path: Path, network: Network, device: str, precision: str) -> Session:
    """A session of a compiled file. Raises NotRunnable when it cannot be loaded here."""
    import torch._inductor

    on_gpu = device.startswith("cuda")
    try:
        # One thread calls it, and only so can a CUDA graph be made of it.
        run = torch._inductor.aoti_load_package(str(path), run_single_threaded=on_gpu)
    except Exception as error:  # a library that cannot be loaded, a file that is none
        raise NotRunnable(f"{path.name} cannot be loaded: {one_line(str(error), 400)}") from error
    call = torchcall.called(run)
    return torchcall.session(network, Graphed(call) if on_gpu else call, device, precision)


def compile(network: Network, device: str, precision: str, path: Path) -> None:
    """Write a network to a file as Inductor compiles it for a device, and compare it with torch. Raises NotRunnable.

    No other thread may compute in torch meanwhile.
    """
    import torch
    import torch._inductor

    module = network.build().eval().requires_grad_(False)
    with torch.no_grad():
        cases = parity.cases(network, module)
    del module
    placed = torchcall.module_of(network, device, precision)
    dtype = torchcall.dtype_of(precision)
    given = tuple(torchcall.placed(_several(network, name, t), device, dtype) for name, t in cases[0][0].items())
    package = path.with_name(f"{path.name}.pt2")  # torch takes no other name
    try:
        with torch.no_grad():
            program = torch.export.export(torchcall.positional(placed), given, dynamic_shapes=(_axes(network),))
        _check_axes(program, network)
        torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=_FREEZING)
    except NotRunnable:
        raise
    except Exception as error:  # torch raises whatever running the module its way raises
        text = one_line(f"{type(error).__name__}: {error}", 400)
        raise NotRunnable(f"the network {network.name} cannot be compiled: {text}") from error
    try:
        parity.check(network, _on_host(opened(package, network, device, precision)), precision, cases)
        package.replace(path)
    finally:
        package.unlink(missing_ok=True)


def _axes(network: Network) -> tuple[dict[int, Any], ...]:
    from torch.export import Dim

    return tuple(dict.fromkeys(network.dynamic_axes.get(name, {}), Dim.AUTO) for name in network.example)


def _several(network: Network, name: str, tensor: Any) -> Any:
    """The tensor with two along each axis that may vary and has one: torch takes a single one for fixed."""
    import torch

    for axis in network.dynamic_axes.get(name, {}):
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], axis)
    return tensor


def _check_axes(program: Any, network: Network) -> None:
    """Raise NotRunnable where the network, as torch sees it, fixes an axis that may vary."""
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    for name, node in zip(network.example, inputs, strict=True):
        for axis, called in network.dynamic_axes.get(name, {}).items():
            if str(node.meta["val"].shape[axis]).isdigit():  # else it is a symbol
                raise NotRunnable(f"the network {network.name} cannot be compiled: it fixes the {called} of {name}")


def _on_host(session: Session) -> Session:
    return lambda **inputs: {name: tensor.cpu() for name, tensor in session(**inputs).items()}


def _device(device: str) -> str:
    """What compiled code depends on: a GPU's name and capability, or the processor's instructions."""
    if device.startswith("cuda"):
        import torch

        made: Any = torch.cuda  # whose functions carry no types
        return f"{made.get_device_name()} {made.get_device_capability()}"
    # A folder may be shared by machines that are not alike.
    flags = " ".join(sorted(devices.cpuinfo("flags").split()))
    return f"{platform.machine()} {platform.libc_ver()[1]} {hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def _versions() -> str:
    import torch

    return f"torch-{torch.__version__} cuda-{torch.version.cuda}"
