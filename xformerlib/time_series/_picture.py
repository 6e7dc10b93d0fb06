"""Pictures of forecasts, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._arguments import check_size
from ._frames import ID, TARGET, TIME

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FORECAST = "#222222", "#d1495b"


@dataclass(frozen=True)
class Picture:
    """One series: its times and values, and each forecast of it, as times and columns."""

    title: str
    times: Any
    values: Any
    forecasts: list[tuple[Any, dict[str, Any]]]


def draw(df: Any, forecast: Any, name: str, series: int | SequenceOf[Any], history: int) -> Figure:
    """A figure with one picture above the other; see ``Forecaster.plot``."""
    from matplotlib.figure import Figure

    pictures = list((_of_frames if hasattr(forecast, "columns") else _of_arrays)(df, forecast, name, series))
    figure = Figure(figsize=(9, 2.4 * len(pictures)), layout="constrained")
    grid = figure.subplots(len(pictures), 1, squeeze=False)[:, 0]
    for axes, picture in zip(grid, pictures, strict=True):
        _draw(axes, picture, name, history)
    handles, labels = grid[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside upper left", ncols=len(once), frameon=False)
    return figure


def _draw(axes: Axes, picture: Picture, name: str, history: int) -> None:
    """The values, and each forecast with its intervals: the wider, the paler."""
    import numpy as np
    from matplotlib.dates import ConciseDateFormatter

    first = min(times[0] for times, _ in picture.forecasts)
    last = max(times[-1] for times, _ in picture.forecasts)
    before = int((picture.times < first).sum())
    shown = slice(max(before - history, 0), int((picture.times <= last).sum()))
    axes.plot(picture.times[shown], picture.values[shown], color=INK, lw=1.5, label=TARGET)
    for times, columns in picture.forecasts:
        levels = [key.removeprefix(f"{name}-lo-") for key in columns if key.startswith(f"{name}-lo-")]
        for level in levels:
            lower, upper = columns[f"{name}-lo-{level}"], columns[f"{name}-hi-{level}"]
            alpha = 0.12 + 0.8 * (1 - float(level) / 100)
            axes.fill_between(times, lower, upper, color=FORECAST, alpha=alpha, lw=0, label=f"{level}%")
        axes.plot(times, columns[name], color=FORECAST, lw=1.8, label=name)
    if np.asarray(first).dtype.kind == "M":
        axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))
    axes.set_title(picture.title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", lw=0.8)


def _of_frames(df: Any, forecast: Any, name: str, series: int | SequenceOf[Any]) -> Iterator[Picture]:
    _check_columns(forecast.columns, name)
    present = forecast[ID].unique().tolist()
    for one in _chosen(present, series):
        rows, own = df[df[ID] == one].sort_values(TIME), forecast[forecast[ID] == one]
        parts = [part for _, part in own.groupby("cutoff")] if "cutoff" in own else [own]
        columns = [column for column in own if column.startswith(name)]
        forecasts = [(part[TIME].to_numpy(), {c: part[c].to_numpy() for c in columns}) for part in parts]
        yield Picture(str(one), rows[TIME].to_numpy(), rows[TARGET].to_numpy(dtype=float), forecasts)


def _of_arrays(df: Any, forecast: dict[str, Any], name: str, series: int | SequenceOf[Any]) -> Iterator[Picture]:
    import numpy as np

    _check_columns(forecast, name)
    many = isinstance(df, list | tuple) or df.ndim == 3
    data = [np.asarray(part) for part in (df if many else [df])]
    numbers = {key: np.asarray(value) if many else np.asarray(value)[None] for key, value in forecast.items()}
    for one in _chosen(list(range(len(data))), series):
        values = data[one] if data[one].ndim == 2 else data[one][:, None]
        own = {key: value[one] for key, value in numbers.items() if key.startswith(name)}
        cutoffs = numbers["cutoff"][one] if "cutoff" in numbers else None
        for channel in range(1 if data[one].ndim == 1 else own[name].shape[-1]):
            columns = own if data[one].ndim == 1 else {key: value[..., channel] for key, value in own.items()}
            if cutoffs is None:
                forecasts = [(np.arange(len(values), len(values) + len(columns[name])), columns)]
            else:
                forecasts = [
                    (
                        np.arange(cut + 1, cut + 1 + columns[name].shape[1]),
                        {key: value[i] for key, value in columns.items()},
                    )
                    for i, cut in enumerate(cutoffs)
                ]
            title = [f"series {one}"] * many + [f"channel {channel}"] * (data[one].ndim == 2)
            yield Picture(", ".join(title), np.arange(len(values)), values[:, channel], forecasts)


def _check_columns(columns: Any, name: str) -> None:
    if name not in columns:
        raise ValueError(
            f"forecast must be what predict or cross_validate returned, with {name!r}; it has {list(columns)}"
        )


def _chosen(present: list[Any], series: int | SequenceOf[Any]) -> list[Any]:
    if isinstance(series, int):
        return present[: check_size("series", series)]
    for one in series:
        if one not in present:
            raise ValueError(f"series must be some of those that were forecast; got {one!r}")
    return list(series)
