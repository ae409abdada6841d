"""The section on YOLOv8 n, s and x at 640: the network alone, and with all that the device's thread does around it."""

from __future__ import annotations

from benchmarks.gpu_sections import bench as shared
from benchmarks.gpu_sections import forward
from benchmarks.gpu_sections.bench import Bench, jpegs


def run(bench: Bench) -> None:
    """Every way of each size; then prepare and infer."""
    names = ("yolov8n",) if bench.quick or not bench.on_gpu else ("yolov8n", "yolov8s", "yolov8x")
    size, batches = (64, (2,)) if bench.quick else (640, (1, 8, 32) if bench.on_gpu else (8,))
    bench.head(*forward.HEAD)
    for name in names:
        weights = shared.yolo_weights(bench.folder, name)
        network = shared.networks(bench, "yolo", weights, {"imgsz": size}, "detections")["yolo"]
        forward.table(bench, name, network, batches)
    bench.head("network", "precision", "batch", "infer: copy, network, NMS, boxes", "prepare: letterbox, one thread")
    for name in names:
        around(bench, name, size, batches[-1])


def around(bench: Bench, name: str, size: int, batch: int) -> None:
    """What a worker does with decoded pictures, in the precision that it would take."""
    from workers import images
    from workers.models import Item

    precision = "fp16" if bench.on_gpu else "fp32"

    def take() -> tuple[object, ...]:
        weights = shared.yolo_weights(bench.folder, name)
        model = shared.load(bench, "yolo", weights, {"imgsz": size}, "detections", precision)
        pictures = [images.decode(data, images.Limits()).pixels for data in jpegs(batch, size, size * 3 // 4)]
        prepared = [model.prepare(picture, Item("x")) for picture in pictures]
        infer = bench.rate(lambda: len(model.infer(prepared)))
        return infer, bench.rate(lambda: len([model.prepare(picture, Item("x")) for picture in pictures]))

    bench.attempt(name, precision, batch, take=take)
