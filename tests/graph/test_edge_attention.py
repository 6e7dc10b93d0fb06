"""Attention along edges: parity with PyTorch Geometric, and what must hold on any graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import GPSConv, Sequential, TransformerConv

import xformerlib as xf
from tests.closeness import assert_close
from xformerlib.graph import EdgeAttention
from xformerlib.interop.pyg import from_pyg

OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta": True, "edge_dim": 5},
    {"concat": False, "edge_dim": 1, "beta": True},
    {"concat": False, "bias": False},
    {"root_weight": False, "edge_dim": 2},
]


def redrawn(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return module.double()


def drawn_edges(sources: int, targets: int, count: int) -> Tensor:
    """Parallel edges and self-loops included; the last two targets have none."""
    return torch.stack([torch.randint(sources, (count,)), torch.randint(max(targets - 2, 1), (count,))])


def largest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("channels", [6, (6, 7)], ids=["one kind", "bipartite"])
def test_parity_with_transformer_conv(options: dict[str, Any], channels: Any, precision: torch.dtype) -> None:
    theirs = redrawn(TransformerConv(channels, 4, heads=3, **options)).to(precision)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = from_pyg(theirs)
    sources, targets = 20, 20 if channels == 6 else 15
    x: Any = torch.randn(sources, 6)
    x = x if channels == 6 else (x, torch.randn(targets, 7))
    edges = drawn_edges(sources, targets, 60)
    attr = torch.randn(60, options["edge_dim"]) if "edge_dim" in options else None
    got, (same, alpha) = ours(x, edges, attr, return_attention_weights=True)
    wanted, (_, their_alpha) = theirs(x, edges, attr, return_attention_weights=True)
    assert_close(got, wanted)
    assert_close(alpha, their_alpha)
    assert torch.equal(same, edges)
    (got**2).sum().backward()
    (wanted**2).sum().backward()
    assert_close(ours.query.weight.grad, theirs.lin_query.weight.grad, depth=2)  # there and back
    if ours.edge is not None:
        assert_close(ours.edge.weight.grad, theirs.lin_edge.weight.grad, depth=2)
    with torch.no_grad():
        ours.query.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**31))
def test_permuted_nodes_give_permuted_nodes(nodes: int, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = redrawn(EdgeAttention(4, 3, heads=2, edge_dim=2, beta=True))
    x, edges = torch.randn(nodes, 4, dtype=torch.float64), drawn_edges(nodes, nodes, count)
    attr, order, edge_order = torch.randn(count, 2, dtype=torch.float64), torch.randperm(nodes), torch.randperm(count)
    place = order.argsort()
    assert_close(layer(x[order], place[edges][:, edge_order], attr[edge_order]), layer(x, edges, attr)[order])


def test_ways_to_give_edges_agree() -> None:
    layer, x = redrawn(EdgeAttention(4, 3, heads=2)), torch.randn(9, 4, dtype=torch.float64)
    edges = drawn_edges(9, 9, 30).unique(dim=1).contiguous()
    wanted = layer(x, edges)
    adjacency = torch.sparse_coo_tensor(edges.flip(0), torch.ones(edges.shape[1]), (9, 9), check_invariants=True)
    for given_as in (EdgeIndex(edges, sparse_size=(9, 9)), xf.Graph(edges, 9), adjacency, adjacency.to_sparse_csr()):
        assert_close(layer(x, given_as), wanted)


def test_edges_that_change_in_place_are_sorted_anew() -> None:
    layer, x = redrawn(EdgeAttention(4, 3)), torch.randn(5, 4, dtype=torch.float64)
    edges = torch.tensor([[0, 1], [1, 2]])
    layer(x, edges)
    edges[0, 0] = 3
    assert largest(layer(x, edges), layer(x, edges.clone())) == 0


def test_isolated_nodes_and_empty_graphs() -> None:
    layer = redrawn(EdgeAttention(4, 3, heads=2))
    x, none = torch.randn(3, 4, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.long)
    assert largest(layer(x, none), layer.root(x)) == 0
    assert layer(x[:0], none).shape == (0, 6)


def test_inside_layers_of_pytorch_geometric() -> None:
    x, edges, batch = torch.randn(9, 8), drawn_edges(9, 9, 30), torch.tensor([0] * 4 + [1] * 5)
    model = Sequential("x, edges", [(EdgeAttention(8, 4, heads=2), "x, edges -> x"), nn.ReLU(), nn.Linear(8, 2)])
    assert model(x, edges).shape == (9, 2)
    assert GPSConv(8, EdgeAttention(8, 4, heads=2), heads=2)(x, edges, batch).shape == (9, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EdgeAttention(4, 3, beta=True, root_weight=False), "beta gates"),
        (lambda: EdgeAttention(4, 3)(torch.randn(5, 3), torch.zeros(2, 1).long()), r"x must be \(nodes, 4\)"),
        (lambda: EdgeAttention(4, 3)(torch.randn(5, 4), torch.full((2, 1), 5)), "must index the 5 sources; got .* to 5"),
        (lambda: EdgeAttention(4, 3)(torch.randn(5, 4), torch.zeros(1, 2).long()), r"integers \(2, edges\)"),
        (lambda: EdgeAttention(4, 3)(torch.randn(5, 4), torch.zeros(2, 1).long(), torch.randn(1, 2)), "if and only if"),
        (lambda: EdgeAttention(4, 3, edge_dim=2)(torch.randn(5, 4), torch.zeros(2, 1).long()), "if and only if"),
        (lambda: EdgeAttention(4, 3, edge_dim=2)(torch.randn(5, 4), torch.zeros(2, 1).long(), torch.randn(1, 3)), r"\(edges, 2\)"),
        (lambda: from_pyg(TransformerConv(-1, 4)), "in_channels must be known"),
        (lambda: from_pyg(TransformerConv(4, 4, flow="target_to_source")), "flow 'source_to_target'"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
