"""A row for each edge, or for any pair of nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import RandomLinkSplit

import xformerlib as xf
from tests.closeness import assert_close
from tests.graph.test_edge_attention import largest, redrawn
from xformerlib import masks
from xformerlib.graph import GPS, EdgeReadout, GraphTransformer, SGFormer

EDGES = torch.tensor([[0, 1, 2, 2, 3, 0], [1, 0, 0, 2, 4, 1]])  # a pair twice, a loop


def ring(nodes: int) -> Data:
    i = torch.arange(nodes)
    ends = torch.cat([torch.stack([i, (i + 1) % nodes]), torch.stack([(i + 1) % nodes, i])], 1)
    return Data(x=torch.randn(nodes, 5), edge_index=ends)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("features", [None, 3])
def test_formula(symmetric: bool, features: int | None, precision: torch.dtype) -> None:
    readout = redrawn(EdgeReadout(4, edge_dim=features, symmetric=symmetric)).to(precision)
    x = torch.randn(5, 4)
    e = None if features is None else torch.randn(6, features)
    got = readout(x, EDGES, e)
    w, b = readout.ends.weight, readout.ends.bias
    first, second = (slice(0, 4), slice(0, 4)) if symmetric else (slice(0, 4), slice(4, 8))
    wanted = []
    for row, (s, t) in enumerate(EDGES.T.tolist()):
        y = w[first] @ x[s] + b[first] + w[second] @ x[t] + b[second] + readout.product.weight @ (x[s] * x[t])
        if readout.edge is not None and e is not None:
            y = y + readout.edge.weight @ e[row]
        wanted.append(y.relu())
    assert_close(got, torch.stack(wanted))
    if symmetric:
        assert_close(readout(x, EDGES.flip(0), e), got)


def models() -> dict[str, Any]:
    return {
        "transformer": GraphTransformer(5, 8, 3, 1, 2, mask=masks.Edges(self_loops=True), pool="edge"),
        "virtual node": GPS(5, 8, 3, 1, 2, pool="edge", virtual_nodes=1, norm="layer"),
        "cat": SGFormer(5, 8, 3, aggregate="cat", pool="edge"),
    }


@pytest.mark.parametrize("name", models())
def test_any_pairs_by_a_model(name: str, precision: torch.dtype) -> None:
    model = models()[name].eval()
    data = Data(x=torch.randn(5, 5), edge_index=EDGES)
    of_edges = model(data)
    assert of_edges.shape == (6, 3)
    assert_close(of_edges[0], of_edges[5], depth=3)
    assert largest(of_edges[0], of_edges[1]) > 1e-3
    pairs = torch.tensor([[4, 2, 0], [0, 0, 1]])
    asked = model(data.x, data.edge_index, edge_label_index=pairs)
    assert_close(asked[1:], of_edges[[2, 0]], depth=3)
    data.edge_label_index = pairs
    assert torch.equal(model(data), asked)
    assert model(data.x, EDGES, edge_label_index=pairs[:, :0]).shape == (0, 3)
    graph = xf.Graph(EDGES, 5, virtual_nodes=0 if model.virtual is None else 1)
    assert_close(model(data.x, graph), of_edges, depth=3)


def test_a_batch_with_pairs_of_each_graph_in_any_order(precision: torch.dtype) -> None:
    model, graphs = models()["virtual node"].eval(), [ring(4), ring(7)]
    for graph in graphs:
        graph.edge_label_index = torch.stack([torch.arange(3), torch.zeros(3).long()])
    batch = next(iter(DataLoader(graphs, batch_size=2)))
    together = model(batch)
    assert_close(together, torch.cat([model(graph) for graph in graphs]), depth=3)
    order = torch.randperm(11)
    new = order.argsort()
    shuffled = model(
        batch.x[order], new[batch.edge_index], batch=batch.batch[order], edge_label_index=new[batch.edge_label_index]
    )
    assert_close(shuffled, together, depth=3)


def test_links_are_learned() -> None:
    """Two groups that nothing but their links tells apart from each other: a link within one is more likely than one across."""
    torch.manual_seed(0)
    group = torch.arange(40) % 2
    pairs = torch.combinations(torch.arange(40)).T
    linked = torch.rand(pairs.shape[1]) < torch.where(group[pairs[0]] == group[pairs[1]], 0.5, 0.02)
    ends = pairs[:, linked]
    data = Data(x=torch.eye(40), edge_index=torch.cat([ends, ends.flip(0)], 1))
    split = RandomLinkSplit(is_undirected=True, num_val=0.0, num_test=0.2, neg_sampling_ratio=1.0)
    train, _, test = split(data)
    model = GraphTransformer(
        40, 16, 1, 2, 2, mask=masks.Edges(self_loops=True), pool=EdgeReadout(16, symmetric=True), dropout=0.2
    )
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(40):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(train)[:, 0], train.edge_label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert float(auc(model(test)[:, 0].detach(), test.edge_label)) > 0.65  # chance is 0.5


def auc(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores[labels == 1][:, None] > scores[labels == 0]).double().mean()


def test_features_of_edges_of_the_graph() -> None:
    model = GraphTransformer(5, 8, 3, 1, 2, pool=EdgeReadout(8, edge_dim=2))
    x, e = torch.randn(5, 5), torch.randn(6, 2)
    assert largest(model(x, EDGES, e)[0], model(x, EDGES, e)[5]) > 1e-3
    with pytest.raises(ValueError, match="for the edges of the graph alone"):
        model(x, EDGES, e, edge_label_index=EDGES)
    with pytest.raises(ValueError, match="if and only if the readout has an edge_dim"):
        model(x, EDGES)


def test_bad_input() -> None:
    x = torch.randn(5, 5)
    with pytest.raises(ValueError, match="build the model with pool='edge'"):
        GraphTransformer(5, 8, 3, 1, 2)(x, EDGES, edge_label_index=EDGES)
    for wrong in (EDGES + 1, EDGES - 1, EDGES.float(), EDGES[0]):
        with pytest.raises(ValueError, match="edge_label_index must"):
            models()["transformer"](x, EDGES, edge_label_index=wrong)
