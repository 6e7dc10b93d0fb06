"""What every model does with its inputs: sizes that were declared, checks, missing values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .._arguments import Size, check_size
from .._recorded import Recorded
from ._checks import check_finite, check_times, check_values, seen_of
from ._heads import Head, Point
from ._windows import Batch

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Series:
    """The inputs of one call, checked: nothing in them is NaN, and what is missing is marked.

    Attributes:
        values: look-back of the targets and then of the past-only covariates; 0 where missing.
        observed: True where ``values`` were observed.
        times: of look-back and horizon; None if the caller gave none.
        future: covariates known over look-back and horizon; 0 columns if the model has none.
        static: covariates that do not change; 0 columns if the model has none.
    """

    values: Float[Tensor, "batch lookback columns"]
    observed: Bool[Tensor, "batch lookback columns"]
    times: Float[Tensor, "batch steps"] | None
    future: Float[Tensor, "batch steps known"]
    static: Float[Tensor, "batch constants"]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return bool(self.observed.all())


class Inputs(TypedDict, total=False):
    """What a model is declared with beside its sizes, by keyword, as far as it takes it (``ForecastModel.takes``).

    Attributes:
        past: further columns of ``x``, covariates that are known for the look-back only; 0 unless given.
        future: covariates known over look-back and horizon; 0 unless given.
        static: covariates that do not change over time; 0 unless given.
        head: what a forecast is: ``Point()``, which is the default, ``Quantile(levels)`` or ``StudentT()``.
    """

    past: int
    future: int
    static: int
    head: Head


class ForecastModel(Recorded):
    """What all forecasting models share: the call, the sizes that they were declared with, and how inputs are checked.

    A model of one's own derives from this class, and says in ``forecast`` what it does with a ``Series``.

    Args:
        channels: target series, the first columns of ``x``.
        lookback: steps that the model sees.
        horizon: steps that it forecasts.
        **inputs: covariates and head, as in ``Inputs``.

    Attributes:
        takes: which of ``"past"``, ``"future"``, ``"static"``, ``"times"`` and ``"head"`` the model can use; others are refused by name.
        any_length: whether the look-back of a call may differ from the declared one.

    Example:
        >>> class Last(ForecastModel):
        ...     def forecast(self, series):
        ...         return self.head.forecast(series.values[:, -1:, :, None].expand(-1, self.horizon, -1, self.head.size))
        >>> Last(2, 24, 6)(torch.randn(8, 24, 2)).shape
        torch.Size([8, 6, 2])
    """

    takes: ClassVar[frozenset[str]] = frozenset({"past", "future", "static", "head"})
    any_length: ClassVar[bool] = False

    def __init__(self, channels: Size, lookback: Size, horizon: Size, **inputs: Unpack[Inputs]) -> None:
        super().__init__()
        self._check_declared(inputs)
        self.channels = check_size("channels", channels)
        self.lookback, self.horizon = check_size("lookback", lookback), check_size("horizon", horizon)
        self.past = check_size("past", inputs.get("past", 0), least=0)
        self.future = check_size("future", inputs.get("future", 0), least=0)
        self.static = check_size("static", inputs.get("static", 0), least=0)
        self.head = inputs.get("head", Point())
        if not isinstance(self.head, Head):
            raise TypeError(f"head must be Point(), Quantile(levels) or StudentT(); got {self.head!r}")

    def forward(
        self,
        x: Float[Tensor, "batch lookback columns"],
        observed: Bool[Tensor, "batch lookback columns"] | None = None,
        times: Shaped[Tensor, "*batch steps"] | None = None,
        future: Shaped[Tensor, "batch steps known"] | None = None,
        static: Shaped[Tensor, "batch constants"] | None = None,
    ) -> Any:
        """Forecast the ``horizon`` steps after the look-back.

        Args:
            x: the look-back: ``channels`` targets, then ``past`` covariates. NaN is a missing value.
            observed: False where a value is missing, besides NaN; what stands there changes nothing.
            times: real times of look-back and horizon, ``(L + H,)`` or one row for each series.
            future: ``(B, L + H, future)``, of any dtype; each value known.
            static: ``(B, static)``, likewise.

        Returns:
            What the head makes: ``(B, H, channels)`` for ``Point``, ``(B, H, channels, levels)`` for ``Quantile``, a
            ``StudentTForecast`` for ``StudentT``.

        Raises:
            ValueError, TypeError: an input that was not declared, or that does not fit what was.
        """
        return self.forecast(self.series(x, observed=observed, times=times, future=future, static=static))

    def forecast(self, series: Series) -> Any:
        """The forecast of checked inputs; each model has its own."""
        raise NotImplementedError(f"{type(self).__name__} must define forecast(series)")

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """What training lowers: the loss of the head, of the forecast of these windows, where their target was observed.

        Example:
            >>> from xformerlib.time_series import DLinear, Windows
            >>> windows, model = Windows(torch.randn(500, 2), 48, 24), DLinear(2, 48, 24)
            >>> model.loss(windows.batch([0, 7, 300])).backward()
        """
        return self.head.loss(self(**batch.inputs), batch.target)

    def series(
        self,
        x: Float[Tensor, "batch lookback columns"],
        *,
        observed: Bool[Tensor, "batch lookback columns"] | None = None,
        times: Shaped[Tensor, "*batch steps"] | None = None,
        future: Shaped[Tensor, "batch steps known"] | None = None,
        static: Shaped[Tensor, "batch constants"] | None = None,
    ) -> Series:
        """The inputs of a call, checked; arguments as in a call."""
        self._check_lookback(x)
        seen = seen_of(x, observed)
        name, batch, steps = type(self).__name__, x.shape[0], x.shape[1] + self.horizon
        return Series(
            values=x.masked_fill(~seen, 0),
            observed=seen,
            times=self._times(times, batch, steps),
            future=covariates(name, "future", future, (batch, steps, self.future), x),
            static=covariates(name, "static", static, (batch, self.static), x),
        )

    def _check_declared(self, inputs: Inputs) -> None:
        name = type(self).__name__
        for key in inputs:
            if key not in Inputs.__annotations__:
                raise TypeError(f"{name} has no argument {key!r}")
            if key not in self.takes and inputs.get(key) != 0:
                raise ValueError(
                    f"{name} has no use for {key}: leave it out, or choose a model that has; got {key}={inputs.get(key)!r}"
                )

    def _check_lookback(self, x: Tensor) -> None:
        name, columns = type(self).__name__, self.channels + self.past
        check_values(x)
        if x.ndim != 3 or x.shape[2] != columns:
            declared = f"{self.channels} channels and {self.past} past covariates"
            raise ValueError(
                f"x must be (batch, lookback, {columns}), since {name} was declared with {declared}; got {tuple(x.shape)}"
            )
        if self.any_length and x.shape[1] == 0:
            raise ValueError(f"x must hold at least one step; got {tuple(x.shape)}")
        if not self.any_length and x.shape[1] != self.lookback:
            raise ValueError(
                f"x must hold the {self.lookback} steps of the look-back of {name}; got {tuple(x.shape)}. "
                "Fill series that are shorter with NaN in front."
            )

    def _times(self, times: Tensor | None, batch: int, steps: int) -> Tensor | None:
        name = type(self).__name__
        if times is None:
            return None
        if "times" not in self.takes:
            raise ValueError(
                f"{name} takes no times: its steps are regular. Leave times out, or give features of them as future covariates "
                "to a model that has some."
            )
        check_times(times)
        if times.shape not in ((steps,), (batch, steps)):
            raise ValueError(
                f"times must be ({steps},) or ({batch}, {steps}), look-back and horizon; got {tuple(times.shape)}"
            )
        times = times if times.is_floating_point() else times.double()
        check_finite("times", times)
        return times.expand(batch, steps)


def covariates(
    model: str, argument: str, given: Tensor | None, shape: tuple[int, ...], like: Tensor
) -> Float[Tensor, "*shape"]:
    """The covariates of a call, checked against the shape that ``model`` was declared with, in the dtype of ``like``."""
    size = shape[-1]
    if given is None:
        if size:
            raise ValueError(
                f"{model} was declared with {argument}={size}: {argument} must be given, {shape}; got None"
            )
        return like.new_zeros(shape)
    if not isinstance(given, Tensor):
        raise TypeError(f"{argument} must be a tensor; got {type(given).__name__}")
    if not size:
        raise ValueError(
            f"{model} has no {argument} covariates: leave {argument} out, or build a model that takes them "
            f"with {argument}=<how many>; got {tuple(given.shape)}"
        )
    if not isinstance(given, Tensor):
        raise TypeError(f"{argument} must be a tensor; got {type(given).__name__}")
    if given.shape != shape:
        raise ValueError(f"{argument} of {model} must be {shape}; got {tuple(given.shape)}")
    check_finite(argument, given)
    return given.to(like.dtype)
