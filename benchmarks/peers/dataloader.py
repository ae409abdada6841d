"""A plain loop over a DataLoader of torch, as one writes it in an afternoon; pictures through PIL or OpenCV.

    python -P benchmarks/peers/dataloader.py FOLDER --workload dinov2 --reader cv2 --precision bf16 [--count 160]

The network is channels-last in the asked precision. yolov8n is followed by ultralytics' own non-maximum suppression.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common
from benchmarks.workloads import BATCH

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    """Loop, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", choices=("dinov2", "yolov8n"), default="dinov2")
    parser.add_argument("--reader", choices=("PIL", "cv2"), default="cv2")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--workers", type=int, default=0, help="processes that load")
    parser.add_argument("--count", type=int, default=160)
    arguments = parser.parse_args()
    common.need("torch", "torchvision", "transformers", "ultralytics", "cv2")
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())  # or importing ultralytics makes it 1
    os.environ.setdefault("YOLO_CONFIG_DIR", str(arguments.folder))
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    make = {"dinov2": _embedder, "yolov8n": _detector}[arguments.workload]
    ready, network, after = make(arguments.folder)
    network = network.eval().requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)
    read = {"PIL": _pil, "cv2": _cv2}[arguments.reader]
    paths = sorted((arguments.folder / "pictures").glob("*.jpg"))[: arguments.count]
    pictures: Any = _Pictures(paths, lambda path: ready(read(path)))
    loader: Any = torch.utils.data.DataLoader(pictures, batch_size=BATCH, num_workers=arguments.workers)
    pace = common.Pace(BATCH)
    with torch.inference_mode():
        for images in loader:
            after(network(images.to(dtype).contiguous(memory_format=torch.channels_last)))
            pace.add(len(images))
    common.answer(rate=pace.rate)


class _Pictures:
    """What a DataLoader asks for its items."""

    def __init__(self, paths: list[Path], load: Callable[[Path], Any]) -> None:
        self._paths, self._load = paths, load

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Any:
        return self._load(self._paths[number])


def _pil(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    return np.array(Image.open(path).convert("RGB"))


def _cv2(path: Path) -> Any:
    import cv2

    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def _embedder(folder: Path) -> tuple[Callable[[Any], Any], Any, Callable[[Any], Any]]:
    import torch
    from torchvision.transforms import v2
    from transformers import AutoModel

    steps = v2.Compose(
        [
            v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def ready(image: Any) -> Any:
        return steps(torch.from_numpy(image).permute(2, 0, 1))

    return ready, AutoModel.from_pretrained(folder / "dinov2"), lambda out: out.pooler_output.float().numpy()


def _detector(folder: Path) -> tuple[Callable[[Any], Any], Any, Callable[[Any], Any]]:
    import torch
    from ultralytics import YOLO
    from ultralytics.data.augment import LetterBox
    from ultralytics.utils.nms import non_max_suppression

    boxed = LetterBox((640, 640), auto=True)

    def ready(image: Any) -> Any:
        return torch.from_numpy(boxed(image=image)).permute(2, 0, 1).float().div_(255)

    network = YOLO(str(folder / "yolov8n.pt")).model
    network.fuse(verbose=False)
    return ready, network, lambda out: [found.numpy() for found in non_max_suppression(out[0].float())]


if __name__ == "__main__":
    main()
