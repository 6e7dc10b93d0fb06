"""Train a forecaster on a table of dates and numbers, and compare it with "the same hour yesterday".

    python examples/time_series.py                      # San Francisco and Seattle, under a minute on 2 cores
    python examples/time_series.py --model dlinear
    python examples/time_series.py --data ETTh1.csv --split 8640 2880 2880 --lookback 336 --horizon 96 --seeds 0 1 2
    python examples/time_series.py --help

The data is hourly temperatures of San Francisco and Seattle over the year 2010, as the package vega_datasets ships them.
They are smooth, as averages over many years are: a day is much like the day before, and so hard to beat as a forecast.

Rows are split by time into train, validation and test. The weights that do best on validation are scored once on test, on
every window there is. What is written: metrics.jsonl, model.safetensors, resume.pt (for --resume) and forecast.png.
"""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple

import common
import numpy as np
import series_data as data
import series_figure as figure
import series_scores as scores
import torch
import training
import tyro
from torch import Tensor
from tqdm import tqdm

from xformerlib import time_series as ts

# -- options -----------------------------------------------------------------------------------------------------------

Name = Literal[
    "seasonal-naive",
    "dlinear",
    "rnn",
    "attention-rnn",
    "autoregressive-rnn",
    "tcn",
    "wavenet",
    "causal",
    "encoder-decoder",
    "patch-tst",
    "itransformer",
    "timexer",
    "informer",
    "crossformer",
    "group",
]
# Each model with the sizes that small data and a CPU ask for, in place of its own defaults, which are those of its paper.
MODELS: dict[Name, tuple[type[ts.ForecastModel], dict[str, Any]]] = {
    "seasonal-naive": (ts.SeasonalNaive, {}),
    "dlinear": (ts.DLinear, {}),
    "rnn": (ts.RNN, {}),
    "attention-rnn": (ts.AttentionPoolingRNN, {}),
    "autoregressive-rnn": (ts.AutoregressiveRNN, {}),
    "tcn": (ts.TCN, {}),
    "wavenet": (ts.WaveNet, {}),
    "causal": (ts.CausalTransformer, {}),
    "encoder-decoder": (ts.EncoderDecoderTransformer, {}),
    "patch-tst": (ts.PatchTST, {"dim": 16, "heads": 4, "hidden": 128}),
    "itransformer": (ts.ITransformer, {"dim": 64, "heads": 4, "hidden": 128, "depth": 2}),
    "timexer": (ts.TimeXer, {"dim": 128, "heads": 4, "hidden": 256}),
    "informer": (ts.Informer, {"dim": 64, "heads": 4, "hidden": 128}),
    "crossformer": (ts.Crossformer, {"dim": 64, "heads": 4, "hidden": 128, "depth": 2}),
    "group": (ts.GroupTransformer, {"dim": 64, "heads": 4, "hidden": 128, "depth": 2}),
}
HEADS: dict[str, ts.Head] = {
    "point": ts.Point(),
    "median": ts.Quantile((0.5,)),
    "quantile": ts.Quantile((0.1, 0.25, 0.5, 0.75, 0.9)),
    "student-t": ts.StudentT(),
}
CHOICES = ("dim", "depth", "heads", "hidden", "dropout", "patch", "stride", "normalise")


