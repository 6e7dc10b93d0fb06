"""Training on windows, with early stopping, and scores over every window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from .._arguments import Count, NonNegative, Positive, Size, check_size, checked
from ._inputs import ForecastModel
from ._windows import Batch, Windows

Schedule = Literal["cosine", "constant"]


class Scores(NamedTuple):
    """Errors over every window, step and channel that was observed, in the units of the windows.

    Attributes:
        loss: that of the model's head.
        mse, mae: squared and absolute error of the point forecast.
    """

    loss: float
    mse: float
    mae: float


class Evaluation(NamedTuple):
    """How training stood at one step.

    Attributes:
        step: steps taken, counted from 1.
        loss: mean training loss since the last evaluation.
        lr: learning rate of this step.
        validation: scores on the validation windows; None if there are none.
    """

    step: int
    loss: float
    lr: float
    validation: Scores | None


@torch.no_grad()
@checked
def evaluate(model: ForecastModel, windows: Windows, *, batch_size: Size = 256) -> Scores:
    """The scores of a model over every window, none left out; they do not depend on ``batch_size``, which is a matter of memory.

    The model is in evaluation mode meanwhile, on the device where it is. What is missing in a target does not count.

    Example:
        >>> from xformerlib.time_series import SeasonalNaive, Windows, evaluate
        >>> hours = torch.sin(torch.arange(500.0)[:, None] * torch.pi / 12)
        >>> scores = evaluate(SeasonalNaive(1, 48, 24, season=24), Windows(hours, 48, 24))
        >>> scores.mae < 1e-4
        True
    """
    sums = torch.zeros(4, dtype=torch.float64)
    with _evaluating(model):
        for batch in windows.batches(batch_size):
            batch = batch.to(_device(model, batch))
            forecast = model(**batch.inputs)
            error = (model.head.point(forecast) - batch.target).double()
            seen = ~batch.target.isnan()
            error = error.masked_fill(~seen, 0)
            loss = model.head.loss(forecast, batch.target).double() * seen.sum()
            sums += torch.stack([loss, error.square().sum(), error.abs().sum(), seen.sum().double()]).cpu()
    if sums[3] == 0:
        raise ValueError(f"windows must hold a target that was observed; got {windows}")
    return Scores(*(sums[:3] / sums[3]).tolist())


@checked
def train(
    model: ForecastModel,
    windows: Windows,
    validation: Windows | None = None,
    *,
    steps: Size = 1000,
    batch_size: Size = 32,
    lr: NonNegative = 1e-3,
    weight_decay: NonNegative = 0.0,
    schedule: Schedule = "cosine",
    clip: Positive | None = 1.0,
    eval_every: Size = 100,
    patience: Size | None = None,
    eval_batch_size: Size = 256,
    seed: Count = 0,
    progress: bool = False,
    log: Callable[[Evaluation], None] | None = None,
) -> list[Evaluation]:
    """Train a model with AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) on its ``loss``.

    Windows are drawn in an order that is shuffled anew each time all were drawn; none is left out. With ``validation``, the model ends
    with the weights of the evaluation whose validation loss was lowest, and in evaluation mode. A ``StepwiseModel`` is trained with
    teacher forcing, and validated on forecasts of its own. The random state outside is left as it was.

    Args:
        model: trained in place, on the device where it is.
        windows: what to train on.
        validation: what to choose weights by; later in time, with ``Windows(..., first=...)``.
        steps: training steps at most.
        batch_size: windows in a step.
        lr: learning rate; with ``schedule="cosine"`` it falls to 0 along half a cosine over ``steps``.
        weight_decay: of AdamW.
        schedule: ``"cosine"`` or ``"constant"``.
        clip: largest norm of the gradient; None for no limit.
        eval_every: steps from one evaluation to the next; there is one after the last step, too.
        patience: evaluations in a row that may fail to lower the validation loss before training stops; None for no stop.
        eval_batch_size: windows evaluated at a time, a matter of memory.
        seed: of the order of windows and of dropout.
        progress: show a bar, if tqdm is installed.
        log: called with each evaluation.

    Returns:
        The evaluations.

    Raises:
        FloatingPointError: the loss is no longer finite.

    Example:
        >>> from xformerlib.time_series import DLinear, Windows, train
        >>> hours = torch.sin(torch.arange(500.0)[:, None] * torch.pi / 12)
        >>> model = DLinear(1, 48, 24)
        >>> evaluations = train(model, Windows(hours[:400], 48, 24), Windows(hours, 48, 24, first=400), steps=60, eval_every=20)
        >>> [evaluation.step for evaluation in evaluations]
        [20, 40, 60]
    """
    _check(model, validation, patience)
    for name, size in (("steps", steps), ("batch_size", batch_size), ("eval_every", eval_every)):
        check_size(name, size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=lr, weight_decay=weight_decay)
    rates = LambdaLR(optimizer, _factor(schedule, steps))
    course = _Course(model, patience)
    total, since = torch.zeros((), device=parameters[0].device), 0
    with _seeded(seed, parameters[0].device), _bar(steps, progress) as bar:
        for step, index in enumerate(_drawn(len(windows), batch_size, steps, seed), start=1):
            rate = optimizer.param_groups[0]["lr"]
            total += _step(model, windows.batch(index), optimizer, clip)
            rates.step()
            bar.update()
            since += 1
            if step % eval_every and step < steps:
                continue
            loss, since = float(total) / since, 0
            total.zero_()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the training loss is {loss} at step {step}: lower lr={lr}, or clip={clip}")
            scores = None if validation is None else evaluate(model, validation, batch_size=eval_batch_size)
            evaluation = Evaluation(step, loss, rate, scores)
            bar.set_postfix(loss=f"{loss:.4g}", **({} if scores is None else {"validation": f"{scores.loss:.4g}"}))
            if log is not None:
                log(evaluation)
            if course.ends_with(evaluation):
                break
    course.restore()
    return course.evaluations


class _Course:
    """The evaluations so far, and the best weights."""

    def __init__(self, model: ForecastModel, patience: int | None) -> None:
        self.model, self.patience = model, patience
        self.evaluations: list[Evaluation] = []
        self.best, self.failed = math.inf, 0
        self.weights: dict[str, Tensor] | None = None

    def ends_with(self, evaluation: Evaluation) -> bool:
        """Take note of an evaluation; whether training should stop."""
        self.evaluations.append(evaluation)
        if evaluation.validation is None:
            return False
        if not math.isfinite(evaluation.validation.loss):
            raise FloatingPointError(
                f"the validation loss is {evaluation.validation.loss} at step {evaluation.step}: lower lr"
            )
        if evaluation.validation.loss < self.best:
            self.best, self.failed = evaluation.validation.loss, 0
            self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}
            return False
        self.failed += 1
        return self.patience is not None and self.failed >= self.patience

    def restore(self) -> None:
        """Give the model the weights that did best, if there was a validation."""
        if self.weights is not None:
            self.model.load_state_dict(self.weights)
        self.model.eval()


def _check(model: ForecastModel, validation: Windows | None, patience: int | None) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"model must have weights to train; {type(model).__name__} has none: it forecasts as it is")
    if patience is not None:
        check_size("patience", patience)
        if validation is None:
            raise ValueError(f"patience counts evaluations on validation windows: give some; got patience={patience}")


def _step(model: ForecastModel, batch: Batch, optimizer: AdamW, clip: float | None) -> Tensor:
    model.train()
    loss = model.loss(batch.to(_device(model, batch)))
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach()


def _drawn(count: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of each step's windows: all in a random order, then all in another."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, count)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]


def _factor(schedule: Schedule, steps: int) -> Callable[[int], float]:
    if schedule == "cosine":
        return lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    if schedule == "constant":
        return lambda step: 1.0
    raise ValueError(f"schedule must be 'cosine' or 'constant'; got schedule={schedule!r}")


def _device(model: nn.Module, batch: Batch) -> torch.device:
    first = next(model.parameters(), None)
    return batch.x.device if first is None else first.device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed devices that are not forked
        if on_cuda:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


class _NoBar:
    """What stands for a bar where none is shown."""

    def update(self) -> None: ...

    def set_postfix(self, **values: str) -> None: ...


@contextmanager
def _bar(steps: int, progress: bool) -> Iterator[Any]:
    if progress:
        try:
            from tqdm import tqdm
        except ImportError:  # it is an extra
            progress = False
    if not progress:
        yield _NoBar()
        return
    with tqdm(total=steps, desc="train", unit="step", mininterval=0.5) as bar:
        yield bar
