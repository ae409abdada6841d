"""The parameters of Stable Diffusion jobs, checked; their defaults stand here alone."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from workers import diffusionfolders, imagefiles
from workers.paramchecks import flag, number, one_of, whole

# Those of diffusers' KarrasDiffusionSchedulers that every model here can be sampled with. Left out: DPMSolverSDE, whose
# noise does not come from an item's own generator, and LMSDiscrete and EDMEuler, which need other libraries or models.
SCHEDULERS = (
    "DDIM",
    "DDPM",
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "KDPM2AncestralDiscrete",
    "KDPM2Discrete",
    "PNDM",
    "UniPCMultistep",
)
CONTROLS = ("canny", "image")
SEEDS = 2**63

_SIDE = 8  # pixels; what the autoencoder makes one latent of


@dataclass(frozen=True, slots=True)
class Params:
    """What a user may set; the defaults are those of diffusers' pipelines.

    Attributes:
        prompt, negative_prompt: for items that have none of their own.
        steps: of the sampler; 0 means 50, or 1 for a model with "turbo" in its name.
        guidance: how strongly the prompt is followed, up to 1 means that it is sampled without guidance; None means
            7.5, 5.0 for SDXL, 0.0 for a model with "turbo" in its name.
        scheduler: one of SCHEDULERS, or "" for the model's own.
        width, height: of the image in pixels, multiples of 8. Both 0 means the model's own size; a picture is then
            redrawn in its own shape, on as many pixels as the model's size has, with sides that are multiples of 64.
        strength: how far a redrawn picture may go from the original, from 0.01 to 1; that share of the steps is done.
        controlnet: folder of a ControlNet for this model, on every worker's machine; "" for the folder "controlnet" in
            the model's own, if there is one.
        controlnet_sha256: of that folder (workers.weights.sha256_of), so that the recipe names what was used; filled
            in from the folder when it is not given.
        control: "canny" takes the edges of the item's picture, "image" takes the picture as the control image it is.
        canny_low, canny_high: thresholds of cv2.Canny, 0..255.
        control_scale: weight of the ControlNet, 0..2.
        redraw: with a ControlNet, whether the item's picture is drawn anew, as far from it as `strength` says, or False
            an image from noise. Without one a picture is always drawn anew.
        seed: of the job; whole number from 0.
        safety: False leaves out the model's own check of unsafe images; a flagged image fails with reason "unsafe".
        format, quality: of the files, see workers.imagefiles.encode.
    """

    prompt: str = ""
    negative_prompt: str = ""
    steps: int = 0
    guidance: float | None = None
    scheduler: str = ""
    width: int = 0
    height: int = 0
    strength: float = 0.8
    controlnet: str = ""
    controlnet_sha256: str = ""
    control: str = "canny"
    canny_low: int = 100
    canny_high: int = 200
    control_scale: float = 1.0
    redraw: bool = False
    seed: int = 0
    safety: bool = True
    format: str = "png"
    quality: int = 95

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "scheduler", "controlnet", "controlnet_sha256"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, but got {getattr(self, name)!r}")
        whole("steps", self.steps, 0, 1000)
        whole("canny_low", self.canny_low, 0, 255)
        whole("canny_high", self.canny_high, self.canny_low, 255)
        whole("seed", self.seed, 0, SEEDS - 1)
        number("strength", self.strength, 0.01, 1)
        number("control_scale", self.control_scale, 0, 2)
        if self.guidance is not None:
            number("guidance", self.guidance, 0, 100)
        flag("safety", self.safety)
        flag("redraw", self.redraw)
        one_of("control", self.control, CONTROLS)
        _check_size(self.width, self.height)
        imagefiles.check_format(self.format, self.quality)
        object.__setattr__(self, "scheduler", _scheduler(self.scheduler))
        if self.controlnet and not self.controlnet_sha256:
            folder = Path(self.controlnet).expanduser().absolute()
            object.__setattr__(self, "controlnet", str(folder))
            object.__setattr__(self, "controlnet_sha256", diffusionfolders.controlnet_sha256(folder))


def _check_size(width: int, height: int) -> None:
    for name, value in (("width", width), ("height", height)):
        whole(name, value, 0, 8192)
        if value % _SIDE:
            raise ValueError(f"{name} must be a multiple of {_SIDE}, but got {value}")
    if bool(width) != bool(height):
        raise ValueError(f"give width and height, or neither, but got {width}x{height}")


def _scheduler(name: str) -> str:
    """A scheduler's name without the ending that all of diffusers' classes have."""
    plain = name.removesuffix("Scheduler")
    if plain in ("", *SCHEDULERS):
        return plain
    lower = {known.lower(): known for known in SCHEDULERS}
    close = difflib.get_close_matches(plain.lower(), lower, n=1, cutoff=0.4)
    hint = f"; did you mean {lower[close[0]]!r}?" if close else ""
    raise ValueError(f"there is no scheduler {name!r}{hint}; known: {', '.join(SCHEDULERS)}")
