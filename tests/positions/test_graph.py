"""Positions on graphs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from tests.closeness import assert_close
from xformerlib import Graph
from xformerlib.positions import ContinuousBias, DistanceDecay, Learned, RandomWalk, RelativeBias, Rotary, Sinusoidal

from .cases import redrawn


def undirected(*edges: tuple[int, int]) -> Tensor:
    return torch.tensor([*edges, *((b, a) for a, b in edges)], dtype=torch.long).reshape(-1, 2).T


# No two nodes are alike and no two eigenvalues close, so that eigenvectors and their signs are decided.
PLAIN = undirected((0, 1), (0, 3), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 5))


def added(embedding: torch.nn.Module, graph: Graph) -> Tensor:
    return embedding.double()(torch.zeros(graph.num_tokens, embedding.dim, dtype=torch.float64), graph)


def permuted(edges: Tensor, order: Tensor) -> Tensor:
    """Edges after node ``order[i]`` was renamed ``i``."""
    return torch.argsort(order)[edges]


def random_edges(seed: int, n: int = 6) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(n, n, generator=draw) < 0.3).nonzero().T


@given(seed=st.integers(0, 2**16))
def test_renaming_nodes_renames_everything(seed: int) -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    here = Graph(random_edges(seed), 6)
    there = Graph(permuted(here.edge_index, order), 6)
    i = torch.arange(6)
    for bias in (RelativeBias(2, buckets=4, max_distance=3), ContinuousBias(2, hidden=4), DistanceDecay(2)):
        redrawn(bias).double()
        one, other = (bias.pair(graph).at(i[:, None], i[None, :]) for graph in (here, there))
        assert_close(other, one[:, order][:, :, order])
    for embedding in (RandomWalk(4, 5), Learned(4, 3), Learned(4, 2, directed=True)):
        redrawn(embedding)
        assert_close(added(embedding, there), added(embedding, here)[order])


def test_renaming_nodes_renames_what_eigenvectors_say_where_they_are_unique() -> None:
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    here, there = Graph(PLAIN, 6), Graph(permuted(PLAIN, order), 6)
    x = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    assert_close(added(Sinusoidal(16).eval(), there), added(Sinusoidal(16).eval(), here)[order])
    assert_close(Rotary(8).rotate_one(x[:, :, order], there), Rotary(8).rotate_one(x, here)[:, :, order])


# -- eigenvectors ------------------------------------------------------------------------------------------------------


def test_sinusoids_of_eigenvectors() -> None:
    graph = Graph(PLAIN, 6, virtual_nodes=1)
    embedding = Sinusoidal(13, eigenvectors=3, theta=100.0, scale=2.0).eval()
    _, vectors = graph.laplacian_eigenvectors(3)
    result = added(embedding, graph)
    assert (result[0] == 0).all()
    assert (result[:, 12:] == 0).all()
    for axis in range(3):
        angles = 2.0 * math.sqrt(6) * vectors[:, axis : axis + 1] * torch.tensor([[1.0, 0.1]], dtype=torch.float64)
        assert_close(result[1:, 4 * axis : 4 * axis + 4], torch.cat([angles.sin(), angles.cos()], 1))


def test_signs_are_drawn_for_each_graph_at_each_step_of_training() -> None:
    n = 40
    graph = Graph(torch.cat([PLAIN + 6 * g for g in range(n)], 1), 6 * n, batch=torch.arange(n).repeat_interleave(6))
    embedding = Sinusoidal(8, eigenvectors=2)
    still = added(embedding.eval(), graph).reshape(n, 6, 2, 4)  # graph, node, eigenvector, (sin, sin, cos, cos)
    assert torch.equal(added(embedding, graph).reshape(still.shape), still)
    embedding.train()
    torch.manual_seed(5)
    first, second = (added(embedding, graph).reshape(still.shape) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(added(embedding, graph).reshape(still.shape), first)
    assert not torch.equal(first, second)
    for drawn in (first, second):
        assert_close(drawn[..., 2:], still[..., 2:])  # cosines have no sign
        signs = (drawn / still)[..., :2]
        assert_close(signs.abs(), torch.ones_like(signs))
        assert_close(signs, signs[:, :1, :, :1].expand_as(signs))  # one for all nodes of a graph and all bands
        assert abs((signs[:, 0, :, 0] > 0).double().mean() - 0.5) < 6 * 0.5 / (2 * n) ** 0.5  # six standard errors
        assert not torch.equal(signs[:, 0, 0, 0], signs[:, 0, 1, 0])


def test_graphs_with_few_nodes_have_few_eigenvectors() -> None:
    for n in range(4):
        result = added(Sinusoidal(16).eval(), Graph(undirected(*((a, a + 1) for a in range(n - 1))), n))
        assert result.shape == (n, 16)
        assert result.isfinite().all()


# -- nodes -------------------------------------------------------------------------------------------------------------


def test_degrees_choose_rows_and_large_ones_share_the_last() -> None:
    edges = torch.tensor([[0, 1, 2, 3, 0], [4, 4, 4, 4, 1]])
    graph = Graph(edges, 5, virtual_nodes=1)
    one = redrawn(Learned(3, 3, prefix=1)).double()
    assert_close(added(one, graph), torch.cat([one.prefix_table, one.table[torch.tensor([0, 1, 0, 0, 2])]]))
    two = redrawn(Learned(3, 3, directed=True)).double()
    expected = two.table[torch.tensor([0, 1, 0, 0, 2])] + two.out_table[torch.tensor([2, 1, 1, 1, 0])]
    assert_close(added(two, graph)[1:], expected)


def test_random_walks_return_with_the_probabilities_of_matrix_powers() -> None:
    graph = Graph(random_edges(3), 6, virtual_nodes=2)
    embedding = redrawn(RandomWalk(4, steps=5)).double()
    adjacency = torch.zeros(6, 6, dtype=torch.float64)
    adjacency[graph.edge_index[0], graph.edge_index[1]] = 1
    walk = adjacency / adjacency.sum(1, keepdim=True).clamp(min=1)
    returns = torch.stack([torch.linalg.matrix_power(walk, k).diagonal() for k in range(1, 6)], 1)
    result = added(embedding, graph)
    assert (result[:2] == 0).all()
    assert_close(result[2:], returns @ embedding.linear.weight.T + embedding.linear.bias)


# -- hops --------------------------------------------------------------------------------------------------------------

PATH = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])  # 0 -> 1 -> 2 -> 3 -> 4
HOPS = torch.tensor([[max(q - k, 0) if k <= q else 5 for k in range(5)] for q in range(5)])


def test_hops_choose_rows() -> None:
    bias = redrawn(RelativeBias(2, buckets=4, max_distance=8)).double()
    i = torch.arange(1, 6)
    graph = Graph(PATH, 5, virtual_nodes=1)
    rows = torch.where(HOPS == 5, 3, HOPS.clamp(max=2))
    assert torch.equal(bias.pair(graph).at(i[:, None], i[None, :]), bias.table[rows].movedim(-1, 0))


def test_decay_with_hops() -> None:
    i = torch.arange(5)
    result = DistanceDecay(2).pair(Graph(PATH, 5)).at(i[:, None], i[None, :])
    assert_close(result, -torch.tensor([2.0**-4, 2.0**-8])[:, None, None] * HOPS)


def test_network_of_hops() -> None:
    bias = redrawn(ContinuousBias(3, hidden=8, scale=2.0)).double()
    i = torch.arange(5)
    result = bias.pair(Graph(PATH, 5)).at(i[:, None], i[None, :])
    reached = HOPS < 5
    u = torch.stack([torch.log2(1 + 2 * HOPS.double()) * reached, (~reached).double()], -1)
    hidden = torch.relu(u @ bias.inner.weight[:, :2].T + bias.inner.bias)
    assert_close(result, 16 * torch.sigmoid(hidden @ bias.outer.weight.T).movedim(-1, 0))


def test_a_graph_is_scored_as_it_is_alone() -> None:
    small, large = Graph(PATH[:, :2], 3), Graph(PATH, 5)
    both = Graph(torch.cat([PATH[:, :2], PATH + 3], 1), 8, batch=torch.tensor([0] * 3 + [1] * 5))
    for bias in (RelativeBias(2, buckets=4, max_distance=8), ContinuousBias(2, hidden=4), DistanceDecay(2)):
        pair = redrawn(bias).double().pair(both)
        for graph, first in ((small, 0), (large, 3)):
            i = torch.arange(graph.num_nodes)
            alone = bias.pair(graph).at(i[:, None], i[None, :])
            assert_close(pair.at(i[:, None] + first, i[None, :] + first), alone)


def test_nothing_turns_where_no_eigenvectors_exist() -> None:
    x = torch.randn(1, 1, 3, 8)
    assert_close(Rotary(8).rotate_one(x, Graph(torch.empty(2, 0).long(), 2, virtual_nodes=1)), x)


def test_two_graphs_have_no_distance() -> None:
    with pytest.raises(ValueError, match="same Graph object"):
        DistanceDecay(2).pair(Graph(PATH, 5), Graph(PATH, 5))
