"""The routes for CUDA: what they compute, seen here without a GPU through FlexAttention's uncompiled formulas, and when they are chosen."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import flex_attention as torch_flex

import xformerlib as xf
from tests.kernels.test_matrix import HEADS, KV_HEADS, close, inputs
from tests.strategies import DOMAINS, ROWS, position, randoms, tree
from xformerlib import masks, positions
from xformerlib.kernels import Plan, Problem, Scores, _flex, _varlen, choose

# torch hides this warning of its own from users, but not where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

GENERATED = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention by its formulas, which torch refuses to differentiate on the CPU for want of a kernel, not of formulas."""
    monkeypatch.setattr(_flex, "COMPILED", False)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
    monkeypatch.setattr(torch_flex, "_warn_once", lambda *args, **options: None)


def problem_of(tensors: dict[str, Tensor], where: xf.Domain, options: SimpleNamespace, **changes: object) -> Problem:
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    problem = Problem(
        options.mask, where, where, len(query), query.shape[1], key.shape[1], query.shape[3], value.shape[3], query.dtype, "cuda",
        bias="fixed" if options.bias else None, softcap=options.softcap is not None, sinks=options.sinks is not None,
        pointwise_bias=all(isinstance(term, Tensor) or term.is_pointwise(where) for term in options.bias),
    )  # fmt: skip
    if any(isinstance(term, Tensor) for term in options.bias):
        problem = replace(problem, bias="dense")
    return replace(problem, **changes)


def computed(
    plan: Plan, problem: Problem, tensors: dict[str, Tensor], where: xf.Domain, options: SimpleNamespace
) -> Tensor:
    """What attention does with a plan."""
    dense = any(isinstance(term, Tensor) for term in options.bias)
    scores = Scores(
        plan.predicate,
        tuple(
            term if isinstance(term, Tensor) else term.pair(where, dtype=torch.promote_types(tensors["query"].dtype, torch.float32))
            for term in options.bias
        ),
        options.scale, options.softcap, reflexive=problem.is_reflexive and not dense, clean=problem.is_clean and not dense,
    )  # fmt: skip
    query, key, value = (
        x if where.valid is None else x.masked_fill(~where.valid[:, None, :, None], 0)
        for x in (tensors[name] for name in ("query", "key", "value"))
    )
    return plan.run(problem, scores, query, key, value, options.sinks)


def gradients(out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    up = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(0), device=out.device).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), up, allow_unused=True, materialize_grads=True)
    return {"output": out.detach(), **dict(zip(leaves, grads, strict=True))}


def drawn(rng: Random, where: xf.Domain, dtype: torch.dtype) -> tuple[dict[str, Tensor], SimpleNamespace]:
    """Inputs with NaN wherever nobody may look, and options."""
    mask = tree(rng, where)
    drawn_position = position(rng, HEADS, 16, where)
    biases: list = [] if drawn_position is None else list(drawn_position.biases)
    for bias in biases:
        bias.to(torch.promote_types(dtype, torch.float32))
        for parameter in bias.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    if rng.random() < 0.2:
        shape = rng.choice([1, ROWS]), rng.choice([1, HEADS]), where.num_tokens, rng.choice([1, where.num_tokens])
        biases.append(torch.randn(shape, dtype=dtype).masked_fill(torch.rand(shape) < 0.2, float("-inf")))
    sinks = torch.randn(HEADS, dtype=dtype, requires_grad=True) if rng.random() < 0.3 else None
    softcap = rng.choice([None, 2.0])
    return inputs(rng, where, where, mask, dtype), SimpleNamespace(
        mask=mask, bias=biases, scale=0.3, softcap=softcap, sinks=sinks
    )


def leaves_of(tensors: dict[str, Tensor], options: SimpleNamespace) -> dict[str, Tensor]:
    modules = [bias for bias in options.bias if not isinstance(bias, Tensor)]
    found = {f"{i}.{n}": p for i, module in enumerate(modules) for n, p in module.named_parameters()}
    return {**tensors, **found, **({} if options.sinks is None else {"sinks": options.sinks})}


