"""When a network is captured as a graph, which graphs are kept, and that one which is wrong is never used.

The capture itself needs a GPU: `benchmarks/gpu.py` compares and times it there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from workers import graphed
from workers.graphed import Call, Graphed


class Network:
    """Doubles a tensor; counts its own calls, captures and replays."""

    def __init__(self, factor: float = 2, error: Exception | None = None) -> None:
        self.factor, self.error = factor, error
        self.calls = self.captures = self.replays = 0

    def call(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        return tuple(2 * tensor for tensor in given)

    def capture(self, call: Call, given: Sequence[Any]) -> Call:
        self.captures += 1
        if self.error is not None:
            raise self.error
        shapes = [tensor.shape for tensor in given]

        def replay(*given: Any) -> tuple[Any, ...]:
            assert [tensor.shape for tensor in given] == shapes
            self.replays += 1
            return tuple(self.factor * tensor for tensor in given)

        return replay

    def run(self, graph: Graphed, *shapes: tuple[int, ...], dtype: Any = torch.float32) -> None:
        given = [torch.rand(shape).to(dtype) for shape in shapes]
        for one, other in zip(graph(*given), given, strict=True):
            assert torch.allclose(one, 2 * other)


def test_a_shape_that_repeats_is_captured() -> None:
    network = Network()
    graph = Graphed(network.call, network.capture)
    for _ in range(10):
        network.run(graph, (4, 3), (4,))
    assert network.captures == 1
    assert network.calls == graphed._AFTER
    assert network.replays == 10 - graphed._AFTER + 1, "one of them to compare"


def test_other_shapes_strides_and_types_have_their_own() -> None:
    network = Network()
    graph = Graphed(network.call, network.capture)
    for _ in range(5):
        network.run(graph, (4, 3))
        network.run(graph, (3, 4))
        network.run(graph, (4, 3), dtype=torch.float64)
        given = torch.rand(3, 4).t()
        assert torch.equal(graph(given)[0], 2 * given)
    assert network.captures == 4


def test_only_the_last_used_are_kept() -> None:
    network = Network()
    graph = Graphed(network.call, network.capture)
    for side in range(1, graphed._GRAPHS + 2):
        for _ in range(graphed._AFTER):
            network.run(graph, (side,))
    assert len(graph._graphs) == graphed._GRAPHS
    captures = network.captures
    network.run(graph, (1,))
    assert network.captures == captures + 1, "the first had been let go"


def test_rare_shapes_are_not_counted_for_ever() -> None:
    network = Network()
    graph = Graphed(network.call, network.capture)
    for side in range(1, 2 * graphed._SHAPES):
        network.run(graph, (side,))
    assert len(graph._seen) <= graphed._SHAPES


@pytest.mark.parametrize(
    "network", [Network(factor=2.1), Network(error=RuntimeError("pretended"))], ids=["off", "raises"]
)
def test_a_graph_that_is_wrong_or_cannot_be_is_done_without(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    graph = Graphed(network.call, network.capture)
    with caplog.at_level(logging.WARNING, "imagemill.worker"):
        for _ in range(10):
            network.run(graph, (4, 3))
            network.run(graph, (5, 3))
    assert network.captures == 1
    assert network.calls == 20
    assert [record.message.count("no CUDA graphs for this network") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    ("found", "alike"),
    [
        ([1.0, 100.0], True),
        ([1.5, 100.0], True),
        ([1.0, 102.0], False),
        ([float("nan"), 100.0], False),
        ([1.0, 100.0, 0.0], False),
    ],
)
def test_alike_but_for_rounding(found: list[float], alike: bool) -> None:
    assert graphed._alike([torch.tensor(found)], [torch.tensor([1.0, 100.0])]) is alike


def test_alike_where_both_have_no_number() -> None:
    broken = torch.tensor([float("nan"), float("inf"), 1.0])
    assert graphed._alike([broken.clone()], [broken])
    assert graphed._alike([torch.zeros(0, 4)], [torch.zeros(0, 4)])
