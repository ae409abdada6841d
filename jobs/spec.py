"""What was asked: the JobSpec, and the recipe digest that names what makes a result what it is. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.errors import BadInput

AUTO = "auto"
SCHEMA_VERSION = 1  # of the stored spec; a worker leaves newer ones to newer workers


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """A resolved request: it can be run again in a year. A plain JSON value.

    What makes a result what it is, and so the recipe:

    Attributes:
        dataset: canonical URI.
        kind: a result kind, such as "detections".
        family: a file of workers/models.
        weights_sha256: of the weights file, "" for a family without weights.
        params: every parameter of the model, defaults filled in.

    How it is computed and shown, which a result does not depend on:

    Attributes:
        model: the name the user gave, for people.
        weights: key of the weights in the object store, "" for none.
        labels: the model's class names, in the order of its class ids.
        runtime, precision, batch: such as "torch", "fp32", and images in one forward pass; where they
            are AUTO, AUTO and 0, the worker chooses.
        shard_size: items in a shard.
        queue: which workers may run it, by capability.
    """

    dataset: str
    kind: str
    family: str
    weights_sha256: str
    params: Mapping[str, Any]
    model: str
    weights: str = ""
    labels: tuple[str, ...] = ()
    runtime: str = "torch"
    precision: str = "fp32"
    batch: int = 8
    shard_size: int = 256
    queue: str = "cpu"
    schema_version: int = SCHEMA_VERSION

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields that make a result what it is."""
        return {
            "dataset": self.dataset,
            "kind": self.kind,
            "family": self.family,
            "weights_sha256": self.weights_sha256,
            "params": dict(self.params),
        }

    @property
    def digest(self) -> str:
        """Names the recipe: sha256 of its canonical JSON."""
        return hashlib.sha256(_canonical(self.recipe)).hexdigest()

    @property
    def model_key(self) -> str:
        """Names the loaded model, so that a worker which holds it can prefer this job. The dataset plays no part."""
        loaded = {**self.recipe, "dataset": "", "runtime": self.runtime, "precision": self.precision}
        return hashlib.sha256(_canonical(loaded)).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """A value that JSON can hold."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**plain, "labels": list(self.labels), "params": dict(self.params)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> JobSpec:
        """The inverse of `to_json`; fields of a newer version are left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        given = {k: v for k, v in value.items() if k in known}
        return cls(**{**given, "labels": tuple(given.get("labels", ()))})


def _canonical(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        raise BadInput("a parameter is infinite or no number; give a finite one") from None
