"""Where random walks on a batch of graphs are after some steps. Pure functions of tensors, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ._graph_facts import BLOCK, MOST_ENTRIES, Stack, Topology, first_pairs, stacks
from ._neighbours import Neighbours, neighbours_of

# Powers of dense matrices up to this many nodes, blocks of walks beyond.
LARGEST_DENSE_WALK = 128
# Up to this many nodes the walks soon are everywhere, so that their probabilities are best kept dense from the start.
LARGEST_WITHOUT_SPARSE = 1024
# A sparse block turns dense when more than this share of it is filled.
DENSE_SHARE = 1 / 32


def return_probabilities(topology: Topology, steps: int) -> Float64[Tensor, "nodes steps"]:
    """``diag((D^-1 A)^s)`` for s = 1, ..., steps: A[j, i] the number of edges j -> i, D the number that leave j."""
    result = torch.zeros(topology.num_nodes, steps, dtype=torch.float64, device=topology.graph.device)
    for stack in stacks(topology, LARGEST_DENSE_WALK):
        if stack.n > LARGEST_DENSE_WALK:
            result[stack.nodes[0]] = _of_large(stack, steps)
        else:
            result[stack.nodes] = _of_small(stack, steps)
    return result


def arrival_probabilities(
    topology: Topology, steps: int, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "pairs steps"]:
    """``(D^-1 A)^s`` for s = 0, ..., steps - 1 and all pairs within each graph: row where a walk begins, column where it is."""
    pairs, begin = int(topology.size.square().sum()), first_pairs(topology)
    if pairs * steps > MOST_ENTRIES:
        raise ValueError(
            f"walks of all pairs need num_nodes^2 * steps entries per graph, at most {MOST_ENTRIES:,}; got {pairs:,} pairs and "
            f"steps={steps}. On large graphs use RandomWalk(dim, steps), which needs nodes * steps."
        )
    result = torch.zeros(pairs, steps, dtype=dtype, device=topology.graph.device)
    for stack in stacks(topology, LARGEST_DENSE_WALK):
        cells = torch.arange(stack.n * stack.n, device=result.device)
        power = torch.eye(stack.n, dtype=torch.float64, device=result.device).repeat(stack.graphs.numel(), 1, 1)
        powers = [power]
        if stack.n > LARGEST_DENSE_WALK:
            weight = 1 / torch.bincount(stack.source, minlength=stack.n).double()[stack.source]
            back = _Step.make(stack.source, stack.target, weight, stack.n).matrix
            for _ in range(steps - 1):
                powers.append(torch.sparse.mm(back, powers[-1][0].mT).mT[None])
        else:
            adjacency = stack.adjacency(torch.float64)
            walk = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1)
            for _ in range(steps - 1):
                powers.append(powers[-1] @ walk)
        if steps:
            result[begin[stack.graphs][:, None] + cells] = torch.stack(powers, -1).flatten(1, 2).to(dtype)
    return result


def _of_small(stack: Stack, steps: int) -> Float64[Tensor, "graphs n steps"]:
    adjacency = stack.adjacency(torch.float64)
    walk = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1)
    result = walk.new_empty(*walk.shape[:2], steps)
    power = walk
    for step in range(steps):
        result[:, :, step] = power.diagonal(dim1=1, dim2=2)
        power = power @ walk
    return result


class _Step(NamedTuple):
    """One step of a walk: where it can lead from each node and with what weight, and the same as a matrix (to, from)."""

    neighbours: Neighbours
    weight: Float64[Tensor, " edges"]
    matrix: Tensor

    @classmethod
    def make(cls, origin: Tensor, goal: Tensor, weight: Tensor, n: int) -> _Step:
        neighbours = neighbours_of(origin, goal, n, n)
        matrix = torch.sparse_coo_tensor(torch.stack([goal, origin]), weight, (n, n), check_invariants=False).coalesce()
        assert neighbours.origin is not None
        return cls(neighbours, weight[neighbours.origin], matrix)


class _Sparse(NamedTuple):
    """Walks from a block of nodes: value at ``node * width + walk`` for the rising ``place``, 0 elsewhere."""

    place: Int[Tensor, " entries"]
    value: Float64[Tensor, " entries"]


def _of_large(stack: Stack, steps: int) -> Float64[Tensor, "n steps"]:
    """Walks from a block of nodes at a time, forward and backward: (P^(a+b))_ii is the sum over j of (P^a)_ij (P^b)_ji.

    So walks of half the steps do, which on a large sparse graph reach far fewer nodes.
    """
    n, device = stack.n, stack.first.device
    weight = 1 / torch.bincount(stack.source, minlength=n).double()[stack.source]
    forward = _Step.make(stack.source, stack.target, weight, n)
    backward = _Step.make(stack.target, stack.source, weight, n)
    result = torch.empty(n, steps, dtype=torch.float64, device=device)
    width = max(1, BLOCK // n)
    for low in range(0, n, width):
        nodes = torch.arange(low, min(n, low + width), device=device)
        ahead = behind = _start(nodes, n)
        for step in range(steps):
            if step % 2 == 0:
                ahead = _advance(ahead, forward, nodes.numel())
            else:
                behind = _advance(behind, backward, nodes.numel())
            result[nodes, step] = _meet(ahead, behind, nodes.numel())
    return result


def _start(nodes: Tensor, n: int) -> Tensor | _Sparse:
    width = nodes.numel()
    place = nodes * width + torch.arange(width, device=nodes.device)
    value = torch.ones(width, dtype=torch.float64, device=nodes.device)
    walks = _Sparse(place, value)
    return walks if n > LARGEST_WITHOUT_SPARSE else _dense(walks, n, width)


def _dense(walks: _Sparse, n: int, width: int) -> Float64[Tensor, "n width"]:
    result = walks.value.new_zeros(n * width)
    result[walks.place] = walks.value
    return result.view(n, width)


def _advance(walks: Tensor | _Sparse, step: _Step, width: int) -> Tensor | _Sparse:
    """One step further."""
    if isinstance(walks, Tensor):
        return torch.sparse.mm(step.matrix, walks)
    which, entry = step.neighbours.expand(walks.place // width)
    goal = step.neighbours.col[entry] * width + (walks.place % width)[which]
    place, where = torch.unique(goal, return_inverse=True)
    value = walks.value.new_zeros(place.numel()).index_add_(0, where, walks.value[which] * step.weight[entry])
    n = step.neighbours.num_rows
    moved = _Sparse(place, value)
    return _dense(moved, n, width) if place.numel() > DENSE_SHARE * n * width else moved


def _meet(a: Tensor | _Sparse, b: Tensor | _Sparse, width: int) -> Float64[Tensor, " width"]:
    """For each walk the sum over nodes of the products of two distributions."""
    if isinstance(a, Tensor):
        if isinstance(b, Tensor):
            return (a * b).sum(0)
        a, b = b, a
    if isinstance(b, Tensor):
        other = b.flatten()[a.place]
    elif b.place.numel() == 0:
        return a.value.new_zeros(width)
    else:
        found = torch.searchsorted(b.place, a.place).clamp(max=b.place.numel() - 1)
        other = torch.where(b.place[found] == a.place, b.value[found], 0.0)
    return a.value.new_zeros(width).index_add_(0, a.place % width, a.value * other)
