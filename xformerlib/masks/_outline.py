"""What the structure of a mask says of whole blocks of pairs, without a look at the pairs themselves."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from ..domains import Domain
from ..domains._neighbours import Neighbours
from ._runs import Runs, held_by

if TYPE_CHECKING:
    from ._algebra import Mask

# Block pairs that are compared one by one at a time.
COMPARED = 2**22
# Runs of offsets on a grid that are worth telling apart.
MOST_OFFSETS = 256


class Outline(NamedTuple):
    """A mask over blocks in three values: all pairs of a block are surely allowed, some perhaps are, or none is.

    Outlines combine as masks do, by Kleene's logic. What they leave open only the pairs can tell.

    Attributes:
        certain: blocks of which every pair is allowed. Blocks are numbered as ``Tiling`` says.
        possible: blocks of which a pair may be allowed.
        likely: some pairs (row of the batch, query, key) that a leaf allows: where the others are sparse, those to ask first.
    """

    certain: Runs
    possible: Runs
    likely: Int[Tensor, "3 pairs"] | None = None

    @staticmethod
    def all_of(outlines: SequenceOf[Outline]) -> Outline:
        """The outline of a conjunction."""
        return Outline._combined(outlines, len(outlines))

    @staticmethod
    def any_of(outlines: SequenceOf[Outline]) -> Outline:
        """The outline of a disjunction."""
        return Outline._combined(outlines, 1)

    @staticmethod
    def _combined(outlines: SequenceOf[Outline], least: int) -> Outline:
        likely = [outline.likely for outline in outlines if outline.likely is not None]
        return Outline(
            held_by([outline.certain for outline in outlines], least),
            held_by([outline.possible for outline in outlines], least),
            torch.cat(likely, 1) if likely else None,
        )

    def negated(self) -> Outline:
        """The outline of what the mask forbids."""
        return Outline(self.possible.complement(), self.certain.complement(), self.likely)

    def at_most(self) -> Outline:
        """The same without certainty: of a condition that is necessary, but not sufficient."""
        return self._replace(certain=Runs.empty(self.certain.size, self.certain.start.device))


class Between(NamedTuple):
    """A relation of queries and keys by a number of each: ``low[q] <= at[k] <= high[q]``; None where there is no bound.

    Shapes broadcast to ``(rows, tokens)``, tokens being those of ``Tiling.q`` and ``Tiling.k``, or every one. ``slack`` is by how much
    rounding may put a bound too high or too low.
    """

    low: Tensor | None
    high: Tensor | None
    at: Tensor
    slack: float = 0

    @staticmethod
    def equal(query: Tensor, key: Tensor) -> Between:
        """Both have the same number."""
        return Between(query, query, key)


class Ends(NamedTuple):
    """The smallest and the largest number in each block."""

    min: Tensor
    max: Tensor


@dataclass(frozen=True, eq=False)
class Tiling:
    """The pairs of two domains cut into blocks: block (row of the batch, query block, key block) has the number

        (row * query_blocks + query_block) * key_blocks + key_block.

    Attributes:
        domain, keys: of the queries and of the keys.
        size: queries and keys of a block.
        rows: rows of the batch.
        device: where indices are made.
        candidates: the blocks that matter; of others an outline may say anything.
    """

    domain: Domain
    keys: Domain
    size: tuple[int, int]
    rows: int
    device: torch.device
    candidates: Runs | None = None

    # -- indices ---------------------------------------------------------------------------------------------------

    @cached_property
    def b(self) -> Int[Tensor, "rows 1"]:
        return torch.arange(self.rows, device=self.device)[:, None]

    @property
    def q(self) -> Int[Tensor, " queries"]:
        """Queries that tell the numbers of all of them; see ``telling``."""
        return self.telling(self.domain, self.size[0])

    @property
    def k(self) -> Int[Tensor, " keys"]:
        """Keys that tell the numbers of all of them; see ``telling``."""
        return self.telling(self.keys, self.size[1])

    def telling(self, where: Domain, size: int) -> Int[Tensor, " tokens"]:
        """All tokens; or, on an unbroken sequence, the first and the last of each block.

        There numbers that never fall with the place are told by the ends. Numbers of other kinds need ``every`` token.
        """
        unbroken = where.kind == "Sequence" and where.items is None
        return self._edges(where.num_tokens, size) if unbroken else self.every(where)

    def _edges(self, tokens: int, size: int) -> Int[Tensor, " tokens"]:
        """The first and the last token of each block; all tokens if there are no more."""
        first = torch.arange(0, tokens, size, device=self.device)
        if 2 * len(first) >= tokens:
            return torch.arange(tokens, device=self.device)
        return torch.stack([first, (first + size - 1).clamp(max=tokens - 1)], 1).flatten()

    def every(self, where: Domain) -> Int[Tensor, " tokens"]:
        """The indices of all tokens."""
        return torch.arange(where.num_tokens, device=self.device)

    def coordinates(self, axis: int) -> tuple[Tensor, Tensor]:
        """Coordinates of ``q`` and of ``k`` on one axis, (rows, tokens) or (tokens,)."""
        return self.domain.coordinate(axis, self.b, self.q), self.keys.coordinate(axis, self.b, self.k)

    @property
    def query_blocks(self) -> int:
        return -(-self.domain.num_tokens // self.size[0])

    @property
    def key_blocks(self) -> int:
        return -(-self.keys.num_tokens // self.size[1])

    @property
    def count(self) -> int:
        """The number of blocks."""
        return self.rows * self.query_blocks * self.key_blocks

    def split(self, block: Int[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor]:
        """Row of the batch, query block and key block of numbered blocks."""
        line = block // self.key_blocks
        return line // self.query_blocks, line % self.query_blocks, block % self.key_blocks

    def among(self, candidates: Runs) -> Tiling:
        """The same, where only some blocks matter any more."""
        if self.candidates is not None:
            candidates = held_by([self.candidates, candidates], 2)
        return replace(self, candidates=candidates)

    def outline_of(self, mask: Mask) -> Outline:
        """The outline of a mask, with the domains' own facts."""
        if self.count == 0:
            return self.everywhere()
        together = self.together()
        tiling = self.among(together.possible)
        whole = self.domain.whole is self.domain and self.keys.whole is self.keys
        # Where tokens were left out, blocks say nothing of places.
        return Outline.all_of([together, mask.outline(tiling) if whole else tiling.unknown()])

    def within_reach(self, reaches: SequenceOf[float]) -> Tiling:
        """On a grid, without the blocks that no step of at most so many cells on each axis leads to.

        In row-major order such steps are runs of index offsets, one for each step on the leading axes. Ranges of coordinates alone would
        keep much more: a block that goes on into the next row has all columns.
        """
        if self.domain.kind != "Grid" or self.domain != self.keys or self.domain.offsets is not None:
            return self
        span, offsets, stride = 0, torch.zeros(1, dtype=torch.long, device=self.device), 1
        for reach, size in zip(reversed(reaches), reversed(self.domain.sizes), strict=True):  # type: ignore[attr-defined]
            reach = int(min(reach, max(size - 1, 0)))
            if stride <= 2 * span + sum(self.size):  # too close for a block to lie between
                span += reach * stride
            else:
                steps = torch.arange(-reach, reach + 1, device=self.device) * stride
                offsets = (offsets + steps[:, None]).flatten()
            stride *= size
        if len(offsets) > MOST_OFFSETS:
            return self
        q, k = (self._edges(self.domain.num_tokens, size) for size in self.size)
        runs = [self.between(Between(q + offset - span, q + offset + span, k)) for offset in offsets.tolist()]
        return self.among(Outline.any_of(runs).possible)

    # -- outlines of simple relations --------------------------------------------------------------------------------

    def everywhere(self) -> Outline:
        """Every pair is allowed."""
        whole = Runs.whole(self.count, self.device)
        return Outline(whole, whole)

    def unknown(self) -> Outline:
        """Nothing is known."""
        return self.everywhere().at_most()

    def of_keys(self, flag: Bool[Tensor, "..."]) -> Outline:
        """Every query and the keys that are flagged; ``flag`` broadcasts to (rows, keys), of ``k`` or of every key."""
        ends = _ends(flag.to(torch.uint8), self.keys.num_tokens, self.size[1])
        return Outline(self._in_every_line(ends.min), self._in_every_line(ends.max))

    def _in_every_line(self, flag: Integer[Tensor, "_ key_blocks"]) -> Runs:
        """The flagged key blocks of a row of the batch, in the lines of all its query blocks."""
        width = self.key_blocks + 1  # one more, never flagged, so that no run goes on from one row to the next
        flag = torch.nn.functional.pad(flag.expand(self.rows, -1), (0, 1))
        runs = Runs.of_numbers(flag.flatten().nonzero()[:, 0], flag.numel())
        line = runs.start // width * self.query_blocks + torch.arange(self.query_blocks, device=self.device)[:, None]
        start, stop = (
            (line * self.key_blocks + end % width).flatten().sort().values for end in (runs.start, runs.stop)
        )
        return Runs(start, stop, self.count)

    def of_queries(self, flag: Bool[Tensor, "..."]) -> Outline:
        """The queries that are flagged and every key; ``flag`` broadcasts to (rows, queries), of ``q`` or of every query."""
        ends = _ends(flag.to(torch.uint8), self.domain.num_tokens, self.size[0])
        return Outline(self._whole_lines(ends.min), self._whole_lines(ends.max))

    def _whole_lines(self, flag: Integer[Tensor, "_ query_blocks"]) -> Runs:
        line = flag.expand(self.rows, -1).flatten().nonzero()[:, 0]
        return Runs(line * self.key_blocks, (line + 1) * self.key_blocks, self.count)

    def of_neighbours(self, neighbours: Neighbours) -> Outline:
        """The entries of sparse rows; those of row b of the batch are behind those of the rows before, if they differ."""
        row, k = neighbours.row, neighbours.col
        tokens = max(self.domain.num_tokens, 1)
        shared = neighbours.num_rows == self.domain.num_tokens
        b, q = (torch.zeros_like(row), row) if shared else (row // tokens, row % tokens)
        block = (b * self.query_blocks + q // self.size[0]) * self.key_blocks + k // self.size[1]
        block, order = block.sort()
        first = torch.cat([block.new_ones(1, dtype=torch.bool), block.diff() > 0])[: block.numel()]
        block, likely = block[first], torch.stack([b, q, k])[:, order[first]]
        if shared and self.rows > 1:
            step = self.query_blocks * self.key_blocks
            block = (block + step * self.b).flatten()
            likely = torch.stack([likely] * self.rows, 1)
            likely[0] = self.b
            likely = likely.flatten(1)
        return Outline(Runs.empty(self.count, self.device), Runs.of_numbers(block, self.count), likely)

    def together(self) -> Outline:
        """The pairs in the same item of which both tokens exist."""
        outlines = [self.everywhere()]
        if self.domain.items is not None and self.keys.items is not None:
            outlines.append(self.between(Between.equal(self.domain.items, self.keys.items)))
        if self.domain.valid is not None:
            outlines.append(self.of_queries(self.domain.valid))
        if self.keys.valid is not None:
            outlines.append(self.of_keys(self.keys.valid))
        return Outline.all_of(outlines)

    def or_prefix(self, outline: Outline) -> Outline:
        """With all pairs that have a prefix token."""
        query, key = self.domain.is_prefix(self.b, self.q), self.keys.is_prefix(self.b, self.k)
        touches = [self.of_queries(query)] if query is not None else []
        touches += [self.of_keys(key)] if key is not None else []
        return Outline.any_of([outline, *touches])

    # -- outlines of relations by number -------------------------------------------------------------------------------

    def between(self, *relations: Between) -> Outline:
        """The pairs for which all the relations hold.

        Where the keys' numbers rise from block to block, the blocks of a query block are found by bisection; elsewhere the blocks
        that are left are compared one by one, by the ranges of their numbers.
        """
        found, left = [self.everywhere() if self.candidates is None else Outline(self.candidates, self.candidates)], []
        for relation in relations:
            bounds = _Bounds.of(relation, self)
            if not bounds.rising and (lifted := self._lifted(relation, bounds)) is not None:
                bounds = _Bounds.of(lifted, self)
            if bounds.rising:
                found.append(Outline(*bounds.bisected(self)))
            else:
                left.append(bounds)
        outline = Outline.all_of(found)
        return self._compared(outline, left) if left else outline

    def _compared(self, outline: Outline, bounds: SequenceOf[_Bounds]) -> Outline:
        certain, possible = [], []
        for block in outline.possible.numbers(COMPARED):
            b, q, k = self.split(block)
            sure, maybe = (torch.ones_like(block, dtype=torch.bool) for _ in range(2))
            for bound in bounds:
                sure_here, maybe_here = bound.compared(b, q, k)
                sure, maybe = sure & sure_here, maybe & maybe_here
            certain.append(block[sure])
            possible.append(block[maybe])
        sets = [
            Runs.of_numbers(torch.cat(blocks), self.count) if blocks else outline.possible
            for blocks in (certain, possible)
        ]
        return Outline(held_by([outline.certain, sets[0]], 2), sets[1])

    def _lifted(self, relation: Between, bounds: _Bounds) -> Between | None:
        """Whole numbers of packed items, moved apart from item to item, so that they may rise over all; None if that is no use.

        Pairs of different items are never together, so that it does not matter what the relation says of them.
        """
        items, key_items = self.domain.items, self.keys.items
        if items is None or key_items is None or relation.at.is_floating_point():
            return None
        ends = [ends for ends in (bounds.low, bounds.high, bounds.at) if ends is not None]
        step = int(max(end.max.max() for end in ends) - min(end.min.min() for end in ends)) + 1
        if step * self.domain.num_items >= 2**62:
            return None
        low, high = (None if bound is None else bound + items * step for bound in relation[:2])
        return relation._replace(low=low, high=high, at=relation.at + key_items * step)


class _Bounds(NamedTuple):
    """A relation by the ranges of its numbers in each block: those of queries, (rows, query_blocks), those of keys likewise."""

    low: Ends | None
    high: Ends | None
    at: Ends
    slack: float

    @staticmethod
    def of(relation: Between, tiling: Tiling) -> _Bounds:
        queries, size = tiling.domain.num_tokens, tiling.size
        low, high = (
            None if bound is None else _ends(bound, queries, size[0]) for bound in (relation.low, relation.high)
        )
        if relation.low is relation.high:
            high = low
        return _Bounds(low, high, _ends(relation.at, tiling.keys.num_tokens, size[1]), relation.slack)

    @property
    def rising(self) -> bool:
        """Whether both ends of the keys' ranges never fall from block to block."""
        return all(bool((end.diff(dim=-1) >= 0).all()) for end in self.at)

    def bisected(self, tiling: Tiling) -> tuple[Runs, Runs]:
        """The blocks of which every pair is related, and those of which one may be."""
        at, low, high, slack = self.at, self.low, self.high, self.slack
        zero, end = tiling.b.new_zeros(1, 1), tiling.b.new_full((1, 1), tiling.key_blocks)
        lines = torch.arange(tiling.rows * tiling.query_blocks, device=tiling.device) * tiling.key_blocks

        def runs(start: Tensor, stop: Tensor) -> Runs:
            shape = (tiling.rows, tiling.query_blocks)
            return Runs.of(lines + start.expand(shape).flatten(), lines + stop.expand(shape).flatten(), tiling.count)

        certain = runs(
            zero if low is None else _place(at.min, low.max + slack, right=False),
            end if high is None else _place(at.max, high.min - slack, right=True),
        )
        possible = runs(
            zero if low is None else _place(at.max, low.min - slack, right=False),
            end if high is None else _place(at.min, high.max + slack, right=True),
        )
        return certain, possible

    def compared(self, b: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Whether every pair of the blocks is related, and whether one may be."""
        sure = maybe = torch.ones_like(q, dtype=torch.bool)
        first, last = (_at(end, b, k) for end in self.at)
        if self.low is not None:
            sure = sure & (first >= _at(self.low.max, b, q) + self.slack)
            maybe = maybe & (last >= _at(self.low.min, b, q) - self.slack)
        if self.high is not None:
            sure = sure & (last <= _at(self.high.min, b, q) - self.slack)
            maybe = maybe & (first <= _at(self.high.max, b, q) + self.slack)
        return sure, maybe


def _ends(x: Tensor, tokens: int, size: int) -> Ends:
    """The ends of each block's range, (rows or 1, blocks), from the numbers of telling tokens or of every token."""
    x = torch.atleast_2d(x)
    blocks = -(-tokens // size)
    if x.shape[1] == 2 * blocks < tokens:
        return Ends(*x.unflatten(1, (blocks, 2)).aminmax(dim=-1))
    x = x.expand(x.shape[0], tokens)
    whole = tokens // size * size
    parts = [x[:, :whole].unflatten(1, (whole // size, size)).aminmax(dim=-1)] if whole else []
    parts += [x[:, whole:].unsqueeze(1).aminmax(dim=-1)] if whole < tokens else []
    return Ends(*(torch.cat(ends, 1) for ends in zip(*parts, strict=True)))


def _place(sorted_ends: Tensor, bound: Tensor, *, right: bool) -> Tensor:
    """Where bounds stand among the ends of the keys' ranges."""
    rows = max(len(sorted_ends), len(bound))
    dtype = torch.promote_types(sorted_ends.dtype, bound.dtype)
    ends, bound = (x.to(dtype).expand(rows, -1).contiguous() for x in (sorted_ends, bound))
    return torch.searchsorted(ends, bound, right=right)


def _at(table: Tensor, b: Tensor, block: Tensor) -> Tensor:
    return table[0][block] if len(table) == 1 else table[b, block]
