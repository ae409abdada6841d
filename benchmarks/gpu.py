"""Checks and times everything there is on a GPU, from a bare checkout with torch installed; without one, on the CPU.

    python -P benchmarks/gpu.py [--quick] [--out RESULTS.md]

What is not installed is left out and said so. Sections: decoding, the YOLO network bare in each precision and batch,
its boxes in each precision against fp32, prepare + infer together, and what happens when the memory runs out.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="imagemill-gpu-"))

from workers.models import Item

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "shapes-yolov8.pt"


class Report:
    """Lines for people, printed as they come and kept for the file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str = "") -> None:
        """Print and keep."""
        print(line, flush=True)
        self.lines.append(line)


def main() -> int:
    """Run every section; one that fails is told and does not keep the others from running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds, not minutes: to see that it runs")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report.say(f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')}")
    failed = 0
    for section in (decoding, bare_forward, precisions, whole_batches, out_of_memory):
        report.say(f"\n## {section.__name__.replace('_', ' ')}")
        try:
            section(report, device, arguments.quick)
        except ImportError as error:
            report.say(f"left out: {error.name} is not installed")
        except Exception as error:  # noqa: BLE001 (a section may fail in any way; the others still tell something)
            failed += 1
            report.say(f"FAILED: {type(error).__name__}: {error}")
    if arguments.out:
        arguments.out.write_text("\n".join(report.lines) + "\n")
    return 1 if failed else 0


def rate(work: Callable[[], int], device: str, seconds: float, rounds: int = 3) -> float:
    """Items a second of `work`, which returns how many it did: the median of a few rounds, the device waited for."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    work()
    wait()
    rates = []
    for _ in range(rounds):
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            count += work()
        wait()
        rates.append(count / (time.perf_counter() - started))
    return statistics.median(rates)


def jpegs(count: int, width: int = 640, height: int = 480) -> list[bytes]:
    """Smooth coloured pictures, as JPEG bytes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        small = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def decoding(report: Report, device: str, quick: bool) -> None:
    """Pictures a second, by threads on the CPU and where there is one on the GPU."""
    import torch
    import torchvision

    from workers import images

    pictures = jpegs(64)
    here = images.Here(images.Limits())
    with ThreadPoolExecutor() as pool:
        cpu = rate(lambda: len(list(pool.map(here.decode, pictures))), "cpu", 0.5 if quick else 3)
    report.say(f"CPU, all threads                {cpu:9.0f} images/s")
    if device == "cuda":
        data = [torch.frombuffer(bytearray(p), dtype=torch.uint8) for p in pictures]
        gpu = rate(lambda: len(torchvision.io.decode_jpeg(data, device="cuda")), device, 0.5 if quick else 3)
        report.say(f"GPU, torchvision, batches of 64 {gpu:9.0f} images/s")


def _weights(folder: Path, name: str) -> Path:
    from ultralytics import YOLO

    path = folder / f"{name}.pt"
    YOLO(f"{name}.yaml").save(str(path))
    return path


def _load(weights: Path, device: str, precision: str, **params: Any) -> tuple[Any, list[Any]]:
    """A detector, and the sessions it opened."""
    from workers.models import Site, card_for, yolo
    from workers.runtimes import torch as runtime

    sessions: list[Any] = []

    def open_network(network: Any) -> Any:
        sessions.append(runtime.open(network, device, precision))
        return sessions[-1]

    return yolo.load(
        card_for("bench", "yolo", "detections"), yolo.Params(**params), weights, Site(device, open_network)
    ), sessions


def bare_forward(report: Report, device: str, quick: bool) -> None:
    """The network alone, channels-last, at 640."""
    import torch

    names = ("yolov8n",) if quick or device == "cpu" else ("yolov8n", "yolov8s", "yolov8x")
    batches = (8,) if quick or device == "cpu" else (1, 8, 32, 64)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            weights = _weights(Path(folder), name)
            for precision in ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32", "bf16"):
                _, sessions = _load(weights, device, precision)
                for batch in batches:
                    images = torch.rand(batch, 3, 640, 640, device=device).contiguous(memory_format=torch.channels_last)
                    value = rate(lambda s=sessions[0], x=images: len(s(images=x)) and len(x), device, 1 if quick else 3)
                    report.say(f"{name:<8} {precision}  batch {batch:<3} {value:9.1f} images/s")


def _scenes(count: int) -> list[Any]:
    sys.path.insert(0, str(ROOT / "demo"))
    import scenes

    from workers import images

    with tempfile.TemporaryDirectory() as folder:
        scenes.write_scenes(Path(folder), count, 7, Path(folder) / "truth.json")
        paths = sorted((Path(folder) / "images").glob("*.jpg"))
        return [images.decode(path.read_bytes(), images.Limits()).pixels for path in paths]


def precisions(report: Report, device: str, quick: bool) -> None:
    """The trained demo detector: boxes of each precision on this device against fp32 on the CPU."""
    import numpy as np

    pictures = _scenes(24 if quick else 200)
    reference, _ = _load(DEMO, "cpu", "fp32", imgsz=256)
    expected = _detect(reference, pictures)
    for precision in ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32", "bf16"):
        detector, _ = _load(DEMO, device, precision, imgsz=256)
        found = _detect(detector, pictures)
        same = [(a, b) for a, b in zip(expected, found, strict=True) if a.labels == b.labels]
        boxes = max((float(np.abs(a.boxes_xyxy - b.boxes_xyxy).max(initial=0)) for a, b in same), default=0.0)
        scores = max((float(np.abs(a.scores - b.scores).max(initial=0)) for a, b in same), default=0.0)
        report.say(
            f"{precision}: equal labels in equal order on {len(same)} of {len(pictures)} pictures; "
            f"there boxes within {boxes:.3f} px, scores within {scores:.4f}"
        )


def _detect(detector: Any, pictures: list[Any], size: int = 8) -> list[Any]:
    """Results in the order of the pictures, batched by the model's own groups."""
    prepared = [detector.prepare(picture, Item(str(i))) for i, picture in enumerate(pictures)]
    groups: dict[Any, list[int]] = {}
    for i, one in enumerate(prepared):
        groups.setdefault(one.group, []).append(i)
    found: dict[int, Any] = {}
    for members in groups.values():
        for start in range(0, len(members), size):
            part = members[start : start + size]
            found.update(zip(part, detector.infer([prepared[i] for i in part]), strict=True))
    return [found[i] for i in range(len(pictures))]


