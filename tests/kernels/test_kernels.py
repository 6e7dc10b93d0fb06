"""The oracle against the formula, and what each kernel promises beside its values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import xformerlib as xf
from tests.closeness import assert_close, largest
from xformerlib import masks, positions
from xformerlib.kernels import _chunked

S = xf.Sequence
EVERYWHERE = ("sdpa", "chunked", "reference")  # kernels that need no structure


def qkv(batch=2, heads=4, kv_heads=2, tokens=7, dim=4, value_dim=3, dtype=torch.float64):
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim)
    return [torch.randn(batch, h, tokens, d, dtype=dtype, requires_grad=True) for h, d in shapes]


def test_the_oracle_is_the_formula():
    q, k, v = qkv()
    mask, bias, sinks = (
        masks.Causal() & masks.Local(2),
        torch.randn(4, 7, 7, dtype=torch.float64),
        torch.randn(4, dtype=torch.float64),
    )
    got = xf.attention(q, k, v, mask=mask, bias=bias, sinks=sinks, softcap=1.5, kernel="reference")
    allowed = mask.dense(S(7))
    for h in range(4):
        for i in range(7):
            s = 1.5 * torch.tanh(q[:, h, i, None] @ k[:, h // 2].mT / math.sqrt(4) / 1.5)[:, 0] + bias[h, i]
            weights = torch.exp(s) * allowed[i]
            want = (weights[:, None] @ v[:, h // 2])[:, 0] / (weights.sum(-1, keepdim=True) + torch.exp(sinks[h]))
            assert_close(got[:, h, i], want)


def test_grouped_queries_are_those_of_torch():
    q, k, v = qkv(value_dim=4)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    for kernel in EVERYWHERE:
        assert_close(xf.attention(q, k, v, kernel=kernel), want, kernel)


@pytest.mark.parametrize("kernel", EVERYWHERE)
def test_a_query_that_sees_nothing_gets_exactly_zero_and_no_gradient(kernel):
    q, k, v = qkv()
    mask = masks.Dense(torch.tensor([i != 3 for i in range(7)])[:, None].expand(7, 7)) & ~masks.Prefix(1)
    out = xf.attention(q, k, v, mask=mask, kernel=kernel)
    assert (out[:, :, 3] == 0).all() and (out[:, :, 2] != 0).any()
    out.sum().backward()
    assert (q.grad[:, :, 3] == 0).all() and (k.grad[:, :, 0] == 0).all() and (v.grad[:, :, 0] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("kernel", ["sdpa", "chunked"])
def test_a_row_of_minus_infinities_is_empty(kernel):
    q, k, v = qkv()
    bias = torch.zeros(7, 7, dtype=torch.float64).index_fill(0, torch.tensor([2]), float("-inf"))
    out = xf.attention(q, k, v, bias=bias, kernel=kernel)
    assert (out[:, :, 2] == 0).all() and out.isfinite().all()
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("kernel", EVERYWHERE)
def test_dropout_keeps_the_mean_and_follows_the_seed(kernel):
    q, k, v = (t.detach() for t in qkv(batch=1, tokens=6))
    want = xf.attention(q, k, v, mask=masks.Causal(), kernel=kernel)
    many = torch.stack([xf.attention(q, k, v, mask=masks.Causal(), dropout_p=0.3, kernel=kernel) for _ in range(300)])
    assert not torch.equal(many[0], want)
    assert (many.mean(0) - want).abs().max() < 6 * float(many.std(0).max()) / math.sqrt(300)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(xf.attention(q, k, v, dropout_p=0.3, kernel=kernel))
    assert torch.equal(*runs)


def test_dropout_is_the_same_when_chunks_are_recomputed(monkeypatch):
    monkeypatch.setattr(_chunked, "BLOCK_SCORES", 20)
    q, k, v = qkv(batch=1, heads=2, kv_heads=1, tokens=5, dim=2)

    def loss(q):
        torch.manual_seed(5)
        return xf.attention(q, k, v, dropout_p=0.5, domain=S(5), kernel="chunked").sum()

    assert torch.autograd.gradcheck(loss, (q,), nondet_tol=0)


def test_the_oracle_is_differentiable_twice():
    q, k, v = qkv(batch=1, heads=2, kv_heads=1, tokens=3)
    f = lambda q, k, v: xf.attention(q, k, v, mask=masks.Causal(), kernel="reference")  # noqa: E731
    assert torch.autograd.gradcheck(f, (q, k, v)) and torch.autograd.gradgradcheck(f, (q, k, v))


def test_chunks_do_not_show(monkeypatch):
    q, k, v = qkv(tokens=37)
    bias = positions.RelativeBias(4, buckets=8).double()
    torch.nn.init.normal_(next(bias.parameters()))
    results = []
    for size in (1, 500, 2**21):
        monkeypatch.setattr(_chunked, "BLOCK_SCORES", size)
        out = xf.attention(q, k, v, mask=~masks.Local(1), bias=bias, domain=S(37), kernel="chunked")
        results.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v, *bias.parameters()])))
    for other in results[1:]:
        assert_close(other, results[0], "output and gradients", scale=largest(results[0]))


def _peak(tokens: int) -> int:
    """Bytes that autograd keeps between forward and backward of a chunked attention, beside its inputs and output."""
    q, k, v = qkv(batch=1, heads=2, kv_heads=2, tokens=tokens, dtype=torch.float32)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        xf.attention(
            q, k, v, mask=masks.Windows(16) | masks.Global(2), bias=positions.DistanceDecay(2), kernel="chunked"
        )
    return sum(kept.values())


def test_memory_kept_for_the_backward_is_linear():
    assert _peak(2048) < 2.2 * _peak(1024)


def test_bf16_accumulates_in_fp32():
    q, k, v = (t.detach().to(torch.bfloat16) for t in qkv(tokens=600, dim=16))
    for kernel in ("sdpa", "chunked"):
        got = xf.attention(q, k, v, mask=masks.Causal(), kernel=kernel)
        want = xf.attention(q.double(), k.double(), v.double(), mask=masks.Causal(), kernel="reference")
        assert_close(got, want, kernel)


def test_gradients_of_many_blocks_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    # In bf16 a sum of 1,024 numbers of 1 / 1024 stops at 1 / 4.
    monkeypatch.setattr("xformerlib.kernels._chunked.BLOCK_SCORES", 1)
    where, (query, key, value) = xf.Sequence(1024), torch.zeros(3, 1, 1, 1024, 8, dtype=torch.bfloat16)
    value = value.requires_grad_()
    out = xf.attention(query, key, value, domain=where, kernel="chunked")
    out.backward(torch.ones_like(out))
    assert_close(value.grad, torch.ones_like(value))


def test_plans_say_why():
    def kernel(mask, where, **options):
        return xf.plan(mask, where, heads=4, **options).kernel

    assert kernel(None, S(100_000)) == "sdpa"
    assert kernel(masks.Causal(), S(100_000)) == "sdpa"
    assert kernel(masks.Causal(), S.padded([5, 100_000])) == "packed"
    assert kernel(masks.Causal() & masks.Local(127), S(8192)) == "windowed"
    assert kernel(masks.Local(3), xf.Grid(56, 56, prefix=1)) == "windowed"
    assert kernel(masks.Windows(7, shift=3), xf.Grid(56, 56)) == "packed"
    assert kernel(masks.Axial(0), xf.Grid(56, 56)) == "blocks"
    assert kernel(masks.Local(3), S(100)) == "sdpa"
    far = xf.plan(masks.Where(lambda b, h, q, k: q > k), S(5000))
    assert far.kernel == "chunked" and "5,000 x 5,000 is not small" in far.reasons["sdpa"] and "chunked" in str(far)
    assert kernel(masks.Causal(), S(5000), bias=positions.DistanceDecay(4)) == "chunked"
    assert kernel(None, S(10), softcap=2.0) == kernel(None, S(10), sinks=True) == "chunked"
    assert kernel(None, S(10), kernel="reference") == "reference"


def test_a_kernel_is_used_or_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="kernel='sdpa' cannot compute this attention: it has no soft cap"):
        xf.attention(q, k, v, softcap=1.0, kernel="sdpa")
    with pytest.raises(ValueError, match="kernel must be 'auto' or one of 'sdpa'"):
        xf.attention(q, k, v, kernel="flash")
