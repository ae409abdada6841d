"""Knows how good the demo's mask model and backbone are: runs the three models as one chain of jobs, and scores it.

The chain goes through the ordinary command line: boxes, the masks of those boxes, and the vectors of those crops;
beside them the masks of the true boxes and of one true point each. `python demo/measure_chain.py` prints the figures of
the model cards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import evaluate  # noqa: E402
import scenes  # noqa: E402

from storage import rle  # noqa: E402

DETECTOR, SEGMENTER, BACKBONE = HERE / "shapes-yolov8.pt", HERE / "shapes-sam.pth", HERE / "shapes-resnet"
IMAGE_SIZE = 256  # pixels, of the detector's input
MIN_SCORE = 0.5  # of a box that is masked and cut out
SAME_OBJECT = 0.5  # IoU from which a found box is one of the true boxes

Bools = NDArray[np.bool_]
Truth = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Figures:
    """What a chain reached, each from 0 to 1.

    Attributes:
        box_mask_iou: mean over all true objects of the IoU of the mask made from the detector's box of that label; an
            object without one counts as 0.
        true_box_mask_iou, point_mask_iou: the same, of masks made from each true box, and from one point inside.
        recall_at_1: share of cut out shapes whose nearest other vector is of the same shape.
        knn_accuracy: share of the second half's cut out shapes that the first half's label rightly, by 5 neighbours.
    """

    box_mask_iou: float
    true_box_mask_iou: float
    point_mask_iou: float
    recall_at_1: float
    knn_accuracy: float


# ------------------------------------------------------------------------------------------------ the chain


def measure(dataset: Path, work: Path, environment: Mapping[str, str]) -> Figures:
    """Run the chain over a folder that `scenes.py --masks` wrote; jobs go to the environment's IMAGEMILL_HOME."""
    truth: Truth = json.loads((dataset / "truth.json").read_text(encoding="utf-8"))
    true_masks = {key: read_masks(dataset, key) for key in truth}
    chain = write_chain(dataset, work, truth, true_masks)
    imagemill(environment, "run", str(chain))
    found = {name: exported(environment, name, work / name) for name in ("boxes", "masks", "true", "points")}
    shapes = shapes_of_crops(found["boxes"], truth)
    return Figures(
        mean_mask_iou(found["masks"], truth, true_masks),
        mean_mask_iou(found["true"], truth, true_masks),
        mean_mask_iou(found["points"], truth, true_masks),
        recall_at_1(nearest_others(environment, "vectors"), shapes),
        knn_accuracy(environment, "vectors", shapes, work / "examples.csv"),
    )


def write_chain(dataset: Path, work: Path, truth: Truth, true_masks: Mapping[str, Sequence[Bools]]) -> Path:
    """Write the chain's file, and the files of the true boxes and points."""
    images = dataset / "images"
    prompts = {
        "true": {key: {"boxes": [thing["box"] for thing in things]} for key, things in truth.items()},
        "points": {key: {"points": [[point_inside(mask)] for mask in masks]} for key, masks in true_masks.items()},
    }
    for name, of_key in prompts.items():
        labelled = [
            {"key": key, **given, "labels": [thing["label"] for thing in truth[key]]} for key, given in of_key.items()
        ]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled), encoding="utf-8")
    params = {"conf": MIN_SCORE, "imgsz": IMAGE_SIZE}
    segmenter = {"do": "mask", "model": str(SEGMENTER)}
    steps: list[dict[str, Any]] = [
        {"name": "boxes", "do": "annotate", "source": str(images), "model": str(DETECTOR), "params": params},
        {"name": "masks", "from": "boxes", "as": "boxes", **segmenter},
        *({"name": name, "source": f"prompted:?of={images}&from={work / name}.jsonl", **segmenter} for name in prompts),
        {"name": "vectors", "do": "embed", "from": "boxes", "as": "crops", "model": str(BACKBONE)},
    ]
    chain = work / "chain.yaml"
    chain.write_text(json.dumps({"steps": steps}), encoding="utf-8")  # JSON is YAML
    return chain


def imagemill(environment: Mapping[str, str], *arguments: str) -> str:
    """Run a command and return what it printed. Raises CalledProcessError when it failed."""
    program = str(Path(sys.executable).parent / "imagemill")
    done = subprocess.run([program, *arguments], env=dict(environment), text=True, stdout=subprocess.PIPE, check=True)
    return done.stdout


def exported(environment: Mapping[str, str], job: str, out: Path) -> dict[str, list[dict[str, Any]]]:
    """A job's COCO export, as the annotations of each item's key in the order of the result, with their label."""
    imagemill(environment, "export", job, "--format", "coco", "--to", str(out), "--quiet")
    coco = json.loads((out / "annotations.json").read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    keys = {image["id"]: image["file_name"] for image in coco["images"]}
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in keys.values()}
    for annotation in coco["annotations"]:
        found[keys[annotation["image_id"]]].append({**annotation, "label": names[annotation["category_id"]]})
    return found


