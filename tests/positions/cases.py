"""One domain of each kind, and every position that is defined on it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from xformerlib import Domain, Graph, Grid, Points, Sequence, Timeline
from xformerlib.graph import GaussianBias, RandomWalkBias, SignNet
from xformerlib.positions import (
    Bias,
    ContinuousBias,
    DistanceDecay,
    Embedding,
    Learned,
    RandomWalk,
    RelativeBias,
    Rotary,
    Rotation,
    Sinusoidal,
)

Module = TypeVar("Module", bound=nn.Module)

DIM, HEADS = 12, 3

DOMAINS = [
    "sequence", "late sequence", "prefixed sequence", "padded sequences", "packed sequences",
    "timeline", "prefixed timeline", "timelines", "packed timelines",
    "line", "grid", "volume", "packed grids",
    "points", "sets of points", "packed points",
    "graph", "graphs",
]  # fmt: skip


def domain(name: str) -> Domain:
    """A small domain of the named kind; a new one at each call, so that nothing is cached on it."""
    draw = torch.Generator().manual_seed(len(name))

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=draw, dtype=torch.float64) * 5

    return {
        "sequence": lambda: Sequence(7),
        "late sequence": lambda: Sequence(5, start=3),
        "prefixed sequence": lambda: Sequence(4, prefix=2),
        "padded sequences": lambda: Sequence.padded([5, 2], prefix=1),
        "packed sequences": lambda: Sequence.packed([3, 4], prefix=1),
        "timeline": lambda: Timeline(rand(6)),
        "prefixed timeline": lambda: Timeline(rand(2, 5), prefix=1),
        "timelines": lambda: Timeline(rand(2, 6), valid=torch.arange(6) < torch.tensor([[6], [3]])),
        "packed timelines": lambda: Timeline.packed(rand(6), [2, 4]),
        "line": lambda: Grid(6),
        "grid": lambda: Grid(3, 4, prefix=1),
        "volume": lambda: Grid(2, 3, 2),
        "packed grids": lambda: Grid.packed([(2, 3), (4, 1)], prefix=1),
        "points": lambda: Points(rand(6, 3)),
        "sets of points": lambda: Points(rand(2, 5, 2)),
        "packed points": lambda: Points(rand(6, 2), batch=torch.tensor([0, 0, 1, 1, 1, 1])),
        "graph": lambda: Graph(torch.tensor([[0, 1, 2, 3, 5, 4], [1, 2, 3, 4, 4, 3]]), 6),
        "graphs": lambda: Graph(
            torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 5]]), 6,
            batch=torch.tensor([0, 0, 0, 1, 1, 1]), virtual_nodes=1,
        ),
    }[name]()  # fmt: skip


def embeddings(on: Domain) -> list[Embedding]:
    """Every embedding that is defined on a domain, in the variants that it has there."""
    result: list[Embedding] = [Sinusoidal(DIM), Sinusoidal(DIM + 1, theta=100.0, scale=2.0, eigenvectors=3)]
    if isinstance(on, (Sequence, Graph)):
        result += [Learned(DIM, 10), Learned(DIM, 10, prefix=on.prefix)]
    if isinstance(on, Grid):
        result += [Learned(DIM, (3,) * on.ndim), Learned(DIM, (2,) * on.ndim, prefix=on.prefix)]
    if isinstance(on, Graph):
        result += [Learned(DIM, 2, directed=True), RandomWalk(DIM, 4), SignNet(DIM, 3, hidden=4, num_layers=2)]
    return [redrawn(position) for position in result]


def rotations(on: Domain) -> list[Rotation]:
    """Every rotation that is defined on a domain, in the variants that it has there."""
    options: list[dict[str, object]] = [
        {},
        {"layout": "interleaved"},
        {"fraction": 0.7, "offset": 0.5},
        {"mixed": True, "heads": HEADS},
    ]
    if isinstance(on, Grid):
        options += [{"coordinates": "resized"}, {"coordinates": "normalized", "theta": 100.0}]
    return [redrawn(Rotary(DIM, **option)) for option in options]


def biases(on: Domain) -> list[Bias]:
    """Every bias that is defined on a domain, in the variants that it has there."""
    result: list[Bias] = [
        ContinuousBias(HEADS, hidden=8),
        ContinuousBias(HEADS, hidden=8, bound=None),
        DistanceDecay(HEADS),
        DistanceDecay(HEADS, learned=True, scale=0.3),
    ]
    if isinstance(on, Graph):
        result.append(RandomWalkBias(HEADS, 4, hidden=8))
    if isinstance(on, Points):
        result.append(GaussianBias(HEADS, 5))
    if isinstance(on, (Sequence, Grid)):
        result.append(RelativeBias(HEADS, size=(3,) * on.ndim, prefix=on.prefix > 0))
    if not isinstance(on, Grid):
        options = {"buckets": 6, "max_distance": 8, "scale": 1.7}
        result += [
            RelativeBias(HEADS, **options),
            RelativeBias(HEADS, **options, bidirectional=False, prefix=on.prefix > 0),
        ]
    return [redrawn(position) for position in result]


def redrawn(module: Module) -> Module:
    """The module with every parameter drawn at random: at its usual start much of it is nearly zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module
