"""The models this process holds: loaded once, least recently used out first."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.spec import JobSpec
from storage.errors import BadInput, ImagemillError, Misconfigured
from storage.objects import Store
from storage.settings import Settings
from workers import models, runtimes, weights
from workers.batches import BatchSize
from workers.encodings import StoredEncodings
from workers.models import Model, Site

log = logging.getLogger("imagemill.worker")

_HELD = 2  # models; the next job's may be loaded while the last batches of this one run


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on the device, and how many images it takes at once there."""

    key: str
    model: Model
    size: BatchSize


class Models:
    """Loads models for specs. Called from the feeding thread; closing waits until nobody uses the model."""

    def __init__(self, store: Store, settings: Settings, device: str) -> None:
        self.store, self.settings, self.device = store, settings, device
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Loaded] = OrderedDict()
        self._encodings = StoredEncodings(store, settings.encodings_bytes)
        self._sizes: dict[str, BatchSize] = {}  # outlives the model: what did not fit will not fit after a reload

    def get(self, spec: JobSpec, in_use: Callable[[], set[str]] = set) -> Loaded:
        """The spec's model, loaded if need be. Raises ImagemillError with the remedy when it cannot be.

        Args:
            in_use: keys of models that batches still wait for; those are never closed.
        """
        with self._lock:
            held = self._held.get(spec.model_key)
            if held is None:
                self._make_room(in_use())
                held = Loaded(spec.model_key, self._load(spec), self._size(spec))
                self._held[spec.model_key] = held
            self._held.move_to_end(spec.model_key)
            held.size.asked = spec.batch
            return held

    def close(self) -> None:
        """Free everything."""
        with self._lock:
            for loaded in self._held.values():
                loaded.model.close()
            self._held.clear()

    def _size(self, spec: JobSpec) -> BatchSize:
        return self._sizes.setdefault(spec.model_key, BatchSize(spec.batch))

    def _make_room(self, in_use: set[str]) -> None:
        for key in [k for k in self._held if k not in in_use]:
            if len(self._held) < _HELD:
                return
            self._held.pop(key).model.close()

    def _load(self, spec: JobSpec) -> Model:
        log.info("loading %s (%s, %s)", spec.model, spec.runtime, spec.precision)
        family = models.family(spec.family)
        card = models.card_for(spec.model, spec.family, spec.kind, spec.weights_sha256)
        path = None
        if spec.weights:
            path = weights.fetch(self.store, spec.weights, spec.weights_sha256, self.settings.cache_folder)
        runtime = runtimes.get(spec.runtime)

        def open_network(network: runtimes.Network) -> Any:
            return runtime.open(network, self.device, spec.precision)

        site = Site(self.device, open_network, spec.precision, spec.weights_sha256, self._encodings)
        try:
            model: Model = family.load(card, card.params(**spec.params), path, site)
        except ImagemillError:
            raise
        except ImportError as error:
            raise Misconfigured(models.lacking(spec.family, error.name or str(error))) from error
        except Exception as error:
            raise BadInput(f"model {spec.model!r} could not be loaded: {type(error).__name__}: {error}") from error
        return model