def check_agrees_with_the_oracle(rng: Random, kind: str, dtype: torch.dtype, problem_changes: dict) -> None:
    where = DOMAINS[kind](rng)
    tensors, options = drawn(rng, where, dtype)
    leaves = leaves_of(tensors, options)
    problem = problem_of(tensors, where, options, **problem_changes)
    plan = choose(problem, "auto", tensors["query"].device)
    if plan.kernel == "sdpa" and where.num_tokens:  # few pairs: leave dense attention aside
        plan = choose(problem, "chunked", tensors["query"].device)
    want = xf.attention(
        *tensors.values(), domain=where, kernel="reference", **{**vars(options), "bias": options.bias or None}
    )
    want, got = (gradients(out, leaves) for out in (want, computed(plan, problem, tensors, where, options)))
    for name, value in got.items():
        steep = 4 if name[0].isdigit() else 1  # parameters of biases
        close(value, want[name], dtype, f"{name} by\n{plan}\n{options} on {where!r}", steep)


@pytest.mark.parametrize("kind", DOMAINS)
@given(rng=randoms)
@GENERATED
def test_flex_attention_agrees_with_the_oracle(kind: str, uncompiled: None, rng: Random) -> None:
    torch._dynamo.reset()
    # In double precision, which the plan would leave to the tiles: what is checked is what FlexAttention is asked for.
    check_agrees_with_the_oracle(rng, kind, torch.float64, {"dtype": torch.float32})


@pytest.mark.cuda
@pytest.mark.parametrize("kind", DOMAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(rng=randoms)
@GENERATED
def test_on_a_gpu_compiled_code_agrees_with_the_oracle(kind: str, dtype: torch.dtype, rng: Random) -> None:
    with torch.device("cuda"):
        check_agrees_with_the_oracle(rng, kind, dtype, {})


def eager_varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Item by item, as torch's operator for half precision on a GPU is documented."""
    out, lse = torch.empty_like(query), query.new_zeros(query.shape[1], len(query))
    assert bounds.dtype == torch.int32
    assert longest == int(bounds.diff().max())
    group = query.shape[1] // key.shape[1]
    parts = []
    for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = query[a:b], key[a:b].repeat_interleave(group, 1), value[a:b].repeat_interleave(group, 1)
        s = torch.einsum("qhd,khd->hqk", q, k) * scale
        s = s.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), float("-inf")) if causal else s
        parts.append(torch.einsum("hqk,khd->qhd", torch.softmax(s, -1), v))
        lse[:, a:b] = torch.logsumexp(s.detach(), -1)
    out = torch.cat(parts)
    assert out.shape == query.shape
    return out, lse


@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal()], ids=repr)
def test_packed_items_are_laid_out_for_varlen(mask: masks.Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_varlen, "_varlen_attn", eager_varlen)
    where = xf.Sequence.packed([3, 0, 600, 5, 2000], prefix=0)
    tensors = {
        name: torch.randn(ROWS, heads, where.num_tokens, dim, dtype=torch.float64, requires_grad=True)
        for name, heads, dim in (("query", HEADS, 6), ("key", KV_HEADS, 6), ("value", KV_HEADS, 3))
    }
    options = SimpleNamespace(mask=mask, bias=[], scale=0.3, softcap=None, sinks=None)
    problem = problem_of(tensors, where, options, dtype=torch.bfloat16)
    plan = choose(problem, "auto", torch.device("cpu"))
    assert plan.kernel == "packed"
    assert "by varlen" in str(plan)
    want = gradients(xf.attention(*tensors.values(), mask=mask, domain=where, scale=0.3, kernel="packed"), tensors)
    for name, value in gradients(computed(plan, problem, tensors, where, options), tensors).items():
        close(value, want[name], torch.float64, name)


# -- what is chosen ------------------------------------------------------------------------------------------------------


def planned(mask: masks.Mask | None, where: xf.Domain, **options: object) -> Plan:
    return xf.plan(mask, where, **{"heads": 8, "device": "cuda", "dtype": torch.bfloat16, **options})


def test_structures_go_through_flex_attention_on_cuda() -> None:
    assert str(planned(masks.Local(64) | masks.Global(16), xf.Sequence(1_000_000))).splitlines()[:2] == [
        "kernel        windowed",
        "part          Local(64) | Global(16), by FlexAttention: windowed",
    ]
    swin = planned(masks.Windows(7, shift=3), xf.Grid(56, 56), bias=positions.RelativeBias(8, size=(7, 7)))
    assert swin.parts == (("Windows(size=7, shift=3), by FlexAttention", "packed"),)
    series = xf.Sequence.padded([100, 4000])
    assert planned(masks.Causal(), series).parts == (("Causal(), by FlexAttention", "packed"),)
    t5 = planned(None, xf.Sequence(4096), bias=positions.RelativeBias(8))
    assert t5.parts == (("Full(), by FlexAttention", "chunked"),)
    graph = xf.Graph(torch.randint(0, 20_000, (2, 50_000)), 20_000, virtual_nodes=1)
    assert [kernel for _, kernel in planned(masks.Edges(), graph).parts] == ["sdpa", "sparse"]


