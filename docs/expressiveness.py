"""Which pairs of graphs the encodings tell apart: the table of the guide to graphs.

    python docs/expressiveness.py

Colours are refined as Transformers refine nodes: a node's colour and, for every other node, what the encoding says of the pair and the
other's colour (generalised distance Weisfeiler-Leman, Zhang et al. 2023, arXiv:2301.09505). For encodings of nodes a pair is adjacent or
not, which is the usual 1-WL begun with their rows. Two graphs are told apart if the colours differ as multisets; an encoding that tells
a graph from itself with its nodes renamed depends on a choice of basis, and tells nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor

import xformerlib as xf
from xformerlib.graph import SignNet
from xformerlib.positions import Sinusoidal

STEPS = 16
EIGENVECTORS = 8


# -- graphs ----------------------------------------------------------------------------------------------------------


def graph(nodes: int, pairs: set[tuple[int, int]]) -> xf.Graph:
    """Undirected."""
    ends = torch.tensor(sorted({(a, b) for a, b in pairs} | {(b, a) for a, b in pairs})).T
    return xf.Graph(ends, nodes)


def circulant(nodes: int, *skips: int) -> xf.Graph:
    return graph(nodes, {(i, (i + skip) % nodes) for i in range(nodes) for skip in skips})


def on_torus(*steps: tuple[int, int]) -> xf.Graph:
    """On Z4 x Z4, each place joined to those these steps away."""
    return graph(
        16, {(4 * a + b, 4 * ((a + s) % 4) + (b + t) % 4) for a, b in product(range(4), repeat=2) for s, t in steps}
    )


def petersen(outer: int, skip: int) -> xf.Graph:
    """A generalised Petersen graph: a ring, a star of steps of ``skip``, and spokes."""
    ring = {(i, (i + 1) % outer) for i in range(outer)}
    star = {(outer + i, outer + (i + skip) % outer) for i in range(outer)}
    return graph(2 * outer, ring | star | {(i, outer + i) for i in range(outer)})


def cube(switched: bool) -> xf.Graph:
    """The 4-cube; or the Hoffman graph, which has its spectrum: whoever has two of the neighbours of 0 gets the other two instead."""
    pairs = {(a, b) for a, b in product(range(16), repeat=2) if (a ^ b).bit_count() == 1}
    if switched:
        some = {1, 2, 4, 8}
        for node in range(16):
            joined = {b for a, b in pairs if a == node} & some
            if len(joined) == 2:
                pairs -= {(node, b) for b in joined} | {(b, node) for b in joined}
                pairs |= {(node, b) for b in some - joined}
    return graph(16, pairs)


# Graphs no two of which are the same; all of a list are regular of the same degree and size, so that 1-WL sees no difference.
FAMILIES: dict[str, list[xf.Graph]] = {
    "hexagon, two triangles": [circulant(6, 1), circulant(6, 2)],
    "10 CSL graphs of 41 nodes": [circulant(41, 1, skip) for skip in (2, 3, 4, 5, 6, 9, 11, 12, 13, 16)],
    "4-cube, Hoffman": [cube(False), cube(True)],
    "dodecahedron, Desargues": [petersen(10, 2), petersen(10, 3)],
    "rook 4x4, Shrikhande": [
        on_torus(*((0, s) for s in (1, 2, 3)), *((s, 0) for s in (1, 2, 3))),
        on_torus((0, 1), (1, 0), (1, 1)),
    ],
}


# -- encodings -------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What an encoding says: (nodes, ...) of nodes and (nodes, nodes, ...) of pairs."""

    nodes: Tensor
    pairs: Tensor


def of_nodes(rows: Callable[[xf.Graph], Tensor]) -> Callable[[xf.Graph], Seen]:
    return lambda on: Seen(rows(on), xf.masks.Edges().dense(on).double()[..., None])


def of_pairs(rows: Callable[[xf.Graph], Tensor]) -> Callable[[xf.Graph], Seen]:
    return lambda on: Seen(torch.eye(on.num_nodes)[:, :0], rows(on))


