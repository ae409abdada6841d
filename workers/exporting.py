"""Exports a model's networks to ONNX, or compiles them, in a child process wherever this one may compute meanwhile.

While torch exports a module it replaces the call of every module in the process, so that a model that computes in
another thread meanwhile fails. A child loads the model again, on the CPU, and has the process to itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import processes
from jobs.spec import JobSpec
from storage.errors import ImagemillError, one_line
from workers import models, onnxgraph
from workers.models import Site
from workers.runtimes import Network, NotRunnable, Session

_CODE = "from workers import exporting; exporting.main()"
_TIMEOUT_S = 1800
_SAYS = "imagemill: "  # begins the child's last line, which is for the parent


def export(spec: JobSpec, weights: Path | None, network: Network, precision: str, path: Path) -> None:
    """Write one of a model's networks to an ONNX file, compared with torch.

    Args:
        weights: local file or folder of the spec's weights.
        network: found again in the child by its name.

    Raises:
        NotRunnable: it cannot be exported, or the file does not compute what torch does.
    """
    _in_child(spec, weights, network, {"to": "onnx", "precision": precision, "path": str(path)})


def compile(spec: JobSpec, weights: Path | None, network: Network, device: str, precision: str, path: Path) -> None:
    """Compile one of a model's networks, as workers.runtimes.inductor does, for a device that the child has too.

    Raises:
        NotRunnable: it cannot be compiled, or does not compute then what torch does.
    """
    made = {"to": "inductor", "device": device, "precision": precision, "path": str(path)}
    _in_child(spec, weights, network, made)


def _in_child(spec: JobSpec, weights: Path | None, network: Network, made: Mapping[str, str]) -> None:
    """Have a child make a file.

    Args:
        made: "to": "onnx" or "inductor", and what the file depends on besides the network.
    """
    import torch

    asked = {
        **made,
        "spec": spec.to_json(),
        "weights": str(weights) if weights else "",
        "network": network.name,
        "for": network.device,
        "threads": torch.get_num_threads(),
        "parent": os.getpid(),
    }
    # An export needs no GPU, whose memory the child would take a part of.
    hidden = {} if made.get("device", "cpu") != "cpu" else {"CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CODE],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **hidden},
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = one_line(str(error), 300)
        raise NotRunnable(f"the network {network.name} was not brought to {made['to']}: {reason}") from error
    if done.returncode == 0:
        return
    said = done.stdout.strip().rpartition("\n")[2]
    if not said.startswith(_SAYS):
        said = (
            f"the network {network.name} was not brought to {made['to']}: exit {done.returncode}, {done.stderr[-300:]}"
        )
    raise NotRunnable(one_line(said.removeprefix(_SAYS), 500))


def export_alone(spec: JobSpec, weights: Path | None, network: Network, precision: str, path: Path) -> None:
    """As `export`, in this process, which computes nothing else meanwhile; what takes long is left to a child.

    A child takes the most of its time for importing torch and the model's library.
    """
    try:
        onnxgraph.trace(network, precision, path)
    except NotRunnable:
        export(spec, weights, network, precision, path)


def main() -> None:
    """The child: reads what is asked from its standard input; exit status 0, or 1 with a last line that says why."""
    asked: dict[str, Any] = json.loads(sys.stdin.read())
    processes.end_with_parent(signal.SIGKILL, asked["parent"])  # nobody would take what is made
    try:
        _make(asked)
    except ImagemillError as error:
        print(f"\n{_SAYS}{one_line(str(error))}", flush=True)
        os._exit(1)
    os._exit(0)  # taking torch apart takes two seconds more


def _make(asked: dict[str, Any]) -> None:
    import torch

    from workers import runtimes

    torch.set_num_threads(asked["threads"])
    spec = JobSpec.from_json(asked["spec"])
    found: dict[str, Network] = {}

    def open_network(network: Network) -> Session:
        found[network.name] = network
        session: Session = runtimes.get("torch").open(network, "cpu", "fp32")
        return session

    family = models.family(spec.family)
    card = models.card_for(spec.model, spec.family, spec.kind, spec.weights_sha256)
    weights = Path(asked["weights"]) if asked["weights"] else None
    model = family.load(card, card.params(**spec.params), weights, Site(asked["for"], open_network))
    model.close()
    if asked["network"] not in found:
        raise NotRunnable(f"the model has no network {asked['network']!r}; it has: {', '.join(found)}")
    network, path = found[asked["network"]], Path(asked["path"])
    if asked["to"] == "onnx":
        onnxgraph.export(network, asked["precision"], path)
    else:
        runtimes.get(asked["to"]).compile(network, asked["device"], asked["precision"], path)
