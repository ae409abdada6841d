"""Knows the dataset of those images of another one that a file has prompts for: prompted:?of=DATASET&from=FILE.

FILE is a .csv, .jsonl or .parquet file, local or on S3, with a column `key` that names an image of the dataset as its
results do, and any of

    boxes          [[x1, y1, x2, y2], ...] in pixels of the upright picture
    points         [[x, y], ...], and point_labels [1, 0, ...], 1 on the object and 0 beside it
    masks          rough masks as COCO RLE
    labels         one a prompt, the mask's own label

each as a list, in a .csv as its JSON text. Several rows may name the same image: their lists are joined. Images that
no row names are left out; a row that names an image which is not there becomes a failure of that name. The prompts
are held in memory while the dataset is listed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from typing import Any

from jobs import sources, tabular
from jobs.references import row_key, short
from jobs.sources import ImageRef
from storage.errors import BadInput
from storage.settings import Settings

_SCHEME = "prompted:?"
_WHAT = "prompt list"
_LISTS = ("boxes", "points", "point_labels", "masks", "labels")

Prompts = dict[str, dict[str, list[Any]]]


def claims(uri: str) -> bool:
    """Whether it starts with prompted:?."""
    return uri.startswith(_SCHEME)


def canonical(uri: str) -> str:
    """The spelling with both parts canonical. Raises BadInput when one of them is not there."""
    dataset, file = _parts(uri)
    return _SCHEME + urllib.parse.urlencode({"of": sources.canonical(dataset), "from": tabular.canonical(file, _WHAT)})


def refs(uri: str, settings: Settings) -> Iterator[ImageRef | None]:
    """The images with prompts, in the dataset's order, then what the file names and the dataset lacks."""
    dataset, file = _parts(uri)
    prompts = _read(tabular.canonical(file, _WHAT), settings)
    for ref in sources.refs(dataset, settings):
        if ref is None:
            yield None
        elif (given := prompts.pop(ref.key, None)) is not None:
            data = json.dumps({**(json.loads(ref.data) if ref.data else {}), **given}, separators=(",", ":"))
            digest = hashlib.sha256(data.encode()).hexdigest()[:16]
            yield ImageRef(ref.key, ref.uri, f"{ref.fingerprint}+{digest}", data)
    for key in prompts:
        yield ImageRef(key, f"missing:{key}", "missing")


def _parts(uri: str) -> tuple[str, str]:
    given = dict(urllib.parse.parse_qsl(uri.removeprefix(_SCHEME)))
    if set(given) != {"of", "from"}:
        raise BadInput(f"expected prompted:?of=DATASET&from=FILE, but got {uri!r}")
    return given["of"], given["from"]


def _read(file: str, settings: Settings) -> Prompts:
    prompts: Prompts = {}
    for key, given in tabular.each(file, settings, _WHAT, _choose, _row, column="key"):
        known = prompts.setdefault(key, {})
        for name, values in given.items():
            known[name] = known.get(name, []) + values
    if not prompts:
        raise BadInput(f"{_WHAT} {file!r} names no image: write rows with a key and boxes or points")
    return prompts


@functools.lru_cache(maxsize=16)
def _choose(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    chosen = tuple(name for name in names if name in ("key", *_LISTS))
    if "key" not in chosen or not {"boxes", "points", "masks"} & set(chosen):
        found = ", ".join(repr(name[:50]) for name in names[:20]) or "none"
        raise BadInput(f"{where}: expected a column 'key' and one of boxes, points or masks; the columns are {found}")
    return chosen


def _row(names: tabular.Names, values: tabular.Values) -> tuple[str, dict[str, list[Any]]]:
    given = dict(zip(names, values, strict=True))
    key = row_key(given.pop("key"), "")
    return key, {str(name): _list(str(name), value) for name, value in given.items() if value not in (None, "")}


def _list(name: str, value: Any) -> list[Any]:
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = None
    if not isinstance(found, list):
        raise BadInput(f"expected {name} as a list, but got {short(value)}")
    return found
