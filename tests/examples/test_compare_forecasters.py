from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import compare_forecasters as compare
import numpy as np
import pandas as pd
import pytest
import torch

from xformerlib import time_series as ts

TINY = compare.Options(
    models=("seasonal-naive", "dlinear", "rnn"), lookback=24, horizon=6, steps=2, batch_size=4, eval_every=1
)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    dates = pd.date_range("2020-01-01", periods=300, freq="h", name="date")
    noise = np.random.default_rng(0).normal(size=300)
    pd.DataFrame({"a": np.sin(np.arange(300) / 4) + 0.1 * noise}, index=dates).to_csv(path)
    return path


def test_every_model_has_a_row_and_training_is_not_repeated(
    csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(TINY, data=csv, run=tmp_path / "run")
    compare.main(options)
    table = (options.run / "comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["`seasonal-naive`", "`dlinear`", "`rnn`"]
    assert (options.run / "comparison.png").read_bytes().startswith(b"\x89PNG")
    last = json.loads((options.run / "rnn" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ts.ForecastModel, "loss", never)
    monkeypatch.setattr(compare, "milliseconds", lambda *_: 1.0)
    compare.main(dataclasses.replace(options, resume=True))
    again = (options.run / "comparison.md").read_text().splitlines()
    for one, other in zip(table, again, strict=True):
        assert one.split("|")[:6] == other.split("|")[:6] and one.split("|")[7:] == other.split("|")[7:]


def test_the_receptive_field_is_that_of_the_architecture() -> None:
    windows = ts.Windows(torch.randn(200, 2), 64, 6)
    for depth in (1, 3):
        model = ts.TCN(2, 64, 6, dim=8, depth=depth)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        row = compare.Row("tcn", 1, 1, compare.reach(model, windows), 1.0, 1.0, 1.0)
        assert row.field == model.receptive_field < 64
        assert 1 <= row.half <= row.field
    naive = compare.reach(ts.SeasonalNaive(2, 64, 6, season=24), windows)
    assert np.flatnonzero(naive).tolist() == [23]  # the first step ahead is the one a season before it
    assert compare.reach(ts.ITransformer(2, 64, 6, dim=8, heads=2, hidden=8), windows).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "dlinear"}, "the comparison takes --models"),
        ({"seeds": (0, 1)}, "the comparison takes --models, and one seed"),
        ({"calendar": ("day",)}, "SeasonalNaive has no use for future"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str, csv: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        compare.main(dataclasses.replace(TINY, data=csv, run=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
