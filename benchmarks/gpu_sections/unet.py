"""The section on diffusion: steps of a UNet with the sizes of Stable Diffusion 1.5, random weights."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_sections import forward
from benchmarks.gpu_sections.bench import Bench, need

STEPS = 30  # of a picture

# As the published unet/config.json of Stable Diffusion 1.5 says: 860 million weights, pictures of 512 x 512.
SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TINY = {
    **SD15,
    "sample_size": 16,
    "block_out_channels": (32, 32, 64, 64),
    "cross_attention_dim": 32,
    "layers_per_block": 1,
}
TOKENS = 77  # of a prompt


def run(bench: Bench) -> None:
    """Steps a second; a picture takes two rows of a batch, one with its prompt and one without."""
    need("diffusers")
    config = TINY if bench.quick or not bench.on_gpu else SD15
    network = unet(config)
    if config is TINY:
        bench.say("(a tiny one)")
    bench.say(f"A picture takes {STEPS} steps, and in each two rows of the batch: one with its prompt, one without.")
    bench.head(*forward.HEAD[:3], "pictures a second", forward.HEAD[4])
    batches = (2, 8, 16) if bench.on_gpu and not bench.quick else (2,)
    forward.table(bench, "UNet", network, batches, per_call=lambda batch: batch / 2 / STEPS)


def unet(config: dict[str, Any]) -> Any:
    """As a network that a runtime could take."""
    import torch
    from diffusers import UNet2DConditionModel

    from workers.runtimes import Network

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.unet = UNet2DConditionModel(**config)

        def forward(self, sample: Any, time: Any, prompt: Any) -> Any:
            return self.unet(sample, time, encoder_hidden_states=prompt, return_dict=False)[0]

    side, width = config["sample_size"], config["cross_attention_dim"]
    example = {
        "sample": torch.zeros(2, 4, side, side),
        "time": torch.tensor([500, 500]),
        "prompt": torch.zeros(2, TOKENS, width),
    }
    axes = {name: {0: "batch"} for name in (*example, "noise")}
    return Network("unet", Step, example, ("noise",), axes)
