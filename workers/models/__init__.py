"""The model families: one file a family, listed from this folder, imported when one of its models is asked for.

A family's file defines, with no heavy import at module level,

    CARDS: tuple[Card, ...]                     the models known by name, at least one for each kind it yields
    REQUIRES: tuple[str, ...]                   import names of the libraries that `load` needs
    EXTRA: str                                  the extra of the package that brings them, where it is not "worker"
    RUNTIME: str                                the one runtime that runs its networks, where others cannot
    claims(path) -> bool                        whether a local weights file or folder is of this family
    describe(path) -> tuple[str, ...]           the class names in the weights, read without running them
    load(card, params, weights, site) -> Model  `card.kind` says which of its kinds is wanted

and may define

    check(card, params, weights)                raises BadInput for what `load` would refuse, as far as that can be told
                                                when a job is made: from the weights' own description, or with libraries
                                                that happen to be installed
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from storage.errors import BadInput
from workers.runtimes import Network, Session

Image = npt.NDArray[np.uint8]  # (height, width, 3) RGB, upright


@dataclass(frozen=True, slots=True)
class Card:
    """What is known of a model before anything heavy is imported.

    Attributes:
        name: what the user types after --model; unique among the models of one kind.
        family: the file in this folder.
        kind: the result kind it yields, a file of storage/results.
        params: class of a frozen dataclass; its fields are the parameters, its defaults the defaults.
        weights: where the weights come from: "" for none, an https:// URL of a file, or hf:owner/name[@revision].
        sha256: of the weights, "" until resolved.
        memory_gb: device memory it needs with a batch of one.
        licence: SPDX name.
        shard_size: items in a shard where the user does not say; fewer for a model that takes seconds for each, since a
            shard is what workers share out and what a crash costs.
        needs_image: whether it can do nothing with an item that has no image, such as a prompt.
    """

    name: str
    family: str
    kind: str
    params: type
    weights: str = ""
    sha256: str = ""
    memory_gb: float = 1.0
    licence: str = ""
    shard_size: int = 256
    needs_image: bool = True


@dataclass(slots=True)  # not frozen, as storage.shardfile.Outcome is not
class Item:
    """What a model is told of an item besides its pixels. Never changed.

    Attributes:
        key: its name in the dataset.
        uri, fingerprint: of the image, "" where there is none; together they name its content.
        data: what the job says of this item alone (jobs.sources.ImageRef.data), {} for nothing.
    """

    key: str
    uri: str = ""
    fingerprint: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


class Encodings(Protocol):
    """What costly encoders have made of images, kept for the whole fleet; may forget anything at any time."""

    def get(self, name: str) -> bytes | None: ...
    def recent(self, name: str) -> bytes | None: ...  # what this process has put lately; costs nothing to ask
    def put(self, name: str, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Site:
    """Where a model is loaded.

    Attributes:
        device: "cpu" or "cuda" (a worker sees one GPU only).
        open_network: gives a runtime's Session for a Network, on that device in the job's precision.
        precision: "fp32", "bf16" or "fp16", for families that keep a loop of their own.
        weights_sha256: of the weights, to name what is made with them.
        encodings: where encoded images are kept, or None.
        runtime: the job's, to name what is made with it.
    """

    device: str
    open_network: Callable[[Network], Session]
    precision: str = "fp32"
    weights_sha256: str = ""
    encodings: Encodings | None = None
    runtime: str = "torch"


@dataclass(slots=True)  # not frozen, as storage.shardfile.Outcome is not
class Prepared:
    """One image made ready for the device by `Model.prepare`. Never changed.

    Attributes:
        group: images of one batch share it (the padded shape, for instance).
        data: what `infer` stacks: usually a (channels, height, width) array.
        nbytes: host memory it holds, counted against the worker's budget.
        meta: what `infer` needs to map results back to the original image.
    """

    group: Hashable
    data: Any
    nbytes: int
    meta: Any = None


class Model(Protocol):
    """A loaded model on one device."""

    def prepare(self, image: Image | None, item: Item) -> Prepared:
        """One upright RGB image -> ready for the device. Called from several threads. May raise ItemFailed.

        Args:
            image: None for an item without an image.
        """
        ...

    def infer(self, batch: Sequence[Prepared]) -> list[Any]:
        """Prepared images of one group -> one result each, same length, same order. Called from one thread.

        An ItemFailed in place of a result fails that image only; it is put into the list, not raised.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model that a job can be run with in a year: a card with its weights pinned, parameters filled and checked."""

    card: Card
    params: Mapping[str, Any]
    weights_path: Path | None
    labels: tuple[str, ...]


def families() -> list[str]:
    """The families there are, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family(name: str) -> ModuleType:
    """Import one family's file; its heavy libraries come only with `load`."""
    if name not in families():
        raise BadInput(f"unknown model family {name!r}; known: {', '.join(families())}")
    return importlib.import_module(f"{__name__}.{name}")


def cards() -> list[Card]:
    """Every model known by name."""
    return [card for name in families() for card in family(name).CARDS]


