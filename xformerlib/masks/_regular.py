"""Random regular graphs: the pattern behind ``Expander``."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def regular_pattern(n: int, degree: int, seed: int) -> Int[Tensor, "n row"]:
    """For each of n nodes the sorted list of itself and its neighbours in a random graph that is symmetric and exactly regular.

    Every node has ``degree`` neighbours; one more where ``n * degree`` is odd, which no graph can be; all others where there are no
    more. Drawn on the CPU from (n, degree, seed) alone.
    """
    degree += n % 2 * (degree % 2)
    if n <= degree + 1:
        return torch.arange(n).expand(n, n)
    generator = torch.Generator().manual_seed(_mixed(n, degree, seed))
    if degree == 0:
        edges = torch.empty(2, 0, dtype=torch.long)
    elif n <= 2 * degree:
        edges = _relabelled_circulant(n, degree, generator)
    else:
        edges = _union_of_cycles(n, degree, generator)
    row = torch.cat([edges[0], edges[1], torch.arange(n)])
    col = torch.cat([edges[1], edges[0], torch.arange(n)])
    return (torch.sort(row * n + col).values % n).view(n, degree + 1)


def _mixed(n: int, degree: int, seed: int) -> int:
    """One seed of three numbers: near ones lead to unrelated draws."""
    state = 0
    for number in (n, degree, seed):
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % 2**63


def _relabelled_circulant(n: int, degree: int, generator: torch.Generator) -> Int[Tensor, "2 edges"]:
    """Each node joined to those at some random distances around a circle of all nodes in random order.

    For graphs so dense that cycles drawn at random would mostly coincide. Distance 1 is among them, so it is connected.
    """
    distances = torch.cat([torch.ones(1, dtype=torch.long), torch.randperm((n - 1) // 2 - 1, generator=generator) + 2])
    order, start = torch.randperm(n, generator=generator), torch.arange(n)
    parts = [torch.stack([start, (start + int(distance)) % n]) for distance in distances[: degree // 2]]
    if degree % 2:
        parts.append(torch.stack([start[: n // 2], start[: n // 2] + n // 2]))
    return order[torch.cat(parts, 1)]


def _union_of_cycles(n: int, degree: int, generator: torch.Generator) -> Int[Tensor, "2 edges"]:
    """Random Hamiltonian cycles, and a perfect matching where the degree is odd, with edges that coincide switched away."""
    parts = []
    for _ in range(degree // 2):
        cycle = torch.randperm(n, generator=generator)
        parts.append(torch.stack([cycle, cycle.roll(-1)]))
    if degree % 2:
        parts.append(torch.randperm(n, generator=generator).view(2, n // 2))
    edges = torch.cat(parts, 1)
    _switch_double_edges(edges, n, generator)
    return edges


def _switch_double_edges(edges: Int[Tensor, "2 edges"], n: int, generator: torch.Generator) -> None:
    """Make a regular multigraph simple, in place: a double edge a-b and a random edge c-d become a-c and b-d, if both are new.

    Degrees stay as they are. Some degree^2 / 4 edges are double whatever n is, and most trials succeed, so a loop over them will do.
    """
    keys = edges.amin(0) * n + edges.amax(0)
    order = torch.argsort(keys, stable=True)
    repeats = order[1:][keys[order][1:] == keys[order][:-1]]
    for edge in repeats.tolist():
        a, b = edges[:, edge].tolist()
        while True:
            other = int(torch.randint(edges.shape[1], (1,), generator=generator))
            c, d = edges[:, other].tolist()
            one, two = min(a, c) * n + max(a, c), min(b, d) * n + max(b, d)
            if a == c or b == d or one == two or bool(((keys == one) | (keys == two)).any()):
                continue
            edges[:, edge], edges[:, other] = torch.tensor([a, c]), torch.tensor([b, d])
            keys[edge], keys[other] = one, two
            break
