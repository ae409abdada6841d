"""Says which image a row of a list means, and whether it may be read.

A list may come from anyone. A URI is s3://bucket/key in any bucket (what the credentials may read decides), or a plain
path: relative ones start at the list's own folder or prefix, and a local file must really lie there or under
IMAGEMILL_LOCAL_ROOTS. Nothing else is read.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import posixpath
import re
import stat
import urllib.parse
from pathlib import Path
from typing import Any, NamedTuple

from jobs.sources import ImageRef, is_under, safe_key, stat_fingerprint
from storage.errors import BadInput
from storage.objects import local_path
from storage.settings import Settings, masked

_FINGERPRINT_LIMIT = 256
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_UNTIDY = re.compile(r"(?:^\.|/\.?)/")  # "./a", "a//b", "a/./b"
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class _Parent(NamedTuple):
    """What is known of a folder that holds images: real path, URI with a closing slash, key with one or ""."""

    real: str
    uri: str
    key: str


class Resolver:
    """What the rows of one list mean.

    Args:
        uri: of the list, in its canonical spelling.
        what: "manifest", or what else it is to its user.
    """

    def __init__(self, uri: str, what: str, settings: Settings) -> None:
        self._what = what
        self._remote = f"{uri.rpartition('/')[0]}/" if uri.startswith("s3://") else ""
        local = [] if self._remote else [os.path.dirname(str(local_path(uri) or uri))]
        self._folder = local[0] if local else ""
        self._roots = [*local, *map(str, settings.local_roots)]
        self._real_roots = [os.path.realpath(root) for root in self._roots]
        # The folders of a list's images come in runs, so few are looked at twice.
        self._parent = functools.lru_cache(maxsize=4096)(self._look_at)

    def resolve(self, given: Any, key: Any, fingerprint: Any) -> ImageRef:
        """One row as an image. Raises BadInput, without the row's number."""
        if not isinstance(given, str) or not given:
            raise BadInput(f"expected a URI or path as text, but got {short(given)}")
        if _CONTROL.search(given):
            raise BadInput(f"{short(given)} has a control character or half a letter; rename the file")
        if ".." in given and ".." in given.split("/"):
            raise BadInput(f"{short(given)} has a '..' part; give the path without it")
        known = _fingerprint(fingerprint)
        if given.startswith("s3://"):
            return _on_s3(given, key, given[5:], known)
        if _SCHEME.match(given):
            raise self._bad_scheme(given)
        path = posixpath.normpath(given) if _UNTIDY.search(given) else given
        if self._remote and not path.startswith("/"):
            return _on_s3(self._remote + path, key, path, known)
        return self._local(path, key, known)

    def _bad_scheme(self, given: str) -> BadInput:
        remedies = {
            "file": "give a plain path",
            "http": "web addresses are off: copy the images to a folder or bucket first",
            "https": "web addresses are off: copy the images to a folder or bucket first",
        }
        scheme = given.partition("://")[0].lower()
        return BadInput(
            f"{short(given)} is not allowed in a {self._what}: " + remedies.get(scheme, "give s3:// or a path")
        )

    def _local(self, path: str, key: Any, known: str | None) -> ImageRef:
        relative = not path.startswith("/")
        folder, _, name = (f"{self._folder}/{path}" if relative else path).rpartition("/")
        parent = self._parent(folder)
        key = row_key(key, path if relative else parent.key + name)
        uri = parent.uri + urllib.parse.quote_from_bytes(os.fsencode(name))
        try:
            info = os.lstat(f"{parent.real}/{name}")
            if stat.S_ISLNK(info.st_mode):
                # The target's own name goes into the URI, so that moving the link later leads nobody elsewhere.
                real = self._allowed(os.path.realpath(f"{parent.real}/{name}"), path)
                uri = Path(real).as_uri()
                info = os.stat(real)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            return ImageRef(key, uri, "missing")
        if not stat.S_ISREG(info.st_mode):
            raise BadInput(f"{short(path)} is not a regular file; list image files only")
        return ImageRef(key, uri, known or stat_fingerprint(info))

    def _look_at(self, folder: str) -> _Parent:
        real = self._allowed(os.path.realpath(folder or "/"), folder)
        pairs = [*((folder, root) for root in self._roots), *((real, root) for root in self._real_roots)]
        key = next((path[len(root) :].strip("/") for path, root in pairs if is_under(path, root)), "")
        uri = Path(real).as_uri()
        return _Parent(real.rstrip("/"), uri if uri.endswith("/") else f"{uri}/", f"{key}/" if key else "")

    def _allowed(self, real: str, given: str) -> str:
        if not any(is_under(real, root) for root in self._real_roots):
            where = f"a {self._what} on S3" if self._remote else f"the {self._what}'s folder"
            home = f"no folder is open to {where}" if self._remote else f"it leads outside {where}"
            raise BadInput(
                f"{short(given)} may not be read: {home}; name the images' folder in IMAGEMILL_LOCAL_ROOTS to allow it"
            )
        return real


def _on_s3(uri: str, key: Any, default: str, known: str | None) -> ImageRef:
    bucket, _, name = uri[5:].partition("/")
    if not bucket or not name or "@" in bucket:
        raise BadInput(f"{short(uri)} is not s3://bucket/key; credentials go into AWS_ variables")
    return ImageRef(row_key(key, default), uri, known or f"uri:{hashlib.sha256(uri.encode()).hexdigest()[:16]}")


def row_key(given: Any, default: str) -> str:
    """The key a row gives, or its default. Raises BadInput for one that is no text or not safe."""
    if given is None or given == "":
        return safe_key(default)
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    if not isinstance(given, str):
        raise BadInput(f"expected the key as text, but got {short(given)}")
    return safe_key(given)


def _fingerprint(given: Any) -> str | None:
    if given is None or given == "":
        return None
    text = str(given)
    if not isinstance(given, str | int) or len(text) > _FINGERPRINT_LIMIT or _CONTROL.search(text):
        raise BadInput(f"expected a fingerprint of at most {_FINGERPRINT_LIMIT} letters, but got {short(given)}")
    return f"given:{text}"


def short(value: Any) -> str:
    """A value for people's eyes: short, and without a URL's password or query."""
    if not isinstance(value, str):
        return f"{value!r:.100}"
    if "://" in value:
        try:
            value = masked(value)
        except ValueError:
            value = f"{value.partition('://')[0]}://..."
    return f"{value[:200]!r}"
