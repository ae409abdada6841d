"""Knows how the demo's backbone is made: cuts shapes out of drawn scenes, trains a small ResNet to put like by like.

Run it from any folder: `python demo/train_embedding.py --images 1200 --steps 900 --out demo/shapes-resnet`. The folder
is as timm saves and loads it, with a classifier of the six shapes beside the vectors.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import scenes
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).resolve().parent

# Series of scenes. The model card reports seed 9001, the demo draws 7, the tests 5: none of them may be trained on.
TRAIN_SEED = 20_003
CHECK_SEED = 30_003
RESERVED_SEEDS = frozenset({5, 7, 9001, CHECK_SEED})
CHECK_IMAGES = 100  # looked at only after the last step, so they choose nothing

ARCHITECTURE = "resnet18"  # timm's name; the arguments make it a small one
MODEL_ARGS = {"layers": [1, 1, 1, 1], "channels": [24, 48, 72, 96], "stem_type": "deep", "stem_width": 12}
SIDE = 64  # of the input, in pixels
BATCH = 64
JITTER = 0.08  # of a box's side: how far each edge of a cut may be off
TEMPERATURE = 0.1  # of the contrastive loss

Crops = NDArray[np.uint8]
Classes = NDArray[np.int64]


# ------------------------------------------------------------------------------------------------ pictures


def crops(seed: int, count: int, jitter: float) -> tuple[Crops, Classes]:
    """The shapes of `count` scenes, cut out by their boxes and squashed to (n, SIDE, SIDE, 3), and their class numbers.

    `jitter` is the share of a box's side by which each of its edges may be off.
    """
    rng = np.random.RandomState(seed)
    cut, classes = [], []
    for index in range(count):
        scene = scenes.make_scene(seed, index)
        picture = Image.fromarray(scene.pixels)
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box
            by = rng.uniform(-jitter, jitter, 4) * np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
            box = np.clip(np.rint(np.array(thing.box) + by), 0, np.tile(picture.size, 2)).astype(int).tolist()
            cut.append(np.asarray(picture.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
            classes.append(scenes.LABELS.index(thing.label))
    return np.stack(cut), np.array(classes)


def varied(rng: np.random.RandomState, cut: Crops) -> Any:
    """Crops (n, SIDE, SIDE, 3) turned, scaled, mirrored, in other colours and noisier, as (n, 3, SIDE, SIDE) 0 to 1."""
    import torch

    count = len(cut)
    images = torch.from_numpy(cut.transpose(0, 3, 1, 2).copy()).float() / 255
    angle, scale = rng.uniform(0, 2 * math.pi, count), rng.uniform(0.8, 1.15, (2, count))
    mirror = rng.choice([-1.0, 1.0], count)
    places = np.zeros((count, 2, 3), np.float32)
    places[:, 0, 0], places[:, 0, 1] = mirror * np.cos(angle) / scale[0], -np.sin(angle) / scale[0]
    places[:, 1, 0], places[:, 1, 1] = mirror * np.sin(angle) / scale[1], np.cos(angle) / scale[1]
    places[:, :, 2] = rng.uniform(-0.06, 0.06, (count, 2))
    grid = torch.nn.functional.affine_grid(torch.from_numpy(places), list(images.shape), align_corners=False)
    images = torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain = rng.uniform(0.6, 1.3, (count, 3, 1, 1)) * rng.choice([-1.0, 1.0], (count, 1, 1, 1))  # negatives too
    shift = rng.uniform(-0.15, 0.15, (count, 3, 1, 1))
    noise = rng.standard_normal((count, 1, SIDE, SIDE)) * rng.uniform(0, 0.05, (count, 1, 1, 1))
    images = (images[:, rng.permutation(3)] - 0.5) * torch.from_numpy(gain) + 0.5 + torch.from_numpy(shift + noise)
    return images.clamp(0, 1).float()


# ------------------------------------------------------------------------------------------------ network


def network() -> Any:
    """A ResNet of timm with random weights, which says itself how its pictures are to be prepared."""
    import timm

    return timm.create_model(
        ARCHITECTURE,
        num_classes=len(scenes.LABELS),
        pretrained_cfg={
            "input_size": (3, SIDE, SIDE),
            "pool_size": (2, 2),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "num_classes": len(scenes.LABELS),
            "first_conv": "conv1.0",
            "classifier": "fc",
            "license": "agpl-3.0",
        },
        **MODEL_ARGS,
    )


def features(model: Any, images: Any) -> Any:
    """Images (n, 3, SIDE, SIDE), 0 to 1, as vectors (n, d)."""
    return model.forward_head(model.forward_features((images - 0.5) / 0.5), pre_logits=True)


def contrast(vectors: Any, classes: Any) -> Any:
    """The supervised contrastive loss of vectors (n, d) with classes (n,).

    Khosla et al., arXiv 2004.11362, equation 2: every other vector of the class is a positive.
    """
    import torch

    unit = torch.nn.functional.normalize(vectors, dim=1)
    itself = torch.eye(len(unit), dtype=torch.bool)
    likeness = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -1e9)
    same = (classes[:, None] == classes[None, :]) & ~itself
    chance = likeness.log_softmax(1)
    per_vector = -(chance * same).sum(1) / same.sum(1).clamp(min=1)
    return per_vector[same.any(1)].mean()


# ------------------------------------------------------------------------------------------------ training


def train(cut: Crops, classes: Classes, steps: int, seed: int, rate: float) -> Any:
    """Train from random weights on the CPU; return the network after the last step."""
    import torch

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    rng = np.random.RandomState(seed)
    model = network().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(steps):
        chosen = rng.randint(len(cut), size=BATCH)
        wanted = torch.from_numpy(classes[chosen])
        vectors = features(model, varied(rng, cut[chosen]))
        logits = model.get_classifier()(vectors)
        loss = contrast(vectors, wanted) + torch.nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            right = (logits.argmax(1) == wanted).float().mean()
            print(
                f"step {step} loss {loss.item():.3f} right {right:.3f}, {time.monotonic() - started:.0f} s", flush=True
            )
    return model.eval()


def check(model: Any) -> tuple[float, float]:
    """On shapes that were not trained on: how often the nearest other vector is of the same shape, and accuracy."""
    import torch

    cut, classes = crops(CHECK_SEED, CHECK_IMAGES, 0.0)
    with torch.no_grad():
        vectors = features(model, torch.from_numpy(cut.transpose(0, 3, 1, 2).copy()).float() / 255)
        found = model.get_classifier()(vectors).argmax(1).numpy()
    unit = torch.nn.functional.normalize(vectors, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1).numpy()
    return float((classes[nearest] == classes).mean()), float((found == classes).mean())


def save(model: Any, out: Path) -> None:
    """Write config.json and model.safetensors (fp16) as timm does, with the names of the classes."""
    from timm.models import save_for_hf

    save_for_hf(
        model.half(),
        str(out),
        model_config={"label_names": list(scenes.LABELS)},
        model_args=MODEL_ARGS,
        safe_serialization=True,
    )


def main() -> None:
    """Read the command line, train and write the folder."""
    parser = argparse.ArgumentParser(description="Train the demo's backbone from scratch on drawn shapes.")
    parser.add_argument("--images", type=int, default=1200, help="number of training scenes")
    parser.add_argument("--steps", type=int, default=900, help=f"steps of {BATCH} shapes")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="series of the training scenes")
    parser.add_argument("--rate", type=float, default=0.004, help="highest learning rate")
    parser.add_argument("--out", type=Path, default=HERE / "shapes-resnet", help="where the folder goes")
    args = parser.parse_args()
    if args.seed in RESERVED_SEEDS:
        parser.error(f"seed {args.seed} is kept for measuring")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # torch reads it when it is imported
    started = time.monotonic()
    cut, classes = crops(args.seed, args.images, JITTER)
    print(f"{len(cut)} shapes drawn in {time.monotonic() - started:.0f} s", flush=True)
    model = train(cut, classes, args.steps, args.seed, args.rate)
    recall, accuracy = check(model)
    save(model, args.out)
    size = (args.out / "model.safetensors").stat().st_size / 1e6
    print(
        f"{args.out}: {size:.2f} MB after {(time.monotonic() - started) / 60:.1f} minutes; on shapes of {CHECK_IMAGES} "
        f"other scenes the nearest vector is of the same shape {recall:.3f}, the classifier right {accuracy:.3f}"
    )


if __name__ == "__main__":
    main()
