"""Knows how a model that encodes a picture once and answers many prompts about it works through a batch.

The encoder looks at each picture once; the small decoder then answers any number of prompts about it. So the pictures
of a batch are encoded together, their prompts, as many as each has, are decoded together a bounded number at a time,
and what the encoder made of a picture is kept for later jobs.

What an item may ask for is in workers/prompts.py. An item that asks for nothing gets the masks of everything in it
(workers/maskgen.py); one that asks with an empty list has no objects, and gets an empty result.

A family brings its networks, and says how a picture becomes their input and their masks become the picture's.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from storage.errors import ItemFailed
from storage.results.masks import Result
from workers import maskgen, masks, nms, prompts, queries
from workers.maskgen import Box, Candidate, Params
from workers.models import Image, Item, Prepared, Site
from workers.queries import Form, Frame, Queries

LABELS = ("object",)  # of masks that no earlier job has named

Maps = list[npt.NDArray[np.float16]]


class Networks(Protocol):
    """What a family knows. Tensors are on the device, n are views or prompts.

    Attributes:
        shapes: of the maps that an encoding consists of, (channels, height, width) each.
        mask_side: pixels of the side of the decoder's masks.
        at_once: prompts decoded at once, by the memory that each takes.
    """

    shapes: Sequence[tuple[int, int, int]]
    mask_side: int
    at_once: int

    def frame(self, size: tuple[int, int]) -> Frame:
        """How a picture of (height, width) lies in the encoder's input."""
        ...

    def pixels(self, picture: Image, frame: Frame) -> Image:
        """A picture as it goes to the device, (height, width, 3) uint8. Called from several threads."""
        ...

    def encode(self, pictures: Sequence[Image]) -> Sequence[Any]:
        """What `pixels` made of n pictures -> maps (n, channels, height, width), one for each of `shapes`."""
        ...

    def decode(self, maps: Sequence[Any], asked: Queries) -> tuple[Any, Any]:
        """Maps of n prompts' pictures, float32, and the prompts -> logits (n, k, side, side) and quality (n, k).

        The answer that is meant to be the only one comes first, then those of which the best is taken.
        """
        ...

    def enlarged(self, logits: Any, frame: Frame) -> Any:
        """Logits (n, side, side) in the pixels of the picture (n, height, width)."""
        ...


@dataclass(slots=True)
class View:
    """A picture, or a crop of it, and what is asked about it.

    Attributes:
        crop: x1, y1, x2, y2 in pixels of the picture.
        pixels: (height, width, 3) uint8 RGB as it goes to the device, or None where the encoding is there.
        encoding: its maps, or None.
        name: to keep the encoding under, "" for not at all.
    """

    crop: Box
    frame: Frame
    pixels: Image | None
    encoding: Maps | None
    name: str
    queries: list[Queries]

    @property
    def nbytes(self) -> int:
        """Host memory it holds."""
        held = sum(one.nbytes for one in self.queries) + sum(part.nbytes for part in self.encoding or ())
        return held + (0 if self.pixels is None else self.pixels.nbytes)


@dataclass(frozen=True, slots=True)
class Task:
    """What `infer` needs to know of an item.

    Attributes:
        size: (height, width) of the picture.
        views: the whole picture first, then its crops; empty when there is nothing to ask.
        objects: how many prompts there are; None for the masks of everything.
        labels, class_ids, scores: of each prompt; scores None for the model's own.
    """

    size: tuple[int, int]
    views: list[View]
    objects: int | None
    labels: Sequence[str] = ()
    class_ids: Sequence[int] = ()
    scores: Sequence[float] | None = None


@dataclass
class _Found:
    """The masks found for one item so far."""

    task: Task
    masks: dict[int, tuple[masks.Mask, float]] = field(default_factory=dict)  # by the object they are for
    anything: list[Candidate] = field(default_factory=list)  # where everything was asked for
    failed: ItemFailed | None = None


