"""Blocks and stacks of them equal their formulas, whatever they are given and however it is padded, packed or batched."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import xformerlib as xf
from xformerlib import masks, positions

DIM, HEADS, HIDDEN = 16, 4, 20
NORMS = ["pre", "post", "sandwich", "parallel"]


def redrawn(module: Any) -> Any:
    """The module in fp64, every parameter drawn anew, so that norms, biases and scales count."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module.double()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def assert_equal(got: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == wanted.shape
    got, wanted = got.detach(), wanted.detach()
    if wanted.numel():
        assert float((got - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


# -- the formulas ----------------------------------------------------------------------------------------------------------


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    if isinstance(norm, nn.RMSNorm):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def attended(layer: xf.Attention, x: Tensor, context: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
    """softmax(Q K' / sqrt(d)) V for each head, and the output projection."""
    source, d = x if context is None else context, layer.head_dim
    rows = layer.heads * d, layer.kv_heads * d, layer.kv_heads * d
    (w_q, w_k, w_v), (b_q, b_k, b_v) = layer.qkv.weight.split(rows), layer.qkv.bias.split(rows)
    q, k, v = x @ w_q.T + b_q, source @ w_k.T + b_k, source @ w_v.T + b_v
    heads = []
    for h in range(layer.heads):
        own, shared = slice(h * d, (h + 1) * d), h // (layer.heads // layer.kv_heads)
        from_ = slice(shared * d, (shared + 1) * d)
        scores = q[..., own] @ k[..., from_].transpose(-2, -1) / d**0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        heads.append(torch.softmax(scores, -1) @ v[..., from_])
    return torch.cat(heads, -1) @ layer.out.weight.T + layer.out.bias


def fed_forward(layer: xf.FeedForward, x: Tensor) -> Tensor:
    h = x @ layer.up.weight.T + (0 if layer.up.bias is None else layer.up.bias)
    if layer.gated:
        gate, h = h[..., : layer.hidden], h[..., layer.hidden :]
        h = (gate * torch.sigmoid(gate) if layer.activation == "swiglu" else exact_gelu(gate)) * h
    else:
        h = {"relu": lambda h: h.clamp(min=0), "gelu": exact_gelu}[layer.activation](h)
    return h @ layer.down.weight.T + (0 if layer.down.bias is None else layer.down.bias)


def exact_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def block_formula(block: xf.Block, kind: str, x: Tensor, context: Tensor | None, allowed: Tensor | None) -> Tensor:
    branches: list[tuple[Callable[[Tensor], Tensor], Any]] = [
        (lambda y: attended(block.attention, y, None, allowed), block.attention_residual)
    ]
    if context is not None:
        branches.append((lambda y: attended(block.cross_attention, y, context), block.cross_residual))
    branches.append((lambda y: fed_forward(block.feed_forward, y), block.feed_forward_residual))
    if kind == "parallel":
        first = branches[0][1]
        y = normed(x, first.norm)
        return x + sum(f(y) for f, _ in branches) * (1 if first.scale is None else first.scale)
    for f, residual in branches:
        y = f(x if kind == "post" else normed(x, residual.norm))
        y = normed(y, residual.branch_norm) if kind == "sandwich" else y
        x = x + y * (1 if residual.scale is None else residual.scale)
        x = normed(x, residual.norm) if kind == "post" else x
    return x


# -- feed-forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu", "geglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_is_its_formula(activation: str, bias: bool) -> None:
    layer, x = redrawn(xf.FeedForward(DIM, hidden=HIDDEN, activation=activation, bias=bias)), tokens(2, 5)
    assert (layer.up.bias is not None, layer.down.bias is not None) == (bias, bias)
    assert_equal(layer(x), fed_forward(layer, x))


@pytest.mark.parametrize("activation", [nn.Tanh(), torch.tanh], ids=["module", "function"])
def test_feed_forward_with_any_activation(activation: Any) -> None:
    layer, x = redrawn(xf.FeedForward(DIM, hidden=HIDDEN, activation=activation)), tokens(2, 5)
    assert_equal(layer(x), layer.down(torch.tanh(layer.up(x))))


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
    assert float(dropped.sum() / (seen[1] > 0).sum()) == pytest.approx(0.25, abs=0.02)
    assert_equal(seen[0][~dropped] * 0.75, seen[1][~dropped])


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
    assert_equal(block(x), y)


@given(
    st.sampled_from(NORMS), st.sampled_from(["layer", "rms"]), st.sampled_from([None, 0.1]), st.booleans(),
    st.sampled_from([1, 2, 4]), st.sampled_from(["relu", "gelu", "swiglu", "geglu"]), st.sampled_from([masks.Full(), masks.Causal()]),
)  # fmt: skip
def test_every_arrangement_is_its_formula(
    norm: Any, norm_layer: Any, scale: float | None, cross: bool, kv_heads: int, activation: str, mask: masks.Mask
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
        )
    )
    x, context = tokens(2, 5), tokens(2, 8) if cross else None
    wanted = block_formula(block, norm, x, context, mask.dense(xf.Sequence(5)))
    assert_equal(block(x, context=context), wanted)
    assert_equal(block(x[0], context=None if context is None else context[0]), wanted[0])


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
    assert_equal(block(x), block_formula(block, "sandwich", x, None, None))
    bare = redrawn(xf.Block(DIM, HEADS, norm_layer=lambda dim: nn.Identity(), hidden=HIDDEN, activation="relu"))
    y = x + attended(bare.attention, x)
    assert_equal(bare(x), y + fed_forward(bare.feed_forward, y))


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
    assert torch.allclose(factors, per_row[:, None, None].expand_as(x), atol=1e-6)
    kept = per_row > 0
    assert torch.allclose(per_row[kept], torch.tensor(4 / 3))
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.03)


def test_drop_path_drops_packed_items() -> None:
    lengths = [3, 0, 1, 5] * 500
    domain, drop = xf.Sequence.packed(lengths, prefix=1), xf.DropPath(0.5)
    items = drop(torch.ones(domain.num_tokens, 2), domain).split([length + 1 for length in lengths])
    first = torch.stack([item[0, 0] for item in items])
    assert all(torch.equal(item, item[:1, :1].expand_as(item)) for item in items)
    assert set(first.tolist()) == {0.0, 2.0}
    assert float(first.mean()) == pytest.approx(1.0, abs=0.1)


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
    x = torch.randn(64, 5, DIM)
    out = block(x)
    unchanged = (out == x).flatten(1).all(1)
    assert 0.1 < float(unchanged.float().mean()) < 0.45  # a quarter
    assert not torch.equal(block.eval()(x)[unchanged], x[unchanged])


@pytest.mark.parametrize(("depth", "rates"), [(1, [0.2]), (2, [0.0, 0.2]), (5, [0.0, 0.05, 0.1, 0.15, 0.2])])
def test_drop_path_rises_to_the_last_block(depth: int, rates: list[float]) -> None:
    encoder = xf.Encoder(DIM, depth, HEADS, drop_path=0.2)
    for residual in ("attention_residual", "feed_forward_residual"):
        assert [getattr(block, residual).drop_path.p for block in encoder.blocks] == pytest.approx(rates)


# -- stacks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("final", [None, True, False])
def test_an_encoder_is_its_blocks_and_a_norm(norm: Any, final: bool | None) -> None:
    encoder = redrawn(xf.Encoder(DIM, 3, HEADS, norm=norm, final_norm=final, hidden=HIDDEN))
    x = y = tokens(2, 5)
    for block in encoder.blocks:
        y = block_formula(block, norm, y, None, None)
    has_norm = norm != "post" if final is None else final
    assert isinstance(encoder.norm, nn.LayerNorm) is has_norm
    assert_equal(encoder(x), normed(y, encoder.norm))


@pytest.mark.parametrize("norm", NORMS)
def test_encoder_and_decoder_are_their_formulas(norm: Any) -> None:
    model = redrawn(xf.EncoderDecoder(DIM, HEADS, encoder_depth=2, decoder_depth=3, norm=norm, hidden=HIDDEN))
    source, target = x, y = tokens(2, 7), tokens(2, 5)
    for block in model.encoder.blocks:
        x = block_formula(block, norm, x, None, None)
    x = normed(x, model.encoder.norm)
    for block in model.decoder.blocks:
        y = block_formula(block, norm, y, x, masks.Causal().dense(xf.Sequence(5)))
    wanted = normed(y, model.decoder.norm)
    assert_equal(model(source, target), wanted)
    assert_equal(model.decoder(target, context=model.encoder(source)), wanted)
    assert_equal(model(source[0], target[0]), wanted[0])


def test_the_defaults_of_the_whole_are_the_paper() -> None:
    model = xf.EncoderDecoder()
    assert [len(stack.blocks) for stack in (model.encoder, model.decoder)] == [6, 6]
    assert (
        model.encoder.dim,
        model.encoder.blocks[0].attention.heads,
        model.encoder.blocks[0].feed_forward.hidden,
    ) == (512, 8, 2048)
    assert {block.feed_forward.activation for block in (*model.encoder.blocks, *model.decoder.blocks)} == {"relu"}
    assert {block.attention.mask for block in model.decoder.blocks} == {masks.Causal()}
    assert {block.attention.mask for block in model.encoder.blocks} == {None}
    assert isinstance(model.encoder.norm, nn.Identity)


def test_a_decoder_alone_is_a_causal_encoder() -> None:
    decoder, x = redrawn(xf.Decoder(DIM, 2, HEADS, cross=False)), tokens(2, 5)
    encoder = redrawn(xf.Encoder(DIM, 2, HEADS, mask=masks.Causal()))
    encoder.load_state_dict(decoder.state_dict())
    assert torch.equal(encoder(x), decoder(x))


def test_masks_of_each_layer_and_of_each_call() -> None:
    layers = [masks.Local(1), None, masks.Causal()]
    encoder, x, extra = redrawn(xf.Encoder(DIM, 3, HEADS, mask=layers)), tokens(2, 6), masks.Windows(4)
    for given_mask in (None, extra):
        y = x
        for block, own in zip(encoder.blocks, layers, strict=True):
            mask = masks.Full() if own is None else own
            mask = mask if given_mask is None else mask & given_mask
            y = block_formula(block, "pre", y, None, mask.dense(xf.Sequence(6)))
        assert_equal(encoder(x, mask=given_mask), normed(y, encoder.norm))


def test_masks_of_source_target_and_context() -> None:
    model = redrawn(xf.EncoderDecoder(DIM, HEADS, encoder_depth=1, decoder_depth=1))
    source, target = tokens(1, 6), tokens(1, 4)
    base = model(source, target)

    def changed(**given_masks: masks.Mask) -> bool:
        return not torch.equal(model(source, target, **given_masks), base)

    assert changed(source_mask=masks.Local(1))
    assert changed(mask=masks.Local(1))
    assert changed(context_mask=masks.Prefix(2))
    assert torch.equal(
        model(source, target, source_mask=masks.Full(), mask=masks.Causal(), context_mask=masks.Full()), base
    )
    # A source token that no target may see makes no difference, unless other source tokens look at it.
    hidden = {"source_mask": masks.Prefix(2), "context_mask": masks.Prefix(2)}
    moved = torch.cat([source[:, :2], tokens(1, 4)], 1)
    assert torch.equal(model(moved, target, **hidden), model(source, target, **hidden))
    assert not torch.equal(model(moved, target), base)


def test_a_position_is_shared_and_a_function_makes_one_for_each_layer() -> None:
    shared = xf.Encoder(DIM, 3, HEADS, position=positions.RelativeBias(HEADS))
    own = xf.Encoder(DIM, 3, HEADS, position=lambda: positions.RelativeBias(HEADS))
    tables = [[name for name, _ in model.named_parameters() if name.endswith("table")] for model in (shared, own)]
    assert tables == [["position.table"], [f"blocks.{i}.attention.position.table" for i in range(3)]]
    x = torch.randn(2, 5, DIM)
    with torch.no_grad():
        shared.position.table.normal_()
        own.load_state_dict(
            {name: value for name, value in shared.state_dict().items() if "position" not in name}, strict=False
        )
        for block in own.blocks:
            block.attention.position.table.copy_(shared.position.table)
    assert_equal(own(x), shared(x), 1e-6)
    with torch.no_grad():
        own.blocks[2].attention.position.table.zero_()
    assert not torch.allclose(own(x), shared(x), atol=1e-4)


def test_embeddings_are_added_once_and_rotations_and_biases_in_every_layer() -> None:
    position = positions.Sinusoidal(DIM) + positions.Rotary(DIM // HEADS) + positions.DistanceDecay(HEADS)
    encoder = redrawn(xf.Encoder(DIM, 2, HEADS, position=position))
    x, domain = tokens(2, 5), xf.Sequence(5)
    y = position.terms[0](x, domain)
    for block in encoder.blocks:
        y = block(y, domain, position=position.terms[1] + position.terms[2])
    assert_equal(encoder(x, domain), encoder.norm(y))
    assert not torch.allclose(encoder(x), redrawn(xf.Encoder(DIM, 2, HEADS))(x))


def test_encoder_and_decoder_learn_positions_of_their_own() -> None:
    model = xf.EncoderDecoder(DIM, HEADS, encoder_depth=1, decoder_depth=1, position=positions.RelativeBias(HEADS))
    encoder, decoder = model.encoder.position.table, model.decoder.position.table
    assert encoder is not decoder
    assert torch.equal(encoder, decoder)
    each = xf.EncoderDecoder(
        DIM, HEADS, encoder_depth=2, decoder_depth=1, position=lambda: positions.RelativeBias(HEADS)
    )
    assert len({id(p) for name, p in each.named_parameters() if name.endswith("table")}) == 3


def test_an_activation_that_learns_is_each_blocks_own() -> None:
    activation = nn.PReLU()
    encoder = xf.Encoder(DIM, 2, HEADS, activation=activation)
    assert sum(name.endswith("activation.weight") for name, _ in encoder.named_parameters()) == 2
    assert all(block.feed_forward.activation is not activation for block in encoder.blocks)


# -- padding, packing, batching --------------------------------------------------------------------------------------------

MASKS = [
    masks.Full(), masks.Causal(), masks.Local(2), masks.Causal() & masks.Local(1), masks.Local(1) | masks.Global(1),
    masks.Local(1, border="clamp"), masks.Dilated(1, 2), masks.Windows(3, shift=1), ~masks.Local(1), masks.Prefix(2) | masks.Local(0),
    masks.Expander(2, seed=0),
]  # fmt: skip
POSITIONS: list[Callable[[], positions.Position | None]] = [
    lambda: None,
    lambda: positions.Sinusoidal(DIM) + positions.Rotary(DIM // HEADS),
    lambda: positions.Learned(DIM, 32) + positions.DistanceDecay(HEADS),
    lambda: positions.RelativeBias(HEADS) + positions.ContinuousBias(HEADS, hidden=8),
]
OPTIONS: list[dict[str, Any]] = [
    {}, {"qk_norm": "rms", "kv_heads": 2}, {"gate": True, "layer_scale": 0.5}, {"sinks": True, "softcap": 5.0},
]  # fmt: skip
# The model is made when it is called: what draws random numbers has no place in a strategy.
models = st.builds(
    lambda norm, norm_layer, mask, position, more: lambda: redrawn(
        xf.Encoder(DIM, 2, HEADS, norm=norm, norm_layer=norm_layer, mask=mask, position=position(), hidden=HIDDEN, **more)
    ),
    st.sampled_from(NORMS), st.sampled_from(["layer", "rms"]), st.sampled_from(MASKS), st.sampled_from(POSITIONS),
    st.sampled_from(OPTIONS),
)  # fmt: skip
lengths = st.lists(st.integers(0, 7), min_size=1, max_size=4)


def gradients(model: nn.Module, out: Tensor, direction: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((out * direction).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@given(models, lengths, st.integers(0, 2), st.integers(0, 3))
def test_padding_changes_nothing(make: Callable[[], xf.Encoder], sizes: list[int], prefix: int, more: int) -> None:
    model = make()
    domain = xf.Sequence.padded(sizes, max(sizes) + more, prefix=prefix)
    items = [tokens(prefix + size) for size in sizes]
    x = torch.full((len(sizes), domain.num_tokens, DIM), torch.nan, dtype=torch.float64)
    for row, item in zip(x, items, strict=True):
        row[: len(item)] = item
    x.requires_grad_()
    out = model(x, domain)
    assert float(out.detach()[~domain.valid].abs().sum()) == 0
    direction = torch.randn_like(out)
    alone = [model(item, xf.Sequence(size, prefix=prefix)) for item, size in zip(items, sizes, strict=True)]
    for row, item in zip(out, alone, strict=True):
        assert_equal(row[: len(item)], item)
    (at_x,) = torch.autograd.grad((out * direction).sum(), x, retain_graph=True)
    assert bool(at_x.isfinite().all())
    assert float(at_x[~domain.valid].abs().sum()) == 0
    wanted = [gradients(model, item, along[: len(item)]) for item, along in zip(alone, direction, strict=True)]
    for got, parts in zip(gradients(model, out, direction), zip(*wanted, strict=True), strict=True):
        assert_equal(got, sum(parts), 1e-10)


@given(models, lengths, st.integers(0, 2))
def test_packing_changes_nothing(make: Callable[[], xf.Encoder], sizes: list[int], prefix: int) -> None:
    model = make()
    domain = xf.Sequence.packed(sizes, prefix=prefix)
    items = [tokens(prefix + size) for size in sizes]
    out = model(torch.cat(items), domain)
    for got, item, size in zip(out.split([len(item) for item in items]), items, sizes, strict=True):
        assert_equal(got, model(item, xf.Sequence(size, prefix=prefix)))


@given(models, st.integers(1, 6))
def test_what_else_is_in_the_batch_changes_nothing(make: Callable[[], xf.Encoder], length: int) -> None:
    model = make()
    x = tokens(4, length)
    together = model(x)
    for i in range(4):
        assert_equal(together[i], model(x[i]))
    x[0] = torch.nan
    assert_equal(model(x)[1:], together[1:])
    assert_equal(model(x[[2, 1]]), together[[2, 1]])


def test_packed_grids_and_graphs_are_each_alone() -> None:
    mask, position = masks.Local(1) | masks.Global(1), positions.Rotary(DIM // 2)
    model = redrawn(xf.Encoder(DIM, 2, 2, mask=mask, position=position))
    sizes = [(2, 3), (4, 1), (3, 3)]
    items = [tokens(1 + h * w) for h, w in sizes]
    packed = model(torch.cat(items), xf.Grid.packed(sizes, prefix=1)).split([len(item) for item in items])
    for got, item, size in zip(packed, items, sizes, strict=True):
        assert_equal(got, model(item, xf.Grid(*size, prefix=1)))
    # Two graphs without symmetry, so that their spectra, which rotary positions take for coordinates, are unique.
    first, second = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 4, 3]]), torch.tensor([[0, 1, 2, 0], [1, 2, 3, 2]])
    batch = torch.tensor([0] * 5 + [1] * 4)
    x = tokens(9)
    both = model(x, xf.Graph(torch.cat([first, second + 5], 1), 9, batch=batch))
    assert_equal(both[:5], model(x[:5], xf.Graph(first, 5)), 1e-8)
    assert_equal(both[5:], model(x[5:], xf.Graph(second, 4)), 1e-8)


def test_padding_of_the_context_changes_nothing() -> None:
    model = redrawn(xf.EncoderDecoder(DIM, HEADS, encoder_depth=1, decoder_depth=1, position=positions.Sinusoidal(DIM)))
    source, target = tokens(2, 6), tokens(2, 5)
    source[0, 2:] = target[1, 3:] = torch.nan
    out = model(source, target, xf.Sequence.padded([2, 6]), xf.Sequence.padded([5, 3]))
    assert_equal(out[:1], model(source[:1, :2], target[:1]))
    assert_equal(out[1:, :3], model(source[1:], target[1:, :3]))
    assert float(out.detach()[1, 3:].abs().sum()) == 0
    packed = model(
        torch.cat([source[0, :2], source[1]]), torch.cat([target[0], target[1, :3]]), xf.Sequence.packed([2, 6]), xf.Sequence.packed([5, 3])
    )  # fmt: skip
    assert_equal(packed, torch.cat([out[0], out[1, :3]]))
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), list(model.parameters())))


