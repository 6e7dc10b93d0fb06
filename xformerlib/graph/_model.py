"""What the models have in common: nodes in, and a row for each node or each graph out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from .._arguments import Count, Size, shown
from .._inputs import Masks, Positions
from .._options import GraphEncoderOptions
from .._pooling import Pooling
from .._recorded import Recorded
from .._sublayers import NormLayer, normed
from ..blocks import Encoder
from ..domains import Graph
from ..positions._graph import on_nodes
from ._edges import Adjacency, as_pairs, check_ends
from ._inputs import check_nodes, linear_from, place_nodes
from ._pairs import worked_out_once
from ._readout import EdgeReadout, Readout
from ._reset import reset

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GraphModel(Recorded, ABC):
    """A model on PyTorch Geometric's interface: ``model(x, edge_index, edge_attr, batch)``, or ``model(data)``.

    Args:
        in_channels: features of a node, -1 for as many as come at the first call; or a module that makes ``hidden_channels`` of what
            ``x`` holds, such as an embedding of atoms.
        hidden_channels: channels of a token.
        out_channels: of the output; None for the tokens themselves, or what pooling makes of them.
        pool: None for a row for each node, or one for each graph, as in ``Pooling``; with ``"token"`` it is that of a virtual node.
            ``"edge"`` for a row for each edge, by ``EdgeReadout(hidden_channels)``, or an ``EdgeReadout``.
        virtual_nodes: learned tokens in front of each graph's nodes.
        heads: of attention pooling.

    Shapes:
        x (nodes, in_channels), ``edge_index`` (2, edges), ``edge_attr`` (edges, features), ``batch`` (nodes,), in any order;
        ``edge_label_index`` (2, pairs). Returns (nodes, out_channels), (graphs, out_channels), or (edges or pairs, out_channels).
    """

    def __init__(
        self,
        in_channels: int | nn.Module,
        hidden_channels: Size,
        out_channels: Size | None,
        *,
        pool: Readout = None,
        virtual_nodes: Count = 0,
        heads: Size = 1,
    ) -> None:
        super().__init__()
        if pool == "token" and not virtual_nodes:
            raise ValueError("pool='token' is the row of a virtual node; got virtual_nodes=0")
        self.embed = linear_from(in_channels, hidden_channels) if isinstance(in_channels, int) else in_channels
        self.virtual = nn.Parameter(torch.empty(virtual_nodes, hidden_channels)) if virtual_nodes else None
        self.pool = _readout(pool, hidden_channels, heads)
        self.head: nn.Module = nn.Identity() if out_channels is None else nn.Linear(hidden_channels, out_channels)
        self._draw_virtual_nodes()

    def _draw_virtual_nodes(self) -> None:
        if self.virtual is not None:
            nn.init.normal_(self.virtual, std=0.02)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self._draw_virtual_nodes()
        reset(self)

    @property
    def reads_edge_features(self) -> bool:
        """Whether the readout, whatever the layers do, is told the features of edges."""
        return isinstance(self.pool, EdgeReadout) and self.pool.edge is not None

    def refuse_edge_features(self, edge_attr: Tensor | None, instead: str) -> None:
        """Raise if features of edges are given to a model of which no part reads them; ``instead`` names one that does."""
        if edge_attr is not None and not self.reads_edge_features:
            raise ValueError(f"edge_attr has no use in {type(self).__name__}; leave it out, or use {instead}")

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
        *,
        edge_label_index: Int[Tensor, "2 pairs"] | None = None,
        num_graphs: Count | None = None,
    ) -> Float[Tensor, "rows out_channels"]:
        """A row for each node, in the order in which they were given, for each graph, or for each edge.

        ``edge_label_index`` names other pairs of nodes than the edges to have rows, as PyTorch Geometric's ``RandomLinkSplit`` does.
        ``num_graphs`` counts the graphs of ``batch``, if the last ones may have no nodes; ``torch.compile(fullgraph=True)`` needs it for
        a row for each graph, since it cannot read ``batch``.
        """
        data = None
        if edge_index is None:
            data = _data_of(x)
            if getattr(data, "edge_weight", None) is not None:
                raise ValueError(
                    "data.edge_weight has no use here; give it as a feature of edges, "
                    "data.edge_attr = data.edge_weight[:, None], to a model with an edge_dim, or take it out of data"
                )
            x, edge_index, edge_attr = data.x, data.edge_index, getattr(data, "edge_attr", None)
            batch = getattr(data, "batch", None)
            num_graphs = None if batch is None else data.num_graphs if num_graphs is None else num_graphs
            if isinstance(self.pool, EdgeReadout) and edge_label_index is None:
                edge_label_index = getattr(data, "edge_label_index", None)
        check_nodes(x, self.embed, "x" if data is None else "data.x")
        if edge_label_index is not None and not isinstance(self.pool, EdgeReadout):
            raise ValueError("edge_label_index asks for rows of pairs of nodes; build the model with pool='edge'")
        prefix = 0 if self.virtual is None else len(self.virtual)
        by_graph = isinstance(self.pool, Pooling)
        placed = place_nodes(edge_index, len(x), batch, virtual_nodes=prefix, num_graphs=num_graphs, by_graph=by_graph)
        graph = placed.graph
        tokens = on_nodes(graph, self.embed(placed.sorted(x)))
        if self.virtual is not None:
            assert graph.offsets is not None
            front = (graph.offsets[:-1, None] + torch.arange(prefix, device=graph.device)).flatten().to(tokens.device)
            tokens = tokens.index_copy(0, front, self.virtual.to(tokens.dtype).repeat(graph.num_graphs, 1))
        tokens = self.run(tokens, graph, edge_attr)
        if isinstance(self.pool, Pooling):
            return self.head(self.pool(tokens, graph))
        nodes = placed.restored(tokens if not prefix else tokens.index_select(0, graph.node_tokens.to(tokens.device)))
        if self.pool is None:
            return self.head(nodes)
        features = edge_attr if self.reads_edge_features else None
        if edge_label_index is None:
            return self.head(self.pool(nodes, as_pairs(edge_index), features))
        check_ends("edge_label_index", edge_label_index, len(nodes), len(nodes))
        return self.head(self.pool(nodes, edge_label_index, None))


def _data_of(x: Any) -> Any:
    """A batch of PyTorch Geometric's, which was given in place of ``x``."""
    if isinstance(x, Tensor) or x is None or not hasattr(x, "edge_index"):
        if hasattr(x, "edge_types"):
            raise TypeError(
                f"data must be a graph of one kind of nodes; got {type(x).__name__}. Use data.to_homogeneous(), or HeteroAttention."
            )
        raise TypeError(
            f"edge_index must be given with x, a tensor (2, edges), or one Data with both; got edge_index=None and x={shown(x)}. "
            "Without edges: torch.empty(2, 0).long()."
        )
    if getattr(x, "x", None) is None:
        raise ValueError(
            "data.x must hold node features, one row for each node; got None. Set data.x, such as torch.ones(nodes, 1)."
        )
    return x


