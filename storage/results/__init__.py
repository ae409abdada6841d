"""The result kinds: one file a kind, listed from this folder, imported when its name is asked for.

A kind's file defines

    Result                    a dataclass of arrays, never changed; an empty result is a value, never None
    SCHEMA: pa.Schema         its columns in a shard's Parquet object
    columns(results)          list[Result | None] -> dict of arrow arrays, same length and order; None is a failed item
    results(table)            the inverse: pa.Table -> list[Result | None]
    summary(result)           -> Summary, what the SQL index keeps of it
    agreement(expected, found, least)  -> how far two results of one image agree, 0..1, None when there is nothing to
                              compare; `least` is the score at which the job cuts off, 0 for none. A kind without it is
                              computed as asked and never tuned

Results that are files have the fields of storage.shardfile.HasBlob besides, and their bytes lie in blobs.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from storage.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(slots=True)  # not frozen, which costs more than all else of an item without objects
class Summary:
    """What the index keeps of one result: enough to answer "which images have a dog above 0.6".

    Attributes:
        count: how many objects, 0 for an image in which nothing was found.
        top_score: highest score, or None where the kind has no scores or nothing was found.
        labels: label -> (how many, highest score).
    """

    count: int
    top_score: float | None = None
    labels: Mapping[str, tuple[int, float]] = field(default_factory=dict)


class Kind(Protocol):
    """What a result kind's module offers (see the module docstring)."""

    SCHEMA: pa.Schema

    def columns(self, results: Sequence[Any]) -> dict[str, pa.Array]: ...
    def results(self, table: pa.Table) -> list[Any]: ...
    def summary(self, result: Any) -> Summary: ...


def names() -> list[str]:
    """The kinds there are, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@functools.cache
def get(kind: str) -> Kind:
    """Import one kind. Raises BadInput, naming the known ones."""
    if kind not in names():
        raise BadInput(f"unknown result kind {kind!r}; known kinds: {', '.join(names())}")
    return cast(Kind, importlib.import_module(f"{__name__}.{kind}"))
