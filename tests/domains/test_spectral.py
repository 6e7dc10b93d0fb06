"""Laplacian eigenvectors against dense decompositions, on both routes."""

from __future__ import annotations

from unittest import mock

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg
import torch
from hypothesis import given

import xformerlib as xf
from tests.closeness import assert_close
from tests.domains.graphs import as_networkx, permuted, random_graph, together, undirected
from tests.strategies import randoms
from xformerlib.domains import _spectral


def simple(graph: xf.Graph) -> nx.Graph:
    """The simple undirected graph underneath."""
    result = nx.Graph(as_networkx(graph))
    result.remove_edges_from(list(nx.selfloop_edges(result)))
    return result


def close(got: np.ndarray, want: np.ndarray, what: str, condition: float = 1.0) -> None:
    """In terms of the largest eigenvalue that a normalised Laplacian may have."""
    assert_close(torch.from_numpy(got), torch.from_numpy(want), what, condition=condition, scale=2.0)


def check(graph: xf.Graph, k: int, condition: float = 1.0) -> None:
    """Eigenpairs are determined by their values, residuals and orthogonality; and the rest is padding."""
    values, vectors = graph.laplacian_eigenvectors(k)
    assert values.shape == (graph.num_graphs, k) and vectors.shape == (graph.num_nodes, k)
    for g in range(graph.num_graphs):
        nodes = (graph.batch == g).nonzero()[:, 0].tolist()
        part = simple(graph).subgraph(nodes)
        if not nodes:
            assert not values[g].any()
            continue
        laplacian = nx.normalized_laplacian_matrix(part, nodelist=nodes).toarray()
        nontrivial = np.linalg.eigvalsh(laplacian)[nx.number_connected_components(part) :][:k]
        found = len(nontrivial)
        theta, v = values[g].numpy(), vectors[nodes].numpy()
        close(theta[:found], nontrivial, "eigenvalues", condition)
        assert not theta[found:].any() and not v[:, found:].any()
        close(laplacian @ v, v * theta, "products with the Laplacian", condition)
        close(v[:, :found].T @ v[:, :found], np.eye(found), "products of vectors")
        for component in nx.connected_components(part):  # nothing of a null vector
            members = [nodes.index(node) for node in component]
            weights = np.sqrt(np.maximum([part.degree(node) for node in component], 1))
            close(weights @ v[members], np.zeros(k), "products with null vectors", condition)


@given(rng=randoms)
def test_small_graphs(rng):
    graph = random_graph(rng, largest=12)
    check(graph, rng.randint(0, 6))


@given(rng=randoms)
def test_the_route_of_large_graphs_is_right_on_small_ones_too(rng):
    graph = random_graph(rng, largest=12)
    with mock.patch.object(_spectral, "LARGEST_DENSE_SPECTRUM", 0):
        check(graph, rng.randint(0, 6), condition=1e6)  # it stops at relative residuals of 1e-6


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_nodes_than_eigenvectors(n):
    graph = undirected(nx.complete_graph(n))
    values, vectors = graph.laplacian_eigenvectors(8)
    assert values.tolist() == [[2.0 if n == 2 else 0.0] + [0.0] * 7]
    assert vectors.shape == (n, 8)
    assert_close(vectors.norm(), torch.tensor(1.0 if n == 2 else 0.0, dtype=torch.float64))


def test_isolated_nodes_are_components_of_their_own():
    graph = undirected(nx.disjoint_union(nx.path_graph(3), nx.empty_graph(4)))
    values, vectors = graph.laplacian_eigenvectors(5)
    assert_close(values, torch.tensor([[1.0, 2.0, 0, 0, 0]], dtype=torch.float64))
    assert not vectors[3:].any()


@given(rng=randoms)
def test_components(rng):
    graph = random_graph(rng, largest=12)
    both = torch.cat([graph.edge_index, graph.edge_index.flip(0)], 1)
    found = _spectral.components(both[0], both[1], graph.num_nodes)
    for component in nx.connected_components(simple(graph)):
        assert {int(found[node]) for node in component} == {min(component)}


def test_components_of_a_long_path_in_any_order():
    order = torch.randperm(20_000)
    source, target = order[:-1], order[1:]
    found = _spectral.components(torch.cat([source, target]), torch.cat([target, source]), 20_000)
    assert not found.any()


def test_signs_do_not_depend_on_the_order_of_nodes():
    graph = undirected(nx.gnm_random_graph(30, 60, seed=3))  # no symmetry: distinct eigenvalues
    _, vectors = graph.laplacian_eigenvectors(10)
    assert (vectors.pow(3).sum(0) > 0).all()
    for _ in range(5):
        order = torch.randperm(30)
        _, renamed = permuted(graph, order).laplacian_eigenvectors(10)
        assert_close(renamed[order], vectors, condition=100)  # one over the smallest gap between eigenvalues


def test_an_antisymmetric_vector_has_a_sign_too():
    _, vectors = undirected(nx.path_graph(4)).laplacian_eigenvectors(3)
    assert_close(vectors[:, 0], -vectors[:, 0].flip(0))
    assert vectors[0, 0] > 0


