"""Knows what models of whole images share, whichever library they come from: parameters, batches, vectors, labels.

A family brings two things: how a picture becomes the network's input, and a network that gives vectors or logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import BadInput, ItemFailed
from storage.results import embedding, labels
from workers import uploading
from workers.models import Image, Item, Prepared
from workers.pixels import Pixels
from workers.runtimes import Network, Session

POOLS = ("default", "cls", "mean")
DTYPES = embedding.DTYPES

# A picture longer than so many times its shorter side keeps its middle only: no crop of the middle sees further, and
# scaled whole, a line of a million pixels would take 200 GB.
_LONGEST = 64

Answers = list[Any]  # a Result or an ItemFailed for each image
Finish = Callable[[Any], Answers]  # (batch, n) float32 tensor on the device -> answers


@dataclass(frozen=True, slots=True)
class EmbeddingParams:
    """What a user may set of an embedding.

    Attributes:
        pool: what becomes the vector: the class token ("cls"), the mean over all places of the last feature map or all
            patch tokens ("mean"), or what the model's own library takes ("default").
        l2: scale vectors to length one, so that their dot product is the cosine.
        dtype: of the stored vectors, "float32" or "float16".
        imgsz: side of the network's square input in pixels; 0 for the model's own.
    """

    pool: str = "default"
    l2: bool = False
    dtype: str = "float32"
    imgsz: int = 0

    def __post_init__(self) -> None:
        for name, known in (("pool", POOLS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, but got {getattr(self, name)!r}")
        if not isinstance(self.l2, bool):
            raise TypeError(f"l2 must be true or false, but got {self.l2!r}")
        _check_imgsz(self.imgsz)


@dataclass(frozen=True, slots=True)
class LabelsParams:
    """What a user may set of a classification.

    Attributes:
        topk: labels of an image at most, the best ones.
        conf: labels score higher than this, 0..1.
        classes: names of the labels to choose from; none means all. Scores stay shares among all.
        imgsz: side of the network's square input in pixels; 0 for the model's own.
    """

    topk: int = 5
    conf: float = 0.0
    classes: tuple[str, ...] = ()
    imgsz: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.topk, bool) or not isinstance(self.topk, int) or self.topk < 1:
            raise ValueError(f"topk must be a whole number of 1 or more, but got {self.topk!r}")
        if isinstance(self.conf, bool) or not isinstance(self.conf, int | float) or not 0 <= self.conf <= 1:
            raise ValueError(f"conf must be a number from 0 to 1, but got {self.conf!r}")
        names = self.classes
        if (
            isinstance(names, str)
            or not isinstance(names, Sequence)
            or not all(isinstance(v, str) and v for v in names)
        ):
            raise TypeError(f"classes must be a list of label names, but got {names!r}")
        object.__setattr__(self, "conf", float(self.conf))
        object.__setattr__(self, "classes", tuple(names))
        _check_imgsz(self.imgsz)


def _check_imgsz(size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or (size != 0 and not 16 <= size <= 4096):
        raise ValueError(f"imgsz must be 0, for the model's own, or from 16 to 4096 pixels, but got {size!r}")


# ------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True, slots=True)
class Input:
    """How a picture becomes the network's input.

    Attributes:
        crop: (height, width, 3) uint8 RGB -> the same, scaled and cropped to the size of the input.
        size: (height, width) of the input in pixels.
        pixels: how its bytes become the network's numbers.
    """

    crop: Callable[[Image], Image]
    size: tuple[int, int]
    pixels: Pixels


def network(name: str, build: Callable[[], Any], given: Input) -> Network:
    """A network of one output, (batch, n)."""
    import torch

    return Network(
        name=name,
        build=build,
        example={"images": torch.zeros(2, 3, *given.size)},  # two: exporters take a batch of one for a constant
        outputs=("output",),
        dynamic_axes={"images": {0: "batch"}, "output": {0: "batch"}},
        pixels={"images": given.pixels},
    )


class Backbone:
    """A network over whole images on one device, with what its output means."""

    def __init__(self, given: Input, session: Session, device: str, finish: Finish) -> None:
        self._given, self._device, self._finish = given, device, finish
        self._session: Session | None = session

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """Scale and crop one picture; data is (height, width, 3) uint8 RGB."""
        if image is None:
            raise ItemFailed("prepare", "no-image", "this model looks at pictures, and the item has none")
        data = self._given.crop(image)
        return Prepared(self._given.size, data, data.nbytes)

    def infer(self, batch: Sequence[Prepared]) -> Answers:
        """A result for each picture; ItemFailed "not-finite" where the network gave NaN or infinity."""
        return self.answer(self.compute(batch), batch) if batch else []

    def compute(self, batch: Sequence[Prepared]) -> Any:
        """The network's output for a batch."""
        import torch

        if self._session is None:
            raise RuntimeError("expected an open model, but it was closed")
        with torch.inference_mode():
            return self._session(images=uploading.pictures([item.data for item in batch], self._device))["output"]

    def answer(self, output: Any, batch: Sequence[Prepared]) -> Answers:
        """A result for each picture, from what `compute` gave."""
        import torch

        with torch.inference_mode():
            finite = output.isfinite().all(1).tolist()
            answers = self._finish(output.nan_to_num(0.0, 0.0, 0.0))
        return [answer if ok else _not_finite() for answer, ok in zip(answers, finite, strict=True)]

    def close(self) -> None:
        """Let go of the network."""
        self._session = None


