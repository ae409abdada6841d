"""A shard's outcomes survive Parquet, with their provenance; damaged objects are told from good ones."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import objects, shardfile
from storage.errors import BadInput, ItemFailed, NotFound, Unavailable
from storage.objects import Store
from storage.results import detections, image
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


def generated(n: int = 20) -> list[Outcome]:
    """Made images, two of them alike, and a failure between them."""
    contents = [b"0" if i == 3 else str(i).encode() * (i + 1) for i in range(n)]
    made = [image.made(data, "webp", 8, 9, {"seed": i, "prompt": "ein Bär"}) for i, data in enumerate(contents)]
    found = [outcome(i, f"{i}", result=result) for i, result in enumerate(made)]
    return [*found, outcome(n, "failed", failed=True)]


def test_blobs_lie_beside_their_object(store: Store) -> None:
    written = shardfile.write(store, "jobs/1/2/a1-x/", "image", generated(), {})
    blobs = {stat.key: stat.size for stat in store.list("jobs/1/2/a1-x/") if stat.key != written.key}
    assert len(blobs) == 19, "equal bytes are one blob"
    plain, _ = shardfile.read(store, written.key, written.sha256)
    full = list(shardfile.filled(store, written.key, plain))
    assert plain == full[:-1] + plain[-1:], "results without bytes compare equal to those with"
    assert [o.result.data for o in plain[:-1]] == [None] * 20
    for wanted, found in zip(generated()[:-1], full[:-1], strict=True):
        key = shardfile.blob_key(written.key, found.result)
        assert store.get(key) == found.result.data == wanted.result.data
        assert (found.result, blobs[key]) == (wanted.result, wanted.result.nbytes)
    assert shardfile.damaged_blobs(store, written.key, plain) == []
    store.delete([next(iter(blobs))])
    with pytest.raises(NotFound):
        list(shardfile.filled(store, written.key, plain))


def test_blobs_are_there_before_the_object(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sees the object sees all of its blobs."""
    order: list[str] = []
    put = folder.put
    monkeypatch.setattr(folder, "put", lambda key, data: (put(key, data), order.append(key)))
    written = shardfile.write(folder, "p/", "image", generated(), {})
    assert (order[-1], len(order)) == (written.key, 20)


def test_a_blob_that_cannot_be_put_leaves_no_object(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put = folder.put

    def failing(key: str, data: bytes) -> None:
        if data == b"22":
            raise Unavailable("gone")
        put(key, data)

    found = generated()
    found[1] = outcome(1, "1", result=image.made(b"22", "png", 1, 1, {}))
    monkeypatch.setattr(folder, "put", failing)
    with pytest.raises(Unavailable, match="gone"):
        shardfile.write(folder, "p/", "image", found, {})
    assert folder.stat("p/items.parquet") is None


def test_results_without_their_bytes_are_not_written(folder: Store) -> None:
    written = shardfile.write(folder, "p/", "image", generated(), {})
    plain, _ = shardfile.read(folder, written.key)
    with pytest.raises(ValueError, match="read it with get_blob"):
        shardfile.write(folder, "q/", "image", plain, {})
    assert not list(folder.list("q/"))


def test_blobs_that_were_put_before_are_named(folder: Store) -> None:
    """Those of the attempt itself only: another's may be taken away."""
    attempt = "jobs/1/0000002/a1-x/"
    early = [replace(o, result=o.result and shardfile.put_blob(folder, attempt, o.result)) for o in generated()]
    assert [o.result.data for o in early[:-1]] == [None] * 20
    late = generated()[:5] + early[5:]
    written = shardfile.write(folder, f"{attempt}try/", "image", late, {}, attempt)
    plain, _ = shardfile.read(folder, written.key, written.sha256)
    keys = [shardfile.blob_key(written.key, o.result) for o in plain[:-1]]
    assert {key.rpartition("/")[0] for key in keys[:5]} == {f"{attempt}try/blobs"}
    assert {key.rpartition("/")[0] for key in keys[5:]} == {f"{attempt}blobs"}
    assert {f"{key.rpartition('/')[0]}/" for key in keys} == shardfile.blob_folders(written.key)
    assert [o.result.data for o in shardfile.filled(folder, written.key, plain) if o.result] == [
        o.result.data for o in generated()[:-1]
    ]
    for other in ("jobs/1/0000002/a2-y/", "jobs/1/0000002/a1-", ""):
        with pytest.raises(ValueError, match="a blob of this attempt"):
            shardfile.write(folder, "jobs/1/0000002/a2-y/try/", "image", plain, {}, other)
    assert not list(folder.list("jobs/1/0000002/a2-y/"))


def test_reading_ahead_is_bounded_in_bytes(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes slowly through a shard's files does not find all of them in memory."""
    made = [outcome(i, f"{i}", result=image.made(bytes([i]) * 1000, "png", 8, 8, {})) for i in range(100)]
    written = shardfile.write(folder, "p/", "image", made, {})
    plain, _ = shardfile.read(folder, written.key)
    monkeypatch.setattr(shardfile, "_AHEAD_BYTES", 5000)
    got: list[str] = []
    get = folder.get
    monkeypatch.setattr(folder, "get", lambda key: (got.append(key), get(key))[1])
    for number, full in enumerate(shardfile.filled(folder, written.key, plain)):
        assert full.result.data == bytes([number]) * 1000
        assert len(got) <= number + 1 + 6
    assert len(got) == 100


def test_blobs_that_changed_are_noticed(folder: Store) -> None:
    written = shardfile.write(folder, "p/", "image", generated(), {})
    outcomes, _ = shardfile.read(folder, written.key)
    gone, changed = (shardfile.blob_key(written.key, outcomes[i].result) for i in (4, 5))
    folder.delete([gone])
    folder.put(changed, b"other")
    assert shardfile.damaged_blobs(folder, written.key, outcomes) == [(gone, "missing"), (changed, "changed")]
    folder.put(gone, folder.get(shardfile.blob_key(written.key, outcomes[6].result)))
    with pytest.raises(Unavailable, match="is not what was written"):
        list(shardfile.filled(folder, written.key, outcomes))


@pytest.mark.parametrize(
    "changes",
    [{"format": "gif"}, {"sha256": "ab"}, {"width": 0}, {"nbytes": 0}, {"data": b"four"}],
)
def test_an_image_is_described_truly(changes: dict[str, Any]) -> None:
    values = {"data": b"three", "sha256": "0" * 64, "nbytes": 5, "format": "png", "width": 1, "height": 1, "meta": {}}
    image.Result(**values)
    with pytest.raises(ValueError):
        image.Result(**{**values, **changes})
    with pytest.raises(ValueError):
        image.made(b"x", "png", 1, 1, {"score": float("nan")})


def test_no_thread_of_arrows_is_left_behind(folder: Store) -> None:
    """A process that ends right after it has read would be aborted by one, every thirtieth time on a busy machine."""
    written = shardfile.write(folder, "jobs/1/", "detections", many(), {})
    code = (
        "import sys, psutil; from storage import shardfile, vectors;"
        "data = open(sys.argv[1], 'rb').read(); before = psutil.Process().num_threads();"
        "shardfile.from_table(shardfile.columns_of(data)); print(psutil.Process().num_threads() - before)"
    )
    path = Path(folder.url.removeprefix("file://")) / written.key
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "0"
