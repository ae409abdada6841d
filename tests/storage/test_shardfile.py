"""A shard's outcomes survive Parquet, with their provenance; damaged objects are told from good ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import objects, shardfile
from storage.errors import BadInput, ItemFailed, NotFound, Unavailable
from storage.objects import Store
from storage.results import detections
from storage.shardfile import Outcome
from tests.support import outcome, result

MANIFESTS: list[list[shardfile.ManifestRow]] = [
    [],
    [shardfile.ManifestRow("a.jpg", "file:///a.jpg", "mtime:1+2")],
    [shardfile.ManifestRow(f"日本/🐕 {i}\n.jpg", f"s3://b/%20{i}", "", '{"n": 1}') for i in range(3000)],
]


@pytest.fixture
def store(store_url: str) -> Store:
    """An empty store."""
    return objects.open_store(store_url)


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    """An empty store in a folder."""
    return objects.open_store((tmp_path / "store").as_uri())


def many() -> list[Outcome]:
    """Results, empty results, failures, and text from everywhere."""
    failure = ItemFailed("infer", "out-of-memory", "naïve 日本\n🐕\0", retry=True)
    return [
        outcome(0, "ä/日本/🐕.jpg", result=result(0.9, 0.1, label="chien’s “日本”")),
        outcome(1, "empty.jpg", result=detections.empty()),
        outcome(2, "failed.jpg", failed=True),
        outcome(3, "", result=None, failure=failure, uri="", fingerprint="", width=1, height=2),
        outcome(4, "last.jpg", result=result(*np.linspace(1, 0, 300))),
    ]


def same(left: Outcome, right: Outcome) -> None:
    names = ("position", "key", "uri", "fingerprint", "width", "height")
    assert [getattr(left, n) for n in names] == [getattr(right, n) for n in names]
    if left.failure is not None:
        assert right.failure is not None
        names = ("stage", "reason", "message", "retry")
        assert [getattr(left.failure, n) for n in names] == [getattr(right.failure, n) for n in names]
        return
    assert right.failure is None
    for name in ("boxes_xyxy", "scores", "class_ids", "labels"):
        np.testing.assert_array_equal(getattr(left.result, name), getattr(right.result, name))


@pytest.mark.parametrize("rows", MANIFESTS, ids=["empty", "one", "unicode"])
def test_manifest_round_trip(store: Store, rows: list[shardfile.ManifestRow]) -> None:
    shardfile.write_manifest(store, "jobs/1/m.parquet", rows)
    assert shardfile.read_manifest(store, "jobs/1/m.parquet") == rows


def test_round_trip(store: Store) -> None:
    provenance = {"recipe": "ab", "model": "naïve", "seed": 3, "nested": {"a": [1, None]}}
    written = shardfile.write(store, "jobs/1/2/a1-x/", "detections", many(), provenance)
    data = store.get(written.key)
    assert written == shardfile.Written("jobs/1/2/a1-x/items.parquet", hashlib.sha256(data).hexdigest(), len(data))
    back, told = shardfile.read(store, written.key, written.sha256)
    assert told == {**provenance, "kind": "detections"}
    assert len(back) == 5
    for left, right in zip(many(), back, strict=True):
        same(left, right)


@pytest.mark.parametrize("chosen", [[], [0], [1], [2], [2, 3], [1, 1, 2]])
def test_any_mixture(folder: Store, chosen: list[int]) -> None:
    outcomes = [many()[i] for i in chosen]
    written = shardfile.write(folder, "p/", "detections", outcomes, {})
    back, _ = shardfile.read(folder, written.key)
    assert len(back) == len(outcomes)
    for left, right in zip(outcomes, back, strict=True):
        same(left, right)


def test_the_object_is_parquet_that_anyone_can_read(folder: Store, tmp_path: Path) -> None:
    shardfile.write(folder, "p/", "detections", many(), {"recipe": "ab"})
    table = pq.read_table(tmp_path / "store" / "p" / "items.parquet")
    assert table.column("key").to_pylist()[1:3] == ["empty.jpg", "failed.jpg"]
    assert table.column("scores").to_pylist()[1:3] == [[], None]
    assert table.column("ok").to_pylist() == [True, True, False, False, True]
    assert b'"recipe": "ab"' in table.schema.metadata[b"imagemill"]


def test_provenance_cannot_change_the_kind(folder: Store) -> None:
    written = shardfile.write(folder, "p/", "detections", many(), {"kind": "masks"})
    assert shardfile.read(folder, written.key)[1]["kind"] == "detections"


def test_bytes_that_changed_are_noticed(folder: Store) -> None:
    written = shardfile.write(folder, "p/", "detections", many(), {})
    data = bytearray(folder.get(written.key))
    data[100] ^= 1
    folder.put(written.key, bytes(data))
    with pytest.raises(Unavailable, match="its sha256 differs"):
        shardfile.read(folder, written.key, written.sha256)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_objects_are_no_parquet(folder: Store, share: float) -> None:
    written = shardfile.write(folder, "p/", "detections", many(), {})
    shardfile.write_manifest(folder, "m", MANIFESTS[2])
    for key, read in ((written.key, shardfile.read), ("m", shardfile.read_manifest)):
        data = folder.get(key)
        folder.put(key, data[: int(len(data) * share)])
        with pytest.raises(Unavailable, match="no Parquet file") as caught:
            read(folder, key)
        assert "\n" not in str(caught.value)


def test_missing_objects(store: Store) -> None:
    with pytest.raises(NotFound):
        shardfile.read(store, "p/items.parquet")
    with pytest.raises(NotFound):
        shardfile.read_manifest(store, "m")


def test_parquet_of_a_stranger(folder: Store, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "store" / "x.parquet")
    with pytest.raises(BadInput, match="unknown result kind"):
        shardfile.read(folder, "x.parquet")
    with pytest.raises(Unavailable, match="no manifest"):
        shardfile.read_manifest(folder, "x.parquet")


def test_two_attempts_share_no_key(folder: Store) -> None:
    keys = {shardfile.write(folder, f"j/a{n}/", "detections", many(), {}).key for n in range(3)}
    assert len(keys) == 3


@pytest.mark.parametrize("changes", [{"result": None}, {"failure": ItemFailed("a", "b", "c")}])
def test_an_outcome_is_a_result_or_a_failure(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        outcome(0, "a", **changes)


def test_failures_are_one_line_that_can_be_stored() -> None:
    failure = ItemFailed("a", "b", "one\n two \0\ud800" + "x" * 5000)
    assert failure.message.startswith("one two ?xxx")
    assert len(failure.message) == 1000
    assert str(failure) == failure.message
