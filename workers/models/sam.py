"""Knows Segment Anything (SAM): its two networks, how an item's prompts become masks, and masks of a whole picture.

The encoder looks at each picture once; the small decoder then answers any number of prompts about it. So the pictures
of a batch are encoded together, their prompts, as many as each has, are decoded together a bounded number at a time,
and what the encoder made of a picture is kept for later jobs.

What an item may ask for is in workers/prompts.py. An item that asks for nothing gets the masks of everything in it; one
that asks with an empty list has no objects, and gets an empty result.

Defaults and arithmetic follow segment-anything 1.0 (SamPredictor, SamAutomaticMaskGenerator), against which they are
tested; https://arxiv.org/abs/2304.02643.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import rle
from storage.errors import BadInput, ItemFailed
from storage.results.masks import Result
from workers import masks, prompts, statedicts
from workers.models import Card, Encodings, Image, Item, Prepared, Site
from workers.runtimes import Network, Session

REQUIRES = ("torch", "torchvision", "segment_anything", "cv2", "PIL")
EXTRA = "models"
LABELS = ("object",)

_MEAN = (123.675, 116.28, 103.53)  # RGB 0..255, segment_anything/build_sam.py
_STD = (58.395, 57.12, 57.375)
_DECODER_HEADS = 8  # segment_anything/build_sam.py; the shapes of the weights do not tell it
_PROMPTS = 32  # decoded at once: each holds about ten maps of 4 MB
_INSIDE = 6.9  # logit of a probability of 0.999, for the pixels of a rough mask given as a prompt
_EDGE = 20  # pixels; a mask that ends so near to the edge of a crop is cut off (is_box_near_crop_edge, atol)
_WAITING = 16  # encodings that may wait to be stored; further ones are not kept

Floats = npt.NDArray[np.float32]
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Params:
    """What a user may set; the defaults are those of SamPredictor.predict and SamAutomaticMaskGenerator.

    Attributes:
        multimask: for each prompt the best of three masks (good for one point), or the one mask that is meant for
            several points or a box.

    For items without prompts:

        points_per_side: points asked about along each side of the picture.
        pred_iou_thresh: masks that the model rates higher are kept, 0..1.
        stability_score_thresh: masks whose size depends little on the threshold are kept: the part that stays between
            stability_score_offset above and below it, 0..1.
        stability_score_offset: in logits.
        box_nms_thresh: of two masks whose boxes overlap more, 0..1, the lower rated one goes.
        crop_n_layers: how often the picture is cut into smaller crops, of which layer i has 4^i.
        crop_nms_thresh: as box_nms_thresh, between crops; the mask of the smaller crop stays.
        crop_overlap_ratio: how much of the shorter side neighbouring crops of the first layer share, 0..1.
        crop_n_points_downscale_factor: layer i has points_per_side / factor^i points along a side.
        min_mask_region_area: smaller holes and islands are removed, in pixels; 0 for none.
    """

    multimask: bool = True
    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.multimask, bool):
            raise TypeError(f"multimask must be true or false, but got {self.multimask!r}")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh", "crop_nms_thresh"):
            object.__setattr__(self, name, _number(name, getattr(self, name), 0, 1))
        object.__setattr__(self, "crop_overlap_ratio", _number("crop_overlap_ratio", self.crop_overlap_ratio, 0, 1))
        offset = _number("stability_score_offset", self.stability_score_offset, 0, 100)
        object.__setattr__(self, "stability_score_offset", offset)
        _whole("points_per_side", self.points_per_side, 1, 256)
        _whole("crop_n_layers", self.crop_n_layers, 0, 3)
        _whole("crop_n_points_downscale_factor", self.crop_n_points_downscale_factor, 1, 16)
        _whole("min_mask_region_area", self.min_mask_region_area, 0, 1 << 30)
        if self.points_per_side < self.crop_n_points_downscale_factor**self.crop_n_layers:
            raise ValueError(
                f"points_per_side must leave a point in the last of {self.crop_n_layers} crop layers, but got "
                f"{self.points_per_side} with crop_n_points_downscale_factor {self.crop_n_points_downscale_factor}"
            )


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number from {low} to {high}, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value!r}")
    return float(value)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value}")


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
        build=_once(sam.image_encoder, lambda: _built(weights, build).image_encoder),
        example={"images": torch.zeros(2, 3, build.side, build.side)},
        outputs=("encoding",),
        dynamic_axes={"images": {0: "batch"}, "encoding": {0: "batch"}},
    )
    decoder = Network(
        name="decoder",
        build=_once(_decoder(sam), lambda: _decoder(_built(weights, build))),
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
    return Segmenter(params, build, site, site.open_network(encoder), reader, site.open_network(decoder))


def _once(first: Any, again: Callable[[], Any]) -> Callable[[], Any]:
    """Gives the module that is there already to the first runtime; the next gets its own, as runtimes change theirs."""
    there = [first]
    return lambda: there.pop() if there else again()


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
    tokens = torch.cat([asked.expand(len(tokens), -1, -1), tokens], 1)
    answers, pixels = decoder.transformer(encoding, decoder.places, tokens)
    maps = decoder.output_upscaling(pixels.transpose(1, 2).unflatten(2, encoding.shape[2:]))
    mixing = [mlp(answers[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    logits = (torch.stack(mixing, 1) @ maps.flatten(2)).unflatten(2, maps.shape[2:])
    return logits, decoder.iou_prediction_head(answers[:, 0])


# ------------------------------------------------------------------------------------------------ prompts


@dataclass(frozen=True, slots=True)
class _Queries:
    """Prompts of one form about one view, in columns of one length n, in pixels of the network's input.

    Attributes:
        places: (n,) int, which of the item's objects each is for.
        points: (n, k, 2) float32 xy, with signs (n, k) int32: 1 on the object, 0 beside it.
        boxes: (n, 4) float32 xyxy, or None.
        rough: (n, mask_side^2 / 8) uint8, packed bits of a rough mask, or None.
    """

    places: npt.NDArray[np.int64]
    points: Floats
    signs: npt.NDArray[np.int32]
    boxes: Floats | None = None
    rough: npt.NDArray[np.uint8] | None = None

    @property
    def form(self) -> tuple[int, bool, bool]:
        """What must be equal for prompts to be decoded together."""
        return self.points.shape[1], self.boxes is not None, self.rough is not None


def _grouped(objects: Sequence[prompts.Object], frame: _Frame, build: _Build) -> list[_Queries]:
    """Objects of one form together, in pixels of the network's input."""
    forms: dict[tuple[int, bool, bool], list[int]] = defaultdict(list)
    for i, one in enumerate(objects):
        forms[len(one.points), one.box is not None, one.rough is not None].append(i)
    return [_queries(indices, [objects[i] for i in indices], frame, build) for indices in forms.values()]


