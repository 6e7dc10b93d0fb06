"""Models that read a series step by step: one vector for each step, and forecasts at once or one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from .._arguments import Size
from .._autograd import is_compiling
from ._heads import StudentT
from ._inputs import ForecastModel, Series
from ._parts import Affine, instance_norm
from ._windows import Batch

# From the vector of the next step, (B, 1, width), to what the model makes of it, (B, 1, dim). It remembers what came before.
Advance = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Steps:
    """A look-back as one vector for each step: normalised values, whether each was observed, and covariates.

    Attributes:
        vectors: ``(values, observed, future, static)`` side by side.
        seen: whether anything was observed at the step.
        inverse: from normalised targets to the units of the data.
        later: future covariates and static ones of the steps of the horizon.
        values: columns of the look-back, targets and past covariates.
        times: of look-back and horizon, counted so that the last step of the look-back is where it is without times; None if the caller
            gave none.
    """

    vectors: Float[Tensor, "batch lookback width"]
    seen: Bool[Tensor, "batch lookback"]
    inverse: Affine
    later: Float[Tensor, "batch horizon covariates"]
    values: int
    times: Shaped[Tensor, "*batch steps"] | None = None

    @property
    def first(self) -> Shaped[Tensor, " batch"]:
        """The step at which each series begins: the first of which anything was observed, or the last of all."""
        return (self.seen.cumsum(1) == 0).sum(1).clamp(max=self.seen.shape[1] - 1)

    @cached_property
    def complete(self) -> bool:
        """Whether something was observed at every step."""
        return bool(self.seen.all())

    @cached_property
    def begun(self) -> Bool[Tensor, "batch lookback"] | None:
        """Where the series has begun; None where all begin at once."""
        return None if bool(self.seen[:, 0].all()) else self.seen.cumsum(1) > 0

    def after(self, values: Float[Tensor, "batch steps channels"], start: int) -> Float[Tensor, "batch steps width"]:
        """The vectors of steps of the horizon, from ``start`` on, at which these normalised targets stood; NaN where unknown."""
        batch, steps, channels = values.shape
        known = ~values.isnan()
        unknown = values.new_zeros(batch, steps, self.values - channels)  # past covariates end with the look-back
        later = self.later[:, start : start + steps]
        return torch.cat([values.masked_fill(~known, 0), unknown, known.to(values.dtype), unknown, later], -1)

    def repeated(self, times: int) -> Steps:
        """Each series ``times`` times, one after the other."""
        if times == 1:
            return self
        inverse = Affine(*(x.repeat_interleave(times, 0) for x in (self.inverse.level, self.inverse.scale)))
        vectors, seen, later = (x.repeat_interleave(times, 0) for x in (self.vectors, self.seen, self.later))
        own = self.times is not None and self.times.ndim == 2
        at = self.times.repeat_interleave(times, 0) if own and self.times is not None else self.times
        return Steps(vectors, seen, inverse, later, self.values, at)


def width_of(model: ForecastModel) -> int:
    """Channels of the vector of a step."""
    return 2 * (model.channels + model.past) + model.future + model.static + ("times" in model.takes)


def steps_of(model: ForecastModel, series: Series, *, ahead: int) -> Steps:
    """The look-back step by step; each step holds the future covariates of the step that is ``ahead`` of it.

    Of a model that takes times, also log(1 + the time between this one and the one before it); without times that is 1.
    """
    z, inverse = instance_norm(series.values, series.observed)
    lookback = z.shape[1]
    static = series.static[:, None].expand(-1, series.future.shape[1], -1)
    known = torch.cat([series.future, static], -1)
    times = None if series.times is None else _relative(series.times, lookback, model.lookback)
    if "times" in model.takes:
        gaps = z.new_ones(1, known.shape[1] - 1) if times is None else times.diff(dim=-1)
        gaps = nn.functional.pad(gaps.log1p().to(z.dtype), (1, 0))  # before the first step there is none
        known = torch.cat([known, gaps.expand(len(z), -1)[..., None]], -1)
    targets = Affine(inverse.level[..., : model.channels], inverse.scale[..., : model.channels])
    return Steps(
        vectors=torch.cat([z, series.observed.to(z.dtype), known[:, ahead : lookback + ahead]], -1),
        seen=series.observed.any(-1),
        inverse=targets,
        later=known[:, lookback + ahead :],
        values=z.shape[2],
        times=times,
    )


def _relative(times: Float[Tensor, "batch steps"], lookback: int, declared: int) -> Float[Tensor, "*batch steps"]:
    """Times such that the last step of the look-back is where it would be if steps were numbered; one row if all are the same."""
    times = times[:1] if times.stride(0) == 0 else times
    if not is_compiling() and not times.is_meta:
        gaps = times.diff(dim=1)
        wrong = torch.cat([gaps[:, : lookback - 1] < 0, gaps[:, lookback - 1 :] <= 0], 1)
        if wrong.any():
            row, step = wrong.nonzero()[0].tolist()
            raise ValueError(
                "times must not decrease from step to step, and must increase from the last step of the look-back on; got "
                f"{times[row, step + 1]:g} at step {step + 1} after {times[row, step]:g}. Sort the steps by time."
            )
    times = times - times[:, lookback - 1 : lookback] + (max(declared, lookback) - 1)
    return times[0] if len(times) == 1 else times


class DirectOutput(nn.Module):
    """All steps of the horizon at once, from one state s and what is known of each step ahead:

    raw_h = W_h s + b_h + MLP(s, future_h)       (the second term only with future covariates; as in MQ-RNN, arXiv:1711.11053)
    """

    def __init__(self, model: ForecastModel, dim: Size) -> None:
        super().__init__()
        self.shape = (model.horizon, model.channels, model.head.size)
        numbers = model.channels * model.head.size
        self.linear = nn.Linear(dim, model.horizon * numbers)
        self.local = (
            nn.Sequential(nn.Linear(dim + model.future + model.static, dim), nn.GELU(), nn.Linear(dim, numbers))
            if model.future
            else None
        )

    def forward(
        self, state: Float[Tensor, "batch dim"], later: Float[Tensor, "batch horizon covariates"]
    ) -> Float[Tensor, "batch horizon channels size"]:
        raw = self.linear(state).unflatten(-1, self.shape)
        if self.local is None:
            return raw
        own = torch.cat([state[:, None].expand(-1, later.shape[1], -1), later], -1)
        return raw + self.local(own).unflatten(-1, self.shape[1:])


class StepwiseModel(ForecastModel, ABC):
    """A model that forecasts one step after the other, each from the look-back and the steps of the horizon before it.

        p(y_1, ..., y_H | x) = product over h of p(y_h | y_1, ..., y_(h-1), x)

    Training shows it the true steps before each one (teacher forcing): ``model(x, target=y)`` computes all steps in one pass, and
    ``loss`` is of that. Without ``target`` its own forecasts take their place (the point of each: of ``StudentT`` the mean), each step
    computed once, with what earlier ones left in a cache. ``sample`` draws whole paths. Arguments are those of ``ForecastModel``.
    """

    any_length: ClassVar[bool] = True
    output: nn.Linear

    @abstractmethod
    def hidden(self, steps: Steps, later: Float[Tensor, "batch later width"]) -> Float[Tensor, "batch horizon dim"]:
        """All at once: what is known at the last step of the look-back, and at each of the later ones."""

    @abstractmethod
    def start(self, steps: Steps, samples: int) -> tuple[Float[Tensor, "batch 1 dim"], Advance]:
        """One by one: what is known at the last step of the look-back, and what goes on from there; each series ``samples`` times."""

    def forward(
        self,
        x: Float[Tensor, "batch lookback columns"],
        observed: Bool[Tensor, "batch lookback columns"] | None = None,
        times: Shaped[Tensor, "*batch steps"] | None = None,
        future: Float[Tensor, "batch steps covariates"] | None = None,
        static: Float[Tensor, "batch constants"] | None = None,
        target: Float[Tensor, "batch horizon channels"] | None = None,
    ) -> Any:
        """Forecast the ``horizon`` steps after the look-back.

        Args:
            target: the true steps of the horizon, NaN where missing. Given, each step is forecast from the true steps before it; step h
                never sees step h or later ones.
        """
        steps = self._steps(self.series(x, observed=observed, times=times, future=future, static=static))
        if target is not None:
            raw = self._raw(self.hidden(steps, steps.after(self._known(steps, target), 0)))
            return self.head.forecast(raw, steps.inverse)
        return self._free(steps)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """What training lowers: the loss of the head, of these windows with the true steps before each one (teacher forcing)."""
        return self.head.loss(self(**batch.inputs, target=batch.target), batch.target)

    @torch.no_grad()
    def sample(
        self,
        x: Float[Tensor, "batch lookback columns"],
        n: int,
        *,
        observed: Bool[Tensor, "batch lookback columns"] | None = None,
        times: Shaped[Tensor, "*batch steps"] | None = None,
        future: Float[Tensor, "batch steps covariates"] | None = None,
        static: Float[Tensor, "batch constants"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n batch horizon channels"]:
        """``n`` paths drawn step by step, each step given those drawn before it. For models with a ``StudentT`` head."""
        if not isinstance(self.head, StudentT):
            raise ValueError(
                f"sample needs a distribution to draw from: build the model with head=StudentT(); it has {self.head!r}"
            )
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a whole number >= 1; got n={n!r}")
        steps = self._steps(self.series(x, observed=observed, times=times, future=future, static=static))
        _, drawn = self._unrolled(steps, n, lambda own: own.sample(1, generator=generator)[0])
        paths = steps.repeated(n).inverse(drawn)
        return paths.unflatten(0, (-1, n)).transpose(0, 1)

    def forecast(self, series: Series) -> Any:
        return self._free(self._steps(series))

    def _free(self, steps: Steps) -> Any:
        """The forecast of each step from the forecasts of those before it."""
        raw, _ = self._unrolled(steps, 1, self.head.point)
        return self.head.forecast(raw, steps.inverse)

    def _steps(self, series: Series) -> Steps:
        return steps_of(self, series, ahead=1)  # a step knows of the next one what can be known

    def _unrolled(
        self, steps: Steps, samples: int, choose: Callable[[Any], Tensor]
    ) -> tuple[Float[Tensor, "batch horizon channels size"], Float[Tensor, "batch horizon channels"]]:
        """What the model says of each step where ``choose`` takes the values of those before it, and these values, normalised."""
        hidden, advance = self.start(steps, samples)
        steps = steps.repeated(samples)
        raws, values = [], []
        for step in range(self.horizon):
            raw = self._raw(hidden)
            value = choose(self.head.forecast(raw)).to(raw.dtype)
            raws.append(raw)
            values.append(value)
            if step + 1 < self.horizon:
                hidden = advance(steps.after(value, step))
        return torch.cat(raws, 1), torch.cat(values, 1)

    def _raw(self, hidden: Tensor) -> Float[Tensor, "batch steps channels size"]:
        return self.output(hidden).unflatten(-1, (self.channels, self.head.size))

    def _known(self, steps: Steps, target: Tensor) -> Float[Tensor, "batch steps channels"]:
        """The steps of the target that others are forecast from, normalised."""
        shape = (steps.vectors.shape[0], self.horizon, self.channels)
        if not isinstance(target, Tensor) or not target.is_floating_point():
            raise TypeError(
                f"target must be a floating-point tensor; got {getattr(target, 'dtype', type(target).__name__)}"
            )
        if target.shape != shape:
            raise ValueError(f"target must be the horizon, {shape}; got {tuple(target.shape)}")
        return ((target - steps.inverse.level) / steps.inverse.scale)[:, :-1].to(steps.vectors.dtype)
