"""Masks by edges: those that a graph has, and those of a random expander laid over any tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._arguments import check_count, checked_names
from ..domains import Domain
from ..domains._base import either
from ..domains._neighbours import Neighbours, neighbours_from_sorted
from ._algebra import Leaf, Predicate
from ._outline import Between, Outline, Tiling
from ._regular import regular_pattern


@checked_names
@dataclass(frozen=True)
class Edges(Leaf):
    """On a graph, a query may attend to the sources of the edges into it: there is an edge j -> i.

    Prefix (virtual) tokens are not constrained.

    Args:
        self_loops: whether every token may also attend to itself; without, only where the graph has a self-loop.

    Literature: graph attention networks (Veličković et al. 2018, arXiv:1710.10903); UniMP (Shi et al. 2021, arXiv:2009.03509).

    Example:
        >>> Edges().dense(Graph(torch.tensor([[0, 1], [1, 2]]), 3)).int()
        tensor([[0, 0, 0],
                [1, 0, 0],
                [0, 1, 0]], dtype=torch.int32)
    """

    self_loops: bool = False

    kinds = ("Graph",)
    instead = "Local(radius) or Expander(degree)"
    relates_places = True

    def __post_init__(self) -> None:
        if not isinstance(self.self_loops, bool):
            raise TypeError(f"self_loops must be True or False; got self_loops={self.self_loops!r}")

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        neighbours: Neighbours = domain.csr  # type: ignore[attr-defined]

        def joined(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            edge = neighbours.contains(q, k)
            result = either(edge | (q == k) if self.self_loops else edge, domain.touches_prefix(keys, b, q, k))
            assert result is not None
            return result

        return joined

    def outline(self, tiling: Tiling) -> Outline:
        outlines = [tiling.of_neighbours(tiling.domain.csr)]  # type: ignore[attr-defined]
        if self.self_loops:
            outlines.append(tiling.between(Between.equal(tiling.q, tiling.k)))
        return tiling.or_prefix(Outline.any_of(outlines))

    def is_reflexive(self, domain: Domain) -> bool:
        return self.self_loops


@checked_names
@dataclass(frozen=True)
class Expander(Leaf):
    """A query may attend to itself and to ``degree`` others of its item, picked once at random and mutually.

    The links form a random regular graph on the ordinary tokens of each item that exist. Such a graph is an expander: information gets
    from any token to any other in some log(tokens) layers. It depends on the number of those tokens, ``degree`` and ``seed`` alone, so
    padding, packing, the rest of the batch and the device change nothing. Prefix tokens are not constrained.

    Args:
        degree: links of each token, >= 0. An odd degree becomes one more in an item with an odd number of tokens (no graph is regular of
            odd degree on those); an item of no more than ``degree + 1`` tokens is linked completely.
        seed: another number gives other links.

    Raises:
        ValueError: when bound, if queries and keys are not the same tokens.

    Literature: random attention in BigBird (Zaheer et al. 2020, arXiv:2007.14062); Exphormer (Shirzad et al. 2023, arXiv:2303.06147);
    unions of random Hamiltonian cycles as expanders (Friedman 2008, "A proof of Alon's second eigenvalue conjecture").

    Example:
        >>> Expander(3, seed=1).dense(Sequence(100)).sum(-1).unique()
        tensor([4])
    """

    degree: int
    seed: int = 0

    relates_places = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "degree", check_count("degree", self.degree))
        object.__setattr__(self, "seed", check_count("seed", self.seed))

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        if domain != keys:
            raise ValueError(
                f"Expander links the tokens of one domain, so queries and keys must be the same; got {domain!r} and {keys!r}. Between "
                f"different tokens use Where(fn) or Dense(tensor)."
            )

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        neighbours = self.neighbours(domain)
        shared, tokens = domain.valid is None, domain.num_tokens

        def linked(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            result = either(
                neighbours.contains(q if shared else b * tokens + q, k), domain.touches_prefix(keys, b, q, k)
            )
            assert result is not None
            return result

        return linked

    def outline(self, tiling: Tiling) -> Outline:
        return tiling.or_prefix(tiling.of_neighbours(self.neighbours(tiling.domain)))

    def neighbours(self, domain: Domain) -> Neighbours:
        """The links of each token, itself among them. Where ``valid`` differs by row, token i of row b is ``b * num_tokens + i``."""
        return domain.fact(("expander", self.degree, self.seed), lambda: _links(domain, self.degree, self.seed))

    def is_reflexive(self, domain: Domain) -> bool:
        return True


def _links(domain: Domain, degree: int, seed: int) -> Neighbours:
    """The regular pattern laid over the ordinary tokens of every item."""
    token, size = _ordinary_tokens(domain)
    tokens, device = domain.num_tokens, token.device
    first = size.cumsum(0) - size
    rows, cols = [], []
    for n in size.unique().tolist():
        pattern = regular_pattern(n, degree, seed).to(device)
        members = token[first[size == n][:, None] + torch.arange(n, device=device)]  # (items, n)
        links = members[:, pattern]
        rows.append(members[:, :, None].expand_as(links).flatten())
        cols.append(links.flatten())
    row, col = (torch.cat(parts) if parts else token.new_zeros(0) for parts in (rows, cols))
    order = torch.argsort(row * max(tokens, 1) + col % max(tokens, 1))
    num_rows = tokens if domain.valid is None else tokens * domain.valid.shape[0]
    return neighbours_from_sorted(row[order], col[order] % max(tokens, 1), num_rows)


def _ordinary_tokens(domain: Domain) -> tuple[Tensor, Tensor]:
    """The tokens that exist and are not prefix tokens, as ``row * tokens + token`` in rising order, and their number in each item."""
    tokens = domain.num_tokens
    i = torch.arange(tokens, device=domain.device)
    ordinary = torch.ones_like(i, dtype=torch.bool)
    prefix = domain.is_prefix(torch.zeros_like(i), i)
    if prefix is not None:
        ordinary = ~prefix
    if domain.valid is not None:
        ordinary = domain.valid & ordinary
        return ordinary.flatten().nonzero()[:, 0], ordinary.sum(1)
    item = torch.zeros_like(i) if domain.items is None else domain.items
    return i[ordinary], torch.bincount(item[ordinary], minlength=domain.num_items)
