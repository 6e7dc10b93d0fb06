from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from xformerlib import time_series as ts


def series_of(lengths: list[int], columns: int = 1) -> list[Tensor]:
    """Each value says which series, step and column it is."""
    return [1000.0 * i + torch.arange(n)[:, None] + torch.linspace(0, 0.5, columns) for i, n in enumerate(lengths)]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    lookback=st.integers(1, 12),
    horizon=st.integers(1, 6),
    stride=st.integers(1, 4),
    first=st.integers(0, 20),
    share=st.floats(0, 1),
    columns=st.integers(1, 3),
)
def test_windows_are_those_of_a_loop(
    lengths: list[int], lookback: int, horizon: int, stride: int, first: int, share: float, columns: int
) -> None:
    values, history = series_of(lengths, columns), max(1, int(share * lookback))
    options: dict[str, Any] = {
        "past": columns - 1, "first": first, "history": history, "stride": stride,
        "future": [-value for value in values], "static": torch.arange(float(len(values)))[:, None],
    }  # fmt: skip
    expected = []
    for i, value in enumerate(values):
        for least in (lookback, history):
            last = len(value) - horizon
            origins = [t for t in range(max(first, least), last + 1) if (last - t) % stride == 0]
            full = range(max(first, least), last + 1)
            if full:
                break
        expected += [(i, t) for t in origins]
    if not expected:
        with pytest.raises(ValueError, match="values must hold a window"):
            ts.Windows(values, lookback, horizon, **options)
        return
    windows = ts.Windows(values, lookback, horizon, **options)
    assert [*zip(windows.series.tolist(), windows.origin.tolist(), strict=True)] == expected
    assert len(windows) == len(expected)
    batch = windows.batch(range(len(windows)))
    assert batch.future is not None and batch.static is not None
    for row, (i, t) in enumerate(expected):
        begun = min(t, lookback)
        assert torch.equal(batch.x[row, lookback - begun :], values[i][t - begun : t])
        assert batch.x[row, : lookback - begun].isnan().all()
        assert (batch.future[row, : lookback - begun] == 0).all()
        assert torch.equal(batch.future[row, lookback - begun :], -values[i][t - begun : t + horizon])
        assert torch.equal(batch.target[row], values[i][t : t + horizon, :1])
        assert batch.static[row].item() == i


@pytest.mark.parametrize("size", [1, 3, 100])
def test_batches_hold_every_window_once(size: int) -> None:
    windows = ts.Windows(series_of([40, 12, 25], 2), 8, 3, past=1)
    joined = torch.cat([batch.target for batch in windows.batches(size)])
    assert torch.equal(joined, windows.batch(slice(None)).target)
    assert len(joined) == len(windows)


def test_one_series_is_not_copied() -> None:
    values = torch.randn(100, 2)
    windows = ts.Windows(values, 8, 4)
    values[50] = 7.0
    assert (windows.batch([int((windows.origin == 50).nonzero())]).target[0, 0] == 7).all()


def test_what_is_forecast_begins_at_first() -> None:
    windows = ts.Windows(series_of([50, 40]), 10, 5, first=[30, 20])
    assert windows.origin[windows.series == 0].tolist() == list(range(30, 46))
    assert windows.origin[windows.series == 1].tolist() == list(range(20, 36))


def test_inputs_are_those_of_a_model() -> None:
    values, known = series_of([30, 30], 2), [torch.randn(30, 3)] * 2
    windows = ts.Windows(values, 8, 4, past=1, future=known, static=torch.randn(2, 2))
    model = ts.RNN(1, 8, 4, past=1, future=3, static=2, dim=4)
    batch = windows.batch([0, 5])
    assert model(**batch.inputs).shape == batch.target.shape
    assert set(ts.Windows(values, 8, 4).batch([0]).inputs) == {"x"}
    assert batch.to("cpu").inputs.keys() == batch.inputs.keys()


def test_bad_arguments_are_refused() -> None:
    values = series_of([20, 20])
    with pytest.raises(ValueError, match="lookback must be >= 1; got lookback=0"):
        ts.Windows(values, 0, 4)
    with pytest.raises(ValueError, match="history must be <= lookback; got history=9 and lookback=8"):
        ts.Windows(values, 8, 4, history=9)
    with pytest.raises(ValueError, match="values must have targets beside the 1 past covariates"):
        ts.Windows(values, 8, 4, past=1)
    with pytest.raises(ValueError, match="first must be one step for each of 2 series; got 3"):
        ts.Windows(values, 8, 4, first=[1, 2, 3])
    with pytest.raises(ValueError, match="values must hold at least one series"):
        ts.Windows([], 8, 4)
    with pytest.raises(TypeError, match=r"values must be floating-point tensors.*series 1 is torch.int64"):
        ts.Windows([values[0], values[1].long()], 8, 4)
    with pytest.raises(ValueError, match=r"same columns; series 0 is \(20, 1\) and series 1 is \(20, 2\)"):
        ts.Windows([values[0], torch.randn(20, 2)], 8, 4)
    with pytest.raises(ValueError, match=r"future must have the steps of values.*\[20, 19\] and \[20, 20\]"):
        ts.Windows(values, 8, 4, future=[values[0], values[1][1:]])
    with pytest.raises(ValueError, match=r"static must be \(2, constants\)"):
        ts.Windows(values, 8, 4, static=torch.randn(3, 1))
