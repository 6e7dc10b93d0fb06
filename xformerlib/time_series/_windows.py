"""Windows of many series of unequal length: what a model is trained and scored on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as SequenceOf
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from .._arguments import Count, Size, check_size, checked_class


@dataclass(frozen=True)
class Batch:
    """Some windows: the inputs of a model, and what came after them.

    Attributes:
        x: look-back of the targets and of the past-only covariates; NaN where missing, and before a series began.
        target: the horizon of the targets; NaN where missing.
        future: covariates known over look-back and horizon; None if there are none. 0 before a series began.
        static: covariates that do not change; None if there are none.
    """

    x: Float[Tensor, "batch lookback columns"]
    target: Float[Tensor, "batch horizon channels"]
    future: Float[Tensor, "batch steps known"] | None = None
    static: Float[Tensor, "batch constants"] | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of a model, for ``model(**batch.inputs)``."""
        given = {"x": self.x, "future": self.future, "static": self.static}
        return {name: value for name, value in given.items() if value is not None}

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        future, static = (None if value is None else value.to(device) for value in (self.future, self.static))
        return Batch(self.x.to(device), self.target.to(device), future, static)


@checked_class
class Windows:
    """Every window of ``lookback + horizon`` steps in one or many series of unequal length; none is copied before it is asked for.

    A window forecasts the ``horizon`` steps from its ``origin`` on: ``lookback <= origin <= steps - horizon``. A series that has no such
    origin has those with ``history <= origin`` instead, with NaN in front.

    Args:
        values: the series, each (steps, columns): targets, and then past-only covariates. NaN is a missing value. Or one series.
        lookback, horizon: steps before the origin, and from it on.
        past: how many of the columns are past-only covariates.
        future: for each series (steps, known), covariates known over look-back and horizon.
        static: (series, constants), covariates that do not change.
        first: the first step that is forecast: of all series, or of each. What lies before it is only looked at.
        history: steps of look-back that a series must have if it is too short for a full one; ``lookback`` if not given.
        stride: steps from one origin to the next, counted back from the last.

    Attributes:
        series, origin: of each window, the series that it is from, and the step at which its forecast begins.

    Example:
        >>> from xformerlib.time_series import Windows
        >>> hours = torch.arange(1000.0)[:, None]
        >>> train, test = Windows(hours[:800], 96, 24), Windows(hours, 96, 24, first=800)
        >>> len(train), len(test)  # 800 - 120 + 1 and 200 - 24 + 1
        (681, 177)
        >>> batch = test.batch([0, 176])
        >>> batch.x.shape, batch.x[0, -1], batch.target[0, 0]
        (torch.Size([2, 96, 1]), tensor([799.]), tensor([800.]))

        The second series is shorter than a look-back:

        >>> len(Windows([hours, hours[:50]], 96, 24)), len(Windows([hours, hours[:50]], 96, 24, history=20))
        (881, 888)
    """

    def __init__(
        self,
        values: SequenceOf[Float[Tensor, "_ columns"]] | Float[Tensor, "_ columns"],
        lookback: Size,
        horizon: Size,
        *,
        past: Count = 0,
        future: SequenceOf[Float[Tensor, "_ known"]] | Float[Tensor, "_ known"] | None = None,
        static: Float[Tensor, "series constants"] | None = None,
        first: Count | SequenceOf[Count] = 0,
        history: Size | None = None,
        stride: Size = 1,
    ) -> None:
        self.lookback, self.horizon = lookback, horizon
        history = lookback if history is None else history
        if history > lookback:
            raise ValueError(f"history must be <= lookback; got history={history} and lookback={lookback}")
        for name, given in (("values", values), ("future", future)):
            if isinstance(given, Tensor) and given.ndim == 0:
                raise ValueError(f"{name} must be (steps, columns), or a list of such; got a 0-dim tensor")
        parts = _series("values", values)
        self.channels = parts[0].shape[1] - past
        if self.channels < 1:
            raise ValueError(
                f"values must have targets beside the {past} past covariates; got columns={parts[0].shape[1]}"
            )
        firsts = [first] * len(parts) if isinstance(first, int) else list(first)
        if len(firsts) != len(parts):
            raise ValueError(f"first must be one step for each of {len(parts)} series; got {len(firsts)}")
        for i, (begin, part) in enumerate(zip(firsts, parts, strict=True)):
            if begin > len(part) and not isinstance(first, int):
                raise ValueError(f"first must be <= {len(part)}, the steps of series {i}; got first={begin}")
        origins = [
            _origins(len(part), self.lookback, self.horizon, begin, history, stride)
            for part, begin in zip(parts, firsts, strict=True)
        ]
        if not any(origins):
            longest = max(map(len, parts))
            raise ValueError(
                f"values must hold a window of lookback={lookback} and horizon={horizon} steps that begins its forecast at first={first} "
                f"or later; got series of up to {longest} steps. Give longer ones, or history= for less of a look-back."
            )
        missing = [max(self.lookback - own[0], 0) if own else 0 for own in origins]
        self._values = _joined(parts, missing, torch.nan)
        self._future = None if future is None else _joined(_covariates(future, parts), missing, 0.0)
        self._static = None if static is None else _constants(static, len(parts))
        self.series = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(own) for own in origins]))
        self.origin = torch.cat([torch.tensor(own, dtype=torch.long) for own in origins])
        begins = torch.tensor([0, *(len(part) for part in parts[:-1])]).cumsum(0) + torch.tensor(missing).cumsum(0)
        self._rows = begins[self.series] + self.origin - self.lookback

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Windows({len(self)} of lookback={self.lookback}, horizon={self.horizon})"

    def batch(self, indices: Int[Tensor, " batch"] | SequenceOf[int] | slice) -> Batch:
        """The windows of these indices, in their order."""
        index = indices if isinstance(indices, slice) else torch.as_tensor(indices, dtype=torch.long).cpu()
        device = self._values.device
        rows = self._rows[index].to(device)[:, None] + torch.arange(self.lookback + self.horizon, device=device)
        values = self._values[rows]
        return Batch(
            x=values[:, : self.lookback],
            target=values[:, self.lookback :, : self.channels],
            future=None if self._future is None else self._future[rows],
            static=None if self._static is None else self._static[self.series[index].to(self._static.device)],
        )

    def batches(self, size: int) -> Iterator[Batch]:
        """Every window once, in order, ``size`` at a time; the last batch holds what is left."""
        check_size("size", size)
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size))


