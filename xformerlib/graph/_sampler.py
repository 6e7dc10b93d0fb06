"""Large graphs some nodes at a time: a sampler of neighbourhoods in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from .._arguments import checked_class
from ..domains._graph_inputs import check_edges
from ..domains._neighbours import Neighbours, neighbours_of


class _Sampled(NamedTuple):
    """Nodes (the seeds first, then those of each hop) and edges (by hop), by their numbers in the whole graph, and the ends of the edges
    by their places among the nodes."""

    nodes: Int[Tensor, " nodes"]
    edges: Int[Tensor, " edges"]
    ends: Int[Tensor, "2 edges"]
    nodes_of_hop: list[int]
    edges_of_hop: list[int]


@checked_class
class NeighborSampler(DataLoader[Any]):
    """Subgraphs around some nodes at a time, for graphs too large to be trained on at once (GraphSAGE, Hamilton et al. 2017,
    arXiv:1706.02216).

    Of each seed up to ``num_neighbors[0]`` of the edges into it are drawn without replacement, of each node so found up to
    ``num_neighbors[1]``, and so on; a node found twice is kept, and drawn from, once. So every edge leads towards a seed, and as many
    layers of attention along edges as there are hops give the seeds what they would get in the drawn graph whole. This is what PyTorch
    Geometric's ``NeighborLoader`` does, which needs packages that do not install everywhere; arguments and batches are named alike.

    Args:
        data: one graph, PyTorch Geometric's ``Data``, on the CPU.
        num_neighbors: edges drawn into each node, hop by hop; -1 for all.
        input_nodes: the seeds, as indices or as a mask of nodes, each at most once; None for all nodes.
        batch_size: seeds of a batch.
        shuffle, num_workers, drop_last, ...: of ``torch.utils.data.DataLoader``, which this is. ``generator`` seeds both the order
            and, without workers, the edges; or ``torch.manual_seed`` does.

    Shapes:
        A batch is a copy of ``data`` in which what has a row for each node or edge is cut to the subgraph's, with ``n_id`` (nodes,) and
        ``e_id`` (edges,) their numbers in ``data``, ``input_id`` (batch_size,) the places of its seeds in ``input_nodes``,
        ``batch_size`` their number: they are its first nodes; ``num_sampled_nodes`` and ``num_sampled_edges`` by hop.

    Raises:
        ValueError, TypeError: seeds that are not there or twice, fewer than -1 neighbours.

    Example:
        >>> from torch_geometric.data import Data
        >>> ring = Data(x=torch.arange(5.0)[:, None], edge_index=torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]]))
        >>> batch = next(iter(NeighborSampler(ring, [1, 1], input_nodes=torch.tensor([3]))))
        >>> batch.n_id, batch.edge_index
        (tensor([3, 2, 1]), tensor([[1, 2],
                [0, 1]]))
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: Sequence[int],
        input_nodes: Int[Tensor, " seeds"] | Bool[Tensor, " nodes"] | None = None,
        batch_size: int = 1,
        **loader: Any,
    ) -> None:
        if getattr(data, "edge_index", None) is None or getattr(data, "num_nodes", None) is None:
            raise TypeError(f"data must have edge_index and num_nodes; got {type(data).__name__}")
        self.data, self.num_neighbors = data, [int(count) for count in num_neighbors]
        if not self.num_neighbors or min(self.num_neighbors) < -1:
            raise ValueError(
                f"num_neighbors must be numbers >= 0, or -1 for all, one for each hop; got {list(num_neighbors)}"
            )
        if "collate_fn" in loader or "dataset" in loader:
            raise TypeError("NeighborSampler says itself what a batch is; leave dataset and collate_fn out")
        self.seeds = _checked_seeds(input_nodes, data.num_nodes)
        source, target = check_edges(data.edge_index, data.num_nodes).cpu()
        self.incoming = neighbours_of(target, source, data.num_nodes, data.num_nodes)
        super().__init__(range(len(self.seeds)), batch_size=batch_size, collate_fn=self._batch, **loader)  # type: ignore[arg-type]

    def _batch(self, chosen: list[int]) -> Any:
        """The subgraph around these of the seeds."""
        places = torch.tensor(chosen, dtype=torch.long)
        generator = self.generator if get_worker_info() is None else None  # torch has seeded each worker's own
        found = sample_neighbors(self.incoming, self.seeds[places], self.num_neighbors, generator)
        batch = copy.copy(self.data)
        for name, value in _tensors(self.data):
            if name == "edge_index":
                continue
            if self.data.is_node_attr(name):
                setattr(batch, name, value[found.nodes])
            elif self.data.is_edge_attr(name):
                setattr(batch, name, value[found.edges])
        batch.edge_index, batch.num_nodes = found.ends, len(found.nodes)
        batch.n_id, batch.e_id, batch.input_id, batch.batch_size = found.nodes, found.edges, places, len(chosen)
        batch.num_sampled_nodes, batch.num_sampled_edges = found.nodes_of_hop, found.edges_of_hop
        return batch


