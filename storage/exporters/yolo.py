"""The YOLO layout: labels/<key without suffix>.txt beside images/<key>, data.yaml, and lists of what is in it.

    data.yaml      class names, `train` and `val` (both all pictures: split as needed), provenance under `imagemill`
    images.txt     one path a line
    sources.csv    image, key, uri: which picture a file came from
    failures.csv   key, stage, reason, message: items without a result, and pictures that could not be copied

Trainers find a picture's labels by its path: the last folder called `images` becomes `labels`, the suffix `.txt`. So a
name is changed where that would go wrong: a second key with the same stem takes its suffix into its name (a.jpg, then
a.png as a.png.png), a folder `images` within a key becomes `_images`, and a part that is hidden or too long for a disk
is spelled differently. Pictures that are no JPEG, PNG, WebP, BMP, TIFF, AVIF or HEIF are copied, but ultralytics does
not load them.

`images` is "copy" by default, since the layout is not loadable without pictures. A copy costs a whole read of the
dataset: with 100 kB a picture about 1,000 a second within a disk, 300 from a local S3 server, 200 within that server.
"link" makes symbolic links from one local folder to another and costs nothing, but older trainers mend broken JPEGs in
place, through the link. `scores` adds a sixth column, as `predict` writes it; trainers refuse such files.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import sqlite3
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from storage.errors import BadInput, ImagemillError, NotFound, StoreFull
from storage.exporters import Classes
from storage.objects import local_path
from storage.shardfile import Outcome
from storage.staging import Output

KINDS = frozenset({"detections"})
OPTIONS: Mapping[str, tuple[Any, ...]] = {"images": ("copy", "link", "none"), "scores": (False, True)}

_THREADS = 16
_IN_FLIGHT = 64
_PART_BYTES = 200  # of one folder's or file's name; disks take 255
_NAME_BYTES = 900  # of all of it; S3 takes 1024 with its prefix
_JPEG_SUFFIXES = frozenset({".jfif", ".jpe"})  # JPEG files that ultralytics knows by .jpg only
# YAML readers refuse these even in quotes, and know no surrogate pairs: what is beyond U+FFFF stays as it is.
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


@contextlib.contextmanager
def writer(
    output: Output, labels: Sequence[str], provenance: Mapping[str, Any], options: Mapping[str, Any]
) -> Iterator[_Writer]:
    """Labels and pictures are put as they come, by several threads; the lists and data.yaml at the end."""
    if options["images"] == "link" and not output.is_folder:
        raise BadInput("images=link needs a local folder as the destination; take images=copy")
    with contextlib.ExitStack() as stack:
        lists = _Lists.open(output.scratch, stack)
        names = stack.enter_context(contextlib.closing(_Names(output.scratch / "names.db")))
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="yolo")
        stack.callback(pool.shutdown, cancel_futures=True)
        writing = _Writer(output, Classes(labels), options, lists, names, pool)
        yield writing
        writing.finish()
        lists.put(output)
        output.put("data.yaml", _data_yaml(writing.classes, provenance).encode())


class _Writer:
    def __init__(
        self,
        output: Output,
        classes: Classes,
        options: Mapping[str, Any],
        lists: _Lists,
        names: _Names,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.classes, self.notes = classes, list[str]()
        self._output, self._options, self._lists, self._names, self._pool = output, options, lists, names, pool
        self._running: deque[tuple[Outcome, str, Future[ImagemillError | None]]] = deque()
        self._missing = 0

    def append(self, outcome: Outcome) -> None:
        if outcome.failure is not None:
            failure = outcome.failure
            self._lists.failures.writerow(_safe(outcome.key, failure.stage, failure.reason, failure.message))
            return
        if self._options["images"] == "link" and local_path(outcome.uri) is None:
            raise BadInput(f"images=link needs local pictures, but got {outcome.uri!r}; take images=copy")
        name, image = self._names.take(outcome.key)
        text = _label_text(outcome, self.classes, scores=self._options["scores"])
        task = self._pool.submit(self._put, f"labels/{name}.txt", text.encode(), image, outcome.uri)
        self._running.append((outcome, image, task))
        if len(self._running) >= _IN_FLIGHT:
            self._take_result()

    def finish(self) -> None:
        """Wait for what is still being put."""
        while self._running:
            self._take_result()
        if self._missing:
            self.notes.append(f"{self._missing} pictures could not be copied; they are listed in failures.csv")

    def _put(self, label: str, data: bytes, image: str, uri: str) -> ImagemillError | None:
        """Put one item's files; the answer is what kept its picture from being read."""
        self._output.put(label, data)
        if self._options["images"] == "none":
            return None
        try:
            (self._output.link if self._options["images"] == "link" else self._output.copy)(image, uri)
        except (NotFound, BadInput) as error:
            return error
        return None

    def _take_result(self) -> None:
        outcome, image, task = self._running.popleft()
        error = task.result()
        self._lists.sources.writerow(_safe(image, outcome.key, outcome.uri))
        if error is None:
            self._lists.images.write(f"./{image}\n")
        else:
            self._missing += 1
            self._lists.failures.writerow(_safe(outcome.key, "export", "no-picture", str(error)))


