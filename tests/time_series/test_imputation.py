"""Imputer: what was observed stays, what is missing is estimated from it alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.closeness import assert_close
from tests.time_series.test_contract import redraw
from xformerlib import masks, positions, time_series as ts

pytestmark = pytest.mark.usefixtures("double")


def small(channels: int = 2, **options: object) -> ts.Imputer:
    model = ts.Imputer(channels, **{"dim": 8, "depth": 2, "heads": 2, "hidden": 16, **options})
    redraw(model)
    return model.eval()


def holes(x: Tensor, share: float) -> Tensor:
    observed = torch.rand(x.shape) >= share
    observed[0, 5:12] = False
    return observed


@settings(max_examples=15)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000), timed=st.booleans())
def test_what_was_observed_stays_and_what_is_missing_changes_nothing(share: float, seed: int, timed: bool) -> None:
    torch.manual_seed(seed)
    model, x = small(), 3 + 2 * torch.randn(3, 20, 2)
    observed, times = holes(x, share), torch.rand(3, 20).cumsum(1) if timed else None
    filled = model(x, observed=observed, times=times)
    assert filled.isfinite().all()
    assert torch.equal(filled[observed], x[observed])
    for filling in (torch.nan, torch.inf, 1e9):
        other = x.masked_fill(~observed, filling)
        assert torch.equal(model(other, observed=observed, times=times), filled)
    assert torch.equal(model(x.masked_fill(~observed, torch.nan), times=times), filled)


def test_rows_do_not_depend_on_each_other_nor_on_padding(precision: torch.dtype) -> None:
    model, x = small(), torch.randn(3, 20, 2)
    x[0, 12:] = torch.nan
    x[:, 3] = torch.nan
    together = model(x)
    for row in range(3):
        assert_close(model(x[row : row + 1]), together[row : row + 1])
    assert_close(model(x[:1, :12]), together[:1, :12])


def test_asking_for_a_value_at_another_time_changes_no_answer() -> None:
    model, times = small(), torch.tensor([0.0, 0.4, 2.5, 3.0, 7.0])
    x = torch.randn(1, 5, 2)
    x[0, 2, 0] = torch.nan
    asked, order = torch.cat([times, torch.tensor([1.7])]), [0, 1, 5, 2, 3, 4]
    longer = torch.cat([x, torch.full((1, 1, 2), torch.nan)], 1)
    alone, beside = model(x, times=times), model(longer, times=asked)
    assert_close(beside[:, :5], alone)
    assert_close(model(longer[:, order], times=asked[order]), beside[:, order])


def test_regular_times_are_steps_and_others_matter() -> None:
    model, x = small(), torch.randn(2, 9, 2)
    x[:, 4:6] = torch.nan
    steps = model(x)
    assert_close(model(x, times=10 + torch.arange(9)), steps)
    assert not torch.allclose(model(x, times=torch.arange(9.0) ** 1.5), steps)


def test_estimates_move_with_level_and_scale() -> None:
    # The epsilon of the norm does not scale: beside deviations so large it is nothing.
    model, x = small(), 1e6 * torch.randn(2, 20, 2)
    x[:, 4:9] = torch.nan
    assert_close(model(100 * x + 7e6), 100 * model(x) + 7e6)


def test_the_loss_is_its_formula_and_counts_hidden_values_that_were_observed() -> None:
    model, x = small(), torch.randn(2, 20, 2)
    observed, hidden = holes(x, 0.2), torch.rand(x.shape) < 0.3
    loss = model.loss(x, observed=observed, hidden=hidden)
    estimates = model(x, observed=observed & ~hidden)
    total, count = torch.zeros(()), 0
    for b in range(2):
        for c in range(2):
            values, asked = x[b, observed[b, :, c], c], (observed & hidden)[b, :, c]
            scale = (values.var(correction=0) + 1e-5).sqrt()
            total += ((estimates[b, asked, c] - x[b, asked, c]) / scale).square().sum()
            count += int(asked.sum())
    assert_close(loss, total / count)
    garbage = x.masked_fill(~observed, 1e9)
    assert_close(model.loss(garbage, observed=observed, hidden=hidden), loss)
    assert model.loss(x, observed=torch.zeros_like(observed)) == 0


def test_hidden_values_have_no_influence_on_the_estimates() -> None:
    """The gradient of the loss with respect to a hidden value is that of the target alone."""
    model, x = small(1), torch.randn(1, 12, 1).requires_grad_()
    hidden = torch.zeros(1, 12, 1, dtype=torch.bool)
    hidden[0, 7] = True
    (grad,) = torch.autograd.grad(model(x, observed=~hidden)[hidden].sum(), x)
    assert grad[hidden] == 0 and (grad[~hidden] != 0).all()


def test_the_diagonal_mask_of_saits() -> None:
    model = small(mask=~masks.Local(0))
    weights = model.encoder.blocks[0].attention.weights(torch.randn(1, 6, 8), position=model.encoder.position)
    assert (weights.diagonal(dim1=-2, dim2=-1) == 0).all()
    assert_close(weights.sum(-1), torch.ones(1, 2, 6))


@pytest.mark.parametrize("position", [None, positions.Sinusoidal(8), positions.DistanceDecay(2)])
def test_positions_and_masks_are_used(position: positions.Position | None) -> None:
    x = torch.randn(1, 12, 2)
    x[:, 5:7] = torch.nan
    swapped = x[:, [1, 0, *range(2, 12)]]  # the same level and scale
    model, near = small(position=position), small(position=position, mask=masks.Local(2), depth=1)
    assert not torch.allclose(model(swapped)[:, 5:7], model(x)[:, 5:7])
    assert_close(near(swapped)[:, 5:7], near(x)[:, 5:7])


def test_sines_are_filled_better_than_by_their_mean_or_by_what_was_last() -> None:
    generator = torch.Generator().manual_seed(1)
    t = torch.arange(48)[:, None]

    def waves(count: int) -> Tensor:
        phase = 6.3 * torch.rand(count, 1, 2, generator=generator)
        return 5 + torch.sin(2 * torch.pi * t / 12 + phase)

    def missing(x: Tensor) -> Tensor:
        observed = torch.rand(x.shape, generator=generator) > 0.2
        start = torch.randint(0, 40, (len(x), 1, 1), generator=generator)
        return observed & ~((t >= start) & (t < start + 6))  # half a wave, in both channels

    torch.manual_seed(0)
    model = ts.Imputer(2, dim=32, depth=2, heads=2, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    train, test = waves(64), waves(32)
    for _ in range(100):
        seen = missing(train)
        loss = model.loss(train, observed=torch.ones_like(seen), hidden=~seen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    observed = missing(test)
    model.eval()
    level = ts.instance_norm(test, observed)[1].level.expand_as(test)
    errors = [
        ts.mse(filled, test, ~observed).item()
        for filled in (model(test, observed=observed), level, ts.fill_forward(test, observed))
    ]
    assert errors[0] < 0.3 * min(errors[1:])


def test_a_channel_without_values_is_filled_in_the_units_of_standardised_data() -> None:
    model, x = small(), torch.randn(1, 20, 2)
    x[..., 1] = torch.nan
    filled = model(x)[..., 1]
    assert filled.isfinite().all() and filled.abs().max() > 0.01
    x[..., 0] += torch.randn(20)
    assert not torch.allclose(model(x)[..., 1], filled)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiles_to_one_graph_whatever_is_missing() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    model, x = small(), torch.randn(2, 20, 2)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for share in (0.0, 0.5):
        given_ = x.masked_fill(~holes(x, share), torch.nan) if share else x
        assert_close(compiled(given_), model(given_))
    assert counter.frame_count == 1


def test_bad_inputs_are_refused() -> None:
    model, x = small(), torch.randn(2, 20, 2)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        model(x.long())
    with pytest.raises(ValueError, match=r"x must be \(batch, steps, 2\); got \(2, 20, 1\)"):
        model(x[..., :1])
    with pytest.raises(TypeError, match="observed must be a bool tensor"):
        model(x, observed=x)
    with pytest.raises(ValueError, match=r"times must be \(2, 20\) or \(20,\)"):
        model(x, times=torch.arange(19))
    with pytest.raises(ValueError, match="times must be known and finite"):
        model(x, times=torch.full((20,), torch.nan))
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\); got share=1"):
        model.loss(x, share=1.0)
    with pytest.raises(ValueError, match="hidden must be a bool tensor in the shape of x"):
        model.loss(x, hidden=torch.ones(20, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="channels must be >= 1"):
        ts.Imputer(0)
