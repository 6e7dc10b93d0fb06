from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from xformerlib import time_series as ts

LOOKBACK, HORIZON = 8, 4
OPTIONS: dict[str, Any] = {"steps": 12, "batch_size": 4, "eval_every": 4, "lr": 1e-2}


def waves(steps: int = 60) -> Tensor:
    t = torch.arange(float(steps))[:, None]
    return torch.sin(t / 2) + 0.1 * torch.randn(steps, 1)


def parts(values: Tensor | None = None) -> tuple[ts.Windows, ts.Windows]:
    values = waves() if values is None else values
    return ts.Windows(values[:45], LOOKBACK, HORIZON), ts.Windows(values, LOOKBACK, HORIZON, first=45)


def model() -> ts.ForecastModel:
    torch.manual_seed(0)
    return ts.DLinear(1, LOOKBACK, HORIZON, kernel=3)


def weights(one: ts.ForecastModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in one.parameters()])


def trained(**options: Any) -> Tensor:
    one = model()
    ts.train(one, *parts(), **{**OPTIONS, **options})
    return weights(one)


class Recorder(ts.ForecastModel):
    """Notes the first value of each window that it is shown in training."""

    def __init__(self, channels: int, lookback: int, horizon: int) -> None:
        super().__init__(channels, lookback, horizon)
        self.bias = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[float]] = []

    def forecast(self, series: ts.Series) -> Tensor:
        if self.training:
            self.seen.append(series.values[:, 0, 0].tolist())
        return self.bias.expand(len(series.values), self.horizon, self.channels)


@pytest.mark.parametrize("size", [3, 10, 64])
def test_every_window_is_drawn_before_any_again(size: int) -> None:
    windows = ts.Windows(torch.arange(21.0)[:, None], LOOKBACK, HORIZON)
    one = Recorder(1, LOOKBACK, HORIZON)
    ts.train(one, windows, steps=20, batch_size=size)
    drawn = [value for batch in one.seen for value in batch]
    count = len(windows)
    assert count == 10 and len(one.seen) == 20 and len(drawn) == 20 * min(size, count)
    for start in range(0, len(drawn) - count + 1, count):
        assert Counter(drawn[start : start + count]) == Counter(range(count))
    assert drawn[:count] != drawn[count : 2 * count]  # in another order


def test_training_lowers_the_loss_and_ends_with_the_best_weights() -> None:
    windows, validation = parts()
    one, noted = model(), []
    before = ts.evaluate(one, validation)
    evaluations = ts.train(
        one, windows, validation, **{**OPTIONS, "steps": 80, "lr": 0.3, "schedule": "constant"}, log=noted.append
    )
    assert evaluations == noted and [e.step for e in evaluations] == list(range(4, 81, 4))
    losses = [e.validation.loss for e in evaluations if e.validation is not None]
    assert min(losses) < 0.5 * before.loss
    assert losses[-1] > min(losses)  # or the test shows nothing
    assert ts.evaluate(one, validation).loss == min(losses)
    assert not one.training


def test_the_last_step_is_evaluated() -> None:
    evaluations = ts.train(model(), *parts(), **{**OPTIONS, "steps": 10})
    assert [e.step for e in evaluations] == [4, 8, 10]
    assert [e.validation for e in ts.train(model(), parts()[0], **OPTIONS)] == [None] * 3


def test_patience_ends_training() -> None:
    evaluations = ts.train(model(), *parts(), **{**OPTIONS, "steps": 100, "lr": 0.0}, patience=2)
    assert [e.step for e in evaluations] == [4, 8, 12]


def test_learning_rates() -> None:
    falling = [e.lr for e in ts.train(model(), *parts(), **OPTIONS)]
    assert falling == sorted(falling, reverse=True) and 0 < falling[-1] < 0.02 * OPTIONS["lr"]
    constant = ts.train(model(), *parts(), **OPTIONS, schedule="constant")
    assert [e.lr for e in constant] == [OPTIONS["lr"]] * 3


