"""Losses that are means over what was observed: a target that is NaN, or that ``observed`` excludes, does not count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as SequenceOf
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._arguments import ELSEWHERE, Within, check_number, checked, shown
from ._student_t import StudentTForecast

_SHARE = Within(0, 1, above=True)


@checked
def mse(
    forecast: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"], observed: Bool[Tensor, "*shape"] | None = None
) -> Float[Tensor, ""]:
    """Mean squared error, ``mean (forecast - target)^2`` over what was observed; 0 if that is nothing.

    Example:
        >>> mse(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, float("nan")]))
        tensor(2.)
    """
    target, seen = _observed(forecast, target, observed)
    return _mean((forecast - target).square(), seen)


@checked
def mae(
    forecast: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"], observed: Bool[Tensor, "*shape"] | None = None
) -> Float[Tensor, ""]:
    """Mean absolute error, ``mean |forecast - target|`` over what was observed; 0 if that is nothing.

    Example:
        >>> mae(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, float("nan")]))
        tensor(1.)
    """
    target, seen = _observed(forecast, target, observed)
    return _mean((forecast - target).abs(), seen)


@checked
def quantile_loss(
    forecast: Float[Tensor, "*shape levels"],
    target: Float[Tensor, "*shape"],
    levels: Annotated[SequenceOf[float], ELSEWHERE],
    observed: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, ""]:
    """Quantile (pinball) loss, the mean over levels q of ``2 max(q (y - f), (q - 1) (y - f))`` over what was observed.

    Its minimum is at the quantiles (Koenker and Bassett 1978). With the factor 2, the loss of the median alone is the MAE, and over
    many levels it approaches the CRPS.

    Example:
        >>> quantile_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([1.0]), levels=(0.5, 0.9))
        tensor(0.5000)
    """
    _check_forecast(forecast)
    given: Any = levels
    if isinstance(given, str) or not isinstance(given, Iterable) or forecast.ndim == 0:
        raise TypeError(
            f"levels must be a list of numbers in (0, 1), one for each of the last axis of the forecast; got levels={shown(levels)} and "
            f"a forecast of shape {tuple(forecast.shape)}"
        )
    q = torch.tensor([check_number("levels", level, _SHARE) for level in given]).to(forecast)
    if len(q) != forecast.shape[-1]:
        raise ValueError(
            f"levels must be one for each of the {forecast.shape[-1]} numbers of the forecast; got levels={levels}"
        )
    target, seen = _observed(forecast[..., 0], target, observed)
    error = target[..., None] - forecast
    return _mean(2 * torch.maximum(q * error, (q - 1) * error).mean(-1), seen)


@checked
def negative_log_likelihood(
    forecast: StudentTForecast,
    target: Float[Tensor, "*shape"],
    observed: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, ""]:
    """``-mean log p(target)`` under a forecast that is a distribution, over what was observed; 0 if that is nothing.

    Example:
        >>> normal = StudentTForecast(df=torch.tensor([1e6]), loc=torch.zeros(1), scale=torch.ones(1))
        >>> negative_log_likelihood(normal, torch.zeros(1))
        tensor(0.9189)
    """
    target, seen = _observed(forecast.loc, target, observed)
    return _mean(-forecast.log_prob(target), seen)


def _observed(forecast: Tensor, target: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The target with 0 where it is missing, so that no NaN reaches a gradient, and where it is not."""
    _check_forecast(forecast)
    if target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must be a tensor of real numbers; got {target.dtype}")
    if observed is not None and observed.dtype != torch.bool:
        raise TypeError(f"observed must be a bool tensor, False where a value is missing; got {observed.dtype}")
    for name, tensor in (("target", target), ("observed", observed)):
        if tensor is not None and tensor.shape != forecast.shape:
            raise ValueError(
                f"{name} must have one value for each that is forecast, {tuple(forecast.shape)}; got {tuple(tensor.shape)}"
            )
    seen = ~target.isnan() if observed is None else observed & ~target.isnan()
    return target.masked_fill(~seen, 0), seen


def _check_forecast(forecast: Tensor) -> None:
    if not forecast.is_floating_point():
        raise TypeError(f"forecast must be a floating-point tensor; got {forecast.dtype}")


def _mean(errors: Tensor, seen: Tensor) -> Tensor:
    return errors.masked_fill(~seen, 0).sum() / seen.sum().clamp(min=1)
