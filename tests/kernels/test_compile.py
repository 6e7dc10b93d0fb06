"""Layers in torch.compile: cold, one graph, the same numbers; few graphs over many lengths, domains and masks."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import xformerlib as xf
from tests.closeness import assert_close, largest
from xformerlib import masks, positions

pytestmark = pytest.mark.usefixtures("double")
DIM, HEADS = 16, 2
EDGES = torch.randint(0, 60, (2, 240), generator=torch.Generator().manual_seed(0))


def _odd(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q + k) % 3 == 0


# What is compiled: arguments of the layer, and how its domain is made.
CASES: dict[str, tuple[dict[str, Any], Callable[[], xf.Domain | None]]] = {
    "sdpa": ({"mask": masks.Causal(), "position": positions.Rotary(8)}, lambda: xf.Sequence(64)),
    "sdpa with a trained bias": ({"position": positions.RelativeBias(HEADS)}, lambda: xf.Sequence(64)),
    "sdpa of a small mask": ({"mask": masks.Local(9), "kernel": "sdpa"}, lambda: xf.Sequence(64)),
    "default domain": ({"mask": masks.Local(9), "position": positions.Rotary(8)}, lambda: None),
    "windowed": ({"mask": masks.Causal() & masks.Local(9), "kernel": "windowed"}, lambda: xf.Sequence(200)),
    "windowed with a trained bias": (
        {"mask": masks.Local(9), "position": positions.RelativeBias(HEADS), "kernel": "windowed"},
        lambda: xf.Sequence(200),
    ),
    "windowed with a network": (
        {"mask": masks.Local(0.3), "position": positions.ContinuousBias(HEADS, hidden=8)},
        lambda: xf.Timeline(torch.linspace(0, 9, 200) ** 0.9),
    ),
    "blocks": (
        {"mask": masks.Windows(4), "position": positions.RelativeBias(HEADS, size=(4, 4)), "kernel": "blocks"},
        lambda: xf.Grid(12, 12, prefix=1),
    ),
    "packed": ({"mask": masks.Causal(), "kernel": "packed"}, lambda: xf.Sequence.packed([30, 50, 40])),
    "padded": ({"position": positions.DistanceDecay(HEADS)}, lambda: xf.Sequence.padded([30, 50, 40])),
    "sparse": ({"mask": masks.Edges(self_loops=True), "kernel": "sparse"}, lambda: xf.Graph(EDGES, 60)),
    "graph with a trained bias": ({"position": positions.RelativeBias(HEADS)}, lambda: xf.Graph(EDGES, 60)),
    "expander": ({"mask": masks.Expander(4)}, lambda: xf.Sequence(300)),
    "chunked": ({"mask": masks.Where(_odd), "kernel": "chunked"}, lambda: xf.Sequence(100)),
    "reference": ({"mask": masks.Where(_odd), "kernel": "reference"}, lambda: xf.Sequence(30)),
    "window and global": ({"mask": masks.Local(9) | masks.Global(2)}, lambda: xf.Sequence(500)),
    "segments": ({"mask": masks.Segments(torch.arange(120) // 17)}, lambda: xf.Sequence(120)),
    "sinks, softcap, grouped": (
        {"mask": masks.Local(9), "sinks": True, "softcap": 5.0, "kv_heads": 1},
        lambda: xf.Sequence(200),
    ),
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compiled(fn: Any, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(fn, fullgraph=True, backend=counter), counter


def made(name: str) -> tuple[xf.Attention, xf.Domain | None, Tensor]:
    options, make = CASES[name]
    torch.manual_seed(1)
    layer, domain = xf.Attention(DIM, HEADS, **options).to(torch.get_default_dtype()), make()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rows = 2 if domain is None or domain.batch_size is None else domain.batch_size
    return layer, domain, torch.randn(rows, 200 if domain is None else domain.num_tokens, DIM)


def results(run: Any, layer: xf.Attention, x: Tensor, *args: Any) -> list[Tensor]:
    layer.zero_grad()
    x = x.to(next(layer.parameters()).dtype).clone().requires_grad_()
    out = run(x, *args)
    out.square().sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert_close(got[0], want[0], "output")
    assert_close(
        got[1:], want[1:], "gradients", depth=2, scale=largest(want[1:])
    )  # those of biases are sums that all but cancel


def tokens(count: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, count, DIM)


@pytest.mark.parametrize("name", CASES)
def test_one_graph_without_an_eager_call_first(name: str) -> None:
    layer, domain, x = made(name)
    run, counter = compiled(layer)
    got = results(run, layer, x, domain)
    assert_same(got, results(layer, layer, x, CASES[name][1]()))
    results(run, layer, x, domain)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["sdpa", "windowed with a trained bias"])
def test_inductor(name: str, precision: torch.dtype) -> None:
    if name == "sdpa":  # the compiler of torch 2.11 takes the log-sum-exp of doubles for floats
        torch.set_default_dtype(torch.float32)
    layer, domain, x = made(name)
    run, _ = compiled(layer, "inductor")
    assert_same(results(run, layer, x, domain), results(layer, layer, x, domain))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_outlives_what_it_was_made_of(copied: Callable[[xf.Attention], xf.Attention]) -> None:
    layer = xf.Attention(DIM, HEADS, mask=masks.Local(9), position=positions.RelativeBias(HEADS), kernel="windowed")
    other, x, domain = copied(layer), tokens(200), xf.Sequence(200)
    del layer
    gc.collect()
    assert_same(results(compiled(other)[0], other, x, domain), results(other, other, x, domain))


def test_a_bias_made_inside_is_refused() -> None:
    q = torch.randn(1, HEADS, 200, DIM // HEADS)

    def attended(q: Tensor) -> Tensor:
        bias = positions.DistanceDecay(HEADS)
        return xf.attention(q, q, q, domain=xf.Sequence(200), mask=masks.Local(5), bias=bias)

    assert attended(q).shape == q.shape
    with pytest.raises(Exception, match="DistanceDecay was made while the graph is; make it outside"):
        compiled(attended)[0](q)


def test_models_of_several_layers() -> None:
    encoder = xf.Encoder(
        DIM, 2, HEADS, mask=[masks.Local(4), None], position=positions.Sinusoidal(DIM) + positions.RelativeBias(HEADS)
    )
    run, counter = compiled(encoder)
    x, domain = torch.randn(3, 40, DIM), xf.Sequence.padded([40, 10, 0])
    assert_close(run(x, domain), encoder(x, domain), depth=3)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "position", [positions.Learned(DIM, 8, directed=True), positions.RandomWalk(DIM, 3), positions.Sinusoidal(DIM)]
)
def test_what_positions_know_of_graphs(position: positions.Position) -> None:
    encoder = xf.Encoder(DIM, 1, HEADS, mask=masks.Edges(self_loops=True), position=position).double().eval()
    run, counter = compiled(encoder)
    for nodes in (60, 70, 80):
        graph, x = xf.Graph(EDGES, nodes), torch.randn(nodes, DIM)
        assert_close(run(x, graph), encoder(x, graph), depth=2)
    assert counter.frame_count <= 2


def test_dropout_is_drawn_by_torchs_generator() -> None:
    layer, x = xf.Attention(DIM, HEADS, dropout=0.4, mask=masks.Local(9), kernel="windowed"), tokens(80)
    run, _ = compiled(layer)
    torch.manual_seed(5)
    got = results(run, layer, x)
    torch.manual_seed(5)
    assert_same(got, results(layer, layer, x))
    assert not torch.equal(got[0], results(run, layer, x)[0])


# -- how many graphs -----------------------------------------------------------------------------------------------------


def graphs(fn: Any, calls: Iterable[tuple[Any, ...]], layer: xf.Attention) -> int:
    run, counter = compiled(fn)
    for args in calls:
        assert_same(results(run, layer, *args), results(fn, layer, *args))
    return counter.frame_count


LENGTHS = [50 * n for n in range(1, 11)]
SERIES = [[10 * n, 20, 3 * n] for n in range(1, 6)]


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"mask": masks.Causal(), "position": positions.Rotary(8)}, 2),
        ({"mask": masks.Local(9), "position": positions.Rotary(8)}, 2),
        ({"mask": masks.Local(9), "position": positions.RelativeBias(HEADS)}, 2),
        ({"mask": masks.Causal(), "position": positions.RelativeBias(HEADS)}, 2),  # and one where it is no longer dense
    ],
    ids=["sdpa", "windowed", "windowed with a bias", "sdpa with a bias"],
)
def test_two_graphs_serve_all_lengths(options: dict[str, Any], most: int) -> None:
    layer = xf.Attention(DIM, HEADS, **options).double()
    assert graphs(layer, ((tokens(n), xf.Sequence(n)) for n in LENGTHS), layer) <= most


@pytest.mark.parametrize(
    ("mask", "calls"),
    [
        (masks.Local(1), [(tokens(n * (n + 1)), xf.Grid(n, n + 1)) for n in range(8, 13)]),
        (masks.Causal(), [(tokens(sum(each)), xf.Sequence.packed(each)) for each in SERIES]),
        (masks.Causal(), [(tokens(max(each), 3), xf.Sequence.padded(each)) for each in SERIES]),
        (masks.Edges(), [(tokens(n), xf.Graph(EDGES, n)) for n in range(60, 65)]),
        (masks.Local(2.5), [(tokens(n), xf.Timeline(torch.rand(n).cumsum(0))) for n in range(60, 65)]),
        (masks.Local(0.2), [(tokens(n), xf.Points(torch.rand(n, 2))) for n in range(60, 65)]),
    ],
    ids=["grids", "packed", "padded", "graphs", "timelines", "points"],
)
def test_few_graphs_serve_all_domains_of_a_kind(mask: masks.Mask, calls: list[tuple[Any, ...]]) -> None:
    layer = xf.Attention(DIM, HEADS, mask=mask)
    assert graphs(layer, calls, layer) <= 3


def test_one_graph_serves_equal_masks_and_domains() -> None:
    layer = xf.Attention(DIM, HEADS)

    def attend(x: Tensor, domain: xf.Domain, mask: masks.Mask) -> Tensor:
        return layer(x, domain, mask=mask)

    calls = [(tokens(300), xf.Sequence(300), masks.Local(8) & masks.Causal() | masks.Global(2)) for _ in range(3)]
    assert graphs(attend, calls, layer) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda n: masks.Local(n),
        lambda n: masks.Segments(torch.arange(100) // n),
        lambda n: masks.Keys(torch.rand(100) < 0.1 * n),
    ],
    ids=["other numbers", "other labels", "other keys"],
)
def test_two_graphs_serve_masks_of_a_form(make: Callable[[int], masks.Mask]) -> None:
    layer = xf.Attention(DIM, HEADS)

    def attend(x: Tensor, mask: masks.Mask) -> Tensor:
        return layer(x, mask=mask)

    assert graphs(attend, [(tokens(100), make(n)) for n in range(2, 8)], layer) <= 2


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (xf.Sequence(x.shape[1]), masks.Local(5) & masks.Causal()),
        lambda x: (xf.Grid(x.shape[1] // 4, 4), masks.Local(1) | masks.Global([0, 3])),
        lambda x: (xf.Sequence(x.shape[1]), masks.Segments(torch.arange(x.shape[1]) // 7)),
        lambda x: (xf.Sequence(x.shape[1]), masks.Where(lambda b, h, q, k: q - k < 4)),
    ],
    ids=["sequence", "grid", "segments", "where"],
)
def test_domains_and_masks_made_inside(make: Callable[[Tensor], tuple[xf.Domain, masks.Mask]]) -> None:
    layer = xf.Attention(DIM, HEADS)

    def attend(x: Tensor) -> Tensor:
        domain, mask = make(x)
        return layer(x, domain, mask=mask)

    assert graphs(attend, [(tokens(n),) for n in (40, 60, 80, 100)], layer) <= 2


# -- what is kept ---------------------------------------------------------------------------------------------------------


def test_a_domain_lives_until_its_backward_and_no_longer() -> None:
    layer = xf.Attention(DIM, HEADS, mask=masks.Causal())
    run, _ = compiled(layer)
    alive = []
    for lengths in SERIES:
        domain = xf.Sequence.packed(lengths)
        number = domain.ticket()[1]
        out = run(tokens(sum(lengths)), domain)
        del domain
        gc.collect()
        out.sum().backward()
        del out
        alive.append(number)
    run(tokens(5), xf.Sequence.packed([5]))
    gc.collect()
    from xformerlib.domains._kept import LIVING

    assert not set(alive) & set(LIVING.keys())


def test_a_graph_holds_no_tensors_of_a_plan() -> None:
    layer = xf.Attention(DIM, HEADS, mask=masks.Local(9) | masks.Global(2))
    held: list[Tensor] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        held.extend([*graph.buffers(), *(x for x in inputs if isinstance(x, Tensor))])
        return graph

    x = tokens(500)
    torch.compile(layer, fullgraph=True, backend=backend)(x, xf.Sequence(500))
    own = {p.shape for p in layer.parameters()} | {x.shape}
    assert {tensor.shape for tensor in held} <= own


def test_facts_are_shared_by_equal_domains_alone() -> None:
    mask = masks.Local(3) | masks.Global(1)
    assert xf.plan(mask, xf.Sequence(5000)) is xf.plan(mask, xf.Sequence(5000))
    assert xf.plan(mask, xf.Sequence(5000)) is not xf.plan(mask, xf.Sequence(5000, start=1))
    packed = [xf.Sequence.packed([9, 9]) for _ in range(2)]
    assert xf.plan(mask, packed[0]) is not xf.plan(mask, packed[1])
