"""What graphs add: random walks, and how facts of nodes become facts of tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, nn

from .._arguments import check_size
from .._projection import dtype_of
from ..domains import Domain, Graph
from ._base import Embedding, no_meaning


class RandomWalk(Embedding):
    """Random-walk structural encoding, RWSE (Dwivedi et al. 2021, arXiv:2110.07875).

        x_i + W [p_1(i), ..., p_K(i)] + b,   p_k(i) = (M^k)_ii

    where M is the transition matrix of the walk that leaves a node along a random edge: p_k(i) is the probability that a walk from
    node i is back after k steps. Virtual nodes get 0.

    Args:
        dim: channels of a token.
        steps: K, the longest walk.

    Shapes:
        ``forward(x, domain)``: x (N, dim) or (1, N, dim), returned in the same shape and dtype.

    Raises:
        ValueError: a domain that is not a Graph.

    Example:
        >>> ring = Graph(torch.tensor([[0, 1, 2], [1, 2, 0]]), 3)
        >>> RandomWalk(8, steps=4)(torch.zeros(3, 8), ring).shape
        torch.Size([3, 8])
    """

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.dim = check_size("dim", dim)
        self.steps = check_size("steps", steps)
        self.linear = nn.Linear(steps, dim)

    def reset_parameters(self) -> None:
        """Draw the linear map anew."""
        self.linear.reset_parameters()

    def rows(self, domain: Domain, x: Tensor) -> Float[Tensor, "tokens dim"]:
        if not isinstance(domain, Graph):
            raise no_meaning(self, domain, "Walks need edges; use Sinusoidal(dim), which is defined on every domain.")
        walks = domain.random_walk(self.steps).to(x.device, dtype_of(self.linear))
        return on_nodes(domain, self.linear(walks))

    def extra_repr(self) -> str:
        return f"{self.dim}, steps={self.steps}"


def on_nodes(domain: Graph, rows: Shaped[Tensor, "nodes dim"]) -> Shaped[Tensor, "tokens dim"]:
    """Rows of nodes as rows of tokens; those of virtual nodes are 0."""
    if domain.prefix == 0:
        return rows
    return rows.new_zeros(domain.num_tokens, rows.shape[1]).index_copy(0, domain.node_tokens.to(rows.device), rows)


def spectral_axes(domain: Graph, count: int) -> Float64[Tensor, "nodes count"]:
    """The lowest nontrivial Laplacian eigenvectors, times the square root of the graph's size, so that entries are about 1."""
    _, vectors = domain.laplacian_eigenvectors(count)
    return vectors * domain.sizes[domain.batch].double().sqrt()[:, None]


def random_signs(domain: Graph, count: int) -> Float[Tensor, "nodes count"]:
    """A random sign for each eigenvector of each graph, from torch's generator, spread over the graph's nodes."""
    signs = 2.0 * torch.randint(0, 2, (domain.num_graphs, count), device=domain.device) - 1.0
    return signs[domain.batch]
