"""The sparse kernel against a dense formula over the listed pairs, and what it promises beside its values."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from torch.profiler import ProfilerActivity, profile

import xformerlib as xf
from tests.closeness import assert_close, largest
from tests.strategies import randoms
from xformerlib import masks, positions
from xformerlib.kernels import _stack
from xformerlib.kernels._pattern import Pattern
from xformerlib.kernels._scores import Scores
from xformerlib.kernels._sparse import edge_attention


class Inputs(NamedTuple):
    """Leaves of an attention along listed pairs: features ``e`` of them, and vectors ``u`` by which queries score these."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    u: torch.Tensor
    e: torch.Tensor
    bias: torch.Tensor


def drawn_pattern(rng: Random) -> tuple[Pattern, int]:
    """Few or no entries, parallel ones, queries and keys without any, a row that is longer than a piece; and the rows of the batch."""
    batch, rows = rng.choice([1, 2, 3]), rng.choice([None, True])
    queries, keys = rng.randint(1, 6), rng.randint(1, 6)
    blocks = batch if rows else 1
    pairs = [
        (b * queries + rng.randrange(queries), b * keys + rng.randrange(keys))
        for b in range(blocks)
        for _ in range(rng.choice([0, 1, 8, 40]))
    ]
    if rng.random() < 0.3:
        pairs += [(rng.randrange(queries), rng.randrange(keys))] * rng.choice([300, 600])
    row, col = torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2).unbind(1)
    return Pattern(row, col, queries, keys, batch if rows else None), batch


