"""Knows detectors that come as a finished graph in a file, whatever runs it, in the layouts that ultralytics exports.

One input, (batch, 3, height, width) RGB in 0..1, and one output: (batch, 4 + classes, anchors) with middle, width and
height of each box in pixels of the input and a score for each class, or (batch, boxes, 6) with two corners, score and
class id, of a graph that has suppressed what overlaps. What else is known of a file, its metadata, is a dict of texts.

Arithmetic follows `predict` of ultralytics 8.4 on such a file, against which it is tested.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput, ItemFailed, one_line
from storage.results.detections import Result
from workers import nms, uploading, yolohead
from workers.models import Image, Item, Prepared
from workers.runtimes import Session

SIZE = 640  # pixels, of a file that does not say (ultralytics/cfg/default.yaml, imgsz)
STRIDE = 32
SIDES = range(32, 8193)  # pixels that an input may have

_LISTS = (".names", ".txt")
_MAX_LIST_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Params:
    """What a user may set; the defaults are those of ultralytics predict (ultralytics/cfg/default.yaml, 8.4).

    Attributes:
        conf: boxes score higher than this, 0..1.
        iou: of two boxes of one class that overlap more than this, 0..1, the lower one goes; of no use for a graph
            that suppresses by itself.
        imgsz: longer side of the input in pixels, a multiple of 32; 0 for the file's own.
        max_det: boxes of an image at most, the best ones.
        classes: names of the labels to keep; none means all.
        agnostic_nms: boxes of different classes suppress each other too.
    """

    conf: float = 0.25
    iou: float = 0.7
    imgsz: int = 0
    max_det: int = 300
    classes: tuple[str, ...] = ()
    agnostic_nms: bool = False

    def __post_init__(self) -> None:
        checked = self.of_head(self.imgsz or SIZE)
        for name in ("conf", "iou", "classes"):
            object.__setattr__(self, name, getattr(checked, name))

    def of_head(self, imgsz: int) -> yolohead.Params:
        """The same as parameters of the YOLO head."""
        return yolohead.Params(self.conf, self.iou, imgsz, self.max_det, self.classes, self.agnostic_nms)


@dataclass(frozen=True, slots=True)
class Layout:
    """What goes in and out of a graph.

    Attributes:
        given, got: names of the input and the output.
        batch: images that it takes at once, 0 for any number.
        side: pixels of its square input, 0 for any size.
        classes: that it scores, 0 where it gives class ids.
        stride: pixels of which both sides are multiples.
    """

    given: str
    got: str
    batch: int
    side: int
    classes: int
    stride: int


def check(name: str, session: Session, layout: Layout, size: int, device: str) -> None:
    """Run a black picture, since a file may say one thing of itself and do another. Raises BadInput."""
    out = black(name, session, layout.given, layout.got, size, device)
    expected = (1, 4 + layout.classes, None) if layout.classes else (1, None, 6)
    if out.ndim != 3 or any(right not in (None, n) for n, right in zip(out.shape, expected, strict=True)):
        shown = f"(1, {4 + layout.classes}, anchors)" if layout.classes else "(1, boxes, 6)"
        raise BadInput(f"{name} gives numbers in the shape {tuple(out.shape)} for one picture, but expected {shown}")


def black(name: str, session: Session, given: str, got: str, size: int, device: str) -> Any:
    """What a graph gives for a black picture. Raises BadInput when it does not take one of that size."""
    import torch

    try:
        return session(**{given: torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)})[got]
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{name} cannot be run on a picture of {size} pixels: {one_line(str(error), 300)}") from error


def only_file(path: Path, ending: str) -> Path:
    """The file at a path, or the only one with that ending in a folder. Raises BadInput."""
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix == ending)
        if len(found) == 1:
            return found[0]
        raise BadInput(
            f"the folder {path.name} holds {len(found)} {ending} files; expected one, and a list of its labels"
        )
    if path.suffix != ending:
        raise BadInput(f"{path.name} is of another kind: expected a name that ends with {ending}")
    return path


def labels(path: Path, file: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The labels in the list beside a file in a folder, or else in its metadata. Raises BadInput without any."""
    listed = _listed(path) if path.is_dir() else ()
    names = listed or names_in(metadata)
    if not names:
        raise BadInput(
            f"{file.name} names no classes; put it into a folder of its own with a file labels.names of one label a "
            "line, and give that folder to --model"
        )
    return names


