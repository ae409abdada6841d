"""Where an export puts its files: all of them are there after a clean exit, and not one of them after an error.

In a folder everything is made in a hidden folder and moved out at the end; on a server what was put is deleted again.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from storage import objects
from storage.errors import BadInput, ImagemillError, NotFound
from storage.folder import FolderStore, translated
from storage.objects import Store, local_path
from storage.settings import Settings


class Output:
    """Where a writer puts its files. Safe to use from several threads.

    Attributes:
        scratch: a folder for what has to wait; on the destination's own disk where that is a folder.
        files: how many were put.
        is_folder: whether links can be made.
    """

    def __init__(self, store: Store, scratch: Path, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._root = local_path(store.url)
        self._lock = threading.Lock()
        self._journal = scratch / "put.jsonl"  # so that a failed export can be undone
        self.scratch, self.files = scratch, 0

    @property
    def is_folder(self) -> bool:
        return self._root is not None

    def put(self, key: str, data: bytes) -> None:
        """Write a small file."""
        self._count(key)
        self._store.put(key, data)

    def put_file(self, key: str, path: Path) -> None:
        """Write a file that was made in the scratch folder."""
        self._count(key)
        self._store.put_file(key, path)

    def copy(self, key: str, uri: str) -> None:
        """Copy a picture. Raises NotFound or BadInput when it cannot be read."""
        path = local_path(uri)
        if path is None:
            self.put(key, objects.read(uri, self._settings, self._settings.max_image_bytes))
        elif path.is_file():
            self.put_file(key, path)
        else:
            raise NotFound(f"{str(path)!r} does not exist")

    def link(self, key: str, uri: str) -> None:
        """Make a symbolic link to a local picture. Raises NotFound when it is not there."""
        path = local_path(uri)
        assert path is not None
        assert self._root is not None
        if not path.is_file():
            raise NotFound(f"{str(path)!r} does not exist")
        objects.check_key(key)
        with translated(key):
            (self._root / key).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path, self._root / key)
        self._count(key)

    def undo(self) -> None:
        """Delete what was put on a server."""
        if self._journal.exists():
            with self._journal.open(encoding="ascii") as lines:
                self._store.delete(json.loads(line) for line in lines)

    def _count(self, key: str) -> None:
        with self._lock:
            if self._root is None:  # before the put: its answer may be lost
                with self._journal.open("a", encoding="ascii") as journal:
                    journal.write(json.dumps(key) + "\n")
            self.files += 1


@contextlib.contextmanager
def staged(destination: Store, settings: Settings) -> Iterator[Output]:
    """An output whose files are all there after a clean exit, and not one of them after an error."""
    root = local_path(destination.url)
    if root is not None:
        with _in_folder(root, settings) as output:
            yield output
        return
    check_empty(destination)
    with (
        translated(tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix="imagemill-export-") as scratch,
    ):
        output = Output(destination, Path(scratch), settings)
        try:
            yield output
        except BaseException:
            with contextlib.suppress(ImagemillError):
                output.undo()
            raise


@contextlib.contextmanager
def _in_folder(root: Path, settings: Settings) -> Iterator[Output]:
    # Inside the destination, not beside it: that may be a mounted disk. A killed export leaves this hidden folder.
    made = not root.exists()
    try:
        with translated(str(root)):
            _check_folder(root)
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".imagemill-export-", dir=root) as folder:
                files, scratch = Path(folder, "files"), Path(folder, "scratch")
                files.mkdir()
                scratch.mkdir()
                yield Output(FolderStore(files), scratch, settings)
                _check_folder(root)
                for path in sorted(files.iterdir(), key=lambda p: (p.is_file(), p.name)):
                    path.rename(root / path.name)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                root.rmdir()
        raise


def check_empty(destination: Store) -> None:
    """Raise BadInput when there is something at the destination already."""
    root = local_path(destination.url)
    if root is not None:
        _check_folder(root)
    elif any(found.key for found in destination.list()):  # an empty key is the mark that consoles leave for a folder
        raise _not_empty(destination.url)


def _check_folder(root: Path) -> None:
    # Hidden files are no part of a dataset; lost+found is in the root of every ext4 volume.
    if root.exists() and any(not name.startswith(".") and name != "lost+found" for name in os.listdir(root)):
        raise _not_empty(str(root))


def _not_empty(where: str) -> BadInput:
    return BadInput(f"{where!r} is not empty; export to a new or empty place, so that no two exports are mixed")
