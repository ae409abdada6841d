"""Knows what people ask of the engine cache: which engines there are, of which models; to build and to remove some."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.spec import JobSpec
from storage.errors import BadInput, ImagemillError, Misconfigured, NotFound
from storage.objects import Store
from storage.settings import Settings
from workers import devices, engines, models, runtimes, submit, weights
from workers.engines import Engines, Entry, Pace
from workers.models import Site
from workers.runtimes import Network, Session

# Faster than a worker's, so that a person sees the seconds pass.
PACE = Pace(renew=2)

_UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class Row:
    """An engine in the store, for people.

    Attributes:
        digest: of everything that the engine depends on.
        name: of the file.
        model: the name of the weights' file, or the family where the store has no weights of it.
        runtime: that made the file; an ONNX file serves all of onnx, openvino and tensorrt.
        precision: "fp32" or "fp16".
        size: bytes.
        modified: seconds since the epoch, by the store's clock.
    """

    digest: str
    name: str
    model: str
    runtime: str
    precision: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that a model needs on this machine's device.

    Attributes:
        built: whether it was built here just now; otherwise somebody had built it before.
        seconds: that it took to build, or to wait for and fetch.
    """

    digest: str
    name: str
    size: int
    built: bool
    seconds: float


def rows(store: Store) -> list[Row]:
    """Every engine in the store, newest first."""
    found = engines.entries(store)
    by_sha256 = {entry.sha256: entry for entry in found}
    named: dict[str, str] = {}
    return [_row(store, entry, by_sha256, named) for entry in found]


def remove(store: Store, settings: Settings, prefixes: Sequence[str], *, everything: bool = False) -> list[Row]:
    """Remove engines from the store and from this machine; returns those that were there.

    A worker that holds one goes on with it, and other machines keep their files until they need the room.

    Args:
        prefixes: beginnings of digests, each of one engine.
        everything: take all of them, and what was begun and never finished.

    Raises:
        NotFound: no engine has such a digest. BadInput: several have.
    """
    there = rows(store)
    chosen = there if everything else [_one(prefix, there) for prefix in dict.fromkeys(prefixes)]
    digests = [row.digest for row in chosen]
    engines.remove(store, engines.digests(store) if everything else digests)
    here = engines.folder_of(settings)
    with contextlib.suppress(OSError):
        for folder in [f for f in here.iterdir() if everything or f.name in digests]:
            shutil.rmtree(folder, ignore_errors=True)
    return list(dict.fromkeys(chosen))


def build(
    store: Store,
    settings: Settings,
    *,
    model: str,
    kind: str,
    params: Mapping[str, Any],
    runtime: str,
    precision: str,
    device: str = "auto",
    on_download: Callable[[str, int, int], None] = lambda name, done, total: None,
    on_progress: Callable[[str, float], None] = lambda name, seconds: None,
    pace: Pace = PACE,
) -> list[Built]:
    """Build what a runtime needs for a model, as the first worker of a job would, and put it into the store.

    Pins this process to the device. What somebody else is building is waited for.

    Args:
        device: "auto", "cpu", "gpu", or one GPU's number or UUID (workers.devices.find).
        on_progress: called every few seconds with a file's name and how long it takes already.

    Raises:
        BadInput: for anything the user got wrong, and where there is nothing to build.
        Misconfigured: a library is missing.
        NotRunnable: the runtime cannot run the model's network.
    """
    if runtime == runtimes.FALLBACK or not getattr(runtimes.get(runtime), "BUILDS", True):
        raise BadInput(f"the runtime {runtime} builds nothing for the fleet; take one that does: --runtime onnx")
    place = devices.find(device)[0]
    os.environ.update(place.environment)
    where = "cpu" if place.id == "cpu" else "cuda"
    spec = submit.resolve_model(
        store,
        settings,
        kind=kind,
        model=model,
        params=params,
        device=where,
        runtime=runtime,
        precision=precision,
        on_download=on_download,
    )
    return _build(store, settings, spec, where, on_progress, pace)


