"""The operation's arguments and the layer around it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import xformerlib as xf
from tests.closeness import assert_close
from xformerlib import masks, positions

S = xf.Sequence


def redraw(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def test_the_layer_is_its_formula():
    layer = redraw(xf.Attention(12, 3, gate=True, sinks=True, softcap=2.0, mask=masks.Causal()))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (
        t.unflatten(-1, (3, 4)).transpose(1, 2) for t in F.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, -1)
    )
    s = 2 * torch.tanh(q @ k.mT / 2 / 2)
    e = torch.exp(s) * torch.ones(5, 5).tril()
    o = (e @ v) / (e.sum(-1, keepdim=True) + torch.exp(layer.sinks)[:, None, None])
    o = o.transpose(1, 2).flatten(2) * torch.sigmoid(layer.gate(x))
    assert_close(layer(x), layer.out(o))


def test_grouped_heads_share_keys():
    layer = redraw(xf.Attention(12, 4, kv_heads=2, head_dim=5, qk_norm="rms"))
    assert layer.qkv.out_features == (4 + 2 * 2) * 5 and layer.out.in_features == 20
    wide = redraw(xf.Attention(12, 4, head_dim=5, qk_norm="rms"))
    q, k, v = layer.qkv.weight.split([20, 10, 10])
    qb, kb, vb = layer.qkv.bias.split([20, 10, 10])
    repeat = lambda t: t.unflatten(0, (2, 5)).repeat_interleave(2, 0).flatten(0, 1)  # noqa: E731
    wide.load_state_dict(
        {
            **layer.state_dict(),
            "qkv.weight": torch.cat([q, repeat(k), repeat(v)]),
            "qkv.bias": torch.cat([qb, repeat(kb), repeat(vb)]),
        }
    )
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    assert_close(layer(x), wide(x))


def test_cross_attention_and_its_padding():
    layer = redraw(xf.Attention(8, 2))
    x, context = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    keys = S.padded([2, 5])
    context[0, 2:] = float("nan")
    got = layer(x, context=context, context_domain=keys)
    assert_close(got[:1], layer(x[:1], context=context[:1, :2]))
    assert_close(got[1:], layer(x[1:], context=context[1:]))


def test_unbatched_and_packed_tokens():
    layer = redraw(xf.Attention(8, 2, mask=masks.Local(1), position=positions.Rotary(4)))
    a, b = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    packed = layer(torch.cat([a, b]), S.packed([3, 4]))
    assert packed.shape == (7, 8)
    assert_close(packed, torch.cat([layer(a), layer(b[None])[0]]))


@pytest.mark.parametrize("rows", [None, [0, 3], torch.tensor([4])])
def test_weights_are_those_that_made_the_output(rows):
    position = positions.Rotary(4) + positions.DistanceDecay(2)
    layer = redraw(
        xf.Attention(8, 2, sinks=True, softcap=3.0, mask=masks.Causal() & ~masks.Prefix(1), position=position)
    )
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    weights = layer.weights(x, S(5), rows)
    value = F.linear(x, layer.qkv.weight[16:], layer.qkv.bias[16:]).unflatten(-1, (2, 4)).transpose(1, 2)
    index = range(5) if rows is None else torch.as_tensor(rows).tolist()
    want = layer(x)[:, list(index)]
    assert_close(layer.out((weights @ value).transpose(1, 2).flatten(2)), want)
    assert (weights[:, :, [i for i, row in enumerate(index) if row == 0]] == 0).all()
    with pytest.raises(ValueError, match="rows must index the 5 queries"):
        layer.weights(x, S(5), [5])


def test_the_mask_of_a_call_restricts_the_mask_of_the_layer():
    layer = redraw(xf.Attention(8, 2, mask=masks.Causal()))
    both = redraw(xf.Attention(8, 2, mask=masks.Causal() & masks.Local(1)))
    both.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert_close(layer(x, mask=masks.Local(1)), both(x))
    assert not torch.equal(layer(x), both(x))


def test_training_drops_weights_and_evaluation_does_not():
    layer = xf.Attention(8, 2, dropout=0.5)
    x = torch.randn(2, 5, 8)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_autocast_and_half_precision():
    layer = xf.Attention(
        16,
        2,
        mask=masks.Local(2) & ~masks.Prefix(1),
        position=positions.Rotary(8) + positions.DistanceDecay(2),
        qk_norm="rms",
    )
    x = torch.randn(2, 9, 16)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert_close(got.bfloat16(), want, "under autocast", depth=2)
    assert_close(layer.bfloat16()(x.bfloat16()), want, "in half precision", depth=2)  # two maps


def test_layers_copy_and_pickle():
    layer = redraw(xf.Attention(8, 2, mask=masks.Causal() | masks.Global(1), position=positions.RelativeBias(2)))
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_empty_inputs():
    layer = xf.Attention(8, 2, mask=masks.Causal(), position=positions.Rotary(4), sinks=True)
    assert layer(torch.randn(2, 0, 8)).shape == (2, 0, 8)
    assert layer(torch.randn(0, 3, 8)).shape == (0, 3, 8)
    assert (xf.attention(torch.randn(1, 1, 3, 4), *(torch.randn(1, 1, 0, 4) for _ in range(2))) == 0).all()


Q = torch.randn(2, 4, 5, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: xf.attention(Q.int(), Q, Q), "query must be a floating-point tensor"),
        (lambda: xf.attention(Q, Q[0], Q), "key must be"),
        (lambda: xf.attention(Q, Q, Q.double()), "value must have the dtype and device of query"),
        (lambda: xf.attention(Q, Q.to("meta"), Q), "key must have the dtype and device of query"),
        (lambda: xf.attention(Q, Q[:1], Q[:1]), "same batch size"),
        (lambda: xf.attention(Q, Q[..., :4], Q), "same dim"),
        (lambda: xf.attention(Q, Q, Q[:, :, :3]), "same heads and tokens"),
        (lambda: xf.attention(Q, Q[:, :3], Q[:, :3]), "multiple of the heads of key"),
        (lambda: xf.attention(Q, Q, Q, sinks=torch.zeros(3)), "one logit per query head"),
        (lambda: xf.attention(Q, Q, Q, dropout_p=1.0), r"dropout_p must be in \[0, 1\)"),
        (lambda: xf.attention(Q, Q, Q, softcap=0.0), "softcap must be > 0"),
        (lambda: xf.attention(Q, Q, Q, mask=torch.ones(5, 5, dtype=torch.bool)), "Wrap a bool tensor"),
        (lambda: xf.attention(Q, Q, Q, bias=torch.zeros(3, 5, 5)), "bias must broadcast"),
        (lambda: xf.attention(Q, Q, Q, bias=torch.ones(5, 5, dtype=torch.bool)), "masks.Dense for a bool mask"),
        (lambda: xf.attention(Q, Q, Q, bias=positions.DistanceDecay(3)), "as many heads as query has"),
        (lambda: xf.attention(Q, Q, Q, bias=positions.Rotary(8)), "positions.Bias or a tensor"),
        (lambda: xf.attention(Q, Q, Q, domain=S(4)), "as many tokens as its domain; got 5"),
        (lambda: xf.attention(Q, Q, Q, domain=5), "must be a domain"),
        (lambda: xf.attention(Q, Q, Q, key_domain=S(5)), "give domain too"),
        (lambda: xf.attention(Q, Q[:, :, :3], Q[:, :, :3], mask=masks.Causal()), "do not say which places"),
        (lambda: xf.attention(Q, Q[:, :, :3], Q[:, :, :3], bias=positions.DistanceDecay(4)), "do not say which places"),
        (lambda: xf.attention(Q, Q, Q, domain=S.padded([1, 2, 5])), "one row for each of the 3 rows"),
        (lambda: xf.attention(Q, Q, Q, domain=xf.Timeline(torch.zeros(5)).to("meta")), r"domain.to\('cpu'\)"),
        (lambda: xf.attention(Q, Q, Q, mask=masks.Keys(torch.ones(3, 5, dtype=torch.bool))), "mask must have 1 or 2 rows"),
        (lambda: xf.Attention(10, 4), "dim must be divisible by heads; got dim=10 and heads=4"),
        (lambda: xf.Attention(12, 4, kv_heads=3), "heads must be divisible by kv_heads"),
        (lambda: xf.Attention(12, 0), "heads must be a whole number >= 1"),
        (lambda: xf.Attention(12, 4, qk_norm="l2"), "qk_norm must be"),
        (lambda: xf.Attention(12, 4, dropout=-0.1), r"dropout must be in \[0, 1\)"),
        (lambda: xf.Attention(12, 4, kernel="flash"), "kernel must be"),
        (lambda: xf.Attention(12, 4, mask="causal"), "mask must be a mask"),
        (lambda: xf.Attention(12, 4, position="rotary"), "position must be a position"),
        (lambda: xf.Attention(12, 4, position=positions.Sinusoidal(12)), "added to the tokens once, by the model"),
        (lambda: xf.Attention(12, 4, position=positions.DistanceDecay(3)), "as many heads as the layer has"),
        (lambda: xf.Attention(8, 2)(torch.randn(2, 5, 6)), r"x must be \(batch, tokens, 8\)"),
        (lambda: xf.Attention(8, 2)(torch.zeros(2, 5, 8, dtype=torch.long)), "x must be a floating-point tensor"),
        (lambda: xf.Attention(8, 2)(torch.randn(5, 8), xf.Grid(2, 2, prefix=2)), "prefix=2 in front of each item included"),
        (lambda: xf.Attention(8, 2)(torch.randn(5, 8), context_domain=S(3)), "give context too"),
    ],
)  # fmt: skip
def test_bad_input_says_what_is_wrong(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_cosine_attention_is_its_formula() -> None:
    layer = redraw(xf.Attention(12, 4, kv_heads=2, qk_norm="cosine"))
    with torch.no_grad():
        layer.query_norm.temperature.copy_(torch.tensor([0.0, 1.0, 3.0, 9.0]))  # the last one is beyond the limit
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x).split([12, 6, 6], -1)
    heads = []
    for h, factor in enumerate([1.0, torch.e, torch.e**3, 100.0]):
        a, b, value = q[..., 3 * h : 3 * h + 3], *(t[..., 3 * (h // 2) : 3 * (h // 2) + 3] for t in (k, v))
        cosines = torch.cosine_similarity(a[:, :, None], b[:, None], -1)
        heads.append(torch.softmax(factor * cosines, -1) @ value)
    wanted = layer.out(torch.cat(heads, -1))
    assert_close(layer(x), wanted, condition=100)  # the largest score
