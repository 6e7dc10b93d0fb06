"""Encodings computed where data are prepared: transforms of PyTorch Geometric's ``Data``, of one graph or of thousands at once."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from .._arguments import check_size, checked_class, shown
from ..domains import Graph
from ..positions._graph import random_signs

Data = TypeVar("Data")


class _AddEncoding(ABC):
    """A transform that adds a tensor with a row for each node.

    Args:
        attr_name: where the rows go; None to put them beside ``data.x``.
    """

    def __init__(self, attr_name: str | None) -> None:
        self.attr_name = _checked_name(attr_name)

    def __call__(self, data: Data) -> Data:
        """A copy of the graph, or of a batch of graphs, with the encoding; tensors that it has are shared."""
        _check_graph(data)
        graph, data = Graph.from_pyg(data), copy.copy(data)
        for name, rows, _ in self._encodings(graph):
            _put(data, name, rows)
        return data

    def of_many(self, graphs: Iterable[Data]) -> list[Data]:
        """What calling it with each graph gives, worked out for all of them together, which is several times as fast.

        For a data set that fits into memory, such as a list or an ``InMemoryDataset``: ``graphs = AddLaplacian(8).of_many(dataset)``.
        """
        copies: list[Any] = [copy.copy(data) for data in graphs]
        if not copies:
            return copies
        for data in copies:
            _check_graph(data)
        together = _together(copies)
        sizes = together.sizes.tolist()
        for name, rows, of_graphs in self._encodings(together):
            # Copies of their own: a view would keep, and save, the rows of all graphs.
            for data, part in zip(copies, rows.split(1 if of_graphs else sizes), strict=True):
                _put(data, name, part.clone())
        return copies

    @abstractmethod
    def _encodings(self, graph: Graph) -> list[tuple[str | None, Tensor, bool]]:
        """Name and rows of what is added, and whether rows are of graphs instead of nodes."""


@checked_class
class AddLaplacian(_AddEncoding):
    """Adds the k lowest nontrivial eigenvectors of the symmetric normalised Laplacian (Dwivedi et al. 2020, arXiv:2003.00982).

    Each graph of a batch has its own. One null vector for each connected component is left out; a graph with fewer than k others gets
    columns of 0, so that every graph has k. Signs depend on the graph alone; draw them anew in training with ``FlipSigns``. Edges are
    taken in both directions, once. PyTorch Geometric's ``AddLaplacianEigenvectorPE`` leaves one null vector out whatever the graph, and
    raises for graphs of up to k nodes.

    Args:
        k: eigenvectors.
        attr_name: where they go, (nodes, k); None to put them beside ``data.x``.
        eigenvalues: where the eigenvalues go, (1, k), so that a batch has (graphs, k); None to leave them out.

    Raises:
        ValueError: a graph with ``edge_weight``; a name that would be counted up in batches.

    Example:
        >>> from torch_geometric.data import Data
        >>> data = Data(edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), num_nodes=3)
        >>> AddLaplacian(4)(data).laplacian_eigenvector_pe.shape
        torch.Size([3, 4])
    """

    def __init__(
        self, k: int, attr_name: str | None = "laplacian_eigenvector_pe", *, eigenvalues: str | None = None
    ) -> None:
        super().__init__(attr_name)
        self.k, self.eigenvalues = check_size("k", k), _checked_name(eigenvalues)

    def _encodings(self, graph: Graph) -> list[tuple[str | None, Tensor, bool]]:
        values, vectors = (x.to(torch.get_default_dtype()) for x in graph.laplacian_eigenvectors(self.k))
        own = [(self.attr_name, vectors, False)]
        return own if self.eigenvalues is None else [*own, (self.eigenvalues, values, True)]

    def __repr__(self) -> str:
        return f"AddLaplacian({self.k})"


@checked_class
class AddRandomWalk(_AddEncoding):
    """Adds the probabilities that a random walk is back after 1, ..., ``steps`` steps (RWSE, Dwivedi et al. 2021, arXiv:2110.07875).

    The numbers of PyTorch Geometric's ``AddRandomWalkPE``, but that parallel edges count apart; see ``Graph.random_walk``.

    Args:
        steps: the longest walk.
        attr_name: where they go, (nodes, steps); None to put them beside ``data.x``.

    Raises:
        ValueError: a graph with ``edge_weight``; a name that would be counted up in batches.

    Example:
        >>> from torch_geometric.data import Data
        >>> data = Data(edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), num_nodes=3)
        >>> AddRandomWalk(2)(data).random_walk_pe
        tensor([[0.0000, 0.5000],
                [0.0000, 1.0000],
                [0.0000, 0.5000]])
    """

    def __init__(self, steps: int, attr_name: str | None = "random_walk_pe") -> None:
        super().__init__(attr_name)
        self.steps = check_size("steps", steps)

    def _encodings(self, graph: Graph) -> list[tuple[str | None, Tensor, bool]]:
        return [(self.attr_name, graph.random_walk(self.steps).to(torch.get_default_dtype()), False)]

    def __repr__(self) -> str:
        return f"AddRandomWalk({self.steps})"


@checked_class
class AddDegree(_AddEncoding):
    """Adds the number of edges into each node and of those out of it, as integers; parallel edges and self-loops count.

    Args:
        attr_name: where they go, (nodes, 2); None to put them beside ``data.x``.

    Example:
        >>> from torch_geometric.data import Data
        >>> AddDegree()(Data(edge_index=torch.tensor([[0, 1], [1, 2]]), num_nodes=3)).degree
        tensor([[0, 1],
                [1, 1],
                [1, 0]])
    """

    def __init__(self, attr_name: str | None = "degree") -> None:
        super().__init__(attr_name)

    def _encodings(self, graph: Graph) -> list[tuple[str | None, Tensor, bool]]:
        return [(self.attr_name, torch.stack(graph.degrees, 1), False)]

    def __repr__(self) -> str:
        return "AddDegree()"


@checked_class
class FlipSigns:
    """Multiplies each column of an encoding by -1 or 1, drawn anew at each call and for each graph: eigenvectors have no sign.

    ``dataset = Set(root, pre_transform=AddLaplacian(8), transform=FlipSigns())`` computes eigenvectors once and flips them at every step.

    Args:
        attr_name: the encoding, (nodes, k).

    Example:
        >>> from torch_geometric.data import Data
        >>> data = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=2, pe=torch.ones(2, 3))
        >>> FlipSigns("pe")(data).pe.abs().sum()
        tensor(6.)
    """

    def __init__(self, attr_name: str = "laplacian_eigenvector_pe") -> None:
        self.attr_name = attr_name

    def __call__(self, data: Data) -> Data:
        """A copy of the graph, or of a batch of graphs, with other signs."""
        _check_edges(data)
        rows, flipped = getattr(data, self.attr_name, None), copy.copy(data)
        if not isinstance(rows, Tensor) or rows.ndim != 2:
            raise ValueError(
                f"data.{self.attr_name} must be an encoding, a tensor (nodes, k), as AddLaplacian makes it; got {shown(rows)}"
            )
        signs = random_signs(Graph.from_pyg(data), rows.shape[1])
        setattr(flipped, self.attr_name, rows * signs.to(rows))
        return flipped

    def __repr__(self) -> str:
        return f"FlipSigns({self.attr_name!r})"


def _together(graphs: list[Any]) -> Graph:
    """The disjoint union."""
    sizes = torch.tensor([data.num_nodes for data in graphs])
    edges = torch.cat([data.edge_index for data in graphs], 1)
    counts = torch.tensor([data.edge_index.shape[1] for data in graphs])
    shift = torch.repeat_interleave(sizes.cumsum(0) - sizes, counts).to(edges.device)
    batch = torch.repeat_interleave(torch.arange(len(graphs)), sizes).to(edges.device)
    return Graph(edges + shift, int(sizes.sum()), batch=batch, num_graphs=len(graphs))


def _put(data: Any, name: str | None, rows: Shaped[Tensor, "rows columns"]) -> None:
    if name is not None:
        setattr(data, name, rows)
    elif getattr(data, "x", None) is None:
        data.x = rows
    else:
        x = data.x[:, None] if data.x.ndim == 1 else data.x
        data.x = torch.cat([x, rows.to(x)], 1)


def _checked_name(name: str | None) -> str | None:
    if name is not None and ("index" in name or "batch" in name or name == "face"):
        raise ValueError(
            f"PyTorch Geometric counts attributes up in a batch whose names hold 'index' or 'batch', and 'face'; got {name!r}"
        )
    return name


def _check_edges(data: Any) -> None:
    if getattr(data, "edge_index", None) is None:
        raise TypeError(f"data must have edge_index and num_nodes; got {type(data).__name__} without edge_index")


def _check_graph(data: Any) -> None:
    _check_edges(data)
    if getattr(data, "edge_weight", None) is not None:
        raise ValueError(
            "edge_weight has no part in these encodings; take it out of the graph, or put it into edge_attr"
        )
