"""One part of the work, alone on all cores: the bare forward pass, decoding, or making pictures ready.

    python -P benchmarks/parts.py forward FOLDER --workload yolov8n --runtime torch --precision bf16
    python -P benchmarks/parts.py decode  FOLDER
    python -P benchmarks/parts.py prepare FOLDER --workload dinov2

FOLDER is what workloads.py wrote. The forward pass is given the very tensors that the family gives it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.workloads import WORKLOADS


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("forward", "decode", "prepare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="yolov8n")
    parser.add_argument("--runtime", default="torch")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--whole", action="store_true", help="a YOLO network with all of its head, as on a GPU")
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()
    work = {"forward": forward, "decode": decode, "prepare": prepare}[arguments.part](arguments)
    common.answer(rate=common.rate_of(work, arguments.seconds, warm=2 if arguments.seconds > 1 else 1))


def decode(arguments: argparse.Namespace) -> Callable[[], int]:
    """Bytes in memory to pixels."""
    from workers import images

    limits = images.Limits()
    return _on_all_cores(lambda data: images.decode(data, limits), [path.read_bytes() for path in _paths(arguments)])


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Pixels to what the device takes."""
    model, _ = _load(arguments)
    return _on_all_cores(lambda pixels: model.prepare(pixels, _item()), _pixels(arguments))


def _on_all_cores(work: Callable[[Any], object], given: Sequence[Any]) -> Callable[[], int]:
    """A pass over all that is given. What comes of each is let go at once: fresh memory for hundreds costs time."""
    pool = ThreadPoolExecutor(os.cpu_count())

    def one(it: Any) -> None:
        work(it)

    return lambda: len(list(pool.map(one, given)))


def forward(arguments: argparse.Namespace) -> Callable[[], int]:
    """Tensors in, tensors out: the session of a runtime, what it leaves of a head for later, and nothing around it."""
    from workers import tuning

    model, sessions = _load(arguments)
    batch = tuning.USUAL_BATCH["cpu"]
    rest = _computed_at_points(model)
    model.infer([model.prepare(one, _item()) for one in _pixels(arguments)[:batch]])
    network = [sessions[0], *rest]

    def once() -> int:
        for part in network:
            part.again()
        return batch

    return once


class _Built:
    """What runtimes build, kept beside the pictures from one round to the next."""

    def __init__(self, folder: Path, workload: str) -> None:
        self._folder = folder / "built"
        self.model: Mapping[str, str] = {"weights": workload}

    def export(self, network: Any, precision: str, path: Path) -> None:
        """Nothing else runs in this process that the export could disturb."""
        from workers import onnxgraph

        onnxgraph.export(network, precision, path)

    def compile(self, network: Any, device: str, precision: str, path: Path) -> None:
        """Nor a compilation."""
        from workers.runtimes import inductor

        inductor.compile(network, device, precision, path)

    def here(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        """As any other."""
        return self.get(about, name, build)

    def get(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        """The file that `build` writes, or wrote."""
        digest = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()
        path = self._folder / digest / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            build(path)
        return path


class _Call:
    """A call that remembers what it was given."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._given: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __call__(self, *given: Any, **named: Any) -> Any:
        self._given = given, named
        return self.again()

    def again(self) -> Any:
        """The same once more."""
        given, named = self._given
        return self._call(*given, **named)


class _Branch:
    """A part of a head that is computed at single points."""

    def __init__(self, at: _Call) -> None:
        self.at = at


def _computed_at_points(model: Any) -> list[_Call]:
    """The calls of the parts of a YOLO head that its network leaves out."""
    head = getattr(model, "_head", None)
    if head is None:
        return []
    calls = {name: _Call(branch.at) for name, branch in head.branches.items()}
    model._head = dataclasses.replace(head, branches={name: _Branch(call) for name, call in calls.items()})
    return list(calls.values())


def _load(arguments: argparse.Namespace) -> tuple[Any, list[_Call]]:
    from storage.errors import ImagemillError
    from workers import models, runtimes

    family, kind, weights = WORKLOADS[arguments.workload]
    card = models.card_for(arguments.workload, family, kind)
    sessions: list[_Call] = []

    def open_network(network: runtimes.Network) -> _Call:
        name, precision = arguments.runtime, arguments.precision
        try:
            files = _Built(arguments.folder, arguments.workload)
            if name == "inductor":  # no job takes it on a CPU
                session = runtimes.get(name).open(network, "cpu", precision, files)
            else:
                session = runtimes.open_network(name, network, "cpu", precision, files)
        except ImagemillError as error:
            common.leave_out(f"{name} does not run it here: {error}".splitlines()[0])
        sessions.append(_Call(session))
        return sessions[-1]

    site = models.Site("cpu", open_network, arguments.precision)
    path = arguments.folder / weights if weights else None
    params = card.params(conf=0.0) if arguments.whole else card.params()
    return models.family(family).load(card, params, path, site), sessions


def _paths(arguments: argparse.Namespace) -> list[Path]:
    return sorted((arguments.folder / "pictures").glob("*.jpg"))[:64]


def _pixels(arguments: argparse.Namespace) -> list[Any]:
    from workers import images

    return [images.decode(path.read_bytes(), images.Limits()).pixels for path in _paths(arguments)[:32]]


def _item() -> Any:
    from workers.models import Item

    return Item("picture")


if __name__ == "__main__":
    main()