@dataclass(frozen=True)
class Options:
    """Train a forecaster on a table of dates and numbers, and compare it with the last season, repeated."""

    model: Name = "patch-tst"
    """A model of xformerlib.time_series."""
    head: Literal["point", "median", "quantile", "student-t"] = "point"
    """What a forecast is: a number (point: trained by the squared error; median: by the absolute error), quantiles, or a distribution.
    Scores are of its centre."""
    data: Path | None = None
    """A CSV file with a column of dates and columns of numbers. Without it: the temperatures that vega_datasets ships."""
    date_column: str = "date"
    """The column of --data that holds dates. They rise in equal steps; a row that is missing counts as missing cells."""
    columns: tuple[str, ...] = ()
    """The columns of --data to forecast. Without it: all but the dates and the covariates."""
    past_columns: tuple[str, ...] = ()
    """Columns of --data that are known up to now: the model sees them, and does not forecast them."""
    future_columns: tuple[str, ...] = ()
    """Columns of --data that are known ahead, such as holidays or forecasts of the weather."""
    calendar: tuple[Literal["hour", "day", "week", "month", "year"], ...] = ()
    """Cycles of the calendar in which the model is told where it is, as covariates that are known ahead."""
    difference: bool | None = None
    """Forecast what changes from one season to the next, for series that repeat almost exactly. Without it: only for the temperatures."""
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Train, validation and test, in order of time: shares of the rows, or numbers of rows (ETTh1: 8640 2880 2880)."""
    lookback: int = 168
    """Steps that the model sees."""
    horizon: int = 24
    """Steps that it forecasts."""
    season: int | None = None
    """Steps in a season, which the baseline repeats. Without it: a day (for daily data, a week)."""
    dim: int | None = None
    """Width of the model. Each size that is not given is one that fits small data."""
    depth: int | None = None
    """Layers, one after the other."""
    heads: int | None = None
    """Attention heads of a layer."""
    hidden: int | None = None
    """Width inside the feed-forward layers."""
    dropout: float | None = None
    """Share of the values dropped in training."""
    patch: int | None = None
    """Steps in a patch, which is a token."""
    stride: int | None = None
    """Steps from one patch to the next."""
    normalise: bool | None = None
    """Whether dlinear sees every look-back off its own level and scale, as the models of attention always do."""
    steps: int = 300
    """Training steps."""
    batch_size: int = 32
    """Windows in a training step."""
    eval_batch_size: int = 256
    """Windows scored at a time in validation and test. A matter of memory: it does not change the scores."""
    lr: float = 1e-3
    """Highest learning rate, reached after --warmup steps."""
    warmup: int = 30
    """Steps over which the learning rate rises. After them it falls to 0 along half a cosine."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    eval_every: int = 25
    """Steps between validations. Each saves the state for --resume, and the weights if they are the best so far."""
    seeds: tuple[int, ...] = (0,)
    """Where random numbers start, one run for each. The same seed, options and machine give the same result, bit for bit."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    threads: int = 1
    """CPU threads. One is enough for a model as small as the default; wide models and long tables gain from more."""
    run: Path = Path("runs/time_series")
    """Directory for all that is written, for several seeds one within it for each. A run that is there already is replaced, or
    continued with --resume."""
    resume: bool = False
    """Continue the run in --run from where it was last saved. The result is that of a run which was never cut off."""

    def check(self) -> None:
        """Raise ValueError for what cannot work."""
        common.check_least(
            self, 1, "lookback", "horizon", "season", "dim", "depth", "heads", "hidden", "patch", "stride"
        )
        common.check_least(self, 1, "steps", "batch_size", "eval_batch_size", "eval_every", "threads")
        common.check_least(self, 0, "warmup", "weight_decay")
        common.check_shares(self, "dropout")
        common.check_positive(self, "lr")
        common.check_different(self, "seeds")
        if self.data is None and (self.columns or self.past_columns or self.future_columns):
            raise ValueError("--columns, --past-columns and --future-columns are of a table: give one with --data")


# -- the task: a table, its windows, and the model for them ------------------------------------------------------------


class Task(NamedTuple):
    """A table, seen as windows on standardised values.

    Attributes:
        windows: of train, validation and test, as the model sees them.
        plain: of test, the targets alone and as they are: what the seasonal-naive forecast sees.
        first: the row of the table at which the forecast of the first test window begins.
        mean, std: of each target in the data's own unit.
    """

    table: data.Table
    first: int
    windows: dict[str, ts.Windows]
    plain: ts.Windows
    mean: Tensor
    std: Tensor


def load(o: Options, device: torch.device) -> Task:
    """The table that was asked for: made regular, split by time, standardised by the training rows, and seen as windows."""
    if o.data is None:
        table = data.regular(data.load_temperatures(), o.season, unit="°F")
    else:
        frame = data.load_csv(o.data, o.date_column, o.columns, (*o.past_columns, *o.future_columns))
        table = data.regular(frame, o.season, past=len(o.past_columns), future=len(o.future_columns))
    if table.season > o.lookback:
        raise ValueError(f"--lookback must hold a season of {table.season} steps; got --lookback {o.lookback}")
    if differenced(o) and table.season == o.lookback:
        raise ValueError(
            f"--lookback must hold more than the season of {table.season} steps that --difference takes off"
        )
    parts = data.split_rows(table, o.split, o.lookback, o.horizon)
    targets = len(table.names)
    standard, *scale = data.standardise(table, parts["train"])
    if o.calendar:
        table = data.with_calendar(table, o.calendar)
        standard = torch.cat([standard, torch.tensor(table.values[:, standard.shape[1] :])], 1)
    values, known = standard.to(device, torch.float32).tensor_split([targets + table.past], 1)

    make: Any = partial(data.Changes, season=table.season) if differenced(o) else ts.Windows
    windows = {}
    for name, part in parts.items():
        rows = slice(part.start, part.stop)
        future = known[rows] if table.future else None
        windows[name] = make(values[rows], o.lookback, o.horizon, past=table.past, future=future)
    return Task(
        table=table,
        first=parts["test"].start + o.lookback,
        windows=windows,
        plain=ts.Windows(values[parts["test"].start : parts["test"].stop, :targets], o.lookback, o.horizon),
        mean=scale[0][:targets],
        std=scale[1][:targets],
    )


def differenced(o: Options) -> bool:
    """Whether the last season is taken off, and the model sees a season less."""
    return o.data is None if o.difference is None else o.difference


def build(o: Options, table: data.Table) -> ts.ForecastModel:
    """The model that was asked for, with the sizes that were given."""
    kind, sizes = MODELS[o.model]
    known = inspect.signature(kind).parameters
    given = {name: getattr(o, name) for name in CHOICES if getattr(o, name) is not None}
    for name in given:
        if name not in known:
            raise ValueError(f"--{name} is no option of {o.model}: leave it out")
    options = {**sizes, **given} | {name: size for name in ("past", "future") if (size := getattr(table, name))}
    if "head" in kind.takes:
        options["head"] = HEADS[o.head]
    elif o.head != "point":
        raise ValueError(f"--head {o.head} is not for {o.model}, whose forecast is a number; leave it out")
    if "season" in known:
        options["season"] = table.season
    lookback = o.lookback - differenced(o) * table.season
    return kind(len(table.names), lookback, o.horizon, **options)


# -- the run -----------------------------------------------------------------------------------------------------------


def main(o: Options) -> None:
    began = time.perf_counter()
    with common.plain_errors():
        o.check()
        device = common.choose_device(o.device)
        task = load(o, device)
        model = build(o, task.table)
    torch.set_num_threads(o.threads)
    print(describe(task, o, common.count_parameters(model), device))
    naive = ts.SeasonalNaive(len(task.table.names), o.lookback, o.horizon, season=task.table.season)
    theirs = scores.score(naive, task.plain, o.eval_batch_size)
    results = []
    for seed in o.seeds:
        run, own = common.own_run(o, seed)
        common.seed_everything(seed)
        model = build(o, task.table).to(device)
        step, spent = train(model, task, run, own, seed)

        # The weights that did best on validation, scored once on every test window, beside the seasonal-naive forecast.
        run.load_weights(model)
        ours = scores.score(model, task.windows["test"], o.eval_batch_size)
        results.append(ours)
        run.log(
            step=step,
            test_mae=float(ours.mae_by_channel(task.std).mean()),
            naive_test_mae=float(theirs.mae_by_channel(task.std).mean()),
            test_mae_standardised=ours.mae(),
            test_mse_standardised=ours.mse(),
            seconds=spent,
        )
        curves = ours.mae_by_step(task.std), theirs.mae_by_step(task.std)
        figure.draw(run.directory / "forecast.png", task.table, examples(task, model, naive), curves)
        print(f"\n{scores.summary(task.table, ours, theirs, task.std)}")
        print(f"\nseed {seed}; in {run.directory}: {run.written()}")
    if len(results) > 1:
        for name, values in (("MSE", [s.mse() for s in results]), ("MAE", [s.mae() for s in results])):
            print(f"standardised {name} over {len(values)} seeds: {mean(values):.4f} +- {stdev(values):.4f}")
    print(f"{time.perf_counter() - began:.0f} seconds")


def train(model: ts.ForecastModel, task: Task, run: common.Run, o: Options, seed: int) -> tuple[int, float]:
    """Train on windows in random order. Every --eval-every steps: a score on validation, and everything saved.

    Returns:
        The steps taken, and the seconds they took, those before a run was continued included.
    """
    began, windows = time.perf_counter(), task.windows["train"]
    if not common.count_parameters(model):  # nothing to train
        run.begin()
        run.save_weights(model)
        return 0, 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=o.weight_decay)
    schedule = common.cosine_schedule(optimizer, warmup=o.warmup, steps=o.steps)
    trained = training.Trained(model, optimizer, schedule)
    total = torch.zeros((), device=next(model.parameters()).device)
    step, saved = run.start(trained.parts, resume=o.resume)
    best, spent = saved.get("best", math.inf), saved.get("seconds", 0.0)
    bar = tqdm(initial=step, total=o.steps, desc="train", unit="step", mininterval=0.5)
    while step < o.steps:
        model.train()
        loss = model.loss(windows.batch(drawn(len(windows), o.batch_size, step, seed)))
        trained.step(loss)
        step += 1
        total += loss.detach()
        bar.update()
        if step % o.eval_every and step < o.steps:
            continue
        validation = scores.score(model, task.windows["validation"], o.eval_batch_size)
        error = validation.mse()
        if not math.isfinite(error):
            raise SystemExit(f"error: the validation error is {error} at step {step}; try a smaller --lr")
        average = float(total) / ((step - 1) % o.eval_every + 1)
        total.zero_()
        seconds, lr = spent + time.perf_counter() - began, optimizer.param_groups[0]["lr"]
        run.log(
            step=step, train_loss=average, validation_mse=error, validation_mae=validation.mae(), lr=lr, seconds=seconds
        )
        bar.set_postfix(train=f"{average:.4f}", validation=f"{error:.4f}")
        if error < best:
            best = error
            run.save_weights(model)
        run.save_state(step, trained.parts, best=best, seconds=seconds)
    bar.close()
    return step, spent + time.perf_counter() - began


def drawn(windows: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The windows of a training step: each comes once before any comes again, in an order that step and seed determine."""
    epoch, batch = divmod(step, -(-windows // batch_size))
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    return order[batch * batch_size : (batch + 1) * batch_size]


@torch.inference_mode()
def examples(task: Task, model: ts.ForecastModel, naive: ts.ForecastModel) -> list[figure.Example]:
    """Forecasts of three test windows, evenly apart, in the data's own unit."""
    windows, plain, found = task.windows["test"], task.plain, []
    for i in np.linspace(0, len(windows) - 1, 3).astype(int).tolist():
        ours = model.head.point(model(**windows.batch([i]).inputs))
        if isinstance(windows, data.Changes):
            ours = ours + windows.level([i])
        answers = [y[0].cpu() * task.std + task.mean for y in (ours, naive(**plain.batch([i]).inputs))]
        found.append(figure.Example(task.first + i, *(answer.T.numpy() for answer in answers)))
    return found


def describe(task: Task, o: Options, parameters: int, device: torch.device) -> str:
    """What is about to be trained, and on what."""
    table = task.table
    missing = int(np.isnan(table.values).sum())
    cells = f"\n         {missing:,} missing cells: not looked at, trained or scored on" if missing else ""
    covariates = (
        f"\n         covariates: {table.past} past, {table.future} future" if table.past or table.future else ""
    )
    counts = ", ".join(f"{name} {len(x):,}" for name, x in task.windows.items())
    return (
        f"data     {', '.join(table.names)}: {len(table.dates):,} rows, {table.dates[0]} to {table.dates[-1]}"
        f"{cells}{covariates}\n"
        f"windows  {counts}, each of {o.lookback} steps and {o.horizon} ahead\n"
        f"model    {o.model}, {parameters:,} parameters, on {device}"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
