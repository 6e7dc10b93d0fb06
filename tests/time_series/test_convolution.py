"""Causal convolutions: what they see, their weights, and queues."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from tests.closeness import assert_close
from tests.time_series import stepwise
from xformerlib import time_series as ts


def seen(model: nn.Module, length: int, step: int = 0) -> Tensor:
    """Which steps of a look-back the forecast of a step depends on, by the gradient. Levels and scales see every step: they are cut."""
    vectors: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        vectors.append(args[0].detach().requires_grad_())
        return (vectors[-1], *args[1:])

    entry = model.blocks[0] if isinstance(model, ts.TCN) else model.embed
    handle = entry.register_forward_pre_hook(keep)
    x = torch.randn(1, length, 1, dtype=torch.float64)
    target = {} if isinstance(model, ts.TCN) else {"target": torch.randn(1, model.horizon, 1, dtype=torch.float64)}
    model(x, **target)[:, step].sum().backward()
    handle.remove()
    assert vectors[0].grad is not None
    return vectors[0].grad[0].abs().sum(0) > 0


def redrawn(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():  # positive, so that no relu is dead
        nn.init.uniform_(parameter, 0.1, 0.4)
    return model.double()


@settings(max_examples=15)
@given(depth=st.integers(1, 4), kernel_size=st.integers(1, 4), extra=st.integers(0, 5))
def test_the_receptive_field_of_a_tcn(depth: int, kernel_size: int, extra: int) -> None:
    model = redrawn(ts.TCN(1, 8, 2, dim=3, depth=depth, kernel_size=kernel_size))
    field = 1 + 2 * (kernel_size - 1) * (2**depth - 1)
    assert model.receptive_field == field
    assert seen(model, field + extra).tolist() == [False] * extra + [True] * field


@settings(max_examples=15)
@given(depth=st.integers(1, 5), cycle=st.integers(1, 3), kernel_size=st.integers(1, 3), step=st.integers(0, 3))
def test_the_receptive_field_of_wavenet(depth: int, cycle: int, kernel_size: int, step: int) -> None:
    model = redrawn(ts.WaveNet(1, 8, 4, dim=3, depth=depth, cycle=cycle, kernel_size=kernel_size))
    field = 1 + (kernel_size - 1) * sum(2 ** (layer % cycle) for layer in range(depth))
    assert model.receptive_field == field
    # The vectors are those of the look-back and of the horizon but its last step.
    last = field + 2 + step
    assert seen(model, field + 3, step).nonzero().flatten().tolist() == list(range(last - field + 1, last + 1))


@given(lookback=st.integers(1, 300), kernel_size=st.integers(2, 4))
@settings(max_examples=10)
def test_the_default_depth_sees_the_lookback_and_no_layer_is_idle(lookback: int, kernel_size: int) -> None:
    for model in (
        ts.TCN(1, lookback, 1, dim=1, kernel_size=kernel_size),
        ts.WaveNet(1, lookback, 1, dim=1, kernel_size=kernel_size, cycle=4),
    ):
        depth = len(model.blocks if isinstance(model, ts.TCN) else model.layers)
        assert model.receptive_field >= lookback
        if depth > 1:
            fewer = type(model)(1, lookback, 1, dim=1, kernel_size=kernel_size, depth=depth - 1, **_cycle(model))
            assert fewer.receptive_field < lookback


def _cycle(model: nn.Module) -> dict[str, int]:
    return {"cycle": 4} if isinstance(model, ts.WaveNet) else {}


def test_the_weights_are_those_that_were_drawn() -> None:
    model = ts.TCN(4, 64, 8, dim=64, depth=3)
    model(torch.randn(2, 64, 4))
    for block in model.blocks:
        for convolution in block.convolutions:
            # Six standard errors of the deviation of so many draws.
            off = 6 * 0.01 / (2 * convolution.weight.numel()) ** 0.5
            assert abs(float(convolution.weight.detach().std()) - 0.01) < off


def test_a_kernel_of_one_is_a_map_of_each_step(precision: torch.dtype) -> None:
    layer, x = ts.CausalConvolution(3, 5, 1, dilation=4), torch.randn(2, 3, 7)
    assert_close(layer(x), (x.mT @ layer.weight[..., 0].mT + layer.bias).mT)


@settings(max_examples=10)
@given(kernel_size=st.integers(1, 4), dilation=st.integers(1, 5), steps=st.integers(1, 12))
def test_a_convolution_is_the_formula(kernel_size: int, dilation: int, steps: int) -> None:
    layer = ts.CausalConvolution(2, 3, kernel_size, dilation=dilation).double()
    x = torch.randn(2, 2, steps, dtype=torch.float64)
    wanted = layer.bias[:, None].expand(2, 3, steps).clone()
    for t in range(steps):
        for i in range(kernel_size):
            at = t - (kernel_size - 1 - i) * dilation
            if at >= 0:
                wanted[..., t] += x[..., at] @ layer.weight[..., i].mT
    assert_close(layer(x), wanted)


@pytest.mark.parametrize("model", [ts.TCN, ts.WaveNet])
def test_a_series_that_begins_late_is_a_shorter_one(model: type[ts.ForecastModel]) -> None:
    stepwise.assert_shorter_is_missing_in_front(stepwise.built(model, dim=6))


@settings(max_examples=10)
@given(depth=st.integers(1, 5), cycle=st.integers(1, 4), kernel_size=st.integers(1, 4), holes=st.booleans())
def test_queues_agree_with_convolutions(depth: int, cycle: int, kernel_size: int, holes: bool) -> None:
    options = {"dim": 4, "depth": depth, "cycle": cycle, "kernel_size": kernel_size}
    stepwise.check_steps(stepwise.built(ts.WaveNet, **options), torch.float64, holes)


def test_queues_agree_in_single_precision() -> None:
    stepwise.check_steps(stepwise.built(ts.WaveNet, torch.float32, dim=8), torch.float32, holes=False)


def test_no_step_sees_a_later_one() -> None:
    stepwise.check_no_leakage(stepwise.built(ts.WaveNet, dim=6))


def test_samples() -> None:
    stepwise.check_samples(stepwise.built(ts.WaveNet, dim=6, head=ts.StudentT()))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size must be >= 1; got kernel_size=0"):
        ts.TCN(1, 4, 2, kernel_size=0)
    with pytest.raises(ValueError, match="cycle must be >= 1"):
        ts.WaveNet(1, 4, 2, cycle=0)
    with pytest.raises(ValueError, match="dilation must be >= 1"):
        ts.CausalConvolution(1, 1, 2, dilation=0)
