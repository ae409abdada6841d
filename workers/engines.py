"""Knows the engine cache: what runtimes build from networks, built once for the whole fleet, kept in the object store.

    engines/<digest>/<sha256>       a built file, under the sha256 of its bytes
    engines/<digest>/engine.json    what it is: written last, so that it names whole files only
    engines/<digest>/building       somebody builds it: its content changes every few seconds, for as long as they live

The digest names everything that the file depends on. Nobody owns the right to build: who sees that nobody's
`building` changes builds, so that a builder that dies stops nobody, and two that start at once build twice, each a
whole file of its own, of which engine.json names one. Only changes are looked at, no clocks are compared.

Each machine keeps a folder of the same files, limited in size, whose bytes are compared with their sha256 at every
use. Where the store does not answer, the machine builds for itself. Machine code for its processor it builds for
itself always: whoever may write to the store must not be able to run code on a worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.spec import JobSpec
from storage.errors import ImagemillError, Misconfigured, NotFound
from storage.objects import Store
from storage.settings import Settings
from workers import exporting
from workers.runtimes import Network
from workers.weights import sha256_of

log = logging.getLogger("imagemill.worker")

FOLDER = "engines/"
LIMIT_BYTES = 20_000_000_000  # of a machine's folder

_ENTRY = "engine.json"
_BUILDING = "building"
_LOCK = ".lock"  # on a machine, of the process that builds what no other machine may give
_NOTE = "sha256"  # on a machine, the file that holds the sha256 of the one beside it


@dataclass(frozen=True, slots=True)
class Pace:
    """How a build of somebody else's is waited for, in seconds.

    Attributes:
        renew: between two changes of `building`.
        dead: without a change, after which its builder is taken for dead.
        patience: of waiting in all, after which one builds for oneself.
        look: between two looks.
    """

    renew: float = 5
    dead: float = 30
    patience: float = 1800
    look: float = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One built file in the store.

    Attributes:
        digest: of `about`.
        name: for people.
        about: everything that the file depends on.
        size: bytes.
        sha256: of the file.
        modified: seconds since the epoch, by the store's clock.
    """

    digest: str
    name: str
    about: Mapping[str, str]
    size: int
    sha256: str
    modified: float = 0.0


