r"""Train a classifier of series of unequal length, without padding, and see which classes it takes for which.

    python examples/series_classification.py                       # handwritten digits, under a minute on one core
    python examples/series_classification.py --data JapaneseVowels
    python examples/series_classification.py --data PLAID --patch 5 --scale series --logarithm --noise 0.05 --skip 9 \
        --dropout 0.1 --lr 2e-3 --epochs 50
    python examples/series_classification.py --help

The data is the digits that the package scikit-learn ships, read from left to right: a step is a column of 8 pixels. --data takes
a folder of the UCR and UEA archives, https://timeseriesclassification.com, with its files NAME_TRAIN.ts and NAME_TEST.ts.

A share of the training series, drawn class by class, is held out for validation. The weights that do best on it are scored once
on the test series. What is written: metrics.jsonl, model.safetensors, resume.pt (for --resume) and confusion.png.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import common
import confusion_figure as figure
import labelled_series as data
import torch
import training
import tyro
from class_scores import Score, score_of, summary
from torch import nn
from torch.nn import functional as F

from xformerlib import time_series as ts

# -- options -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Train a classifier of series of unequal length, without padding, and see which classes it takes for which."""

    data: Path | None = None
    """A folder with files NAME_TRAIN.ts and NAME_TEST.ts, as timeseriesclassification.com has them. Without it: digits."""
    scale: Literal["train", "series"] = "train"
    """What makes values comparable: train, their deviation in the training series; series, the largest value of each series itself, whose
    logarithm the model then knows beside the steps. For recordings of very different strength."""
    logarithm: bool = False
    """Show the model the logarithm of each value's size, too. For values that matter at any scale, such as currents."""
    validation: float = 0.2
    """Share of the training series that is held out to choose the weights by; 0 trains on all, and keeps the last weights."""
    patch: int = 1
    """Steps in a token: 1 for short series; for long ones about the length of what can be told apart."""
    dim: int = 64
    """Width of the model."""
    depth: int = 2
    """Layers, one after the other."""
    heads: int = 4
    """Attention heads of a layer."""
    hidden: int | None = None
    """Width inside the feed-forward layers; 4 times --dim if not given."""
    dropout: float = 0.2
    """Share of the values dropped in training."""
    pool: Literal["mean", "attention", "max"] = "mean"
    """How one vector is made of the steps of a series."""
    epochs: int = 40
    """Times that training goes through all series."""
    batch_size: int = 32
    """Series in a training step."""
    eval_batch_size: int = 128
    """Series scored at a time in validation and test. A matter of memory."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: float = 0.1
    """Share of training over which the learning rate rises. After it it falls to 0 along half a cosine."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    smoothing: float = 0.1
    """Label smoothing: the share of certainty that is given to all classes alike."""
    noise: float = 0.0
    """Deviation of noise on the values in training, which are themselves scaled to deviation 1."""
    skip: int = 0
    """In training a random number of first steps is left out, up to so many."""
    seeds: tuple[int, ...] = (0,)
    """Where random numbers start, one run for each, also those of the split. The same seed, options and machine give the same result."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    threads: int = 1
    """CPU threads. One is enough for a model as small as the default."""
    run: Path = Path("runs/series_classification")
    """Directory for all that is written, for several seeds one within it for each. A run that is there already is replaced, or
    continued with --resume."""
    resume: bool = False
    """Continue the run in --run from where it was last saved. The result is that of a run which was never cut off."""

    def check(self) -> None:
        """Raise ValueError for what cannot work."""
        common.check_least(self, 1, "patch", "dim", "depth", "heads", "hidden", "epochs")
        common.check_least(self, 1, "batch_size", "eval_batch_size", "threads")
        common.check_least(self, 0, "noise", "skip", "weight_decay")
        common.check_shares(self, "validation", "dropout", "warmup", "smoothing")
        common.check_positive(self, "lr")
        common.check_different(self, "seeds")
        common.check_heads(self)


# -- the task: series, and the model for them --------------------------------------------------------------------------


def parts_of(known: data.Data, o: Options, seed: int, device: torch.device) -> dict[str, data.Labelled]:
    """Train, validation and test, scaled by train. Without validation, two parts."""
    train, held_out = data.stratified(known.train.labels, o.validation, seed)
    if o.validation and not len(held_out):
        raise ValueError(
            f"--validation {o.validation} of so few series in each class is none; give a larger share, or 0"
        )
    validation = {"validation": known.train.take(held_out)} if o.validation else {}
    parts = {"train": known.train.take(train), **validation, "test": known.test}
    return {name: part.to(device) for name, part in data.scaled(parts, o.scale, o.logarithm).items()}


def build(o: Options, part: data.Labelled, classes: int) -> ts.SeriesClassifier:
    """The model for such series."""
    return ts.SeriesClassifier(
        part.series[0].shape[1],
        classes,
        patch=o.patch,
        dim=o.dim,
        depth=o.depth,
        heads=o.heads,
        hidden=o.hidden,
        dropout=o.dropout,
        pool=o.pool,
        static=part.static.shape[1],
    )


def batches(part: data.Labelled, size: int, *, shuffle: bool) -> Iterator[data.Labelled]:
    """Every series once, ``size`` at a time."""
    order = torch.randperm(len(part.labels)) if shuffle else torch.arange(len(part.labels))
    yield from (part.take(index) for index in order.split(size))


def varied(batch: data.Labelled, o: Options) -> data.Labelled:
    """What training sees of a batch: without some first steps, and with noise."""
    series = batch.series
    if o.skip:
        first = [int(torch.randint(min(o.skip, len(x) - 1) + 1, ())) for x in series]
        series = [x[start:] for x, start in zip(series, first, strict=True)]
    if o.noise:
        series = [x + o.noise * torch.randn_like(x) for x in series]
    return batch._replace(series=series)


# -- scores ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def score(model: nn.Module, part: data.Labelled, batch_size: int) -> Score:
    """Classify every series; ``batch_size`` makes no difference."""
    model.eval()
    logits = torch.cat([model(**batch.inputs) for batch in batches(part, batch_size, shuffle=False)])
    return score_of(logits, part.labels)


# -- the run -----------------------------------------------------------------------------------------------------------


def main(o: Options) -> None:
    began = time.perf_counter()
    with common.plain_errors():
        o.check()
        device = common.choose_device(o.device)
        known = data.load(o.data)
        parts = parts_of(known, o, o.seeds[0], device)
        model = build(o, parts["train"], len(known.classes))
    torch.set_num_threads(o.threads)
    print(describe(known, parts, common.count_parameters(model), device))
    results = []
    for seed in o.seeds:
        run, own = common.own_run(o, seed)
        parts = parts_of(known, o, seed, device)
        common.seed_everything(seed)
        model = build(o, parts["train"], len(known.classes)).to(device)
        spent = train(model, parts, run, own)

        # The weights that did best on validation, scored once on every test series.
        run.load_weights(model)
        course = run.records()
        ours = score(model, parts["test"], o.eval_batch_size)
        results.append(ours.accuracy)
        run.log(epoch=o.epochs, test_accuracy=ours.accuracy, test_loss=ours.loss, seconds=spent)
        title = f"{known.name}: {ours.accuracy:.1%} of test right"
        figure.draw(run.directory / "confusion.png", title, known.classes, ours.confusion.numpy(), course)
        print(f"\n{summary(known.classes, ours, 'series')}\n\nseed {seed}; in {run.directory}: {run.written()}")
    if len(results) > 1:
        print(f"test accuracy over {len(results)} seeds: {mean(results):.2%} +- {stdev(results):.2%}")
    print(f"{time.perf_counter() - began:.0f} seconds")


def train(model: ts.SeriesClassifier, parts: dict[str, data.Labelled], run: common.Run, o: Options) -> float:
    """Train, and keep the weights that did best on validation; the seconds it took."""
    steps = o.epochs * math.ceil(len(parts["train"].labels) / o.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=o.weight_decay)
    schedule = common.cosine_schedule(optimizer, warmup=round(o.warmup * steps), steps=steps)
    trained = training.Trained(model, optimizer, schedule)

    def validate() -> tuple[dict[str, float], training.Rank]:
        found = score(model, parts["validation"], o.eval_batch_size)
        return {"validation_loss": found.loss, "validation_accuracy": found.accuracy}, found.rank

    _, seconds = training.fit(
        trained,
        run,
        epochs=o.epochs,
        resume=o.resume,
        train=lambda: train_epoch(trained, parts["train"], o),
        validate=validate if "validation" in parts else None,
    )
    return seconds


def train_epoch(trained: training.Trained, part: data.Labelled, o: Options) -> float:
    """Go through all series once, in random order; the mean cross-entropy of a series."""
    trained.model.train()
    total = torch.zeros((), device=part.labels.device)
    for batch in batches(part, o.batch_size, shuffle=True):
        logits = trained.model(**varied(batch, o).inputs)
        trained.step(F.cross_entropy(logits, batch.labels, label_smoothing=o.smoothing))
        total += F.cross_entropy(logits.detach(), batch.labels, reduction="sum")  # unsmoothed, as in validation
    return float(total) / len(part.labels)


def describe(known: data.Data, parts: dict[str, data.Labelled], parameters: int, device: torch.device) -> str:
    """What is about to be trained, and on what."""
    every = known.train.series + known.test.series
    lengths, missing = [len(x) for x in every], sum(int(x.isnan().sum()) for x in every)
    cells = f"\n         {missing:,} missing values: neither looked at nor scaled by" if missing else ""
    counts = ", ".join(f"{name} {len(part.labels):,}" for name, part in parts.items())
    return (
        f"data     {known.name}: {len(known.classes)} classes, {min(lengths):,} to {max(lengths):,} steps of "
        f"{every[0].shape[1]} values{cells}\n"
        f"series   {counts}\n"
        f"model    SeriesClassifier, {parameters:,} parameters, on {device}"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
