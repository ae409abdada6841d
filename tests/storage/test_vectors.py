"""Neighbours found block by block are those that one look at everything finds; wrong questions get one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import vectors
from storage.errors import BadInput, Unavailable
from storage.objects import open_store
from storage.results import embedding
from tests.storage.exporters.support import Mill, detected, failed, found, shards

DIM = 16
KEYS = [f"{i:03d}.jpg" for i in range(100)]

Stored = Callable[..., int]


def points(count: int = 100, dim: int = DIM, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


@pytest.fixture
def mill(tmp_path: Path) -> Mill:
    return Mill(f"sqlite:///{tmp_path}/index.db", open_store(f"file://{tmp_path}/store"))


@pytest.fixture
def stored(mill: Mill) -> Stored:
    """Makes a recipe of embeddings in shards of a size; gives its id."""

    def make(rows: np.ndarray, size: int = 30, keys: list[str] = KEYS, **options: Any) -> int:
        items = [found(key, embedding.Result(row)) for key, row in zip(keys, rows, strict=False)]
        return mill.run(shards(items, size), kind="embedding", **options).recipe_id

    return make


def by_hand(rows: np.ndarray, query: np.ndarray, metric: str) -> np.ndarray:
    """The scores of every row, in float64."""
    rows, query = rows.astype(np.float64), query.astype(np.float64)
    if metric == "l2":
        return np.array([np.sqrt(((row - query) ** 2).sum()) for row in rows])
    dots = np.array([float(row @ query) for row in rows])
    if metric == "dot":
        return dots
    return dots / np.array([np.sqrt(row @ row) for row in rows]) / np.sqrt(query @ query)


@pytest.mark.parametrize("size", [9, 100])
@pytest.mark.parametrize("metric", vectors.METRICS)
def test_the_nearest_are_those_of_one_look_at_everything(mill: Mill, stored: Stored, metric: str, size: int) -> None:
    rows, queries = points(), points(3, seed=1)
    recipe_id = stored(rows, size)
    answers = vectors.nearest(mill.db, mill.store, recipe_id, queries, k=9, metric=metric)
    assert len(answers) == 3
    for query, answer in zip(queries, answers, strict=True):
        scores = by_hand(rows, query, metric)
        order = np.argsort(scores if metric == "l2" else -scores)[:9]
        assert [near.key for near in answer] == [KEYS[i] for i in order]
        assert np.allclose([near.score for near in answer], scores[order], rtol=1e-5)
        assert answer[0].uri == f"file:///data/pictures/{answer[0].key}"


def test_small_pieces_give_the_same(mill: Mill, stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_id, queries = stored(points()), points(5, seed=1)
    whole = vectors.nearest(mill.db, mill.store, recipe_id, queries)
    monkeypatch.setattr(vectors, "_CELLS", 20)
    pieces = vectors.nearest(mill.db, mill.store, recipe_id, queries)
    assert [[n.key for n in answer] for answer in pieces] == [[n.key for n in answer] for answer in whole]


@pytest.mark.parametrize("metric", vectors.METRICS)
def test_an_image_is_nearest_to_itself(mill: Mill, stored: Stored, metric: str) -> None:
    rows = points() * 100
    recipe_id = stored(rows / np.linalg.norm(rows, axis=1, keepdims=True) * 1000)
    query = rows[42] / np.linalg.norm(rows[42]) * 1000
    ((best, *_),) = vectors.nearest(mill.db, mill.store, recipe_id, query, metric=metric)
    assert best.key == KEYS[42]
    assert best.score == pytest.approx({"cosine": 1, "dot": 1e6, "l2": 0}[metric], abs=2e-3, rel=1e-5)


def test_small_distances_between_long_vectors(mill: Mill, stored: Stored) -> None:
    """Their squares, in float32, differ by more than the distances."""
    start = points(1)[0] * 1000
    rows = np.stack([start] * 20)
    rows[:, 0] += np.arange(20, dtype=np.float32)[::-1] / 64
    (answer,) = vectors.nearest(mill.db, mill.store, stored(rows), start, k=20, metric="l2")
    assert [near.key for near in answer] == KEYS[19::-1]
    expected = np.abs(rows[::-1, 0].astype(np.float64) - start[0])
    assert np.allclose([near.score for near in answer], expected, atol=1e-4)


def test_float16_is_compared_in_float32(mill: Mill, stored: Stored) -> None:
    """The squares of such numbers, summed in float16, would be infinite."""
    rows = (points() * 200).astype(np.float16)
    recipe_id = stored(rows)
    ((best, second),) = vectors.nearest(mill.db, mill.store, recipe_id, rows[7], k=2)
    scores = np.sort(by_hand(rows, rows[7], "cosine"))[::-1]
    assert best.key == KEYS[7]
    assert [best.score, second.score] == pytest.approx(scores[:2].tolist(), abs=1e-6)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_equal_ones_come_in_the_order_of_their_keys(mill: Mill, stored: Stored, size: int) -> None:
    rows = np.ones((10, DIM), np.float32)
    recipe_id = stored(rows, size, keys=KEYS[9::-1])
    (answer,) = vectors.nearest(mill.db, mill.store, recipe_id, rows[0], k=4)
    assert [near.key for near in answer] == KEYS[:4]


def test_more_than_there_are(mill: Mill, stored: Stored) -> None:
    (answer,) = vectors.nearest(mill.db, mill.store, stored(points(5)), points(1), k=50)
    assert sorted(near.key for near in answer) == KEYS[:5]


def test_a_vector_of_zeros_is_like_nothing(mill: Mill, stored: Stored) -> None:
    rows = points(3)
    rows[1] = 0
    (answer,) = vectors.nearest(mill.db, mill.store, stored(rows), rows[0], k=3)
    assert next(near.score for near in answer if near.key == KEYS[1]) == 0
    (answer,) = vectors.nearest(mill.db, mill.store, 1, np.zeros(DIM), k=3)
    assert [near.score for near in answer] == [0, 0, 0]


def test_only_what_is_current_is_found(database_url: str, tmp_path: Path) -> None:
    """Failed, pruned and superseded items are not."""
    mill = Mill(database_url, open_store(f"file://{tmp_path}/store"))
    rows = points(5)
    items = [found(key, embedding.Result(row)) for key, row in zip("abcd", rows, strict=False)]
    job = mill.run([*shards(items, 4), *shards([failed("e")], 1)], kind="embedding")
    mill.run(shards([found("b", embedding.Result(rows[4]))], 1), kind="embedding", replaces=1)
    mill.prune(job, ["c"])
    blocks = list(vectors.matrix(mill.db, mill.store, job.recipe_id))
    stored = {key: row for keys, block in blocks for key, row in zip(keys, block, strict=True)}
    assert sorted(stored) == ["a", "b", "d"]
    assert sum(len(keys) for keys, _ in blocks) == 3
    assert np.array_equal(stored["b"], rows[4])
    assert np.array_equal(stored["d"], rows[3])
    (answer,) = vectors.nearest(mill.db, mill.store, job.recipe_id, rows[2], k=9)
    assert sorted(near.key for near in answer) == ["a", "b", "d"]


@pytest.mark.parametrize("dtype", embedding.DTYPES)
def test_the_matrix_is_what_was_stored(mill: Mill, stored: Stored, dtype: str) -> None:
    rows = points().astype(dtype)
    blocks = list(vectors.matrix(mill.db, mill.store, stored(rows, 30)))
    assert [len(keys) for keys, _ in blocks] == [30, 30, 30, 10]
    assert [key for keys, _ in blocks for key in keys] == KEYS
    assert np.array_equal(np.concatenate([block for _, block in blocks]), rows)
    assert all(block.dtype == dtype for _, block in blocks)


class TestWrongQuestions:
    """One line says what was expected."""

    @pytest.mark.parametrize(
        ("query", "options", "message"),
        [
            (np.ones(DIM + 1), {}, f"has {DIM + 1} numbers, but the embeddings of recipe 1 have {DIM}"),
            (np.array([1.0] * 15 + [np.nan]), {}, "NaN or infinity"),
            (np.array([[np.inf] * DIM]), {}, "NaN or infinity"),
            (np.ones((1, 1, DIM)), {}, "expected a query of d numbers"),
            (np.ones((0, DIM)), {}, "expected a query of d numbers"),
            (["a"] * DIM, {}, "expected a query of d numbers"),
            (np.ones(DIM), {"k": 0}, "k must be at least 1"),
            (np.ones(DIM), {"metric": "manhattan"}, "known: cosine, dot, l2"),
        ],
    )
    def test_queries(self, mill: Mill, stored: Stored, query: Any, options: dict[str, Any], message: str) -> None:
        stored(points())
        with pytest.raises(BadInput, match=message):
            vectors.nearest(mill.db, mill.store, 1, query, **options)

    def test_nowhere_to_look(self, mill: Mill) -> None:
        with pytest.raises(BadInput, match="there is no recipe 7"):
            vectors.nearest(mill.db, mill.store, 7, np.ones(DIM))
        boxes = mill.run(shards([found("a", detected(1))], 1))
        with pytest.raises(BadInput, match="holds detections, not embeddings; run imagemill embed"):
            vectors.nearest(mill.db, mill.store, boxes.recipe_id, np.ones(DIM))
        broken = mill.run(shards([failed("a")], 1), kind="embedding")
        with pytest.raises(BadInput, match="has no embeddings yet"):
            vectors.nearest(mill.db, mill.store, broken.recipe_id, np.ones(DIM))

    def test_objects_that_changed(self, mill: Mill, stored: Stored) -> None:
        recipe_id = stored(points())
        for stat in list(mill.store.list("jobs/")):
            if stat.key.endswith("items.parquet"):
                mill.store.put(stat.key, mill.store.get(stat.key)[:-1] + b"?")
        with pytest.raises(Unavailable, match="is not what was written"):
            vectors.nearest(mill.db, mill.store, recipe_id, np.ones(DIM))

    @pytest.mark.parametrize("other", [points(5, DIM + 1), points(5).astype(np.float16)])
    def test_vectors_of_two_lengths(self, mill: Mill, stored: Stored, other: np.ndarray) -> None:
        """No model makes them; two lengths in one shard or in two are refused, whatever wrote them."""
        rows = [*points(5), *other]
        if other.dtype == np.float32:
            with pytest.raises(Unavailable, match=r"has vectors of 17, not 16|lengths \[16, 17\]"):
                list(vectors.matrix(mill.db, mill.store, stored(rows, 5)))
        with pytest.raises(Unavailable, match="one length and type"):
            list(vectors.matrix(mill.db, mill.store, stored(rows, 10, dataset="/other")))


class TestLabels:
    """Labels by the vote of the nearest examples."""

    def test_votes_by_hand(self, mill: Mill, stored: Stored) -> None:
        rows = points()
        examples = {KEYS[i]: "abc"[i % 3] for i in range(0, 60, 2)}
        answers = list(vectors.knn_labels(mill.db, mill.store, stored(rows, 30), examples, k=5))
        assert [key for key, _, _ in answers] == KEYS
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for (_, label, score), row in zip(answers, unit, strict=True):
            near = sorted(((float(unit[KEYS.index(key)] @ row), key) for key in examples), reverse=True)[:5]
            votes = {name: sum(np.exp(c / 0.07) for c, key in near if examples[key] == name) for name in "abc"}
            assert label == max(votes, key=votes.__getitem__)
            assert score == pytest.approx(votes[label] / sum(votes.values()), rel=1e-4)

    def test_clusters_are_told_apart(self, mill: Mill, stored: Stored) -> None:
        centres = np.eye(DIM, dtype=np.float32)[:2] * 5
        rows = points() * 0.3 + centres[np.arange(100) % 2]
        examples = {KEYS[0]: "even", KEYS[1]: "odd", KEYS[2]: "even"}
        for key, label, score in vectors.knn_labels(mill.db, mill.store, stored(rows), examples, k=20):
            assert label == ("odd" if int(key[:3]) % 2 else "even")
            assert 0.9 < score <= 1

    def test_the_pieces_do_not_matter(self, mill: Mill, stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe_id = stored(points())
        examples = {key: str(i % 4) for i, key in enumerate(KEYS[:40])}
        whole = list(vectors.knn_labels(mill.db, mill.store, recipe_id, examples))
        monkeypatch.setattr(vectors, "_CELLS", 100)
        pieces = list(vectors.knn_labels(mill.db, mill.store, recipe_id, examples))
        assert [row[:2] for row in whole] == [row[:2] for row in pieces]

    def test_wrong_examples(self, mill: Mill, stored: Stored) -> None:
        recipe_id = stored(points())
        for examples, k, message in (
            ({}, 5, "give at least one"),
            ({"nothing.jpg": "a", KEYS[0]: "b"}, 5, "1 of 2 examples have no embedding, the first is 'nothing.jpg'"),
            ({KEYS[0]: "a"}, 0, "k must be at least 1"),
        ):
            with pytest.raises(BadInput, match=message):
                list(vectors.knn_labels(mill.db, mill.store, recipe_id, examples, k))
