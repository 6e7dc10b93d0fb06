"""The picture of a forecasting run: a few forecasts beside the truth, and the error by step ahead."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from series_data import Table
from torch import Tensor

INK, PAST, OURS, NAIVE = "#222222", "#a0a0a0", "#d1495b", "#2e86ab"


class Example(NamedTuple):
    """Two forecasts of one window in the data's own unit, each (channels, horizon), and the row where they begin."""

    first: int
    ours: np.ndarray
    naive: np.ndarray


def draw(path: Path, table: Table, examples: list[Example], curves: tuple[Tensor, Tensor]) -> None:
    """Forecast and truth of a few windows, the errors beneath them, and the mean error by step ahead.

    Args:
        path: the PNG file to write.
        table: the data.
        examples: the windows to show; of their channels, the first three.
        curves: mean absolute error by step ahead, of the model and of the last season: each (horizon,).
    """
    channels, width, unit = min(3, len(table.names)), len(examples), table.unit and ", " + table.unit
    figure = Figure(figsize=(3.6 * width + 3.8, 3.4 * channels + 0.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[width, 1.05], wspace=0.04, squeeze=False)[0]
    grid = left.subplots(2 * channels, width, sharex=True, height_ratios=[2.2, 1] * channels, squeeze=False)
    for channel in range(channels):
        for column, example in enumerate(examples):
            draw_window(grid[2 * channel, column], grid[2 * channel + 1, column], table, example, channel)
        limit = max(abs(bound) for axes in grid[2 * channel + 1] for bound in axes.get_ylim())
        for axes in grid[2 * channel + 1]:
            axes.set_ylim(-limit, limit)
        grid[2 * channel, 0].set_ylabel(table.names[channel] + unit)
        grid[2 * channel + 1, 0].set_ylabel("error" + unit)
    for axes, example in zip(grid[0], examples, strict=True):
        axes.set_title(f"from {table.dates[example.first]:%Y-%m-%d %H:%M}")
    for axes in grid[-1]:
        axes.set_xlabel("steps ahead")
    curve = right.subplots()
    for values, colour in zip(curves, (OURS, NAIVE), strict=True):
        curve.plot(range(1, len(values) + 1), values, color=colour, lw=2.5)
    curve.set(title="mean absolute error on test" + unit, xlabel="steps ahead", ylim=(0, None))
    left.align_ylabels()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
    for axes in (*grid.flat, curve):
        axes.spines[:].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color="0.9", lw=0.8)
        axes.tick_params(length=0)
    with common.replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


def draw_window(values: Axes, errors: Axes, table: Table, example: Example, channel: int) -> None:
    """One channel of one window: the values above, the errors below."""
    horizon = example.ours.shape[1]
    past = min(example.first, max(table.season, horizon))
    truth = table.values[:, channel]
    steps, ahead = np.arange(1, horizon + 1), slice(example.first, example.first + horizon)
    values.plot(np.arange(1 - past, 2), truth[example.first - past : example.first + 1], color=PAST, lw=2, label="past")
    values.plot(steps, truth[ahead], color=INK, lw=3.5, alpha=0.75, label="truth")
    for forecast, colour, label in ((example.naive, NAIVE, "last season repeated"), (example.ours, OURS, "forecast")):
        values.plot(steps, forecast[channel], color=colour, lw=1.8, label=label)
        errors.axhline(0, color=INK, lw=0.8)
        errors.fill_between(steps, forecast[channel] - truth[ahead], color=colour, alpha=0.25, lw=0)
        errors.plot(steps, forecast[channel] - truth[ahead], color=colour, lw=1.5)
