"""The neighbour sampler against what it must draw, found node by node."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch_geometric.data import Data

from tests.closeness import assert_close
from xformerlib.graph import EdgeAttention, NeighborSampler


def drawn(nodes: int, edges: int) -> Data:
    """Parallel edges and self-loops included."""
    data = Data(edge_index=torch.randint(nodes, (2, edges)), x=torch.randn(nodes, 3), y=torch.arange(nodes), name="set")
    data.edge_attr = torch.arange(edges)[:, None].float()
    return data


def check(batch: Data, data: Data, seeds: Tensor, counts: list[int]) -> None:
    """Everything that holds whatever was drawn."""
    n_id, e_id, (source, target) = batch.n_id, batch.e_id, batch.edge_index
    assert torch.equal(n_id[: batch.batch_size], seeds) and len(n_id.unique()) == len(n_id) == batch.num_nodes
    assert len(e_id.unique()) == len(e_id)
    assert torch.equal(data.edge_index[:, e_id], torch.stack([n_id[source], n_id[target]]))
    assert torch.equal(batch.x, data.x[n_id]) and torch.equal(batch.y, n_id) and batch.name == "set"
    assert torch.equal(batch.edge_attr[:, 0], e_id.float())
    frontier, begin, known = seeds.tolist(), 0, set(seeds.tolist())
    for hop, count in enumerate(counts):
        end = begin + batch.num_sampled_edges[hop]
        into = Counter(n_id[target[begin:end]].tolist())
        degree = Counter(data.edge_index[1].tolist())
        wanted = {node: degree[node] if count < 0 else min(degree[node], count) for node in frontier}
        assert into == {node: number for node, number in wanted.items() if number}
        new = set(n_id[source[begin:end]].tolist()) - known
        at = len(known)
        frontier = n_id[at : at + len(new)].tolist()
        assert set(frontier) == new and batch.num_sampled_nodes[hop + 1] == len(new)
        known, begin = known | new, end
    assert len(known) == len(n_id) and begin == len(e_id)


@given(
    st.integers(1, 12), st.integers(0, 40), st.lists(st.integers(-1, 4), min_size=1, max_size=3), st.integers(0, 2**31)
)
def test_what_is_drawn(nodes: int, edges: int, counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    data = drawn(nodes, edges)
    seeds = torch.randperm(nodes)[: torch.randint(1, nodes + 1, ()).item()]
    seen = []
    for batch in NeighborSampler(data, counts, seeds, batch_size=3):
        check(batch, data, seeds[batch.input_id], counts)
        seen.append(batch.input_id)
    assert torch.equal(torch.cat(seen), torch.arange(len(seeds)))
    assert data.x.shape == (nodes, 3) and "n_id" not in data


def test_every_set_of_edges_is_as_likely() -> None:
    edges = torch.stack([torch.arange(1, 6), torch.zeros(5, dtype=torch.long)])
    data, rounds = Data(edge_index=edges, num_nodes=6), 4000
    sampler = NeighborSampler(data, [2], torch.zeros(1).long(), generator=torch.Generator().manual_seed(0))
    seen = Counter(tuple(sorted(batch.e_id.tolist())) for _ in range(rounds) for batch in sampler)
    assert len(seen) == 10
    # Chi-squared of 9 degrees of freedom is above with the chance of six standard errors, 2e-9.
    assert sum((count - rounds / 10) ** 2 / (rounds / 10) for count in seen.values()) < 59.1


def test_layers_on_all_neighbours_give_what_they_give_on_the_whole_graph() -> None:
    torch.manual_seed(0)
    data = drawn(40, 100)
    layers = nn.ModuleList(
        [EdgeAttention(3, 4, heads=2, edge_dim=1), EdgeAttention(8, 4, heads=2, edge_dim=1)]
    ).double()

    def run(on: Data) -> Tensor:
        x = on.x.double()
        for layer in layers:
            x = layer(x, on.edge_index, on.edge_attr.double()).tanh()
        return x

    whole = run(data)
    for batch in NeighborSampler(data, [-1, -1], batch_size=7, shuffle=True):
        seeds = run(batch)[: batch.batch_size]
        assert_close(seeds, whole[batch.n_id[: batch.batch_size]])


def test_seeds_repeat_what_was_drawn() -> None:
    torch.manual_seed(0)
    data, mask = drawn(30, 200), torch.arange(30) % 2 == 0

    def epoch(seed: int) -> list[tuple[list[int], list[int]]]:
        generator = torch.Generator().manual_seed(seed)
        sampler = NeighborSampler(data, [3, 2], mask, batch_size=4, shuffle=True, generator=generator)
        assert len(sampler) == 4
        return [(batch.n_id.tolist(), batch.e_id.tolist()) for batch in sampler]

    assert epoch(1) == epoch(1) != epoch(2)


DATA = drawn(5, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NeighborSampler(DATA, []), ValueError, "one for each hop"),
        (lambda: NeighborSampler(DATA, [-2]), ValueError, "-1 for all"),
        (lambda: NeighborSampler(DATA, [1], torch.tensor([1, 1])), ValueError, "each node once; got 1 again"),
        (lambda: NeighborSampler(DATA, [1], torch.tensor([5])), ValueError, "from 0 to 4"),
        (lambda: NeighborSampler(DATA, [1], torch.ones(3).bool()), ValueError, "a mask of 5 nodes"),
        (lambda: NeighborSampler(DATA, [1], torch.ones(3)), TypeError, "indices or a mask"),
        (lambda: NeighborSampler(DATA, [1], collate_fn=list), TypeError, "leave dataset and collate_fn out"),
        (lambda: NeighborSampler(Data(x=torch.ones(2, 1)), [1]), TypeError, "must have edge_index"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
