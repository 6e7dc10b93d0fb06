"""Many series with what is known beside them: as a Forecaster holds them, whether they came as a frame or as arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

Columns = Mapping[str, Float64[Tensor, "*series steps channels"]]


class Labels(ABC):
    """What the series of a panel are called, and how forecasts of them are handed back. A frozen value.

    The labels of a panel belong to its last steps.

    Attributes:
        freq: from one step to the next, where series have times.
    """

    freq: str | int | None

    @abstractmethod
    def back(self, steps: SequenceOf[int]) -> Labels:
        """The labels of the panel without its last steps, so many of each series."""

    @abstractmethod
    def name(self, series: int) -> str:
        """What a message calls a series."""

    @abstractmethod
    def calendar(self, cycles: SequenceOf[str], length: int, series: int, ahead: int) -> Tensor:
        """Calendar features of the last ``length`` steps of a series and of ``ahead`` steps after them."""

    @abstractmethod
    def table(self, columns: Columns) -> Any:
        """Forecasts of the steps after the last, as the user's kind of data."""

    @abstractmethod
    def tables(self, parts: SequenceOf[tuple[Labels, Columns]]) -> Any:
        """The same of several panels that end at different steps, with the step at which each ends: ``cutoff``."""

    @abstractmethod
    def known(self, future: Any, names: int | tuple[str, ...], horizon: int) -> list[Tensor]:
        """Covariates of the steps after the last, (horizon, known) of each series, from the user's kind of data."""

    @abstractmethod
    def plain(self) -> dict[str, Any]:
        """As plain values, for JSON."""


@dataclass(frozen=True)
class Panel:
    """Series, each of its own length.

    Attributes:
        values: of each series (steps, columns): targets and then past-only covariates; NaN where missing.
        future: of each series (steps, known); None if there are no known-future covariates.
        static: (series, constants); None if there are none.
        labels: what the series are called.
        level, scale: (series, columns), what brings each column to mean 0 and deviation 1.
    """

    values: list[Float64[Tensor, "_ columns"]]
    future: list[Float64[Tensor, "_ known"]] | None
    static: Float64[Tensor, "series constants"] | None
    labels: Labels
    level: Float64[Tensor, "series columns"]
    scale: Float64[Tensor, "series columns"]

    @classmethod
    def of(cls, values: list[Tensor], future: list[Tensor] | None, static: Tensor | None, labels: Labels) -> Panel:
        """With the scales of these values."""
        level, scale = (torch.stack(parts) for parts in zip(*map(_scale, values), strict=True))
        return cls(values, future, static, labels, level, scale)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def lengths(self) -> list[int]:
        """Steps of each series."""
        return [len(part) for part in self.values]

    def without(self, steps: SequenceOf[int]) -> Panel:
        """Without the last steps, so many of each series; they have no part in the scales either."""
        ends = [length - count for length, count in zip(self.lengths, steps, strict=True)]
        return Panel.of(
            _heads(self.values, ends), self.future and _heads(self.future, ends), self.static, self.labels.back(steps)
        )

    def tail(self, steps: int) -> Panel:
        """The last steps alone, with the scales of all."""
        future = None if self.future is None else [part[-steps:].clone() for part in self.future]
        return replace(self, values=[part[-steps:].clone() for part in self.values], future=future)

    def scaled(self) -> list[Tensor]:
        """The values at mean 0 and deviation 1."""
        return [(v - level) / scale for v, level, scale in zip(self.values, self.level, self.scale, strict=True)]

    def with_calendar(self, cycles: SequenceOf[str]) -> Panel:
        """With features of the calendar as further known-future covariates."""
        if not cycles:
            return self
        own = [self.labels.calendar(cycles, length, i, 0).double() for i, length in enumerate(self.lengths)]
        future = own if self.future is None else [torch.cat(both, 1) for both in zip(self.future, own, strict=True)]
        return replace(self, future=future)


def _heads(parts: list[Tensor], ends: list[int]) -> list[Tensor]:
    return [part[:end] for part, end in zip(parts, ends, strict=True)]


def _scale(values: Float64[Tensor, "steps columns"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column over what was observed; deviation 1 for a column that does not vary."""
    seen = ~values.isnan()
    count = seen.sum(0).clamp(min=1)
    level = values.nan_to_num(nan=0.0).sum(0) / count
    deviation = ((values - level).masked_fill(~seen, 0).square().sum(0) / count).sqrt()
    return level, torch.where(deviation > 1e-10 * level.abs(), deviation, 1.0)
