"""Knows how the demo's mask model is made: draws scenes, trains a tiny Segment Anything on boxes and points, saves it.

Run it from any folder: `python demo/train_masks.py --images 1200 --steps 2200 --out demo/shapes-sam.pth`. The file is a
state dict in segment-anything's own names; whoever loads it reads the network's sizes off the shapes.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scenes
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).resolve().parent

# Series of scenes. The model card reports seed 9001, the demo draws 7, the tests 5: none of them may be trained on.
TRAIN_SEED = 20_002
CHECK_SEED = 30_002
RESERVED_SEEDS = frozenset({5, 7, 9001, CHECK_SEED})
CHECK_IMAGES = 100  # looked at only after the last step, so they choose nothing

# The network: SAM's shape with everything small.
SIDE = 128  # of the input, in pixels
PATCH = 8  # of a patch, in pixels; masks come out at half of that
GRID = SIDE // PATCH
MASK_SIDE = 4 * GRID
WIDTH, DEPTH, HEADS = 64, 3, 4
WINDOW = 4  # patches along a window's side; the last block sees everything
CHANNELS = 64
DECODER_HEADS = 8  # segment-anything's own; the shapes of the weights do not tell it

BATCH = 8
PROMPTS = 1  # boxes and as many points for each picture and step
JITTER = 0.06  # of a box's side: how far each edge of a training box may be off
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB 0 to 255, segment_anything/build_sam.py

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """A scene as the network sees it.

    Attributes:
        pixels: (height, width, 3) uint8, the longer side `SIDE`.
        masks: (n, height, width) uint8, 0 to 255: how much of each pixel a shape covers.
    """

    pixels: NDArray[np.uint8]
    masks: NDArray[np.uint8]


# ------------------------------------------------------------------------------------------------ pictures


def example(scene: scenes.Scene) -> Example:
    """Scale a scene so that its longer side fills the input."""
    height, width, _ = scene.pixels.shape
    scale = SIDE / max(height, width)
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    pixels = np.asarray(Image.fromarray(scene.pixels).resize(size, Image.Resampling.BILINEAR))
    masks = [
        np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX))
        for mask in scene.masks
    ]
    return Example(pixels, np.stack(masks))


def varied(rng: np.random.RandomState, one: Example) -> Example:
    """A scene turned by quarters, mirrored, and with its colour channels in another order."""
    turns, mirrored = int(rng.randint(4)), bool(rng.randint(2))
    pixels = np.rot90(one.pixels[:, :, rng.permutation(3)], turns)
    masks = np.rot90(one.masks, turns, (1, 2))
    return Example(pixels[:, ::-1], masks[:, :, ::-1]) if mirrored else Example(pixels, masks)


def padded(one: Example) -> tuple[Floats, Floats]:
    """The network's input (3, SIDE, SIDE) and its masks (n, SIDE, SIDE), 0 to 1, in the upper left corner of zeros."""
    height, width, _ = one.pixels.shape
    image = np.zeros((3, SIDE, SIDE), np.float32)
    normal = (one.pixels.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)
    image[:, :height, :width] = normal.transpose(2, 0, 1)
    masks = np.zeros((len(one.masks), SIDE, SIDE), np.float32)
    masks[:, :height, :width] = one.masks.astype(np.float32) / 255
    return image, masks


def box_around(mask: Floats) -> list[float]:
    """The box x1, y1, x2, y2 around what a mask covers at least half."""
    return [float(edge) for edge in scenes.tight_box(mask >= 0.5) or (0, 0, 1, 1)]


def jittered(rng: np.random.RandomState, box: list[float]) -> list[float]:
    """A box with each edge moved by up to `JITTER` of its side."""
    x1, y1, x2, y2 = box
    by = rng.uniform(-JITTER, JITTER, 4) * np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
    return [float(edge) for edge in np.clip(np.array(box) + by, 0, SIDE)]


def point_in(rng: np.random.RandomState, mask: Floats) -> list[float]:
    """The middle of a pixel that a mask covers wholly, or of its best one."""
    rows, columns = np.nonzero(mask >= min(1.0, float(mask.max())))
    which = int(rng.randint(len(rows)))
    return [columns[which] + 0.5, rows[which] + 0.5]


