from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from tests.closeness import assert_close
from tests.time_series.forecasting import (
    HORIZON,
    LOOKBACK,
    QUANTILES,
    ahead,
    frame,
    quick,
    static,
    with_covariates,
)
from xformerlib import time_series as ts

HEADS = [ts.Point(), ts.StudentT(), QUANTILES]
every_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)


def same(a: Any, b: Any) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def close(a: Any, b: Any, **options: float) -> None:
    """Numbers are close, as they are computed in fp32, and the rest is the same."""
    numbers = list(b.select_dtypes("number"))
    same(a.drop(columns=numbers), b.drop(columns=numbers))
    assert_close(*(torch.tensor(x[numbers].to_numpy(), dtype=torch.float32) for x in (a, b)), **options)


@every_head
def test_a_forecast_is_a_long_frame(head: ts.Head) -> None:
    df = frame()
    forecast = quick(head=head).fit(df).predict(level=(80, 95))
    sides = [f"DLinear-{side}-{level}" for level in (80, 95) for side in ("lo", "hi")]
    assert list(forecast) == ["unique_id", "ds", "DLinear", *sides]
    for name, own in forecast.groupby("unique_id"):
        last = df[df["unique_id"] == name]["ds"].max()
        assert own["ds"].tolist() == list(pd.date_range(last, periods=HORIZON + 1, freq="h")[1:])
    assert forecast["ds"].dtype == df["ds"].dtype
    assert forecast.drop(columns="unique_id").notna().all(axis=None)


@every_head
def test_levels_are_nested_and_any_are_given_that_can_be(head: ts.Head) -> None:
    forecaster = quick(head=head).fit(frame())
    columns = forecaster.predict(level=(95, 80))
    assert list(columns)[3] == "DLinear-lo-95"
    order = columns[["DLinear-lo-95", "DLinear-lo-80", "DLinear", "DLinear-hi-80", "DLinear-hi-95"]].to_numpy()
    assert (np.diff(order, axis=1) >= 0).all() and (np.diff(order, axis=1)[:, [0, 3]] > 0).any()
    same(forecaster.predict(), forecaster.predict(level=(80, 95)))
    assert list(forecaster.predict(level=())) == ["unique_id", "ds", "DLinear"]


def test_what_a_head_cannot_tell_is_refused_by_name() -> None:
    df = frame()
    deciles = quick(head=ts.Quantile()).fit(df)
    assert [c for c in deciles.predict() if "-lo-" in c] == ["DLinear-lo-80"]
    with pytest.raises(ValueError, match=r"level=95 is made of the quantiles 0.025, 0.975; the head has 0.1, 0.2"):
        deciles.predict(level=(80, 95))
    blind = quick(validation=0).fit(df)
    assert list(blind.predict()) == ["unique_id", "ds", "DLinear"]
    with pytest.raises(ValueError, match="level=80 of a Point head is made of the errors on a validation part"):
        blind.predict(level=(80,))
    with pytest.raises(ValueError, match=r"level=99\.5 needs more errors .*: 199 at each step"):
        quick().fit(df).predict(level=(99.5,))
    for level in ((0,), (100,), ("80",), 80):
        with pytest.raises(ValueError, match="level must be percentages between 0 and 100"):
            deciles.predict(level=level)  # type: ignore[arg-type]


def test_a_shorter_forecast_is_the_beginning_of_the_long_one() -> None:
    forecaster = quick().fit(frame())
    whole = forecaster.predict()
    short = forecaster.predict(2)
    same(short, whole.groupby("unique_id").head(2).reset_index(drop=True))
    with pytest.raises(ValueError, match=r"h must be <= horizon=4; got h=5. Build a Forecaster with a longer horizon"):
        forecaster.predict(5)
    with pytest.raises(ValueError, match="h must be >= 1; got h=0"):
        forecaster.predict(0)


