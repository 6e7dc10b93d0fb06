"""Tiles of few keys, whose weights are kept for the backward, against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

import xformerlib as xf
from benchmarks._measure import Setting, memory
from tests.closeness import assert_close, largest
from xformerlib import masks, positions
from xformerlib.kernels import _formulas

S = xf.Sequence
SCALE = 1.0  # of inputs, and so of the sums that results are, however small these are
WAYS = {
    "all": (None, None),
    "in order": (masks.Causal(), None),
    "near": (masks.Local(2), None),
    "some see nothing": (masks.Causal() & ~masks.Local(0), None),
    "a bias that is trained": (None, positions.RelativeBias),
    "a bias that is trained, and a mask": (masks.Local(3), positions.RelativeBias),
    "a bias that is not trained": (masks.Causal(), positions.DistanceDecay),
}


def inputs(tokens, heads=4, kv_heads=2, dim=5, value_dim=3, batch=1, dtype=torch.float64):
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim)
    return [torch.randn(batch, h, tokens, d, dtype=dtype, requires_grad=True) for h, d in shapes]


def keeps_weights(mask, domain, **options):
    ((part, _),) = xf.plan(mask, domain, **options)._run
    return part._keeps_weights(options["head_dim"], False, 0.0, domain.num_tokens)


def outputs(q, k, v, mask, domain, bias, kernel):
    out = xf.attention(q, k, v, mask=mask, domain=domain, bias=bias, kernel=kernel)
    trained = [] if bias is None else [p for p in bias.parameters() if p.requires_grad]
    wanted = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, [q, k, v, *trained], wanted)]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=2, max_size=12).filter(any),
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_are_those_of_the_oracle(way, lengths, batch, seed):
    torch.manual_seed(seed)
    mask, make = WAYS[way]
    bias = None if make is None else make(4).double()
    if bias is not None:
        for parameter in bias.parameters():
            torch.nn.init.normal_(parameter)
    domain, given = S.packed(lengths), inputs(sum(lengths), batch=batch)
    found = outputs(*given, mask, domain, bias, "blocks" if len(set(lengths) - {0}) == 1 else "packed")
    assert_close(found, outputs(*given, mask, domain, bias, "reference"), "output and gradients", scale=SCALE)


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_kept_where_few_tokens_meet_and_only_there(way):
    mask, make = WAYS[way]
    bias = None if make is None else make(4)
    assert keeps_weights(mask, S.packed([5, 9, 7] * 200), heads=4, head_dim=16, bias=bias)
    assert not keeps_weights(mask, S.packed([90, 97] * 100), heads=4, head_dim=64, bias=bias)
    assert not keeps_weights(mask, S.packed([33] * 200), heads=4, head_dim=4, bias=bias)  # they would take more memory


@pytest.mark.parametrize("room", [1, 60, 500, 4000])
@pytest.mark.parametrize("way", WAYS)
def test_pieces_of_any_size(way, room, monkeypatch):
    monkeypatch.setattr(_formulas, "PIECE", room)  # a query's scores are 4 to 9
    torch.manual_seed(0)
    mask, make = WAYS[way]
    bias = None if make is None else make(4).double()
    domain, given = S.packed([5, 9, 4, 9, 5, 5] * 3), inputs(111, batch=2)
    assert_close(
        *(outputs(*given, mask, domain, bias, kernel) for kernel in ("packed", "reference")),
        "output and gradients",
        scale=SCALE,
    )


def test_nothing_is_kept_where_nothing_is_learned():
    domain, given = S.packed([30, 20] * 200), [x.float() for x in inputs(10_000)]

    def held(grad):
        def forward():
            with torch.set_grad_enabled(grad):
                return (xf.attention(*given, domain=domain, kernel="packed"),)

        forward()
        return memory(forward, Setting())[0]

    weights = 200 * (30**2 + 20**2) * 4 * 4
    assert held(grad=True) - held(grad=False) >= weights / 2


@pytest.mark.parametrize("domain", [xf.Grid(9, 7), S(64)], ids=repr)
@pytest.mark.parametrize("shift", [0, 1])
def test_windows_of_rows_of_a_batch(domain, shift):
    given = inputs(domain.num_tokens, batch=3)
    mask = masks.Windows(4, shift=shift)
    kernel = "blocks" if domain == S(64) and not shift else "packed"
    assert keeps_weights(mask, domain, batch=3, heads=4, head_dim=5, kernel=kernel)
    assert_close(
        *(outputs(*given, mask, domain, None, kernel) for kernel in (kernel, "reference")),
        "output and gradients",
        scale=SCALE,
    )


def test_rows_with_segments_of_their_own():
    ids = (
        torch.tensor([[0] * 20 + [1] * 12, [0] * 7 + [1] * 25]).repeat(8, 4) + torch.arange(4).repeat_interleave(32) * 2
    )
    given, mask = inputs(128, batch=16), masks.Segments(ids)
    assert_close(
        *(outputs(*given, mask, S(128), None, kernel) for kernel in ("packed", "reference")),
        "output and gradients",
        scale=SCALE,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    domain = S.packed([7, 12, 3, 9] * 8)
    given = [x.to(dtype).detach().requires_grad_() for x in inputs(domain.num_tokens)]
    exact = outputs(*(x.detach().double().requires_grad_() for x in given), None, domain, None, "reference")
    for got, want in zip(outputs(*given, None, domain, None, "packed"), exact, strict=True):
        assert got.dtype == dtype
        assert_close(got, want)


def test_what_nobody_may_see_does_not_matter():
    domain, mask = S.packed([4, 6] * 20), masks.Keys(torch.arange(200) % 5 != 0)
    q, k, v = inputs(200)
    with torch.no_grad():
        k[:, :, ::5], v[:, :, ::5] = torch.nan, torch.inf
    assert keeps_weights(mask, domain, heads=4, head_dim=5, kernel="packed")
    found = outputs(q, k, v, mask, domain, None, "packed")
    assert all(x.isfinite().all() for x in found)
    assert not found[2][:, :, ::5].any() and not found[3][:, :, ::5].any()


DENSE = {"all": None, "in order": masks.Causal(), "some see nothing": masks.Causal() & ~masks.Local(0)}


@pytest.mark.parametrize("way", DENSE)
@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (2, 1), (2, 4)], ids=str)
def test_a_dense_bias_that_is_learned(way, shape):
    (q, *_), (_, k, v) = inputs(7, batch=2), inputs(9, batch=2)
    bias = torch.randn(*shape, 7, 9, dtype=torch.float64, requires_grad=True)
    domains = {"domain": S(7, start=2), "key_domain": S(9), "mask": DENSE[way]}

    def found(kernel):
        out = xf.attention(q, k, v, bias=bias, kernel=kernel, **domains)
        plain = torch.autograd.grad(out, [q, k, v, bias], out.detach().sin(), retain_graph=True)
        first = torch.autograd.grad(out.cos().sum(), [q, k, v, bias], create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), [q, k, v, bias])
        return [out, *plain, *first, *second]

    wanted = found("reference")
    assert_close(found("sdpa"), wanted, "output, gradients and theirs", depth=3, scale=largest(wanted))


def test_a_row_of_a_learned_bias_that_hides_all_keys():
    given = inputs(5, kv_heads=4)
    bias = torch.zeros(5, 5, dtype=torch.float64)
    bias[2] = -torch.inf
    out = xf.attention(*given, bias=bias.requires_grad_(), kernel="sdpa")
    grads = torch.autograd.grad(out.sum(), [*given, bias])
    assert not out[:, :, 2].any() and out[:, :, 3].all()
    assert all(x.isfinite().all() for x in grads) and not grads[0][:, :, 2].any()


def test_the_plan_counts_the_scores_of_a_learned_bias():
    q, k, v = (torch.randn(8, 4, 100, 16, requires_grad=True) for _ in range(3))
    bias, domain = positions.RelativeBias(4), S(100)
    plan = xf.plan(None, domain, batch=8, heads=4, head_dim=16, bias=bias)
    taken = memory(lambda: (xf.attention(q, k, v, bias=bias, domain=domain),), Setting())[0]
    assert plan.kernel == "sdpa" and taken / 2 < plan.bytes < 2 * taken
