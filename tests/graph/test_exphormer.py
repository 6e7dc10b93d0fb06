"""Exphormer: the same pairs as the mask of the same name, what links are told of, and a graph alone or in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

import xformerlib as xf
from tests.closeness import assert_close
from tests.graph.test_edge_attention import redrawn
from xformerlib import masks, positions
from xformerlib.graph import ExpanderAttention, Exphormer
from xformerlib.graph._exphormer import links


def drawn(sizes: list[int], virtual: int, count: int) -> tuple[xf.Graph, Tensor]:
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    edge_index = torch.randint(max(sum(sizes), 1), (2, count if sum(sizes) else 0))
    inside = batch[edge_index[0]] == batch[edge_index[1]]
    edge_index = edge_index[:, inside]
    graph = xf.Graph(edge_index, sum(sizes), batch=batch, virtual_nodes=virtual, num_graphs=len(sizes))
    return graph, torch.randn(graph.num_edges, 3, dtype=torch.float64)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=3), st.integers(0, 2), st.integers(0, 3), st.integers(0, 30),
    st.integers(0, 2**31),
)  # fmt: skip
def test_links_are_the_pairs_of_the_mask(sizes: list[int], virtual: int, degree: int, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    graph, edge_attr = drawn(sizes, virtual, count)
    # Without virtual nodes the mask of none of them is that of no pairs.
    every = [masks.Edges(), masks.Expander(degree, seed=3)] + [masks.Global(virtual)] * (virtual > 0)
    found = links(graph, degree, 3)
    pairs = torch.zeros(graph.num_tokens, graph.num_tokens, dtype=torch.bool)
    pairs[found.edge_index[1], found.edge_index[0]] = True
    i = torch.arange(graph.num_tokens)
    ordinary = (graph.place(i) >= virtual)[:, None] & (graph.place(i) >= virtual)
    wanted = [mask.dense(graph) for mask in every]
    assert torch.equal(pairs, torch.stack(wanted).any(0)) and int(pairs.sum()) == len(found.kinds)
    for kind, mask in enumerate(wanted):
        own = torch.zeros_like(pairs)
        own[found.edge_index[1], found.edge_index[0]] = found.kinds[:, kind] > 0
        assert torch.equal(own, mask & ordinary if kind < 2 else mask)
    features = torch.zeros(graph.num_tokens, graph.num_tokens, 3, dtype=torch.float64)
    source, target = graph.node_tokens[graph.edge_index]
    features.index_put_((target, source), edge_attr, accumulate=True)
    assert_close(found.features(edge_attr)[:, :3], features[found.edge_index[1], found.edge_index[0]])


@pytest.mark.parametrize("virtual", [0, 2])
def test_without_features_it_is_attention_under_the_mask(virtual: int) -> None:
    graph, _ = drawn([9, 30], virtual, 60)
    layer, plain = redrawn(ExpanderAttention(8, 2, degree=3)), xf.Attention(8, 2).double()
    with torch.no_grad():
        layer.along.edge.weight.zero_()
        plain.qkv.weight.copy_(torch.cat([layer.along.query.weight, layer.along.key_value.weight]))
        plain.qkv.bias.copy_(torch.cat([layer.along.query.bias, layer.along.key_value.bias]))
    plain.out.load_state_dict(layer.out.state_dict())
    x = torch.randn(graph.num_tokens, 8, dtype=torch.float64)
    mask = masks.Edges() | masks.Expander(3)
    mask = mask | masks.Global(virtual) if virtual else mask
    assert_close(layer(x, graph), plain(x, graph, mask=mask))


def test_links_are_told_apart() -> None:
    graph, edge_attr = drawn([20], 1, 30)
    layer = redrawn(ExpanderAttention(8, 2, edge_dim=3, degree=3))
    x = torch.randn(21, 8, dtype=torch.float64)
    layer(x, graph, edge_attr).square().sum().backward()
    assert layer.along.edge.weight.grad.abs().amax(0).amin() > 0


def test_a_large_graph_in_a_batch_gives_what_it_gives_alone(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    model = redrawn(Exphormer(7, 8, 3, 2, 2, edge_dim=2, degree=3, virtual_nodes=2)).to(precision).eval()
    graphs = [
        Data(
            x=torch.randn(n, 7),
            edge_index=torch.randint(n, (2, 3 * n)),
            edge_attr=torch.randn(3 * n, 2),
        )
        for n in (40, 1, 25)
    ]
    together = model(Batch.from_data_list(graphs))
    assert_close(together, torch.cat([model(graph) for graph in graphs]), depth=2)


def test_without_messages() -> None:
    model = Exphormer(7, 8, 3, 1, 2, passing=False)
    assert not any(module.conv for module in model.layers)
    assert model(torch.randn(4, 7), torch.zeros(2, 0).long()).shape == (4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExpanderAttention(8, 3), "heads must divide channels=8"),
        (lambda: ExpanderAttention(8, 2, degree=-1), "degree must be >= 0"),
        (lambda: ExpanderAttention(8, 2)(torch.randn(2, 8), drawn([2], 0, 0)[0], torch.randn(0, 3)), "if and only if"),
        (lambda: Exphormer(7, 8, 3, 1, 2, position=positions.RelativeBias(2)), "may have embeddings only"),
        (lambda: Exphormer(7, 8, 3, 1, 2, mask=masks.Edges()), "mask: an Exphormer attends along its links"),
        (lambda: Exphormer(7, 8, 3, 1, 2, attention=nn.Identity()), "attention: an Exphormer attends along its links"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
