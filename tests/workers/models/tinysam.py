"""A tiny Segment Anything with random weights, in the classes of segment-anything itself."""

from __future__ import annotations

import functools
from typing import Any

import torch

SIDE = 256  # of the network's input, in pixels


def tiny(seed: int = 0, *, patch: int = 16, width: int = 32, depth: int = 3, heads: int = 2, window: int = 6) -> Any:
    """A Sam with random weights."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(seed)
    grid, channels = SIDE // patch, 32
    made = Sam(
        ImageEncoderViT(
            img_size=SIDE,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=2,
            out_chans=channels,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window,
            global_attn_indexes=(1,),
        ),
        PromptEncoder(channels, (grid, grid), (SIDE, SIDE), mask_in_chans=16),
        MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=channels, num_heads=8, mlp_dim=64),
            transformer_dim=channels,
            iou_head_depth=3,
            iou_head_hidden_dim=48,
        ),
    )
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                value.normal_(0, 0.3)
    return made.eval()
