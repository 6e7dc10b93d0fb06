"""Return probabilities of random walks against powers of the dense matrix, on all routes."""

from __future__ import annotations

from unittest import mock

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given

import xformerlib as xf
from tests.closeness import assert_close
from tests.domains.graphs import random_graph, undirected
from tests.strategies import randoms
from xformerlib.domains import _random_walk


def dense_walk(graph: xf.Graph, steps: int) -> torch.Tensor:
    adjacency = np.zeros((graph.num_nodes, graph.num_nodes))
    np.add.at(adjacency, tuple(graph.edge_index.numpy()), 1)
    walk = adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1)
    result, power = np.zeros((graph.num_nodes, steps)), np.eye(graph.num_nodes)
    for step in range(steps):
        power = power @ walk
        result[:, step] = power.diagonal()
    return torch.from_numpy(result)


@given(rng=randoms)
def test_small_graphs(rng):
    graph, steps = random_graph(rng, largest=10), rng.randint(0, 9)
    assert_close(graph.random_walk(steps), dense_walk(graph, steps), scale=1.0)  # probabilities


@pytest.mark.parametrize("share", [-1.0, 0.2, 2.0], ids=["dense", "both", "sparse"])
@pytest.mark.parametrize("block", [1, 30, 2**22])
@given(rng=randoms)
def test_the_routes_of_large_graphs_are_right_on_small_ones_too(share, block, rng):
    graph, steps = random_graph(rng, largest=10), rng.randint(0, 9)
    with mock.patch.multiple(
        _random_walk, LARGEST_DENSE_WALK=0, LARGEST_WITHOUT_SPARSE=0, DENSE_SHARE=share, BLOCK=block
    ):
        assert_close(graph.random_walk(steps), dense_walk(graph, steps), scale=1.0)  # probabilities


@pytest.mark.parametrize("n", [200, 1100])
def test_large_graphs(n):
    graph = undirected(nx.gnm_random_graph(n, 3 * n, seed=0))
    assert_close(graph.random_walk(7), dense_walk(graph, 7), scale=1.0)  # probabilities


def test_a_walk_follows_the_direction_of_edges():
    # 0 -> 1 -> 0 and 1 -> 2: from 1 half the walks leave for good.
    graph = xf.Graph(torch.tensor([[0, 1, 1], [1, 0, 2]]), 3)
    assert_close(graph.random_walk(2), torch.tensor([[0, 0.5], [0, 0.5], [0, 0]]).double())


def test_isolated_nodes_never_come_back():
    assert not xf.Graph(torch.zeros(2, 0, dtype=torch.long), 3).random_walk(4).any()


def test_a_self_loop_is_a_way_back():
    assert xf.Graph(torch.tensor([[0], [0]]), 1).random_walk(3).tolist() == [[1, 1, 1]]
