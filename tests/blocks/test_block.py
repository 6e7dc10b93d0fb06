"""Feed-forward layers and blocks equal their formulas; stochastic depth."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import xformerlib as xf
from tests.blocks.formulas import (
    DIM,
    HEADS,
    HIDDEN,
    NORMS,
    attended,
    block_formula,
    fed_forward,
    redrawn,
    tokens,
)
from tests.closeness import assert_close
from xformerlib import masks, positions


def assert_share(drawn: Tensor, p: float) -> None:
    """As many are true as if each had been drawn with probability ``p``: six standard errors at most from it."""
    assert abs(float(drawn.double().mean()) - p) < 6 * math.sqrt(p * (1 - p) / drawn.numel())


# -- feed-forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu", "geglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_is_its_formula(activation: str, bias: bool) -> None:
    layer, x = redrawn(xf.FeedForward(DIM, hidden=HIDDEN, activation=activation, bias=bias)), tokens(2, 5)
    assert (layer.up.bias is not None, layer.down.bias is not None) == (bias, bias)
    assert_close(layer(x), fed_forward(layer, x))


@pytest.mark.parametrize("activation", [nn.Tanh(), torch.tanh], ids=["module", "function"])
def test_feed_forward_with_any_activation(activation: Any) -> None:
    layer, x = redrawn(xf.FeedForward(DIM, hidden=HIDDEN, activation=activation)), tokens(2, 5)
    assert_close(layer(x), layer.down(torch.tanh(layer.up(x))))


def test_gated_units_are_two_thirds_as_wide_unless_told() -> None:
    assert xf.FeedForward(96).hidden == 384
    for activation in ("swiglu", "geglu"):
        layer = xf.FeedForward(96, activation=activation)
        assert layer.hidden == 256
        assert sum(p.numel() for p in layer.parameters() if p.ndim == 2) == sum(
            p.numel() for p in xf.FeedForward(96).parameters() if p.ndim == 2
        )
        assert xf.FeedForward(100, activation=activation).hidden % 8 == 0
        assert xf.FeedForward(96, activation=activation, hidden=7).hidden == 7


def test_feed_forward_drops_hidden_channels_in_training() -> None:
    layer = redrawn(xf.FeedForward(DIM, hidden=1000, activation="relu", dropout=0.25))
    seen: list[Tensor] = []
    layer.down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = tokens(50)
    layer(x)
    layer.eval()(x)
    dropped = (seen[0] == 0) & (seen[1] > 0)
    assert_share(dropped[seen[1] > 0], 0.25)
    assert_close(seen[0][~dropped] * 0.75, seen[1][~dropped])


# -- block -----------------------------------------------------------------------------------------------------------------


def test_the_block_of_the_lecture() -> None:
    """softmax(QK'/sqrt(d))V, residual, LayerNorm, ReLU feed-forward, residual, LayerNorm: one configuration of Block."""
    block = redrawn(xf.Block(DIM, HEADS, norm="post", activation="relu", hidden=HIDDEN))
    x, d = tokens(3, 7), DIM // HEADS
    w, b = block.attention.qkv.weight, block.attention.qkv.bias
    Q, K, V = (
        (x @ w[i * DIM : (i + 1) * DIM].T + b[i * DIM : (i + 1) * DIM]).reshape(3, 7, HEADS, d).transpose(1, 2)
        for i in range(3)
    )
    A = torch.softmax(Q @ K.transpose(-2, -1) / d**0.5, -1) @ V
    attention = A.transpose(1, 2).reshape(3, 7, DIM) @ block.attention.out.weight.T + block.attention.out.bias

    def norm(z: Tensor, layer: nn.LayerNorm) -> Tensor:
        mean, variance = z.mean(-1, keepdim=True), z.var(-1, unbiased=False, keepdim=True)
        return (z - mean) / torch.sqrt(variance + 1e-5) * layer.weight + layer.bias

    z = norm(x + attention, block.attention_residual.norm)
    W1, b1, W2, b2 = block.feed_forward.parameters()
    y = norm(z + torch.maximum(z @ W1.T + b1, torch.zeros(())) @ W2.T + b2, block.feed_forward_residual.norm)
    assert_close(block(x), y)


@given(
    st.sampled_from(NORMS), st.sampled_from(["layer", "rms"]), st.sampled_from([None, 0.1]), st.booleans(),
    st.sampled_from([1, 2, 4]), st.sampled_from(["relu", "gelu", "swiglu", "geglu"]), st.sampled_from([masks.Full(), masks.Causal()]),
    st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
def test_every_arrangement_is_its_formula(
    norm: Any,
    norm_layer: Any,
    scale: float | None,
    cross: bool,
    kv_heads: int,
    activation: str,
    mask: masks.Mask,
    dtype: torch.dtype,
) -> None:
    block = redrawn(
        xf.Block(
            DIM,
            HEADS,
            norm=norm,
            norm_layer=norm_layer,
            layer_scale=scale,
            cross=cross,
            kv_heads=kv_heads,
            hidden=HIDDEN,
            activation=activation,
            mask=mask,
        ),
        dtype,
    )
    x, context = tokens(2, 5, dtype=dtype), tokens(2, 8, dtype=dtype) if cross else None
    wanted = block_formula(block, norm, x, context, mask.dense(xf.Sequence(5)))
    assert_close(block(x, context=context), wanted, depth=3)  # three branches
    assert_close(block(x[0], context=None if context is None else context[0]), wanted[0], depth=3)


def test_layer_scale_starts_where_it_is_told() -> None:
    block, x = xf.Block(DIM, HEADS, norm="pre", layer_scale=0.0), torch.randn(2, 5, DIM)
    assert torch.equal(block(x), x)
    block = xf.Block(DIM, HEADS, layer_scale=1e-4, cross=True)
    scales = {name: p for name, p in block.named_parameters() if name.endswith("scale")}
    assert len(scales) == 3
    assert all(torch.equal(p, torch.full((DIM,), 1e-4)) for p in scales.values())


def test_norms_may_be_callables() -> None:
    block = redrawn(
        xf.Block(
            DIM, HEADS, norm="sandwich", norm_layer=partial(nn.LayerNorm, eps=0.5), hidden=HIDDEN, activation="relu"
        )
    )
    x = tokens(2, 5)
    assert [norm.eps for norm in block.modules() if isinstance(norm, nn.LayerNorm)] == [0.5] * 4
    assert_close(block(x), block_formula(block, "sandwich", x, None, None))
    bare = redrawn(xf.Block(DIM, HEADS, norm_layer=lambda dim: nn.Identity(), hidden=HIDDEN, activation="relu"))
    y = x + attended(bare.attention, x)
    assert_close(bare(x), y + fed_forward(bare.feed_forward, y))


def test_every_attention_of_a_block_has_the_options_but_only_self_attention_has_the_place() -> None:
    block = xf.Block(
        DIM,
        HEADS,
        cross=True,
        mask=masks.Causal(),
        position=positions.Rotary(4),
        qk_norm="rms",
        gate=True,
        qkv_bias=False,
    )
    assert (block.attention.mask, block.cross_attention.mask) == (masks.Causal(), None)
    assert block.cross_attention.position is None
    for layer in (block.attention, block.cross_attention):
        assert layer.gate is not None
        assert layer.qkv.bias is None
        assert isinstance(layer.query_norm, nn.RMSNorm)


# -- stochastic depth --------------------------------------------------------------------------------------------------------


def test_drop_path_drops_whole_items_and_keeps_the_expectation() -> None:
    drop, x = xf.DropPath(0.25), torch.randn(4000, 3, 2)
    factors = drop(x, xf.Sequence(3)) / x
    per_row = factors[:, 0, 0]
    assert_close(factors, per_row[:, None, None].expand_as(x), "factors of one item")
    kept = per_row > 0
    assert_close(per_row[kept], torch.full((int(kept.sum()),), 4 / 3), "factor of what is kept")
    assert_share(kept, 0.75)  # and with it the mean of the factors, 1


def test_drop_path_drops_packed_items() -> None:
    lengths = [3, 0, 1, 5] * 500
    domain, drop = xf.Sequence.packed(lengths, prefix=1), xf.DropPath(0.5)
    items = drop(torch.ones(domain.num_tokens, 2), domain).split([length + 1 for length in lengths])
    first = torch.stack([item[0, 0] for item in items])
    assert all(torch.equal(item, item[:1, :1].expand_as(item)) for item in items)
    assert set(first.tolist()) == {0.0, 2.0}
    assert_share(first > 0, 0.5)


def test_drop_path_of_one_item_and_of_rows_of_packed_items() -> None:
    drop = xf.DropPath(0.5)
    for _ in range(10):
        one = drop(torch.ones(3, 2), xf.Sequence(3))
        assert one.unique().numel() == 1
    many = drop(torch.ones(200, 5, 2), xf.Sequence.packed([2, 3]))
    assert torch.equal(many[:, :1].expand(-1, 2, -1), many[:, :2])
    assert torch.equal(many[:, 2:3].expand(-1, 3, -1), many[:, 2:])
    assert {tuple(row) for row in many[:, [0, 2], 0].tolist()} == {(0.0, 0.0), (0.0, 2.0), (2.0, 0.0), (2.0, 2.0)}


def test_drop_path_does_nothing_in_evaluation_and_repeats_for_a_seed() -> None:
    drop, x, domain = xf.DropPath(0.5), torch.randn(64, 3, 2), xf.Sequence(3)
    assert drop.eval()(x, domain) is x
    assert xf.DropPath(0.0)(x, domain) is x
    drop.train()
    first = torch.random.manual_seed(7) and drop(x, domain)
    assert torch.equal(torch.random.manual_seed(7) and drop(x, domain), first)
    assert not torch.equal(drop(x, domain), first)


def test_an_item_whose_branches_are_dropped_passes_unchanged() -> None:
    block = xf.Block(DIM, HEADS, drop_path=0.5)
    x = torch.randn(640, 5, DIM)
    out = block(x)
    unchanged = (out == x).flatten(1).all(1)
    assert_share(unchanged, 0.25)
    assert not torch.equal(block.eval()(x)[unchanged], x[unchanged])


@pytest.mark.parametrize(("depth", "rates"), [(1, [0.2]), (2, [0.0, 0.2]), (5, [0.0, 0.05, 0.1, 0.15, 0.2])])
def test_drop_path_rises_to_the_last_block(depth: int, rates: list[float]) -> None:
    encoder = xf.Encoder(DIM, depth, HEADS, drop_path=0.2)
    for residual in ("attention_residual", "feed_forward_residual"):
        assert [getattr(block, residual).drop_path.p for block in encoder.blocks] == pytest.approx(rates)


def test_drop_path_of_each_block_may_be_listed() -> None:
    encoder = xf.Encoder(DIM, 3, HEADS, drop_path=[0.3, 0.0, 0.1])
    assert [block.attention_residual.drop_path.p for block in encoder.blocks] == [0.3, 0.0, 0.1]
    assert [block.feed_forward_residual.drop_path.p for block in encoder.blocks] == [0.3, 0.0, 0.1]


def test_inner_norms_stand_before_the_second_maps() -> None:
    block, x = redrawn(xf.Block(DIM, HEADS, hidden=HIDDEN, hidden_norm="layer", out_norm="rms")), tokens(2, 5)
    seen: dict[str, Tensor] = {}
    block.feed_forward.norm.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0]))
    block.attention.out_norm.register_forward_pre_hook(lambda _, inputs: seen.update(heads=inputs[0]))
    block(x)
    own, plain = block.feed_forward, redrawn(xf.FeedForward(DIM, hidden=HIDDEN))
    plain.load_state_dict({k: v for k, v in own.state_dict().items() if not k.startswith("norm")})
    assert seen["hidden"].shape == (2, 5, HIDDEN) and seen["heads"].shape == (2, 5, DIM)
    y = tokens(2, 5)
    h = torch.nn.functional.gelu(y @ own.up.weight.T + own.up.bias)
    assert_close(own(y), own.norm(h) @ own.down.weight.T + own.down.bias)
    assert float((own(y) - plain(y)).detach().abs().max()) > 0.1


def test_checkpoints_change_nothing_but_memory() -> None:
    plain, x = redrawn(xf.Encoder(DIM, 3, HEADS, dropout=0.2, drop_path=0.3, mask=masks.Local(2))), tokens(4, 7)
    again = xf.Encoder(DIM, 3, HEADS, dropout=0.2, drop_path=0.3, mask=masks.Local(2), checkpoint=True).double()
    again.load_state_dict(plain.state_dict())
    kept: list[int] = []
    results = []
    for encoder in (plain, again):
        torch.manual_seed(0)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            y = encoder(x)
        kept.append(sum(sizes))
        y.square().sum().backward()
        results.append([y, *(p.grad for p in encoder.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert kept[1] < kept[0] / 5
