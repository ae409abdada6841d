"""The runtimes: one file a runtime, each turning a Network into a Session on one device.

A runtime's file defines

    open(network, device, precision) -> Session
    installed() -> bool
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

from storage.errors import BadInput

PRECISIONS = ("fp32", "bf16", "fp16")


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
    """

    name: str
    build: Callable[[], Any]
    example: Mapping[str, Any]
    outputs: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


class Session(Protocol):
    """A network ready to run: tensors on the device in, tensors on the device out."""

    def __call__(self, **inputs: Any) -> dict[str, Any]: ...


def names() -> list[str]:
    """The runtimes there are, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """Import one runtime. Raises BadInput, naming the known ones."""
    if name not in names():
        raise BadInput(f"unknown runtime {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
