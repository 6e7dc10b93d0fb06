from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import class_scores
import common
import compare_padding as compare
import confusion_figure as figure
import labelled_series as data
import pytest
import series_classification as example
import torch

from tests.closeness import assert_close
from tests.examples import checks

TINY = example.Options(dim=8, depth=1, heads=2, epochs=3, batch_size=8, noise=0.1, skip=2)


def write(folder: Path) -> Path:
    """Slow and fast waves of 8 to 30 steps, at any height; one value is missing."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for part, count in (("TRAIN", 60), ("TEST", 40)):
        lines = ["@timeStamps false", "@classLabel true slow fast", "@data"]
        for i in range(count):
            steps = torch.arange(int(torch.randint(8, 31, (), generator=generator)))
            phase, height, noise = torch.rand(3, generator=generator)
            x = torch.sin(steps * (0.4, 1.4)[i % 2] + 7 * phase) + height + 0.1 * noise
            cells = [f"{value:.4f}" for value in x.tolist()]
            if i == 3:
                cells[5] = "?"
            lines.append(",".join(cells) + ":" + ("slow", "fast")[i % 2])
        (folder / f"Waves_{part}.ts").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    return write(tmp_path / "Waves")


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at something else: drawing takes longer than training."""
    monkeypatch.setattr(figure, "draw", lambda *_: None)


# -- the whole script --------------------------------------------------------------------------------------------------


def test_the_command_without_data(tmp_path: Path) -> None:
    says, run = ("train 720, validation 179, test 898", "most frequent"), tmp_path / "run"
    checks.assert_command_trains("series_classification.py", run, "", says, ("confusion.png",))
    assert checks.records(run)[-1]["test_accuracy"] > 0.3  # of ten digits, after two epochs


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (example.Options, compare.Options):
        checks.assert_help_explains(options, capsys)


