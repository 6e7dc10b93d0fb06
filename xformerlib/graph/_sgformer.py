"""SGFormer: one kind of layer of linear attention beside a graph neural network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from .._arguments import Count, Rate, Size, made_by
from .._dropout import Dropout
from ..domains import Graph
from ._inputs import linear_from
from ._linear_attention import SGFormerAttention
from ._model import GraphModel
from ._readout import Readout

Aggregate = Literal["add", "cat"]


class SGFormer(GraphModel):
    """Linear attention among all nodes of a graph beside a graph neural network (Wu et al. 2023, arXiv:2306.10759), for large graphs.

        z_0 = drop(relu(norm(W x)));   z_{l+1} = drop(relu(norm((attention(z_l) + z_l) / 2)))          layer norm
        g_0 = drop(relu(norm(V x)));   g_{l+1} = drop(relu(norm(conv(g_l)))) + g_0                     batch norm
        y = W_o (a g + (1 - a) z),   a = ``graph_weight``;  or with ``aggregate="cat"``  W_o [z, g]

    The function of PyTorch Geometric's ``SGFormer``, but for batches, which are exact here, and the output, which is no log-softmax. What
    the paper says of lengths of queries and keys is in ``SGFormerAttention``. The norm of the graph neural network is over nodes.

    Args:
        in_channels, hidden_channels, out_channels, pool: as in ``GraphModel``; it has no virtual nodes.
        trans_num_layers, trans_num_heads, trans_dropout: of attention.
        gnn_num_layers, gnn_dropout: of the graph neural network.
        graph_weight, aggregate: above.
        conv: makes each of its layers, which map ``hidden_channels`` to as many; None for ``GCNConv`` of PyTorch Geometric, the paper's.

    Example:
        >>> model = SGFormer(7, 32, 3)
        >>> model(torch.randn(4, 7), torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        in_channels: int | nn.Module,
        hidden_channels: Size,
        out_channels: Size | None,
        trans_num_layers: Count = 2,
        trans_num_heads: Size = 1,
        trans_dropout: Rate = 0.5,
        gnn_num_layers: Count = 3,
        gnn_dropout: Rate = 0.5,
        graph_weight: float = 0.5,
        aggregate: Aggregate = "add",
        *,
        conv: Callable[[], nn.Module] | None = None,
        pool: Readout = None,
    ) -> None:
        if aggregate not in get_args(Aggregate):
            raise ValueError(f"aggregate must be 'add' or 'cat'; got aggregate={aggregate!r}")
        if not 0 <= graph_weight <= 1:
            raise ValueError(f"graph_weight must be in [0, 1]; got graph_weight={graph_weight}")
        given = isinstance(in_channels, nn.Module)
        out_hidden = hidden_channels * (2 if aggregate == "cat" else 1)
        super().__init__(in_channels if given else nn.Identity(), out_hidden, out_channels, pool=pool)
        width = hidden_channels if isinstance(in_channels, nn.Module) else in_channels
        conv = _gcn(hidden_channels) if conv is None else conv
        self.graph_weight, self.aggregate = graph_weight, aggregate
        self.attention_in, self.conv_in = (linear_from(width, hidden_channels) for _ in range(2))
        self.attentions = nn.ModuleList(
            SGFormerAttention(hidden_channels, trans_num_heads, hidden_channels) for _ in range(trans_num_layers)
        )
        self.attention_norms = nn.ModuleList(nn.LayerNorm(hidden_channels) for _ in range(trans_num_layers + 1))
        self.convs = nn.ModuleList(made_by("conv", conv) for _ in range(gnn_num_layers))
        self.conv_norms = nn.ModuleList(nn.BatchNorm1d(hidden_channels) for _ in range(gnn_num_layers + 1))
        self.attention_dropout, self.conv_dropout = Dropout(trans_dropout), Dropout(gnn_dropout)

    def run(
        self, x: Float[Tensor, "tokens in_channels"], graph: Graph, edge_attr: Shaped[Tensor, "edges *features"] | None
    ) -> Float[Tensor, "tokens channels"]:
        self.refuse_edge_features(edge_attr, "GPS")
        z, g = self._attended(x, graph), self._passed(x, graph)
        if self.aggregate == "cat":
            return torch.cat([z, g], -1)
        return (
            1 - self.graph_weight
        ) * z + self.graph_weight * g  # not lerp: under autocast the two have different dtypes

    def _attended(self, x: Tensor, graph: Graph) -> Tensor:
        first, *norms = self.attention_norms
        z = self.attention_dropout(first(self.attention_in(x)).relu())
        for attention, norm in zip(self.attentions, norms, strict=True):
            z = self.attention_dropout(norm((attention(z, graph) + z) / 2).relu())
        return z

    def _passed(self, x: Tensor, graph: Graph) -> Tensor:
        first, *norms = self.conv_norms
        start = g = self.conv_dropout(first(self.conv_in(x)).relu())
        for conv, norm in zip(self.convs, norms, strict=True):
            g = self.conv_dropout(norm(conv(g, graph.edge_index)).relu()) + start
        return g


def _gcn(channels: int) -> Callable[[], nn.Module]:
    from torch_geometric.nn import GCNConv

    return lambda: GCNConv(channels, channels)
