"""Biases bound to the domains of queries and keys: the score of any pair on request."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable
from functools import reduce
from itertools import islice
from operator import add

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..domains import Domain


class PairBias(ABC):
    """A bias bound to the domains of queries and keys: the score of any pair on request, never of all pairs unless asked.

    Attributes:
        heads: attention heads.
        batch_size: rows of the batch that have scores of their own, or None where all rows share them.
        tensors: what the scores are differentiable in; a kernel that recomputes scores in its backward passes these through
            its autograd function and evaluates ``using(...)`` there.
    """

    def __init__(
        self,
        domain: Domain,
        keys: Domain,
        tensors: tuple[Tensor, ...],
        *,
        heads: int,
        batch_size: int | None,
    ) -> None:
        self.domain = domain
        self.keys = keys
        self.tensors = tensors
        self.heads = heads
        self.batch_size = batch_size

    def at(
        self,
        q_index: Int[Tensor, "*#pairs"],
        k_index: Int[Tensor, "*#pairs"],
        b_index: Int[Tensor, "*#pairs"] | None = None,
    ) -> Float[Tensor, "heads *pairs"]:
        """Scores of the pairs that the indices make when broadcast together, e.g. ``(tq, 1)`` and ``(1, tk)``.

        ``b_index``, the row of the batch, may be left out where ``batch_size`` is None.
        """
        if self.batch_size is not None and b_index is None:
            raise ValueError(
                f"b_index is needed: each of the {self.batch_size} rows of {self.domain!r} has positions of its own. Pass the row of "
                "each pair, e.g. torch.arange(batch)[:, None, None]."
            )
        b = q_index.new_zeros(()) if b_index is None else b_index
        shape = torch.broadcast_shapes(b.shape, q_index.shape, k_index.shape)
        scores = self.scores(b, q_index, k_index)
        missing = len(shape) + 1 - scores.ndim
        return scores.reshape(self.heads, *(1,) * missing, *scores.shape[1:]).expand(self.heads, *shape)

    @abstractmethod
    def scores(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """``at`` with an index of rows, up to broadcasting: ``(heads, ...)``."""

    def of_head(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """``at(q, k, b)[h]``; where the bias is pointwise, by one look into each tensor, as a kernel of FlexAttention needs it."""
        return self.at(q, k, b)[h]

    @property
    def rows_key(self) -> Hashable:
        """For scores that are rows of a table: what tells, for two domains, which row each pair has. None for others."""
        return None

    def index(self, b: Tensor, q: Tensor, k: Tensor) -> Int[Tensor, "..."]:
        """The row of each pair, where there is a ``rows_key``."""
        raise NotImplementedError(f"{type(self).__name__} has no table")

    def from_rows(self, index: Int[Tensor, "*pairs"]) -> Float[Tensor, "heads *pairs"]:
        """The scores of pairs by their rows, where there is a ``rows_key``."""
        raise NotImplementedError(f"{type(self).__name__} has no table")

    def using(self, tensors: tuple[Tensor, ...]) -> PairBias:
        """The same bias with other ``tensors``, of the same shapes."""
        other = copy.copy(self)
        other.tensors = tensors
        return other


class PlacePair(PairBias):
    """A bias that is a function of real coordinates, and differentiable in those that require grad."""

    def __init__(
        self, domain: Domain, keys: Domain, weights: tuple[Tensor, ...], *, heads: int, batch_size: int | None
    ) -> None:
        given = (domain,) if keys is domain else (domain, keys)
        learned = tuple(each.learned for each in given if each.learned is not None)
        super().__init__(domain, keys, (*weights, *learned), heads=heads, batch_size=batch_size)
        self.weights, self._given = weights, given
        self._place(learned)

    def using(self, tensors: tuple[Tensor, ...]) -> PairBias:
        other = copy.copy(self)
        count = len(self.weights)
        other.tensors, other.weights = tensors, tensors[:count]
        other._place(tensors[count:])
        return other

    def _place(self, learned: tuple[Tensor, ...]) -> None:
        """Put queries and keys where ``learned`` says."""
        rest = iter(learned)
        domains = [each if each.learned is None else each.at_places(next(rest)) for each in self._given]
        self.domain, self.keys = domains[0], domains[-1]


class SumPair(PairBias):
    """Biases added up, bound to one pair of domains."""

    def __init__(self, pairs: tuple[PairBias, ...]) -> None:
        rows = [pair.batch_size for pair in pairs if pair.batch_size is not None]
        super().__init__(
            pairs[0].domain,
            pairs[0].keys,
            tuple(tensor for pair in pairs for tensor in pair.tensors),
            heads=max(pair.heads for pair in pairs),
            batch_size=rows[0] if rows else None,
        )
        self.pairs = pairs

    def using(self, tensors: tuple[Tensor, ...]) -> SumPair:
        rest = iter(tensors)
        return SumPair(tuple(pair.using(tuple(islice(rest, len(pair.tensors)))) for pair in self.pairs))

    def scores(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return reduce(add, (pair.at(q, k, b) for pair in self.pairs))

    def of_head(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return reduce(add, (pair.of_head(b, h, q, k) for pair in self.pairs))


class SubsetPair(PairBias):
    """The scores of a bias on a whole domain, between tokens that were kept of it."""

    def __init__(self, whole: PairBias, domain: Domain, keys: Domain) -> None:
        rows = [n for n in (whole.batch_size, domain.batch_size, keys.batch_size) if n is not None]
        super().__init__(domain, keys, whole.tensors, heads=whole.heads, batch_size=rows[0] if rows else None)
        self.whole = whole

    def using(self, tensors: tuple[Tensor, ...]) -> SubsetPair:
        return SubsetPair(self.whole.using(tensors), self.domain, self.keys)

    def _kept(self, b: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return b, self.domain.token(b, q), self.keys.token(b, k)

    def scores(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.whole.scores(*self._kept(b, q, k))

    def of_head(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, q, k = self._kept(b, q, k)
        return self.whole.of_head(b, h, q, k)

    @property
    def rows_key(self) -> Hashable:
        return self.whole.rows_key

    def index(self, b: Tensor, q: Tensor, k: Tensor) -> Int[Tensor, "..."]:
        return self.whole.index(*self._kept(b, q, k))

    def from_rows(self, index: Int[Tensor, "*pairs"]) -> Float[Tensor, "heads *pairs"]:
        return self.whole.from_rows(index)
