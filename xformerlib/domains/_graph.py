"""Nodes and directed edges, one graph or many at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int, Integer, Shaped
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._arguments import check_count
from .._autograd import is_compiling
from . import _graph_facts as facts
from ._base import Domain, offsets_of
from ._graph_inputs import check_batch, check_edge_attr, check_edges
from ._kept import Fact
from ._neighbours import Neighbours, neighbours_of
from ._random_walk import arrival_probabilities, return_probabilities
from ._spectral import laplacian_eigenvectors
from ._tickets import domain_fact


class PairPlaces(NamedTuple):
    """Where the pairs within each graph stand in a table of all of them: query q and key k at ``row[q] + place[k]``.

    Attributes:
        row: for each token where its row begins.
        place: for each token its node's number within its graph.
        size: for each token the number of nodes of its graph.
    """

    row: Int[Tensor, " tokens"]
    place: Int[Tensor, " tokens"]
    size: Int[Tensor, " tokens"]


class HopTable(NamedTuple):
    """Hop distances of all pairs within each graph: that of query q and key k is ``table[row[q] + place[k]]``.

    Attributes:
        table: the ``(n, n)`` tables of all graphs, targets by sources, flat and one behind the other; n where there is no path.
        row: for each token where its row begins.
        place: for each token its node's number within its graph.
        size: for each token the number of nodes of its graph.
    """

    table: Integer[Tensor, " pairs"]
    row: Int[Tensor, " tokens"]
    place: Int[Tensor, " tokens"]
    size: Int[Tensor, " tokens"]


class Graph(Domain):
    """Nodes joined by directed edges: one graph, or the disjoint union of a batch of graphs, as in PyTorch Geometric.

    An edge j -> i (``edge_index[0] = j``, ``edge_index[1] = i``) lets query i attend to key j: the source speaks, the target listens. An
    undirected graph has each edge in both directions. Graphs are always packed: ``offsets`` bounds the tokens of each one, and tokens of
    different graphs never meet.

    - distance: the fewest edges on a directed path from j to i; the number of nodes of the graph where there is no path.
    - order: j is not later than i if a directed path leads from j to i (acyclic graphs only).
    - coordinates: the first three nontrivial eigenvectors of the Laplacian, times the square root of the number of nodes.

    Args:
        edge_index: ``(2, edges)`` integers, sources above targets. Parallel edges and self-loops are kept.
        num_nodes: nodes of all graphs together.
        edge_attr: ``(edges, ...)`` features of the edges, kept as they are.
        batch: ``(nodes,)`` the graph of each node, not falling. A number that is skipped is a graph without nodes.
        virtual_nodes: tokens put in front of each graph's nodes, which belong to no place; ``num_tokens`` counts them.
        num_graphs: number of graphs, if the last ones may have no nodes.

    Raises:
        ValueError, TypeError: anything that does not fit together; the message says what.

    Example:
        >>> path = Graph(torch.tensor([[0, 1, 2], [1, 2, 3]]), 4)  # 0 -> 1 -> 2 -> 3
        >>> path.hop_distance(torch.tensor(3), torch.arange(4))  # to node 3 from each node
        tensor([3, 2, 1, 0])
    """

    kind = "Graph"
    continuous = True

    def __init__(
        self,
        edge_index: Integer[Tensor, "2 edges"],
        num_nodes: int,
        *,
        edge_attr: Shaped[Tensor, "edges ..."] | None = None,
        batch: Integer[Tensor, " nodes"] | None = None,
        virtual_nodes: int = 0,
        num_graphs: int | None = None,
    ) -> None:
        self.num_nodes = check_count("num_nodes", num_nodes)
        prefix = check_count("virtual_nodes", virtual_nodes)
        self.edge_index = check_edges(edge_index, self.num_nodes)
        device = self.edge_index.device
        self.edge_attr = check_edge_attr(edge_attr, self.edge_index)
        self.batch, self.sizes = check_batch(batch, num_graphs, self.num_nodes, self.edge_index)
        self._told = batch is not None, num_graphs  # for the operators of a compiled graph
        # Nodes of the largest graph; a compiled graph, which cannot read the sizes, takes the most there may be.
        self.largest = num_nodes if is_dynamo_compiling() else int(self.sizes.max()) if self.sizes.numel() else 0
        super().__init__(
            num_tokens=self.num_nodes + prefix * self.sizes.numel(), ndim=3, prefix=prefix,
            offsets=offsets_of(self.sizes + prefix), device=device,
        )  # fmt: skip

    @classmethod
    def from_pyg(cls, data: Any, *, virtual_nodes: int = 0) -> Graph:
        """From PyTorch Geometric's ``Data`` or ``Batch``, or anything with ``edge_index`` and ``num_nodes``.

        ``edge_attr``, ``batch`` and ``num_graphs`` are read where they exist.

        Example:
            >>> from types import SimpleNamespace
            >>> Graph.from_pyg(SimpleNamespace(edge_index=torch.tensor([[0], [1]]), num_nodes=2))
            Graph(<1 edges>, 2)
        """
        edge_index, num_nodes = getattr(data, "edge_index", None), getattr(data, "num_nodes", None)
        if edge_index is None or num_nodes is None:
            missing = "edge_index" if edge_index is None else "num_nodes"
            raise TypeError(
                f"data must have edge_index and num_nodes; got {type(data).__name__} without {missing}. Give both to Graph itself."
            )
        batch = getattr(data, "batch", None)
        return cls(
            edge_index, num_nodes, edge_attr=getattr(data, "edge_attr", None), batch=batch, virtual_nodes=virtual_nodes,
            num_graphs=None if batch is None else getattr(data, "num_graphs", None),
        )  # fmt: skip

    @property
    def num_graphs(self) -> int:
        """Graphs in the batch, those without nodes included."""
        return self.sizes.numel()

    @property
    def num_edges(self) -> int:
        """Edges of all graphs together."""
        return self.edge_index.shape[1]

    def __repr__(self) -> str:
        batch = f", batch=<{self.num_graphs} graphs>" if self.num_graphs != 1 else ""
        virtual = f", virtual_nodes={self.prefix}" if self.prefix else ""
        features = "" if self.edge_attr is None else ", edge_attr=..."
        return f"Graph(<{self.num_edges} edges>, {self.num_nodes}{features}{batch}{virtual})"

    def _given(self) -> dict[str, Any]:
        return {
            "edge_index": self.edge_index, "num_nodes": self.num_nodes, "edge_attr": self.edge_attr, "batch": self.batch,
            "virtual_nodes": self.prefix, "num_graphs": self.num_graphs,
        }  # fmt: skip

    def ticket(self) -> list[int]:
        if self._number:
            return super().ticket()
        has_batch, num_graphs = self._told
        return [3, self.num_nodes, self.prefix, -1 if num_graphs is None else num_graphs, 1 + has_batch]

    def ticket_tensors(self) -> list[Tensor]:
        if self._number:
            return []
        return [self.edge_index, self.batch] if self._told[0] else [self.edge_index]

    # -- nodes and tokens ------------------------------------------------------------------------------------------

    @property
    def node_tokens(self) -> Int[Tensor, " nodes"]:
        """The token of each node."""
        return self.fact("node_tokens", self._make_node_tokens)

    def _make_node_tokens(self) -> Tensor:
        return torch.arange(self.num_nodes, device=self.device) + self.prefix * (self.batch + 1)

    def _by_token(self, by_node: Shaped[Tensor, "nodes ..."], fill: float = 0) -> Shaped[Tensor, "tokens ..."]:
        """A table over nodes as one over tokens, ``fill`` for virtual nodes."""
        if self.prefix == 0:
            return by_node
        table = by_node.new_full((self.num_tokens, *by_node.shape[1:]), fill)
        table[self.node_tokens] = by_node
        return table

    @property
    def _topology(self) -> facts.Topology:
        first = offsets_of(self.sizes)[:-1]
        return facts.Topology(self.edge_index[0], self.edge_index[1], self.batch, first, self.sizes)

    def _found(self, key: Hashable, make: Callable[[], Fact]) -> Fact:
        """A fact that is found by reading data, which cannot be traced: compiled code takes one that is there already."""
        if is_compiling() and self._facts is not None and key in self._facts:
            return self._facts[key]
        return self.fact(key, make)

    # -- edges -----------------------------------------------------------------------------------------------------

    @property
    def csr(self) -> Neighbours:
        """The sources of the edges into each token, parallel edges included; ``origin`` is the column of ``edge_index``."""
        return self._found("csr", self._make_csr)

    def _make_csr(self) -> Neighbours:
        source, target = self.node_tokens[self.edge_index]
        return neighbours_of(target, source, self.num_tokens, self.num_tokens)

    @property
    def csr_transpose(self) -> Neighbours:
        """The targets of the edges out of each token; ``origin`` is the entry of ``csr``."""
        return self._found("csr_transpose", lambda: self.csr.transpose(self.num_tokens))

    @property
    def degrees(self) -> tuple[Int[Tensor, " nodes"], Int[Tensor, " nodes"]]:
        """The number of edges into each node and out of it; parallel edges and self-loops count."""
        if self.is_looked_up():
            size = [2, self.num_nodes]
            table = domain_fact(
                self.ticket(), self.ticket_tensors(), "_degree_table", None, size, torch.int64, self.edge_index
            )
            return table[0], table[1]
        return self.fact("degrees", self._make_degrees)

    @property
    def _degree_table(self) -> Int[Tensor, "2 nodes"]:
        return torch.stack(self.degrees)

    def _make_degrees(self) -> tuple[Tensor, Tensor]:
        source, target = (torch.bincount(ends, minlength=self.num_nodes) for ends in self.edge_index)
        return target, source

    # -- paths -----------------------------------------------------------------------------------------------------

    @property
    def hops(self) -> HopTable:
        """Hop distances of all pairs within each graph.

        Raises:
            ValueError: more than 2^28 pairs.
        """
        return self._found("hops", self._make_hops)

    def _make_hops(self) -> HopTable:
        return HopTable(facts.hop_table(self._topology), *self.pair_places)

    @property
    def pair_places(self) -> PairPlaces:
        """Where the pairs within each graph stand in tables of all of them."""
        return self._found("pair_places", self._make_pair_places)

    def _make_pair_places(self) -> PairPlaces:
        size = self.sizes[self.batch]
        place = torch.arange(self.num_nodes, device=self.device) - self._topology.first[self.batch]
        rows = facts.first_pairs(self._topology)[self.batch] + place * size
        return PairPlaces(self._by_token(rows), self._by_token(place), self._by_token(size, 1))

    def hop_distance(self, q: Tensor, k: Tensor) -> Int[Tensor, "*pairs"]:
        """The fewest edges on a directed path from node k to node q, both given as tokens: elementwise in broadcastable indices.

        The number of nodes of the graph, which is longer than any path, where there is none; 0 where a virtual node is involved.
        """
        hops = self.hops
        size = hops.size[q]
        if hops.table.numel() == 0:  # no graph has a node
            return torch.zeros_like(q + k)
        distance = hops.table[hops.row[q] + torch.minimum(hops.place[k], size - 1)].long()
        if self.items is not None:
            distance = torch.where(self.items[q] == self.items[k], distance, size)
        virtual = self.touches_prefix(self, q, q, k)
        return distance if virtual is None else distance.masked_fill(virtual, 0)

    def within_hops(self, radius: int) -> Neighbours:
        """For each token the tokens from which a directed path of at most ``radius`` edges leads to it, itself included.

        Raises:
            ValueError: a negative radius, or more than 2^28 pairs.
        """
        radius = min(check_count("radius", radius), self.num_nodes)
        return self._found(("within_hops", radius), lambda: facts.within_hops(self.csr, radius))

    @property
    def ancestors(self) -> Neighbours:
        """For each token the tokens from which a directed path leads to it, itself included.

        Raises:
            ValueError: the graph has a cycle, or more than 2^28 pairs.
        """
        return self._found("ancestors", self._make_ancestors)

    def _make_ancestors(self) -> Neighbours:
        nodes = self._by_token(torch.arange(self.num_nodes, device=self.device))
        return facts.ancestors(self.csr, nodes)

    # -- encodings of nodes ------------------------------------------------------------------------------------------

    def laplacian_eigenvectors(self, k: int) -> tuple[Float64[Tensor, "graphs k"], Float64[Tensor, "nodes k"]]:
        """Eigenvalues and eigenvectors of the symmetric normalised Laplacian of each graph, the k lowest nontrivial ones.

        ``L = I - D^-1/2 A D^-1/2`` of the simple undirected graph underneath. The null vectors, one of each connected component, are
        dropped; columns beyond the last eigenvector are 0. Vectors have norm 1 within their graph, and the sign that makes the sum
        of their cubes positive. Where eigenvalues coincide the vectors are one basis of many.

        Small graphs are decomposed together, large ones by an iteration that needs products with the sparse matrix only; both in
        float64.

        Literature: Belkin and Niyogi 2003; as positional encoding Dwivedi and Bresson 2021 (arXiv:2012.09699).

        Example:
            >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])  # 0 - 1 - 2
            >>> values, vectors = Graph(edges, 3).laplacian_eigenvectors(3)
            >>> values.round(decimals=3)
            tensor([[1., 2., 0.]], dtype=torch.float64)
        """
        k = check_count("k", k)
        if self.is_looked_up():
            names, rows = ("_eigenvalues", "_eigenvectors"), (self.sizes.numel(), self.num_nodes)
            values, vectors = (
                domain_fact(self.ticket(), self.ticket_tensors(), name, k, [n, k], torch.float64, self.edge_index)
                for name, n in zip(names, rows, strict=True)
            )
            return values, vectors
        return self.fact(("laplacian_eigenvectors", k), lambda: laplacian_eigenvectors(self._topology, k))

    def _eigenvalues(self, k: int) -> Tensor:
        return self.laplacian_eigenvectors(k)[0]

    def _eigenvectors(self, k: int) -> Tensor:
        return self.laplacian_eigenvectors(k)[1]

    def random_walk(self, steps: int) -> Float64[Tensor, "nodes steps"]:
        """The probability that a random walk from each node is back after 1, 2, ..., ``steps`` steps: ``diag((D^-1 A)^s)``.

        A walk follows edges from source to target, each edge out of a node with the same probability (parallel edges count apart, so do
        self-loops), and ends where no edge leads out. Isolated nodes hold 0.

        Literature: RWSE, Dwivedi et al. 2022 (arXiv:2110.07875).

        Example:
            >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])  # 0 - 1 - 2
            >>> Graph(edges, 3).random_walk(2)[:, 1]
            tensor([0.5000, 1.0000, 0.5000], dtype=torch.float64)
        """
        steps = check_count("steps", steps)
        if self.is_looked_up():
            size = [self.num_nodes, steps]
            return domain_fact(
                self.ticket(), self.ticket_tensors(), "random_walk", steps, size, torch.float64, self.edge_index
            )
        return self.fact(("random_walk", steps), lambda: return_probabilities(self._topology, steps))

    def walks(self, steps: int, dtype: torch.dtype = torch.float64) -> Float[Tensor, "pairs steps"]:
        """The probability that a random walk from query to key arrives after 0, 1, ..., ``steps`` - 1 steps.

        ``(P^s)_qk`` with P = D^-1 A, for all pairs within each graph, as in ``pair_places``; walks as in ``random_walk``. Computed
        in float64, and kept in ``dtype`` alone: on many graphs this is the largest of their facts.

        Raises:
            ValueError: more than 2^28 entries.

        Literature: RRWP, Ma et al. 2023 (GRIT, arXiv:2305.17589).

        Example:
            >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])  # 0 - 1 - 2
            >>> Graph(edges, 3).walks(3)[1]  # from node 0 to node 1
            tensor([0., 1., 0.], dtype=torch.float64)
        """
        steps = check_count("steps", steps)
        return self._found(("walks", steps, dtype), lambda: arrival_probabilities(self._topology, steps, dtype))

    # -- the vocabulary of domains -----------------------------------------------------------------------------------

    def _make_coordinates(self) -> Tensor:
        _, vectors = self.laplacian_eigenvectors(self.ndim)
        return self._by_token(vectors * self.sizes[self.batch].double().sqrt()[:, None])

    def coordinate(self, axis: int, b: Tensor, i: Tensor) -> Tensor:
        return self.coordinates[..., axis][i]

    def check_related(self, keys: Domain, what: object) -> None:
        super().check_related(keys, what)
        if keys is not self:
            raise ValueError(
                f"{what} compares places of queries and keys, so on graphs both must be on the same Graph object; got {self!r} and "
                f"another {keys!r}. Leave key_domain out, or use Full(), Keys(valid), Prefix(n) or Where(fn) between graphs."
            )

    def check_ordered(self) -> None:
        _ = self.ancestors  # raises on a cycle, when a mask is bound and not when it is first evaluated

    def precedes(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Bool[Tensor, "*pairs"]:
        return self.ancestors.contains(q, k)

    def distance(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Int[Tensor, "*pairs"]:
        return self.hop_distance(q, k)

    def within(
        self, keys: Domain, radius: tuple[float, ...], b: Tensor, q: Tensor, k: Tensor
    ) -> Bool[Tensor, "*pairs"]:
        hops = int(min(radius[0], self.num_nodes))
        if hops == 0:
            return q == k
        return self.csr.contains(q, k) | (q == k) if hops == 1 else self.within_hops(hops).contains(q, k)
