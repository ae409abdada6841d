"""Ray Data: read_images, then map_batches with an actor that holds an ultralytics model.

    .venv-bench/bin/python -P benchmarks/peers/ray_data.py FOLDER [--count 160]

Ray lives in .venv-bench (make bench-peers), which sees torch and ultralytics of .venv, so both sides run the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common
from benchmarks.workloads import BATCH


class Detector:
    """The actor: boxes of each picture, and when its batch was done (seconds since the epoch)."""

    def __init__(self, weights: str) -> None:
        from ultralytics import YOLO

        self._model = YOLO(weights)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        pictures = [image[..., ::-1] for image in batch["image"]]  # predict takes BGR
        found = self._model.predict(pictures, imgsz=640, verbose=False, device="cpu")
        count = len(found)
        return {"boxes": np.array([len(one.boxes) for one in found]), "ended": np.full(count, time.time())}


def main() -> None:
    """Run the pipeline, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=160)
    arguments = parser.parse_args()
    common.need("ray", "ultralytics")
    weights = str(arguments.folder / "yolov8n.pt")
    variables = {"OMP_NUM_THREADS": str(os.cpu_count()), "YOLO_CONFIG_DIR": str(arguments.folder)}
    os.environ.update(variables, RAY_DATA_DISABLE_PROGRESS_BARS="1")
    import ray

    cores = os.cpu_count()
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    paths = [str(path) for path in sorted((arguments.folder / "pictures").glob("*.jpg"))[: arguments.count]]
    found = ray.data.read_images(paths).map_batches(
        Detector, batch_size=BATCH, concurrency=1, num_cpus=1, fn_constructor_args=(weights,)
    )
    # The actor's own clock: blocks arrive here in bursts.
    ended = sorted(moment for batch in found.iter_batches(batch_size=BATCH) for moment in batch["ended"])
    later = [moment for moment in ended if moment > ended[0]]
    if not later:
        common.leave_out("more pictures are needed than one batch")
    common.answer(rate=len(later) / (later[-1] - ended[0]))


if __name__ == "__main__":
    main()
