"""Knows Stable Diffusion 1.x, 2.x and XL: images from prompts, from prompts and pictures, and along ControlNet's edges.

The pipelines are diffusers' own; what is decided here is which one an item takes, which seed it has, and what becomes
of what it yields:

    item                                    becomes
    --------------------------------------  ----------------------------------------------------------------
    a prompt                                an image drawn from noise
    a prompt and a picture                  the picture drawn anew, as far from it as `strength` says
    the same, of a model with ControlNet    an image from noise whose edges are the picture's

The prompt is the item's own ("prompt" and "negative_prompt" in its data) or else the job's. Each item has a generator
of its own on the CPU, seeded with the item's "seed" or else from the job's seed and the item's key. So an image is the
same whichever items share its batch, up to the rounding of the device, and the same when the job runs again.

Tested against the pipelines of diffusers 0.42. SDXL's invisible watermark is never added: diffusers adds it only on
machines that have a further library, and results must not depend on that.
"""

from __future__ import annotations

import difflib
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

from storage.errors import BadInput, ItemFailed
from storage.results.image import Result
from workers import imagefiles, weights
from workers.models import Card, Image, Item, Prepared, Site

REQUIRES = ("torch", "diffusers", "transformers", "safetensors", "cv2", "PIL")
EXTRA = "models"

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

_SIDE = 8  # pixels; what the autoencoder makes one latent of
_BUCKET = (
    64  # pixels; sides of a redrawn picture are multiples of it, so that pictures of about one shape share batches
)
_STEPS = 50  # diffusers' num_inference_steps
_GUIDANCE = {"sd": 7.5, "xl": 5.0}  # diffusers' guidance_scale
_ENCODERS = 4  # threads that turn a batch's pixels into files
_SEEDS = 2**63

# What is in model_index.json -> which generation, of which the names of the three pipelines follow.
_GENERATIONS = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionControlNetPipeline": "sd",
    "StableDiffusionXLPipeline": "xl",
    "StableDiffusionXLControlNetPipeline": "xl",
}
_PIPELINES = {"draw": "{}Pipeline", "redraw": "{}Img2ImgPipeline", "control": "{}ControlNetPipeline"}
_PREFIX = {"sd": "StableDiffusion", "xl": "StableDiffusionXL"}
_LIBRARIES = {"diffusers", "transformers", "stable_diffusion", None}  # whose classes a folder may name


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
    seed: int = 0
    safety: bool = True
    format: str = "png"
    quality: int = 95

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "scheduler", "controlnet", "controlnet_sha256"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, but got {getattr(self, name)!r}")
        _whole("steps", self.steps, 0, 1000)
        _whole("canny_low", self.canny_low, 0, 255)
        _whole("canny_high", self.canny_high, self.canny_low, 255)
        _whole("seed", self.seed, 0, _SEEDS - 1)
        _number("strength", self.strength, 0.01, 1)
        _number("control_scale", self.control_scale, 0, 2)
        if self.guidance is not None:
            _number("guidance", self.guidance, 0, 100)
        if not isinstance(self.safety, bool):
            raise TypeError(f"safety must be true or false, but got {self.safety!r}")
        if self.control not in CONTROLS:
            raise ValueError(f"control must be one of {', '.join(CONTROLS)}, but got {self.control!r}")
        _check_size(self.width, self.height)
        imagefiles.check_format(self.format, self.quality)
        object.__setattr__(self, "scheduler", _scheduler(self.scheduler))
        if self.controlnet and not self.controlnet_sha256:
            folder = Path(self.controlnet).expanduser().absolute()
            object.__setattr__(self, "controlnet", str(folder))
            object.__setattr__(self, "controlnet_sha256", _controlnet_sha256(folder))


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number from {low} to {high}, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value!r}")


def _check_size(width: int, height: int) -> None:
    for name, value in (("width", width), ("height", height)):
        _whole(name, value, 0, 8192)
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


