"""What a long frame may be, and what it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.time_series.forecasting import HORIZON, ahead, frame, quick, static, with_covariates

Change = Callable[[pd.DataFrame], pd.DataFrame]


@pytest.mark.parametrize("freq", ["h", "30min", "D", "B", "W-SUN", "W-MON", "MS", "ME", "QS-FEB", "YS", "2h", "7D"])
@pytest.mark.parametrize("given", [False, True])
def test_steps_of_any_kind(freq: str, given: bool) -> None:
    df = frame({"a": 60, "b": 45}, freq=freq)
    forecast = quick(freq=freq if given else None).fit(df).predict()
    for name, own in df.groupby("unique_id"):
        expected = pd.date_range(own["ds"].iloc[-1], periods=HORIZON + 1, freq=freq)[1:]
        assert forecast[forecast["unique_id"] == name]["ds"].tolist() == list(expected)
    table = quick(freq=freq if given else None).cross_validate(df, windows=2)
    assert table.merge(df, on=["unique_id", "ds", "y"]).shape[0] == len(table)


def test_data_to_forecast_from_has_the_steps_that_were_fitted() -> None:
    df = frame()
    forecaster = quick().fit(df)
    one = forecaster.predict(df=df.groupby("unique_id").head(1))
    assert one["ds"].tolist() == list(pd.date_range("2024-02-27 01:00", periods=HORIZON, freq="h")) * 3
    with pytest.raises(ValueError, match=r"must rise in steps of freq='h'; unique_id='a' has 2024-02-27 00:30:00"):
        forecaster.predict(df=frame(freq="30min"))


def test_times_may_be_whole_numbers(tmp_path: Any) -> None:
    df = frame({"a": 60, "b": 45})
    dates = quick().fit(df).predict()
    df["ds"] = 7 + 5 * df.groupby("unique_id").cumcount()
    forecaster = quick().fit(df)
    forecast = forecaster.predict()
    assert forecast["ds"].tolist() == [7 + 5 * t for n in (60, 45) for t in range(n, n + HORIZON)]
    assert forecast["DLinear"].tolist() == dates["DLinear"].tolist()
    forecaster.save(tmp_path / "model.pt")
    pd.testing.assert_frame_equal(type(forecaster).load(tmp_path / "model.pt").predict(), forecast, check_exact=True)
    assert quick().cross_validate(df)["cutoff"].tolist() == [7 + 5 * t for t in (55, 40) for _ in range(HORIZON)]
    with pytest.raises(TypeError, match="freq must be a whole number where 'ds' holds whole numbers"):
        quick(freq="h").fit(df)
    with pytest.raises(ValueError, match="freq must be >= 1; got freq=0"):
        quick(freq=0).fit(df)
    with pytest.raises(ValueError, match=r"calendar=.* needs dates; column 'ds' holds whole numbers"):
        with_covariates().fit(df, static())


def test_times_may_have_a_zone(tmp_path: Any) -> None:
    df = frame({"a": 800, "b": 700})
    local = df.assign(ds=df["ds"].dt.tz_localize("UTC").dt.tz_convert("Europe/Berlin"))  # a clock is changed meanwhile
    forecaster = quick(steps=1).fit(local)
    forecast = forecaster.predict()
    utc = quick(steps=1).fit(df).predict()
    assert forecast["ds"].dt.tz_convert("UTC").dt.tz_localize(None).tolist() == utc["ds"].tolist()
    assert forecast["DLinear"].tolist() == utc["DLinear"].tolist()
    forecaster.save(tmp_path / "model.pt")
    pd.testing.assert_frame_equal(type(forecaster).load(tmp_path / "model.pt").predict(), forecast, check_exact=True)


@pytest.mark.parametrize("kind", ["int", "category", "string", "object"])
def test_kinds_of_ids(kind: str) -> None:
    df = frame({1: 50, 2: 60}) if kind == "int" else frame({"1": 50, "2": 60}).astype({"unique_id": kind})
    forecast = quick().fit(df).predict()
    assert forecast["unique_id"].tolist() == [1 if kind == "int" else "1"] * 4 + [2 if kind == "int" else "2"] * 4


def test_kinds_of_numbers() -> None:
    df = frame().assign(y=lambda x: x["y"].round() + 10, price=lambda x: x["price"] > 5)
    expected = with_covariates().fit(df.astype({"price": float}), static())
    future = ahead(df).assign(price=lambda x: x["price"] > 5)
    forecast = expected.predict(future=future.astype({"price": float}))["RNN"]
    kinds = df.astype({"y": "Int64", "load": "Float64"})
    assert with_covariates().fit(kinds, static()).predict(future=future)["RNN"].tolist() == forecast.tolist()
    holes = kinds["y"].mask(kinds.index == 30)
    assert (
        holes.isna().any() and with_covariates().fit(kinds.assign(y=holes), static()).predict(future=future) is not None
    )


def test_a_gap_in_time_is_missing_values() -> None:
    df = frame()
    shorter = df.drop(index=[10, 11, 12, 80])
    holes = df.assign(y=df["y"].mask(df.index.isin([10, 11, 12, 80])))
    assert quick().fit(shorter).predict().equals(quick().fit(holes).predict())


def test_more_columns_and_another_index_change_nothing() -> None:
    df = frame()
    other = df.assign(colour="red").set_index(pd.Index(range(7, 7 + len(df))))[["colour", "y", "ds", "unique_id"]]
    assert quick().fit(other).predict().equals(quick().fit(df).predict())


def put(column: str, row: int, value: Any) -> Change:
    def change(df: pd.DataFrame) -> pd.DataFrame:
        df = df.astype({column: object}) if isinstance(value, str) else df.copy()
        df.loc[row, column] = value
        return df

    return change


BAD: dict[str, tuple[Change, type[Exception], str]] = {
    "no column": (
        lambda df: df.drop(columns="y"),
        ValueError,
        "df must have a column 'y'; it has 'unique_id', 'ds', 'load'",
    ),
    "no covariate": (lambda df: df.drop(columns="price"), ValueError, "df must have a column 'price'"),
    "no rows": (lambda df: df[:0], ValueError, "df must have rows; got none"),
    "a column": (lambda df: df["y"], TypeError, "df must be a pandas frame.*; got Series"),
    "twice": (
        lambda df: pd.concat([df, df[5:6]]),
        ValueError,
        "at most one row for a 'ds'; unique_id='a' has more at 2024-02-27 05:00:00: drop or aggregate",
    ),
    "dates as text": (
        lambda df: df.astype({"ds": str}),
        TypeError,
        "column 'ds' of df must hold dates .* such as '2024-02-27 00:00:00': convert it with pandas.to_datetime",
    ),
    "no date": (put("ds", 9, pd.NaT), ValueError, "column 'ds' of df must be known in every row; row 9 has none"),
    "off the grid": (
        put("ds", 9, pd.Timestamp("2024-02-27 09:30")),
        ValueError,
        "column 'ds' of df must rise in steps of freq='h'; unique_id='a' has 2024-02-27 09:30:00, which is no step after",
    ),
    "no id": (put("unique_id", 3, np.nan), ValueError, "column 'unique_id' of df must be known in every row; row 3"),
    "ids of no kind": (lambda df: df.assign(unique_id=0.5), TypeError, "column 'unique_id' of df .*; got floating"),
    "text": (put("y", 4, "many"), TypeError, "column 'y' of df must hold numbers; got object, such as 'many' in row 4"),
    "infinity": (
        put("load", 4, np.inf),
        ValueError,
        "column 'load' of df must be finite, or NaN .*; row 4 is infinite",
    ),
    "a price that is not known": (
        put("price", 4, np.nan),
        ValueError,
        "column 'price' of df must be known at every step, since it was declared with future; unique_id='a' has none at ds=2024-02-27 04",
    ),
    "a price of a time that is absent": (
        lambda df: df.drop(index=4),
        ValueError,
        "column 'price' of df must be known at every step.* unique_id='a' has none at ds=2024-02-27 04:00:00: fill it",
    ),
    "nothing observed": (
        lambda df: df.assign(y=df["y"].mask(df["unique_id"] == "b")),
        ValueError,
        "column 'y' of df holds no value for unique_id='b': leave the series out",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_frame_is_refused(name: str) -> None:
    change, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        with_covariates(freq="h").fit(change(frame()), static())


def test_steps_that_cannot_be_found_are_asked_for() -> None:
    days = pd.to_datetime(["2024-01-01", "2024-01-03", "2024-01-06", "2024-01-10"])
    df = pd.DataFrame({"unique_id": "a", "ds": days, "y": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(ValueError, match="freq could not be found in column 'ds': give it"):
        quick().fit(df)
    with pytest.raises(ValueError, match="freq could not be found"):
        quick().fit(df[:1])
    with pytest.raises(TypeError, match=r"freq must be a whole number .*; got freq=3"):
        quick(freq=3).fit(df)


BAD_FUTURE: dict[str, tuple[Change, type[Exception], str]] = {
    "no column": (lambda df: df.drop(columns="price"), ValueError, "future must have a column 'price'"),
    "too short": (
        lambda df: df.groupby("unique_id").head(3),
        ValueError,
        "column 'price' of future must be known at each of the 4 steps after the last .*; unique_id='a' has none at ds=2024-02-29 15",
    ),
    "another series": (lambda df: df[df["unique_id"] != "c"], ValueError, "unique_id='c' has none at ds="),
    "unknown": (put("price", 2, np.nan), ValueError, "unique_id='a' has none at ds=2024-02-29 14"),
    "twice": (lambda df: pd.concat([df, df[:1]]), ValueError, "each 'unique_id' of future must have at most one row"),
    "whole numbers": (
        lambda df: df.assign(ds=range(len(df))),
        TypeError,
        "column 'ds' of future must be of the kind that was fitted",
    ),
    "an array": (lambda df: df["price"].to_numpy(), TypeError, "future must be a pandas frame"),  # type: ignore[dict-item, return-value]
    "text": (put("price", 0, "dear"), TypeError, "column 'price' of future must hold numbers; .*'dear' in row 0"),
}


@pytest.mark.parametrize("name", BAD_FUTURE)
def test_a_bad_future_is_refused(name: str) -> None:
    change, kind, message = BAD_FUTURE[name]
    df = frame()
    with pytest.raises(kind, match=message):
        with_covariates(steps=1).fit(df, static()).predict(future=change(ahead(df)))


def test_a_future_may_hold_more() -> None:
    df = frame()
    forecaster = with_covariates().fit(df, static())
    more = pd.concat([ahead(df, 9).assign(colour="red"), ahead(df, 9).assign(unique_id="other")])
    few = more.groupby("unique_id").head(HORIZON)
    assert forecaster.predict(future=more).equals(forecaster.predict(future=few))


BAD_STATIC: dict[str, tuple[Change, type[Exception], str]] = {
    "no column": (lambda df: df.drop(columns="size"), ValueError, "static must have a column 'size'"),
    "no row": (
        lambda df: df[:2],
        ValueError,
        "column 'size' of static must be known of every series; unique_id='c' has none",
    ),
    "unknown": (put("size", 1, np.nan), ValueError, "column 'size' of static must be known .*; unique_id='b' has none"),
    "twice": (
        lambda df: pd.concat([df, df]),
        ValueError,
        "static must have one row for each series; it has more for unique_id='a'",
    ),
    "text": (put("size", 0, "big"), TypeError, "column 'size' of static must hold numbers; got object, such as 'big'"),
}


@pytest.mark.parametrize("name", BAD_STATIC)
def test_bad_statics_are_refused(name: str) -> None:
    change, kind, message = BAD_STATIC[name]
    with pytest.raises(kind, match=message):
        with_covariates().fit(frame(), change(static()))
