"""Train a Transformer to forecast a time series, and compare it with "the same hour yesterday".

    python examples/time_series.py                      # San Francisco and Seattle, under a minute on 2 cores
    python examples/time_series.py --model causal
    python examples/time_series.py --data table.csv --lookback 336 --horizon 96         # any table with a column "date"
    python examples/time_series.py --help

The data is hourly temperatures of San Francisco and Seattle over the year 2010, as the package vega_datasets ships them.
They are smooth, as averages over many years are: a day is much like the day before, and so hard to beat as a forecast.

Rows are split by time into train, validation and test. The weights that do best on validation are scored once on test, on
every window there is. What is written: metrics.jsonl, model.safetensors, resume.pt (for --resume) and forecast.png.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import common
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from tqdm import tqdm

import xformerlib as xf
from xformerlib import masks, positions

# -- options -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Train a Transformer to forecast a time series, and compare it with the last season, repeated."""

    model: Literal["patch", "causal"] = "patch"
    """patch: all patches see each other, and give one forecast. causal: each sees those before it, and gives its own."""
    data: Path | None = None
    """A CSV file with a column of dates and columns of numbers. Without it: the temperatures that vega_datasets ships."""
    date_column: str = "date"
    """The column of --data that holds dates. They rise in equal steps; a row that is missing counts as missing cells."""
    columns: tuple[str, ...] = ()
    """The columns of --data to forecast. Without it: all but the dates."""
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Train, validation and test, in order of time: shares of the rows, or numbers of rows (ETTh1: 8640 2880 2880)."""
    lookback: int = 168
    """Steps that the model sees."""
    horizon: int = 24
    """Steps that it forecasts."""
    season: int | None = None
    """Steps in a season, which the baseline repeats. Without it: a day (for daily data, a week)."""
    patch: int = 24
    """Steps in a patch, which is a token. Divides --lookback."""
    dim: int = 64
    """Width of a token."""
    depth: int = 3
    """Layers of the encoder."""
    heads: int = 4
    """Attention heads of a layer. --dim is an even multiple of it."""
    dropout: float = 0.0
    """Share of the values dropped in training."""
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
    seed: int = 0
    """Where random numbers start. The same seed, options and machine give the same result, bit for bit."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    threads: int = 1
    """CPU threads. One is enough for a model as small as the default; wide models and long tables gain from more."""
    run: Path = Path("runs/time_series")
    """Directory for all that is written. A run that is there already is replaced, or continued with --resume."""
    resume: bool = False
    """Continue the run in --run from where it was last saved. The result is that of a run which was never cut off."""

    def check(self) -> None:
        """Raise ValueError for what cannot work."""
        counts = ("lookback", "horizon", "patch", "dim", "depth", "heads", "steps", "batch_size", "eval_batch_size")
        for name in (*counts, "eval_every", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be >= 1; got {getattr(self, name)}")
        if self.warmup < 0 or (self.season is not None and self.season < 1):
            raise ValueError(
                f"--season must be >= 1 and --warmup >= 0; got --season {self.season}, --warmup {self.warmup}"
            )
        if not 0 <= self.dropout < 1 or self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                "--dropout must be in [0, 1), --lr > 0 and --weight-decay >= 0; "
                f"got --dropout {self.dropout}, --lr {self.lr}, --weight-decay {self.weight_decay}"
            )
        if self.dim % (2 * self.heads):
            raise ValueError(f"--dim must be an even multiple of --heads; got --dim {self.dim}, --heads {self.heads}")
        if self.lookback % self.patch:
            raise ValueError(f"--patch must divide --lookback; got --patch {self.patch}, --lookback {self.lookback}")


