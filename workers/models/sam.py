"""Knows Segment Anything (SAM): its two networks, and how their sizes are read from the shapes of the weights.

How prompts become masks, one by one or of everything in a picture, is in workers/promptable.py.

Defaults and arithmetic follow segment-anything 1.0 (SamPredictor, SamAutomaticMaskGenerator), against which they are
tested; https://arxiv.org/abs/2304.02643.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput
from workers import promptable, statedicts
from workers.maskgen import Params
from workers.models import Card, Image, Site
from workers.promptable import LABELS, Segmenter
from workers.queries import Frame, Queries
from workers.runtimes import Network, Session

REQUIRES = ("torch", "torchvision", "segment_anything", "cv2", "PIL")
EXTRA = "models"

_MEAN = (123.675, 116.28, 103.53)  # RGB 0..255, segment_anything/build_sam.py
_STD = (58.395, 57.12, 57.375)
_DECODER_HEADS = 8  # segment_anything/build_sam.py; the shapes of the weights do not tell it
_PROMPTS = 32  # decoded at once: each holds about ten maps of 4 MB

_RELEASE = "https://dl.fbaipublicfiles.com/segment_anything/"


def _card(name: str, file: str, sha256: str, memory_gb: float) -> Card:
    return Card(name, "sam", "masks", Params, _RELEASE + file, sha256, memory_gb, "Apache-2.0")


CARDS: tuple[Card, ...] = (
    _card("sam_vit_b", "sam_vit_b_01ec64.pth", "01ec64", 3.0),
    _card("sam_vit_l", "sam_vit_l_0b3195.pth", "0b3195", 5.0),
    _card("sam_vit_h", "sam_vit_h_4b8939.pth", "4b8939", 7.0),
)

_EMBEDDED = "image_encoder.pos_embed"
_PATCHES = "image_encoder.patch_embed.proj.weight"
_TOKENS = "mask_decoder.mask_tokens.weight"


def claims(path: Path) -> bool:
    """Whether the file is a state dict of segment-anything's Sam, of any size."""
    try:
        return {_EMBEDDED, _PATCHES, _TOKENS} <= statedicts.shapes(path).keys()
    except BadInput:
        return False


def describe(path: Path) -> tuple[str, ...]:
    """The one label of masks that no earlier job has named."""
    return LABELS


