"""Prediction intervals of a level, from whatever a head says of the future."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ._conformal import Conformal
from ._heads import Head, Point, Quantile, StudentT

Bound = Float[Tensor, "batch steps channels"]


def checked_levels(level: SequenceOf[float] | None, head: Head, conformal: Conformal | None) -> tuple[float, ...]:
    """The levels asked for, each of which must be possible; if none were, those of 80 and 95 that are."""
    if level is None:
        return tuple(usual for usual in (80, 95) if _refusal(usual, head, conformal) is None)
    if not isinstance(level, list | tuple) or not all(isinstance(one, int | float) and 0 < one < 100 for one in level):
        raise ValueError(f"level must be percentages between 0 and 100, such as (80, 95); got level={level!r}")
    for one in level:
        refusal = _refusal(one, head, conformal)
        if refusal is not None:
            raise ValueError(refusal)
    return tuple(level)


def interval(forecast: Any, level: float, head: Head, conformal: Conformal | None) -> tuple[Bound, Bound]:
    """Lower and upper end of the interval that holds the truth with a chance of ``level`` percent, as much on either side."""
    below, above = _sides(level)
    if isinstance(head, StudentT):
        return forecast.quantile(below), forecast.quantile(above)
    if isinstance(head, Quantile):
        return forecast[..., _held(head).index(below)], forecast[..., _held(head).index(above)]
    assert conformal is not None
    y = head.point(forecast)
    width = conformal.width(level).to(y)[:, None]
    return y - width, y + width


def _refusal(level: float, head: Head, conformal: Conformal | None) -> str | None:
    """Why a level is not possible; None if it is."""
    if isinstance(head, StudentT):
        return None
    if isinstance(head, Quantile):
        if all(side in _held(head) for side in _sides(level)):
            return None
        sides, held = (", ".join(f"{q:g}" for q in levels) for levels in (_sides(level), head.levels))
        return (
            f"level={level:g} is made of the quantiles {sides}; the head has {held}. Build the Forecaster with head=Quantile(levels) that "
            "hold them, or ask for other levels"
        )
    if not isinstance(head, Point):
        return f"level={level:g} needs a head that is Point, Quantile or StudentT: leave level=() ; got {head!r}"
    if conformal is None:
        return (
            f"level={level:g} of a Point head is made of the errors on a validation part, and there was none: build the Forecaster with "
            "validation > 0, or with head=StudentT() or head=Quantile(levels)"
        )
    try:
        conformal.width(level)
    except ValueError as error:
        return f"{error}; or build the Forecaster with head=StudentT() or head=Quantile(levels)"
    return None


def _sides(level: float) -> tuple[float, float]:
    return round(0.5 - level / 200, 10), round(0.5 + level / 200, 10)


def _held(head: Quantile) -> list[float]:
    return [round(q, 10) for q in head.levels]
