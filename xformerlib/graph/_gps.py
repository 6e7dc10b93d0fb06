"""GPS: a message-passing layer and global attention beside each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from .._arguments import Count, Rate, Size, made_by
from .._inputs import check_is_position
from .._options import AttentionOptions, GPSOptions
from .._recorded import Recorded
from .._sublayers import Activation, FeedForward, NormLayer, Residual, TokenNorm, norm_factory
from ..attention import Attention
from ..domains import Domain, Graph
from ..masks import Mask
from ..positions import Position
from ..positions._graph import on_nodes
from ._edge_attention import EdgeAttention
from ._edges import Adjacency, check_edge_features, width_of
from ._inputs import check_nodes, linear_from, place_nodes
from ._model import GraphModel
from ._pairs import worked_out_once
from ._readout import Readout
from ._reset import reset

if TYPE_CHECKING:
    from typing_extensions import Unpack

# As in blocks, or "batch", or a module that makes one of PyTorch Geometric's norms, which is told the graph of each node.
GraphNorm = NormLayer | str | None


class GPSLayer(Recorded):
    """Message passing along edges and attention among all nodes of a graph, added (GPS, Rampášek et al. 2022, arXiv:2205.12454).

        h_M = norm(x + dropout(conv(x, edges)));   h_A = norm(x + dropout(attention(x)))
        y = norm(h + mlp(h)),   h = h_M + h_A,   mlp of width 2 * channels

    The function of PyTorch Geometric's ``GPSConv``. Attention is computed within each graph and nowhere padded, and takes a mask and
    positions besides. Nodes are packed, so that norms over nodes, such as batch norm, see nodes that exist and no others. On a
    ``Graph`` with virtual nodes messages pass between nodes, and attention sees all tokens.

    Args:
        channels: of a node.
        conv: a module called as ``conv(x, edge_index)``, or ``conv(x, edge_index, edge_attr=...)`` where edges have features, which
            returns ``channels`` for each node: an ``EdgeAttention``, any of PyTorch Geometric's; None for attention alone.
        heads: of global attention.
        dropout: of both branches and in the MLP.
        activation: of the MLP.
        norm: ``"batch"``, ``"layer"``, ``"rms"``, None, or what makes a norm from ``channels``: PyTorch Geometric's ``GraphNorm``, say,
            which is told which nodes are of a graph.
        drop_path: stochastic depth of each branch, for whole graphs.
        attention: a module called as ``attention(x, graph)`` to use instead: a linear one, say.
        mask, position, **options: of global attention, as in ``Attention``; its ``dropout`` is here ``attention_dropout``.

    Shapes:
        x (nodes, channels), ``edge_index`` (2, edges) or a ``Graph``, ``edge_attr`` (edges, features), ``batch`` (nodes,) in any order.
        Returns (nodes, channels); on a ``Graph`` x and y have a row for each token.

    Example:
        >>> layer = GPSLayer(16, EdgeAttention(16, 4, heads=4, edge_dim=3), heads=4, position=positions.RelativeBias(4))
        >>> edge_index, batch = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), torch.tensor([0, 0, 1, 1])
        >>> layer(torch.randn(4, 16), edge_index, torch.randn(4, 3), batch).shape
        torch.Size([4, 16])
    """

    def __init__(
        self,
        channels: Size,
        conv: nn.Module | None,
        heads: Size = 1,
        *,
        dropout: Rate = 0.0,
        activation: Activation = "relu",
        norm: GraphNorm = "batch",
        drop_path: Rate = 0.0,
        attention: nn.Module | None = None,
        attention_dropout: Rate = 0.0,
        mask: Mask | None = None,
        position: Position | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        if attention is not None and (mask is not None or position is not None or attention_dropout or options):
            raise ValueError("mask, position and options make the attention; an attention that is given has its own")
        self.channels = channels
        self.conv = conv
        self.attention = attention or Attention(
            channels, heads, mask=mask, position=position, dropout=attention_dropout, **options
        )
        make = _norm_factory(norm)
        count = 2 if conv is None else 3
        residuals = [Residual(channels, "post", make, None, dropout, drop_path) for _ in range(count)]
        self.attention_residual, self.feed_forward_residual = residuals[:2]
        self.conv_residual = None if conv is None else residuals[2]
        self.feed_forward = FeedForward(channels, hidden=2 * channels, activation=activation, dropout=dropout)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        reset(self)

    def forward(
        self,
        x: Float[Tensor, "tokens channels"],
        edge_index: Adjacency,
        edge_attr: Float[Tensor, "edges features"] | None = None,
        batch: Int[Tensor, " nodes"] | None = None,
        **attend: Any,
    ) -> Float[Tensor, "tokens channels"]:
        """Nodes to nodes. Further arguments are those of the attention: a position that layers share."""
        check_nodes(x, None)
        virtual = edge_index.prefix if isinstance(edge_index, Graph) else 0
        placed = place_nodes(edge_index, len(x), batch, virtual_nodes=virtual)
        return placed.restored(self.run(placed.sorted(x), placed.graph, edge_attr, **attend))

    def run(
        self, x: Float[Tensor, "tokens channels"], graph: Graph, edge_attr: Tensor | None = None, **attend: Any
    ) -> Float[Tensor, "tokens channels"]:
        """Tokens of ``graph`` to tokens."""
        h = self.attention_residual(x, lambda y: self.attend(y, graph, edge_attr, **attend), graph)
        if self.conv is not None:
            h = h + self._passed(x, graph, edge_attr)
        return self.feed_forward_residual(h, lambda y: self.feed_forward(y), graph)

    def attend(self, x: Tensor, graph: Graph, edge_attr: Tensor | None, **options: Any) -> Tensor:
        """The attention, which here is not told the features of edges."""
        return self.attention(x, graph, **options)

    def _passed(self, x: Tensor, graph: Graph, edge_attr: Tensor | None) -> Tensor:
        """The branch of messages; 0 at virtual nodes."""
        assert self.conv is not None and self.conv_residual is not None
        conv, features = self.conv, {} if edge_attr is None else {"edge_attr": edge_attr}
        if not graph.prefix:
            return self.conv_residual(x, lambda y: conv(y, graph.edge_index, **features), graph)
        nodes = graph.fact("without virtual nodes", lambda: _without_virtual_nodes(graph))
        y = x.index_select(0, graph.node_tokens)
        return on_nodes(graph, self.conv_residual(y, lambda y: conv(y, nodes.edge_index, **features), nodes))


class GPS(GraphModel):
    """A stack of GPS layers (Rampášek et al. 2022, arXiv:2205.12454).

    The paper's recipe is three choices: encodings of places and structure (``position``: its best for molecules is
    ``positions.RandomWalk(hidden_channels, 20)``, for others ``positions.Sinusoidal``, from Laplacian eigenvectors), a message-passing
    layer (``conv``), and global attention. Its code joins encodings to a node's features side by side; here they are added.

    Args:
        in_channels, hidden_channels, out_channels, pool, virtual_nodes: as in ``GraphModel``.
        num_layers, heads: layers, heads of global attention.
        conv: makes the message-passing layer of each layer, which maps ``hidden_channels`` to as many; None for ``EdgeAttention`` with
            ``heads``. The paper's for molecules is ``lambda: GINEConv(MLP(...))``, of PyTorch Geometric.
        edge_dim: features of an edge, or a module that makes ``hidden_channels`` of what ``edge_attr`` holds, such as an embedding of
            bonds. Layers are given these ``hidden_channels`` as ``edge_attr``.
        position: embeddings are added to the nodes; rotations and biases serve the attention of all layers.
        **layer: further arguments of ``GPSLayer``: dropout, attention_dropout, norm, mask, drop_path, ...

    Example:
        >>> model = GPS(7, 32, 1, num_layers=2, heads=4, edge_dim=3, position=positions.RandomWalk(32, 8), pool="sum")
        >>> edge_index, batch = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), torch.tensor([0, 0, 1, 1])
        >>> model(torch.randn(4, 7), edge_index, torch.randn(4, 3), batch).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        in_channels: int | nn.Module,
        hidden_channels: Size,
        out_channels: Size | None,
        num_layers: int,
        heads: Size,
        *,
        conv: Callable[[], nn.Module] | None = None,
        edge_dim: int | nn.Module | None = None,
        position: Position | None = None,
        pool: Readout = None,
        virtual_nodes: Count = 0,
        **layer: Unpack[GPSOptions],
    ) -> None:
        super().__init__(
            in_channels, hidden_channels, out_channels, pool=pool, virtual_nodes=virtual_nodes, heads=heads
        )
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1; got num_layers={num_layers}")
        check_is_position(position)
        if isinstance(conv, nn.Module):
            raise TypeError(
                f"conv must be a function that makes the layer of each layer, such as lambda: GINEConv(...); got the layer "
                f"{type(conv).__name__}"
            )
        self.embed_edges = (
            linear_from(edge_dim, hidden_channels, name="edge_dim") if isinstance(edge_dim, int) else edge_dim
        )
        self.position = position
        if conv is None:
            head_dim, rest = divmod(hidden_channels, heads)
            if rest:
                raise ValueError(f"heads must divide hidden_channels={hidden_channels}; got heads={heads}")
            features = None if edge_dim is None else hidden_channels

            def conv() -> nn.Module:
                return EdgeAttention(hidden_channels, head_dim, heads, edge_dim=features)

        self.layers = nn.ModuleList(self.make_layer(hidden_channels, conv, heads, **layer) for _ in range(num_layers))

    def make_layer(self, channels: int, conv: Callable[[], nn.Module], heads: int, **layer: Any) -> GPSLayer:
        """One of the layers."""
        return GPSLayer(channels, made_by("conv", conv), heads, **layer)

    def run(
        self, x: Float[Tensor, "tokens channels"], graph: Graph, edge_attr: Shaped[Tensor, "edges *features"] | None
    ) -> Float[Tensor, "tokens channels"]:
        check_edge_features(edge_attr, self.embed_edges is not None, graph.num_edges, width_of(self.embed_edges))
        edges = None if self.embed_edges is None else self.embed_edges(edge_attr)
        for embedding in () if self.position is None else self.position.embeddings:
            x = embedding(x, graph)
        shared = self.shared(graph, edges)
        for layer in self.layers:
            x = layer(x, graph, edges, **shared)
        return x

    def shared(self, graph: Graph, edges: Float[Tensor, "edges channels"] | None) -> dict[str, Any]:
        """What the attention of every layer is given beside tokens, worked out once."""
        position = worked_out_once(self.position)
        return {} if position is None else {"position": position}


class _WithinGraphs(TokenNorm):
    """A norm of PyTorch Geometric's, told the graph of each token."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Float[Tensor, "tokens dim"], domain: Domain | None = None) -> Float[Tensor, "tokens dim"]:
        return self.norm(x, batch=None if domain is None else domain.items)


def _norm_factory(norm: GraphNorm) -> Callable[[int], nn.Module]:
    if norm is None:
        return lambda _: nn.Identity()
    if norm == "batch":
        return nn.BatchNorm1d
    if isinstance(norm, str) and norm not in ("layer", "rms"):
        raise ValueError(
            f"norm must be 'batch', 'layer', 'rms', None or a callable that makes a module; got norm={norm!r}"
        )
    make = norm_factory(norm, "norm")  # type: ignore[arg-type]

    def made(channels: int) -> nn.Module:
        module = make(channels)
        own = "batch" in inspect.signature(module.forward).parameters
        return _WithinGraphs(module) if own else module

    return made


def _without_virtual_nodes(graph: Graph) -> Graph:
    return Graph(graph.edge_index, graph.num_nodes, batch=graph.batch, num_graphs=graph.num_graphs)
