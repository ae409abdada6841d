"""Knows how the bytes of pictures become a network's numbers.

A family gives a session bytes. Where a runtime computes with them itself, as OpenVINO does, a quarter of the memory is
written and read; elsewhere they become floats on the device, right before the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.runtimes import Network, Session

Three = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Pixels:
    """An input that is pictures: (byte / 255 - mean) / std of each of three channels."""

    mean: Three = (0.0, 0.0, 0.0)
    std: Three = (1.0, 1.0, 1.0)

    @property
    def plain(self) -> bool:
        """Whether the numbers are just 0..1."""
        return self == Pixels()

    def floats(self, pictures: Any) -> Any:
        """(batch, 3, height, width) uint8 -> the network's numbers, float32 in the same memory order."""
        images = pictures.float().div_(255)
        if self.plain:
            return images
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return images.sub_(mean).div_(std)


def taken(network: Network, session: Session) -> Session:
    """A session that takes floats, as one that takes the bytes of the network's pictures."""
    if not network.pixels:
        return session

    def run(**inputs: Any) -> dict[str, Any]:
        return session(**{name: _floats(network, name, tensor) for name, tensor in inputs.items()})

    return run


def _floats(network: Network, name: str, tensor: Any) -> Any:
    is_bytes = name in network.pixels and not tensor.is_floating_point()
    return network.pixels[name].floats(tensor) if is_bytes else tensor