def test_the_order_of_rows_does_not_matter() -> None:
    df = frame()
    mixed = df.sample(frac=1, random_state=0)
    same(with_covariates().fit(mixed, static("cab").iloc[[2, 0, 1]].assign(size=[1, 2, 3])).predict(future=ahead(df)),
         with_covariates().fit(df, static("bca").assign(size=[1, 2, 3])).predict(future=ahead(df).sample(frac=1)))  # fmt: skip


def test_a_forecast_depends_on_its_own_series_alone() -> None:
    df = frame()
    forecaster = with_covariates().fit(df, static())
    future = ahead(df)
    together = forecaster.predict(future=future, df=df, static=static())
    same(together, forecaster.predict(future=future))
    names = {"a": "z", "b": "y", "c": "x"}
    renamed, constants, known = (x.assign(unique_id=x["unique_id"].map(names)) for x in (df, static(), future))
    other = forecaster.predict(future=known, df=renamed, static=constants)
    back = {new: old for old, new in names.items()}
    other = other.assign(unique_id=other["unique_id"].map(back)).sort_values(["unique_id", "ds"], ignore_index=True)
    close(other, together)
    alone = forecaster.predict(future=future, df=df[df["unique_id"] == "b"], static=static())
    close(alone, together[together["unique_id"] == "b"].reset_index(drop=True))


def test_the_batch_size_of_predictions_changes_nothing() -> None:
    df = frame({f"s{i}": 40 + i for i in range(9)})
    forecasts = [quick(ts.RNN, head=ts.StudentT(), eval_batch_size=size).fit(df).predict() for size in (2, 5, 256)]
    for one in forecasts[1:]:
        close(one, forecasts[0])


@every_head
def test_units_are_those_of_the_data(head: ts.Head) -> None:
    df = frame()
    first = quick(head=head).fit(df).predict()
    second = quick(head=head).fit(df.assign(y=1000 + 50 * df["y"])).predict()
    numbers = list(first)[2:]
    close(second[numbers], 1000 + 50 * first[numbers])


@pytest.mark.parametrize("covariates", [False, True])
@every_head
def test_saved_and_loaded_it_forecasts_the_same(head: ts.Head, covariates: bool, tmp_path: Path) -> None:
    df = frame()
    forecaster = with_covariates(head=head) if covariates else quick(head=head)
    known = {"future": ahead(df)} if covariates else {}
    forecast = forecaster.fit(df, static() if covariates else None).predict(**known)
    forecaster.save(tmp_path / "model.pt")
    loaded = ts.Forecaster.load(tmp_path / "model.pt", device="cpu")
    same(loaded.predict(**known), forecast)
    same(loaded.predict(df=df, static=static() if covariates else None, **known), forecast)
    assert repr(loaded) == repr(forecaster)
    assert loaded.evaluations == forecaster.evaluations and len(loaded.evaluations) == 2
    assert vars(loaded).keys() == vars(forecaster).keys()
    for name in vars(forecaster).keys() - {"_fitted"}:
        assert getattr(loaded, name) == getattr(forecaster, name)
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forecaster = quick().fit(frame())
    path = tmp_path / "model.pt"

    def half(value: object, to: Path) -> None:
        to.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="disk full"):
            forecaster.save(path)
        assert os.listdir(tmp_path) == []
    forecaster.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        forecaster.save(path)
    assert os.listdir(tmp_path) == ["model.pt"] and path.read_bytes() == before


class Own(ts.DLinear):
    """A model that the library does not know."""


def test_what_could_not_be_written_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    forecaster = quick(Own).fit(frame())
    forecaster.save(path)
    with pytest.raises(TypeError, match=r"arguments that could not be written, \['model'\]; got \[\]"):
        ts.Forecaster.load(path)
    same(ts.Forecaster.load(path, model=Own).predict(), forecaster.predict())
    torch.save({"weights": {}}, path)
    with pytest.raises(ValueError, match=r"path must be a file that Forecaster.save has written"):
        ts.Forecaster.load(path)


