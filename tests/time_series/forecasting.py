"""Small Forecasters and data for their tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from xformerlib import time_series as ts

LOOKBACK, HORIZON = 16, 4
QUICK: dict[str, Any] = {
    "steps": 6, "eval_every": 3, "batch_size": 8, "lr": 1e-2, "validation": 0.3, "progress": False, "device": "cpu"
}  # fmt: skip
QUANTILES = ts.Quantile((0.025, 0.1, 0.5, 0.9, 0.975))
COVARIATES: dict[str, Any] = {"past": ["load"], "future": ["price"], "static": ["size"], "calendar": ("day",)}


def quick(model: type[ts.ForecastModel] = ts.DLinear, **options: Any) -> ts.Forecaster:
    own = {ts.DLinear: {"kernel": 5}, ts.RNN: {"dim": 4, "depth": 1}}.get(model, {})
    return ts.Forecaster(model, LOOKBACK, HORIZON, **{**QUICK, **own, **options})


def with_covariates(**options: Any) -> ts.Forecaster:
    return quick(ts.RNN, **{**COVARIATES, **options})


def frame(lengths: dict[Any, int] | None = None, *, freq: str = "h", seed: int = 0) -> pd.DataFrame:
    """Series of unequal length and level, each with a wave of its own."""
    draw = np.random.default_rng(seed)
    parts = []
    for i, (name, length) in enumerate((lengths or {"a": 60, "b": 90, "c": 70}).items()):
        steps = np.arange(length)
        columns = {
            "unique_id": name,
            "ds": pd.date_range("2024-02-27", periods=length, freq=freq),
            "y": 100 * i + (i + 1) * (np.sin(steps / 4) + 0.1 * draw.normal(size=length)),
            "load": draw.normal(size=length),
            "price": 5 + draw.normal(size=length),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def static(names: str = "abc") -> pd.DataFrame:
    return pd.DataFrame({"unique_id": list(names), "size": np.arange(len(names)) ** 2})


def ahead(df: pd.DataFrame, steps: int = HORIZON, *, freq: str = "h", seed: int = 1) -> pd.DataFrame:
    """Prices after the end of each series."""
    draw = np.random.default_rng(seed)
    parts = [
        pd.DataFrame(
            {
                "unique_id": name,
                "ds": pd.date_range(own["ds"].max(), periods=steps + 1, freq=freq)[1:],
                "price": 5 + draw.normal(size=steps),
            }
        )
        for name, own in df.groupby("unique_id")
    ]
    return pd.concat(parts, ignore_index=True)
