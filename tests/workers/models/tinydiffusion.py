"""Tiny pipelines with random weights in diffusers' own layout, made without network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # of the published models


def _tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with a vocabulary of single bytes."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def _text_config(**changes: Any) -> Any:
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    known = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513, "projection_dim": 32}
    return CLIPTextConfig(**sizes, **known, **changes)


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    values = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**values, **changes})


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )


def _checker() -> dict[str, Any]:
    """Finds every image unsafe."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"image_size": 32, "patch_size": 16, "projection_dim": 8}
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    config = CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=8)
    size = {"shortest_edge": 32}
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2.0)  # what the likeness to a forbidden concept, -1..1, must be above
    return {
        "safety_checker": checker,
        "feature_extractor": CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}),
    }


def sd(folder: Path, *, safety: bool = False, seed: int = 0) -> Path:
    """Stable Diffusion 1.x for 64x64 pixels."""
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    checker = _checker() if safety else {"safety_checker": None, "feature_extractor": None}
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=_tokenizer(folder / "made"),
        unet=_unet(),
        scheduler=PNDMScheduler(**_NOISE, skip_prk_steps=True, steps_offset=1),
        requires_safety_checker=safety,
        **checker,
    ).save_pretrained(folder / "sd")
    return folder / "sd"


def xl(folder: Path, seed: int = 1) -> Path:
    """Stable Diffusion XL for 64x64 pixels."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    unet = _unet(
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(hidden_act="gelu")),
        tokenizer=_tokenizer(folder / "made"),
        tokenizer_2=_tokenizer(folder / "made"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_NOISE, steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(folder / "xl")
    return folder / "xl"


def controlnet(folder: Path, base: Path, seed: int = 2) -> Path:
    """A ControlNet for a pipeline made here, whose last layers are not zero, so that it changes something."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 8))
    for layer in [*network.controlnet_down_blocks, network.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.3)
    torch.nn.init.normal_(network.controlnet_cond_embedding.conv_out.weight, std=0.3)
    network.save_pretrained(folder / "controlnet")
    return folder / "controlnet"