def test_cross_validation_has_every_window_beside_the_truth() -> None:
    df = frame()
    forecaster = quick()
    table = forecaster.cross_validate(df, windows=3, step=2, level=(80,))
    assert list(table) == ["unique_id", "ds", "cutoff", "y", "DLinear", "DLinear-lo-80", "DLinear-hi-80"]
    assert len(table) == 3 * 3 * HORIZON and repr(forecaster).endswith("not fitted)")
    truth = table.merge(df, on=["unique_id", "ds"])
    assert truth["y_x"].tolist() == truth["y_y"].tolist()
    for name, own in table.groupby("unique_id"):
        last = df[df["unique_id"] == name]["ds"].max()
        assert own["ds"].max() == last
        cutoffs = own["cutoff"].unique()
        assert [(last - cutoff) / pd.Timedelta("1h") for cutoff in cutoffs] == [8, 6, 4]
        assert (own["ds"] - own["cutoff"]).tolist() == [pd.Timedelta(hours=h + 1) for _ in cutoffs for h in range(4)]


def test_cross_validation_is_what_one_would_have_forecast() -> None:
    df = frame({"a": 70, "b": 70})
    cut = df.groupby("unique_id").head(70 - HORIZON - 3)
    table = quick().cross_validate(df, windows=2, step=3)
    by_hand = quick().fit(cut)
    first = table[table["cutoff"] == table["cutoff"].min()].drop(columns=["cutoff", "y"]).reset_index(drop=True)
    same(first, by_hand.predict())
    second = table[table["cutoff"] == table["cutoff"].max()].drop(columns=["cutoff", "y"]).reset_index(drop=True)
    same(second, by_hand.predict(df=df.groupby("unique_id").head(70 - HORIZON)))
    anew = quick().cross_validate(df, windows=2, step=3, refit=True)
    again = anew[anew["cutoff"] == anew["cutoff"].max()].drop(columns=["cutoff", "y"]).reset_index(drop=True)
    same(again, quick().fit(df.groupby("unique_id").head(70 - HORIZON)).predict())


@pytest.mark.parametrize("refit", [False, True])
def test_cross_validation_does_not_see_the_future(refit: bool) -> None:
    df = frame()
    seen = with_covariates().cross_validate(df, windows=2, static=static(), refit=refit)
    changed = df.copy()
    late = df.groupby("unique_id").cumcount(ascending=False) < HORIZON
    changed.loc[late, ["y", "load"]] = 1e3 * np.random.default_rng(0).normal(size=(int(late.sum()), 2))
    other = with_covariates().cross_validate(changed, windows=2, static=static(), refit=refit)
    assert (other["y"] != seen["y"]).any()
    same(other.drop(columns="y"), seen.drop(columns="y"))


@pytest.mark.parametrize("name", ["y", "load", "price", "size", "ds", "price ahead"])
def test_every_covariate_has_an_effect(name: str) -> None:
    df, constants = frame(), static()
    forecaster = with_covariates(steps=30).fit(df, constants)
    future = ahead(df)
    before = forecaster.predict(future=future, df=df, static=constants)
    if name == "ds":
        df, future = (x.assign(ds=x["ds"] + pd.Timedelta(hours=9)) for x in (df, future))
    elif name == "size":
        constants["size"] = [3, -1, 2]
    elif name == "price ahead":
        future["price"] = np.arange(len(future)) % 5
    else:
        df[name] = df[name] + np.sin(np.arange(len(df)))
    after = forecaster.predict(future=future, df=df, static=constants)
    assert not np.allclose(after["RNN"], before["RNN"])


def test_what_is_missing_is_a_missing_value() -> None:
    df = frame()
    gone = df.index.isin([20, 21, 55, 57])
    holes = df.assign(y=df["y"].mask(gone))
    left_out = df[~gone]
    assert quick().fit(df).predict()["DLinear"].tolist() != quick().fit(holes).predict()["DLinear"].tolist()
    same(quick().fit(left_out).predict(), quick().fit(holes).predict())


