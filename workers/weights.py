"""Weights files: put into the object store once under their sha256, fetched once a machine, verified."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from storage.errors import BadInput, Misconfigured, Unavailable
from storage.objects import Store

Progress = Callable[[int, int], None]  # bytes so far, bytes in all (0 when unknown)

_BLOCK = 1 << 20


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def publish(store: Store, path: Path, sha256: str) -> str:
    """Put a weights file where every worker finds it; returns its key. One that is there already is left alone."""
    key = f"weights/{sha256}/{path.name}"
    there = store.stat(key)
    if there is None or there.size != path.stat().st_size:
        store.put_file(key, path)
    return key


def fetch(store: Store, key: str, sha256: str, cache: Path) -> Path:
    """The weights as a local file whose sha256 has been checked. Several processes may fetch it at once."""
    path = cache / "weights" / sha256 / key.rsplit("/", 1)[-1]
    if path.is_file() and sha256_of(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        store.get_file(key, temporary)
        _verify(temporary, sha256, key)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def download(url: str, cache: Path, sha256: str, on_progress: Progress = lambda done, total: None) -> Path:
    """The file at an https URL, kept in the cache; its sha256 is checked when one is pinned.

    Raises:
        Unavailable: the server does not answer, or breaks off; nothing half-fetched is left.
        Misconfigured: the bytes are not those that were pinned.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https":
        raise BadInput(f"cannot fetch weights from {url!r}: expected an https:// URL or a local file")
    path = cache / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / Path(parts.path).name
    if path.is_file() and (not sha256 or sha256_of(path) == sha256):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        _stream(url, temporary, on_progress)
        _verify(temporary, sha256, url)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _stream(url: str, path: Path, on_progress: Progress) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            done = 0
            while block := answer.read(_BLOCK):
                file.write(block)
                done += len(block)
                on_progress(done, total)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise Unavailable(
            f"cannot download {url}: {getattr(error, 'reason', error)}; "
            "fetch the file on another machine and give its path to --model"
        ) from error
    if total and done != total:
        raise Unavailable(f"the download of {url} broke off after {done} of {total} bytes; run the same command again")


def _verify(path: Path, sha256: str, source: str) -> None:
    if sha256 and (found := sha256_of(path)) != sha256:
        raise Misconfigured(
            f"{source} is not the file that was pinned: sha256 {found[:16]}..., expected {sha256[:16]}..."
        )
