"""What every forecasting model promises. A model of its own is one more line in ``CASES``."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from tests.closeness import assert_close
from xformerlib import time_series as ts

CHANNELS, LOOKBACK, HORIZON, BATCH = 2, 24, 6, 3
COVARIATES = {"past": 1, "future": 2, "static": 3}


class Case(NamedTuple):
    """A model, and what makes a small one of it."""

    model: type[ts.ForecastModel]
    options: dict[str, Any]

    def takes(self, name: str) -> bool:
        """Whether the model can use it."""
        return name in self.model.takes

    def build(self, *, covariates: bool = False, **options: Any) -> ts.ForecastModel:
        """A small model with weights that are drawn anew: at their first values many models hardly do anything."""
        sizes = {name: size for name, size in COVARIATES.items() if covariates and self.takes(name)}
        model = self.model(CHANNELS, LOOKBACK, HORIZON, **self.options, **sizes, **options)
        redraw(model)
        return model.eval()


CASES = [
    Case(ts.SeasonalNaive, {"season": 4}),
    Case(ts.DLinear, {"kernel": 5}),
    Case(ts.DLinear, {"kernel": 5, "individual": True}),
    Case(ts.DLinear, {"kernel": 5, "normalise": True}),
    Case(ts.PatchTST, {"patch": 6, "stride": 3, "dim": 8, "depth": 2, "heads": 2, "hidden": 16}),
    Case(ts.ITransformer, {"dim": 8, "depth": 2, "heads": 2, "hidden": 16}),
    Case(ts.TimeXer, {"patch": 5, "dim": 8, "depth": 2, "heads": 2, "hidden": 16}),
    Case(ts.Crossformer, {"segment": 5, "dim": 8, "depth": 1, "heads": 2, "hidden": 16}),
    Case(ts.GroupTransformer, {"patch": 5, "dim": 8, "depth": 1, "heads": 2, "hidden": 16}),
    Case(ts.Informer, {"dim": 8, "heads": 2, "hidden": 16, "factor": 2.0}),
    Case(ts.RNN, {"dim": 8}),
    Case(ts.RNN, {"dim": 8, "depth": 1, "cell": "gru"}),
    Case(ts.AttentionPoolingRNN, {"dim": 8, "depth": 1}),
    Case(ts.AutoregressiveRNN, {"dim": 8, "depth": 1}),
    Case(ts.TCN, {"dim": 8, "depth": 3}),
    Case(ts.WaveNet, {"dim": 8, "depth": 5, "cycle": 3}),
    Case(ts.CausalTransformer, {"dim": 8, "depth": 2, "heads": 2}),
    Case(ts.EncoderDecoderTransformer, {"dim": 8, "depth": 1, "heads": 2}),
]
HEADS = [ts.Point(), ts.Quantile((0.1, 0.5, 0.9)), ts.StudentT()]


def ids(value: Any) -> str:
    return value.model.__name__ if isinstance(value, Case) else repr(value)


every_model = pytest.mark.parametrize("case", CASES, ids=ids)


def cases_with(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in CASES if case.takes(name)], ids=ids)


def redraw(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)


def inputs(model: ts.ForecastModel, batch: int = BATCH) -> dict[str, Tensor]:
    """A call's inputs, every declared one among them."""
    steps = LOOKBACK + HORIZON
    given = {"x": 3 + 2 * torch.randn(batch, LOOKBACK, CHANNELS + model.past)}
    if model.future:
        given["future"] = torch.randn(batch, steps, model.future)
    if model.static:
        given["static"] = torch.randn(batch, model.static)
    if "times" in model.takes:
        given["times"] = torch.rand(batch, steps).cumsum(1)
    return given


def point(model: ts.ForecastModel, given: dict[str, Tensor]) -> Tensor:
    return model.head.point(model(**given))


def missing(x: Tensor, share: float) -> Tensor:
    """Where x is observed: holes here and there, and one whole stretch."""
    observed = torch.rand(x.shape) >= share
    observed[0, 5:17] = False
    return observed


@every_model
@pytest.mark.parametrize("covariates", [False, True])
def test_a_forecast_has_a_value_for_each_step_and_channel(case: Case, covariates: bool) -> None:
    model = case.build(covariates=covariates)
    assert model(**inputs(model)).shape == (BATCH, HORIZON, CHANNELS)


