"""A shard's manifest and a shard's outcomes, each as one Parquet object.

A manifest says what is to be done: key, uri, fingerprint, data, in the order of positions. A result object says what
came of it: one row an item, a result or a failure, with the provenance of all of them in the object's metadata.

A result that is a file, such as an image that was made, leaves its bytes as a blob. It is put as soon as it is made,
under the prefix of the attempt that made it, or at the latest with the object, beside it:

    <attempt's prefix>blobs/<sha256[:32]>.<format>
    <attempt's prefix><this try's>/items.parquet
    <attempt's prefix><this try's>/blobs/<sha256[:32]>.<format>

The name follows from the bytes, so that two tries of one attempt cannot put different bytes under one key. Results of
such a kind are `HasBlob`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
_AHEAD_BYTES = 32_000_000  # of blobs that are read before they are asked for

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


_manifest_row = functools.partial(tuple.__new__, ManifestRow)  # as ManifestRow._make, in a fifth of its time


@dataclass(slots=True)  # not frozen: of a million items, that would take more time than all else of this class
class Outcome:
    """What came of one item: a result of the job's kind, or the failure that stands in its place. Never changed.

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
    """A result whose bytes are a blob: a frozen dataclass with these fields.

    Attributes:
        data: the bytes, or None when they have been put, or have not been read.
        sha256: of the bytes, in hex.
        nbytes: how many they are.
        blob: the blob's key in the store, once it has been put; before that "blobs/..." beside the object to be.
    """

    @property
    def data(self) -> bytes | None: ...
    @property
    def sha256(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def blob(self) -> str: ...


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
    # By way of numpy, which takes a tenth of the time of to_pylist().
    columns = (table.column(name).to_numpy().tolist() for name in MANIFEST_SCHEMA.names)
    return list(map(_manifest_row, zip(*columns, strict=True)))


def write(
    store: Store, prefix: str, kind: str, outcomes: Sequence[Outcome], provenance: Mapping[str, Any], attempt: str = ""
) -> Written:
    """Put a shard's outcomes as one object, and before it the blobs that have not been put yet.

    Args:
        prefix: of this try of this attempt alone, so that no two ever write the same object.
        provenance: recipe, model, weights' sha256, runtime, precision, code version and the like; JSON values.
        attempt: the attempt's own prefix, under which `put_blob` has put the blobs of results without their bytes.

    Raises:
        ValueError: a result has no bytes, and its blob belongs to no such attempt, so that it may go away.
    """
    key = f"{prefix}{_OBJECT}"
    table = to_table(kind, outcomes, provenance)
    _put_blobs(store, key, outcomes, attempt)
    data = _to_bytes(table)
    store.put(key, data)
    return Written(key, hashlib.sha256(data).hexdigest(), len(data))


def read(store: Store, key: str, sha256: str | None = None) -> tuple[list[Outcome], dict[str, Any]]:
    """A shard's outcomes and their provenance. Results that are files come without their bytes, see `filled`.

    Raises:
        NotFound: there is no such object.
        Unavailable: its bytes are not those that were written (their sha256 differs), or no Parquet.
    """
    data = store.get(key)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise Unavailable(f"object {key!r} is not what was written: its sha256 differs from the index")
    return from_table(_from_bytes(data, key))


# ------------------------------------------------------------------------------------------------ blobs


def has_blob(result: Any) -> bool:
    """Whether a result is a file, so that its bytes lie in a blob."""
    return hasattr(result, "blob")


def blob_key(object_key: str, result: HasBlob) -> str:
    """The key of a result's blob, in the store of its Parquet object."""
    beside = result.blob.startswith(_BLOBS)
    return f"{object_key.rpartition('/')[0]}/{result.blob}" if beside else result.blob


def blob_folders(object_key: str) -> set[str]:
    """Where the blobs of an object may lie: beside it, and in the folder of its attempt, which is the one above."""
    folder = object_key.rpartition("/")[0]
    return {f"{folder}/{_BLOBS}", f"{folder.rpartition('/')[0]}/{_BLOBS}"}


def put_blob(store: Store, attempt: str, result: Any) -> Any:
    """Put a result's bytes under an attempt's own prefix; returns the result without them, naming the blob."""
    name = result.blob.rpartition("/")[2]
    kept = replace(result, data=None, blob=f"{attempt}{_BLOBS}{name}")
    store.put(kept.blob, result.data)
    return kept


def get_blob(store: Store, object_key: str, result: Any) -> Any:
    """A result of an object, with its bytes.

    Raises:
        NotFound: the blob is not there.
        Unavailable: it is not what was written, or the store does not answer.
    """
    name = blob_key(object_key, result)
    data = store.get(name)
    if hashlib.sha256(data).hexdigest() != result.sha256:
        raise Unavailable(f"blob {name!r} is not what was written: its sha256 differs from that in {object_key!r}")
    return replace(result, data=data)


def filled(store: Store, key: str, outcomes: Sequence[Outcome]) -> Iterator[Outcome]:
    """Outcomes of an object, those whose results are files with their bytes; some are read ahead, never all of them.

    Raises what `get_blob` does.
    """

    def load(outcome: Outcome) -> Outcome:
        return replace(outcome, result=get_blob(store, key, outcome.result)) if has_blob(outcome.result) else outcome

    waiting: deque[tuple[int, Future[Outcome]]] = deque()
    ahead = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for outcome in outcomes:
                nbytes = outcome.result.nbytes if has_blob(outcome.result) else 0  # type: ignore[union-attr]
                while waiting and (ahead + nbytes > _AHEAD_BYTES or len(waiting) > 2 * _THREADS):
                    size, first = waiting.popleft()
                    ahead -= size
                    yield first.result()
                waiting.append((nbytes, pool.submit(load, outcome)))
                ahead += nbytes
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()


def damaged_blobs(store: Store, key: str, outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """(key, "missing" or "changed") of each blob that is not what was written; every one is read.

    Args:
        key: of the Parquet object that `outcomes` were read from.
    """
    found = {blob_key(key, o.result): o.result.sha256 for o in outcomes if has_blob(o.result)}  # type: ignore[union-attr,arg-type]
    with ThreadPoolExecutor(_THREADS) as pool:
        states = pool.map(lambda name: _state(store, name, found[name]), found)
        return [(name, state) for name, state in zip(found, states, strict=True) if state]


def _state(store: Store, key: str, sha256: str) -> str:
    try:
        data = store.get(key)
    except NotFound:
        return "missing"
    return "" if hashlib.sha256(data).hexdigest() == sha256 else "changed"


def _put_blobs(store: Store, key: str, outcomes: Sequence[Outcome], attempt: str) -> None:
    """Put the blobs that are still in memory, several at once, and see that the others are this attempt's."""
    waiting: dict[str, bytes] = {}
    for result in (o.result for o in outcomes if has_blob(o.result)):
        name = blob_key(key, result)  # type: ignore[arg-type]
        if result.data is not None:  # type: ignore[union-attr]
            waiting[name] = result.data  # type: ignore[union-attr]
        elif not attempt or not name.startswith(f"{attempt}{_BLOBS}"):
            raise ValueError(f"expected the bytes of {name!r}, or a blob of this attempt; read it with get_blob")
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda name: store.put(name, waiting[name]), waiting):
            pass


# ------------------------------------------------------------------------------------------------ columns


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
    # Without dictionaries: few columns repeat themselves, and zstd sees to those; the files are smaller and take half
    # the time.
    pq.write_table(table, sink, compression="zstd", compression_level=1, use_dictionary=False)
    return sink.getvalue()


def columns_of(data: bytes, names: Sequence[str] | None = None) -> pa.Table:
    """Columns of a Parquet file in memory, all of them by default. Raises what pyarrow does, and OSError.

    Read in the calling thread: with Arrow's own threads, as `read_table` uses them, a process that ends right after may
    be aborted by them ("terminate called without an active exception", pyarrow 26).
    """
    return pq.ParquetFile(pa.BufferReader(data)).read(columns=names, use_threads=False)


def _from_bytes(data: bytes, key: str) -> pa.Table:
    try:
        return columns_of(data)
    except (pa.ArrowException, OSError) as error:
        raise Unavailable(f"object {key!r} is no Parquet file: {error}") from None
