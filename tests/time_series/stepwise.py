"""What the tests of step-by-step models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.closeness import assert_close
from xformerlib import time_series as ts

CHANNELS, LOOKBACK, HORIZON, BATCH = 2, 20, 6, 3
DEPTH = 2 * HORIZON  # layers, and steps that are fed back


def built(model: type[Any], dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A small model with every kind of input, its weights drawn anew."""
    made = model(CHANNELS, LOOKBACK, HORIZON, past=1, future=2, static=1, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float64, lookback: int = LOOKBACK, holes: bool = False) -> dict[str, Tensor]:
    x = 3 + 2 * torch.randn(BATCH, lookback, CHANNELS + 1, dtype=dtype)
    if holes:
        x[0, : lookback // 3] = torch.nan
        x[1, lookback // 2] = torch.nan
        x[2, -1, 0] = torch.nan
    future = torch.randn(BATCH, lookback + HORIZON, 2, dtype=dtype)
    return {"x": x, "future": future, "static": torch.randn(BATCH, 1, dtype=dtype)}


def again_from_the_start(model: ts.StepwiseModel, given: dict[str, Tensor]) -> Tensor:
    """The forecast without any cache: for each step everything before it is computed anew."""
    target = given["x"].new_full((BATCH, HORIZON, CHANNELS), torch.nan)
    for step in range(HORIZON):
        target[:, step] = model(**given, target=target)[:, step]
    return target


def assert_shorter_is_missing_in_front(model: ts.ForecastModel, times: Tensor | None = None) -> None:
    """A series that begins late is a shorter series, whatever else is in the batch."""
    given = inputs() | ({} if times is None else {"times": times})
    late = {**given, "x": given["x"].clone()}
    late["x"][0, :7] = torch.nan
    shorter = {"x": given["x"][:1, 7:], "future": given["future"][:1, 7:], "static": given["static"][:1]}
    if times is not None:
        shorter["times"] = times[:1, 7:]
    together = model.head.point(model(**late))
    assert_close(model.head.point(model(**shorter)), together[:1], depth=2)
    whole = model.head.point(model(**given))
    assert_close(together[1:], whole[1:], depth=2)
    assert not torch.allclose(together[:1], whole[:1])


def check_steps(model: ts.StepwiseModel, dtype: torch.dtype, holes: bool, times: Tensor | None = None) -> None:
    """Step by step with what is cached, and everything anew, agree; gradients too."""
    given = inputs(dtype, holes=holes) | ({} if times is None else {"times": times})
    cached = model(**given)
    with torch.no_grad():
        assert_close(model(**given), again_from_the_start(model, given), depth=DEPTH)
    assert_close(model(**given, target=cached.detach()), cached, depth=DEPTH)
    parameter = next(model.parameters())
    (through_steps,) = torch.autograd.grad(cached[:, 0].sum(), parameter)
    (at_once,) = torch.autograd.grad(model(**given, target=cached.detach())[:, 0].sum(), parameter)
    assert_close(through_steps, at_once, depth=DEPTH)


def check_no_leakage(model: ts.StepwiseModel, times: Tensor | None = None) -> None:
    """With teacher forcing a step sees the true steps before it, and neither itself nor later ones, nor their covariates."""
    given, target = (
        inputs() | ({} if times is None else {"times": times}),
        torch.randn(BATCH, HORIZON, CHANNELS, dtype=torch.float64),
    )
    before = model(**given, target=target)
    for step in range(HORIZON):
        changed = target.clone()
        changed[:, step] += 1
        after = model(**given, target=changed)
        assert torch.equal(after[:, : step + 1], before[:, : step + 1])
        if step + 1 < HORIZON:
            assert (after[:, step + 1] != before[:, step + 1]).any(-1).all()
        known = given["future"].clone()
        known[:, LOOKBACK + step] += 1
        after = model(**{**given, "future": known}, target=target)
        assert torch.equal(after[:, :step], before[:, :step])
        assert (after[:, step] != before[:, step]).any(-1).all()


def check_samples(model: ts.StepwiseModel, times: Tensor | None = None) -> None:
    """Paths are as they would be drawn for each series by itself, one sample at a time, with the same noise."""
    given, n = inputs(holes=True) | ({} if times is None else {"times": times}), 4
    paths = model.sample(**given, n=n, generator=torch.Generator().manual_seed(1))
    assert paths.shape == (n, BATCH, HORIZON, CHANNELS) and paths.isfinite().all()
    # Each path explains itself: given it as the target, the first steps of all agree, and later ones differ.
    forecasts = [model(**given, target=path) for path in paths]
    assert_close(forecasts[0].loc[:, 0], forecasts[1].loc[:, 0])
    assert (forecasts[0].loc[:, 1] != forecasts[1].loc[:, 1]).any()
    # The noise is what stands between a path and the forecasts along it; drawn in the same way, it is found again.
    noise = torch.Generator().manual_seed(1)
    drawn = torch.stack(
        [
            _standard(torch.stack([f.df[:, step] for f in forecasts], 1).flatten(0, 1)[:, None], noise)
            .unflatten(0, (BATCH, n))[:, :, 0]
            .transpose(0, 1)
            for step in range(HORIZON)
        ],
        2,
    )
    expected = torch.stack([f.loc + f.scale * t for f, t in zip(forecasts, drawn, strict=True)])
    assert_close(paths, expected, depth=DEPTH)


def _standard(df: Tensor, generator: torch.Generator) -> Tensor:
    return ts.StudentTForecast(df, torch.zeros_like(df), torch.ones_like(df)).sample(1, generator=generator)[0]


def irregular(lookback: int = LOOKBACK, batch: int = BATCH) -> Tensor:
    """Times of each series, in order, some far apart; two steps of the look-back may be of one time."""
    gaps = torch.rand(batch, lookback + HORIZON, dtype=torch.float64) * 2 + 0.05
    gaps[0, 4] = 0.0
    gaps[:, 7] += 20.0
    return gaps.cumsum(1)
