"""Knows Segment Anything 2 (SAM 2, SAM 2.1) of transformers, for single pictures: a folder in, masks out.

A checkpoint is a folder as `save_pretrained` writes it: config.json, preprocessor_config.json and model.safetensors.
Folders of the model for videos, as which SAM 2.1 is published, hold the one for pictures too.

How prompts become masks, one by one or of everything in a picture, is in workers/promptable.py. Unlike SAM's, pictures
are stretched to the input's square, an encoding has three maps, and the decoder says of its single answer itself when
it is too unsteady to be used.

Arithmetic follows Sam2Processor and Sam2Model of transformers 5, against which it is tested;
https://arxiv.org/abs/2408.00714. Of the masks of everything, the defaults are those of its mask generation too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput
from workers import promptable
from workers.backbones import read_json
from workers.maskgen import Params
from workers.models import Card, Image, Site
from workers.promptable import LABELS, Segmenter
from workers.queries import Frame, Queries
from workers.runtimes import Network, Session

REQUIRES = ("torch", "torchvision", "transformers", "safetensors", "cv2", "PIL")
EXTRA = "models"

_TYPES = ("sam2", "sam2_video")  # of configurations; the published folders are of the second
_PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_MAPS = ("fine", "middle", "coarse")  # of an encoding: a quarter, an eighth and a sixteenth of the input's side
_PROMPTS = 16  # decoded at once: each holds its picture's maps, 17 MB, and a few as large as the largest of them
_MEMORY_GB = {"tiny": 2.5, "small": 2.5, "base-plus": 3.0, "large": 3.5}  # half a GB of it for CUDA itself

CARDS: tuple[Card, ...] = tuple(
    Card(
        name=f"sam2.1-hiera-{size}",
        family="sam2",
        kind="masks",
        params=Params,
        weights=f"hf:facebook/sam2.1-hiera-{size}",
        memory_gb=memory_gb,
        licence="Apache-2.0",
    )
    for size, memory_gb in _MEMORY_GB.items()
)


def claims(path: Path) -> bool:
    """Whether the folder's config.json is of SAM 2, for pictures or for videos."""
    return read_json(path / "config.json").get("model_type") in _TYPES


def describe(path: Path) -> tuple[str, ...]:
    """The one label of masks that no earlier job has named. Raises BadInput for a folder that is not complete."""
    if not any((path / name).is_file() for name in _WEIGHTS):
        raise BadInput(
            f"{path.name} holds no {_WEIGHTS[0]}; pickled weights run code when they are opened, so they are not. Open "
            "them where you trust them and save again with Sam2Model.save_pretrained"
        )
    if not any((path / name).is_file() for name in _PROCESSORS):
        raise BadInput(
            f"{path.name} holds no {_PROCESSORS[0]}, which says how pictures are resized; fetch it from where the "
            "weights come from"
        )
    return LABELS


def load(card: Card, params: Params, weights: Path, site: Site) -> Segmenter:
    """Load a checkpoint folder and open both networks on the device; nothing is fetched and no code of it is run."""
    describe(weights)
    model, processor = _built(weights), _processor(weights)
    _check(weights.name, model, processor)
    side = model.prompt_encoder.input_image_size
    shapes = _shapes(model)
    single = None if params.multimask else _single(model.config.mask_decoder_config)
    encoder = _encoder_network(promptable.once(_encoder(model), lambda: _encoder(_built(weights))), side)
    decoder = _decoder_network(promptable.once(_decoder(model), lambda: _decoder(_built(weights))), shapes)
    reader = model.prompt_encoder.to(site.device)
    sessions = site.open_network(encoder), site.open_network(decoder)
    return Segmenter("sam2", params, site, _Networks(shapes, processor, single, site.device, reader, *sessions))


