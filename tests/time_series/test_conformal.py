from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from xformerlib import time_series as ts


@given(count=st.integers(1, 60), tenth=st.integers(1, 999), seed=st.integers(0, 1000))
def test_a_width_is_the_error_of_its_rank(count: int, tenth: int, seed: int) -> None:
    errors = torch.randn(count, 3, 1, generator=torch.Generator().manual_seed(seed))
    rank = math.ceil((count + 1) * tenth / 1000 - 1e-9)
    conformal = ts.Conformal.of(errors)
    if rank > count:
        with pytest.raises(ValueError, match="needs more errors than there were"):
            conformal.width(tenth / 10)
    else:
        assert torch.equal(conformal.width(tenth / 10), errors[..., 0].abs().sort(0).values[rank - 1])


@given(count=st.integers(19, 60), level=st.sampled_from([50, 80, 90, 95]), seed=st.integers(0, 1000))
def test_a_share_of_exchangeable_errors_is_within(count: int, level: int, seed: int) -> None:
    # Each of n + 1 errors may as well be the new one: that at least the share is within is a fact, not a chance.
    errors = torch.randn(count + 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    within = [
        bool(errors[i].abs() <= ts.Conformal.of(torch.cat([errors[:i], errors[i + 1 :]])).width(level))
        for i in range(count + 1)
    ]
    assert sum(within) / len(within) >= level / 100


def test_what_was_not_seen_does_not_count() -> None:
    errors = torch.randn(40, 2, 3)
    with_holes = torch.cat([errors, torch.full((7, 2, 3), torch.nan)])
    assert torch.equal(ts.Conformal.of(with_holes).widths, ts.Conformal.of(errors).widths)


def test_wider_with_the_level() -> None:
    widths = ts.Conformal.of(torch.randn(50, 4, 2)).widths
    assert (widths.diff(dim=0).nan_to_num(nan=0.0) >= 0).all()


def test_what_is_no_level_is_refused() -> None:
    conformal = ts.Conformal.of(torch.randn(30, 2, 1))
    for level in (0, -5, 99.95, 100):
        with pytest.raises(ValueError, match=r"level must be > 0 and <= 99.9; got level="):
            conformal.width(level)
    with pytest.raises(ValueError, match=r"level=99 needs more .*: 99 at each step ahead. Give a longer validation"):
        conformal.width(99)
