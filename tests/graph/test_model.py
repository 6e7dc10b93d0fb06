"""Models of graphs: what else is in a batch, and in which order nodes come, changes nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data

import xformerlib as xf
from tests.closeness import assert_close
from tests.graph.test_edge_attention import largest
from xformerlib import masks, positions
from xformerlib.graph import (
    AGNN,
    GPS,
    EdgeAttention,
    EdgeReadout,
    ExpanderAttention,
    Exphormer,
    GPSLayer,
    Graphormer,
    GraphTransformer,
    PerformerAttention,
    RandomWalkBias,
    SGFormer,
)

EDGES = masks.Edges() | masks.Local(0)
MODELS: dict[str, Any] = {
    "nodes": lambda: GraphTransformer(7, 16, 3, 2, 4),
    "edges, mean": lambda: GraphTransformer(7, 16, 3, 2, 4, mask=EDGES, pool="mean", position=positions.Learned(16, 5)),
    "masks of each layer": lambda: GraphTransformer(7, 16, 3, 2, 4, mask=[EDGES, None], pool="sum"),
    "virtual node": lambda: GraphTransformer(
        7, 16, None, 1, 4, mask=EDGES | masks.Global(1), pool="token", virtual_nodes=1
    ),
    "hops, attention": lambda: GraphTransformer(
        7, 16, 3, 2, 4, pool="attention", position=positions.RandomWalk(16, 4) + positions.RelativeBias(4)
    ),
    "walks between, virtual node": lambda: GraphTransformer(
        7, 16, 3, 2, 4, pool="token", virtual_nodes=1, position=RandomWalkBias(4, 5)
    ),
    "GPS": lambda: GPS(7, 16, 3, 2, 4, edge_dim=2, position=positions.RandomWalk(16, 4)),
    "GPS, virtual node": lambda: GPS(7, 16, 3, 2, 4, edge_dim=2, pool="token", virtual_nodes=1, norm="layer"),
    "GPS, a row for each edge": lambda: GPS(7, 16, 3, 1, 4, edge_dim=2, pool=EdgeReadout(16, edge_dim=2)),
    "SGFormer": lambda: SGFormer(7, 16, 3, pool="mean"),
    "AGNN": lambda: AGNN(7, 16, 3, 4, teleport=0.2),
    "AGNN, all": lambda: AGNN(7, 16, 3, mask=masks.Full(), pool="sum"),
    "Graphormer": lambda: Graphormer(7, 16, 3, 2, 4, edge_dim=2, path_steps=2, max_hops=3),
    "Graphormer, nodes": lambda: Graphormer(7, 16, 3, 1, 4, pool=None, virtual_nodes=0),
    # Of graphs this small the expander has all pairs; of larger ones those that it has depend on the order of nodes.
    "Exphormer": lambda: Exphormer(7, 16, 3, 2, 4, edge_dim=2, degree=8, virtual_nodes=1, pool="token"),
}
WITH_EDGES = {"Exphormer", "Graphormer", "GPS", "GPS, a row for each edge", "GPS, virtual node"}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def drawn(nodes: int, edges: int) -> Data:
    edge_attr = torch.randn(edges, 2, dtype=torch.float64)
    edge_index = torch.randint(max(nodes, 1), (2, edges))
    return Data(x=torch.randn(nodes, 7, dtype=torch.float64), edge_index=edge_index, edge_attr=edge_attr)


GRAPHS = [drawn(5, 12), drawn(1, 0), drawn(9, 20), drawn(3, 2)]


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_gives_what_it_gives_alone_and_permuted(name: str, precision: torch.dtype) -> None:
    model = made(name).to(precision)
    graphs = [graph.clone().apply(lambda t: t.to(precision) if t.is_floating_point() else t) for graph in GRAPHS]
    if name not in WITH_EDGES:
        for graph in graphs:
            del graph.edge_attr
    batch = Batch.from_data_list(graphs)
    together = model(batch)
    assert_close(together, torch.cat([model(graph) for graph in graphs]), depth=4)  # the most layers of any model
    order = torch.randperm(batch.num_nodes)
    permuted = model(batch.x[order], order.argsort()[batch.edge_index], batch.edge_attr, batch.batch[order])
    assert_close(permuted, together if model.pool else together[order], depth=4)
    graph = xf.Graph.from_pyg(batch, virtual_nodes=0 if model.virtual is None else 1)
    assert largest(model(batch.x, graph, batch.edge_attr), together) == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [[], [0, 0, 2]], ids=["no nodes", "empty graphs"])
def test_graphs_without_nodes_or_edges(name: str, batch: list[int]) -> None:
    model = made(name)
    virtual = 0 if model.virtual is None else len(model.virtual)
    item = torch.tensor(batch, dtype=torch.long)
    graph = xf.Graph(torch.zeros(2, 0).long(), len(batch), batch=item, num_graphs=4, virtual_nodes=virtual)
    edge_attr = torch.zeros(0, 2, dtype=torch.float64) if name in WITH_EDGES else None
    out = model(torch.randn(len(batch), 7, dtype=torch.float64), graph, edge_attr)
    rows = 0 if isinstance(model.pool, EdgeReadout) else 4 if model.pool else len(batch)
    assert len(out) == rows and out.isfinite().all()


def test_an_edge_index_that_changes_in_place_is_placed_anew() -> None:
    model, graph = made("edges, mean"), drawn(6, 9)
    del graph.edge_attr
    first = model(graph)
    graph.edge_index[0] = (graph.edge_index[0] + 1) % 6
    assert largest(model(graph), model(graph.clone())) == 0
    assert largest(model(graph), first) > 1e-6
    batch = torch.tensor([0, 0, 0, 1, 1, 1])
    inside = graph.edge_index[:, batch[graph.edge_index[0]] == batch[graph.edge_index[1]]]
    assert model(graph.x, inside).shape == (1, 3)
    assert model(graph.x, inside, batch=batch).shape == (2, 3)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="row of a virtual node"):
        GraphTransformer(7, 16, 3, 2, 4, pool="token")
    graph = drawn(3, 2)
    with pytest.raises(ValueError, match="edge_attr has no use in GraphTransformer"):
        made("nodes")(graph.x, graph.edge_index, torch.randn(2, 4))
    with pytest.raises(ValueError, match="a Graph says itself which nodes"):
        made("nodes")(graph.x, xf.Graph(graph.edge_index, 3), batch=torch.zeros(3).long())


@pytest.mark.parametrize("name", ["edges, mean", "hops, attention"])
def test_evaluation_before_training_and_tensors_made_in_inference(name: str) -> None:
    model, batch = made(name), Batch.from_data_list(GRAPHS)
    with torch.inference_mode():
        seen = model(batch.x, batch.edge_index, batch=batch.batch)
        again = model(batch.x.clone(), batch.edge_index.clone(), batch=batch.batch.clone())
    model.train()(batch.x, batch.edge_index, batch=batch.batch).sum().backward()
    assert largest(seen, again) == 0 and all(p.grad is not None for p in model.head.parameters())


def test_what_is_kept_beside_edges_goes_with_them() -> None:
    model, graph = made("edges, mean"), drawn(6, 9)
    layer, edges = EdgeAttention(7, 4).double(), graph.edge_index
    model(graph.x, edges, batch=torch.zeros(6).long())
    layer(graph.x, edges)
    alive = weakref.ref(edges)
    del edges, graph
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", sorted(WITH_EDGES))
def test_edge_features_made_in_inference(name: str) -> None:
    model, batch = made(name), Batch.from_data_list(GRAPHS)
    with torch.inference_mode():
        again = model(batch.x.clone(), batch.edge_index.clone(), batch.edge_attr.clone(), batch.batch.clone())
        seen = model(batch)
    assert_close(seen, again)
    model.train()(batch).sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_drawn_anew(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    first = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7)
    model.reset_parameters()
    for old, new in zip(first, model.parameters(), strict=True):
        # Six standard errors of a deviation: of n normal numbers it is 1 / sqrt(2 n), of uniform ones less, and here there are two.
        drift = largest(new.std(correction=0), old.std(correction=0))
        assert not (new == 7).any() and drift <= 6 * float(old.std(correction=0)) / old.numel() ** 0.5


def test_weights_of_layers_are_drawn_anew_and_what_cannot_be_is_refused() -> None:
    torch.manual_seed(0)
    performer = PerformerAttention(16, 2)
    before = performer.projection.clone()
    for layer in (performer, ExpanderAttention(16, 2), GPSLayer(16, EdgeAttention(16, 8, 2), 2)):
        old = [parameter.detach().clone() for parameter in layer.parameters() if parameter.ndim == 2]
        layer.reset_parameters()
        new = [parameter for parameter in layer.parameters() if parameter.ndim == 2]
        assert all(largest(a, b) > 0 for a, b in zip(old, new, strict=True))
    assert largest(performer.projection, before) > 0
    with pytest.raises(TypeError, match="attention of GPSLayer cannot be drawn anew"):
        GPSLayer(16, None, 2, sinks=True).reset_parameters()


def test_weights_of_edges_are_not_ignored() -> None:
    data = drawn(5, 8)
    data.edge_weight = torch.rand(8, dtype=torch.float64)
    with pytest.raises(ValueError, match="edge_weight has no use here"):
        made("GPS")(data)


def test_channels_that_are_known_at_the_first_call() -> None:
    graph = drawn(5, 8)
    x, edges = graph.x.float(), graph.edge_attr.float()
    for model in (GPS(-1, 16, 3, 1, 4, edge_dim=-1), Exphormer(-1, 16, 3, 1, 4, edge_dim=-1)):
        assert model(x, graph.edge_index, edges).shape == (5, 3)
        with pytest.raises(ValueError, match=r"x must be \(nodes, in_channels=7\)"):
            model(x[:, 1:], graph.edge_index, edges)
    for make in (SGFormer, AGNN):
        assert make(-1, 16, 3)(x, graph.edge_index).shape == (5, 3)
    layer = EdgeAttention((-1, -1), 4, heads=2, edge_dim=2)
    assert layer((x, x[:3, :4]), graph.edge_index % 3, edges).shape == (3, 8)
    assert isinstance(layer.query, nn.Linear) and layer.query.in_features == 4
    with pytest.raises(ValueError, match=r"x must be \(nodes, 7\) for sources"):
        layer((x[:, 1:], x[:3, :4]), graph.edge_index % 3, edges)


@pytest.mark.parametrize("name", ["GraphTransformer", "GPS", "Graphormer", "Exphormer", "SGFormer", "AGNN"])
def test_every_model_has_every_readout(name: str) -> None:
    make = {
        "GraphTransformer": lambda **o: GraphTransformer(7, 8, 3, 1, 2, **o),
        "GPS": lambda **o: GPS(7, 8, 3, 1, 2, **o),
        "Graphormer": lambda **o: Graphormer(7, 8, 3, 1, 2, **o),
        "Exphormer": lambda **o: Exphormer(7, 8, 3, 1, 2, **o),
        "SGFormer": lambda **o: SGFormer(7, 8, 3, **o),
        "AGNN": lambda **o: AGNN(7, 8, 3, **o),
    }[name]
    virtual = name not in ("SGFormer", "AGNN")
    batch = Batch.from_data_list([drawn(4, 6), drawn(5, 7)])
    given = batch.x.float(), batch.edge_index, None, batch.batch
    for pool, rows in {None: 9, "edge": 13, "mean": 2, "sum": 2, "max": 2, "mean-max": 2, "attention": 2}.items():
        for options in ({},) if not virtual else ({"virtual_nodes": 0}, {"virtual_nodes": 2}):
            assert make(pool=pool, **options)(*given).shape == (rows, 3)
    if virtual:
        assert make(pool="token", virtual_nodes=1)(*given).shape == (2, 3)
    with pytest.raises(ValueError, match="row of a virtual node"):
        make(pool="token", **({"virtual_nodes": 0} if virtual else {}))
