"""A sparse pattern for several planes at once, each a head of a row of the batch: products at its entries, and sums over them.

The heads of a token lie side by side, as they leave a linear layer: head h of token t is row ``t * heads + h`` of a table. So nothing is
copied, and what a pair fetches for one head is next to what it fetches for the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache, cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..domains._base import offsets_of
from ..domains._neighbours import expand_ranges
from ._pattern import Pattern

# Entries of all planes of a stack, each of which has 16 bytes of indices. More at once save calls and copies, fewer save memory.
STACK_ENTRIES = 7 * 2**18

# Entries that are computed at a time, so that the steps of a softmax find them in the cache.
RUN_ENTRIES = 2**19

# Longer sums are taken in pieces: a sum of a million numbers one after the other loses three digits.
PIECE_ENTRIES = 2**8

# Entries that are given an index for each number of their features at a time.
FEATURE_ENTRIES = 2**16


def stack_of(pattern: Pattern, batch: int, heads: int, group: int) -> Stack:
    """The pattern for as many planes at once as suits its size: one, some groups of heads, or all heads of some rows of the batch."""
    most = max(STACK_ENTRIES // max(pattern.size, 1), 1)
    side = max(n for n in range(1, max(heads, 1) + 1) if n == 1 or (heads % n == 0 and n % group == 0 and n <= most))
    blocks = 1
    if side == heads and pattern.rows is None:
        blocks = max((n for n in range(1, min(most // side, batch) + 1) if batch % n == 0), default=1)
    key = blocks, side, max(side // max(group, 1), 1)
    if key not in pattern.stacks:
        if len(pattern.stacks) == 4:  # batches of many sizes need not be remembered
            pattern.stacks.clear()
        pattern.stacks[key] = Stack(pattern, *key)
    stack: Stack = pattern.stacks[key]
    return stack


class Stack:
    """A pattern for ``blocks * heads`` planes: heads side by side, and these for some rows of the batch one after the other.

    Its entries are sorted by row of the table of queries: by token, then head, then as in the pattern.

    Attributes:
        by_query: the runs of the entries; ``at`` is the row of an entry within its run, ``other`` that of its key.
        by_key: the runs of the entries sorted by row of the table of keys; ``at`` is an entry's place in the first order, ``other`` the
            row of its query.
    """

    def __init__(self, pattern: Pattern, blocks: int, heads: int, kv_heads: int) -> None:
        self.blocks, self.heads, self.kv_heads, self._pattern = blocks, heads, kv_heads, pattern
        self.num_entries = blocks * heads * pattern.num_entries
        self._rowptr = _repeated_bounds(pattern.rowptr, blocks)
        self._bounds, row, entry = _side_by_side(self._rowptr, heads)
        col = _repeated(pattern.col, blocks, pattern.num_cols)[entry]
        other = col * kv_heads + torch.div(row % heads, heads // kv_heads, rounding_mode="floor")
        self.by_query = [
            Run(rows, bounds, row[entries] - rows.start, other[entries], entries)
            for rows, bounds, entries in _cut(self._bounds, heads)
        ]

    @cached_property
    def by_key(self) -> list[Run]:
        pattern, heads, kv_heads = self._pattern, self.heads, self.kv_heads
        bounds, order = pattern.by_key
        bounds, row, entry = _side_by_side(_repeated_bounds(bounds, self.blocks), heads)
        order, head = _repeated(order, self.blocks, pattern.num_entries)[entry], row % heads
        row = _repeated(pattern.row, self.blocks, pattern.num_rows)[order]
        at, other = self._places(order, row, head), row * heads + head
        return [
            Run(rows, bounds, at[entries], other[entries], entries)
            for rows, bounds, entries in _cut(bounds[:: heads // kv_heads].contiguous(), kv_heads)
        ]

    @cached_property
    def entry(self) -> Int[Tensor, " entries"]:
        """The entry of the pattern that each one is."""
        if self.blocks == self.heads == 1:
            return torch.arange(self.num_entries, device=self._rowptr.device, dtype=self._rowptr.dtype)
        return _side_by_side(self._rowptr, self.heads)[2] % max(self._pattern.num_entries, 1)

    def plane(self, block: int, head: int) -> tuple[Int[Tensor, " entries"], Int[Tensor, " entries"]]:
        """Of one plane: where the entries of the pattern stand here, and their rows in the table of queries."""
        pattern = self._pattern
        if self.blocks == self.heads == 1:
            return self.entry, pattern.row
        row = pattern.row + block * pattern.num_rows
        entry = torch.arange(pattern.num_entries, device=row.device, dtype=row.dtype) + block * pattern.num_entries
        return self._places(entry, row, head), row * self.heads + head

    def _places(self, entry: Tensor, row: Tensor, head: Tensor | int) -> Tensor:
        return self._bounds[row * self.heads + head] + (entry - self._rowptr[row])


class Run:
    """A run of entries that are sorted by row of a table, the whole of some tokens.

    Attributes:
        rows, entries: those of the run, counted from the first of all.
        at, other: two indices of each entry, see ``Stack``.
    """

    def __init__(self, rows: slice, bounds: Int[Tensor, " bounds"], at: Tensor, other: Tensor, entries: slice) -> None:
        self.rows, self.entries, self.at, self.other = rows, entries, at, other
        self._bounds, self._pieces = bounds, None
        counts = (bounds.diff() + (PIECE_ENTRIES - 1)).div(PIECE_ENTRIES, rounding_mode="floor").clamp(min=1)
        self._bounds_of_pieces = bounds
        if int(counts.max()) > 1:
            self._pieces = offsets_of(counts.long()).to(bounds.dtype)
            starts, within = expand_ranges(torch.zeros_like(counts), counts.long())
            self._bounds_of_pieces = torch.cat([bounds[starts] + PIECE_ENTRIES * within.to(bounds.dtype), bounds[-1:]])
            self._piece = torch.arange(within.numel(), device=bounds.device, dtype=bounds.dtype)

    def products(
        self, rows: Float[Tensor, "rows dim"], others: Float[Tensor, "others dim"], scale: float = 1.0
    ) -> Float[Tensor, " entries"]:
        """``scale * rows[row] . others[other]`` at every entry; ``rows`` are those of the run."""
        zeros = rows.new_zeros(self.other.shape)
        if zeros.numel() == 0 or rows.shape[1] == 0:
            return zeros
        if zeros.numel() > len(rows) * len(others):  # parallel entries; torch would cut off what a matrix cannot hold
            others = F.pad(others, (0, 0, 0, zeros.numel() - len(others)))
        _hear_beta_notice()
        size = len(rows), len(others)
        at = torch.sparse_csr_tensor(self._bounds, self.other, zeros, size, check_invariants=False)
        return torch.sparse.sampled_addmm(at, rows, others.T, beta=0.0, alpha=scale, out=at).values()

    def sums(
        self, weights: Float[Tensor, " entries"], others: Float[Tensor, "others dim"], index: Tensor | None = None
    ) -> Float[Tensor, "rows dim"]:
        """For each row the sum of ``weight * others[other]`` over its entries, or of ``weight * others[index]``."""
        sums = _weighted(self._bounds_of_pieces, self.other if index is None else index, weights, others)
        return sums if self._pieces is None else _weighted(self._pieces, self._piece, None, sums)

    def max(self, x: Float[Tensor, " entries"]) -> Float[Tensor, " rows"]:
        """The largest of each row's entries; minus infinity where there are none."""
        return torch.segment_reduce(x, "max", offsets=self._bounds, unsafe=True)

    def sum(self, x: Float[Tensor, " entries"]) -> Float[Tensor, " rows"]:
        """The sum of each row's entries."""
        for bounds in (self._bounds_of_pieces, self._pieces):
            x = x if bounds is None else torch.segment_reduce(x, "sum", offsets=bounds, unsafe=True)
        return x


