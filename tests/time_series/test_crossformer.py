"""Crossformer beyond the contract: two axes of one grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xformerlib as xf
from tests.closeness import assert_close
from tests.time_series.test_contract import redraw
from xformerlib import masks, time_series as ts

pytestmark = pytest.mark.usefixtures("double")


def small(**options: Any) -> ts.Crossformer:
    sizes = {"segment": 6, "dim": 8, "depth": 1, "heads": 2, "hidden": 16, "dropout": 0.0}
    model = ts.Crossformer(3, 24, 6, **{**sizes, **options})
    redraw(model)
    return model.eval()


def test_forecasts_move_with_level_and_scale() -> None:
    # The epsilon of the norm does not scale: beside deviations so large it is nothing.
    model, x = small(), 1e6 * torch.randn(2, 24, 3)
    assert_close(model(100 * x + 7e6), 100 * model(x) + 7e6)


def test_it_is_its_formula(precision: torch.dtype) -> None:
    """A block on each variable by itself, then one on each segment by itself."""
    model, x = small(), torch.randn(2, 24, 3)
    over_time, over_variables = model.encoder.blocks
    level, scale = x.mean(1, keepdim=True), (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    z = torch.cat([(x - level) / scale, torch.zeros(2, 6, 3)], 1).transpose(1, 2)
    tokens = model.norm(model.embed(z.unflatten(2, (5, 6))) + model.position.table.view(3, 5, 8))
    over_time.attention.mask = over_variables.attention.mask = None
    tokens = torch.stack([over_time(tokens[:, v]) for v in range(3)], 1)
    tokens = torch.stack([over_variables(tokens[:, :, s]) for s in range(5)], 2)
    forecast = model.project(tokens[:, :, -1]).transpose(1, 2) * scale + level
    over_time.attention.mask, over_variables.attention.mask = masks.Axial(1), masks.Axial(0)
    assert_close(model(x), forecast)


def test_the_masks_take_turns() -> None:
    model = small(depth=3)
    assert [block.attention.mask for block in model.encoder.blocks] == [masks.Axial(1), masks.Axial(0)] * 3


def test_variables_have_no_order_beside_their_positions() -> None:
    model, x = small(depth=2), torch.randn(2, 24, 3)
    forecast, order = model(x), [2, 0, 1]
    with torch.no_grad():
        model.position.table.copy_(model.position.table.view(3, 5, 8)[order].flatten(0, 1))
    assert_close(model(x[..., order]), forecast[..., order])


def test_variables_see_each_other() -> None:
    model, x = small(), torch.randn(2, 24, 3)
    other = x.clone()
    other[..., 1] = torch.randn(2, 24)
    assert not torch.allclose(model(other)[..., 0], model(x)[..., 0])


@pytest.mark.parametrize(("segment", "count"), [(6, 5), (5, 7), (7, 5), (24, 2), (30, 2)])
def test_a_segment_begins_with_the_horizon(segment: int, count: int) -> None:
    model, x = small(segment=segment), torch.randn(2, 24, 3).requires_grad_()
    assert model.grid.sizes == (3, count)
    model(x).square().sum().backward()
    assert x.grad is not None and (x.grad.abs().amin(1) > 0).all()


def test_a_segment_without_values_is_attended_to_by_nobody() -> None:
    model, x = small(depth=2), torch.randn(1, 24, 3)
    x[:, 6:12, 0] = torch.nan
    before = model(x)
    with torch.no_grad():
        model.position.table[1] += 100.0
    assert_close(model(x), before)
    assert not torch.allclose(model(x.nan_to_num(0.0)), before)


def test_a_covariate_without_values_is_attended_to_by_nobody() -> None:
    model, x = small(depth=2, past=1), torch.randn(1, 24, 4)
    x[..., 3] = torch.nan
    before = model(x)
    with torch.no_grad():
        model.position.table[15:] += 100.0
    assert_close(model(x), before)


@pytest.mark.parametrize("axis", [0, 1])
def test_both_axes_are_computed_as_blocks(axis: int) -> None:
    model = ts.Crossformer(64, 384, 96, dim=32)
    plan = xf.explain(model.encoder, model.grid)[f"blocks.{1 - axis}.attention"]
    assert plan.kernel == "blocks"
    pairs = plan.flops / (2 * 4 * (8 + 8))
    assert model.grid.sizes == (64, 40) and pairs == 64 * 40 * (64, 40)[axis]


def test_a_compiled_model_agrees() -> None:
    torch.compiler.reset()
    model, x = small(), torch.randn(2, 24, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), model(x))
    x[0, :12] = torch.nan
    assert_close(compiled(x), model(x))