class Segmenter:
    """A promptable model's networks on one device.

    Attributes:
        encoded: how many pictures and crops the encoder has run on.
    """

    def __init__(self, family: str, params: Params, site: Site, networks: Networks) -> None:
        nms.ready(site.device)
        self._family, self._params, self._site = family, params, site
        self._networks: Networks | None = networks
        self._kept = site.encodings if site.weights_sha256 else None
        self.encoded = 0

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """Scale one picture and read its prompts; what the encoder made of it before is looked up instead.

        data is a Task. Raises ItemFailed "bad-prompt" for prompts that are malformed or outside the picture.
        """
        if image is None:
            raise ItemFailed("prepare", "no-image", "a model for masks looks at pictures, and this item has none")
        size = (image.shape[0], image.shape[1])
        objects = prompts.read(item.data, size)
        if objects is None:
            task = Task(size, self._views_of_everything(image), None)
        else:
            views = [self._view(image, (0, 0, size[1], size[0]))] if objects else []
            for view in views:
                view.queries = queries.of_objects(objects, view.frame, self._open().mask_side)
            task = Task(size, views, len(objects), **prompts.carried(item.data, len(objects), LABELS[0]))
        return Prepared(self._family, task, max(1, sum(view.nbytes for view in task.views)))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The masks of each picture, in the order of its prompts; best first where it has none.

        ItemFailed "not-finite" for a picture whose numbers are NaN or infinite.
        """
        import torch

        self._open()
        found = [_Found(item.data) for item in batch]
        views = [(one, view) for one in found for view in one.task.views]
        with torch.inference_mode():
            # As many at once as there are pictures, so that crops take no more memory than the batch was found to.
            for start in range(0, len(views), max(1, len(batch))):
                self._answer(views[start : start + len(batch)])
        return [one.failed or self._result(one) for one in found]

    def close(self) -> None:
        """Let go of the networks."""
        self._networks = None

    def _open(self) -> Networks:
        if self._networks is None:
            raise RuntimeError("expected an open model, but it was closed")
        return self._networks

    # ---------------------------------------------------------------- before the device

    def _view(self, image: Image, crop: Box) -> View:
        """A part of a picture as the network wants it."""
        x1, y1, x2, y2 = crop
        frame = self._open().frame((y2 - y1, x2 - x1))
        part = np.ascontiguousarray(image[y1:y2, x1:x2])
        name = self._name(part)
        encoding = self._maps(self._kept.get(name)) if self._kept is not None else None
        pixels = self._open().pixels(part, frame) if encoding is None else None
        return View(crop, frame, pixels, encoding, name, [])

    def _views_of_everything(self, image: Image) -> list[View]:
        """The picture and its crops, each with a grid of points."""
        views = []
        for crop, points in maskgen.crops((image.shape[0], image.shape[1]), self._params):
            view = self._view(image, crop)
            view.queries = [queries.of_points(points, view.frame)]
            views.append(view)
        return views

    def _name(self, part: Image) -> str:
        """What an encoding is kept under: everything that it follows from, the pixels themselves among it.

        Not the image's fingerprint, which the prompts of an item are part of, nor its place.
        """
        if self._kept is None:
            return ""
        site = self._site
        network = f"{site.weights_sha256} {site.runtime} {site.precision} {site.device}"
        digest = hashlib.blake2b(f"{network} {part.shape}".encode())
        digest.update(part.data)
        return f"{self._family}/{digest.hexdigest()[:64]}"

    def _maps(self, data: bytes | None) -> Maps | None:
        """What was kept, None if that was nothing or something else."""
        shapes = self._open().shapes
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        if data is None or len(data) != 2 * int(ends[-1]):
            return None
        parts = np.split(np.frombuffer(data, "<f2"), ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    # ---------------------------------------------------------------- on the device

    def _answer(self, views: Sequence[tuple[_Found, View]]) -> None:
        """Encode the views and decode all their prompts; those of one form together, whichever view they are about."""
        import torch

        maps = self._encodings([view for _, view in views])
        sums = torch.stack([part.flatten(1).sum(1, dtype=torch.float32) for part in maps])
        finite = sums.isfinite().all(0).tolist()
        forms: dict[Form, list[tuple[int, Queries]]] = defaultdict(list)
        for i, (found, view) in enumerate(views):
            if not finite[i]:
                found.failed = _not_finite()
                continue
            for asked in view.queries:
                forms[asked.form].append((i, asked))
        for group in forms.values():
            owners = np.repeat([i for i, _ in group], [len(asked) for _, asked in group])
            self._decode(views, maps, owners, queries.joined([asked for _, asked in group]))

    def _decode(
        self, views: Sequence[tuple[_Found, View]], maps: Sequence[Any], owners: npt.NDArray[Any], asked: Queries
    ) -> None:
        """Prompts of one form, a bounded number at once; `owners` says which view each is about, in rising order."""
        import torch

        networks = self._open()
        for start in range(0, len(owners), networks.at_once):
            part = slice(start, start + networks.at_once)
            mine, places = owners[part], asked.places[part]
            which = torch.from_numpy(mine).to(self._site.device)
            logits, quality = networks.decode([one[which].float() for one in maps], asked.part(part))
            for i in np.unique(mine).tolist():
                found, view = views[i]
                rows = slice(*np.searchsorted(mine, [i, i + 1]).tolist())
                self._take(found, view, places[rows], logits[rows], quality[rows])

    def _encodings(self, views: Sequence[View]) -> list[Any]:
        """What the encoder makes of each view, maps (n, channels, height, width) of float16 on the device.

        All are rounded to float16, so that it makes no difference whether one was kept or is new.
        """
        import torch

        networks, device = self._open(), self._site.device
        maps = [torch.empty((len(views), *shape), dtype=torch.float16, device=device) for shape in networks.shapes]
        self._look_again(views)
        new = [i for i, view in enumerate(views) if view.encoding is None]
        if new:
            made = networks.encode([view.pixels for view in views if view.pixels is not None])
            for part, fresh in zip(maps, made, strict=True):
                part[new] = fresh.half()
            self.encoded += len(new)
            self._keep([views[i].name for i in new], [part[new] for part in maps])
        for i, view in enumerate(views):
            for part, kept in zip(maps, view.encoding or (), strict=False):
                part[i] = torch.from_numpy(np.array(kept)).to(device)
        return maps

    def _look_again(self, views: Sequence[View]) -> None:
        """Take what another job has had encoded since the views were made ready."""
        for view in views:
            if view.encoding is None and self._kept is not None:
                view.encoding = self._maps(self._kept.recent(view.name))
                view.pixels = view.pixels if view.encoding is None else None

    def _keep(self, names: Sequence[str], maps: Sequence[Any]) -> None:
        import torch

        if self._kept is None:
            return
        encodings = torch.cat([part.flatten(1) for part in maps], 1).cpu().numpy()
        for name, encoding in zip(names, encodings, strict=True):
            if np.isfinite(encoding).all():
                self._kept.put(name, encoding.astype("<f2", copy=False).tobytes())

    def _take(self, found: _Found, view: View, places: npt.NDArray[Any], logits: Any, quality: Any) -> None:
        """Keep what is wanted of the answers to prompts about one view."""
        if not bool((logits.sum() + quality.sum()).isfinite()):
            found.failed = _not_finite()
        elif found.task.objects is None:
            self._take_everything(found, view, logits[:, 1:].flatten(0, 1), quality[:, 1:].flatten())
        else:
            self._take_asked(found, view, places, logits, quality)

    def _take_asked(self, found: _Found, view: View, places: npt.NDArray[Any], logits: Any, quality: Any) -> None:
        """One mask for each prompt."""
        import torch

        answers = slice(1, None) if self._params.multimask else slice(0, 1)
        logits, quality = logits[:, answers], quality[:, answers]
        ratings, best = quality.max(1)
        logits = logits[torch.arange(len(logits), device=logits.device), best]
        coded = [
            mask
            for piece in masks.pieces(len(logits), view.frame.size, (view.frame.side,) * 2)
            for mask in masks.coded(self._open().enlarged(logits[piece], view.frame) > 0)
        ]
        for place, mask, rating in zip(places.tolist(), coded, ratings.tolist(), strict=True):
            found.masks[place] = (mask, rating)

    def _take_everything(self, found: _Found, view: View, logits: Any, ratings: Any) -> None:
        """The masks (n, m, m) of a view that are rated well, stable and not cut off (_process_batch)."""
        logits, ratings = maskgen.rated(logits, ratings, self._params)
        for piece in masks.pieces(len(logits), found.task.size, (view.frame.side,) * 2):
            large = self._open().enlarged(logits[piece], view.frame)
            large, rated = maskgen.stable(large, ratings[piece], self._params)
            found.anything += maskgen.candidates(large, rated, view.crop, found.task.size)

    # ---------------------------------------------------------------- after the device

    def _result(self, found: _Found) -> Result:
        task = found.task
        if task.objects is None:
            kept = maskgen.without_doubles(found.anything, task.size, self._params)
            count = len(kept)
            return masks.result(
                [one.mask for one in kept], [_score(one.rating) for one in kept], [0] * count, LABELS * count, task.size
            )
        made = [found.masks[i] for i in range(task.objects)]
        scores = task.scores if task.scores is not None else [_score(rating) for _, rating in made]
        return masks.result([mask for mask, _ in made], scores, task.class_ids, task.labels, task.size)


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the network gave NaN or infinity; try precision fp32")


def _score(rating: float) -> float:
    """A rating as a score: the model expects an IoU, and at times one a little above 1."""
    return min(1.0, max(0.0, rating))


def normalised(pictures: Sequence[Image], side: int, mean: Sequence[float], std: Sequence[float], device: str) -> Any:
    """Pictures (height, width, 3) uint8 in the upper left corner of (n, 3, side, side) float32 on the device.

    The copy is of bytes; mean and std are of the channels in 0..255, and what lies beyond a picture is zero after them.
    """
    import torch

    means, stds = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (mean, std))
    images = torch.zeros((len(pictures), 3, side, side), device=device)
    for image, picture in zip(images, pictures, strict=True):
        pixels = torch.from_numpy(picture).to(device).permute(2, 0, 1).float()
        image[:, : pixels.shape[1], : pixels.shape[2]] = (pixels - means) / stds
    return images


def once(first: Any, again: Callable[[], Any]) -> Callable[[], Any]:
    """Gives the module that is there already to the first runtime; the next gets its own, as runtimes change theirs."""
    there = [first]
    return lambda: there.pop() if there else again()
