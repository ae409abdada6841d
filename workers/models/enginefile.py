"""Knows detectors that come as a TensorRT engine, in the layouts that ultralytics exports (workers/graphfiles.py).

An engine runs on the kind of GPU and with the version of TensorRT that it was built with, and in the precision it was
built in. Task, class names, stride and size are in the file's metadata (workers/enginemeta.py); an engine without
names comes in a folder of its own, with one other file, .names or .txt, of one label a line. An engine is machine code
for the GPU: run those that you trust. This family has not been run on a GPU yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage.errors import BadInput
from workers import enginemeta, graphfiles
from workers.graphfiles import Detector, Layout, Params
from workers.models import Card, Site, check_labels
from workers.pixels import Pixels
from workers.runtimes import Network, NotRunnable

REQUIRES = ("torch", "torchvision", "cv2", "tensorrt")
EXTRA = "worker,onnx,gpu"
RUNTIME = "tensorrt"  # no other one runs it

CARDS: tuple[Card, ...] = (
    Card(name="detector.engine", family="enginefile", kind="detections", params=Params, licence="NOASSERTION"),
)

_GIVEN, _GOT = "images", "output0"  # what ultralytics calls input and output


def claims(path: Path) -> bool:
    """Whether the path is an engine, or a folder of one engine and a list of labels."""
    try:
        enginemeta.read(_file(path))
    except BadInput:
        return False
    return True


def describe(path: Path) -> tuple[str, ...]:
    """The labels in the order of their class ids. Raises BadInput for an engine of another task, or without labels."""
    file = _file(path)
    metadata = enginemeta.read(file).metadata
    task = metadata.get("task", "detect")
    if task != "detect":
        raise BadInput(f"{file.name} is an engine to {task}; of engine files only those that detect are run")
    return graphfiles.labels(path, file, metadata)


def load(card: Card, params: Params, weights: Path, site: Site) -> Detector:
    """Open the engine on the device, and see from a black picture which of the layouts it has."""
    labels = describe(weights)
    check_labels({"classes": params.classes}, labels)
    path = _file(weights)
    metadata = enginemeta.read(path).metadata
    side, stride = _side(path.name, metadata), max(graphfiles.STRIDE, graphfiles.whole(metadata.get("stride", ""), 0))
    size = graphfiles.size_for(path.name, params.imgsz, side, stride, graphfiles.size_in(metadata))
    session = site.open_network(_network(path, size))
    shape = tuple(graphfiles.black(path.name, session, _GIVEN, _GOT, size, site.device).shape)
    classes = _classes(path.name, shape, len(labels))
    # An engine without metadata may have one size only, so that every picture is made that square.
    layout = Layout(_GIVEN, _GOT, 0, side if metadata else size, classes, stride)
    return Detector(params.of_head(size), labels, layout, session, site.device)


def _file(path: Path) -> Path:
    return graphfiles.only_file(path, ".engine")


def _side(name: str, metadata: dict[str, str]) -> int:
    """Pixels of a fixed square input, 0 for any size and for an engine that does not say."""
    given = graphfiles.literal(metadata, "args", None)
    sizes = graphfiles.literal(metadata, "imgsz", None)
    if isinstance(given, dict) and given.get("dynamic") is True:
        return 0
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        return 0
    return graphfiles.square(name, *sizes)


def _classes(name: str, shape: tuple[int, ...], labels: int) -> int:
    """Classes that are scored, 0 where each box has six numbers. Raises BadInput for another shape."""
    if len(shape) == 3 and shape[1] == 4 + labels:
        return labels
    if len(shape) == 3 and shape[2] == 6:
        return 0
    raise BadInput(
        f"{name} gives numbers in the shape {shape} for one picture, but with {labels} labels "
        f"(1, {4 + labels}, anchors) or (1, boxes, 6) was expected"
    )


def _network(path: Path, size: int) -> Network:
    import torch

    def no_module() -> Any:
        raise NotRunnable(f"{path.name} is an engine, which the runtime {RUNTIME} alone runs; give --runtime {RUNTIME}")

    example = {_GIVEN: torch.zeros(1, 3, size, size)}
    return Network("enginefile", no_module, example, (_GOT,), pixels={_GIVEN: Pixels()}, engine=path)
