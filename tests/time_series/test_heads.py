"""Heads, the distribution they make, and losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from scipy import stats

from tests.closeness import assert_close
from xformerlib import time_series as ts

pytestmark = pytest.mark.usefixtures("double")


def student(df: float, loc: float = 0.0, scale: float = 1.0) -> ts.StudentTForecast:
    return ts.StudentTForecast(*(torch.tensor([value], dtype=torch.float64) for value in (df, loc, scale)))


@given(df=st.floats(2, 1e5), q=st.floats(1e-4, 1 - 1e-4))
def test_quantiles_are_those_of_scipy(df: float, q: float) -> None:
    expected = 1.5 + 2 * stats.t.ppf(q, df)
    scale = max(1.5, abs(expected))
    # Interpolated through 40 nodes, which in the tails is 1e-9 off.
    assert_close(student(df, 1.5, 2.0).quantile(q), torch.tensor([expected]), condition=1e4, scale=scale)


@given(df=st.floats(2, 1e6), y=st.floats(-50, 50), scale=st.floats(0.01, 100))
def test_densities_are_those_of_scipy(df: float, y: float, scale: float) -> None:
    expected = stats.t.logpdf(y, df, 0.5, scale)
    log_prob = student(df, 0.5, scale).log_prob(torch.tensor([y], dtype=torch.float64))
    scale = max(abs(expected), float(torch.lgamma(torch.tensor(df / 2 + 0.5))))  # of what is subtracted from each other
    assert_close(log_prob, torch.tensor([expected]), scale=scale)


def test_samples_have_the_distribution(generator: torch.Generator) -> None:
    forecast = ts.StudentTForecast(torch.tensor([2.5, 40.0]), torch.tensor([1.0, -3.0]), torch.tensor([0.5, 2.0]))
    draws = forecast.sample(20_000, generator=generator)
    assert draws.shape == (20_000, 2)
    for i in range(2):
        t = stats.t(float(forecast.df[i]), float(forecast.loc[i]), float(forecast.scale[i]))
        assert stats.kstest(draws[:, i].numpy(), t.cdf).pvalue > 2e-9  # the chance of six standard errors
    assert torch.equal(forecast.mean, forecast.loc)
    for n in (0, 2.0):
        with pytest.raises(ValueError, match="n must be a whole number >= 1"):
            forecast.sample(n)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q must be between 0 and 1; got q=1"):
        forecast.quantile(1.0)


HEADS = [ts.Point(), ts.Quantile((0.25, 0.5)), ts.StudentT()]


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_the_inverse_brings_forecasts_to_the_units_of_the_data(head: ts.Head, precision: torch.dtype) -> None:
    raw = torch.randn(2, 5, 3, head.size)
    inverse = ts.Affine(torch.randn(2, 1, 3), 1 + torch.rand(2, 1, 3))
    here, there = head.forecast(raw), head.forecast(raw, inverse)
    assert_close(head.point(there), inverse(head.point(here)))
    if isinstance(there, ts.StudentTForecast):
        assert_close(there.quantile(0.9), inverse(here.quantile(0.9)))
        assert (there.df > 2).all()


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_losses_take_only_what_was_observed(head: ts.Head, precision: torch.dtype) -> None:
    raw, target = torch.randn(2, 5, 3, head.size), torch.randn(2, 5, 3)
    observed = torch.rand(2, 5, 3) < 0.5
    part = head.loss(head.forecast(raw[observed][None, None]), target[observed][None, None])
    raw.requires_grad_()
    for given_target, given_observed in (
        (target.masked_fill(~observed, torch.nan), None),
        (target, observed),
        (target.masked_fill(~observed, torch.inf), observed),
    ):
        loss = head.loss(head.forecast(raw), given_target, given_observed)
        assert_close(loss, part)
        (gradient,) = torch.autograd.grad(loss, raw)
        assert gradient.isfinite().all() and (gradient[~observed] == 0).all()
    nothing = head.loss(head.forecast(raw), target, torch.zeros_like(observed))
    assert nothing == 0
    nothing.backward()
    with pytest.raises(ValueError, match="target must have one value for each that is forecast"):
        head.loss(head.forecast(raw), target[:, :1])


def test_the_quantile_loss_has_its_minimum_at_the_quantiles() -> None:
    y = torch.arange(1.0, 1001.0)
    levels = (0.1, 0.5, 0.8)
    candidates = torch.arange(0.0, 1001.0)
    for level in levels:
        losses = torch.stack([ts.quantile_loss(f.expand(1000, 1), y, (level,)) for f in candidates])
        assert abs(float(candidates[losses.argmin()]) - 1000 * level) <= 1
    median = torch.randn(20)
    assert_close(ts.quantile_loss(median[:, None], y[:20], (0.5,)), ts.mae(median, y[:20]))
    with pytest.raises(ValueError, match="levels must be one for each of the 1 numbers"):
        ts.quantile_loss(median[:, None], y[:20], levels)


@pytest.mark.parametrize(
    ("levels", "median"),
    [((0.5,), 0.0), ((0.1, 0.5, 0.9), 1.0), ((0.4, 0.8), 0.25), ((0.1, 0.2), 1.0), ((0.7, 0.9), 0.0), ((0.9,), 0.0)],
)
def test_the_point_of_quantiles_is_the_median(levels: tuple[float, ...], median: float) -> None:
    forecast = torch.arange(float(len(levels))).expand(1, 1, 1, -1)
    assert_close(ts.Quantile(levels).point(forecast), torch.full((1, 1, 1), median))


@pytest.mark.parametrize("levels", [(), (0.5, 0.5), (0.9, 0.1), (0.0, 0.5), (0.5, 1.0)])
def test_levels_that_are_none_are_refused(levels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="levels must rise, each between 0 and 1"):
        ts.Quantile(levels)


def test_heads_are_values() -> None:
    assert ts.Quantile((0.1, 0.9)) == ts.Quantile((0.1, 0.9)) != ts.Quantile((0.1, 0.8))
    assert ts.Point() == ts.Point() and hash(ts.StudentT()) == hash(ts.StudentT())
