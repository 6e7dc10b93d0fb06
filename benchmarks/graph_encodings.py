"""Encodings of many small graphs where data are prepared: all at once, against a transform called with each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import xformerlib as xf

from ._measure import Call, Line, Setting, Side, Target, Work, installed
from .graphs import molecules, zinc_sizes

Encode = Callable[[list[Any]], list[Any]]


def data_set(graph: xf.Graph) -> list[Any]:
    """A batch of graphs as PyTorch Geometric holds a data set."""
    from torch_geometric.data import Data

    sizes, (graph_of, order) = graph.sizes, graph.batch[graph.edge_index[0]].sort(stable=True)
    first = (sizes.cumsum(0) - sizes)[graph_of]
    edges = (graph.edge_index[:, order] - first).split(torch.bincount(graph_of, minlength=len(sizes)).tolist(), 1)
    return [Data(edge_index=e.contiguous(), num_nodes=n) for e, n in zip(edges, sizes.tolist(), strict=True)]


def prepared(setting: Setting, ours: Encode, theirs: Callable[[], Encode], shown: Callable[..., Tensor]) -> Work:
    graph = molecules(zinc_sizes(setting.size(1000, 20)))
    graphs = data_set(graph)

    def peer() -> Side:
        encode = theirs()
        return Call(lambda: shown(encode(graphs), graph))

    return Work(Call(lambda: shown(ours(graphs), graph)), installed(peer), "-", 0, 0)


def laplacian(setting: Setting) -> Work:
    from xformerlib.graph import AddLaplacian

    def levels(graphs: list[Any], graph: xf.Graph) -> Tensor:
        """v' L v of each column of each graph, its eigenvalue, whatever its sign and the basis of its eigenspace."""
        v = torch.cat([data.laplacian_eigenvector_pe for data in graphs]).double()
        source, target = graph.edge_index
        x = v / graph.degrees[0].double().sqrt()[:, None]
        differences = (x[source] - x[target]).square()
        return v.new_zeros(graph.num_graphs, v.shape[1]).index_add(0, graph.batch[target], differences / 2)

    def theirs() -> Encode:
        from torch_geometric.transforms import AddLaplacianEigenvectorPE

        transform = AddLaplacianEigenvectorPE(8, is_undirected=True)
        return lambda graphs: [transform(data) for data in graphs]

    return prepared(setting, AddLaplacian(8).of_many, theirs, levels)


def random_walk(setting: Setting) -> Work:
    from xformerlib.graph import AddRandomWalk

    def rows(graphs: list[Any], graph: xf.Graph) -> Tensor:
        return torch.cat([data.random_walk_pe for data in graphs])

    def theirs() -> Encode:
        from torch_geometric.transforms import AddRandomWalkPE

        transform = AddRandomWalkPE(20)
        return lambda graphs: [transform(data) for data in graphs]

    return prepared(setting, AddRandomWalk(20).of_many, theirs, rows)


LINES = (
    Line(
        "encodings-laplacian", "8 Laplacian eigenvectors of each of 1,000 molecules (sizes as in ZINC)",
        "PyG AddLaplacianEigenvectorPE(is_undirected=True)", laplacian, Target(faster=3),
    ),
    Line(
        "encodings-walk", "random walks of 20 steps on each of 1,000 molecules (sizes as in ZINC)",
        "PyG AddRandomWalkPE", random_walk, Target(faster=3),
    ),
)  # fmt: skip
