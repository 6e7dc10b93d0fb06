from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from tests.time_series import test_contract as contract
from tests.time_series.forecasting import COVARIATES, HORIZON, LOOKBACK, ahead, frame, quick, static, with_covariates
from tests.time_series.test_contract import CASES, Case, ids
from xformerlib import time_series as ts


@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("count", [None, 2])
def test_arrays_come_back_as_they_came(columns: int | None, count: int | None) -> None:
    draw = np.random.default_rng(0)
    shapes = [(60,) if columns is None else (60, columns), (50,) if columns is None else (50, columns)]
    series = [draw.normal(size=shape).cumsum(0) for shape in shapes]
    data: Any = series if count else series[0]
    front = (count,) if count else ()
    back = () if columns is None else (columns,)
    forecaster = quick(validation=20).fit(data)
    forecast = forecaster.predict(3)
    assert list(forecast)[:3] == ["DLinear", "DLinear-lo-80", "DLinear-hi-80"]
    assert all(isinstance(c, np.ndarray) and c.shape == (*front, 3, *back) for c in forecast.values())
    table = forecaster.cross_validate(data, windows=2, step=5)
    assert table["cutoff"].shape == (*front, 2) and table["DLinear"].shape == (*front, 2, HORIZON, *back)
    cut = table["cutoff"][0] if count else table["cutoff"]
    assert cut.tolist() == [50, 55]
    own = table["y"][0] if count else table["y"]
    assert np.array_equal(own[1], series[0][56:60])
    assert len(forecaster.plot(data, table).axes) == (count or 1) * (columns or 1)
    assert len(forecaster.plot(data, forecast, series=1).axes) == (columns or 1)
    tensors = [torch.from_numpy(x) for x in series] if count else torch.from_numpy(series[0])
    again = quick(validation=20).fit(tensors).predict(3)
    for name, values in again.items():
        assert isinstance(values, torch.Tensor)
        assert_close(values.float(), torch.from_numpy(forecast[name]))  # computed in fp32


def test_arrays_and_frames_forecast_the_same(tmp_path: Path) -> None:
    df, constants = frame(), static()
    future = ahead(df)
    columns = ["y", "load", "price"]
    arrays = [own[columns].to_numpy() for _, own in df.groupby("unique_id")]
    known = [own[["price"]].to_numpy() for _, own in future.groupby("unique_id")]
    fixed = constants[["size"]].to_numpy()
    one = with_covariates(calendar=()).fit(df, constants)
    other = with_covariates(calendar=(), past=1, future=1, static=1).fit(arrays, fixed)
    forecast, expected = other.predict(future=known), one.predict(future=future)
    for name, values in forecast.items():
        assert values.flatten().tolist() == expected[name].tolist()
    other.save(tmp_path / "model.pt")
    loaded = ts.Forecaster.load(tmp_path / "model.pt").predict(future=known)
    assert all(np.array_equal(loaded[name], values) for name, values in forecast.items())
    fresh = other.predict(future=known, df=arrays, static=fixed)
    assert all(np.array_equal(fresh[name], values) for name, values in forecast.items())


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_every_model_works_with_all_that_it_takes(case: Case) -> None:
    draw = np.random.default_rng(0)
    counts = {name: size for name, size in contract.COVARIATES.items() if case.takes(name)}
    columns = contract.CHANNELS + counts.get("past", 0) + counts.get("future", 0)
    data = [draw.normal(size=(steps, columns)) for steps in (70, 50, 20)]
    data[0][[3, 30, 31], 0] = np.nan
    known = [draw.normal(size=(contract.HORIZON, counts["future"])) for _ in data] if "future" in counts else None
    fixed = draw.normal(size=(len(data), counts["static"])) if "static" in counts else None
    options = {"steps": 2, "eval_every": 1, "head": ts.StudentT()} if case.takes("head") else {}
    forecaster = ts.Forecaster(
        case.model,
        contract.LOOKBACK,
        contract.HORIZON,
        **counts,
        **options,
        **case.options,
        device="cpu",
        progress=False,
    )
    forecast = forecaster.fit(data, fixed).predict(4, future=known, level=(80,) if case.takes("head") else ())
    assert forecast[case.model.__name__].shape == (len(data), 4, contract.CHANNELS)
    assert all(np.isfinite(values).all() for values in forecast.values())


def test_pandas_is_not_needed_for_arrays(tmp_path: Path) -> None:
    code = f"""
import sys
import torch
import xformerlib.time_series as ts
x = torch.randn(80)
f = ts.Forecaster(ts.DLinear, {LOOKBACK}, {HORIZON}, steps=2, progress=False).fit(x)
f.predict(), f.cross_validate(x, 2)
f.save(sys.argv[1]); ts.Forecaster.load(sys.argv[1])
assert "pandas" not in sys.modules and "matplotlib" not in sys.modules
"""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


BAD_ARRAYS: dict[str, tuple[Any, type[Exception], str]] = {
    "infinity": (np.array([1.0, np.inf] * 40), ValueError, "the data must be finite, or NaN"),
    "objects": (np.array(["a"] * 40), TypeError, "the data must hold numbers"),
    "bools": (np.ones(40, dtype=bool), TypeError, "the data must hold real numbers; got torch.bool"),
    "a list of numbers": ([1.0, 2.0], TypeError, r"the data must be a pandas frame, an array .*; item 0 is float"),
    "no series": ([], ValueError, "the data must hold at least one series"),
    "4-D": (np.zeros((2, 3, 4, 5)), TypeError, "it is"),
    "columns": ([np.zeros((40, 2)), np.zeros((40, 3))], ValueError, "series 0 has 2 and series 1 has 3"),
    "empty": ([np.zeros(40), np.full(40, np.nan)], ValueError, "series 1 has no value that was observed"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_refused(name: str) -> None:
    data, kind, message = BAD_ARRAYS[name]
    with pytest.raises(kind, match=message):
        quick().fit(data)


def test_bad_covariates_of_arrays_are_refused() -> None:
    draw = np.random.default_rng(0)
    data = draw.normal(size=(60, 3))
    options = {**COVARIATES, "past": 1, "future": 1, "static": 2, "calendar": ()}
    with pytest.raises(ValueError, match="the data must have targets beside 1 past and 1 future covariates"):
        with_covariates(**options).fit(data[:, :2], np.zeros((1, 2)))
    holes = data.copy()
    holes[7, 2] = np.nan
    with pytest.raises(
        ValueError, match=r"known-future covariates must be known at every step; the series has none .*at step 7"
    ):
        with_covariates(**options).fit(holes, np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"static must be \(1, 2\), one row for each series; got \(2, 2\)"):
        with_covariates(**options).fit(data, np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"static must be known of every series; got NaN"):
        with_covariates(**options).fit(data, np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match=r"calendar=.* needs dates, which arrays do not have"):
        with_covariates(**{**options, "calendar": ("day",)}).fit(data, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="freq is for frames"):
        quick(freq="h").fit(data)
    fitted = with_covariates(**options).fit(data, np.zeros(2))
    with pytest.raises(ValueError, match=r"future must be \(4, 1\), the horizon .*; that of the series is \(3, 1\)"):
        fitted.predict(future=np.zeros((3, 1)))
    with pytest.raises(ValueError, match="df must have the 1 targets that were fitted; got 2"):
        fitted.predict(future=np.zeros((4, 1)), df=np.zeros((40, 4)), static=np.zeros(2))
