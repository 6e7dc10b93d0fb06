"""Training and scores of ``graph.py``, for classes, yes or no, and values, of graphs or of nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import common
import graph_data as data
import torch
from graph_options import Options
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from training import Rank, Trained, fit

NAMES: dict[data.Metric, str] = {"accuracy": "accuracy", "auc": "ROC-AUC", "mae": "MAE", "rmse": "RMSE"}


class Score(NamedTuple):
    """The metric, and the loss that training lowers."""

    value: float
    loss: float


class Task(NamedTuple):
    """A data set, split, and ready to be trained on. Values are learned with mean 0 and deviation 1 in train."""

    data: data.Data
    parts: data.Parts
    device: torch.device
    edges: bool
    mean: float
    deviation: float

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        metric = self.data.metric
        if metric == "accuracy":
            return F.cross_entropy(out, y)
        if metric == "auc":
            return F.binary_cross_entropy_with_logits(out[:, 0], y)
        standard = (y - self.mean) / self.deviation
        return F.l1_loss(out[:, 0], standard) if metric == "mae" else F.mse_loss(out[:, 0], standard)

    def metric(self, out: Tensor, y: Tensor) -> float:
        if self.data.metric == "accuracy":
            return float((out.argmax(1) == y).double().mean())
        if self.data.metric == "auc":
            return float(roc_auc_score(y, out[:, 0]))
        error = out[:, 0].double() * self.deviation + self.mean - y
        return float(error.abs().mean() if self.data.metric == "mae" else error.square().mean().sqrt())

    def rank(self, score: Score) -> Rank:
        """Greater for a better score; of those that are as good, for the surest."""
        return (score.value if self.data.metric in ("accuracy", "auc") else -score.value), -score.loss


def task_of(found: data.Data, parts: data.Parts, device: torch.device, edges: bool) -> Task:
    """The task of a data set and its parts."""
    mean, deviation = 0.0, 1.0
    if found.metric in ("mae", "rmse"):
        train = found.y[parts["train"]].double()
        mean, deviation = float(train.mean()), max(float(train.std()), 1e-6)
    if found.metric == "auc":
        for name, part in parts.items():
            if len(found.y[part].unique()) < 2:
                raise ValueError(f"{name} must have both classes for ROC-AUC; it has one: give another split")
    return Task(found, parts, device, edges, mean, deviation)


def batches(task: Task, part: str, size: int, *, shuffle: bool = False) -> Iterator[data.Batch]:
    """The batches of a part, one after the other, on the device. Those that are not drawn anew can be kept in a list."""
    for index in data.batches(task.data, task.parts[part], size, shuffle=shuffle):
        yield data.batch_of(task.data, index).to(task.device)


def predict(model: nn.Module, task: Task, batch: data.Batch) -> Tensor:
    """What a model says of the graphs of a batch, or of the nodes that are asked for."""
    inputs = batch._replace(edge_attr=batch.edge_attr if task.edges else None)
    out = model(inputs)
    return out if batch.rows is None else out[batch.rows]


@torch.inference_mode()
def score(model: nn.Module, task: Task, made: list[data.Batch]) -> Score:
    """Score a part, given in batches; --eval-batch-size makes no difference."""
    model.eval()
    out = torch.cat([predict(model, task, batch) for batch in made]).float().cpu()
    y = torch.cat([batch.y for batch in made]).cpu()
    return Score(task.metric(out, y), float(task.loss(out, y)))


def train(model: nn.Module, task: Task, run: common.Run, o: Options) -> tuple[float, float]:
    """Train, and keep the weights that did best on validation.

    Returns:
        The best score on validation, and the seconds it took, those before a run was continued included.
    """
    whole = task.data.of_nodes
    steps = o.epochs * (o.epoch_steps if whole else math.ceil(len(task.parts["train"]) / o.batch_size))
    kind = torch.optim.AdamW if o.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(model.parameters(), o.lr, weight_decay=o.weight_decay, fused=True)
    schedule = common.cosine_schedule(optimizer, warmup=round(o.warmup * steps), steps=steps)
    trained = Trained(model, optimizer, schedule, o.clip)
    validation = list(batches(task, "validation", o.eval_batch_size))
    kept = list(batches(task, "train", o.batch_size)) * o.epoch_steps if whole else None

    def train_once() -> float:
        drawn = kept if kept is not None else batches(task, "train", o.batch_size, shuffle=True)
        return train_epoch(trained, task, drawn)

    def validate() -> tuple[dict[str, float], Rank]:
        found = score(model, task, validation)
        return {"validation_loss": found.loss, f"validation_{task.data.metric}": found.value}, task.rank(found)

    best, seconds = fit(trained, run, epochs=o.epochs, resume=o.resume, train=train_once, validate=validate)
    return abs(best), seconds


def train_epoch(trained: Trained, task: Task, drawn: Iterable[data.Batch]) -> float:
    """Go through all batches once; the mean loss of a step."""
    trained.model.train()
    losses = []
    for batch in drawn:
        if len(batch.x) < 2:
            continue  # batch norms have nothing to tell of a single node
        loss = task.loss(predict(trained.model, task, batch), batch.y)
        trained.step(loss)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())