@dataclass(frozen=True, slots=True)
class _Build:
    """The sizes of a Sam, read from the shapes of its weights.

    Attributes:
        width, depth, heads, hidden: of the encoder's blocks; hidden is that of their two-layer networks.
        patch, grid: pixels of a patch's side, and patches along the input's side.
        window: patches along a window's side; 0 where every block attends to everything.
        whole: the blocks that attend to everything.
        channels: of the encoding.
        mask_channels: of the network that reads a rough mask.
        layers, decoder_hidden, downsample: of the decoder's transformer.
        masks: the decoder's answers to one prompt, the single one not counted.
        rating: layers and hidden size of the network that rates masks.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    patch: int
    grid: int
    window: int
    whole: tuple[int, ...]
    channels: int
    mask_channels: int
    layers: int
    decoder_hidden: int
    downsample: int
    masks: int
    rating: tuple[int, int]

    @property
    def side(self) -> int:
        """Pixels of the input's side."""
        return self.patch * self.grid

    @property
    def mask_side(self) -> int:
        """Pixels of the side of the decoder's masks."""
        return 4 * self.grid

    @classmethod
    def of(cls, name: str, shapes: Mapping[str, tuple[int, ...]]) -> _Build:
        """Raises BadInput when a tensor is missing that every Sam has."""
        try:
            return cls._of(shapes)
        except (KeyError, IndexError, ZeroDivisionError, StopIteration, ValueError) as error:
            raise BadInput(
                f"{name} is no state dict of segment-anything's Sam that can be read: {type(error).__name__} {error}"
            ) from error

    @classmethod
    def _of(cls, shapes: Mapping[str, tuple[int, ...]]) -> _Build:
        width, _, patch, _ = shapes[_PATCHES]
        grid = shapes[_EMBEDDED][1]
        reach = [(s + 1) // 2 for s, _ in _numbered(shapes, "image_encoder.blocks.{}.attn.rel_pos_h")]
        windows = {r for r in reach if r != grid}
        if len(windows) > 1:
            raise ValueError(f"its windows have several sizes: {sorted(windows)}")
        channels = shapes[_TOKENS][1]
        attention = "mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight"
        ratings = list(_numbered(shapes, "mask_decoder.iou_prediction_head.layers.{}.weight"))
        return cls(
            width=width,
            depth=len(reach),
            heads=width // shapes["image_encoder.blocks.0.attn.rel_pos_h"][1],
            hidden=shapes["image_encoder.blocks.0.mlp.lin1.weight"][0],
            patch=patch,
            grid=grid,
            window=next(iter(windows), 0),
            whole=tuple(i for i, r in enumerate(reach) if r == grid),
            channels=channels,
            mask_channels=shapes["prompt_encoder.mask_downscaling.3.weight"][0],
            layers=len(list(_numbered(shapes, "mask_decoder.transformer.layers.{}.mlp.lin1.weight"))),
            decoder_hidden=shapes["mask_decoder.transformer.layers.0.mlp.lin1.weight"][0],
            downsample=channels // shapes[attention][0],
            masks=shapes[_TOKENS][0] - 1,
            rating=(len(ratings), ratings[0][0]),
        )


def _numbered(shapes: Mapping[str, tuple[int, ...]], name: str) -> Iterator[tuple[int, ...]]:
    """The shapes under a name with the numbers 0, 1, 2, ... in it."""
    number = 0
    while name.format(number) in shapes:
        yield shapes[name.format(number)]
        number += 1


def load(card: Card, params: Params, weights: Path, site: Site) -> Segmenter:
    """Check the local state dict (.pth), build what it fits into, and open both networks on the device."""
    import torch

    build = _Build.of(weights.name, statedicts.shapes(weights))
    sam = _built(weights, build)
    example = torch.zeros(2, build.channels, build.grid, build.grid)  # two: exporters take one for a constant
    encoder = Network(
        name="encoder",
        build=promptable.once(sam.image_encoder, lambda: _built(weights, build).image_encoder),
        example={"images": torch.zeros(2, 3, build.side, build.side)},
        outputs=("encoding",),
        dynamic_axes={"images": {0: "batch"}, "encoding": {0: "batch"}},
    )
    decoder = Network(
        name="decoder",
        build=promptable.once(_decoder(sam), lambda: _decoder(_built(weights, build))),
        example={"encoding": example, "tokens": torch.zeros(2, 3, build.channels)},
        outputs=("masks", "quality"),
        dynamic_axes={
            "encoding": {0: "prompts"},
            "tokens": {0: "prompts", 1: "tokens"},
            "masks": {0: "prompts"},
            "quality": {0: "prompts"},
        },
    )
    reader = sam.prompt_encoder.to(site.device)
    networks = _Networks(build, site.device, site.open_network(encoder), reader, site.open_network(decoder))
    return Segmenter("sam", params, site, networks)


def _built(weights: Path, build: _Build) -> Any:
    """A Sam with the weights, on the CPU in float32. Raises BadInput when they do not fit."""
    import torch
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    with torch.device("meta"):  # no memory and no time for random weights that go at once
        sam = Sam(
            ImageEncoderViT(
                img_size=build.side,
                patch_size=build.patch,
                embed_dim=build.width,
                depth=build.depth,
                num_heads=build.heads,
                mlp_ratio=build.hidden / build.width,
                out_chans=build.channels,
                qkv_bias=True,
                norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=build.window,
                global_attn_indexes=build.whole,
            ),
            PromptEncoder(
                embed_dim=build.channels,
                image_embedding_size=(build.grid, build.grid),
                input_image_size=(build.side, build.side),
                mask_in_chans=build.mask_channels,
            ),
            MaskDecoder(
                num_multimask_outputs=build.masks,
                transformer=TwoWayTransformer(
                    depth=build.layers,
                    embedding_dim=build.channels,
                    num_heads=_DECODER_HEADS,
                    mlp_dim=build.decoder_hidden,
                    attention_downsample_rate=build.downsample,
                ),
                transformer_dim=build.channels,
                iou_head_depth=build.rating[0],
                iou_head_hidden_dim=build.rating[1],
            ),
        )
    statedicts.fill(sam, weights, "segment-anything's Sam", assign=True)
    return sam.float().eval()


def _decoder(sam: Any) -> Any:
    """The mask decoder as a network of the encodings, one for each prompt, and the prompts' tokens."""
    decoder = sam.mask_decoder
    decoder.register_buffer("places", sam.prompt_encoder.get_dense_pe().detach(), persistent=False)
    decoder.forward = functools.partial(_decode, decoder)
    return decoder


def _decode(decoder: Any, encoding: Any, tokens: Any) -> tuple[Any, Any]:
    """Encodings with rough masks added (n, channels, grid, grid) and tokens (n, t, channels) -> masks and quality.

    Masks are (n, 4, 4 grid, 4 grid) logits, the single answer first; quality (n, 4) the IoU expected of each. Unlike
    upstream's own, it takes prompts of several pictures at once.
    """
    import torch

    asked = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([asked.expand(tokens.shape[0], -1, -1), tokens], 1)
    answers, pixels = decoder.transformer(encoding, decoder.places, tokens)
    maps = decoder.output_upscaling(pixels.transpose(1, 2).unflatten(2, encoding.shape[2:]))
    mixing = [mlp(answers[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    logits = (torch.stack(mixing, 1) @ maps.flatten(2)).unflatten(2, maps.shape[2:])
    return logits, decoder.iou_prediction_head(answers[:, 0])


class _Networks:
    """SAM's encoder, reader of prompts, and decoder on one device (workers.promptable.Networks)."""

    at_once = _PROMPTS

    def __init__(self, build: _Build, device: str, encoder: Session, reader: Any, decoder: Session) -> None:
        self._side, self._device = build.side, device
        self.encoder, self._reader, self.decoder = encoder, reader, decoder
        self.mask_side = build.mask_side
        self.shapes: Sequence[tuple[int, int, int]] = ((build.channels, build.grid, build.grid),)

    def frame(self, size: tuple[int, int]) -> Frame:
        """Scaled so that the longer side fills the input (ResizeLongestSide), at least one pixel each way."""
        scale = self._side * 1.0 / max(size)
        return Frame(size, (max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))), self._side)

    def pixels(self, picture: Image, frame: Frame) -> Image:
        """The picture scaled into its frame."""
        from PIL import Image as Pictures

        return np.array(Pictures.fromarray(picture).resize(frame.scaled[::-1], Pictures.Resampling.BILINEAR))

    def encode(self, pictures: Sequence[Image]) -> Sequence[Any]:
        """One map of each picture."""
        images = promptable.normalised(pictures, self._side, _MEAN, _STD, self._device)
        return [self.encoder(images=images)["encoding"]]

    def decode(self, maps: Sequence[Any], asked: Queries) -> tuple[Any, Any]:
        """Four masks of each prompt, the single answer first, and their quality."""
        points, boxes, rough = asked.tensors(self._device, self.mask_side)
        tokens, dense = self._reader(points=points, boxes=boxes, masks=rough)
        out = self.decoder(encoding=maps[0] + dense, tokens=tokens)
        return out["masks"], out["quality"]

    def enlarged(self, logits: Any, frame: Frame) -> Any:
        """To the input's size, without what lies beyond the picture, to the picture's (Sam.postprocess_masks)."""
        from torch.nn.functional import interpolate

        side = frame.side
        of_input = interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)
        of_input = of_input[:, :, : frame.scaled[0], : frame.scaled[1]]
        return interpolate(of_input, frame.size, mode="bilinear", align_corners=False)[:, 0]