def test_no_tokens_and_no_rows() -> None:
    model = redrawn(xf.Encoder(DIM, 2, 2, mask=masks.Local(1), position=positions.Rotary(DIM // 2)))
    for shape in [(2, 0), (0, 5), (0, 0), (0,)]:
        assert model(tokens(*shape)).shape == (*shape, DIM)
    assert model(tokens(0), xf.Graph(torch.zeros(2, 0, dtype=torch.long), 0)).shape == (0, DIM)
    model = redrawn(xf.EncoderDecoder(DIM, HEADS, encoder_depth=1, decoder_depth=1))
    assert model(tokens(2, 0), tokens(2, 3)).isfinite().all()


# -- what came later, randomness, kinds of data --------------------------------------------------------------------------------


def causal_domains(length: int) -> list[xf.Domain]:
    times = torch.rand(length).cumsum(0)
    return [xf.Sequence(length), xf.Sequence(length - 1, prefix=1), xf.Timeline(times), xf.Grid(length // 2, 2)]


@given(
    st.sampled_from([masks.Causal(), masks.Causal() & masks.Local(2), masks.Causal() & (masks.Local(1) | masks.Global(1))]),
    st.sampled_from([POSITIONS[0], POSITIONS[1], lambda: positions.DistanceDecay(HEADS) + positions.ContinuousBias(HEADS, hidden=8)]),
    st.sampled_from(NORMS), st.integers(0, 3), st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_the_future_never_leaks(
    mask: masks.Mask, position: Any, norm: Any, which: int, step: int, training: bool
) -> None:
    domain, x = causal_domains(10)[which], tokens(2, 10).float()
    model = xf.Decoder(
        DIM,
        2,
        HEADS,
        mask=mask,
        cross=False,
        position=position(),
        norm=norm,
        dropout=0.1,
        attention_dropout=0.1,
        drop_path=0.1,
    )
    model.train(training)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return model(x, domain)

    changed = x.clone()
    changed[:, step:] = 100 * torch.randn(2, 10 - step, DIM)
    out = run(x)
    assert torch.equal(out[:, :step], run(changed)[:, :step])
    changed[:, step:] = torch.nan
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(run(x)[:, :step].sum(), x)
    assert float(gradient[:, step:].abs().sum()) == 0


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "drop_path"])
def test_evaluation_is_deterministic_and_training_repeats_for_a_seed(option: str) -> None:
    model = xf.EncoderDecoder(DIM, HEADS, encoder_depth=2, decoder_depth=2, **{option: 0.3})
    source, target = torch.randn(2, 6, DIM), torch.randn(2, 5, DIM)

    def run(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        out = model(source, target)
        return out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(1), strict=True))
    assert not torch.equal(run(1)[0], run(2)[0])
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True))


def test_one_encoder_three_kinds_of_data() -> None:
    def encoder(kernel: str) -> xf.Encoder:
        return xf.Encoder(
            dim=32, depth=2, heads=4, mask=masks.Local(3) | masks.Global(1), position=positions.Rotary(8), kernel=kernel
        )  # fmt: skip

    model, oracle = encoder("auto"), encoder("reference").double()
    redrawn(oracle)
    model.load_state_dict(oracle.state_dict())
    edges = torch.randint(60, (2, 150))
    graph = xf.Graph(edges, 60)
    for domain in (xf.Grid(14, 14, prefix=1), xf.Sequence(300), graph):
        x = torch.randn(2, domain.num_tokens, 32)
        x = x[0] if domain is graph else x
        assert_equal(model(x, domain).double(), oracle(x.double(), domain), 5e-6)
    # On each of them a token sees its neighbourhood and the global token, and no more.
    layer = redrawn(xf.Encoder(DIM, 1, HEADS, mask=masks.Local(1) | masks.Global(1)))
    for domain, far in (
        (xf.Grid(4, 4, prefix=1), 16),
        (xf.Sequence(9), 8),
        (xf.Graph(torch.tensor([[1, 2], [2, 3]]), 4), 1),
    ):
        x = tokens(domain.num_tokens)
        moved = x.clone()
        moved[far] = tokens(1)[0]
        same = (layer(x, domain) == layer(moved, domain)).all(-1)
        sees = (masks.Local(1) | masks.Global(1)).dense(domain)[:, far]
        assert torch.equal(same, ~sees)


def test_evaluation_in_inference_mode_does_not_spoil_training() -> None:
    position = positions.Sinusoidal(DIM) + positions.Rotary(DIM // HEADS) + positions.RelativeBias(HEADS)
    model, domain = xf.Encoder(DIM, 1, HEADS, mask=masks.Local(2), position=position), xf.Sequence.packed([3, 4])
    x = torch.randn(7, DIM)
    with torch.inference_mode():
        model(x, domain)
        model(x)
    (model(x, domain).sum() + model(x).sum()).backward()
    assert model.position.terms[2].table.grad is not None


def test_mixed_precision_stays_close() -> None:
    model, x = (
        xf.Encoder(DIM, 2, HEADS, mask=masks.Causal(), position=positions.Rotary(DIM // HEADS)),
        torch.randn(2, 9, DIM),
    )
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert_equal(got.float(), wanted, 3e-2)
    assert_equal(copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), wanted, 6e-2)


# -- saving ----------------------------------------------------------------------------------------------------------------


def whole(position: Any) -> xf.EncoderDecoder:
    return xf.EncoderDecoder(
        DIM, HEADS, encoder_depth=2, decoder_depth=2, norm="sandwich", activation=nn.PReLU(), position=position, layer_scale=0.1,
        qk_norm="rms", gate=True, sinks=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "position",
    [
        lambda: positions.RelativeBias(HEADS) + positions.Learned(DIM, 9),
        lambda: lambda: positions.ContinuousBias(HEADS, hidden=4),
    ],
)
def test_saving_and_loading(position: Callable[[], Any], tmp_path: Path) -> None:
    model, other = redrawn(whole(position())), redrawn(whole(position()))
    source, target = tokens(2, 6), tokens(2, 5)
    wanted = model(source, target)
    assert len({value.data_ptr() for value in model.state_dict().values()}) == len(model.state_dict())
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(source, target), wanted)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(source, target), wanted)
    redrawn(twin)
    assert torch.equal(model(source, target), wanted)


def test_pickling() -> None:
    model = redrawn(
        xf.Encoder(DIM, 2, HEADS, mask=masks.Local(1) | masks.Global(1), position=positions.RelativeBias(HEADS))
    )
    x = tokens(2, 5)
    wanted = model(x)  # after a call: nothing that was kept for the next one is in the way
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)


