"""Transformers that forecast step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xformerlib as xf
from tests.time_series import stepwise
from xformerlib import time_series as ts

MODELS = [ts.CausalTransformer, ts.EncoderDecoderTransformer]
SMALL: dict[str, Any] = {"dim": 8, "depth": 2, "heads": 2, "hidden": 16}
both = pytest.mark.parametrize("model", MODELS)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("holes", [False, True])
def test_decoding_with_a_cache_agrees(model: type[ts.StepwiseModel], dtype: torch.dtype, holes: bool) -> None:
    stepwise.check_steps(stepwise.built(model, dtype, **SMALL), dtype, holes)


@both
def test_no_step_sees_a_later_one(model: type[ts.StepwiseModel]) -> None:
    stepwise.check_no_leakage(stepwise.built(model, **SMALL))


@both
def test_samples_share_what_came_before(model: type[ts.StepwiseModel]) -> None:
    stepwise.check_samples(stepwise.built(model, head=ts.StudentT(), **SMALL))


@both
def test_a_series_that_begins_late_is_a_shorter_one(model: type[ts.StepwiseModel]) -> None:
    stepwise.assert_shorter_is_missing_in_front(stepwise.built(model, **SMALL))


@both
def test_order_matters(model: type[ts.StepwiseModel]) -> None:
    made, given = stepwise.built(model, **SMALL), stepwise.inputs()
    given["future"][:] = 0
    turned = {**given, "x": given["x"].clone()}
    turned["x"][:, :-1] = given["x"][:, :-1].flip(1)  # all but the last step: only positions tell them apart
    assert not torch.allclose(made(**turned), made(**given))


def test_the_context_is_kept_once_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stepwise.built(ts.EncoderDecoderTransformer, head=ts.StudentT(), **SMALL)
    caches: list[xf.Cache] = []
    repeated = xf.Cache.repeated

    def watched(cache: xf.Cache, times: int) -> xf.Cache:
        caches.append(repeated(cache, times))
        return caches[-1]

    monkeypatch.setattr(xf.Cache, "repeated", watched)
    model.sample(**stepwise.inputs(), n=7)
    (cache,) = caches
    layers = [block.cross_attention for block in model.transformer.decoder.blocks]
    assert [len(cache.context(layer)[0]) for layer in layers] == [stepwise.BATCH] * SMALL["depth"]


def test_each_step_of_a_forecast_is_computed_once() -> None:
    model, given = stepwise.built(ts.CausalTransformer, **SMALL), stepwise.inputs()
    counts: list[int] = []
    model.decoder.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
    model(**given)
    assert counts == [stepwise.LOOKBACK] + [1] * (stepwise.HORIZON - 1)


@both
@pytest.mark.parametrize("head", [ts.Quantile((0.1, 0.5, 0.9)), ts.StudentT()])
def test_heads_feed_back_their_point(model: type[ts.StepwiseModel], head: ts.Head) -> None:
    made, given = stepwise.built(model, head=head, **SMALL), stepwise.inputs()
    with torch.no_grad():
        free = head.point(made(**given))
        forced = head.point(made(**given, target=free))
    torch.testing.assert_close(free, forced)


@both
def test_a_target_with_holes(model: type[ts.StepwiseModel]) -> None:
    made, given = stepwise.built(model, **SMALL), stepwise.inputs()
    target = torch.randn(stepwise.BATCH, stepwise.HORIZON, stepwise.CHANNELS, dtype=torch.float64)
    target[0, 2, 1] = torch.nan
    forecast = made(**given, target=target)
    assert forecast.isfinite().all()
    ts.mse(forecast, target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
