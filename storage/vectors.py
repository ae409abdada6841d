"""Nearest neighbours over stored embeddings: by brute force, block by block, in memory that does not grow with them.

Takes vectors, never an image: what turns an image into a vector is a model, and models are not known here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import sqlalchemy as sa

from storage import index, shardfile
from storage.database import Database
from storage.errors import BadInput, Unavailable
from storage.objects import Store
from storage.results import embedding
from storage.tables import recipe

KIND = "embedding"
METRICS = ("cosine", "dot", "l2")

_CELLS = 1 << 22  # products computed at once: 16 MB in float32
_ROWS = 4096  # vectors turned into float32 at once, at most
_TEMPERATURE = 0.07  # of a neighbour's vote: Wu et al., arXiv 1805.01978, and DINO's eval_knn.py

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A stored embedding near a query.

    Attributes:
        key, uri: the image it stands for.
        score: the cosine or the dot product, higher is nearer; for "l2" the Euclidean distance, lower is nearer.
    """

    key: str
    uri: str
    score: float


class _Block(NamedTuple):
    """Some embeddings of a recipe: n keys, n uris and vectors (n, d) as they are stored."""

    keys: npt.NDArray[np.object_]
    uris: npt.NDArray[np.object_]
    vectors: npt.NDArray[Any]


def matrix(db: Database, store: Store, recipe_id: int) -> Iterator[tuple[list[str], npt.NDArray[Any]]]:
    """The current embeddings of a recipe, one block a result object: (n keys, (n, d) float32 or float16).

    Raises:
        BadInput: the recipe holds no embeddings.
        Unavailable: an object's bytes are not those that were written.
    """
    for block in _blocks(db, store, recipe_id):
        yield block.keys.tolist(), block.vectors