def test_packed_items_go_through_varlen_in_half_precision() -> None:
    series = xf.Sequence.packed([100, 300, 4000])
    assert planned(masks.Causal(), series).parts[0][0].endswith("by varlen")
    for options in ({"dtype": torch.float32}, {"softcap": 2.0}, {"bias": positions.DistanceDecay(8)}, {"sinks": True}):
        assert planned(masks.Causal(), series, **options).parts == (("Causal(), by FlexAttention", "packed"),)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_p": 0.1}, "FlexAttention has no dropout"),
        ({"dtype": torch.float64}, "FlexAttention does not compute in torch.float64"),
        ({"head_dim": 320}, "FlexAttention has heads of no more than 256 channels"),
    ],
)
def test_what_flex_attention_cannot_do_is_left_to_the_tiles(options: dict, reason: str) -> None:
    plan = planned(masks.Local(64), xf.Sequence(8192), **options)
    assert (plan.kernel, plan.reasons["flex"]) == ("windowed", reason)
    assert plan.parts == (("Local(64)", "windowed"),)


def test_a_network_at_each_pair_is_left_to_the_tiles() -> None:
    plan = planned(masks.Local(4.0), xf.Points(torch.rand(5000, 3)), bias=positions.ContinuousBias(8))
    assert "a network at each pair" in plan.reasons["flex"]
    steps = planned(masks.Local(4), xf.Grid(70, 70), bias=positions.ContinuousBias(8))  # there it makes a table
    assert "by FlexAttention" in steps.parts[0][0]


def test_functions_go_through_flex_attention_if_they_can_be_traced() -> None:
    even = masks.Where(lambda b, h, q, k: (q + k) % 2 == 0)
    plan = planned(masks.Local(3) & even, xf.Sequence(2048))
    assert "by FlexAttention" in plan.parts[0][0]
    assert plan.flops < planned(even, xf.Sequence(2048)).flops / 4  # the window's blocks only
    with xf.strict("fused"):
        assert planned(even, xf.Sequence(2048)).kernel == "chunked"
        with pytest.raises(ValueError, match="cannot trace"):
            planned(masks.Where(lambda b, h, q, k: q > k if bool((q > k).all()) else q < k), xf.Sequence(2048))
    too_many = planned(even, xf.Sequence(2**15))
    assert "before each call" in too_many.reasons["flex"]
    assert "FlexAttention" not in too_many.parts[0][0]


# -- what kernels are compiled for ---------------------------------------------------------------------------------------

# Beside pointwise operators: looking up, and what makes or moves an index.
IN_KERNELS = {
    "index.Tensor",
    "select.int",
    "slice.Tensor",
    "floor_divide.default",
    "full_like.default",
    "zeros_like.default",
}


@settings(max_examples=80)
@given(rng=randoms)
def test_predicates_are_what_a_kernel_can_do_for_one_pair(rng: Random) -> None:
    where = DOMAINS[rng.choice(sorted(DOMAINS))](rng)
    if where.num_tokens == 0:
        return
    predicate = tree(rng, where).bind(where)
    index = torch.zeros(1, dtype=torch.long)
    predicate(index, index, index, index)  # makes what the domain keeps
    for node in make_fx(predicate)(index, index, index, index).graph.nodes:
        if node.op == "call_function":
            name = str(node.target).removeprefix("aten.")
            assert torch.Tag.pointwise in node.target.tags or name in IN_KERNELS, name


def test_lengths_are_not_what_kernels_are_compiled_for(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flex, "COMPILED", True)
    counter, compiler = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=counter, **options))
    _flex._compiled.cache_clear()
    bias = positions.RelativeBias(HEADS)
    for i in range(6):
        where = xf.Sequence.packed([150 + 90 * i, 40 * i, 20])
        tensors = {
            name: torch.randn(1, HEADS, where.num_tokens, 16, requires_grad=True) for name in ("query", "key", "value")
        }
        options = SimpleNamespace(mask=masks.Causal(), bias=[bias], scale=0.3, softcap=None, sinks=None)
        problem = problem_of(tensors, where, options)
        out = computed(choose(problem, "packed", torch.device("cpu")), problem, tensors, where, options)
        gradients(out, tensors)
    _flex._compiled.cache_clear()
    assert counter.frame_count <= 3
