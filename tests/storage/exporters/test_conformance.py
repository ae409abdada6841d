"""Every export format keeps the same promises: each current key once, no label lost, nothing half-made."""

from __future__ import annotations

import csv
import json
import pathlib
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from storage import exporters, index, objects, results, settings
from storage.errors import BadInput, NotFound, StoreFull, Unavailable
from storage.exporters import Report
from storage.objects import Store, open_store
from storage.shardfile import Outcome
from storage.staging import Output
from tests.storage.exporters.support import (
    LABELS,
    Mill,
    detected,
    detection,
    download,
    failed,
    found,
    masked,
    mixed,
    moved,
    provenance,
    shards,
)

# Formats of other kinds than boxes have tests of their own.
FORMATS = [name for name in exporters.names() if "detections" in exporters.get(name).KINDS]
OPTIONS = {"yolo": {"images": "none"}}  # what a format needs where there are no pictures


def of(kind: str) -> Callable[[int], Any]:
    """Results as the suite of the kinds makes them."""
    from tests.storage.results.test_conformance import example

    return lambda seed: example(kind, 1 + seed % 3)


SAMPLES: dict[str, Callable[[int], Any]] = {
    "detections": detected,
    "masks": masked,
    "embedding": of("embedding"),
    "labels": of("labels"),
}


@dataclass
class Read:
    """What a reader gets back: the keys with a result, those without, (key, label) of every object, provenance."""

    keys: list[str]
    failures: list[str]
    labels: list[tuple[str, str]]
    provenance: dict[str, Any]


def read_coco(folder: Path) -> Read:
    data = json.loads((folder / "annotations.json").read_text())
    names = {c["id"]: c["name"] for c in data["categories"]}
    keys = {image["id"]: image["file_name"] for image in data["images"]}
    labels = [(keys[a["image_id"]], names[a["category_id"]]) for a in data["annotations"]]
    failures = [f["key"] for f in data["imagemill_failures"]]
    return Read(list(keys.values()), failures, labels, data["info"]["imagemill"])


def read_yolo(folder: Path) -> Read:
    data = yaml.safe_load((folder / "data.yaml").read_text())
    with (folder / "sources.csv").open(newline="") as file:
        keys = {Path(row["image"]).relative_to("images"): row["key"] for row in csv.DictReader(file)}
    with (folder / "failures.csv").open(newline="") as file:
        failures = [row["key"] for row in csv.DictReader(file)]
    labels = []
    for image, key in keys.items():
        lines = (folder / "labels" / image.with_suffix(".txt")).read_text().splitlines()
        labels += [(key, data["names"][int(line.split()[0])]) for line in lines]
    assert len(list(folder.rglob("labels/**/*.txt"))) == len(keys)
    return Read(list(keys.values()), failures, labels, data["imagemill"])


def read_parquet(folder: Path) -> Read:
    parts = [pq.read_table(path) for path in sorted(folder.iterdir())]
    rows = [row for part in parts for row in part.to_pylist()]
    good = [row for row in rows if row["ok"]]
    labels = [(row["key"], label) for row in good for label in row.get("labels", [])]
    metadata = json.loads(parts[0].schema.metadata[b"imagemill"])
    return Read([r["key"] for r in good], [r["key"] for r in rows if not r["ok"]], labels, metadata)


READERS = {"coco": read_coco, "yolo": read_yolo, "parquet": read_parquet}


