"""The models this process holds: loaded once, least recently used out first."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.spec import JobSpec
from storage.errors import BadInput, ImagemillError, Misconfigured
from storage.objects import Store
from storage.settings import Settings
from workers import engines, lanes, models, runtimes, weights
from workers.batches import BatchSize, Fit
from workers.encodings import Keeper, StoredEncodings, Written
from workers.engines import Engines
from workers.models import Encodings, Model, Site
from workers.runtimes import Network, NotRunnable, Session

log = logging.getLogger("imagemill.worker")

_HELD = 2  # models; the next job's may be loaded while the last batches of this one run


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on the device, as a job uses it.

    Attributes:
        size: of the job's batches.
        runtime: that its networks run in; not the spec's when that one could not run them.
        networks: whether it has any that runtimes run.
        lanes: whether in all of them each core computes pictures of its own.
    """

    key: str
    model: Model
    size: BatchSize
    runtime: str = "torch"
    networks: bool = False
    lanes: bool = False


class Models:
    """Loads models for specs. Called from the feeding thread; closing waits until nobody uses the model.

    Args:
        moving: called every few seconds while a runtime builds what it needs, to show that the process lives.
        running: makes a context for each call of a network; it is told whether cores wait for each other in it.
        during: makes a context that tells people what goes on in it.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        device: str,
        moving: Callable[[], None] = lambda: None,
        running: Callable[[bool], AbstractContextManager[None]] = lambda barriers: nullcontext(),
        during: Callable[[str], AbstractContextManager[None]] = lambda doing: nullcontext(),
    ) -> None:
        self.store, self.settings, self.device = store, settings, device
        self._moving, self._running, self._during = moving, running, during
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Loaded] = OrderedDict()
        limit = settings.encodings_bytes
        self._encodings = Keeper(StoredEncodings(store, limit)) if limit else None
        self._fits: dict[str, Fit] = {}  # outlives the model: what did not fit will not fit after a reload

    def get(self, spec: JobSpec, in_use: Callable[[], set[str]] = set) -> Loaded:
        """The spec's model, loaded if need be. Raises ImagemillError with the remedy when it cannot be.

        Args:
            in_use: keys of models that batches still wait for; those are never closed.
        """
        with self._lock:
            held = self._held.get(spec.model_key)
            if held is None:
                self._make_room(in_use())
                held = self._load(spec, self._encodings)
                self._held[spec.model_key] = held
            self._held.move_to_end(spec.model_key)
            fit = self._fits.setdefault(spec.model_key, Fit())
            return dataclasses.replace(held, size=BatchSize(spec.batch, fit))

    def apart(self, spec: JobSpec, keeping: bool = False) -> Loaded:
        """The spec's model, loaded for the caller alone, who closes it. Raises as `get`.

        It looks up no encodings, so that it can be timed. No other thread may compute meanwhile.

        Args:
            keeping: the encodings that it makes, for others.
        """
        kept = Written(self._encodings) if keeping and self._encodings is not None else None
        return self._load(spec, kept, alone=True)

    def close(self) -> None:
        """Free everything."""
        with self._lock:
            for loaded in self._held.values():
                loaded.model.close()
            self._held.clear()
        if self._encodings is not None:
            self._encodings.close()

    def _make_room(self, in_use: set[str]) -> None:
        for key in [k for k in self._held if k not in in_use]:
            if len(self._held) < _HELD:
                return
            self._held.pop(key).model.close()

    def _load(self, spec: JobSpec, encodings: Encodings | None, alone: bool = False) -> Loaded:
        log.info("loading %s (%s, %s)", spec.model, spec.runtime, spec.precision)
        family = models.family(spec.family)
        card = models.card_for(spec.model, spec.family, spec.kind, spec.weights_sha256)
        path = None
        if spec.weights:
            path = weights.fetch(self.store, spec.weights, spec.weights_sha256, self.settings.cache_folder)
        opener = _Opener(spec, self.device, self._engines(spec, path, alone), self._running)
        site = Site(self.device, opener.open, spec.precision, spec.weights_sha256, encodings, spec.runtime)
        try:
            with self._during(f"loading {spec.model} for {spec.runtime}"):
                model: Model = family.load(card, card.params(**spec.params), path, site)
        except ImagemillError:
            raise
        except ImportError as error:
            raise Misconfigured(models.lacking(spec.family, error.name or str(error))) from error
        except Exception as error:
            raise BadInput(f"model {spec.model!r} could not be loaded: {type(error).__name__}: {error}") from error
        return Loaded(spec.model_key, model, BatchSize(spec.batch), opener.used(), opener.any, opener.lanes)

    def _engines(self, spec: JobSpec, path: Path | None, alone: bool) -> Engines:
        return engines.of_spec(self.store, self.settings, spec, path, self._moving, alone=alone)


@dataclass
class _Opener:
    """Opens a model's networks in its job's runtime, or in the one that can run them, and remembers in which."""

    spec: JobSpec
    device: str
    engines: Engines
    running: Callable[[bool], AbstractContextManager[None]]
    _used: set[str] = field(default_factory=set)
    _barriers: set[bool] = field(default_factory=set)  # of each network

    def open(self, network: Network) -> Session:
        """A session in the job's runtime, or else in torch. Raises BadInput or Misconfigured where that is no help."""
        wanted = self.spec.runtime
        if network.onnx is not None and wanted == runtimes.FALLBACK:
            wanted = "onnx"  # torch has no module for a network that comes as a file
        try:
            session = self._open_in(wanted, network)
        except NotRunnable as error:
            if wanted == runtimes.FALLBACK or network.onnx is not None or network.engine is not None:
                raise
            log.warning("%s runs in %s instead of %s: %s", self.spec.model, runtimes.FALLBACK, wanted, error)
            session = self._open_in(runtimes.FALLBACK, network)
        return session

    def _open_in(self, name: str, network: Network) -> Session:
        session = runtimes.open_network(name, network, self.device, self.spec.precision, self.engines)
        self._used.add(name)
        barriers = not lanes.alone(session)
        self._barriers.add(barriers)

        def run(**inputs: Any) -> dict[str, Any]:
            with self.running(barriers):
                return session(**inputs)

        return run

    @property
    def any(self) -> bool:
        """Whether the model has opened a network."""
        return bool(self._used)

    @property
    def lanes(self) -> bool:
        """Whether each core computes pictures of its own in all networks."""
        return self._barriers == {False}

    def used(self) -> str:
        """The runtimes of all networks that were opened, the job's own for a model that opens none."""
        return "+".join(sorted(self._used)) or self.spec.runtime
