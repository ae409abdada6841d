"""Engines are listed by their models, built before a job asks, and removed by the beginnings of their digests."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

import cli
from storage.errors import BadInput, NotFound
from storage.objects import Store, open_store
from storage.settings import Settings, load
from tests.workers.models import test_conformance as families
from workers import enginelist, engines, exporting, submit, weights
from workers.enginelist import Built
from workers.engines import Engines, Pace
from workers.loaded import Models

QUICK = Pace(renew=0.05, dead=0.4, patience=60, look=0.02)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri(), load())


def put(store: Store, about: Mapping[str, str], name: str = "a.onnx", data: bytes = b"graph") -> str:
    """An engine of these bytes in the store; its digest."""

    def build(path: Path) -> None:
        path.write_bytes(data)

    folder = Path(store.url.removeprefix("file://")).parent / "elsewhere"
    Engines(store, folder, {}, lambda *given: None, lambda *given: None, pace=QUICK).get(about, name, build)
    return engines.digest_of(about)


# ------------------------------------------------------------------------------------------------ ls


def test_each_row_names_its_model(store: Store, tmp_path: Path) -> None:
    for name in ("yolov8n.pt", "vits"):
        path = tmp_path / name
        if "." in name:
            path.write_bytes(name.encode())
        else:
            path.mkdir()
            (path / "config.json").write_text("{}")
        weights.publish(store, path, weights.sha256_of(path))
    of_file, of_folder = (weights.sha256_of(tmp_path / name) for name in ("yolov8n.pt", "vits"))
    graph = {"file": "onnx", "weights": of_file, "family": "yolo", "precision": "fp16"}
    put(store, graph, "yolo-fp16.onnx")
    (entry,) = engines.entries(store)
    put(store, {"file": "tensorrt", "onnx": entry.sha256, "precision": "fp16"}, "yolo-fp16.engine", b"engine")
    put(store, {"file": "onnx", "weights": of_folder, "family": "dinov2", "precision": "fp32"}, "dinov2-fp32.onnx")
    put(store, {"file": "onnx", "weights": "0" * 64, "family": "sam", "precision": "fp32"}, "sam.onnx")
    put(store, {"what": "a newer version writes"}, "x")
    found = {row.name: (row.model, row.runtime, row.precision, row.size) for row in enginelist.rows(store)}
    assert found == {
        "yolo-fp16.onnx": ("yolov8n", "onnx", "fp16", 5),
        "yolo-fp16.engine": ("yolov8n", "tensorrt", "fp16", 6),
        "dinov2-fp32.onnx": ("vits", "onnx", "fp32", 5),
        "sam.onnx": ("sam", "onnx", "fp32", 5),
        "x": ("?", "?", "?", 5),
    }
    assert all(abs(row.modified - time.time()) < 60 for row in enginelist.rows(store))


def test_an_entry_that_is_no_entry_is_left_out(store: Store) -> None:
    digest = put(store, {"network": "a"})
    for damaged in (b"{", b"[]", b'{"name": "a", "about": [], "size": 1, "sha256": "x"}'):
        store.put(f"engines/{digest}/engine.json", damaged)
        assert enginelist.rows(store) == []


# ------------------------------------------------------------------------------------------------ rm


def two_alike(store: Store) -> tuple[str, str]:
    """Two engines whose digests begin with the same digit."""
    by_first: dict[str, str] = {}
    for i in range(17):
        about = {"network": str(i)}
        digest = engines.digest_of(about)
        if digest[0] in by_first:
            put(store, about)
            return by_first[digest[0]], digest
        by_first[digest[0]] = put(store, about)
    raise AssertionError("seventeen digests have sixteen first digits")


def test_a_prefix_names_one_engine(store: Store, home: Path) -> None:
    settings = load()
    one, other = two_alike(store)
    here = engines.folder_of(settings) / one
    here.mkdir(parents=True)
    with pytest.raises(BadInput, match=rf"2 engines have a digest that begins with '{one[0]}'.*give more of it"):
        enginelist.remove(store, settings, [one[0]])
    with pytest.raises(NotFound, match="begins with 'xyz'; list them with: imagemill engines ls"):
        enginelist.remove(store, settings, [one, "xyz"])
    with pytest.raises(NotFound, match="begins with ''"):
        enginelist.remove(store, settings, [""])
    assert {one, other} <= {row.digest for row in enginelist.rows(store)}, "nothing goes unless all can"
    assert here.exists()
    (gone,) = enginelist.remove(store, settings, [one[:40].upper(), one])
    assert gone.digest == one
    assert not here.exists()
    assert other in {row.digest for row in enginelist.rows(store)}


def test_all_takes_what_was_never_finished_too(store: Store) -> None:
    two_alike(store)
    store.put("engines/abc/building", b"somebody 1")
    assert len(enginelist.remove(store, load(), [], everything=True)) >= 2
    assert list(store.list(engines.FOLDER)) == []
    assert enginelist.remove(store, load(), [], everything=True) == []


# ------------------------------------------------------------------------------------------------ build


@dataclasses.dataclass
class Fleet:
    """A store in which the console script has built the engine of a tiny model."""

    model: Path
    home: Path
    built: list[dict[str, Any]]

    def settings(self) -> Settings:
        return Settings(home=self.home)

    def store(self) -> Store:
        return open_store(self.settings().store, self.settings())


@contextlib.contextmanager
def at(home: Path) -> Iterator[None]:
    """The console script's environment in this process: its home and no GPU; logging is put back afterwards."""
    before = logging.getLogger().handlers[:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGEMILL_HOME", str(home))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        load.cache_clear()
        yield
    load.cache_clear()
    logging.getLogger().handlers[:] = before


def run(home: Path, *arguments: str, code: int = 0) -> str:
    """What a command of the console script prints, wherever to."""
    said = io.StringIO()
    with at(home), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert cli._run(cli.cli, ["engines", *arguments]) == code, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "tinyvit").mkdir()
    made = Fleet(families._timm(folder / "tinyvit"), folder / "home", [])
    given = (str(made.model), "--kind", "embedding", "--runtime", "onnx", "--device", "cpu", "--json")
    made.built = json.loads(run(made.home, "build", *given))
    return made


