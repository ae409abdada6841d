"""ultralytics' own predict over a folder of pictures, in batches.

    python -P benchmarks/peers/ultralytics_predict.py FOLDER --weights yolov8n.pt [--count 160]

How many threads torch takes is the caller's choice of OMP_NUM_THREADS; importing ultralytics sets it to 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common
from benchmarks.workloads import BATCH


def main() -> None:
    """Predict, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", default="yolov8n.pt")
    parser.add_argument("--count", type=int, default=160)
    arguments = parser.parse_args()
    common.need("ultralytics")
    weights = arguments.folder / arguments.weights
    if not weights.exists():
        common.leave_out(f"ultralytics could not export {arguments.weights}")
    os.environ.setdefault("YOLO_CONFIG_DIR", str(arguments.folder))
    from ultralytics import YOLO

    sources = [str(path) for path in sorted((arguments.folder / "pictures").glob("*.jpg"))[: arguments.count]]
    listed = arguments.folder / f"first-{len(sources)}.txt"
    listed.write_text("\n".join(sources))
    pace = common.Pace(BATCH)
    model = YOLO(str(weights), task="detect")
    for _ in model.predict(source=str(listed), stream=True, batch=BATCH, imgsz=640, verbose=False, device="cpu"):
        pace.add(1)
    common.answer(rate=pace.rate)


if __name__ == "__main__":
    main()
