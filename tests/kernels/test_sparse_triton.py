"""The fused sparse kernel against the one by products of matrices: on a GPU, and without one in Triton's interpreter.

Triton decides when it is imported whether to interpret, so the interpreter runs these tests in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import xformerlib as xf
from tests.closeness import UNIT, assert_close, largest
from tests.counting import Made
from tests.strategies import randoms
from xformerlib import masks, positions
from xformerlib.kernels import _pattern, _sparse_torch, _sparse_triton
from xformerlib.kernels._merge import Gradients, Merged
from xformerlib.kernels._pattern import Pattern
from xformerlib.kernels._scores import Scores
from xformerlib.kernels._sparse_torch import Call, FeatureGradients, Features

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
PROGRAMS = {"forward", "backward_queries", "backward_keys", "backward_entries", "combine"}
on_device = pytest.mark.filterwarnings("ignore:.*TRITON_DEFAULT_FP_FUSION") if INTERPRETED else pytest.mark.cuda

if not INTERPRETED:

    @pytest.mark.skipif(
        find_spec("triton") is None or torch.cuda.is_available(),
        reason="no Triton here, or a GPU that runs these tests",
    )
    def test_in_the_interpreter() -> None:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-m", "not cuda", "-p", "no:cacheprovider"]
        run = subprocess.run(
            command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout[-6000:]
        assert " passed" in run.stdout and "skipped" not in run.stdout.splitlines()[-1]

    @pytest.mark.skipif(
        find_spec("triton") is None or torch.cuda.is_available(),
        reason="no Triton here, or a GPU that runs these tests",
    )
    @pytest.mark.filterwarnings("ignore:.*TRITON_DEFAULT_FP_FUSION")
    @pytest.mark.parametrize(("dtype", "simple"), [(torch.float32, False), (torch.bfloat16, True)])
    def test_every_program_compiles(
        dtype: torch.dtype, simple: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """For a GPU that is not here: the interpreter takes more of Python than the compiler does."""
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        from xformerlib.kernels import _triton_kernels

        gpu = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )  # fmt: skip
        monkeypatch.setattr(driver, "_active", gpu)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
        monkeypatch.setitem(globals(), "DEVICE", "cpu")
        for name in PROGRAMS:
            monkeypatch.setattr(_triton_kernels, name, Compiled(getattr(_triton_kernels, name)))
        rng = Random(0)
        call = case(rng, dtype)
        while (call.features is None, call.bias is None, not call.scores.dropout_p) != (
            simple,
            simple,
            simple,
        ) or not divided(call):
            call = case(rng, dtype)
        results(_sparse_triton, call, torch.Generator().manual_seed(0))
        names = {name for name in PROGRAMS if getattr(_triton_kernels, name).binaries}
        assert names == PROGRAMS - ({"backward_entries"} if simple else set())


class Compiled:
    """A program that is compiled, and not run, where it is launched."""

    def __init__(self, program: Any) -> None:
        self.program, self.binaries = program, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.binaries.append(self.program.warmup(*args, grid=grid, **kwargs).asm["cubin"])

        return launch


def divided(call: Call) -> bool:
    """Whether rows and columns are long enough for their parts to be added up."""
    return bool(call.pattern.pieces.num_slots and call.pattern.pieces_by_key.num_slots)


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are divided that small cases have."""
    monkeypatch.setattr(_pattern, "DIVIDED_ENTRIES", 5)


