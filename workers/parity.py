"""Knows how a network built for another runtime is compared with torch: on which inputs, and what is rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from storage.errors import one_line
from workers.runtimes import Network, NotRunnable, Session

# Largest difference from torch in float32, as a share of the largest output. In float32 the two round differently by
# some 1e-6 a layer; what is wrong in a build differs in the first digits.
_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
_JUMPS = 1e-3  # of whole numbers, such as the place of a largest one, where rounding decides between two
_ROUNDING = 10  # a network that magnifies rounding may differ by so many times what torch's float32 is off by itself

Case = tuple[Mapping[str, Any], Sequence[Any]]  # inputs of a network by name, and its outputs in their order


def cases(network: Network, module: Any) -> list[Case]:
    """What a file is compared on: inputs, and what torch makes of them.

    Random ones as the example; the first of them alone; others, of another sign and size, so that what depends on
    numbers shows; and one with each side doubled. Sides are axes that may vary, other than the batch's; doubled, since
    they may have to be a multiple of something, as those of the example are.
    """
    given = random(network)
    right = _outputs(module, given.values())
    found: list[Case] = [(given, right)]
    if all(0 in network.dynamic_axes.get(name, {}) for name in (*network.example, *network.outputs)):
        given = {name: tensor[:1] for name, tensor in given.items()}
        found.append((given, [tensor[:1] for tensor in right]))
    sides = {axis for name in network.example for number, axis in network.dynamic_axes.get(name, {}).items() if number}
    for other in (
        {name: -3 * t if t.is_floating_point() else t for name, t in given.items()},
        *({name: _doubled(network, name, t, side) for name, t in given.items()} for side in sides),
    ):
        found.append((other, _outputs(module, other.values())))
    return found


def _doubled(network: Network, name: str, tensor: Any, axis: str) -> Any:
    import torch

    for number in [number for number, its in network.dynamic_axes.get(name, {}).items() if its == axis]:
        tensor = torch.cat([tensor, tensor.flip(number)], number)
    return tensor


def _outputs(module: Any, inputs: Iterable[Any]) -> Sequence[Any]:
    found = module(*inputs)
    return found if isinstance(found, tuple) else (found,)


def check(network: Network, run: Session, precision: str, cases: Sequence[Case]) -> None:
    """Raise NotRunnable when a build does not give what torch gave.

    Args:
        run: calls the build.
    """
    for given, right in cases:
        got = _ran(run, network, given)
        limits = [allowed(one, precision) for one in right]
        try:
            compare(network, got, right, limits)
        except NotRunnable:
            if precision != "fp32":
                raise
            off = _rounding(network, given, right)
            compare(network, got, right, [max(a, _ROUNDING * b) for a, b in zip(limits, off, strict=True)])


def allowed(right: Any, precision: str) -> float:
    """The difference from an output that is rounding; of whole numbers, the share of them that differ."""
    if not right.is_floating_point():
        return _JUMPS if precision == "fp32" else math.inf  # they jump where rounding is coarse
    return _TOLERANCE[precision] * _largest(right)


def _difference(found: Any, right: Any) -> float:
    """As `allowed` says it."""
    if not right.is_floating_point():
        return float((found != right).double().mean()) if right.numel() else 0.0
    return _largest(found.double() - right.double())


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
    return [_difference(one, right) for one, right in zip(given, exact, strict=True)]


def random(network: Network) -> dict[str, Any]:
    """Inputs as the example's, floats drawn from a standard normal: zeros would hide what a wrong layer does."""
    import torch

    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(t.shape, generator=draw, dtype=t.dtype) if t.is_floating_point() else t
        for name, t in network.example.items()
    }


def _ran(run: Session, network: Network, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return run(**inputs)
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime's have no root of their own
        raise NotRunnable(
            f"the network {network.name} as it was built does not run: {one_line(str(error), 400)}"
        ) from error


def compare(network: Network, got: Mapping[str, Any], expected: Sequence[Any], most: Sequence[float]) -> None:
    """Raise NotRunnable where an output has another shape, or differs by more than its most."""
    for name, right, limit in zip(network.outputs, expected, most, strict=True):
        found = got[name]
        if found.shape != right.shape:
            raise NotRunnable(
                f"the network {network.name} gives {name} in the shape {tuple(found.shape)}, "
                f"but should in {tuple(right.shape)}"
            )
        difference = _difference(found, right)
        if not difference <= limit:
            off = f"by up to {difference:.3g} in {name}, whose largest number is {_largest(right):.3g}"
            if not right.is_floating_point():
                off = f"in a share of {difference:.3g} of {name}"
            raise NotRunnable(
                f"the network {network.name} built for another runtime differs {off}; at most {limit:.3g} is rounding"
            )
