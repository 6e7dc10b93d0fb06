"""The pairs of a sparse mask as compressed rows and as compressed columns, and the products over them."""

from __future__ import annotations

import warnings
from functools import cache, cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..domains._base import offsets_of
from ..domains._neighbours import expand_ranges
from ._scores import Pairs

# Entries of all planes of a stack. More at once save calls, fewer save memory.
STACK_ENTRIES = 2**20

# Longer sums are taken in pieces: a sum of a million numbers one after the other loses three digits.
PIECE_ENTRIES = 2**8

# Entries that are given indices of their own at a time.
CHUNK_ENTRIES = 2**16


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
        self._stacks: dict[int, Stack] = {}

    @property
    def num_entries(self) -> int:
        """Entries of a plane."""
        return self.col.numel()

    @cached_property
    def by_key(self) -> tuple[Int[Tensor, " bounds"], Int[Tensor, " entries"]]:
        """Where the entries of each key begin and end, and the entries in that order."""
        bounds = offsets_of(torch.bincount(self.col, minlength=self.num_cols))
        return bounds.to(self.col.dtype), torch.argsort(self.col, stable=True).to(self.col.dtype)

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

    def planes(
        self, x: Float[Tensor, "batch heads tokens dim"], first: int, count: int
    ) -> Float[Tensor, "rows_or_heads heads_or_rows tokens dim"]:
        """A view of the planes from ``first`` on: heads of one row of the batch, or whole rows; or heads of all rows."""
        if self.rows is not None:
            return x[:, first : first + count].transpose(0, 1)
        row, head = divmod(first, x.shape[1])
        return x[row, None, head : head + count] if count < x.shape[1] else x[row : row + count // x.shape[1]]

    def products_with_entries(
        self, planes: Float[Tensor, "planes rows dim"], table: Float[Tensor, "entries dim"]
    ) -> Float[Tensor, "planes entries"]:
        """``rows[query] . table[entry]`` at every entry and for every plane.

        As weighted sums: those of the ``dim`` numbers that a query has in all planes, weighted by the entry's.
        """
        count, dim = len(planes), table.shape[1]
        by_query = planes.permute(1, 2, 0).reshape(-1, count).contiguous()
        result = planes.new_zeros(count, self.num_entries)
        if dim == 0:
            return result
        step = torch.arange(dim, device=self.row.device)
        for a in range(0, self.num_entries, CHUNK_ENTRIES):
            row, weights = self.row[a : a + CHUNK_ENTRIES, None].long(), table[a : a + CHUNK_ENTRIES]
            bounds = torch.arange(0, weights.numel() + 1, dim, device=row.device)
            index = (row * dim + step).flatten()
            result[:, a : a + CHUNK_ENTRIES] = _weighted(bounds, index, weights.flatten(), by_query).T
        return result

    def stack(self, batch: int, heads: int, group: int) -> Stack:
        """The pattern for as many planes at once as suits its size: one, some groups of heads, or some rows of the batch."""
        most = max(STACK_ENTRIES // max(self.size, 1), 1)
        count = max(
            n for n in range(1, max(heads, 1) + 1) if n == 1 or (heads % n == 0 and n % group == 0 and n <= most)
        )
        if count == heads and self.rows is None:
            count *= max((n for n in range(1, min(most // heads, batch) + 1) if batch % n == 0), default=1)
        if count not in self._stacks:
            if len(self._stacks) == 4:  # batches of many sizes need not be remembered
                self._stacks.clear()
            self._stacks[count] = Stack(self, count)
        return self._stacks[count]


class Stack:
    """A pattern for ``count`` planes, the blocks of a block-diagonal matrix.

    Vectors of entries are ``(count * entries,)``, tables of queries ``(count * rows, dim)``, tables of keys ``(count * cols, dim)``.
    """

    def __init__(self, pattern: Pattern, count: int) -> None:
        self.count, self._pattern = count, pattern
        self.rowptr = _repeated_bounds(pattern.rowptr, count)
        self.row = _repeated(pattern.row, count, pattern.num_rows)
        self.col = _repeated(pattern.col, count, pattern.num_cols)
        self._rows = _Segments(self.rowptr)

    @cached_property
    def _by_key(self) -> tuple[_Segments, Tensor, Tensor]:
        bounds, order = self._pattern.by_key
        row = self._pattern.row[order]
        return (
            _Segments(_repeated_bounds(bounds, self.count)),
            _repeated(row, self.count, self._pattern.num_rows),
            _repeated(order, self.count, self._pattern.num_entries),
        )

    @cached_property
    def _entry(self) -> Tensor:
        return torch.arange(self._pattern.num_entries, device=self.row.device, dtype=self.row.dtype).repeat(self.count)

    def products(
        self, rows: Float[Tensor, "rows dim"], cols: Float[Tensor, "cols dim"], scale: float = 1.0
    ) -> Float[Tensor, " entries"]:
        """``scale * rows[query] . cols[key]`` at every entry."""
        values = rows.new_zeros(self.row.shape)
        if values.numel() and rows.shape[1]:
            _hear_beta_notice()
            if values.numel() > len(rows) * len(
                cols
            ):  # parallel entries; torch would cut off what a matrix cannot hold
                cols = F.pad(cols, (0, 0, 0, values.numel() - len(cols)))
            at = torch.sparse_csr_tensor(
                self.rowptr, self.col, values, (rows.shape[0], cols.shape[0]), check_invariants=False
            )
            values = torch.sparse.sampled_addmm(at, rows, cols.T, beta=0.0, alpha=scale, out=at).values()
        return values

    def sums(self, weights: Float[Tensor, " entries"], cols: Float[Tensor, "cols dim"]) -> Float[Tensor, "rows dim"]:
        """For each query the sum of ``weight * cols[key]`` over its entries."""
        return self._rows.weighted_sums(self.col, weights, cols)

    def sums_of_entries(
        self, weights: Float[Tensor, " entries"], table: Float[Tensor, "pattern_entries dim"]
    ) -> Float[Tensor, "rows dim"]:
        """For each query the sum of ``weight * table[entry]`` over its entries."""
        return self._rows.weighted_sums(self._entry, weights, table)

    def sums_by_key(
        self, weights: Float[Tensor, " entries"], rows: Float[Tensor, "rows dim"]
    ) -> Float[Tensor, "cols dim"]:
        """For each key the sum of ``weight * rows[query]`` over its entries."""
        segments, row, order = self._by_key
        return segments.weighted_sums(row, weights.index_select(0, order), rows)

    def max(self, x: Float[Tensor, " entries"]) -> Float[Tensor, " rows"]:
        """The largest of each query's entries; minus infinity where there are none."""
        return torch.segment_reduce(x, "max", offsets=self.rowptr, unsafe=True)

    def sum(self, x: Float[Tensor, " entries"]) -> Float[Tensor, " rows"]:
        """The sum of each query's entries."""
        return self._rows.sums(x)

    def spread(self, x: Float[Tensor, " rows"]) -> Float[Tensor, " entries"]:
        """To every entry what its query has."""
        return x.index_select(0, self.row)


class _Segments:
    """Runs of entries, long ones in pieces."""

    def __init__(self, bounds: Int[Tensor, " bounds"]) -> None:
        counts = (bounds.diff() + (PIECE_ENTRIES - 1)).div(PIECE_ENTRIES, rounding_mode="floor").clamp(min=1)
        self.bounds, self._pieces = bounds, None
        if bounds.numel() > 1 and int(counts.max()) > 1:
            self._pieces = offsets_of(counts.long()).to(bounds.dtype)
            starts, within = expand_ranges(torch.zeros_like(counts), counts.long())
            self.bounds = torch.cat([bounds[starts] + PIECE_ENTRIES * within.to(bounds.dtype), bounds[-1:]])
            self._index = torch.arange(within.numel(), device=bounds.device, dtype=bounds.dtype)

    def weighted_sums(
        self, index: Int[Tensor, " entries"], weights: Float[Tensor, " entries"], table: Float[Tensor, "items dim"]
    ) -> Float[Tensor, "segments dim"]:
        """The sum over each segment of ``weight * table[index]``."""
        sums = _weighted(self.bounds, index, weights, table)
        return sums if self._pieces is None else _weighted(self._pieces, self._index, None, sums)

    def sums(self, x: Float[Tensor, " entries"]) -> Float[Tensor, " segments"]:
        """The sum over each segment."""
        for bounds in (self.bounds, self._pieces):
            x = x if bounds is None else torch.segment_reduce(x, "sum", offsets=bounds, unsafe=True)
        return x


def _repeated(index: Tensor, count: int, step: int) -> Tensor:
    """An index into one block as an index into ``count`` blocks of ``step``."""
    if count == 1:
        return index
    return (index + step * torch.arange(count, device=index.device, dtype=index.dtype)[:, None]).flatten()


def _repeated_bounds(bounds: Tensor, count: int) -> Tensor:
    return torch.cat([bounds[:1], _repeated(bounds[1:], count, int(bounds[-1]))])


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