def added(embedding: xf.positions.Embedding) -> Callable[[xf.Graph], Tensor]:
    embedding = embedding.double().eval()
    return lambda on: embedding(torch.zeros(on.num_nodes, embedding.dim, dtype=torch.float64), on).detach()


def sign_net() -> SignNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SignNet(4, EIGENVECTORS, hidden=8)


def hops(on: xf.Graph) -> Tensor:
    i = torch.arange(on.num_nodes)
    return on.hop_distance(i[:, None], i[None, :])[..., None].double()


ENCODINGS: dict[str, Callable[[xf.Graph], Seen]] = {
    "none (1-WL, message passing)": of_nodes(lambda on: torch.zeros(on.num_nodes, 0)),
    "degree: `Learned`": of_nodes(lambda on: torch.stack(on.degrees, 1).double()),
    f"Laplacian eigenvalues, {EIGENVECTORS}": of_nodes(lambda on: on.laplacian_eigenvectors(EIGENVECTORS)[0].expand(on.num_nodes, -1)),
    f"Laplacian eigenvectors, {EIGENVECTORS}: `Sinusoidal`": of_nodes(added(Sinusoidal(32, eigenvectors=EIGENVECTORS))),
    f"the same through `SignNet`, {EIGENVECTORS}": of_nodes(added(sign_net())),
    f"random walks back, {STEPS} steps: `RandomWalk`": of_nodes(lambda on: on.random_walk(STEPS)),
    "hops: `RelativeBias`": of_pairs(hops),
    f"random walks between, {STEPS} steps: `RandomWalkBias`": of_pairs(
        lambda on: on.walks(STEPS).view(on.num_nodes, on.num_nodes, STEPS)
    ),
}  # fmt: skip


# -- colours ---------------------------------------------------------------------------------------------------------


def names(rows: Tensor) -> list[int]:
    """A whole number for each row, the same for rows that differ by rounding; no fraction that occurs is near a boundary."""
    return [hash(tuple(row)) for row in (rows * 7390851.332151607).round().long().tolist()]


def colours(seen: Seen) -> tuple[int, tuple[int, ...]]:
    """Rounds until the classes are stable, and the colours as a multiset."""
    n = len(seen.nodes)
    flat = names(seen.pairs.flatten(0, 1))
    pairs = [flat[i * n : (i + 1) * n] for i in range(n)]
    colour, rounds = names(seen.nodes), 0
    while True:
        refined = [hash((colour[i], tuple(sorted(zip(pairs[i], colour, strict=True))))) for i in range(n)]
        rounds += 1
        if len(set(refined)) == len(set(colour)):
            return rounds, tuple(sorted(refined))
        colour = refined


def renamed(on: xf.Graph) -> xf.Graph:
    order = torch.randperm(on.num_nodes, generator=torch.Generator().manual_seed(0))
    return xf.Graph(order[on.edge_index], on.num_nodes)


def told_apart(encoding: Callable[[xf.Graph], Seen], family: list[xf.Graph]) -> tuple[int, int] | None:
    """How many pairs of the family are told apart, and of how many; None if graphs are told from themselves."""
    found = [colours(encoding(on)) for on in family]
    if any(colours(encoding(renamed(on))) != own for on, own in zip(family, found, strict=True)):
        return None
    pairs = list(combinations(found, 2))
    return sum(a != b for a, b in pairs), len(pairs)


def cell(result: tuple[int, int] | None) -> str:
    if result is None:
        return "basis"
    apart, pairs = result
    return "**yes**" if apart == pairs else "no" if apart == 0 else f"{apart} of {pairs} pairs"


def table() -> str:
    """In Markdown."""
    lines = [["encoding", *FAMILIES], ["---"] * (1 + len(FAMILIES))]
    for name, encoding in ENCODINGS.items():
        lines.append([name, *(cell(told_apart(encoding, family)) for family in FAMILIES.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
