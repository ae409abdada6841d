"""imagemill end to end against the bare forward pass and ultralytics' own predict: same pictures, same weights, fp32.

    python -P benchmarks/end_to_end.py [--pictures 160] [--rounds 3]

yolov8n at 640 with random weights (speed does not depend on them), rendered pictures, batch 8, all cores. imagemill's
figure is a whole job's items by the time from its first claim to its end, on a worker that holds the model already.
Each round runs the three one after another; the medians and their ratios are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH, IMGSZ = 8, 640

_MAKE = """
import sys
from ultralytics import YOLO
YOLO("yolov8n.yaml").save(sys.argv[1])
"""

_PICTURES = """
import sys
import numpy as np
from PIL import Image
rng = np.random.default_rng(1)
for i in range(int(sys.argv[2])):
    small = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(f"{sys.argv[1]}/{i:05d}.jpg", quality=90)
"""

_BARE = """
import sys, time
from pathlib import Path
import torch
from workers.models import Site, card_for, yolo
from workers.runtimes import torch as runtime
from workers.runtimes import Network
sessions = []
def open_network(network):
    sessions.append(runtime.open(network, "cpu", "fp32"))
    return sessions[-1]
yolo.load(card_for("n", "yolo", "detections"), yolo.Params(), Path(sys.argv[1]), Site("cpu", open_network))
images = torch.rand(int(sys.argv[2]), 3, 480, 640).contiguous(memory_format=torch.channels_last)
for _ in range(3):
    sessions[0](images=images)
count, started = 0, time.perf_counter()
while time.perf_counter() - started < 6:
    sessions[0](images=images)
    count += len(images)
print(count / (time.perf_counter() - started))
"""

_PREDICT = """
import sys, time
from ultralytics import YOLO
model = YOLO(sys.argv[1])
started = None
count = 0
for result in model.predict(source=sys.argv[2], stream=True, batch=8, imgsz=640, verbose=False, device="cpu"):
    if started is None:
        started = time.perf_counter()  # the first batch pays for the start
    count += 1
print((count - 8) / (time.perf_counter() - started))
"""


def main() -> None:
    """Make pictures and weights, measure in rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-bench-") as name:
        folder = Path(name)
        pictures, weights = folder / "pictures", folder / "yolov8n.pt"
        pictures.mkdir()
        env = {**os.environ, "IMAGEMILL_HOME": str(folder / "home"), "YOLO_OFFLINE": "true", "PYTHONPATH": str(ROOT)}
        env["YOLO_CONFIG_DIR"] = str(folder)
        _python(env, _MAKE, str(weights))
        _python(env, _PICTURES, str(pictures), str(arguments.pictures))
        rounds = [_round(env, weights, pictures) for _ in range(arguments.rounds)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    bare, ours, theirs = medians["bare forward"], medians["imagemill"], medians["ultralytics predict"]
    for label, value in medians.items():
        print(f"{label:<22} {value:7.1f} images/s   ({', '.join(f'{r[label]:.1f}' for r in rounds)})")
    print(f"imagemill / bare forward         {ours / bare:.2f}")
    print(f"imagemill / ultralytics predict  {ours / theirs:.2f}")


def _round(env: dict[str, str], weights: Path, pictures: Path) -> dict[str, float]:
    return {
        "bare forward": float(_python(env, _BARE, str(weights), str(BATCH))),
        "imagemill": _imagemill(env, weights, pictures),
        "ultralytics predict": float(_python(env, _PREDICT, str(weights), str(pictures))),
    }


def _imagemill(env: dict[str, str], weights: Path, pictures: Path) -> float:
    """Images a second of a whole job, from its first claim to its end, on a worker that holds the model already."""
    program = str(Path(sys.executable).parent / "imagemill")
    command = (program, "annotate", str(pictures), "--model", str(weights), "--imgsz", str(IMGSZ), "--force", "--json")
    with subprocess.Popen(
        [program, "up", "--device", "cpu"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as up:
        try:
            while "cpu" not in _output(env, program, "workers", "--json"):
                time.sleep(0.2)
            for _ in range(2):  # the first loads the model
                done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, check=True)
            return float(json.loads(done.stdout)["rate"])
        finally:
            up.send_signal(signal.SIGTERM)


def _output(env: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def _python(env: dict[str, str], code: str, *arguments: str) -> str:
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, check=True)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


if __name__ == "__main__":
    main()
