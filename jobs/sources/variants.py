"""Knows the dataset that has every item of another one several times: variants:?of=DATASET&n=4.

Each copy is told which one it is: data has "variant", from 0.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator

from jobs import sources
from jobs.sources import ImageRef, safe_key
from storage.errors import BadInput
from storage.settings import Settings

_SCHEME = "variants:?"
_MOST = 1000


def claims(uri: str) -> bool:
    """Whether it starts with variants:?."""
    return uri.startswith(_SCHEME)


def canonical(uri: str) -> str:
    """The spelling in which the other dataset's is canonical. Raises BadInput for a number out of 1..1000."""
    dataset, count = _parts(uri)
    return _SCHEME + urllib.parse.urlencode({"of": sources.canonical(dataset), "n": count})


def refs(uri: str, settings: Settings) -> Iterator[ImageRef | None]:
    """The copies of each item, one after the other: "a.jpg" becomes "a.jpg/0", "a.jpg/1", ..."""
    dataset, count = _parts(uri)
    for ref in sources.refs(dataset, settings):
        if ref is None:
            yield None
            continue
        data = json.loads(ref.data) if ref.data else {}
        for i in range(count):
            key = safe_key(f"{ref.key}/{i}")
            yield ImageRef(key, ref.uri, ref.fingerprint, json.dumps({**data, "variant": i}, separators=(",", ":")))


def _parts(uri: str) -> tuple[str, int]:
    given = dict(urllib.parse.parse_qsl(uri.removeprefix(_SCHEME)))
    count = given.get("n", "")
    if "of" not in given or not count.isdecimal() or not 1 <= int(count[:9]) <= _MOST:
        raise BadInput(f"expected from 1 to {_MOST} variants of a dataset, but got {count or 'nothing'}")
    return given["of"], int(count)