def nearest(
    db: Database, store: Store, recipe_id: int, queries: npt.ArrayLike, k: int = 10, metric: str = "cosine"
) -> list[list[Neighbour]]:
    """For each query the k stored embeddings nearest to it, nearest first, equal ones in the order of their keys.

    Args:
        queries: (d,) for one, or (q, d); finite numbers. In float32 inside, for "l2" in float64.
        metric: "cosine", "dot" or "l2". The cosine with a vector of zeros is 0.

    Raises:
        BadInput: a query of another dimension or with NaN, k below 1, an unknown metric, no embeddings to look in.
    """
    if metric not in METRICS:
        raise BadInput(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    _at_least_one(k)
    asked = _queries(queries)
    dtype = np.float64 if metric == "l2" else np.float32
    asked = _unit(asked.astype(dtype)) if metric == "cosine" else asked.astype(dtype)
    best = [_Best(k) for _ in asked]
    for block in _parts(_blocks(db, store, recipe_id), len(asked)):
        _check_dim(asked, block, recipe_id)
        closeness = _closeness(asked, block.vectors.astype(dtype), metric)
        for mine, scores in zip(best, closeness, strict=True):
            mine.add(scores, block)
    return [mine.neighbours(distances=metric == "l2") for mine in best]


def knn_labels(
    db: Database, store: Store, recipe_id: int, examples: Mapping[str, str], k: int = 20
) -> Iterator[tuple[str, str, float]]:
    """A label for every embedded image, from the k labelled images most like it: (key, label, score).

    Each neighbour's vote weighs exp(cosine / 0.07), as in the k-NN evaluation of DINO (facebookresearch/dino,
    eval_knn.py); the score is the winner's share of all k votes, in 0..1. An example is its own nearest neighbour.

    Args:
        examples: key of an embedded image -> its label.
        k: neighbours that vote; all examples, where there are fewer. 20 is DINO's choice.

    Raises:
        BadInput: no examples, an example without an embedding, k below 1, or no embeddings.
    """
    _at_least_one(k)
    vectors, given = _examples(db, store, recipe_id, examples)
    names = sorted(set(given))
    class_of = np.array([names.index(label) for label in given])
    for block in _parts(_blocks(db, store, recipe_id), len(given)):
        cosines = _unit(block.vectors.astype(np.float32)) @ vectors.T
        votes = _votes(cosines, class_of, len(names), min(k, len(given)))
        winners, shares = votes.argmax(1), votes.max(1) / votes.sum(1)
        for key, winner, share in zip(block.keys, winners.tolist(), shares.tolist(), strict=True):
            yield key, names[winner], share


def _votes(cosines: Floats, class_of: npt.NDArray[np.int_], classes: int, k: int) -> npt.NDArray[np.float64]:
    """(n, examples) cosines -> (n, classes) sums of the k nearest examples' votes."""
    near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    weights = np.exp(np.take_along_axis(cosines, near, 1).astype(np.float64) / _TEMPERATURE)
    votes = np.zeros((len(cosines), classes))
    np.add.at(votes, (np.arange(len(cosines))[:, None], class_of[near]), weights)
    return votes


def _examples(
    db: Database, store: Store, recipe_id: int, examples: Mapping[str, str]
) -> tuple[npt.NDArray[np.float32], list[str]]:
    """The examples' unit vectors (n, d) and n labels, in the order of their keys."""
    if not examples:
        raise BadInput("k-NN labels need examples; give at least one embedded image with its label")
    found: dict[str, npt.NDArray[Any]] = {}
    for block in _blocks(db, store, recipe_id):
        found |= {key: row.copy() for key, row in zip(block.keys, block.vectors, strict=True) if key in examples}
    if absent := sorted(examples.keys() - found.keys()):
        raise BadInput(f"{len(absent)} of {len(examples)} examples have no embedding, the first is {absent[0]!r}")
    keys = sorted(found)
    return _unit(np.stack([found[key] for key in keys]).astype(np.float32)), [examples[key] for key in keys]


# ------------------------------------------------------------------------------------------------ the best so far


class _Best:
    """The k nearest to one query among the blocks seen so far."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._rows: list[tuple[float, str, str]] = []  # (-closeness, key, uri), nearest first

    def add(self, scores: Floats, block: _Block) -> None:
        """Look at one more block.

        Args:
            scores: (n,) higher is nearer.
        """
        least = -self._rows[-1][0] if len(self._rows) == self._k else -np.inf
        if len(scores) > self._k:
            least = max(least, float(np.partition(scores, -self._k)[-self._k]))
        # All that tie with the last one come along, so that the keys decide among them, not the order of blocks.
        for i in np.flatnonzero(scores >= least).tolist():
            self._rows.append((-float(scores[i]), block.keys[i], block.uris[i]))
        self._rows = sorted(self._rows)[: self._k]

    def neighbours(self, distances: bool) -> list[Neighbour]:
        return [Neighbour(key, uri, score if distances else -score) for score, key, uri in self._rows]


def _closeness(queries: Floats, vectors: Floats, metric: str) -> Floats:
    """(q, d) and (n, d) -> (q, n), higher is nearer; for "l2" the negated distance."""
    if metric == "cosine":
        vectors = _unit(vectors)
    products: Floats = queries @ vectors.T
    if metric != "l2":
        return products
    squares = (queries**2).sum(1)[:, None] + (vectors**2).sum(1)[None] - 2 * products
    distances: Floats = -np.sqrt(np.maximum(squares, 0))
    return distances


def _unit(vectors: Floats) -> Any:
    """Rows of length one; rows of zeros stay as they are."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


# ------------------------------------------------------------------------------------------------ what was asked


def _at_least_one(k: int) -> None:
    if k < 1:
        raise BadInput(f"k must be at least 1, but got {k}")


def _queries(queries: npt.ArrayLike) -> npt.NDArray[Any]:
    """(q, d) from (d,) or (q, d)."""
    given = np.asarray(queries)
    if given.ndim not in (1, 2) or not given.size or given.dtype.kind not in "fiu":
        raise BadInput(f"expected a query of d numbers or a table of q x d, but got {given.dtype} of {given.shape}")
    if not np.isfinite(given).all():
        raise BadInput("expected a query of finite numbers, but it holds NaN or infinity; embed the image in fp32")
    return np.atleast_2d(given)


def _check_dim(queries: Floats, block: _Block, recipe_id: int) -> None:
    asked, stored = queries.shape[1], block.vectors.shape[1]
    if asked != stored:
        raise BadInput(
            f"the query has {asked} numbers, but the embeddings of recipe {recipe_id} have {stored}; "
            "embed the query with the same model and parameters"
        )


# ------------------------------------------------------------------------------------------------ reading


def _parts(blocks: Iterator[_Block], width: int) -> Iterator[_Block]:
    """The blocks in pieces so small that piece x width numbers are little memory."""
    rows = max(1, min(_ROWS, _CELLS // width))
    for block in blocks:
        for start in range(0, len(block.keys), rows):
            yield _Block(*(column[start : start + rows] for column in block))


def _blocks(db: Database, store: Store, recipe_id: int) -> Iterator[_Block]:
    _check_recipe(db, recipe_id)
    empty, dim = True, None
    for found, live in index.snapshot(db, recipe_id):
        block = _read(store, found, live)
        if len(block.keys):
            empty, dim = False, dim or block.vectors.shape[1]
            if block.vectors.shape[1] != dim:
                raise Unavailable(f"object {found.key!r} has vectors of {block.vectors.shape[1]}, not {dim} numbers")
            yield block
    if empty:
        raise BadInput(f"recipe {recipe_id} has no embeddings yet; wait for its job, or see why its images failed")


def _check_recipe(db: Database, recipe_id: int) -> None:
    rows = db.query(sa.select(recipe.c.kind).where(recipe.c.id == recipe_id))
    if not rows:
        raise BadInput(f"there is no recipe {recipe_id}")
    if rows[0].kind != KIND:
        raise BadInput(f"recipe {recipe_id} holds {rows[0].kind}, not embeddings; run imagemill embed on its dataset")


def _read(store: Store, found: index.ShardObject, live: set[int]) -> _Block:
    """The live embeddings of one result object, column by column: rows made into objects would take ten times as long.

    Failed items, whose vector is null, are left out.
    """
    data = store.get(found.key)
    if found.sha256 and hashlib.sha256(data).hexdigest() != found.sha256:
        raise Unavailable(f"object {found.key!r} is not what was written: its sha256 differs from the index")
    try:
        table = shardfile.columns_of(data, ["position", "key", "uri", "ok", *embedding.SCHEMA.names])
        chosen = np.isin(table.column("position").to_numpy(), np.fromiter(live, np.int64, len(live)))
        table = table.filter(pa.array(chosen & table.column("ok").to_numpy()))
        vectors = embedding.matrix(table)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Unavailable(f"object {found.key!r} is no table of embeddings: {error}") from None
    return _Block(_texts(table, "key"), _texts(table, "uri"), vectors)


def _texts(table: pa.Table, column: str) -> npt.NDArray[np.object_]:
    return np.array(table.column(column).to_pylist(), object)
