"""The runtimes: one file a runtime, each turning a Network into a Session on one device.

A runtime's file defines

    open(network, device, precision, files) -> Session     torch, which builds no files, takes none
    installed() -> bool
    RUNS: Mapping[str, tuple[str, ...]]                     device -> precisions; torch, which runs all, has none
    EXTRA: str                                              the extras of the package that bring its libraries, or
    INSTALL: str                                            the command that brings what is lacking
    BUILDS: bool                                            whether it makes files for the fleet; True where not said
    START_S: float                                          that it takes to start at least; 0 where not said

`open` raises NotRunnable when the runtime cannot run this network; torch can run every one that has a module. A session
takes the bytes of a network's `pixels`; `workers.pixels.taken` makes such a one of one that takes floats.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from storage.errors import BadInput, ImagemillError, Misconfigured
from workers.pixels import Pixels

PRECISIONS = ("fp32", "bf16", "fp16")
FALLBACK = "torch"


class NotRunnable(ImagemillError):
    """This runtime cannot run this network; another one may."""


@dataclass(frozen=True, slots=True)
class Network:
    """Something a runtime can run: it builds a module and shows what goes in and out.

    Attributes:
        name: tells the networks of one model apart.
        build: returns the nn.Module, in eval mode, on the CPU, in float32; its forward takes the inputs in the order
            of `example` and returns one tensor or a tuple in the order of `outputs`.
        example: input name -> example tensor.
        outputs: names of the outputs.
        dynamic_axes: input or output name -> {axis: axis name} that may vary.
        pixels: input name -> how the bytes of pictures become this input. A session is given the bytes,
            (batch, 3, height, width) uint8; the module, and every file made of it, takes the floats.
        onnx: a file that is this network already, for one that comes as a file; its inputs and outputs have the names
            above, and it runs in the precision that it was written in.
        engine: an engine of TensorRT that is this network already, as `workers.enginemeta` reads it; no other runtime
            can run it.
        device: "cpu" or "cuda", for which the model was loaded, where it has another network of this name for each.
    """

    name: str
    build: Callable[[], Any]
    example: Mapping[str, Any]
    outputs: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    pixels: Mapping[str, Pixels] = field(default_factory=dict)
    onnx: Path | None = None
    engine: Path | None = None
    device: str = "cpu"

    def about(self) -> dict[str, str]:
        """What a file that is made of it depends on, besides its model."""
        return {
            "network": self.name,
            "inputs": "; ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in self.example.items()),
            "outputs": ", ".join(self.outputs),
            "axes": "; ".join(f"{name} {dict(axes)}" for name, axes in sorted(self.dynamic_axes.items())),
        }


class Session(Protocol):
    """A network ready to run: tensors on the device in, tensors on the device out; of its `pixels`, bytes."""

    def __call__(self, **inputs: Any) -> dict[str, Any]: ...


class Files(Protocol):
    """Where a runtime keeps what it builds, so that it is built once for the whole fleet.

    Attributes:
        model: what a network depends on besides its name: weights, family, parameters.
    """

    model: Mapping[str, str]

    def export(self, network: Network, precision: str, path: Path) -> None:
        """What workers.onnxgraph.export does, where no other thread is disturbed by it."""
        ...

    def compile(self, network: Network, device: str, precision: str, path: Path) -> None:
        """What workers.runtimes.inductor.compile does, where no other thread is disturbed by it."""
        ...

    def get(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        """The local file that `build(path)` writes, or has written somewhere before.

        Args:
            about: everything that the file's content depends on; another value is another file.
            name: of the file, for people.
        """
        ...

    def here(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        """As `get`, for this machine alone: of code for its processor, which nobody takes from others."""
        ...


def names() -> list[str]:
    """The runtimes there are, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """Import one runtime. Raises BadInput, naming the known ones."""
    if name not in names():
        raise BadInput(f"unknown runtime {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def precisions(name: str, device: str) -> tuple[str, ...]:
    """In which precisions a runtime runs on a device, () when it does not run there."""
    runs: Mapping[str, tuple[str, ...]] = getattr(get(name), "RUNS", {"cpu": PRECISIONS, "cuda": PRECISIONS})
    return runs.get(device.partition(":")[0], ())


def usual_precision(name: str, device: str) -> str:
    """The precision that a runtime is taken in where none was asked for: fp32, or the first it has on the device."""
    able = precisions(name, device)
    return "fp32" if "fp32" in able or not able else able[0]


def check(name: str, device: str, precision: str) -> None:
    """Raise BadInput when a runtime does not run on a device in a precision, naming what does."""
    if precision not in PRECISIONS:
        raise BadInput(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    able = precisions(name, device)
    if precision in able:
        return
    others = ", ".join(other for other in names() if precision in precisions(other, device))
    where = f"runs in {' or '.join(able)} on {device}" if able else f"does not run on {device}"
    raise BadInput(f"the runtime {name} {where}, but {precision} was asked for; {precision} runs with: {others}")


def _remedy(runtime: ModuleType) -> str:
    extra = getattr(runtime, "EXTRA", "")
    return f"pip install 'imagemill[{extra}]'" if extra else str(runtime.INSTALL)


def open_network(name: str, network: Network, device: str, precision: str, files: Files) -> Session:
    """Open a network in a runtime.

    Raises:
        BadInput: the runtime does not run on that device in that precision.
        Misconfigured: its libraries are not installed.
        NotRunnable: it cannot run this network.
    """
    check(name, device, precision)
    runtime = get(name)
    if not runtime.installed():
        raise Misconfigured(f"the runtime {name} is not installed here; install it with: {_remedy(runtime)}")
    if name == "torch":
        session: Session = runtime.open(network, device, precision)
        return session
    built: Session = runtime.open(network, device, precision, files)
    return built
