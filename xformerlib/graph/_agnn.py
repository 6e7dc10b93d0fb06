"""AGNN: attention that has no weights but a temperature, for graphs of which few nodes are labelled."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Rate, Size
from .._dropout import Dropout
from .._inputs import check_mask
from ..attention import attention
from ..domains import Graph
from ..masks import Edges, Mask
from ._model import GraphModel
from ._readout import Readout


class AGNN(GraphModel):
    """Layers of attention by likeness alone, after one layer of weights (Thekumparampil et al. 2018, arXiv:1803.03735).

        z_0 = drop(relu(W x + b))
        z_{l+1, i} = (1 - a) sum_j softmax_j(t_l cos(z_{l, i}, z_{l, j})) z_{l, j} + a z_{0, i},   a = ``teleport``
        y = W_o z_L + b_o

    with a learned temperature t_l of each layer, and j all that i may attend to. A layer has one weight where a Transformer's has
    thousands, which a few labels cannot teach. ``teleport=0`` is the paper's; more leads back to what a node itself has, so that many
    layers look far and do not make all nodes alike, as in APPNP (Gasteiger et al. 2019, arXiv:1810.05997), which it is with t = 0 and
    means for its normalised sums.

    Args:
        in_channels, hidden_channels, out_channels, pool: as in ``GraphModel``; it has no virtual nodes.
        num_layers: layers of attention, each one step along edges further.
        teleport: above.
        dropout: after the layer of weights, in training.
        mask: who attends to whom; along edges, and to itself, if not given.

    Example:
        >>> model = AGNN(7, 32, 3, num_layers=10, teleport=0.1)
        >>> model(torch.randn(4, 7), torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        in_channels: int | nn.Module,
        hidden_channels: Size,
        out_channels: Size | None,
        num_layers: Size = 2,
        *,
        teleport: float = 0.0,
        dropout: Rate = 0.5,
        mask: Mask | None = None,
        pool: Readout = None,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1; got num_layers={num_layers}")
        if not 0 <= teleport < 1:
            raise ValueError(f"teleport must be in [0, 1); got teleport={teleport}")
        super().__init__(in_channels, hidden_channels, out_channels, pool=pool)
        self.mask = Edges(self_loops=True) if mask is None else check_mask(mask)
        self.teleport, self.dropout = teleport, Dropout(dropout)
        self.temperature = nn.Parameter(torch.ones(num_layers))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.temperature)

    def run(
        self, x: Float[Tensor, "tokens channels"], graph: Graph, edge_attr: Shaped[Tensor, "edges *features"] | None
    ) -> Float[Tensor, "tokens channels"]:
        self.refuse_edge_features(edge_attr, "GPS")
        start = z = self.dropout(x.relu())
        for temperature in self.temperature.to(x.dtype):
            value = z[None, None]
            key = F.normalize(value, dim=-1)
            mean = attention(temperature * key, key, value, mask=self.mask, domain=graph, scale=1.0)
            z = torch.lerp(mean[0, 0], start, self.teleport)
        return z
