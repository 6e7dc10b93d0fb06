"""A domain is freed when its last name goes, without the garbage collector: nothing that it keeps refers back to it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from random import Random
from weakref import ref

import pytest
import torch
from hypothesis import given
from torch import nn

import xformerlib as xf
from tests.closeness import assert_close, largest
from tests.positions import cases
from tests.strategies import ROWS, domain as any_domain, position, randoms, tree
from xformerlib import graph, masks, positions
from xformerlib.domains._kept import SHARED


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def run(model: Callable[..., torch.Tensor], where: xf.Domain, dim: int, train: bool) -> None:
    shape = (where.num_tokens, dim) if where.offsets is not None else (where.batch_size or ROWS, where.num_tokens, dim)
    x = torch.randn(shape, requires_grad=train)
    out = model(x, where)
    if train:
        out.sum().backward()


def watched(where: xf.Domain) -> list[ref[object]]:
    """References to a domain, to what its plans hold of it, and to the tensors of it that are its own."""
    tensors = [value for value in vars(where).values() if isinstance(value, torch.Tensor)]
    return [ref(where), ref(where.anchor), *map(ref, tensors)]


def assert_freed(refs: list[ref[object]], where: str) -> None:
    assert not [r() for r in refs if r() is not None], where


@pytest.mark.filterwarnings("ignore:.*fact.*:UserWarning")
@given(randoms)
def test_models_let_go_of_domains(rng: Random) -> None:
    where = any_domain(rng)
    mask, place, train = tree(rng, where.whole), position(rng, 4, 48, where.whole), rng.random() < 0.5
    extent = mask.extent()
    if extent.batch not in (None, 1, where.batch_size or (1 if where.offsets is not None else ROWS)):
        mask = masks.Full()
    model = xf.Encoder(48, 2, 4, mask=mask, position=place).train(train)
    said = f"{mask!r} and {place!r} on {where!r}"
    run(model, where, 48, train)
    SHARED.clear()
    refs = watched(where)
    del where
    assert_freed(refs, said)


@pytest.mark.parametrize("name", cases.DOMAINS)
@pytest.mark.parametrize("train", [False, True])
def test_every_kind_of_domain_is_freed(name: str, train: bool) -> None:
    for bias in cases.biases(cases.domain(name)):
        where = cases.domain(name)
        model = xf.Encoder(12, 1, 3, mask=masks.Full() if name == "graph" else masks.Global(1), position=bias).train(
            train
        )
        run(model, where, 12, train)
        SHARED.clear()
        refs = watched(where)
        del where
        assert_freed(refs, f"{bias!r} on {name}")


def test_domains_of_queries_and_keys_are_freed() -> None:
    layer = xf.Attention(16, 2, mask=masks.Causal() & masks.Local(3))
    where, context = xf.Timeline(torch.rand(2, 9)), xf.Timeline(torch.rand(2, 7))
    for _ in range(2):
        layer(torch.randn(2, 9, 16), where, context=torch.randn(2, 7, 16), context_domain=context)
        layer(torch.randn(2, 7, 16), context, context=torch.randn(2, 9, 16), context_domain=where)
    first = watched(where)[:1]
    del where
    assert_freed(first, "queries")
    refs = watched(context)
    del context
    assert_freed(refs, "keys")


def test_a_subset_and_its_whole_are_freed() -> None:
    model = xf.Encoder(16, 1, 2, mask=masks.Local(2), position=positions.Rotary(8))
    whole = xf.Graph(torch.randint(0, 20, (2, 60)), 20)
    kept = whole.subset(torch.arange(0, 20, 2))
    model(torch.randn(20, 16), whole)
    model(torch.randn(10, 16), kept)
    refs = [*watched(kept), *watched(whole)]
    del kept, whole
    assert_freed(refs, "subset")


def test_windows_on_grids_are_freed() -> None:
    model = xf.Encoder(16, 2, 2, mask=[masks.Windows(4), masks.Axial(0)])
    where = xf.Grid(8, 8, valid=torch.rand(2, 8, 8) < 0.7)
    model(torch.randn(2, 64, 16), where)
    packed = xf.Grid.packed([(4, 8), (8, 8)])
    model(torch.randn(96, 16), packed)
    refs = [*watched(where), *watched(packed)]
    del where, packed
    assert_freed(refs, "grids")


@pytest.mark.parametrize(
    "make",
    [
        lambda: graph.GraphTransformer(3, 16, 2, 2, 2, mask=masks.Edges() | masks.Global(1), virtual_nodes=1),
        lambda: graph.GraphTransformer(3, 16, 2, 2, 2, position=graph.RandomWalkBias(2, 3), pool="mean"),
        lambda: graph.Graphormer(3, 16, 2, num_layers=2, heads=2),
        lambda: graph.Exphormer(3, 16, 2, num_layers=2, heads=2),
        lambda: graph.GPS(3, 16, 2, num_layers=2, heads=2),
    ],
    ids=["edges", "walks", "graphormer", "exphormer", "gps"],
)
def test_graphs_are_freed_with_their_edges(make: Callable[[], nn.Module]) -> None:
    model = make()
    edge_index = torch.randint(0, 12, (2, 40))
    model(torch.randn(12, 3), edge_index).sum().backward()
    where = xf.Graph(edge_index, 12)
    refs = [ref(edge_index), *watched(where)[:2]]
    del edge_index, where
    assert_freed(refs, "edges")


@pytest.mark.parametrize("train", [False, True])
def test_compiled_models_let_go_of_domains(train: bool) -> None:
    torch.compiler.reset()
    model = xf.Encoder(16, 1, 2, mask=masks.Local(1), position=positions.DistanceDecay(2)).train(train)
    compiled = torch.compile(model, backend="aot_eager")
    for call in range(5):
        where = xf.Graph(torch.randint(0, 20, (2, 60)), 20)
        run(compiled, where, 16, train)
        whole = ref(where)
        del where
        assert call < 3 or whole() is None  # the compiler lets go of what it compiles for when the collector runs


@pytest.mark.usefixtures("double")
def test_a_backward_outlives_its_domain() -> None:
    torch.compiler.reset()
    model = xf.Encoder(16, 1, 2, mask=masks.Local(1), position=positions.DistanceDecay(2, learned=True))
    compiled = torch.compile(model, backend="aot_eager")
    edges, grads = torch.randint(0, 20, (2, 60)), []
    x = torch.randn(20, 16)
    for run_ in (model, compiled):
        model.zero_grad()
        where = xf.Graph(edges, 20)
        out = run_(x, where)
        del where
        out.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_close(*grads, "gradients", depth=4, scale=largest(*grads))


def test_plans_are_found_again() -> None:
    where = xf.Graph(torch.randint(0, 20, (2, 60)), 20)
    first = xf.plan(masks.Local(2), where)
    assert xf.plan(masks.Local(2), where) is first
    assert xf.plan(masks.Local(2), xf.Sequence(50)) is xf.plan(masks.Local(2), xf.Sequence(50))
