"""Errors of forecasts over every window: sums, means, and a table beside a baseline."""

from __future__ import annotations

from typing import NamedTuple

import torch
from series_data import Table
from torch import Tensor

from xformerlib import time_series as ts


class Score(NamedTuple):
    """Errors summed over windows, on standardised values, and their number: each (horizon, channels), in fp64."""

    absolute: Tensor
    squared: Tensor
    number: Tensor

    def mae(self) -> float:
        """Mean absolute error over windows, steps and channels."""
        return float(self.absolute.sum() / self.number.sum())

    def mse(self) -> float:
        """Mean squared error over windows, steps and channels."""
        return float(self.squared.sum() / self.number.sum())

    def mae_by_channel(self, scale: Tensor) -> Tensor:
        """Mean absolute error of each channel in the data's own unit: (channels,)."""
        return self.absolute.sum(0) / self.number.sum(0) * scale

    def mae_by_step(self, scale: Tensor) -> Tensor:
        """Mean absolute error of each step ahead in the data's own unit, the mean of the channels': (horizon,)."""
        return (self.absolute / self.number * scale).nanmean(1)


@torch.inference_mode()
def score(model: ts.ForecastModel, windows: ts.Windows, batch_size: int) -> Score:
    """Score the forecast of every window where a value was observed; ``batch_size`` makes no difference."""
    model.eval()
    sums: Tensor | float = 0.0
    for batch in windows.batches(batch_size):
        seen = ~batch.target.isnan()
        error = (model.head.point(model(**batch.inputs)) - batch.target).double().masked_fill(~seen, 0)
        sums += torch.stack([error.abs(), error.square(), seen.double()]).sum(1)
    assert isinstance(sums, Tensor)
    return Score(*sums.cpu())


def summary(table: Table, ours: Score, naive: Score, scale: Tensor) -> str:
    """Test errors of the model and of the last season repeated, side by side."""
    columns = []
    for s in (ours, naive):
        by_channel = s.mae_by_channel(scale)
        columns.append([*by_channel, by_channel.mean(), torch.tensor(s.mae()), torch.tensor(s.mse())])
    names = [*table.names, "mean of channels", "standardised MAE", "standardised MSE"]
    lines = [f"{'test MAE' + (table.unit and ', ' + table.unit):<22}{'model':>10}{'last season':>14}{'ratio':>8}"]
    for name, a, b in zip(names, *columns, strict=True):
        lines.append(f"{name[:21]:<22}{a:>10.4g}{b:>14.4g}{a / b:>8.2f}")
    return "\n".join(lines)
