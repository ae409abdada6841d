"""The pictures and the models that everybody is measured on: same files, random weights, made on the spot.

    python -P benchmarks/workloads.py FOLDER [--pictures 640]

Speed does not depend on weights, but for what a detector finds: it finds as much as in a street scene. The pictures
have edges and noise, as heavy for a decoder as photographs, and one size, so that a peer that pads a batch of unequal
ones to a square loses nothing by it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common

WIDTH, HEIGHT, DISTINCT = 960, 640, 40
FOUND = 100  # anchor points of a picture over the threshold of 0.25; of one object there are some ten, before NMS
BATCH = 8
TINY_PPM = b"P6 2 2 255\n" + bytes(12)
WORKLOADS = {  # name -> (family, kind, weights in the folder)
    "yolov8n": ("yolo", "detections", "yolov8n.pt"),
    "dinov2": ("dinov2", "embedding", "dinov2"),
    "timm": ("timm", "embedding", "timm"),
    "yolos": ("detr", "detections", "yolos"),
    "stub": ("stub", "detections", ""),
}
EXPORTS = {"onnx": "yolov8n.onnx", "openvino": "yolov8n_openvino_model"}


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=640)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    os.environ.setdefault("YOLO_CONFIG_DIR", str(folder))
    for name, count in (("pictures", arguments.pictures), ("few", BATCH)):
        write_pictures(folder / name, count)
    (folder / "tiny.ppm").write_bytes(TINY_PPM)
    for make in (yolov8n, dinov2, timm_vit, yolos):
        make(folder)
    for name in EXPORTS:
        export(folder, name)
    common.answer(pictures=arguments.pictures)


def write_pictures(folder: Path, count: int) -> None:
    """`count` JPEGs, of which the first DISTINCT differ."""
    folder.mkdir(parents=True)
    drawn = [jpeg(seed) for seed in range(min(DISTINCT, count))]
    for i in range(count):
        (folder / f"{i:05d}.jpg").write_bytes(drawn[i % len(drawn)])


def jpeg(seed: int) -> bytes:
    """A picture with edges and noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT)), np.int16)
    pixels = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return out.getvalue()


def write_manifest(path: Path, pictures: Sequence[Path], count: int) -> Path:
    """`count` items that are these pictures again and again."""
    with path.open("w") as file:
        file.write("key,uri,fingerprint\n")
        file.writelines(f"{i:08d},{pictures[i % len(pictures)]},1\n" for i in range(count))
    return path


def write_prompts(path: Path, count: int) -> Path:
    """`count` items without pictures."""
    path.write_text("".join(f"{i:08d}\n" for i in range(count)))
    return path


def yolov8n(folder: Path) -> None:
    """The detector, as ultralytics saves it."""
    import torch
    from ultralytics import YOLO

    torch.manual_seed(0)
    model = YOLO("yolov8n.yaml")
    _make_find(model.model, _input([jpeg(seed) for seed in range(BATCH)]))
    model.save(str(folder / "yolov8n.pt"))


def _input(pictures: Sequence[bytes]) -> Any:
    """(n, 3, height, width) floats 0..1 in the size that detectors are given."""
    import numpy as np
    import torch
    from PIL import Image

    size = (640, 640 * HEIGHT // WIDTH // 32 * 32)
    arrays = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize(size)) for data in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def _make_find(module: Any, pictures: Any) -> None:
    """Random weights leave nothing of a picture in the last layers: norms learn its scale, and the head a threshold."""
    import torch

    norms = [one for one in module.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of what it sees
    head = module.model[-1]
    with torch.no_grad():
        module.train()(pictures)
        logits = module.eval()(pictures)[1]["scores"]
        for stack in head.cv3:
            last = stack[-1]
            last.weight *= 2 / logits.std()
            last.bias.zero_()
        best = module(pictures)[1]["scores"].amax(1)
        shift = torch.tensor(0.25).logit() - best.flatten().quantile(1 - FOUND / best.shape[1])
        for stack in head.cv3:
            stack[-1].bias += shift
    for norm in norms:
        norm.momentum = 0.03  # as ultralytics sets it


def export(folder: Path, name: str) -> None:
    """The detector in the form that ultralytics runs elsewhere; left out where its libraries are not installed."""
    from ultralytics import YOLO

    options = {"simplify": False} if name == "onnx" else {}
    try:
        YOLO(str(folder / "yolov8n.pt")).export(format=name, dynamic=True, batch=BATCH, verbose=False, **options)
    except Exception as error:  # noqa: BLE001 (any failure leaves this one peer out, and its measure says so)
        print(f"ultralytics export to {name} failed: {type(error).__name__}: {error}", file=sys.stderr)


def dinov2(folder: Path) -> None:
    """DINOv2 small, as transformers saves it, with the processor of the published one: 256, then 224 of the middle."""
    import transformers

    config = transformers.Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
    transformers.Dinov2Model(config).save_pretrained(folder / "dinov2")
    transformers.BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder / "dinov2")


def timm_vit(folder: Path) -> None:
    """The same network of timm, at 224."""
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=224, num_classes=0)
    save_for_hf(model, folder / "timm", model_args={"img_size": 224}, safe_serialization=True)


def yolos(folder: Path) -> None:
    """YOLOS tiny at 256 x 384, as transformers saves it."""
    import transformers

    config = transformers.YolosConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=[256, 384],
        num_detection_tokens=100,
    )
    transformers.YolosForObjectDetection(config).save_pretrained(folder / "yolos")
    size = {"shortest_edge": 256, "longest_edge": 384}
    transformers.YolosImageProcessor(size=size).save_pretrained(folder / "yolos")


if __name__ == "__main__":
    main()
