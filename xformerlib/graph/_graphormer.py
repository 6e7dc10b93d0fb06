"""Graphormer: attention among all nodes, told degrees, distances, and what lies on the paths between nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from .._arguments import Count, Size, check_size
from .._autograd import no_autocast, outside_graphs
from .._options import GraphormerOptions
from .._sublayers import NormLayer, norm_factory, normed
from ..blocks import Block
from ..domains import Domain, Graph
from ..positions import Bias, Learned, PairBias, RelativeBias
from ..positions._base import at_least_fp32, no_meaning
from ._edges import check_edge_features, width_of
from ._model import GraphModel
from ._pairs import NodePairBias, NodePairs
from ._paths import shortest_paths, size_of_pairs
from ._readout import Readout

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PathBias(NodePairBias):
    """A score for what lies on the shortest paths from a key to a query: Graphormer's edge encoding (Ying et al. 2021, arXiv:2106.05234).

        b_ij = mean over the shortest paths from j to i of   1/N sum_{n <= N} e_n . w_n,   N the smaller of its edges and ``steps``

    where e_n are the features of the path's n-th edge, counted from the query, and w_n is learned for each n and head; 0 where there is
    no path, for a node and itself, and for virtual nodes. The paper takes one shortest path of several, as its search happens to find
    it; here it is the mean over all, which is found as fast and does not depend on the order of nodes.

    Features are those that the ``Graph`` was given as ``edge_attr``. Memory grows with the last edges of shortest paths, at most the nodes
    times the edges of each graph: for graphs of up to some hundred nodes.

    Args:
        heads: attention heads.
        edge_dim: features of an edge; kinds of bonds, say, as 0 and 1 for each kind.
        steps: edges of a path that count, from the query on.

    Weights:
        ``weight`` (steps, edge_dim, heads), drawn from a truncated normal distribution of std 0.02.

    Example:
        >>> path = Graph(torch.tensor([[0, 1], [1, 2]]), 3, edge_attr=torch.tensor([[1.0], [5.0]]))
        >>> bias = PathBias(1, edge_dim=1)
        >>> _ = nn.init.ones_(bias.weight)
        >>> bias.pair(path).at(torch.tensor(2), torch.arange(3))  # to the last node from each
        tensor([[3., 5., 0.]], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, heads: Size, edge_dim: int, *, steps: Size = 5) -> None:
        super().__init__()
        self.heads = check_size("heads", heads)
        self.weight = nn.Parameter(torch.empty(check_size("steps", steps), check_size("edge_dim", edge_dim), heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.trunc_normal_(self.weight, std=0.02)

    def table(self, domain: Domain, dtype: torch.dtype | None) -> Float[Tensor, "pairs heads"]:
        """The scores of all pairs within graphs."""
        if not isinstance(domain, Graph):
            raise no_meaning(self, domain, "Paths need edges; use RelativeBias(heads).")
        if domain.edge_attr is None:
            raise ValueError(f"PathBias asks for features of edges: give the Graph its edge_attr; got {domain!r}")
        return self._of_features(domain, domain.edge_attr, dtype)

    def forward(
        self, domain: Domain, keys: Domain, dtype: torch.dtype | None, edge_attr: Tensor | None = None
    ) -> PairBias:
        """``between``, or the same with features other than the graph's."""
        if edge_attr is None:
            return self.between(domain, keys, dtype)
        assert isinstance(domain, Graph)
        return NodePairs(domain, keys, self._of_features(domain, edge_attr, dtype), None)

    def _of_features(
        self, graph: Graph, edge_attr: Float[Tensor, "edges features"], dtype: torch.dtype | None
    ) -> Float[Tensor, "pairs heads"]:
        steps, width, _ = self.weight.shape
        if edge_attr.shape != (graph.num_edges, width) or not edge_attr.is_floating_point():
            raise ValueError(
                f"edge_attr must be floating-point (edges, edge_dim) = {(graph.num_edges, width)}; got {edge_attr.dtype} "
                f"{tuple(edge_attr.shape)}. Categories are given as 0 and 1 for each (torch.nn.functional.one_hot)."
            )
        dtype = at_least_fp32(dtype or self.weight.dtype)
        with no_autocast(edge_attr.device):
            by_step = edge_attr.to(dtype) @ self.weight.to(dtype).transpose(0, 1).flatten(1)
        return shortest_paths(graph).mean(by_step.unflatten(1, (steps, -1)))

    def extra_repr(self) -> str:
        steps, width, heads = self.weight.shape
        return f"{heads}, edge_dim={width}, steps={steps}"


class Graphormer(GraphModel):
    """All nodes attend to all of their graph, told degrees, hops and the edges between them (Ying et al. 2021, arXiv:2106.05234).

        x_i <- W x_i + in[degree of i] + out[degree of i];   score_ij = q_i . k_j / sqrt(d) + hops[d(i, j)] + path_ij

    Blocks are pre-norm, with a feed-forward layer of ``hidden_channels``; the virtual node's row stands for the graph, and pairs with it
    have scores of their own (here three for each head: from it, to it, with itself; in the paper one). ``path_ij`` is ``PathBias``, which
    differs from the paper's where there are several shortest paths. As in the paper's code all layers share hops and paths.

    Args:
        in_channels, hidden_channels, out_channels, pool, virtual_nodes: as in ``GraphModel``.
        num_layers, heads: blocks, attention heads.
        edge_dim: features of an edge, or a module that makes ``hidden_channels`` of what ``edge_attr`` holds; None without features.
        max_degree, max_hops: larger ones are taken for these.
        path_steps: edges of a path that count.
        norm_layer, **block: arguments of ``Block``: dropout, attention_dropout, activation, drop_path, hidden, ...

    Example:
        >>> model = Graphormer(7, 32, 1, num_layers=2, heads=4, edge_dim=3)
        >>> edge_index, batch = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), torch.tensor([0, 0, 1, 1])
        >>> model(torch.randn(4, 7), edge_index, torch.randn(4, 3), batch).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        in_channels: int | nn.Module,
        hidden_channels: Size,
        out_channels: Size | None,
        num_layers: int = 12,
        heads: Size = 8,
        *,
        edge_dim: int | nn.Module | None = None,
        max_degree: Size = 63,
        max_hops: Size = 30,
        path_steps: Size = 5,
        pool: Readout = "token",
        virtual_nodes: Count = 1,
        norm_layer: NormLayer = "layer",
        **block: Unpack[GraphormerOptions],
    ) -> None:
        super().__init__(
            in_channels, hidden_channels, out_channels, pool=pool, virtual_nodes=virtual_nodes, heads=heads
        )
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1; got num_layers={num_layers}")
        self.embed_edges = edge_dim if isinstance(edge_dim, nn.Module) else None
        self.degree = Learned(hidden_channels, check_size("max_degree", max_degree) + 1, directed=True)
        rows = check_size("max_hops", max_hops, least=2) + 2  # 0, 1, ..., and no path
        self.hops = RelativeBias(heads, buckets=rows, prefix=virtual_nodes > 0, bidirectional=False)
        width = edge_dim if isinstance(edge_dim, int) else hidden_channels
        self.paths = None if edge_dim is None else PathBias(heads, width, steps=path_steps)
        block = {"hidden": hidden_channels, **block}
        self.blocks = nn.ModuleList(
            Block(hidden_channels, heads, norm_layer=norm_layer, **block) for _ in range(num_layers)
        )
        self.norm = norm_factory(norm_layer)(hidden_channels)

    def run(
        self, x: Float[Tensor, "tokens channels"], graph: Graph, edge_attr: Shaped[Tensor, "edges *features"] | None
    ) -> Float[Tensor, "tokens channels"]:
        check_edge_features(edge_attr, self.paths is not None, graph.num_edges, width_of(self.embed_edges))
        return outside_graphs(self._run, "paths are found by reading the edges")(x, graph, edge_attr)

    def _run(self, x: Tensor, graph: Graph, edge_attr: Tensor | None) -> Tensor:
        hops = self.hops(graph, graph, None)
        table, prefix_table = hops.tensors[0].split([hops.rows, hops.prefix_rows])
        scores = table[_hop_rows(graph, hops.rows)]
        if self.paths is not None and edge_attr is not None:
            edges = edge_attr if self.embed_edges is None else self.embed_edges(edge_attr)
            scores = scores + self.paths(graph, graph, None, edges).tensors[0][: len(scores)]
        shared = _Scores(scores, prefix_table if hops.prefix_rows else None)
        x = self.degree(x, graph)
        for block in self.blocks:
            x = block(x, graph, position=shared)
        return normed(self.norm, x, graph)


class _Scores(Bias):
    """Scores of all pairs that were computed for this call, once for all layers."""

    def __init__(self, scores: Float[Tensor, "pairs heads"], prefix_table: Tensor | None) -> None:
        super().__init__()
        self.heads, self.scores, self.prefix_table = scores.shape[1], scores, prefix_table

    def is_pointwise(self, domain: Domain) -> bool:
        return True

    def between(self, domain: Domain, keys: Domain, dtype: torch.dtype | None) -> PairBias:
        dtype = at_least_fp32(dtype or self.scores.dtype)
        return NodePairs(domain, keys, self.scores.to(dtype), self.prefix_table)


def _hop_rows(graph: Graph, rows: int) -> Int[Tensor, " pairs"]:
    """The row of each pair in a table of hops, as ``RelativeBias`` has it."""

    def make() -> Tensor:
        hops = graph.hops.table.long()
        return torch.where(hops < size_of_pairs(graph), hops.clamp(max=rows - 2), rows - 1)

    return graph.fact(("hop rows of all pairs", rows), make)