def sample_neighbors(
    incoming: Neighbours, seeds: Int[Tensor, " seeds"], counts: Sequence[int], generator: torch.Generator | None
) -> _Sampled:
    """Hop by hop up to so many of the edges into each node that the last hop found."""
    place = torch.full((incoming.num_rows,), -1)
    place[seeds] = torch.arange(len(seeds))
    nodes, edges, sources, targets = [seeds], [], [], []
    for count in counts:
        row, entry = _drawn(incoming, nodes[-1], count, generator)
        source = incoming.col[entry]
        new = source[place[source] < 0].unique()
        known = sum(map(len, nodes))
        place[new] = torch.arange(known, known + len(new))
        targets.append(place[nodes[-1]][row])
        sources.append(place[source])
        assert incoming.origin is not None
        edges.append(incoming.origin[entry])
        nodes.append(new)
    ends = torch.stack([torch.cat(sources), torch.cat(targets)])
    return _Sampled(torch.cat(nodes), torch.cat(edges), ends, [len(n) for n in nodes], [len(e) for e in edges])


def _drawn(
    incoming: Neighbours, nodes: Int[Tensor, " nodes"], count: int, generator: torch.Generator | None
) -> tuple[Int[Tensor, " drawn"], Int[Tensor, " drawn"]]:
    """Up to ``count`` entries of each of these rows (-1: all), each set of them with the same probability: the row's place, and the entry.

    Floyd's algorithm (Bentley and Floyd 1987, "A sample of brilliance") for all rows at once: its work does not grow with the degrees.
    """
    degree = incoming.rowptr.diff()[nodes]
    few = degree <= count if count >= 0 else torch.ones_like(degree, dtype=torch.bool)
    all_rows = few.nonzero()[:, 0]
    which, entry = incoming.expand(nodes[all_rows])
    many = (~few).nonzero()[:, 0]
    drawn = torch.empty(len(many), max(count, 0), dtype=torch.long)
    for step in range(count if len(many) else 0):
        last = degree[many] - count + step
        pick = (torch.rand(len(many), dtype=torch.float64, generator=generator) * (last + 1)).long().clamp(max=last)
        taken = (drawn[:, :step] == pick[:, None]).any(1)
        drawn[:, step] = torch.where(taken, last, pick)
    begin = incoming.rowptr[nodes[many]]
    rows = torch.cat([all_rows[which], many.repeat_interleave(drawn.shape[1])])
    entries = torch.cat([entry, (begin[:, None] + drawn).flatten()])
    order = torch.argsort(rows, stable=True)
    return rows[order], entries[order]


def _tensors(data: Any) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in data.to_dict().items() if isinstance(value, Tensor)]


def _checked_seeds(nodes: Tensor | None, num_nodes: int) -> Int[Tensor, " seeds"]:
    if nodes is None:
        return torch.arange(num_nodes)
    if nodes.dtype == torch.bool:
        if nodes.shape != (num_nodes,):
            raise ValueError(f"input_nodes must be a mask of {num_nodes} nodes; got {tuple(nodes.shape)}")
        return nodes.nonzero()[:, 0].cpu()
    if nodes.ndim != 1 or nodes.is_floating_point():
        raise TypeError(f"input_nodes must be a vector of indices or a mask; got {nodes.dtype} {tuple(nodes.shape)}")
    nodes = nodes.long().cpu()
    if len(nodes) and not (int(nodes.min()) >= 0 and int(nodes.max()) < num_nodes):
        raise ValueError(f"input_nodes must be from 0 to {num_nodes - 1}; got {int(nodes.min())} to {int(nodes.max())}")
    if len(nodes.unique()) < len(nodes):
        raise ValueError(f"input_nodes must name each node once; got {len(nodes) - len(nodes.unique())} again")
    return nodes
