"""What can be known of a batch of graphs: hop distances, r-hop sets, ancestors. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int, Int16, Integer
from torch import Tensor

from ._base import offsets_of
from ._neighbours import Neighbours, expand_ranges, neighbours_from_sorted

# Tables of this many entries and more are refused: one of 2^28 takes 256 MB to 2 GB.
MOST_ENTRIES = 2**28
# Floyd-Warshall up to this many nodes, breadth-first search beyond.
LARGEST_DENSE_HOPS = 512
# Entries worked on at a time.
BLOCK = 2**22


class Topology(NamedTuple):
    """A batch of graphs by node numbers: ends of the edges, graph of each node, first node and size of each graph."""

    source: Int[Tensor, " edges"]
    target: Int[Tensor, " edges"]
    graph: Int[Tensor, " nodes"]
    first: Int[Tensor, " graphs"]
    size: Int[Tensor, " graphs"]

    @property
    def num_nodes(self) -> int:
        """Nodes of all graphs together."""
        return self.graph.numel()


class Stack(NamedTuple):
    """Graphs of the same size ``n``: their numbers, and their edges as (place in the stack, local source, local target)."""

    n: int
    graphs: Int[Tensor, " graphs"]
    first: Int[Tensor, " graphs"]
    slot: Int[Tensor, " edges"]
    source: Int[Tensor, " edges"]
    target: Int[Tensor, " edges"]

    @property
    def nodes(self) -> Int[Tensor, "graphs n"]:
        """Node numbers of each graph."""
        return self.first[:, None] + torch.arange(self.n, device=self.first.device)

    def adjacency(self, dtype: torch.dtype) -> Tensor:
        """``(graphs, n, n)``: the number of edges from row to column."""
        flat = torch.zeros(self.graphs.numel() * self.n * self.n, dtype=dtype, device=self.first.device)
        place = (self.slot * self.n + self.source) * self.n + self.target
        return flat.index_add_(0, place, flat.new_ones(place.numel())).view(-1, self.n, self.n)


def stacks(topology: Topology, largest: int, entries: int = BLOCK) -> Iterator[Stack]:
    """All graphs that have nodes, those of equal size together, ``entries`` of their matrices at most at a time.

    Stacking equal sizes instead of padding makes what is computed of a graph independent of the other graphs in the batch. Graphs of
    more than ``largest`` nodes come alone.
    """
    size, order = torch.sort(topology.size, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    edge_position, by_position = torch.sort(position[topology.graph[topology.target]], stable=True)
    edges_until = [0, *torch.bincount(edge_position, minlength=size.numel()).cumsum(0).tolist()]
    source, target = topology.source[by_position], topology.target[by_position]
    sizes = size.tolist()
    low = 0
    while low < len(sizes):
        n, high = sizes[low], low + 1
        most = 1 if n > largest else max(1, entries // max(1, n * n))
        while high < len(sizes) and sizes[high] == n and high - low < most:
            high += 1
        if n:
            graphs = order[low:high]
            first = topology.first[graphs]
            here = slice(edges_until[low], edges_until[high])
            slot = edge_position[here] - low
            yield Stack(n, graphs, first, slot, source[here] - first[slot], target[here] - first[slot])
        low = high


# -- hop distances -----------------------------------------------------------------------------------------------


def first_pairs(topology: Topology) -> Int[Tensor, " graphs"]:
    """Where the pairs of each graph begin among those within all graphs."""
    return offsets_of(topology.size.square())[:-1]


def hop_table(topology: Topology) -> Integer[Tensor, " pairs"]:
    """Fewest edges on a directed path from j to i, for all pairs within each graph.

    The table of a graph of n nodes is ``(n, n)``, row i and column j, laid flat; n where there is no path.
    """
    pairs, begin = int(topology.size.square().sum()), first_pairs(topology)
    if pairs > MOST_ENTRIES:
        raise ValueError(
            f"hop distances of all pairs need num_nodes^2 entries per graph, at most {MOST_ENTRIES:,}; got {pairs:,} for "
            f"{topology.size.numel()} graphs of up to {int(topology.size.max())} nodes. On large graphs use a mask of few hops, "
            f"Local(radius) or Edges(), and positions that need no distances."
        )
    largest = int(topology.size.max()) if topology.size.numel() else 0
    table = torch.empty(pairs, dtype=torch.uint8 if largest < 256 else torch.int16, device=topology.graph.device)
    for stack in stacks(topology, LARGEST_DENSE_HOPS):
        cells = stack.n * stack.n
        if stack.n > LARGEST_DENSE_HOPS:
            start = int(begin[stack.graphs])
            _search_all(stack, table[start : start + cells].view(stack.n, stack.n))
        else:
            place = begin[stack.graphs][:, None] + torch.arange(cells, device=table.device)
            table[place] = _floyd_warshall(stack).flatten(1).to(table.dtype)
    return table


def _floyd_warshall(stack: Stack) -> Int16[Tensor, "graphs n n"]:
    """Hop distances of a stack of small graphs, target by source."""
    edge = stack.adjacency(torch.float32).mT > 0
    distance = torch.full_like(edge, stack.n, dtype=torch.int16).masked_fill_(edge, 1)
    distance.diagonal(dim1=1, dim2=2).zero_()
    through = torch.empty_like(distance)
    for k in range(stack.n):
        torch.add(distance[:, :, k : k + 1], distance[:, k : k + 1, :], out=through)
        torch.minimum(distance, through, out=distance)
    return distance


def _search_all(stack: Stack, table: Integer[Tensor, "n n"]) -> None:
    """Hop distances of one large graph into ``table``, by breadth-first search from many sources at a time."""
    n = stack.n
    edges = torch.unique(stack.target * n + stack.source)
    target, source = edges // n, edges % n
    incoming = torch.sparse_coo_tensor(
        torch.stack([target, source]), torch.ones(edges.numel(), device=edges.device), (n, n),
        is_coalesced=True, check_invariants=False,
    )  # fmt: skip
    outgoing = neighbours_from_sorted(target, source, n).transpose(n)
    width = max(1, BLOCK // n)
    for low in range(0, n, width):
        sources = torch.arange(low, min(n, low + width), device=edges.device)
        table[:, low : low + width] = _search(incoming, outgoing, sources)


def _search(incoming: Tensor, outgoing: Neighbours, sources: Int[Tensor, " sources"]) -> Int16[Tensor, "n sources"]:
    """Hops from each source to every node; n where there is no path.

    A small frontier pushes along its own edges, a large one pulls by a product of matrices (Beamer et al. 2012, "Direction-optimizing
    breadth-first search").
    """
    n, width = outgoing.num_rows, sources.numel()
    distance = torch.full((n, width), n, dtype=torch.int16, device=sources.device)
    flat = distance.view(-1)
    frontier = sources * width + torch.arange(width, device=sources.device)
    flat[frontier] = 0
    degree = outgoing.rowptr.diff()
    pull_cost = outgoing.col.numel() * width + distance.numel()
    for step in range(1, n):
        node = frontier // width
        if int(degree[node].sum()) * 64 < pull_cost:  # pushing an edge costs some 64 times as much as pulling it
            which, entry = outgoing.expand(node)
            reached = outgoing.col[entry] * width + (frontier % width)[which]
            frontier = torch.unique(reached[flat[reached] == n])
        else:
            reached = torch.sparse.mm(incoming, (distance == step - 1).float()) > 0
            frontier = (reached & (distance == n)).view(-1).nonzero()[:, 0]
        if frontier.numel() == 0:
            break
        flat[frontier] = step
    return distance


# -- sets of neighbours ------------------------------------------------------------------------------------------


def within_hops(edges: Neighbours, radius: int) -> Neighbours:
    """For each target the sources from which a directed path of at most ``radius`` edges leads to it, itself included.

    Boolean powers of the adjacency with self-loops, by repeated squaring; memory is that of the result.
    """
    n = edges.num_rows
    itself = torch.arange(n, device=edges.col.device)
    if radius == 0:
        return neighbours_from_sorted(itself, itself, n)
    pairs = torch.unique(torch.cat([edges.row * n + edges.col, itself * (n + 1)]))
    power, result = _from_keys(pairs, n), None
    while True:
        if radius & 1:
            result = power if result is None else _product(result, power)
        radius >>= 1
        if radius == 0:
            assert result is not None
            return result
        square = _product(power, power)
        if (
            square.col.numel() == power.col.numel()
        ):  # closed: no path leads further, so the rest of the radius adds nothing
            return square
        power = square


def _product(a: Neighbours, b: Neighbours) -> Neighbours:
    """The Boolean product: what is reached by an entry of ``a`` and then one of ``b``. Worked out some rows at a time."""
    n = a.num_rows
    work = torch.cat([a.rowptr.new_zeros(1), b.rowptr.diff()[a.col].cumsum(0)])[a.rowptr]
    keys, low, total = [a.col.new_zeros(0)], 0, 0
    while low < n:
        high = max(low + 1, int(torch.searchsorted(work, work[low] + BLOCK, right=True)) - 1)
        first, last = int(a.rowptr[low]), int(a.rowptr[high])
        which, entry = b.expand(a.col[first:last])
        keys.append(torch.unique(a.row[first:last][which] * n + b.col[entry]))
        total, low = total + keys[-1].numel(), high
        if total > MOST_ENTRIES:
            raise ValueError(
                f"sets of neighbours may have at most {MOST_ENTRIES:,} entries; got {total:,} for {low} of {n} nodes. "
                f"Use a smaller radius, Edges() or Expander(degree)."
            )
    return _from_keys(torch.cat(keys), n)


def _from_keys(keys: Int[Tensor, " entries"], n: int) -> Neighbours:
    return neighbours_from_sorted(keys // max(n, 1), keys % max(n, 1), n)


def ancestors(edges: Neighbours, names: Int[Tensor, " nodes"]) -> Neighbours:
    """For each node of an acyclic graph the nodes from which a directed path leads to it, itself included.

    Node after node in topological order, those of equal depth together: the ancestors of a node are itself and those of its sources.
    ``names`` are the numbers of nodes to speak of in the message.

    Raises:
        ValueError: the graph has a cycle, which is named; a self-loop is one.
    """
    n, device = edges.num_rows, edges.col.device
    outgoing, waiting = edges.transpose(n), edges.rowptr.diff()
    begin, count = torch.zeros_like(waiting), torch.zeros_like(waiting)
    known, used = torch.empty(max(1024, 4 * n), dtype=torch.long, device=device), 0
    queue = (waiting == 0).nonzero()[:, 0]
    while queue.numel():
        which, entry = edges.expand(queue)
        source = edges.col[entry]
        # As many nodes as inherit BLOCK ancestors in all, but at least one.
        work = torch.zeros_like(queue).index_add_(0, which, count[source]).cumsum(0)
        most = max(1, int((work <= BLOCK).sum()))
        ready, queue = queue[:most], queue[most:]
        which, source = which[which < most], source[which < most]
        inherited, place = expand_ranges(begin[source], count[source])
        itself = torch.arange(ready.numel(), device=device) * n + ready
        keys = torch.unique(torch.cat([which[inherited] * n + known[place], itself]))
        count[ready] = torch.bincount(keys // n, minlength=ready.numel())
        begin[ready] = used + count[ready].cumsum(0) - count[ready]
        known, used = _append(known, used, keys % n)
        target = outgoing.col[outgoing.expand(ready)[1]]
        waiting.index_add_(0, target, torch.full_like(target, -1))
        queue = torch.cat([queue, torch.unique(target[waiting[target] == 0])])
    if bool((waiting > 0).any()):
        cycle = [int(names[node]) for node in _some_cycle(edges, waiting > 0)]
        shown = cycle if len(cycle) <= 9 else [*cycle[:4], "...", *cycle[-4:]]
        raise ValueError(
            f"ancestors are defined on acyclic graphs only; got the cycle {' -> '.join(map(str, shown))}. Drop an edge of it "
            f"(a self-loop is a cycle too), or use Local(radius), which follows the direction of edges on any graph."
        )
    row, place = expand_ranges(begin, count)
    return neighbours_from_sorted(row, known[place], n)


def _append(store: Tensor, used: int, more: Tensor) -> tuple[Tensor, int]:
    """``more`` written behind the ``used`` entries of a store that doubles when it is full."""
    total = used + more.numel()
    if total > MOST_ENTRIES:
        raise ValueError(
            f"sets of ancestors may have at most {MOST_ENTRIES:,} entries; got {total:,}. Use Edges() or Local(radius), which keep less."
        )
    if total > store.numel():
        store = torch.cat([store[:used], store.new_empty(2 * total - used)])
    store[used:total] = more
    return store, total


def _some_cycle(edges: Neighbours, stuck: Tensor) -> list[int]:
    """One directed cycle among the ``stuck`` nodes, each of which has a source among them."""
    rowptr, col, waiting = edges.rowptr.tolist(), edges.col.tolist(), stuck.tolist()
    path, seen = [waiting.index(True)], {}
    while path[-1] not in seen:
        seen[path[-1]] = len(path) - 1
        path.append(next(j for j in col[rowptr[path[-1]] : rowptr[path[-1] + 1]] if waiting[j]))
    return path[seen[path[-1]] :][::-1]
