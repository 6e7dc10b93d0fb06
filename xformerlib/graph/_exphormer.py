"""Exphormer: attention along edges, the links of an expander, and links with virtual nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .._arguments import Count, Rate, Size, made_by, shown
from .._autograd import outside_graphs
from .._inputs import check_is_position, check_values
from .._options import ExphormerOptions
from .._recorded import Recorded
from ..domains import Graph
from ..masks import Expander
from ..positions import Position
from ._edge_attention import EdgeAttention
from ._edges import check_edge_features
from ._gps import GPS, GPSLayer
from ._readout import Readout
from ._reset import reset

if TYPE_CHECKING:
    from typing_extensions import Unpack

KINDS = 3  # an edge, a link of the expander, a link with a virtual node


class Links(NamedTuple):
    """The pairs of ``Edges() | Expander(degree, seed) | Global(virtual nodes)``, each once, by target and then by source.

    Attributes:
        edge_index: sources above targets, tokens of the graph.
        kinds: 1 for each kind of link that a pair is, else 0: edge, expander, virtual node.
        of_edge: for each edge of the graph its pair.
    """

    edge_index: Int[Tensor, "2 links"]
    kinds: Float[Tensor, "links kinds"]
    of_edge: Int[Tensor, " edges"]

    def features(self, edge_attr: Float[Tensor, "edges features"] | None) -> Float[Tensor, "links all_features"]:
        """Features of edges, added up where several join a pair and 0 where none does, and beside them the kinds."""
        if edge_attr is None:
            return self.kinds
        by_link = edge_attr.new_zeros(len(self.kinds), edge_attr.shape[1]).index_add(0, self.of_edge, edge_attr)
        return torch.cat([by_link, self.kinds.to(edge_attr.dtype)], 1)


def links(graph: Graph, degree: int, seed: int) -> Links:
    """The links of a graph, found once for all layers."""
    find = outside_graphs(_links, "an expander is found by reading how many nodes each graph has")
    return graph.fact(("links", degree, seed), lambda: find(graph, degree, seed))


def _links(graph: Graph, degree: int, seed: int) -> Links:
    expander = Expander(degree, seed).neighbours(graph)
    source, target = graph.node_tokens[graph.edge_index]
    groups = [(source, target), (expander.col, expander.row), _with_virtual_nodes(graph)]
    keys = torch.cat([target * graph.num_tokens + source for source, target in groups])
    pairs, place = keys.unique(return_inverse=True)
    kinds = torch.zeros(len(pairs), KINDS, device=keys.device)
    kind = torch.repeat_interleave(torch.tensor([len(source) for source, _ in groups], device=keys.device))
    kinds[place, kind] = 1
    tokens = max(graph.num_tokens, 1)
    return Links(torch.stack([pairs % tokens, pairs // tokens]), kinds, place[: graph.num_edges])


def _with_virtual_nodes(graph: Graph) -> tuple[Tensor, Tensor]:
    """Sources and targets of all pairs within graphs of which one is a virtual node."""
    assert graph.offsets is not None
    first, device = graph.offsets[:-1], graph.offsets.device
    tokens = torch.arange(graph.num_tokens, device=device)
    item = torch.repeat_interleave(torch.arange(graph.num_graphs, device=device), graph.offsets.diff())
    virtual = (first[item][:, None] + torch.arange(graph.prefix, device=device)).flatten()
    other = tokens.repeat_interleave(graph.prefix)
    return torch.cat([virtual, other]), torch.cat([other, virtual])


class ExpanderAttention(Recorded):
    """Attention along edges, the links of an expander, and links with virtual nodes, told which is which (Exphormer, Shirzad et al. 2023,
    arXiv:2303.06147).

        y_i = W_o sum_j alpha_ij (v_j + W e_ij),   alpha_ij = softmax_j(q_i . (k_j + W e_ij) / sqrt(d))
        over the pairs of Edges() | Expander(degree, seed) | Global(graph.prefix), each once; each token itself is among them

    e_ij are the features of the edges that join the pair, and three numbers that are 1 if it is an edge, a link of the expander, with a
    virtual node. In the paper a pair that is linked in several ways counts several times, and features multiply keys instead of being
    added; added they need no vector for each link and head (see ``EdgeAttention``). Cost and memory are linear in edges and nodes. The
    expander depends on the order of nodes, as in the paper: another order is another draw of it.

    Args:
        channels, heads: of a token; attention heads.
        edge_dim: features of an edge; None if there are none.
        degree, seed: of the expander, as in ``masks.Expander``.
        dropout: of attention weights, in training.

    Shapes:
        x (tokens, channels), those of ``graph``; ``edge_attr`` (edges, edge_dim), in the order of ``graph.edge_index``.

    Example:
        >>> graph = Graph(torch.tensor([[0, 1], [1, 2]]), 30, virtual_nodes=1)
        >>> ExpanderAttention(16, 2, edge_dim=3, degree=4)(torch.randn(31, 16), graph, torch.randn(2, 3)).shape
        torch.Size([31, 16])
    """

    def __init__(
        self,
        channels: Size,
        heads: Size,
        *,
        edge_dim: Size | None = None,
        degree: Count = 4,
        seed: Count = 0,
        dropout: Rate = 0.0,
    ) -> None:
        super().__init__()
        head_channels, rest = divmod(channels, heads)
        if rest:
            raise ValueError(f"heads must divide channels={channels}; got heads={heads}")
        self.degree, self.seed = degree, seed
        self.edge_dim = edge_dim
        self.along = EdgeAttention(
            channels, head_channels, heads, edge_dim=(edge_dim or 0) + KINDS, dropout=dropout, root_weight=False
        )
        self.out = nn.Linear(channels, channels)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        reset(self)

    def forward(
        self,
        x: Float[Tensor, "tokens channels"],
        graph: Graph,
        edge_attr: Float[Tensor, "edges features"] | None = None,
        *,
        features: Float[Tensor, "links all_features"] | None = None,
    ) -> Float[Tensor, "tokens channels"]:
        """Attend along links. ``features`` are those of the links, where they are worked out once for several layers."""
        check_values("x", x)
        if not isinstance(graph, Graph):
            raise TypeError(f"graph must be a Graph, where the tokens live; got graph={shown(graph)}")
        check_edge_features(edge_attr, self.edge_dim is not None, graph.num_edges, self.edge_dim)
        found = links(graph, self.degree, self.seed)
        features = found.features(edge_attr) if features is None else features
        return self.out(self.along(x, found.edge_index, features.to(x.dtype)))

    def extra_repr(self) -> str:
        return f"degree={self.degree}, seed={self.seed}"


class _Layer(GPSLayer):
    """A layer whose attention is told the features of edges."""

    def attend(self, x: Tensor, graph: Graph, edge_attr: Tensor | None, **options: Any) -> Tensor:
        return self.attention(x, graph, edge_attr, **options)


class Exphormer(GPS):
    """GPS with attention along edges, an expander's links and virtual nodes (Shirzad et al. 2023, arXiv:2303.06147): linear in the graph.

    As in the paper it stands beside message passing in a GPS layer; ``passing=False`` leaves that out. What differs is in
    ``ExpanderAttention``; virtual nodes take part in norms and MLPs as nodes do.

    Args:
        in_channels, hidden_channels, out_channels, num_layers, heads, conv, edge_dim, pool: as in ``GPS``.
        degree, seed: of the expander; layers share it.
        virtual_nodes: of each graph.
        passing: whether messages pass along edges besides.
        position: embeddings, which are added to the nodes; links have no rotations and biases.
        attention_dropout, **layer: as in ``GPSLayer``: dropout, norm, activation, drop_path.

    Example:
        >>> model = Exphormer(7, 32, 3, num_layers=2, heads=4, edge_dim=3)
        >>> edge_index = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
        >>> model(torch.randn(4, 7), edge_index, torch.randn(4, 3)).shape
        torch.Size([4, 3])
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
        degree: Count = 4,
        seed: Count = 0,
        virtual_nodes: Count = 1,
        passing: bool = True,
        position: Position | None = None,
        pool: Readout = None,
        attention_dropout: Rate = 0.0,
        **layer: Unpack[ExphormerOptions],
    ) -> None:
        check_is_position(position)
        if position is not None and (position.rotations or position.biases):
            raise ValueError(
                "position of an Exphormer may have embeddings only; for rotations and biases use GPS with a mask"
            )
        wrong = [name for name in ("mask", "attention") if name in layer]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: an Exphormer attends along its links; use GPS for other attention")
        # Read by make_layer, which the base calls.
        self.degree, self.seed, self.passing = degree, seed, passing
        self._edge_dim, self._attention_dropout = None if edge_dim is None else hidden_channels, attention_dropout
        super().__init__(
            in_channels, hidden_channels, out_channels, num_layers, heads, conv=conv, edge_dim=edge_dim, position=position,
            pool=pool, virtual_nodes=virtual_nodes, **layer,
        )  # fmt: skip

    def shared(self, graph: Graph, edges: Float[Tensor, "edges channels"] | None) -> dict[str, Any]:
        """Features of the links."""
        return {"features": links(graph, self.degree, self.seed).features(edges)}

    def make_layer(self, channels: int, conv: Callable[[], nn.Module], heads: int, **layer: Any) -> GPSLayer:
        """One of the layers."""
        attention = ExpanderAttention(
            channels,
            heads,
            edge_dim=self._edge_dim,
            degree=self.degree,
            seed=self.seed,
            dropout=self._attention_dropout,
        )
        return _Layer(channels, made_by("conv", conv) if self.passing else None, attention=attention, **layer)
