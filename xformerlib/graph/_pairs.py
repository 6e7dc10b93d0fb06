"""Scores of all pairs of nodes of each graph, and what layers share of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._autograd import is_compiling
from ..domains import Domain, Graph
from ..positions import Bias, PairBias, Position, Sum
from ..positions._tables import TablePair


class NodePairBias(Bias):
    """A bias with a score for each pair of nodes of the same graph, which are computed together; pairs with virtual nodes score 0."""

    def is_pointwise(self, domain: Domain) -> bool:
        return True

    @abstractmethod
    def table(self, domain: Domain, dtype: torch.dtype | None) -> Float[Tensor, "pairs heads"]:
        """The scores of all pairs, in the order of ``Graph.pair_places``; or an error that says where they have no meaning."""

    def between(self, domain: Domain, keys: Domain, dtype: torch.dtype | None) -> PairBias:
        return NodePairs(domain, keys, self.table(domain, dtype), None)


class NodePairs(TablePair):
    """A row for each pair of nodes of the same graph."""

    @property
    def rows_key(self) -> Hashable:
        return NodePairs, self.rows, self.prefix_rows

    def row(self, b: Tensor, q: Tensor, k: Tensor) -> Int[Tensor, "..."]:
        assert isinstance(self.domain, Graph)
        pairs = self.domain.pair_places
        # Keys of other graphs must stay within the table.
        return pairs.row[q] + torch.minimum(pairs.place[k], pairs.size[q] - 1)


def worked_out_once(position: Position | None) -> Position | None:
    """What layers are given of a position that they share, in one call of a model: scores are worked out by the first, for all.

    A new one is made at every call, and nothing is kept longer.
    """
    if position is None or not (position.rotations or position.biases):
        return None
    if is_compiling():  # a graph finds biases by numbers, which what is made in it does not have
        return Sum(*position.rotations, *position.biases)
    return Sum(*position.rotations, *map(_Once, position.biases))


class _Once(Bias):
    """A bias that is bound once to the same places."""

    def __init__(self, bias: Bias) -> None:
        super().__init__()
        self.bias, self.heads = bias, bias.heads
        self.bound: dict[Hashable, PairBias] = {}

    def is_pointwise(self, domain: Domain) -> bool:
        return self.bias.is_pointwise(domain)

    def between(self, domain: Domain, keys: Domain, dtype: torch.dtype | None) -> PairBias:
        key = (domain, keys, dtype)
        if key not in self.bound:
            self.bound[key] = self.bias(domain, keys, dtype)
        return self.bound[key]
