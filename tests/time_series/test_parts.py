"""Instance normalisation, patches, what was seen last, and features of dates and times."""

from __future__ import annotations

import datetime

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from tests.closeness import assert_close
from xformerlib import time_series as ts

moments = st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2199, 12, 31))


def seconds(moment: datetime.datetime) -> Tensor:
    return torch.tensor([moment.replace(tzinfo=datetime.timezone.utc).timestamp()], dtype=torch.float64)


@given(seed=st.integers(0, 1000), share=st.floats(0, 1), steps=st.integers(1, 12))
def test_instance_norm_is_that_of_the_observed_values(seed: int, share: float, steps: int) -> None:
    torch.manual_seed(seed)
    x = 100 + 5 * torch.randn(3, steps, 2, dtype=torch.float64)
    observed = torch.rand(x.shape) >= share
    z, inverse = ts.instance_norm(x, observed)
    for b in range(3):
        for c in range(2):
            seen = x[b, observed[b, :, c], c]
            if len(seen):
                scale = (seen.var(correction=0) + 1e-5).sqrt()
                level = float(seen.abs().max() / scale)  # of what is subtracted from each other
                assert_close(z[b, observed[b, :, c], c], (seen - seen.mean()) / scale, scale=level)
    assert (z[~observed] == 0).all()
    assert_close(inverse(z)[observed], x[observed])
    again, _ = ts.instance_norm(x.masked_fill(~observed, torch.nan))
    assert torch.equal(again, z)


def test_instance_norm_survives_a_far_level_and_half_precision() -> None:
    x = 1e4 + torch.arange(8.0)[None, :, None]
    z, inverse = ts.instance_norm(x)
    assert_close(z, ts.instance_norm(x.double())[0], condition=1e4)  # level over deviation, and some
    assert_close(inverse(z), x)
    half, _ = ts.instance_norm(torch.full((1, 100, 1), 300.0, dtype=torch.float16))  # whose sum is beyond fp16
    assert half.dtype == torch.float16 and (half == 0).all()


def test_level_and_scale_are_constants_to_the_gradient() -> None:
    x = torch.randn(2, 6, 3).requires_grad_()
    observed = torch.rand(2, 6, 3) < 0.7
    z, inverse = ts.instance_norm(x, observed)
    weight = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((inverse(z) * weight).sum(), x)
    assert_close(gradient, weight.masked_fill(~observed, 0))


def test_the_inverse_of_the_first_channels() -> None:
    _, inverse = ts.instance_norm(torch.randn(2, 5, 3))
    y = torch.randn(2, 4, 3)
    assert torch.equal(inverse.first(2)(y[..., :2]), inverse(y)[..., :2])


@given(seed=st.integers(0, 1000), share=st.floats(0, 1), steps=st.integers(1, 9))
def test_fill_forward_takes_the_last_value_before(seed: int, share: float, steps: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, steps, 2)
    observed = torch.rand(x.shape) >= share
    filled = ts.fill_forward(x.masked_fill(~observed, torch.nan), observed)
    for b in range(2):
        for c in range(2):
            seen = [t for t in range(steps) if observed[b, t, c]]
            for t in range(steps):
                before = [s for s in seen if s <= t] or seen[:1]
                assert filled[b, t, c] == (x[b, before[-1], c] if before else 0)


@given(steps=st.integers(1, 40), size=st.integers(1, 10), stride=st.integers(1, 10), pad_end=st.booleans())
def test_patches_are_slices(steps: int, size: int, stride: int, pad_end: bool) -> None:
    x = torch.arange(float(steps))
    if steps < size:
        with pytest.raises(ValueError, match="x must hold at least one patch"):
            ts.patches(x, size, stride, pad_end=pad_end)
        return
    cut = ts.patches(x, size, stride, pad_end=pad_end)
    padded = [*x.tolist(), *([steps - 1.0] * stride if pad_end else [])]
    starts = range(0, len(padded) - size + 1, stride)
    assert cut.tolist() == [padded[start : start + size] for start in starts]


@given(moment=moments)
def test_phases_of_the_calendar_are_those_of_datetime(moment: datetime.datetime) -> None:
    at = seconds(moment)
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    day = (moment - midnight) / datetime.timedelta(days=1)
    next_month = (midnight.replace(day=28) + datetime.timedelta(days=4)).replace(day=1)
    year = datetime.datetime(moment.year, 1, 1)
    expected = {
        "hour": (day * 24) % 1,
        "day": day,
        "week": (moment.weekday() + day) / 7,
        "month": (moment - midnight.replace(day=1)) / (next_month - midnight.replace(day=1)),
        "year": (moment - year) / (datetime.datetime(moment.year + 1, 1, 1) - year),
    }
    for cycle, value in expected.items():
        angle = 2 * torch.pi * torch.tensor([[value]], dtype=torch.float64)
        assert_close(ts.calendar_features(at, (cycle,)), torch.cat([angle.sin(), angle.cos()], 1), cycle)


def test_dates_of_numpy_and_seconds_agree() -> None:
    dates = np.array(["2016-07-01T05:30", "2020-02-29", "2099-12-31T23:59:59"], dtype="datetime64[ns]")
    at = torch.from_numpy(dates.astype("datetime64[s]").astype("int64"))
    assert torch.equal(ts.calendar_features(dates), ts.calendar_features(at))
    assert ts.calendar_features(dates).shape == (3, 8)


def test_calendar_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="cycles must be some of 'hour', 'day'"):
        ts.calendar_features(torch.zeros(1), ("decade",))
    with pytest.raises(TypeError, match="dates must be seconds since 1970 in a tensor"):
        ts.calendar_features([1.5, 2.5])
    with pytest.raises(ValueError, match="got NaT"):
        ts.calendar_features(np.array(["NaT"], dtype="datetime64[s]"))


def test_time2vec_is_its_formula_and_learns() -> None:
    features = ts.Time2Vec(5, shortest=2.0, longest=50.0)
    times = torch.tensor([0.0, 0.25, 13.0])
    out = features(times)
    w, b = features.frequency, features.phase
    assert_close(out[:, 0], w[0] * times + b[0])
    assert_close(out[:, 3], torch.sin(w[3] * times + b[3]))
    assert_close(2 * torch.pi / w[[1, -1]], torch.tensor([50.0, 2.0]))
    out.sum().backward()
    assert w.grad is not None and (w.grad != 0).all()
    with pytest.raises(ValueError, match="size must be >= 2"):
        ts.Time2Vec(1)
    with pytest.raises(ValueError, match="0 < shortest <= longest"):
        ts.Time2Vec(4, shortest=3.0, longest=2.0)
