"""Attention on graphs whose nodes and edges are of several kinds: the layer of the heterogeneous graph Transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .._along_edges import Listed, Pattern, along_edges
from .._arguments import Size, check_size, shown
from .._inputs import check_values
from .._recorded import Recorded
from ..domains._made_once import made_once
from ._edges import Adjacency, as_pairs, sorted_edges

EdgeType = tuple[str, str, str]


class HeteroAttention(Recorded):
    """Each node attends to the nodes from which edges of any kind lead to it (HGT, Hu et al. 2020, arXiv:2003.01332).

        s_e = m_r (q_i . W_r k_j) / sqrt(d) + b_r                  for an edge e of kind r from j to i, by head
        y_i = sum_e softmax_e(s_e) W'_r v_j                        over the edges of all kinds into i
        x_i <- sigmoid(c) W gelu(y_i) + (1 - sigmoid(c)) x_i       q, k, v, W and c by the kind of node

    Keys and values have maps of their own for each kind of edge, W_r and W'_r, and a factor m_r; with ``relation_bias`` also a score b_r,
    which the paper has not. Where channels change, the second term of the last line is left out, and c. The function of PyTorch
    Geometric's ``HGTConv``, and by ``interop.pyg.from_pyg`` its weights.

    Args:
        in_channels: of nodes, a number or one for each kind.
        out_channels: of nodes; heads share them.
        metadata: the kinds of nodes, and those of edges, (source, relation, target): ``HeteroData.metadata()``.
        heads: attention heads.
        relation_bias: learn a score for each kind of edge and head.

    Shapes:
        ``x_dict`` of (nodes, in_channels) by kind of node, ``edge_index_dict`` of (2, edges), or sparse tensors of (targets, sources), by
        kind of edge, of which some may be missing. Returns (nodes, out_channels) by kind of node, for those that edges lead to.

    Raises:
        ValueError: kinds that are not in ``metadata``, tensors that do not fit.

    Example:
        >>> kinds = (["author", "paper"], [("author", "writes", "paper"), ("paper", "cites", "paper")])
        >>> layer = HeteroAttention({"author": 4, "paper": 8}, 16, kinds, heads=2)
        >>> x = {"author": torch.randn(2, 4), "paper": torch.randn(3, 8)}
        >>> edges = {kinds[1][0]: torch.tensor([[0, 1], [2, 2]]), kinds[1][1]: torch.tensor([[0], [1]])}
        >>> {kind: tuple(out.shape) for kind, out in layer(x, edges).items()}
        {'paper': (3, 16)}
    """

    def __init__(
        self,
        in_channels: int | dict[str, int],
        out_channels: Size,
        metadata: tuple[Sequence[str], Sequence[EdgeType]],
        heads: Size = 1,
        *,
        relation_bias: bool = False,
    ) -> None:
        super().__init__()
        if len(metadata) != 2 or not all(isinstance(part, (list, tuple)) for part in metadata):
            raise TypeError(
                f"metadata must be (kinds of nodes, kinds of edges), as of HeteroData.metadata(); got {metadata!r}"
            )
        self.node_types, self.edge_types = list(metadata[0]), [tuple(kind) for kind in metadata[1]]
        channels = dict.fromkeys(self.node_types, in_channels) if isinstance(in_channels, int) else dict(in_channels)
        self.heads, self.out_channels = check_size("heads", heads), check_size("out_channels", out_channels)
        if out_channels % heads:
            raise ValueError(f"heads must divide out_channels; got out_channels={out_channels} and heads={heads}")
        if set(channels) != set(self.node_types):
            raise ValueError(f"in_channels must be of the kinds of nodes {self.node_types}; got {list(channels)}")
        if not self.edge_types or {end for a, _, b in self.edge_types for end in (a, b)} - set(self.node_types):
            raise ValueError(f"metadata must have kinds of edges between {self.node_types}; got {self.edge_types}")
        for width in channels.values():
            check_size("in_channels", width)
        self.in_channels = [channels[kind] for kind in self.node_types]
        self.key_query_value = nn.ModuleList(nn.Linear(width, 3 * out_channels) for width in self.in_channels)
        self.out = nn.ModuleList(nn.Linear(out_channels, out_channels) for _ in self.node_types)
        self.skip = nn.Parameter(torch.empty(len(self.node_types)))
        relations, dim = len(self.edge_types), out_channels // heads
        self.key_map = nn.Parameter(torch.empty(relations, heads, dim, dim))
        self.value_map = nn.Parameter(torch.empty(relations, heads, dim, dim))
        self.factor = nn.Parameter(torch.empty(relations, heads))
        self.bias = nn.Parameter(torch.empty(relations, heads)) if relation_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; factors and gates begin at 1, scores of relations at 0."""
        for layer in (*self.key_query_value, *self.out):
            layer.reset_parameters()
        bound = math.sqrt(3 / self.key_map.shape[-1])  # Glorot's
        nn.init.uniform_(self.key_map, -bound, bound)
        nn.init.uniform_(self.value_map, -bound, bound)
        nn.init.ones_(self.factor)
        nn.init.ones_(self.skip)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[EdgeType, Adjacency]) -> dict[str, Tensor]:
        """Attend along edges of all kinds."""
        self._check(x_dict, edge_index_dict)
        counts = [len(x_dict[kind]) for kind in self.node_types]
        made = [
            layer(x_dict[kind]).unflatten(-1, (3 * self.heads, -1)).transpose(0, 1)
            for kind, layer in zip(self.node_types, self.key_query_value, strict=True)
        ]  # (3 heads, nodes, dim)
        query = torch.cat([part[self.heads : 2 * self.heads] for part in made], 1)[None]
        given = [r for r, kind in enumerate(self.edge_types) if kind in edge_index_dict]
        keys, values, scores = [], [], []
        for r in given:
            source = made[self.node_types.index(self.edge_types[r][0])]
            keys.append(source[: self.heads] @ (self.key_map[r] * self.factor[r, :, None, None]))
            values.append(source[2 * self.heads :] @ self.value_map[r])
            if self.bias is not None:
                scores.append(self.bias[r, :, None].expand(-1, source.shape[1]))
        if given:
            bias = torch.cat(scores, 1)[None, :, None] if scores else None
            key, value = (torch.cat(parts, 1)[None] for parts in (keys, values))
            y, _ = along_edges(query, key, value, self._pattern(counts, edge_index_dict), bias=bias)
        else:
            y = torch.zeros_like(query)
        by_kind = y[0].transpose(0, 1).flatten(1).split(counts)
        return {
            kind: self._gated(i, by_kind[i], x_dict[kind])
            for i, kind in enumerate(self.node_types)
            if any(target == kind for _, _, target in self.edge_types)
        }

    def _gated(self, i: int, y: Float[Tensor, "nodes out"], x: Float[Tensor, "nodes channels"]) -> Tensor:
        y = self.out[i](F.gelu(y))
        if x.shape[1] != self.out_channels:
            return y
        gate = torch.sigmoid(self.skip[i])
        return gate * y + (1 - gate) * x

    def _pattern(self, counts: list[int], edge_index_dict: dict[EdgeType, Adjacency]) -> Pattern | Listed:
        """All edges in one: the queries are all nodes, the keys the sources of each kind of edge, one kind behind the other."""
        edges = {kind: edge_index_dict[kind] for kind in self.edge_types if kind in edge_index_dict}
        what = ("kinds", tuple(self.node_types), tuple(counts), tuple(edges))
        return made_once(what, [*edges.values()], lambda: self._made_pattern(counts, edges))

    def _made_pattern(self, counts: list[int], edges: dict[Any, Adjacency]) -> Pattern | Listed:
        size, parts, keys = dict(zip(self.node_types, counts, strict=True)), [], 0
        begin = {kind: sum(counts[:i]) for i, kind in enumerate(self.node_types)}
        for (source, relation, target), adjacency in edges.items():
            pairs = as_pairs(adjacency).long()
            for name, ends, count in ((source, pairs[0], size[source]), (target, pairs[1], size[target])):
                if torch.compiler.is_dynamo_compiling():
                    inside = ((ends >= 0) & (ends < count)).all()
                    torch._assert_async(inside, f"edges must index the nodes of kind {name!r}")
                elif ends.numel() and not (int(ends.min()) >= 0 and int(ends.max()) < count):
                    raise ValueError(
                        f"edges of {(source, relation, target)} must index the {count} nodes of kind {name!r}; got indices from "
                        f"{int(ends.min())} to {int(ends.max())}"
                    )
            parts.append(torch.stack([pairs[0] + keys, pairs[1] + begin[target]]))
            keys += size[source]
        return sorted_edges(torch.cat(parts, 1), keys, sum(counts)).pattern

    def _check(self, x_dict: dict[str, Tensor], edge_index_dict: dict[EdgeType, Adjacency]) -> None:
        for name, given in (("x_dict", x_dict), ("edge_index_dict", edge_index_dict)):
            if not isinstance(given, Mapping):
                raise TypeError(f"{name} must be a dict of tensors by kind; got {name}={shown(given)}")
        missing = [kind for kind in self.node_types if kind not in x_dict]
        if missing:
            raise ValueError(f"x_dict must have every kind of nodes; got none of kind {missing[0]!r}")
        unknown = [kind for kind in edge_index_dict if kind not in self.edge_types]
        if unknown:
            raise ValueError(f"edge_index_dict must be of the kinds of edges {self.edge_types}; got {unknown[0]}")
        for kind, width in zip(self.node_types, self.in_channels, strict=True):
            check_values(f"x_dict[{kind!r}]", x_dict[kind])
            if x_dict[kind].ndim != 2 or x_dict[kind].shape[1] != width:
                raise ValueError(f"x_dict[{kind!r}] must be (nodes, {width}); got {tuple(x_dict[kind].shape)}")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, heads={self.heads}"