def test_direction_parallel_edges_and_self_loops_do_not_matter():
    path = undirected(nx.path_graph(5))
    other = xf.Graph(torch.tensor([[0, 2, 2, 3, 4, 1, 1], [1, 1, 3, 2, 3, 0, 1]]), 5)
    for a, b in zip(path.laplacian_eigenvectors(4), other.laplacian_eigenvectors(4), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    "graph",
    [
        nx.grid_2d_graph(70, 72),
        nx.grid_2d_graph(50, 50),  # pairs of equal eigenvalues
        nx.gnm_random_graph(5000, 15_000, seed=0),  # with isolated nodes
        nx.disjoint_union_all([nx.grid_2d_graph(30, 30)] * 3 + [nx.path_graph(40), nx.empty_graph(50)]),
        nx.path_graph(2000),
    ],
    ids=["grid", "square grid", "random", "disconnected", "path"],
)
def test_large_graphs(graph):
    k = 12
    (values,), vectors = (part.numpy() for part in undirected(graph).laplacian_eigenvectors(k))
    laplacian = nx.normalized_laplacian_matrix(graph).astype(float)
    residual = np.linalg.norm(laplacian @ vectors - vectors * values, axis=0)
    assert (residual < 1e-5 * values).all()  # it stops at 1e-6
    close(vectors.T @ vectors, np.eye(k), "products of vectors")
    # The number of eigenvalues below a shift is that of negative pivots (Sylvester): none is missed, and none counted twice.
    trivial = nx.number_connected_components(graph)
    for shift, below in (
        (values[0] * 0.99, trivial),
        (values[-1] * 0.999999, trivial + int((values < values[-1] * 0.999999).sum())),
    ):
        assert _eigenvalues_below(laplacian, shift) == below


def _eigenvalues_below(matrix: sp.csr_matrix, shift: float) -> int:
    shifted = (matrix - shift * sp.identity(matrix.shape[0])).tocsc()
    factors = scipy.sparse.linalg.splu(
        shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
    return int((factors.U.diagonal() < 0).sum())


def test_large_and_small_graphs_in_one_batch():
    parts = [nx.gnm_random_graph(1500, 4000, seed=1), nx.cycle_graph(7), nx.grid_2d_graph(3, 4)]
    graph = together([undirected(part) for part in parts])
    values, _ = graph.laplacian_eigenvectors(3)
    for part, found in zip(parts, values, strict=True):
        dense = np.linalg.eigvalsh(nx.normalized_laplacian_matrix(part).toarray())
        wanted = dense[nx.number_connected_components(part) :][:3]
        close(
            found.numpy(), wanted, "eigenvalues", condition=1e4
        )  # the square of relative residuals of 1e-6, over gaps


def test_no_convergence_is_said():
    graph = undirected(nx.path_graph(1200))
    with (
        mock.patch.object(_spectral, "MOST_PRODUCTS", 10),
        pytest.warns(UserWarning, match="did not converge in .* products"),
    ):
        graph.laplacian_eigenvectors(2)


@pytest.mark.parametrize(
    "make", [nx.star_graph, nx.cycle_graph, nx.complete_graph, nx.path_graph], ids=lambda make: make.__name__
)
def test_a_basis_of_an_eigenspace_does_not_depend_on_the_solver(make):
    """Solvers return any basis where eigenvalues coincide, and any sign."""
    theta, v = torch.linalg.eigh(torch.from_numpy(nx.normalized_laplacian_matrix(make(7)).todense()))
    want = _spectral._with_canonical_signs(_spectral._with_canonical_bases(theta[None], v[None]))
    for _ in range(5):
        turn = torch.linalg.qr(torch.randn(len(v), len(v), dtype=torch.float64)).Q
        space = (theta.diff(prepend=theta[:1]) > 1e-6).cumsum(0)
        mixed = torch.zeros_like(turn)
        for each in space.unique():
            here = (space == each).nonzero()[:, 0]
            mixed[here[:, None], here] = torch.linalg.qr(turn[here[:, None], here]).Q
        got = _spectral._with_canonical_signs(_spectral._with_canonical_bases(theta[None], (v @ mixed)[None]))
        assert_close(got, want, "eigenvectors", depth=100, scale=1.0)
        assert_close(got[0] @ torch.diag(theta) @ got[0].mT, v @ torch.diag(theta) @ v.mT, "the matrix", depth=10)


def test_close_eigenvalues_keep_their_eigenvectors():
    """The lowest eigenvalues of a long path lie 1e-5 apart, which is no rounding."""
    graph = nx.path_graph(700)
    theta, v = np.linalg.eigh(nx.normalized_laplacian_matrix(graph).todense())
    values, vectors = undirected(graph).laplacian_eigenvectors(3)
    assert theta[2] - theta[1] < 1e-4
    close(values[0].numpy(), theta[1:4], "eigenvalues")
    products = np.abs((vectors.numpy() * v[:, 1:4]).sum(0))
    assert_close(torch.from_numpy(products), torch.ones(3, dtype=torch.float64), "the same up to sign", condition=1e4)