def test_domains_that_were_used_copy_and_pickle() -> None:
    model = redrawn(xf.Encoder(DIM, 1, 2, mask=masks.Local(1) | masks.Global(1), position=positions.Rotary(DIM // 2)))
    graph = xf.Graph(torch.tensor([[0, 1, 2, 0], [1, 2, 3, 2]]), 4)
    for domain in (xf.Sequence(4), xf.Sequence.packed([3, 1]), xf.Timeline(torch.rand(4)), xf.Grid(2, 2), graph):
        x = tokens(4)
        wanted = model(x, domain)
        for twin in (copy.copy(domain), copy.deepcopy(domain), pickle.loads(pickle.dumps(domain))):
            assert torch.equal(model(x, twin), wanted)


def test_masks_of_a_call_do_not_pile_up() -> None:
    model, x = xf.Encoder(DIM, 1, HEADS), torch.randn(1, 5, DIM)
    given_masks = [masks.Dense(torch.ones(5, 5, dtype=torch.bool)) for _ in range(12)]
    seen = [weakref.ref(mask.allowed) for mask in given_masks]
    for mask in given_masks:
        model(x, mask=mask)
        model(x, mask=mask & masks.Causal())
    del mask, given_masks
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= 4


# -- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: xf.FeedForward(8, activation="selu"), ValueError, "activation must be one of 'relu', .*got activation='selu'"),
        (lambda: xf.FeedForward(8, hidden=0), ValueError, "hidden must be >= 1; got hidden=0"),
        (lambda: xf.DropPath(1.0), ValueError, r"drop_path must be in \[0, 1\); got drop_path=1.0"),
        (lambda: xf.DropPath(-0.1), ValueError, "got drop_path=-0.1"),
        (lambda: xf.Block(8, 2, norm="middle"), ValueError, "norm must be 'pre', 'post', 'sandwich' or 'parallel'; got norm='middle'"),
        (lambda: xf.Block(8, 2, norm_layer="batch"), ValueError, "norm_layer must be 'layer', 'rms' or a callable.*got norm_layer='batch'"),
        (lambda: xf.Block(8, 3), ValueError, "dim must be divisible by heads; got dim=8 and heads=3"),
        (lambda: xf.Block(8, 2, colour="red"), TypeError, "colour"),
        (lambda: xf.Block(8, 2, mask=torch.ones(3, 3)), TypeError, "mask must be a mask.*got Tensor"),
        (lambda: xf.Encoder(8, 0, 2), ValueError, "depth must be a whole number >= 1; got depth=0"),
        (lambda: xf.Encoder(8, 2.0, 2), ValueError, "got depth=2.0"),
        (lambda: xf.Encoder(8, 2, 2, mask=[masks.Full()]), ValueError, "one for each of the 2 layers; got 1"),
        (lambda: xf.Encoder(8, 2, 2, mask=torch.ones(2)), TypeError, "mask must be a mask.*or a list.*got Tensor"),
        (lambda: xf.Encoder(8, 2, 2, mask=["causal", None]), TypeError, "mask must be a mask.*got str"),
        (lambda: xf.Encoder(8, 2, 2, position="rope"), TypeError, "position must be a position, or a function.*got str"),
        (lambda: xf.Encoder(8, 2, 2, position=lambda: "rope"), TypeError, "position must be a position.*got str"),
        (lambda: xf.Encoder(8, 2, 2, position=lambda: positions.Sinusoidal(8)), ValueError, "Sinusoidal is added to the tokens once"),
        (lambda: xf.Encoder(8, 2, 2, position=positions.RelativeBias(4)), ValueError, "as many heads as the layer has, 2; got .* of 4"),
        (lambda: xf.Encoder(8, 2, 2, cross=True), ValueError, "cross is for a Decoder"),
        (lambda: xf.Encoder(8, 2, 2, drop_path=1.5), ValueError, "got drop_path=1.5"),
        (lambda: xf.EncoderDecoder(8, 2, norm="middle"), ValueError, "got norm='middle'"),
    ],
)  # fmt: skip
def test_bad_options(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


X, CONTEXT = torch.randn(2, 5, 8), torch.randn(2, 3, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: xf.Block(8, 2)(torch.randn(2, 5, 9)), ValueError, r"x must be \(batch, tokens, 8\) or \(tokens, 8\); got \(2, 5, 9\)"),
        (lambda: xf.Encoder(8, 1, 2)(torch.randn(5)), ValueError, r"got \(5,\)"),
        (lambda: xf.Encoder(8, 1, 2)(torch.ones(2, 5, 8, dtype=torch.long)), TypeError, "x must be a floating.*got torch.int64"),
        (lambda: xf.Encoder(8, 1, 2)(X, xf.Sequence(6)), ValueError, r"x must have as many tokens as its domain; got 5 and Sequence\(6\)"),
        (lambda: xf.Encoder(8, 1, 2)(X, xf.Sequence(5, prefix=1)), ValueError, "prefix=1 in front of each item included"),
        (lambda: xf.Encoder(8, 1, 2)(X, xf.Sequence.padded([5, 2, 1])), ValueError, "x must have one row for each of the 3 rows.*got 2"),
        (lambda: xf.Encoder(8, 1, 2)(X, "sequence"), TypeError, "the domain of x must be a domain.*got str"),
        (lambda: xf.Encoder(8, 1, 2)(X, mask=torch.ones(5, 5)), TypeError, "mask must be a mask.*got Tensor"),
        (lambda: xf.Encoder(8, 1, 2, mask=masks.Causal())(X, xf.Points(torch.randn(5, 2))), ValueError, "Causal is defined on"),
        (lambda: xf.Block(8, 2)(X, context=CONTEXT), ValueError, "context is for blocks with cross attention"),
        (lambda: xf.Block(8, 2)(X, context_domain=xf.Sequence(3)), ValueError, "context_domain is for blocks with cross attention"),
        (lambda: xf.Block(8, 2)(X, context_mask=masks.Full()), ValueError, "context_mask is for blocks with cross attention"),
        (lambda: xf.Block(8, 2, cross=True)(X), ValueError, "context must be given to a block with cross=True"),
        (lambda: xf.Decoder(8, 1, 2)(X), ValueError, "context must be given"),
        (lambda: xf.Decoder(8, 1, 2, cross=False)(X, context=CONTEXT), ValueError, "context is for blocks with cross attention"),
        (lambda: xf.Decoder(8, 1, 2)(X, context=CONTEXT[..., :7]), ValueError, r"context must be \(batch, tokens, 8\).*got \(2, 3, 7\)"),
        (lambda: xf.Decoder(8, 1, 2)(X, context=CONTEXT, context_domain=xf.Sequence(4)), ValueError, "context must have as many tokens"),
        (lambda: xf.Decoder(8, 1, 2)(X, context=CONTEXT[:1]), ValueError, "same batch size"),
        (lambda: xf.Encoder(8, 1, 2, position=positions.Rotary(8))(X), ValueError, "head_dim=8"),
        (lambda: xf.Encoder(8, 1, 2, position=positions.Learned(8, 4))(X), ValueError, "Raise size"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
