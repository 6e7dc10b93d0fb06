"""Attention along edges: the layer of UniMP, equal to PyTorch Geometric's TransformerConv."""

from __future__ import annotations

import math
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .._along_edges import along_edges
from .._linear import applied, linear
from ._edges import Adjacency, as_pairs, sorted_edges
from ._inputs import linear_from

Nodes = Tensor | tuple[Tensor, Tensor]
Weights = tuple[Int[Tensor, "2 edges"], Float[Tensor, "edges heads"]]


class EdgeAttention(nn.Module):
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
        out_channels: int,
        heads: int = 1,
        *,
        concat: bool = True,
        beta: bool = False,
        dropout: float = 0.0,
        edge_dim: int | None = None,
        bias: bool = True,
        root_weight: bool = True,
    ) -> None:
        super().__init__()
        if beta and not root_weight:
            raise ValueError("beta gates between the edges and the node itself, which root_weight=False leaves out")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got dropout={dropout}")
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
        source, target = (x, x) if isinstance(x, Tensor) else x
        self._check(source, target, edge_attr)
        q = self._by_head(applied(self.query, target))
        key, value = (self._by_head(part) for part in self._keys_and_values(source))
        pattern, order = sorted_edges(edge_index, len(source), len(target))
        dropout = self.dropout if self.training else 0.0
        if self.edge is None:
            y, _ = along_edges(q, key, value, pattern, dropout_p=dropout)
        else:
            assert edge_attr is not None
            by_head = self.edge.weight.unflatten(0, (self.heads, -1))
            u, e = self._edge_query(target, by_head), edge_attr.index_select(0, order).to(q.dtype)
            y, sums = along_edges(q, key, value, pattern, dropout_p=dropout, edge_query=u, edge_attr=e)
            assert sums is not None
            y = torch.baddbmm(y[0], sums[0], by_head.transpose(1, 2))[None]
        y = y[0].transpose(0, 1)
        out = self._rooted(y.flatten(1) if self.concat else y.mean(1), target)
        if return_attention_weights is None:
            return out
        return out, (as_pairs(edge_index), self._weights(q, key, edge_index, edge_attr))

    def _keys_and_values(self, x: Float[Tensor, "sources channels"]) -> list[Tensor]:
        """By maps of their own: the gradients of a single map's halves would be put side by side first."""
        if isinstance(self.key_value, nn.LazyLinear):
            return [*self.key_value(x).chunk(2, -1)]
        weight, bias = self.key_value.weight.chunk(2), self.key_value.bias
        biases = (None, None) if bias is None else bias.chunk(2)
        return [linear(x, w, b) for w, b in zip(weight, biases, strict=True)]

    def _by_head(self, x: Float[Tensor, "nodes inner"]) -> Float[Tensor, "1 heads nodes dim"]:
        return x.unflatten(-1, (self.heads, self.out_channels)).transpose(0, 1)[None]

    def _edge_query(
        self, x: Float[Tensor, "targets channels"], by_head: Float[Tensor, "heads dim features"]
    ) -> Float[Tensor, "1 heads targets features"]:
        """W' q: by one linear map of x, which is faster than a product for each head."""
        weight = by_head.mT @ self.query.weight.unflatten(0, (self.heads, -1))
        bias = None if self.query.bias is None else by_head.mT @ self.query.bias.view(self.heads, -1, 1)
        u = linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return u.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]

    def _rooted(self, y: Float[Tensor, "targets outer"], x: Float[Tensor, "targets channels"]) -> Tensor:
        if self.root is None:
            return y
        root = applied(self.root, x)
        if self.gate is None:
            return y + root
        # w . [y, r, y - r] = (w_1 + w_3) . y + (w_2 - w_3) . r, without a tensor of three times the width.
        own, other, difference = self.gate.weight.unflatten(1, (3, -1)).unbind(1)
        b = torch.sigmoid(y @ (own + difference).mT + root @ (other - difference).mT)
        return torch.lerp(y, root, b)

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
            given = "None" if edge_attr is None else tuple(edge_attr.shape)
            raise ValueError(
                f"edge_attr must be given if and only if the layer has an edge_dim; got edge_attr={given} and "
                f"edge_dim={None if self.edge is None else self.edge.in_features}"
            )
        if self.edge is not None and edge_attr is not None and edge_attr.shape[1:] != (self.edge.in_features,):
            raise ValueError(f"edge_attr must be (edges, {self.edge.in_features}); got {tuple(edge_attr.shape)}")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, heads={self.heads}, concat={self.concat}"