def _series(name: str, given: SequenceOf[Tensor] | Tensor) -> list[Tensor]:
    parts = [given] if isinstance(given, Tensor) and given.ndim == 2 else list(given)
    if not parts:
        raise ValueError(f"{name} must hold at least one series; got none")
    for i, part in enumerate(parts):
        if not isinstance(part, Tensor) or not part.is_floating_point():
            kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(f"{name} must be floating-point tensors (steps, columns); series {i} is {kind}")
        if part.ndim != 2 or part.shape[1] != parts[0].shape[-1]:
            raise ValueError(
                f"{name} must be tensors (steps, columns) with the same columns; series 0 is {tuple(parts[0].shape)} "
                f"and series {i} is {tuple(part.shape)}"
            )
    return parts


def _covariates(future: SequenceOf[Tensor] | Tensor, values: list[Tensor]) -> list[Tensor]:
    parts = _series("future", future)
    lengths, wanted = [len(part) for part in parts], [len(part) for part in values]
    if lengths != wanted:
        raise ValueError(f"future must have the steps of values in each series; got {lengths} and {wanted}")
    return parts


def _constants(static: Tensor, count: int) -> Tensor:
    if static.ndim != 2 or len(static) != count:
        raise ValueError(f"static must be ({count}, constants), one row for each series; got {tuple(static.shape)}")
    return static


def _origins(steps: int, lookback: int, horizon: int, first: int, history: int, stride: int) -> range:
    last = steps - horizon
    begin = max(first, lookback)
    if begin > last:
        begin = max(first, history)
    return range(begin + (last - begin) % stride, last + 1, stride)


def _joined(parts: list[Tensor], missing: list[int], value: float) -> Tensor:
    """The series one after the other, each with as many steps in front as its first window lacks."""
    if len(parts) == 1 and not missing[0]:
        return parts[0]
    return torch.cat([F.pad(part, (0, 0, front, 0), value=value) for part, front in zip(parts, missing, strict=True)])
