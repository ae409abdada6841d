"""The runtime inductor: what cannot be compiled says so, a wrong program is not kept, a machine compiles once.

Whatever runs the compiler is slow: no job does so on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import processes
from storage.errors import BadInput, Misconfigured
from storage.objects import Store, open_store
from storage.settings import load
from tests.flow import wait_until
from tests.workers import test_runtimes as shared
from workers import exporting, runtimes
from workers.engines import Engines, Pace
from workers.loaded import Models
from workers.models import Item
from workers.runtimes import Network, NotRunnable, inductor

BATCH = {0: "batch"}
QUICK = Pace(renew=0.02, dead=0.4, patience=20, look=0.02)
compiles = pytest.mark.skipif(not inductor.installed(), reason="there is no C++ compiler")


def network(module: type[torch.nn.Module]) -> Network:
    return Network("net", module, {"x": torch.zeros(2, 3)}, ("y",), {"x": BATCH, "y": BATCH})


class Asks(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


class Fixed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(2, 3)


class Sly(torch.nn.Module):
    """Something else while it is compiled, by a thousandth."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1.001 if torch.compiler.is_exporting() else 1.0)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Asks, "the network net cannot be compiled: "),
        (Fixed, "the network net cannot be compiled: it fixes the batch of x"),
        pytest.param(Sly, r"differs by up to 0\.00\d+ in y", marks=[compiles, pytest.mark.slow]),
    ],
)
def test_what_cannot_be_compiled_says_so_and_leaves_nothing(
    module: type[torch.nn.Module], says: str, tmp_path: Path
) -> None:
    with pytest.raises(NotRunnable, match=says) as caught:
        inductor.compile(network(module), "cpu", "fp32", tmp_path / "net.tmp")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("precision", runtimes.PRECISIONS)
def test_the_same_numbers_as_torch_whatever_the_batch_and_the_size(precision: str, tmp_path: Path) -> None:
    """One file for all shapes, a single picture and a single pixel among them; results stay when the next come."""
    session = inductor.open(shared.network(shared.copied), "cpu", precision, shared.Kept(tmp_path))
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    for shape in ((1, 3, 8, 8), (3, 3, 12, 20), (8, 3, 7, 5), (1, 3, 1, 1)):
        images, bias = torch.randn(shape), torch.randn(shape[0])
        out = session(bias=bias, images=images)
        assert list(out) == ["out", "best"]
        assert (out["out"].dtype, out["best"].dtype) == (torch.float32, torch.int64)
        with torch.no_grad():
            expected = shared.two()(images, bias)[0]
        allowed = shared.ROUNDING[precision] * float(expected.abs().max())
        torch.testing.assert_close(out["out"], expected, atol=allowed, rtol=0)
        before.append((out["out"], out["out"].clone()))
    assert all(torch.equal(kept, copy) for kept, copy in before)


def test_no_job_takes_it_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the runtime inductor does not run on cpu, but fp32 was asked for"):
        runtimes.open_network("inductor", network(Asks), "cpu", "fp32", shared.Kept(tmp_path))


def test_a_file_that_is_no_program_says_so(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"no zip")
    with pytest.raises(NotRunnable, match=r"net\.pt2 cannot be loaded: "):
        inductor.opened(tmp_path / "net.pt2", network(Asks), "cpu", "fp32")


def test_without_a_compiler_it_says_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not inductor.installed()
    with pytest.raises(Misconfigured, match=r"inductor is not installed here; install it with: apt-get install g\+\+"):
        runtimes.open_network("inductor", network(Asks), "cuda", "fp32", shared.Kept(tmp_path))


def test_a_network_that_comes_as_a_file_has_nothing_to_compile(tmp_path: Path) -> None:
    net = dataclasses.replace(network(Asks), onnx=tmp_path / "detector.onnx")
    with pytest.raises(NotRunnable, match="comes as a file"):
        inductor.open(net, "cpu", "fp32", shared.Kept(tmp_path))


def test_another_machine_precision_or_network_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []
    files = shared.Kept(tmp_path)
    monkeypatch.setattr(files, "here", lambda about, name, build: asked.append(dict(about)))
    monkeypatch.setattr(inductor, "opened", lambda *given: None)
    net = network(Asks)
    for one, precision in ((net, "fp32"), (net, "bf16"), (dataclasses.replace(net, name="other"), "fp32")):
        inductor.open(one, "cpu", precision, files)
    monkeypatch.setattr("workers.devices.cpuinfo", lambda name: "fpu amx_bf16")
    inductor.open(net, "cpu", "fp32", files)
    assert all(one != other for i, one in enumerate(asked) for other in asked[:i])


# ------------------------------------------------------------------------------------------------ on one machine


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri(), load())


