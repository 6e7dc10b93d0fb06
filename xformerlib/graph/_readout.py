"""What is read out of nodes for each edge, or for any pair of them."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Size, shown
from .._autograd import unwatched
from .._inputs import check_values
from .._pooling import Pool
from .._recorded import Recorded
from ._edges import check_edge_features, check_ends, width_of

EdgePool = Literal["edge"]


class EdgeReadout(Recorded):
    """A vector for each edge, or for any pair of nodes, from its two ends: for classes of edges, and for links that may be missing.

        y_st = relu(W_s x_s + W_t x_t + W_p (x_s * x_t) + W_e e_st + b)

    The ends side by side are what an edge is told by in Dwivedi et al. (2020, arXiv:2003.00982), their product in DistMult (Yang et al.
    2015, arXiv:1412.6575), of which the scalar product is a case. Linear maps of an end are computed once for each node.

    Args:
        dim: channels of a node, and of an edge's vector.
        edge_dim: features of an edge; None to tell edges by their ends alone.
        symmetric: whether both ways along an edge give the same: W_s = W_t.

    Shapes:
        x (nodes, dim); ``edge_index`` (2, edges), sources above targets; ``edge_attr`` (edges, edge_dim). Returns (edges, dim).

    Raises:
        ValueError: features of edges where there is no ``edge_dim``, or none where there is.

    Example:
        >>> EdgeReadout(16)(torch.randn(3, 16), torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]])).shape
        torch.Size([4, 16])
    """

    def __init__(self, dim: Size, *, edge_dim: Size | None = None, symmetric: bool = False) -> None:
        super().__init__()
        self.dim, self.symmetric = dim, symmetric
        self.ends = nn.Linear(dim, dim if symmetric else 2 * dim)
        self.product = nn.Linear(dim, dim, bias=False)
        self.edge = None if edge_dim is None else nn.Linear(edge_dim, dim, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for layer in (self.ends, self.product, self.edge):
            if layer is not None:
                layer.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "nodes dim"],
        edge_index: Int[Tensor, "2 edges"],
        edge_attr: Float[Tensor, "edges features"] | None = None,
    ) -> Float[Tensor, "edges dim"]:
        """A row for each pair of nodes in ``edge_index``."""
        if (self.edge is None) != (edge_attr is None):
            came = tuple(edge_attr.shape) if isinstance(edge_attr, Tensor) else shown(edge_attr)
            raise ValueError(
                f"edge_attr must be given if and only if the readout has an edge_dim, and for the edges of the graph alone; got "
                f"edge_attr={came}"
            )
        self._check(x, edge_index, edge_attr)
        source, target = edge_index
        ends = self.ends(x)
        first, second = (ends, ends) if self.symmetric else ends.chunk(2, -1)
        y = F.embedding(source, first) + F.embedding(target, second)
        y = y + self.product(F.embedding(source, x) * F.embedding(target, x))
        if self.edge is not None and edge_attr is not None:
            y = y + self.edge(edge_attr.to(y.dtype))
        return F.relu(y)

    def _check(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None) -> None:
        check_values("x", x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be (nodes, dim={self.dim}); got {tuple(x.shape)}")
        if not isinstance(edge_index, Tensor):
            raise TypeError(f"edge_index must be a tensor (2, edges) of pairs of nodes; got {shown(edge_index)}")
        if unwatched(edge_index):  # elsewhere its values are not read
            check_ends("edge_index", edge_index, len(x), len(x))
        width = width_of(self.edge)
        check_edge_features(edge_attr, self.edge is not None, edge_index.shape[-1], width)

    def extra_repr(self) -> str:
        return f"{self.dim}, symmetric={self.symmetric}"


# What models have a row for: as in ``Pooling`` for each graph, for each edge, or None for each node.
Readout = Pool | EdgePool | EdgeReadout | None
