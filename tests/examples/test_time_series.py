from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import series_data as data
import series_figure as figure
import series_scores as scores
import time_series as example
import torch
from hypothesis import given, strategies as st

from tests.closeness import assert_close
from tests.examples import checks
from xformerlib import time_series as ts

MODELS = pytest.mark.parametrize("model", ["patch-tst", "causal"])
TINY = example.Options(
    lookback=48,
    horizon=12,
    dim=8,
    depth=1,
    heads=2,
    dropout=0.1,
    steps=6,
    batch_size=4,
    warmup=2,
    eval_every=2,
)


def frame(rows: int = 360, start: str = "2020-01-01", freq: str = "h") -> pd.DataFrame:
    """A daily cycle that drifts, with noise; in two columns."""
    time = np.arange(rows)
    noise = np.random.default_rng(0).normal(size=(rows, 2))
    values = (
        np.sin(2 * np.pi * time[:, None] / 24 + np.array([0.0, 1.0])) * [1, 30] + 0.1 * noise + 0.01 * time[:, None]
    )
    return pd.DataFrame(values, columns=["a", "b"], index=pd.date_range(start, periods=rows, freq=freq, name="date"))


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    frame().to_csv(path)
    return path


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at something else: drawing takes longer than training."""
    monkeypatch.setattr(figure, "draw", lambda *_: None)


# -- the whole script --------------------------------------------------------------------------------------------------


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    done = checks.run_command("time_series.py", "--steps", "4", "--eval-every", "2", "--run", str(tmp_path / "run"))
    assert "4/4" in done.stderr  # the progress bar
    assert "1 missing cells" not in done.stdout and "2 missing cells" in done.stdout  # an hour that no clock showed
    for word in ("San Francisco", "Seattle", "last season", "test MAE, °F", "metrics.jsonl", "forecast.png"):
        assert word in done.stdout
    run = tmp_path / "run"
    checks.assert_written(run, "forecast.png")
    assert [record["step"] for record in checks.records(run)] == [2, 4, 4]
    # What a forecast of the same hour yesterday is worth does not depend on any model. To the digits that are given.
    assert checks.records(run)[-1]["naive_test_mae"] == pytest.approx(0.1681, abs=1e-4)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    checks.assert_help_explains(example.Options, capsys)


@MODELS
def test_a_trained_model_beats_the_same_hour_yesterday(model: Any, tmp_path: Path, no_picture: None) -> None:
    steps = 60 if model == "causal" else 100
    example.main(example.Options(model=model, run=tmp_path, steps=steps, eval_every=steps, dim=16, depth=1, lr=3e-3))
    score = checks.records(tmp_path)[-1]
    assert score["test_mae"] < 0.7 * score["naive_test_mae"]


@MODELS
@pytest.mark.parametrize(("saved", "moment"), [(1, "after"), (2, "before"), (2, "after"), (3, "before"), (3, "after")])
def test_a_run_that_was_cut_off_ends_as_if_it_never_was(
    model: Any, saved: int, moment: Any, csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    whole = dataclasses.replace(TINY, model=model, data=csv, run=tmp_path / "whole")
    checks.assert_continued(example.main, whole, monkeypatch, saved, moment)


def test_an_interrupted_run_is_not_continued_with_other_options(csv: Path, tmp_path: Path, no_picture: None) -> None:
    begun = dataclasses.replace(TINY, data=csv, run=tmp_path / "run", steps=2)
    example.main(begun)
    with pytest.raises(SystemExit, match=r"error: --resume needs the options .* lr='0.001' then, '0.1' now"):
        example.main(dataclasses.replace(begun, resume=True, lr=0.1))
    with pytest.raises(SystemExit, match="error: --resume continues a run, but there is no"):
        example.main(dataclasses.replace(begun, resume=True, run=tmp_path / "other"))


def test_several_seeds_are_several_runs_and_their_mean_is_told(
    csv: Path, tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dataclasses.replace(TINY, data=csv, run=tmp_path / "run")
    checks.assert_seeds_are_runs(example.main, options)
    errors = [checks.records(options.run / f"seed-{seed}")[-1]["test_mse_standardised"] for seed in (0, 1)]
    told = f"standardised MSE over 2 seeds: {np.mean(errors):.4f} +- {np.std(errors, ddof=1):.4f}"
    assert told in capsys.readouterr().out


def test_every_name_is_that_of_a_model() -> None:
    assert get_args(example.Name) == tuple(example.MODELS)


@pytest.mark.parametrize("model", example.MODELS)
def test_every_model_runs_and_is_saved(model: Any, csv: Path, tmp_path: Path, no_picture: None) -> None:
    example.main(example.Options(model=model, data=csv, lookback=48, horizon=12, steps=1, batch_size=2, run=tmp_path))
    assert np.isfinite(checks.records(tmp_path)[-1]["test_mse_standardised"])
    assert {path.name for path in tmp_path.iterdir()} >= {"metrics.jsonl", "model.safetensors"}
    if model == "seasonal-naive":
        assert checks.records(tmp_path)[-1]["test_mae"] == checks.records(tmp_path)[-1]["naive_test_mae"]


@pytest.mark.parametrize("head", ["quantile", "student-t"])
def test_covariates_and_heads(head: Any, csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"columns": ("a",), "future_columns": ("b",), "calendar": ("day",), "head": head}
    example.main(dataclasses.replace(TINY, model="causal", data=csv, run=tmp_path / "run", **options))
    assert "covariates: 0 past, 3 future" in capsys.readouterr().out
    past = {"columns": ("a",), "past_columns": ("b",), "head": head, "difference": True}
    example.main(dataclasses.replace(TINY, model="itransformer", data=csv, run=tmp_path / "run", **past))
    assert "covariates: 1 past, 0 future" in capsys.readouterr().out


def test_gaps_in_a_table_are_told_and_scored_around(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = frame()
    table.iloc[:3, 0] = np.nan
    table.iloc[50:60, 1] = np.nan
    table.iloc[340:350, 0] = np.inf
    table.drop(table.index[100:102]).to_csv(tmp_path / "table.csv")
    example.main(dataclasses.replace(TINY, data=tmp_path / "table.csv", run=tmp_path / "run"))
    out = capsys.readouterr().out
    assert "360 rows, 2020-01-01 00:00:00" in out
    assert "27 missing cells: not looked at, trained or scored on" in out
    assert all(np.isfinite(list(record.values())).all() for record in checks.records(tmp_path / "run"))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a CSV file that begins with column names"),
        ("time,x\n2020-01-01,1\n", "has no column 'date'; it has 'time', 'x'; choose with --date-column"),
        ("date\n2020-01-01\n", "has no column besides 'date'"),
        ("date,x\n2020-01-01,1\nsoon,2\n", "'date' of .* must hold dates; got 'soon' in row 2"),
        (
            "date,x,y\n2020-01-01,1,2\n2020-01-02,3,low\n",
            "must hold numbers; 'y' of .* holds 'low'; leave the column out",
        ),
        ("date,x,y\n2020-01-01,1,\n2020-01-02,3,\n", "'y' is empty; choose others with --columns"),
        ("date,x\n2020-01-01,1\n", "the table is too short: it needs 2 rows or more; got 1"),
        (
            "date,x\n2020-01-02,1\n2020-01-01,1\n",
            r"dates must rise; row 2 \(2020-01-01.* comes after row 1 \(2020-01-02",
        ),
        ("date,x\n2020-01-01,1\n2020-01-01,1\n", "dates must rise"),
        ("date,x\n2020-01-01,1\n2020-01-02,1\n2020-01-03 01:00,1\n", r"equal steps apart .*; row 3"),
        ("date,x\n2020-01-01,1\n2020-01-08,1\n", "7 days .* give --season in rows"),
        ("date,x, x\n2020-01-01,1,2\n2020-01-02,1,2\n", "columns of .* must have different names; 'x' comes twice"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        example.main(dataclasses.replace(TINY, data=tmp_path / "table.csv", run=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": Path("nowhere.csv")}, "there is no file nowhere.csv"),
        ({"columns": ("a", "z")}, "has no column 'z'; it has 'date', 'a', 'b'; choose with --columns"),
        (
            {"lookback": 240},
            r"too short: train has 251 of its 360 rows, .* takes 252 \(--lookback 240 \+ --horizon 12\)",
        ),
        ({"horizon": 40}, "too short: validation has 84 of its 360 rows, and a single window takes 88"),
        ({"split": (0.9, 0.2, 0.1)}, "--split must be positive shares"),
        ({"split": (300.0, 60.0, 60.0)}, r"--split must be .* \(sum <= 360\)"),
        ({"split": (0.9, 0.0, 0.1)}, "--split must be positive"),
        ({"lookback": 12, "horizon": 6}, "--lookback must hold a season of 24 steps; got --lookback 12"),
        ({"lookback": 24, "horizon": 6, "difference": True}, "--lookback must hold more than the season of 24 steps"),
        ({"patch": 49}, "patch must be <= lookback; got patch=49 and lookback=48"),
        ({"model": "dlinear"}, "--dim is no option of dlinear: leave it out"),
        (
            {"model": "dlinear", "dim": None, "depth": None, "heads": None, "dropout": None, "calendar": ("day",)},
            "DLinear has no use for future",
        ),
        (
            {"model": "seasonal-naive", "dim": None, "depth": None, "heads": None, "dropout": None, "head": "quantile"},
            "--head quantile is not for seasonal-naive",
        ),
        ({"data": None, "columns": ("a",)}, "--columns, .* are of a table: give one with --data"),
        ({"columns": ("a",), "future_columns": ("z",)}, "has no column 'z'.*; choose with --past-columns and --future"),
        ({"seeds": (1, 1)}, "--seeds must be one or several different ones"),
        ({"steps": 0}, "--steps must be >= 1; got 0"),
        ({"season": 0}, "--season must be >= 1"),
        ({"lr": -1.0}, "--lr must be > 0; got -1"),
        ({"device": "abacus"}, "--device must be auto or a device of this machine"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str, csv: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": csv, "run": tmp_path / "run", **options}
    checks.assert_refused(example.main, dataclasses.replace(TINY, **given), message)


def test_columns_without_variation_are_refused(tmp_path: Path) -> None:
    frame().assign(c=1.0).to_csv(tmp_path / "table.csv")
    with pytest.raises(SystemExit, match="'c' does not in train; name others with --columns"):
        example.main(dataclasses.replace(TINY, data=tmp_path / "table.csv", run=tmp_path / "run"))


def test_text_is_no_harm_in_columns_that_were_not_asked_for(tmp_path: Path) -> None:
    frame().assign(weather="fine").reset_index(names="when").to_csv(tmp_path / "table.csv", index=False)
    loaded = data.load_csv(tmp_path / "table.csv", "when", ("b",))
    pd.testing.assert_frame_equal(loaded, frame()[["b"]], check_freq=False, check_names=False)


def test_spaces_around_names_of_columns_do_not_matter(csv: Path, tmp_path: Path) -> None:
    text = csv.read_text()
    spaced = tmp_path / "spaced.csv"
    spaced.write_text(text.replace("date,a,b", "date , a, b "))
    for columns, others in (((), ("b",)), (("b",), ()), ((" b ",), (" a",))):
        given = tuple(map(str.strip, columns)), tuple(map(str.strip, others))
        want = data.load_csv(csv, "date", *given)
        pd.testing.assert_frame_equal(data.load_csv(spaced, " date", columns, others), want)


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("freq", "season"), [("15min", 96), ("h", 24), ("12h", 2), ("D", 7)])
def test_a_season_is_a_day_or_for_daily_rows_a_week(freq: str, season: int) -> None:
    assert data.regular(frame(400, freq=freq)).season == season
    assert data.regular(frame(400, freq=freq), 5).season == 5


def test_the_protocol_of_ett() -> None:
    table = data.regular(frame(17_420))
    parts = data.split_rows(table, (8640, 2880, 2880), lookback=336, horizon=96)
    assert parts == {"train": range(8640), "validation": range(8640 - 336, 11_520), "test": range(11_520 - 336, 14_400)}
    assert [len(part) - (336 + 96) + 1 for part in parts.values()] == [8209, 2785, 2785]


@given(
    rows=st.integers(60, 400),
    cut=st.tuples(st.floats(0.2, 0.6), st.floats(0.1, 0.2), st.floats(0.1, 0.2)),
    lookback=st.integers(1, 5),
    horizon=st.integers(1, 5),
)
def test_parts_forecast_rows_of_their_own_and_look_back_one_window(
    rows: int, cut: tuple[float, float, float], lookback: int, horizon: int
) -> None:
    parts = data.split_rows(data.regular(frame(rows)), cut, lookback, horizon)
    train, validation, test = parts.values()
    assert train.start == 0 and validation.start + lookback == train.stop and test.start + lookback == validation.stop
    assert test.stop <= rows
    for part, share in zip((len(train), len(validation) - lookback, len(test) - lookback), cut, strict=True):
        assert 0 <= share * rows - part < 1


def test_what_is_missing_stays_missing_and_what_is_known_ahead_must_be_known() -> None:
    table = frame().assign(known=1.0)
    table.iloc[10:13, 0] = np.nan
    made = data.regular(table.drop(table.index[20:22]).assign(), past=0)
    expected = table.to_numpy(copy=True)
    expected[20:22] = np.nan
    np.testing.assert_array_equal(made.values, expected)
    with pytest.raises(ValueError, match=r"--future-columns must be known in every row; row 21 \(2020-01-01 20"):
        data.regular(table.drop(table.index[20:22]), future=1)


def test_changes_are_those_from_one_season_to_the_next() -> None:
    values, known = torch.randn(40, 3), torch.randn(40, 1)
    values[7, 0] = torch.nan
    windows = data.Changes(values, 12, 6, season=4, past=1, future=known)
    assert len(windows) == 40 - 18 + 1
    batch, rows = windows.batch(torch.tensor([3, 0])), values[3:21]
    assert_close(batch.x[0], rows[4:12] - rows[:8])
    assert_close(batch.target[0], rows[12:, :2] - rows[8:12, :2].repeat(2, 1)[:6])
    assert_close(batch.inputs["future"][0], known[7:21])
    assert_close(batch.target + windows.level([3, 0]), torch.stack([rows[12:], values[12:18]])[..., :2])


@given(windows=st.integers(1, 50), batch_size=st.integers(1, 60), seed=st.integers(0, 3))
def test_each_window_comes_once_before_any_comes_again(windows: int, batch_size: int, seed: int) -> None:
    steps = -(-windows // batch_size)
    for epoch in range(2):
        drawn = [example.drawn(windows, batch_size, epoch * steps + i, seed) for i in range(steps)]
        assert torch.cat(drawn).sort().values.tolist() == list(range(windows))


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [0, 24])
def test_every_window_is_scored_whatever_the_batch_size(difference: int, double: torch.dtype) -> None:
    table = torch.randn(100, 2)
    table[torch.rand(100, 2) < 0.2] = torch.nan
    windows = data.Changes(table, 48, 12, difference) if difference else ts.Windows(table, 48, 12)
    model = ts.DLinear(2, 48 - difference, 12)
    results = [scores.score(model, windows, batch_size) for batch_size in (1, 7, 41, 1000)]
    absolute, squared, number = (torch.zeros(12, 2, dtype=torch.float64) for _ in range(3))
    for i in range(41):
        forecast = model(**windows.batch([i]).inputs)[0]
        if isinstance(windows, data.Changes):
            forecast = forecast + windows.level([i])[0]
        error, seen = (forecast - table[i + 48 : i + 60]).double(), ~table[i + 48 : i + 60].isnan()
        error = error.masked_fill(~seen, 0)
        absolute, squared, number = absolute + error.abs(), squared + error.square(), number + seen
    for s in results:
        assert_close(s.absolute, absolute)
        assert_close(s.squared, squared)
        assert torch.equal(s.number, number)