def products_with_entries(
    pattern: Pattern, planes: Float[Tensor, "planes rows dim"], table: Float[Tensor, "entries dim"]
) -> Float[Tensor, "planes entries"]:
    """``rows[query] . table[entry]`` at every entry of the pattern and for every plane.

    As weighted sums: those of the ``dim`` numbers that a query has in all planes, weighted by the entry's.
    """
    count, dim = len(planes), table.shape[1]
    by_query = planes.permute(1, 2, 0).reshape(-1, count).contiguous()
    result = planes.new_zeros(count, pattern.num_entries)
    if dim == 0:
        return result
    step = torch.arange(dim, device=pattern.row.device)
    for a in range(0, pattern.num_entries, FEATURE_ENTRIES):
        row, weights = pattern.row[a : a + FEATURE_ENTRIES, None].long(), table[a : a + FEATURE_ENTRIES]
        bounds = torch.arange(0, weights.numel() + 1, dim, device=row.device)
        index = (row * dim + step).flatten()
        result[:, a : a + FEATURE_ENTRIES] = _weighted(bounds, index, weights.flatten(), by_query).T
    return result


def _repeated(index: Tensor, count: int, step: int) -> Tensor:
    """An index into one block as an index into ``count`` blocks of ``step``."""
    if count == 1:
        return index
    return (index + step * torch.arange(count, device=index.device, dtype=index.dtype)[:, None]).flatten()


def _repeated_bounds(bounds: Tensor, count: int) -> Tensor:
    return torch.cat([bounds[:1], _repeated(bounds[1:], count, int(bounds[-1]))])


def _side_by_side(bounds: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Segments once for each head, one beside the other: their bounds, and for each entry its segment and its place before."""
    index, counts = bounds.dtype, bounds.diff().repeat_interleave(heads)
    wide = offsets_of(counts.long()).to(index)
    segment = torch.arange(counts.numel(), device=bounds.device, dtype=index).repeat_interleave(counts)
    shift = bounds[:-1].repeat_interleave(heads) - wide[:-1]
    return wide, segment, torch.arange(segment.numel(), device=bounds.device, dtype=index) + shift[segment]


def _cut(bounds: Tensor, heads: int) -> Iterator[tuple[slice, Tensor, slice]]:
    """The rows of whole tokens whose entries are about as many as are computed at a time; their bounds, and their entries."""
    by_token, a = bounds[::heads].contiguous(), 0
    while a < len(by_token) - 1:
        room = by_token[a] + RUN_ENTRIES
        b = max(int(torch.searchsorted(by_token, room, right=True)) - 1, a + 1)
        rows = slice(a * heads, b * heads)
        part = bounds[rows.start : rows.stop + 1]
        yield rows, part - part[0], slice(int(part[0]), int(part[-1]))
        a = b


def _weighted(bounds: Tensor, index: Tensor, weights: Tensor | None, table: Tensor) -> Tensor:
    """A product of a sparse matrix with a dense one.

    The kernel of embedding bags fetches rows several times as fast as that of sparse matrices, and needs no copy of the indices.
    """
    if index.numel() == 0 or table.shape[1] == 0:
        return table.new_zeros(bounds.numel() - 1, table.shape[1])
    table = table.detach()  # one that asks for a gradient gets a slower kernel, which prepares for a backward
    return torch.embedding_bag(table, index, bounds, False, 0, False, weights, True)[0]


@cache
def _hear_beta_notice() -> None:
    """Let torch say once that sparse tensors are in beta, to nobody; the operation used here is tested against the oracle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.tensor([0, 0]), torch.empty(0).long(), torch.empty(0), (1, 1), check_invariants=False
        )
