"""Forecasts of frames and arrays in a few lines: a model, its data and its training, held together."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any

import torch

from .._arguments import ELSEWHERE, NonNegative, Size, check_device, check_size, checked_class
from ._arrays import read_arrays
from ._fitting import Fitted, fit, forecast, least_history
from ._frames import checked_freq, read_frame
from ._heads import Head
from ._inputs import ForecastModel
from ._levels import checked_levels
from ._panel import Panel
from ._parts import calendar_features
from ._training import Evaluation, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Names = Annotated[SequenceOf[str] | int, ELSEWHERE]


@checked_class
class Forecaster:
    """A model, the data that it is for and how it is trained: fit, predict, cross-validate, plot, save and load.

    Series come as a pandas long frame, with a row for each series ``unique_id`` and time ``ds``, its value ``y`` and its covariates; or as
    arrays, (steps,) or (steps, targets + past + future covariates), one or a list. Every series of a frame is a series of its own (one
    channel), all are forecast by one model; the columns of an array are channels that a model may relate. Lengths may differ. A value
    that is NaN, or a time that is absent, is missing; a series shorter than the look-back is missing in front.

    Targets and past covariates are brought to mean 0 and deviation 1 series by series, known-future and static ones over all series;
    forecasts come back in the units of the data. The order of rows does not matter.

    Args:
        model: the class of a model, such as ``PatchTST``.
        lookback, horizon: steps that it sees, and that it forecasts.
        freq: from one step to the next: ``"h"``, ``"D"``, ``"MS"``, ..., or a whole number where times are. Found in the data if not
            given. For frames.
        past: covariates that are known for the past only: names of columns, or for arrays how many. They may be missing.
        future: covariates that are known for the horizon, too.
        static: covariates that do not change, given to ``fit`` by themselves.
        calendar: features of the dates as further known-future covariates: cycles as in ``calendar_features``.
        head: what is forecast: ``Point()``, ``Quantile(levels)`` or ``StudentT()``; the default of the model if not given.
        validation: the end of each series, which is not trained on: a share of its steps (but at least a horizon), or steps; with 0, none.
            Weights are chosen by it, and the intervals of a ``Point`` head are made of its errors. A series that would be left with
            less than two horizons is trained on as a whole.
        steps, batch_size, lr, weight_decay, schedule, eval_every, patience, eval_batch_size, seed: as in ``train``.
        device: where to compute; if not given, a GPU if there is one.
        progress: show a bar while training, if tqdm is installed.
        **options: further arguments of the model.

    Example:
        >>> from xformerlib.time_series import DLinear, Forecaster
        >>> hours = 20 + torch.sin(torch.arange(500.0) * torch.pi / 12)
        >>> forecaster = Forecaster(DLinear, lookback=48, horizon=24, steps=50, progress=False).fit(hours)
        >>> forecast = forecaster.predict(level=(80,))
        >>> {name: values.shape for name, values in forecast.items()}
        {'DLinear': torch.Size([24]), 'DLinear-lo-80': torch.Size([24]), 'DLinear-hi-80': torch.Size([24])}
    """

    def __init__(
        self,
        model: type[ForecastModel],
        lookback: Size,
        horizon: Size,
        *,
        freq: str | int | None = None,
        past: Names = (),
        future: Names = (),
        static: Names = (),
        calendar: SequenceOf[str] = (),
        head: Head | None = None,
        validation: Annotated[float, ELSEWHERE] = 0.1,
        steps: Size = 1000,
        batch_size: Size = 32,
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.0,
        schedule: Schedule = "cosine",
        eval_every: Size = 100,
        patience: int | None = None,
        eval_batch_size: Size = 256,
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: bool = True,
        **options: Any,
    ) -> None:
        if not (isinstance(model, type) and issubclass(model, ForecastModel)):
            raise TypeError(
                f"model must be the class of a forecasting model, such as PatchTST, and no instance; got {model!r}"
            )
        self.model_class, self.lookback, self.horizon = model, lookback, horizon
        self.freq, self.calendar, self.head = None if freq is None else checked_freq(freq), tuple(calendar), head
        self.past, self.future, self.static = (
            _names(name, given) for name, given in (("past", past), ("future", future), ("static", static))
        )
        self.validation = _checked_share(validation, horizon)
        self.training: dict[str, Any] = {
            "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "schedule": schedule,
            "eval_every": eval_every, "patience": patience, "eval_batch_size": eval_batch_size, "seed": seed,
        }  # fmt: skip
        for name in ("steps", "batch_size", "eval_every", "eval_batch_size"):
            check_size(name, self.training[name])
        check_size("seed", seed, least=0)
        self.device = check_device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
        self.progress = progress
        self.options = options
        self._fitted: Fitted | None = None
        if self.calendar and "future" not in model.takes:
            raise ValueError(
                f"calendar makes known-future covariates, which {model.__name__} has no use for: leave calendar out, or choose a model "
                f"that takes future; got calendar={self.calendar}"
            )
        if self.calendar:
            calendar_features(torch.zeros(1), self.calendar)
        self.build(1)  # what cannot be is refused now

    def __repr__(self) -> str:
        state = "fitted" if self._fitted is not None else "not fitted"
        return f"Forecaster({self.name}, lookback={self.lookback}, horizon={self.horizon}; {state})"

    @property
    def name(self) -> str:
        """What the columns of forecasts are called: the name of the model."""
        return self.model_class.__name__

    @property
    def fitted(self) -> Fitted:
        """What fitting has left behind."""
        if self._fitted is None:
            raise RuntimeError("the Forecaster must be fitted first: call fit(df)")
        return self._fitted

    @property
    def model(self) -> ForecastModel:
        """The fitted model, in evaluation mode; it works on values that were brought to mean 0 and deviation 1."""
        return self.fitted.model

    @property
    def evaluations(self) -> list[Evaluation]:
        """How training went, in those units."""
        return self.fitted.evaluations

    def fit(self, df: Any, static: Any = None) -> Forecaster:
        """Train on all series.

        Args:
            df: a long frame, or arrays.
            static: a row for each series: a frame with ``unique_id`` and the static covariates, or an array (series, constants).

        Returns:
            The Forecaster itself.
        """
        self._fitted = self._fit(self._read(df, static))
        return self

    def predict(
        self,
        h: int | None = None,
        future: Any = None,
        level: SequenceOf[float] | None = None,
        *,
        df: Any = None,
        static: Any = None,
    ) -> Any:
        """Forecast the steps after the last row of each series, whether it has a value or not.

        Args:
            h: how many steps, ``horizon`` if not given, which is also the most.
            future: the known-future covariates of the ``horizon`` steps after the end, whatever ``h`` is: a frame with ``unique_id``,
                ``ds`` and their columns, or an array (horizon, known), for a list of series one for each.
            level: levels of prediction intervals in percent; if not given, 80 and 95, as far as the head can tell them. ``Quantile``
                has those that its levels make, ``StudentT`` all, and ``Point`` has intervals from errors on the validation part
                (``Conformal``).
            df: forecast the steps after the end of these series instead of those that were fitted.
            static: the static covariates of ``df``.

        Returns:
            A frame with ``unique_id``, ``ds``, ``<model>``, ``<model>-lo-80``, ``<model>-hi-80``, ...; for arrays, a dictionary of arrays
            of the same names, (h,) or (h, targets), with (series, ...) in front for a list.
        """
        fitted = self.fitted
        if df is None and static is not None:
            raise ValueError("static is that of df: leave it out where df is not given, since fit has it already")
        panel = fitted.panel if df is None else self._read(df, static, fitted.panel.labels.freq)
        self._check_channels(panel, fitted.model)
        steps = self._checked_h(h)
        levels = checked_levels(level, fitted.model.head, fitted.conformal)
        columns = forecast(
            fitted, panel, self._known(panel, future), levels, self.name, self.training["eval_batch_size"]
        )
        return panel.labels.table({name: column[:, :steps] for name, column in columns.items()})

    def cross_validate(
        self,
        df: Any,
        windows: int = 1,
        step: int | None = None,
        *,
        level: SequenceOf[float] | None = None,
        static: Any = None,
        refit: bool = False,
    ) -> Any:
        """Forecast the end of each series as if it were not known yet, and hand back forecasts beside what happened.

        The Forecaster itself stays as it is: another one, with the same arguments, is fitted to what lies before the first cutoff, and
        with ``refit`` anew at each cutoff. A forecast sees nothing after its cutoff but known-future covariates.

        Args:
            df, static: as in ``fit``.
            windows: how many forecasts of each series; the last ends with the series.
            step: steps from one cutoff to the next; ``horizon`` if not given, so that forecasts follow each other.
            level: as in ``predict``.
            refit: fit again at each cutoff, which takes ``windows`` trainings instead of one.

        Returns:
            A frame with ``unique_id``, ``ds``, ``cutoff`` (the last time that the forecast could see), ``y``, ``<model>``, ...; for arrays,
            a dictionary of arrays (windows, horizon, ...), with (series, ...) in front for a list, and ``cutoff``, the last step seen.
        """
        panel = self._read(df, static)
        step = self.horizon if step is None else check_size("step", step)
        behind = [self.horizon + i * step for i in reversed(range(check_size("windows", windows)))]
        for i, length in enumerate(panel.lengths):
            if length <= behind[0]:
                raise ValueError(
                    f"{panel.labels.name(i)} has {length} steps, and windows={windows} of step={step} need more than {behind[0]}: ask for "
                    "fewer, or leave the series out"
                )
        parts, fitted = [], None
        for count in behind:
            past = panel.without([count] * len(panel))
            fitted = self._fit(past) if fitted is None or refit else fitted
            level = checked_levels(level, fitted.model.head, fitted.conformal)
            ahead = [slice(length, length + self.horizon) for length in past.lengths]
            known = panel.future and [part[own] for part, own in zip(panel.future, ahead, strict=True)]
            targets = [part[own, : fitted.model.channels] for part, own in zip(panel.values, ahead, strict=True)]
            columns = forecast(fitted, past, known, level, self.name, self.training["eval_batch_size"])
            parts.append((past.labels, {"y": torch.stack(targets), **columns}))
        return panel.labels.tables(parts)

    def plot(self, df: Any, forecast: Any, *, series: int | SequenceOf[Any] = 4, history: int | None = None) -> Figure:
        """Draw forecasts, their intervals and the values around them, with matplotlib.

        Args:
            df: the series, as in ``fit``; what it holds of the time that was forecast is drawn, too.
            forecast: what ``predict`` or ``cross_validate`` returned.
            series: which series, by ``unique_id`` or number; or how many of the first.
            history: steps before the forecast that are drawn; three horizons if not given.
        """
        from ._picture import draw  # needs matplotlib

        return draw(
            df, forecast, self.name, series, 3 * self.horizon if history is None else check_size("history", history)
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the fitted Forecaster into one file: weights, and options as JSON. It is complete, or what was there before stays.

        Arguments that are no plain values, such as a model of your own or a module in ``block``, are not written: ``load`` asks for them.
        """
        from ._saved import save

        save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str], *, device: torch.device | str | None = None, **absent: Any) -> Forecaster:
        """Read a Forecaster that ``save`` has written; nothing in the file is executed.

        Args:
            path: the file.
            device: where to compute; if not given, a GPU if there is one.
            **absent: arguments that could not be written, by their names.
        """
        from ._saved import load

        saved = load(path, absent)
        forecaster = cls(**saved.arguments, device=device)
        forecaster._fitted = saved.fitted(forecaster.build(saved.channels))
        return forecaster

    def build(self, channels: int) -> ForecastModel:
        """A new model for so many targets, with weights of ``seed``."""
        given: dict[str, Any] = {
            "past": _count(self.past), "future": _count(self.future) + 2 * len(self.calendar), "static": _count(self.static)
        }  # fmt: skip
        given = {name: count for name, count in given.items() if count}
        if self.head is not None:
            given["head"] = self.head
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.training["seed"])
            model = self.model_class(channels, self.lookback, self.horizon, **given, **self.options)
        return model.to(self.device)

    def _fit(self, panel: Panel) -> Fitted:
        calendar = 2 * len(self.calendar)
        model = self.build(panel.values[0].shape[1] - _count(self.past))
        held_out = self._held_out(panel.lengths)
        rest = least_history(self.lookback, self.horizon) + self.horizon
        if max(panel.lengths) < rest and any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"no series of df is long enough to train on: it must have {rest} steps, and the longest has {max(panel.lengths)}. Give "
                "longer series, or a shorter horizon"
            )
        return fit(model, panel, held_out, calendar=calendar, training=self.training, progress=self.progress)

    def _held_out(self, lengths: list[int]) -> list[int]:
        """Steps at the end of each series that are for validation."""
        if not self.validation:
            return [0] * len(lengths)
        rest = least_history(self.lookback, self.horizon) + self.horizon
        counts = [
            self.validation if isinstance(self.validation, int) else max(self.horizon, int(self.validation * length))
            for length in lengths
        ]
        counts = [count if length - count >= rest else 0 for count, length in zip(counts, lengths, strict=True)]
        if not any(counts):
            raise ValueError(
                f"no series is long enough for validation={self.validation}: beside that part it needs {rest} steps, and the longest has "
                f"{max(lengths)}. Give longer series, a shorter horizon, or validation=0"
            )
        return counts

    def _read(self, df: Any, static: Any, freq: str | int | None = None) -> Panel:
        if _count(self.static) and static is None:
            raise ValueError(f"static must be given, since static={self.static!r} was declared")
        if static is not None and not _count(self.static):
            raise ValueError(
                "static was given, but none was declared: build the Forecaster with static, or leave it out"
            )
        if type(df).__module__.partition(".")[0] == "pandas":
            past, future, constants = (_columns(name, getattr(self, name)) for name in ("past", "future", "static"))
            panel = read_frame(df, freq=freq or self.freq, past=past, future=future, static=static, constants=constants)
        else:
            if self.freq is not None:
                raise ValueError(f"freq is for frames: arrays have no times. Leave it out; got freq={self.freq!r}")
            counts = {name: _count(getattr(self, name)) for name in ("past", "future")}
            panel = read_arrays(df, **counts, static=static, constants=_count(self.static))
        for i, part in enumerate(panel.values):
            if part[-self.lookback :, : part.shape[1] - _count(self.past)].isnan().all():
                raise ValueError(
                    f"{panel.labels.name(i)} has no value in its last {self.lookback} steps, the look-back: there is nothing to forecast "
                    "from. Leave missing rows at its end out, such as with df.dropna(), or leave out the series"
                )
        return panel.with_calendar(self.calendar)

    def _known(self, panel: Panel, future: Any) -> list[torch.Tensor] | None:
        """Known-future covariates and features of the calendar at the steps to come."""
        declared = _count(self.future)
        if future is not None and not declared:
            raise ValueError(
                "future was given, but none was declared: build the Forecaster with future, or leave it out"
            )
        if future is None and declared:
            raise ValueError(
                f"future must be given for the {self.horizon} steps to come, since future={self.future!r} was declared"
            )
        parts = [panel.labels.known(future, self.future, self.horizon)] if declared else []
        if self.calendar:
            own = [panel.labels.calendar(self.calendar, 0, i, self.horizon) for i in range(len(panel))]
            parts.append([features.double() for features in own])
        return [torch.cat(both, 1) for both in zip(*parts, strict=True)] if parts else None

    def _check_channels(self, panel: Panel, model: ForecastModel) -> None:
        channels = panel.values[0].shape[1] - _count(self.past)
        if channels != model.channels:
            raise ValueError(f"df must have the {model.channels} targets that were fitted; got {channels}")

    def _checked_h(self, h: int | None) -> int:
        if h is None:
            return self.horizon
        if check_size("h", h) > self.horizon:
            raise ValueError(
                f"h must be <= horizon={self.horizon}; got h={h}. Build a Forecaster with a longer horizon"
            )
        return h


