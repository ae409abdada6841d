"""The spec survives JSON, and the digest names exactly what makes a result what it is."""

from __future__ import annotations

import dataclasses
import json
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.spec import JobSpec
from storage.errors import BadInput
from tests.support import spec

RECIPE = {
    "dataset": "/other",
    "kind": "masks",
    "family": "sam",
    "weights_sha256": "ab",
    "params": {"conf": 0.5},
}
REST = {
    "model": "other",
    "weights": "weights/x.pt",
    "labels": ("cat", "dog"),
    "runtime": "onnx",
    "precision": "fp16",
    "batch": 64,
    "shard_size": 9,
    "queue": "gpu",
    "schema_version": 7,
}

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def test_every_field_is_tried_here() -> None:
    assert {f.name for f in dataclasses.fields(JobSpec)} == {*RECIPE, *REST}


@pytest.mark.parametrize("name", RECIPE)
def test_digest_changes_with_the_recipe(name: str) -> None:
    assert spec(**{name: RECIPE[name]}).digest != spec().digest


@pytest.mark.parametrize("name", REST)
def test_digest_does_not_change_with_how_it_is_computed(name: str) -> None:
    assert spec(**{name: REST[name]}).digest == spec().digest


@pytest.mark.parametrize("name", [*RECIPE, "runtime", "precision"])
def test_model_key_names_what_is_loaded(name: str) -> None:
    changed = spec(**{name: {**RECIPE, **REST}[name]}).model_key
    assert (changed == spec().model_key) == (name == "dataset")


def test_digest_is_pinned() -> None:
    # Changing how a recipe is named would make every stored result stale.
    assert spec().digest == "34666220c5afbe2012336a88347152ad5e6cddca11e0091cd417a132a7ddfbb2"


@given(st.dictionaries(st.text(), values, max_size=5))
def test_round_trip_through_json_keeps_spec_and_digest(params: dict[str, Any]) -> None:
    given_spec = spec(params=params, labels=("a", "b"))
    back = JobSpec.from_json(json.loads(json.dumps(given_spec.to_json())))
    assert back == given_spec
    assert back.digest == given_spec.digest


def test_digest_does_not_depend_on_order_or_on_the_kind_of_mapping() -> None:
    assert spec(params={"a": 1, "b": 2}).digest == spec(params={"b": 2, "a": 1}).digest
    frozen = spec(params=MappingProxyType({"a": 1}))
    assert frozen.digest == spec(params={"a": 1}).digest
    assert JobSpec.from_json(frozen.to_json()).digest == frozen.digest


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parameter_that_json_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(BadInput, match="finite"):
        _ = spec(params={"conf": value}).digest


def test_fields_of_a_newer_version_are_left_out() -> None:
    newer = {**spec().to_json(), "schema_version": 99, "sharpness": 3}
    assert JobSpec.from_json(newer).schema_version == 99


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().batch = 3  # type: ignore[misc]
