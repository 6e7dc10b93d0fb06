"""The pictures of the documentation.

    python docs/pictures.py                 # draws the one that the README shows again
    python docs/pictures.py restored        # draws restored.svg, or others by their names

All but the README's are drawn whenever the documentation is built.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence as SequenceOf
from pathlib import Path

import matplotlib
import torch

import xformerlib as xf
from xformerlib import plot
from xformerlib.masks import (
    Axial,
    Causal,
    Dilated,
    Edges,
    Expander,
    Global,
    Keys,
    Local,
    Mask,
    Prefix,
    Segments,
    Windows,
)
from xformerlib.positions import DistanceDecay, Rotary, Sinusoidal

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "xformerlib",
    "figure.facecolor": "white",
}
Draw = Callable[[Axes], object]


def row(*draws: Draw, widths: SequenceOf[float] | None = None, height: float = 2.8) -> Figure:
    """Pictures side by side, on at most the width of a page, so that letters are as large in all of them."""
    widths = widths or [1.0] * len(draws)
    scale = min(1.0, 9.0 / (height * sum(widths) * 1.05))
    with plt.rc_context(STYLE):
        size = (scale * height * sum(widths) * 1.05, scale * height)
        figure, axes = plt.subplots(
            1, len(draws), figsize=size, width_ratios=widths, layout="constrained", squeeze=False
        )
        for ax, draw in zip(axes[0], draws, strict=True):
            draw(ax)
    return figure


def matrix(mask: Mask, domain: xf.Domain, title: str | None = None) -> Draw:
    def draw(ax: Axes) -> None:
        plot.mask(mask, domain, ax=ax)
        if title is not None:
            ax.set_title(title)

    return draw


def seen(mask: Mask, domain: xf.Domain, query: int, title: str | None = None) -> Draw:
    def draw(ax: Axes) -> None:
        plot.mask_on(mask, domain, query=query, ax=ax)
        if title is not None:
            ax.set_title(title)

    return draw


def undirected(*edges: tuple[int, int]) -> torch.Tensor:
    one_way = torch.tensor(edges).T
    return torch.cat([one_way, one_way.flip(0)], 1)


SEQUENCE = xf.Sequence(16)
TIMES = xf.Timeline(torch.tensor([0.0, 0.5, 0.9, 2.1, 2.6, 3.3, 4.9, 5.4, 5.8, 7.1, 8.0]))
GRID = xf.Grid(7, 7)
DAG = xf.Graph(torch.tensor([[0, 1, 2, 2, 3, 4, 1, 5, 6, 7], [2, 2, 3, 4, 5, 5, 6, 8, 7, 8]]), 9)
# Two rings joined by a bond, with tails: the skeleton of a small molecule.
MOLECULE = undirected(
    (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (3, 6), (6, 7), (7, 8), (8, 9), (9, 10), (10, 6), (0, 11), (11, 12), (9, 13)
)  # fmt: skip
GRAPH = xf.Graph(MOLECULE, 14)


def one_mask() -> Figure:
    """One mask on three domains: as a matrix, and as one token sees it."""
    mask = Local(2) | Global(1)
    domains = [
        (xf.Sequence(20), 12, "a sequence"),
        (xf.Grid(7, 7, prefix=1), 25, "a grid with a class token"),
        (xf.Graph(MOLECULE, 14, virtual_nodes=1), 4, "a graph with a virtual node"),
    ]
    with plt.rc_context(STYLE | {"axes.titlesize": 11}):
        figure, axes = plt.subplots(2, 3, figsize=(9, 6.2), height_ratios=[1.25, 1], layout="constrained")
        for (domain, query, what), above, below in zip(domains, *axes, strict=True):
            plot.mask(mask, domain, ax=above).set(title=f"{mask!r}\non {what}", xlabel="key", ylabel="query")
            plot.mask_on(mask, domain, query=query, ax=below).set_title("")
    return figure


def general() -> Figure:
    ids = torch.tensor([0] * 5 + [1] * 7 + [2] * 4)
    valid = torch.ones(16, dtype=torch.bool)
    valid[[3, 9, 10]] = False
    return row(*(matrix(mask, SEQUENCE) for mask in (Global(2), Prefix(4), Segments(ids), Keys(valid))))


def border() -> Figure:
    corner = GRID.num_tokens - 2
    return row(*(seen(mask, GRID, corner) for mask in (Local(2), Local(2, border="clamp"))))


def sinusoidal() -> Figure:
    embed = Sinusoidal(32)
    return row(
        lambda ax: plot.embedding(embed, xf.Sequence(64), dim=32, ax=ax),
        lambda ax: plot.embedding(embed, GRID, dim=32, ax=ax),
        widths=[1.3, 1.3],
    )


def rotary() -> Figure:
    rope = Rotary(32, theta=100.0)
    return row(
        lambda ax: plot.rotation(rope, xf.Sequence(32), ax=ax),
        lambda ax: plot.rotation_on(rope, xf.Grid(9, 9), query=40, ax=ax),
        lambda ax: plot.rotation_on(rope, TIMES, query=3, ax=ax),
        widths=[1.3, 1.2, 1.8],
    )


def decay() -> Figure:
    alibi = DistanceDecay(8)
    return row(
        lambda ax: plot.bias(alibi, SEQUENCE, head=0, ax=ax),
        lambda ax: plot.bias(alibi, SEQUENCE, head=3, ax=ax),
        lambda ax: plot.bias_on(alibi, xf.Grid(9, 9), query=40, head=0, ax=ax),
        widths=[1.2, 1.2, 1.2],
    )


def forecast() -> Figure:
    """Forecasts of a week by a small model, trained on four years of daily temperatures."""
    from vega_datasets import local_data

    from xformerlib import time_series as ts

    weather = local_data.seattle_weather().rename(columns={"date": "ds"})
    df = weather.melt("ds", ["temp_max", "temp_min"], var_name="unique_id", value_name="y")
    forecaster = ts.Forecaster(
        ts.PatchTST, 56, 7, head=ts.StudentT(), patch=7, stride=7, dim=32, depth=2, heads=4, hidden=64,
        steps=150, eval_every=50, device="cpu", progress=False,
    )  # fmt: skip
    with plt.rc_context(STYLE):
        return forecaster.plot(df, forecaster.fit(df).predict(level=(80, 95)))


def tasks() -> Figure:
    """Holes in a wave filled, and hidden patches of it restored, each by a small model trained on such waves."""
    from xformerlib import time_series as ts

    torch.manual_seed(0)
    t = torch.arange(96)[:, None]

    def waves(count: int) -> torch.Tensor:
        turn = t / 24 + torch.rand(count, 1, 1)
        return 20 + 5 * torch.sin(2 * torch.pi * turn) + 2 * torch.sin(4 * torch.pi * turn + 1)

    def holes(count: int) -> torch.Tensor:
        start = torch.randint(6, 72, (count, 1, 1))
        return (t >= start) & (t < start + 16)

    imputer = ts.Imputer(1, dim=32, heads=2, dropout=0.0)
    model = ts.PatchTST(1, 96, 24, patch=12, stride=12, dim=32, depth=2, heads=4, hidden=64, dropout=0.0)
    pretraining = ts.MaskedPatches(model)
    for task, loss in (
        (imputer, lambda x: imputer.loss(x, hidden=holes(len(x)))),
        (pretraining, pretraining),
    ):
        optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            loss(waves(16)).backward()
            optimizer.step()
        task.eval()

    truth, missing = waves(1), (t >= 30) & (t < 50)
    hidden = (t // 12 == 1) | (t // 12 == 4) | (t // 12 == 6)
    seen = truth.masked_fill(missing, torch.nan)
    with torch.no_grad():
        filled, restored = imputer(seen), pretraining.restored(truth, hidden[None])

    def lines(ax: Axes, gone: torch.Tensor, ways: SequenceOf[tuple[str, torch.Tensor, str]], title: str) -> None:
        shown = [(truth, "observed", "0.2", ~gone), (truth, "truth", "0.75", gone)]
        for values, label, colour, where in [*shown, *((way, name, colour, gone) for name, way, colour in ways)]:
            ax.plot(t[:, 0], values[0].masked_fill(~where, torch.nan)[:, 0], color=colour, label=label, lw=1.5)
        ax.set(title=title, xlabel="step", xticks=range(0, 97, 24))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="upper right", fontsize=7, ncols=2)
        ax.set_ylim(12, 31)

    last = ts.fill_forward(seen, ~missing[None])
    return row(
        lambda ax: lines(ax, missing, [("Imputer", filled, "tab:blue"), ("last value", last, "tab:orange")], "filled"),
        lambda ax: lines(ax, hidden, [("MaskedPatches", restored, "tab:blue")], "patches hidden and restored"),
        widths=[1.6, 1.6],
    )


def forces() -> Figure:
    """Forces on points, which are the gradient of an energy in their coordinates."""
    torch.manual_seed(0)
    angle = torch.linspace(0, 2 * torch.pi, 13)[:-1]
    places = (torch.stack([angle.cos(), angle.sin()], -1) * (1 + 0.3 * (3 * angle).cos()[:, None])).requires_grad_()
    position = DistanceDecay(2, learned=True)
    model = xf.Encoder(16, 2, 2, position=position, mask=Local(1.5), final_norm=False)
    energy = model(torch.randn(12, 16), xf.Points(places)).square().sum()
    (gradient,) = torch.autograd.grad(energy, places)
    domain = xf.Points(places.detach())

    def pull(ax: Axes) -> None:
        plot.mask_on(Local(1.5), domain, query=0, ax=ax)
        ax.quiver(*places.detach().T, *-gradient.T, color="tab:red", width=0.008)
        ax.set_title("forces of neighbours within 1.5")

    return row(lambda ax: plot.bias_on(position, domain, query=0, ax=ax), pull, widths=[1.3, 1.3])


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's handwritten digits, 8 x 8 pixels from -1 to 1, and which digit each is."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images[:, None] / 8 - 1).float(), torch.tensor(found.target)


def looked_at() -> Figure:
    """Digits, and what a small Vision Transformer looks at that was trained on others like them."""
    from xformerlib import vision

    images, labels = digits()
    torch.manual_seed(0)
    model = vision.ViT(10, size=8, embed=vision.ConvStem(32, channels=1, pool=False), dim=32, depth=2, heads=4)
    optimizer = torch.optim.AdamW(vision.parameter_groups(model, weight_decay=0.05, lr=4e-3))
    for _ in range(120):
        index = torch.randint(1500, (32,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
    model.eval()

    shown = images[1500:1506]
    maps = vision.attention_maps(model, shown)
    lines = [("image", 0 * maps[-1].of(0).mean(1)), ("last layer", maps[-1].of(0).mean(1))]
    lines.append(("all layers", vision.rollout(maps).of(0).mean(1)))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, len(shown), figsize=(8, 4.2), layout="constrained")
        for (name, attention), line in zip(lines, axes, strict=True):
            for image, seen, ax in zip(shown, attention, line, strict=True):
                plot.attention_on_image(image, seen, ax=ax)
            beside(line[0], name)
    return figure


def beside(ax: Axes, name: str) -> None:
    """What a line of pictures shows, in front of the first."""
    ax.text(-0.08, 0.5, name, transform=ax.transAxes, rotation=90, ha="right", va="center")


def restored() -> Figure:
    """Digits of which half of the patches are hidden, and restored by a small masked autoencoder that was trained on others."""
    from xformerlib import vision

    images, _ = digits()
    torch.manual_seed(0)
    encoder = vision.ViT(None, size=8, patch=2, channels=1, dim=64, depth=2, heads=4, position=Sinusoidal(64))
    model = vision.MaskedAutoencoder(
        encoder, decoder_dim=64, decoder_depth=2, decoder_heads=4, ratio=0.5, norm_targets=False
    )
    optimizer = torch.optim.AdamW(vision.parameter_groups(model, weight_decay=0.05, lr=3e-3))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        optimizer.zero_grad()
        model(images[torch.randint(1500, (64,))]).loss.backward()
        optimizer.step()
        schedule.step()

    shown = images[1500:1508]
    with torch.no_grad():
        _, whole, hidden = model.eval()(shown)
    hidden = hidden[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    lines = [("image", shown), ("seen", shown.masked_fill(hidden, torch.nan)), ("restored", whole)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, len(shown), figsize=(8, 3.2), layout="constrained")
        for (name, pictures), line in zip(lines, axes, strict=True):
            for picture, ax in zip(pictures, line, strict=True):
                ax.set_facecolor("lightsteelblue")
                ax.imshow(picture[0].numpy(), cmap="gray", vmin=-1, vmax=1)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            beside(line[0], name)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "causal": lambda: row(matrix(Causal(), SEQUENCE), seen(Causal(), GRID, 24), seen(Causal(), DAG, 5)),
    "local": lambda: row(
        matrix(Local(2), SEQUENCE),
        seen(Local(1.5), TIMES, 4),
        seen(Local(2), GRID, 24),
        seen(Local(2), GRAPH, 6),
        widths=[1, 1.4, 1, 1],
    ),
    "border": border,
    "dilated": lambda: row(matrix(Dilated(2, step=3), SEQUENCE), seen(Dilated(1, step=2), GRID, 24)),
    "windows": lambda: row(
        matrix(Windows(4), SEQUENCE),
        matrix(Windows(4, shift=2), SEQUENCE),
        seen(Windows(2), TIMES, 4),
        seen(Windows(3, shift=1), GRID, 24),
        widths=[1, 1, 1.4, 1],
    ),
    "axial": lambda: row(seen(Axial(1), GRID, 24), seen(Axial(0), GRID, 24)),
    "edges": lambda: row(matrix(Edges(), GRAPH), seen(Edges(), GRAPH, 6), seen(Edges(), DAG, 5)),
    "expander": lambda: row(matrix(Expander(4, seed=0), xf.Sequence(32)), seen(Expander(4, seed=0), GRAPH, 6)),
    "general": general,
    "algebra": lambda: row(
        *(
            matrix(mask, SEQUENCE)
            for mask in (Causal() & Local(3), Local(2) | Global(1), Local(2) | Dilated(3, step=4))
        ),
        seen(Windows(3) & ~Local(0), GRID, 24),
    ),
    "sinusoidal": sinusoidal,
    "rotary": rotary,
    "decay": decay,
    "forecast": forecast,
    "tasks": tasks,
    "looked-at": looked_at,
    "forces": forces,
    "restored": restored,
}


def as_svg(figure: Figure) -> bytes:
    """The figure as an SVG file, the same bytes each time."""
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(f"{name}.svg").write_bytes(as_svg(PICTURES[name]()))
        print(f"drew {name}.svg")
    if not sys.argv[1:]:
        path = Path(__file__).parent / "assets" / "one-mask.png"
        path.parent.mkdir(exist_ok=True)
        one_mask().savefig(path, dpi=110, metadata={"Software": None})
        print(f"drew {path}")
