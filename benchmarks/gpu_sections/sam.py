"""The section on Segment Anything, random weights: the encoder, the decoder, and boxes to masks as a job does it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from benchmarks.gpu_sections import bench as shared
from benchmarks.gpu_sections import forward
from benchmarks.gpu_sections.bench import Bench, expect, jpegs, need

BOXES = 16  # of a picture


def run(bench: Bench) -> None:
    """ViT-B and ViT-H."""
    need("segment_anything", "cv2")
    names = ("tiny",) if bench.quick else ("vit_b", "vit_h") if bench.on_gpu else ("vit_b",)
    bench.head(*forward.HEAD)
    files = {name: weights(bench.folder, name) for name in names}
    for name in names:
        found = shared.networks(bench, "sam", files[name], {}, "masks")
        forward.table(bench, f"{name} encoder, pictures", found["encoder"], (1, 4) if bench.on_gpu else (1,))
        boxes = (BOXES,) if bench.quick or not bench.on_gpu else (BOXES, 64)
        forward.table(bench, f"{name} decoder, prompts", found["decoder"], boxes, forward.ways(bench)[:3])
    bench.head("network", "precision", "pictures a second", f"masks a second, {BOXES} boxes a picture")
    for name in names:
        for precision in ("fp32", "fp16") if bench.on_gpu else ("fp32",):
            bench.attempt(name, precision, take=functools.partial(with_boxes, bench, files[name], precision))


def weights(folder: Path, name: str) -> Path:
    """A state dict of random weights, in the classes of segment-anything."""
    import torch

    path = folder / f"{name}.pth"
    if not path.exists():
        torch.manual_seed(0)
        torch.save(built(name).state_dict(), path)
    return path


def built(name: str) -> Any:
    """A Sam of random weights."""
    from segment_anything import sam_model_registry

    if name != "tiny":
        return sam_model_registry[name]()
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder = ImageEncoderViT(
        img_size=128, patch_size=16, embed_dim=32, depth=2, num_heads=2, out_chans=32, use_rel_pos=True, window_size=4,
        global_attn_indexes=(1,),
    )  # fmt: skip
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=8, mlp_dim=64)
    decoder = MaskDecoder(num_multimask_outputs=3, transformer=transformer, transformer_dim=32, iou_head_hidden_dim=48)
    return Sam(encoder, PromptEncoder(32, (8, 8), (128, 128), mask_in_chans=16), decoder)


def with_boxes(bench: Bench, file: Path, precision: str) -> tuple[object, ...]:
    """Pictures with boxes through the family: encode, decode, enlarge, RLE."""
    from storage.errors import ItemFailed
    from workers import images
    from workers.models import Item

    model = shared.load(bench, "sam", file, {}, "masks", precision)
    width, height = (160, 120) if bench.quick else (1280, 960)
    boxes = [[i * width / BOXES / 2, 0.0, width / 2 + i * width / BOXES / 2, height * 0.8] for i in range(BOXES)]
    pictures = [images.decode(data, images.Limits()).pixels for data in jpegs(2, width, height)]
    prepared = [model.prepare(picture, Item("x", data={"boxes": boxes})) for picture in pictures]
    answers = model.infer(prepared)
    expect(not any(isinstance(answer, ItemFailed) for answer in answers), f"no masks: {answers[0]}")
    found = bench.rate(lambda: len(model.infer(prepared)))
    model.close()
    return found, found * BOXES
