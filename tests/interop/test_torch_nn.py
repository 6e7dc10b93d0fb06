"""Modules of torch.nn, taken over, compute the same: the same weights, the same masks, and the source as it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import xformerlib as xf
from tests.closeness import assert_close
from xformerlib import masks
from xformerlib.interop.torch_nn import from_torch, from_torch_mask

DIM, HEADS, HIDDEN, ROWS, SOURCE, TARGET = 16, 4, 24, 3, 7, 5
ACTIVATIONS: list[Callable[[], Any]] = [
    lambda: "relu",
    lambda: "gelu",
    lambda: F.silu,
    lambda: nn.GELU("tanh"),
    nn.PReLU,
]

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True:UserWarning", "ignore:The PyTorch API of nested:UserWarning"
)


def redrawn(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every parameter drawn anew, so that norms and biases count."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module.to(dtype)


def tokens(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS, count, DIM, dtype=dtype)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert_close(ours, theirs, depth=4)  # no stack has more than three layers and a norm


def front(x: Tensor, module: nn.Module) -> Tensor:
    """Tokens in the order of axes that the module takes, and its output back."""
    batch_first = next(part.batch_first for part in module.modules() if isinstance(part, nn.MultiheadAttention))
    return x if batch_first else x.transpose(0, 1)


booleans = st.booleans()
options = st.fixed_dictionaries({"norm_first": booleans, "batch_first": booleans, "bias": booleans})
activations = st.sampled_from(ACTIVATIONS)
dtypes = st.sampled_from([torch.float32, torch.float64])


# -- equal outputs ---------------------------------------------------------------------------------------------------------


def masks_of_theirs(kind: str, queries: int, keys: int) -> dict[str, Tensor | None]:
    """A mask as their modules take it; the first key stays open, since they make NaN of a query that sees nothing."""
    ignored = torch.rand(queries, keys) < 0.4
    each = torch.rand(ROWS * HEADS, queries, keys) < 0.4
    padding = torch.arange(keys) >= torch.tensor([keys, 1, keys - 2])[:, None]
    ignored[:, 0] = each[..., 0] = False
    minus = torch.zeros(queries, keys, dtype=torch.float64).masked_fill(ignored, -torch.inf)
    no_padding = torch.zeros(ROWS, keys, dtype=torch.float64).masked_fill(padding, -torch.inf)
    return {
        "none": {"attn_mask": None, "key_padding_mask": None},
        "pairs": {"attn_mask": ignored, "key_padding_mask": None},
        "heads": {"attn_mask": each, "key_padding_mask": None},
        "keys": {"attn_mask": None, "key_padding_mask": padding},
        "both": {"attn_mask": ignored, "key_padding_mask": padding},
        "float": {"attn_mask": minus, "key_padding_mask": no_padding},
    }[kind]  # type: ignore[return-value]


kinds = st.sampled_from(["none", "pairs", "heads", "keys", "both", "float"])


@given(booleans, booleans, booleans, booleans, kinds, dtypes)
def test_multihead_attention(
    bias: bool, batch_first: bool, zero: bool, cross: bool, kind: str, dtype: torch.dtype
) -> None:
    theirs = redrawn(nn.MultiheadAttention(DIM, HEADS, bias=bias, batch_first=batch_first, add_zero_attn=zero), dtype)
    x, source = tokens(TARGET, dtype), tokens(SOURCE, dtype) if cross else None
    context = x if source is None else source
    key = front(context, theirs)
    query = front(x, theirs) if cross else key
    drawn = masks_of_theirs(kind, TARGET, context.shape[1])
    in_dtype = {name: m.to(dtype) if m is not None and m.is_floating_point() else m for name, m in drawn.items()}
    ours = from_torch(theirs)(x, context=source, mask=from_torch_mask(**drawn, heads=HEADS))
    for weights in (True, False):
        expected, _ = theirs(query, key, key, need_weights=weights, **in_dtype)
        assert_same(ours, front(expected, theirs))


@given(options, activations, kinds)
def test_encoder_layer(how: dict[str, bool], activation: Callable[[], Any], kind: str) -> None:
    theirs = redrawn(nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, activation(), 1e-3, **how))
    x, drawn = tokens(SOURCE), masks_of_theirs(kind, SOURCE, SOURCE)
    expected = theirs(front(x, theirs), drawn["attn_mask"], drawn["key_padding_mask"])
    assert_same(from_torch(theirs)(x, mask=from_torch_mask(**drawn, heads=HEADS)), front(expected, theirs))


@given(options, activations, kinds)
def test_decoder_layer(how: dict[str, bool], activation: Callable[[], Any], kind: str) -> None:
    theirs = redrawn(nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN, 0.0, activation(), 1e-3, **how))
    x, context = tokens(TARGET), tokens(SOURCE)
    own, cross = masks_of_theirs(kind, TARGET, TARGET), masks_of_theirs(kind, TARGET, SOURCE)
    expected = theirs(
        front(x, theirs), front(context, theirs), own["attn_mask"], cross["attn_mask"],
        own["key_padding_mask"], cross["key_padding_mask"],
    )  # fmt: skip
    mask, context_mask = (from_torch_mask(**drawn, heads=HEADS) for drawn in (own, cross))
    assert_same(from_torch(theirs)(x, context=context, mask=mask, context_mask=context_mask), front(expected, theirs))


@given(options, st.sampled_from([lambda: None, lambda: nn.LayerNorm(DIM, eps=1e-2), lambda: nn.RMSNorm(DIM)]))
def test_stacks(how: dict[str, bool], norm: Callable[[], nn.Module | None]) -> None:
    encoder = redrawn(nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, **how), 3, norm()))
    decoder = redrawn(nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN, 0.0, **how), 2, norm()))
    x, y = tokens(SOURCE), tokens(TARGET)
    assert_same(from_torch(encoder)(x), front(encoder(front(x, encoder)), encoder))
    assert_same(from_torch(decoder)(y, context=x), front(decoder(front(y, decoder), front(x, decoder)), decoder))


@given(options, activations, dtypes)
def test_transformer(how: dict[str, bool], activation: Callable[[], Any], dtype: torch.dtype) -> None:
    theirs = redrawn(nn.Transformer(DIM, HEADS, 2, 1, HIDDEN, 0.0, activation(), **how), dtype)
    x, y = tokens(SOURCE, dtype), tokens(TARGET, dtype)
    future = nn.Transformer.generate_square_subsequent_mask(TARGET, dtype=dtype)
    padding = torch.arange(SOURCE) >= torch.tensor([SOURCE, 2, 5])[:, None]
    float_padding = torch.zeros(ROWS, SOURCE, dtype=dtype).masked_fill(padding, -torch.inf)
    expected = theirs(
        front(x, theirs), front(y, theirs), tgt_mask=future, src_key_padding_mask=float_padding,
        memory_key_padding_mask=float_padding,
    )  # fmt: skip
    expected = front(expected, theirs)
    ours, keys = from_torch(theirs), from_torch_mask(key_padding_mask=padding)
    assert_same(ours(x, y, source_mask=keys, mask=from_torch_mask(future), context_mask=keys), expected)
    # Padding as a fact of the domain: nothing changes for the tokens that exist.
    assert_same(ours(x, y, xf.Sequence.padded([SOURCE, 2, 5], SOURCE), mask=masks.Causal()), expected)
    # One item without an axis for the batch.
    assert_same(ours(x[0], y[0]), theirs(x[0], y[0]))


@given(options, st.sampled_from(["relu", "gelu"]), dtypes)
def test_their_fast_path(how: dict[str, bool], activation: str, dtype: torch.dtype) -> None:
    """In evaluation without gradients theirs take other code, with nested tensors where tokens are padded."""
    layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.1, activation, **how)
    theirs = redrawn(nn.TransformerEncoder(layer, 2, nn.LayerNorm(DIM)), dtype).eval()
    ours, x = from_torch(theirs), tokens(SOURCE, dtype)
    lengths = torch.tensor([SOURCE, 2, 5])
    padding = torch.arange(SOURCE) >= lengths[:, None]
    with torch.no_grad():
        assert_same(ours(x), front(theirs(front(x, theirs)), theirs))
        expected = front(theirs(front(x, theirs), src_key_padding_mask=padding), theirs)
        assert_same(ours(x, mask=from_torch_mask(key_padding_mask=padding))[~padding], expected[~padding])
        assert_same(ours(x, xf.Sequence.padded(lengths, SOURCE))[~padding], expected[~padding])


def test_the_tanh_gelu_is_what_it_says_in_evaluation_too() -> None:
    theirs = redrawn(nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, nn.GELU("tanh"), batch_first=True)).eval()
    x = tokens(SOURCE)
    with_gradients = theirs(x)
    with torch.no_grad():
        assert_same(from_torch(theirs)(x), with_gradients)
        assert not torch.allclose(theirs(x), with_gradients, atol=1e-6)  # theirs takes the exact one here


@given(st.data())
def test_gradients_are_equal(data: st.DataObject) -> None:
    how = {name: data.draw(st.booleans(), name) for name in ("norm_first", "bias")}
    theirs = redrawn(
        nn.Transformer(
            DIM, HEADS, 1, 1, HIDDEN, 0.0, data.draw(st.sampled_from(["relu", "gelu"])), batch_first=True, **how
        )
    )
    ours, x, y = from_torch(theirs), tokens(SOURCE).requires_grad_(), tokens(TARGET)
    direction = torch.randn(ROWS, TARGET, DIM, dtype=torch.float64)
    wanted = torch.autograd.grad((theirs(x, y) * direction).sum(), [x, *theirs.parameters()])
    got = torch.autograd.grad((ours(x, y) * direction).sum(), [x, *ours.parameters()])
    assert_same(got[0], wanted[0])
    # The parameters are the same in another order: compared by what they are copies of.
    gradients = [gradient for _, gradient in zip(ours.parameters(), got[1:], strict=True)]
    for parameter, gradient in zip(theirs.parameters(), wanted[1:], strict=True):
        twins = [i for i, p in enumerate(ours.parameters()) if p.shape == parameter.shape and torch.equal(p, parameter)]
        assert len(twins) == 1
        assert_same(gradients[twins[0]], gradient)


def test_decoding_step_by_step_with_their_weights() -> None:
    theirs = redrawn(nn.Transformer(DIM, HEADS, 1, 2, HIDDEN, batch_first=True)).eval()
    x, y = tokens(SOURCE), tokens(TARGET)
    expected = theirs(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(TARGET, dtype=torch.float64))
    ours, cache = from_torch(theirs), xf.Cache()
    context = ours.encoder(x)
    steps = [
        ours.decoder(y[:, t : t + 1], xf.Sequence(1, start=t), context=context if t == 0 else None, cache=cache)
        for t in range(TARGET)
    ]
    assert_same(torch.cat(steps, 1), expected)


def test_a_query_that_sees_nothing_gets_nan_there_and_nothing_here() -> None:
    theirs = redrawn(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    x, hidden = tokens(TARGET), torch.tensor([False, True, False])[:, None].expand(ROWS, TARGET)
    expected, _ = theirs(x, x, x, key_padding_mask=hidden)
    ours = from_torch(theirs)(x, mask=from_torch_mask(key_padding_mask=hidden))
    assert expected[1].isnan().all()
    assert_close(ours[1], theirs.out_proj.bias.expand(TARGET, DIM))
    assert_same(ours[::2], expected[::2])


# -- what else carries over ------------------------------------------------------------------------------------------------

MODULES: list[Callable[[], nn.Module]] = [
    lambda: nn.MultiheadAttention(DIM, HEADS, dropout=0.3),
    lambda: nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, dropout=0.3, activation=nn.PReLU()),
    lambda: nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN, dropout=0.3),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN), 2, nn.LayerNorm(DIM)),
    lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN), 2),
    lambda: nn.Transformer(DIM, HEADS, 1, 1, HIDDEN),
]
OURS = [xf.Attention, xf.Block, xf.Block, xf.Encoder, xf.Decoder, xf.EncoderDecoder]


@pytest.mark.parametrize(("make", "kind"), list(zip(MODULES, OURS, strict=True)))
def test_the_source_stays_as_it_was(make: Callable[[], nn.Module], kind: type[nn.Module]) -> None:
    theirs = redrawn(make())
    before, state, modules = (
        copy.deepcopy(theirs.state_dict()),
        torch.get_rng_state(),
        [type(part) for part in theirs.modules()],
    )
    ours = from_torch(theirs)
    assert type(ours) is kind
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    assert len({p.data_ptr() for p in (*theirs.parameters(), *ours.parameters())}) == len(
        [*theirs.parameters(), *ours.parameters()]
    )
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    ours.eval().half()
    assert [type(part) for part in theirs.modules()] == modules
    assert theirs.training
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_mode_dtype_device_and_frozen_weights_carry_over(make: Callable[[], nn.Module], training: bool) -> None:
    theirs = make().bfloat16().train(training)
    frozen = sum(p.requires_grad_(False).numel() for p in list(theirs.parameters())[::2])
    ours = from_torch(theirs)
    assert {(p.dtype, p.device) for p in ours.parameters()} == {(torch.bfloat16, torch.device("cpu"))}
    assert all(part.training is training for part in ours.modules())
    assert sum(p.numel() for p in ours.parameters() if not p.requires_grad) == frozen
    assert all(p.is_meta for p in from_torch(theirs.to("meta")).parameters())


def test_dropout_rates_carry_over() -> None:
    theirs = nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN)
    theirs.self_attn.dropout, theirs.multihead_attn.dropout = 0.1, 0.2
    for rate, dropout in zip(
        (0.3, 0.4, 0.5, 0.6), (theirs.dropout, theirs.dropout1, theirs.dropout2, theirs.dropout3), strict=True
    ):
        dropout.p = rate
    theirs.eval()
    theirs.dropout2.train()
    ours = from_torch(theirs)
    assert (ours.attention.dropout, ours.cross_attention.dropout, ours.feed_forward.dropout.p) == (0.1, 0.2, 0.3)
    residuals = (ours.attention_residual, ours.cross_residual, ours.feed_forward_residual)
    assert [residual.dropout.p for residual in residuals] == [0.4, 0.5, 0.6]
    assert [residual.dropout.training for residual in residuals] == [False, True, False]


def test_training_drops_as_much_as_theirs() -> None:
    theirs = redrawn(nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.5, batch_first=True))
    ours, x = from_torch(theirs), tokens(1)[:1].expand(4000, 1, DIM)
    mean, deviation = ours(x).mean(0), ours(x).std(0)
    same, as_wide = theirs(x).mean(0), theirs(x).std(0)
    error = 2**0.5 * as_wide / len(x) ** 0.5  # of a difference of two means; that of deviations is smaller
    assert ((mean - same).abs() < 6 * error).all() and ((deviation - as_wide).abs() < 6 * error).all()


def test_tied_layers_stay_tied() -> None:
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, batch_first=True), 3)
    theirs.layers[2] = theirs.layers[0]
    ours = from_torch(redrawn(theirs))
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    assert ours.blocks[2].attention.qkv.weight is ours.blocks[0].attention.qkv.weight
    x = tokens(SOURCE)
    assert_same(ours(x), theirs(x))


def test_the_whole_is_ours() -> None:
    ours = from_torch(nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, activation=nn.ReLU()), 2))
    assert [type(part).__module__ for part in ours.modules() if "Transformer" in type(part).__name__] == []
    assert ours.blocks[1].feed_forward.activation == "relu"
    twin = xf.Encoder(DIM, 2, HEADS, hidden=HIDDEN, activation="relu", norm="post")
    assert twin.load_state_dict(ours.state_dict()).missing_keys == []


# -- what cannot be taken over -----------------------------------------------------------------------------------------------


class _Louder(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return 2 * super()._ff_block(x)


def _encoder(layer: nn.Module | None = None, **how: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer or nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, **how), 2)  # type: ignore[arg-type]


def _replaced(**parts: nn.Module) -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN)
    for name, part in parts.items():
        setattr(layer, name, part)
    return layer


def _patched() -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True), ValueError, "add_bias_kv=True"),
    (lambda: nn.MultiheadAttention(DIM, HEADS, kdim=8), ValueError, "kdim and vdim must be embed_dim=16.*kdim=8"),
    (lambda: nn.MultiheadAttention(DIM, HEADS, vdim=8), ValueError, "vdim=8"),
    (lambda: nn.Transformer(DIM, HEADS, 1, 1, custom_encoder=nn.Identity()), TypeError, "custom_encoder must be .* got Identity"),
    (lambda: nn.Transformer(DIM, HEADS, 1, 1, custom_decoder=nn.Identity()), TypeError, "custom_decoder must be .* got Identity"),
    (lambda: nn.TransformerDecoder(nn.TransformerEncoderLayer(DIM, HEADS), 1), TypeError, r"layers\[0\] must be an nn.TransformerDec"),
    (lambda: _encoder(nn.Identity()), TypeError, r"layers\[0\] must be an nn.TransformerEncoderLayer.*got Identity"),
    (lambda: _encoder(_Louder(DIM, HEADS, HIDDEN)), TypeError, "_Louder has a _ff_block of its own"),
    (lambda: _patched(), TypeError, "has a forward of its own"),
    (lambda: _replaced(linear1=nn.Sequential(nn.Linear(DIM, DIM))), TypeError, "linear1 must be an nn.Linear.*got Sequential"),
    (lambda: _replaced(linear2=nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, DIM))), TypeError, "linear2.weight must be a plain"),
    (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS), 0), ValueError, "num_layers must be >= 1"),
    (lambda: nn.LSTM(DIM, DIM), TypeError, "module must be one of nn.MultiheadAttention,.*got LSTM"),
    (lambda: "transformer", TypeError, "module must be one of .*got str"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_what_ours_cannot_express_is_refused_by_name(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_torch(make())


# -- masks -----------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.data())
def test_true_means_ignore(queries: int, keys: int, rows: int, heads: int, floating: bool, data: st.DataObject) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.rand(shape) < 0.5

    pairs = data.draw(st.sampled_from([None, draw(queries, keys), draw(rows * heads, queries, keys)]), "attn_mask")
    padding = data.draw(st.sampled_from([None, draw(keys), draw(rows, keys)]), "key_padding_mask")

    def given_as(mask: Tensor | None) -> Tensor | None:
        return torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if floating and mask is not None else mask

    mask = from_torch_mask(given_as(pairs), given_as(padding), heads=heads)
    got = mask.dense(xf.Sequence(queries), xf.Sequence(keys), batch_size=rows, heads=heads)
    for b, h, i, j in itertools.product(range(rows), range(heads), range(queries), range(keys)):
        ignored = pairs is not None and bool(pairs[i, j] if pairs.ndim == 2 else pairs[b * heads + h, i, j])
        ignored |= padding is not None and bool(padding[j] if padding.ndim == 1 else padding[b, j])
        assert bool(got[b, h, i, j]) is not ignored


def test_masks_take_their_shortest_form() -> None:
    future = torch.ones(4, 4, dtype=torch.bool).triu(1)
    assert from_torch_mask() == masks.Full()
    assert from_torch_mask(is_causal=True) == masks.Causal()
    assert from_torch_mask(future, is_causal=True) == masks.Causal()
    assert from_torch_mask(future.expand(6, 4, 4), is_causal=True, heads=3) == masks.Causal()
    assert repr(from_torch_mask(future, future[:, 0])) == "Dense(<4 x 4>) & Keys(<4 valid>)"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attn_mask": torch.full((2, 2), 0.5)}, ValueError, "attn_mask must be 0 or -inf everywhere.*got 0.5"),
        ({"key_padding_mask": torch.full((2, 2), -1e9)}, ValueError, "key_padding_mask must be 0 or -inf everywhere"),
        ({"attn_mask": torch.full((2, 2), torch.nan)}, ValueError, "got nan"),
        ({"attn_mask": torch.full((2, 2), torch.inf)}, ValueError, "got inf"),
        ({"attn_mask": torch.ones(2, 2, dtype=torch.uint8)}, TypeError, "attn_mask must be a bool or float.*got torch.uint8"),
        ({"key_padding_mask": [True]}, TypeError, "key_padding_mask must be a bool or floating-point tensor; got list"),
        ({"attn_mask": torch.ones(6, 2, 2, dtype=torch.bool)}, ValueError, "give heads, a divisor of 6; got heads=None"),
        ({"attn_mask": torch.ones(6, 2, 2, dtype=torch.bool), "heads": 4}, ValueError, "a divisor of 6; got heads=4"),
        ({"attn_mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"attn_mask must be \(Tq, Tk\) or \(B \* H, Tq, Tk\); got \(2,\)"),
        ({"attn_mask": torch.zeros(2, 2, dtype=torch.bool), "is_causal": True}, ValueError, "is_causal says .* but it is another one"),
        ({"key_padding_mask": torch.zeros(1, 2, 2, dtype=torch.bool)}, ValueError, r"must be \(tokens,\) or \(batch, tokens\)"),
    ],
)  # fmt: skip
def test_masks_that_are_none_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_torch_mask(**arguments)