def pattern_of(rng: Random, queries: int, keys: int, rows: int | None) -> Pattern:
    """Entries at random: empty rows, hubs among queries and keys, parallel edges."""
    planes = rows or 1
    total = rng.choice([0, 1, 7, 24])
    q, k = torch.randint(planes * queries, (total,)), torch.randint(keys, (total,))
    if rng.random() < 0.6:
        q = torch.cat([q, torch.full((15,), rng.randrange(planes * queries))])
        k = torch.cat([k, torch.randint(keys, (15,))])
    if rng.random() < 0.6:
        q = torch.cat([q, torch.randint(planes * queries, (13,))])
        k = torch.cat([k, torch.full((13,), rng.randrange(keys))])
    q = q[torch.argsort(q, stable=True)]
    k = k[: len(q)]
    if rows is not None:
        k = k + keys * (q // queries)
    pattern = Pattern(q.to(DEVICE), k.to(DEVICE), queries, keys, rows)
    if rng.random() < 0.3:
        pattern.rowptr, pattern.row, pattern.col = (x.long() for x in (pattern.rowptr, pattern.row, pattern.col))
    return pattern


def by_token(rng: Random, x: torch.Tensor) -> torch.Tensor:
    """The same numbers, perhaps in the layout that a model's projection has, or with channels far apart."""
    kind = rng.randrange(4)
    if kind < 2:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.mT.contiguous().mT if kind == 2 else x


def case(rng: Random, dtype: torch.dtype) -> Call:
    """A call with options at random, NaN where nobody may look."""
    batch, (group, kv_heads) = rng.choice([1, 2]), rng.choice([(1, 1), (2, 1), (1, 2), (2, 2)])
    heads, dim, value_dim = group * kv_heads, rng.choice([3, 8]), rng.choice([2, 5])
    queries, keys = rng.choice([1, 4]), rng.choice([2, 5])
    rows = rng.choice([None, None, batch])
    pattern = pattern_of(rng, queries, keys, rows)
    wide = torch.promote_types(dtype, torch.float32)
    count = pattern.num_entries

    def planes(n: int, tokens: int, channels: int) -> torch.Tensor:
        return by_token(rng, torch.randn(batch, n, tokens, channels, device=DEVICE).to(dtype))

    def per_entry() -> torch.Tensor:
        return torch.randn(rng.choice([1, batch]) if rows is None else 1, rng.choice([1, heads]), count, device=DEVICE)

    query, key, value = planes(heads, queries, dim), planes(kv_heads, keys, dim), planes(kv_heads, keys, value_dim)
    bias = per_entry().to(wide) if rng.random() < 0.6 else None
    allowed = per_entry() < 0.7 if rng.random() < 0.5 else None
    if allowed is not None:
        query, key, value = hidden(pattern, allowed, query, key, value)
    features = None
    if allowed is None and rng.random() < 0.4:
        width = rng.choice([1, 4])
        features = Features(planes(heads, queries, width), torch.randn(count, width, device=DEVICE).to(dtype))
    dropout_p = rng.choice([0.0, 0.4])
    seed = torch.randint(1 << 31, (), device=DEVICE) if dropout_p else None
    softcap = rng.choice([None, 1.5])
    scores = Scores(None, (), rng.choice([0.4, 1.0]), softcap, dropout_p, seed)
    return Call(pattern, scores, query, key, value, bias, allowed, features)


def hidden(
    pattern: Pattern, allowed: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NaN in queries that see nothing and keys that nobody sees."""
    batch, heads = query.shape[:2]
    b, _, q, k = (index.flatten() for index in pattern.pairs(batch, heads))
    seen = torch.zeros(batch, heads, query.shape[2], key.shape[2], dtype=torch.bool, device=DEVICE)
    for row in range(batch):
        for head in range(heads):
            yes = allowed[row % allowed.shape[0], head % allowed.shape[1]]
            yes = yes if pattern.rows is None else yes & (b == row)
            seen[row, head, q[yes], k[yes]] = True
    dark = ~seen.any(-2).unflatten(1, (key.shape[1], -1)).any(2)[..., None]
    nan = float("nan")
    dark = ~seen.any(-2).unflatten(1, (key.shape[1], -1)).any(2)[..., None]
    return query.masked_fill(~seen.any(-1)[..., None], nan), key.masked_fill(dark, nan), value.masked_fill(dark, nan)


def without_nan(call: Call) -> Call:
    """What the other engine is given: it does not hide NaN itself."""
    return replace(call, **{name: getattr(call, name).nan_to_num() for name in ("query", "key", "value")})


def results(engine: ModuleType, call: Call, up: torch.Generator) -> dict[str, torch.Tensor]:
    """Outputs and all gradients by one engine, for gradients from above that ``up`` makes."""
    out, lse, sums, _ = engine.forward(call)
    wide = call.wide
    grad = torch.randn(out.shape, generator=up, dtype=torch.float64).to(DEVICE, call.query.dtype)
    delta = (grad.to(wide) * out).sum(-1)
    wanted = None
    if sums is not None and call.features is not None:
        sums_grad = torch.randn(sums.shape, generator=up, dtype=torch.float64).to(DEVICE, call.query.dtype)
        delta = delta + (sums_grad.to(wide) * sums).sum(-1)
        du, de = (torch.zeros_like(x, dtype=wide) for x in call.features)
        wanted = FeatureGradients(sums_grad, du, de)
    merged = Merged(out, lse.masked_fill(lse == float("-inf"), float("inf")), grad, delta)
    into = Gradients([])
    bias_grad = None if call.bias is None else torch.zeros_like(call.bias)
    engine.backward(call, merged, into, bias_grad, wanted)
    made = dict(zip(("dq", "dk", "dv"), into.buffers(call.query, call.key, call.value), strict=True))
    made |= {"out": out, "lse": lse} | ({} if bias_grad is None else {"bias": bias_grad})
    return made if sums is None else made | {"sums": sums, "du": du, "de": de}


def check(rng: Random, dtype: torch.dtype) -> None:
    call = case(rng, dtype)
    seed = rng.randrange(1 << 30)
    got = results(_sparse_triton, call, torch.Generator().manual_seed(seed))
    again = got if INTERPRETED else results(_sparse_triton, call, torch.Generator().manual_seed(seed))
    want = results(_sparse_torch, without_nan(call), torch.Generator().manual_seed(seed))
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert torch.equal(x, again[name]), f"{name} differs between two runs"
        assert x.shape == want[name].shape and x.dtype == want[name].dtype, name
        # The largest scores: a rounding error of one is a relative error of its weight. In half precision, scores are of single.
        condition = 1 if dtype.itemsize == 2 else 4
        assert_close(x, want[name], name, condition=condition, scale=max(1.0, largest(want[name])), dtype=dtype)


@on_device
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@given(rng=randoms)
@settings(max_examples=3 if INTERPRETED else 100)
def test_it_agrees_with_the_other_engine(dtype: torch.dtype, rng: Random) -> None:
    check(rng, dtype)


@on_device
def test_two_runs_are_equal_bit_by_bit() -> None:
    call = graph(*((60, 20) if INTERPRETED else (40_000, 4000)), heads=2, dim=3)
    first, second = (results(_sparse_triton, call, torch.Generator().manual_seed(0)) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@on_device
def test_masks_of_dropout_are_those_of_the_other_engine() -> None:
    """A weight of 1 for each entry, alone in its row: the output says which are kept."""
    n = 16 if INTERPRETED else 1000
    pattern = Pattern(torch.arange(n, device=DEVICE), torch.arange(n, device=DEVICE).flip(0), n, n)
    ones = torch.ones(1 if INTERPRETED else 2, 2, n, 2, device=DEVICE)
    for seed in (0, 2**31 - 1):
        scores = Scores(None, (), 1.0, None, 0.5, torch.tensor(seed, device=DEVICE))
        call = Call(pattern, scores, ones, ones, ones, None, None, None)
        got, want = (engine.forward(call)[0] for engine in (_sparse_triton, _sparse_torch))
        assert torch.equal(got, want) and set(got.unique().tolist()) == {0.0, 2.0}


def graph(entries: int, nodes: int, heads: int, dim: int) -> Call:
    """Random edges, half of which lead to one node in ten."""
    pairs = torch.randint(nodes, (2, entries), device=DEVICE)
    pairs[1, ::2] //= 10
    pairs = pairs[:, torch.argsort(pairs[0], stable=True)]
    q, k, v = torch.randn(3, 1, nodes, heads, dim, device=DEVICE).transpose(2, 3).unbind(0)
    return Call(Pattern(*pairs, nodes, nodes), Scores(None, (), dim**-0.5), q, k, v, None, None, None)


@pytest.mark.cuda
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("trained", [False, True])
def test_attention_on_a_gpu_is_that_on_the_cpu(trained: bool) -> None:
    edges = torch.randint(300, (2, 2000))
    where = xf.Graph(edges, num_nodes=300)
    bias = positions.RelativeBias(4, buckets=4) if trained else None
    layer = xf.Attention(32, 4, kv_heads=2, mask=masks.Local(1), position=bias, kernel="sparse")
    x = torch.randn(300, 32)
    results = []
    for device in ("cpu", "cuda"):
        layer = layer.to(device)
        layer.zero_grad()
        out = layer(x.to(device), where.to(device))
        out.square().sum().backward()
        results.append([out.cpu(), *(p.grad.cpu() for p in layer.parameters())])
    # There and back. Gradients of biases are sums that all but cancel.
    assert_close(results[1], results[0], "output and gradients", depth=2, scale=largest(results[0]))


@on_device
def test_it_makes_no_vector_for_an_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that operators of torch make is some numbers for each token and edge: vectors of edges never leave the programs."""
    monkeypatch.setattr(_pattern, "DIVIDED_ENTRIES", 2**10)
    entries = 120 if INTERPRETED else 2_000_000
    call = graph(entries, entries // 20, heads=2, dim=32)
    with Made() as made:
        one_step(_sparse_triton, call, torch.ones_like(call.query))
    vectors = entries * 2 * 32 * 4
    assert made.bytes < vectors / 2


@pytest.mark.cuda
def test_on_a_gpu_it_is_linear_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pattern, "DIVIDED_ENTRIES", 2**10)
    call = graph(2_000_000, 100_000, heads=8, dim=32)
    upstream = torch.randn_like(call.query)
    one_step(_sparse_triton, call, upstream)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        one_step(_sparse_triton, call, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Output, three gradients and the parts of divided runs; a vector for each edge and head would be 25 times a query.
    assert torch.cuda.max_memory_allocated() - before < 8 * call.query.nbytes


def one_step(engine: ModuleType, call: Call, grad: torch.Tensor) -> None:
    out, lse, _, _ = engine.forward(call)
    engine.backward(call, Merged(out, lse, grad, (grad * out).sum(-1)), Gradients([]), None, None)
