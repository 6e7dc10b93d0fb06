from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import common
import graph as example
import graph_data as data
import graph_figure as figure
import graph_training as training
import numpy as np
import pytest
import torch
from graph_options import Optimizer, Options

from tests.closeness import assert_close
from tests.examples import checks
from tests.examples.graphs import TINY, one_graph, rings


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at something else: drawing takes longer than training."""
    monkeypatch.setattr(figure, "curves", lambda *_: None)
    monkeypatch.setattr(figure, "attention", lambda *_: None)


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    says, pictures = ("digits: 10 classes for graphs", "33 nodes a graph"), ("attention.png", "curves.png")
    checks.assert_command_trains("graph.py", tmp_path / "run", "--test 0.9 --batch-size 16", says, pictures)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    checks.assert_help_explains(Options, capsys)


def test_a_run_that_was_cut_off_ends_as_if_it_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    whole = dataclasses.replace(TINY, epochs=3, position="laplacian", run=tmp_path / "whole")
    checks.assert_continued(example.main, whole, monkeypatch, saved=2)


def test_adam_leads_weights_that_nothing_moves_to_zero(tmp_path: Path, no_picture: None) -> None:
    held = one_graph(3)
    held["node_features"][:, 0] = 0  # a feature that no node has
    np.savez(tmp_path / "tiny.npz", **held)
    left = {}
    for optimizer in get_args(Optimizer):
        o = dataclasses.replace(TINY, model="gcn", epochs=2, epoch_steps=10, lr=0.02, optimizer=optimizer)
        example.main(dataclasses.replace(o, data=tmp_path / "tiny.npz", run=tmp_path / optimizer))
        weights = torch.load(tmp_path / optimizer / "resume.pt", weights_only=True)["parts"]["model"]
        left[optimizer] = float(weights["embed.1.weight"][:, 0].abs().mean())
    assert left["adam"] < 0.9 * left["adamw"]


def test_epochs_of_several_steps_are_the_same_steps(tmp_path: Path, no_picture: None) -> None:
    np.savez(tmp_path / "tiny.npz", **one_graph(3))
    o = dataclasses.replace(TINY, data=tmp_path / "tiny.npz", model="gcn", epochs=6, run=tmp_path / "single")
    example.main(o)
    example.main(dataclasses.replace(o, epochs=2, epoch_steps=3, run=tmp_path / "several"))
    single, several = (
        torch.load(tmp_path / name / "resume.pt", weights_only=True)["parts"]["model"] for name in ("single", "several")
    )
    assert all(torch.equal(single[name], several[name]) for name in single)
    assert [record["epoch"] for record in common.Run(tmp_path / "several", {}).records()] == [1, 2, 2]


def test_several_splits_and_seeds(tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "tiny.npz", **one_graph(3))
    options = dataclasses.replace(
        TINY, data=tmp_path / "tiny.npz", model="gcn", splits=(0, 1), seeds=(0, 1), run=tmp_path / "run"
    )
    example.main(options)
    found = [checks.records(path.parent)[-1]["test_accuracy"] for path in (tmp_path / "run").rglob("metrics.jsonl")]
    assert len(found) == 4
    assert f"test accuracy over 4 runs: {np.mean(found):.4f} +- {np.std(found, ddof=1):.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("held", "metric", "worst"),
    [
        (rings(lambda size: size.astype(np.float32), scaffold=False), "mae", 0.6),
        (rings(lambda size: size.astype(np.float32), scaffold=True), "rmse", 0.7),
        (rings(lambda size: (size > 5).astype(np.float32), scaffold=True), "auc", 0.9),
        (rings(lambda size: size - 4, scaffold=False), "accuracy", 0.9),
        (one_graph(2), "auc", 0.9),
        (one_graph(3), "accuracy", 0.9),
    ],
    ids=["values", "scaffolds", "yes-or-no", "classes", "two-classes-of-nodes", "classes-of-nodes"],
)
def test_each_kind_of_task_is_learned_and_scored_its_way(
    held: dict[str, Any], metric: str, worst: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "tiny.npz", **held)
    options = dataclasses.replace(
        TINY,
        data=tmp_path / "tiny.npz",
        pool="sum",
        dropout=0.0,
        epochs=30,
        batch_size=8,
        lr=2e-2,
        run=tmp_path / "run",
    )
    example.main(options)
    reached = checks.records(tmp_path / "run")[-1][f"test_{metric}"]
    assert reached < worst if metric in ("mae", "rmse") else reached > worst
    assert f"scored by {training.NAMES[metric]}" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").exists() and not (tmp_path / "run" / "attention.png").exists()


def test_metrics_are_what_their_names_say() -> None:
    y, out = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([[0.0], [0.0], [1.0]])
    found = data.load(None)._replace(y=y, metric="mae")
    task = training.Task(found, {}, torch.device("cpu"), False, mean=3.0, deviation=2.0)
    assert_close(torch.tensor(task.metric(out, y)), torch.tensor(2 / 3))  # 3, 3, 5 were said
    rmse = task._replace(data=found._replace(metric="rmse"))
    assert_close(torch.tensor(rmse.metric(out, y)), torch.tensor((4 / 3) ** 0.5))
    yes = task._replace(data=found._replace(metric="auc"))
    assert yes.metric(torch.tensor([[0.1], [0.4], [0.3], [0.9]]), torch.tensor([0.0, 0, 1, 1])) == 0.75
    low, high = training.Score(0.2, 1.0), training.Score(0.3, 1.0)
    assert task.rank(low) > task.rank(high) and yes.rank(low) < yes.rank(high)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"model": "gcn", "messages": "gine"}, "--messages"),
        ({"model": "sgformer", "messages": "attention"}, "--messages"),
        ({"model": "exphormer", "attend": "edges"}, "--attend"),
        ({"model": "gps", "residual": True}, "--residual"),
        ({"model": "sgformer", "norm": "layer"}, "--norm"),
        ({"model": "sgformer", "graph_weight": 1.5}, "--graph-weight"),
        ({"model": "gps", "graph_weight": 0.8}, "--graph-weight 0.8 is for sgformer; got --model gps"),
        ({"model": "agnn", "teleport": 1.0}, "--teleport must be"),
        ({"model": "gcn", "teleport": 0.2}, "--teleport 0.2 is for agnn; got --model gcn"),
    ],
)
def test_options_that_a_model_has_no_use_for(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(TINY, **options).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": Path("nowhere.npz")}, "--data must be an .npz file or a folder; there is none at nowhere.npz"),
        ({"data": checks.ROOT / "examples"}, "must have a file of graphs, such as PROTEINS.txt"),
        ({"data": Path("x.npz"), "pyg": "MUTAG"}, "--data and --pyg both say what to train on"),
        ({"dim": 9}, "--heads must divide --dim; got --heads 2, --dim 9"),
        ({"depth": 0}, "--depth must be >= 1; got 0"),
        ({"validation": 0.0}, "--validation must be > 0; got 0"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\); got 1"),
        ({"weight_decay": -1.0}, "--weight-decay must be >= 0"),
        ({"lr": 0.0}, "--lr must be > 0"),
        ({"seeds": (1, 1)}, "--seeds must be one or several different ones"),
        ({"splits": (-1,)}, "--splits must be 0 or above"),
        ({"splits": (1,)}, "--splits must be below 1 for digits; got 1"),
        ({"model": "sgformer", "position": "walk"}, "--position walk has no use in sgformer"),
        ({"model": "agnn", "position": "walk"}, "--position walk has no use in agnn"),
        ({"device": "abacus"}, "--device must be auto or a device of this machine"),
        ({"resume": True}, "--resume continues a run, but there is no"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"run": tmp_path / "run", **options}
    checks.assert_refused(example.main, dataclasses.replace(TINY, **given), message)
