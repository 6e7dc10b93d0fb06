"""Train every forecasting model alike, and compare what each is made of, what it sees, what it costs and how well it forecasts.

    python examples/compare_forecasters.py                                  # a few steps on the temperatures: is everything there?
    python examples/compare_forecasters.py --data ETTh1.csv --split 8640 2880 2880 --lookback 96 --horizon 96 --steps 600
    python examples/compare_forecasters.py --help

Takes the options of time_series.py. What is written: comparison.md, the table; comparison.png, the picture; and one run for each
model. With --resume, models that are trained are not trained again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import series_scores as scores
import time_series as example
import torch
import tyro
from matplotlib.figure import Figure

from xformerlib import time_series as ts

# How many states, one made from the other, lie between the oldest step of the look-back and the forecast. What is linear from the
# whole look-back to the forecast has none. A formula of the architecture, unlike all else here, which is measured.
Paths = dict[type[ts.ForecastModel], Callable[[ts.ForecastModel], int]]
PATHS: Paths = {
    ts.SeasonalNaive: lambda m: 0,
    ts.DLinear: lambda m: 0,
    ts.RNN: lambda m: m.lookback,
    ts.AutoregressiveRNN: lambda m: m.lookback,
    ts.AttentionPoolingRNN: lambda m: 1,
    ts.TCN: lambda m: 2 * len(m.blocks),  # type: ignore[arg-type]  # two convolutions in each
    ts.WaveNet: lambda m: len(m.layers),  # type: ignore[arg-type]
}
ATTENTION = 1  # of models in which every token sees every other in one step


@dataclass(frozen=True)
class Options(example.Options):
    """Train every forecasting model alike, and compare them."""

    models: tuple[example.Name, ...] = tuple(example.MODELS)
    """The models to compare."""
    steps: int = 20
    """Training steps of each."""
    run: Path = Path("runs/compare_forecasters")
    """Directory for all that is written: one within it for each model."""


class Row(NamedTuple):
    """What was found out about one model. ``reach`` is how strongly the forecast depends on each step, the last one first."""

    name: str
    parameters: int
    path: int
    reach: np.ndarray
    milliseconds: float
    mse: float
    mae: float

    @property
    def field(self) -> int:
        """Receptive field: steps back to the oldest one on which the forecast depends at all."""
        return int(np.flatnonzero(self.reach)[-1]) + 1 if self.reach.any() else 0

    @property
    def half(self) -> int:
        """Steps back to where half of the dependence lies."""
        return int(np.searchsorted(self.reach.cumsum(), self.reach.sum() / 2)) + 1


def reach(model: ts.ForecastModel, windows: ts.Windows, count: int = 64) -> np.ndarray:
    """mean |d forecast_1 / d x_(L - age)| by age, over windows: the receptive field as the gradient sees it.

    The forecast is of the first step after the look-back, of which all targets are added up.
    """
    model.eval()
    inputs = windows.batch(torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()).inputs
    x = inputs["x"].nan_to_num().requires_grad_()
    with torch.enable_grad():
        first = model.head.point(model(**{**inputs, "x": x}))[:, 0].sum()
        (gradient,) = torch.autograd.grad(first, x)
    return gradient.abs().sum(2).mean(0).flip(0).double().numpy()


def milliseconds(model: ts.ForecastModel, windows: ts.Windows, batch_size: int, repeats: int = 5) -> float:
    """What a training step takes, the fastest of several: forward and backward, without the optimiser."""
    model.train()
    batch = windows.batch(slice(batch_size))
    fastest = float("inf")
    for _ in range(repeats + 1):  # the first one also plans
        began = time.perf_counter()
        model.loss(batch).backward()
        fastest = min(fastest, time.perf_counter() - began)
    return 1000 * fastest


def examine(name: example.Name, task: example.Task, o: Options) -> Row:
    """Train one model, unless that is done, and find out about it."""
    run, own = common.own_run(dataclasses.replace(o, model=name), o.seeds[0], name)
    common.seed_everything(o.seeds[0])
    model = example.build(own, task.table)
    example.train(model, task, run, own, o.seeds[0])
    run.load_weights(model)
    score = scores.score(model, task.windows["test"], o.eval_batch_size)
    size = common.count_parameters(model)
    return Row(
        name=name,
        parameters=size,
        path=PATHS.get(type(model), lambda _: ATTENTION)(model),
        reach=reach(model, task.windows["test"]),
        milliseconds=milliseconds(model, task.windows["train"], o.batch_size) if size else 0.0,
        mse=score.mse(),
        mae=score.mae(),
    )


def table(rows: list[Row]) -> str:
    """The comparison in Markdown, in the order of the models."""
    lines = [
        "| model | parameters | path | receptive field | half within | ms a step | MSE | MAE |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| `{row.name}` | {row.parameters:,} | {row.path} | {row.field} | {row.half} | {row.milliseconds:.3g} "
            f"| {row.mse:.4g} | {row.mae:.4g} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """What each model sees, by age, and its error beside its cost."""
    trained = [row for row in rows if row.parameters]
    figure = Figure(figsize=(12, 0.42 * len(rows) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    share = np.stack([row.reach / max(row.reach.max(), 1e-30) for row in rows])
    image = left.imshow(np.sqrt(share), aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, vmax=1)
    left.set_yticks(range(len(rows)), [row.name for row in rows])
    left.set(xlabel="steps before the forecast", title="|d forecast / d x|, relative to its largest (square root)")
    left.invert_xaxis()
    figure.colorbar(image, ax=left, shrink=0.8)
    for rank, row in enumerate(sorted(trained, key=lambda row: row.milliseconds)):
        place = (5, 4) if rank % 2 else (5, -10)  # neighbours on both sides, so that they can be read
        right.plot(row.milliseconds, row.mse, "o", color="#2e86ab")
        right.annotate(row.name, (row.milliseconds, row.mse), xytext=place, textcoords="offset points", fontsize=8)
    right.set(
        xscale="log", yscale="log", xlabel="milliseconds a training step", ylabel="test MSE", title="error and cost"
    )
    right.yaxis.set_major_formatter("{x:.2g}")
    right.yaxis.set_minor_formatter("{x:.2g}")
    right.spines[["top", "right"]].set_visible(False)
    with common.replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


def main(o: Options) -> None:
    with common.plain_errors():
        o.check()
        if o.model != example.Options().model or len(o.seeds) > 1:
            raise ValueError(
                "the comparison takes --models, and one seed; leave --model out, and give --seeds one number"
            )
        task = example.load(o, torch.device("cpu"))
        for name in o.models:
            example.build(
                dataclasses.replace(o, model=name), task.table
            )  # refuse what cannot be before anything is trained
    torch.set_num_threads(o.threads)
    rows = []
    for name in o.models:
        rows.append(examine(name, task, o))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    with common.replacing(o.run / "comparison.md") as path:
        path.write_text(table(rows) + "\n")
    draw(rows, o.run / "comparison.png")
    print(f"\n{table(rows)}\n\nin {o.run}: comparison.md, comparison.png, and a run for each model")


if __name__ == "__main__":
    main(tyro.cli(Options))
