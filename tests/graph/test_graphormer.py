"""Graphormer: the bias of paths beside plain enumeration, and the model beside its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import xformerlib as xf
from tests.closeness import assert_close
from tests.graph.test_edge_attention import redrawn
from xformerlib import positions
from xformerlib.graph import Graphormer, PathBias


def shortest_paths(edges: list[tuple[int, int]], start: int, end: int) -> list[list[int]]:
    """All of them, each the numbers of its edges."""
    paths: list[tuple[int, list[int]]] = [(start, [])]
    for _ in range(len(edges) + 1):
        done = [path for node, path in paths if node == end]
        if done or not paths:
            return done
        paths = [(t, [*path, e]) for node, path in paths for e, (s, t) in enumerate(edges) if s == node]
    return []


def score(path: list[int], edge_attr: Tensor, weight: Tensor) -> Tensor:
    used = path[::-1][: len(weight)]
    return torch.stack([edge_attr[e] @ weight[n] for n, e in enumerate(used)]).mean(0)


@given(st.integers(1, 6), st.integers(0, 9), st.integers(1, 3), st.integers(0, 1), st.integers(0, 2**31))
def test_scores_are_means_over_all_shortest_paths(nodes: int, count: int, steps: int, virtual: int, seed: int) -> None:
    torch.manual_seed(seed)
    bias = redrawn(PathBias(2, 3, steps=steps))
    edge_index = torch.randint(nodes, (2, count))  # directed, with parallel edges and self-loops
    edge_attr = torch.randn(count, 3, dtype=torch.float64)
    graph = xf.Graph(edge_index, nodes, edge_attr=edge_attr, virtual_nodes=virtual)
    i = torch.arange(nodes + virtual)
    got = bias.pair(graph).at(i[:, None], i[None])
    wanted = torch.zeros_like(got)
    edges = [(int(s), int(t)) for s, t in edge_index.T]
    for q in range(nodes):
        for k in range(nodes):
            paths = shortest_paths(edges, k, q)
            if q != k and paths:
                each = [score(path, edge_attr, bias.weight) for path in paths]
                wanted[:, virtual + q, virtual + k] = torch.stack(each).mean(0)
    assert_close(got, wanted)


def test_a_model_is_blocks_with_the_sum_of_its_biases(precision: torch.dtype) -> None:
    model = redrawn(Graphormer(5, 8, None, 2, 2, edge_dim=3, max_hops=3, path_steps=2)).to(precision).eval()
    edge_index, batch = torch.randint(4, (2, 12)), torch.tensor([0] * 4 + [1] * 5)
    edge_index[:, 6:] += 4
    edge_attr, x = torch.randn(12, 3), torch.randn(9, 5)
    graph = xf.Graph(edge_index, 9, edge_attr=edge_attr, batch=batch, virtual_nodes=1)
    tokens = torch.zeros(11, 8)
    tokens[graph.node_tokens] = model.embed(x)
    tokens[graph.offsets[:-1]] = model.virtual
    tokens = model.degree(tokens, graph)
    for block in model.blocks:
        tokens = block(tokens, graph, position=model.hops + model.paths)
    got = model(x, edge_index, edge_attr, batch)
    assert_close(got, model.norm(tokens)[graph.offsets[:-1]], depth=2)
    weight = torch.randn_like(got)
    named = dict(model.named_parameters())
    one = torch.autograd.grad((got * weight).sum(), [*named.values()])
    other = torch.autograd.grad((model.norm(tokens)[graph.offsets[:-1]] * weight).sum(), [*named.values()])
    assert_close(one, other, depth=4)
    assert all(grad.abs().sum() > 0 for name, grad in zip(named, one, strict=True) if "table" in name or "path" in name)


def test_features_that_are_learned_get_gradients() -> None:
    edge_index, kinds = torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 1, 1])
    model = Graphormer(5, 8, 1, 1, 2, edge_dim=nn.Embedding(2, 8), pool="sum")
    model(torch.randn(4, 5), edge_index, kinds).sum().backward()
    assert model.embed_edges.weight.grad.abs().amin() > 0


def test_features_that_change_in_place_are_read_anew() -> None:
    edge_attr = torch.ones(1, 1, dtype=torch.float64)
    graph = xf.Graph(torch.tensor([[0], [1]]), 2, edge_attr=edge_attr)
    bias = redrawn(PathBias(1, 1))
    first = bias.pair(graph).at(torch.tensor(1), torch.tensor(0))
    edge_attr.mul_(2)
    assert_close(bias.pair(graph).at(torch.tensor(1), torch.tensor(0)), 2 * first)


def test_in_any_encoder() -> None:
    encoder = xf.Encoder(8, 2, 2, position=PathBias(2, 1) + positions.RelativeBias(2))
    graph = xf.Graph(torch.tensor([[0], [1]]), 2, edge_attr=torch.ones(1, 1))
    encoder(torch.randn(2, 8), graph).sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PathBias(2, 3).pair(xf.Sequence(4)), "PathBias is not defined on a Sequence"),
        (lambda: PathBias(2, 3).pair(xf.Graph(torch.zeros(2, 1).long(), 2)), "give the Graph its edge_attr"),
        (
            lambda: PathBias(2, 3).pair(xf.Graph(torch.zeros(2, 1).long(), 2, edge_attr=torch.ones(1, 2))),
            r"edge_attr must be floating-point \(edges, edge_dim\) = \(1, 3\)",
        ),
        (lambda: Graphormer(7, 8, 3, 0, 2), "num_layers must be >= 1"),
        (lambda: Graphormer(7, 8, 3, 1, 2, max_hops=1), "max_hops must be >= 2"),
        (lambda: Graphormer(7, 8, 3, 1, 2, edge_dim=3)(torch.randn(3, 7), torch.zeros(2, 1).long()), "if and only if"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
