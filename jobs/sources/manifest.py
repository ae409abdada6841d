"""Datasets that are a list: a .parquet, .csv, .jsonl or .txt file, local or on S3, with one image a row.

Columns: `uri` (or path, image, file, url), and if wanted `key` and `fingerprint` (or etag). A .txt file holds one URI a
line. Which URIs a list may name is said by jobs/references.py.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import NoReturn

from jobs import tabular
from jobs.references import Resolver
from jobs.sources import MANIFEST_SUFFIXES, ImageRef
from storage.errors import BadInput
from storage.settings import Settings

_WHAT = "manifest"
_URI_NAMES = ("uri", "path", "image", "file", "url")
_FINGERPRINT_NAMES = ("fingerprint", "etag")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def claims(uri: str) -> bool:
    """A name that ends like a manifest's, on S3 or local; whether it exists is seen when it is opened."""
    if not uri.rstrip("/").lower().endswith(MANIFEST_SUFFIXES):
        return False
    scheme = _SCHEME.match(uri)
    if scheme is not None:
        return scheme.group(1).lower() in ("s3", "file")
    return not os.path.isdir(os.path.expanduser(uri))


def canonical(uri: str) -> str:
    """The absolute spelling. Raises BadInput when a local file is not there."""
    return tabular.canonical(uri, _WHAT)


def refs(uri: str, settings: Settings) -> Iterator[ImageRef]:
    """Every row, in the manifest's order."""
    return _listed(canonical(uri), settings)


def _listed(uri: str, settings: Settings) -> Iterator[ImageRef]:
    resolve = Resolver(uri, _WHAT, settings).resolve
    yield from tabular.each(
        uri, settings, _WHAT, _choose, lambda names, values: resolve(*values), column=_URI_NAMES[0], text=True
    )


def _choose(names: tuple[str, ...], where: str) -> tuple[str, str | None, str | None]:
    return _columns(names) or _no_uri(names, where)


@functools.lru_cache(maxsize=16)
def _columns(names: tuple[str, ...]) -> tuple[str, str | None, str | None] | None:
    """Names of the columns of uri, key and fingerprint, as they are spelled; None without a uri."""
    spelled = {name.strip().lower(): name for name in reversed(names)}
    uri = next((spelled[name] for name in _URI_NAMES if name in spelled), None)
    fingerprint = next((spelled[name] for name in _FINGERPRINT_NAMES if name in spelled), None)
    return None if uri is None else (uri, spelled.get("key"), fingerprint)


def _no_uri(names: Iterable[str], where: str) -> NoReturn:
    found = ", ".join(repr(name[:50]) for name in itertools.islice(names, 20)) or "none"
    raise BadInput(f"{where}: no column 'uri' (or {', '.join(_URI_NAMES[1:])}); the columns found are {found}")
