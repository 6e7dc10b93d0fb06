"""Tokens on a regular grid of one, two or three axes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence as SequenceOf
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from .._arguments import as_tensor, check_count
from ._base import Domain, as_lengths, offsets_of


class Grid(Domain):
    """Tokens on a regular grid, in row-major order, after ``prefix`` tokens that have no position.

    Token ``prefix + (r * W + c)`` of ``Grid(H, W)`` is at row ``r``, column ``c``. The distance of two tokens is Chebyshev's, the
    largest difference on any axis: a radius of 1 is the 3 x 3 neighbourhood.

    Args:
        *sizes: one to three sizes: ``Grid(length)``, ``Grid(height, width)``, ``Grid(depth, height, width)``.
        prefix: number of class or register tokens in front.
        valid: for a batch of grids with holes: (B, *sizes) bool, True where a token exists. The others are padding.

    Raises:
        ValueError, TypeError: no size, more than three, or one that is negative or not an integer.

    Example:
        >>> Grid(14, 14, prefix=1).num_tokens
        197
        >>> Grid(2, 2).coordinates.tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """

    kind = "Grid"

    def __init__(self, *sizes: int, prefix: int = 0, valid: Bool[Tensor, "batch *sizes"] | None = None) -> None:
        if not 1 <= len(sizes) <= 3:
            raise ValueError(f"Grid takes 1 to 3 sizes; got {len(sizes)}: {sizes}")
        self.sizes: tuple[int, ...] = tuple(check_count("sizes", size) for size in sizes)
        self.item_sizes: Tensor | None = None
        self.size_of_items: tuple[tuple[int, ...], ...] = (self.sizes,)
        prefix = check_count("prefix", prefix)
        super().__init__(num_tokens=prefix + math.prod(self.sizes), ndim=len(sizes), prefix=prefix)
        if valid is not None:
            self._set_valid(valid)

    def _set_valid(self, valid: Tensor) -> None:
        if not isinstance(valid, Tensor):
            raise TypeError(f"valid must be a bool tensor, True where a token exists; got {type(valid).__name__}")
        if valid.dtype != torch.bool or tuple(valid.shape[1:]) != self.sizes:
            axes = ", ".join(["batch", *map(str, self.sizes)])
            raise ValueError(f"valid must be bool of shape ({axes}); got {valid.dtype} {tuple(valid.shape)}")
        self.valid = F.pad(valid.flatten(1), (self.prefix, 0), value=True)
        self._batch_size, self._device = valid.shape[0], valid.device

    @classmethod
    def packed(cls, sizes: SequenceOf[SequenceOf[int]] | Tensor, *, prefix: int = 0) -> Grid:
        """Grids of different sizes, one after the other without padding: ``Grid.packed([(4, 6), (8, 2)], prefix=1)``.

        ``item_sizes`` holds the sizes, ``(items, ndim)``, ``size_of_items`` the same as tuples; ``sizes`` the largest on each axis.
        """
        table = as_tensor("sizes", sizes, "a list of (height, width) or of 1 to 3 sizes each")
        if table.ndim != 2 or not 1 <= table.shape[1] <= 3:
            raise ValueError(
                f"sizes must be a list of (height, width) or of 1 to 3 sizes each; got shape {tuple(table.shape)}"
            )
        as_lengths("sizes", table.reshape(-1))
        table = table.long()
        domain = cls(
            *(int(size) for size in (table.amax(0) if len(table) else torch.zeros(table.shape[1]))), prefix=prefix
        )
        domain.item_sizes, domain.size_of_items = table, tuple(tuple(item) for item in table.tolist())
        domain.offsets = offsets_of(table.prod(1) + prefix)
        domain.num_tokens = int(domain.offsets[-1])
        domain._device = table.device
        return domain

    def coordinate(self, axis: int, b: Tensor, i: Tensor) -> Tensor:
        place = self.place(i) - self.prefix
        if self.item_sizes is None:
            stride, size = math.prod(self.sizes[axis + 1 :]), self.sizes[axis]
            return place // max(stride, 1) % max(size, 1) if axis else place // max(stride, 1)
        sizes = self.item_sizes[0] if self.items is None else self.item_sizes[self.items[i]]
        for other in range(axis + 1, self.ndim):  # and no product along an axis: kernels ask about one pair at a time
            place = torch.div(place, sizes[..., other].clamp(min=1), rounding_mode="floor")
        return place % sizes[..., axis].clamp(min=1)

    def precedes(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Row-major order."""
        return keys.place(k) - keys.prefix <= self.place(q) - self.prefix

    def distance(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Chebyshev: the largest difference on any axis."""
        result = self.offset(0, keys, b, q, k).abs()
        for axis in range(1, self.ndim):
            result = torch.maximum(result, self.offset(axis, keys, b, q, k).abs())
        return result

    def within(self, keys: Domain, radius: tuple[float, ...], b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        radii = radius * self.ndim if len(radius) == 1 else radius
        result = self.offset(0, keys, b, q, k).abs() <= radii[0]
        for axis in range(1, self.ndim):
            result = result & (self.offset(axis, keys, b, q, k).abs() <= radii[axis])
        return result

    def extent(self, axis: int, b: Tensor, i: Tensor) -> tuple[Tensor | int, Tensor | int]:
        if self.item_sizes is None:
            return 0, self.sizes[axis] - 1
        sizes = self.item_sizes[0] if self.items is None else self.item_sizes[self.items[i]]
        return 0, sizes[..., axis] - 1

    def _given(self) -> dict[str, Any]:
        if self.item_sizes is not None:
            return {"packed": self.item_sizes, "prefix": self.prefix}
        valid = None if self.valid is None else self.valid[:, self.prefix :].unflatten(1, self.sizes)
        return {"sizes": list(self.sizes), "prefix": self.prefix, **({} if valid is None else {"valid": valid})}

    @classmethod
    def _made_of(cls, arguments: dict[str, Any]) -> Grid:
        if "packed" not in arguments:
            return super()._made_of(arguments)
        arguments = dict(arguments)
        return cls.packed(arguments.pop("packed"), **arguments)

    def ticket(self) -> list[int]:
        return [2, self.prefix, *self.sizes] if self._value() is not None else super().ticket()

    def _value(self) -> Hashable:
        return (self.sizes, self.prefix) if self.item_sizes is None and self.valid is None else None

    def __repr__(self) -> str:
        options = f", prefix={self.prefix}" if self.prefix else ""
        if self.item_sizes is None:
            options += f", valid=<{self.batch_size} rows>" if self.valid is not None else ""
            return f"Grid({', '.join(map(str, self.sizes))}{options})"
        return f"Grid.packed(<{self.num_items} sizes up to {' x '.join(map(str, self.sizes))}>{options})"
