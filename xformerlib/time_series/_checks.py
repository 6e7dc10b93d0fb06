"""Checks of arguments that every model shares."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._autograd import is_compiling


def check_values(x: object) -> None:
    """Raise unless ``x`` is a tensor of real numbers."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor; got {kind(x)}")


def check_series(x: object) -> None:
    """Raise unless ``x`` is (batch, steps, channels) real numbers."""
    check_values(x)
    assert isinstance(x, Tensor)
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, steps, channels); got {tuple(x.shape)}")


def seen_of(x: Float[Tensor, "*shape"], observed: Bool[Tensor, "*shape"] | None) -> Bool[Tensor, "*shape"]:
    """Where a value was observed: it is not NaN, and ``observed`` does not say otherwise."""
    seen = ~x.isnan()
    if observed is None:
        return seen
    if not isinstance(observed, Tensor) or observed.dtype != torch.bool:
        raise TypeError(f"observed must be a bool tensor, False where a value is missing; got {kind(observed)}")
    if observed.shape != x.shape:
        raise ValueError(f"observed must have the shape of x; got {tuple(observed.shape)} and {tuple(x.shape)}")
    return seen & observed


def check_times(times: object) -> None:
    """Raise unless ``times`` is a tensor of real numbers."""
    if not isinstance(times, Tensor) or times.dtype == torch.bool or times.is_complex():
        raise TypeError(f"times must be a tensor of real numbers; got {kind(times)}")


def check_finite(name: str, given: Tensor) -> None:
    """Raise if something is NaN or infinite, except in a graph, which cannot hold a check of values."""
    if not is_compiling() and not given.is_meta and not given.isfinite().all():
        raise ValueError(
            f"{name} must be known and finite; got NaN or infinity. Only x may have missing values: fill the others."
        )


def kind(value: object) -> str:
    """What came, for messages."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
