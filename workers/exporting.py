"""Exports a model's networks to ONNX, in a child process wherever this one may compute meanwhile.

While torch exports a module it replaces the call of every module in the process, so that a model that computes in
another thread meanwhile fails. A child loads the model again, on the CPU, and has the process to itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    import torch

    asked = {
        "spec": spec.to_json(),
        "weights": str(weights) if weights else "",
        "network": network.name,
        "precision": precision,
        "path": str(path),
        "threads": torch.get_num_threads(),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CODE],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = one_line(str(error), 300)
        raise NotRunnable(f"the network {network.name} was not exported to ONNX: {reason}") from error
    if done.returncode == 0:
        return
    said = done.stdout.strip().rpartition("\n")[2]
    if not said.startswith(_SAYS):
        said = f"the network {network.name} was not exported to ONNX: exit {done.returncode}, {done.stderr[-300:]}"
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
    try:
        _export(asked)
    except ImagemillError as error:
        print(f"\n{_SAYS}{one_line(str(error))}", flush=True)
        os._exit(1)
    os._exit(0)  # taking torch apart takes two seconds more


def _export(asked: dict[str, Any]) -> None:
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
    model = family.load(card, card.params(**spec.params), weights, Site("cpu", open_network))
    model.close()
    if asked["network"] not in found:
        raise NotRunnable(f"the model has no network {asked['network']!r}; it has: {', '.join(found)}")
    onnxgraph.export(found[asked["network"]], asked["precision"], Path(asked["path"]))
