"""Baselines that every other model has to beat: the last season again, and linear maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Size, check_size
from ._inputs import ForecastModel, Inputs, Series
from ._parts import fill_forward, instance_norm

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SeasonalNaive(ForecastModel):
    """The last season again: ``y_{T + h} = x_{T + h - m season}``, m the smallest whole number that reaches into the look-back.

    Where that value is missing, the one a season before it, and so on; where all are, the last value observed, and 0 without
    any. Nothing is learned. Any length of look-back works. See Hyndman and Athanasopoulos, Forecasting: Principles and Practice, 5.2.

    Args:
        channels, lookback, horizon: as in ``ForecastModel``.
        season: steps in a season; with 1, the last value is repeated.

    Example:
        >>> SeasonalNaive(1, 4, 3, season=2)(torch.tensor([[[1.0], [2.0], [3.0], [float("nan")]]])).flatten()
        tensor([3., 2., 3.])
    """

    takes: ClassVar[frozenset[str]] = frozenset()
    any_length: ClassVar[bool] = True

    def __init__(
        self, channels: Size, lookback: Size, horizon: Size, *, season: Size = 1, **inputs: Unpack[Inputs]
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.season = check_size("season", season)

    def forecast(self, series: Series) -> Float[Tensor, "batch horizon channels"]:
        """The last season again."""
        x, seen = series.values, series.observed
        missing = -x.shape[1] % self.season
        # (batch, seasons, phase, channels), the last season ending where the look-back does
        x, seen = (F.pad(a, (0, 0, missing, 0)).unflatten(1, (-1, self.season)) for a in (x, seen))
        by_phase = fill_forward(x.flatten(2), seen.flatten(2))[:, -1].unflatten(1, (self.season, self.channels))
        last = fill_forward(series.values, series.observed)[:, -1:]
        cycle = torch.where(seen.any(1), by_phase, last)
        return cycle.repeat(1, -(-self.horizon // self.season), 1)[:, : self.horizon]

    def extra_repr(self) -> str:
        return f"season={self.season}"


class DLinear(ForecastModel):
    """Two linear maps over time, of the trend and of what is left, the same for every channel (Zeng et al. 2022, arXiv:2205.13504).

        trend_t = mean of x over a window around t, the ends repeated;   y = W_trend trend + W_rest (x - trend) + b

    With ``normalise``, both see the look-back off its own level and scale, and the forecast is brought back to them (``instance_norm``):
    RLinear (Li et al. 2023, arXiv:2305.10721), whose one linear map can do what these two can. It is for series whose level drifts away
    from where it was in training.

    Weights begin at random, as in the paper's code. What is missing is filled with the last value before it (the paper has no missing
    values).

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        kernel: steps of the moving average, an odd number.
        individual: maps of its own for each channel.
        normalise: take every look-back off its own level and scale.

    Example:
        >>> DLinear(7, 336, 96)(torch.randn(2, 336, 7)).shape
        torch.Size([2, 96, 7])
    """

    takes: ClassVar[frozenset[str]] = frozenset({"head"})

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        kernel: Size = 25,
        individual: bool = False,
        normalise: bool = False,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        if check_size("kernel", kernel) % 2 == 0:
            raise ValueError(f"kernel must be odd, so that the average is around each step; got kernel={kernel}")
        self.kernel, self.normalise = kernel, normalise
        count, outputs = channels if individual else 1, horizon * self.head.size
        self.trend, self.rest = (nn.ModuleList(nn.Linear(lookback, outputs) for _ in range(count)) for _ in range(2))

    def forecast(self, series: Series) -> Any:
        """The sum of both maps."""
        x, inverse = instance_norm(series.values, series.observed) if self.normalise else (series.values, None)
        x = fill_forward(x, series.observed).transpose(1, 2)
        side = self.kernel // 2
        trend = F.avg_pool1d(F.pad(x, (side, side), mode="replicate"), self.kernel, stride=1)
        parts = zip(self._map(self.trend, trend), self._map(self.rest, x - trend), strict=True)
        y = torch.cat([a + b for a, b in parts], 1)
        return self.head.forecast(y.unflatten(2, (self.horizon, -1)).transpose(1, 2), inverse)

    def _map(self, maps: nn.ModuleList, x: Float[Tensor, "batch channels steps"]) -> list[Tensor]:
        return [one(part) for one, part in zip(maps, x.chunk(len(maps), 1), strict=True)]

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, normalise={self.normalise}"
