"""Knows folders in diffusers' layout: what pipeline one holds, whether it may be run, and how it is loaded.

A model has several pipelines over the same networks, one for each thing that may be asked of it (a mode):

    draw             an image from noise
    redraw           a picture drawn anew
    control          an image from noise, along a condition image that a ControlNet reads
    control-redraw   a picture drawn anew, along a condition image

Nothing here imports torch or diffusers before something is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from storage.errors import BadInput
from workers import weights

_PREFIX = {"sd": "StableDiffusion", "xl": "StableDiffusionXL"}  # of diffusers' class names, by generation
_PIPELINES = {
    "draw": "Pipeline",
    "redraw": "Img2ImgPipeline",
    "control": "ControlNetPipeline",
    "control-redraw": "ControlNetImg2ImgPipeline",
}
_GENERATIONS = {prefix + name: generation for generation, prefix in _PREFIX.items() for name in _PIPELINES.values()}
_LIBRARIES = {"diffusers", "transformers", "stable_diffusion", None}  # whose classes a folder may name


class Wanted(Protocol):
    """Those of the job's parameters that say what is loaded (workers.diffusionparams.Params)."""

    @property
    def scheduler(self) -> str: ...
    @property
    def controlnet(self) -> str: ...
    @property
    def controlnet_sha256(self) -> str: ...
    @property
    def safety(self) -> bool: ...


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


def generation(folder: Path) -> str:
    """ "sd" for Stable Diffusion 1.x and 2.x, "xl" for XL."""
    return _GENERATIONS[_index(folder)["_class_name"]]


def _be_quiet() -> None:
    """No progress bars in a worker's log, and no advice about casting networks, which diffusers itself then does."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load(folder: Path, wanted: Wanted, dtype: Any) -> dict[str, Any]:
    """The pipeline of each mode that the model has: the first two, or with a ControlNet the first and the last two.

    They share their networks. Raises BadInput for what `describe` refuses, and for another ControlNet than the job's.
    """
    import diffusers

    _be_quiet()
    describe(folder)
    which = generation(folder)
    safe = {"local_files_only": True, "use_safetensors": True, "dtype": dtype}
    without = {} if wanted.safety or which == "xl" else {"safety_checker": None, "requires_safety_checker": False}
    classes = {mode: getattr(diffusers, _PREFIX[which] + name) for mode, name in _PIPELINES.items()}
    pipeline = classes["draw"].from_pretrained(folder, variant=_variant(folder / "unet"), **safe, **without)
    if wanted.scheduler:
        scheduler = getattr(diffusers, f"{wanted.scheduler}Scheduler")
        # Some would clip the latents, of which these models make larger ones, where the model's own did not say.
        pipeline.scheduler = scheduler.from_config({**pipeline.scheduler.config, "clip_sample": False})
    pipeline.vae.enable_slicing()  # images are decoded one by one: less memory, and no batch to depend on
    modes, more = ["redraw"], {}
    control = _control_folder(folder, wanted)
    if control is not None:
        check_controlnet(folder, control)
        network = diffusers.ControlNetModel.from_pretrained(control, variant=_variant(control), **safe)
        modes, more = ["control", "control-redraw"], {"controlnet": network}
    found = {"draw": pipeline} | {mode: classes[mode].from_pipe(pipeline, dtype=dtype, **more) for mode in modes}
    for each in found.values():
        each.set_progress_bar_config(disable=True)
        if which == "xl":
            each.watermark = None
    return found


def _variant(folder: Path) -> str | None:
    """ "fp16" where the folder has its weights in that variant only."""
    names = [path.name for path in folder.glob("*.safetensors*")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def _control_folder(folder: Path, wanted: Wanted) -> Path | None:
    if not wanted.controlnet:
        return folder / "controlnet" if (folder / "controlnet").is_dir() else None
    found = controlnet_sha256(Path(wanted.controlnet))
    if found != wanted.controlnet_sha256:
        raise BadInput(
            f"the ControlNet in {wanted.controlnet!r} is not the one of this job: sha256 {found[:16]}..., expected "
            f"{wanted.controlnet_sha256[:16]}...; put the same folder there on every worker's machine"
        )
    return Path(wanted.controlnet)


def check_controlnet(folder: Path, control: Path) -> None:
    """A ControlNet and its model meet at every level of the U-Net. Raises BadInput for one of another generation."""
    own, its = _json(folder / "unet" / "config.json"), _json(control / "config.json")
    for name in ("cross_attention_dim", "block_out_channels", "addition_embed_type"):
        if own.get(name) != its.get(name):
            raise BadInput(
                f"the ControlNet in {str(control)!r} is for another model: its {name} is {its.get(name)}, that of "
                f"{folder.name!r} is {own.get(name)}"
            )


def controlnet_sha256(folder: Path) -> str:
    """Of a ControlNet's folder. Raises BadInput when there is none."""
    if not (folder / "config.json").is_file():
        raise BadInput(f"there is no ControlNet in {str(folder)!r}: expected a folder with config.json; check the path")
    found = _json(folder / "config.json").get("_class_name")
    if found != "ControlNetModel":
        raise BadInput(f"{str(folder)!r} holds a {found}, expected a ControlNetModel as diffusers saves it")
    return weights.sha256_of(folder)
