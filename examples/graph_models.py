"""The models of ``graph.py``: xformerlib's graph Transformers, and graph neural networks of PyTorch Geometric between the same ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from graph_data import Data
from graph_options import BASELINES, Options
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GATv2Conv, GCNConv, GINConv, GINEConv

from xformerlib import domains, graph, masks, positions

WALK, EIGENVECTORS, HOPS = 16, 16, 16
PROPAGATIONS, TELEPORT = 10, 0.1


def build(o: Options, data: Data) -> graph.GraphModel:
    """The model that was asked for, for such graphs, with the head that was asked for."""
    model = body(o, data)
    if o.head == "mlp":
        last = model.head
        assert isinstance(last, nn.Linear)
        model.head = nn.Sequential(nn.Linear(last.in_features, o.dim), nn.ReLU(), nn.Linear(o.dim, last.out_features))
    return model


def body(o: Options, data: Data) -> graph.GraphModel:
    """The model with a linear head."""
    embed, edges = encoder(o.dim, data.graphs.x, o.input_dropout), None
    if data.graphs.edge_attr is not None:
        edges = encoder(o.dim, data.graphs.edge_attr)
    pool = None if data.of_nodes else o.pool
    ends: dict[str, Any] = {"in_channels": embed, "hidden_channels": o.dim, "out_channels": data.outputs, "pool": pool}
    sizes: dict[str, Any] = {"num_layers": o.depth, "heads": o.heads}
    norm = None if o.norm == "none" else o.norm
    place = encoding(o, data)
    conv = None if o.messages is None or o.messages == "attention" else partial(message, o.messages, o, edges)
    if o.model == "gps":
        mask = masks.Edges() if o.attend == "edges" else None
        return graph.GPS(
            **ends, **sizes, conv=conv, mask=mask, edge_dim=edges, position=place, norm=norm, dropout=o.dropout
        )
    if o.model == "exphormer":
        return graph.Exphormer(**ends, **sizes, edge_dim=edges, position=place, norm=norm, dropout=o.dropout)
    if o.model == "graph-transformer":
        # Nodes of a large graph look along edges, those of a small one at all others, and count the hops between.
        own: dict[str, Any] = {"mask": masks.Edges(self_loops=True), "position": place}
        if not data.of_nodes:
            hops = positions.RelativeBias(o.heads, buckets=HOPS)
            own = {"position": hops if place is None else place + hops}
        return graph.GraphTransformer(**ends, **sizes, **own, dropout=o.dropout)
    if o.model == "graphormer":
        # Of degree and paths it is told by itself.
        ends["pool"] = None if data.of_nodes else "token"
        return graph.Graphormer(**ends, **sizes, edge_dim=edges, dropout=o.dropout)
    if o.model == "sgformer":
        return graph.SGFormer(
            **ends, trans_num_layers=1, trans_num_heads=o.heads, trans_dropout=o.dropout,
            gnn_num_layers=o.depth, gnn_dropout=o.dropout, graph_weight=o.graph_weight, conv=conv,
        )  # fmt: skip
    if o.model == "agnn":
        return graph.AGNN(**ends, num_layers=o.depth, teleport=o.teleport, dropout=o.dropout)
    return Network(o, edges, **ends, position=place)


def uses_edges(o: Options) -> bool:
    """Whether a model is given the features of edges."""
    return o.model in ("gps", "exphormer", "graphormer", "gat", "gine")


def encoder(dim: int, values: Tensor, dropout: float = 0.0) -> nn.Module:
    """What makes ``dim`` channels of numbers, or of categories, of which there are as many as the data has."""
    if values.is_floating_point():
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(values.shape[1], dim))
    return graph.AtomEncoder(dim, [int(size) + 1 for size in values.amax(0)])


def encoding(o: Options, data: Data) -> positions.Position | None:
    """What nodes are told of the structure around them."""
    name = o.position or ("none" if data.of_nodes or data.graphs.places is not None else "walk")
    if name != "none" and o.model in ("graphormer", "sgformer", "agnn"):
        if o.position is None:
            return None
        raise ValueError(f"--position {name} has no use in {o.model}; give none, or leave it out")
    make: dict[str, Callable[[], positions.Position | None]] = {
        "none": lambda: None,
        "walk": lambda: positions.RandomWalk(o.dim, WALK),
        "laplacian": lambda: positions.Sinusoidal(o.dim, eigenvectors=min(EIGENVECTORS, o.dim // 2)),
    }
    return make[name]()


def message(kind: str, o: Options, edges: nn.Module | None) -> nn.Module:
    """A layer of PyTorch Geometric's for messages along edges."""
    if kind == "gcn":
        return GCNConv(o.dim, o.dim)
    if kind == "appnp":
        return APPNP(PROPAGATIONS, TELEPORT)
    if kind == "gat":
        return GATv2Conv(o.dim, o.dim // o.heads, o.heads, edge_dim=None if edges is None else o.dim)
    perceptron = nn.Sequential(nn.Linear(o.dim, o.dim), nn.ReLU(), nn.Linear(o.dim, o.dim))
    return GINConv(perceptron) if kind == "gin" or edges is None else GINEConv(perceptron)


class Network(graph.GraphModel):
    """A graph neural network of layers of PyTorch Geometric's, which starts and ends as xformerlib's models do.

    Each layer is followed by a norm, ReLU and dropout, and with --residual added to its input: what tuned ones are made of
    (Luo et al. 2024, arXiv:2406.08993).
    """

    def __init__(
        self, o: Options, edges: nn.Module | None, *, position: positions.Position | None, **ends: Any
    ) -> None:
        super().__init__(**ends)
        assert o.model in BASELINES
        self.embed_edges, self.position = edges if uses_edges(o) else None, position
        self.convs = nn.ModuleList(message(o.model, o, edges) for _ in range(o.depth))
        norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}[o.norm]
        self.norms = nn.ModuleList(norm(o.dim) for _ in range(o.depth))
        self.dropout, self.residual = nn.Dropout(o.dropout), o.residual

    def run(self, x: Tensor, graph: domains.Graph, edge_attr: Tensor | None) -> Tensor:
        for embedding in () if self.position is None else self.position.embeddings:
            x = embedding(x, graph)
        edges = {} if self.embed_edges is None else {"edge_attr": self.embed_edges(edge_attr)}
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = self.dropout(torch.relu(norm(conv(x, graph.edge_index, **edges))))
            x = x + y if self.residual else y
        return x
