"""Fitting a model to a panel of series, and forecasting from one: what a Forecaster does between data and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ._conformal import Conformal
from ._heads import Point
from ._inputs import ForecastModel
from ._levels import interval
from ._panel import Columns, Panel
from ._training import Evaluation, train
from ._windows import Windows


@dataclass(frozen=True)
class Covariates:
    """What brings known-future and static covariates to mean 0 and deviation 1, the same for all series: level and scale."""

    future: Float64[Tensor, "2 known"] | None
    static: Float64[Tensor, "2 constants"] | None

    @classmethod
    def of(cls, panel: Panel, calendar: int) -> Covariates:
        """Of these series; the last columns of ``future``, so many features of the calendar, stay as they are."""
        future = None if panel.future is None else _spread(torch.cat(panel.future))
        if future is not None and calendar:
            future[0, -calendar:], future[1, -calendar:] = 0, 1
        return cls(future, None if panel.static is None else _spread(panel.static))


@dataclass(frozen=True)
class Fitted:
    """What fitting leaves behind.

    Attributes:
        model: in evaluation mode.
        panel: the end of each series, as much as the model looks back.
        covariates: their scales.
        conformal: errors on the validation part, of a ``Point`` head; None without one.
        evaluations: how training went.
    """

    model: ForecastModel
    panel: Panel
    covariates: Covariates
    conformal: Conformal | None
    evaluations: list[Evaluation]


def fit(
    model: ForecastModel,
    panel: Panel,
    held_out: SequenceOf[int],
    *,
    calendar: int,
    training: Mapping[str, Any],
    progress: bool,
) -> Fitted:
    """Train a model on all but the last steps of each series, so many of each, and validate it on those."""
    seen = panel.without(held_out) if any(held_out) else panel
    covariates = Covariates.of(seen, calendar)
    validation = None
    if any(held_out):
        first = [length - count for length, count in zip(panel.lengths, held_out, strict=True)]
        as_seen = replace(panel, level=seen.level, scale=seen.scale)
        validation = _windows(model, as_seen, covariates, first=first)
    evaluations = []
    if any(p.requires_grad for p in model.parameters()):
        evaluations = train(model, _windows(model, seen, covariates), validation, progress=progress, **training)
    model.eval()
    conformal = None
    if validation is not None and isinstance(model.head, Point):
        conformal = Conformal.of(_errors(model, validation, training["eval_batch_size"]))
    return Fitted(model, panel.tail(model.lookback), covariates, conformal, evaluations)


@torch.no_grad()
def forecast(
    fitted: Fitted,
    panel: Panel,
    known: list[Float64[Tensor, "horizon known"]] | None,
    levels: SequenceOf[float],
    name: str,
    batch_size: int,
) -> Columns:
    """The forecasts after the end of each series, in the units of the data, by the names of columns."""
    model, tail = fitted.model, panel.tail(fitted.model.lookback)
    ahead = [part.new_full((model.horizon, part.shape[1]), torch.nan) for part in tail.values]
    longer = replace(
        tail,
        values=[torch.cat(both) for both in zip(tail.values, ahead, strict=True)],
        future=None if known is None else [torch.cat(both) for both in zip(tail.future or [], known, strict=True)],
    )
    windows = _windows(model, longer, fitted.covariates, first=tail.lengths, history=1)
    parts = []
    for batch in windows.batches(batch_size):
        answer = model(**batch.to(_device(model)).inputs)
        columns = {name: model.head.point(answer)}
        for level in levels:
            lower, upper = interval(answer, level, model.head, fitted.conformal)
            columns |= {f"{name}-lo-{level:g}": lower, f"{name}-hi-{level:g}": upper}
        parts.append(columns)
    mean, scale = (part[:, None, : model.channels] for part in (panel.level, panel.scale))
    return {key: torch.cat([part[key].double().cpu() for part in parts]) * scale + mean for key in parts[0]}


def _windows(
    model: ForecastModel,
    panel: Panel,
    covariates: Covariates,
    *,
    first: int | list[int] = 0,
    history: int | None = None,
) -> Windows:
    return Windows(
        [part.float() for part in panel.scaled()],
        model.lookback,
        model.horizon,
        past=model.past,
        future=None if panel.future is None else [_scaled(part, covariates.future) for part in panel.future],
        static=None if panel.static is None else _scaled(panel.static, covariates.static),
        first=first,
        history=least_history(model.lookback, model.horizon) if history is None else history,
    )


def least_history(lookback: int, horizon: int) -> int:
    """Steps that must lie before a forecast that is trained or validated on, in a series too short for a whole look-back."""
    return min(lookback, horizon)


@torch.no_grad()
def _errors(model: ForecastModel, windows: Windows, batch_size: int) -> Float[Tensor, "windows horizon channels"]:
    errors = []
    for batch in windows.batches(batch_size):
        batch = batch.to(_device(model))
        errors.append((batch.target - model.head.point(model(**batch.inputs))).cpu())
    return torch.cat(errors)


def _device(model: ForecastModel) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _spread(values: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "2 columns"]:
    deviation = values.std(0, correction=0)
    return torch.stack([values.mean(0), torch.where(deviation > 1e-10 * values.mean(0).abs(), deviation, 1.0)])


def _scaled(values: Float64[Tensor, "rows columns"], spread: Tensor | None) -> Float[Tensor, "rows columns"]:
    assert spread is not None
    return ((values - spread[0]) / spread[1]).float()
