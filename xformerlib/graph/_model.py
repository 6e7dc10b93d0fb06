"""What the models have in common: nodes in, and a row for each node or each graph out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from .._pooling import Pool, Pooling
from .._sublayers import NormLayer
from ..blocks import Encoder
from ..domains import Graph
from ..masks import Mask
from ..positions import Position
from ..positions._graph import on_nodes
from ._edges import Adjacency
from ._inputs import place_nodes


class GraphModel(nn.Module, ABC):
    """A model on PyTorch Geometric's interface: ``model(x, edge_index, edge_attr, batch)``, or ``model(data)``.

    Args:
        in_channels: features of a node; or a module that makes ``hidden_channels`` of what ``x`` holds, such as an embedding of atoms.
        hidden_channels: channels of a token.
        out_channels: of the output; None for the tokens themselves, or what pooling makes of them.
        pool: None for a row for each node, or one for each graph, as in ``Pooling``; with ``"token"`` it is that of a virtual node.
        virtual_nodes: learned tokens in front of each graph's nodes.
        heads: of attention pooling.

    Shapes:
        x (nodes, in_channels), ``edge_index`` (2, edges), ``edge_attr`` (edges, features), ``batch`` (nodes,), in any order. Returns
        (nodes, out_channels), or (graphs, out_channels).
    """

    def __init__(
        self,
        in_channels: int | nn.Module,
        hidden_channels: int,
        out_channels: int | None,
        *,
        pool: Pool | None = None,
        virtual_nodes: int = 0,
        heads: int = 1,
    ) -> None:
        super().__init__()
        if pool == "token" and not virtual_nodes:
            raise ValueError("pool='token' is the row of a virtual node; got virtual_nodes=0")
        self.embed = nn.Linear(in_channels, hidden_channels) if isinstance(in_channels, int) else in_channels
        self.virtual = nn.Parameter(torch.empty(virtual_nodes, hidden_channels)) if virtual_nodes else None
        options = {"heads": heads} if pool == "attention" else {}
        self.pool = None if pool is None else Pooling(hidden_channels, pool, **options)
        self.head = nn.Identity() if out_channels is None else nn.Linear(hidden_channels, out_channels)
        if self.virtual is not None:
            nn.init.normal_(self.virtual, std=0.02)

    @abstractmethod
    def run(
        self, x: Float[Tensor, "tokens channels"], graph: Graph, edge_attr: Shaped[Tensor, "edges *features"] | None
    ) -> Float[Tensor, "tokens channels"]:
        """Tokens of ``graph``, virtual nodes among them, to tokens. ``edge_attr`` is in the order of ``graph.edge_index``."""

    def forward(
        self,
        x: Any,
        edge_index: Adjacency | None = None,
        edge_attr: Tensor | None = None,
        batch: Int[Tensor, " nodes"] | None = None,
    ) -> Float[Tensor, "rows out_channels"]:
        """A row for each node, in the order in which they were given, or for each graph."""
        num_graphs = None
        if edge_index is None:
            data = x
            x, edge_index, edge_attr = data.x, data.edge_index, getattr(data, "edge_attr", None)
            batch = getattr(data, "batch", None)
            num_graphs = None if batch is None else data.num_graphs
        prefix = 0 if self.virtual is None else len(self.virtual)
        placed = place_nodes(edge_index, len(x), batch, virtual_nodes=prefix, num_graphs=num_graphs)
        graph = placed.graph
        tokens = on_nodes(graph, self.embed(placed.sorted(x)))
        if self.virtual is not None:
            assert graph.offsets is not None
            front = (graph.offsets[:-1, None] + torch.arange(prefix, device=tokens.device)).flatten()
            tokens = tokens.index_copy(0, front, self.virtual.to(tokens.dtype).repeat(graph.num_graphs, 1))
        tokens = self.run(tokens, graph, edge_attr)
        if self.pool is not None:
            return self.head(self.pool(tokens, graph))
        return self.head(placed.restored(tokens if not prefix else tokens.index_select(0, graph.node_tokens)))


def check_edge_features(edge_attr: Tensor | None, wanted: bool) -> None:
    """Raise unless a model that has an ``edge_dim``, and no other, is given features of edges."""
    if (edge_attr is not None) != wanted:
        came = "None" if edge_attr is None else tuple(edge_attr.shape)
        raise ValueError(f"edge_attr must be given if and only if the model has an edge_dim; got edge_attr={came}")


class GraphTransformer(GraphModel):
    """A Transformer whose tokens are nodes: who attends to whom, and where nodes are, is what it is given (Dwivedi and Bresson 2020,
    arXiv:2012.09699).

        mask=masks.Edges() | masks.Local(0)    along edges
        mask=None                              among all nodes of a graph, whatever else is in the batch
        mask=masks.Edges() | masks.Expander(4) | masks.Global(1)    with ``virtual_nodes=1``: Exphormer's (arXiv:2303.06147)
        position=positions.RandomWalk(dim, 20), positions.Sinusoidal(dim), positions.RelativeBias(heads), ...   sums of these

    Args:
        in_channels, hidden_channels, out_channels, pool, virtual_nodes: as in ``GraphModel``.
        num_layers, heads: blocks, attention heads.
        mask, position, **encoder: arguments of ``Encoder`` and ``Block``: dropout, drop_path, norm_layer, activation, ...

    Example:
        >>> model = GraphTransformer(7, 32, 3, num_layers=2, heads=4, pool="mean")
        >>> edge_index, batch = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), torch.tensor([0, 0, 1, 1])
        >>> model(torch.randn(4, 7), edge_index, batch=batch).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_channels: int | nn.Module,
        hidden_channels: int,
        out_channels: int | None,
        num_layers: int,
        heads: int,
        *,
        mask: Mask | None = None,
        position: Position | Callable[[], Position] | None = None,
        pool: Pool | None = None,
        virtual_nodes: int = 0,
        norm_layer: NormLayer = "layer",
        **encoder: Any,
    ) -> None:
        super().__init__(
            in_channels, hidden_channels, out_channels, pool=pool, virtual_nodes=virtual_nodes, heads=heads
        )
        self.encoder = Encoder(
            hidden_channels, num_layers, heads, mask=mask, position=position, norm_layer=norm_layer, **encoder
        )

    def run(
        self, x: Float[Tensor, "tokens channels"], graph: Graph, edge_attr: Shaped[Tensor, "edges *features"] | None
    ) -> Float[Tensor, "tokens channels"]:
        if edge_attr is not None:
            raise ValueError("edge_attr has no use in GraphTransformer; leave it out, or use GPS with an EdgeAttention")
        return self.encoder(x, graph)
