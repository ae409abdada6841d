"""Knows detectors that come as an ONNX file, in the layouts that ultralytics exports (workers/graphfiles.py).

Task, class names, stride and size are in the file's metadata; a file without names comes in a folder of its own, with
one other file, .names or .txt, of one label a line. Nothing in an ONNX file is code, and what is read of it before it
is opened is read by our own bounded reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage.errors import BadInput
from workers import graphfiles, onnxgraph, onnxmeta
from workers.graphfiles import Detector, Layout, Params
from workers.models import Card, Site, check_labels
from workers.onnxmeta import About, Axis
from workers.pixels import Pixels
from workers.runtimes import Network

REQUIRES = ("torch", "torchvision", "cv2", "onnx", "onnxruntime", "onnxscript")
EXTRA = "worker,onnx"

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
    layout = _layout(file.name, about)
    labels = graphfiles.labels(path, file, about.metadata)
    if layout.classes and len(labels) != layout.classes:
        raise BadInput(f"{file.name} gives scores for {layout.classes} classes, but {len(labels)} are named")
    return labels


def load(card: Card, params: Params, weights: Path, site: Site) -> Detector:
    """Check the file, and open its graph on the device."""
    labels = describe(weights)
    check_labels({"classes": params.classes}, labels)
    path = _file(weights)
    about = onnxmeta.read(path)
    layout = _layout(path.name, about)
    own = graphfiles.size_in(about.metadata)
    size = graphfiles.size_for(path.name, params.imgsz, layout.side, layout.stride, own)
    session = site.open_network(_network(path, layout, size))
    graphfiles.check(path.name, session, layout, size, site.device)
    return Detector(params.of_head(size), labels, layout, session, site.device)


def _file(path: Path) -> Path:
    return graphfiles.only_file(path, ".onnx")


def _layout(name: str, about: About) -> Layout:
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
    stride = graphfiles.whole(about.metadata.get("stride", ""), graphfiles.STRIDE)
    size = int(batch == 1), graphfiles.square(name, height, width)
    return Layout(given.name, got.name, *size, _classes(got.shape, about, wrong), max(graphfiles.STRIDE, stride))


def _classes(shape: tuple[Axis, ...], about: About, wrong: BadInput) -> int:
    """Classes that are scored, 0 where each box has six numbers. Raises `wrong` for another shape."""
    if shape[2] == 6 or about.metadata.get("end2end") == "True" or _suppresses(about):
        return 0
    if isinstance(shape[1], int):
        if shape[1] <= 4 or (isinstance(shape[2], int) and shape[2] < shape[1] and "names" not in about.metadata):
            raise wrong  # the latter is the layout of YOLOv5: (batch, anchors, 5 + classes)
        return shape[1] - 4
    names = graphfiles.names_in(about.metadata)  # the exporter left the axis without a size
    if not names:
        raise wrong
    return len(names)


def _suppresses(about: About) -> bool:
    """Whether the file was exported with the suppression of what overlaps inside."""
    given = graphfiles.literal(about.metadata, "args", None)
    return isinstance(given, dict) and given.get("nms") is True


def _network(path: Path, layout: Layout, size: int) -> Network:
    import torch

    batch = {} if layout.batch else {0: "batch"}
    sides = {} if layout.side else {2: "height", 3: "width"}
    return Network(
        name="onnxfile",
        build=lambda: _module(path, layout),
        example={layout.given: torch.zeros(layout.batch or 2, 3, size, size)},
        outputs=(layout.got,),
        dynamic_axes={layout.given: {**batch, **sides}, layout.got: {**batch, **({} if layout.side else {2: "n"})}},
        pixels={layout.given: Pixels()},
        onnx=path,
    )


def _module(path: Path, layout: Layout) -> Any:
    """The graph under a module's forward, computed by ONNX Runtime on the CPU."""
    import torch

    session = onnxgraph.opened(path, torch.get_num_threads())

    class Graph(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            return session(**{layout.given: images.cpu()})[layout.got].to(images.device)

    return Graph()
