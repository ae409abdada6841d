"""Knows detectors that come as an ONNX file, in the layout that ultralytics exports.

One input, (batch, 3, height, width) RGB in 0..1, and one output: (batch, 4 + classes, anchors) with middle, width and
height of each box in pixels of the input and a score for each class, or (batch, boxes, 6) with two corners, score and
class id, of a graph that has suppressed what overlaps. Task, class names, stride and size are in the file's metadata;
a file without names comes in a folder of its own, with one other file, .names or .txt, of one label a line.

Arithmetic follows `predict` of ultralytics 8.4 on such a file, against which it is tested. Nothing in an ONNX file is
code, and what is read of it before it is opened is read by our own bounded reader.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadInput, ItemFailed, one_line
from storage.results.detections import Result
from workers import onnxgraph, onnxmeta, yolohead
from workers.models import Card, Image, Item, Prepared, Site, check_labels
from workers.onnxmeta import About, Axis
from workers.runtimes import Network, Session

REQUIRES = ("torch", "torchvision", "cv2", "onnx", "onnxruntime", "onnxscript")
EXTRA = "worker,onnx"

_SIZE = 640  # pixels, of a file that does not say (ultralytics/cfg/default.yaml, imgsz)
_STRIDE = 32
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
        checked = self.of_head(self.imgsz or _SIZE)
        for name in ("conf", "iou", "classes"):
            object.__setattr__(self, name, getattr(checked, name))

    def of_head(self, imgsz: int) -> yolohead.Params:
        """The same as parameters of the YOLO head."""
        return yolohead.Params(self.conf, self.iou, imgsz, self.max_det, self.classes, self.agnostic_nms)


# The name says how such a model is asked for: by its file.
CARDS: tuple[Card, ...] = (
    Card(name="detector.onnx", family="onnxfile", kind="detections", params=Params, licence="NOASSERTION"),
)


def claims(path: Path) -> bool:
    """Whether the path is an ONNX file, or a folder of one ONNX file and a list of labels."""
    try:
        onnxmeta.read(_file(path))
    except BadInput:
        return False
    return True


def describe(path: Path) -> tuple[str, ...]:
    """The labels in the order of their class ids. Raises BadInput when the file is not a detector of this layout."""
    file = _file(path)
    about = onnxmeta.read(file)
    layout = _Layout.of(file.name, about)
    labels = _listed(path) if path.is_dir() else _named(file.name, about)
    if layout.classes and len(labels) != layout.classes:
        raise BadInput(f"{file.name} gives scores for {layout.classes} classes, but {len(labels)} are named")
    return labels


def load(card: Card, params: Params, weights: Path, site: Site) -> Detector:
    """Check the file, and open its graph on the device."""
    labels = describe(weights)
    check_labels({"classes": params.classes}, labels)
    path = _file(weights)
    about = onnxmeta.read(path)
    layout = _Layout.of(path.name, about)
    size = _size(path.name, params.imgsz, layout, about)
    session = site.open_network(_network(path, layout, size))
    _try(path.name, session, layout, size, site.device)
    return Detector(params.of_head(size), labels, layout, session, site.device)


def _try(name: str, session: Session, layout: _Layout, size: int, device: str) -> None:
    """Run a black picture, since a file may say one thing of itself and do another. Raises BadInput."""
    import torch

    try:
        out = session(**{layout.given: torch.zeros(1, 3, size, size, device=device)})[layout.got]
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{name} cannot be run on a picture of {size} pixels: {one_line(str(error), 300)}") from error
    expected = (1, 4 + layout.classes, None) if layout.classes else (1, None, 6)
    if out.ndim != 3 or any(right not in (None, n) for n, right in zip(out.shape, expected, strict=True)):
        shown = f"(1, {4 + layout.classes}, anchors)" if layout.classes else "(1, boxes, 6)"
        raise BadInput(f"{name} gives numbers in the shape {tuple(out.shape)} for one picture, but expected {shown}")


@dataclass(frozen=True, slots=True)
class _Layout:
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

    @classmethod
    def of(cls, name: str, about: About) -> _Layout:
        """Raises BadInput, saying what was expected and what is there."""
        task = about.metadata.get("task", "detect")
        if task != "detect":
            raise BadInput(f"{name} is a model to {task}; of ONNX files only those that detect are run")
        ports = ", ".join(map(str, (*about.inputs, *about.outputs)))
        wrong = BadInput(
            f"{name} is no detector of a known layout: expected one input (batch, 3, height, width) of float32 or "
            f"float16 and one output (batch, 4 + classes, anchors) or (batch, boxes, 6), but got {ports[:300]}"
        )
        if len(about.inputs) != 1 or len(about.outputs) != 1:
            raise wrong
        given, got = about.inputs[0], about.outputs[0]
        if given.kind not in ("float32", "float16") or len(given.shape) != 4 or given.shape[1] != 3:
            raise wrong
        if len(got.shape) != 3 or got.kind not in ("float32", "float16"):
            raise wrong
        batch, _, height, width = given.shape
        if batch not in (1, "?") and isinstance(batch, int):
            raise BadInput(f"{name} takes {batch} images at once, no more and no less; export it with dynamic=True")
        stride = _whole(about.metadata.get("stride", ""), _STRIDE)
        size = int(batch == 1), _side(name, height, width)
        return cls(given.name, got.name, *size, _classes(got.shape, about, wrong), max(_STRIDE, stride))


def _side(name: str, height: Axis, width: Axis) -> int:
    """Pixels of a fixed square input, 0 for any size."""
    if not isinstance(height, int) and not isinstance(width, int):
        return 0
    if height != width or not isinstance(height, int) or not 32 <= height <= 8192:
        raise BadInput(
            f"{name} takes pictures of {height} x {width} pixels only; export it with a square imgsz or dynamic=True"
        )
    return height


def _classes(shape: tuple[Axis, ...], about: About, wrong: BadInput) -> int:
    """Classes that are scored, 0 where each box has six numbers. Raises `wrong` for another shape."""
    if shape[2] == 6 or about.metadata.get("end2end") == "True" or _suppresses(about):
        return 0
    if isinstance(shape[1], int):
        if shape[1] <= 4 or (isinstance(shape[2], int) and shape[2] < shape[1] and "names" not in about.metadata):
            raise wrong  # the latter is the layout of YOLOv5: (batch, anchors, 5 + classes)
        return shape[1] - 4
    names = _names_in(about)  # the exporter left the axis without a size
    if not names:
        raise wrong
    return len(names)


def _suppresses(about: About) -> bool:
    """Whether the file was exported with the suppression of what overlaps inside."""
    given = _literal(about, "args", None)
    return isinstance(given, dict) and given.get("nms") is True


def _file(path: Path) -> Path:
    """The ONNX file at a path, or the only one in a folder."""
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix == ".onnx")
        if len(found) == 1:
            return found[0]
        raise BadInput(f"the folder {path.name} holds {len(found)} ONNX files; expected one, and a list of its labels")
    if path.suffix != ".onnx":
        raise BadInput(f"{path.name} is no ONNX file: expected a name that ends with .onnx")
    return path


def _named(name: str, about: About) -> tuple[str, ...]:
    names = _names_in(about)
    if not names:
        raise BadInput(
            f"{name} names no classes; put it into a folder of its own with a file labels.names of one label a line, "
            "and give that folder to --model"
        )
    return names


def _names_in(about: About) -> tuple[str, ...]:
    """The class names in the metadata, a dict of ids and names or a list as Python or JSON writes them, or ()."""
    names = _literal(about, "names", ())
    if isinstance(names, list | tuple):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        return ()
    by_id = {int(key): str(name) for key, name in names.items() if str(key).isdecimal()}
    return tuple(by_id[i] for i in range(len(by_id))) if sorted(by_id) == list(range(len(names))) else ()


def _literal(about: About, name: str, otherwise: Any) -> Any:
    """A value of the metadata, written as Python or JSON writes it; `otherwise` where there is none."""
    try:
        value = ast.literal_eval(about.metadata.get(name, ""))  # which runs nothing: literals only
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return otherwise
    return value


def _listed(folder: Path) -> tuple[str, ...]:
    """The labels in the list beside an ONNX file, or in the file when there is no list."""
    lists = sorted(p for p in folder.iterdir() if p.suffix in _LISTS)
    if not lists:
        file = _file(folder)
        return _named(file.name, onnxmeta.read(file))
    if len(lists) > 1:
        raise BadInput(f"the folder {folder.name} holds {len(lists)} lists of labels; expected one .names or .txt file")
    if lists[0].stat().st_size > _MAX_LIST_BYTES:
        raise BadInput(f"{lists[0].name} is over {_MAX_LIST_BYTES} bytes; expected one label a line")
    try:
        lines = lists[0].read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the labels in {lists[0].name}: {error}; expected UTF-8, one a line") from error
    return tuple(line.strip() for line in lines if line.strip())


def _whole(text: str, otherwise: int) -> int:
    """A number of the metadata, or another one where it is none."""
    return int(text) if text.isdecimal() and 0 < int(text) <= 8192 else otherwise


def _size(name: str, asked: int, layout: _Layout, about: About) -> int:
    """Pixels of the longer side of the input. Raises BadInput for one that the graph does not take."""
    if layout.side:
        if asked not in (0, layout.side):
            raise BadInput(f"{name} takes pictures of {layout.side} pixels only, but imgsz is {asked}")
        return layout.side
    own = _literal(about, "imgsz", None)
    sides = own if isinstance(own, list | tuple) and own and all(isinstance(n, int) for n in own) else (_SIZE,)
    size = asked or (max(sides) if 32 <= max(sides) <= 8192 else _SIZE)
    if size % layout.stride:
        raise BadInput(f"{name} needs imgsz to be a multiple of {layout.stride}, but got {size}")
    return size


def _network(path: Path, layout: _Layout, size: int) -> Network:
    import torch

    batch = {} if layout.batch else {0: "batch"}
    sides = {} if layout.side else {2: "height", 3: "width"}
    return Network(
        name="onnxfile",
        build=lambda: _module(path, layout),
        example={layout.given: torch.zeros(layout.batch or 2, 3, size, size)},
        outputs=(layout.got,),
        dynamic_axes={layout.given: {**batch, **sides}, layout.got: {**batch, **({} if layout.side else {2: "n"})}},
        onnx=path,
    )


def _module(path: Path, layout: _Layout) -> Any:
    """The graph under a module's forward, computed by ONNX Runtime on the CPU."""
    import torch

    session = onnxgraph.opened(path, torch.get_num_threads())

    class Graph(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            return session(**{layout.given: images.cpu()})[layout.got].to(images.device)

    return Graph()


class Detector:
    """A detector's graph on one device."""

    def __init__(
        self, params: yolohead.Params, labels: tuple[str, ...], layout: _Layout, session: Session, device: str
    ) -> None:
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
        import torch

        if not batch:
            return []
        if self._session is None:
            raise RuntimeError("expected an open model, but it was closed")
        with torch.inference_mode():
            out = self._output(yolohead.stacked(batch, self._device))
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
