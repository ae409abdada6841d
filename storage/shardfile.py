"""A shard's manifest and a shard's outcomes, each as one Parquet object.

A manifest says what is to be done: key, uri, fingerprint, data, in the order of positions. A result object says what
came of it: one row an item, a result or a failure, with the provenance of all of them in the object's metadata.

A result that is a file, such as an image that was made, leaves its bytes as a blob beside the object:

    <attempt's prefix>items.parquet
    <attempt's prefix>blobs/<sha256[:32]>.<format>

A kind of such results defines with_data(result, data) -> result, and its results are `HasBlob`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from storage import results
from storage.errors import ItemFailed, NotFound, Unavailable
from storage.objects import Store

_METADATA_KEY = b"imagemill"
_OBJECT = "items.parquet"
_BLOBS = "blobs/"
_THREADS = 8  # blobs under way at once

MANIFEST_SCHEMA = pa.schema([pa.field(name, pa.string()) for name in ("key", "uri", "fingerprint", "data")])

ITEM_SCHEMA = pa.schema(
    [
        pa.field("position", pa.int32()),
        pa.field("key", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("fingerprint", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("ok", pa.bool_()),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("retry", pa.bool_()),
    ]
)


class ManifestRow(NamedTuple):
    """One item to be done: jobs.sources.ImageRef, as it is stored."""

    key: str
    uri: str
    fingerprint: str
    data: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one item: a result of the job's kind, or the failure that stands in its place.

    Attributes:
        position: its place in the shard's manifest, from 0.
        width, height: pixels of the upright original, None when it was never decoded.
        result: a storage.results.<kind>.Result, or None when it failed.
        failure: the reason, or None when there is a result.
    """

    position: int
    key: str
    uri: str
    fingerprint: str
    width: int | None
    height: int | None
    result: Any | None
    failure: ItemFailed | None

    def __post_init__(self) -> None:
        if (self.result is None) == (self.failure is None):
            raise ValueError(f"item {self.key!r}: expected a result or a failure, exactly one of them")


class HasBlob(Protocol):
    """A result whose bytes lie beside the Parquet object.

    Attributes:
        data: the bytes, or None when they have not been read.
        sha256: of the bytes, in hex.
        blob_name: "blobs/..." relative to the object's folder; follows from the bytes.
    """

    @property
    def data(self) -> bytes | None: ...
    @property
    def sha256(self) -> str: ...
    @property
    def blob_name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Written:
    """Where a result object was put, and what its bytes were."""

    key: str
    sha256: str
    nbytes: int


def write_manifest(store: Store, key: str, rows: Sequence[ManifestRow]) -> None:
    """Put the list of a shard's items."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(MANIFEST_SCHEMA)
    table = pa.table([pa.array(c, pa.string()) for c in columns], schema=MANIFEST_SCHEMA)
    store.put(key, _to_bytes(table))


def read_manifest(store: Store, key: str) -> list[ManifestRow]:
    """The items of a shard, in the order of their positions."""
    table = _from_bytes(store.get(key), key)
    if table.schema.names != MANIFEST_SCHEMA.names:
        raise Unavailable(f"object {key!r} is no manifest: it has the columns {', '.join(table.schema.names)[:200]}")
    columns = (table.column(name).to_pylist() for name in MANIFEST_SCHEMA.names)
    return [ManifestRow(*row) for row in zip(*columns, strict=True)]


def write(store: Store, prefix: str, kind: str, outcomes: Sequence[Outcome], provenance: Mapping[str, Any]) -> Written:
    """Put a shard's outcomes as one object under an attempt's own prefix, and before it the blobs it names.

    Args:
        prefix: of this attempt alone, so that no two attempts ever write the same key.
        provenance: recipe, model, weights' sha256, runtime, precision, code version and the like; JSON values.
    """
    table = to_table(kind, outcomes, provenance)
    data = _to_bytes(table)
    key = f"{prefix}{_OBJECT}"
    _put_blobs(store, key, outcomes)
    store.put(key, data)
    return Written(key, hashlib.sha256(data).hexdigest(), len(data))


def read(
    store: Store, key: str, sha256: str | None = None, *, blobs: bool = False
) -> tuple[list[Outcome], dict[str, Any]]:
    """A shard's outcomes and their provenance.

    Args:
        blobs: read the bytes of results that are files too, all of the shard's into memory.

    Raises:
        NotFound: there is no such object, or with `blobs` one of its blobs is missing.
        Unavailable: its bytes are not those that were written (their sha256 differs), or no Parquet.
    """
    data = store.get(key)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise Unavailable(f"object {key!r} is not what was written: its sha256 differs from the index")
    outcomes, provenance = from_table(_from_bytes(data, key))
    fill = _fill(provenance["kind"])
    return (_filled(store, key, outcomes, fill) if blobs and fill is not None else outcomes), provenance


def blob_key(object_key: str, result: HasBlob) -> str:
    """The key of a result's blob, in the store of its Parquet object."""
    return folder_of(object_key) + result.blob_name


