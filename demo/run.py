"""The demo: renders scenes, annotates them through the ordinary command line, scores the boxes against the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from evaluate import mean_average_precision  # noqa: E402

WORK = HERE.parent / ".demo"
COUNT, SEED = 300, 7
MODEL = HERE / "shapes-yolov8.pt"
IMAGEMILL = Path(sys.executable).parent / "imagemill"


def main() -> int:
    """Run it all; exit code 1 when the boxes are not as good as the model's card says."""
    dataset = _rendered()
    command = [
        *("annotate", str(dataset / "images"), "--model", str(MODEL)),
        *("--imgsz", "320", "--conf", "0.05", "--name", "demo"),
    ]
    print(f"$ imagemill {' '.join(command)}", flush=True)
    _imagemill(*command)
    print("\nthe same command again:", flush=True)
    started = time.monotonic()
    again = json.loads(_imagemill(*command, "--json", capture=True))
    print(f"{again['fresh']} fresh, {again['planned']} to do, in {time.monotonic() - started:.1f} s")
    first = json.loads(_imagemill("status", str(_computing_job()), "--json", capture=True))
    score = _map50(dataset)
    print(f"\nimages/s      {first['rate']:.1f}")
    print(f"mAP50         {score:.4f} against the truth of {COUNT} scenes")
    print(f"contact sheet {again['contact_sheet']}")
    return 0 if score >= 0.95 and again["planned"] == 0 else 1


def _rendered() -> Path:
    """The scenes, rendered once: a second run must find the same files, or they would not be fresh."""
    dataset = WORK / f"scenes-{SEED}-{COUNT}"
    if not (dataset / "truth.json").exists():
        script = [
            sys.executable,
            "-P",
            str(HERE / "scenes.py"),
            str(dataset),
            "--count",
            str(COUNT),
            "--seed",
            str(SEED),
        ]
        subprocess.run(script, check=True)
    return dataset


def _map50(dataset: Path) -> float:
    with tempfile.TemporaryDirectory(prefix="imagemill-demo-") as folder:
        _imagemill("export", "latest", "--format", "coco", "--to", folder, "--quiet")
        exported = json.loads((Path(folder) / "annotations.json").read_text())
    truth = json.loads((dataset / "truth.json").read_text())
    return float(mean_average_precision(_predictions(exported), truth))


def _predictions(coco: dict[str, Any]) -> dict[str, list[Any]]:
    names = {category["id"]: category["name"] for category in coco["categories"]}
    keys = {image["id"]: image["file_name"] for image in coco["images"]}
    found: dict[str, list[Any]] = {key: [] for key in keys.values()}
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        box = (names[annotation["category_id"]], annotation["score"], (x, y, x + width, y + height))
        found[keys[annotation["image_id"]]].append(box)
    return found


def _computing_job() -> int:
    """The job that computed something: a second run of the demo finds everything fresh."""
    jobs = json.loads(_imagemill("jobs", "--json", capture=True))
    return int(next((job["id"] for job in jobs if job["planned"]), jobs[0]["id"]))


def _imagemill(*arguments: str, capture: bool = False) -> str:
    environment = {**os.environ, "IMAGEMILL_HOME": str(WORK / "home")}
    done = subprocess.run(
        [str(IMAGEMILL), *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE if capture else None,
        check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