@cases_with("head")
@pytest.mark.parametrize("head", HEADS, ids=ids)
def test_every_head_fits(case: Case, head: ts.Head) -> None:
    model = case.build(head=head)
    given = inputs(model)
    forecast = model(**given)
    shape = (BATCH, HORIZON, CHANNELS)
    if isinstance(head, ts.Quantile):
        assert forecast.shape == (*shape, 3)
        assert (forecast.diff(dim=-1) >= 0).all()
    if isinstance(head, ts.StudentT):
        assert forecast.df.shape == forecast.loc.shape == forecast.scale.shape == shape
    assert point(model, given).shape == shape
    target = torch.randn(shape)
    target[0, 0, 0] = torch.nan
    head.loss(forecast, target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_model
@pytest.mark.usefixtures("double")
@settings(max_examples=3)
@given(seed=st.integers(0, 1000))
def test_the_loss_is_that_of_the_forecast_or_of_each_step_from_the_true_ones_before_it(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    model = case.build(covariates=True)
    given, target = inputs(model), torch.randn(BATCH, HORIZON, CHANNELS)
    target[0, 2], target[1, 0, 1] = torch.nan, torch.nan
    batch = ts.Batch(given["x"], target, given.get("future"), given.get("static"))
    forced = {"target": target} if isinstance(model, ts.StepwiseModel) else {}
    forecast = model(**batch.inputs, **forced)
    seen = ~target.isnan()
    assert_close(model.loss(batch), (forecast - target)[seen].square().mean())


@every_model
@settings(max_examples=6)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_what_is_missing_changes_nothing(case: Case, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = case.build(covariates=True)
    given = inputs(model)
    observed = missing(given["x"], share)
    forecast = point(model, {**given, "observed": observed})
    assert forecast.isfinite().all()
    for filling in (torch.nan, torch.inf, 1e9, 0.0):
        x = given["x"].masked_fill(~observed, filling)
        assert torch.equal(point(model, {**given, "x": x, "observed": observed}), forecast)
    nan = given["x"].masked_fill(~observed, torch.nan)
    assert torch.equal(point(model, {**given, "x": nan}), forecast)


@every_model
def test_what_is_missing_matters(case: Case) -> None:
    model = case.build()
    given = inputs(model)
    observed = torch.ones_like(given["x"], dtype=torch.bool)
    observed[:, -4:, 0] = False
    assert not torch.allclose(point(model, {**given, "observed": observed}), point(model, given))


@every_model
@pytest.mark.parametrize("hidden", ["a channel", "a series", "all"])
def test_nothing_observed_is_no_nan(case: Case, hidden: str) -> None:
    model = case.build(covariates=True)
    given = inputs(model)
    part = {"a channel": (0, slice(None), 0), "a series": (0,), "all": ()}[hidden]
    given["x"][part] = torch.nan
    assert point(model, given).isfinite().all()


@cases_with("head")
def test_what_is_missing_is_in_no_gradient(case: Case) -> None:
    model = case.build(covariates=True).train()
    given = inputs(model)
    observed = missing(given["x"], 0.3)
    x = given["x"].masked_fill(~observed, torch.nan).requires_grad_()
    point(model, {**given, "x": x}).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert (x.grad[~observed] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_model
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_row_does_not_depend_on_the_others(case: Case, share: float, precision: torch.dtype) -> None:
    model = case.build(covariates=True)
    given = inputs(model)
    if share:
        given["observed"] = missing(given["x"], share)
    together = point(model, given)
    for row in range(BATCH):
        alone = point(model, {name: value[row : row + 1] for name, value in given.items()})
        assert_close(alone, together[row : row + 1])


@every_model
def test_evaluation_is_deterministic(case: Case) -> None:
    model = case.build(covariates=True)
    given = inputs(model)
    assert torch.equal(point(model, given), point(model, given))


@every_model
def test_the_targets_are_what_is_forecast(case: Case) -> None:
    model = case.build(covariates=True)
    given = inputs(model)
    before = point(model, given)
    given["x"][..., 0] = torch.randn(BATCH, LOOKBACK)
    assert not torch.allclose(point(model, given)[..., 0], before[..., 0])


def covariates_of(case: Case) -> list[str]:
    """What changes a forecast beside the targets, each by itself."""
    names = [name for name in COVARIATES if case.takes(name)] + ["times"] * case.takes("times")
    return [part for name in names for part in ([name] if name != "future" else ["future before", "future after"])]


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in covariates_of(case)], ids=ids)
def test_every_covariate_has_an_effect(case: Case, name: str) -> None:
    model = case.build(covariates=True)
    given = inputs(model)
    before = point(model, given)
    part: Tensor = {
        "past": lambda: given["x"][..., CHANNELS:],
        "future before": lambda: given["future"][:, :LOOKBACK],
        "future after": lambda: given["future"][:, LOOKBACK:],
        "static": lambda: given["static"],
        "times": lambda: given["times"],
    }[name]()
    part += torch.rand_like(part).cumsum(1)
    assert not torch.allclose(point(model, given), before)


@every_model
def test_what_was_not_declared_is_refused(case: Case) -> None:
    model = case.build()
    given = inputs(model)
    steps = LOOKBACK + HORIZON
    name = case.model.__name__
    with pytest.raises(ValueError, match=f"{name} has no future covariates: leave future out"):
        model(**given, future=torch.randn(BATCH, steps, 1))
    with pytest.raises(ValueError, match=f"{name} has no static covariates: leave static out"):
        model(**given, static=torch.randn(BATCH, 1))
    with pytest.raises(ValueError, match=r"x must be \(batch, lookback, 2\).*declared with 2 channels and 0 past"):
        model(torch.randn(BATCH, LOOKBACK, CHANNELS + 1))
    if "times" not in model.takes:
        with pytest.raises(ValueError, match=f"{name} takes no times"):
            model(**given, times=torch.arange(steps))


@every_model
def test_what_has_no_use_is_refused_when_it_is_declared(case: Case) -> None:
    for key in COVARIATES:
        if not case.takes(key):
            with pytest.raises((ValueError, TypeError), match=key):
                case.model(CHANNELS, LOOKBACK, HORIZON, **case.options, **{key: 1})
    with pytest.raises(TypeError, match="colour"):
        case.model(CHANNELS, LOOKBACK, HORIZON, **case.options, colour=1)
    with pytest.raises((ValueError, TypeError), match=r"head must be Point\(\)" if case.takes("head") else "head"):
        case.model(CHANNELS, LOOKBACK, HORIZON, **case.options, head="point")


@every_model
def test_what_was_declared_must_come(case: Case) -> None:
    model = case.build(covariates=True)
    given = inputs(model)
    for name in ("future", "static"):
        if name in given:
            with pytest.raises(ValueError, match=f"{name} must be given"):
                model(**{key: value for key, value in given.items() if key != name})
            with pytest.raises(ValueError, match=f"{name} must be known and finite"):
                model(**{**given, name: given[name] * torch.nan})
            with pytest.raises(ValueError, match=f"{name} of {case.model.__name__} must be"):
                model(**{**given, name: given[name][:, :-1]})


@every_model
def test_bad_inputs_are_refused(case: Case) -> None:
    model = case.build()
    x = inputs(model)["x"]
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        model(x.long())
    with pytest.raises(TypeError, match="observed must be a bool tensor"):
        model(x, observed=torch.ones_like(x))
    with pytest.raises(ValueError, match="observed must have the shape of x"):
        model(x, observed=torch.ones(BATCH, LOOKBACK, dtype=torch.bool))
    if not model.any_length:
        with pytest.raises(ValueError, match="x must hold the 24 steps"):
            model(x[:, 1:])
    with pytest.raises(ValueError, match="horizon must be >= 1; got horizon=0"):
        case.model(CHANNELS, LOOKBACK, 0, **case.options)
    with pytest.raises(TypeError, match="channels must be a whole number"):
        case.model(2.0, LOOKBACK, HORIZON, **case.options)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [case for case in CASES if case.model.any_length], ids=ids)
@pytest.mark.parametrize("length", [1, 3, 2 * LOOKBACK + 1])
def test_any_length_works_where_it_is_said_to(case: Case, length: int) -> None:
    model = case.build()
    assert model(torch.randn(BATCH, length, CHANNELS)).shape == (BATCH, HORIZON, CHANNELS)


@every_model
def test_weights_are_saved_and_loaded(case: Case) -> None:
    model, other = case.build(covariates=True), case.build(covariates=True)
    given = inputs(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(point(model, given), point(other, given))


@every_model
def test_double_precision(case: Case) -> None:
    model = case.build(covariates=True)
    given = inputs(model)
    exact = point(model.double(), {name: value.double() for name, value in given.items()})
    assert exact.dtype == torch.float64
    assert_close(point(model.float(), given), exact)


@cases_with("head")
@pytest.mark.parametrize("head", HEADS, ids=ids)
def test_training_lowers_the_loss(case: Case, head: ts.Head) -> None:
    model = case.model(CHANNELS, LOOKBACK, HORIZON, head=head, **case.options)
    t = torch.arange(LOOKBACK + HORIZON)[:, None] + 7 * torch.rand(8, 1, CHANNELS)
    series = 5 + torch.sin(t / 2) + 0.1 * torch.randn(8, LOOKBACK + HORIZON, CHANNELS)
    series[0, 3:9] = torch.nan
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = head.loss(model(series[:, :LOOKBACK]), series[:, LOOKBACK:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] if losses[0] > 0 else losses[-1] < losses[0]


@cases_with("head")
def test_training_is_reproducible_to_the_bit(case: Case) -> None:
    given = inputs(case.build(covariates=True))
    target = torch.randn(BATCH, HORIZON, CHANNELS)
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = case.build(covariates=True).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model.head.loss(model(**given), target).backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
