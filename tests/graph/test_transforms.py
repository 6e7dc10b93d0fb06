"""Encodings as transforms: of one graph, of a batch, of many at once; and against PyTorch Geometric's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import AddLaplacianEigenvectorPE, AddRandomWalkPE, Compose

import xformerlib as xf
from tests.closeness import assert_close
from xformerlib.graph import AddDegree, AddLaplacian, AddRandomWalk, FlipSigns


def undirected(nodes: int, *pairs: tuple[int, int]) -> Data:
    ends = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    return Data(edge_index=torch.cat([ends, ends.flip(0)], 1), num_nodes=nodes)


# No two nodes are alike and no two eigenvalues close.
PLAIN = undirected(6, (0, 1), (0, 3), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 5))
ODD = [
    PLAIN,
    undirected(2, (0, 1)),
    undirected(5, (0, 1), (2, 3), (3, 4)),  # two components
    undirected(3),  # no edges
    undirected(0),
    Data(edge_index=torch.tensor([[0, 0, 1], [1, 1, 1]]), num_nodes=3),  # parallel edges, a self-loop, an isolated node
    undirected(1),
]
TRANSFORMS: list[Any] = [AddLaplacian(4, eigenvalues="levels"), AddRandomWalk(5), AddDegree()]
NAMES = ["laplacian_eigenvector_pe", "levels", "random_walk_pe", "degree"]


def same(a: Any, b: Any, names: list[str]) -> None:
    for name in names:
        assert_close(a[name], b[name])


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_many_at_once_and_a_batch_are_as_each_alone(transform: Any) -> None:
    alone, together = [transform(data) for data in ODD], transform.of_many(ODD)
    names = [name for name in NAMES if name in alone[0]]
    for a, b, data in zip(alone, together, ODD, strict=True):
        same(a, b, names)
        assert not any(name in data for name in names)  # what was given is left as it was
        assert all(b[name].untyped_storage().nbytes() == b[name].nbytes for name in names)
    batch = transform(Batch.from_data_list(ODD))
    same(batch, Batch.from_data_list(alone), names)
    assert transform.of_many([]) == []


def test_laplacian_of_odd_graphs() -> None:
    for data in AddLaplacian(4, eigenvalues="levels").of_many(ODD):
        v, levels, n = data.laplacian_eigenvector_pe.double(), data.levels.double(), data.num_nodes
        assert v.shape == (n, 4) and levels.shape == (1, 4)
        graph = xf.Graph.from_pyg(data)
        both = torch.cat([graph.edge_index, graph.edge_index.flip(0)], 1).unique(dim=1)
        both = both[:, both[0] != both[1]]
        a = torch.zeros(n, n, dtype=torch.float64)
        a[tuple(both)] = 1
        scale = a.sum(1).clamp(min=1).rsqrt()
        laplacian = torch.diag((a.sum(1) > 0).double()) - scale[:, None] * a * scale
        assert_close((laplacian @ v).float(), v * levels)  # tables are stored in fp32
        wanted = torch.linalg.eigvalsh(laplacian)
        wanted = wanted[wanted > 1e-9][:4]
        assert_close(data.levels[0, : len(wanted)], wanted)
        assert not levels[0, len(wanted) :].any() and not v[:, len(wanted) :].any()


def test_parity_with_pytorch_geometric() -> None:
    theirs = AddLaplacianEigenvectorPE(4, is_undirected=True)(PLAIN).laplacian_eigenvector_pe
    ours = AddLaplacian(4)(PLAIN).laplacian_eigenvector_pe
    assert_close(ours.abs(), theirs.abs())
    for data in ODD[:5]:
        same(AddRandomWalk(5)(data), AddRandomWalkPE(5)(data), ["random_walk_pe"])


def test_in_a_pipeline_and_beside_features() -> None:
    prepare = Compose([AddLaplacian(3, None), AddRandomWalk(2, None), AddDegree(None)])
    data = PLAIN.clone()
    data.x = torch.arange(6)[:, None].float()
    assert prepare(data).x.shape == (6, 1 + 3 + 2 + 2) and data.x.shape == (6, 1)
    loader = DataLoader(AddRandomWalk(2).of_many(ODD), batch_size=len(ODD))
    assert next(iter(loader)).random_walk_pe.shape == (20, 2)
    assert AddDegree(None)(PLAIN).x.dtype == torch.long


def test_signs_are_drawn_for_each_graph_and_column() -> None:
    batch = Batch.from_data_list(AddLaplacian(3).of_many([PLAIN] * 20))
    name, seen = "laplacian_eigenvector_pe", set()
    torch.manual_seed(0)
    before = batch[name].clone()
    flipped = FlipSigns()(batch)[name]
    for part, old in zip(flipped.split(6), before.split(6), strict=True):
        signs = (part / old).round()
        assert_close(part, old * signs[:1])
        seen.add(tuple(signs[0].tolist()))
    assert len(seen) > 4 and torch.equal(batch[name], before)
    assert not torch.equal(FlipSigns()(batch)[name], flipped)


def weighted() -> Data:
    data = PLAIN.clone()
    data.edge_weight = torch.ones(data.num_edges)
    return data


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AddLaplacian(0), ValueError, "k must be >= 1; got k=0"),
        (lambda: AddRandomWalk(2, "walk_index"), ValueError, "counts attributes up .* got 'walk_index'"),
        (lambda: AddRandomWalk(2)(weighted()), ValueError, "edge_weight has no part"),
        (lambda: AddDegree().of_many([weighted()]), ValueError, "edge_weight has no part"),
        (lambda: AddDegree()(Data(x=torch.ones(2, 1))), TypeError, "must have edge_index and num_nodes"),
        (lambda: AddDegree().of_many([Data(x=torch.ones(2, 1))]), TypeError, "must have edge_index and num_nodes"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
