"""Masks by order and distance, which every domain with coordinates (or hops) understands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._arguments import as_number, checked_names, shown
from ..domains import Domain
from ..domains._base import either
from ._algebra import Leaf, Predicate
from ._outline import Between, Outline, Tiling

Sizes = int | float | tuple[int | float, ...]


class SpatialLeaf(Leaf):
    """A leaf that relates places. It does not constrain a pair that has a prefix token, since those have no place."""

    relates_places = True

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        related = self.relates(domain, keys)

        def unless_prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            result = either(related(b, q, k), domain.touches_prefix(keys, b, q, k))
            assert result is not None
            return result

        return unless_prefix

    def relates(self, domain: Domain, keys: Domain):  # type: ignore[no-untyped-def]
        """The relation ``(b, q, k) -> bool`` of ordinary tokens."""
        raise AssertionError("each spatial leaf has its own relation")

    def outline(self, tiling: Tiling) -> Outline:
        return tiling.or_prefix(self.relates_blocks(tiling))

    def relates_blocks(self, tiling: Tiling) -> Outline:
        """The outline of the relation of ordinary tokens."""
        return tiling.unknown()


@checked_names
@dataclass(frozen=True)
class Causal(Leaf):
    """A query may attend to what is not later than itself.

    ``j <= i`` on a sequence, ``t_j <= t_i`` on a timeline, row-major order on a grid, a directed path from j to i on an acyclic graph.
    Prefix tokens count as earliest, in their own order. The decoder mask of Vaswani et al. 2017 (arXiv:1706.03762).

    Raises (when bound):
        ValueError: on points, which have no order, and on a graph with a cycle.

    Example:
        >>> Causal().dense(Sequence(1, start=2), Sequence(4)).int()
        tensor([[1, 1, 1, 0]], dtype=torch.int32)
    """

    kinds = ("Sequence", "Timeline", "Grid", "Graph")
    instead = "Where(fn) with an order of your own"
    relates_places = True

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        domain.check_ordered()
        if domain.kind == "Grid" and domain.sizes[1:] != keys.sizes[1:]:  # type: ignore[attr-defined]
            raise ValueError(
                f"Causal needs grids with the same rows, to have one row-major order; got {domain!r} and {keys!r}"
            )

    def allows(self, domain: Domain, keys: Domain) -> Predicate:
        def not_later(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            result = domain.precedes(keys, b, q, k)
            query_prefix, key_prefix = domain.is_prefix(b, q), keys.is_prefix(b, k)
            if query_prefix is not None:
                earlier = keys.place(k) <= domain.place(q)
                result = torch.where(
                    query_prefix, earlier if key_prefix is not None else torch.zeros_like(earlier), result
                )
            if key_prefix is not None:
                result = result | (key_prefix if query_prefix is None else key_prefix & ~query_prefix)
            return result

        return not_later

    def outline(self, tiling: Tiling) -> Outline:
        domain, keys = tiling.domain, tiling.keys
        if domain.kind == "Graph":
            ancestors = tiling.of_neighbours(domain.ancestors)  # type: ignore[attr-defined]
            return tiling.or_prefix(ancestors).at_most()
        if domain.kind != "Timeline" and domain == keys:
            return tiling.between(Between(None, tiling.q, tiling.k))
        if 0 < keys.prefix < domain.prefix:
            return tiling.unknown()
        return tiling.between(*_orders(tiling))

    def is_reflexive(self, domain: Domain) -> bool:
        return True


@checked_names
@dataclass(frozen=True, repr=False)
class Local(SpatialLeaf):
    """A query may attend to keys at distance at most ``radius``, in both directions: ``d(i, j) <= radius``.

    ``d`` is |i - j| on a sequence, |t_i - t_j| on a timeline, Chebyshev's distance on a grid (one radius, or one per axis), Euclidean on
    points, and the fewest edges on a directed path from j to i on a graph. A causal window of W keys is ``Causal() & Local(W - 1)``.

    Args:
        radius: >= 0; in steps, time units, cells, hops or units of length.
        border: at the rim of a grid or sequence, ``"cut"`` leaves the window smaller, ``"clamp"`` moves it inside so that it keeps its
            full size, as in neighbourhood attention (Hassani et al. 2023, arXiv:2204.07143).

    Literature: Longformer's sliding window (Beltagy et al. 2020, arXiv:2004.05150); NATTEN; k-hop graph attention.

    Example:
        >>> Local(1, border="clamp").dense(Sequence(4)).int()
        tensor([[1, 1, 1, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1],
                [0, 1, 1, 1]], dtype=torch.int32)
    """

    radius: Sizes
    border: Literal["cut", "clamp"] = "cut"

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", check_sizes("radius", self.radius, least=0))
        if not isinstance(self.border, str) or self.border not in ("cut", "clamp"):
            raise ValueError(f"border must be 'cut' or 'clamp'; got border={self.border!r}")

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        radii = per_axis("radius", self.radius, domain)
        if domain.kind == "Graph" and not isinstance(radii[0], int):
            raise TypeError(f"radius on a graph is a number of hops, an integer; got radius={self.radius!r}")
        if self.border == "clamp":
            if domain.kind not in ("Sequence", "Grid"):
                raise ValueError(
                    f'border="clamp" is defined on Sequence and Grid, which have a rim; got {domain!r}. Use border="cut".'
                )
            if not all(isinstance(radius, int) for radius in radii):
                raise TypeError(f'border="clamp" needs whole radii; got radius={self.radius!r}')

    def relates(self, domain: Domain, keys: Domain):  # type: ignore[no-untyped-def]
        radii = per_axis("radius", self.radius, domain)
        if self.border == "cut":
            return lambda b, q, k: domain.within(keys, radii, b, q, k)

        def in_clamped_window(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inside = None
            for axis, radius in enumerate(radii):
                first, last = keys.extent(axis, b, k)
                centre, key = domain.coordinate(axis, b, q), keys.coordinate(axis, b, k)
                # The window starts radius before the query, but no later than leaves room for all of it, and not before the rim.
                start = torch.maximum(
                    torch.minimum(centre - radius, _like(last - 2 * radius, centre)), _like(first, centre)
                )
                here = (key >= start) & (key <= start + 2 * radius)
                inside = here if inside is None else inside & here
            assert inside is not None
            return inside

        return in_clamped_window

    def relates_blocks(self, tiling: Tiling) -> Outline:
        domain, keys = tiling.domain, tiling.keys
        radii = per_axis("radius", self.radius, domain)
        if domain.kind == "Graph":
            hops = min(int(radii[0]), domain.num_tokens)
            return tiling.of_neighbours(domain.within_hops(hops))  # type: ignore[attr-defined]
        if self.border == "clamp":
            if domain != keys and keys.items is not None:
                return tiling.unknown()  # where the rim is depends on the item
            tiling = tiling.within_reach([2 * radius for radius in radii])
            return tiling.between(*(self._clamped(axis, radius, tiling) for axis, radius in enumerate(radii)))
        tiling = tiling.within_reach(radii)
        outline = tiling.between(*(_around(tiling, axis, radii[axis % len(radii)]) for axis in range(domain.ndim)))
        # A ball is less than its box.
        return outline.at_most() if domain.kind == "Points" else outline

    def _clamped(self, axis: int, radius: int | float, tiling: Tiling) -> Between:
        at_query, at_key = tiling.coordinates(axis)
        first, last = tiling.keys.extent(axis, tiling.b, tiling.q if tiling.domain == tiling.keys else tiling.k[:1])
        start = torch.maximum(
            torch.minimum(at_query - radius, _like(last - 2 * radius, at_query)), _like(first, at_query)
        )
        return Between(start, start + 2 * radius, at_key)

    def is_reflexive(self, domain: Domain) -> bool:
        return True

    def lookback(self) -> float | None:
        return None if isinstance(self.radius, tuple) or self.border == "clamp" else self.radius

    def __repr__(self) -> str:
        return f"Local({self.radius!r})" if self.border == "cut" else f"Local({self.radius!r}, border='clamp')"


@checked_names
@dataclass(frozen=True)
class Dilated(SpatialLeaf):
    """A query may attend to every ``step``-th key out to ``radius`` steps: ``i - j = m * step`` with ``|m| <= radius``, on every axis.

    Args:
        radius: >= 0, the number of steps to each side; one, or one per axis of a grid.
        step: >= 1; one, or one per axis.

    Literature: Longformer's dilated window (arXiv:2004.05150); dilated neighbourhood attention (Hassani and Shi 2022,
    arXiv:2209.15001).

    Example:
        >>> Dilated(1, step=2).dense(Sequence(5))[2].int()
        tensor([1, 0, 1, 0, 1], dtype=torch.int32)
    """

    radius: int | tuple[int, ...]
    step: int | tuple[int, ...]

    kinds = ("Sequence", "Grid")
    instead = "Local(radius)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", check_sizes("radius", self.radius, least=0, whole=True))
        object.__setattr__(self, "step", check_sizes("step", self.step, least=1, whole=True))
        _check_lengths("radius", self.radius, "step", self.step)

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        per_axis("radius", self.radius, domain)
        per_axis("step", self.step, domain)

    def relates(self, domain: Domain, keys: Domain):  # type: ignore[no-untyped-def]
        radii, steps = (
            tuple(n) if len(n) == domain.ndim else tuple(n) * domain.ndim
            for n in (per_axis("radius", self.radius, domain), per_axis("step", self.step, domain))
        )

        def on_lattice(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            result = None
            for axis, (radius, step) in enumerate(zip(radii, steps, strict=True)):
                offset = domain.offset(axis, keys, b, q, k)
                here = (offset % step == 0) & (offset.abs() <= radius * step)
                result = here if result is None else result & here
            assert result is not None
            return result

        return on_lattice

    def relates_blocks(self, tiling: Tiling) -> Outline:
        radii, steps = (per_axis(*named, tiling.domain) for named in (("radius", self.radius), ("step", self.step)))
        pairs = list(zip(*(n * (tiling.domain.ndim // len(n)) for n in (radii, steps)), strict=True))
        if len(pairs) == 1 and steps[0] > min(tiling.size):  # whole blocks may lie between two keys
            query, key = tiling.coordinates(0)
            places = (query + m * int(steps[0]) for m in range(-int(radii[0]), int(radii[0]) + 1))
            return Outline.any_of([tiling.between(Between.equal(place, key)) for place in places])
        tiling = tiling.within_reach([radius * step for radius, step in pairs])
        outline = tiling.between(*(_around(tiling, axis, radius * step) for axis, (radius, step) in enumerate(pairs)))
        return outline if all(step == 1 for _, step in pairs) else outline.at_most()

    def is_reflexive(self, domain: Domain) -> bool:
        return True

    def lookback(self) -> float | None:
        if isinstance(self.radius, tuple) or isinstance(self.step, tuple):
            return None
        return self.radius * self.step


@checked_names
@dataclass(frozen=True)
class Windows(SpatialLeaf):
    """A query may attend to the keys of its own window: ``floor((coordinate - shift) / size)`` equal on every axis.

    Chunks of a sequence, bins of time, Swin's windows on a grid of any size (tokens before the shift form windows of their own), voxels.

    Args:
        size: > 0; one, or one per axis.
        shift: where the windows begin; one, or one per axis.

    Literature: Swin (Liu et al. 2021, arXiv:2103.14030).

    Example:
        >>> Windows(2, shift=1).dense(Sequence(4)).int()
        tensor([[1, 0, 0, 0],
                [0, 1, 1, 0],
                [0, 1, 1, 0],
                [0, 0, 0, 1]], dtype=torch.int32)
    """

    size: Sizes
    shift: Sizes = 0

    kinds = ("Sequence", "Timeline", "Grid", "Points")
    instead = "Segments(ids)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_sizes("size", self.size, least=0, above=True))
        object.__setattr__(self, "shift", check_sizes("shift", self.shift))
        _check_lengths("size", self.size, "shift", self.shift)

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        per_axis("size", self.size, domain)
        per_axis("shift", self.shift, domain)

    def relates(self, domain: Domain, keys: Domain):  # type: ignore[no-untyped-def]
        sizes, shifts = (
            tuple(n) if len(n) == domain.ndim else tuple(n) * domain.ndim
            for n in (per_axis("size", self.size, domain), per_axis("shift", self.shift, domain))
        )

        def same_window(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            result = None
            for axis, (size, shift) in enumerate(zip(sizes, shifts, strict=True)):
                a = torch.div(domain.coordinate(axis, b, q) - shift, size, rounding_mode="floor")
                here = a == torch.div(keys.coordinate(axis, b, k) - shift, size, rounding_mode="floor")
                result = here if result is None else result & here
            assert result is not None
            return result

        return same_window

    def relates_blocks(self, tiling: Tiling) -> Outline:
        sizes, shifts = (per_axis(*named, tiling.domain) for named in (("size", self.size), ("shift", self.shift)))

        def windows(axis: int) -> Between:
            size, shift = sizes[axis % len(sizes)], shifts[axis % len(shifts)]
            return Between.equal(
                *(torch.div(at - shift, size, rounding_mode="floor") for at in tiling.coordinates(axis))
            )

        tiling = tiling.within_reach(sizes)
        return tiling.between(*(windows(axis) for axis in range(tiling.domain.ndim)))

    def is_reflexive(self, domain: Domain) -> bool:
        return True

    def lookback(self) -> float | None:
        return None if isinstance(self.size, tuple) else self.size


def check_sizes(name: str, value: object, *, least: float | None = None, above: bool = False, whole: bool = False):  # type: ignore[no-untyped-def]
    """A number, or a tuple of one per axis, checked; whole numbers come back as int, so that equal masks are equal."""
    if isinstance(value, (tuple, list)):
        if not len(value) >= 1:
            raise ValueError(f"{name} must be a number or one per axis; got {name}={value!r}")
        return tuple(check_sizes(name, part, least=least, above=above, whole=whole) for part in value)
    number = as_number(value)
    if number is None:
        raise TypeError(f"{name} must be a number, or a tuple of one per axis; got {name}={shown(value)}")
    if math.isinf(number):
        raise ValueError(f"{name} must be finite; got {name}={value!r}. Leave the mask out for no bound.")
    if math.isnan(number) or (least is not None and (number <= least if above else number < least)):
        raise ValueError(f"{name} must be {'>' if above else '>='} {least}; got {name}={value!r}")
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if whole and not isinstance(number, int):
        raise TypeError(f"{name} must be an integer; got {name}={value!r}")
    return number


def _check_lengths(name: str, value: Sizes, other: str, also: Sizes) -> None:
    """Raise where both have one number for each axis, of different numbers of axes."""
    if isinstance(value, tuple) and isinstance(also, tuple) and len(value) != len(also):
        raise ValueError(
            f"{name} and {other} must have one number each, or one per axis of the same axes; got {name}={value} and {other}={also}"
        )


def per_axis(name: str, value: Sizes, domain: Domain) -> tuple[int | float, ...]:
    """``value`` as a tuple of one number, or of one for each axis of the domain."""
    if not isinstance(value, tuple):
        return (value,) if domain.kind != "Grid" else (value,) * domain.ndim
    if domain.kind == "Graph" or len(value) != domain.ndim:
        axes = 1 if domain.kind == "Graph" else domain.ndim
        raise ValueError(
            f"{name} must be one number or one per axis of the domain; got {name}={value!r} on {domain!r} of {axes} axes"
        )
    return value


def _like(value: Tensor | int | float, other: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(other, value)


def _around(tiling: Tiling, axis: int, radius: int | float) -> Between:
    """Keys at most ``radius`` from a query on one axis; real numbers with slack for what the predicate's subtraction rounds."""
    query, key = tiling.coordinates(axis)
    if not key.is_floating_point():
        radius = math.floor(min(radius, 2**40))
        return Between(query - radius, query + radius, key)
    info = torch.finfo(torch.promote_types(query.dtype, key.dtype))
    radius = min(radius, info.max / 4)
    largest = max(float(at.abs().max()) for at in (query, key))
    return Between(query - radius, query + radius, key, slack=4 * info.eps * (largest + radius) + info.tiny**0.5)


def _orders(tiling: Tiling) -> list[Between]:
    """That a key is not later than a query: by time or place; prefix tokens before all others, by their own places."""
    most = max(tiling.domain.prefix, tiling.keys.prefix)

    def order(where: Domain, i: Tensor) -> Tensor:
        order = where.place(i) - where.prefix if where.kind == "Grid" else where.coordinate(0, tiling.b, i)
        prefix = where.is_prefix(tiling.b, i)
        if prefix is None:
            return order
        # Places of the others are not negative; times may be.
        return torch.where(prefix, -math.inf if order.is_floating_point() else where.place(i) - most, order)

    query, key = order(tiling.domain, tiling.q), order(tiling.keys, tiling.k)
    orders = [Between(None, query, key)]
    if key.is_floating_point() and most > 1:  # and place by place
        place, key_place = tiling.domain.place(tiling.q), tiling.keys.place(tiling.k)
        key_prefix = key_place < tiling.keys.prefix
        orders.append(Between(None, torch.where(place < tiling.domain.prefix, place, most), key_place * key_prefix))
    return orders
