"""Group attention beyond the contract: who is in a group, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import xformerlib as xf
from tests.closeness import assert_close
from tests.time_series.test_contract import redraw
from xformerlib import masks, time_series as ts
from xformerlib.time_series import _group

pytestmark = pytest.mark.usefixtures("double")


def small(channels: int = 1, **options: Any) -> ts.GroupTransformer:
    sizes = {"patch": 6, "dim": 8, "depth": 2, "heads": 2, "hidden": 16, "dropout": 0.0}
    torch.manual_seed(1)  # the same weights, however many series
    model = ts.GroupTransformer(channels, 24, 9, **{**sizes, **options})
    redraw(model)
    return model.eval()


def test_forecasts_move_with_level_and_scale() -> None:
    # The epsilon of the norm does not scale: beside deviations so large it is nothing.
    model, x = small(3), 1e6 * torch.randn(2, 24, 3)
    assert_close(model(100 * x + 7e6), 100 * model(x) + 7e6)


def test_series_of_other_groups_change_nothing() -> None:
    model, x = small(), torch.randn(7, 24, 1)
    groups = torch.tensor([4, 0, 4, -3, 0, 4, 9])
    forecast = model(x, groups=groups)
    other = torch.where((groups == 4)[:, None, None], x, 5 * torch.randn_like(x))
    assert_close(model(other, groups=groups)[groups == 4], forecast[groups == 4])
    other[0] = torch.randn(24, 1)
    assert not torch.allclose(model(other, groups=groups)[2], forecast[2])
    assert not torch.allclose(model(x)[0], forecast[0])


@settings(max_examples=10)
@given(groups=st.lists(st.integers(-2, 3), min_size=1, max_size=8), seed=st.integers(0, 100), hide=st.booleans())
def test_a_group_is_the_same_by_itself(groups: list[int], seed: int, hide: bool) -> None:
    model = small()
    torch.manual_seed(seed)
    x, of = torch.randn(len(groups), 24, 1), torch.tensor(groups)
    if hide:
        x = x.masked_fill(torch.rand(len(groups), 4, 1).repeat_interleave(6, 1) < 0.3, torch.nan)
    forecast = model(x, groups=of)
    for group in set(groups):
        alone = model(x[of == group], groups=torch.zeros(groups.count(group), dtype=torch.int32))
        assert_close(alone, forecast[of == group])
    order = torch.randperm(len(groups))
    assert_close(model(x[order], groups=of[order]), forecast[order])


def test_the_columns_of_a_row_are_a_group() -> None:
    one, three, x = small(), small(3), torch.randn(2, 24, 3)
    groups = torch.arange(2).repeat_interleave(3)
    rows = one(x.transpose(1, 2).flatten(0, 1)[..., None], groups=groups)
    assert_close(rows.view(2, 3, 9).transpose(1, 2), three(x))
    assert_close(three(x[..., [2, 0, 1]]), three(x)[..., [2, 0, 1]])


def test_groups_join_rows_with_all_their_columns() -> None:
    three, six = small(3), small(6)
    x = torch.randn(2, 24, 3)
    together = three(x, groups=torch.tensor([1, 1]))
    assert_close(torch.cat([together[:1], together[1:]], 2), six(torch.cat([x[:1], x[1:]], 2)))


def test_what_is_known_of_the_horizon_tells_covariates_apart() -> None:
    model, x = small(1, past=1, future=1), torch.randn(2, 24, 2)
    future = torch.randn(2, 33, 1)
    forecast = model(x, future=future)
    assert_close(
        small(2, future=1)(x, future=future)[..., :1], forecast
    )  # a past-only covariate is a target that nobody asks for
    future[:, 30:] += 1.0
    assert not torch.allclose(model(x, future=future)[:, :6], forecast[:, :6])


def test_a_look_back_that_is_missing_in_front_is_a_shorter_one() -> None:
    model, x = small(2), torch.randn(2, 24, 2)
    short = model(x[:, 8:])
    x[:, :8] = torch.nan
    assert_close(model(x), short)


def test_a_patch_without_values_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(2), torch.randn(2, 24, 2)
    counts: list[int] = []
    monkeypatch.setattr(_group, "attention_masks", lambda *ids: counts.append(len(ids[0])) or attention_masks(*ids))
    model(x)
    x[0, :13, 1] = torch.nan
    model(x)
    assert counts == [2 * 2 * (4 + 2), 2 * 2 * (4 + 2) - 2]


attention_masks = _group.attention_masks


def dense(*ids: Tensor) -> tuple[masks.Mask, masks.Mask]:
    return tuple(masks.Dense(mask.ids[:, None] == mask.ids) for mask in attention_masks(*ids))  # type: ignore[return-value]


@pytest.mark.parametrize("hide", [False, True])
def test_it_is_attention_among_all_under_a_dense_mask(
    hide: bool, monkeypatch: pytest.MonkeyPatch, precision: torch.dtype
) -> None:
    model, x = small(2, past=1), torch.randn(3, 24, 3)
    if hide:
        x[0, :13, 1] = x[2, :, 2] = torch.nan
    groups = torch.tensor([0, 1, 0])
    packed = model(x, groups=groups)
    monkeypatch.setattr(_group, "attention_masks", dense)
    assert_close(model(x, groups=groups), packed)


def test_along_time_and_in_the_group() -> None:
    series, patch = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    time, group = attention_masks(series, patch, torch.tensor([7, 7, 7, 3]))
    where = xf.Timeline(patch)
    assert time.dense(where).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert group.dense(where).int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("hide", [False, True])
def test_work_is_that_of_the_pairs_in_series_and_groups(hide: bool) -> None:
    """256 series in groups of 4, 12 patches each: neither dense nor in chunks, and no pair for nothing."""
    exists = torch.rand(256, 12) < 0.7 if hide else torch.ones(256, 12, dtype=torch.bool)
    series, patch = exists.nonzero().unbind(1)
    for mask, sizes in zip(
        attention_masks(series, patch, series // 4),
        (exists.sum(1), exists.view(64, 4, 12).sum(1).flatten()),
        strict=True,
    ):
        plan = xf.plan(mask, xf.Timeline(patch), heads=8, head_dim=16)
        assert plan.kernel == ("packed" if hide else "blocks")
        pairs = plan.flops / (2 * 8 * (16 + 16))
        assert sizes.square().sum() <= pairs <= (3 if hide else 1) * sizes.square().sum()


def test_groups_that_do_not_fit_are_refused() -> None:
    model, x = small(), torch.randn(3, 24, 1)
    with pytest.raises(TypeError, match=r"groups must be a tensor of integers; got torch\.float64"):
        model(x, groups=torch.zeros(3))
    with pytest.raises(TypeError, match="groups must be a tensor of integers; got list"):
        model(x, groups=[0, 0, 0])
    with pytest.raises(ValueError, match=r"groups must be one number for each of the 3 rows of x; got \(2,\)"):
        model(x, groups=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="GroupTransformer has no use for static"):
        ts.GroupTransformer(1, 24, 6, static=1)


@torch.no_grad()  # under autograd Dynamo warns of itself at graph breaks
def test_a_compiled_model_agrees() -> None:
    torch.compiler.reset()
    model, x = small(2), torch.randn(3, 24, 2)
    compiled = torch.compile(model, backend="eager")
    groups = torch.tensor([0, 1, 0])
    assert_close(compiled(x, groups=groups), model(x, groups=groups))
    x[0, :12] = torch.nan
    assert_close(compiled(x, groups=groups), model(x, groups=groups))