# ------------------------------------------------------------------------------------------------ masks


def read_masks(dataset: Path, key: str) -> list[Bools]:
    """The true masks (height, width) of a scene's objects, in their order."""
    numbers = np.asarray(Image.open((dataset / "masks" / key).with_suffix(".png")))
    return [numbers == number for number in range(1, int(numbers.max()) + 1)]


def point_inside(mask: Bools) -> list[float]:
    """The middle of the mask's pixel that is nearest to its centre: the centre of a moon is not on it."""
    places = np.argwhere(mask)
    row, column = places[np.square(places - places.mean(0)).sum(1).argmin()].tolist()
    return [column + 0.5, row + 0.5]


def mean_mask_iou(
    found: Mapping[str, Sequence[Mapping[str, Any]]], truth: Truth, true_masks: Mapping[str, Sequence[Bools]]
) -> float:
    """The mean over all true objects of the best IoU of a found mask with its label, 0 where there is none."""
    ious = []
    for key, things in truth.items():
        made = [(row["label"], coco_mask(row["segmentation"])) for row in found.get(key, ())]
        for thing, mask in zip(things, true_masks[key], strict=True):
            ious.append(max((mask_iou(other, mask) for label, other in made if label == thing["label"]), default=0.0))
    return float(np.mean(ious))


def coco_mask(segmentation: Mapping[str, Any]) -> Bools:
    """The mask (height, width) of a COCO run-length code."""
    height, width = segmentation["size"]
    return rle.decode(segmentation["counts"].encode(), (height, width))


def mask_iou(first: Bools, second: Bools) -> float:
    """Intersection over union of two masks of one size; 0 for two empty ones."""
    return float((first & second).sum() / max(1, (first | second).sum()))


# ------------------------------------------------------------------------------------------------ vectors


def shapes_of_crops(boxes: Mapping[str, Sequence[Mapping[str, Any]]], truth: Truth) -> dict[str, str]:
    """The true shape in each crop: crop `KEY#i` is of the i-th box found in KEY; "" where no true box is."""
    shapes = {}
    for key, rows in boxes.items():
        corners = evaluate.as_boxes((x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in rows))
        ious = evaluate.iou_matrix(corners, evaluate.as_boxes(thing["box"] for thing in truth[key]))
        for i, row in enumerate(ious):
            best = int(row.argmax())
            shapes[f"{key}#{i}"] = str(truth[key][best]["label"]) if row[best] >= SAME_OBJECT else ""
    return shapes


def nearest_others(environment: Mapping[str, str], job: str) -> dict[str, str]:
    """For each crop the key of the nearest other one, as `imagemill similar` finds it, asked for all at once."""
    from storage import vectors
    from storage.database import Database
    from storage.objects import open_store
    from storage.settings import Settings

    settings = Settings(home=Path(environment["IMAGEMILL_HOME"]))
    recipe_id = json.loads(imagemill(environment, "status", job, "--json"))["recipe_id"]
    db, store = Database(settings.database), open_store(settings.store, settings)
    try:
        near = {}
        for keys, rows in vectors.matrix(db, store, recipe_id):
            for key, found in zip(keys, vectors.nearest(db, store, recipe_id, rows, 2), strict=True):
                near[key] = next(other.key for other in found if other.key != key)
        return near
    finally:
        db.close()


def recall_at_1(near: Mapping[str, str], shapes: Mapping[str, str]) -> float:
    """The share of crops with a shape whose nearest other crop is of the same one."""
    return float(np.mean([shapes[near[key]] == shape for key, shape in shapes.items() if shape]))


def knn_accuracy(environment: Mapping[str, str], job: str, shapes: Mapping[str, str], examples: Path) -> float:
    """The share of the second half's crops that `imagemill knn` labels rightly, the first half being the examples."""
    keys = sorted(key for key, shape in shapes.items() if shape)
    given = keys[: len(keys) // 2]
    examples.write_text("key,label\n" + "".join(f"{key},{shapes[key]}\n" for key in given), encoding="utf-8")
    lines = imagemill(environment, "knn", job, "--examples", str(examples), "-k", "5", "--json").splitlines()
    labels = {row["key"]: row["label"] for row in map(json.loads, lines)}
    return float(np.mean([labels[key] == shapes[key] for key in keys[len(given) :]]))


def main() -> None:
    """Draw scenes, run the chain in a home of its own and print the figures."""
    parser = argparse.ArgumentParser(description="Measure the demo's mask model and backbone on drawn scenes.")
    parser.add_argument("--count", type=int, default=300, help="number of scenes")
    parser.add_argument("--seed", type=int, default=9001, help="series of the scenes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shapes-") as folder:
        work = Path(folder)
        scenes.write_scenes(work / "scenes", args.count, args.seed, with_masks=True)
        figures = measure(work / "scenes", work, {**os.environ, "IMAGEMILL_HOME": str(work / "home")})
    print(f"{args.count} scenes of seed {args.seed}: {json.dumps(asdict(figures), indent=1)}")


if __name__ == "__main__":
    main()
