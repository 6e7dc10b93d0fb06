"""Sets of whole numbers, kept as runs of neighbours: a band of a matrix of millions of rows is a few numbers for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as SequenceOf
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..domains._neighbours import expand_ranges


class Runs(NamedTuple):
    """A subset of ``0, ..., size - 1``: the numbers from ``start[r]`` to ``stop[r] - 1`` for each run r, in rising order, disjoint."""

    start: Int[Tensor, " runs"]
    stop: Int[Tensor, " runs"]
    size: int

    @staticmethod
    def whole(size: int, device: torch.device | None) -> Runs:
        """All numbers below ``size``."""
        edges = torch.tensor([0, size] if size else [], dtype=torch.long, device=device)
        return Runs(edges[:1], edges[1:], size)

    @staticmethod
    def empty(size: int, device: torch.device | None) -> Runs:
        """No number at all."""
        nothing = torch.empty(0, dtype=torch.long, device=device)
        return Runs(nothing, nothing, size)

    @staticmethod
    def of(start: Int[Tensor, " runs"], stop: Int[Tensor, " runs"], size: int) -> Runs:
        """From runs in rising order that are disjoint, some of them perhaps empty."""
        there = start < stop
        return Runs(start[there], stop[there], size)

    @staticmethod
    def of_numbers(numbers: Int[Tensor, " count"], size: int) -> Runs:
        """From distinct numbers in rising order."""
        if numbers.numel() == 0:
            return Runs(numbers, numbers, size)
        breaks = numbers.diff() > 1
        first, last = breaks.new_ones(1), breaks.new_ones(1)
        return Runs(numbers[torch.cat([first, breaks])], numbers[torch.cat([breaks, last])] + 1, size)

    @property
    def total(self) -> int:
        """How many numbers are in the set."""
        return int((self.stop - self.start).sum())

    @property
    def is_whole(self) -> bool:
        """Whether the set is one run of all numbers."""
        return self.start.numel() == 1 and int(self.stop[0] - self.start[0]) == self.size

    def complement(self) -> Runs:
        """The numbers below ``size`` that are not in the set."""
        zero, size = self.start.new_zeros(1), self.start.new_full((1,), self.size)
        return Runs.of(torch.cat([zero, self.stop]), torch.cat([self.start, size]), self.size)

    def numbers(self, most: int) -> Iterator[Int[Tensor, " count"]]:
        """The numbers in rising order, no more than ``most`` at a time."""
        counts = self.stop - self.start
        total = counts.cumsum(0)
        for begin in range(0, int(total[-1]) if total.numel() else 0, most):
            # What this piece has of each run.
            low = (begin - (total - counts)).clamp(min=0)
            high = torch.minimum(begin + most - (total - counts), counts)
            here = low < high
            yield expand_ranges((self.start + low)[here], (high - low)[here])[1]


def held_by(sets: SequenceOf[Runs], least: int) -> Runs:
    """The numbers that are in at least ``least`` of the sets: their union (1), their intersection (all of them)."""
    if least == len(sets):
        sets = [runs for runs in sets if not runs.is_whole] or sets[:1]
        least = len(sets)
    if len(sets) == 1:
        return sets[0]
    ends = torch.cat([2 * runs.start for runs in sets] + [2 * runs.stop + 1 for runs in sets]).sort().values
    count = (1 - 2 * (ends & 1)).cumsum(0)  # the sets that hold what follows each end
    held = count >= least
    before = torch.cat([held.new_zeros(1), held])[:-1]
    at = ends >> 1
    return Runs.of(at[held & ~before], at[before & ~held], sets[0].size)
