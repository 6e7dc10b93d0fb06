"""Series as a pandas long frame: one row for each series (``unique_id``) and time (``ds``), with its value (``y``) and covariates."""

from __future__ import annotations

import warnings
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64
from torch import Tensor

from .._arguments import check_size
from ._panel import Columns, Labels, Panel
from ._parts import calendar_features

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

ID, TIME, TARGET = "unique_id", "ds", "y"


@dataclass(frozen=True)
class FrameLabels(Labels):
    """What series are called, and when.

    Attributes:
        ids: strings or whole numbers, in order.
        ends: the time of the last step of each: a date, or a whole number.
        freq: from one step to the next, as pandas writes it, or a whole number.
    """

    ids: tuple[str | int, ...]
    ends: tuple[Any, ...]
    freq: str | int

    def back(self, steps: SequenceOf[int]) -> FrameLabels:
        ends = tuple(_times(end, self.freq, n + 1, 0)[0] for end, n in zip(self.ends, steps, strict=True))
        return FrameLabels(self.ids, ends, self.freq)

    def name(self, series: int) -> str:
        return f"{ID}={self.ids[series]!r}"

    def calendar(self, cycles: SequenceOf[str], length: int, series: int, ahead: int) -> Tensor:
        times = _times(self.ends[series], self.freq, length, ahead)
        if isinstance(self.freq, int):
            raise ValueError(
                f"calendar={tuple(cycles)} needs dates; column {TIME!r} holds whole numbers: leave calendar out"
            )
        return calendar_features(times.tz_localize(None), cycles)

    def table(self, columns: Columns) -> pd.DataFrame:
        import pandas as pd

        horizon = next(iter(columns.values())).shape[1]
        index = self._ahead(horizon)
        return pd.concat(
            [index, pd.DataFrame({name: c[..., 0].flatten().numpy() for name, c in columns.items()})], axis=1
        )

    def tables(self, parts: SequenceOf[tuple[Labels, Columns]]) -> pd.DataFrame:
        import pandas as pd

        frames = []
        for labels, columns in parts:
            assert isinstance(labels, FrameLabels)
            frame = labels.table(columns)
            frame.insert(2, "cutoff", pd.Series(labels.ends).repeat(len(frame) // len(labels.ids)).to_numpy())
            frame["cutoff"] = frame["cutoff"].astype(frame[TIME].dtype)
            frames.append(frame)
        return pd.concat(frames).sort_values([ID, "cutoff", TIME], kind="stable", ignore_index=True)

    def known(self, future: Any, names: int | tuple[str, ...], horizon: int) -> list[Tensor]:
        assert not isinstance(names, int)
        frame = _columns("future", future, (ID, TIME, *names))
        _check_times("future", frame)
        for name in names:
            frame[name] = _numbers("future", frame, name)
        _check_duplicates("future", frame)
        wanted = self._ahead(horizon)
        if frame[TIME].dtype.kind != wanted[TIME].dtype.kind:
            raise TypeError(
                f"column {TIME!r} of future must be of the kind that was fitted, {wanted[TIME].dtype}; got {frame[TIME].dtype}"
            )
        found = wanted.merge(frame, on=[ID, TIME], how="left")
        for name in names:
            absent = found[found[name].isna()]
            if len(absent):
                raise ValueError(
                    f"column {name!r} of future must be known at each of the {horizon} steps after the last of a series; "
                    f"{ID}={absent[ID].iloc[0]!r} has none at {TIME}={absent[TIME].iloc[0]}"
                )
        values = torch.tensor(found[list(names)].to_numpy(dtype="float64"))
        return list(values.unflatten(0, (len(self.ids), horizon)))

    def plain(self) -> dict[str, Any]:
        if isinstance(self.freq, int):
            return {"kind": "frame", "ids": list(self.ids), "ends": list(self.ends), "freq": self.freq, "zone": None}
        zone = None if self.ends[0].tz is None else str(self.ends[0].tz)
        ends = [(end if zone is None else end.tz_convert("UTC").tz_localize(None)).isoformat() for end in self.ends]
        return {"kind": "frame", "ids": list(self.ids), "ends": ends, "freq": self.freq, "zone": zone}

    @classmethod
    def from_plain(cls, ids: list[Any], ends: list[Any], freq: str | int, zone: str | None) -> FrameLabels:
        """The opposite of ``plain``."""
        if isinstance(freq, int):
            return cls(tuple(ids), tuple(ends), freq)
        import pandas as pd

        stamps = [pd.Timestamp(end) for end in ends]
        local = [s if zone is None else s.tz_localize("UTC").tz_convert(zone) for s in stamps]
        return cls(tuple(ids), tuple(local), freq)

    def _ahead(self, horizon: int) -> pd.DataFrame:
        """Series and times of the steps after the last."""
        import pandas as pd

        times = [pd.Series(_times(end, self.freq, 0, horizon)) for end in self.ends]
        ids = pd.Series(self.ids).repeat(horizon).reset_index(drop=True)
        return pd.DataFrame({ID: ids, TIME: pd.concat(times, ignore_index=True)})


def read_frame(
    df: pd.DataFrame,
    *,
    freq: str | int | None,
    past: tuple[str, ...],
    future: tuple[str, ...],
    static: Any,
    constants: tuple[str, ...],
) -> Panel:
    """Series from a long frame; the order of its rows does not matter. Times that are absent are missing values."""
    frame = _columns("df", df, (ID, TIME, TARGET, *past, *future))
    _check_ids("df", frame)
    _check_times("df", frame)
    for name in (TARGET, *past, *future):
        frame[name] = _numbers("df", frame, name)
    _check_duplicates("df", frame)
    frame = frame.sort_values([ID, TIME], ignore_index=True)
    new = ~frame.duplicated(ID).to_numpy()
    begins = [*new.nonzero()[0].tolist(), len(frame)]
    ids = tuple(frame[ID].iloc[begins[:-1]].tolist())
    times = _index(frame[TIME])
    spans = [times[begin:end] for begin, end in zip(begins, begins[1:], strict=False)]
    step = _freq(freq, spans)
    numbers = torch.tensor(frame[[TARGET, *past, *future]].to_numpy(dtype="float64"))
    values = [
        _regular(name, span, part, step)
        for name, span, part in zip(ids, spans, numbers.split([len(span) for span in spans]), strict=True)
    ]
    labels = FrameLabels(ids, tuple(span[-1] if not isinstance(step, int) else int(span[-1]) for span in spans), step)
    width = 1 + len(past)
    for i, part in enumerate(values):
        if part[:, 0].isnan().all():
            raise ValueError(f"column {TARGET!r} of df holds no value for {labels.name(i)}: leave the series out")
        _check_known(labels, i, part[:, width:], future)
    known = [part[:, width:] for part in values] if future else None
    fixed = None if static is None else _static(static, ids, constants)
    return Panel.of([part[:, :width] for part in values], known, fixed, labels)


def _columns(what: str, frame: Any, names: tuple[str, ...]) -> pd.DataFrame:
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"{what} must be a pandas frame, as the data of fit was; got {type(frame).__name__}")
    for name in names:
        if name not in frame:
            present = ", ".join(map(repr, frame.columns))
            raise ValueError(f"{what} must have a column {name!r}; it has {present}. Rename one, or add it")
    if frame.empty:
        raise ValueError(f"{what} must have rows; got none")
    return frame[list(names)].reset_index(drop=True)


def _check_ids(what: str, frame: pd.DataFrame) -> None:
    import pandas as pd

    if isinstance(frame[ID].dtype, pd.CategoricalDtype):
        frame[ID] = frame[ID].astype(frame[ID].cat.categories.dtype)
    if frame[ID].isna().any():
        raise ValueError(
            f"column {ID!r} of {what} must be known in every row; row {int(frame[ID].isna().argmax())} has none"
        )
    kind = pd.api.types.infer_dtype(frame[ID])
    if kind not in ("string", "integer"):
        raise TypeError(f"column {ID!r} of {what} must hold strings or whole numbers; got {kind}")


def _check_times(what: str, frame: pd.DataFrame) -> None:
    import pandas as pd

    times = frame[TIME]
    if not (pd.api.types.is_datetime64_any_dtype(times) or pd.api.types.is_integer_dtype(times)):
        raise TypeError(
            f"column {TIME!r} of {what} must hold dates (datetime64) or whole numbers; got {times.dtype}, such as {times.iloc[0]!r}: "
            "convert it with pandas.to_datetime"
        )
    if times.isna().any():
        raise ValueError(
            f"column {TIME!r} of {what} must be known in every row; row {int(times.isna().argmax())} has none"
        )


def _numbers(what: str, frame: pd.DataFrame, name: str) -> np.ndarray[Any, Any]:
    import pandas as pd

    column = frame[name]
    if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)) or column.dtype.kind == "c":
        bad = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
        cell = f", such as {bad.iloc[0]!r} in row {bad.index[0]}" if len(bad) else ""
        raise TypeError(f"column {name!r} of {what} must hold numbers; got {column.dtype}{cell}: convert it")
    values = column.to_numpy(dtype="float64", na_value=float("nan"))
    infinite = abs(values) == float("inf")
    if infinite.any():
        raise ValueError(
            f"column {name!r} of {what} must be finite, or NaN where a value is missing; row {int(infinite.argmax())} is infinite"
        )
    return values


