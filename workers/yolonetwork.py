"""Builds the networks of YOLO checkpoints: they end at the head's raw numbers, or, on a CPU, before most of the head.

Most convolutions of a head say where the box of an anchor point is, and all but the few points that pass the threshold
are thrown away. So on a CPU a network gives the best class of each point and the feature maps, and the rest of the head
is computed at the points that pass (`workers/atpoints.py`). By turns on two shared cores, at 640 x 448, a hundred
points a picture, YOLOv8 n with all that follows took so many times less: in OpenVINO, bf16, 1.11; in ONNX Runtime,
fp32, 1.14; in torch, bf16, 1.08. On a GPU, where that has not been tried, a network gives the numbers of all points.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.errors import BadInput
from workers import checkpoints, nms, ultralytics_checkpoints
from workers.atpoints import Branch
from workers.models import Site
from workers.pixels import Pixels
from workers.runtimes import Network, Session
from workers.yolohead import Head, Params

# Below, hundreds of points of a picture may pass, and computing those takes as long as the runtime takes for all.
_LEAST_CONF = 0.05

_ANCHORS = {0: "batch", 2: "anchors"}
_PARTS = {"box_head": "distances", "mask_head": "coefficients"}  # of a head, as ultralytics and as we name them


def opened(
    name: str, weights: Path, allowed: frozenset[str], labels: Sequence[str], params: Params, site: Site
) -> tuple[Head, Session]:
    """A checkpoint's network on its device, and what the numbers that it gives mean.

    Args:
        name: of the network.
        allowed: what a checkpoint of the family may name.

    Raises:
        BadInput: the checkpoint's head does not fit its labels or the parameters.
    """
    nms.ready(site.device)
    build = functools.partial(_Built, weights, allowed, params, site.device)
    first = [build()]
    head = Head.of(first[0].module, labels, first[0].branches)
    if params.imgsz % head.padding:
        raise BadInput(f"{weights.name} needs imgsz to be a multiple of {head.padding}, but got {params.imgsz}")
    axes = first[0].axes
    # The module just built serves the first runtime; one that runs next gets its own, as runtimes change theirs.
    network = _network(name, lambda: (first.pop() if first else build()).module, axes, params.imgsz, site.device)
    return head, site.open_network(network)


def _network(name: str, build: Any, axes: Mapping[str, Mapping[int, str]], imgsz: int, device: str) -> Network:
    import torch

    return Network(
        name=name,
        build=build,
        example={"images": torch.zeros(2, 3, imgsz, imgsz)},  # two: exporters take a batch of one for a constant
        outputs=tuple(axes),
        dynamic_axes={"images": {0: "batch", 2: "height", 3: "width"}, **axes},
        pixels={"images": Pixels()},
        device=device,
    )


class _Built:
    """A checkpoint's module, batch norms fused into the convolutions.

    Attributes:
        module: from (batch, 3, height, width) to the outputs named in `axes`.
        axes: output -> its axes that may vary.
        branches: the parts of the head that the module leaves out; none where it has all.
    """

    def __init__(self, weights: Path, allowed: frozenset[str], params: Params, device: str) -> None:
        checkpoints.check(weights, allowed)
        model = ultralytics_checkpoints.load(weights)
        head = model.model[-1]
        parts = _parts(head, params.nms, weights.name)
        model.end2end = not params.nms  # before fuse, which drops the branch that is not used
        model.fuse(verbose=False)
        few = device == "cpu" and params.nms and params.conf >= _LEAST_CONF
        self.branches = _branches(parts) if few else {}
        self.axes = (_axes_of_maps if self.branches else _axes_of_all)(head)
        head.forward = functools.partial(_found_and_maps if self.branches else _all, head, parts)
        self.module = model.eval()


def _parts(head: Any, nms: bool, name: str) -> dict[str, Any]:
    """The parts of a head that is trained for NMS, or of the NMS-free one. Raises BadInput where there is none."""
    if not nms and getattr(head, "one2one_cv2", None) is None:
        raise BadInput(f"{name} has no NMS-free head; leave the parameter nms at true")
    found: dict[str, Any] = head.one2many if nms else head.one2one
    return found


def _branches(parts: Mapping[str, Any]) -> dict[str, Branch]:
    """The parts that can be computed at single points, all or none."""
    found = {ours: Branch.of(parts[theirs]) for theirs, ours in _PARTS.items() if theirs in parts}
    made = {name: branch for name, branch in found.items() if branch is not None}
    return made if made.keys() == found.keys() else {}


def _axes_of_all(head: Any) -> dict[str, dict[int, str]]:
    masks = {"coefficients": _ANCHORS, **_axes_of_masks(head)} if hasattr(head, "proto") else {}
    return {"distances": _ANCHORS, "logits": _ANCHORS, **masks}


def _all(head: Any, parts: dict[str, Any], features: list[Any]) -> tuple[Any, ...]:
    """The head without its decoding.

    Returns:
        distances (batch, 4 * bins, anchors) and logits (batch, classes, anchors); of a segmenter also coefficients
        (batch, m, anchors) and maps (batch, m, height / 4, width / 4).
    """
    raw = head.forward_head(features, **parts)
    masks = (raw["mask_coefficient"], *_masks(head, features)) if hasattr(head, "proto") else ()
    return raw["boxes"], raw["scores"], *masks


def _axes_of_maps(head: Any) -> dict[str, dict[int, str]]:
    maps = {f"features{i}": {0: "batch", 2: f"height{i}", 3: f"width{i}"} for i in range(head.nl)}
    of_points = {0: "batch", 1: "anchors"}
    return {"best": of_points, "class_id": of_points, **_axes_of_masks(head), **maps}


def _found_and_maps(head: Any, parts: dict[str, Any], features: list[Any]) -> tuple[Any, ...]:
    """The head without what can be computed later at single points.

    Returns:
        best (batch, anchors), the largest logit of each point, and class_id (batch, anchors), whose it is; of a
        segmenter also maps; and the feature maps, finest first, (batch, channels, height / stride, width / stride).
    """
    import torch

    found = [part(one).max(1) for part, one in zip(parts["cls_head"], features, strict=True)]
    best, class_id = (torch.cat([one[i].flatten(1) for one in found], 1) for i in (0, 1))
    return best, class_id, *_masks(head, features), *features


def _axes_of_masks(head: Any) -> dict[str, dict[int, str]]:
    return {"maps": {0: "batch", 2: "map height", 3: "map width"}} if hasattr(head, "proto") else {}


def _masks(head: Any, features: list[Any]) -> tuple[Any, ...]:
    """The maps of a segmenter, which 26 makes of all features, the others of the finest."""
    if not hasattr(head, "proto"):
        return ()
    return (head.proto(features if hasattr(head.proto, "feat_refine") else features[0]),)
