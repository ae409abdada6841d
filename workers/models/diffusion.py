"""Knows Stable Diffusion 1.x, 2.x and XL: images from prompts, from prompts and pictures, and along edges.

The pipelines are diffusers' own; what is decided here is which one an item takes, which seed it has, and what becomes
of what it yields:

    item                                    becomes
    --------------------------------------  ----------------------------------------------------------------
    a prompt                                an image drawn from noise
    a prompt and a picture                  the picture drawn anew, as far from it as `strength` says
    the same, of a model with ControlNet    an image from noise whose edges are the picture's
    the same, with redraw=true              the picture drawn anew, and its edges kept

The prompt is the item's own ("prompt" and "negative_prompt" in its data) or else the job's. Each item has a generator
of its own on the CPU, seeded with the item's "seed" or else from the job's seed and the item's key. So an image is the
same whichever items share its batch, up to the rounding of the device, and the same when the job runs again.

Tested against the pipelines of diffusers 0.42. SDXL's invisible watermark is never added: diffusers adds it only on
machines that have a further library, and results must not depend on that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import ItemFailed
from storage.results.image import Result
from workers import diffusionfolders, imagefiles
from workers.diffusionfolders import claims as claims
from workers.diffusionfolders import describe as describe
from workers.diffusionparams import SEEDS, Params
from workers.models import Card, Image, Item, Prepared, Site

REQUIRES = ("torch", "diffusers", "transformers", "safetensors", "cv2", "PIL")
EXTRA = "models"

# Pixels; sides of a redrawn picture are multiples of it, so that pictures of about one shape share batches.
_BUCKET = 64
_STEPS = 50  # diffusers' num_inference_steps
_GUIDANCE = {"sd": 7.5, "xl": 5.0}  # diffusers' guidance_scale
_ENCODERS = 4  # threads that turn a batch's pixels into files


def _card(name: str, repository: str, memory_gb: float, licence: str) -> Card:
    return Card(
        name,
        "diffusion",
        "image",
        Params,
        f"hf:{repository}",
        memory_gb=memory_gb,
        licence=licence,
        shard_size=64,
        needs_image=False,
    )


# Licences are those of the weights; LicenseRef- marks one without an SPDX name.
CARDS: tuple[Card, ...] = (
    _card(
        "stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5", 5.0, "LicenseRef-CreativeML-OpenRAIL-M"
    ),
    _card("stable-diffusion-xl", "stabilityai/stable-diffusion-xl-base-1.0", 12.0, "LicenseRef-OpenRAIL++-M"),
    _card("sd-turbo", "stabilityai/sd-turbo", 5.0, "LicenseRef-Stability-AI-Community"),
    _card("sdxl-turbo", "stabilityai/sdxl-turbo", 12.0, "LicenseRef-Stability-AI-Community"),
)


def check(card: Card, params: Params, weights: Path | None) -> None:
    """Raises BadInput for a ControlNet of another model."""
    if params.controlnet and weights is not None:
        diffusionfolders.check_controlnet(weights, Path(params.controlnet))


def load(card: Card, params: Params, weights: Path, site: Site) -> Painter:
    """Load the pipelines of a folder in diffusers' layout, without network, in the site's precision."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[site.precision]
    pipelines = diffusionfolders.load(weights, params, dtype)
    for pipeline in pipelines.values():
        pipeline.to(site.device)
    turbo = "turbo" in card.name.lower()
    guidance = 0 if turbo else _GUIDANCE[diffusionfolders.generation(weights)]
    settled = Settled(
        steps=params.steps or (1 if turbo else _STEPS),
        guidance=float(guidance if params.guidance is None else params.guidance),
        how={
            "model": card.name,
            "weights_sha256": site.weights_sha256,
            "scheduler": type(pipelines["draw"].scheduler).__name__.removesuffix("Scheduler"),
        },
    )
    return Painter(pipelines, params, settled)


@dataclass(frozen=True, slots=True)
class Settled:
    """What of the parameters depends on the model, and what every file says of it."""

    steps: int
    guidance: float
    how: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """One image to be made.

    Attributes:
        mode: one of workers.diffusionfolders.
        negative: None where there is none: SDXL takes that for something else than an empty one.
    """

    mode: str
    prompt: str
    negative: str | None
    seed: int
    width: int
    height: int

    @property
    def redrawn(self) -> bool:
        """Whether a picture is drawn anew."""
        return self.mode in ("redraw", "control-redraw")

    @property
    def controlled(self) -> bool:
        """Whether a ControlNet reads a condition image."""
        return self.mode in ("control", "control-redraw")