def names_in(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The class names in the metadata, a dict of ids and names or a list as Python or JSON writes them, or ()."""
    names = literal(metadata, "names", ())
    if isinstance(names, list | tuple):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        return ()
    by_id = {int(key): str(name) for key, name in names.items() if str(key).isdecimal()}
    return tuple(by_id[i] for i in range(len(by_id))) if sorted(by_id) == list(range(len(names))) else ()


def literal(metadata: Mapping[str, str], name: str, otherwise: Any) -> Any:
    """A value of the metadata, written as Python or JSON writes it; `otherwise` where there is none."""
    try:
        value = ast.literal_eval(metadata.get(name, ""))  # which runs nothing: literals only
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return otherwise
    return value


def _listed(folder: Path) -> tuple[str, ...]:
    """The labels in the one list of a folder, () where there is none."""
    lists = sorted(p for p in folder.iterdir() if p.suffix in _LISTS)
    if not lists:
        return ()
    if len(lists) > 1:
        raise BadInput(f"the folder {folder.name} holds {len(lists)} lists of labels; expected one .names or .txt file")
    if lists[0].stat().st_size > _MAX_LIST_BYTES:
        raise BadInput(f"{lists[0].name} is over {_MAX_LIST_BYTES} bytes; expected one label a line")
    try:
        lines = lists[0].read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the labels in {lists[0].name}: {error}; expected UTF-8, one a line") from error
    return tuple(line.strip() for line in lines if line.strip())


def whole(text: str, otherwise: int) -> int:
    """A number of the metadata, or another one where it is none."""
    return int(text) if text.isdecimal() and 0 < int(text) <= 8192 else otherwise


def size_in(metadata: Mapping[str, str]) -> int:
    """Pixels of the longer side of the input, by the metadata; 640 where that does not say."""
    own = literal(metadata, "imgsz", None)
    sides = own if isinstance(own, list | tuple) and own and all(isinstance(n, int) for n in own) else (SIZE,)
    return max(sides) if max(sides) in SIDES else SIZE


def size_for(name: str, asked: int, layout_side: int, stride: int, own: int) -> int:
    """Pixels of the longer side of the input. Raises BadInput for one that the graph does not take.

    Args:
        asked: by the user, 0 for the graph's own.
        layout_side: of a fixed square input, 0 for any size.
    """
    if layout_side:
        if asked not in (0, layout_side):
            raise BadInput(f"{name} takes pictures of {layout_side} pixels only, but imgsz is {asked}")
        return layout_side
    size = asked or own
    if size % stride:
        raise BadInput(f"{name} needs imgsz to be a multiple of {stride}, but got {size}")
    return size


def square(name: str, height: object, width: object) -> int:
    """Pixels of a fixed square input, 0 for any size. Raises BadInput for a rectangle."""
    if not isinstance(height, int) and not isinstance(width, int):
        return 0
    if height != width or height not in SIDES:
        raise BadInput(
            f"{name} takes pictures of {height} x {width} pixels only; export it with a square imgsz or dynamic=True"
        )
    assert isinstance(height, int)
    return height


class Detector:
    """A detector's graph on one device."""

    def __init__(
        self, params: yolohead.Params, labels: tuple[str, ...], layout: Layout, session: Session, device: str
    ) -> None:
        nms.ready(device)
        self._params, self._labels, self._layout, self._device = params, labels, layout, device
        self._session: Session | None = session
        self._keep = [i for i, label in enumerate(labels) if label in params.classes]

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """Letterbox one picture; data is (height, width, 3) uint8 RGB, meta the original's (height, width)."""
        if image is None:
            raise ItemFailed("prepare", "no-image", "a detector looks at pictures, and this item has none")
        data = yolohead.letterbox(image, self._params.imgsz, self._layout.side or self._layout.stride)
        return Prepared(data.shape[:2], data, data.nbytes, (image.shape[0], image.shape[1]))

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The boxes of each picture, best first; ItemFailed "not-finite" for one whose numbers are NaN or infinite."""
        return self.answer(self.compute(batch), batch) if batch else []

    def compute(self, batch: Sequence[Prepared]) -> Any:
        """What the graph gives for a batch."""
        import torch

        if self._session is None:
            raise RuntimeError("expected an open model, but it was closed")
        with torch.inference_mode():
            return self._output(uploading.pictures([item.data for item in batch], self._device))

    def answer(self, out: Any, batch: Sequence[Prepared]) -> list[Result | ItemFailed]:
        """The boxes of each picture, from what `compute` gave."""
        import torch

        with torch.inference_mode():
            finite = out.flatten(1).sum(1).isfinite().tolist()
            found = [self._boxes(one).cpu().numpy() for one in out]
        return [
            self._result(rows, image) if ok else _not_finite()
            for rows, ok, image in zip(found, finite, batch, strict=True)
        ]

    def close(self) -> None:
        """Let go of the graph."""
        self._session = None

    def _output(self, images: Any) -> Any:
        """(batch, 3, height, width) -> what the graph gives, one image at a time where it takes no more."""
        import torch

        assert self._session is not None
        given, got = self._layout.given, self._layout.got
        if not self._layout.batch:
            return self._session(**{given: images})[got]
        return torch.cat([self._session(**{given: images[i : i + 1]})[got] for i in range(len(images))])

    def _boxes(self, out: Any) -> Any:
        """What the graph gives for one picture -> (n, 6): x1, y1, x2, y2 in pixels of the input, score, class id."""
        import torch

        if self._layout.classes:
            score, class_id = out[4:].max(0)
            passed = self._passed(score, class_id)
            middle, half = out[:2, passed].T, out[2:4, passed].T / 2
            columns = [middle - half, middle + half, score[passed, None], class_id[passed, None]]
            return yolohead._suppressed(torch.cat(columns, 1), self._params)
        return out[self._passed(out[:, 4], out[:, 5])][: self._params.max_det]

    def _passed(self, score: Any, class_id: Any) -> Any:
        import torch

        passed = score > self._params.conf
        if self._keep:
            passed &= torch.isin(class_id, torch.tensor(self._keep, device=class_id.device))
        return passed

    def _result(self, rows: Any, image: Prepared) -> Result | ItemFailed:
        ids = rows[:, 5].astype(np.int32)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self._labels):
            return ItemFailed("infer", "model-error", f"the graph gave class id {ids.max()} of {len(self._labels)}")
        boxes = yolohead.to_original(rows[:, :4], image.data.shape[:2], image.meta)
        return Result(boxes, rows[:, 4].copy(), ids, tuple(self._labels[i] for i in ids.tolist()))


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the graph gave NaN or infinity; try precision fp32")