def _build(
    store: Store,
    settings: Settings,
    spec: JobSpec,
    device: str,
    on_progress: Callable[[str, float], None],
    pace: Pace,
) -> list[Built]:
    path = weights.fetch(store, spec.weights, spec.weights_sha256, settings.cache_folder) if spec.weights else None
    clock = _Clock(on_progress)
    noted = _Noted(engines.of_spec(store, settings, spec, path, clock.tell, pace), clock)

    def open_network(network: Network) -> Session:
        return runtimes.open_network(spec.runtime, network, device, spec.precision, noted)

    for library in models.missing(spec.family):
        raise Misconfigured(models.lacking(spec.family, library))
    family = models.family(spec.family)
    card = models.card_for(spec.model, spec.family, spec.kind, spec.weights_sha256)
    site = Site(device, open_network, spec.precision, spec.weights_sha256)
    try:
        family.load(card, card.params(**spec.params), path, site).close()
    except ImagemillError:
        raise
    except Exception as error:
        raise BadInput(f"model {spec.model!r} could not be loaded: {type(error).__name__}: {error}") from error
    if not noted.built:
        raise BadInput(f"the runtime {spec.runtime} needs nothing built for {spec.model}: it runs what is there")
    return noted.built


@dataclass
class _Clock:
    """Tells which file is being built, and for how long."""

    on_progress: Callable[[str, float], None]
    name: str = ""
    since: float = 0.0

    def start(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def tell(self) -> None:
        self.on_progress(self.name, self.seconds)


class _Noted:
    """Engines that end up in the store, and a note of each: `workers.runtimes.Files`."""

    def __init__(self, files: Engines, clock: _Clock) -> None:
        self.model, self._files, self._clock = files.model, files, clock
        self.built: list[Built] = []

    def export(self, network: Network, precision: str, path: Path) -> None:
        """As of the engines."""
        self._files.export(network, precision, path)

    def compile(self, network: Network, device: str, precision: str, path: Path) -> None:
        """As of the engines."""
        self._files.compile(network, device, precision, path)

    def here(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        """As of the engines, and not noted: nothing of it goes into the store."""
        return self._files.here(about, name, build)

    def get(self, about: Mapping[str, str], name: str, build: Callable[[Path], None]) -> Path:
        """As of the engines; raises ImagemillError too when the store does not take the file."""
        ran = []

        def noted(path: Path) -> None:
            build(path)
            ran.append(path)

        self._clock.start(name)
        path = self._files.get(about, name, noted)
        self._files.share(about, name)
        seconds = round(self._clock.seconds, 3)
        self.built.append(Built(engines.digest_of(about), name, path.stat().st_size, bool(ran), seconds))
        return path


def _row(store: Store, entry: Entry, by_sha256: Mapping[str, Entry], named: dict[str, str]) -> Row:
    about = entry.about
    # An engine made from an ONNX file names that file only, and the file's own entry names the model.
    source = by_sha256[about["onnx"]].about if about.get("onnx") in by_sha256 else about
    sha256 = source.get("weights", "")
    if sha256 and sha256 not in named:
        named[sha256] = weights.name_in(store, sha256)
    model = named.get(sha256) or source.get("family", _UNKNOWN)
    return Row(
        entry.digest,
        entry.name,
        model,
        about.get("file", _UNKNOWN),
        about.get("precision", _UNKNOWN),
        entry.size,
        entry.modified,
    )


def _one(prefix: str, there: Sequence[Row]) -> Row:
    """The one engine whose digest begins so."""
    found = [row for row in there if prefix and row.digest.startswith(prefix.lower())]
    if not found:
        raise NotFound(f"no engine has a digest that begins with {prefix!r}; list them with: imagemill engines ls")
    if len(found) > 1:
        some = ", ".join(row.digest[:12] for row in found[:3])
        raise BadInput(f"{len(found)} engines have a digest that begins with {prefix!r} ({some}, ...); give more of it")
    return found[0]