@dataclass(frozen=True, slots=True)
class _Lists:
    """The lists, growing in the scratch folder."""

    images: IO[str]
    sources: Any
    failures: Any
    files: tuple[IO[str], ...]

    @classmethod
    def open(cls, folder: Path, stack: contextlib.ExitStack) -> _Lists:
        names = ("images.txt", "sources.csv", "failures.csv")
        files = tuple(stack.enter_context((folder / name).open("w", encoding="utf-8", newline="")) for name in names)
        sources, failures = (csv.writer(file, lineterminator="\n") for file in files[1:])
        sources.writerow(["image", "key", "uri"])
        failures.writerow(["key", "stage", "reason", "message"])
        return cls(files[0], sources, failures, files)

    def put(self, output: Output) -> None:
        for file in self.files:
            file.close()
            output.put_file(Path(file.name).name, Path(file.name))


class _Names:
    """Gives each key a name of its own. The names given are kept in a file: there may be millions."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        for statement in ("PRAGMA journal_mode=OFF", "PRAGMA synchronous=OFF", "BEGIN"):
            self._db.execute(statement)
        self._db.execute("CREATE TABLE taken (name TEXT PRIMARY KEY) WITHOUT ROWID")

    def take(self, key: str) -> tuple[str, str]:
        """(name of the label file without folder and suffix, path of the image)."""
        stem, suffix = os.path.splitext(key)
        image_suffix = ".jpg" if suffix.lower() in _JPEG_SUFFIXES else suffix
        for candidate in _candidates(stem, key):
            name = _fitting(candidate)
            if self._is_new(name):
                return name, f"images/{name}{image_suffix}"
        raise AssertionError("candidates never end")

    def _is_new(self, name: str) -> bool:
        try:
            return bool(self._db.execute("INSERT OR IGNORE INTO taken VALUES (?)", (name,)).rowcount)
        except sqlite3.OperationalError as error:
            raise StoreFull(f"no space left for the list of names: {error}; free some and export again") from error

    def close(self) -> None:
        self._db.close()


def _candidates(stem: str, key: str) -> Iterator[str]:
    yield stem
    yield key
    number = 2
    while True:
        yield f"{key}~{number}"
        number += 1


def _fitting(name: str) -> str:
    """A name whose every part a disk and a trainer take."""
    name = "/".join(_fitting_part(part) for part in name.split("/"))
    return name if len(name.encode()) <= _NAME_BYTES else _cut(name, _NAME_BYTES)


def _fitting_part(part: str) -> str:
    if part == "images" or part.startswith("."):  # trainers would look in another folder, or not look at all
        part = f"_{part}"
    return part if len(part.encode()) <= _PART_BYTES else _cut(part, _PART_BYTES)


def _cut(text: str, limit: int) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text.encode()[: limit - 17].decode(errors='ignore').rstrip('/')}~{digest}"


def _label_text(outcome: Outcome, classes: Classes, *, scores: bool) -> str:
    """One line an object: class, centre and size as shares of the picture; boxes are clipped to it."""
    result: Any = outcome.result
    if not result.labels:
        return ""
    if not outcome.width or not outcome.height:
        raise BadInput(f"item {outcome.key!r} has boxes but no width and height; run its job again with --force")
    size = np.array([outcome.width, outcome.height], np.float64)
    corners = np.clip(result.boxes_xyxy.astype(np.float64).reshape(-1, 2, 2) / size, 0, 1)
    low, high = corners[:, 0], corners[:, 1]
    shares = np.hstack([(low + high) / 2, high - low]).tolist()
    lines = []
    for class_id, label, (x, y, w, h), score in zip(
        result.class_ids.tolist(), result.labels, shares, result.scores.tolist(), strict=True
    ):
        last = f" {score:.6f}" if scores else ""
        lines.append(f"{classes.number(class_id, label)} {x:.6f} {y:.6f} {w:.6f} {h:.6f}{last}\n")
    return "".join(lines)


def _safe(*values: str) -> list[str]:
    """Cells that no spreadsheet takes for a formula."""
    return [f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value for value in values]


def _data_yaml(classes: Classes, provenance: Mapping[str, Any]) -> str:
    # Without `path` a loader takes the folder of this file, wherever the dataset is moved to.
    names = (name if name is not None else f"class_{number}" for number, (name, _) in enumerate(classes.table()))
    lines = [f"  {number}: {_quoted(name)}" for number, name in enumerate(names)]
    table = ["names:", *lines] if lines else ["names: {}"]
    return "\n".join(["train: images", "val: images", *table, f"imagemill: {_quoted(provenance)}", ""])


def _quoted(value: Any) -> str:
    """A value as JSON, which is YAML too."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", json.dumps(value, ensure_ascii=False))