def build(model: Path | str, store: Store, cache: Path, **changes: Any) -> list[Built]:
    """What the command does, on another machine."""
    settings = Settings(home=cache, cache=cache)
    how: dict[str, Any] = {"model": str(model), "kind": "embedding", "params": {}, "device": "cpu"}
    how |= {"runtime": "onnx", "precision": "fp32", "pace": QUICK}
    return enginelist.build(store, settings, **{**how, **changes})


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which a build sets for its whole process


def test_the_command_builds_lists_and_removes(fleet: Fleet) -> None:
    (engine,) = fleet.built
    assert engine["built"] is True
    assert engine["name"].endswith("-fp32.onnx")
    (row,) = json.loads(run(fleet.home, "ls", "--json"))
    assert {**row, "modified": 0} == {
        **{name: engine[name] for name in ("digest", "name", "size")},
        "model": "tinyvit",
        "runtime": "onnx",
        "precision": "fp32",
        "modified": 0,
    }
    head, line = run(fleet.home, "ls").splitlines()
    assert head.split() == ["name", "model", "runtime", "precision", "size", "age", "digest"]
    assert line.split()[:2] == [engine["name"], "tinyvit"]
    assert line.split()[-1] == engine["digest"][:12]
    assert "imagemill: no engine has a digest that begins with 'zz'" in run(fleet.home, "rm", "zz", code=2)
    assert "give the beginnings of digests" in run(fleet.home, "rm", code=2)
    assert "give the beginnings of digests" in run(fleet.home, "rm", "--all", "ab", code=2)
    copy = dataclasses.replace(fleet, home=fleet.home.with_name("copy"))
    shutil.copytree(fleet.home, copy.home)
    assert run(copy.home, "rm", line.split()[-1]) == f"removed {engine['digest'][:12]}  {engine['name']}\n"
    assert json.loads(run(copy.home, "rm", "--all", "--json")) == []
    assert engines.entries(copy.store()) == []
    assert not any(engines.folder_of(copy.settings()).iterdir())


