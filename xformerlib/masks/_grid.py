"""Masks of grids alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._arguments import check_count, checked_names
from ..domains import Domain
from ._outline import Between, Outline, Tiling
from ._sequence import SpatialLeaf


@checked_names
@dataclass(frozen=True)
class Axial(SpatialLeaf):
    """A query may attend along one axis: all coordinates equal but the ``axis``-th (Ho et al. 2019, arXiv:1912.12180).

    Args:
        axis: the axis along which to attend; negative axes count from the last.

    Example:
        >>> Axial(1).dense(Grid(2, 2)).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
    """

    axis: int

    kinds = ("Grid",)
    instead = "Windows(size) or Segments(ids), which have no axis,"

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", check_count("axis", self.axis, least=-3))

    def check(self, domain: Domain, keys: Domain) -> None:
        super().check(domain, keys)
        if not -domain.ndim <= self.axis < domain.ndim:
            raise ValueError(
                f"axis must be one of the {domain.ndim} axes of the grid; got axis={self.axis} on {domain!r}"
            )

    def relates(self, domain: Domain, keys: Domain):  # type: ignore[no-untyped-def]
        others = [axis for axis in range(domain.ndim) if axis != self.axis % domain.ndim]

        def on_the_line(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            result = (q >= 0) & (k >= 0)
            for axis in others:
                result = result & (domain.coordinate(axis, b, q) == keys.coordinate(axis, b, k))
            return result

        return on_the_line

    def relates_blocks(self, tiling: Tiling) -> Outline:
        others = [axis for axis in range(tiling.domain.ndim) if axis != self.axis % tiling.domain.ndim]
        return tiling.between(*(Between.equal(*tiling.coordinates(axis)) for axis in others))

    def is_reflexive(self, domain: Domain) -> bool:
        return True
