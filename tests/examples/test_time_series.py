from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import pytest
import time_series as ts
import torch
import tyro
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
MODELS = pytest.mark.parametrize("model", ["patch", "causal"])
TINY = ts.Options(
    lookback=48,
    horizon=12,
    patch=12,
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
    monkeypatch.setattr(ts, "draw", lambda *_: None)


def redraw(model: nn.Module) -> nn.Module:
    """Parameters that hide nothing: the head of a new model is 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records(path)]


# -- the whole script --------------------------------------------------------------------------------------------------


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "examples/time_series.py",
        "--steps",
        "4",
        "--eval-every",
        "2",
        "--run",
        str(tmp_path / "run"),
    ]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "4/4" in done.stderr  # the progress bar
    assert "1 missing cells" not in done.stdout and "2 missing cells" in done.stdout  # an hour that no clock showed
    for word in ("San Francisco", "Seattle", "last season", "test MAE, °F", "metrics.jsonl", "forecast.png"):
        assert word in done.stdout
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "model.safetensors", "resume.pt", "forecast.png"}
    assert (run / "forecast.png").read_bytes().startswith(b"\x89PNG")
    assert [record["step"] for record in records(run)] == [2, 4, 4]
    # What a forecast of the same hour yesterday is worth does not depend on any model.
    assert records(run)[-1]["naive_test_mae"] == pytest.approx(0.1681, abs=1e-4)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tyro.cli(ts.Options, args=["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(ts.Options):
        explained = re.search(rf"--{field.name.replace('_', '-')},? [A-Z{{\[-]\S+(.*?)\(default:", text)
        assert explained and len(explained[1].split()) >= 2, field.name


@MODELS
def test_a_trained_model_beats_the_same_hour_yesterday(model: Any, tmp_path: Path, no_picture: None) -> None:
    ts.main(ts.Options(model=model, run=tmp_path, steps=100, eval_every=100, dim=32, depth=1, lr=3e-3))
    score = records(tmp_path)[-1]
    assert score["test_mae"] < 0.7 * score["naive_test_mae"]


@MODELS
@pytest.mark.parametrize("saved", [1, 2, 3])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_was_cut_off_ends_as_if_it_never_was(
    model: Any, saved: int, moment: str, csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    whole = dataclasses.replace(TINY, model=model, data=csv, run=tmp_path / "whole")
    parted = dataclasses.replace(whole, run=tmp_path / "parted")
    ts.main(whole)

    save_state, calls = common.Run.save_state, []

    def cut_off(run: common.Run, *args: Any, **values: float) -> None:
        calls.append(run)
        if len(calls) < saved + (moment == "before"):
            return save_state(run, *args, **values)
        if moment == "after":
            save_state(run, *args, **values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "save_state", cut_off)
        if saved < 3 or moment == "after":
            with pytest.raises(KeyboardInterrupt):
                ts.main(parted)
        else:  # all steps taken: continuing it only scores again
            ts.main(parted)
    torch.rand(5)
    ts.main(dataclasses.replace(parted, resume=True))

    assert untimed(parted.run) == untimed(whole.run)
    assert (parted.run / "model.safetensors").read_bytes() == (whole.run / "model.safetensors").read_bytes()
    ends = [torch.load(o.run / "resume.pt", weights_only=True) for o in (whole, parted)]
    for end in ends:
        del end["random"]["python"]  # the type checks of tests draw from it, to look at one item of a sequence
    for name in ("step", "parts", "random", "options"):
        for one, other in zip(*(tree_leaves(end[name]) for end in ends), strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_an_interrupted_run_is_not_continued_with_other_options(csv: Path, tmp_path: Path, no_picture: None) -> None:
    begun = dataclasses.replace(TINY, data=csv, run=tmp_path / "run", steps=2)
    ts.main(begun)
    with pytest.raises(SystemExit, match=r"error: --resume needs the options .* lr='0.001' then, '0.1' now"):
        ts.main(dataclasses.replace(begun, resume=True, lr=0.1))
    with pytest.raises(SystemExit, match="error: --resume continues a run, but there is no"):
        ts.main(dataclasses.replace(begun, resume=True, run=tmp_path / "other"))


def test_gaps_in_a_table_are_told_and_scored_around(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = frame()
    table.iloc[:3, 0] = np.nan  # before the first value: rows left out
    table.iloc[50:60, 1] = np.nan
    table.iloc[340:350, 0] = np.inf
    table.drop(table.index[100:102]).to_csv(tmp_path / "table.csv")
    ts.main(dataclasses.replace(TINY, data=tmp_path / "table.csv", run=tmp_path / "run"))
    out = capsys.readouterr().out
    assert "357 rows, 2020-01-01 03:00:00" in out
    assert "24 missing cells: filled with the value before, not trained or scored on" in out
    assert all(np.isfinite(list(record.values())).all() for record in records(tmp_path / "run"))


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
    ],
)
def test_a_table_that_cannot_be_used_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        ts.main(dataclasses.replace(TINY, data=tmp_path / "table.csv", run=tmp_path / "run"))
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
        ({"patch": 7}, "--patch must divide --lookback; got --patch 7, --lookback 48"),
        ({"heads": 3}, "--dim must be an even multiple of --heads; got --dim 8, --heads 3"),
        ({"steps": 0}, "--steps must be >= 1; got 0"),
        ({"season": 0}, "--season must be >= 1"),
        ({"lr": -1.0}, "--lr > 0"),
        ({"device": "abacus"}, "--device must be auto or a device of this machine"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str, csv: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        ts.main(dataclasses.replace(TINY, **{"data": csv, "run": tmp_path / "run", **options}))


def test_columns_without_variation_are_refused(tmp_path: Path) -> None:
    frame().assign(c=1.0).to_csv(tmp_path / "table.csv")
    with pytest.raises(SystemExit, match="'c' does not in train; name others with --columns"):
        ts.main(dataclasses.replace(TINY, data=tmp_path / "table.csv", run=tmp_path / "run"))


def test_text_is_no_harm_in_columns_that_were_not_asked_for(tmp_path: Path) -> None:
    frame().assign(weather="fine").reset_index(names="when").to_csv(tmp_path / "table.csv", index=False)
    loaded = ts.load_csv(tmp_path / "table.csv", "when", ("b",))
    pd.testing.assert_frame_equal(loaded, frame()[["b"]], check_freq=False, check_names=False)


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("freq", "season"), [("15min", 96), ("h", 24), ("12h", 2), ("D", 7)])
def test_a_season_is_a_day_or_for_daily_rows_a_week(freq: str, season: int) -> None:
    assert ts.regular(frame(400, freq=freq), None, "").season == season
    assert ts.regular(frame(400, freq=freq), 5, "").season == 5


def test_the_protocol_of_ett() -> None:
    table = ts.regular(frame(17_420), None, "")
    parts = ts.split_rows(table, (8640, 2880, 2880), lookback=336, horizon=96)
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
    parts = ts.split_rows(ts.regular(frame(rows), None, ""), cut, lookback, horizon)
    train, validation, test = parts.values()
    assert train.start == 0 and validation.start + lookback == train.stop and test.start + lookback == validation.stop
    assert test.stop <= rows
    for part, share in zip((len(train), len(validation) - lookback, len(test) - lookback), cut, strict=True):
        assert 0 <= share * rows - part < 1


def test_what_was_filled_in_comes_from_the_past_alone() -> None:
    whole = frame()
    table = whole.copy()
    table.iloc[10:13, 0] = np.nan
    filled = ts.regular(table, None, "")
    assert (filled.values[10:13, 0] == whole.iloc[9, 0]).all()
    expected = np.ones_like(filled.observed)
    expected[10:13, 0] = False
    assert (filled.observed == expected).all()
    assert (filled.values[expected] == whole.to_numpy()[expected]).all()


# -- models and scores -------------------------------------------------------------------------------------------------


def build(model: str, **options: Any) -> nn.Module:
    o = dataclasses.replace(TINY, model=model, **options)  # type: ignore[arg-type]
    return redraw((ts.PatchForecaster if model == "patch" else ts.CausalForecaster)(o, season=24))


@MODELS
def test_a_new_model_forecasts_the_last_season(model: str) -> None:
    o = dataclasses.replace(TINY, horizon=40)
    new = (ts.PatchForecaster if model == "patch" else ts.CausalForecaster)(o, season=24).eval()
    x = torch.randn(3, 48)
    torch.testing.assert_close(new(x)[:, -1], x[:, 24:].repeat(1, 2)[:, :40], rtol=1e-5, atol=1e-5)


@MODELS
def test_forecasts_move_and_grow_with_their_series(model: str) -> None:
    forecaster, x = build(model), torch.randn(3, 48)
    torch.testing.assert_close(forecaster(7 * x - 20), 7 * forecaster(x) - 20, rtol=1e-3, atol=1e-3)


@MODELS
def test_forecasts_do_not_depend_on_the_other_series(model: str) -> None:
    forecaster, x = build(model).double(), torch.randn(5, 48, dtype=torch.float64)
    torch.testing.assert_close(forecaster(x), torch.cat([forecaster(one[None]) for one in x]), rtol=1e-10, atol=1e-10)


@given(step=st.integers(0, 95), patch=st.sampled_from([1, 6, 8, 12]))
def test_no_causal_forecast_knows_what_comes_after_its_origin(step: int, patch: int) -> None:
    forecaster, x = build("causal", lookback=96, patch=patch), torch.randn(2, 96)
    changed = x.clone()
    changed[:, step] += 3
    before, after = forecaster(x), forecaster(changed)
    origins = before.shape[1]
    assert origins == (96 - 24) // patch + 1
    known = torch.tensor([95 - patch * (origins - 1 - i) >= step for i in range(origins)])
    assert torch.equal(before[:, ~known], after[:, ~known])
    assert (before[:, known] != after[:, known]).any(-1).all()


@given(steps=st.integers(5, 30), season=st.integers(1, 5), horizon=st.integers(1, 12), stride=st.integers(1, 30))
def test_the_seasonal_naive_forecast_is_the_value_one_season_before(
    steps: int, season: int, horizon: int, stride: int
) -> None:
    x = torch.arange(float(steps))[None]
    forecasts = ts.repeat_season(x, season, horizon, stride)[0]
    origins = reversed(range(steps - 1, season - 2, -stride))
    expected = [[origin - season + 1 + h % season for h in range(horizon)] for origin in origins]
    assert forecasts.tolist() == expected


@given(origins=st.integers(1, 4), stride=st.integers(1, 3), horizon=st.integers(1, 4), seed=st.integers(0, 100))
def test_the_training_error_is_the_mean_over_what_was_observed(
    origins: int, stride: int, horizon: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = 3 + (origins - 1) * stride + horizon
    window = torch.randn(2, steps, generator=generator)
    observed = torch.rand(2, steps, generator=generator) < 0.7
    forecasts = torch.randn(2, origins, horizon, generator=generator)
    errors = []
    for series in range(2):
        for origin in range(origins):
            for h in range(horizon):
                at = steps - horizon - (origins - 1 - origin) * stride + h
                if observed[series, at]:
                    errors.append(abs(float(forecasts[series, origin, h] - window[series, at])))
    expected = sum(errors) / max(1, len(errors))
    assert float(ts.absolute_error(forecasts, window, observed, stride)) == pytest.approx(expected, abs=1e-6)


def test_every_window_is_scored_whatever_the_batch_size() -> None:
    table = torch.randn(100, 2)
    seen = torch.rand(100, 2) < 0.8
    window, observed = (x.unfold(0, 60, 1) for x in (table, seen))

    def repeat(x: Tensor) -> Tensor:
        return ts.repeat_season(x, 24, 12, 48)

    scores = [ts.score(repeat, window, observed, 48, batch_size) for batch_size in (1, 7, 41, 1000)]
    absolute, squared, number = np.zeros((12, 2)), np.zeros((12, 2)), np.zeros((12, 2))
    for first in range(41):
        for h in range(12):
            now = first + 48 + h
            error = np.where(seen[now], (table[now] - table[first + 24 + h]).double(), 0)
            absolute[h] += abs(error)
            squared[h] += error**2
            number[h] += seen[now].numpy()
    for s in scores:
        np.testing.assert_allclose(s.absolute, absolute, rtol=1e-6)
        np.testing.assert_allclose(s.squared, squared, rtol=1e-6)
        np.testing.assert_array_equal(s.number, number)
    assert scores[0].mae() == pytest.approx(absolute.sum() / number.sum())
    assert scores[0].mse() == pytest.approx(squared.sum() / number.sum())
    scale = torch.tensor([2.0, 5.0], dtype=torch.float64)
    np.testing.assert_allclose(scores[0].mae_by_channel(scale), absolute.sum(0) / number.sum(0) * [2, 5])
    np.testing.assert_allclose(scores[0].mae_by_step(scale), (absolute / number * [2, 5]).mean(1))


@MODELS
def test_scores_of_a_model_do_not_depend_on_the_batch_size(
    model: str, csv: Path, tmp_path: Path, no_picture: None
) -> None:
    o = dataclasses.replace(TINY, model=model, data=csv, run=tmp_path / "run", steps=2, eval_batch_size=1)  # type: ignore[arg-type]
    ts.main(o)
    one = records(tmp_path / "run")[-1]
    ts.main(dataclasses.replace(o, eval_batch_size=1000, resume=True))
    assert records(tmp_path / "run")[-1]["test_mae"] == pytest.approx(one["test_mae"], rel=1e-6)


def test_the_saved_weights_are_those_that_did_best_on_validation(
    csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    snapshots: list[dict[str, Tensor]] = []
    save_state = common.Run.save_state

    def keep(run: common.Run, step: int, parts: dict[str, Any], **values: float) -> None:
        snapshots.append({name: tensor.clone() for name, tensor in parts["model"].state_dict().items()})
        save_state(run, step, parts, **values)

    monkeypatch.setattr(common.Run, "save_state", keep)
    harmful_from_step_4 = partial(LambdaLR, lr_lambda=lambda step: 1.0 if step < 4 else 1e3)
    monkeypatch.setattr(common, "cosine_schedule", lambda optimizer, **_: harmful_from_step_4(optimizer))
    ts.main(dataclasses.replace(TINY, data=csv, run=tmp_path / "run", steps=8))
    validations = [record["validation_mae"] for record in records(tmp_path / "run")[:-1]]
    best = int(np.argmin(validations))
    assert best < len(validations) - 1
    torch.testing.assert_close(load_file(tmp_path / "run" / "model.safetensors"), snapshots[best], rtol=0, atol=0)