def _check_duplicates(what: str, frame: pd.DataFrame) -> None:
    again = frame.duplicated([ID, TIME])
    if again.any():
        row = frame[again].iloc[0]
        raise ValueError(
            f"each {ID!r} of {what} must have at most one row for a {TIME!r}; {ID}={row[ID]!r} has more at {row[TIME]}: "
            "drop or aggregate them"
        )


def _check_known(labels: FrameLabels, series: int, known: Tensor, names: tuple[str, ...]) -> None:
    absent = known.isnan()
    if absent.any():
        step, column = (int(i) for i in absent.nonzero()[0])
        at = _times(labels.ends[series], labels.freq, len(known), 0)[step]
        raise ValueError(
            f"column {names[column]!r} of df must be known at every step, since it was declared with future; {labels.name(series)} has "
            f"none at {TIME}={at}: fill it, or declare it with past"
        )


def _index(times: pd.Series[Any]) -> Any:
    import pandas as pd

    return pd.Index(times) if pd.api.types.is_integer_dtype(times) else pd.DatetimeIndex(times)


def checked_freq(freq: str | int) -> str | int:
    """A step from one row to the next: a whole number, or a string that pandas, if it is installed, knows."""
    if not isinstance(freq, str):
        return check_size("freq", freq)
    try:
        import pandas as pd
    except ImportError:  # it is an extra, without which there are no frames
        return freq
    try:
        pd.tseries.frequencies.to_offset(freq)
    except ValueError:
        raise ValueError(
            f"freq must be a step of pandas such as 'h', 'D' or 'MS', or a whole number; got freq={freq!r}"
        ) from None
    return freq