def _names(name: str, given: Names) -> int | tuple[str, ...]:
    if not isinstance(given, (str, int, list, tuple)):
        raise TypeError(
            f"{name} must be names of columns, such as ('price',), or for arrays their count; got {name}={given!r}"
        )
    if isinstance(given, int):
        return check_size(name, given, least=0)
    if isinstance(given, str) or not all(isinstance(one, str) for one in given):
        raise TypeError(
            f"{name} must be names of columns, such as ('price',), or for arrays how many; got {name}={given!r}"
        )
    return tuple(given)


def _count(names: int | tuple[str, ...]) -> int:
    return names if isinstance(names, int) else len(names)


def _columns(name: str, names: int | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(names, int) and names:
        raise ValueError(f"{name} must name its columns for a frame, such as {name}=('price',); got {name}={names}")
    return () if isinstance(names, int) else names


def _checked_share(validation: float, horizon: int) -> float:
    whole = isinstance(validation, int) and not isinstance(validation, bool)
    if not isinstance(validation, (int, float)):
        raise TypeError(f"validation must be a share, a number in [0, 1); got validation={validation!r}")
    if validation != 0 and not (validation >= horizon if whole else 0 < validation < 1):
        raise ValueError(
            f"validation must be a share between 0 and 1, whole steps >= horizon={horizon}, or 0; got validation={validation!r}"
        )
    return validation
