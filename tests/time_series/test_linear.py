"""The baselines beyond the contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F

from tests.closeness import assert_close
from xformerlib import time_series as ts

pytestmark = pytest.mark.usefixtures("double")


@given(
    lookback=st.integers(1, 12),
    horizon=st.integers(1, 9),
    season=st.integers(1, 14),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_the_seasonal_naive_forecast_is_its_definition(
    lookback: int, horizon: int, season: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, lookback, 2)
    x = x.masked_fill(torch.rand(x.shape) < share, torch.nan)
    forecast = ts.SeasonalNaive(2, lookback, horizon, season=season)(x)
    for b in range(2):
        for c in range(2):
            known = [t for t in range(lookback) if not x[b, t, c].isnan()]
            for h in range(horizon):
                same = [t for t in known if (lookback + h - t) % season == 0]
                source = same or known
                assert forecast[b, h, c] == (x[b, source[-1], c] if source else 0)


@pytest.mark.parametrize("individual", [False, True])
def test_dlinear_is_its_formula(individual: bool, precision: torch.dtype) -> None:
    model, x = ts.DLinear(2, 9, 4, kernel=3, individual=individual), torch.randn(3, 9, 2)
    padded = torch.cat([x[:, :1], x, x[:, -1:]], 1)
    trend = torch.stack([padded[:, t : t + 3].mean(1) for t in range(9)], 1)
    for c in range(2):
        i = c if individual else 0
        expected = F.linear(trend[..., c], model.trend[i].weight, model.trend[i].bias) + F.linear(
            (x - trend)[..., c], model.rest[i].weight, model.rest[i].bias
        )
        assert_close(model(x)[..., c], expected)


@given(level=st.floats(-100, 100), scale=st.floats(1, 100), seed=st.integers(0, 1000))
def test_normalised_dlinear_follows_level_and_scale(level: float, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    # The epsilon of the norm does not scale: beside deviations so large it is nothing.
    level *= 1e6
    model, x = ts.DLinear(2, 9, 4, kernel=3, normalise=True), 1e6 * torch.randn(3, 9, 2)
    z = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
    plain = ts.DLinear(2, 9, 4, kernel=3)
    plain.load_state_dict(model.state_dict())
    expected = plain(z) * x.std(1, keepdim=True, correction=0) + x.mean(1, keepdim=True)
    assert_close(model(x * scale + level), expected * scale + level)
    assert not torch.allclose(model(x), plain(x))


def test_dlinear_fills_what_is_missing_forward() -> None:
    model, x = ts.DLinear(1, 9, 4, kernel=3), torch.randn(1, 9, 1)
    filled = x.clone()
    x[:, 4:6] = torch.nan
    filled[:, 4:6] = filled[:, 3]
    assert_close(model(x), model(filled))


def test_sizes_of_the_baselines_are_checked() -> None:
    with pytest.raises(ValueError, match="kernel must be odd"):
        ts.DLinear(1, 9, 4, kernel=4)
    with pytest.raises(ValueError, match="season must be >= 1"):
        ts.SeasonalNaive(1, 9, 4, season=0)
