"""Masks by edges: those of a graph, and those of an expander."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

import xformerlib as xf
from tests.domains.graphs import as_networkx, random_graph
from tests.strategies import DOMAINS, randoms
from xformerlib.masks import Edges, Expander
from xformerlib.masks._regular import regular_pattern

# -- edges ---------------------------------------------------------------------------------------------------------


@given(rng=randoms)
def test_edges_lead_from_key_to_query(rng):
    graph = random_graph(rng)
    reference, tokens = as_networkx(graph), graph.node_tokens.tolist()
    item = torch.zeros(graph.num_tokens) if graph.items is None else graph.items
    for self_loops in (False, True):
        mask = Edges(self_loops=self_loops).dense(graph)
        for i in range(graph.num_tokens):
            for j in range(graph.num_tokens):
                if i in tokens and j in tokens:
                    edge = reference.has_edge(tokens.index(j), tokens.index(i))
                    assert mask[i, j] == (edge or (self_loops and i == j))
                else:
                    assert mask[i, j] == (item[i] == item[j])


@pytest.mark.parametrize("domain", [xf.Sequence(3), xf.Grid(2, 2), xf.Timeline([0.0]), xf.Points(torch.zeros(1, 2))])
def test_only_graphs_have_edges(domain):
    with pytest.raises(ValueError, match=r"Edges is defined on Graph; got .*Use Local\(radius\) or Expander\(degree\)"):
        Edges().bind(domain)


def test_edges_join_nodes_of_one_graph():
    edges = torch.tensor([[0], [1]])
    with pytest.raises(ValueError, match="same Graph object"):
        Edges().bind(xf.Graph(edges, 2), xf.Graph(edges, 2))
    with pytest.raises(TypeError, match="self_loops must be True or False; got self_loops=1"):
        Edges(self_loops=1)


# -- the pattern ---------------------------------------------------------------------------------------------------


def adjacency(n: int, degree: int, seed: int = 0) -> torch.Tensor:
    links = torch.zeros(n, n, dtype=torch.bool)
    pattern = regular_pattern(n, degree, seed)
    return links.scatter(1, pattern, torch.ones_like(pattern, dtype=torch.bool))


@given(n=integers(0, 70), degree=integers(0, 12), seed=integers(0, 5))
def test_the_pattern_is_symmetric_regular_and_reflexive(n, degree, seed):
    links = adjacency(n, degree, seed)
    neighbours = degree + (n % 2 and degree % 2)
    expected = min(neighbours + 1, n)
    assert torch.equal(links, links.T) and links.diagonal().all() and (links.sum(1) == expected).all()
    pattern = regular_pattern(n, degree, seed)
    assert pattern.shape == (n, expected) and (pattern.diff(dim=1) > 0).all()
    assert torch.equal(pattern, regular_pattern(n, degree, seed))


@given(n=integers(3, 200), degree=integers(2, 8), seed=integers(0, 5))
def test_the_pattern_is_connected(n, degree, seed):
    assert nx.is_connected(nx.from_numpy_array(adjacency(n, degree, seed).numpy()))


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 7])
def test_the_pattern_depends_on_the_seed(degree):
    assert not torch.equal(adjacency(40, degree, 0), adjacency(40, degree, 1))


@pytest.mark.parametrize(("n", "degree"), [(300, 3), (300, 4), (301, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_pattern_expands(n, degree, seed):
    """The second eigenvalue is near the least possible, 2 sqrt(d - 1) (Alon and Boppana); that of a ring is near d."""
    links = adjacency(n, degree, seed).double().fill_diagonal_(0)
    assert links.sum(1).unique().item() == degree
    second = torch.linalg.eigvalsh(links).abs().sort().values[-2].item()
    assert second < 1.05 * 2 * (degree - 1) ** 0.5
    circle = sum(torch.eye(n).double().roll(shift, 0) for shift in range(-(degree // 2), degree // 2 + 1)) - torch.eye(
        n
    )
    assert torch.linalg.eigvalsh(circle)[-2] > 0.99 * (degree // 2) * 2


def test_the_pattern_stays_the_same_for_good():
    assert regular_pattern(6, 2, 0).tolist() == FIXED[6, 2, 0]  # random cycles
    assert regular_pattern(8, 4, 3).tolist() == FIXED[8, 4, 3]  # a circulant


# A trained model has learned with its links, so they must not change from one version to the next.
FIXED = {
    (6, 2, 0): [[0, 1, 5], [0, 1, 3], [2, 4, 5], [1, 3, 4], [2, 3, 4], [0, 2, 5]],
    (8, 4, 3): [
        [0, 3, 4, 6, 7], [1, 2, 3, 4, 5], [1, 2, 4, 5, 6], [0, 1, 3, 5, 7],
        [0, 1, 2, 4, 6], [1, 2, 3, 5, 7], [0, 2, 4, 6, 7], [0, 3, 5, 6, 7],
    ],
}  # fmt: skip


# -- the mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in DOMAINS if kind != "Subset"])
@given(rng=randoms)
def test_every_item_of_every_domain_has_its_own_pattern(kind, rng):
    domain = DOMAINS[kind](rng)
    degree, seed = rng.randint(0, 4), rng.randint(0, 3)
    rows = domain.batch_size or 1
    mask = Expander(degree, seed).dense(domain, batch_size=rows)[:, 0]
    index = torch.arange(domain.num_tokens)
    prefix = domain.is_prefix(torch.tensor(0), index)
    prefix = torch.zeros_like(index, dtype=torch.bool) if prefix is None else prefix
    item = torch.zeros_like(index) if domain.items is None else domain.items
    for row in range(rows):
        exists = torch.ones_like(prefix) if domain.valid is None else domain.valid[row]
        together = (item[:, None] == item) & exists[:, None] & exists
        expected = together & (prefix[:, None] | prefix)
        for number in range(domain.num_items):
            members = (exists & ~prefix & (item == number)).nonzero()[:, 0]
            expected[members[:, None], members] = adjacency(len(members), degree, seed)
        assert torch.equal(mask[row], expected)


def test_padding_packing_and_company_change_nothing():
    mask = Expander(3, seed=5)
    alone = mask.dense(xf.Sequence(20))
    assert torch.equal(mask.dense(xf.Sequence.padded([7, 20, 0], 33))[1, 0, :20, :20], alone)
    assert torch.equal(mask.dense(xf.Sequence.packed([4, 20, 9]))[4:24, 4:24], alone)
    assert torch.equal(mask.dense(xf.Sequence(20, start=9, prefix=2))[2:, 2:], alone)
    assert torch.equal(mask.dense(xf.Grid(4, 5)), alone)
    valid = torch.rand(1, 30).argsort().argsort() < 20
    there = mask.dense(xf.Timeline(torch.rand(1, 30), valid=valid))[0, 0]
    assert torch.equal(there[valid[0]][:, valid[0]], alone) and there.sum() == alone.sum()


def test_equal_domains_may_be_different_objects():
    mask = Expander(2)
    assert torch.equal(mask.dense(xf.Sequence(9), xf.Sequence(9)), mask.dense(xf.Sequence(9)))


def test_links_are_made_once_for_a_domain():
    domain = xf.Sequence(50)
    assert Expander(3).neighbours(domain) is Expander(3).neighbours(domain)
    assert Expander(3).neighbours(domain) is not Expander(3, seed=1).neighbours(domain)


def test_a_value():
    assert Expander(3) == Expander(3, seed=0) != Expander(3, seed=1) and hash(Edges()) == hash(Edges())
    assert repr(Expander(3, seed=1)) == "Expander(degree=3, seed=1)" and repr(Edges()) == "Edges(self_loops=False)"
    assert pickle.loads(pickle.dumps(Expander(3) & Edges())) == Expander(3) & Edges()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Expander(-1), "degree must be >= 0; got degree=-1"),
        (lambda: Expander(1.5), "degree must be an integer"),
        (lambda: Expander(2, seed=-1), "seed must be >= 0"),
        (lambda: Expander(2).bind(xf.Sequence(3), xf.Sequence(4)), "queries and keys must be the same; got Sequence.3. and Sequence.4."),
        (lambda: Expander(2).bind(xf.Sequence(1, start=3), xf.Sequence(4)), "must be the same"),
        (lambda: Expander(2).bind(xf.Sequence(4), xf.Grid(2, 2)), "same kind of domain"),
        (lambda: Expander(2).bind(xf.Timeline([0.0, 1.0]), xf.Timeline([0.0, 1.0])), "must be the same"),
    ],
)  # fmt: skip
def test_errors(make: Callable[[], object], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_under_flex_attention_and_compile():
    from torch.nn.attention.flex_attention import create_mask

    domain, zero, index = xf.Sequence.padded([3, 9, 0], 10, prefix=1), torch.tensor(0), torch.arange(11)
    relation, expected = Expander(2).bind(domain), Expander(2).dense(domain)
    assert torch.equal(create_mask(relation, 3, 1, 11, 11, device="cpu")[:, 0], expected[:, 0])
    compiled = torch.compile(relation, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.arange(3)[:, None, None], zero, index[:, None], index), expected[:, 0])