class Engines:
    """What runtimes build for one model: `workers.runtimes.Files`.

    Args:
        folder: of this machine, shared by its processes.
        model: what a network depends on besides its name.
        export: writes a network to an ONNX file in a precision, as workers.onnxgraph.export does.
        compile: writes it as workers.runtimes.inductor.compile does.
        moving: called every few seconds of building and waiting, to show that the process lives.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        model: Mapping[str, str],
        export: Callable[[Network, str, Path], None],
        compile: Callable[[Network, str, str, Path], None],
        moving: Callable[[], None] = lambda: None,
        limit_bytes: int = LIMIT_BYTES,
        pace: Pace = Pace(),
    ) -> None:
        self.model = model
        self._export, self._compile = export, compile
        self._store, self._folder, self._moving = store, folder, moving
        self._limit, self._pace = limit_bytes, pace

    def export(self, network: Network, precision: str, path: Path) -> None:
        """Write a network to an ONNX file. Raises NotRunnable."""
        self._export(network, precision, path)

    def compile(self, network: Network, device: str, precision: str, path: Path) -> None:
        """Write a network as compiled for a device. Raises NotRunnable."""
        self._compile(network, device, precision, path)

    def get(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        """The local file that `build(path)` writes, or has written for somebody in the fleet.

        Raises what `build` raises.
        """
        digest = digest_of(about)
        path = self._folder / digest / name
        if self._is_whole(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = self._wait(digest)
        if entry is None or not self._fetch(entry, path):
            with self._announced(digest):
                self._build(path, build, functools.partial(self._publish, digest, path.name, about))
        self._make_room(path.parent)
        return path

    def here(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        """As `get`, without the store: one process of this machine builds, and the others wait for it."""
        path = self._folder / digest_of(about) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._only_one(path.parent / _LOCK):
            if not self._is_whole(path):
                for left in path.parent.glob(".*.tmp*"):  # by one that was killed
                    left.unlink(missing_ok=True)
                with self._meanwhile(lambda count: None):
                    self._build(path, build, lambda temporary, sha256: None)
        self._make_room(path.parent)
        return path

    def share(self, about: Mapping[str, str], name: str) -> None:
        """Put this machine's file into the store where that has lost it, by `remove` say. Raises ImagemillError."""
        digest = digest_of(about)
        if _entry(self._store, digest) is None:
            path = self._folder / digest / name
            self._put(Entry(digest, name, about, path.stat().st_size, sha256_of(path)), path)

    # ------------------------------------------------------------------------------------------------ this machine

    def _is_whole(self, path: Path) -> bool:
        """Whether the file is here with the bytes that it was written with."""
        try:
            noted = (path.parent / _NOTE).read_text()
            whole = sha256_of(path) == noted
        except OSError:
            return False
        if whole:
            with contextlib.suppress(OSError):  # another process is making room
                os.utime(path.parent)
        return whole

    @contextlib.contextmanager
    def _only_one(self, lock: Path) -> Iterator[None]:
        """While no other process of this machine is in it; one that dies leaves it."""
        with lock.open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._moving()
                    time.sleep(self._pace.look)
            yield

    def _keep(self, temporary: Path, path: Path, sha256: str) -> None:
        os.replace(temporary, path)
        note = path.parent / f".{uuid.uuid4().hex}.tmp"
        note.write_text(sha256)
        os.replace(note, path.parent / _NOTE)

    def _make_room(self, newest: Path) -> None:
        """Remove the files used longest ago while all of them together are over the limit, the newest never."""
        with contextlib.suppress(OSError):
            folders = sorted((f for f in self._folder.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)
            sizes = {f: sum(p.stat().st_size for p in f.iterdir()) for f in folders}
            total = sum(sizes.values())
            for folder in folders:
                if total <= self._limit:
                    return
                if folder != newest:
                    shutil.rmtree(folder, ignore_errors=True)
                    total -= sizes[folder]

    # ------------------------------------------------------------------------------------------------ the store

    def _wait(self, digest: str) -> Entry | None:
        """The entry in the store, as soon as it is there; None when there is none and nobody is building it."""
        until = time.monotonic() + self._pace.patience
        seen, seen_at = b"", time.monotonic()
        try:
            while time.monotonic() < until:
                if (entry := _entry(self._store, digest)) is not None:
                    return entry
                sign = _read(self._store, f"{FOLDER}{digest}/{_BUILDING}")
                if sign is None:
                    return None
                if sign != seen:
                    seen, seen_at = sign, time.monotonic()
                elif time.monotonic() - seen_at > self._pace.dead:
                    log.warning("who was building engine %s has stopped; building it here", digest[:12])
                    return None
                self._moving()
                time.sleep(self._pace.look)
        except ImagemillError as error:
            log.warning("the engine cache cannot be read, so this machine builds for itself: %s", error)
        return None

    def _fetch(self, entry: Entry, path: Path) -> bool:
        """Bring a file here, and compare its bytes with what the store says they are."""
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            self._store.get_file(f"{FOLDER}{entry.digest}/{entry.sha256}", temporary)
            if sha256_of(temporary) != entry.sha256:
                log.warning("engine %s in the store is damaged; building it again", entry.digest[:12])
                return False
            self._keep(temporary, path, entry.sha256)
        except (ImagemillError, OSError) as error:
            log.warning("engine %s cannot be fetched, so this machine builds it: %s", entry.digest[:12], error)
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _build(self, path: Path, build: Callable[[Path], None], publish: Callable[[Path, str], None]) -> None:
        """Build and keep a file here.

        Args:
            publish: called with the file that was built, under another name, and its sha256.
        """
        started = time.monotonic()
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            build(temporary)
            sha256 = sha256_of(temporary)
            log.info("built %s in %.0f s", path.name, time.monotonic() - started)
            publish(temporary, sha256)
            self._keep(temporary, path, sha256)
        except OSError as error:
            raise Misconfigured(
                f"cannot write the engine {path}: {error.strerror or error}; see IMAGEMILL_CACHE"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _publish(self, digest: str, name: str, about: Mapping[str, str], path: Path, sha256: str) -> None:
        try:
            self._put(Entry(digest, name, about, path.stat().st_size, sha256), path)
        except ImagemillError as error:
            log.warning("engine %s could not be kept for the fleet: %s", name, error)

    def _put(self, entry: Entry, path: Path) -> None:
        shown: dict[str, Any] = {
            "name": entry.name,
            "about": dict(entry.about),
            "size": entry.size,
            "sha256": entry.sha256,
        }
        self._store.put_file(f"{FOLDER}{entry.digest}/{entry.sha256}", path)
        self._store.put(f"{FOLDER}{entry.digest}/{_ENTRY}", json.dumps(shown, sort_keys=True).encode())

    @contextlib.contextmanager
    def _announced(self, digest: str) -> Iterator[None]:
        """Say in the store that somebody builds, over and over, until it is done or this process dies."""
        key, owner = f"{FOLDER}{digest}/{_BUILDING}", uuid.uuid4().hex

        def announce(count: int) -> None:
            with contextlib.suppress(ImagemillError):  # then others build too, which is allowed
                self._store.put(key, f"{owner} {count}".encode())

        announce(0)
        try:
            with self._meanwhile(announce):
                yield
        finally:
            with contextlib.suppress(ImagemillError):
                self._store.delete([key])

    @contextlib.contextmanager
    def _meanwhile(self, tell: Callable[[int], None]) -> Iterator[None]:
        """Show every few seconds that the process lives, and call `tell` with the number of the time, from 1 on."""
        done = threading.Event()

        def go_on() -> None:
            count = 1
            while not done.wait(self._pace.renew):
                tell(count)
                self._moving()
                count += 1

        thread = threading.Thread(target=go_on, name="building", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def of_spec(
    store: Store,
    settings: Settings,
    spec: JobSpec,
    weights: Path | None,
    moving: Callable[[], None] = lambda: None,
    pace: Pace = Pace(),
    alone: bool = False,
) -> Engines:
    """The engines of a job's model.

    Args:
        weights: local file or folder of the spec's weights.
        alone: whether no other thread computes in torch while a network is exported.
    """
    # All parameters, since a family alone knows which of them change its networks.
    model = {
        "weights": spec.weights_sha256,
        "family": spec.family,
        "kind": spec.kind,
        "params": json.dumps(dict(spec.params), sort_keys=True),
    }
    export = functools.partial(exporting.export_alone if alone else exporting.export, spec, weights)
    compile = functools.partial(exporting.compile, spec, weights)
    return Engines(store, folder_of(settings), model, export, compile, moving, pace=pace)


def folder_of(settings: Settings) -> Path:
    """Where this machine keeps its files."""
    return settings.cache_folder / "engines"


def digest_of(about: Mapping[str, str]) -> str:
    """Names what a file depends on: the sha256 of its canonical JSON."""
    return hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()


def entries(store: Store) -> list[Entry]:
    """Every engine in the store, newest first."""
    found = []
    for stat in store.list(FOLDER):
        if stat.key.endswith(f"/{_ENTRY}"):
            entry = _entry(store, stat.key.removeprefix(FOLDER).partition("/")[0], stat.modified)
            found += [entry] if entry else []
    return sorted(found, key=lambda entry: entry.modified, reverse=True)


def digests(store: Store) -> list[str]:
    """Of everything that there is or that was begun, entries or not."""
    return sorted({stat.key.removeprefix(FOLDER).partition("/")[0] for stat in store.list(FOLDER)})


def remove(store: Store, digests: Sequence[str]) -> int:
    """Remove engines from the store; returns how many there were. Workers that hold one go on with it.

    Args:
        digests: whole ones, as `entries` and `digests` give them.
    """
    count = 0
    for digest in digests:
        keys = [stat.key for stat in store.list(f"{FOLDER}{digest}/")]
        entry = f"{FOLDER}{digest}/{_ENTRY}"
        count += entry in keys
        store.delete([entry])  # first, so that it never names a file that is gone
        store.delete([key for key in keys if key != entry])
    return count


def _entry(store: Store, digest: str, modified: float = 0.0) -> Entry | None:
    data = _read(store, f"{FOLDER}{digest}/{_ENTRY}")
    try:
        value = json.loads(data) if data else {}
        about = {str(name): str(text) for name, text in value["about"].items()}
        return Entry(digest, str(value["name"]), about, int(value["size"]), str(value["sha256"]), modified)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key)
    except NotFound:
        return None