def fill(card: Card, given: Mapping[str, Any]) -> dict[str, Any]:
    """The card's parameters with the given ones in place. Raises BadInput for an unknown name or a wrong value."""
    known = {f.name for f in dataclasses.fields(card.params)}
    unknown = sorted(set(given) - known)
    if unknown:
        has = ", ".join(sorted(known)) or "none"
        raise BadInput(f"model {card.name!r} has no parameter {unknown[0]!r}; it has: {has}")
    try:
        return dataclasses.asdict(card.params(**given))
    except (TypeError, ValueError) as error:
        raise BadInput(f"model {card.name!r}: {error}") from error


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint ', did you mean ...?' for a misspelt name, or ''."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def card_for(name: str, family_name: str, kind: str, sha256: str = "") -> Card:
    """The card of a stored spec's model: the family's own for that kind, under the name the user gave."""
    cards = [card for card in family(family_name).CARDS if card.kind == kind]
    known: Card = next((card for card in cards if card.name == name), cards[0])  # a file's name is no card's
    return dataclasses.replace(known, name=name, sha256=sha256)


def missing(family_name: str) -> list[str]:
    """The libraries that a family needs and this machine lacks, by their import names."""
    return [name for name in family(family_name).REQUIRES if importlib.util.find_spec(name) is None]


def extra(family_name: str) -> str:
    """The extra of the package that brings what a family needs."""
    return str(getattr(family(family_name), "EXTRA", "worker"))


def kind_of(name: str) -> str:
    """The one kind that a named model or a weights file yields. Raises BadInput where there are several or none."""
    path = Path(name).expanduser()
    found = _named(name) or [c for f in families() if path.exists() and family(f).claims(path) for c in family(f).CARDS]
    kinds = sorted({card.kind for card in found})
    if len(kinds) > 1:
        raise BadInput(f"model {name!r} can yield {' and '.join(kinds)}; say which with --kind")
    return kinds[0] if kinds else _card_named(name, "").kind


def lacking(family_name: str, library: str) -> str:
    """What to tell a user whose machine lacks a library that a family needs."""
    remedy = f"pip install 'imagemill[{extra(family_name)}]'"
    return f"the model family {family_name} needs {library}; install it with: {remedy}"


def resolve(name: str, kind: str, given: Mapping[str, Any], fetch: Callable[[Card], Path]) -> Resolved:
    """The model a user named, its weights found and its parameters filled and checked.

    Args:
        name: a path to a weights file or folder, or the name of a card.
        kind: the result kind that is wanted.
        given: the parameters the user set, by name.
        fetch: card -> local weights file or folder, downloading it if need be.

    Raises:
        BadInput: no such model or file, no such parameter, a wrong value.
    """
    path = Path(name).expanduser()
    if path.is_file() or (name and path.is_dir() and ("/" in name or not _named(name))):
        card = _card_of_file(path, kind)
    elif (path.suffix or "/" in name) and not any(card.weights for card in _named(name)):
        # A card without weights of its own stands for files that the user has, such as "detector.onnx".
        raise BadInput(f"there is no model file {name!r}; check the path, or list the known models: imagemill models")
    else:
        card = _card_named(name, kind)
        path = fetch(card) if card.weights else Path()
    module = family(card.family)
    has_weights = bool(path.name)
    labels = tuple(module.describe(path)) if has_weights else tuple(getattr(module, "LABELS", ()))
    params = fill(card, given)
    check_labels(params, labels)
    if hasattr(module, "check"):
        module.check(card, card.params(**params), path if has_weights else None)
    return Resolved(card, params, path if has_weights else None, labels)


def check_labels(params: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Raise BadInput when `classes` names a label the model does not have."""
    for wanted in params.get("classes", ()):
        if labels and wanted not in labels:
            shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
            raise BadInput(f"the model has no label {wanted!r}{nearest(wanted, labels)}; it has: {shown}")


COMMANDS = {
    "detections": "annotate",
    "masks": "mask",
    "embedding": "embed",
    "labels": "classify",
    "image": "generate or transform",
}


def _named(name: str) -> list[Card]:
    return [card for card in cards() if card.name == name]


def _card_named(name: str, kind: str) -> Card:
    found = _named(name)
    if not found:
        hint = nearest(name, [card.name for card in cards()])
        raise BadInput(f"unknown model {name!r}{hint}; list them with: imagemill models, or give a weights file")
    return _of_kind(found, kind)


def _card_of_file(path: Path, kind: str) -> Card:
    for name in families():
        module = family(name)
        if module.claims(path):
            card = _of_kind([dataclasses.replace(card, name=path.stem) for card in module.CARDS], kind)
            return dataclasses.replace(card, weights=str(path), sha256="")
    raise BadInput(f"{str(path)!r} is no checkpoint of a known family; known: {', '.join(families())}")


def _of_kind(found: Sequence[Card], kind: str) -> Card:
    """The first card of a kind. Raises BadInput, naming the command that takes the model."""
    for card in found:
        if card.kind == kind:
            return card
    kinds = sorted({card.kind for card in found})
    use = " or ".join(f"imagemill {COMMANDS.get(k, k)}" for k in kinds)
    raise BadInput(
        f"model {found[0].name!r} is of the family {found[0].family}, which yields {' and '.join(kinds)}, "
        f"but this command needs {kind}; use: {use}"
    )
