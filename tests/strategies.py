"""Generated domains, masks, positions and attention options: the cells of the matrix that the library promises."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from hypothesis import strategies as st

import xformerlib as xf
from xformerlib import masks, positions
from xformerlib.masks._algebra import Leaf

HEADS = 4
ROWS = 2  # rows of the batch wherever a domain or a mask has facts of each row


def _lengths(rng: Random) -> list[int]:
    return [rng.randint(0, 5) for _ in range(ROWS)]


def _sequence(rng: Random) -> xf.Domain:
    prefix, start = rng.choice([0, 0, 1, 2]), rng.choice([0, 0, 3])
    how = rng.choice(["dense", "padded", "packed"])
    if how == "dense":
        return xf.Sequence(rng.randint(0, 9), start=start, prefix=prefix)
    if how == "packed":
        return xf.Sequence.packed([*_lengths(rng), rng.randint(0, 3)], start=start, prefix=prefix)
    lengths = _lengths(rng)
    return xf.Sequence.padded(lengths, max(lengths) + rng.randint(0, 2), start=start, prefix=prefix)


def _timeline(rng: Random) -> xf.Domain:
    count = rng.randint(0, 7)
    times = torch.tensor([[rng.choice([0.0, 0.5, 1.25, 2.0, 7.5]) for _ in range(count)] for _ in range(ROWS)]).reshape(
        ROWS, count
    )
    how = rng.choice(["shared", "rows", "valid", "packed"])
    if how == "packed":
        first = rng.randint(0, count)
        return xf.Timeline.packed(times[0], [first, count - first])
    prefix = rng.choice([0, 1])
    if how == "valid":
        valid = torch.tensor(
            [[rng.random() < 0.7 for _ in range(count)] for _ in range(ROWS)], dtype=torch.bool
        ).reshape(ROWS, count)
        return xf.Timeline(times.masked_fill(~valid, float("nan")), valid=valid, prefix=prefix)
    return xf.Timeline(times[0] if how == "shared" else times, prefix=prefix)


def _grid(rng: Random) -> xf.Domain:
    ndim, prefix = rng.randint(1, 3), rng.choice([0, 0, 1, 2])
    sizes = [tuple(rng.randint(1 if ndim > 1 else 0, 4 if ndim < 3 else 2) for _ in range(ndim)) for _ in range(2)]
    how = rng.choice(["dense", "valid", "packed"])
    if how == "packed":
        return xf.Grid.packed(sizes, prefix=prefix)
    return xf.Grid(*sizes[0], prefix=prefix, valid=_bools(rng, ROWS, *sizes[0]) if how == "valid" else None)


def _graph(rng: Random) -> xf.Domain:
    sizes = [rng.randint(0, 5) for _ in range(rng.randint(1, 3))]
    edges, first = [], 0
    for size in sizes:
        # From smaller to larger: acyclic, so that every mask is defined.
        edges += [(first + a, first + b) for a in range(size) for b in range(a + 1, size) if rng.random() < 0.4]
        first += size
    edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)) if len(sizes) > 1 else None
    return xf.Graph(edge_index, sum(sizes), batch=batch, virtual_nodes=rng.choice([0, 0, 1]))


def _points(rng: Random) -> xf.Domain:
    count, ndim = rng.randint(0, 7), rng.randint(1, 3)
    places = torch.tensor(
        [[[rng.uniform(-2, 2) for _ in range(ndim)] for _ in range(count)] for _ in range(ROWS)]
    ).reshape(ROWS, count, ndim)
    how = rng.choice(["one", "rows", "valid", "packed"])
    if how == "packed":
        return xf.Points(
            places[0], batch=torch.tensor(sorted(rng.randint(0, 2) for _ in range(count)), dtype=torch.long)
        )
    if how == "valid":
        return xf.Points(
            places,
            valid=torch.tensor(
                [[rng.random() < 0.7 for _ in range(count)] for _ in range(ROWS)], dtype=torch.bool
            ).reshape(ROWS, count),
        )
    return xf.Points(places[0] if how == "one" else places)


def _bools(rng: Random, *shape: int) -> torch.Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.tensor([rng.random() < 0.6 for _ in range(count)], dtype=torch.bool).reshape(shape)


def _subset(rng: Random) -> xf.Domain:
    whole = rng.choice([_sequence, _timeline, _grid, _graph, _points])(rng)
    bounds = [0, whole.num_tokens] if whole.offsets is None else whole.offsets.tolist()
    # Prefix tokens stay in front; of the others some, and on some domains in another order.
    front, in_order = whole.prefix, rng.random() < 0.5

    def row(count: Callable[[int], int]) -> list[int]:
        kept = []
        for first, end in zip(bounds, bounds[1:], strict=False):
            some = rng.sample(range(first + front, end), count(end - first - front))
            kept += [*range(first, first + front), *(sorted(some) if in_order else some)]
        return kept

    if whole.offsets is not None or rng.random() < 0.3:
        return whole.subset(torch.tensor(row(lambda n: rng.randint(0, n)), dtype=torch.long))
    count = rng.randint(0, whole.num_tokens - front)
    return whole.subset(torch.tensor([row(lambda n: count) for _ in range(ROWS)], dtype=torch.long))


DOMAINS: dict[str, Callable[[Random], xf.Domain]] = {
    "Sequence": _sequence, "Timeline": _timeline, "Grid": _grid, "Graph": _graph, "Points": _points, "Subset": _subset,
}  # fmt: skip


def _rows(rng: Random, tokens: int, make: Callable[..., torch.Tensor]) -> torch.Tensor:
    return make(rng, tokens) if rng.random() < 0.5 else make(rng, ROWS, tokens)


def _numbers(rng: Random, domain: xf.Domain, least: int) -> int | float | tuple[int, ...]:
    if domain.kind == "Grid" and rng.random() < 0.5:
        return tuple(rng.randint(least, 3) for _ in range(domain.ndim))
    return rng.uniform(least, 3) + 0.01 if domain.continuous and domain.kind != "Graph" else rng.randint(least, 3)


def _local(rng: Random, domain: xf.Domain) -> masks.Mask:
    clamp = domain.kind in ("Sequence", "Grid") and rng.random() < 0.4
    return masks.Local(_numbers(rng, domain, 0), border="clamp" if clamp else "cut")


# One way to draw each leaf; a test checks that no leaf is missing.
LEAVES: dict[type[Leaf], Callable[[Random, xf.Domain], masks.Mask]] = {
    masks.Full: lambda rng, domain: masks.Full(),
    masks.Causal: lambda rng, domain: masks.Causal(),
    masks.Local: _local,
    masks.Dilated: lambda rng, domain: masks.Dilated(rng.randint(0, 2), step=rng.randint(1, 3)),
    masks.Windows: lambda rng, domain: masks.Windows(_numbers(rng, domain, 1), shift=rng.choice([0, 1])),
    masks.Axial: lambda rng, domain: masks.Axial(rng.randrange(-domain.ndim, domain.ndim)),
    masks.Edges: lambda rng, domain: masks.Edges(self_loops=rng.random() < 0.5),
    masks.Expander: lambda rng, domain: masks.Expander(rng.randint(1, 4), seed=rng.randint(0, 3)),
    masks.Global: lambda rng, domain: masks.Global(
        rng.randint(0, 2) if domain.whole.num_tokens == 0 or rng.random() < 0.5 else [rng.randrange(domain.whole.num_tokens)]
    ),
    masks.Prefix: lambda rng, domain: masks.Prefix(rng.randint(0, 3)),
    masks.Segments: lambda rng, domain: masks.Segments(_rows(rng, domain.whole.num_tokens, _bools).long()),
    masks.Keys: lambda rng, domain: masks.Keys(_rows(rng, domain.whole.num_tokens, _bools)),
    masks.Dense: lambda rng, domain: masks.Dense(
        _bools(rng, *rng.choice([(), (1, 1), (ROWS, 1), (ROWS, HEADS)]), domain.whole.num_tokens, domain.whole.num_tokens)
    ),
    masks.Where: lambda rng, domain: masks.Where(
        rng.choice([lambda b, h, q, k: (q + k) % 2 == 0, lambda b, h, q, k: (q + h + b) % 3 != 0])
    ),
}  # fmt: skip


def leaf(rng: Random, domain: xf.Domain) -> masks.Mask:
    """A leaf that is defined on the domain."""
    kind = rng.choice([cls for cls in LEAVES if domain.kind in cls.kinds])
    return LEAVES[kind](rng, domain)


def tree(rng: Random, domain: xf.Domain, depth: int = 2) -> masks.Mask:
    """A mask expression over leaves that are defined on the domain."""
    how = rng.choice(["leaf", "and", "or", "not"]) if depth else "leaf"
    if how == "leaf":
        return leaf(rng, domain)
    if how == "not":
        return ~tree(rng, domain, depth - 1)
    a, b = tree(rng, domain, depth - 1), tree(rng, domain, depth - 1)
    return a & b if how == "and" else a | b


def _relative(heads: int, dim: int, domain: xf.Domain) -> positions.Position:
    sized = domain.kind == "Grid"
    return (
        positions.RelativeBias(heads, size=(3,) * domain.ndim)
        if sized
        else positions.RelativeBias(heads, buckets=8, max_distance=6)
    )


def _learned(heads: int, dim: int, domain: xf.Domain) -> positions.Position:
    return positions.Learned(dim, (3,) * domain.ndim if domain.kind == "Grid" else 16, prefix=domain.prefix)


# One way to make each position for a model of so many heads and channels, and the domains that it is defined on.
EVERYWHERE = ("Sequence", "Timeline", "Grid", "Graph", "Points")
POSITIONS: dict[type[positions.Position], tuple[tuple[str, ...], Callable[[int, int, xf.Domain], positions.Position]]] = {
    positions.Sinusoidal: (EVERYWHERE, lambda heads, dim, domain: positions.Sinusoidal(dim)),
    positions.Learned: (("Sequence", "Grid", "Graph"), _learned),
    positions.RandomWalk: (("Graph",), lambda heads, dim, domain: positions.RandomWalk(dim, 4)),
    positions.Rotary: (EVERYWHERE, lambda heads, dim, domain: positions.Rotary(dim // heads, mixed=dim % 48 == 24)),
    positions.RelativeBias: (EVERYWHERE, _relative),
    positions.ContinuousBias: (EVERYWHERE, lambda heads, dim, domain: positions.ContinuousBias(heads, hidden=8)),
    positions.DistanceDecay: (EVERYWHERE, lambda heads, dim, domain: positions.DistanceDecay(heads, learned=dim % 48 == 24)),
}  # fmt: skip


def position(rng: Random, heads: int, dim: int, domain: xf.Domain) -> positions.Position | None:
    """A position that is defined on the domain, a sum of two, or none."""
    kinds = [cls for cls, (where, _) in POSITIONS.items() if domain.kind in where]
    drawn = [POSITIONS[cls][1](heads, dim, domain) for cls in rng.sample(kinds, rng.randint(0, 2))]
    return None if not drawn else drawn[0] if len(drawn) == 1 else drawn[0] + drawn[1]


randoms = st.randoms(use_true_random=False)


def domain(rng: Random, kind: str | None = None) -> xf.Domain:
    """A domain of a kind, or of any."""
    return DOMAINS[kind or rng.choice(sorted(DOMAINS))](rng)