# ------------------------------------------------------------------------------------------------ network


def network() -> Any:
    """A Sam with random weights, in the classes of segment-anything itself."""
    import torch
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    return Sam(
        ImageEncoderViT(
            img_size=SIDE,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=2,
            out_chans=CHANNELS,
            qkv_bias=True,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=WINDOW,
            global_attn_indexes=(DEPTH - 1,),
        ),
        PromptEncoder(CHANNELS, (GRID, GRID), (SIDE, SIDE), mask_in_chans=4),
        MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=CHANNELS, num_heads=DECODER_HEADS, mlp_dim=128, attention_downsample_rate=2
            ),
            transformer_dim=CHANNELS,
            iou_head_depth=2,
            iou_head_hidden_dim=32,
        ),
    )


def answers(sam: Any, images: Any, owners: Any, sparse: Any, dense: Any) -> tuple[Any, Any]:
    """Prompts about pictures -> mask logits (n, 4, MASK_SIDE, MASK_SIDE) and the IoU expected of each (n, 4).

    `owners` (n,) says which of the images (b, 3, SIDE, SIDE) each prompt is about. As MaskDecoder.predict_masks, which
    takes the prompts of one picture only.
    """
    import torch

    decoder = sam.mask_decoder
    encoding = sam.image_encoder(images)[owners] + dense
    asked = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([asked.expand(len(owners), -1, -1), sparse], 1)
    places = sam.prompt_encoder.get_dense_pe().expand(len(owners), -1, -1, -1)
    out, pixels = decoder.transformer(encoding, places, tokens)
    maps = decoder.output_upscaling(pixels.transpose(1, 2).unflatten(2, (GRID, GRID)))
    mixing = [mlp(out[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    logits = (torch.stack(mixing, 1) @ maps.flatten(2)).unflatten(2, (MASK_SIDE, MASK_SIDE))
    return logits, decoder.iou_prediction_head(out[:, 0])


def prompted(sam: Any, boxes: Any, points: Any) -> tuple[Any, Any]:
    """The prompt encoder's tokens and dense encodings for boxes (n, 4), then for single points (m, 2) on objects."""
    import torch

    of_boxes, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    signs = torch.ones(len(points), 1, dtype=torch.int64)
    of_points, more = sam.prompt_encoder(points=(points[:, None], signs), boxes=None, masks=None)
    return torch.cat([of_boxes, of_points]), torch.cat([dense, more])


def loss_of(logits: Any, rated: Any, truth: Any) -> Any:
    """How far masks (n, 4, m, m) and ratings (n, 4) are from the truth (n, m, m), 0 to 1: cross-entropy, dice, squares.

    All four answers learn the one truth: a shape has no parts that could be meant instead.
    """
    import torch

    wanted = truth[:, None].expand_as(logits)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
    chance = logits.sigmoid()
    dice = 1 - (2 * (chance * wanted).sum((2, 3)) + 1) / (chance.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    return 10 * entropy + dice.mean() + torch.nn.functional.mse_loss(rated, iou_of(logits, wanted))


def iou_of(logits: Any, truth: Any) -> Any:
    """Intersection over union of masks and truth, both (..., m, m), shape (...)."""
    found, true = logits.detach() > 0, truth >= 0.5
    return (found & true).sum((-2, -1)) / (found | true).sum((-2, -1)).clamp(min=1)


# ------------------------------------------------------------------------------------------------ training


def batch_of(rng: np.random.RandomState, drawn: list[Example]) -> tuple[Any, Any, Any, Any, Any]:
    """Images, owners, boxes, points and truth of one step: the boxes' prompts first, then the points'."""
    import torch

    images, owners, boxes, points, truth = [], [], [], [], []
    for number, which in enumerate(rng.randint(len(drawn), size=BATCH)):
        image, masks = padded(varied(rng, drawn[which]))
        images.append(image)
        chosen = masks[rng.randint(len(masks), size=2 * PROMPTS)]
        boxes += [jittered(rng, box_around(mask)) for mask in chosen[:PROMPTS]]
        points += [point_in(rng, mask) for mask in chosen[PROMPTS:]]
        owners.append([number] * PROMPTS)
        truth.append(chosen)
    stacked = np.stack(truth)  # (batch, 2 prompts, SIDE, SIDE)
    ordered = np.concatenate([stacked[:, :PROMPTS], stacked[:, PROMPTS:]]).reshape(-1, SIDE, SIDE)
    small = torch.nn.functional.avg_pool2d(torch.from_numpy(ordered)[:, None], SIDE // MASK_SIDE)[:, 0]
    return (
        torch.from_numpy(np.stack(images)),
        torch.tensor(owners).flatten().repeat(2),
        torch.tensor(boxes),
        torch.tensor(points),
        small,
    )


def train(drawn: list[Example], steps: int, seed: int, rate: float) -> Any:
    """Train from random weights on the CPU; return the network after the last step."""
    import torch

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    rng = np.random.RandomState(seed)
    sam = network()
    optimizer = torch.optim.AdamW(sam.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    warm = max(1, min(300, steps // 10))
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.01),
    )
    started = time.monotonic()
    for step in range(steps):
        images, owners, boxes, points, truth = batch_of(rng, drawn)
        logits, rated = answers(sam, images, owners, *prompted(sam, boxes, points))
        loss = loss_of(logits, rated, truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        if step % 50 == 0:
            ious = iou_of(logits[:, 0], truth)
            half = len(ious) // 2
            print(
                f"step {step} loss {loss.item():.3f} IoU of boxes {ious[:half].mean():.3f}, of points "
                f"{ious[half:].mean():.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return sam.eval()


def check(sam: Any) -> tuple[float, float]:
    """Mean IoU, at the size of the decoder's masks, of boxes and of points on scenes that were not trained on."""
    import torch

    rng = np.random.RandomState(CHECK_SEED)
    of_boxes, of_points = [], []
    for index in range(CHECK_IMAGES):
        image, masks = padded(example(scenes.make_scene(CHECK_SEED, index)))
        boxes, points = [box_around(m) for m in masks], [point_in(rng, m) for m in masks]
        with torch.no_grad():
            prompts = prompted(sam, torch.tensor(boxes), torch.tensor(points))
            owners = torch.zeros(2 * len(masks), dtype=torch.int64)
            logits, rated = answers(sam, torch.from_numpy(image)[None], owners, *prompts)
            best = logits[torch.arange(len(logits)), 1 + rated[:, 1:].argmax(1)]
            truth = torch.nn.functional.avg_pool2d(torch.from_numpy(masks)[:, None], SIDE // MASK_SIDE)[:, 0]
            ious = iou_of(best, truth.repeat(2, 1, 1))
        of_boxes += ious[: len(masks)].tolist()
        of_points += ious[len(masks) :].tolist()
    return float(np.mean(of_boxes)), float(np.mean(of_points))


def main() -> None:
    """Read the command line, train and write the weights."""
    parser = argparse.ArgumentParser(description="Train the demo's mask model from scratch on drawn scenes.")
    parser.add_argument("--images", type=int, default=1200, help="number of training scenes")
    parser.add_argument("--steps", type=int, default=2200, help=f"steps of {BATCH} pictures")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="series of the training scenes")
    parser.add_argument("--rate", type=float, default=0.002, help="learning rate after the warm-up")
    parser.add_argument("--out", type=Path, default=HERE / "shapes-sam.pth", help="where the weights go")
    args = parser.parse_args()
    if args.seed in RESERVED_SEEDS:
        parser.error(f"seed {args.seed} is kept for measuring")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # torch reads it when it is imported
    import torch

    started = time.monotonic()
    drawn = [example(scenes.make_scene(args.seed, index)) for index in range(args.images)]
    print(f"{len(drawn)} scenes drawn in {time.monotonic() - started:.0f} s", flush=True)
    sam = train(drawn, args.steps, args.seed, args.rate)
    of_boxes, of_points = check(sam)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.half() for name, tensor in sam.state_dict().items()}, args.out)
    print(
        f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB after {(time.monotonic() - started) / 60:.1f} minutes; on "
        f"{CHECK_IMAGES} other scenes the mean IoU of boxes is {of_boxes:.3f}, of points {of_points:.3f}"
    )


if __name__ == "__main__":
    main()
