"""What a forecast is: a number, quantiles, or a distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from .._arguments import checked_class
from .._config import Described
from ._losses import mse, negative_log_likelihood, quantile_loss
from ._parts import Affine
from ._student_t import StudentTForecast


class Head(Described, ABC):
    """How the numbers that a model ends in become a forecast, and the loss that trains it. A frozen value.

    A model gives ``size`` numbers for each step and channel, ``raw``: (B, H, channels, size).
    """

    size: int

    @abstractmethod
    def forecast(self, raw: Float[Tensor, "batch steps channels size"], inverse: Affine | None = None) -> Any:
        """The forecast; ``inverse``, from ``instance_norm``, brings it to the units of the data."""

    @abstractmethod
    def loss(
        self,
        forecast: Any,
        target: Float[Tensor, "batch steps channels"],
        observed: Bool[Tensor, "batch steps channels"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss that fits this kind of forecast, over what was observed of the target."""

    @abstractmethod
    def point(self, forecast: Any) -> Float[Tensor, "batch steps channels"]:
        """One number for each step: what a score such as the MSE is taken of."""


@dataclass(frozen=True)
class Point(Head):
    """One number for each step and channel, (B, H, channels); its loss is the mean squared error.

    Example:
        >>> Point().forecast(torch.zeros(2, 6, 3, 1)).shape
        torch.Size([2, 6, 3])
    """

    size = 1

    def forecast(
        self, raw: Float[Tensor, "batch steps channels 1"], inverse: Affine | None = None
    ) -> Float[Tensor, "batch steps channels"]:
        y = raw[..., 0]
        return y if inverse is None else inverse(y)

    def loss(
        self,
        forecast: Float[Tensor, "batch steps channels"],
        target: Float[Tensor, "batch steps channels"],
        observed: Bool[Tensor, "batch steps channels"] | None = None,
    ) -> Float[Tensor, ""]:
        return mse(forecast, target, observed)

    def point(self, forecast: Float[Tensor, "batch steps channels"]) -> Float[Tensor, "batch steps channels"]:
        return forecast


@checked_class
@dataclass(frozen=True)
class Quantile(Head):
    """Quantiles of each step and channel, (B, H, channels, levels); the loss is the quantile loss.

    They never cross: they are sorted, which can only lower the loss (monotone rearrangement, Chernozhukov, Fernandez-Val and
    Galichon 2010, arXiv:0704.3649).

    Args:
        levels: rising, each between 0 and 1.

    Example:
        >>> Quantile((0.1, 0.5, 0.9)).forecast(torch.randn(2, 6, 3, 3)).shape
        torch.Size([2, 6, 3, 3])
    """

    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    def __post_init__(self) -> None:
        levels = tuple(float(level) for level in self.levels)
        if not levels or not all(0 < level < 1 for level in levels) or list(levels) != sorted(set(levels)):
            raise ValueError(f"levels must rise, each between 0 and 1; got levels={self.levels}")
        object.__setattr__(self, "levels", levels)

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.levels)

    def forecast(
        self, raw: Float[Tensor, "batch steps channels levels"], inverse: Affine | None = None
    ) -> Float[Tensor, "batch steps channels levels"]:
        y = raw.sort(-1).values
        return y if inverse is None else y * inverse.scale[..., None] + inverse.level[..., None]

    def loss(
        self,
        forecast: Float[Tensor, "batch steps channels levels"],
        target: Float[Tensor, "batch steps channels"],
        observed: Bool[Tensor, "batch steps channels"] | None = None,
    ) -> Float[Tensor, ""]:
        return quantile_loss(forecast, target, self.levels, observed)

    def point(self, forecast: Float[Tensor, "batch steps channels levels"]) -> Float[Tensor, "batch steps channels"]:
        """The median, between the two levels around it where it is not one; the nearest level where all are to one side."""
        above = next((i for i, level in enumerate(self.levels) if level >= 0.5), len(self.levels) - 1)
        below = max(above - 1, 0) if self.levels[above] > 0.5 else above
        if above == below:
            return forecast[..., above]
        share = (0.5 - self.levels[below]) / (self.levels[above] - self.levels[below])
        return forecast[..., below].lerp(forecast[..., above], min(share, 1.0))


@dataclass(frozen=True)
class StudentT(Head):
    """A Student t distribution of each step and channel, a ``StudentTForecast``; its loss is the negative log-likelihood.

        df = 2 + softplus(a),   loc = b,   scale = softplus(c)        (so that mean and variance exist)

    As in DeepAR's successors (Salinas et al. 2017, arXiv:1704.04110; GluonTS, arXiv:1906.05264). Tails are those of the data: a single
    outlier in training does not widen every forecast, as it would a normal one.

    Example:
        >>> forecast = StudentT().forecast(torch.zeros(2, 6, 3, 3))
        >>> forecast.mean.shape, forecast.sample(100).shape
        (torch.Size([2, 6, 3]), torch.Size([100, 2, 6, 3]))
    """

    size = 3

    def forecast(self, raw: Float[Tensor, "batch steps channels 3"], inverse: Affine | None = None) -> StudentTForecast:
        a, b, c = raw.to(torch.promote_types(raw.dtype, torch.float32)).unbind(-1)
        spread = F.softplus(c).clamp(min=1e-6)
        if inverse is not None:
            b, spread = inverse(b), spread * inverse.scale
        return StudentTForecast(df=2 + F.softplus(a), loc=b, scale=spread)

    def loss(
        self,
        forecast: StudentTForecast,
        target: Float[Tensor, "batch steps channels"],
        observed: Bool[Tensor, "batch steps channels"] | None = None,
    ) -> Float[Tensor, ""]:
        return negative_log_likelihood(forecast, target, observed)

    def point(self, forecast: StudentTForecast) -> Float[Tensor, "batch steps channels"]:
        return forecast.mean
