from __future__ import annotations

import itertools
from pathlib import Path

import common
import pytest
import torch
import training
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from training import Rank, Trained, fit

from tests.closeness import assert_close


def trained(average: bool = False, clip: float = 1.0) -> Trained:
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return Trained(model, optimizer, schedule, clip, AveragedModel(model) if average else None)


@pytest.mark.parametrize("average", [False, True])
def test_a_step_goes_along_the_clipped_gradient(average: bool) -> None:
    made = trained(average, clip=0.5)
    for expected in ([0.7, 0.6], [0.55, 0.4]):  # of 0.5 and then 0.25, along 3 and 4
        made.step(made.model(torch.tensor([[3.0, 4.0]])).sum())
        assert_close(made.model.weight, torch.tensor([expected]))
    assert_close(made.scored.weight, torch.tensor([[0.625, 0.5]]) if average else made.model.weight)
    assert made.parts.keys() == {"model", "optimizer", "schedule"} | ({"mean"} if average else set())


def go(
    run: common.Run, made: Trained, ranks: list[Rank] | None, *, epochs: int, resume: bool = False
) -> tuple[float, float]:
    """An epoch counts the weights up; ranks are given."""

    def train() -> float:
        with torch.no_grad():
            made.model.weight.add_(1)
        return made.model.weight.tolist()[0][0]

    def validate() -> tuple[dict[str, float], Rank]:
        assert ranks is not None
        reached = ranks[int(made.model.weight.tolist()[0][0]) - 2]
        return {"validation_loss": -reached[1]}, reached

    return fit(made, run, epochs=epochs, resume=resume, train=train, validate=None if ranks is None else validate)


@pytest.mark.parametrize(
    ("ranks", "best"),
    [
        ([(0.1, -1.0), (0.3, -1.0), (0.2, 0.0)], 2),
        ([(0.3, -1.0), (0.3, -0.5), (0.3, -0.5)], 2),  # as good, and surer; then no better
        ([(-9.0, -1.0), (-8.0, -9.0), (-7.0, -9.0)], 3),  # an error, which is to be small
        (None, 3),
    ],
)
def test_the_best_weights_are_kept_also_of_a_run_that_goes_on(
    ranks: list[Rank] | None, best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()  # a second for each look at the clock
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(ticks)))
    whole, parted = common.Run(tmp_path / "whole", {}), common.Run(tmp_path / "parted", {})
    reached, seconds = go(whole, trained(), ranks, epochs=3)
    assert reached == (-float("inf") if ranks is None else ranks[best - 1][0])
    assert seconds == 4  # one look for each epoch, and one at the end
    go(parted, trained(), ranks, epochs=2)
    again, longer = go(parted, trained(), ranks, epochs=3, resume=True)
    assert again == reached and longer == parted.records()[1]["seconds"] + 2
    for run in (whole, parted):
        kept = trained().model
        run.load_weights(kept)
        assert kept.weight.tolist() == [[1.0 + best] * 2]
        assert [record["epoch"] for record in run.records()] == [1, 2, 3]
        assert [record["train_loss"] for record in run.records()] == [2.0, 3.0, 4.0]
        assert ("validation_loss" in run.records()[0]) == (ranks is not None)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    made, run = trained(), common.Run(tmp_path, {})
    with pytest.raises(SystemExit, match="error: the training loss is nan in epoch 1; try a smaller --lr"):
        fit(made, run, epochs=2, resume=False, train=lambda: float("nan"), validate=None)
    assert not run.weights.exists()