def _readout(pool: Readout, channels: int, heads: int) -> Pooling | EdgeReadout | None:
    if pool is None or isinstance(pool, EdgeReadout):
        return pool
    if pool == "edge":
        return EdgeReadout(channels)
    return Pooling(channels, pool, heads=heads) if pool == "attention" else Pooling(channels, pool)


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
        mask, position: of all layers or of each, as in ``Encoder``.
        **encoder: further arguments of ``Encoder`` and ``Block``: dropout, drop_path, norm_layer, activation, ...

    Example:
        >>> model = GraphTransformer(7, 32, 3, num_layers=2, heads=4, pool="mean")
        >>> edge_index, batch = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), torch.tensor([0, 0, 1, 1])
        >>> model(torch.randn(4, 7), edge_index, batch=batch).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_channels: int | nn.Module,
        hidden_channels: Size,
        out_channels: Size | None,
        num_layers: Size,
        heads: Size,
        *,
        mask: Masks = None,
        position: Positions = None,
        pool: Readout = None,
        virtual_nodes: Count = 0,
        norm_layer: NormLayer = "layer",
        **encoder: Unpack[GraphEncoderOptions],
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
        self.refuse_edge_features(edge_attr, "GPS with an EdgeAttention")
        if self.encoder.checkpoint:  # each block is computed again by itself, scores included
            return self.encoder(x, graph)
        x, shared = self.encoder.embed(x, graph), worked_out_once(self.encoder.position)
        for block in self.encoder.blocks:
            x = block(x, graph, position=shared)
        return normed(self.encoder.norm, x, graph)
