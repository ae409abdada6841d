"""The section on whole jobs: files to committed results through a real worker, beside the network alone.

Where the package or what it needs is not installed, decoding, preparing and the device run in one process instead.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import mill
from benchmarks.gpu_sections import bench as shared
from benchmarks.gpu_sections import dinov2
from benchmarks.gpu_sections.bench import Bench, jpegs
from benchmarks.mill import Mill


def run(bench: Bench) -> None:
    """YOLO n, s and x, and DINOv2 s."""
    works = workloads(bench)
    pictures = dataset(bench)
    head = ("network", "precision", "how", "images a second", "network alone", "share of it", "the device waited")
    if not mill.PROGRAM.exists():
        bench.say(f"There is no {mill.PROGRAM}: decoding, preparing and the device run in one process instead.")
        bench.head(*head)
        for name, family, kind, weights, params in works:
            take = functools.partial(in_process, bench, family, kind, weights, params, pictures)
            bench.attempt(name, precision(bench), "in one process", take=take)
        return
    bench.head(*head)
    with Mill(bench.folder / "home", "gpu" if bench.on_gpu else "cpu") as imagemill:
        jobs(bench, imagemill, "imagemill", works, pictures)
    if bench.on_gpu:
        with Mill(bench.folder / "decoding-home", "gpu", gpu_decode="true") as imagemill:
            jobs(bench, imagemill, "imagemill, JPEGs decoded by the GPU", works, pictures)


Work = tuple[str, str, str, Path, dict[str, Any]]  # name, family, kind, weights, parameters


def jobs(bench: Bench, imagemill: Mill, how: str, works: Sequence[Work], pictures: Path) -> None:
    """A line for each network."""
    for name, family, kind, weights, params in works:
        take = functools.partial(as_job, bench, imagemill, family, kind, weights, params, pictures)
        bench.attempt(name, precision(bench), how, take=take)


def precision(bench: Bench) -> str:
    """What a job on this device is best asked for."""
    return "fp16" if bench.on_gpu else "fp32"


def dataset(bench: Bench) -> Path:
    """JPEGs with names of their own, 40 of them unlike."""
    folder = bench.folder / "pictures"
    folder.mkdir()
    count = 24 if bench.quick else 8192 if bench.on_gpu else 256
    drawn = jpegs(min(count, 40), *((96, 64) if bench.quick else (960, 640)))
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if i < len(drawn):
            path.write_bytes(drawn[i])
        else:
            path.hardlink_to(folder / f"{i % len(drawn):06d}.jpg")
    return folder


def workloads(bench: Bench) -> list[Work]:
    """What can be run here."""
    found: list[Work] = []
    side = 64 if bench.quick else 640
    for name in ("yolov8n",) if bench.quick or not bench.on_gpu else ("yolov8n", "yolov8s", "yolov8x"):
        with bench.without(name):
            found.append((name, "yolo", "detections", shared.yolo_weights(bench.folder, name), {"imgsz": side}))
    with bench.without("dinov2_vits14"):
        sizes = (32, 2, 2) if bench.quick else dinov2.SIZES["dinov2_vits14"]
        weights = shared.dinov2_weights(bench.folder, "dinov2_vits14", *sizes)
        found.append(("dinov2_vits14", "dinov2", "embedding", weights, {"imgsz": 28 if bench.quick else 224}))
    return found


def alone(bench: Bench, family: str, kind: str, weights: Path, params: dict[str, Any], pictures: Path) -> float:
    """Items a second of the network, given again and again what a job gives it of some of the pictures."""
    from workers import images
    from workers.models import Item

    calls: list[Callable[[], Any]] = []

    def remembering(session: Any) -> Any:
        def run(**inputs: Any) -> Any:
            calls.append(functools.partial(session, **inputs))
            return session(**inputs)

        return run

    model = shared.load(bench, family, weights, params, kind, precision(bench), remembering)
    paths = sorted(pictures.iterdir())[: batch(bench)]
    prepared = [
        model.prepare(images.decode(path.read_bytes(), images.Limits()).pixels, Item(path.name)) for path in paths
    ]
    model.infer(prepared)
    (again,) = calls
    return bench.rate(lambda: len(again() and prepared))


def batch(bench: Bench) -> int:
    """As jobs have by default."""
    return 32 if bench.on_gpu else 8


def as_job(
    bench: Bench, imagemill: Mill, family: str, kind: str, weights: Path, params: dict[str, Any], pictures: Path
) -> tuple[object, ...]:
    """Through a worker that stays; the second job, whose model is loaded already."""
    bare = alone(bench, family, kind, weights, params, pictures)
    bench.free()  # the worker shares the device
    options = {"precision": precision(bench), "imgsz": params["imgsz"], "device": "gpu" if bench.on_gpu else "cpu"}
    for _ in range(2):
        figures = imagemill.job(kind, pictures, str(weights), **options)
    return figures["rate"], bare, f"{figures['rate'] / bare:.2f}", f"{figures['idle']:.1%}"


def in_process(
    bench: Bench, family: str, kind: str, weights: Path, params: dict[str, Any], pictures: Path
) -> tuple[object, ...]:
    """Threads decode and prepare, this one infers: a lower bound of what a worker does."""
    from workers import images
    from workers.models import Item

    bare = alone(bench, family, kind, weights, params, pictures)
    model = shared.load(bench, family, weights, params, kind, precision(bench))
    paths, limits, size = sorted(pictures.iterdir()), images.Limits(), batch(bench)

    def ready(path: Path) -> Any:
        return model.prepare(images.decode(path.read_bytes(), limits).pixels, Item(path.name))

    def whole() -> int:
        done, waiting = 0, []
        for prepared in pool.map(ready, paths):
            waiting.append(prepared)
            if len(waiting) == size:
                done, waiting = done + len(model.infer(waiting)), []
        return done + (len(model.infer(waiting)) if waiting else 0)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rate = bench.rate(whole)
    return rate, bare, f"{rate / bare:.2f}", ""
