"""The structures that a term of a mask may have, and the tiles that cover them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence as SequenceOf
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..domains import Domain, Grid, Sequence, Timeline
from ..masks import Axial, Causal, Dilated, Full, Local, Mask, Prefix, Segments, Windows
from ..masks._sequence import per_axis
from ._normal import NamedKeys, NamedQueries, PrefixKeys, PrefixQueries, Term
from ._problem import Problem
from ._tiles import Band, Block, Gathered, Slices, Tiles, pairs_of_row

# Pairs whose mask and bias are held at a time.
CALL_PAIRS = 2**22

# Numbers of a tensor of tiles that are fetched at a time on the CPU: memory that is used again is faster than new.
CALL_NUMBERS = 2**22

# Sizes of windows on two axes: up to so many are worth a call each, if their tokens need not be gathered.
MOST_SLICES = 9
# Scores, of all rows of the batch and heads, that take as long as a call costs besides.
CALL_SCORES = 2**16


@dataclass(frozen=True)
class Structure:
    """Tiles that hold every pair of a term.

    Attributes:
        kernel: the name under which a plan shows it.
        calls: tiles, in batches.
        exact: "full" or "causal" where the tiles' pairs are just those that the term allows, all of them or in order; None where the
            predicate must be asked.
    """

    kernel: str
    calls: tuple[Tiles, ...]
    exact: str | None = None

    @property
    def pairs(self) -> float:
        """Pairs that the tiles hold, for each row of the batch."""
        return pairs_of_row(self.calls) * (0.5 if self.exact == "causal" else 1)


def tiled_structures(term: Term, problem: Problem, device: torch.device) -> Iterator[Structure]:
    """Every structure of tiles that covers a term, by its literals and by the facts of the domain."""
    domain, keys = problem.domain, problem.keys
    if domain == keys:
        for literal in term:
            if isinstance(literal, (Local, Dilated)):
                yield from _windowed(literal, term, problem, device)
            labels = _labels(literal, domain, device)
            if labels is not None:
                yield from _grouped(labels, _exactness(term, domain, literal), problem, device)
        if domain.items is not None:
            yield from _grouped(domain.items.to(device), _exactness(term, domain, None), problem, device)
        elif domain.valid is not None:
            rows = domain.valid.to(device).long() - 1  # one group for each row of the batch: the tokens that exist
            yield from _grouped(rows, _exactness(term, domain, None), problem, device)
    for literal in term:
        if isinstance(literal, (NamedKeys, PrefixKeys, Prefix)):
            yield from _rectangles(literal, problem, device, columns=True)
        elif isinstance(literal, (NamedQueries, PrefixQueries)):
            yield from _rectangles(literal, problem, device, columns=False)


# -- windows -------------------------------------------------------------------------------------------------------------


def _windowed(literal: Local | Dilated, term: Term, problem: Problem, device: torch.device) -> Iterator[Structure]:
    domain = problem.domain
    if isinstance(domain, Grid):
        if domain.items is None:
            yield Structure("windowed", tuple(_grid_halo(literal, domain, device)))
        return
    before = reach(literal, domain)
    if before is None:
        return
    after = 0 if Causal() in term and isinstance(domain, Sequence) else before
    before, after = min(before, domain.num_tokens - 1), min(after, domain.num_tokens - 1)
    rows = _band_rows(before + after)
    tiles = -(-domain.num_tokens // rows)
    most = max(1, CALL_PAIRS // (rows * (before + rows + after)))
    calls = [
        Band(first * rows, min(most, tiles - first), rows, before, after, domain.num_tokens, device)
        for first in range(0, tiles, most)
    ]
    yield Structure("windowed", tuple(calls))


def _band_rows(reach: int) -> int:
    """Queries of a run: as many as half the keys that they reach beside their own, within what suits a matrix product."""
    return min(256, max(32, 1 << max((reach + 1) // 2, 1).bit_length() - 1))


def reach(literal: Local | Dilated, domain: Domain) -> int | None:
    """How many tokens before or behind a query its keys may stand, in the order of the tensors; None where that is unknown."""
    if isinstance(domain, Sequence):
        if isinstance(literal, Dilated):
            return int(per_axis("radius", literal.radius, domain)[0] * per_axis("step", literal.step, domain)[0])
        radius = int(per_axis("radius", literal.radius, domain)[0])
        return 2 * radius if literal.border == "clamp" else radius
    if isinstance(domain, Timeline) and isinstance(literal, Local):
        return domain.fact(
            ("reach", literal.radius),
            lambda: _timeline_reach(domain, float(per_axis("radius", literal.radius, domain)[0])),
        )
    return None


def _timeline_reach(domain: Timeline, radius: float) -> int | None:
    """The most tokens between two that are within ``radius``; None where times are not sorted (or are padded or packed)."""
    times = domain.times if domain.times.ndim == 2 else domain.times[None]
    if (
        domain.valid is not None
        or domain.items is not None
        or domain.prefix
        or times.shape[-1] == 0
        or bool((times.diff(dim=-1) < 0).any())
    ):
        return None
    # One step more than the radius, lest rounding in t - radius leave out a key that t - t_j <= radius lets in.
    place = torch.arange(times.shape[-1], device=times.device)
    first = torch.searchsorted(times.contiguous(), (times - radius).nextafter(times.new_tensor(-math.inf)).contiguous())
    return int((place - first).max()) + 1


def _grid_halo(literal: Local | Dilated, domain: Grid, device: torch.device) -> Iterator[Tiles]:
    """Blocks of a grid by the cells around them."""
    radii = [int(r) for r in per_axis("radius", literal.radius, domain)]
    if isinstance(literal, Dilated):
        radii = [r * int(s) for r, s in zip(radii, per_axis("step", literal.step, domain), strict=True)]
    elif literal.border == "clamp":
        radii = [2 * r for r in radii]
    side = {1: 64, 2: 8, 3: 4}[domain.ndim]
    starts, inner, outer = [], [], []
    for size, radius in zip(domain.sizes, radii, strict=True):
        edge = min(side, max(size, 1))
        starts.append(torch.arange(0, max(size, 1), edge, device=device))
        inner.append(torch.arange(edge, device=device))
        # A halo that would be as wide as the axis is the axis.
        outer.append(torch.arange(-radius, edge + radius, device=device) if edge + 2 * radius < size else None)
    corners = torch.cartesian_prod(*starts).reshape(-1, domain.ndim)
    q_index = _cells(domain, [corners[:, a, None] + inner[a] for a in range(domain.ndim)])
    around = [
        torch.arange(size, device=device).expand(len(corners), -1) if wide is None else corners[:, a, None] + wide
        for a, (size, wide) in enumerate(zip(domain.sizes, outer, strict=True))
    ]
    k_index = _cells(domain, around)
    most = max(1, CALL_PAIRS // max(q_index.shape[1] * k_index.shape[1], 1))
    for q, k in zip(q_index.split(most), k_index.split(most), strict=True):
        yield Gathered(q.clamp(min=0), k.clamp(min=0), q >= 0, k >= 0)


def _cells(domain: Grid, axes: SequenceOf[Int[Tensor, "n _"]]) -> Int[Tensor, "n cells"]:
    """The tokens at the product of coordinates on each axis; -1 outside the grid."""
    index = torch.zeros(axes[0].shape[0], 1, dtype=torch.long, device=axes[0].device)
    inside = torch.ones_like(index, dtype=torch.bool)
    for axis, size in zip(axes, domain.sizes, strict=True):
        index = (index[:, :, None] * size + axis[:, None, :]).flatten(1)
        inside = (inside[:, :, None] & ((axis >= 0) & (axis < size))[:, None, :]).flatten(1)
    return torch.where(inside, index + domain.prefix, -1)


# -- groups --------------------------------------------------------------------------------------------------------------


def _labels(literal: Mask, domain: Domain, device: torch.device) -> Int[Tensor, "*batch tokens"] | None:
    """For a mask that allows pairs of the same label: each token's label, -1 for prefix tokens, which have none."""
    if domain.whole is not domain:
        labels = _labels(literal, domain.whole, device)
        if labels is None:
            return None
        b = torch.arange(len(labels) if labels.ndim == 2 else domain.batch_size or 1, device=device)[:, None]
        kept = domain.token(b, torch.arange(domain.num_tokens, device=device))
        return labels[kept] if labels.ndim == 1 else labels[b, kept]
    if isinstance(literal, Segments) and literal.key_ids is None:
        labels = literal.ids.unique(return_inverse=True)[1]
    elif isinstance(literal, (Windows, Axial)) and domain.kind in ("Sequence", "Grid", "Timeline", "Points"):
        places = domain.coordinates.to(device)
        if isinstance(literal, Windows):
            size, shift = (
                places.new_tensor(_every_axis(n, value, domain))
                for n, value in (("size", literal.size), ("shift", literal.shift))
            )
            cells = torch.div(places - shift, size, rounding_mode="floor")
        else:
            cells = places.clone()
            cells[..., literal.axis] = 0
        cells = cells - cells.flatten(0, -2).amin(0) if cells.numel() else cells
        labels = cells[..., 0].long()
        for axis in range(1, domain.ndim):
            labels = labels * (int(cells[..., axis].max()) + 1 if cells.numel() else 1) + cells[..., axis].long()
    else:
        return None
    if domain.items is not None:
        labels = labels * domain.num_items + domain.items.to(device)
    b = torch.arange(1 if labels.ndim == 1 else labels.shape[0], device=device)[:, None]
    prefix = domain.is_prefix(b, torch.arange(domain.num_tokens, device=device))
    if prefix is not None and not isinstance(literal, Segments):
        labels = labels.masked_fill(prefix if labels.ndim == prefix.ndim else prefix.expand(labels.shape), -1)
    if domain.valid is not None:
        labels = labels.expand(domain.valid.shape).masked_fill(~domain.valid, -1)
    return labels


