"""What every runtime must do: give the numbers that torch gives, whatever the batch and size; a new file is picked up.

Which runtimes run here is asked of them; those that need a GPU are tested for what they do without one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.spec import JobSpec
from storage.errors import BadInput, Misconfigured
from storage.objects import open_store
from storage.settings import load
from tests.workers.models import test_conformance as families
from tests.workers.models import test_yolo as of_yolo
from workers import exporting, models, onnxcuda, onnxgraph, parity, runtimes, ultralytics_checkpoints, weights
from workers.engines import Engines
from workers.loaded import Models
from workers.models import Item, Site
from workers.pixels import Pixels
from workers.runtimes import PRECISIONS, Network, NotRunnable, inductor, tensorrt
from workers.runtimes import onnx as onnx_runtime
from workers.runtimes import torch as torch_runtime

HERE = [name for name in runtimes.names() if runtimes.get(name).installed() and runtimes.precisions(name, "cpu")]
# OpenVINO computes in bf16 only where the processor does; elsewhere it says so.
_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
_BF16 = "avx512_bf16" in _FLAGS or "amx_bf16" in _FLAGS
PAIRS = [
    (name, precision)
    for name in HERE
    for precision in runtimes.precisions(name, "cpu")
    if _BF16 or (name, precision) != ("openvino", "bf16")
]
# Those that make a file of a network first; a runtime that does not says so with BUILDS = False.
BUILDERS = [name for name in HERE if name != "torch" and getattr(runtimes.get(name), "BUILDS", True)]
ROUNDING = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.005}  # as a share of the largest number


class Kept:
    """Files of one test session, built once; counts the builds."""

    model: Mapping[str, str] = types.MappingProxyType({})

    def __init__(self, folder: Path) -> None:
        self._folder, self._there, self.built = folder, {}, 0

    def export(self, network: Network, precision: str, path: Path) -> None:
        onnxgraph.export(network, precision, path)

    def compile(self, network: Network, device: str, precision: str, path: Path) -> None:
        inductor.compile(network, device, precision, path)

    def here(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        return self.get(about, name, build)

    def get(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        key = tuple(sorted(about.items()))
        if key not in self._there:
            self.built += 1
            path = self._folder / f"{len(self._there)}-{name}"
            build(path)
            self._there[key] = path
        return self._there[key]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Two(torch.nn.Module):
    """Two inputs, two outputs of which one is of whole numbers; remembers what reached it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.seen: list[Any] = []

    def forward(self, images: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append((images.dtype, images.is_contiguous(memory_format=torch.channels_last), self.training))
        out = self.conv(images) + bias[:, None, None, None]
        return out, out.argmax(1)


def network(build: Any = Two) -> Network:
    sizes = {0: "batch", 2: "height", 3: "width"}
    axes = {"images": sizes, "bias": {0: "batch"}, "out": sizes, "best": {0: "batch", 1: "height", 2: "width"}}
    return Network("two", build, {"images": torch.zeros(2, 3, 8, 8), "bias": torch.zeros(2)}, ("out", "best"), axes)


@functools.lru_cache(maxsize=1)
def two() -> Two:
    torch.manual_seed(0)
    return Two().eval()


def copied() -> Two:
    """The same weights in a module of its own, as a family builds one for each runtime."""
    module = Two()
    module.load_state_dict(two().state_dict())
    return module


def test_the_folder_is_the_registry() -> None:
    assert {"inductor", "onnx", "openvino", "tensorrt", "torch"} <= set(runtimes.names())
    assert runtimes.get("torch") is not None
    assert runtimes.get("torch").installed()
    with pytest.raises(BadInput, match=r"unknown runtime 'cuda'; known: .*torch"):
        runtimes.get("cuda")


@pytest.mark.parametrize("name", runtimes.names())
def test_every_runtime_defines_the_contract_without_importing_its_library(name: str) -> None:
    code = f"""
import sys
from workers import runtimes
module = runtimes.get({name!r})
assert callable(module.open) and isinstance(module.installed(), bool)
assert runtimes.precisions({name!r}, "cpu") or runtimes.precisions({name!r}, "cuda")
heavy = {{"torch", "onnx", "onnxruntime", "openvino", "tensorrt", "pycuda"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ every runtime here


def opened(name: str, net: Network, precision: str, files: Any) -> runtimes.Session:
    return runtimes.open_network(name, net, "cpu", precision, files)


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_the_same_numbers_as_torch_whatever_the_batch_and_the_size(name: str, precision: str, files: Kept) -> None:
    session = opened(name, network(copied), precision, files)
    for shape in ((1, 3, 8, 8), (3, 3, 12, 20), (8, 3, 7, 5), (1, 3, 1, 1)):
        images, bias = torch.randn(shape), torch.randn(shape[0])
        out = session(images=images.contiguous(memory_format=torch.channels_last), bias=bias)
        assert list(out) == ["out", "best"]
        assert (out["out"].dtype, out["best"].dtype) == (torch.float32, torch.int64)
        assert out["out"].device.type == "cpu"
        with torch.no_grad():
            expected = two()(images, bias)[0]
        allowed = ROUNDING[precision] * float(expected.abs().max())
        torch.testing.assert_close(out["out"], expected, atol=allowed, rtol=0)
        assert torch.equal(out["best"], out["out"].argmax(1)) or precision != "fp32"


@pytest.mark.parametrize("of_bytes", [Pixels(), Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_pictures_come_as_bytes(name: str, precision: str, of_bytes: Pixels, files: Kept) -> None:
    """Channels last in memory or not; what is no picture stays what it is."""
    session = opened(name, dataclasses.replace(network(copied), pixels={"images": of_bytes}), precision, files)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (of_bytes.mean, of_bytes.std))
    for shape in ((1, 3, 8, 8), (5, 3, 12, 20), (2, 3, 1, 1)):
        images, bias = torch.randint(0, 256, shape, dtype=torch.uint8), torch.randn(shape[0])
        with torch.no_grad():
            expected = two()((images / 255 - mean) / std, bias)[0]
        for order in (torch.contiguous_format, torch.channels_last):
            before = images.clone()
            out = session(images=images.contiguous(memory_format=order), bias=bias)["out"]
            allowed = ROUNDING[precision] * float(expected.abs().max())
            torch.testing.assert_close(out, expected, atol=allowed, rtol=0)
            assert torch.equal(images, before)


def test_openvino_takes_no_floats_for_bytes(files: Kept) -> None:
    """It would cut them off without a word."""
    session = opened("openvino", dataclasses.replace(network(copied), pixels={"images": Pixels()}), "fp32", files)
    with pytest.raises(TypeError, match=r"expected images as bytes, but got torch\.float32"):
        session(images=torch.rand(1, 3, 8, 8), bias=torch.zeros(1))


@pytest.mark.parametrize("name", HERE)
def test_results_stay_when_the_next_come(name: str, files: Kept) -> None:
    session = opened(name, network(copied), "fp32", files)
    images = torch.randn(2, 3, 8, 8)
    first = session(images=images, bias=torch.zeros(2))["out"]
    kept = first.clone()
    session(images=images + 1, bias=torch.ones(2))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", HERE)
def test_every_runtime_takes_inputs_by_name(name: str, files: Kept) -> None:
    session = opened(name, network(copied), "fp32", files)
    images, bias = torch.rand(2, 3, 8, 8), torch.tensor([1.0, -1.0])
    assert torch.equal(session(images=images, bias=bias)["out"], session(bias=bias, images=images)["out"])


@pytest.mark.parametrize("name", HERE)
def test_not_a_number_comes_out_as_such(name: str, files: Kept) -> None:
    """Of the one image that has it: the others of its batch stay finite."""
    images = torch.zeros(3, 3, 8, 8)
    images[1] = torch.nan
    out = opened(name, network(copied), "fp32", files)(images=images, bias=torch.zeros(3))["out"]
    assert out.flatten(1).isfinite().all(1).tolist() == [True, False, True]


def test_the_runtimes_share_one_file(tmp_path: Path) -> None:
    files = Kept(tmp_path)
    for name, precision in PAIRS:
        opened(name, network(copied), precision, files)
    assert files.built == 1


def test_another_network_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model says of itself, the shapes, the axes, the names and the precision are part of the key."""
    net, files = network(copied), Kept(tmp_path)
    monkeypatch.setattr(files, "export", lambda *a: None)
    example = {"images": torch.zeros(2, 3, 16, 8), "bias": torch.zeros(2)}
    axes = {**net.dynamic_axes, "images": {0: "batch"}}
    changes = [{}, {"example": example}, {"name": "other"}, {"dynamic_axes": axes}, {"outputs": ("out", "other")}]
    for change in [*changes, {}]:
        onnxgraph.exported(dataclasses.replace(net, **change), files)
    assert files.built == len(changes)
    onnxgraph.exported(net, files, "fp16")
    files.model = {"params": "other"}
    onnxgraph.exported(net, files)
    assert files.built == len(changes) + 2


@pytest.mark.parametrize("name", BUILDERS)
def test_what_cannot_be_exported_says_so(name: str, tmp_path: Path) -> None:
    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    net = Network("asks", Asks, {"x": torch.zeros(2, 3)}, ("y",), {"x": {0: "batch"}, "y": {0: "batch"}})
    with pytest.raises(NotRunnable, match="the network asks cannot be exported to ONNX") as caught:
        opened(name, net, "fp32", Kept(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BUILDERS)
def test_an_axis_that_may_vary_but_does_not_is_noticed(name: str, tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(2, 3)

    net = Network("fixed", Fixed, {"x": torch.zeros(2, 3)}, ("y",), {"x": {0: "batch"}, "y": {0: "batch"}})
    with pytest.raises(NotRunnable, match="fixed cannot be exported"):
        opened(name, net, "fp32", Kept(tmp_path))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_wrong_export_is_noticed_and_not_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that computes something else while it is exported, by a thousandth."""

    class Sly(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (1.001 if _exporting() else 1.0)

    net = Network("sly", Sly, {"x": torch.zeros(2, 3)}, ("y",), {"x": {0: "batch"}, "y": {0: "batch"}})
    store = open_store((tmp_path / "store").as_uri(), load())
    with pytest.raises(NotRunnable, match=r"differs by up to 0\.00\d+ in y"):
        opened(name, net, "fp32", Engines(store, tmp_path / "cache", {}, onnxgraph.export, inductor.compile))
    assert list(store.list()) == []


def test_a_network_that_magnifies_rounding_is_not_refused_for_it(tmp_path: Path) -> None:
    """A module whose own float32 is off by 0.03, and which while it is exported computes without that."""

    class Coarse(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1.0 if _exporting() else (x + 1e6) - 1e6

    net = Network("coarse", Coarse, {"x": torch.zeros(2, 3)}, ("y",), {"x": {0: "batch"}, "y": {0: "batch"}})
    onnxgraph.export(net, "fp32", tmp_path / "coarse.onnx")


def _exporting() -> bool:
    return bool(torch.compiler.is_exporting() or torch.jit.is_tracing())


def test_what_can_be_traced_is_not_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxgraph, "_captured", lambda *a: pytest.fail("it was captured"))
    onnxgraph.export(network(copied), "fp32", tmp_path / "x.onnx")


class _Summing(torch.nn.Module):
    """Its sum is a number that Python looks at: not of the batch, and the same for all of them so far."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if bool(x.sum() < 1e6) else x


class _Counting(torch.nn.Module):
    """A side that Python computes with, as the number it had in the example."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(int(x.shape[1]) * 2).reshape(2, -1).sum(0)


@pytest.mark.parametrize("build", [_Summing, _Counting])
def test_what_a_trace_would_get_wrong_is_captured(
    build: Callable[[], torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []
    monkeypatch.setattr(onnxgraph, "_captured", lambda *a: captured.append(a))
    axes = {0: "batch", 1: "side"}
    net = Network("x", build, {"x": torch.zeros(2, 3)}, ("y",), {"x": axes, "y": axes})
    with contextlib.suppress(NotRunnable):  # nothing was written, or what the trace has left
        onnxgraph.export(net, "fp32", tmp_path / "x.onnx")
    assert len(captured) == 1


def test_half_precision_is_exported_and_compared(tmp_path: Path) -> None:
    onnxgraph.export(network(copied), "fp16", tmp_path / "two.onnx")
    out = onnxgraph.opened(tmp_path / "two.onnx", 1)(images=torch.ones(1, 3, 8, 8), bias=torch.zeros(1))["out"]
    expected = two()(torch.ones(1, 3, 8, 8), torch.zeros(1))[0].detach()
    assert 0 < float((out - expected).abs().max()) < 0.01


def test_a_combination_that_cannot_be_names_those_that_can() -> None:
    with pytest.raises(BadInput, match=r"onnx runs in fp32 on cpu, but bf16 was asked for; .*: openvino, torch"):
        runtimes.check("onnx", "cpu", "bf16")
    with pytest.raises(BadInput, match=r"openvino does not run on cuda:0, but fp16 .*: inductor, onnx, tens"):
        runtimes.check("openvino", "cuda:0", "fp16")
    with pytest.raises(BadInput, match="unknown precision 'int8'; known: fp32, bf16, fp16"):
        runtimes.check("torch", "cpu", "int8")
    for precision in PRECISIONS:
        runtimes.check("torch", "cuda", precision)


def test_a_runtime_that_is_not_installed_says_the_remedy(monkeypatch: pytest.MonkeyPatch, files: Kept) -> None:
    for name in BUILDERS:
        monkeypatch.setattr(runtimes.get(name), "installed", lambda: False)
        with pytest.raises(Misconfigured, match=rf"{name} is not installed here; .*pip install 'imagemill\[onnx"):
            opened(name, network(copied), "fp32", files)


def test_cuda_that_is_not_there_is_no_silent_cpu(files: Kept, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    path = onnxgraph.exported(network(copied), files)
    with pytest.raises(Misconfigured, match=r"does not run on CUDA here, only with .*CPUExecutionProvider"):
        onnx_runtime._on_cuda(path, "cuda")
    with pytest.raises(Misconfigured, match="does not run on CUDA here"):
        onnx_runtime._check_provider(["CPUExecutionProvider"])
    onnx_runtime._check_provider(["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_a_graph_that_would_run_on_the_cpu_in_part_is_refused(files: Kept) -> None:
    """ONNX Runtime gives the CPU what another provider does not know, and says nothing."""
    import onnxruntime

    path = onnxgraph.exported(network(), files)
    session = onnxruntime.InferenceSession(path, onnxcuda.options(), providers=["CPUExecutionProvider"])
    onnxcuda.check_placed(session, "CPUExecutionProvider")
    with pytest.raises(Misconfigured, match="runs in CPUExecutionProvider here, but CUDAExecutionProvider was asked"):
        onnxcuda.check_placed(session, "CUDAExecutionProvider")

    class HalfThere:
        """The same session, as it tells of itself where a provider is there and took no node."""

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", *session.get_providers()]

        def get_provider_graph_assignment_info(self) -> Any:
            return session.get_provider_graph_assignment_info()

    with pytest.raises(NotRunnable, match=r"would compute \d Conv.* on the CPU instead of in CUDAExecutionProvider"):
        onnxcuda.check_placed(HalfThere(), "CUDAExecutionProvider")


def test_memory_that_ran_out_is_known_as_such() -> None:
    text = "[ONNXRuntimeError] : 6 : BFCArena: Failed to allocate memory for requested buffer of size 800"
    assert isinstance(onnxgraph.translated(RuntimeError(text)), MemoryError)
    assert not isinstance(onnxgraph.translated(RuntimeError("wrong shape")), MemoryError)


@pytest.mark.parametrize(
    ("changed", "precision", "says"),
    [
        (0, "fp32", ""),
        (3, "fp32", ""),
        (8, "fp32", "differs in a share of 0.002 of best; at most 0.001 is rounding"),
        (4000, "bf16", ""),
    ],
)
def test_whole_numbers_differ_only_where_rounding_decides(changed: int, precision: str, says: str) -> None:
    right = torch.arange(4000)
    found = {"best": torch.cat([right[:changed] + 1, right[changed:]])}
    net = dataclasses.replace(network(), outputs=("best",))
    with pytest.raises(NotRunnable, match=says) if says else contextlib.nullcontext():
        parity.compare(net, found, [right], [parity.allowed(right, precision)])


# ------------------------------------------------------------------------------------------------ real networks

# families, names of their networks that are tested, parameters; sizes are those of the tiny weights' own tests
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "yolo": ("yolo", "yolo", {"imgsz": 96}),
    "yolo, its whole head": ("yolo", "yolo", {"imgsz": 96, "conf": 0.01}),
    "dinov2": ("dinov2", "dinov2", {}),
    "sam": ("sam", "encoder", {}),
}


def _spread_yolo(folder: Path) -> Path:
    """Random weights whose outputs follow from the picture: those of a new model hardly leave the biases."""
    with ultralytics_checkpoints.library():
        from ultralytics.utils import ASSETS
    return of_yolo.checkpoint(folder, "yolov8n", list(of_yolo.pictures(Path(ASSETS)).values())[:2])


@pytest.fixture(scope="module", params=[*list(NETWORKS)[:3], pytest.param("sam", marks=pytest.mark.slow)])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    its, name, params = NETWORKS[request.param]
    family, card = models.family(its), models.family(its).CARDS[0]
    build = _spread_yolo if its == "yolo" else families.WEIGHTS[its]
    assert build is not None
    found: list[Network] = []

    def open_network(net: Network) -> runtimes.Session:
        found.append(net)
        return torch_runtime.open(net, "cpu", "fp32")

    family.load(card, card.params(**params), build(tmp_path_factory.mktemp(name)), Site("cpu", open_network))
    return next(net for net in found if net.name == name)


def _inputs(net: Network, batch: int, grown: int) -> dict[str, torch.Tensor]:
    """Random inputs of a batch, every other axis that may vary larger by some steps of 32."""
    torch.manual_seed(batch)
    shapes = {name: list(tensor.shape) for name, tensor in net.example.items()}
    for name, shape in shapes.items():
        for step, axis in enumerate(net.dynamic_axes[name]):
            shape[axis] = batch if axis == 0 else shape[axis] + 32 * grown * step
    return {
        name: torch.randint(0, 256, shape, dtype=torch.uint8) if name in net.pixels else torch.randn(shape)
        for name, shape in shapes.items()
    }


def test_real_networks_give_in_every_runtime_what_torch_gives(real: Network, files: Kept) -> None:
    """At batches of 1, 3 and 8, tall and wide."""
    exact = torch_runtime.open(real, "cpu", "fp32")
    _agree(real, {pair: opened(pair[0], real, pair[1], files) for pair in PAIRS if pair != ("torch", "fp32")}, exact)


@pytest.mark.slow
@pytest.mark.skipif(not inductor.installed(), reason="there is no C++ compiler")
def test_real_networks_give_as_they_are_compiled_what_torch_gives(real: Network, files: Kept) -> None:
    """On the CPU, which jobs do not take it for; each compilation takes a minute."""
    sessions = {("inductor", one): inductor.open(real, "cpu", one, files) for one in PRECISIONS}
    _agree(real, sessions, torch_runtime.open(real, "cpu", "fp32"))


def _agree(real: Network, sessions: Mapping[tuple[str, str], runtimes.Session], exact: runtimes.Session) -> None:
    for batch, grown in ((1, 0), (3, 1), (8, -1 if "yolo" in real.name else 0)):
        inputs = _inputs(real, batch, grown)
        right = exact(**inputs)
        for (name, precision), session in sessions.items():
            found = session(**inputs)
            for output in real.outputs:
                if not right[output].is_floating_point():  # the place of a largest number, of which there may be two
                    differ = float((found[output] != right[output]).double().mean())
                    assert differ < (1e-3 if precision == "fp32" else 0.2), (name, precision, output, batch)
                    continue
                allowed = 4 * ROUNDING[precision] * float(right[output].abs().max())
                text = f"{name} {precision} {output} {batch}"
                torch.testing.assert_close(found[output], right[output], atol=allowed, rtol=0, msg=text)


# ------------------------------------------------------------------------------------------------ a worker's models


def spec(tmp_path: Path, **changes: Any) -> JobSpec:
    """A job of the tiny dinov2, its weights in the store and in the folder `weights`."""
    store, path = open_store((tmp_path / "store").as_uri(), load()), tmp_path / "weights"
    path.mkdir()
    build = families.WEIGHTS["dinov2"]
    assert build is not None
    sha256 = weights.sha256_of(build(path))
    params = models.fill(models.card_for("d", "dinov2", "embedding"), {})
    base = {"dataset": "file:///x", "kind": "embedding", "family": "dinov2", "weights_sha256": sha256, "model": "d"}
    return JobSpec(**{**base, "params": params, "weights": weights.publish(store, path, sha256), **changes})


def test_a_worker_opens_its_model_in_the_jobs_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second worker of the fleet exports nothing, and both find what torch finds."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    store = open_store((tmp_path / "store").as_uri(), load())
    job = spec(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    answers, barriers = [], list[bool]()

    @contextlib.contextmanager
    def running(waits: bool) -> Iterator[None]:
        barriers.append(waits)
        yield

    for i, runtime in enumerate(["torch", "onnx", "onnx", "openvino"]):
        if i == 2:
            monkeypatch.setattr(exporting, "export", lambda *a: pytest.fail("it is exported already"))
        cache = load().model_copy(update={"cache": tmp_path / str(i)})
        held = Models(store, cache, "cpu", running=running)
        loaded = held.get(dataclasses.replace(job, runtime=runtime))
        assert (loaded.runtime, loaded.lanes) == (runtime, runtime != "torch")
        answers += loaded.model.infer([loaded.model.prepare(image, Item("k"))])
        held.close()
    assert all(families.same(answers[0], answer) for answer in answers[1:])
    assert barriers == [True, False, False, False]


@pytest.mark.parametrize("traces", [True, False])
def test_alone_in_a_process_only_what_cannot_be_traced_needs_a_child(
    traces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []
    monkeypatch.setattr(exporting, "export", lambda *a: children.append(a))
    job = JobSpec(dataset="x", kind="detections", family="yolo", weights_sha256="a", params={}, model="m")
    held = Models(open_store((tmp_path / "store").as_uri(), load()), load(), "cpu")
    net = network(copied)
    if not traces:
        monkeypatch.setattr(onnxgraph, "trace", _refuse)
    held._engines(job, None, True).export(net, "fp32", tmp_path / "x.onnx")
    assert len(children) == (0 if traces else 1)
    held._engines(job, None, False).export(net, "fp32", tmp_path / "y.onnx")
    assert len(children) == (1 if traces else 2)


def _refuse(*_: object) -> None:
    raise NotRunnable("it cannot be traced")


def test_an_engine_belongs_to_weights_and_parameters(tmp_path: Path) -> None:
    """A parameter may change what a network computes and neither its name nor its shapes."""
    held = Models(open_store((tmp_path / "store").as_uri(), load()), load(), "cpu")
    base = {"dataset": "x", "kind": "detections", "family": "yolo", "weights_sha256": "a", "params": {"nms": True}}
    job = JobSpec(**base, model="m")
    others = [{"weights_sha256": "b"}, {"params": {"nms": False}}, {"family": "rtdetr"}, {"kind": "masks"}]
    named = [held._engines(dataclasses.replace(job, **other), None, False).model for other in [{}, *others]]
    assert all(one != other for i, one in enumerate(named) for other in named[:i])
    assert held._engines(dataclasses.replace(job, dataset="y", model="n"), None, False).model == named[0]


def test_a_network_that_a_runtime_cannot_run_runs_in_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object) -> None:
        raise NotRunnable("the network dinov2 cannot be exported to ONNX")

    monkeypatch.setattr(exporting, "export", fails)
    held = Models(open_store((tmp_path / "store").as_uri(), load()), load().model_copy(), "cpu")
    job = spec(tmp_path, runtime="onnx")
    with caplog.at_level(logging.WARNING):
        loaded = held.get(job)
    assert loaded.runtime == "torch"
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert line == "d runs in torch instead of onnx: the network dinov2 cannot be exported to ONNX"
    assert loaded.model.infer([loaded.model.prepare(np.zeros((48, 64, 3), np.uint8), Item("k"))])
    with pytest.raises(BadInput, match="onnx runs in fp32 on cpu, but bf16"):
        held.get(dataclasses.replace(job, precision="bf16"))


@pytest.mark.slow
def test_a_model_computes_on_while_the_next_ones_network_is_exported(tmp_path: Path) -> None:
    """In a thread of its own, as the last batches of one job do; and what the child cannot do it says."""
    job, path, found = spec(tmp_path), tmp_path / "weights", []

    def open_network(net: Network) -> runtimes.Session:
        found.append(net)
        return torch_runtime.open(net, "cpu", "fp32")

    card = models.card_for(job.model, job.family, job.kind)
    model = models.family(job.family).load(card, card.params(**job.params), path, Site("cpu", open_network))
    batch = [model.prepare(np.zeros((48, 64, 3), np.uint8), Item("k"))]
    stop, wrong = threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            stop.wait(0.01)  # the child needs the processor too
            try:
                model.infer(batch)
            except Exception as error:  # noqa: BLE001 (whatever it is, the test says so)
                wrong.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        exporting.export(job, path, found[0], "fp32", tmp_path / "dinov2.onnx")
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert onnxgraph.opened(tmp_path / "dinov2.onnx", 1)(images=torch.zeros(1, 3, 56, 56))["output"].shape == (1, 64)
    with pytest.raises(NotRunnable, match="the model has no network 'other'; it has: dinov2"):
        exporting.export(job, path, dataclasses.replace(found[0], name="other"), "fp32", tmp_path / "x.onnx")


# ----------------------------------------------------------------------------------------------- TensorRT without a GPU


def test_a_profile_takes_what_may_vary() -> None:
    profile = tensorrt.Profile.of(network())
    assert str(profile) == "bias 1 8 32; images 1x3x1x1 8x3x8x8 32x3x8x8"
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    net = Network("n", Two, {"images": torch.zeros(2, 3, 640, 640)}, ("out",), axes)
    assert str(tensorrt.Profile.of(net)) == "images 1x3x32x32 8x3x640x640 32x3x640x640"
    fixed = dataclasses.replace(net, dynamic_axes={})
    assert str(tensorrt.Profile.of(fixed)) == "images 2x3x640x640 2x3x640x640 2x3x640x640"


def test_a_profile_grows_when_a_size_is_outside() -> None:
    profile = tensorrt.Profile({"x": ((1, 3, 32), (8, 3, 640), (32, 3, 640))})
    assert profile.covers({"x": (1, 3, 32)})
    assert profile.covers({"x": (32, 3, 640)})
    for shape in ((33, 3, 64), (1, 3, 641), (1, 3, 31), (1, 3), (1, 4, 64)):
        assert not profile.covers({"x": shape}), shape
    wide = profile.widened({"x": (1, 3, 700)})
    assert str(wide) == "x 1x3x32 8x3x640 32x3x1024"
    assert str(profile.widened({"x": (1, 3, 16)})) == "x 1x3x16 8x3x640 32x3x640"
    assert wide.covers({"x": (2, 3, 700)})
    assert wide.covers({"x": (2, 3, 640)})


def test_an_engine_is_named_by_all_that_it_depends_on() -> None:
    profile = tensorrt.Profile({"x": ((1,), (8,), (32,))})
    base = ("abc", profile, "fp16", "tensorrt 11.4", "H200 9.0")
    others = [
        ("abd", *base[1:]),
        ("abc", profile.widened({"x": (33,)}), *base[2:]),
        (*base[:2], "fp32", *base[3:]),
        (*base[:3], "tensorrt 11.5", base[4]),
        (*base[:4], "A10 8.6"),
    ]
    named = [str(tensorrt.about(*each)) for each in (base, *others)]
    assert len(set(named)) == 6


def test_the_plug_in_is_told_the_same_sizes(tmp_path: Path) -> None:
    profile = tensorrt.Profile({"x": ((1, 3), (8, 3), (32, 3)), "y": ((1,), (8,), (32,))})
    assert tensorrt.plugin_options(profile, tmp_path) == {
        "nv_profile_min_shapes": "x:1x3,y:1",
        "nv_profile_opt_shapes": "x:8x3,y:8",
        "nv_profile_max_shapes": "x:32x3,y:32",
        "nv_runtime_cache_path": str(tmp_path),
    }
    for known in ((8, 6), (8, 9), (12, 0), (12, 1)):
        tensorrt.check_capability(known)
    with pytest.raises(NotRunnable, match=r"this GPU has 9\.0; install tensorrt instead"):
        tensorrt.check_capability((9, 0))


def test_tensorrt_that_is_missing_says_the_remedy(monkeypatch: pytest.MonkeyPatch, files: Kept) -> None:
    monkeypatch.setattr(tensorrt, "installed", lambda: False)
    with pytest.raises(Misconfigured, match=r"pip install 'imagemill\[onnx,gpu\]', or pip install onnxruntime-ep-nv"):
        tensorrt.open(network(copied), "cuda", "fp16", files)


# ------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs_are_float32_and_near_the_exact_ones(precision: str) -> None:
    torch.manual_seed(0)
    module = Two()
    exact = Two()
    exact.load_state_dict(module.state_dict())
    session = torch_runtime.open(network(lambda: module), "cpu", precision)
    for shape in ((1, 3, 8, 8), (5, 3, 12, 20)):
        images, bias = torch.rand(shape), torch.rand(shape[0])
        out = session(images=images, bias=bias)
        assert list(out) == ["out", "best"]
        assert out["out"].dtype == torch.float32
        assert out["best"].dtype == torch.int64
        with torch.no_grad():
            expected = exact(images, bias)[0]
        torch.testing.assert_close(out["out"], expected, atol=1e-6 if precision == "fp32" else 0.03, rtol=0)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(module.seen) == {(wanted, True, False)}


def test_inputs_go_by_name_not_by_order() -> None:
    session = torch_runtime.open(network(), "cpu", "fp32")
    images, bias = torch.rand(2, 3, 8, 8), torch.tensor([1.0, -1.0])
    assert torch.equal(session(images=images, bias=bias)["out"], session(bias=bias, images=images)["out"])


def test_no_gradients_are_kept() -> None:
    out = torch_runtime.open(network(), "cpu", "fp32")(images=torch.rand(1, 3, 8, 8), bias=torch.zeros(1))["out"]
    assert not out.requires_grad
    assert out.grad_fn is None


def test_one_tensor_is_a_tuple_of_one() -> None:
    single = Network("one", lambda: torch.nn.Linear(3, 2), {"x": torch.zeros(1, 3)}, ("y",))
    assert torch_runtime.open(single, "cpu", "fp32")(x=torch.zeros(4, 3))["y"].shape == (4, 2)


def test_a_wrong_number_of_outputs_is_noticed() -> None:
    wrong = Network("one", lambda: torch.nn.Linear(3, 2), {"x": torch.zeros(1, 3)}, ("y", "z"))
    with pytest.raises(ValueError, match="shorter"):
        torch_runtime.open(wrong, "cpu", "fp32")(x=torch.zeros(4, 3))


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(BadInput, match="unknown precision 'int8'; known: fp32, bf16, fp16"):
        torch_runtime.open(network(), "cpu", "int8")


def test_threads_of_onnx_runtime_sleep_between_batches() -> None:
    assert onnxgraph.options(2).get_session_config_entry("session.force_spinning_stop") == "1"
