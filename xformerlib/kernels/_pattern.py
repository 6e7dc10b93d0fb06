"""The pairs of a sparse mask as compressed rows and as compressed columns."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..domains._base import offsets_of
from ..domains._neighbours import expand_ranges
from ._scores import Pairs

# Longer runs of entries are divided among programs of the fused kernel.
DIVIDED_ENTRIES = 2**10


class Pieces(NamedTuple):
    """Runs of entries, long ones divided.

    Attributes:
        bounds: where each piece begins, and where the last ends.
        run: the run that each piece is of; None, like the rest, where no run is divided and piece i is run i.
        slot: the place of each piece among those of divided runs, or -1.
        divided: the divided runs.
        slots: where the slots of each of these begin and end.
    """

    bounds: Int[Tensor, " bounds"]
    run: Int[Tensor, " pieces"] | None = None
    slot: Int[Tensor, " pieces"] | None = None
    divided: Int[Tensor, " divided"] | None = None
    slots: Int[Tensor, " divided_bounds"] | None = None
    num_slots: int = 0

    @staticmethod
    def of(bounds: Int[Tensor, " bounds"]) -> Pieces:
        """Those of runs that begin and end at ``bounds``."""
        counts = (bounds.diff() + (DIVIDED_ENTRIES - 1)).div(DIVIDED_ENTRIES, rounding_mode="floor").clamp(min=1)
        if bounds.numel() == 1 or int(counts.max()) == 1:
            return Pieces(bounds)
        run, within = expand_ranges(torch.zeros_like(counts), counts)
        starts = torch.cat([bounds[run] + DIVIDED_ENTRIES * within, bounds[-1:]]).to(bounds.dtype)
        many = counts > 1
        slot = torch.where(many[run], many[run].cumsum(0) - 1, -1)
        slots = offsets_of(counts[many].long())
        return Pieces(starts, run.to(bounds.dtype), slot, many.nonzero()[:, 0], slots, int(slots[-1]))


class Pattern:
    """The entries (query, key) of a sparse mask: sorted by query, and on demand by key.

    It holds for each plane of a tensor ``(B, H, T, D)``: each head of each row of the batch. Where rows of the batch have entries of their
    own, their tokens are numbered through, and a plane is a head of all rows.

    Args:
        row, col: query and key of each entry, in rising order of queries.
        num_queries, num_keys: Tq and Tk.
        rows: where rows of the batch have entries of their own, their number; ``row`` is then ``b * Tq + q`` and ``col`` ``b * Tk + k``.
    """

    def __init__(
        self,
        row: Int[Tensor, " entries"],
        col: Int[Tensor, " entries"],
        num_queries: int,
        num_keys: int,
        rows: int | None = None,
    ) -> None:
        self.rows, self.num_queries, self.num_keys = rows, num_queries, num_keys
        self.num_rows, self.num_cols = (n if rows is None else n * rows for n in (num_queries, num_keys))
        self.size = max(row.numel(), self.num_rows, self.num_cols)
        index = torch.int32 if self.size < 2**31 else torch.int64  # half the memory
        self.rowptr = offsets_of(torch.bincount(row, minlength=self.num_rows)).to(index)
        self.row, self.col = row.to(index), col.to(index)
        self.stacks: dict[
            tuple[int, int, int], Any
        ] = {}  # what kernels make of the pattern, by the planes they take at once

    @property
    def num_entries(self) -> int:
        """Entries of a plane."""
        return self.col.numel()

    @cached_property
    def by_key(self) -> tuple[Int[Tensor, " bounds"], Int[Tensor, " entries"]]:
        """Where the entries of each key begin and end, and the entries in that order."""
        bounds = offsets_of(torch.bincount(self.col, minlength=self.num_cols))
        return bounds.to(self.col.dtype), torch.argsort(self.col, stable=True).to(self.col.dtype)

    @cached_property
    def row_by_key(self) -> Int[Tensor, " entries"]:
        """The query of each entry, in the order of ``by_key``."""
        return self.row[self.by_key[1]]

    @cached_property
    def pieces(self) -> Pieces:
        """The entries of each query."""
        return Pieces.of(self.rowptr)

    @cached_property
    def pieces_by_key(self) -> Pieces:
        """The entries of each key, in the order of ``by_key``."""
        return Pieces.of(self.by_key[0])

    def pairs(self, batch: int, heads: int, entries: slice = slice(None)) -> Pairs:
        """The indices of entries, as those of one tile with one row: broadcastable to ``(1, batch, heads, 1, entries)``."""
        row, col = self.row[entries].long(), self.col[entries].long()
        h = torch.arange(heads, device=row.device)[:, None, None]
        if self.rows is None:
            b = torch.arange(batch, device=row.device)[:, None, None, None]
            return Pairs(b, h, row.reshape(1, 1, 1, 1, -1), col.reshape(1, 1, 1, 1, -1))
        b = torch.div(row, max(self.num_queries, 1), rounding_mode="floor")
        indices = (b, row - b * self.num_queries, col - b * self.num_keys)
        b, q, k = (index.reshape(1, 1, 1, 1, -1) for index in indices)
        return Pairs(b, h, q, k)
