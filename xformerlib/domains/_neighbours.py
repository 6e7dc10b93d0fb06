"""Sparse sets of keys: for each query the sorted list of the keys it is related to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Neighbours(NamedTuple):
    """The keys of each query in compressed sparse rows: those of query ``q`` are ``col[rowptr[q] : rowptr[q + 1]]``, in rising order.

    A graph's edges, the tokens within r hops and an expander's links are all of this form, and a kernel for one serves all.

    Attributes:
        rowptr: where each row begins and ends.
        col: the keys, row after row. A key may stand twice in a row (parallel edges).
        steps: bisection steps that find a key in the longest row.
        origin: for each entry its place in what this was made from: the column of ``edge_index``, or (for a transpose) the entry of
            the original; None where it was not made from a list.
    """

    rowptr: Int[Tensor, " bounds"]
    col: Int[Tensor, " entries"]
    steps: int
    origin: Int[Tensor, " entries"] | None = None

    @property
    def num_rows(self) -> int:
        """The number of queries."""
        return self.rowptr.numel() - 1

    @property
    def row(self) -> Int[Tensor, " entries"]:
        """The query of each entry."""
        rows = torch.arange(self.num_rows, device=self.col.device)
        return torch.repeat_interleave(rows, self.rowptr.diff(), output_size=self.col.numel())

    def contains(self, row: Tensor, col: Tensor) -> Bool[Tensor, "*pairs"]:
        """Whether key ``col`` is among those of query ``row``: elementwise in broadcastable indices, by bisection."""
        if self.col.numel() == 0:
            return torch.zeros_like(row + col, dtype=torch.bool)
        last = self.col.numel() - 1
        below, end = self.rowptr[row], self.rowptr[row + 1]
        # `below` moves to the first entry >= col. A fixed number of steps, the same for all, needs no data-dependent control flow.
        for step in reversed(range(self.steps)):
            ahead = below + (1 << step)
            smaller = self.col[(ahead - 1).clamp(max=last)] < col
            below = torch.where((ahead <= end) & smaller, ahead, below)
        return (below < end) & (self.col[below.clamp(max=last)] == col)

    def expand(self, rows: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " out"], Int[Tensor, " out"]]:
        """All entries of the given rows: for each one the index into ``rows`` that it belongs to, and its index into ``col``."""
        return expand_ranges(self.rowptr[rows], self.rowptr[rows + 1] - self.rowptr[rows])

    def transpose(self, num_cols: int) -> Neighbours:
        """The queries of each key; ``origin`` is the entry here of each entry there."""
        order = torch.argsort(self.col, stable=True)
        return _compressed(self.col[order], self.row[order], num_cols, order)


def expand_ranges(
    starts: Int[Tensor, " ranges"], counts: Int[Tensor, " ranges"]
) -> tuple[Int[Tensor, " out"], Int[Tensor, " out"]]:
    """The members of the ranges ``starts[r], ..., starts[r] + counts[r] - 1``: for each the range ``r``, and the member."""
    which = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    shift = starts - (counts.cumsum(0) - counts)
    return which, torch.arange(which.numel(), device=counts.device) + shift[which]


def neighbours_of(
    row: Int[Tensor, " entries"], col: Int[Tensor, " entries"], num_rows: int, num_cols: int
) -> Neighbours:
    """Neighbours from pairs in any order; repeated pairs stay, in the order given, and ``origin`` says which pair an entry is."""
    order = torch.argsort(row * num_cols + col, stable=True)
    return _compressed(row[order], col[order], num_rows, order)


def neighbours_from_sorted(row: Int[Tensor, " entries"], col: Int[Tensor, " entries"], num_rows: int) -> Neighbours:
    """Neighbours from pairs that are sorted already, by row and then by column."""
    return _compressed(row, col, num_rows, None)


def _compressed(row: Tensor, col: Tensor, num_rows: int, origin: Tensor | None) -> Neighbours:
    counts = torch.bincount(row, minlength=num_rows)
    rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    longest = int(counts.max()) if num_rows else 0
    return Neighbours(rowptr, col, longest.bit_length(), origin)
