"""The pipelines of transformers over a list of files: image-feature-extraction or object-detection.

python -P benchmarks/peers/hf_pipeline.py FOLDER --workload dinov2 --precision bf16 [--count 160]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common
from benchmarks.workloads import BATCH

TASKS = {"dinov2": "image-feature-extraction", "yolos": "object-detection"}


def main() -> None:
    """Run the pipeline, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", choices=sorted(TASKS), default="dinov2")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--count", type=int, default=160)
    arguments = parser.parse_args()
    common.need("torch", "transformers")
    import torch
    from transformers import pipeline

    weights = str(arguments.folder / arguments.workload)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    run = pipeline(
        TASKS[arguments.workload], model=weights, image_processor=weights, device="cpu", dtype=dtype, use_fast=True
    )
    paths = sorted((arguments.folder / "pictures").glob("*.jpg"))[: arguments.count]

    def sources() -> Iterator[str]:
        yield from map(str, paths)

    pace = common.Pace(BATCH)
    with torch.inference_mode():
        for _ in run(sources(), batch_size=BATCH):
            pace.add(1)
    common.answer(rate=pace.rate)


if __name__ == "__main__":
    main()
