"""Stable Diffusion against diffusers' own pipelines, on tiny networks with random weights: the same pixels."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from ultralytics.utils import ASSETS

from storage.errors import BadInput, ItemFailed
from storage.results.image import Result
from tests.workers.models import tinydiffusion
from workers import diffusionparams, models, weights
from workers.models import Item, Prepared, Site, diffusion
from workers.models.diffusion import Painter, Params

PROMPTS = ("a cat", "ein Bär 日本", "a photo of a red bus in the rain, detailed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diffusion")


@pytest.fixture(scope="module")
def sd(folder: Path) -> Path:
    return tinydiffusion.sd(folder, safety=True)


@pytest.fixture(scope="module")
def xl(folder: Path) -> Path:
    return tinydiffusion.xl(folder)


@pytest.fixture(scope="module")
def controlnet(folder: Path, sd: Path) -> Path:
    return tinydiffusion.controlnet(folder, sd)


@pytest.fixture(params=["sd", "xl"])
def either(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def painter(path: Path, name: str = "tiny", precision: str = "fp32", **params: Any) -> Painter:
    params = {"steps": 3, "safety": False, **params}
    card = models.Card(name, "diffusion", "image", Params)
    site = Site("cpu", lambda network: pytest.fail("no runtime is asked for"), precision, "ab" * 32)
    return diffusion.load(card, Params(**params), path, site)


def reference(cls: str, path: Path, **given: Any) -> Any:
    """diffusers' own pipeline."""
    pipeline = getattr(diffusers, cls).from_pretrained(path, local_files_only=True, safety_checker=None, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def photo(name: str = "bus.jpg") -> np.ndarray:
    """A real photograph, upright RGB, a quarter of its size."""
    return np.asarray(Image.open(ASSETS / name).convert("RGB").reduce(4))


def items(count: int = 3, **data: Any) -> list[Item]:
    return [Item(f"key {i}", data={"prompt": PROMPTS[i % 3], **data}) for i in range(count)]


def prepared(model: Painter, of: Sequence[Item], image: np.ndarray | None = None) -> list[Prepared]:
    return [model.prepare(image, item) for item in of]


def pixels(result: Result | ItemFailed) -> np.ndarray:
    assert isinstance(result, Result), result
    assert result.data is not None
    return np.asarray(Image.open(io.BytesIO(result.data)))


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def derived(seed: int, key: str) -> int:
    """The seed of an item that has none, as it is documented."""
    digest = hashlib.sha256(json.dumps([seed, key]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


CLASSES = {"sd": "StableDiffusion", "xl": "StableDiffusionXL"}


def some(*by_default: tuple[str, str], of: tuple[str, str]) -> list[Any]:
    """Both models with both values; those that are not named only among the slow tests."""
    pairs = [(model, value) for model in CLASSES for value in of]
    return [pytest.param(*pair, marks=[] if pair in by_default else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(
    ("either", "negative"), some(("sd", "blurry"), ("xl", ""), of=("", "blurry")), indirect=["either"]
)
def test_images_from_prompts_are_those_of_diffusers(either: Path, negative: str) -> None:
    model = painter(either, guidance=6.0, seed=4, negative_prompt=negative)
    batch = prepared(model, items())
    assert {item.group for item in batch} == {("draw", 64, 64, not negative)}
    pipeline = reference(f"{CLASSES[either.name]}Pipeline", either)
    for item, ours in zip(items(), (model.infer([one])[0] for one in batch), strict=True):
        theirs = pipeline(
            item.data["prompt"],
            negative_prompt=negative or None,
            num_inference_steps=3,
            guidance_scale=6.0,
            generator=generator(derived(4, item.key)),
        ).images[0]
        assert np.array_equal(pixels(ours), np.asarray(theirs))


def test_redrawn_pictures_are_those_of_diffusers(either: Path) -> None:
    model = painter(either, steps=6, strength=0.5, width=96, height=64)
    (ours,) = model.infer(prepared(model, items(1, seed=12), photo()))
    pipeline = reference(f"{CLASSES[either.name]}Img2ImgPipeline", either)
    theirs = pipeline(
        PROMPTS[0],
        image=Image.fromarray(photo()).resize((96, 64), Image.Resampling.LANCZOS),
        strength=0.5,
        num_inference_steps=6,
        guidance_scale={"sd": 7.5, "xl": 5.0}[either.name],
        generator=generator(12),
    ).images[0]
    assert np.array_equal(pixels(ours), np.asarray(theirs))
    assert pixels(ours).shape == (64, 96, 3)
    assert ours.meta["strength"] == 0.5


@pytest.mark.parametrize("control", ["canny", pytest.param("image", marks=pytest.mark.slow)])
def test_controlled_images_are_those_of_diffusers(sd: Path, controlnet: Path, control: str) -> None:
    options = {"control": control, "canny_low": 50, "canny_high": 120, "control_scale": 0.7}
    model = painter(sd, controlnet=str(controlnet), width=64, height=64, **options)
    (ours,) = model.infer(prepared(model, items(1, seed=12), photo()))
    small = Image.fromarray(photo()).resize((64, 64), Image.Resampling.LANCZOS)
    edges = cv2.Canny(np.asarray(small), 50, 120)
    assert 100 < (edges > 0).sum() < 3000
    network = diffusers.ControlNetModel.from_pretrained(controlnet)
    pipeline = reference("StableDiffusionControlNetPipeline", sd, controlnet=network)
    given = {"num_inference_steps": 3, "controlnet_conditioning_scale": 0.7}
    theirs = pipeline(
        PROMPTS[0],
        image=Image.fromarray(np.dstack([edges] * 3)) if control == "canny" else small,
        generator=generator(12),
        **given,
    ).images[0]
    assert np.array_equal(pixels(ours), np.asarray(theirs))
    plain = painter(sd)
    assert not np.array_equal(pixels(plain.infer(prepared(plain, items(1, seed=12)))[0]), np.asarray(theirs))
    assert ours.meta["controlnet_sha256"] == weights.sha256_of(controlnet)
    with pytest.raises(ItemFailed, match="needs a picture"):
        model.prepare(None, items(1)[0])


@pytest.mark.parametrize(("either", "control"), some(("sd", "canny"), of=("canny", "image")), indirect=["either"])
def test_pictures_redrawn_along_a_condition_are_those_of_diffusers(either: Path, folder: Path, control: str) -> None:
    """ControlNet and img2img at once: started from the picture, with its edges (or itself) as the condition."""
    net = tinydiffusion.controlnet(folder / f"for-{either.name}", either)
    options = {"control": control, "canny_low": 50, "canny_high": 120, "control_scale": 0.7, "strength": 0.6}
    size = {"steps": 5, "width": 64, "height": 64}
    model = painter(either, controlnet=str(net), redraw=True, **options, **size)
    (prepared_item,) = prepared(model, items(1, seed=12), photo())
    (ours,) = model.infer([prepared_item])
    small = Image.fromarray(photo()).resize((64, 64), Image.Resampling.LANCZOS)
    edges = Image.fromarray(np.dstack([cv2.Canny(np.asarray(small), 50, 120)] * 3))
    pipeline = reference(
        f"{CLASSES[either.name]}ControlNetImg2ImgPipeline",
        either,
        controlnet=diffusers.ControlNetModel.from_pretrained(net),
    )
    given = {"num_inference_steps": 5, "strength": 0.6, "controlnet_conditioning_scale": 0.7}
    guidance = {"sd": 7.5, "xl": 5.0}[either.name]
    theirs = pipeline(
        PROMPTS[0],
        image=small,
        control_image=edges if control == "canny" else small,
        generator=generator(12),
        guidance_scale=guidance,
        **given,
    ).images[0]
    assert np.array_equal(pixels(ours), np.asarray(theirs))
    assert {name: ours.meta[name] for name in ("strength", "control", "control_scale")} == {
        name: options[name] for name in ("strength", "control", "control_scale")
    }
    batch = prepared(model, items(3), photo())
    alone = [pixels(model.infer([item])[0]).astype(int) for item in batch]
    together = [pixels(result).astype(int) for result in model.infer(batch)]
    assert max(abs(a - b).max() for a, b in zip(alone, together, strict=True)) <= 2
    noise = painter(either, controlnet=str(net), **options, **size)
    plain = painter(either, **options, **size)
    others = [m.infer(prepared(m, items(1, seed=12), photo()))[0] for m in (noise, plain)]
    assert all(abs(pixels(other).astype(int) - pixels(ours)).max() > 2 for other in others), "both have their say"


@pytest.mark.parametrize(
    ("either", "mode"),
    some(("sd", "Img2Img"), ("xl", "ControlNetImg2Img"), of=("Img2Img", "ControlNetImg2Img")),
    indirect=["either"],
)
def test_folders_saved_by_the_other_pipelines(either: Path, folder: Path, tmp_path: Path, mode: str) -> None:
    """The same networks under another name in model_index.json."""
    net = tinydiffusion.controlnet(folder / f"of-{either.name}", either)
    more = {"controlnet": diffusers.ControlNetModel.from_pretrained(net)} if mode.startswith("Control") else {}
    reference(f"{CLASSES[either.name]}{mode}Pipeline", either, **more).save_pretrained(tmp_path / "saved")
    model, plain = painter(tmp_path / "saved"), painter(either, **({"controlnet": str(net)} if more else {}))
    a, b = (m.infer(prepared(m, items(1), photo()))[0] for m in (model, plain))
    assert np.array_equal(pixels(a), pixels(b))


def test_a_controlnet_of_another_model_is_refused(sd: Path, xl: Path, controlnet: Path) -> None:
    with pytest.raises(BadInput, match=r"for another model: its cross_attention_dim is 32, that of 'xl' is 64"):
        painter(xl, controlnet=str(controlnet))
    with pytest.raises(BadInput, match=r"holds a UNet2DConditionModel, expected a ControlNetModel"):
        models.fill(diffusion.CARDS[0], {"controlnet": str(sd / "unet")})


def test_a_controlnet_may_lie_in_the_models_folder(sd: Path, controlnet: Path, tmp_path: Path) -> None:
    """So it is part of the weights, and travels with them."""
    network = diffusers.ControlNetModel.from_pretrained(controlnet)
    reference("StableDiffusionControlNetPipeline", sd, controlnet=network).save_pretrained(tmp_path / "both")
    given, inside = painter(sd, controlnet=str(controlnet)), painter(tmp_path / "both")
    assert diffusion.claims(tmp_path / "both")
    a, b = (model.infer(prepared(model, items(1), photo()))[0] for model in (given, inside))
    assert np.array_equal(pixels(a), pixels(b))


NOISY = "EulerAncestralDiscrete"  # it adds noise in each step


@pytest.mark.parametrize(
    "scheduler",
    ["", *(pytest.param(s, marks=[] if s == NOISY else pytest.mark.slow) for s in diffusionparams.SCHEDULERS)],
)
def test_an_image_does_not_depend_on_its_batch(sd: Path, scheduler: str) -> None:
    """With every scheduler, those with noise in each step too; and different items differ."""
    model = painter(sd, scheduler=scheduler, steps=5)
    batch = prepared(model, items(4))
    alone = [pixels(model.infer([item])[0]).astype(int) for item in batch]
    together = [pixels(result).astype(int) for result in model.infer(batch)]
    turned = [pixels(result).astype(int) for result in model.infer(batch[2:] + batch[:2])]
    assert max(abs(a - b).max() for a, b in zip(alone, together, strict=True)) <= 2
    assert max(abs(a - b).max() for a, b in zip(alone, turned[2:] + turned[:2], strict=True)) <= 2
    assert min(abs(alone[i] - alone[j]).max() for i in range(4) for j in range(i)) > 20


@pytest.mark.parametrize("image", [pytest.param(None, marks=pytest.mark.slow), photo()], ids=["drawn", "redrawn"])
def test_xl_images_do_not_depend_on_their_batch(xl: Path, image: np.ndarray | None) -> None:
    model = painter(xl, scheduler="EulerAncestralDiscrete", width=64, height=64)
    batch = prepared(model, items(4), image)
    alone = [pixels(model.infer([item])[0]).astype(int) for item in batch]
    together = [pixels(result).astype(int) for result in model.infer(batch)]
    assert max(abs(a - b).max() for a, b in zip(alone, together, strict=True)) <= 2


def test_every_scheduler_is_one_of_diffusers(sd: Path) -> None:
    others = {"DPMSolverSDE", "LMSDiscrete", "EDMEuler"}
    assert {k.name.removesuffix("Scheduler") for k in KarrasDiffusionSchedulers} == {
        *diffusionparams.SCHEDULERS,
        *others,
    }
    for name in ("DDPM", "DDPMScheduler"):
        pipelines = painter(sd, scheduler=name)._pipelines.values()
        assert {type(pipeline.scheduler).__name__ for pipeline in pipelines} == {"DDPMScheduler"}


def test_seeds_follow_from_the_job_and_the_key(sd: Path) -> None:
    model, other, again = painter(sd, seed=1), painter(sd, seed=2), painter(sd, seed=1)

    def seed(of: Painter, key: str, **data: Any) -> int:
        return of.prepare(None, Item(key, data={"prompt": "a cat", **data})).meta.seed

    assert seed(model, "a") == seed(again, "a") == derived(1, "a")
    assert len({seed(model, "a"), seed(model, "b"), seed(other, "a"), seed(model, "a/1")}) == 4
    assert seed(model, "a", seed=5) == seed(other, "b", seed=5) == 5
    one, two = (m.infer([m.prepare(None, items(1)[0])])[0] for m in (model, again))
    assert one == two
    for bad in (-1, 2**63, 1.5, "7", True):
        with pytest.raises(ItemFailed, match="expected a seed"):
            seed(model, "a", seed=bad)


def test_prompts_come_from_the_item_or_the_job(sd: Path) -> None:
    model = painter(sd, prompt="a dog", negative_prompt="rain")
    said = [model.prepare(None, Item("k", data=data)).meta for data in ({}, {"prompt": "a cat", "negative_prompt": ""})]
    assert [(request.prompt, request.negative) for request in said] == [("a dog", "rain"), ("a cat", None)]
    with pytest.raises(ItemFailed, match="has no prompt"):
        painter(sd).prepare(None, Item("k"))
    with pytest.raises(ItemFailed, match="expected the prompt as text"):
        model.prepare(None, Item("k", data={"prompt": ["a"]}))


def test_sizes(sd: Path) -> None:
    model = painter(sd, prompt="a cat")
    assert model.prepare(None, Item("k")).group[1:3] == (64, 64)
    for shape, size in {
        (480, 640): (64, 64),
        (300, 900): (128, 64),
        (1, 5000): (256, 64),
        (9000, 2): (64, 256),
    }.items():
        assert model.prepare(np.zeros((*shape, 3), np.uint8), Item("k")).group[1:3] == size
    fixed = painter(sd, prompt="a cat", width=72, height=40)
    (result,) = fixed.infer([fixed.prepare(None, Item("k"))])
    assert (result.width, result.height, pixels(result).shape) == (72, 40, (40, 72, 3))


def test_a_flagged_image_fails_and_the_others_stay(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, unchecked = painter(sd, safety=True), painter(sd)
    batch = prepared(model, items())
    assert all(isinstance(r, ItemFailed) and r.reason == "unsafe" for r in model.infer(batch)), "this one flags all"
    pipeline = model._pipelines["draw"]

    def second(image: Any, device: Any, dtype: Any) -> Any:
        return image, [False, True, False]

    monkeypatch.setattr(pipeline, "run_safety_checker", second)
    first, flagged, third = model.infer(batch)
    assert (flagged.stage, flagged.reason) == ("infer", "unsafe")
    expected = unchecked.infer(prepared(unchecked, items()))
    assert (first, third) == (expected[0], expected[2])
    assert unchecked._pipelines["draw"].safety_checker is None


@pytest.mark.parametrize("safety", [True, False])
def test_numbers_that_are_none_fail_alone(sd: Path, safety: bool) -> None:
    model = painter(sd, safety=safety)
    pipeline = model._pipelines["draw"]
    decode = pipeline.vae.decode

    def poisoned(latents: torch.Tensor, **given: Any) -> Any:
        (images,) = decode(latents, **given)
        images[1, 0, 5, 5] = float("nan")
        return (images,)

    pipeline.vae.decode = poisoned
    if safety:
        pipeline.safety_checker.concept_embeds_weights.data.fill_(2.0)  # flags none
    results = model.infer(prepared(model, items()))
    assert [getattr(result, "reason", "") for result in results] == ["", "not-finite", ""]


def test_the_file_says_how_it_was_made(sd: Path) -> None:
    model = painter(sd, name="my-model", negative_prompt="rain", scheduler="DDIM", format="jpeg")
    (result,) = model.infer(prepared(model, items(1, seed=3)))
    assert result.data is not None
    told = Image.open(io.BytesIO(result.data)).getexif().get_ifd(0x8769)[0x9286].removeprefix(b"ASCII\0\0\0")
    assert json.loads(told) == result.meta
    assert {name: result.meta[name] for name in ("prompt", "negative_prompt", "seed", "steps", "guidance")} == {
        "prompt": "a cat",
        "negative_prompt": "rain",
        "seed": 3,
        "steps": 3,
        "guidance": 7.5,
    }
    assert (result.meta["model"], result.meta["scheduler"]) == ("my-model", "DDIM")
    assert result.meta["weights_sha256"] == "ab" * 32
    assert result.meta["imagemill"]


def test_turbo_models_take_one_step(sd: Path) -> None:
    turbo, plain = painter(sd, name="sd-turbo", steps=0), painter(sd, steps=0)
    (result,) = turbo.infer(prepared(turbo, items(1)))
    assert (result.meta["steps"], result.meta["guidance"]) == (1, 0.0)
    assert plain._settled.steps == 50
    (redrawn,) = turbo.infer(prepared(turbo, items(1), photo()))
    assert redrawn.meta["steps"] == 2, "strength 0.8 of one step would be none"


def test_half_precision(sd: Path) -> None:
    full, half = painter(sd), painter(sd, precision="bf16")
    a, b = (pixels(m.infer(prepared(m, items(1)))[0]).astype(int) for m in (full, half))
    assert half._pipelines["draw"].unet.dtype == torch.bfloat16
    assert 0 < abs(a - b).mean() < 8


def test_weights_in_the_fp16_variant_only(sd: Path, tmp_path: Path) -> None:
    reference("StableDiffusionPipeline", sd).save_pretrained(tmp_path / "v", variant="fp16")
    diffusion.describe(tmp_path / "v")
    model = painter(tmp_path / "v")
    assert pixels(model.infer(prepared(model, items(1)))[0]).shape == (64, 64, 3)


def test_the_network_is_never_asked(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was asked"))
    painter(sd)


# ------------------------------------------------------------------------------------------------ what is refused


def changed(source: Path, target: Path, name: str, **changes: Any) -> Path:
    """A copy of a model whose JSON file says something else."""
    shutil.copytree(source, target)
    path = target / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_folders_of_other_models_are_refused(sd: Path, tmp_path: Path) -> None:
    flux = changed(sd, tmp_path / "flux", "model_index.json", _class_name="FluxPipeline")
    assert diffusion.claims(flux)
    with pytest.raises(BadInput, match=r"flux is a FluxPipeline; the diffusion family runs .*StableDiffusionPipeline"):
        diffusion.describe(flux)
    code = changed(sd, tmp_path / "code", "model_index.json", unet=["my_code", "MyUNet"])
    with pytest.raises(BadInput, match="its unet is code of 'my_code', which is not run"):
        painter(code)
    inpaint = changed(sd, tmp_path / "inpaint", "unet/config.json", in_channels=9)
    with pytest.raises(BadInput, match="inpainting or editing"):
        diffusion.describe(inpaint)
    pickled = Path(shutil.copytree(sd, tmp_path / "pickled"))
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BadInput, match=r"no unet/\*\.safetensors"):
        painter(pickled)
    assert not diffusion.claims(tmp_path)
    (tmp_path / "model_index.json").write_text("[1]")
    assert not diffusion.claims(tmp_path)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scheduler": "EulerAncestral"}, "did you mean 'EulerAncestralDiscrete'"),
        ({"scheduler": "dpmsolver"}, "did you mean 'DPMSolver"),
        ({"steps": 0.5}, "steps must be a whole number"),
        ({"guidance": -1}, "guidance must be from 0 to 100"),
        ({"width": 64}, "give width and height, or neither"),
        ({"width": 65, "height": 64}, "width must be a multiple of 8"),
        ({"strength": 0}, "strength must be from 0.01 to 1"),
        ({"control": "depth"}, "control must be one of canny, image"),
        ({"canny_low": 200, "canny_high": 100}, "canny_high must be from 200 to 255"),
        ({"format": "gif"}, "format must be one of"),
        ({"quality": 0}, "quality must be"),
        ({"seed": -1}, "seed must be from 0"),
        ({"safety": "no"}, "safety must be true or false"),
        ({"prompt": 3}, "prompt must be text"),
        ({"redraw": "yes"}, "redraw must be true or false"),
        ({"controlnet": "/nowhere"}, "there is no ControlNet in '/nowhere'"),
    ],
)
def test_wrong_parameters_say_so(params: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        models.fill(diffusion.CARDS[0], params)


def test_a_controlnet_is_pinned(sd: Path, controlnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sha256 is among the parameters, so part of the recipe; another folder under its name is not taken."""
    copy = Path(shutil.copytree(controlnet, tmp_path / "net"))
    monkeypatch.chdir(tmp_path)
    filled = models.fill(diffusion.CARDS[0], {"controlnet": "net", "prompt": "a cat"})
    assert (filled["controlnet"], filled["controlnet_sha256"]) == (str(copy), weights.sha256_of(controlnet))
    stored = json.loads(json.dumps(filled))
    assert models.fill(diffusion.CARDS[0], stored) == filled
    painter(sd, **stored)
    (copy / "more.txt").write_text("x")
    with pytest.raises(BadInput, match=r"is not the one of this job.*on every worker's machine"):
        painter(sd, **stored)
    shutil.rmtree(copy)
    with pytest.raises(BadInput, match="there is no ControlNet"):
        painter(sd, **stored)
