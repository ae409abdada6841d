"""Datasets that are a local folder: every image file below it, hidden ones apart, told by size and modification time.

Links to folders are not followed, since they may go in circles. A link to a file counts when it leads to a file in the
dataset or under IMAGEMILL_LOCAL_ROOTS; any other, and anything that is not a regular file, is listed as "refused", so
that it becomes a failure row that nobody has read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from jobs.sources import FILE_SUFFIXES, IMAGE_SUFFIXES, ImageRef, Keys, is_under, stat_fingerprint
from storage.errors import BadInput, Unavailable
from storage.objects import local_path
from storage.settings import Settings

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def claims(uri: str) -> bool:
    """Folders, and what can only be meant as one: a single image, or a path without a suffix that does not exist."""
    path = _path(uri)
    if path is None:
        return False
    if os.path.isdir(path):
        return True
    suffix = os.path.splitext(path)[1].lower()
    if os.path.exists(path):
        return suffix in IMAGE_SUFFIXES
    return not suffix or suffix in IMAGE_SUFFIXES or (uri.endswith("/") and suffix not in FILE_SUFFIXES)


def canonical(uri: str) -> str:
    """The absolute path as it was given, links kept: a link that is moved on to newer data is the same dataset."""
    path = _path(uri) or uri
    # "link/.." is the parent of the link's target, which only realpath knows; abspath keeps a leading "//".
    path = os.path.realpath(path) if ".." in path.split("/") else "/" + os.path.abspath(path).lstrip("/")
    _check(path)
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).as_uri()
    return path


def refs(uri: str, settings: Settings) -> Iterator[ImageRef]:
    """Every image below the folder, each folder's files in order of name, then its subfolders."""
    found = canonical(uri)
    root = _path(found) or found
    roots = [os.path.realpath(folder) for folder in (root, *map(str, settings.local_roots))]
    return _walk(root, roots)


def _path(uri: str) -> str | None:
    """The local path that a URI or a shell word names, or None."""
    path = local_path(uri)
    if path is not None:
        return str(path)
    return None if not uri or _SCHEME.match(uri) or "\0" in uri else os.path.expanduser(uri)


def _check(path: str) -> None:
    if os.path.isdir(path):
        return
    if not os.path.lexists(path):
        raise BadInput(f"folder {path!r} does not exist; check the spelling, or whether its disk is mounted")
    raise BadInput(f"{path!r} is not a folder; give the folder that holds it, or a .txt manifest that lists it")


def _walk(root: str, roots: list[str]) -> Iterator[ImageRef]:
    todo, keys = [""], Keys()
    while todo:
        prefix = todo.pop()
        folder = os.path.join(root, prefix) if prefix else root
        files, subfolders, identity = _scan(folder)
        todo.extend(f"{prefix}{name}/" for name in reversed(subfolders))
        for name in files:
            yield _ref(folder, name, keys.of(prefix + name), roots, identity)


def _scan(folder: str) -> tuple[list[str], list[str], tuple[int, int]]:
    """Names of the image files and of the subfolders, sorted, and which folder on which disk it was."""
    files, subfolders = [], []
    try:
        identity = _identity(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    subfolders.append(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and not _is_linked_folder(entry):
                    files.append(entry.name)
    except OSError as error:
        raise _broke_off(folder, error) from error
    return sorted(files), sorted(subfolders), identity


def _is_linked_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_symlink() and entry.is_dir()
    return False


def _ref(folder: str, name: str, key: str, roots: list[str], identity: tuple[int, int]) -> ImageRef:
    path = os.path.join(folder, name)
    try:
        info = os.lstat(path)
        if stat.S_ISLNK(info.st_mode):
            # The target's own name goes into the URI, so that moving the link later leads nobody elsewhere.
            path = os.path.realpath(path)
            if not any(is_under(path, root) for root in roots):
                return _refused(key, path)
            info = os.stat(path)
    except OSError as error:
        if error.errno not in _NOT_THERE or not _is_still(folder, identity):
            raise _broke_off(path, error) from error
        return ImageRef(key, Path(path).as_uri(), "missing")
    if not stat.S_ISREG(info.st_mode):
        return _refused(key, path)
    return ImageRef(key, Path(path).as_uri(), stat_fingerprint(info))


def _refused(key: str, path: str) -> ImageRef:
    return ImageRef(key, f"refused:{Path(path).as_uri()}", "refused")


def _identity(folder: str) -> tuple[int, int]:
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def _is_still(folder: str, identity: tuple[int, int]) -> bool:
    """Whether a folder is still the one that was listed: when its disk was unmounted, no file of it is missing."""
    try:
        return _identity(folder) == identity
    except OSError:
        return False


def _broke_off(path: str, error: OSError) -> Unavailable:
    return Unavailable(
        f"cannot list {path!r}: {error.strerror or error}; the dataset was not read to its end, so nothing was pruned: "
        "make it readable and run again"
    )