def _queries(indices: list[int], objects: Sequence[prompts.Object], frame: _Frame, build: _Build) -> _Queries:
    first = objects[0]
    boxes = None if first.box is None else np.stack([one.box for one in objects if one.box is not None])
    return _Queries(
        np.array(indices),
        frame.moved(np.stack([one.points for one in objects])),
        np.stack([one.signs for one in objects]),
        None if boxes is None else frame.moved(boxes.reshape(-1, 2, 2)).reshape(-1, 4),
        None if first.rough is None else np.stack([_rough(one.rough, frame, build) for one in objects]),
    )


def _rough(value: Any, frame: _Frame, build: _Build) -> npt.NDArray[np.uint8]:
    """A mask given as a prompt, in the decoder's size, as packed bits.

    A mask of the picture's size is scaled as the picture is; one of the decoder's own size is taken as it is.
    """
    from PIL import Image as Pictures

    side = build.mask_side
    try:
        size = (int(value["size"][0]), int(value["size"][1]))
        counts = value["counts"]
        if size not in (frame.size, (side, side)):
            raise ValueError(f"its size is {size}")
        mask = rle.decode(counts.encode() if isinstance(counts, str) else bytes(counts), size)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise prompts.bad(
            f'expected a mask as COCO RLE {{"size": [height, width], "counts": "..."}} of the picture\'s size '
            f"{list(frame.size)} or of {[side, side]}, but got {str(value)[:80]} ({error})"
        ) from error
    if size == frame.size:
        height, width = (max(1, round(pixels * side / build.side)) for pixels in frame.scaled)
        scaled = Pictures.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Pictures.Resampling.BOX)
        mask = np.zeros((side, side), bool)
        mask[:height, :width] = np.asarray(scaled) >= 128
    return np.packbits(mask)


