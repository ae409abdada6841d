"""Knows how the demo detector is made: draws training scenes, trains a small YOLOv8 on them, saves clean weights.

Run it from any folder: `python demo/train.py --images 4500 --epochs 24 --out demo/shapes-yolov8.pt`. Everything it
writes besides the weights goes to a scratch folder.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import scenes
from PIL import Image

HERE = Path(__file__).resolve().parent
MODEL_LAYOUT = HERE / "shapes-yolov8.yaml"

# Series of scenes. The demo draws seed 7 and the model card reports seed 9001, so neither may be trained on.
TRAIN_SEED = 20_001
CHECK_SEED = 30_001
RESERVED_SEEDS = frozenset({7, 9001})
CHECK_IMAGES = 200  # looked at only after the last epoch, so they choose nothing

IMAGE_SIZE = 256  # pixels, the longer side of the model's input
BATCH = 16
LAST_PLAIN_EPOCHS = 3  # the last epochs see whole scenes, not mosaics

# What a loaded checkpoint needs to know. All other keys of a training run describe the machine it ran on.
KEPT_TRAIN_ARGS = ("task", "imgsz", "single_cls")


def prepare_environment(scratch: Path) -> None:
    """Set the environment that ultralytics and torch read when they are imported; so call this before."""
    # Without it ultralytics trains on one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ["YOLO_CONFIG_DIR"] = str(scratch)
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ["YOLO_AUTOINSTALL"] = "false"


def yolo_label_lines(scene: scenes.Scene) -> list[str]:
    """Return the YOLO text labels of a scene: class number, then box centre and size as shares of the picture."""
    height, width, _ = scene.pixels.shape
    lines = []
    for thing in scene.objects:
        x1, y1, x2, y2 = thing.box
        numbers = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(" ".join([str(scenes.LABELS.index(thing.label)), *(f"{n:.6f}" for n in numbers)]))
    return lines


def write_split(folder: Path, seed: int, count: int) -> None:
    """Write `count` scenes of a seed as `folder/images/*.jpg` and `folder/labels/*.txt`."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = scenes.make_scene(seed, index)
        picture = folder / "images" / scenes.scene_key(index)
        Image.fromarray(scene.pixels).save(picture, quality=scenes.JPEG_QUALITY)
        label_file = folder / "labels" / f"{picture.stem}.txt"
        label_file.write_text("\n".join(yolo_label_lines(scene)) + "\n", encoding="utf-8")


def write_dataset(scratch: Path, seed: int, count: int) -> Path:
    """Write the training and the check scenes; return the dataset file that ultralytics reads."""
    write_split(scratch / "train", seed, count)
    write_split(scratch / "check", CHECK_SEED, CHECK_IMAGES)
    names = "\n".join(f"  {number}: {label}" for number, label in enumerate(scenes.LABELS))
    data_file = scratch / "shapes.yaml"
    text = f"path: {scratch}\ntrain: train/images\nval: check/images\nnames:\n{names}\n"
    data_file.write_text(text, encoding="utf-8")
    return data_file


def train(data_file: Path, scratch: Path, epochs: int, seed: int, mosaic: float, rate: float) -> Path:
    """Train from random weights on the CPU; return the checkpoint of the last epoch."""
    from ultralytics import YOLO

    model = YOLO(str(MODEL_LAYOUT), task="detect")
    model.train(
        data=str(data_file),
        project=str(scratch / "runs"),
        name="shapes",
        exist_ok=True,
        device="cpu",
        seed=seed,
        deterministic=True,
        epochs=epochs,
        imgsz=IMAGE_SIZE,
        batch=BATCH,
        workers=1,
        cache="ram",
        patience=0,
        pretrained=False,
        optimizer="AdamW",
        lr0=rate,
        lrf=0.01,
        cos_lr=True,
        warmup_epochs=1,
        weight_decay=0.0005,
        amp=False,
        val=False,
        plots=False,
        mosaic=mosaic,
        close_mosaic=min(LAST_PLAIN_EPOCHS, epochs),
        # The scenes already vary in colour and place; flips and a little scaling are what is left to add.
        hsv_h=0.0,
        hsv_s=0.0,
        hsv_v=0.0,
        scale=0.2,
        translate=0.05,
        fliplr=0.5,
        flipud=0.5,
        erasing=0.0,
    )
    return scratch / "runs" / "shapes" / "weights" / "last.pt"


def clean_checkpoint(trained: Path, out: Path) -> None:
    """Write the trained weights to `out` as fp16, without optimizer state and without traces of the machine."""
    import torch
    from ultralytics.utils.torch_utils import strip_optimizer

    strip_optimizer(str(trained))
    checkpoint: dict[str, Any] = torch.load(trained, map_location="cpu", weights_only=False)
    network = checkpoint["model"]
    train_args = {key: checkpoint["train_args"][key] for key in KEPT_TRAIN_ARGS}
    train_args["model"] = MODEL_LAYOUT.name
    network.args = dict(train_args)
    network.yaml["yaml_file"] = MODEL_LAYOUT.name
    network.names = dict(enumerate(scenes.LABELS))
    for name in ("pt_path", "criterion"):
        if hasattr(network, name):
            delattr(network, name)
    kept: dict[str, Any] = {key: checkpoint[key] for key in ("version", "license", "docs") if key in checkpoint}
    cleaned: dict[str, Any] = {"model": network, "train_args": train_args, "epoch": -1, **kept}
    cleaned.update(dict.fromkeys(("ema", "optimizer", "updates")))
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(cleaned, out)


def main() -> None:
    """Read the command line, train and write the weights."""
    parser = argparse.ArgumentParser(description="Train the demo detector from scratch on drawn scenes.")
    parser.add_argument("--images", type=int, default=4500, help="number of training scenes")
    parser.add_argument("--epochs", type=int, default=24, help="passes over the training scenes")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="series of the training scenes")
    parser.add_argument("--out", type=Path, default=HERE / "shapes-yolov8.pt", help="where the weights go")
    parser.add_argument("--scratch", type=Path, default=None, help="scratch folder (default: a temporary one)")
    parser.add_argument("--mosaic", type=float, default=0.0, help="share of training pictures that are mosaics of four")
    parser.add_argument("--rate", type=float, default=0.002, help="learning rate after the warm-up")
    args = parser.parse_args()
    if args.seed in RESERVED_SEEDS | {CHECK_SEED}:
        parser.error(f"seed {args.seed} is kept for measuring")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shapes-") as temporary:
        scratch = (args.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        prepare_environment(scratch)
        data_file = write_dataset(scratch, args.seed, args.images)
        trained = train(data_file, scratch, args.epochs, args.seed, args.mosaic, args.rate)
        clean_checkpoint(trained, args.out)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {size:.2f} MB after {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
