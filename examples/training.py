"""How the examples train: a step along a clipped gradient, and epochs, each followed by a score and by everything saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import Run
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

Rank = tuple[
    float, float
]  # greater for better weights: how good they are, and what decides between those that are as good


@dataclass(frozen=True)
class Trained:
    """A model in training, and all that must be kept beside it to go on.

    Attributes:
        model: what is trained.
        optimizer: of its parameters.
        schedule: of the learning rate, step by step.
        clip: greatest norm of the gradient.
        average: the running mean of the weights, which is then scored in place of the model; or none.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    clip: float = 1.0
    average: AveragedModel | None = None

    @property
    def scored(self) -> nn.Module:
        """What validation scores, and what is kept if it is the best."""
        return self.model if self.average is None else self.average.module

    @property
    def parts(self) -> dict[str, Any]:
        """All that is saved to go on."""
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return parts if self.average is None else {**parts, "mean": self.average}

    def step(self, loss: Tensor) -> None:
        """One step of the optimiser and of its schedule, along the clipped gradient of ``loss``."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)


def fit(
    trained: Trained,
    run: Run,
    *,
    epochs: int,
    resume: bool,
    train: Callable[[], float],
    validate: Callable[[], tuple[dict[str, float], Rank]] | None,
    name: str = "train",
) -> tuple[float, float]:
    """Train epoch by epoch, each followed by a score on validation, and by everything saved.

    Args:
        trained: what is trained.
        run: where metrics, weights and state are written.
        epochs: how many there are.
        resume: go on from where ``run`` was last saved.
        train: goes through the training data once; returns the loss.
        validate: scores ``trained.scored``; returns what is logged of it, and its rank. The weights of the highest rank are
            kept; without it, the last ones.
        name: of what is done, beside the progress bar.

    Returns:
        How good the best weights are, -inf without validation, and the seconds it took, those before a run was continued included.
    """
    began = time.perf_counter()
    epoch, saved = run.start(trained.parts, resume=resume)
    best = saved.get("rank", -math.inf), saved.get("sureness", -math.inf)
    spent = saved.get("seconds", 0.0)
    bar = tqdm(initial=epoch, total=epochs, desc=name, unit="epoch", mininterval=0.5)
    while epoch < epochs:
        lr, loss = trained.optimizer.param_groups[-1]["lr"], train()
        epoch += 1
        if not math.isfinite(loss):
            raise SystemExit(f"error: the training loss is {loss} in epoch {epoch}; try a smaller --lr")
        scores, reached = validate() if validate else ({}, (-math.inf, float(epoch)))
        record = {"train_loss": loss, **scores}
        seconds = spent + time.perf_counter() - began
        run.log(epoch=epoch, **record, lr=lr, seconds=seconds)
        bar.set_postfix({key.replace("_", " "): f"{value:.3f}" for key, value in record.items()})
        bar.update()
        if reached > best:
            best = reached
            run.save_weights(trained.scored)
        run.save_state(epoch, trained.parts, rank=best[0], sureness=best[1], seconds=seconds)
    bar.close()
    return best[0], spent + time.perf_counter() - began
