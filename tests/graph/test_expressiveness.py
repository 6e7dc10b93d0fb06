"""Which graphs the encodings tell apart: what is known of them, and the table of the guide."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch

import xformerlib as xf
from tests.closeness import assert_close
from tests.domains.graphs import as_networkx

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import expressiveness  # noqa: E402

sys.path.pop(0)
FAMILIES = expressiveness.FAMILIES
HEXAGON, CSL, CUBE, DODECAHEDRON, ROOK = FAMILIES


def encoding(begin: str) -> Any:
    (found,) = [value for name, value in expressiveness.ENCODINGS.items() if name.startswith(begin)]
    return found


def spectrum(graph: xf.Graph) -> torch.Tensor:
    return graph.laplacian_eigenvectors(graph.num_nodes - 1)[0]


def hop_counts(graph: xf.Graph) -> set[tuple[tuple[int, int], ...]]:
    """For each node how many are how far."""
    paths = dict(nx.all_pairs_shortest_path_length(as_networkx(graph)))
    return {tuple(sorted(Counter(lengths.values()).items())) for lengths in paths.values()}


def walks_back(graph: xf.Graph) -> torch.Tensor:
    """By the dense matrix, (steps, nodes)."""
    adjacency = torch.tensor(nx.to_numpy_array(as_networkx(graph)))
    return torch.stack([torch.linalg.matrix_power(adjacency / adjacency.sum(1), s).diagonal() for s in range(1, 17)])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graphs_are_different_and_regular(family: str) -> None:
    graphs = [nx.Graph(as_networkx(graph)) for graph in FAMILIES[family]]
    assert len({tuple(degree for _, degree in graph.degree) for graph in graphs}) == 1
    assert all(len({degree for _, degree in graph.degree}) == 1 for graph in graphs)
    for a, b in combinations(graphs[:4], 2):
        assert not nx.could_be_isomorphic(a, b) or not nx.is_isomorphic(a, b)


def test_the_graphs_have_what_they_are_known_for() -> None:
    dodecahedron, desargues = FAMILIES[DODECAHEDRON]
    assert nx.is_isomorphic(nx.Graph(as_networkx(dodecahedron)), nx.dodecahedral_graph())
    assert nx.is_isomorphic(nx.Graph(as_networkx(desargues)), nx.desargues_graph())
    assert hop_counts(dodecahedron) == hop_counts(desargues) and len(hop_counts(desargues)) == 1
    assert nx.is_bipartite(nx.desargues_graph()) and not nx.is_bipartite(nx.dodecahedral_graph())
    cube, hoffman = FAMILIES[CUBE]
    assert_close(spectrum(cube), spectrum(hoffman))
    assert_close(walks_back(cube), walks_back(hoffman))
    assert hop_counts(cube) != hop_counts(hoffman)
    for graph in FAMILIES[ROOK]:
        assert nx.is_strongly_regular(nx.Graph(as_networkx(graph)))
    assert_close(*map(spectrum, FAMILIES[ROOK]))


@pytest.mark.parametrize(
    ("begin", "apart"),
    [
        ("none", set()),
        ("degree", set()),
        ("Laplacian eigenvalues", {HEXAGON, CSL, DODECAHEDRON}),  # no difference in the spectrum, none in the eigenvalues
        ("random walks back", {HEXAGON, CSL, DODECAHEDRON}),  # walk-regular graphs of the same spectrum
        ("hops", {HEXAGON, CUBE}),  # as many nodes at each distance; two CSL graphs, too
        ("random walks between", {HEXAGON, CSL, CUBE, DODECAHEDRON}),  # strongly regular graphs: walks know adjacent or not
    ],
)  # fmt: skip
def test_encodings_tell_apart_what_they_should_and_no_more(begin: str, apart: set[str]) -> None:
    for name, graphs in FAMILIES.items():
        found, pairs = expressiveness.told_apart(encoding(begin), graphs)
        if (begin, name) == ("hops", CSL):
            assert found == pairs - len([1 for a, b in combinations(graphs, 2) if hop_counts(a) == hop_counts(b)])
        else:
            assert found == (pairs if name in apart else 0), name


@pytest.mark.parametrize("begin", ["Laplacian eigenvectors", "the same"])
def test_eigenvectors_of_equal_eigenvalues_are_one_basis_of_many(begin: str) -> None:
    for graphs in FAMILIES.values():
        assert expressiveness.told_apart(encoding(begin), graphs) is None


@pytest.mark.parametrize("begin", ["Laplacian eigenvectors", "the same"])
def test_eigenvectors_of_simple_eigenvalues_tell_graphs_apart(begin: str) -> None:
    pairs = {(0, 1), (0, 3), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 5)}
    plain, other = expressiveness.graph(6, pairs), expressiveness.graph(6, pairs | {(0, 2)})
    assert expressiveness.told_apart(encoding(begin), [plain, other]) == (1, 1)
    assert expressiveness.told_apart(encoding(begin), [plain, expressiveness.renamed(plain)]) == (0, 1)


def test_the_table_of_the_guide_is_what_the_code_finds() -> None:
    assert expressiveness.table() in (DOCS / "guides" / "graphs.md").read_text(encoding="utf-8")
