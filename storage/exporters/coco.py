"""COCO annotations of boxes and masks: one annotations.json, which pycocotools and most labelling tools read.

A mask is the annotation's `segmentation`, as compressed RLE, and its `area` that of the mask; its `bbox` is the box
that the model gave. Masks do not have to be of one object each: semantic ones are all of a class.

A category's id is the model's class id + 1: 0 is background to many trainers, pycocotools' matching takes annotation 0
for "no match", and converters subtract 1. Each category also carries `class_id`. Images that failed are not among the
images but in `imagemill_failures`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from storage.exporters import Classes
from storage.shardfile import Outcome
from storage.staging import Output

KINDS = frozenset({"detections", "masks"})
OPTIONS: Mapping[str, tuple[Any, ...]] = {}

_NAME = "annotations.json"


@contextlib.contextmanager
def writer(
    output: Output, labels: Sequence[str], provenance: Mapping[str, Any], options: Mapping[str, Any]
) -> Iterator[_Writer]:
    """Images go straight into the file; annotations and failures are spilled beside it and joined at the end."""
    path = output.scratch / _NAME
    with (
        path.open("w+", encoding="ascii") as file,
        (output.scratch / "annotations").open("w+", encoding="ascii") as annotations,
        (output.scratch / "failures").open("w+", encoding="ascii") as failures,
    ):
        file.write(f'{{"info": {json.dumps(_info(provenance))},\n"licenses": [],\n"images": [')
        writing = _Writer(_Array(file), _Array(annotations), _Array(failures), Classes(labels))
        yield writing
        _join(file, "annotations", annotations)
        _join(file, "imagemill_failures", failures)
        file.write(f'],\n"categories": {json.dumps(writing.categories())}}}\n')
    output.put_file(_NAME, path)


class _Writer:
    def __init__(self, images: _Array, annotations: _Array, failures: _Array, classes: Classes) -> None:
        self._images, self._annotations, self._failures, self._classes = images, annotations, failures, classes
        self.notes: list[str] = []

    def append(self, outcome: Outcome) -> None:
        if outcome.failure is not None:
            failure = outcome.failure
            row = {"key": outcome.key, "uri": outcome.uri, "stage": failure.stage, "reason": failure.reason}
            self._failures.add({**row, "message": failure.message})
            return
        image_id = self._images.length + 1
        size = {"width": outcome.width, "height": outcome.height}
        self._images.add({"id": image_id, "file_name": outcome.key, **size, "uri": outcome.uri})
        self._annotate(image_id, outcome.result)

    def _annotate(self, image_id: int, result: Any) -> None:
        columns = (result.boxes_xyxy.tolist(), result.scores.tolist(), result.class_ids.tolist(), result.labels)
        shapes = _masks(result) if hasattr(result, "rles") else _boxes(result)
        for (x1, y1, x2, y2), score, class_id, label, shape in zip(*columns, shapes, strict=True):
            self._annotations.add(
                {
                    "id": self._annotations.length + 1,
                    "image_id": image_id,
                    "category_id": self._classes.number(class_id, label) + 1,
                    "bbox": [round(x1, 4), round(y1, 4), round(x2 - x1, 4), round(y2 - y1, 4)],
                    **shape,
                    "iscrowd": 0,
                    "score": round(score, 6),
                }
            )

    def categories(self) -> list[dict[str, Any]]:
        return [
            {"id": number + 1, "name": name, "supercategory": "", "class_id": class_id}
            for number, (name, class_id) in enumerate(self._classes.table())
            if name is not None
        ]


def _boxes(result: Any) -> Iterator[dict[str, Any]]:
    """What the annotation of a box says of its size."""
    for x1, y1, x2, y2 in result.boxes_xyxy.tolist():
        yield {"area": round((x2 - x1) * (y2 - y1), 4)}


def _masks(result: Any) -> Iterator[dict[str, Any]]:
    """What the annotation of a mask says of its pixels."""
    size = list(result.size)
    for counts, area in zip(result.rles, result.areas.tolist(), strict=True):
        yield {"segmentation": {"size": size, "counts": counts.decode("ascii")}, "area": area}


class _Array:
    """The values of a JSON array, written as they come."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self.length = file, 0

    def add(self, value: Mapping[str, Any]) -> None:
        self._file.write((",\n" if self.length else "\n") + json.dumps(value))
        self.length += 1


def _info(provenance: Mapping[str, Any]) -> dict[str, Any]:
    date = str(provenance["exported_at"])
    return {
        "description": f"imagemill {provenance['kind']} of {provenance['dataset']}",
        "version": provenance["imagemill"],
        "year": int(date[:4]),
        "date_created": date,
        "imagemill": dict(provenance),
    }


def _join(file: IO[str], name: str, spilled: IO[str]) -> None:
    """Close the array before and write the next one."""
    file.write(f'],\n"{name}": [')
    spilled.seek(0)
    shutil.copyfileobj(spilled, file, 1 << 20)