def test_a_seed_repeats_training_and_leaves_random_numbers_alone() -> None:
    def with_dropout(seed: int) -> Tensor:
        torch.manual_seed(0)
        one = ts.RNN(1, LOOKBACK, HORIZON, dim=4, depth=1, dropout=0.5)
        torch.manual_seed(11)
        ts.train(one, *parts(torch.linspace(0, 9, 60)[:, None].sin()), **OPTIONS, seed=seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(11)))
        return weights(one)

    assert torch.equal(with_dropout(1), with_dropout(1))
    assert not torch.equal(with_dropout(1), with_dropout(2))


@pytest.mark.parametrize(
    "option",
    [{"clip": 1e-3}, {"clip": None}, {"weight_decay": 0.5}, {"batch_size": 5}, {"lr": 2e-2}, {"schedule": "constant"}],
)
def test_every_option_has_an_effect(option: dict[str, Any]) -> None:
    values = 5 * waves()  # gradients that are clipped
    runs = []
    for options in (OPTIONS, {**OPTIONS, **option}):
        one = model()
        ts.train(one, parts(values)[0], **options)
        runs.append(weights(one))
    assert not torch.equal(*runs)


@pytest.mark.usefixtures("double")
def test_scores_do_not_depend_on_the_batch_size() -> None:
    values = waves()
    values[50:53] = torch.nan
    windows = ts.Windows(values, LOOKBACK, HORIZON)
    one = model()
    batch = windows.batch(slice(None))
    errors = (one(batch.x) - batch.target).detach()
    errors = errors[~errors.isnan()]
    wanted = [errors.square().mean(), errors.abs().mean(), errors.square().mean()]
    for size in (1, 7, 1000):
        scores = ts.evaluate(one.train(), windows, batch_size=size)
        assert one.training
        assert_close([torch.tensor(score) for score in (scores.mse, scores.mae, scores.loss)], wanted)


def test_steps_of_the_horizon_are_shown_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    one = ts.AutoregressiveRNN(1, LOOKBACK, HORIZON, dim=4, depth=1)
    forward = type(one).forward

    def noting(self: ts.ForecastModel, x: Tensor, **given: Any) -> Any:
        shown.append((self.training, "target" in given))
        return forward(self, x, **given)

    monkeypatch.setattr(type(one), "forward", noting)
    ts.train(one, *parts(), **OPTIONS)
    assert set(shown) == {(True, True), (False, False)}


def test_a_bar_is_shown_if_there_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ts.train(model(), *parts(), **OPTIONS)
    assert capsys.readouterr().err == ""
    ts.train(model(), *parts(), **OPTIONS, progress=True)
    assert "12/12" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    ts.train(model(), *parts(), **OPTIONS, progress=True)
    assert capsys.readouterr().err == ""


def test_what_cannot_be_trained_is_refused() -> None:
    windows, _ = parts()
    with pytest.raises(ValueError, match="SeasonalNaive has none: it forecasts as it is"):
        ts.train(ts.SeasonalNaive(1, LOOKBACK, HORIZON), windows)
    with pytest.raises(ValueError, match="patience counts evaluations on validation windows"):
        ts.train(model(), windows, patience=3)
    with pytest.raises(ValueError, match="schedule must be 'cosine' or 'constant'; got schedule='linear'"):
        ts.train(model(), windows, schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be >= 1; got steps=0"):
        ts.train(model(), windows, steps=0)
    with pytest.raises(ValueError, match="windows must hold a target that was observed"):
        ts.evaluate(model(), ts.Windows(torch.full((20, 1), torch.nan), LOOKBACK, HORIZON))


def test_a_loss_that_is_not_finite_ends_training() -> None:
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step 4: lower lr"):
        ts.train(model(), *parts(), **{**OPTIONS, "lr": 1e30}, clip=None)
