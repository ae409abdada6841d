"""Where a label comes from: what is written beside every shard's results."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jobs.leases import Claim

_LIBRARIES = ("torch", "torchvision", "ultralytics-opencv-headless", "onnxruntime")


def of(claim: Claim, runtime: str, batch: int, device: str, decoder: str, worker_id: str) -> dict[str, Any]:
    """Everything needed to compute these results again, as JSON values.

    Args:
        runtime: in which the networks ran; not always the one that was asked for.
        decoder: of JPEGs, "host" or "nvjpeg", whose pixels differ by some grey levels.
    """
    spec = claim.spec
    return {
        "recipe": claim.digest,
        "dataset": spec.dataset,
        "model": spec.model,
        "family": spec.family,
        "weights_sha256": spec.weights_sha256,
        "params": dict(spec.params),
        "labels": list(spec.labels),
        "runtime": runtime,
        "precision": spec.precision,
        "batch": batch,
        "job": claim.job_id,
        "shard": claim.shard_id,
        "fence": claim.fence,
        "worker": worker_id,
        "device": device,
        "decoder": decoder,
        **versions(),
    }


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """The versions that may change a result in its last digits."""
    found = {"imagemill": version("imagemill"), "python": sys.version.split()[0]}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
