"""The section on DINOv2 s, b and l at 224 and 518 pixels, random weights."""

from __future__ import annotations

from benchmarks.gpu_sections import bench as shared
from benchmarks.gpu_sections import forward
from benchmarks.gpu_sections.bench import Bench

# name -> width, layers, heads (the paper's table of architectures, arXiv 2304.07193)
SIZES = {"dinov2_vits14": (384, 12, 6), "dinov2_vitb14": (768, 12, 12), "dinov2_vitl14": (1024, 24, 16)}


def run(bench: Bench) -> None:
    """Every way of each."""
    chosen = {"a tiny one": (32, 2, 2)} if bench.quick else dict([*SIZES.items()][: None if bench.on_gpu else 1])
    bench.head(*forward.HEAD)
    for name, architecture in chosen.items():
        for side in (28,) if bench.quick else (224, 518):
            weights = shared.dinov2_weights(bench.folder, name, *architecture)
            network = shared.networks(bench, "dinov2", weights, {"imgsz": side}, "embedding")["dinov2"]
            batches = (2,) if bench.quick else ((1, 32, 128) if side == 224 else (1, 32)) if bench.on_gpu else (8,)
            forward.table(bench, f"{name} {side}", network, batches)
