"""Objects as files in a folder on a local or shared disk; the operating system's errors are translated here."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from storage.errors import BadInput, Conflict, ImagemillError, Misconfigured, NotFound, StoreFull, Unavailable
from storage.objects import Stat, check_key, check_limit

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
_TEMPORARY_SECONDS = 86400


def read_file(path: Path, limit: int | None) -> bytes:
    """The bytes of a file, refused with BadInput when they are more than the limit."""
    # Unbuffered: each call of the system is a moment in which other threads take Python away.
    with translated(str(path)), open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        check_limit(size, limit)
        data = file.read(size + 1)  # not limit + 1: `read` takes memory for all that it is asked for
        if len(data) == size > 0:
            return data
        rest = io.BufferedReader(file)  # it is growing, or it was not all there at once
        data += rest.read() if limit is None else rest.read(limit + 1 - len(data))
        check_limit(len(data), limit)
        return data


def read_part(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a regular file from `offset` on. Raises Unavailable when it ends before."""
    with translated(str(path)), open_file(path) as file:
        there = os.fstat(file.fileno()).st_size
        if offset + size > there:  # before memory is taken for what is not there
            raise Unavailable(f"{str(path)!r} has {there} bytes, so not {size} from {offset} on: was it cut?")
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise Unavailable(f"{str(path)!r} became shorter while it was read; try again later")
    return data


def open_file(path: Path) -> BinaryIO:
    """A regular file, open for reading. Raises BadInput for a pipe or a device, without waiting for its other end."""
    with translated(str(path)), contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadInput(f"refused to read {str(path)!r}: it is not a regular file")
        stack.pop_all()
        return file


class FolderStore:
    """A folder on a local or shared disk; a put is a temporary file, synced and renamed: no reader sees half of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.as_uri()

    def get(self, key: str) -> bytes:
        with translated(key):
            return self._path(key).read_bytes()

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        with self._temporary(key, if_absent) as temporary:
            temporary.write_bytes(data)

    def put_file(self, key: str, path: Path) -> None:
        with self._temporary(key, False) as temporary:
            shutil.copyfile(path, temporary)

    def get_file(self, key: str, path: Path) -> None:
        with translated(key):
            shutil.copyfile(self._path(key), path)

    def stat(self, key: str) -> Stat | None:
        with translated(key):
            try:
                info = self._path(key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Stat(key, info.st_size, "", info.st_mtime) if stat.S_ISREG(info.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[Stat]:
        with translated(prefix):
            yield from self._walk(self.root, prefix)

    def _walk(self, folder: Path, prefix: str) -> Iterator[Stat]:
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda e: e.name)
        except FileNotFoundError:
            return
        for entry in entries:
            key = Path(entry.path).relative_to(self.root).as_posix()
            if entry.is_dir(follow_symlinks=False):
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(Path(entry.path), prefix)
            elif key.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):
                    info = entry.stat()
                    if not _TEMPORARY.fullmatch(entry.name):
                        yield Stat(key, info.st_size, "", info.st_mtime)
                    elif time.time() - info.st_mtime > _TEMPORARY_SECONDS:
                        os.unlink(entry.path)  # its writer was killed long ago

    def delete(self, keys: Iterable[str]) -> int:
        count = 0
        for key in keys:
            path = self._path(key)
            with translated(key), contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                path.unlink()
                count += 1
            self._remove_emptied(path.parent)
        return count

    def _remove_emptied(self, folder: Path) -> None:
        """Remove a folder and those above it while they are empty, never the root itself."""
        with contextlib.suppress(OSError):  # not empty, or gone already
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent

    def url_for(self, key: str) -> str:
        return self._path(key).as_uri()

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    @contextlib.contextmanager
    def _temporary(self, key: str, if_absent: bool) -> Iterator[Path]:
        path = self._path(key)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with translated(key):
                _create(temporary, key, self.root)
                yield temporary
                _sync(temporary)
                self._move(temporary, path, key, if_absent)
                _sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    @staticmethod
    def _move(temporary: Path, path: Path, key: str, if_absent: bool) -> None:
        try:
            if if_absent:
                os.link(temporary, path)
            else:
                os.replace(temporary, path)
        except FileExistsError:
            raise Conflict(f"object {key!r} exists already") from None
        except IsADirectoryError:
            raise BadInput(
                f"object {key!r} cannot be written: a folder of that name is there; take another key"
            ) from None


def _create(temporary: Path, key: str, root: Path) -> None:
    """Make an empty file and its folders, though a collector may be removing emptied folders at the same time."""
    for attempt in range(100):
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            return
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            blocking = _blocking(temporary)
            if blocking is not None:
                if blocking == root or blocking in root.parents:
                    raise Misconfigured(f"no folder can be made at {root}: {str(blocking)!r} is a file") from None
                raise BadInput(
                    f"object {key!r} cannot be written: {str(blocking)!r} is a file; take another key"
                ) from None
            if attempt == 99:
                raise


def _blocking(path: Path) -> Path | None:
    """What stands where a folder above the path should be. Each is looked at once: it may be gone the next time."""
    for parent in path.parents:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return None if stat.S_ISDIR(parent.stat().st_mode) else parent
        if parent.is_symlink():
            return parent
    return None


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk: a row that points at them may be committed next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Map OSError onto our tree."""
    try:
        yield
    except OSError as error:
        raise from_os(error, what) from error


def from_os(error: OSError, what: str) -> ImagemillError:
    if isinstance(error, NotADirectoryError):
        return NotFound(f"{what!r} does not exist: a part of that path is a file, not a folder")
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        return NotFound(f"{what!r} does not exist")
    if error.errno == errno.ELOOP:
        return NotFound(f"{what!r} does not exist: its links go in a circle")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"no space left while writing {what!r}; free some, nothing committed is lost")
    if error.errno == errno.ENAMETOOLONG:
        return BadInput(f"{what!r} is too long a name for this disk; take a shorter one")
    if isinstance(error, PermissionError):
        return Misconfigured(f"no permission for {what!r}; check the owner and mode of the folder")
    return Unavailable(f"{what!r}: {error.strerror or error}")
