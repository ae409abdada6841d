"""A tiny SAM 2 with random weights, in the classes of transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIDE = 256  # of the network's input, in pixels


def sizes() -> dict[str, Any]:
    """The parts of its configuration."""
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


def tiny(seed: int = 0, **decoder: Any) -> Any:
    """A Sam2Model with random weights, so large that other prompts and other pictures give other masks.

    Args:
        decoder: what its mask decoder's configuration has besides its sizes.
    """
    from transformers import Sam2Config, Sam2Model

    parts = sizes()
    for name, value in decoder.items():
        setattr(parts["mask_decoder_config"], name, value)
    return spread(Sam2Model(Sam2Config(**parts)), seed)


def spread(model: Any, seed: int = 0) -> Any:
    """A model with weights that keep numbers near to one from layer to layer, and a decoder that heeds prompts."""
    torch.manual_seed(seed)
    decoder = model.mask_decoder
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                table = name.endswith(("_token.weight", "_tokens.weight", "_embed.weight")) or "pos_embed" in name
                fan_in = weight.shape[0] if "upscale_conv" in name else weight[0].numel()
                weight.normal_(0, 1 if table else fan_in**-0.5)
        places = model.shared_image_embedding.positional_embedding.normal_()
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(places)
        for layer in decoder.transformer.layers:
            look = layer.cross_attn_image_to_token  # pixels look for prompts at their own place
            look.q_proj.weight.mul_(3)
            look.k_proj.weight.copy_(look.q_proj.weight)
            look.o_proj.weight.mul_(3)
        for conv in (decoder.conv_s0, decoder.conv_s1):
            conv.weight.mul_(0.3)
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight.mul_(4)
        decoder.iou_prediction_head.proj_out.weight.mul_(6)
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    """A folder as save_pretrained writes it, with the image processor's own file."""
    from transformers import Sam2ImageProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    size, mask_size = ({"height": side, "width": side} for side in (SIDE, SIDE // 4))
    Sam2ImageProcessor(size=size, mask_size=mask_size).save_pretrained(folder)
    return folder