def test_short_series_are_forecast_too() -> None:
    df = frame({"long": 80, "short": 11, "shortest": 3})
    forecast = quick(ts.PatchTST, dim=8, depth=1, heads=2, hidden=8, patch=4, stride=4).fit(df).predict()
    assert len(forecast) == 3 * HORIZON and forecast["PatchTST"].notna().all()
    short = frame({"a": 14, "b": 13})
    assert len(quick(validation=0).fit(short).predict()) == 2 * HORIZON


@pytest.mark.parametrize("part", [0.3, 20, 0])
def test_the_validation_part_is_at_the_end_and_not_trained_on(part: float) -> None:
    df = frame({"a": 60, "b": 60})
    changed = df.copy()
    late = df.groupby("unique_id").cumcount(ascending=False) < (part if isinstance(part, int) else 18)
    changed.loc[late, "y"] += np.random.default_rng(0).normal(size=int(late.sum()))
    one, other = (quick(validation=part, eval_every=100).fit(x) for x in (df, changed))
    assert one.evaluations[0].loss == other.evaluations[0].loss
    assert (one.evaluations[0].validation is None) == (part == 0)
    if part:
        assert one.evaluations[0].validation != other.evaluations[0].validation
        length = 20 if isinstance(part, int) else 18
        df.loc[df.groupby("unique_id").cumcount(ascending=False) == length, "y"] += 1
        assert quick(validation=part, eval_every=100).fit(df).evaluations[0].loss != one.evaluations[0].loss


def test_a_seed_repeats_everything_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = quick(ts.RNN, dropout=0.3, seed=1).fit(frame()).predict()
    assert torch.equal(torch.rand(2), expected)
    same(quick(ts.RNN, dropout=0.3, seed=1).fit(frame()).predict(), first)
    assert not first.equals(quick(ts.RNN, dropout=0.3, seed=2).fit(frame()).predict())