def test_it_is_what_a_worker_of_a_job_looks_for(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr(exporting, "export", never)
    store, settings = fleet.store(), fleet.settings()
    spec = submit.resolve_model(
        store,
        settings,
        kind="embedding",
        model=str(fleet.model),
        params={},
        device="cpu",
        runtime="onnx",
        precision="fp32",
    )
    loaded = Models(store, settings, "cpu")
    assert loaded.get(spec).runtime == "onnx"
    loaded.close()


def test_another_machine_waits_for_who_builds(fleet: Fleet, store: Store, tmp_path: Path) -> None:
    (entry,) = engines.entries(fleet.store())
    whole = fleet.store().get(f"engines/{entry.digest}/{entry.sha256}")
    started, told = threading.Event(), []
    # A builder on a crowded machine may say nothing for a second.
    pace = dataclasses.replace(QUICK, dead=3)

    def slow(path: Path) -> None:
        started.set()
        time.sleep(4)  # longer than what makes a builder that says nothing dead
        path.write_bytes(whole)

    other = Engines(store, tmp_path / "other", {}, lambda *given: None, lambda *given: None, pace=pace)
    thread = threading.Thread(target=other.get, args=(entry.about, entry.name, slow))
    thread.start()
    assert started.wait(10)
    (engine,) = build(fleet.model, store, tmp_path / "cache", pace=pace, on_progress=lambda *line: told.append(line))
    thread.join()
    assert (engine.built, engine.digest, engine.size) == (False, entry.digest, len(whole))
    assert {name for name, _ in told} == {entry.name}
    assert [seconds for _, seconds in told] == sorted(seconds for _, seconds in told)


def test_it_goes_on_where_a_builder_died(
    fleet: Fleet, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = engines.entries(fleet.store())
    whole = fleet.store().get(f"engines/{entry.digest}/{entry.sha256}")
    # The export itself has run in the fixture; here it is the waiting that counts.
    monkeypatch.setattr(exporting, "export", lambda spec, model, network, precision, path: path.write_bytes(whole))
    store.put(f"engines/{entry.digest}/building", b"whoever that was 7")
    (engine,) = build(fleet.model, store, tmp_path / "cache")
    assert engine.built
    assert engines.entries(store)[0].about == entry.about
    engines.remove(store, [entry.digest])
    (engine,) = build(fleet.model, store, tmp_path / "cache")
    assert not engine.built, "this machine has the file"
    assert [e.sha256 for e in engines.entries(store)] == [entry.sha256], "and puts it back into the store"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runtime": "torch"}, "the runtime torch builds nothing for the fleet"),
        ({"runtime": "nonsense"}, "unknown runtime 'nonsense'; known: inductor, onnx"),
        ({"precision": "bf16"}, "the runtime onnx runs in fp32 on cpu, but bf16 was asked for"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"runtime": "tensorrt"}, "the runtime tensorrt does not run on cpu"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"params": {"imgsize": 3}}, "has no parameter 'imgsize'"),
        ({}, "needs nothing built for stub"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_built_says_why(changes: dict[str, Any], words: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        build("stub", store, tmp_path / "cache", **{"kind": "detections", **changes})
    assert list(store.list(engines.FOLDER)) == []


def test_seconds_are_shown_when_it_takes_longer_than_a_moment(capsys: pytest.CaptureFixture[str]) -> None:
    loud, quiet = cli._Show(quiet=False), cli._Show(quiet=True)
    for show in (loud, quiet):
        show.building("a.onnx", 1.9)
        show.building("a.onnx", 4.2)
    assert capsys.readouterr().err == "building a.onnx: 4 s\n"


def test_an_age_is_short() -> None:
    assert [cli._age(s) for s in (-3, 59, 60, 7200, 200000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]


def test_the_group_has_all_three() -> None:
    group = cli.cli.commands["engines"]
    assert isinstance(group, click.Group)
    assert sorted(group.commands) == ["build", "ls", "rm"]