def _controlnet_sha256(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise BadInput(f"there is no ControlNet in {str(folder)!r}: expected a folder with config.json; check the path")
    return weights.sha256_of(folder)


def _card(name: str, repository: str, memory_gb: float, licence: str) -> Card:
    return Card(name, "diffusion", "image", Params, f"hf:{repository}", memory_gb=memory_gb, licence=licence)


# Licences are those of the weights; LicenseRef- marks one without an SPDX name.
CARDS: tuple[Card, ...] = (
    _card(
        "stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5", 5.0, "LicenseRef-CreativeML-OpenRAIL-M"
    ),
    _card("stable-diffusion-xl", "stabilityai/stable-diffusion-xl-base-1.0", 12.0, "LicenseRef-OpenRAIL++-M"),
    _card("sd-turbo", "stabilityai/sd-turbo", 5.0, "LicenseRef-Stability-AI-Community"),
    _card("sdxl-turbo", "stabilityai/sdxl-turbo", 12.0, "LicenseRef-Stability-AI-Community"),
)


def claims(path: Path) -> bool:
    """Whether the folder is a pipeline that diffusers wrote, of whatever kind."""
    try:
        return "_class_name" in _index(path)
    except BadInput:
        return False


def describe(path: Path) -> tuple[str, ...]:
    """No labels. Raises BadInput for a folder that this family cannot run, or will not: pickles, code, other models."""
    index = _index(path)
    name = index.get("_class_name")
    if name not in _GENERATIONS:
        raise BadInput(f"{path.name} is a {name}; the diffusion family runs {', '.join(sorted(_GENERATIONS))}")
    for part, origin in index.items():
        if isinstance(origin, list) and origin and origin[0] not in _LIBRARIES:
            raise BadInput(f"{path.name} refused: its {part} is code of {origin[0]!r}, which is not run")
    channels = _json(path / "unet" / "config.json").get("in_channels", 4)
    if channels != 4:
        raise BadInput(
            f"{path.name} is a model for inpainting or editing ({channels} channels in); take one for images"
        )
    for part in ("unet", "vae", "text_encoder"):
        if not list((path / part).glob("*.safetensors")):
            raise BadInput(
                f"{path.name} has no {part}/*.safetensors; save it with safe_serialization=True and try again"
            )
    return ()


def _index(path: Path) -> dict[str, Any]:
    return _json(path / "model_index.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path.name} in {path.parent.name!r}: {error}") from None
    return found if isinstance(found, dict) else {}


def load(card: Card, params: Params, weights: Path, site: Site) -> Painter:
    """Load the pipeline of a folder in diffusers' layout, without network, in the site's precision."""
    import torch

    _be_quiet()
    describe(weights)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[site.precision]
    generation = _GENERATIONS[_index(weights)["_class_name"]]
    pipelines = _pipelines(weights, params, generation, dtype)
    for pipeline in pipelines.values():
        pipeline.to(site.device)
        pipeline.set_progress_bar_config(disable=True)
    turbo = "turbo" in card.name.lower()
    settled = Settled(
        steps=params.steps or (1 if turbo else _STEPS),
        guidance=float(params.guidance if params.guidance is not None else 0 if turbo else _GUIDANCE[generation]),
        how={
            "model": card.name,
            "weights_sha256": site.weights_sha256,
            "scheduler": type(pipelines["draw"].scheduler).__name__.removesuffix("Scheduler"),
        },
    )
    return Painter(pipelines, params, settled)


def _be_quiet() -> None:
    """No progress bars in a worker's log, and no advice about casting networks, which diffusers itself then does."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _pipelines(folder: Path, params: Params, generation: str, dtype: Any) -> dict[str, Any]:
    """What draws, and what redraws or is controlled; they share their networks."""
    import diffusers

    safe = {"local_files_only": True, "use_safetensors": True, "dtype": dtype}
    without = {} if params.safety or generation == "xl" else {"safety_checker": None, "requires_safety_checker": False}
    classes = {mode: getattr(diffusers, name.format(_PREFIX[generation])) for mode, name in _PIPELINES.items()}
    pipeline = classes["draw"].from_pretrained(folder, variant=_variant(folder / "unet"), **safe, **without)
    if params.scheduler:
        scheduler = getattr(diffusers, f"{params.scheduler}Scheduler")
        # Some would clip the latents, of which these models make larger ones, where the model's own did not say.
        pipeline.scheduler = scheduler.from_config({**pipeline.scheduler.config, "clip_sample": False})
    pipeline.vae.enable_slicing()  # images are decoded one by one: less memory, and no batch to depend on
    control = _control_folder(folder, params)
    if control is None:
        found = {"draw": pipeline, "redraw": classes["redraw"].from_pipe(pipeline, dtype=dtype)}
    else:
        network = diffusers.ControlNetModel.from_pretrained(control, variant=_variant(control), **safe)
        controlled = classes["control"].from_pipe(pipeline, controlnet=network, dtype=dtype)
        found = {"draw": pipeline, "control": controlled}
    if generation == "xl":
        for each in found.values():
            each.watermark = None
    return found


def _variant(folder: Path) -> str | None:
    """ "fp16" where the folder has its weights in that variant only."""
    names = [path.name for path in folder.glob("*.safetensors*")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def _control_folder(folder: Path, params: Params) -> Path | None:
    if not params.controlnet:
        return folder / "controlnet" if (folder / "controlnet").is_dir() else None
    found = _controlnet_sha256(Path(params.controlnet))
    if found != params.controlnet_sha256:
        raise BadInput(
            f"the ControlNet in {params.controlnet!r} is not the one of this job: sha256 {found[:16]}..., expected "
            f"{params.controlnet_sha256[:16]}...; put the same folder there on every worker's machine"
        )
    return Path(params.controlnet)


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
        mode: "draw", "redraw" or "control".
        negative: None where there is none: SDXL takes that for something else than an empty one.
    """

    mode: str
    prompt: str
    negative: str | None
    seed: int
    width: int
    height: int


class Painter:
    """The pipelines of one model on one device."""

    def __init__(self, pipelines: dict[str, Any], params: Params, settled: Settled) -> None:
        self._pipelines, self._params, self._settled = pipelines, params, settled
        self._native = _native_size(pipelines["draw"])
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="image-file")

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """What is to be made for an item; data is its picture in the size of the result, (height, width, 3), or None.

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
        data = None if image is None else self._guide(image, request)
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
        return "draw" if image is None else "control" if controlled else "redraw"

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

    def _guide(self, image: Image, request: Request) -> Image:
        """The picture as the pipeline takes it."""
        import cv2
        from PIL import Image as pillow

        size = (request.width, request.height)
        scaled = np.asarray(pillow.fromarray(image).resize(size, pillow.Resampling.LANCZOS))
        if request.mode == "redraw" or self._params.control == "image":
            return scaled
        edges = cv2.Canny(scaled, self._params.canny_low, self._params.canny_high)
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
            "num_inference_steps": self._steps(first.mode),
            "guidance_scale": self._settled.guidance,
            "output_type": "pt",
        }
        if first.mode != "draw":
            given["image"] = [pillow.fromarray(item.data) for item in batch]
        if first.mode == "redraw":
            return {**given, "strength": self._params.strength}
        if first.mode == "control":
            given["controlnet_conditioning_scale"] = self._params.control_scale
        return {**given, "width": first.width, "height": first.height}

    def _steps(self, mode: str) -> int:
        """Of a redrawn picture only a share of the steps is done, at least one."""
        least = math.ceil(1 / self._params.strength) if mode == "redraw" else 1
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
            "steps": self._steps(request.mode),
            "guidance": self._settled.guidance,
        }
        if request.mode == "redraw":
            how["strength"] = self._params.strength
        if request.mode == "control":
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
        return int.from_bytes(digest[:8], "big") % _SEEDS
    if isinstance(own, bool) or not isinstance(own, int) or not 0 <= own < _SEEDS:
        raise ItemFailed("prepare", "bad-seed", f"expected a seed from 0 to {_SEEDS - 1}, but got {own!r:.100}")
    return own
