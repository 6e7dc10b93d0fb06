"""Biases that are looked up: a table of scores, and which entry each pair of tokens has."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..domains import Domain, Graph, Grid, Sequence
from ._pairs import PairBias

# Scores of pairs with prefix tokens: prefix query and ordinary key, ordinary query and prefix key, both prefix.
PREFIX_ENTRIES = 3


class TablePair(PairBias):
    """Scores that are rows of a table; pairs with a prefix token have rows of their own behind the others.

    Attributes:
        rows: how many rows ordinary pairs have.
        prefix_rows: 0 where there are no prefix tokens, 1 where all pairs with one share a row of zeros, or ``PREFIX_ENTRIES``.
    """

    def __init__(
        self,
        domain: Domain,
        keys: Domain,
        table: Float[Tensor, "rows heads"],
        prefix_table: Float[Tensor, "prefix_rows heads"] | None,
        *,
        batch_size: int | None = None,
    ) -> None:
        self.rows = table.shape[0]
        self.prefix_rows = 0
        if domain.prefix or keys.prefix:
            front = table.new_zeros(1, table.shape[1]) if prefix_table is None else prefix_table.to(table.dtype)
            self.prefix_rows = front.shape[0]
            table = torch.cat([table, front])
        super().__init__(domain, keys, (table,), heads=table.shape[1], batch_size=batch_size)

    def scores(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.from_rows(self.index(b, q, k))

    def from_rows(self, index: Int[Tensor, "*pairs"]) -> Float[Tensor, "heads *pairs"]:
        table = self.tensors[0]
        if not table.is_cpu:
            return table[index].movedim(-1, 0)
        # Several times as fast as an index of whole rows, forward and backward, and the heads come first.
        of_head = index.long().reshape(1, -1).expand(self.heads, -1)
        return table.t().gather(1, of_head).reshape(self.heads, *index.shape)

    def of_head(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.tensors[0][self.index(b, q, k), h if self.heads > 1 else torch.zeros_like(h)]

    def index(self, b: Tensor, q: Tensor, k: Tensor) -> Int[Tensor, "..."]:
        """The row of each pair."""
        row = self.row(b, q, k)
        if self.prefix_rows == 0:
            return row
        # What the domain says of the place of a prefix token means nothing, but must stay within the table.
        row = row.clamp(0, max(self.rows - 1, 0))
        nowhere = torch.zeros((), dtype=torch.bool, device=row.device)
        of_query, of_key = self.domain.is_prefix(b, q), self.keys.is_prefix(b, k)
        of_query = nowhere if of_query is None else of_query
        of_key = nowhere if of_key is None else of_key
        entry = of_key.long() + (of_key & of_query) if self.prefix_rows == PREFIX_ENTRIES else 0
        return torch.where(of_query | of_key, self.rows + entry, row)

    @abstractmethod
    def row(self, b: Tensor, q: Tensor, k: Tensor) -> Int[Tensor, "..."]:
        """The row of each pair of ordinary tokens."""


class Offsets:
    """All offsets of queries from keys that whole steps allow, numbered in row-major order.

    The number of an offset is a difference, ``code(domain, q) - code(keys, k)`` up to a constant: one subtraction for each pair.
    """

    def __init__(self, domain: Domain, keys: Domain) -> None:
        spans = [(_span(domain, axis), _span(keys, axis)) for axis in range(domain.ndim)]
        self.low = tuple(queries[0] - others[1] for queries, others in spans)
        self.counts = tuple(
            max(queries[1] - others[0] - low + 1, 1) for (queries, others), low in zip(spans, self.low, strict=True)
        )
        self.strides = tuple(math.prod(self.counts[axis + 1 :]) for axis in range(domain.ndim))
        self.first = sum(low * stride for low, stride in zip(self.low, self.strides, strict=True))

    def all(self, device: torch.device) -> Int[Tensor, "offsets ndim"]:
        """The offsets, in the order of their numbers."""
        axes = [torch.arange(low, low + count, device=device) for low, count in zip(self.low, self.counts, strict=True)]
        return torch.stack(torch.meshgrid(axes, indexing="ij"), -1).flatten(0, -2)

    def code(self, domain: Domain, b: Tensor, i: Tensor) -> Int[Tensor, "..."]:
        """A number for where each token is."""
        code = domain.coordinate(0, b, i) * self.strides[0]
        for axis in range(1, domain.ndim):
            code = code + domain.coordinate(axis, b, i) * self.strides[axis]
        return code


class StepPair(TablePair):
    """A row for each offset of whole steps."""

    def __init__(
        self,
        domain: Domain,
        keys: Domain,
        offsets: Offsets,
        table: Float[Tensor, "offsets heads"],
        prefix_table: Float[Tensor, "prefix_rows heads"] | None = None,
    ) -> None:
        super().__init__(domain, keys, table, prefix_table)
        self.offsets = offsets

    @property
    def rows_key(self) -> Hashable:
        return StepPair, self.prefix_rows

    def row(self, b: Tensor, q: Tensor, k: Tensor) -> Int[Tensor, "..."]:
        return self.offsets.code(self.domain, b, q) - self.offsets.first - self.offsets.code(self.keys, b, k)


class HopPair(TablePair):
    """A row for each number of hops; the last but one for all that are more, the last for pairs without a path."""

    @property
    def rows_key(self) -> Hashable:
        return HopPair, self.rows, self.prefix_rows

    def row(self, b: Tensor, q: Tensor, k: Tensor) -> Int[Tensor, "..."]:
        assert isinstance(self.domain, Graph)
        hops = self.domain.hop_distance(q, k)
        return torch.where(hops < self.domain.hops.size[q], hops.clamp(max=self.rows - 2), self.rows - 1)


def largest_graph(domain: Graph) -> int:
    """The number of nodes of the largest graph."""
    return domain.largest


def _span(domain: Domain, axis: int) -> tuple[int, int]:
    """First and last coordinate of all items on one axis."""
    if isinstance(domain, Grid):
        return 0, domain.sizes[axis] - 1
    assert isinstance(domain, Sequence)
    # Padding may be met too.
    longest = domain.length if domain.offsets is None else domain.longest
    return domain.start, domain.start + longest - 1


def row_in_table(offsets: Int[Tensor, "offsets ndim"], size: tuple[int, ...]) -> Int[Tensor, " offsets"]:
    """The row-major place of each offset among those less than ``size``; farther ones are taken to the rim."""
    row = offsets.new_zeros(offsets.shape[0])
    for axis, n in enumerate(size):
        row = row * (2 * n - 1) + (offsets[:, axis] + n - 1).clamp(0, 2 * n - 2)
    return row


def rows_of_batch(domain: Domain, keys: Domain) -> int | None:
    """How many rows of the batch have places of their own."""
    return keys.batch_size if domain.batch_size is None else domain.batch_size
