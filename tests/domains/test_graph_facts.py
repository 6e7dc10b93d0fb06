"""Hop tables, r-hop sets and ancestors, on both the routes for small graphs and those for large ones."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import networkx as nx
import pytest
import torch
from hypothesis import given

import xformerlib as xf
from tests.domains.graphs import as_networkx, random_graph, undirected
from tests.strategies import randoms
from xformerlib.domains import _graph_facts as facts


@contextmanager
def limits(**values: int):
    """With other limits of what counts as small, and of how much is worked on at a time."""
    with mock.patch.multiple(facts, **values):
        yield


def hops_of(graph: xf.Graph) -> torch.Tensor:
    index = torch.arange(graph.num_tokens)
    return graph.hop_distance(index[:, None], index)


@given(rng=randoms)
def test_breadth_first_search_agrees_with_floyd_warshall(rng):
    graph = random_graph(rng, largest=12)
    expected = hops_of(graph)
    for block in (1, 30, 2**22):
        with limits(LARGEST_DENSE_HOPS=0, BLOCK=block):
            again = xf.Graph(
                graph.edge_index,
                graph.num_nodes,
                batch=graph.batch,
                virtual_nodes=graph.prefix,
                num_graphs=graph.num_graphs,
            )
            assert torch.equal(hops_of(again), expected)


@pytest.mark.parametrize(
    ("graph", "dtype"),
    [
        (nx.path_graph(255), torch.uint8),
        (nx.path_graph(256), torch.int16),
        (nx.path_graph(700), torch.int16),  # a long diameter: a small frontier pushes
        (nx.gnm_random_graph(600, 9000, seed=0), torch.int16),  # a short one: large frontiers pull
        (nx.disjoint_union(nx.cycle_graph(400), nx.star_graph(200)), torch.int16),
    ],
    ids=["path of 255", "path of 256", "path of 700", "dense", "disconnected"],
)
def test_hops_of_larger_graphs(graph, dtype):
    ours = undirected(graph)
    expected = torch.full((len(graph), len(graph)), len(graph))
    for j, lengths in nx.all_pairs_shortest_path_length(graph):
        expected[torch.tensor(list(lengths)), j] = torch.tensor(list(lengths.values()))
    assert ours.hops.table.dtype == dtype
    assert torch.equal(hops_of(ours), expected)


def test_hops_of_many_graphs_of_the_same_size_are_worked_out_in_parts():
    sizes = torch.tensor([3, 5, 3, 3, 0, 5, 3])
    parts = [
        (n, stack.graphs.tolist()) for stack in facts.stacks(_edgeless(sizes), largest=4, entries=20) for n in [stack.n]
    ]
    assert parts == [(3, [0, 2]), (3, [3, 6]), (5, [1]), (5, [5])]


def _edgeless(sizes: torch.Tensor) -> facts.Topology:
    none, graph = torch.zeros(0, dtype=torch.long), torch.arange(len(sizes)).repeat_interleave(sizes)
    return facts.Topology(none, none, graph, sizes.cumsum(0) - sizes, sizes)


@given(rng=randoms)
def test_sets_within_hops(rng):
    graph = random_graph(rng, largest=12)
    with limits(BLOCK=rng.choice([1, 40, 2**22])):
        for radius in (0, 1, 2, 3, 4, 7):
            found = graph.within_hops(radius)
            sets = {(int(i), int(j)) for i, j in zip(found.row, found.col, strict=True)}
            index = torch.arange(graph.num_tokens)
            assert torch.equal(found.contains(index[:, None], index).nonzero(), torch.stack([found.row, found.col], 1))
            assert len(sets) == found.col.numel()
            paths = dict(nx.all_pairs_shortest_path_length(as_networkx(graph), cutoff=radius))
            tokens = graph.node_tokens.tolist()
            expected = {(tokens[i], tokens[j]) for j, reached in paths.items() for i in reached}
            virtual = set(range(graph.num_tokens)) - set(tokens)
            assert sets == expected | {(i, i) for i in virtual}


def test_sets_within_hops_take_memory_of_their_own_size():
    n = 100_000  # a ring: n^2 entries would be 10 GB
    nodes = torch.arange(n)
    ring = xf.Graph(torch.stack([nodes, nodes.roll(-1)]), n)
    assert ring.within_hops(5).col.numel() == 6 * n
    with limits(MOST_ENTRIES=500), pytest.raises(ValueError, match=r"at most 500 entries; got .* Use a smaller radius"):
        ring.within_hops(3)


@given(rng=randoms)
def test_ancestors_in_parts(rng):
    graph = random_graph(rng, acyclic=True, largest=12)
    reference, tokens = as_networkx(graph), graph.node_tokens.tolist()
    with limits(BLOCK=rng.choice([1, 10, 2**22])):
        found = graph.ancestors
    for i in range(graph.num_nodes):
        row = found.col[found.rowptr[tokens[i]] : found.rowptr[tokens[i] + 1]].tolist()
        assert row == sorted(tokens[j] for j in nx.ancestors(reference, i) | {i})


def test_ancestors_of_a_deep_and_a_wide_tree():
    nodes = torch.arange(1000)
    path = xf.Graph(torch.stack([nodes[:-1], nodes[1:]]), 1000)
    assert torch.equal(path.ancestors.rowptr.diff(), nodes + 1)
    star = xf.Graph(torch.stack([torch.zeros(999).long(), nodes[1:]]), 1000)
    assert star.ancestors.rowptr.diff().tolist() == [1] + [2] * 999
    with limits(MOST_ENTRIES=500), pytest.raises(ValueError, match="at most 500 entries"):
        _ = xf.Graph(path.edge_index, 1000).ancestors