class Painter:
    """The pipelines of one model on one device."""

    def __init__(self, pipelines: dict[str, Any], params: Params, settled: Settled) -> None:
        self._pipelines, self._params, self._settled = pipelines, params, settled
        self._native = _native_size(pipelines["draw"])
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="image-file")

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """What is to be made for an item.

        Its data is what the pipeline takes besides: None, or (n, height, width, 3) in the size of the result, with the
        picture that is drawn anew before the one that conditions.

        Raises:
            ItemFailed: it has no prompt, or a wrong one, or the model needs a picture and it has none.
        """
        prompt = _said(item, "prompt", self._params.prompt)
        if not prompt:
            raise ItemFailed("prepare", "no-prompt", "the item has no prompt; give one to each, or --param prompt=...")
        negative = _said(item, "negative_prompt", self._params.negative_prompt) or None
        mode = self._mode(image)
        width, height = self._size(image)
        request = Request(mode, prompt, negative, _seed(self._params.seed, item), width, height)
        data = None if image is None else self._guides(image, request)
        group = (mode, width, height, negative is None)
        return Prepared(group, data, 1024 if data is None else data.nbytes, request)

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """An image each; ItemFailed "unsafe" for a flagged one, "not-finite" for one whose numbers are none."""
        if not batch:
            return []
        with np.errstate(invalid="ignore"):  # the safety check casts what may be NaN; it is looked at below
            done = self._pipelines[batch[0].meta.mode](**self._arguments(batch))
        unsafe = getattr(done, "nsfw_content_detected", None) or [False] * len(batch)
        images = done.images.float().permute(0, 2, 3, 1).cpu().numpy()
        return list(self._encoders.map(self._result, images, unsafe, (item.meta for item in batch)))

    def close(self) -> None:
        """Let go of the networks."""
        self._pipelines = {}
        self._encoders.shutdown(wait=False)

    def _mode(self, image: Image | None) -> str:
        controlled = "control" in self._pipelines
        if image is None and controlled:
            raise ItemFailed("prepare", "no-image", "a model with ControlNet needs a picture, and this item has none")
        if image is None:
            return "draw"
        if not controlled:
            return "redraw"
        return "control-redraw" if self._params.redraw else "control"

    def _size(self, image: Image | None) -> tuple[int, int]:
        """(width, height) of the result."""
        if self._params.width:
            return self._params.width, self._params.height
        width, height = self._native
        if image is None:
            return width, height
        gain = math.sqrt(width * height / (image.shape[0] * image.shape[1]))
        longest = 4 * max(width, height)  # a picture far wider than high would else become too wide for any device
        fitted = [min(max(round(side * gain / _BUCKET), 1) * _BUCKET, longest) for side in image.shape[1::-1]]
        return fitted[0], fitted[1]

    def _guides(self, image: Image, request: Request) -> Image:
        """The pictures that the pipeline takes, (n, height, width, 3)."""
        from PIL import Image as pillow

        size = (request.width, request.height)
        scaled = np.asarray(pillow.fromarray(image).resize(size, pillow.Resampling.LANCZOS))
        guides = [scaled] if request.redrawn else []
        if request.controlled:
            guides.append(scaled if self._params.control == "image" else self._edges(scaled))
        return np.stack(guides)

    def _edges(self, image: Image) -> Image:
        import cv2

        edges = cv2.Canny(image, self._params.canny_low, self._params.canny_high)
        return np.repeat(edges[:, :, None], 3, axis=2)

    def _arguments(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        """What diffusers' pipeline of the batch's mode is called with."""
        import torch
        from PIL import Image as pillow

        requests: list[Request] = [item.meta for item in batch]
        first = requests[0]
        given: dict[str, Any] = {
            "prompt": [request.prompt for request in requests],
            "negative_prompt": None if first.negative is None else [request.negative for request in requests],
            "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in requests],
            "num_inference_steps": self._steps(first),
            "guidance_scale": self._settled.guidance,
            "output_type": "pt",
        }
        pictures = [item.data for item in batch if item.data is not None]
        guides = [[pillow.fromarray(guide) for guide in guides] for guides in zip(*pictures, strict=True)]
        if first.redrawn:
            given |= {"image": guides[0], "strength": self._params.strength}
        if first.controlled:
            name = "control_image" if first.redrawn else "image"
            given |= {name: guides[-1], "controlnet_conditioning_scale": self._params.control_scale}
        # What is drawn anew without a ControlNet has the picture's size, and takes no other.
        return given if first.mode == "redraw" else {**given, "width": first.width, "height": first.height}

    def _steps(self, request: Request) -> int:
        """Of a redrawn picture only a share of the steps is done, at least one."""
        least = math.ceil(1 / self._params.strength) if request.redrawn else 1
        return max(self._settled.steps, least)

    def _result(self, image: npt.NDArray[np.float32], unsafe: bool, request: Request) -> Result | ItemFailed:
        if unsafe:
            return ItemFailed("infer", "unsafe", "the model's safety checker flagged the image; it was thrown away")
        if not np.isfinite(image).all():
            return ItemFailed("infer", "not-finite", "the networks gave NaN or infinity; try precision fp32")
        pixels = (image * 255).round().astype(np.uint8)  # as diffusers' numpy_to_pil
        try:
            return imagefiles.encode(pixels, self._params.format, self._params.quality, self._how(request))
        except ItemFailed as error:
            return error

    def _how(self, request: Request) -> dict[str, Any]:
        """Everything that made this image what it is."""
        how = {
            **self._settled.how,
            "prompt": request.prompt,
            "negative_prompt": request.negative or "",
            "seed": request.seed,
            "steps": self._steps(request),
            "guidance": self._settled.guidance,
        }
        if request.redrawn:
            how["strength"] = self._params.strength
        if request.controlled:
            how |= {"control": self._params.control, "control_scale": self._params.control_scale}
            how["controlnet_sha256"] = self._params.controlnet_sha256
        return how


def _native_size(pipeline: Any) -> tuple[int, int]:
    """(width, height) of the images that a model was trained for."""
    sides = pipeline.unet.config.sample_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor


def _said(item: Item, name: str, default: str) -> str:
    said = item.data.get(name, default)
    if not isinstance(said, str):
        raise ItemFailed("prepare", "bad-prompt", f"expected the {name} as text, but got {said!r:.100}")
    return said


def _seed(seed: int, item: Item) -> int:
    """The seed of an item: its own, or one that follows from the job's and the item's key."""
    own = item.data.get("seed")
    if own is None:
        digest = hashlib.sha256(json.dumps([seed, item.key]).encode()).digest()
        return int.from_bytes(digest[:8], "big") % SEEDS
    if isinstance(own, bool) or not isinstance(own, int) or not 0 <= own < SEEDS:
        raise ItemFailed("prepare", "bad-seed", f"expected a seed from 0 to {SEEDS - 1}, but got {own!r:.100}")
    return own