def test_classes_of_waves_are_learned(waves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = dataclasses.replace(TINY, data=waves, run=tmp_path / "run", epochs=20, patch=4, lr=1e-2)
    example.main(options)
    out = capsys.readouterr().out
    assert "Waves: 2 classes, 8 to 30 steps of 1 values\n         2 missing values" in out
    assert "train 48, validation 12, test 40" in out
    assert "most frequent     50.00%" in out
    assert checks.records(options.run)[-1]["test_accuracy"] > 0.8


def test_the_weights_that_did_best_on_validation_are_scored(waves: Path, tmp_path: Path, no_picture: None) -> None:
    options = dataclasses.replace(TINY, data=waves, run=tmp_path / "run", epochs=5, lr=3e-2)
    example.main(options)
    *course, last = checks.records(options.run)
    known = data.load(waves)
    parts = example.parts_of(known, options, 0, torch.device("cpu"))
    model = example.build(options, parts["train"], 2)
    common.Run(options.run, {}).load_weights(model)
    best = max((record["validation_accuracy"], -record["validation_loss"]) for record in course)
    validation, test = (example.score(model, parts[name], 128) for name in ("validation", "test"))
    assert (validation.accuracy, test.accuracy) == (best[0], last["test_accuracy"])
    losses = [torch.tensor(loss) for loss in (-best[1], last["test_loss"])]
    assert_close([torch.tensor(validation.loss), torch.tensor(test.loss)], losses)
    for batch_size in (1, 7):
        again = example.score(model, parts["test"], batch_size)
        assert torch.equal(again.confusion, test.confusion)
        assert_close(torch.tensor(again.loss), losses[1])


def test_without_validation_all_series_train_and_the_last_weights_are_kept(
    waves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dataclasses.replace(TINY, data=waves, run=tmp_path / "run", validation=0.0, epochs=2)
    example.main(options)
    assert "train 60, test 40" in capsys.readouterr().out
    assert "validation_loss" not in checks.records(options.run)[0]
    state = torch.load(options.run / "resume.pt", weights_only=True)["parts"]["model"]
    model = example.build(options, example.parts_of(data.load(waves), options, 0, torch.device("cpu"))["train"], 2)
    common.Run(options.run, {}).load_weights(model)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("saved", "moment"), [(1, "after"), (2, "before"), (3, "before"), (3, "after")])
def test_a_run_that_was_cut_off_ends_as_if_it_never_was(
    saved: int, moment: Any, waves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    whole = dataclasses.replace(TINY, data=waves, run=tmp_path / "whole", scale="series", logarithm=True)
    checks.assert_continued(example.main, whole, monkeypatch, saved, moment)


def test_a_run_that_was_cut_off_before_anything_was_saved_is_not_continued(
    waves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    begun = dataclasses.replace(TINY, data=waves, run=tmp_path / "run")
    checks.cut_off(example.main, begun, monkeypatch, 1, "before")
    with pytest.raises(SystemExit, match="error: --resume continues a run, but there is no"):
        example.main(dataclasses.replace(begun, resume=True))


def test_several_seeds_split_and_train_anew(
    waves: Path, tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dataclasses.replace(TINY, data=waves, run=tmp_path / "run", epochs=1)
    checks.assert_seeds_are_runs(example.main, options)
    assert "test accuracy over 2 seeds" in capsys.readouterr().out


# -- parts -------------------------------------------------------------------------------------------------------------


def test_training_leaves_out_first_steps_and_adds_noise() -> None:
    batch = data.Labelled([torch.arange(float(n))[:, None] for n in (1, 3, 50)], torch.zeros(3), torch.empty(3, 0))
    for x, own in zip(example.varied(batch, example.Options()).series, batch.series, strict=True):
        assert torch.equal(x, own)
    first = set()
    for _ in range(60):
        series = example.varied(batch, example.Options(skip=4)).series
        assert len(series[0]) == 1 and 1 <= len(series[1]) <= 3
        first.add(int(series[2][0]))
        assert torch.equal(series[2][:, 0], torch.arange(float(series[2][0]), 50))
    assert first == {0, 1, 2, 3, 4}
    noisy = torch.cat([example.varied(batch, example.Options(noise=0.5)).series[2] for _ in range(40)])
    off = 6 * 0.5 / (2 * len(noisy)) ** 0.5  # standard errors of so many draws
    assert abs(float((noisy - batch.series[2].repeat(40, 1)).std()) - 0.5) < off


def test_each_series_comes_once_in_an_epoch() -> None:
    batch = data.Labelled([torch.zeros(2, 1)] * 10, torch.arange(10), torch.arange(10.0)[:, None])
    for shuffle in (False, True):
        drawn = list(example.batches(batch, 4, shuffle=shuffle))
        assert [len(part.series) for part in drawn] == [4, 4, 2]
        order = torch.cat([part.labels for part in drawn])
        assert order.sort().values.tolist() == list(range(10)) and (order.tolist() == list(range(10))) == (not shuffle)
        assert torch.equal(torch.cat([part.static for part in drawn])[:, 0], order.float())


def test_the_summary_names_what_was_taken_for_what() -> None:
    confusion = torch.tensor([[5, 0, 2], [0, 4, 0], [0, 1, 8]])
    text = class_scores.summary(["a", "b", "c"], class_scores.Score(confusion, 0.0), "series")
    assert "85.00%: 17 of 20 series" in text and "45.00%: what one gets" in text
    assert "a for c: 2 times" in text and "c for b: 1 times" in text and "b for" not in text


def test_packed_and_padded_give_the_same_at_each_step_of_training(
    waves: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, double: torch.dtype
) -> None:
    known = data.load(waves)
    train, test = (
        part._replace(series=[x.double() for x in part.series], static=part.static.double())
        for part in (known.train, known.test)
    )
    known = known._replace(train=train, test=test)
    monkeypatch.setattr(data, "load", lambda _: known)
    options = compare.Options(data=waves, patch=3, scale="series", dim=8, depth=1, heads=2, hidden=16, batch_size=8)
    compare.main(options)
    out = capsys.readouterr().out
    (found,) = re.findall(r"differ by (\S+) at most, the largest of which is (\S+)", out)
    difference, largest = map(float, found)
    assert_close(torch.tensor(difference), torch.tensor(0.0), scale=largest)
    rows = [line.split()[-5:] for line in out.splitlines()[-3:]]
    counts = [int(row[0]) for row in rows]
    lengths = [-(-len(x) // 3) for x in known.train.series]
    assert counts[0] == sum(lengths) < counts[1] < counts[2] == 60 * 10
    assert rows[0][2] == "1.00" and all(math.isfinite(float(row[2])) for row in rows)
    assert len({row[4] for row in rows}) == 1
    losses = [float(row[3]) for row in rows]
    assert losses == pytest.approx([losses[0]] * 3, abs=1.1e-4)  # to the digits that are printed


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": Path("nowhere")}, "nowhere has no NAME_TRAIN.ts"),
        ({"patch": 0}, "--patch must be >= 1; got 0"),
        ({"epochs": 0}, "--epochs must be >= 1; got 0"),
        ({"validation": 1.0}, r"--validation must be in \[0, 1\); got 1.0"),
        ({"validation": 0.001}, "--validation 0.001 of so few series in each class is none"),
        ({"smoothing": -0.1}, r"--smoothing must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "--weight-decay must be >= 0"),
        ({"skip": -1}, "--skip must be >= 0; got -1"),
        ({"lr": 0.0}, "--lr must be > 0"),
        ({"seeds": (1, 1)}, "--seeds must be one or several different ones"),
        ({"heads": 3}, "--heads must divide --dim; got --heads 3, --dim 8"),
        ({"device": "abacus"}, "--device must be auto or a device of this machine"),
    ],
)
def test_options_that_cannot_work_are_refused(
    options: dict[str, Any], message: str, waves: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"data": waves, "run": tmp_path / "run", **options}
    checks.assert_refused(example.main, dataclasses.replace(TINY, **given), message)


def test_the_comparison_refuses_what_cannot_work(waves: Path) -> None:
    for options, message in (({"epochs": 0}, "--epochs must be >= 1"), ({"lr": -1.0}, "--lr must be > 0")):
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            compare.main(compare.Options(data=waves, **options))  # type: ignore[arg-type]


def test_a_run_is_not_continued_with_other_options(waves: Path, tmp_path: Path, no_picture: None) -> None:
    begun = dataclasses.replace(TINY, data=waves, run=tmp_path / "run", epochs=1)
    example.main(begun)
    with pytest.raises(SystemExit, match=r"error: --resume needs the options .* skip='2' then, '3' now"):
        example.main(dataclasses.replace(begun, resume=True, skip=3))


def test_a_loss_that_is_not_finite_ends_the_run(waves: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"the training loss is .* in epoch 1; try a smaller --lr"):
        example.main(dataclasses.replace(TINY, data=waves, run=tmp_path / "run", lr=1e30, warmup=0.0, epochs=1))
