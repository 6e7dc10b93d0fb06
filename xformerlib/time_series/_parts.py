"""Parts of models: instance normalisation, patches, what was seen last, features of dates and times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import NonNegative, Size, check_size, checked
from .._recorded import Recorded
from ._checks import check_series, seen_of


@dataclass(frozen=True, eq=False)  # tensors have no truth value, nor a hash by what is in them
class Affine:
    """The map ``y * scale + level``, one for each series: from normalised values back to the units of the data.

    Example:
        >>> Affine(level=torch.tensor([[[10.0]]]), scale=torch.tensor([[[2.0]]]))(torch.ones(1, 3, 1)).flatten()
        tensor([12., 12., 12.])
    """

    level: Float[Tensor, "batch 1 channels"]
    scale: Float[Tensor, "batch 1 channels"]

    def __call__(self, y: Float[Tensor, "batch steps channels"]) -> Float[Tensor, "batch steps channels"]:
        return y * self.scale + self.level

    def first(self, channels: int) -> Affine:
        """The map of the first channels: the targets, where covariates were normalised beside them."""
        return Affine(self.level[..., :channels], self.scale[..., :channels])


@checked
def instance_norm(
    x: Float[Tensor, "batch steps channels"],
    observed: Bool[Tensor, "batch steps channels"] | None = None,
    *,
    eps: NonNegative = 1e-5,
) -> tuple[Float[Tensor, "batch steps channels"], Affine]:
    """Take every series off its own level and scale, and return with it the inverse, for the forecasts.

        level = mean_t x_t,   scale = sqrt(mean_t (x_t - level)^2 + eps),   z_t = (x_t - level) / scale      (t observed)

    RevIN (Kim et al. 2022, openreview cGDAkQo1C0p) without its learned map; nothing is kept between calls. As in its code, level and
    scale are constants to the gradient, so that a gradient with respect to ``x`` says what a model sees, not that all of x was averaged.
    Where ``x`` is missing (``observed`` False, or NaN), z is 0 and the value does not count. A series of which nothing was observed has
    level 0.

    Example:
        >>> z, inverse = instance_norm(torch.tensor([[[1.0], [3.0], [float("nan")]]]))
        >>> z.flatten().round(decimals=3), inverse(z).flatten()
        (tensor([-1.,  1.,  0.]), tensor([1., 3., 2.]))
    """
    check_series(x)
    seen = seen_of(x, observed)
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = x.masked_fill(~seen, 0).to(dtype)
    count = seen.sum(1, keepdim=True).clamp(min=1)
    level = values.detach().sum(1, keepdim=True) / count
    centred = (values - level).masked_fill(~seen, 0)
    scale = (centred.detach().square().sum(1, keepdim=True) / count + eps).sqrt()
    return (centred / scale).to(x.dtype), Affine(level.to(x.dtype), scale.to(x.dtype))


@checked
def fill_forward(
    x: Float[Tensor, "batch steps channels"], observed: Bool[Tensor, "batch steps channels"]
) -> Float[Tensor, "batch steps channels"]:
    """Replace what is missing by the last value before it, and before the first value by that; by 0 where there is none at all.

    Example:
        >>> x = torch.tensor([[[7.0], [1.0], [7.0], [2.0], [7.0]]])
        >>> fill_forward(x, torch.tensor([[[False], [True], [False], [True], [False]]])).flatten()
        tensor([1., 1., 1., 2., 2.])
    """
    check_series(x)
    seen_of(x, observed)  # checks it
    steps = torch.arange(x.shape[1], device=x.device)[None, :, None]
    last = torch.where(observed, steps, -1).cummax(1).values
    first = torch.where(observed, steps, x.shape[1] - 1).amin(1, keepdim=True)
    return x.masked_fill(~observed, 0).gather(1, torch.where(last < 0, first, last))


@checked
def patches(
    x: Shaped[Tensor, "*series steps"], size: Size, stride: Size, *, pad_end: bool = False
) -> Shaped[Tensor, "*series patches size"]:
    """Cut series into patches of ``size`` steps, one every ``stride``; with ``pad_end`` the last value is repeated by ``stride`` first.

    The tokens of PatchTST (Nie et al. 2022, arXiv:2211.14730), ``floor((steps - size) / stride) + 1`` of them, or one more. Where they
    do not fit evenly it is the end that is left out; choose ``stride`` so that it divides ``steps - size``.

    Raises:
        ValueError: a series that is shorter than a patch.

    Example:
        >>> patches(torch.arange(6.0), 4, 2, pad_end=True)
        tensor([[0., 1., 2., 3.],
                [2., 3., 4., 5.],
                [4., 5., 5., 5.]])
    """
    if x.ndim == 0 or x.shape[-1] < size:
        raise ValueError(f"x must hold at least one patch of {size} steps; got {tuple(x.shape)}")
    if pad_end:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], stride)], -1)
    return x.unfold(-1, size, stride)


def calendar_features(
    dates: Any, cycles: SequenceOf[str] = ("day", "week", "month", "year")
) -> Float[Tensor, "*steps features"]:
    """Where dates stand in the cycles of the calendar: the sine and the cosine of the phase in each, as known-future covariates.

        phase in [0, 1):   sin(2 pi phase), cos(2 pi phase)

    Both together, so that 23:59 is next to 00:00, and December to January. A week begins on Monday; months and years are as long as
    they are.

    Args:
        dates: seconds since 1970 as a tensor, or dates as numpy or pandas have them (``datetime64``, ``DatetimeIndex``).
        cycles: of ``"hour"``, ``"day"``, ``"week"``, ``"month"``, ``"year"``.

    Example:
        >>> noon = torch.tensor([12 * 3600])  # 1 January 1970, a Thursday
        >>> calendar_features(noon, ("day",)).round(decimals=3) + 0.0
        tensor([[ 0., -1.]])
    """
    unknown = [cycle for cycle in cycles if cycle not in _PHASES]
    if unknown or not cycles:
        raise ValueError(f"cycles must be some of {', '.join(map(repr, _PHASES))}; got cycles={tuple(cycles)}")
    seconds = _seconds(dates)
    angles = 2 * math.pi * torch.stack([_PHASES[cycle](seconds) for cycle in cycles], -1)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2).float()


def _seconds(dates: Any) -> Float64[Tensor, "*steps"]:
    if isinstance(dates, Tensor):
        return dates.double()
    import numpy  # dates that are no tensor are numpy's, or turn into them

    array = numpy.asarray(dates)
    if array.dtype.kind != "M":
        raise TypeError(f"dates must be seconds since 1970 in a tensor, or datetime64; got {array.dtype}")
    if numpy.isnat(array).any():
        raise ValueError("dates must be known; got NaT")
    return torch.from_numpy(array.astype("datetime64[ms]").astype("int64")).double() / 1000


def _civil(seconds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Phase in the month, and day of the year, day's share and length of the year, in the Gregorian calendar."""
    days = torch.div(seconds, 86400, rounding_mode="floor")
    share = seconds / 86400 - days
    # Eras of 400 years that begin on 1 March of year 0, so that the leap day comes last.
    days = days + 719468
    era = torch.div(days, 146097, rounding_mode="floor")
    of_era = days - era * 146097
    year = torch.div(
        of_era - _floor(of_era, 1460) + _floor(of_era, 36524) - _floor(of_era, 146096), 365, rounding_mode="floor"
    )
    of_year = of_era - (365 * year + _floor(year, 4) - _floor(year, 100))  # from 1 March
    month = _floor(5 * of_year + 2, 153)  # 0 is March
    begin, end = (_floor(153 * m + 2, 5) for m in (month, month + 1))
    civil = year + (month >= 10)  # the year that began on 1 January
    leap = (civil % 4 == 0) & ((civil % 100 != 0) | (civil % 400 == 0))
    february = 28 + leap.double()
    length = torch.where(month == 11, february, end - begin)
    in_month = (of_year - begin + share) / length
    since_january = torch.where(month >= 10, of_year - 306, of_year + 31 + february)
    return in_month, since_january, share, 365 + leap.double()


