"""A tiny SAM 2 with random weights, in the classes of transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIDE = 256  # of the network's input, in pixels


def _sizes() -> dict[str, Any]:
    from transformers import Sam2HieraDetConfig, Sam2MaskDecoderConfig, Sam2PromptEncoderConfig, Sam2VisionConfig

    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[SIDE, SIDE],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 4],
        window_size_per_stage=[8, 4, 7, 4],
        global_attention_blocks=[3],
        mlp_ratio=2.0,
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[SIDE // stride] * 2 for stride in (4, 8, 16)],
        fpn_hidden_size=32,
    )
    return {
        "vision_config": vision,
        "prompt_encoder_config": Sam2PromptEncoderConfig(hidden_size=32, image_size=SIDE, mask_input_channels=8),
        "mask_decoder_config": Sam2MaskDecoderConfig(
            hidden_size=32, mlp_dim=32, num_attention_heads=4, iou_head_hidden_dim=32
        ),
    }


def tiny(seed: int = 0) -> Any:
    """A Sam2Model with random weights, large enough that prompts and pictures matter."""
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(seed)
    return Sam2Model(Sam2Config(**_sizes())).eval()


def save(model: Any, folder: Path) -> Path:
    """A folder as save_pretrained writes it, with the image processor's own file."""
    from transformers import Sam2ImageProcessor

    model.save_pretrained(folder)
    Sam2ImageProcessor(
        size={"height": SIDE, "width": SIDE}, mask_size={"height": SIDE // 4, "width": SIDE // 4}
    ).save_pretrained(folder)
    return folder
