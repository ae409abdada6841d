"""Datasets of prompts, one or several images to be made of each: prompts:FILE?n=4.

FILE is a .txt, .csv, .jsonl or .parquet file, local or on S3. A .txt file holds one prompt a line; the others have the
columns

    prompt             what to draw (or text, caption)
    negative_prompt    what not to draw
    seed               of the row's first image; the others take the numbers after it
    key                name of the row; else its number among the rows and a short hash of the prompt
    image              reference image to start from, as a manifest names it (jobs/references.py)
    n                  images to make of the row, in place of the dataset's own n

of which only prompt must be there. What other columns say is kept in the items' data too. Where a row becomes several
items, their keys end in /0, /1, ...
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from jobs import tabular
from jobs.references import Resolver, row_key, short
from jobs.sources import ImageRef, safe_key
from storage.errors import BadInput
from storage.settings import Settings

MOST = 1000  # images of a prompt

_encode = json.JSONEncoder(sort_keys=True, allow_nan=False, ensure_ascii=False).encode
_quoted = json.encoder.encode_basestring  # a text as _encode writes it

_SCHEME = "prompts:"
_WHAT = "prompt list"
_PROMPT_NAMES = ("prompt", "text", "caption")
_NAMES = ("negative_prompt", "seed", "key", "image", "n")
_SEED_END = 2**63  # seeds go into files and databases as signed 64-bit numbers
_QUERY = re.compile(r"\?n=([^?]*)$")


def claims(uri: str) -> bool:
    """Whether it starts with prompts:."""
    return uri.startswith(_SCHEME)


def canonical(uri: str) -> str:
    """The absolute spelling with its n. Raises BadInput when a local file is not there, or n is not from 1 to MOST."""
    file, count = _parts(uri)
    return f"{_SCHEME}{file}?n={count}"


def refs(uri: str, settings: Settings) -> Iterator[ImageRef]:
    """The items of each row, in the list's order. Raises BadInput when there is none."""
    return _listed(*_parts(uri), settings)


def _parts(uri: str) -> tuple[str, int]:
    """(canonical URI of the list, images of each prompt)."""
    text = uri.removeprefix(_SCHEME)
    query = _QUERY.search(text)
    file = text[: query.start()] if query else text
    return tabular.canonical(file, _WHAT), _whole("n", query.group(1) if query else 1, 1, MOST)


def _listed(file: str, count: int, settings: Settings) -> Iterator[ImageRef]:
    resolver = Resolver(file, _WHAT, settings)
    numbers = itertools.count(1)
    empty = True

    def make(names: tabular.Names, values: tabular.Values) -> list[ImageRef]:
        if len(values) == 1:
            return _alone(values[0], next(numbers), count)
        given = {_known(str(name)): value for name, value in zip(names, values, strict=True) if not _is_missing(value)}
        return _items(given, next(numbers), count, resolver)

    for items in tabular.each(file, settings, _WHAT, _choose, make, column=_PROMPT_NAMES[0]):
        empty = False
        yield from items
    if empty:
        raise BadInput(f"{_WHAT} {file!r} holds no prompt: write one a line, or rows under a column 'prompt'")


@functools.lru_cache(maxsize=16)
def _known(name: str) -> str:
    """A column's name as this file says it; that of an unknown column as it is spelled."""
    plain = name.strip().lower()
    return _PROMPT_NAMES[0] if plain in _PROMPT_NAMES else plain if plain in _NAMES else name


@functools.lru_cache(maxsize=16)
def _choose(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """All columns, less those that mean the same as an earlier one."""
    chosen = {_known(name): name for name in reversed(names)}
    if _PROMPT_NAMES[0] not in chosen:
        found = ", ".join(repr(name[:50]) for name in names[:20]) or "none"
        raise BadInput(f"{where}: no column 'prompt' (or {', '.join(_PROMPT_NAMES[1:])}); the columns are {found}")
    return tuple(name for name in names if chosen[_known(name)] == name)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _alone(prompt: Any, number: int, count: int) -> list[ImageRef]:
    """As `_items` makes them of a row that holds a prompt and nothing else, in half the time."""
    prompt = _text("prompt", None if _is_missing(prompt) else prompt)
    row = f"{number:07d}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    found = []
    for index in range(count):
        data = f'{{"index": {index}, "prompt": {_quoted(prompt)}}}'
        fingerprint = f"sha256:{hashlib.sha256(data.encode()).hexdigest()[:32]}"
        found.append(ImageRef(row if count == 1 else f"{row}/{index}", "", fingerprint, data))
    return found


def _items(given: dict[str, Any], number: int, count: int, resolver: Resolver) -> list[ImageRef]:
    """The items of one row.

    Args:
        given: the row's values that are not missing, by column.
        number: of the row among the prompts, from 1.
    """
    prompt = _text("prompt", given.get("prompt"))
    count = _whole("n", given.pop("n", count), 1, MOST)
    key = row_key(given.pop("key", None), f"{number:07d}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}")
    if "negative_prompt" in given:
        _text("negative_prompt", given["negative_prompt"])
    if "seed" in given:
        given["seed"] = _whole("seed", given["seed"], 0, _SEED_END - MOST)
    image = given.pop("image", None)
    reference = ImageRef(key, "", "") if image is None else resolver.resolve(image, key, None)
    return [_item(given, i, key if count == 1 else safe_key(f"{key}/{i}"), reference) for i in range(count)]


def _item(given: dict[str, Any], index: int, key: str, reference: ImageRef) -> ImageRef:
    seed = {"seed": given["seed"] + index} if "seed" in given else {}
    try:
        data = _encode({**given, **seed, "index": index})
        digest = hashlib.sha256(data.encode()).hexdigest()[:32]
    except (TypeError, ValueError) as error:
        raise BadInput(f"its values cannot be kept as JSON ({error}); leave that column out") from None
    fingerprint = f"sha256:{digest}" + (f"+{reference.fingerprint}" if reference.uri else "")
    return ImageRef(key, reference.uri, fingerprint, data)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"expected a {name} as text, but got {'nothing' if value is None else short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInput(f"the {name} has half a letter (a lone surrogate); write it again as UTF-8") from None
    return value


def _whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number, also as text (csv) or as a float (what a column with gaps becomes in a data frame)."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdecimal():
        value = int(value.strip()[:30])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"expected {name} as a whole number from {low} to {high}, but got {short(value)}")
    return value
