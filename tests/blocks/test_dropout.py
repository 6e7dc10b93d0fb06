"""Dropout: its distribution, its gradient, and where it does nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from tests.closeness import assert_close
from xformerlib._dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_so_many_are_dropped_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    count = 200_001
    y = Dropout(p)(torch.ones(count, dtype=dtype))
    share = (y == 0).double().mean().item()
    assert abs(share - p) < 6 * math.sqrt(p * (1 - p) / count)
    # The rate is rounded to a multiple of 2^-16.
    assert_close(y[y != 0], torch.full((int((y != 0).sum()),), 1 / (1 - round(p * 2**16) / 2**16), dtype=torch.float64))


def test_neighbours_are_dropped_independently() -> None:
    dropped = (Dropout(0.5)(torch.ones(400_000)) == 0).double() - 0.5
    for lag in (1, 2, 3, 4, 5, 8):
        correlation = 4 * (dropped[lag:] * dropped[:-lag]).mean().item()
        assert abs(correlation) < 6 / math.sqrt(400_000)


@given(shape=st.lists(st.integers(0, 5), max_size=3), seed=st.integers(0, 100))
def test_the_gradient_is_that_of_what_was_kept(shape: list[int], seed: int) -> None:
    x = torch.rand(shape, dtype=torch.float64).add(0.5).requires_grad_()
    torch.manual_seed(seed)
    y = Dropout(0.4)(x)
    assert y.shape == x.shape
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient * x, y)
    torch.manual_seed(seed)
    assert torch.equal(Dropout(0.4)(x), y)


def test_nothing_happens_in_evaluation_or_without_a_rate_and_all_goes_at_one() -> None:
    x = torch.randn(7, 5)
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x
    assert (Dropout(1.0)(x) == 0).all()


def test_a_compiled_one_drops_too() -> None:
    y = torch.compile(Dropout(0.5), fullgraph=True)(torch.ones(10_000))
    assert set(y.unique().tolist()) == {0.0, 2.0}
