"""Laplacian eigenvectors whose signs do not matter."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .._arguments import Size, check_size
from ..domains import Domain, Graph
from ..domains._spectral import undirected
from ..positions import Embedding
from ..positions._base import at_least_fp32, no_meaning
from ..positions._graph import on_nodes, spectral_axes


class SignNet(Embedding):
    """Laplacian eigenvectors through a network that is blind to their signs (Lim et al. 2022, arXiv:2202.13013).

        x + rho([phi(v_1, l_1) + phi(-v_1, l_1), ..., phi(v_k, l_k) + phi(-v_k, l_k)])

    phi is a graph isomorphism network (GIN, arXiv:1810.00826) on the entries of one eigenvector v and its eigenvalue l, so that it sees
    entries of neighbours together and not their absolute values alone; rho is an MLP at each node. Where eigenvalues coincide the
    vectors are one basis of many, of which a change of signs is only one: there the result depends on the order of nodes.

    The paper's networks are normalised over the batch; these are normalised over channels, so that nothing depends on the other graphs.

    Args:
        dim: channels of a token.
        eigenvectors: k, the lowest nontrivial ones; a graph that has fewer gives 0 for the others.
        hidden: width of phi and rho.
        num_layers: of phi.

    Shapes:
        ``forward(x, domain)``: x (N, dim) or (1, N, dim), returned in the same shape and dtype; virtual nodes get 0.

    Raises:
        ValueError: a domain that is not a Graph.

    Example:
        >>> ring = xf.Graph(torch.tensor([[0, 1, 2], [1, 2, 0]]), 3)
        >>> SignNet(8, eigenvectors=2)(torch.zeros(3, 8), ring).shape
        torch.Size([3, 8])
    """

    def __init__(self, dim: Size, eigenvectors: int = 8, *, hidden: Size = 32, num_layers: Size = 3) -> None:
        super().__init__()
        self.dim = check_size("dim", dim)
        self.eigenvectors = check_size("eigenvectors", eigenvectors)
        widths = [2] + [check_size("hidden", hidden)] * check_size("num_layers", num_layers)
        self.phi = nn.ModuleList(_mlp(a, hidden, hidden) for a in widths[:-1])
        self.rho = _mlp(eigenvectors * hidden, hidden, dim)

    def reset_parameters(self) -> None:
        """Draw both networks anew."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                layer.reset_parameters()

    def rows(self, domain: Domain, x: Tensor) -> Float[Tensor, "tokens dim"]:
        if not isinstance(domain, Graph):
            raise no_meaning(
                self, domain, "Eigenvectors need edges; use Sinusoidal(dim), which is defined on every domain."
            )
        width = next(self.parameters()).dtype
        dtype = at_least_fp32(width)
        values, _ = domain.laplacian_eigenvectors(self.eigenvectors)
        vectors = spectral_axes(domain, self.eigenvectors).to(dtype)
        exists = (values > 0)[domain.batch]
        level = values.to(dtype)[domain.batch]
        both = torch.stack([torch.stack([v, level], -1) for v in (vectors, -vectors)], 1)  # (nodes, 2, k, 2)
        source, target = domain._found("undirected", lambda: _joined(domain))
        h = both.to(width)
        for layer in self.phi:
            h = layer(h.index_add(0, target, h[source]))
        return on_nodes(domain, self.rho(_shown(h.sum(1), exists)))

    def extra_repr(self) -> str:
        return f"{self.dim}, eigenvectors={self.eigenvectors}"


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, out))


def _shown(h: Float[Tensor, "nodes k hidden"], exists: Bool[Tensor, "nodes k"]) -> Float[Tensor, "nodes width"]:
    """Eigenvectors side by side; those that the graph has not got are 0."""
    return h.masked_fill(~exists[..., None], 0).flatten(1)


def _joined(domain: Graph) -> tuple[Tensor, Tensor]:
    """The ends of the edges of the simple undirected graph underneath, in both directions."""
    simple = undirected(domain._topology)
    return simple.source, simple.target
