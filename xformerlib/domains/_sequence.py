"""Tokens in order: at whole steps (``Sequence``) or at real times (``Timeline``)."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence as SequenceOf
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from .._arguments import as_tensor, check_count
from .._autograd import check_not_batched, is_transformed
from ._base import Domain, as_lengths, offsets_of


class Sequence(Domain):
    """Tokens at positions ``start, start + 1, ..., start + length - 1``, after ``prefix`` tokens that have no position.

    Positions are absolute: ``Sequence(1, start=41)`` is one token at position 41, so that causality between one new query and 42 keys
    is a fact. ``num_tokens`` is ``prefix + length``.

    Args:
        length: number of ordinary tokens, >= 0.
        start: position of the first one.
        prefix: number of class or register tokens in front.

    Raises:
        ValueError, TypeError: a count that is negative or not an integer.

    Example:
        >>> Sequence(1, start=41).coordinates
        tensor([[41]])
        >>> Sequence.packed([2, 3], prefix=1).offsets
        tensor([0, 3, 7])
    """

    kind = "Sequence"
    longest: int  # ordinary tokens of the longest row or item

    def __init__(self, length: int, *, start: int = 0, prefix: int = 0) -> None:
        self.length = self.longest = check_count("length", length)
        self.start = check_count("start", start)
        prefix = check_count("prefix", prefix)
        self.lengths: Tensor | None = None
        super().__init__(num_tokens=prefix + self.length, ndim=1, prefix=prefix)

    @classmethod
    def padded(
        cls, lengths: SequenceOf[int] | Tensor, length: int | None = None, *, start: int = 0, prefix: int = 0
    ) -> Sequence:
        """A batch of rows of unequal length, padded at the end to ``length`` (default: the longest).

        Row ``b`` has its ``prefix`` tokens and then ``lengths[b]`` ordinary ones; the rest of the row does not exist.
        """
        sizes = as_lengths("lengths", lengths)
        longest = int(sizes.max()) if sizes.numel() else 0
        length = longest if length is None else check_count("length", length)
        if longest > length:
            raise ValueError(
                f"lengths must be <= length; got a row of {longest} tokens and length={length}. Raise length."
            )
        domain = cls(length, start=start, prefix=prefix)
        domain.lengths, domain.longest = sizes, longest
        domain.valid = torch.arange(domain.num_tokens, device=sizes.device) < prefix + sizes[:, None]
        domain._batch_size, domain._device = sizes.numel(), sizes.device
        return domain

    @classmethod
    def packed(cls, lengths: SequenceOf[int] | Tensor, *, start: int = 0, prefix: int = 0) -> Sequence:
        """Sequences of unequal length, one after the other without padding; each has its own ``prefix`` tokens in front."""
        sizes = as_lengths("lengths", lengths)
        domain = cls(int(sizes.sum()), start=start, prefix=prefix)
        domain.lengths, domain.longest = sizes, int(sizes.max()) if sizes.numel() else 0
        domain.offsets = offsets_of(sizes + prefix)
        domain.num_tokens = domain.length + prefix * sizes.numel()
        domain._device = sizes.device
        return domain

    def coordinate(self, axis: int, b: Tensor, i: Tensor) -> Tensor:
        return self.place(i) + (self.start - self.prefix)

    def rank(self, b: Tensor, i: Tensor) -> Tensor:
        # A chunk that starts at 41 continues an item: its first token is not the item's front.
        place = super().rank(b, i)
        if self.start == 0:
            return place
        return torch.where(place < self.prefix, place, place + self.start) if self.prefix else place + self.start

    def extent(self, axis: int, b: Tensor, i: Tensor) -> tuple[Tensor | int, Tensor | int]:
        if self.lengths is None:
            return self.start, self.start + self.length - 1
        if self.valid is not None:
            return self.start, self.start - 1 + self.lengths[b]
        lengths = self.lengths[0] if self.items is None else self.lengths[self.items[i]]
        return self.start, self.start - 1 + lengths

    def check_extendable(self) -> None:
        if self.lengths is not None:
            super().check_extendable()

    def extended(self, later: Domain) -> Sequence:
        self.check_extendable()
        end = self.start + self.length
        if not isinstance(later, Sequence) or later.lengths is not None or later.prefix or later.start != end:
            raise ValueError(
                f"the next tokens start where the cached ones ended: Sequence(n, start={end}); got {later!r}"
            )
        return Sequence(self.length + later.length, start=self.start, prefix=self.prefix)

    def continuing(self, earlier: Domain) -> Sequence:
        return self._ranked_from(earlier.prefix)  # ``start`` counts the others

    def begins_with(self, keys: Domain) -> bool:
        return super().begins_with(keys) and (not isinstance(keys, Sequence) or self.start == keys.start)

    def out_of_reach(self, later: Domain, lookback: float) -> int:
        return 0 if self.prefix else max(0, self.length - int(min(lookback, self.length)))

    def last(self, count: int) -> Sequence:
        if self.lengths is not None:
            super().last(count)
        count = check_count("count", count)
        return Sequence(count, start=self.start + self.length - count)._ranked_from(self._rank_offset + self.prefix)

    def _given(self) -> dict[str, Any]:
        own = {"length": self.length, "start": self.start, "prefix": self.prefix}
        if self.lengths is None:
            return own
        if self.valid is None:
            own.pop("length")
        return {"packed": self.valid is None, "lengths": self.lengths, **own}

    @classmethod
    def _made_of(cls, arguments: dict[str, Any]) -> Sequence:
        if "packed" not in arguments:
            return super()._made_of(arguments)
        arguments = dict(arguments)
        return (cls.packed if arguments.pop("packed") else cls.padded)(**arguments)

    def ticket(self) -> list[int]:
        dense = self.lengths is None
        return [1, self.length, self.start, self.prefix, self._rank_offset] if dense else super().ticket()

    def _value(self) -> Hashable:
        return (self.length, self.start, self.prefix, self._rank_offset) if self.lengths is None else None

    def __repr__(self) -> str:
        options = "".join(
            f", {name}={value}" for name, value in (("start", self.start), ("prefix", self.prefix)) if value
        )
        if self.lengths is None:
            return f"Sequence({self.length}{options})"
        how = "packed" if self.valid is None else "padded"
        length = "" if self.valid is None else f", length={self.length}"
        return f"Sequence.{how}(<{self.lengths.numel()} lengths>{length}{options})"


class Timeline(Domain):
    """Tokens at real times, which need not be regular, distinct or sorted.

    Args:
        times: ``(tokens,)`` shared by the batch, or ``(batch, tokens)``; in any unit, which is then the unit of every radius.
        valid: ``(batch, tokens)`` or ``(tokens,)``, True where a token exists; the times of the others are never read.
        prefix: number of class or register tokens in front of the times.

    Raises:
        ValueError: a time of an existing token that is NaN or infinite, or shapes that do not match.

    Example:
        >>> Timeline(torch.tensor([0.0, 0.5, 7.25])).num_tokens
        3
    """

    kind = "Timeline"
    continuous = True

    def __init__(
        self, times: Shaped[Tensor, "*batch tokens"] | SequenceOf[float], *, valid: Bool[Tensor, "*batch tokens"] | None = None,
        prefix: int = 0,
    ) -> None:  # fmt: skip
        times = as_tensor("times", times, "a tensor or list of real numbers")
        if times.ndim not in (1, 2) or times.dtype == torch.bool or times.is_complex():
            raise ValueError(
                f"times must be (tokens,) or (batch, tokens) of real numbers; got {tuple(times.shape)} of {times.dtype}"
            )
        check_not_batched("times", times)
        prefix = check_count("prefix", prefix)
        times = times if times.is_floating_point() else times.double()
        if valid is not None:
            times, valid = _check_valid(times, valid)
        if not times.isfinite().all():
            raise ValueError(
                "times must be finite; got NaN or infinity. Drop those tokens, or mark them as missing with valid=times.isfinite()."
            )
        rows = times.shape[0] if times.ndim == 2 else None
        # With a place, never read, for each prefix token, so that a token's index finds its time.
        at = torch.cat([times.new_zeros(*times.shape[:-1], prefix), times], -1) if prefix else times
        self.times, self._at, self.learned = (
            times.detach(),
            at.detach(),
            at[..., None] if at.requires_grad or is_transformed() else None,
        )
        super().__init__(
            num_tokens=prefix + times.shape[-1], ndim=1, prefix=prefix, batch_size=rows, device=times.device,
            valid=valid if valid is None or prefix == 0 else torch.cat([valid.new_ones(valid.shape[0], prefix), valid], 1),
        )  # fmt: skip

    @classmethod
    def packed(cls, times: Shaped[Tensor, " tokens"], lengths: SequenceOf[int] | Tensor) -> Timeline:
        """Timelines of unequal length, one after the other: ``times`` of all their tokens, and how many each has."""
        domain = cls(times)
        sizes = as_lengths("lengths", lengths).to(domain.times.device)
        if domain.times.ndim != 1 or int(sizes.sum()) != domain.num_tokens:
            raise ValueError(
                f"lengths must add up to the number of times; got {int(sizes.sum())} and times of {tuple(domain.times.shape)}"
            )
        domain.offsets = offsets_of(sizes)
        return domain

    def coordinate(self, axis: int, b: Tensor, i: Tensor) -> Tensor:
        return self._at[i] if self._at.ndim == 1 else self._at[b, i]

    @property
    def _given_times(self) -> Tensor:
        """The times, with their gradient."""
        return self.times if self.learned is None else self.learned[..., self.prefix :, 0]

    def _make_coordinates(self) -> Tensor:
        return self._at[..., None]

    def at_places(self, coordinates: Tensor) -> Timeline:
        other = copy.copy(self)
        other._at, other._facts = coordinates[..., 0], {}
        return other

    def _given(self) -> dict[str, Any]:
        if self.offsets is not None:
            return {"times": self.times, "lengths": self.offsets.diff()}
        valid = None if self.valid is None else self.valid[:, self.prefix :]
        return {"times": self.times, "valid": valid, "prefix": self.prefix}

    @classmethod
    def _made_of(cls, arguments: dict[str, Any]) -> Timeline:
        return cls.packed(**arguments) if "lengths" in arguments else super()._made_of(arguments)

    def check_extendable(self) -> None:
        if self.offsets is not None or self.valid is not None:
            super().check_extendable()

    def extended(self, later: Domain) -> Timeline:
        self.check_extendable()
        if not isinstance(later, Timeline) or later.prefix or later.times.shape[:-1] != self.times.shape[:-1]:
            raise ValueError(
                f"the next tokens of a cached timeline are a Timeline of as many rows, without a prefix; got {later!r}"
            )
        if self.times.numel() and later.times.numel():
            last, first = self.times.amax(-1), later.times.amin(-1)
            if not (first > last).all():
                row = int((first - last).argmin())
                raise ValueError(
                    "times must be later than those in the cache, whose queries did not see them; got "
                    f"{first.flatten()[row]:g} after {last.flatten()[row]:g}. Give tokens in order, and those of one time together."
                )
        return Timeline(torch.cat([self._given_times, later._given_times], -1), prefix=self.prefix)._ranked_from(
            self._rank_offset
        )

    def out_of_reach(self, later: Domain, lookback: float) -> int:
        if self.prefix or later.num_tokens == 0:
            return 0
        first = later.coordinates[..., 0].amin(-1, keepdim=True)
        away = (first - self.times > lookback).reshape(-1, self.num_tokens).all(0)
        return int(away.cumprod(0).sum())

    def last(self, count: int) -> Timeline:
        if self.offsets is not None or self.valid is not None:
            super().last(count)
        count = check_count("count", count)
        first = self.times.shape[-1] - count
        return Timeline(self._given_times[..., first:])._ranked_from(self._rank_offset + self.num_tokens - count)

    def repeated(self, times: int) -> Timeline:
        if self.batch_size is None:
            return self
        return Timeline(self._given_times.repeat_interleave(times, 0), prefix=self.prefix)._ranked_from(
            self._rank_offset
        )

    def __repr__(self) -> str:
        if self.offsets is not None:
            return f"Timeline.packed(<{self.num_tokens} times>, <{self.num_items} lengths>)"
        options = (", valid=..." if self.valid is not None else "") + (f", prefix={self.prefix}" if self.prefix else "")
        return f"Timeline(<{' x '.join(map(str, self.times.shape))} times>{options})"


def _check_valid(places: Tensor, valid: Any, axes: int = 0) -> tuple[Tensor, Tensor]:
    """Times (``axes=0``) or coordinates (``axes=1``) with one row per row of ``valid`` and 0 where no token exists, and ``valid``."""
    shape = places.shape[: places.ndim - axes]
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        raise TypeError(
            f"valid must be a bool tensor, True where a token exists; got {getattr(valid, 'dtype', type(valid).__name__)}"
        )
    valid = valid[None] if valid.ndim == 1 else valid
    if valid.ndim != 2 or valid.shape[-1] != shape[-1] or (len(shape) == 2 and valid.shape[0] != shape[0]):
        raise ValueError(f"valid must be (batch, tokens) like the tokens; got {tuple(valid.shape)} for {tuple(shape)}")
    if valid.device != places.device:
        raise ValueError(f"valid must be on the device of the tokens; got {valid.device} and {places.device}")
    places = places.expand(*valid.shape, *places.shape[len(shape) :])
    exists = valid if axes == 0 else valid[..., None]
    return places.masked_fill(~exists, 0), valid