def drawn_inputs(rng: Random, pattern: Pattern, batch: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Vectors in the layout of a linear layer or of their own, with grouped heads or not."""
    heads, kv_heads = rng.choice([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)])
    dim, value_dim, features = rng.randint(1, 5), rng.randint(1, 5), rng.randint(0, 3)

    def tokens(heads: int, count: int, dim: int) -> torch.Tensor:
        if rng.random() < 0.5:
            return torch.randn(batch, heads, count, dim, dtype=dtype)
        return torch.randn(batch, count, heads, dim, dtype=dtype).transpose(1, 2)

    shape = rng.choice([1, batch]), rng.choice([1, heads]), pattern.num_queries, pattern.num_keys
    leaves = (
        tokens(heads, pattern.num_queries, dim),
        tokens(kv_heads, pattern.num_keys, dim),
        tokens(kv_heads, pattern.num_keys, value_dim),
        tokens(heads, pattern.num_queries, features),
        torch.randn(pattern.num_entries, features, dtype=dtype),
        torch.randn(shape, dtype=dtype),
    )
    return Inputs(*(x.requires_grad_() for x in leaves))


def formula(pattern: Pattern, scores: Scores, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """A vector for every entry, row of the batch and head."""
    (query, key, value, u, e, bias), (batch, heads, tokens, _) = inputs, inputs.query.shape
    pairs = pattern.pairs(batch, heads)
    b, h, q, k = (x[0, :, :, 0] for x in torch.broadcast_tensors(*pairs))
    kv = torch.div(h, heads // key.shape[1], rounding_mode="floor")
    s = scores.scale * ((query[b, h, q] * key[b, kv, k]).sum(-1) + (u[b, h, q] * e).sum(-1))
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    s = s + bias.expand(batch, heads, -1, -1)[b, h, q, k]
    place = (b * heads + h) * tokens + q
    exp, zeros = torch.exp(s - s.max() if s.numel() else s).flatten(), query.new_zeros(batch * heads * tokens)
    p = exp / zeros.index_add(0, place.flatten(), exp)[place.flatten()]
    if scores.dropout_p:
        p = p * scores.kept(pairs).flatten() / (1 - scores.dropout_p)

    def sums(x: torch.Tensor) -> torch.Tensor:
        weighted = p[:, None] * x.expand(*place.shape, -1).flatten(0, 2)
        return (
            x.new_zeros(zeros.numel(), x.shape[-1])
            .index_add(0, place.flatten(), weighted)
            .view(batch, heads, tokens, -1)
        )

    return sums(value[b, kv, k]), sums(e)


def gradients(results: tuple[torch.Tensor, ...], inputs: Inputs) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    up = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    found = torch.autograd.grad(results, inputs, up, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in results), *found]


@given(rng=randoms)
@settings(max_examples=80)
def test_edges_with_features_are_the_formula(rng):
    """However the planes are grouped: all at once, some heads, or one at a time, in runs of any length."""
    pattern, batch = drawn_pattern(rng)
    inputs = drawn_inputs(rng, pattern, batch)
    scores = Scores(
        None,
        (inputs.bias,),
        rng.uniform(0.2, 1),
        softcap=rng.choice([None, 1.5]),
        dropout_p=rng.choice([0.0, 0.4]),
        seed=torch.tensor(rng.randrange(2**31)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stack, "STACK_ENTRIES", rng.choice([1, 50, 2**21]))
        patch.setattr(_stack, "RUN_ENTRIES", rng.choice([1, 20, 2**19]))
        got = gradients(
            edge_attention(*inputs[:3], pattern, scores, inputs.u, inputs.e),
            inputs,
        )
    want = gradients(formula(pattern, scores, inputs), inputs)
    for name, a, b in zip(("out", "sums", *Inputs._fields), got, want, strict=True):
        assert a.dtype == got[0].dtype, name
        assert_close(a, b, name, scale=max(1.0, largest(b)))


def drawn_graph(rng: Random, nodes: int, edges: int) -> xf.Graph:
    """Parallel edges and self-loops included; at least the last two nodes have no edge."""
    ends = [[rng.randrange(max(nodes - 2, 1)) for _ in range(edges)] for _ in range(2)]
    return xf.Graph(torch.tensor(ends, dtype=torch.long), nodes)


def vectors(
    graph: xf.Domain,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 3,
    value_dim: int = 5,
    batch: int = 2,
    dtype=torch.float64,
) -> list[torch.Tensor]:
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim)
    return [torch.randn(batch, graph.num_tokens, h, d, dtype=dtype).transpose(1, 2).requires_grad_() for h, d in shapes]


@given(rng=randoms)
@settings(max_examples=40)
def test_a_part_of_a_mask_is_the_oracle(rng):
    """Alone, which keeps its weights, and beside others or a sink, which does not; masks that ask more of an edge than to be there."""
    graph = drawn_graph(rng, rng.randint(3, 12), rng.randint(0, 40))
    edges = masks.Edges(self_loops=rng.random() < 0.5)
    mask = rng.choice(
        [
            edges,
            edges | masks.Global(1),
            masks.Expander(2, seed=rng.randint(0, 3)),
            edges & masks.Where(lambda b, h, q, k: (q + k + h + b) % 3 != 0),
            edges & ~masks.Keys(torch.tensor([rng.random() < 0.3 for _ in range(graph.num_tokens)])),
        ]
    )
    bias = positions.RelativeBias(4, buckets=4).double() if rng.random() < 0.6 else None
    if bias is not None:
        torch.nn.init.normal_(bias.table)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if rng.random() < 0.3 else None
    options = {"mask": mask, "domain": graph, "bias": bias, "softcap": rng.choice([None, 2.0]), "sinks": sinks}
    leaves = vectors(graph)
    wanted = [*leaves, *([] if bias is None else [bias.table]), *([] if sinks is None else [sinks])]
    if not mask.dense(graph, heads=4).any():
        with pytest.raises(ValueError, match="no pair is allowed"):
            xf.attention(*leaves, kernel="sparse", **options)
        return
    results = []
    for kernel in ("reference", "sparse"):
        out = xf.attention(*leaves, kernel=kernel, **options)
        up = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        results.append([out, *torch.autograd.grad(out, wanted, up, allow_unused=True, materialize_grads=True)])
    assert_close(results[1], results[0], "output and gradients", scale=max(1.0, largest(results[0])))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"dropout_p": 0.3}], ids=str)
def test_two_backward_passes_are_the_same_bit_by_bit(options):
    rng = Random(0)
    graph, threads = drawn_graph(rng, 200, 4000), torch.get_num_threads()
    leaves = vectors(graph, dtype=torch.float32)
    runs = {1: [], 2: []}
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            out = xf.attention(*leaves, mask=masks.Edges(), domain=graph, kernel="sparse", **options)
            loss = out.square().sum()
            runs[count] += [torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(loss, leaves)]
    finally:
        torch.set_num_threads(threads)
    for first, *others in runs.values():
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert_close(runs[2][0], runs[1][0], "gradients by two threads", depth=2)


def test_dropout_is_that_of_the_oracle():
    graph = drawn_graph(Random(0), 30, 200)
    leaves = vectors(graph)
    results = []
    for kernel in ("reference", "sparse"):
        torch.manual_seed(3)
        out = xf.attention(*leaves, mask=masks.Edges(), domain=graph, kernel=kernel, dropout_p=0.4)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert_close(results[1], results[0], "output and gradients")


def test_nobody_sees_a_nan_where_no_edge_leads():
    graph = drawn_graph(Random(0), 20, 60)
    q, k, v = vectors(graph, dtype=torch.float32)
    isolated = torch.ones(20, dtype=torch.bool).index_fill(0, graph.edge_index.unique(), False)
    assert isolated.any()
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, isolated] = float("nan")
    for mask in (masks.Edges(), masks.Edges() & masks.Where(lambda b, h, q, k: (q + k + h) % 2 == 0)):
        out = xf.attention(q, k, v, mask=mask, domain=graph, kernel="sparse")
        assert out.isfinite().all() and not out[:, :, isolated].any()
        for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
            assert grad.isfinite().all() and not grad[:, :, isolated].any()


def test_long_rows_lose_no_digits():
    """A sum of a hundred thousand numbers in single precision, one after the other, would."""
    count = 100_000
    graph = xf.Graph(torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.long)]), count)
    query, key, value = (x.detach() for x in vectors(graph, heads=1, kv_heads=1, batch=1, dtype=torch.float32))
    value += 3  # numbers of one sign, whose errors add up
    out = xf.attention(query, key, value, mask=masks.Edges(), domain=graph, kernel="sparse")
    weights = torch.softmax((query[0, 0, 0] @ key[0, 0].T).double() / math.sqrt(3), 0)
    assert_close(out[0, 0, 0], weights @ value[0, 0].double())


def test_bf16_accumulates_in_fp32():
    graph = drawn_graph(Random(0), 100, 2000)
    leaves = vectors(graph, dim=16, value_dim=16, dtype=torch.bfloat16)
    results = []
    for kernel, dtype in (("sparse", torch.bfloat16), ("reference", torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = xf.attention(*inputs, mask=masks.Edges(), domain=graph, kernel=kernel)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.bfloat16
        assert_close(got, want)


@pytest.mark.parametrize("degree", [8, 64], ids=["weights kept", "weights computed again"])
def test_memory_is_linear_in_the_edges(degree):
    """What edges cost beside inputs, outputs and gradients: some numbers for each edge and head, and no vectors."""
    heads, dim = 4, 32
    peaks = []
    for nodes in (1000, 2000):
        rng = Random(0)
        graph = drawn_graph(rng, nodes, degree * nodes)
        leaves = vectors(graph, heads=heads, kv_heads=heads, dim=dim, value_dim=dim, batch=1, dtype=torch.float32)

        def step(graph: xf.Graph = graph, leaves: list[torch.Tensor] = leaves) -> None:
            out = xf.attention(*leaves, mask=masks.Edges(), domain=graph, kernel="sparse")
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        step()
        peaks.append(_peak(step) - 4 * leaves[0].numel() * 4)
        assert peaks[-1] < 4 * heads * (10 * degree * nodes + 2 * dim * nodes)
    assert 1.8 * peaks[0] < peaks[1] < 2.2 * peaks[0]


def _peak(step: Callable[[], None]) -> int:
    """The most bytes that a step holds at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