def machine(store: Store, folder: Path, moved: list[int] | None = None) -> Engines:
    told = [] if moved is None else moved
    return Engines(store, folder, {}, exporting.export, exporting.compile, lambda: told.append(0), pace=QUICK)  # type: ignore[arg-type]


def test_one_process_builds_while_the_others_wait_and_nothing_is_shared(store: Store, tmp_path: Path) -> None:
    built, moved, paths = [], list[int](), []

    def slow(path: Path) -> None:
        built.append(path)
        time.sleep(0.3)
        path.write_bytes(b"code")

    def take() -> None:
        paths.append(machine(store, tmp_path / "cache", moved).here({"a": "b"}, "net.pt2", slow))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(built), len(paths), len(set(paths))) == (1, 4, 1)
    assert paths[0].read_bytes() == b"code"
    assert len(moved) > 10, "who builds and who waits show that they live"
    assert list(store.list()) == []
    machine(store, tmp_path / "other").here({"a": "b"}, "net.pt2", slow)
    assert len(built) == 2


def test_damage_is_built_again(store: Store, tmp_path: Path) -> None:
    here = machine(store, tmp_path)
    path = here.here({"a": "b"}, "net.pt2", lambda path: path.write_bytes(b"code") and None)
    path.write_bytes(b"cod")
    assert here.here({"a": "b"}, "net.pt2", lambda path: path.write_bytes(b"anew") and None) == path
    assert path.read_bytes() == b"anew"


def test_a_builder_that_is_killed_stops_nobody(store: Store, tmp_path: Path) -> None:
    code = f"""
import time
from collections.abc import Iterator
from pathlib import Path
from storage.objects import open_store
from storage.settings import load
from workers.engines import Engines

def build(path):
    path.write_bytes(b"half")
    print("building", flush=True)
    time.sleep(60)

store = open_store({store.url!r}, load())
Engines(store, Path({str(tmp_path / "cache")!r}), {{}}, print, print).here({{"a": "b"}}, "net.pt2", build)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"building\n"
        paths: list[Path] = []
        here = machine(store, tmp_path / "cache")
        build = lambda path: path.write_bytes(b"whole") and None  # noqa: E731
        waiting = threading.Thread(target=lambda: paths.append(here.here({"a": "b"}, "net.pt2", build)))
        waiting.start()
        time.sleep(0.3)
        assert paths == []
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    waiting.join(10)
    assert [path.read_bytes() for path in paths] == [b"whole"]
    assert list((tmp_path / "cache").rglob(".*.tmp*")) == [], "what was half built is gone"


def test_a_child_ends_with_the_worker_that_it_builds_for(tmp_path: Path) -> None:
    """It would take both cores for a minute, for nobody."""
    child = f"""
import os, time
from collections.abc import Iterator
from pathlib import Path
from workers import exporting
def make(asked):
    Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
    time.sleep(60)
exporting._make = make
exporting.main()
"""
    worker = f"""
from collections.abc import Iterator
from pathlib import Path
from jobs.spec import JobSpec
from workers import exporting
from workers.runtimes import Network
exporting._CODE = {child!r}
job = JobSpec(dataset="x", kind="detections", family="yolo", weights_sha256="a", params={{}}, model="m")
exporting.compile(job, None, Network("net", print, {{}}, ()), "cpu", "fp32", Path("net.pt2"))
"""
    process = subprocess.Popen([sys.executable, "-c", worker], cwd=Path(__file__).parents[2])
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", "the child")
        pid = int((tmp_path / "pid").read_text())
        assert processes.exists(pid)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not processes.exists(pid), "its end", 10)


@compiles
@pytest.mark.slow
def test_a_worker_has_its_model_compiled_in_a_child_once_for_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "RUNS", {"cpu": runtimes.PRECISIONS})  # as on a GPU
    store, job = open_store((tmp_path / "store").as_uri(), load()), shared.spec(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    before, answers, told = {stat.key for stat in store.list()}, [], list[str]()

    @contextlib.contextmanager
    def during(doing: str) -> Iterator[None]:
        told.append(doing)
        yield

    for runtime in ("torch", "inductor", "inductor"):
        here = load().model_copy(update={"cache": tmp_path / "cache"})
        held = Models(store, here, "cpu", during=during)
        loaded = held.get(dataclasses.replace(job, runtime=runtime))
        assert loaded.runtime == runtime
        answers += loaded.model.infer([loaded.model.prepare(image, Item("k"))])
        held.close()
        if runtime == "inductor":
            monkeypatch.setattr(exporting, "compile", lambda *a: pytest.fail("it is compiled already"))
    assert all(shared.families.same(answers[0], answer) for answer in answers[1:])
    assert {stat.key for stat in store.list()} == before, "machine code stays on its machine"
    assert told == ["loading d for torch", "loading d for inductor", "loading d for inductor"]