def whole_batches(report: Report, device: str, quick: bool) -> None:
    """Letterbox, copy, network, NMS, boxes on the host: what the device thread of a worker does, and its share."""
    with tempfile.TemporaryDirectory() as folder:
        weights = _weights(Path(folder), "yolov8n")
        detector, _ = _load(weights, device, "fp32" if device == "cpu" else "fp16")
        from workers import images

        pictures = [images.decode(data, images.Limits()).pixels for data in jpegs(32)]
        prepared = [detector.prepare(picture, Item("x")) for picture in pictures]
        size = 8 if device == "cpu" else 32
        infer = rate(lambda: len(detector.infer(prepared[:size])), device, 1 if quick else 3)
        prepare = rate(lambda: len([detector.prepare(p, Item("x")) for p in pictures]), "cpu", 1 if quick else 3)
        report.say(f"prepare, one thread             {prepare:9.1f} images/s")
        report.say(f"infer, batch {size:<3}                {infer:9.1f} images/s")


def out_of_memory(report: Report, device: str, quick: bool) -> None:
    """A batch that does not fit is halved until it does, and every picture still gets its result."""
    from workers import batches

    if device == "cpu":
        report.say("needs a GPU; on the CPU a model that pretends is tested in tests/workers")
        return
    pictures = jpegs(64, 1280, 1280)
    from workers import images

    with tempfile.TemporaryDirectory() as folder:
        detector, _ = _load(_weights(Path(folder), "yolov8x"), device, "fp32", imgsz=1280)
        prepared = [detector.prepare(images.decode(p, images.Limits()).pixels, Item("x")) for p in pictures]
        many = prepared * (1 if quick else 16)
        size = batches.BatchSize(len(many))
        answers = batches.infer(detector, many, size)
    report.say(f"{len(answers)} answers of {len(many)}, batch {size.asked} -> {size.safe}")


if __name__ == "__main__":
    sys.exit(main())
