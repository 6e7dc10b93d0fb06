"""Series of unequal length, one behind the other, and the patches of their steps that become tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from .._autograd import outside_graphs
from ..domains import Timeline
from ..domains._base import as_lengths, offsets_of
from ._checks import check_finite, check_times, check_values, kind, seen_of


@dataclass(frozen=True)
class Packed:
    """Series one behind the other, in steps or in patches of steps; nothing in them is NaN, and what is missing is marked.

    Attributes:
        values: of each step; 0 where missing.
        observed: True where ``values`` were observed.
        times: of each step, or of the first step of each patch.
        lengths: steps, or patches, of each series.
    """

    values: Float[Tensor, "all *columns"]
    observed: Bool[Tensor, "all *columns"]
    times: Shaped[Tensor, " all"]
    lengths: Int[Tensor, " series"]

    @property
    def domain(self) -> Timeline:
        """Where the steps or patches live."""
        check_finite("times", self.times)
        return outside_graphs(Timeline.packed, "the number of steps is found by reading lengths")(
            self.times, self.lengths
        )

    def patches(self, size: int) -> Packed:
        """Cut every series into patches of ``size`` steps, (all, size, columns); steps beyond its end are missing in the last one."""
        if size == 1:
            return Packed(self.values[:, None], self.observed[:, None], self.times, self.lengths)
        lengths = (self.lengths + size - 1) // size
        first_step, first_patch = offsets_of(self.lengths)[:-1], offsets_of(lengths)[:-1]
        place = _places(self.lengths, len(self.values))
        slot = size * torch.repeat_interleave(first_patch, self.lengths, output_size=len(place)) + place
        count = int(lengths.sum())
        shape = (count * size, *self.values.shape[1:])
        values = self.values.new_zeros(shape).index_copy(0, slot, self.values)
        observed = self.observed.new_zeros(shape).index_copy(0, slot, self.observed)
        first = torch.repeat_interleave(first_step, lengths, output_size=count) + size * _places(lengths, count)
        return Packed(values.unflatten(0, (-1, size)), observed.unflatten(0, (-1, size)), self.times[first], lengths)

    def existing(self) -> Packed:
        """Without the steps or patches of which nothing was observed."""
        exists = self.observed.flatten(1).any(1)
        if exists.all():
            return self
        lengths = F.pad(exists.cumsum(0), (1, 0))[offsets_of(self.lengths)].diff()
        return Packed(self.values[exists], self.observed[exists], self.times[exists], lengths)


def packed(
    x: Float[Tensor, "batch steps channels"] | Float[Tensor, "all channels"],
    channels: int,
    observed: Bool[Tensor, "*steps channels"] | None,
    times: Shaped[Tensor, "*steps"] | None,
    lengths: SequenceOf[int] | Int[Tensor, " series"] | None,
) -> Packed:
    """The series of a call, checked: the first ``lengths`` steps of rows, or packed already. Times count steps unless given."""
    check_values(x)
    if x.ndim not in (2, 3) or x.shape[-1] != channels:
        raise ValueError(f"x must be (series, steps, {channels}), or packed (steps, {channels}); got {tuple(x.shape)}")
    seen = seen_of(x, observed)
    if lengths is None and x.ndim == 2:
        raise ValueError(f"lengths must say how many of the {len(x)} steps of packed x each series has; got None")
    counts = (
        x.new_full(x.shape[:1], x.shape[1], dtype=torch.long) if lengths is None else as_lengths("lengths", lengths)
    )
    counts = counts.to(x.device)
    if x.ndim == 2 and int(counts.sum()) != len(x):
        raise ValueError(f"lengths must add up to the {len(x)} steps of packed x; got a sum of {int(counts.sum())}")
    if x.ndim == 3 and (len(counts) != len(x) or (len(x) and int(counts.max()) > x.shape[1])):
        raise ValueError(f"lengths must be {len(x)} numbers <= {x.shape[1]}, as x {tuple(x.shape)} has; got {lengths}")
    when = _times(x, times, counts)
    values = x.masked_fill(~seen, 0)
    if x.ndim == 2:
        return Packed(values, seen, when, counts)
    if lengths is None:
        return Packed(values.flatten(0, 1), seen.flatten(0, 1), when.flatten(), counts)
    exists = torch.arange(x.shape[1], device=x.device) < counts[:, None]
    return Packed(values[exists], seen[exists], when[exists], counts)


def _times(x: Tensor, times: Tensor | None, lengths: Tensor) -> Tensor:
    """One for each step of ``x``."""
    if times is None:
        steps = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if x.ndim == 3 else None
        return _places(lengths, len(x)) if steps is None else steps
    check_times(times)
    if times.shape != x.shape[:-1] and (x.ndim == 2 or times.shape != x.shape[1:2]):
        allowed = f"{tuple(x.shape[:-1])}" + (f" or {tuple(x.shape[1:2])}" if x.ndim == 3 else "")
        raise ValueError(f"times must be {allowed}, one for each step of x; got {tuple(times.shape)}")
    if times.device != x.device:
        raise ValueError(f"times must be where x is, on {x.device}; got {kind(times)} on {times.device}")
    return times.expand(x.shape[:-1])


def _places(lengths: Int[Tensor, " series"], count: int) -> Int[Tensor, " all"]:
    """0, 1, 2, ... within each series."""
    first = torch.repeat_interleave(offsets_of(lengths)[:-1], lengths, output_size=count)
    return torch.arange(count, device=lengths.device) - first
