"""Tables of numbers at dates: read, put on regular times, split by time, standardised, and cut into windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from xformerlib import time_series as ts


class Table(NamedTuple):
    """Series at regular times: ``values`` are (rows, columns), NaN where missing; a season is ``season`` rows.

    The first ``len(names)`` columns are to be forecast; after them come ``past`` covariates that are known until now only, and
    then covariates that are known ahead.
    """

    dates: pd.DatetimeIndex
    names: list[str]
    values: np.ndarray
    season: int
    unit: str = ""
    past: int = 0

    @property
    def future(self) -> int:
        """Covariates that are known ahead."""
        return self.values.shape[1] - len(self.names) - self.past


def load_temperatures() -> pd.DataFrame:
    """Temperatures of San Francisco and Seattle in °F, from files inside the package vega_datasets."""
    from vega_datasets import local_data

    frames = {"San Francisco": local_data.sf_temps(), "Seattle": local_data.seattle_temps()}
    return pd.DataFrame({name: frame.set_index("date")["temp"] for name, frame in frames.items()})


def load_csv(path: Path, date_column: str, columns: tuple[str, ...], others: tuple[str, ...] = ()) -> pd.DataFrame:
    """The columns to forecast, and then the others, as numbers, with the dates as the index."""
    if not path.is_file():
        raise ValueError(f"--data must be a CSV file; there is no file {path}")
    try:
        frame = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"--data must be a CSV file that begins with column names; {path}: {error}") from error
    frame.columns = frame.columns.str.strip()  # as in "date, load": the space is of the list, not of the name
    if frame.columns.has_duplicates:
        name = frame.columns[frame.columns.duplicated()][0]
        raise ValueError(f"columns of {path} must have different names; {name!r} comes twice")
    date_column, columns, others = date_column.strip(), *(tuple(map(str.strip, given)) for given in (columns, others))
    asked = [(date_column, "--date-column"), *((name, "--columns") for name in columns)]
    asked += [(name, "--past-columns and --future-columns") for name in others]
    for name, option in asked:
        if name not in frame:
            present = ", ".join(map(repr, frame))
            raise ValueError(f"{path} has no column {name!r}; it has {present}; choose with {option}")
    dates = pd.to_datetime(frame[date_column], errors="coerce", format="mixed")
    if dates.isna().any():
        row = int(dates.isna().to_numpy().argmax())
        cell = frame[date_column].iloc[row]
        raise ValueError(f"column {date_column!r} of {path} must hold dates; got {cell!r} in row {row + 1}")
    targets = list(columns) or [str(name) for name in frame if name not in (date_column, *others)]
    if not targets:
        raise ValueError(f"{path} has no column besides {date_column!r}; there is nothing to forecast")
    values = frame[[*targets, *others]]
    for name in values.columns:
        if not pd.api.types.is_numeric_dtype(values[name]):
            cell = values[name][pd.to_numeric(values[name], errors="coerce").isna() & values[name].notna()].iloc[0]
            raise ValueError(
                f"columns to forecast must hold numbers; {name!r} of {path} holds {cell!r}; "
                "leave the column out by naming the others with --columns"
            )
    return values.astype(float).set_axis(pd.DatetimeIndex(dates))


def regular(frame: pd.DataFrame, season: int | None = None, *, unit: str = "", past: int = 0, future: int = 0) -> Table:
    """Put rows on regular times; what is missing is NaN. The last ``past + future`` columns are covariates."""
    dates = pd.DatetimeIndex(frame.index)
    if len(dates) < 2:
        raise ValueError(f"the table is too short: it needs 2 rows or more; got {len(dates)}")
    gaps = dates[1:] - dates[:-1]
    step = gaps.min()
    if step <= pd.Timedelta(0):
        row = int(gaps.argmin()) + 1
        raise ValueError(f"dates must rise; row {row + 1} ({dates[row]}) comes after row {row} ({dates[row - 1]})")
    uneven = np.flatnonzero(gaps % step)
    if uneven.size:
        row = int(uneven[0]) + 1
        raise ValueError(
            f"dates must be equal steps apart ({step}); row {row + 1} ({dates[row]}) is off by a part of one"
        )
    frame = frame.reindex(pd.date_range(dates[0], dates[-1], freq=step)).replace([np.inf, -np.inf], np.nan)
    for name in frame:
        if frame[name].isna().all():
            raise ValueError(f"columns to forecast must hold numbers; {name!r} is empty; choose others with --columns")
    targets = frame.shape[1] - past - future
    known = frame.iloc[:, targets + past :].isna()
    if known.any(axis=None):
        row = int(known.any(axis=1).to_numpy().argmax())
        raise ValueError(
            f"--future-columns must be known in every row; row {row + 1} ({frame.index[row]}) is not: fill it"
        )
    names = [str(name) for name in frame.columns[:targets]]
    season = season or rows_in_season(step)
    return Table(pd.DatetimeIndex(frame.index), names, frame.to_numpy(), season, unit, past)


def with_calendar(table: Table, cycles: tuple[str, ...]) -> Table:
    """The table with the phases of its dates in the cycles of the calendar as further covariates that are known ahead."""
    phases = ts.calendar_features(table.dates, cycles).numpy()
    return table._replace(values=np.concatenate([table.values, phases], axis=1))


def rows_in_season(step: pd.Timedelta) -> int:
    """Rows in a day; for daily rows, in a week."""
    for season in (pd.Timedelta(days=1), pd.Timedelta(days=7)):
        if step < season and season % step == pd.Timedelta(0):
            return int(season / step)
    raise ValueError(f"rows {step} apart do not divide a day or a week; give --season in rows (for weekly rows, 52)")


def split_rows(table: Table, split: tuple[float, float, float], lookback: int, horizon: int) -> dict[str, range]:
    """Rows of train, validation and test, in order of time.

    Validation and test begin one look-back early, so that the first row they *forecast* is the first that is theirs. Shares
    (all <= 1) are of the rows; numbers of rows are taken as they are, and rows after them are not used.
    """
    rows, size = len(table.dates), lookback + horizon
    counts = [int(share * rows) if max(split) <= 1 else int(share) for share in split]
    if min(split) <= 0 or sum(counts) > rows:
        raise ValueError(f"--split must be positive shares (sum <= 1) or numbers of rows (sum <= {rows}); got {split}")
    first, second, third = (int(end) for end in np.cumsum(counts))
    parts = {
        "train": range(first),
        "validation": range(first - lookback, second),
        "test": range(second - lookback, third),
    }
    for name, part in parts.items():
        if len(part) < size or part.start < 0:
            raise ValueError(
                f"the table is too short: {name} has {len(part)} of its {rows} rows, and a single window takes {size} "
                f"(--lookback {lookback} + --horizon {horizon}); give more rows, or shorten these"
            )
        own = table.values[part.start + (lookback if name != "train" else 0) : part.stop, : len(table.names)]
        seen = np.isfinite(own)
        lowest, highest = (np.where(seen, own, fill).T for fill in (np.inf, -np.inf))
        useless = ~seen.any(0) | ((highest.max(1) <= lowest.min(1)) & (name == "train"))
        if useless.any():
            raise ValueError(
                "columns to forecast must have values in train, validation and test, and vary in train; "
                f"{table.names[int(useless.argmax())]!r} does not in {name}; name others with --columns, or move --split"
            )
    return parts


class Changes(ts.Windows):
    """Windows of how each value differs from the one a season before it (seasonal differencing, Box and Jenkins 1970).

    A model sees a season less, and forecasts how the next values differ from the last season repeated. Errors are those of values.

    Args:
        season: steps.
        values, lookback, horizon, **others: as in ``Windows``; the look-back holds more than a season.
    """

    def __init__(self, values: Tensor, lookback: int, horizon: int, season: int, **others: Any) -> None:
        super().__init__(values, lookback, horizon, **others)
        self.naive = ts.SeasonalNaive(self.channels, lookback, horizon, season=season)

    def batch(self, indices: Any) -> ts.Batch:
        """The changes in the windows of these indices."""
        whole, season = super().batch(indices), self.naive.season
        return ts.Batch(
            x=whole.x[:, season:] - whole.x[:, :-season],
            target=whole.target - self.level(indices),
            future=None if whole.future is None else whole.future[:, season:],
        )

    def level(self, indices: Any) -> Tensor:
        """What is to be added to forecasts for them to be of the values themselves."""
        return self.naive(super().batch(indices).x[..., : self.channels])


def standardise(table: Table, train: range) -> tuple[Tensor, Tensor, Tensor]:
    """Values off the mean and the standard deviation that their columns have in training rows, and these two, (columns,)."""
    rows = table.values[train.start : train.stop]
    mean, std = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
    std = np.where(std > 0, std, 1)
    return tuple(torch.tensor(x) for x in ((table.values - mean) / std, mean, std))  # type: ignore[return-value]
