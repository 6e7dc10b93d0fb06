"""Graphs for tests: drawn at random, or from networkx and back."""

from __future__ import annotations

from random import Random

import networkx as nx
import torch

import xformerlib as xf


def random_graph(rng: Random, *, acyclic: bool = False, largest: int = 7, virtual_nodes: int | None = None) -> xf.Graph:
    """A batch of directed graphs, some without nodes or edges, with parallel edges and (unless acyclic) self-loops."""
    sizes = [rng.choice([0, 1, rng.randint(1, largest), rng.randint(1, largest)]) for _ in range(rng.randint(1, 4))]
    edges, first = [], 0
    for size in sizes:
        order = rng.sample(range(size), size)
        for _ in range(rng.randint(0, 2 * size)):
            a, b = rng.randrange(size), rng.randrange(size)
            if acyclic and a == b:
                continue
            ends = sorted((a, b), key=order.index) if acyclic else (a, b)
            edges.append([first + ends[0], first + ends[1]])
        first += size
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return xf.Graph(
        torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T, first, batch=batch, num_graphs=len(sizes),
        virtual_nodes=rng.choice([0, 0, 1, 2]) if virtual_nodes is None else virtual_nodes,
    )  # fmt: skip


def undirected(graph: nx.Graph) -> xf.Graph:
    """A networkx graph, each edge in both directions, nodes in the order that networkx has them."""
    graph = nx.convert_node_labels_to_integers(graph)
    edges = torch.tensor(list(graph.edges), dtype=torch.long).reshape(-1, 2).T
    return xf.Graph(torch.cat([edges, edges.flip(0)], 1), len(graph))


def as_networkx(graph: xf.Graph) -> nx.MultiDiGraph:
    """All nodes and edges, by node number."""
    result = nx.MultiDiGraph()
    result.add_nodes_from(range(graph.num_nodes))
    result.add_edges_from(graph.edge_index.T.tolist())
    return result


def together(graphs: list[xf.Graph]) -> xf.Graph:
    """One batch of several graphs."""
    sizes = torch.tensor([graph.num_nodes for graph in graphs])
    first = sizes.cumsum(0) - sizes
    edges = torch.cat([graph.edge_index + shift for graph, shift in zip(graphs, first.tolist(), strict=True)], 1)
    return xf.Graph(
        edges, int(sizes.sum()), batch=torch.arange(len(graphs)).repeat_interleave(sizes), num_graphs=len(graphs)
    )


def permuted(graph: xf.Graph, order: torch.Tensor) -> xf.Graph:
    """The same single graph with node ``i`` called ``order[i]``."""
    return xf.Graph(order[graph.edge_index], graph.num_nodes)