def _not_finite() -> ItemFailed:
    return ItemFailed("infer", "not-finite", "the network gave NaN or infinity; try precision fp32")


# ------------------------------------------------------------------------------------------------ what comes of it


def vectors(params: EmbeddingParams) -> Finish:
    """(batch, d) features -> embeddings, of length one and in half the bytes where that is asked for."""
    limit = float(np.finfo(params.dtype).max)

    def finish(output: Any) -> Answers:
        import torch

        if params.l2:
            output = torch.nn.functional.normalize(output, dim=1)
        rows = output.cpu().numpy()
        return [_vector(row, params.dtype, limit) for row in rows]

    return finish


def _vector(row: npt.NDArray[np.float32], dtype: str, limit: float) -> embedding.Result | ItemFailed:
    largest = float(np.abs(row).max(initial=0))
    if largest > limit:
        message = f"{largest:g} is too large for {dtype}; set dtype=float32 or l2=true"
        return ItemFailed("infer", "not-finite", message)
    return embedding.Result(row.astype(dtype))  # a copy: a row alone would keep its whole batch in memory


def softmax_labels(params: LabelsParams, names: Sequence[str]) -> Finish:
    """(batch, classes) logits -> the best labels of each image."""
    kept = [i for i, name in enumerate(names) if not params.classes or name in params.classes]

    def finish(output: Any) -> Answers:
        import torch

        scores = output.softmax(1)
        ids = torch.tensor(kept, device=scores.device)
        best, at = scores[:, ids].topk(min(params.topk, len(kept)), dim=1)
        columns = best.cpu().numpy(), ids[at].cpu().numpy().astype(np.int32)
        return [_labels(*row, params.conf, names) for row in zip(*columns, strict=True)]

    return finish


def _labels(
    scores: npt.NDArray[np.float32], ids: npt.NDArray[np.int32], conf: float, names: Sequence[str]
) -> labels.Result:
    passed = scores > conf
    ids = ids[passed]
    return labels.Result(tuple(names[i] for i in ids.tolist()), scores[passed], ids)


def check_names(name: str, names: Sequence[str], classes: int) -> None:
    """Raise BadInput when a classifier has more or fewer classes than names."""
    if len(names) != classes:
        raise BadInput(f"{name} names {len(names)} classes, but its classifier has {classes}")


def class_names(count: int) -> tuple[str, ...]:
    """Names for classes that have none."""
    return tuple(f"class {i}" for i in range(count))


# ------------------------------------------------------------------------------------------------ pictures and files


def middle(image: Image) -> Image:
    """The middle of a picture that is far longer than wide (or the reverse); any other as it is."""
    height, width = image.shape[:2]
    limit = _LONGEST * min(height, width)
    top, left = ((side - limit) // 2 if side > limit else 0 for side in (height, width))
    return image[top : top + min(height, limit), left : left + min(width, limit)]


def pil_crop(transform: Callable[[Any], Any]) -> Callable[[Image], Image]:
    """A crop through a library's own transform, from a PIL picture to a (3, height, width) uint8 tensor."""

    def crop(image: Image) -> Image:
        from PIL import Image as pil

        done = transform(pil.fromarray(np.ascontiguousarray(image)))
        return np.ascontiguousarray(done.permute(1, 2, 0).numpy())

    return crop


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} when there is no such file or it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
