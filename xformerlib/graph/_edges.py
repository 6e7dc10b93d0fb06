"""Edges as layers are given them, and what is made of them once for all layers and calls: they are sorted by target."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .._along_edges import Listed, Pattern, pattern_of
from .._arguments import shown
from .._autograd import is_compiling
from ..domains import Graph
from ..domains._made_once import made_once

# As in PyTorch Geometric: (2, edges) with sources above targets, an EdgeIndex, a sparse tensor of (targets, sources); or a Graph.
Adjacency = Tensor | Graph


class SortedEdges(NamedTuple):
    """Edges by target.

    Attributes:
        pattern: queries are targets, keys are sources; parallel edges count apart.
        order: for each of its entries the edge, as they were given.
    """

    pattern: Pattern | Listed
    order: Int[Tensor, " edges"]

    def keys_of_their_own(self) -> Pattern | Listed:
        """The pattern in which every edge is a key of its own, in the order of the entries."""
        row, every = self.pattern.row.long(), torch.arange(self.order.numel(), device=self.order.device)
        return pattern_of(row, every, self.pattern.num_queries, every.numel())


def sorted_edges(edge_index: Adjacency, sources: int, targets: int) -> SortedEdges:
    """The edges sorted by target, made at the first call with an ``edge_index`` and kept beside it."""
    if isinstance(edge_index, Graph):
        return edge_index.fact(("sorted_edges",), lambda: _sorted(edge_index.edge_index, sources, targets))
    what = ("sorted", sources, targets)
    check_adjacency(edge_index)
    return made_once(what, [edge_index], lambda: _sorted(as_pairs(edge_index), sources, targets))


def as_pairs(edge_index: Adjacency) -> Int[Tensor, "2 edges"]:
    """Sources above targets, of any way to give edges."""
    if isinstance(edge_index, Graph):
        return edge_index.edge_index
    check_adjacency(edge_index)
    if edge_index.layout != torch.strided:
        target, source = edge_index.detach().to_sparse_coo().coalesce().indices()
        return torch.stack([source, target])
    _check_shape("edge_index", edge_index)
    if torch.compiler.is_dynamo_compiling():
        return edge_index
    # Another object: what is kept beside a tensor must not hold on to it.
    return edge_index.as_subclass(Tensor).detach()


def check_adjacency(edge_index: object) -> None:
    """Raise unless edges are given as a tensor."""
    if not isinstance(edge_index, Tensor):
        raise TypeError(
            f"edge_index must be a tensor (2, edges), a sparse tensor or a Graph; got {type(edge_index).__name__}"
        )


def check_ends(what: str, edge_index: Tensor, sources: int, targets: int) -> None:
    """Raise unless pairs of nodes are (2, pairs) integers that index so many sources and targets."""
    _check_shape(what, edge_index)
    if torch.compiler.is_dynamo_compiling():
        return  # a graph cannot read its inputs: the operator does when it runs
    for name, index, count in (("sources", edge_index[0], sources), ("targets", edge_index[1], targets)):
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < count):
            raise ValueError(
                f"{what} must index the {count} {name}; got indices from {int(index.min())} to {int(index.max())}"
            )


def check_edge_features(edge_attr: Tensor | None, wanted: bool, edges: int, width: int | None = None) -> None:
    """Raise unless what has an ``edge_dim``, and nothing else, is given features of edges: a row, of ``width`` if known, for each."""
    if (edge_attr is not None) != wanted:
        came = tuple(edge_attr.shape) if isinstance(edge_attr, Tensor) else shown(edge_attr)
        raise ValueError(
            f"edge_attr must be given if and only if the model has an edge_dim; got edge_attr={came}"
            + (". Give graph.edge_attr, too, where the edges are a Graph." if wanted else "")
        )
    if edge_attr is None:
        return
    if not isinstance(edge_attr, Tensor):
        raise TypeError(f"edge_attr must be a tensor of features of edges; got edge_attr={shown(edge_attr)}")
    # Sizes of a graph that is compiled or exported may be symbols, which a comparison would tie to each other.
    rows_fit = edge_attr.ndim > 0 and (is_compiling() or len(edge_attr) == edges)
    if not rows_fit or (width is not None and edge_attr.shape[1:] != (width,)):
        raise ValueError(
            f"edge_attr must be ({edges}, {'...' if width is None else width}), a row for each edge; got {tuple(edge_attr.shape)}"
        )


def width_of(embed: nn.Module | None) -> int | None:
    """How many features a linear map takes; None where that is not known."""
    return embed.in_features if isinstance(embed, nn.Linear) and not isinstance(embed, nn.LazyLinear) else None


def _check_shape(what: str, pairs: Tensor) -> None:
    if pairs.ndim != 2 or pairs.shape[0] != 2 or pairs.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{what} must be integers (2, edges), sources above targets; got {pairs.dtype} {tuple(pairs.shape)}"
        )


def _sorted(edge_index: Tensor, sources: int, targets: int) -> SortedEdges:
    check_ends("edge_index", edge_index, sources, targets)
    source, target = edge_index.long()
    order = torch.argsort(target * max(sources, 1) + source, stable=True)
    return SortedEdges(pattern_of(target[order], source[order], targets, sources), order)
