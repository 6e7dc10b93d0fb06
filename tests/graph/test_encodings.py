"""Walks between nodes, distances in space, signs of eigenvectors, columns of categories."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import xformerlib as xf
from tests.closeness import assert_close
from tests.domains.graphs import permuted, random_graph, together
from tests.graph.test_edge_attention import largest
from tests.strategies import randoms
from xformerlib.domains import _random_walk
from xformerlib.graph import AtomEncoder, BondEncoder, GaussianBias, GraphTransformer, RandomWalkBias, SignNet

# No two nodes are alike and no two eigenvalues close.
ONE_WAY = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3], [1, 3, 2, 3, 4, 3, 4, 5]])
PLAIN = xf.Graph(torch.cat([ONE_WAY, ONE_WAY.flip(0)], 1), 6)


def redrawn(module: nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return module.double().eval()


def every(bias: Any, domain: xf.Domain) -> Tensor:
    i = torch.arange(domain.num_tokens)
    return bias.pair(domain).at(i[:, None], i[None, :])


def powers(graph: xf.Graph, steps: int) -> Tensor:
    """(nodes, nodes, steps), from the dense matrix of the whole batch."""
    adjacency = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    adjacency.index_put_(tuple(graph.edge_index), torch.ones((), dtype=torch.float64), accumulate=True)
    walk = adjacency / adjacency.sum(1, keepdim=True).clamp(min=1)
    result = [torch.eye(graph.num_nodes, dtype=torch.float64)]
    while len(result) < steps:
        result.append(result[-1] @ walk)
    return torch.stack(result, -1)


# -- walks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [0, 128], ids=["large", "small"])
@given(rng=randoms)
def test_walks_of_all_pairs_are_powers_of_the_matrix(dense: int, rng: Any) -> None:
    graph, steps = random_graph(rng), rng.randint(1, 6)
    same = graph.batch[:, None] == graph.batch
    with mock.patch.object(_random_walk, "LARGEST_DENSE_WALK", dense):
        assert_close(graph.walks(steps), powers(graph, steps)[same])


@given(rng=randoms)
def test_random_walk_bias_is_a_network_of_walks(rng: Any) -> None:
    graph, bias = random_graph(rng), redrawn(RandomWalkBias(3, 4, hidden=5))
    same, tokens = graph.batch[:, None] == graph.batch, graph.node_tokens
    wanted = bias.outer(bias.inner(powers(graph, 4)).relu())
    got = every(bias, graph)[:, tokens[:, None], tokens]
    assert_close(got.movedim(0, -1)[same], wanted[same])


@pytest.mark.parametrize("kernel", ["reference", "packed", "chunked"])
def test_attention_with_walks_is_that_of_each_graph_alone(kernel: str, precision: torch.dtype) -> None:
    alone = [PLAIN, xf.Graph(torch.tensor([[0, 1], [1, 0]]), 2), xf.Graph(torch.empty(2, 0).long(), 3)]
    bias, batch = redrawn(RandomWalkBias(2, 4, hidden=5)).to(precision), together(alone)
    qkv = torch.randn(3, 1, 2, batch.num_nodes, 4)
    got = xf.attention(*qkv, bias=bias, domain=batch, kernel=kernel)
    parts = qkv.split([graph.num_nodes for graph in alone], 3)
    wanted = [
        nn.functional.scaled_dot_product_attention(*part, attn_mask=every(bias, graph)[None])
        for part, graph in zip(parts, alone, strict=True)
    ]
    assert_close(got, torch.cat(wanted, 2))


def test_walks_of_too_many_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 268,435,456; got 100,000,000 pairs and steps=3"):
        xf.Graph(torch.empty(2, 0).long(), 10_000).walks(3)


# -- distances -------------------------------------------------------------------------------------------------------


def test_gaussian_bias_is_its_formula() -> None:
    bias, places = redrawn(GaussianBias(3, 7)), torch.randn(6, 3, dtype=torch.float64)
    domain = xf.Points(places, batch=torch.tensor([0, 0, 1, 1, 1, 1]))
    u = bias.factor * torch.cdist(places, places)[..., None] + bias.shift
    width = bias.widths.abs() + 1e-5
    psi = torch.exp(-(((u - bias.means) / width) ** 2) / 2) / (math.sqrt(2 * math.pi) * width)
    wanted = bias.outer(nn.functional.gelu(bias.inner(psi)))
    got = every(bias, domain)
    assert_close(got, wanted.movedim(-1, 0))
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    moved = xf.Points(places @ turn + 5, batch=torch.tensor([0, 0, 1, 1, 1, 1]))
    assert_close(every(bias, moved), got)


# -- signs -----------------------------------------------------------------------------------------------------------


def signs(net: SignNet, graph: xf.Graph, flipped: Tensor | None = None) -> Tensor:
    values, vectors = graph.laplacian_eigenvectors(net.eigenvectors)
    given = (values, vectors if flipped is None else vectors * flipped)
    with mock.patch.object(xf.Graph, "laplacian_eigenvectors", return_value=given):
        return net(torch.zeros(graph.num_tokens, net.dim, dtype=torch.float64), graph)


def test_signs_of_eigenvectors_do_not_matter_but_those_of_entries_do() -> None:
    net = redrawn(SignNet(4, 3, hidden=5, num_layers=2))
    plain = signs(net, PLAIN)
    assert_close(signs(net, PLAIN, torch.tensor([-1.0, 1.0, -1.0])), plain)
    entries = torch.ones(6, 3)
    entries[2] = -1
    assert largest(signs(net, PLAIN, entries), plain) > 1e-6


def test_sign_net_knows_no_order_and_no_company() -> None:
    net = redrawn(SignNet(4, 4, hidden=5))
    order = torch.randperm(6)
    plain, small = signs(net, PLAIN), xf.Graph(torch.tensor([[0, 1, 1], [1, 0, 1]]), 3)
    assert_close(signs(net, permuted(PLAIN, order))[order], plain)
    assert_close(signs(net, together([small, PLAIN])), torch.cat([signs(net, small), plain]))


# -- atoms and bonds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "columns"), [(AtomEncoder(6), 9), (BondEncoder(6), 3), (AtomEncoder(6, [4]), 1)])
def test_columns_are_sums_of_embeddings(encoder: Any, columns: int) -> None:
    x = torch.stack([torch.randint(size, (20,)) for size in encoder.sizes], 1)
    assert x.shape[1] == columns
    wanted = sum(part[x[:, c]] for c, part in enumerate(encoder.table.split(encoder.sizes)))
    assert_close(encoder(x), wanted)
    assert encoder(x[:0]).shape == (0, 6)
    for part in encoder.table.split(encoder.sizes):
        assert part.abs().max() <= math.sqrt(6 / (len(part) + 6))


def test_an_atom_encoder_is_the_front_of_a_model() -> None:
    model = GraphTransformer(AtomEncoder(8, [5]), 8, 2, 1, 2, pool="mean")
    assert model(torch.arange(5), torch.tensor([[0, 1], [1, 2]])).shape == (1, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AtomEncoder(4, [3, 2])(torch.tensor([[0, 2]])), ValueError, "column 1 must hold values from 0 to 1"),
        (lambda: AtomEncoder(4, [3, 2])(torch.tensor([[-1, 0]])), ValueError, "column 0 .* got values from -1"),
        (lambda: AtomEncoder(4, [3, 2])(torch.tensor([0, 1])), ValueError, r"must be \(rows, 2\)"),
        (lambda: AtomEncoder(4, [3])(torch.rand(2, 1)), TypeError, "must be integers"),
        (lambda: BondEncoder(4, []), ValueError, "at least one column"),
        (lambda: RandomWalkBias(2, 3).pair(xf.Sequence(3)), ValueError, "not defined on a Sequence"),
        (lambda: GaussianBias(2).pair(PLAIN), ValueError, "not defined on a Graph"),
        (lambda: SignNet(4)(torch.zeros(3, 4), xf.Sequence(3)), ValueError, "not defined on a Sequence"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