def _every_axis(name: str, value: object, domain: Domain) -> list[float]:
    numbers = per_axis(name, value, domain)  # type: ignore[arg-type]
    return list(numbers) * (domain.ndim // len(numbers))


def _exactness(term: Term, domain: Domain, literal: Mask | None) -> str | None:
    """Whether the term says nothing beyond "same group", or that and "not later" in the order of the tensors."""
    rest = [other for other in term if other is not literal and not isinstance(other, Full)]
    if not rest:
        return "full"
    ordered = isinstance(domain, (Sequence, Grid)) and (domain.prefix == 0 or isinstance(domain, Sequence))
    return "causal" if rest == [Causal()] and ordered else None


def _grouped(
    labels: Int[Tensor, "*batch tokens"], exact: str | None, problem: Problem, device: torch.device
) -> Iterator[Structure]:
    """Tokens of a label by tokens of the label; groups of about the same size together."""
    rows, tokens = (len(labels) if labels.ndim == 2 else None), labels.shape[-1]
    if rows is not None:  # labels of different rows are different
        several = int(labels.max()) + 1 if labels.numel() else 1
        labels = torch.where(labels < 0, -1, labels + several * torch.arange(rows, device=device)[:, None]).flatten()
    groups = _Groups(labels)
    sizes = groups.sizes
    if sizes.numel() == 0:
        return
    in_place = torch.arange(tokens, device=device)
    # Groups that stand one behind the other are slices if none is padded.
    buckets = groups.bucketed(0) if rows is None and len(sizes.unique()) <= MOST_SLICES else []
    if not (buckets and torch.equal(_flat(buckets), in_place)):
        buckets = groups.bucketed(CALL_SCORES / (problem.heads * (1 if rows else problem.batch)))
    every, calls = _flat(buckets), list[Tiles]()
    if rows is None and torch.equal(every, in_place):
        for index, _ in buckets:
            calls += _runs(int(index[0, 0]), len(index), index.shape[1], exact, device)
    else:
        numbers = problem.heads * problem.head_dim * (1 if rows else problem.batch)
        most = CALL_NUMBERS // max(numbers, 1) if problem.device == "cpu" else every.numel()
        for index, there in buckets:
            calls += [Gathered(*lists, tokens, rows) for lists in _lists(index, there, exact, most)]
    yield Structure("blocks" if int(sizes.min()) == int(sizes.max()) else "packed", tuple(calls), exact)


class _Groups:
    """The groups of tokens of a label, in the order in which they come; tokens of a negative one are in none.

    Attributes:
        sizes: how many tokens each group has.
    """

    def __init__(self, labels: Int[Tensor, " tokens"]) -> None:
        order = torch.argsort(labels, stable=True)
        self._order = order[int((labels < 0).sum()) :]
        sizes = torch.unique_consecutive(labels[self._order], return_counts=True)[1]
        first = sizes.cumsum(0) - sizes
        place = torch.argsort(self._order[first])
        self.sizes, self._first = sizes[place], first[place]

    def bucketed(self, most: float) -> list[tuple[Int[Tensor, "n width"], Bool[Tensor, "n width"]]]:
        """The tokens of groups of about the same size, and which of them are not repeated to fill one up; larger ones first.

        No more than ``most`` pairs of a bucket are computed for nothing.
        """
        found = []
        for chosen, width in _buckets(self.sizes, most):
            step, size = torch.arange(width, device=chosen.device), self.sizes[chosen][:, None]
            found.append((self._order[self._first[chosen][:, None] + torch.minimum(step, size - 1)], step < size))
        return found


def _flat(buckets: list[tuple[Tensor, Tensor]]) -> Int[Tensor, " tokens"]:
    return torch.cat([index.flatten() for index, _ in buckets])


def _buckets(sizes: Int[Tensor, " groups"], most: float) -> Iterator[tuple[Int[Tensor, " chosen"], int]]:
    """Groups to be padded to one size, the largest of them, so that no more than so many pairs are computed for nothing."""
    distinct, counts = (x.flip(0).tolist() for x in sizes.unique(return_counts=True))
    while distinct:
        wide, waste, taken = distinct[0], 0.0, 0
        for size, count in zip(distinct, counts, strict=True):
            waste += (wide**2 - size**2) * count
            if waste > most:
                break
            taken += 1
        yield ((sizes <= wide) & (sizes >= distinct[taken - 1])).nonzero()[:, 0], wide
        distinct, counts = distinct[taken:], counts[taken:]


def _runs(start: int, n: int, width: int, exact: str | None, device: torch.device) -> Iterator[Tiles]:
    """Groups that stand one behind the other, in calls of a bounded number of pairs; one that is too large alone is split by queries."""
    if exact is not None:
        yield Slices(start, n, width, device)
    elif width * width <= CALL_PAIRS:
        most = CALL_PAIRS // (width * width)
        for i in range(0, n, most):
            yield Slices(start + i * width, min(most, n - i), width, device)
    else:
        rows = max(1, CALL_PAIRS // width)
        for a in range(start, start + n * width, width):
            for q in range(a, a + width, rows):
                yield Block(slice(q, min(q + rows, a + width)), slice(a, a + width), device)


def _lists(
    index: Int[Tensor, "n width"], there: Bool[Tensor, "n width"], exact: str | None, most: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``_runs`` for groups that stand anywhere, about ``most`` tokens to a call: queries and keys, and which belong there."""
    n, width = index.shape
    if exact is None and width * width > CALL_PAIRS:
        rows = max(1, CALL_PAIRS // width)
        for i in range(n):
            for q, q_there in zip(index[i].split(rows), there[i].split(rows), strict=True):
                yield q[None], index[i : i + 1], q_there[None], there[i : i + 1]
        return
    step = max(1, min(most // width, n if exact is not None else CALL_PAIRS // (width * width)))
    for some, some_there in zip(index.split(step), there.split(step), strict=True):
        yield some, some, some_there, some_there


# -- rectangles ----------------------------------------------------------------------------------------------------------


def _rectangles(literal: Mask, problem: Problem, device: torch.device, *, columns: bool) -> Iterator[Structure]:
    """Some keys by all queries, or some queries by all keys."""
    domain, keys = problem.domain, problem.keys
    where = keys if columns else domain
    if problem.domain.items is not None and domain.num_items > 1 and domain.num_items * 4 > domain.num_tokens**0.5:
        return  # a token of each of many items by all tokens of all items is mostly nothing: the items' own tiles are better
    at = torch.arange(where.num_tokens, device=device)
    zero = at.new_zeros(())
    # Of a subset, each row of the batch may have others of them: all those that some row names.
    b = zero if where.whole is where else torch.arange(where.batch_size or 1, device=device)[:, None]
    named = literal.allows_kept(domain, keys)(b, zero, zero if columns else at, at if columns else zero)
    some = at[named.expand(-1 if named.ndim == 2 else 1, len(at)).any(0)]
    if some.numel() == 0:
        yield Structure("sdpa", ())
        return
    others = (domain if columns else keys).num_tokens
    rows = max(1, CALL_PAIRS // max(some.numel() if columns else others, 1))
    if columns:
        calls: list[Tiles] = [Block(slice(a, min(a + rows, others)), some, device) for a in range(0, others, rows)]
    else:
        calls = [Block(part, slice(0, others), device) for part in some.split(rows)]
    yield Structure("sdpa", tuple(calls))
