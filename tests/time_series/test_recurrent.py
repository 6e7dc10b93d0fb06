"""Recurrent networks and attention over their states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from tests.closeness import assert_close
from tests.time_series import stepwise
from xformerlib import time_series as ts

MODELS = [ts.RNN, ts.AttentionPoolingRNN, ts.AutoregressiveRNN]
cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


@cells
@pytest.mark.parametrize("model", MODELS)
def test_a_series_that_begins_late_is_a_shorter_one(model: type[ts.ForecastModel], cell: str) -> None:
    stepwise.assert_shorter_is_missing_in_front(stepwise.built(model, dim=8, cell=cell))


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("holes", [False, True])
def test_steps_agree_with_all_at_once(cell: str, dtype: torch.dtype, holes: bool) -> None:
    stepwise.check_steps(stepwise.built(ts.AutoregressiveRNN, dtype, dim=8, cell=cell), dtype, holes)


@cells
def test_no_step_sees_a_later_one(cell: str) -> None:
    stepwise.check_no_leakage(stepwise.built(ts.AutoregressiveRNN, dim=8, cell=cell))


@cells
def test_samples(cell: str) -> None:
    stepwise.check_samples(stepwise.built(ts.AutoregressiveRNN, dim=8, cell=cell, head=ts.StudentT()))


def test_the_cells_are_the_formula() -> None:
    model = ts.RNN(1, 3, 2, dim=4, depth=1, cell="gru").double().eval()
    x = torch.tensor([[[1.0], [2.0], [4.0]]], dtype=torch.float64)
    z, inverse = ts.instance_norm(x)
    state = torch.zeros(1, 4, dtype=torch.float64)
    for t in range(3):
        vector = torch.cat([z[:, t], torch.ones(1, 1, dtype=torch.float64)], -1)
        state = torch.gru_cell(vector, state, *(p for _, p in model.rnn.named_parameters()))
    assert_close(model(x), inverse(model.output.linear(state)[..., None]))


@given(batch=st.integers(1, 4), steps=st.integers(1, 9), dim=st.integers(1, 6), holes=st.booleans())
def test_pooling_is_the_mean_with_softmax_weights(batch: int, steps: int, dim: int, holes: bool) -> None:
    pooling, h = ts.AttentionPooling(dim).double(), torch.randn(batch, steps, dim, dtype=torch.float64)
    valid = torch.rand(batch, steps) < 0.6 if holes else None
    scores = torch.einsum("btd,d->bt", h, pooling.theta)
    shares = scores.exp() if valid is None else scores.exp() * valid
    weights = shares / shares.sum(1, keepdim=True).clamp(min=1e-300)
    if valid is not None:
        h = h.masked_fill(~valid[..., None], torch.nan)
    assert_close(pooling.weights(h, valid), weights.detach())
    pooled = pooling(h, valid)
    assert_close(pooled, torch.einsum("bt,btd->bd", weights, h.nan_to_num()))
    pooled.sum().backward()
    assert pooling.theta.grad is not None and pooling.theta.grad.isfinite().all()


def test_where_nothing_is_valid_the_pool_is_empty() -> None:
    pooling, h = ts.AttentionPooling(3), torch.randn(2, 4, 3)
    valid = torch.tensor([[False] * 4, [True] * 4])
    assert (pooling(h, valid)[0] == 0).all() and (pooling.weights(h, valid).sum(1) == torch.tensor([0.0, 1.0])).all()


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="cell must be 'lstm' or 'gru'; got cell='elman'"):
        ts.RNN(1, 4, 2, cell="elman")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth must be >= 1"):
        ts.AutoregressiveRNN(1, 4, 2, depth=0)
    with pytest.raises(ValueError, match=r"sample needs a distribution .*head=StudentT\(\); it has Point\(\)"):
        ts.AutoregressiveRNN(1, 4, 2).sample(torch.randn(1, 4, 1), 3)
    with pytest.raises(ValueError, match="n must be a whole number >= 1; got n=0"):
        ts.AutoregressiveRNN(1, 4, 2, head=ts.StudentT()).sample(torch.randn(1, 4, 1), 0)
    with pytest.raises(ValueError, match=r"target must be the horizon, \(1, 2, 1\); got \(1, 3, 1\)"):
        ts.AutoregressiveRNN(1, 4, 2)(torch.randn(1, 4, 1), target=torch.randn(1, 3, 1))
