"""The section on what a lower precision costs: boxes of the demo's trained detector against fp32 on the CPU."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.gpu_sections import bench as shared
from benchmarks.gpu_sections.bench import Bench, expect, need

DEMO = common.ROOT / "demo" / "shapes-yolov8.pt"


def run(bench: Bench) -> None:
    """Each precision over the demo's pictures."""
    import numpy as np

    need("ultralytics", "cv2", "torchvision")
    pictures = scenes(8 if bench.quick else 200)
    expected = detected(load("cpu", "fp32"), pictures)
    expect(sum(len(one.labels) for one in expected) > len(pictures), "the demo's detector finds too little on the CPU")
    bench.head("precision", "pictures with the same labels in the same order", "there boxes within", "scores within")
    for precision in ("fp32", "bf16", "fp16") if bench.on_gpu else ("fp32", "bf16"):

        def take(precision: str = precision) -> tuple[object, ...]:
            found = detected(load(bench.device, precision), pictures)
            same = [(a, b) for a, b in zip(expected, found, strict=True) if a.labels == b.labels]
            boxes = max((float(np.abs(a.boxes_xyxy - b.boxes_xyxy).max(initial=0)) for a, b in same), default=0.0)
            scores = max((float(np.abs(a.scores - b.scores).max(initial=0)) for a, b in same), default=0.0)
            if precision == "fp32":
                expect(len(same) == len(pictures) and boxes < 0.5, f"fp32 differs: {len(same)} alike, {boxes:.2f} px")
            return f"{len(same)} of {len(pictures)}", f"{boxes:.3f} px", f"{scores:.4f}"

        bench.attempt(precision, take=take)


def load(device: str, precision: str, imgsz: int = 256) -> Any:
    """The demo's detector, at the size it was trained for unless asked otherwise."""
    return shared.load(Bench(device, True, Path()), "yolo", DEMO, {"imgsz": imgsz}, "detections", precision)


def scenes(count: int) -> list[Any]:
    """Pictures as the demo renders them."""
    sys.path.insert(0, str(common.ROOT / "demo"))
    import scenes

    from workers import images

    with tempfile.TemporaryDirectory() as folder:
        scenes.write_scenes(Path(folder), count, 7, Path(folder) / "truth.json")
        paths = sorted((Path(folder) / "images").glob("*.jpg"))
        return [images.decode(path.read_bytes(), images.Limits()).pixels for path in paths]


def detected(detector: Any, pictures: list[Any], size: int = 8) -> list[Any]:
    """Results in the order of the pictures, batched by the model's own groups."""
    from workers.models import Item

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
