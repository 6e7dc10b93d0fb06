"""Series as arrays: one (steps,) or (steps, columns), or a list of such, from numpy or torch."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ._panel import Columns, Labels, Panel


@dataclass(frozen=True)
class ArrayLabels(Labels):
    """The form in which arrays came: their series have numbers.

    Attributes:
        many: whether it was a list.
        flat: whether each was (steps,), without columns.
        tensor: whether they were torch's.
        lengths: steps of each.
    """

    many: bool
    flat: bool
    tensor: bool
    lengths: tuple[int, ...]
    freq: None = field(default=None, init=False, repr=False)

    def back(self, steps: SequenceOf[int]) -> ArrayLabels:
        return replace(self, lengths=tuple(n - m for n, m in zip(self.lengths, steps, strict=True)))

    def name(self, series: int) -> str:
        return f"series {series}" if self.many else "the series"

    def calendar(self, cycles: SequenceOf[str], length: int, series: int, ahead: int) -> Tensor:
        raise ValueError(
            f"calendar={tuple(cycles)} needs dates, which arrays do not have: give a frame, or ts.calendar_features as future columns"
        )

    def table(self, columns: Columns) -> dict[str, Any]:
        return {name: self._own(column if self.many else column[0]) for name, column in columns.items()}

    def tables(self, parts: SequenceOf[tuple[Labels, Columns]]) -> dict[str, Any]:
        labels, columns = zip(*parts, strict=True)
        stacked = {name: torch.stack([part[name] for part in columns], 1) for name in columns[0]}
        cutoff = torch.tensor([[length - 1 for length in own.lengths] for own in labels]).T
        cut = cutoff if self.many else cutoff[0]
        return {"cutoff": cut if self.tensor else cut.numpy(), **self.table(stacked)}

    def known(self, future: Any, names: int | tuple[str, ...], horizon: int) -> list[Tensor]:
        width = names if isinstance(names, int) else len(names)
        parts = _each("future", future, many=self.many)
        if len(parts) != len(self.lengths):
            raise ValueError(f"future must be one array for each of {len(self.lengths)} series; got {len(parts)}")
        known = [_numbers("future", part) for part in parts]
        for i, part in enumerate(known):
            if part.shape != (horizon, width):
                raise ValueError(
                    f"future must be ({horizon}, {width}), the horizon and the known covariates; that of {self.name(i)} is "
                    f"{tuple(part.shape)}"
                )
            check_known("future", part, self.name(i))
        return known

    def plain(self) -> dict[str, Any]:
        return {"kind": "arrays", "many": self.many, "flat": self.flat, "tensor": self.tensor, "lengths": self.lengths}

    def _own(self, column: Float64[Tensor, "*batch steps channels"]) -> Any:
        column = column[..., 0] if self.flat else column
        return column.to(torch.get_default_dtype()) if self.tensor else column.numpy()


def read_arrays(data: Any, *, past: int, future: int, static: Any, constants: int) -> Panel:
    """Series from arrays: columns are targets, then past covariates, then known-future ones."""
    many = isinstance(data, list | tuple) or getattr(data, "ndim", 0) == 3
    given = _each("the data", data, many=many)
    parts = [_numbers("the data", part) for part in given]
    flat = all(part.ndim == 1 for part in given)
    labels = ArrayLabels(many, flat, isinstance(given[0], Tensor), tuple(len(part) for part in parts))
    columns = parts[0].shape[1]
    targets = columns - past - future
    if targets < 1:
        raise ValueError(
            f"the data must have targets beside {past} past and {future} future covariates, (steps, targets + past + future); "
            f"got {tuple(given[0].shape)}"
        )
    for i, part in enumerate(parts):
        if part.shape[1] != columns:
            raise ValueError(
                f"all series must have the same columns; series 0 has {columns} and series {i} has {part.shape[1]}"
            )
        if part[:, :targets].isnan().all():
            raise ValueError(f"{labels.name(i)} has no value that was observed: leave it out")
        check_known("known-future covariates", part[:, targets + past :], labels.name(i))
    known = [part[:, targets + past :] for part in parts] if future else None
    fixed = _static(static, len(parts), constants)
    return Panel.of([part[:, : targets + past] for part in parts], known, fixed, labels)


def check_known(what: str, values: Tensor, series: str) -> None:
    """Covariates must be finite at every step."""
    if values.isnan().any():
        step, column = (int(i) for i in values.isnan().nonzero()[0])
        raise ValueError(
            f"{what} must be known at every step; {series} has none in column {column} at step {step}: fill it"
        )


def _each(name: str, data: Any, *, many: bool) -> list[Any]:
    parts = list(data) if many else [data]
    if not parts:
        raise ValueError(f"{name} must hold at least one series; got none")
    for i, part in enumerate(parts):
        if not hasattr(part, "shape") or getattr(part, "ndim", 0) not in (1, 2):
            shape = tuple(part.shape) if hasattr(part, "shape") else type(part).__name__
            raise TypeError(
                f"{name} must be a pandas frame, an array (steps,) or (steps, columns), or a list of such arrays; "
                f"{f'item {i}' if many else 'it'} is {shape}"
            )
    return parts


def _numbers(name: str, part: Any) -> Float64[Tensor, "steps columns"]:
    try:
        # A copy, which the owner of the array cannot change.
        values = part.detach().cpu().clone() if isinstance(part, Tensor) else torch.tensor(part.copy())
    except TypeError as error:
        raise TypeError(
            f"{name} must hold numbers; got an array of {getattr(part, 'dtype', type(part).__name__)}"
        ) from error
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} must hold real numbers; got {values.dtype}")
    values = values.double()
    if values.isinf().any():
        raise ValueError(f"{name} must be finite, or NaN where a value is missing; got infinity")
    return values[:, None] if values.ndim == 1 else values


def _static(static: Any, count: int, constants: int) -> Tensor | None:
    if static is None:
        return None
    values = _numbers("static", static[None] if getattr(static, "ndim", 2) == 1 else static)
    if values.shape != (count, constants):
        raise ValueError(f"static must be ({count}, {constants}), one row for each series; got {tuple(values.shape)}")
    if values.isnan().any():
        raise ValueError("static must be known of every series; got NaN")
    return values