# ------------------------------------------------------------------------------------------------ views


@dataclass(frozen=True, slots=True)
class _Frame:
    """How a picture or a crop of it lies in the upper left corner of the network's input.

    Attributes:
        size: (height, width) of the picture or crop.
        scaled: (height, width) it has in the input.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], side: int) -> _Frame:
        """Scaled so that the longer side fills the input (ResizeLongestSide), at least one pixel each way."""
        scale = side * 1.0 / max(size)
        return cls(size, (max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))))

    def moved(self, points: npt.NDArray[Any]) -> Floats:
        """Points (..., 2) xy of the picture in pixels of the input."""
        gain = np.array([self.scaled[1] / self.size[1], self.scaled[0] / self.size[0]])
        moved: Floats = (points.astype(np.float64) * gain).astype(np.float32)
        return moved


@dataclass(slots=True)
class _View:
    """A picture, or a crop of it, and what is asked about it.

    Attributes:
        crop: x1, y1, x2, y2 in pixels of the picture.
        pixels: (height, width, 3) uint8 RGB as it goes into the network, or None where the encoding is there.
        encoding: (channels, grid, grid) float16, or None.
        name: to keep the encoding under, "" for not at all.
    """

    crop: Box
    frame: _Frame
    pixels: Image | None
    encoding: npt.NDArray[np.float16] | None
    name: str
    queries: list[_Queries]

    @property
    def nbytes(self) -> int:
        """Host memory it holds."""
        held: list[npt.NDArray[Any] | None] = [self.pixels, self.encoding]
        for one in self.queries:
            held += [one.places, one.points, one.signs, one.boxes, one.rough]
        return sum(array.nbytes for array in held if array is not None)


@dataclass(frozen=True, slots=True)
class _Task:
    """What `infer` needs to know of an item.

    Attributes:
        size: (height, width) of the picture.
        views: the whole picture first, then its crops; empty when there is nothing to ask.
        objects: how many prompts there are; None for the masks of everything.
        labels, class_ids, scores: of each prompt; scores None for the model's own.
    """

    size: tuple[int, int]
    views: list[_View]
    objects: int | None
    labels: Sequence[str] = ()
    class_ids: Sequence[int] = ()
    scores: Sequence[float] | None = None


@dataclass
class _Found:
    """The masks found for one item so far."""

    task: _Task
    masks: dict[int, tuple[masks.Mask, float]] = field(default_factory=dict)  # by the object they are for
    anything: list[_Candidate] = field(default_factory=list)  # where everything was asked for
    failed: ItemFailed | None = None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One of the masks of everything: its rating, and the crop it was found in."""

    mask: masks.Mask
    rating: float
    crop: Box


