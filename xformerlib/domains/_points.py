"""Tokens at points of space."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from .._autograd import check_not_batched, is_transformed
from ._base import Domain, as_lengths, offsets_of
from ._sequence import _check_valid


class Points(Domain):
    """Tokens at points of a Euclidean space, in no order.

    Args:
        coordinates: ``(tokens, ndim)``, one set of points (or several, see ``batch``), or ``(batch, tokens, ndim)``, one set per row.
        batch: ``(tokens,)``, the item of each point, rising from 0: packed sets of unequal size.
        valid: ``(batch, tokens)``, True where a point exists; the coordinates of the others are never read.

    Coordinates that require grad get one from positions that are functions of them (forces of a learned potential): ``ContinuousBias``,
    ``GaussianBias``, ``DistanceDecay``, ``Rotary``, ``Sinusoidal``. Masks and buckets are constant in them.

    Raises:
        ValueError, TypeError: coordinates that are not finite, ``batch`` that falls or does not fit, shapes that do not match.

    Example:
        >>> Points(torch.zeros(5, 3), batch=torch.tensor([0, 0, 1, 1, 1])).offsets
        tensor([0, 2, 5])
    """

    kind = "Points"
    continuous = True

    def __init__(
        self,
        coordinates: Shaped[Tensor, "*batch tokens ndim"],
        *,
        batch: Int[Tensor, " tokens"] | None = None,
        valid: Bool[Tensor, "*batch tokens"] | None = None,
    ) -> None:
        if not isinstance(coordinates, Tensor) or coordinates.ndim not in (2, 3) or coordinates.shape[-1] == 0:
            shape = tuple(coordinates.shape) if isinstance(coordinates, Tensor) else type(coordinates).__name__
            raise ValueError(
                f"coordinates must be a tensor (tokens, ndim) or (batch, tokens, ndim) with ndim >= 1; got {shape}"
            )
        check_not_batched("coordinates", coordinates)
        if coordinates.is_complex():
            raise TypeError(
                f"coordinates must be real numbers; got coordinates of {coordinates.dtype}. Use torch.view_as_real(coordinates)."
            )
        places = coordinates if coordinates.is_floating_point() else coordinates.double()
        if valid is not None:
            places, valid = _check_valid(places, valid, axes=1)
        if not places.isfinite().all():
            raise ValueError("coordinates must be finite; got NaN or infinity. Mark missing points with valid=.")
        self.places, self.learned = places.detach(), places if places.requires_grad or is_transformed() else None
        super().__init__(
            num_tokens=places.shape[-2], ndim=places.shape[-1], valid=valid, device=places.device,
            offsets=None if batch is None else _offsets_of_batch(places, batch),
            batch_size=places.shape[0] if places.ndim == 3 else None,
        )  # fmt: skip

    def coordinate(self, axis: int, b: Tensor, i: Tensor) -> Tensor:
        column = self.places[..., axis]
        return column[i] if column.ndim == 1 else column[b, i]

    def _make_coordinates(self) -> Tensor:
        return self.places

    def at_places(self, coordinates: Tensor) -> Points:
        other = copy.copy(self)
        other.places, other._facts = coordinates, {}
        return other

    def distance(self, keys: Domain, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Euclidean."""
        squares = self.offset(0, keys, b, q, k) ** 2
        for axis in range(1, self.ndim):
            squares = squares + self.offset(axis, keys, b, q, k) ** 2
        if not squares.requires_grad:
            return squares.sqrt()
        same = squares == 0  # where the derivative of the root is infinite
        return squares.masked_fill(same, 1).sqrt().masked_fill(same, 0)

    def _given(self) -> dict[str, Any]:
        given: dict[str, Any] = {"coordinates": self.places, "valid": self.valid}
        if self.offsets is not None:
            sizes = self.offsets.diff()
            given["batch"] = torch.repeat_interleave(torch.arange(sizes.numel(), device=sizes.device), sizes)
        return given

    def __repr__(self) -> str:
        items = "" if self.offsets is None else f", batch=<{self.num_items} items>"
        return f"Points(<{' x '.join(map(str, self.places.shape))}>{items}{', valid=...' if self.valid is not None else ''})"


def _offsets_of_batch(places: Tensor, batch: Tensor) -> Tensor:
    """Item boundaries from the item of each token, checked."""
    batch = as_lengths("batch", batch)
    if places.ndim != 2 or batch.numel() != places.shape[0]:
        raise ValueError(
            f"batch must name the item of each of the (tokens, ndim) points; got {batch.numel()} for {tuple(places.shape)}"
        )
    if batch.device != places.device:
        raise ValueError(f"batch must be on the device of the coordinates; got {batch.device} and {places.device}")
    if batch.numel() and bool((batch.diff() < 0).any()):
        raise ValueError("batch must not fall: the points of an item stand together. Sort the points by batch first.")
    return offsets_of(torch.bincount(batch))
