"""Every leaf against its definition, pair by pair in plain Python, on every domain of coordinates."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given

import xformerlib as xf
from tests.strategies import DOMAINS, LEAVES, ROWS, leaf, randoms
from xformerlib import masks
from xformerlib.masks._algebra import Leaf


class Token(NamedTuple):
    row: int
    index: int
    item: int
    exists: bool
    prefix: bool
    rank: int  # in the whole item, from its front
    at: tuple[float, ...]
    last: tuple[float, ...]  # of its item


def tokens_of(domain: xf.Domain, row: int) -> list[Token]:
    """A domain spelled out, from what it was built of."""
    result: list[Token] = []

    def add(
        item: int, prefix: int, places: list[tuple[float, ...]], exists: list[bool], start: int, last: tuple[float, ...]
    ) -> None:
        for rank in range(prefix):
            result.append(Token(row, len(result), item, True, True, rank, (0,) * domain.ndim, last))
        for local, (place, here) in enumerate(zip(places, exists, strict=True)):
            result.append(Token(row, len(result), item, here, False, prefix + start + local, place, last))

    if isinstance(domain, xf.Sequence):
        start = domain.start
        lengths = [domain.length] if domain.lengths is None else domain.lengths.tolist()
        if domain.valid is not None:
            own = lengths[row]
            add(
                0,
                domain.prefix,
                [(start + i,) for i in range(domain.length)],
                [i < own for i in range(domain.length)],
                start,
                (start + own - 1,),
            )
        else:
            for item, length in enumerate(lengths):
                add(
                    item,
                    domain.prefix,
                    [(start + i,) for i in range(length)],
                    [True] * length,
                    start,
                    (start + length - 1,),
                )
    elif isinstance(domain, xf.Grid):
        for item, sizes in enumerate([domain.sizes] if domain.item_sizes is None else domain.item_sizes.tolist()):
            cells = list(torch.cartesian_prod(*(torch.arange(n) for n in sizes)).reshape(-1, domain.ndim).tolist())
            here = [True] * len(cells) if domain.valid is None else domain.valid[row, domain.prefix :].tolist()
            add(item, domain.prefix, [tuple(c) for c in cells], here, 0, tuple(n - 1 for n in sizes))
    else:
        places = domain.times[..., None] if isinstance(domain, xf.Timeline) else domain.places
        places = (places[row] if places.ndim == 3 else places).tolist()
        valid = [True] * len(places) if domain.valid is None else domain.valid[row, domain.prefix :].tolist()
        bounds = [0, len(places)] if domain.offsets is None else domain.offsets.tolist()
        for item, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
            add(item, domain.prefix, [tuple(p) for p in places[a:b]], valid[a:b], 0, (0,) * domain.ndim)
    return result


def _axes(value: object, ndim: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * ndim  # type: ignore[return-value]


def defined(mask: masks.Mask, domain: xf.Domain, i: Token, j: Token, head: int) -> bool:
    """Section by section what a mask says about query i and key j."""
    spatial = isinstance(mask, (masks.Local, masks.Dilated, masks.Windows, masks.Axial))
    if spatial and (i.prefix or j.prefix):
        return True
    ndim = domain.ndim
    match mask:
        case masks.Full():
            return True
        case masks.Causal():
            if i.prefix or j.prefix:
                return j.prefix and (not i.prefix or j.rank <= i.rank)
            return j.index <= i.index if isinstance(domain, xf.Grid) else j.at[0] <= i.at[0]
        case masks.Local(radius=radius, border="clamp"):
            starts = [
                max(min(a - r, last - 2 * r), first)
                for a, r, last, first in zip(i.at, _axes(radius, ndim), j.last, _first(domain), strict=True)
            ]
            return all(s <= b <= s + 2 * r for s, b, r in zip(starts, j.at, _axes(radius, ndim), strict=True))
        case masks.Local(radius=radius):
            if isinstance(domain, xf.Points):
                return math.dist(i.at, j.at) <= radius
            return all(abs(a - b) <= r for a, b, r in zip(i.at, j.at, _axes(radius, ndim), strict=True))
        case masks.Dilated(radius=radius, step=step):
            pairs = zip(i.at, j.at, _axes(radius, ndim), _axes(step, ndim), strict=True)
            return all(any(a - b == m * s for m in range(-r, r + 1)) for a, b, r, s in pairs)
        case masks.Windows(size=size, shift=shift):
            # In the precision of the coordinates, as on any device.
            kind = torch.float32 if domain.continuous else torch.float64
            at = torch.tensor([i.at, j.at], dtype=kind)
            a, b = torch.floor(
                (at - torch.tensor(_axes(shift, ndim), dtype=kind)) / torch.tensor(_axes(size, ndim), dtype=kind)
            )
            return torch.equal(a, b)
        case masks.Axial(axis=axis):
            return all(a == b for n, (a, b) in enumerate(zip(i.at, j.at, strict=True)) if n != axis % ndim)
        case masks.Global(tokens=int(count)):
            return i.rank < count or j.rank < count
        case masks.Global(tokens=named):
            return i.index in named or j.index in named
        case masks.Prefix(n=n):
            return j.rank < n
        case masks.Segments(ids=ids):
            ids = ids if ids.ndim == 1 else ids[i.row]
            return bool(ids[i.index] == ids[j.index])
        case masks.Keys(valid=valid):
            return bool((valid if valid.ndim == 1 else valid[i.row])[j.index])
        case masks.Dense(allowed=allowed):
            return bool(allowed.expand(ROWS, 4, *allowed.shape[-2:])[i.row, head, i.index, j.index])
        case masks.Where(fn=fn):
            return bool(fn(*(torch.tensor(n) for n in (i.row, head, i.index, j.index))))
    raise AssertionError(f"no definition of {mask!r}")


def _first(domain: xf.Domain) -> tuple[int, ...]:
    return (domain.start,) if isinstance(domain, xf.Sequence) else (0,) * domain.ndim


@pytest.mark.parametrize("kind", [kind for kind in DOMAINS if kind not in ("Graph", "Subset")])
@given(rng=randoms)
def test_leaves_mean_what_they_say(kind, rng):
    domain = DOMAINS[kind](rng)
    mask = leaf(rng, domain)
    if isinstance(mask, masks.Expander):
        return  # has no definition by pairs; its own tests check what it promises
    dense = mask.dense(domain, batch_size=ROWS, heads=4).expand(ROWS, 4, domain.num_tokens, domain.num_tokens)
    for row in range(ROWS):
        tokens = tokens_of(domain, row)
        assert len(tokens) == domain.num_tokens
        for head in range(4):
            want = [
                [i.exists and j.exists and i.item == j.item and defined(mask, domain, i, j, head) for j in tokens]
                for i in tokens
            ]
            assert dense[row, head].tolist() == want, f"{mask!r} on {domain!r}"


def test_every_leaf_is_generated():
    def leaves(cls):
        for sub in cls.__subclasses__():
            yield from leaves(sub)
            public = sub.__module__.startswith("xformerlib.masks") and not sub.__name__.startswith("_")
            if public and sub.__name__ != "SpatialLeaf":
                yield sub

    assert set(leaves(Leaf)) == set(LEAVES)