def _processor(weights: Path) -> Any:
    from transformers import Sam2ImageProcessor

    try:
        return Sam2ImageProcessor.from_pretrained(weights, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(
            f"{weights.name}: its image processor cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error


def _built(weights: Path) -> Any:
    """The model for pictures on the CPU in float32. Raises BadInput when its tensors are not those it needs."""
    import torch
    from safetensors import SafetensorError
    from transformers import Sam2Config, Sam2Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings = read_json(weights / "config.json")
    try:
        # By its parts, since those of a model for videos are the same.
        config = Sam2Config(**{name: settings[name] for name in _PARTS})
        model, info = Sam2Model.from_pretrained(
            weights,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())[:300]
        raise BadInput(f"{weights.name} could not be loaded by transformers: {type(error).__name__}: {text}") from error
    if missing := sorted(info["missing_keys"]):
        raise BadInput(
            f"{weights.name} lacks {len(missing)} of the tensors its config.json asks for, {missing[0]} among them; "
            "fetch the folder again"
        )
    return model.eval().requires_grad_(False)


def _check(name: str, model: Any, processor: Any) -> None:
    """Raise BadInput when the image processor makes another input than the prompts are measured in."""
    side, made = model.prompt_encoder.input_image_size, (processor.size.height, processor.size.width)
    if made != (side, side) or not (processor.do_resize and processor.do_rescale and processor.do_normalize):
        raise BadInput(
            f"{name}: expected an image processor that stretches pictures to {side} x {side} and normalises them, as "
            f"config.json says, but got {made[0]} x {made[1]}; fetch {_PROCESSORS[0]} from where the weights come from"
        )
    grid = model.prompt_encoder.image_embedding_size[0]
    sizes = [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]
    if [list(size) for size in model.backbone_feature_sizes] != sizes:
        raise BadInput(
            f"{name}: expected backbone_feature_sizes of {sizes} in config.json, which belong to an input of "
            f"{side} x {side}, but got {model.backbone_feature_sizes}"
        )


def _shapes(model: Any) -> list[tuple[int, int, int]]:
    """(channels, height, width) of an encoding's maps."""
    decoder = model.mask_decoder
    channels = (decoder.conv_s0.out_channels, decoder.conv_s1.out_channels, model.hidden_dim)
    return [(n, height, width) for n, (height, width) in zip(channels, model.backbone_feature_sizes, strict=True)]


# ------------------------------------------------------------------------------------------------ networks


def _encoder(model: Any) -> Any:
    """The vision encoder with what the decoder would do again for each prompt (Sam2Model.get_image_embeddings)."""
    import torch

    encoder = torch.nn.Module()
    encoder.vision = model.vision_encoder
    encoder.fine, encoder.middle = model.mask_decoder.conv_s0, model.mask_decoder.conv_s1
    encoder.no_memory = torch.nn.Parameter(model.no_memory_embedding.detach().view(1, -1, 1, 1), requires_grad=False)
    encoder.forward = functools.partial(_encode, encoder)
    return encoder.eval()


def _encode(encoder: Any, images: Any) -> tuple[Any, Any, Any]:
    """(n, 3, side, side) -> maps of a quarter, an eighth and a sixteenth of the side."""
    fine, middle, coarse = encoder.vision(images).fpn_hidden_states
    return encoder.fine(fine), encoder.middle(middle), coarse + encoder.no_memory


def _encoder_network(build: Callable[[], Any], side: int) -> Network:
    import torch

    return Network(
        name="encoder",
        build=build,
        example={"images": torch.zeros(2, 3, side, side)},  # two: exporters take a batch of one for a constant
        outputs=_MAPS,
        dynamic_axes={name: {0: "batch"} for name in ("images", *_MAPS)},
    )


def _decoder(model: Any) -> Any:
    """The mask decoder as a network of the maps, one for each prompt, and the prompts' tokens."""
    decoder = model.mask_decoder
    places = model.get_image_wide_positional_embeddings().detach()
    decoder.register_buffer("places", places, persistent=False)
    # Where one answer is asked for, upstream chooses it here; all four are handed out instead.
    decoder.dynamic_multimask_via_stability = True
    decoder._dynamic_multimask_via_stability = lambda masks, quality: (masks, quality)
    decoder.forward = functools.partial(_decode, decoder, decoder.forward)
    return decoder


def _decode(decoder: Any, upstream: Callable[..., Any], fine: Any, middle: Any, coarse: Any, tokens: Any) -> Any:
    """Maps, rough masks added to the coarse one, and tokens (n, t, channels) -> masks (n, 4, m, m), quality (n, 4)."""
    masks, quality, _, _ = upstream(
        image_embeddings=coarse,
        image_positional_embeddings=decoder.places,
        sparse_prompt_embeddings=tokens[:, None],
        dense_prompt_embeddings=0,
        multimask_output=False,
        high_resolution_features=[fine, middle],
    )
    return masks[:, 0], quality[:, 0]


def _decoder_network(build: Callable[[], Any], shapes: Sequence[tuple[int, int, int]]) -> Network:
    import torch

    example = {name: torch.zeros(2, *shape) for name, shape in zip(_MAPS, shapes, strict=True)}
    return Network(
        name="decoder",
        build=build,
        example={**example, "tokens": torch.zeros(2, 3, shapes[-1][0])},
        outputs=("masks", "quality"),
        dynamic_axes={
            **{name: {0: "prompts"} for name in _MAPS},
            "tokens": {0: "prompts", 1: "tokens"},
            "masks": {0: "prompts"},
            "quality": {0: "prompts"},
        },
    )


_Choose = Callable[[Any, Any], Any]  # logits (n, 4, m, m), quality (n, 4) -> (n,) int, which of the four


def _single(config: Any) -> _Choose | None:
    """What chooses the answer where only one is asked for.

    The first, or where that depends much on the threshold the best of the others
    (Sam2MaskDecoder._dynamic_multimask_via_stability); None where the checkpoint always takes the first.
    """
    if not config.dynamic_multimask_via_stability:
        return None
    delta, least = config.dynamic_multimask_stability_delta, config.dynamic_multimask_stability_thresh

    def choose(logits: Any, quality: Any) -> Any:
        first = logits[:, 0].flatten(1)
        inner, outer = (first > delta).sum(1), (first > -delta).sum(1)
        steady = (inner / outer.clamp(min=1) >= least) | (outer == 0)
        return (quality[:, 1:].argmax(1) + 1).masked_fill(steady, 0)

    return choose


class _Networks:
    """SAM 2's encoder, reader of prompts, and decoder on one device (workers.promptable.Networks)."""

    at_once = _PROMPTS

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        processor: Any,
        single: _Choose | None,
        device: str,
        reader: Any,
        encoder: Session,
        decoder: Session,
    ) -> None:
        self.shapes, self._processor, self._single, self._device = shapes, processor, single, device
        self._reader, self.encoder, self.decoder = reader, encoder, decoder
        self._side: int = reader.input_image_size
        self.mask_side: int = reader.mask_input_size[0]

    def frame(self, size: tuple[int, int]) -> Frame:
        """Stretched to the whole input."""
        return Frame(size, (self._side, self._side), self._side)

    def pixels(self, picture: Image, frame: Frame) -> Image:
        """The picture stretched as the checkpoint's image processor does it."""
        import torch

        pixels = torch.from_numpy(picture).permute(2, 0, 1)
        large = self._processor.resize(pixels, self._processor.size, resample=self._processor.resample)
        return np.ascontiguousarray(large.permute(1, 2, 0).numpy())

    def encode(self, pictures: Sequence[Image]) -> Sequence[Any]:
        """Three maps of each picture."""
        whole = 1 / self._processor.rescale_factor
        mean, std = ([v * whole for v in values] for values in (self._processor.image_mean, self._processor.image_std))
        out = self.encoder(images=promptable.normalised(pictures, self._side, mean, std, self._device))
        return [out[name] for name in _MAPS]

    def decode(self, maps: Sequence[Any], asked: Queries) -> tuple[Any, Any]:
        """Masks of each prompt, the single answer first, and their quality."""
        import torch

        points, boxes, rough = asked.tensors(self._device, self.mask_side)
        if points is None and boxes is None:  # a rough mask alone comes with a point that is none (Sam2Model.forward)
            points = (torch.zeros(len(asked), 1, 2, device=self._device), maps[0].new_full((len(asked), 1), -1).int())
        tokens, dense = self._reader(
            input_points=None if points is None else points[0][:, None],
            input_labels=None if points is None else points[1][:, None],
            input_boxes=None if boxes is None else boxes[:, None],
            input_masks=rough,
        )
        fine, middle, coarse = maps
        out = self.decoder(fine=fine, middle=middle, coarse=coarse + dense, tokens=tokens[:, 0])
        logits, quality = out["masks"], out["quality"]
        if self._single is not None:
            rows, best = torch.arange(len(asked), device=self._device), self._single(logits, quality)
            logits = torch.cat([logits[rows, best][:, None], logits[:, 1:]], 1)
            quality = torch.cat([quality[rows, best][:, None], quality[:, 1:]], 1)
        return logits, quality

    def enlarged(self, logits: Any, frame: Frame) -> Any:
        """To the picture's size (Sam2ImageProcessor.post_process_masks)."""
        from torch.nn.functional import interpolate

        return interpolate(logits[:, None], frame.size, mode="bilinear", align_corners=False)[:, 0]
