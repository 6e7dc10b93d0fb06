"""TimeXer beyond the contract: what is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import xformerlib as xf
from tests.closeness import assert_close
from tests.time_series.test_contract import redraw
from xformerlib import masks, time_series as ts

pytestmark = pytest.mark.usefixtures("double")


def small(channels: int = 3, **options: Any) -> ts.TimeXer:
    sizes = {"patch": 6, "dim": 8, "depth": 1, "heads": 2, "hidden": 16, "dropout": 0.0}
    model = ts.TimeXer(channels, 24, 6, **{**sizes, **options})
    redraw(model)
    return model.eval()


def test_forecasts_move_with_level_and_scale() -> None:
    # The epsilon of the norm does not scale: beside deviations so large it is nothing.
    model, x = small(), 1e6 * torch.randn(2, 24, 3)
    assert_close(model(100 * x + 7e6), 100 * model(x) + 7e6)


def test_it_is_its_formula(precision: torch.dtype) -> None:
    """The paper's layer: patches and the global token attend to each other, then the global token alone to whole series."""
    model, x = small(), torch.randn(2, 24, 3)
    block = model.decoder.blocks[0]
    nn.init.zeros_(block.cross_attention.out.bias)  # the one thing that reaches patches, too
    level, scale = x.mean(1, keepdim=True), (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    z = ((x - level) / scale).transpose(1, 2)
    forecast = torch.empty(2, 6, 3)
    for b in range(2):
        others = model.variates.embed(z[b])
        for c in range(3):
            tokens = model.position(model.embed(z[b, c].view(4, 6)), xf.Sequence(4))
            tokens = torch.cat([tokens, model.global_token[c]])
            tokens = block.attention_residual.norm(tokens + attend(block.attention, tokens, tokens))
            seen = attend(block.cross_attention, tokens[-1:], others)
            tokens = block.cross_residual.norm(torch.cat([tokens[:-1], tokens[-1:] + seen]))
            tokens = model.decoder.norm(block.feed_forward_residual.norm(tokens + block.feed_forward(tokens)))
            forecast[b, :, c] = model.project(tokens.flatten()) * scale[b, 0, c] + level[b, 0, c]
    assert_close(model(x), forecast)


def attend(layer: xf.Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        F.linear(y, w, b)
        for y, w, b in zip((x, context, context), layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    )
    q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(0, 1) for y in (q, k, v))
    return layer.out(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


def test_other_series_come_in_through_the_global_token_alone() -> None:
    model, x = small(1, past=2), torch.randn(2, 24, 3)
    other = x.clone()
    other[..., 1:] = torch.randn(2, 24, 2)
    assert not torch.allclose(model(other), model(x))
    with torch.no_grad():
        model.project.weight.view(6, 5, 8)[:, -1] = 0  # the head no longer reads global tokens
    assert_close(model(other), model(x))


@pytest.mark.parametrize(
    ("channels", "covariates", "columns", "tokens"),
    [(3, {}, 3, 3), (3, {"past": 2, "future": 1}, 5, 6), (1, {}, 1, 1), (1, {"past": 2}, 2, 2), (1, {"future": 2, "static": 3}, 0, 3)],
)  # fmt: skip
def test_which_series_are_exogenous(channels: int, covariates: dict[str, int], columns: int, tokens: int) -> None:
    model = small(channels, **covariates)
    assert (model.variates.embed is not None) == (columns > 0)
    given = {"x": torch.randn(2, 24, channels + model.past)}
    if model.future:
        given["future"] = torch.randn(2, 30, model.future)
    if model.static:
        given["static"] = torch.randn(2, model.static)
    seen = []
    model.variates.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    assert model(**given).shape == (2, 6, channels)
    assert seen == [(2, tokens, 8)]


def test_targets_have_no_order() -> None:
    model, x = small(), torch.randn(2, 24, 3)
    forecast, order = model(x), [2, 0, 1]
    with torch.no_grad():
        model.global_token.copy_(model.global_token[order].clone())
    assert_close(model(x[..., order]), forecast[..., order])


def test_a_series_without_values_is_attended_to_by_nobody() -> None:
    model, without = small(1, past=2), small(1, past=1)
    without.load_state_dict(model.state_dict())
    x = torch.randn(2, 24, 3)
    x[0, :, 1] = torch.nan
    assert_close(model(x)[:1], without(x[:1, :, [0, 2]]))


def test_a_patch_without_values_is_attended_to_by_nobody() -> None:
    model, x = small(2), torch.randn(1, 24, 2)
    x[:, 6:12, 0] = torch.nan
    with torch.no_grad():
        model.project.weight.view(6, 5, 8)[:, 1] = 0  # nor read by the head
    before = model(x)
    model.embed.register_forward_hook(lambda module, args, out: out.index_fill(2, torch.tensor([1]), 5.0))
    after = model(x)
    assert_close(after[..., 0], before[..., 0])
    assert not torch.allclose(after[..., 1], before[..., 1])


@pytest.mark.parametrize("patch", [5, 7, 24, 30])
def test_the_last_steps_count_whatever_the_patch(patch: int) -> None:
    model, x = small(patch=patch), torch.randn(2, 24, 3)
    x.requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None and (x.grad.abs().amin(1) > 0).all()


def test_targets_are_computed_as_blocks() -> None:
    model = ts.TimeXer(321, 96, 96)
    plan = xf.plan(masks.Axial(1), model.grid, heads=8, head_dim=32)
    assert plan.kernel == "blocks"
    pairs = plan.flops / (2 * 8 * (32 + 32))
    assert pairs == 321 * 7 * 7


def test_a_compiled_model_agrees() -> None:
    torch.compiler.reset()
    model, x = small(), torch.randn(2, 24, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), model(x))
    x[0, :12] = torch.nan
    x[1, :, 0] = torch.nan
    assert_close(compiled(x), model(x))
