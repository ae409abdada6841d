"""Knows the checkpoints that ultralytics writes: whose they are, what they name, and how they are opened in safety.

A checkpoint (.pt) holds a pickled module of `ultralytics.nn.tasks`. The class of that module says the task. Families
read a checkpoint's class and labels here without importing anything, check it against `ALLOWED` and the classes of
their own, and only then have ultralytics load it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage import settings
from storage.errors import BadInput
from workers import checkpoints

# What the checkpoints of ultralytics hold besides their model's own class: those of 8.0 to 8.4, and those saved while
# training. "__builtin__" is how pickle protocol 2 spells builtins. No function that opens, imports or evaluates
# anything is among them.
ALLOWED = frozenset(
    {
        "__builtin__.set",
        "__builtin__.slice",
        "builtins.set",
        "builtins.slice",
        "_codecs.encode",
        "collections.OrderedDict",
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "torch.Size",
        "torch.device",
        *(f"torch.{n}Storage" for n in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Byte", "Bool")),
        *(f"torch.{n}" for n in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")),
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(
            f"torch.nn.modules.{n}.*"
            for n in ("activation", "batchnorm", "container", "conv", "dropout", "linear", "loss", "normalization")
        ),
        *(f"torch.nn.modules.{n}.*" for n in ("padding", "pooling", "upsampling")),
        *(f"ultralytics.nn.modules.{n}.*" for n in ("activation", "block", "conv", "head", "transformer")),
        "ultralytics.nn.modules.head.v10Detect",
        "ultralytics.utils.IterableSimpleNamespace",
        "ultralytics.yolo.utils.IterableSimpleNamespace",
        *(f"ultralytics.utils.loss.{n}" for n in ("BboxLoss", "DFLoss", "E2EDetectLoss", "E2ELoss")),
        *(f"ultralytics.utils.loss.{n}" for n in ("v8DetectionLoss", "v10DetectLoss", "VarifocalLoss", "FocalLoss")),
        "ultralytics.utils.tal.TaskAlignedAssigner",
    }
)

_MODELS = "ultralytics.nn.tasks."

# What a checkpoint's model class is for, and the family that runs it; "" where none does.
_CLASSES = {
    "DetectionModel": ("detect", "yolo"),
    "YOLOv10DetectionModel": ("detect", "yolo"),
    "SegmentationModel": ("segment", "yoloseg"),
    "RTDETRDetectionModel": ("detect with RT-DETR", "rtdetr"),
    "PoseModel": ("pose", ""),
    "OBBModel": ("obb (rotated boxes)", ""),
    "ClassificationModel": ("classify", ""),
    "WorldModel": ("detect by text (YOLO-World)", ""),
    "YOLOEModel": ("detect by text (YOLOE)", ""),
    "YOLOESegModel": ("segment by text (YOLOE)", ""),
}


def names_of(*classes: str) -> frozenset[str]:
    """The full names of model classes, to be allowed beside `ALLOWED`."""
    return frozenset(_MODELS + name for name in classes)


def family_of(path: Path) -> str:
    """The family that claims a checkpoint, "" for a file that is none of ultralytics.

    yolo claims those of a task that no family runs, so that `labels` can say what they are for.
    """
    try:
        model = _model_in(path)
    except BadInput:
        return ""
    return _class_of(model)[1] or "yolo"


def labels(path: Path, family: str, task: str) -> tuple[str, ...]:
    """The labels of a checkpoint in the order of their class ids.

    Args:
        family: whose checkpoint it must be.
        task: what that family's models are to do, for the message.

    Raises:
        BadInput: it is no checkpoint of ultralytics, is one of another family, or names no classes.
    """
    model = _model_in(path)
    its_task, its_family = _class_of(model)
    if its_family != family:
        raise BadInput(f"{path.name} is a model to {its_task}; the {family} family runs models to {task}")
    names = model.state.get("names") if isinstance(model.state, dict) else None
    if isinstance(names, list | tuple):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or sorted(names) != list(range(len(names))) or not names:
        raise BadInput(
            f"{path.name} names no classes; expected model.names with the ids 0, 1, 2, ..., but got {names!r}"
        )
    return tuple(str(names[i]) for i in range(len(names)))


def _model_in(path: Path) -> checkpoints.StandIn:
    top = checkpoints.peek(path)
    model = (top.get("ema") or top.get("model")) if isinstance(top, dict) else None
    if not isinstance(model, checkpoints.StandIn) or not model.origin.startswith(_MODELS):
        raise BadInput(f"{path.name} is not a checkpoint of ultralytics: it holds no model of {_MODELS[:-1]}")
    return model


def _class_of(model: checkpoints.StandIn) -> tuple[str, str]:
    """(what it is for, the family that runs it or "")."""
    return _CLASSES.get(model.origin.removeprefix(_MODELS), (model.origin, ""))


def load(weights: Path) -> Any:
    """The model of a checkpoint that has been checked, through ultralytics' own loader, on the CPU in float32."""
    import torch

    with library() as tasks, tempfile.TemporaryDirectory(prefix="imagemill-") as folder:
        if weights.suffix != ".pt":  # the loader wants this suffix, a cache may name files by their digest
            link = Path(folder) / "weights.pt"
            link.symlink_to(weights.resolve())
            weights = link
        return tasks.load_checkpoint(weights, device=torch.device("cpu"))[0]


@contextmanager
def library() -> Iterator[Any]:
    """ultralytics.nn.tasks, imported so that it installs, fetches and runs nothing, and takes no threads away.

    Importing ultralytics sets OMP_NUM_THREADS=1 where nothing is set, which leaves torch, and every process started
    later, with one thread.
    """
    import torch

    threads, before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    os.environ.update(ULTRALYTICS_SAFE_LOAD="1", YOLO_AUTOINSTALL="false", YOLO_OFFLINE="true")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    if "YOLO_CONFIG_DIR" not in os.environ:
        folder = settings.load().cache_folder / "ultralytics"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["YOLO_CONFIG_DIR"] = str(folder)
    try:
        import ultralytics.nn.tasks as tasks

        tasks.SAFE_LOAD = True  # in case someone imported it before the variable was set
        yield tasks
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
