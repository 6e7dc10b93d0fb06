"""The shortest paths between the nodes of graphs, and sums along them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from .._autograd import is_transformed
from ..domains import Graph
from ..domains._neighbours import Neighbours, expand_ranges, neighbours_of


class WeightedSums(NamedTuple):
    """For each row a sum of rows of a table, with weights: a sparse matrix, and its transpose for gradients.

    Attributes:
        rows: the table's rows in each sum.
        weights: theirs.
        columns: the sums that each of the table's rows is in.
    """

    rows: Neighbours
    weights: Float64[Tensor, " entries"]
    columns: Neighbours

    @staticmethod
    def of(row: Tensor, column: Tensor, weights: Float64[Tensor, " entries"], sums: int, table: int) -> WeightedSums:
        """From entries in any order."""
        rows = neighbours_of(row, column, sums, table)
        assert rows.origin is not None
        return WeightedSums(rows, weights[rows.origin], rows.transpose(table))

    def __call__(self, table: Float[Tensor, "table heads"]) -> Float[Tensor, "sums heads"]:
        """The sums, in fp32 or fp64."""
        if is_transformed():
            entries = table.index_select(0, self.rows.col) * self.weights[:, None].to(table.dtype)
            return table.new_zeros(self.rows.num_rows, table.shape[1]).index_add(0, self.rows.row, entries)
        return _Summed.apply(table, self)


class _Summed(torch.autograd.Function):
    """Both ways each sum is formed by itself, which is faster than adding to where an entry belongs, and the same bit by bit."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, sums: WeightedSums) -> Tensor:
        ctx.sums = sums
        return _bags(sums.rows, sums.weights, table.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sums = ctx.sums
        return _bags(sums.columns, sums.weights[sums.columns.origin], grad), None


def _bags(rows: Neighbours, weights: Tensor, table: Tensor) -> Tensor:
    return F.embedding_bag(
        rows.col, table.contiguous(), rows.rowptr[:-1], mode="sum", per_sample_weights=weights.to(table.dtype)
    )


class ShortestPaths(NamedTuple):
    """The shortest paths of a graph by their last edges, which lead from the query of a pair of nodes ``before`` to that of ``pair``.

    What ends a path is read from a table of edges and pairs, the edges first.

    Attributes:
        sums: of what ends the paths of each pair, times the share.
        lengths: of the paths of each pair, at least 1.
    """

    sums: WeightedSums
    lengths: Int[Tensor, " pairs"]

    def mean(self, scores: Float[Tensor, "edges steps heads"]) -> Float[Tensor, "pairs heads"]:
        """For each pair the mean over its shortest paths of ``1/N sum_n scores[n-th edge of the path, n]``.

        With P_n the sum from the n-th edge on, ``P_n(pair) = sum share (scores_n(edge) + P_(n+1)(before))``: a step of width ``heads``
        for each n, and no list of paths.
        """
        steps = scores.shape[1]
        total = scores.new_zeros(len(self.lengths), scores.shape[2])
        for n in reversed(range(steps)):
            total = self.sums(torch.cat([scores[:, n], total]))
        return total / self.lengths.clamp(max=steps)[:, None]


def shortest_paths(graph: Graph) -> ShortestPaths:
    """The shortest paths of a graph, found once."""
    return graph.fact("shortest paths", lambda: _found_paths(graph))


def _found_paths(graph: Graph) -> ShortestPaths:
    hops, size = graph.hops.table.long(), size_of_pairs(graph)
    source, target = graph.hops.row[graph.node_tokens][graph.edge_index]
    # For each edge and each node of its graph as the key: does a shortest path to the target come by the edge?
    edge, key = expand_ranges(torch.zeros_like(target), graph.sizes[graph.batch[graph.edge_index[1]]])
    pair, before = (ends.index_select(0, edge).add_(key) for ends in (target, source))
    known = hops.masked_fill(hops >= size, -2)  # no path of any length is one longer than none
    ending = (known.index_select(0, before) + 1 == hops.index_select(0, pair)).nonzero()[:, 0]
    pair, before, edge = (x.index_select(0, ending) for x in (pair, before, edge))
    share = _shares(hops, pair, before)
    pairs, both = len(hops), torch.cat([pair, pair])
    columns = torch.cat([edge, graph.num_edges + before])
    sums = WeightedSums.of(both, columns, torch.cat([share, share]), pairs, graph.num_edges + pairs)
    return ShortestPaths(sums, hops.clamp(min=1))


def _shares(
    hops: Int[Tensor, " pairs"], pair: Int[Tensor, " ends"], before: Int[Tensor, " ends"]
) -> Float64[Tensor, " ends"]:
    """How many of the shortest paths of each pair come by each of its ends; paths are counted by length."""
    length, order = torch.sort(hops[pair], stable=True)
    counts = torch.bincount(length, minlength=1)[1:].tolist()
    paths = (hops == 0).double()
    for index in order.split(counts) if counts else ():
        paths.index_add_(0, pair[index], paths[before[index]])
    return paths[before] / paths[pair]


def size_of_pairs(graph: Graph) -> Int[Tensor, " pairs"]:
    """For each pair of nodes of a graph the number of its nodes."""
    return torch.repeat_interleave(graph.sizes, graph.sizes.square())