@pytest.mark.parametrize(
    "option",
    [
        {"steps": 9}, {"batch_size": 5}, {"lr": 2e-2}, {"weight_decay": 0.5}, {"schedule": "constant"}, {"validation": 0.5},
        {"seed": 3}, {"kernel": 9}, {"head": ts.Quantile((0.5,))},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_has_an_effect(option: dict[str, Any]) -> None:
    df = frame()
    assert (
        quick(**option).fit(df).predict(level=())["DLinear"].tolist() != quick().fit(df).predict()["DLinear"].tolist()
    )


def test_patience_and_the_bar_reach_training(capsys: pytest.CaptureFixture[str]) -> None:
    forecaster = quick(lr=0.0, steps=30, patience=2, progress=True).fit(frame())
    assert [e.step for e in forecaster.evaluations] == [3, 6, 9]
    assert "train" in capsys.readouterr().err


def test_a_model_without_weights_is_not_trained() -> None:
    df = frame()
    forecaster = quick(ts.SeasonalNaive, season=4).fit(df)
    assert forecaster.evaluations == [] and "SeasonalNaive-hi-95" in forecaster.predict()
    expected = df.groupby("unique_id").tail(4)["y"]
    close(forecaster.predict()[["SeasonalNaive"]], expected.to_frame("SeasonalNaive").reset_index(drop=True))


def test_pictures_show_series_and_forecasts() -> None:
    matplotlib.use("Agg")
    df = frame()
    forecaster = quick().fit(df)
    figure = forecaster.plot(df, forecaster.predict(level=(80, 95)), history=10)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b", "c"]
    past, forecast = figure.axes[1].get_lines()
    own = df[df["unique_id"] == "b"]
    assert past.get_ydata().tolist() == own["y"].tail(10).tolist() and len(forecast.get_ydata()) == HORIZON
    assert [c.get_label() for c in figure.axes[1].collections] == ["80%", "95%"]
    table = forecaster.cross_validate(df, windows=3)
    figure = forecaster.plot(df, table, series=["c"])
    assert len(figure.axes) == 1 and len(figure.axes[0].get_lines()) == 4
    assert figure.axes[0].get_lines()[0].get_ydata()[-1] == df["y"].iloc[-1]
    with pytest.raises(ValueError, match="series must be some of those that were forecast; got 'd'"):
        forecaster.plot(df, table, series=["d"])
    with pytest.raises(ValueError, match="forecast must be what predict or cross_validate returned, with 'DLinear'"):
        forecaster.plot(df, df)


def test_what_does_not_fit_is_refused_when_it_is_built() -> None:
    with pytest.raises(TypeError, match="model must be the class of a forecasting model"):
        quick("PatchTST")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be the class .* no instance"):
        quick(ts.DLinear(1, LOOKBACK, HORIZON))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="DLinear\\(\\) got an unexpected keyword argument 'colour'"):
        quick(colour="red")
    with pytest.raises(ValueError, match="DLinear has no use for future"):
        quick(future=["price"])
    with pytest.raises(ValueError, match="calendar makes known-future covariates, which DLinear has no use for"):
        quick(calendar=("day",))
    with pytest.raises(ValueError, match="cycles must be some of"):
        with_covariates(calendar=("fortnight",))
    with pytest.raises(TypeError, match=r"past must be names of columns, such as \('price',\).*; got past='load'"):
        with_covariates(past="load")
    with pytest.raises(ValueError, match="horizon must be >= 1; got horizon=0"):
        ts.Forecaster(ts.DLinear, LOOKBACK, 0)
    for share in (1.0, -0.1, 3, True):
        with pytest.raises(
            ValueError, match="validation must be a share between 0 and 1, whole steps >= horizon=4, or 0"
        ):
            quick(validation=share)
    with pytest.raises(ValueError, match="steps must be >= 1; got steps=0"):
        quick(steps=0)
    with pytest.raises(TypeError, match=r"seed must be a whole number; got seed=1\.5"):
        quick(seed=1.5)
    with pytest.raises(RuntimeError, match=r"the Forecaster must be fitted first: call fit\(df\)"):
        quick().predict()


def test_what_was_not_declared_or_did_not_come_is_refused() -> None:
    df, constants = frame(), static()
    plain, full = quick().fit(df), with_covariates().fit(df, constants)
    with pytest.raises(ValueError, match="future was given, but none was declared"):
        plain.predict(future=ahead(df))
    with pytest.raises(ValueError, match="static was given, but none was declared"):
        quick().fit(df, constants)
    with pytest.raises(ValueError, match=r"static must be given, since static=\('size',\) was declared"):
        with_covariates().fit(df)
    with pytest.raises(ValueError, match=r"future must be given for the 4 steps to come, since future=\('price',\)"):
        full.predict()
    with pytest.raises(ValueError, match="static is that of df: leave it out"):
        full.predict(future=ahead(df), static=constants)
    with pytest.raises(ValueError, match="past must name its columns for a frame"):
        with_covariates(past=1).fit(df, constants)


def test_data_that_is_too_short_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no series is long enough for validation=0.3: .* needs 8 steps, and the longest has 11"
    ):
        quick().fit(frame({"a": 11, "b": 10}))
    with pytest.raises(
        ValueError, match="no series of df is long enough to train on: it must have 8 steps, and the longest has 7"
    ):
        quick(validation=0).fit(frame({"a": 7}))
    with pytest.raises(ValueError, match=r"unique_id='a' has 12 steps, and windows=3 of step=4 need more than 12"):
        quick().cross_validate(frame({"a": 12, "b": 90}), windows=3)
    df = frame()
    df.loc[df["unique_id"].eq("b") & (df.groupby("unique_id").cumcount(ascending=False) < LOOKBACK), "y"] = np.nan
    with pytest.raises(ValueError, match=r"unique_id='b' has no value in its last 16 steps, the look-back"):
        quick().fit(df)