# -- data --------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Series at regular times: ``values`` and ``observed`` are (rows, channels), a season is ``season`` rows.

    Where ``observed`` is False, the cell was missing, and its value is the last one before it.
    """

    dates: pd.DatetimeIndex
    names: list[str]
    values: np.ndarray
    observed: np.ndarray
    season: int
    unit: str


def load_temperatures() -> pd.DataFrame:
    """Temperatures of San Francisco and Seattle in °F, from files inside the package vega_datasets."""
    from vega_datasets import local_data

    frames = {"San Francisco": local_data.sf_temps(), "Seattle": local_data.seattle_temps()}
    return pd.DataFrame({name: frame.set_index("date")["temp"] for name, frame in frames.items()})


def load_csv(path: Path, date_column: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """The columns to forecast as numbers, with the dates as the index."""
    if not path.is_file():
        raise ValueError(f"--data must be a CSV file; there is no file {path}")
    try:
        frame = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"--data must be a CSV file that begins with column names; {path}: {error}") from error
    for name, option in ((date_column, "--date-column"), *((name, "--columns") for name in columns)):
        if name not in frame:
            present = ", ".join(map(repr, frame))
            raise ValueError(f"{path} has no column {name!r}; it has {present}; choose with {option}")
    dates = pd.to_datetime(frame[date_column], errors="coerce", format="mixed")
    if dates.isna().any():
        row = int(dates.isna().to_numpy().argmax())
        cell = frame[date_column].iloc[row]
        raise ValueError(f"column {date_column!r} of {path} must hold dates; got {cell!r} in row {row + 1}")
    values = frame[list(columns)] if columns else frame.drop(columns=date_column)
    if values.shape[1] == 0:
        raise ValueError(f"{path} has no column besides {date_column!r}; there is nothing to forecast")
    for name in values.columns:
        if not pd.api.types.is_numeric_dtype(values[name]):
            cell = values[name][pd.to_numeric(values[name], errors="coerce").isna() & values[name].notna()].iloc[0]
            raise ValueError(
                f"columns to forecast must hold numbers; {name!r} of {path} holds {cell!r}; "
                "leave the column out by naming the others with --columns"
            )
    return values.astype(float).set_axis(pd.DatetimeIndex(dates))


def regular(frame: pd.DataFrame, season: int | None, unit: str) -> Table:
    """Put rows on regular times, and fill what is missing with the last value before it.

    The model may look at what was filled in, but is not trained and not scored on it. Rows before the first value of some
    column are left out: they could only be filled from the future.
    """
    dates = pd.DatetimeIndex(frame.index)
    if len(dates) < 2:
        raise ValueError(f"the table is too short: it needs 2 rows or more; got {len(dates)}")
    gaps = dates[1:] - dates[:-1]
    step = gaps.min()
    if step <= pd.Timedelta(0):
        row = int(gaps.argmin()) + 1
        raise ValueError(f"dates must rise; row {row + 1} ({dates[row]}) comes after row {row} ({dates[row - 1]})")
    uneven = np.flatnonzero(gaps % step)
    if uneven.size:
        row = int(uneven[0]) + 1
        raise ValueError(
            f"dates must be equal steps apart ({step}); row {row + 1} ({dates[row]}) is off by a part of one"
        )
    frame = frame.reindex(pd.date_range(dates[0], dates[-1], freq=step)).replace([np.inf, -np.inf], np.nan)
    for name in frame:
        if frame[name].isna().all():
            raise ValueError(f"columns to forecast must hold numbers; {name!r} is empty; choose others with --columns")
    frame = frame[frame.notna().cummax().all(axis=1)]
    return Table(
        dates=pd.DatetimeIndex(frame.index),
        names=[str(name) for name in frame],
        values=frame.ffill().to_numpy(),
        observed=frame.notna().to_numpy(),
        season=season or rows_in_season(step),
        unit=unit,
    )


def rows_in_season(step: pd.Timedelta) -> int:
    """Rows in a day; for daily rows, in a week."""
    for season in (pd.Timedelta(days=1), pd.Timedelta(days=7)):
        if step < season and season % step == pd.Timedelta(0):
            return int(season / step)
    raise ValueError(f"rows {step} apart do not divide a day or a week; give --season in rows (for weekly rows, 52)")


def split_rows(table: Table, split: tuple[float, float, float], lookback: int, horizon: int) -> dict[str, range]:
    """Rows of train, validation and test, in order of time.

    Validation and test begin one look-back early, so that the first row they *forecast* is the first that is theirs. Shares
    (all <= 1) are of the rows; numbers of rows are taken as they are, and rows after them are not used.
    """
    rows, size = len(table.dates), lookback + horizon
    counts = [int(share * rows) if max(split) <= 1 else int(share) for share in split]
    if min(split) <= 0 or sum(counts) > rows:
        raise ValueError(f"--split must be positive shares (sum <= 1) or numbers of rows (sum <= {rows}); got {split}")
    first, second, third = (int(end) for end in np.cumsum(counts))
    parts = {
        "train": range(first),
        "validation": range(first - lookback, second),
        "test": range(second - lookback, third),
    }
    for name, part in parts.items():
        if len(part) < size or part.start < 0:
            raise ValueError(
                f"the table is too short: {name} has {len(part)} of its {rows} rows, and a single window takes {size} "
                f"(--lookback {lookback} + --horizon {horizon}); give more rows, or shorten these"
            )
        own = slice(part.start + (lookback if name != "train" else 0), part.stop)
        useless = ~table.observed[own].any(0) | ((np.ptp(table.values[own], axis=0) == 0) & (name == "train"))
        if useless.any():
            raise ValueError(
                "columns to forecast must have values in train, validation and test, and vary in train; "
                f"{table.names[int(useless.argmax())]!r} does not in {name}; name others with --columns, or move --split"
            )
    return parts


# -- models ------------------------------------------------------------------------------------------------------------
#
# Both take (series, look-back) and return (series, origins, horizon): a forecast that begins after the last step and, where
# there are more origins than one, forecasts that begin after earlier steps.


def instance_norm(x: Tensor, reference: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Take each series off the level and scale of ``reference``, and return it with the inverse for forecasts.

    RevIN (Kim et al., 2022) without its affine map.
    """
    level = reference.mean(1, keepdim=True)
    scale = (reference.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    return (x - level) / scale, lambda forecasts: forecasts * scale[:, None] + level[:, None]


def repeat_season(x: Tensor, season: int, horizon: int, stride: int) -> Tensor:
    """The seasonal-naive forecast, "the same hour yesterday": the last season, and again as far as the horizon goes.

    From (series, steps) to (series, origins, horizon). Origins are the last step, and each ``stride`` before it that has a
    season behind it.
    """
    seasons = x[:, (x.shape[1] - season) % stride :].unfold(1, season, stride)
    return seasons.repeat(1, 1, -(-horizon // season))[..., :horizon]


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that begins at 0: training sets out from the seasonal-naive forecast, not from noise around it."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PatchForecaster(nn.Module):
    """Patches see each other, and say together how the last season has to be corrected (PatchTST, arXiv 2211.14730)."""

    def __init__(self, o: Options, season: int) -> None:
        super().__init__()
        self.patch, self.season, self.horizon = o.patch, season, o.horizon
        rotary = positions.Rotary(o.dim // o.heads)
        self.embed = nn.Linear(o.patch, o.dim)
        self.encoder = xf.Encoder(o.dim, o.depth, o.heads, position=rotary, dropout=o.dropout)
        self.head = zero_linear(o.lookback // o.patch * o.dim, o.horizon)

    def forward(self, x: Tensor) -> Tensor:
        x, inverse = instance_norm(x, reference=x)
        tokens = self.embed(x.unflatten(1, (-1, self.patch)))
        tokens = self.encoder(tokens, xf.Sequence(tokens.shape[1]))
        naive = repeat_season(x, self.season, self.horizon, stride=x.shape[1])
        return inverse(naive + self.head(tokens.flatten(1))[:, None])


class CausalForecaster(nn.Module):
    """Patches see those before them, and each says how to correct the season up to it (as TimesFM, arXiv 2310.10688).

    Every patch is an origin, so a window trains many forecasts. The first season sets level and scale, and forecasts begin
    where it ends: nothing is normalised by what comes after it.
    """

    def __init__(self, o: Options, season: int) -> None:
        super().__init__()
        self.patch, self.season, self.horizon = o.patch, season, o.horizon
        rotary = positions.Rotary(o.dim // o.heads)
        self.embed = nn.Linear(o.patch, o.dim)
        self.encoder = xf.Encoder(o.dim, o.depth, o.heads, mask=masks.Causal(), position=rotary, dropout=o.dropout)
        self.head = zero_linear(o.dim, o.horizon)

    def forward(self, x: Tensor) -> Tensor:
        x, inverse = instance_norm(x, reference=x[:, : self.season])
        tokens = self.embed(x.unflatten(1, (-1, self.patch)))
        tokens = self.encoder(tokens, xf.Sequence(tokens.shape[1]))
        naive = repeat_season(x, self.season, self.horizon, stride=self.patch)
        return inverse(naive + self.head(tokens[:, -naive.shape[1] :]))


def absolute_error(forecasts: Tensor, window: Tensor, observed: Tensor, stride: int) -> Tensor:
    """Mean absolute error of forecasts (series, origins, horizon) in windows (series, steps), over what was observed."""
    origins, horizon = forecasts.shape[1:]
    first = window.shape[1] - horizon - (origins - 1) * stride
    target, seen = (x[:, first:].unfold(1, horizon, stride) for x in (window, observed))
    return ((forecasts - target).abs() * seen).sum() / seen.sum().clamp(min=1)


# -- scores ------------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """Errors summed over windows, on standardised values, and their number: each (horizon, channels), in fp64."""

    absolute: Tensor
    squared: Tensor
    number: Tensor

    def mae(self) -> float:
        """Mean absolute error over windows, steps and channels."""
        return float(self.absolute.sum() / self.number.sum())

    def mse(self) -> float:
        """Mean squared error over windows, steps and channels."""
        return float(self.squared.sum() / self.number.sum())

    def mae_by_channel(self, scale: Tensor) -> Tensor:
        """Mean absolute error of each channel in the data's own unit: (channels,)."""
        return self.absolute.sum(0) / self.number.sum(0) * scale

    def mae_by_step(self, scale: Tensor) -> Tensor:
        """Mean absolute error of each step ahead in the data's own unit, the mean of the channels': (horizon,)."""
        return (self.absolute / self.number * scale).nanmean(1)


@torch.inference_mode()
def score(
    forecast: Callable[[Tensor], Tensor], window: Tensor, observed: Tensor, lookback: int, batch_size: int
) -> Score:
    """Score the forecast of every window where a value was observed; ``batch_size`` makes no difference."""
    windows, channels, steps = window.shape
    sums = torch.zeros(3, steps - lookback, channels, dtype=torch.float64, device=window.device)
    for start in range(0, windows, batch_size):
        batch, seen = window[start : start + batch_size], observed[start : start + batch_size, :, lookback:]
        answer = forecast(batch[..., :lookback].flatten(0, 1))[:, -1].unflatten(0, (-1, channels))
        error = (answer - batch[..., lookback:]).double() * seen
        sums += torch.stack([error.abs(), error.square(), seen.double()]).sum(1).mT
    return Score(*sums.cpu())


def summary(table: Table, ours: Score, naive: Score, scale: Tensor) -> str:
    """Test errors of the model and of the last season repeated, side by side."""
    columns = []
    for s in (ours, naive):
        by_channel = s.mae_by_channel(scale)
        columns.append([*by_channel, by_channel.mean(), torch.tensor(s.mae()), torch.tensor(s.mse())])
    names = [*table.names, "mean of channels", "standardised MAE", "standardised MSE"]
    lines = [f"{'test MAE' + (table.unit and ', ' + table.unit):<22}{'model':>10}{'last season':>14}{'ratio':>8}"]
    for name, a, b in zip(names, *columns, strict=True):
        lines.append(f"{name[:21]:<22}{a:>10.4f}{b:>14.4f}{a / b:>8.2f}")
    return "\n".join(lines)


# -- picture -----------------------------------------------------------------------------------------------------------

INK, PAST, OURS, NAIVE = "#222222", "#a0a0a0", "#d1495b", "#2e86ab"


class Example(NamedTuple):
    """Two forecasts of one window in the data's own unit, each (channels, horizon), and the row where they begin."""

    first: int
    ours: np.ndarray
    naive: np.ndarray


def draw(path: Path, table: Table, examples: list[Example], curves: tuple[Tensor, Tensor]) -> None:
    """Forecast and truth of a few windows, the errors beneath them, and the mean error by step ahead.

    Args:
        path: the PNG file to write.
        table: the data.
        examples: the windows to show; of their channels, the first three.
        curves: mean absolute error by step ahead, of the model and of the last season: each (horizon,).
    """
    channels, width, unit = min(3, len(table.names)), len(examples), table.unit and ", " + table.unit
    figure = Figure(figsize=(3.6 * width + 3.8, 3.4 * channels + 0.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[width, 1.05], wspace=0.04, squeeze=False)[0]
    grid = left.subplots(2 * channels, width, sharex=True, height_ratios=[2.2, 1] * channels, squeeze=False)
    for channel in range(channels):
        for column, example in enumerate(examples):
            draw_window(grid[2 * channel, column], grid[2 * channel + 1, column], table, example, channel)
        limit = max(abs(bound) for axes in grid[2 * channel + 1] for bound in axes.get_ylim())
        for axes in grid[2 * channel + 1]:
            axes.set_ylim(-limit, limit)
        grid[2 * channel, 0].set_ylabel(table.names[channel] + unit)
        grid[2 * channel + 1, 0].set_ylabel("error" + unit)
    for axes, example in zip(grid[0], examples, strict=True):
        axes.set_title(f"from {table.dates[example.first]:%Y-%m-%d %H:%M}")
    for axes in grid[-1]:
        axes.set_xlabel("steps ahead")
    curve = right.subplots()
    for values, colour in zip(curves, (OURS, NAIVE), strict=True):
        curve.plot(range(1, len(values) + 1), values, color=colour, lw=2.5)
    curve.set(title="mean absolute error on test" + unit, xlabel="steps ahead", ylim=(0, None))
    left.align_ylabels()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
    for axes in (*grid.flat, curve):
        axes.spines[:].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color="0.9", lw=0.8)
        axes.tick_params(length=0)
    with common.replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


def draw_window(values: Axes, errors: Axes, table: Table, example: Example, channel: int) -> None:
    """One channel of one window: the values above, the errors below."""
    horizon = example.ours.shape[1]
    past = min(example.first, max(table.season, horizon))
    truth = np.where(table.observed[:, channel], table.values[:, channel], np.nan)
    steps, ahead = np.arange(1, horizon + 1), slice(example.first, example.first + horizon)
    values.plot(np.arange(1 - past, 2), truth[example.first - past : example.first + 1], color=PAST, lw=2, label="past")
    values.plot(steps, truth[ahead], color=INK, lw=3.5, alpha=0.75, label="truth")
    for forecast, colour, label in ((example.naive, NAIVE, "last season repeated"), (example.ours, OURS, "forecast")):
        values.plot(steps, forecast[channel], color=colour, lw=1.8, label=label)
        errors.axhline(0, color=INK, lw=0.8)
        errors.fill_between(steps, forecast[channel] - truth[ahead], color=colour, alpha=0.25, lw=0)
        errors.plot(steps, forecast[channel] - truth[ahead], color=colour, lw=1.5)


# -- the run -----------------------------------------------------------------------------------------------------------


def main(o: Options) -> None:
    began = time.perf_counter()

    # 1. The data: made regular, split by time, standardised by the training rows, and seen as windows.
    with common.plain_errors():
        o.check()
        frame, unit = (
            (load_temperatures(), "°F") if o.data is None else (load_csv(o.data, o.date_column, o.columns), "")
        )
        table = regular(frame, o.season, unit)
        if table.season > o.lookback:
            raise ValueError(f"--lookback must hold a season of {table.season} steps; got --lookback {o.lookback}")
        parts = split_rows(table, o.split, o.lookback, o.horizon)
        device = common.choose_device(o.device)
    mean, std = (f(table.values[: parts["train"].stop], axis=0) for f in (np.mean, np.std))
    values = torch.tensor((table.values - mean) / std, dtype=torch.float32, device=device)
    observed = torch.tensor(table.observed, device=device)
    size = o.lookback + o.horizon
    # Views (windows, channels, steps) at stride 1: no window is copied before it is needed.
    window = {name: values[part.start : part.stop].unfold(0, size, 1) for name, part in parts.items()}
    seen = {name: observed[part.start : part.stop].unfold(0, size, 1) for name, part in parts.items()}

    # 2. The model, and what trains it.
    torch.set_num_threads(o.threads)
    common.seed_everything(o.seed)
    model = (PatchForecaster if o.model == "patch" else CausalForecaster)(o, table.season).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=o.weight_decay)
    schedule = common.cosine_schedule(optimizer, warmup=o.warmup, steps=o.steps)
    trained = {"model": model, "optimizer": optimizer, "schedule": schedule}

    # 3. The run: a new one, or one to be continued.
    free = ("run", "resume", "device", "eval_batch_size")  # what may differ when a run is continued
    run = common.Run(o.run, {name: str(value) for name, value in asdict(o).items() if name not in free})
    step, best, spent = 0, math.inf, 0.0
    if o.resume:
        with common.plain_errors():
            step, saved = run.resume(trained)
        best, spent = saved["best"], saved["seconds"]
    else:
        run.begin()
    print(describe(table, window, o, common.count_parameters(model), device))

    # 4. Training, on windows drawn at random. Every --eval-every steps: a score on validation, and everything saved.
    total = torch.zeros((), device=device)
    bar = tqdm(initial=step, total=o.steps, desc="train", unit="step", mininterval=0.5)
    while step < o.steps:
        model.train()
        index = torch.randint(len(window["train"]), (o.batch_size,)).to(device)
        batch, batch_seen = (x["train"][index].flatten(0, 1) for x in (window, seen))
        loss = absolute_error(model(batch[:, : o.lookback]), batch, batch_seen, stride=o.patch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        total += loss.detach()
        bar.update()
        if step % o.eval_every and step < o.steps:
            continue
        model.eval()
        validation = score(model, window["validation"], seen["validation"], o.lookback, o.eval_batch_size).mae()
        if not math.isfinite(validation):
            raise SystemExit(f"error: the validation error is {validation} at step {step}; try a smaller --lr")
        train = float(total) / ((step - 1) % o.eval_every + 1)
        total.zero_()
        seconds = spent + time.perf_counter() - began
        run.log(
            step=step, train_mae=train, validation_mae=validation, lr=optimizer.param_groups[0]["lr"], seconds=seconds
        )
        bar.set_postfix(train=f"{train:.4f}", validation=f"{validation:.4f}")
        if validation < best:
            best = validation
            run.save_weights(model)
        run.save_state(step, trained, best=best, seconds=seconds)
    bar.close()

    # 5. The weights that did best on validation, scored once on every test window, beside the seasonal-naive forecast.
    run.load_weights(model)
    model.eval()
    naive = partial(repeat_season, season=table.season, horizon=o.horizon, stride=o.lookback)
    ours, theirs = (score(f, window["test"], seen["test"], o.lookback, o.eval_batch_size) for f in (model, naive))
    scale = torch.tensor(std)
    run.log(
        step=step,
        test_mae=float(ours.mae_by_channel(scale).mean()),
        naive_test_mae=float(theirs.mae_by_channel(scale).mean()),
        test_mae_standardised=ours.mae(),
        test_mse_standardised=ours.mse(),
        seconds=spent + time.perf_counter() - began,
    )

    # 6. A picture of three test windows, evenly apart.
    examples = []
    for i in np.linspace(0, len(window["test"]) - 1, 3).astype(int):
        with torch.inference_mode():
            x = window["test"][i, :, : o.lookback]
            answers = [f(x)[:, -1].cpu().numpy() * std[:, None] + mean[:, None] for f in (model, naive)]
        examples.append(Example(parts["test"].start + o.lookback + int(i), *answers))
    picture = o.run / "forecast.png"
    draw(picture, table, examples, (ours.mae_by_step(scale), theirs.mae_by_step(scale)))

    files = ", ".join(path.name for path in (run.metrics, run.weights, run.state, picture))
    print(f"\n{summary(table, ours, theirs, scale)}\n")
    print(f"{spent + time.perf_counter() - began:.0f} seconds; in {o.run}: {files}")


def describe(table: Table, window: dict[str, Tensor], o: Options, parameters: int, device: torch.device) -> str:
    """What is about to be trained, and on what."""
    missing = int((~table.observed).sum())
    filled = (
        f"\n         {missing:,} missing cells: filled with the value before, not trained or scored on"
        if missing
        else ""
    )
    windows = ", ".join(f"{name} {len(x):,}" for name, x in window.items())
    return (
        f"data     {', '.join(table.names)}: {len(table.dates):,} rows, {table.dates[0]} to {table.dates[-1]}{filled}\n"
        f"windows  {windows}, each of {o.lookback} steps and {o.horizon} ahead\n"
        f"model    {o.model}, {parameters:,} parameters, on {device}"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