def _freq(freq: str | int | None, spans: list[Any]) -> str | int:
    """The step from one row to the next, checked, or found in the longest series."""
    import pandas as pd

    whole = spans[0].dtype.kind in "iu"
    longest = max(spans, key=len)
    if freq is not None:
        if whole != isinstance(freq, int):
            raise TypeError(
                f"freq must be a whole number where {TIME!r} holds whole numbers, and else a step of pandas such as 'h', 'D' or 'MS'; "
                f"got freq={freq!r} and {TIME} of {spans[0].dtype}"
            )
        return check_size("freq", freq) if isinstance(freq, int) else pd.tseries.frequencies.to_offset(freq).freqstr
    if len(longest) >= 2:
        gaps = longest[1:] - longest[:-1]
        if whole:
            return int(gaps.min())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a string now and an offset in time to come: either will do
            found = pd.infer_freq(longest) if len(longest) >= 3 else None
        if found is not None:
            return pd.tseries.frequencies.to_offset(found).freqstr
        step = gaps.min()
        if not (gaps % step).any():
            return pd.tseries.frequencies.to_offset(step).freqstr
    raise ValueError(f"freq could not be found in column {TIME!r}: give it, such as freq='h', 'D', 'W-SUN' or 'MS'")


def _times(end: Any, freq: str | int, before: int, ahead: int) -> Any:
    """``before`` times up to ``end``, and ``ahead`` after it."""
    import pandas as pd

    if isinstance(freq, int):
        return pd.RangeIndex(end - (before - 1) * freq, end + ahead * freq + 1, freq)
    up_to = pd.date_range(end=end, periods=before, freq=freq)
    return up_to.append(pd.date_range(start=end, periods=ahead + 1, freq=freq)[1:]) if ahead else up_to


def _regular(
    name: str | int, times: Any, values: Float64[Tensor, "rows columns"], freq: str | int
) -> Float64[Tensor, "steps columns"]:
    """Rows on steps that follow each other, NaN where there was none."""
    import pandas as pd

    start, end = times[0], times[-1]
    steps = pd.RangeIndex(start, end + 1, freq) if isinstance(freq, int) else pd.date_range(start, end, freq=freq)
    rows = steps.get_indexer(times)
    if (rows < 0).any():
        raise ValueError(
            f"column {TIME!r} of df must rise in steps of freq={freq!r}; {ID}={name!r} has {times[int((rows < 0).argmax())]}, which is "
            f"no step after {start}: correct the dates, or give another freq"
        )
    regular = values.new_full((len(steps), values.shape[1]), torch.nan)
    regular[torch.from_numpy(rows)] = values
    return regular


def _static(static: Any, ids: tuple[str | int, ...], names: tuple[str, ...]) -> Float64[Tensor, "series constants"]:
    frame = _columns("static", static, (ID, *names))
    _check_ids("static", frame)
    for name in names:
        frame[name] = _numbers("static", frame, name)
    twice = frame[frame.duplicated(ID)]
    if len(twice):
        raise ValueError(f"static must have one row for each series; it has more for {ID}={twice[ID].iloc[0]!r}")
    found = frame.set_index(ID).reindex(list(ids))
    for name in names:
        absent = found[found[name].isna()]
        if len(absent):
            raise ValueError(
                f"column {name!r} of static must be known of every series; {ID}={absent.index[0]!r} has none"
            )
    return torch.tensor(found[list(names)].to_numpy(dtype="float64"))
