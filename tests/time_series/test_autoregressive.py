"""Transformers that forecast step by step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import xformerlib as xf
from tests.closeness import assert_close
from tests.time_series import stepwise
from xformerlib import masks, positions, time_series as ts

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
    assert_close(free, forced, depth=stepwise.DEPTH)


@both
def test_a_target_with_holes(model: type[ts.StepwiseModel]) -> None:
    made, given = stepwise.built(model, **SMALL), stepwise.inputs()
    target = torch.randn(stepwise.BATCH, stepwise.HORIZON, stepwise.CHANNELS, dtype=torch.float64)
    target[0, 2, 1] = torch.nan
    forecast = made(**given, target=target)
    assert forecast.isfinite().all()
    ts.mse(forecast, target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


# -- real times --------------------------------------------------------------------------------------------------------------


HEAD_DIM = SMALL["dim"] // SMALL["heads"]
PLACED: list[dict[str, Any]] = [
    {},
    {"position": lambda: positions.Rotary(HEAD_DIM), "mask": masks.Local(24.0)},
    {"position": lambda: positions.DistanceDecay(SMALL["heads"])},
    {"position": lambda: positions.Sinusoidal(SMALL["dim"]) + positions.Rotary(HEAD_DIM), "mask": masks.Local(3)},
    {"position": lambda: lambda: positions.ContinuousBias(SMALL["heads"], hidden=4), "mask": ~masks.Local(0.5) | masks.Local(0)},
]  # fmt: skip
placed = pytest.mark.parametrize("options", PLACED)


def timed(model: type[ts.StepwiseModel], options: dict[str, Any], **more: Any) -> Any:
    """A model that is given times; ``position`` makes its position anew."""
    made = {name: value() if name == "position" else value for name, value in options.items()}
    return stepwise.built(model, **SMALL, **made, **more)


@both
@placed
@pytest.mark.parametrize(("times", "dtype"), [(None, torch.float64), ("shared", torch.float32), ("own", torch.float64)])
def test_decoding_at_real_times_agrees(
    model: type[ts.StepwiseModel], options: dict[str, Any], dtype: torch.dtype, times: str | None
) -> None:
    at = {None: None, "shared": stepwise.irregular()[0], "own": stepwise.irregular()}[times]
    stepwise.check_steps(timed(model, options, dtype=dtype), dtype, holes=True, times=at)


@both
@pytest.mark.parametrize(
    ("lookback", "options"),
    [*((stepwise.LOOKBACK, options) for options in PLACED), (7, PLACED[0]), (2 * stepwise.LOOKBACK, PLACED[3])],
)
def test_regular_times_are_the_same_as_none(
    model: type[ts.StepwiseModel], options: dict[str, Any], lookback: int
) -> None:
    made, given = timed(model, options), stepwise.inputs(lookback=lookback, holes=True)
    steps = torch.arange(lookback + stepwise.HORIZON)
    for times in (steps, steps.expand(stepwise.BATCH, -1), steps - 1_700_000_000):
        assert_close(made(**given, times=times), made(**given))


@both
@placed
def test_only_spans_of_time_matter(model: type[ts.StepwiseModel], options: dict[str, Any]) -> None:
    made, given, times = timed(model, options), stepwise.inputs(), stepwise.irregular()
    forecast = made(**given, times=times)
    assert_close(made(**given, times=times + 1000), forecast)
    assert not torch.allclose(made(**given, times=24 * times), forecast, rtol=1e-3)
    steps = [5, stepwise.LOOKBACK - 1, stepwise.LOOKBACK, stepwise.LOOKBACK + stepwise.HORIZON - 1]
    for step in steps["mask" in options :]:  # each by itself; a window of time may not reach the first
        moved = times.clone()
        moved[:, step] -= 0.4 * times.diff(dim=1)[:, step - 1]
        assert (made(**given, times=moved) != forecast).flatten(1).any(1)[1:].all()


@both
@placed
def test_no_step_sees_a_later_one_or_its_time(model: type[ts.StepwiseModel], options: dict[str, Any]) -> None:
    times = stepwise.irregular()
    made = timed(model, options)
    stepwise.check_no_leakage(made, times=times)
    given, target = stepwise.inputs(), torch.randn(stepwise.BATCH, stepwise.HORIZON, stepwise.CHANNELS).double()
    before = made(**given, target=target, times=times)
    for step in range(stepwise.HORIZON):
        later = times.clone()
        later[:, stepwise.LOOKBACK + step :] += 0.3
        after = made(**given, target=target, times=later)
        assert torch.equal(after[:, :step], before[:, :step])
        assert (after[:, step] != before[:, step]).any(-1).all()


@both
@placed
def test_samples_at_real_times(model: type[ts.StepwiseModel], options: dict[str, Any]) -> None:
    made = timed(model, options, head=ts.StudentT())
    stepwise.check_samples(made, times=stepwise.irregular())
    stepwise.check_samples(made, times=stepwise.irregular()[1])


@both
def test_a_series_that_begins_late_at_real_times(model: type[ts.StepwiseModel]) -> None:
    stepwise.assert_shorter_is_missing_in_front(timed(model, PLACED[1]), times=stepwise.irregular())


def test_a_window_of_time_hides_what_is_older() -> None:
    """One block, so that a step sees what its mask lets through and no more."""
    made = stepwise.built(ts.CausalTransformer, **{**SMALL, "depth": 1, "mask": masks.Local(5.0)})
    times = torch.arange(stepwise.LOOKBACK + stepwise.HORIZON) * 1.5
    steps = made._steps(made.series(**stepwise.inputs(), times=times))
    later = steps.later[:, :0].new_zeros(stepwise.BATCH, 0, steps.vectors.shape[2])
    hidden = made.hidden(steps, later)
    for age in range(stepwise.LOOKBACK):
        vectors = steps.vectors.clone()
        vectors[:, stepwise.LOOKBACK - 1 - age] += 1
        other = made.hidden(dataclasses.replace(steps, vectors=vectors), later)
        assert torch.equal(other, hidden) == (1.5 * age > 5.0)


@both
def test_times_out_of_order_are_refused(model: type[ts.StepwiseModel]) -> None:
    made, given = stepwise.built(model, **SMALL), stepwise.inputs()
    times = torch.arange(float(stepwise.LOOKBACK + stepwise.HORIZON))
    for step, value in ((3, 9.0), (stepwise.LOOKBACK, times[stepwise.LOOKBACK - 1]), (-1, 0.0)):
        wrong = times.clone()
        wrong[step] = value
        with pytest.raises(
            ValueError, match="times must not decrease from step to step, and must increase from the last"
        ):
            made(**given, times=wrong)
    wrong = times.expand(stepwise.BATCH, -1).clone()
    wrong[1, 5] = 2
    with pytest.raises(ValueError, match="got 2 at step 5 after 4"):
        made(**given, times=wrong)