def _floor(a: Tensor, b: int) -> Tensor:
    return torch.div(a, b, rounding_mode="floor")


def _of_year(seconds: Tensor) -> Tensor:
    _, day, share, length = _civil(seconds)
    return (day + share) / length


_PHASES: dict[str, Callable[[Tensor], Tensor]] = {
    "hour": lambda seconds: seconds / 3600 % 1,
    "day": lambda seconds: seconds / 86400 % 1,
    "week": lambda seconds: (seconds / 86400 + 3) / 7 % 1,  # 1 January 1970 was a Thursday
    "month": lambda seconds: _civil(seconds)[0],
    "year": _of_year,
}


class Time2Vec(Recorded):
    """Features of continuous time: one that grows with it, and sines whose frequencies and phases are learned.

        f_0 = w_0 t + b_0,   f_i = sin(w_i t + b_i)        (Kazemi et al. 2019, arXiv:1907.05321)

    Frequencies begin spread evenly, on a logarithmic scale, from one turn in ``longest`` to one in ``shortest``; the paper leaves open
    where they begin. For positions in attention see ``positions.Sinusoidal`` and ``positions.Rotary`` on a ``Timeline``.

    Args:
        size: number of features, >= 2.
        shortest, longest: periods, in units of the times.

    Example:
        >>> Time2Vec(8, shortest=2.0, longest=24 * 7.0)(torch.tensor([0.0, 0.5, 7.25])).shape
        torch.Size([3, 8])
    """

    def __init__(self, size: int, *, shortest: float = 2.0, longest: float = 1000.0) -> None:
        super().__init__()
        check_size("size", size, least=2)
        if not 0 < shortest <= longest:
            raise ValueError(
                f"shortest and longest must be 0 < shortest <= longest; got shortest={shortest}, longest={longest}"
            )
        periods = torch.logspace(math.log10(longest), math.log10(shortest), size - 1)
        self.frequency = nn.Parameter(torch.cat([torch.tensor([1 / longest]), 2 * math.pi / periods]))
        self.phase = nn.Parameter(F.pad(math.pi * torch.rand(size - 1), (1, 0)))

    def forward(self, times: Shaped[Tensor, "*steps"]) -> Float[Tensor, "*steps size"]:
        """The features of each time."""
        angles = times[..., None].to(self.frequency.dtype) * self.frequency + self.phase
        return torch.cat([angles[..., :1], angles[..., 1:].sin()], -1)