def folder_of(key: str) -> str:
    """What a Parquet object and its blobs have in common: their folder, with a closing slash."""
    return f"{key.rpartition('/')[0]}/".removesuffix(_BLOBS)


def damaged_blobs(store: Store, key: str, outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """(key, "missing" or "changed") of each blob that is not what was written; every one is read.

    Args:
        key: of the Parquet object that `outcomes` were read from.
    """
    found = {blob_key(key, result): result for result in _with_blobs(outcomes)}
    with ThreadPoolExecutor(_THREADS) as pool:
        states = pool.map(lambda name: _state(store, name, found[name].sha256), found)
        return [(name, state) for name, state in zip(found, states, strict=True) if state]


def _state(store: Store, key: str, sha256: str) -> str:
    try:
        data = store.get(key)
    except NotFound:
        return "missing"
    return "" if hashlib.sha256(data).hexdigest() == sha256 else "changed"


def _fill(kind: str) -> Callable[[Any, bytes], Any] | None:
    """What puts the bytes into a result of the kind, or None for a kind without blobs."""
    return getattr(results.get(kind), "with_data", None)


def _with_blobs(outcomes: Sequence[Outcome]) -> list[HasBlob]:
    return [o.result for o in outcomes if hasattr(o.result, "blob_name")]  # type: ignore[misc]


def _put_blobs(store: Store, key: str, outcomes: Sequence[Outcome]) -> None:
    """Put the blobs of an object, several at once. They are in memory as part of the results already."""
    found = {blob_key(key, result): result.data for result in _with_blobs(outcomes)}
    for name, data in found.items():
        if data is None:
            raise ValueError(f"expected the bytes of {name!r}, but the result came without them; read it with blobs")
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda name: store.put(name, found[name]), found):  # type: ignore[arg-type]
            pass


def _filled(store: Store, key: str, outcomes: Sequence[Outcome], fill: Callable[[Any, bytes], Any]) -> list[Outcome]:
    def load(outcome: Outcome) -> Outcome:
        if outcome.result is None:
            return outcome
        name = blob_key(key, outcome.result)
        data = store.get(name)
        if hashlib.sha256(data).hexdigest() != outcome.result.sha256:
            raise Unavailable(f"blob {name!r} is not what was written: its sha256 differs from that in {key!r}")
        return replace(outcome, result=fill(outcome.result, data))

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(load, outcomes))


def to_table(kind: str, outcomes: Sequence[Outcome], provenance: Mapping[str, Any]) -> pa.Table:
    """Outcomes as columns: what every kind has, then the kind's own."""
    module = results.get(kind)
    failures = [o.failure for o in outcomes]
    common = {
        "position": [o.position for o in outcomes],
        "key": [o.key for o in outcomes],
        "uri": [o.uri for o in outcomes],
        "fingerprint": [o.fingerprint for o in outcomes],
        "width": [o.width for o in outcomes],
        "height": [o.height for o in outcomes],
        "ok": [f is None for f in failures],
        "stage": [f and f.stage for f in failures],
        "reason": [f and f.reason for f in failures],
        "message": [f and f.message for f in failures],
        "retry": [f and f.retry for f in failures],
    }
    arrays = [pa.array(common[field.name], field.type) for field in ITEM_SCHEMA]
    own = module.columns([o.result for o in outcomes])
    metadata = {_METADATA_KEY: json.dumps({**provenance, "kind": kind}, sort_keys=True).encode()}
    schema = pa.schema([*ITEM_SCHEMA, *module.SCHEMA], metadata=metadata)
    return pa.table([*arrays, *(own[field.name] for field in module.SCHEMA)], schema=schema)


def from_table(table: pa.Table) -> tuple[list[Outcome], dict[str, Any]]:
    """The inverse of `to_table`."""
    provenance: dict[str, Any] = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
    found = results.get(provenance.get("kind", "")).results(table)
    rows = table.select(ITEM_SCHEMA.names).to_pylist()
    return [_outcome(row, result) for row, result in zip(rows, found, strict=True)], provenance


def _outcome(row: dict[str, Any], result: Any | None) -> Outcome:
    failed = None
    if not row["ok"]:
        result = None
        failed = ItemFailed(row["stage"], row["reason"], row["message"], retry=row["retry"])
    return Outcome(
        row["position"], row["key"], row["uri"], row["fingerprint"], row["width"], row["height"], result, failed
    )


def _to_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=1)
    return sink.getvalue()


def _from_bytes(data: bytes, key: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise Unavailable(f"object {key!r} is no Parquet file: {error}") from None