class Segmenter:
    """SAM's networks on one device.

    Attributes:
        encoded: how many pictures and crops the encoder has run on.
    """

    def __init__(
        self, params: Params, build: _Build, site: Site, encoder: Session, reader: Any, decoder: Session
    ) -> None:
        self._params, self._build, self._site = params, build, site
        self._networks: tuple[Session, Any, Session] | None = (encoder, reader, decoder)
        named = bool(site.weights_sha256) and site.encodings is not None
        self._keeper = _Keeper(site.encodings) if named and site.encodings is not None else None
        self.encoded = 0

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """Scale one picture and read its prompts; what the encoder made of it before is looked up instead.

        data is a _Task. Raises ItemFailed "bad-prompt" for prompts that are malformed or outside the picture.
        """
        if image is None:
            raise ItemFailed("prepare", "no-image", "a model for masks looks at pictures, and this item has none")
        size = (image.shape[0], image.shape[1])
        objects = prompts.read(item.data, size)
        if objects is None:
            task = _Task(size, self._views_of_everything(image), None)
        else:
            views = [self._view(image, (0, 0, size[1], size[0]))] if objects else []
            for view in views:
                view.queries = _grouped(objects, view.frame, self._build)
            task = _Task(size, views, len(objects), **prompts.carried(item.data, len(objects), LABELS[0]))
        return Prepared("sam", task, max(1, sum(view.nbytes for view in task.views)))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The masks of each picture, in the order of its prompts; best first where it has none.

        ItemFailed "not-finite" for a picture whose numbers are NaN or infinite.
        """
        import torch

        if self._networks is None:
            raise RuntimeError("expected an open model, but it was closed")
        found = [_Found(item.data) for item in batch]
        views = [(one, view) for one in found for view in one.task.views]
        with torch.inference_mode():
            # As many at once as there are pictures, so that crops take no more memory than the batch was found to.
            for start in range(0, len(views), max(1, len(batch))):
                self._answer(views[start : start + len(batch)])
        return [one.failed or self._result(one) for one in found]

    def close(self) -> None:
        """Let go of the networks, when the encodings that wait have been stored."""
        self._networks = None
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None

    # ---------------------------------------------------------------- before the device

    def _view(self, image: Image, crop: Box) -> _View:
        """A part of a picture as the network wants it."""
        from PIL import Image as Pictures

        x1, y1, x2, y2 = crop
        frame = _Frame.of((y2 - y1, x2 - x1), self._build.side)
        part = np.ascontiguousarray(image[y1:y2, x1:x2])
        name = self._name(part)
        encoding = self._kept(name)
        pixels = None
        if encoding is None:
            pixels = np.array(Pictures.fromarray(part).resize(frame.scaled[::-1], Pictures.Resampling.BILINEAR))
        return _View(crop, frame, pixels, encoding, name, [])

    def _name(self, part: Image) -> str:
        """What an encoding is kept under: everything that it follows from, the pixels themselves among it.

        Not the image's fingerprint, which the prompts of an item are part of, nor its place.
        """
        if self._keeper is None:
            return ""
        digest = hashlib.blake2b(f"{self._site.weights_sha256} {self._site.precision} {part.shape}".encode())
        digest.update(part.data)
        return f"sam/{digest.hexdigest()[:64]}"

    def _kept(self, name: str) -> npt.NDArray[np.float16] | None:
        shape = (self._build.channels, self._build.grid, self._build.grid)
        data = self._keeper.get(name) if name and self._keeper is not None else None
        if data is None or len(data) != 2 * int(np.prod(shape)):
            return None
        return np.frombuffer(data, "<f2").reshape(shape)

    def _views_of_everything(self, image: Image) -> list[_View]:
        """The picture and its crops, each with a grid of points."""
        from segment_anything.utils.amg import build_all_layer_point_grids, generate_crop_boxes

        p = self._params
        crops, layers = generate_crop_boxes(image.shape[:2], p.crop_n_layers, p.crop_overlap_ratio)
        grids = build_all_layer_point_grids(p.points_per_side, p.crop_n_layers, p.crop_n_points_downscale_factor)
        views = []
        for crop, layer in zip(crops, layers, strict=True):
            view = self._view(image, tuple(crop))
            points = view.frame.moved(grids[layer] * np.array(view.frame.size[::-1]))
            count = len(points)
            view.queries = [_Queries(np.arange(count), points[:, None], np.ones((count, 1), np.int32))]
            views.append(view)
        return views

    # ---------------------------------------------------------------- on the device

    def _answer(self, views: Sequence[tuple[_Found, _View]]) -> None:
        """Encode the views and decode all their prompts; those of one form together, whichever view they are about."""
        encodings = self._encodings([view for _, view in views])
        finite = encodings.flatten(1).sum(1).isfinite().tolist()
        forms: dict[tuple[int, bool, bool], list[tuple[int, _Queries]]] = defaultdict(list)
        for i, (found, view) in enumerate(views):
            if not finite[i]:
                found.failed = _not_finite()
                continue
            for queries in view.queries:
                forms[queries.form].append((i, queries))
        for group in forms.values():
            owners = np.repeat([i for i, _ in group], [len(p.places) for _, p in group])
            together = _joined([queries for _, queries in group])
            for start in range(0, len(owners), _PROMPTS):
                part = slice(start, start + _PROMPTS)
                logits, quality = self._decoded(encodings, owners[part], _cut(together, part))
                for i in np.unique(owners[part]).tolist():
                    mine = np.flatnonzero(owners[part] == i)
                    one = slice(int(mine[0]), int(mine[-1]) + 1)
                    found, view = views[i]
                    self._take(found, view, together.places[part][one], logits[one], quality[one])

    def _encodings(self, views: Sequence[_View]) -> Any:
        """What the encoder makes of each view (n, channels, grid, grid), float32 on the device.

        All are rounded to float16, so that it makes no difference whether one was kept or is new.
        """
        import torch

        assert self._networks is not None
        device, side = self._site.device, self._build.side
        new = [i for i, view in enumerate(views) if view.pixels is not None]
        shape = (len(views), self._build.channels, self._build.grid, self._build.grid)
        encodings = torch.empty(shape, dtype=torch.float16, device=device)
        if new:
            mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (_MEAN, _STD))
            images = torch.zeros((len(new), 3, side, side), device=device)
            for image, i in zip(images, new, strict=True):
                pixels = torch.from_numpy(views[i].pixels).to(device).permute(2, 0, 1).float()
                image[:, : pixels.shape[1], : pixels.shape[2]] = (pixels - mean) / std
            encodings[new] = self._networks[0](images=images)["encoding"].half()
            self.encoded += len(new)
            self._keep([views[i].name for i in new], encodings[new])
        for i, view in enumerate(views):
            if view.encoding is not None:
                encodings[i] = torch.from_numpy(np.array(view.encoding)).to(device)
        return encodings.float()

    def _keep(self, names: Sequence[str], encodings: Any) -> None:
        if self._keeper is None or not any(names):
            return
        for name, encoding in zip(names, encodings.cpu().numpy(), strict=True):
            if name and np.isfinite(encoding).all():
                self._keeper.put(name, encoding.astype("<f2", copy=False).tobytes())

    def _decoded(self, encodings: Any, owners: npt.NDArray[Any], queries: _Queries) -> tuple[Any, Any]:
        """Prompts about the views `owners` -> (n, k, m, m) logits and (n, k) quality of the masks that are wanted."""
        import torch

        assert self._networks is not None
        _, reader, decoder = self._networks
        device, side = self._site.device, self._build.mask_side
        points = boxes = rough = None
        if queries.points.shape[1]:
            points = (torch.from_numpy(queries.points).to(device), torch.from_numpy(queries.signs).to(device))
        if queries.boxes is not None:
            boxes = torch.from_numpy(queries.boxes).to(device)
        if queries.rough is not None:
            bits = np.unpackbits(queries.rough, axis=1).astype(np.float32)
            rough = (torch.from_numpy(bits).to(device) * 2 - 1).mul_(_INSIDE).view(-1, 1, side, side)
        tokens, dense = reader(points=points, boxes=boxes, masks=rough)
        out = decoder(encoding=encodings[torch.from_numpy(owners).to(device)] + dense, tokens=tokens)
        return out["masks"], out["quality"]

    def _take(self, found: _Found, view: _View, places: npt.NDArray[Any], logits: Any, quality: Any) -> None:
        """Keep what is wanted of the answers to prompts about one view."""
        if not bool((logits.sum() + quality.sum()).isfinite()):
            found.failed = _not_finite()
        elif found.task.objects is None:
            self._take_everything(found, view, logits[:, 1:].flatten(0, 1), quality[:, 1:].flatten())
        else:
            self._take_asked(found, view, places, logits, quality)

    def _take_asked(self, found: _Found, view: _View, places: npt.NDArray[Any], logits: Any, quality: Any) -> None:
        """One mask for each prompt."""
        import torch

        if self._params.multimask:
            logits, quality = logits[:, 1:], quality[:, 1:]
        else:
            logits, quality = logits[:, :1], quality[:, :1]
        ratings, best = quality.max(1)
        logits = logits[torch.arange(len(logits), device=logits.device), best]
        coded = [
            mask
            for piece in masks.pieces(len(logits), view.frame.size, (self._build.side,) * 2)
            for mask in masks.coded(self._enlarged(logits[piece], view.frame) > 0)
        ]
        for place, mask, rating in zip(places.tolist(), coded, ratings.tolist(), strict=True):
            found.masks[place] = (mask, rating)

    def _take_everything(self, found: _Found, view: _View, logits: Any, ratings: Any) -> None:
        """The masks (n, m, m) of a view that are rated well, stable and not cut off (_process_batch)."""
        import torch

        p, (height, width) = self._params, found.task.size
        if p.pred_iou_thresh > 0:
            wanted = ratings > p.pred_iou_thresh
            logits, ratings = logits[wanted], ratings[wanted]
        x1, y1, x2, y2 = view.crop
        around = (x1, width - x2, y1, height - y2)
        for piece in masks.pieces(len(logits), found.task.size, (self._build.side,) * 2):
            large, rated = self._enlarged(logits[piece], view.frame), ratings[piece]
            if p.stability_score_thresh > 0:
                inner = (large > p.stability_score_offset).sum((1, 2))
                stable = inner / (large > -p.stability_score_offset).sum((1, 2)) >= p.stability_score_thresh
                large, rated = large[stable], rated[stable]
            coded = masks.coded(torch.nn.functional.pad(large > 0, around))
            for mask, rating in zip(coded, rated.tolist(), strict=True):
                if mask.area and not _cut_off(mask.box, view.crop, found.task.size):
                    found.anything.append(_Candidate(mask, rating, view.crop))

    def _enlarged(self, logits: Any, frame: _Frame) -> Any:
        """Logits (n, m, m) of the input in pixels of the picture (n, height, width) (Sam.postprocess_masks)."""
        from torch.nn.functional import interpolate

        side = self._build.side
        of_input = interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)
        of_input = of_input[:, :, : frame.scaled[0], : frame.scaled[1]]
        return interpolate(of_input, frame.size, mode="bilinear", align_corners=False)[:, 0]

    # ---------------------------------------------------------------- after the device

    def _result(self, found: _Found) -> Result:
        task = found.task
        if task.objects is None:
            kept = self._without_doubles(found.anything, task)
            count = len(kept)
            return masks.result(
                [c.mask for c in kept], [_score(c.rating) for c in kept], [0] * count, LABELS * count, task.size
            )
        made = [found.masks[i] for i in range(task.objects)]
        scores = task.scores if task.scores is not None else [_score(rating) for _, rating in made]
        return masks.result([mask for mask, _ in made], scores, task.class_ids, task.labels, task.size)

    def _without_doubles(self, candidates: list[_Candidate], task: _Task) -> list[_Candidate]:
        """Of masks that show the same the best, then that of the smallest crop, then tidied ones."""
        p = self._params
        kept = []
        for view in task.views:
            mine = [c for c in candidates if c.crop == view.crop]
            kept += _suppressed(mine, [c.rating for c in mine], p.box_nms_thresh)
        if len(task.views) > 1:
            sizes = [(c.crop[2] - c.crop[0]) * (c.crop[3] - c.crop[1]) for c in kept]
            kept = _suppressed(kept, [1 / size for size in sizes], p.crop_nms_thresh)
        if p.min_mask_region_area > 0 and kept:
            tidied = [_tidied(c, task.size, p.min_mask_region_area) for c in kept]
            # What needed no tidying is preferred to a double of it that did.
            untouched = [float(new is old) for new, old in zip(tidied, kept, strict=True)]
            kept = _suppressed(tidied, untouched, max(p.box_nms_thresh, p.crop_nms_thresh))
        return kept


class _Keeper:
    """Stores encodings in threads of its own, so that the device does not wait for a store."""

    def __init__(self, store: Encodings) -> None:
        self._store = store
        self._room = threading.Semaphore(_WAITING)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="encodings")

    def get(self, name: str) -> bytes | None:
        return self._store.get(name)

    def put(self, name: str, data: bytes) -> None:
        """Later; not at all when too many wait already."""
        if self._room.acquire(blocking=False):
            self._threads.submit(self._put, name, data)

    def _put(self, name: str, data: bytes) -> None:
        try:
            self._store.put(name, data)
        finally:
            self._room.release()

    def close(self) -> None:
        self._threads.shutdown()


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the network gave NaN or infinity; try precision fp32")


def _score(rating: float) -> float:
    """A rating as a score: the model expects an IoU, and at times one a little above 1."""
    return min(1.0, max(0.0, rating))


def _joined(queries: Sequence[_Queries]) -> _Queries:
    """Prompts of one form, one after the other."""
    boxes = [p.boxes for p in queries if p.boxes is not None]
    rough = [p.rough for p in queries if p.rough is not None]
    return _Queries(
        np.concatenate([p.places for p in queries]),
        np.concatenate([p.points for p in queries]),
        np.concatenate([p.signs for p in queries]),
        np.concatenate(boxes) if boxes else None,
        np.concatenate(rough) if rough else None,
    )


def _cut(queries: _Queries, part: slice) -> _Queries:
    return _Queries(
        queries.places[part],
        queries.points[part],
        queries.signs[part],
        None if queries.boxes is None else queries.boxes[part],
        None if queries.rough is None else queries.rough[part],
    )


def _inclusive(box: Box) -> Box:
    """A box between pixel corners as one between pixels, as segment-anything counts (batched_mask_to_box)."""
    return box[0], box[1], box[2] - 1, box[3] - 1


def _cut_off(box: Box, crop: Box, size: tuple[int, int]) -> bool:
    """Whether a mask ends near an edge of its crop that is no edge of the picture (is_box_near_crop_edge)."""
    sides = zip(_inclusive(box), crop, (0, 0, size[1], size[0]), strict=True)
    return any(abs(at - edge) <= _EDGE < abs(at - end) for at, edge, end in sides)


def _suppressed(candidates: Sequence[_Candidate], scores: Sequence[float], threshold: float) -> list[_Candidate]:
    """Those that no better one overlaps by more than the threshold, best first."""
    import torch
    from torchvision.ops import nms

    if not candidates:
        return []
    boxes = torch.tensor([_inclusive(c.mask.box) for c in candidates], dtype=torch.float32)
    return [candidates[i] for i in nms(boxes, torch.tensor(scores, dtype=torch.float32), threshold).tolist()]


def _tidied(candidate: _Candidate, size: tuple[int, int], area: int) -> _Candidate:
    """Without holes and islands smaller than `area` pixels; the same object when there were none."""
    import torch
    from segment_anything.utils.amg import remove_small_regions

    pixels, holes = remove_small_regions(rle.decode(candidate.mask.rle, size), area, mode="holes")
    pixels, islands = remove_small_regions(pixels, area, mode="islands")
    if not (holes or islands):
        return candidate
    (mask,) = masks.coded(torch.from_numpy(np.ascontiguousarray(pixels))[None])
    return _Candidate(mask, candidate.rating, candidate.crop)
