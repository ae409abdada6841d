"""The section on Inductor, ONNX Runtime, OpenVINO, TensorRT: whether they run, agree with torch, how fast they are."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_sections import bench as shared
from benchmarks.gpu_sections import dinov2, forward
from benchmarks.gpu_sections.bench import Bench, expect

AGREES = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}  # of the largest number; worse than that is another network


class Files:
    """Where runtimes keep what they build: a folder of this run, so that building is measured too."""

    model: Mapping[str, str] = {}

    def __init__(self, folder: Path) -> None:
        self._folder, self._there = folder, dict[tuple[Any, ...], Path]()
        self.seconds = 0.0

    def export(self, network: Any, precision: str, path: Path) -> None:
        """In this process, where no other thread computes."""
        from workers import onnxgraph

        with shared.quiet():
            onnxgraph.export(network, precision, path)

    def compile(self, network: Any, device: str, precision: str, path: Path) -> None:
        """In this process too."""
        from workers.runtimes import inductor

        with shared.quiet():
            inductor.compile(network, device, precision, path)

    def here(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        """As any other."""
        return self.get(about, name, build)

    def get(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        """Built once."""
        key = tuple(sorted(about.items()))
        if key not in self._there:
            path = self._folder / f"{len(self._there)}-{name}"
            started = time.perf_counter()
            build(path)
            self.seconds += time.perf_counter() - started
            self._there[key] = path
        return self._there[key]


def run(bench: Bench) -> None:
    """Each runtime with each network in each precision that it has on this device."""
    from workers import runtimes

    there = [name for name in runtimes.names() if name != "torch" and runtimes.precisions(name, bench.device)]
    bench.say(f"On this device: {', '.join(there)}. Precisions and batches as a job would ask for them.")
    if "tensorrt" in there:
        bench.say(f"TensorRT is here as: {provider()}.")
    bench.head("network", "runtime", "precision", "batch", "a second", "off from torch fp32", "export and build")
    for name, network in chosen(bench):
        for runtime in there:
            for precision in runtimes.precisions(runtime, bench.device):
                batch = 2 if bench.quick else 32 if bench.on_gpu else 8
                take = functools.partial(measured, bench, name, network, runtime, precision, batch)
                bench.attempt(name, runtime, precision, batch, take=take)
    graphs(bench)


def graphs(bench: Bench) -> None:
    """The runtime torch with and without CUDA graphs, which have to give the same."""
    if not bench.on_gpu:
        bench.say("\nWithout a GPU there are no CUDA graphs.")
        return
    bench.say("")
    bench.head("network", "precision", "batch", "graph, a second", "without, a second", "ratio", "off")
    for name, network in chosen(bench):
        for precision in ("fp32", "fp16"):
            for batch in (1, 8, 64):
                take = functools.partial(as_graph, bench, network, precision, batch)
                bench.attempt(name, precision, batch, take=take)


def as_graph(bench: Bench, network: Any, precision: str, batch: int) -> tuple[object, ...]:
    """Rates of a session that replays a graph, and of one that may not."""
    from workers import graphed
    from workers.runtimes import torch

    inputs = forward.batched(network, batch, bench.device)
    rates, outs = [], []
    for after in (graphed._AFTER, 10**9):
        before, graphed._AFTER = graphed._AFTER, after
        try:
            session = torch.open(network, bench.device, precision)
            for _ in range(before + 1):
                out = session(**inputs)
            outs.append([out[name] for name in network.outputs])
            rates.append(bench.rate(lambda session=session: len(session(**inputs)[network.outputs[0]])))
        finally:
            graphed._AFTER = before
    off = forward.difference(*outs)
    expect(off <= 1e-2, f"a graph differs by {off:.1e} of the largest number")
    return rates[0], rates[1], f"{rates[0] / rates[1]:.2f}", f"{off:.1e}"


def provider() -> str:
    """Which of the two ways to TensorRT there is."""
    from importlib.metadata import PackageNotFoundError, version

    for package in ("tensorrt", "onnxruntime-ep-nv-tensorrt-rtx-cu13"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "not installed (pip install tensorrt pycuda, or onnxruntime-ep-nv-tensorrt-rtx-cu13)"


def check_card() -> None:
    """Raise LeftOut where the plug-in is all there is of TensorRT, and it does not know the card."""
    import torch

    from workers.runtimes import NotRunnable, tensorrt

    if importlib.util.find_spec("tensorrt") is None and tensorrt.installed():
        try:
            tensorrt.check_capability(torch.cuda.get_device_capability(0))
        except NotRunnable as error:
            raise shared.LeftOut(str(error)) from error


def chosen(bench: Bench) -> list[tuple[str, Any]]:
    """Networks of YOLO and DINOv2, as their families ask for them; those whose libraries are missing are left out."""
    found: list[tuple[str, Any]] = []
    side = 64 if bench.quick else 640
    for name in ("yolov8n",) if bench.quick or not bench.on_gpu else ("yolov8n", "yolov8s", "yolov8x"):
        with bench.without(name):
            weights = shared.yolo_weights(bench.folder, name)
            found.append((name, shared.networks(bench, "yolo", weights, {"imgsz": side}, "detections")["yolo"]))
    for name in ("a tiny DINOv2",) if bench.quick else ("dinov2_vits14", "dinov2_vitb14"):
        with bench.without(name):
            sizes = dinov2.SIZES.get(name, (32, 2, 2))
            weights = shared.dinov2_weights(bench.folder, name, *sizes)
            size = 28 if bench.quick else 224
            found.append((name, shared.networks(bench, "dinov2", weights, {"imgsz": size}, "embedding")["dinov2"]))
    return found


def measured(bench: Bench, name: str, network: Any, runtime: str, precision: str, batch: int) -> tuple[object, ...]:
    """Rate, difference, and seconds of building; a runtime that cannot run it is left out with its reason."""
    from storage.errors import ImagemillError
    from workers import runtimes

    if runtime == "tensorrt":
        check_card()
    folder = bench.folder / f"{name}-{runtime}-{precision}".replace(" ", "-")
    folder.mkdir()
    files = Files(folder)
    try:
        session = runtimes.open_network(runtime, network, bench.device, precision, files)
    except ImagemillError as error:
        if isinstance(error, runtimes.NotRunnable):
            raise  # it is there and should have run this
        raise shared.LeftOut(str(error)) from error
    inputs = forward.batched(network, batch, bench.device)
    with forward.numbers(forward.FP32):
        module = forward.session(bench, network, forward.FP32)
        expected = forward.check_alive(module, forward.floats(network, inputs))
    out = session(**inputs)
    found = [out[name] for name in network.outputs]
    off = forward.difference(found, expected)
    expect(off <= AGREES[precision], f"differs from torch by {off:.1e} of the largest number")
    one = session(**{given: tensor[:1] for given, tensor in inputs.items()})
    expect(all(len(one[name]) == 1 for name in network.outputs), "one picture alone gives more than one answer")
    rate = bench.rate(lambda: len(session(**inputs)[network.outputs[0]]))
    return rate, f"{off:.1e}", f"{files.seconds:.1f} s"
