"""What the base class does with inputs, on a model that takes them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xformerlib import time_series as ts


class Everything(ts.ForecastModel):
    """Gives back what it was given, so that tests see it."""

    takes = ts.ForecastModel.takes | {"times"}
    any_length = True

    def forecast(self, series: ts.Series) -> ts.Series:
        return series


def model() -> Everything:
    return Everything(2, 4, 3, past=1, future=2, static=2)


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(5, 4, 3), "future": torch.randn(5, 7, 2), "static": torch.randn(5, 2)}


def test_a_series_is_what_was_given_with_what_is_missing_marked() -> None:
    given = inputs()
    observed = torch.rand(5, 4, 3) < 0.7
    given["x"][0, 0, 0] = torch.nan
    series = model()(**given, observed=observed, times=torch.arange(7))
    seen = observed & ~given["x"].isnan()
    assert torch.equal(series.observed, seen) and not series.complete
    assert torch.equal(series.values, given["x"].masked_fill(~seen, 0))
    assert torch.equal(series.future, given["future"]) and torch.equal(series.static, given["static"])
    assert torch.equal(series.times, torch.arange(7.0).double().expand(5, 7))


def test_what_is_not_given_is_empty() -> None:
    series = Everything(2, 4, 3)(torch.randn(5, 4, 2))
    assert series.complete and series.times is None
    assert series.future.shape == (5, 7, 0) and series.static.shape == (5, 0)


def test_covariates_take_the_dtype_of_the_series() -> None:
    given = inputs()
    series = model().series(given["x"].double(), future=given["future"], static=torch.ones(5, 2, dtype=torch.long))
    assert series.future.dtype == series.static.dtype == torch.float64


def test_the_horizon_follows_a_look_back_of_another_length() -> None:
    given = inputs()
    series = model().series(torch.randn(5, 9, 3), future=torch.randn(5, 12, 2), static=given["static"])
    assert series.future.shape == (5, 12, 2)
    with pytest.raises(ValueError, match=r"future of Everything must be \(5, 12, 2\); got \(5, 7, 2\)"):
        model().series(torch.randn(5, 9, 3), future=given["future"], static=given["static"])
    with pytest.raises(ValueError, match="x must hold at least one step"):
        model().series(torch.randn(5, 0, 3), future=given["future"], static=given["static"])


@pytest.mark.parametrize(
    ("times", "error", "message"),
    [
        (torch.arange(6), ValueError, r"times must be \(7,\) or \(5, 7\)"),
        (torch.zeros(4, 7), ValueError, r"times must be \(7,\) or \(5, 7\)"),
        (torch.full((7,), torch.nan), ValueError, "times must be known and finite"),
        (torch.ones(7, dtype=torch.bool), TypeError, "times must be a tensor of real numbers"),
        (list(range(7)), TypeError, "times must be a tensor of real numbers"),
    ],
)
def test_times_that_are_none_are_refused(times: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model()(**inputs(), times=times)  # type: ignore[arg-type]


def test_a_head_is_a_head() -> None:
    with pytest.raises(TypeError, match=r"head must be Point\(\), Quantile\(levels\) or StudentT\(\); got 'point'"):
        Everything(2, 4, 3, head="point")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="past must be >= 0; got past=-1"):
        Everything(2, 4, 3, past=-1)
    with pytest.raises(NotImplementedError, match=r"ForecastModel must define forecast\(series\)"):
        ts.ForecastModel(2, 4, 3)(torch.randn(1, 4, 2))