def expected_labels(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    return sorted((o.key, label) for o in outcomes if o.result is not None for label in getattr(o.result, "labels", ()))


@pytest.fixture
def mill(tmp_path: Path) -> Iterator[Mill]:
    made = Mill(f"sqlite:///{tmp_path / 'index.db'}", open_store((tmp_path / "results").as_uri()))
    yield made
    made.db.close()


def run(mill: Mill, job: Any, format: str, url: str, **more: Any) -> Report:
    options = {**OPTIONS.get(format, {}), **more.pop("options", {})}
    common = {"job": provenance(job), "options": options, "settings": settings.load(), **more}
    return exporters.export(mill.db, mill.store, job.recipe_id, format, open_store(url), **common)


def read_back(format: str, url: str, tmp_path: Path) -> Read:
    folder = download(url, tmp_path / "read")
    if format in READERS:
        return READERS[format](folder)
    module: Any = exporters.get(format)
    assert hasattr(module, "example_read"), f"add a reader of {format!r} to READERS"
    return Read(*module.example_read(folder))


def sample(kind: str) -> Callable[[int], Any]:
    assert kind in SAMPLES, f"add a sample of kind {kind!r} to SAMPLES"
    return SAMPLES[kind]


def left_behind(store: Store, url: str) -> list[str]:
    """Every file at a destination, hidden ones too."""
    path = objects.local_path(url)
    if path is not None:
        return [str(p) for p in path.rglob("*")]
    return [stat.key for stat in store.list()]


# ------------------------------------------------------------------------------------------------ the registry


def test_lists_without_importing() -> None:
    code = "import sys, storage.exporters as e; print(e.names(), [m for m in sys.modules if m.startswith(e.__name__)])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"{exporters.names()} ['storage.exporters']"


@pytest.mark.parametrize("format", FORMATS)
def test_defines_the_protocol(format: str) -> None:
    module = exporters.get(format)
    assert module.KINDS
    assert set(results.names()) >= module.KINDS
    assert all(isinstance(values, tuple) and values for values in module.OPTIONS.values())
    assert module.__doc__


def test_unknown_format(mill: Mill, tmp_path: Path) -> None:
    job = mill.run([])
    with pytest.raises(BadInput, match=r"unknown export format 'tfrecord'; known formats: .*coco"):
        run(mill, job, "tfrecord", tmp_path.as_uri())


@pytest.mark.parametrize("format", FORMATS)
def test_unknown_option(mill: Mill, tmp_path: Path, format: str) -> None:
    job = mill.run([])
    with pytest.raises(BadInput, match="has no option 'colour'; known options: "):
        run(mill, job, format, (tmp_path / "out").as_uri(), options={"colour": "red"})
    assert not (tmp_path / "out").exists()


def test_bad_value_of_an_option(mill: Mill, tmp_path: Path) -> None:
    job = mill.run([])
    with pytest.raises(BadInput, match="expected copy or link or none, but got 'move'"):
        run(mill, job, "yolo", (tmp_path / "out").as_uri(), options={"images": "move"})


def test_unknown_recipe(mill: Mill, tmp_path: Path) -> None:
    store = open_store((tmp_path / "out").as_uri())
    with pytest.raises(NotFound, match="no recipe 77"):
        exporters.export(mill.db, mill.store, 77, "coco", store, job={}, settings=settings.load())


def test_a_kind_the_format_cannot_write(mill: Mill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = mill.run([])
    monkeypatch.setattr(exporters.get("coco"), "KINDS", frozenset({"embedding"}))
    with pytest.raises(BadInput, match=r"'coco' cannot hold results of kind 'detections'; formats that can: .*parquet"):
        run(mill, job, "coco", (tmp_path / "out").as_uri())


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_it_claims(mill: Mill, tmp_path: Path, store_url: str, format: str) -> None:
    for kind in sorted(exporters.get(format).KINDS):
        make = sample(kind)
        outcomes = [failed(f"k/{i}.jpg") if i % 5 == 2 else found(f"k/{i}.jpg", make(i)) for i in range(23)]
        job = mill.run(shards(outcomes, 10), kind=kind)
        url = f"{store_url}/{kind}"
        report = run(mill, job, format, url)
        read = read_back(format, url, tmp_path / kind)
        assert sorted(read.keys) == sorted(o.key for o in outcomes if o.failure is None)
        assert sorted(read.failures) == sorted(o.key for o in outcomes if o.failure is not None)
        assert sorted(read.labels) == expected_labels(outcomes)
        summary = results.get(kind).summary
        assert report.annotations == sum(summary(o.result).count for o in outcomes if o.failure is None)
        assert (report.items, report.failures) == (23, 5)
        assert report.files == len(list(open_store(url).list()))
        assert report.notes == []


@pytest.mark.parametrize("format", FORMATS)
def test_no_items(mill: Mill, tmp_path: Path, store_url: str, format: str) -> None:
    report = run(mill, mill.run([]), format, store_url + "/out")
    read = read_back(format, store_url + "/out", tmp_path)
    assert (report.items, report.failures, report.annotations) == (0, 0, 0)
    assert (read.keys, read.failures, read.labels) == ([], [], [])
    assert read.provenance["model"] == "stub"


@pytest.mark.parametrize("format", FORMATS)
def test_only_failures(mill: Mill, tmp_path: Path, format: str) -> None:
    job = mill.run(shards([failed(f"{i}.jpg") for i in range(5)], 2))
    report = run(mill, job, format, (tmp_path / "out").as_uri())
    read = read_back(format, (tmp_path / "out").as_uri(), tmp_path)
    assert (report.items, report.failures) == (5, 5)
    assert (read.keys, read.failures) == ([], [f"{i}.jpg" for i in range(5)])


NAMES = (
    "plain.jpg",
    "with space/and, comma.jpg",
    "ünï/猫😀.png",
    "images/images/a.jpg",
    "a.b.c/d.e.jpg",
    "no-suffix",
    'quote".jpg',
    "100%.jpg",
    "#hash.jpg",
    "a/" + "n" * 200 + ".jpg",
)


@pytest.mark.parametrize("format", FORMATS)
def test_any_key(mill: Mill, tmp_path: Path, store_url: str, format: str) -> None:
    outcomes = [found(key, detected(i, 2)) for i, key in enumerate(NAMES)]
    job = mill.run(shards(outcomes, 4))
    run(mill, job, format, store_url + "/out")
    read = read_back(format, store_url + "/out", tmp_path)
    assert sorted(read.keys) == sorted(NAMES)
    assert sorted(read.labels) == expected_labels(outcomes)


@pytest.mark.parametrize("format", FORMATS)
def test_carries_its_provenance(mill: Mill, tmp_path: Path, format: str) -> None:
    job = mill.run(shards(mixed(3), 2))
    run(mill, job, format, (tmp_path / "out").as_uri())
    read = read_back(format, (tmp_path / "out").as_uri(), tmp_path)
    wanted = {
        "job": job.id,
        "model": "stub",
        "weights_sha256": "ab" * 32,
        "recipe": job.spec.digest,
        "dataset": "/data/pictures",
        "kind": "detections",
        "params": {"conf": 0.25},
    }
    assert {name: read.provenance[name] for name in wanted} == wanted
    assert read.provenance["imagemill"]
    assert read.provenance["exported_at"].endswith("+00:00")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("table", [(), ("cat",), ("wrong", "dog"), LABELS])
def test_no_label_is_lost(mill: Mill, tmp_path: Path, format: str, table: tuple[str, ...]) -> None:
    """Though the model's table of names is missing, short or wrong."""
    pairs = [("cat", 0), ("dog", 1), ("late", 9), ("other", 1), ("cat", 0), ("huge", 2**31 - 1), ("negative", -1)]
    outcomes = [found(f"{i}.jpg", detection(*pair)) for i, pair in enumerate(pairs)]
    job = mill.run(shards(outcomes, 3), labels=table)
    run(mill, job, format, (tmp_path / "out").as_uri())
    read = read_back(format, (tmp_path / "out").as_uri(), tmp_path)
    assert sorted(read.labels) == expected_labels(outcomes)


@pytest.mark.parametrize("format", FORMATS)
def test_each_current_key_once(tmp_path: Path, database_url: str, format: str) -> None:
    mill = Mill(database_url, open_store((tmp_path / "results").as_uri()))
    old = [found(f"{i:02d}.jpg", detection("cat", 0)) for i in range(20)]
    first = mill.run(shards(old, 6))
    new = [found(o.key, detection("dog", 1)) for o in old[:9]] + [failed(old[9].key)]
    job = mill.run(shards(new, 4), replaces=1)
    assert job.recipe_id == first.recipe_id
    mill.prune(job, ["00.jpg", "09.jpg", "15.jpg", "19.jpg"])
    report = run(mill, job, format, (tmp_path / "out").as_uri())
    read = read_back(format, (tmp_path / "out").as_uri(), tmp_path)
    labels = {f"{i:02d}.jpg": "dog" if i < 9 else "cat" for i in range(20) if i not in (0, 9, 15, 19)}
    assert sorted(read.labels) == sorted(labels.items())
    assert sorted(read.keys) == sorted(labels)
    assert read.failures == []
    assert report.items == 16
    mill.db.close()


@pytest.mark.parametrize("format", FORMATS)
def test_each_key_once_while_a_job_commits(tmp_path: Path, database_url: str, format: str) -> None:
    """What is written is what was there when it began: a row superseded meanwhile is neither lost nor doubled."""
    mill = Mill(database_url, open_store((tmp_path / "results").as_uri()))
    old = [found(f"{i:02d}.jpg", detection("cat", 0)) for i in range(12)]
    mill.run(shards(old, 3))
    rest = iter(shards([found(o.key, detection("dog", 1)) for o in [old[0], old[11], old[4], old[5]]], 1))
    job = mill.submit()
    mill.plan(job, shards([old[0], old[11], old[4], old[5]], 1), replaces=1)
    mill.commit(job, next(rest))

    def meanwhile(report: Report) -> None:
        if outcomes := next(rest, None):
            mill.commit(job, outcomes)

    run(mill, job, format, (tmp_path / "out").as_uri(), on_progress=meanwhile)
    read = read_back(format, (tmp_path / "out").as_uri(), tmp_path)
    assert sorted(read.labels) == [(f"{i:02d}.jpg", "cat" if i else "dog") for i in range(12)]
    assert next(rest, None) is None
    mill.db.close()


def test_reports_progress(mill: Mill, tmp_path: Path) -> None:
    job = mill.run(shards(mixed(10), 4))
    seen: list[int] = []
    run(mill, job, "coco", (tmp_path / "out").as_uri(), on_progress=lambda report: seen.append(report.items))
    assert seen == [4, 8, 10, 10]


def test_reads_each_object_once_and_in_order(mill: Mill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = mill.run(shards(mixed(30), 4))
    mill.prune(job, [f"f/{i:05d}.jpg" for i in range(4, 8)])  # all of the second shard: it need not be read
    asked: list[str] = []
    get = mill.store.get
    monkeypatch.setattr(mill.store, "get", lambda key: asked.append(key) or get(key))
    run(mill, job, "parquet", (tmp_path / "out").as_uri())
    keys = [found.key for found in index.objects(mill.db, job.recipe_id)]
    assert len(keys) == 7
    assert asked == keys


# ------------------------------------------------------------------------------------------------ when it goes wrong


@pytest.mark.parametrize("format", FORMATS)
def test_refuses_what_is_not_empty(mill: Mill, tmp_path: Path, store_url: str, format: str) -> None:
    job = mill.run(shards(mixed(3), 2))
    run(mill, job, format, store_url + "/out")
    before = {stat.key: stat.size for stat in open_store(store_url).list()}
    with pytest.raises(BadInput, match="is not empty; export to a new or empty place"):
        run(mill, job, format, store_url + "/out")
    assert {stat.key: stat.size for stat in open_store(store_url).list()} == before


def test_takes_an_empty_folder_and_the_root_of_a_disk(mill: Mill, tmp_path: Path) -> None:
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    (tmp_path / "out" / ".DS_Store").touch()
    run(mill, mill.run([]), "coco", (tmp_path / "out").as_uri())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".DS_Store", "annotations.json", "lost+found"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_object_leaves_nothing(mill: Mill, tmp_path: Path, store_url: str, format: str, damage: str) -> None:
    job = mill.run(shards(mixed(40), 10))
    last = list(index.objects(mill.db, job.recipe_id))[-1]
    mill.store.delete([last.key])
    if damage == "changed":
        mill.store.put(last.key, b"PAR1 something else PAR1")
    with pytest.raises(Unavailable, match="sha256 differs" if damage == "changed" else "is gone"):
        run(mill, job, format, store_url + "/out")
    assert left_behind(open_store(store_url), store_url) == []


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_store_leaves_nothing(
    mill: Mill, tmp_path: Path, store_url: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = mill.run(shards(mixed(5), 3))
    puts = run(mill, job, format, store_url + "/count").files
    for allowed in range(puts):
        with monkeypatch.context() as patch:
            fail_after(patch, allowed)
            with pytest.raises(StoreFull):
                run(mill, job, format, f"{store_url}/{allowed}")
        assert left_behind(open_store(f"{store_url}/{allowed}"), f"{store_url}/{allowed}") == []
    assert run(mill, job, format, store_url + "/0").files == puts


def fail_after(patch: pytest.MonkeyPatch, allowed: int) -> None:
    """Let so many files through and be full afterwards."""
    left = iter(range(allowed))
    put, put_file = Output.put, Output.put_file

    def limited(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if next(left, None) is None:
                raise StoreFull("no space left")
            real(*args)

        return call

    patch.setattr(Output, "put", limited(put))
    patch.setattr(Output, "put_file", limited(put_file))


_ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from storage import exporters, settings
from storage.database import Database
from storage.errors import StoreFull
from storage.objects import open_store

database, store, recipe_id, format, options, out = sys.argv[1:]
try:
    exporters.export(Database(database), open_store(store), int(recipe_id), format, open_store(out),
        job={}, options=eval(options), settings=settings.load())
except StoreFull as error:
    print("full:", error)
print("left:", [str(p) for p in open_store(out)._path("x").parent.rglob("*")])
"""


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing(mill: Mill, tmp_path: Path, format: str) -> None:
    job = mill.run(shards([found(f"{i}.jpg", detected(i, 30)) for i in range(600)], 300))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k tmpfs {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs user namespaces to mount a small disk")
    arguments = [mill.db.url, mill.store.url, str(job.recipe_id), format, repr(OPTIONS.get(format, {})), disk.as_uri()]
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", _ON_A_SMALL_DISK]
    out = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout
    assert "full: no space left" in out
    assert "left: []" in out


@pytest.mark.parametrize(
    "format",
    [pytest.param(f, marks=pytest.mark.slow if f in ("yolo", "parquet") else []) for f in FORMATS],
)
@pytest.mark.parametrize(
    ("few", "many", "items"),
    [(25, 75, 100), pytest.param(20, 200, 500, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_memory_does_not_grow_with_the_recipe(
    mill: Mill, tmp_path: Path, format: str, few: int, many: int, items: int
) -> None:
    most = []
    for count in (few, many):
        parts = ([found(f"{i}/{j}.jpg", BOXES[j % 50]) for j in range(items)] for i in range(count))
        job = mill.run([[moved(o, p) for p, o in enumerate(part)] for part in parts], dataset=f"/data/{count}")
        held: list[int] = []

        def look(report: Report, every: int = count // 5 * items, held: list[int] = held) -> None:
            if report.items % every == 0:
                held.append(held_now())

        tracemalloc.start()
        run(mill, job, format, (tmp_path / f"{count}").as_uri(), on_progress=look)
        tracemalloc.stop()
        assert len(held) > 4
        most.append(max(held))
    assert most[1] < 1.25 * most[0] + 500_000, f"{format}: {most}"


BOXES = [detected(seed, 4) for seed in range(50)]


def held_now() -> int:
    """Bytes that Python and Arrow hold. Not pathlib's: the table of interned names grows by megabytes at once."""
    ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, pathlib.__file__)])
    return sum(trace.size for trace in ours.traces) + pa.total_allocated_bytes()
