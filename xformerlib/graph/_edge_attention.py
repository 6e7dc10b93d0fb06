"""Attention along edges: the layer of UniMP, equal to PyTorch Geometric's TransformerConv."""

from __future__ import annotations

import math
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .._along_edges import along_edges
from .._arguments import Rate, Size, shown
from .._autograd import is_compiling
from .._projection import is_plain
from .._recorded import Recorded
from ..domains import Graph
from ._edges import Adjacency, SortedEdges, as_pairs, sorted_edges
from ._inputs import linear_from

Nodes = Tensor | tuple[Tensor, Tensor]
Weights = tuple[Int[Tensor, "2 edges"], Float[Tensor, "edges heads"]]


class EdgeAttention(Recorded):
    """Each node attends to the nodes from which edges lead to it, features of edges included (UniMP, Shi et al. 2020, arXiv:2009.03509).

        alpha_ij = softmax_j( q_i . (k_j + W e_ij) / sqrt(d) )        over the edges j -> i
        y_i = sum_j alpha_ij (v_j + W e_ij)                           by head, then side by side or their mean
        y_i <- y_i + W_r x_i,    or with ``beta``   b_i W_r x_i + (1 - b_i) y_i,   b_i = sigmoid(w . [y_i, W_r x_i, y_i - W_r x_i])

    The function of PyTorch Geometric's ``TransformerConv``, with its arguments and, by ``interop.pyg.from_pyg``, its weights. No edge
    has a vector for each head: q . (k + W e) = q . k + (W' q) . e, and likewise for values, so that memory grows with the nodes and with
    what is given for edges. Parallel edges count apart; a node without edges gets W_r x_i.

    Args:
        in_channels: of nodes, -1 for as many as come at the first call; for edges between two kinds of nodes a pair, (sources, targets).
        out_channels: of each head.
        heads: attention heads.
        concat: put heads side by side; if not, their mean.
        beta: gate between what comes along edges and the node itself.
        dropout: of attention weights, in training.
        edge_dim: features of an edge; None if there are none.
        bias: whether linear maps have biases.
        root_weight: whether the node itself is added at all.

    Shapes:
        x (nodes, in_channels), or a pair for sources and targets; ``edge_index`` (2, edges), sources above targets, or a sparse tensor of
        (targets, sources), or a ``Graph``; ``edge_attr`` (edges, edge_dim). Returns (targets, heads * out_channels), or with
        ``return_attention_weights`` also the edges and alpha (edges, heads), as PyTorch Geometric has it.

    Example:
        >>> layer = EdgeAttention(16, 8, heads=4, edge_dim=3)
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> layer(torch.randn(3, 16), edge_index, torch.randn(3, 3)).shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: Size,
        heads: Size = 1,
        *,
        concat: bool = True,
        beta: bool = False,
        dropout: Rate = 0.0,
        edge_dim: Size | None = None,
        bias: bool = True,
        root_weight: bool = True,
    ) -> None:
        super().__init__()
        if beta and not root_weight:
            raise ValueError("beta gates between the edges and the node itself, which root_weight=False leaves out")
        if not isinstance(in_channels, int) and len(in_channels) != 2:
            raise ValueError(f"in_channels must be one number, or a pair for sources and targets; got {in_channels}")
        self.in_channels = (in_channels, in_channels) if isinstance(in_channels, int) else in_channels
        self.out_channels, self.heads, self.concat, self.dropout = out_channels, heads, concat, dropout
        source, target = self.in_channels
        inner, outer = heads * out_channels, heads * out_channels if concat else out_channels
        self.query = linear_from(target, inner, bias=bias)
        self.key_value = linear_from(source, 2 * inner, bias=bias)
        self.edge = None if edge_dim is None else nn.Linear(edge_dim, inner, bias=False)
        self.root = linear_from(target, outer, bias=bias) if root_weight else None
        self.gate = nn.Linear(3 * outer, 1, bias=False) if beta else None

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for layer in (self.query, self.key_value, self.edge, self.root, self.gate):
            if layer is not None:
                layer.reset_parameters()

    @overload
    def forward(self, x: Nodes, edge_index: Adjacency, edge_attr: Tensor | None = None) -> Tensor:
        """The nodes."""

    @overload
    def forward(
        self,
        x: Nodes,
        edge_index: Adjacency,
        edge_attr: Tensor | None = None,
        return_attention_weights: bool = ...,
    ) -> tuple[Tensor, Weights]:
        """The nodes, and the weights."""

    def forward(
        self,
        x: Nodes,
        edge_index: Adjacency,
        edge_attr: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor | tuple[Tensor, Weights]:
        """Attend along edges."""
        if not isinstance(x, Tensor) and not (
            isinstance(x, (tuple, list)) and len(x) == 2 and all(isinstance(part, Tensor) for part in x)
        ):
            raise TypeError(f"x must be a tensor of node features, or a pair for sources and targets; got {shown(x)}")
        source, target = (x, x) if isinstance(x, Tensor) else x
        self._check(source, target, edge_attr)
        if edge_attr is not None:
            _check_rows(edge_attr, edge_index)
        q = self._by_head(self.query(target))
        key, value = (self._by_head(part) for part in self.key_value(source).chunk(2, -1))
        edges = sorted_edges(edge_index, len(source), len(target))
        y = self._attended(q, key, value, edges, edge_attr)[0].transpose(0, 1)
        out = self._rooted(y.flatten(1) if self.concat else y.mean(1), target)
        if return_attention_weights is None:
            return out
        return out, (as_pairs(edge_index), self._weights(q, key, edge_index, edge_attr))

    def _attended(
        self, q: Tensor, key: Tensor, value: Tensor, edges: SortedEdges, edge_attr: Tensor | None
    ) -> Float[Tensor, "1 heads targets dim"]:
        """The sums of values by head."""
        dropout = self.dropout if self.training else 0.0
        if self.edge is None or edge_attr is None:
            return along_edges(q, key, value, edges.pattern, dropout_p=dropout)[0]
        if not is_plain(self.edge):
            # An adapter or a hook needs a call of the layer: each edge then has a key and a value of its own.
            more = self._by_head(self.edge(edge_attr.index_select(0, edges.order).to(q.dtype)))
            source, own = edges.pattern.col.long(), edges.keys_of_their_own()
            key, value = (x.index_select(2, source) + more for x in (key, value))
            return along_edges(q, key, value, own, dropout_p=dropout)[0]
        by_head = self.edge.weight.unflatten(0, (self.heads, -1))
        e = edge_attr.index_select(0, edges.order).to(q.dtype)
        u = q @ by_head
        y, sums = along_edges(q, key, value, edges.pattern, dropout_p=dropout, edge_query=u, edge_attr=e)
        assert sums is not None
        return y + sums @ by_head.mT

    def _by_head(self, x: Float[Tensor, "nodes inner"]) -> Float[Tensor, "1 heads nodes dim"]:
        return x.unflatten(-1, (self.heads, self.out_channels)).transpose(0, 1)[None]

    def _rooted(self, y: Float[Tensor, "targets outer"], x: Float[Tensor, "targets channels"]) -> Tensor:
        if self.root is None:
            return y
        root = self.root(x)
        if self.gate is None:
            return y + root
        return torch.lerp(y, root, torch.sigmoid(self.gate(torch.cat([y, root, y - root], -1))))

    def _weights(
        self, q: Tensor, key: Tensor, edge_index: Adjacency, edge_attr: Tensor | None
    ) -> Float[Tensor, "edges heads"]:
        """alpha, edge by edge as they were given."""
        source, target = as_pairs(edge_index).long()
        keys = key[0].transpose(0, 1)[source]
        if self.edge is not None and edge_attr is not None:
            keys = keys + self.edge(edge_attr.to(q.dtype)).unflatten(-1, (self.heads, -1))
        scores = (q[0].transpose(0, 1)[target] * keys).sum(-1) / math.sqrt(self.out_channels)
        largest = scores.new_full((q.shape[2], self.heads), -torch.inf)
        largest = largest.scatter_reduce(0, target[:, None].expand_as(scores), scores.detach(), "amax")
        weights = (scores - largest[target]).exp()
        return weights / weights.new_zeros(q.shape[2], self.heads).index_add(0, target, weights)[target]

    def _check(self, source: Tensor, target: Tensor, edge_attr: Tensor | None) -> None:
        for name, x, layer in (("sources", source, self.key_value), ("targets", target, self.query)):
            if x.ndim != 2 or (x.shape[1] != layer.in_features and not isinstance(layer, nn.LazyLinear)):
                raise ValueError(f"x must be (nodes, {layer.in_features}) for {name}; got {tuple(x.shape)}")
        if (self.edge is None) != (edge_attr is None):
            given = tuple(edge_attr.shape) if isinstance(edge_attr, Tensor) else shown(edge_attr)
            raise ValueError(
                f"edge_attr must be given if and only if the layer has an edge_dim; got edge_attr={given} and "
                f"edge_dim={None if self.edge is None else self.edge.in_features}"
            )
        if edge_attr is not None and not isinstance(edge_attr, Tensor):
            raise TypeError(f"edge_attr must be a tensor of features of edges; got edge_attr={shown(edge_attr)}")
        if self.edge is not None and edge_attr is not None and edge_attr.shape[1:] != (self.edge.in_features,):
            raise ValueError(f"edge_attr must be (edges, {self.edge.in_features}); got {tuple(edge_attr.shape)}")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, heads={self.heads}, concat={self.concat}"


def _check_rows(edge_attr: Tensor, edge_index: Adjacency) -> None:
    """Raise unless there is a row for each edge; not in a graph, where sizes may be symbols, which a comparison would tie to each other."""
    if is_compiling() or (isinstance(edge_index, Tensor) and edge_index.layout != torch.strided):
        return
    edges = edge_index.num_edges if isinstance(edge_index, Graph) else as_pairs(edge_index).shape[1]
    if len(edge_attr) != edges:
        raise ValueError(f"edge_attr must have a row for each of the {edges} edges; got {tuple(edge_attr.shape)}")
