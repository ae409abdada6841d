"""Knows how to measure a detector file on drawn scenes: runs ultralytics over a scene folder and prints the mAP.

This is the plain path, one picture at a time, that the figures in the model card come from.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import evaluate
import train


def detect(weights: Path, images: Path, imgsz: int, conf: float) -> dict[str, list[evaluate.Prediction]]:
    """Return the boxes found in each picture of a folder, in pixels of that picture, by file name.

    `imgsz` is the longer side of the model's input in pixels, `conf` the lowest score kept.
    """
    from ultralytics import YOLO

    model = YOLO(str(weights))
    found: dict[str, list[evaluate.Prediction]] = {}
    for path in sorted(images.iterdir()):
        boxes = model.predict(str(path), imgsz=imgsz, conf=conf, device="cpu", verbose=False)[0].boxes
        rows = zip(boxes.cls.tolist(), boxes.conf.tolist(), boxes.xyxy.tolist(), strict=True)
        found[path.name] = [(model.names[int(number)], score, box) for number, score, box in rows]
    return found


def main() -> None:
    """Read the command line, run the detector and print the figures."""
    parser = argparse.ArgumentParser(description="Measure detector weights on a folder written by scenes.py.")
    parser.add_argument("weights", type=Path)
    parser.add_argument("scenes", type=Path, help="folder with images/ and truth.json")
    parser.add_argument("--imgsz", type=int, default=train.IMAGE_SIZE, help="model input size in pixels")
    parser.add_argument("--conf", type=float, default=0.25, help="lowest score kept")
    args = parser.parse_args()
    truth: evaluate.Truth = json.loads((args.scenes / "truth.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="shapes-") as scratch:
        train.prepare_environment(Path(scratch))
        found = detect(args.weights, args.scenes / "images", args.imgsz, args.conf)
    figure50 = evaluate.mean_average_precision(found, truth)
    figure50_95 = evaluate.mean_average_precision_50_95(found, truth)
    print(f"{len(truth)} scenes, imgsz {args.imgsz}, conf {args.conf}: mAP50 {figure50:.4f} mAP50-95 {figure50_95:.4f}")


if __name__ == "__main__":
    main()
