"""The pictures of ``graph.py``: how training went, and which edges a model looks along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import torch
from graph_data import Batch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv

from xformerlib import graph

TRAIN, VALIDATION = "#2e86ab", "#d1495b"
FAINT = 0.02  # a share of attention below which an edge is as good as not there


def curves(path: Path, title: str, metric: str, name: str, course: list[dict[str, Any]]) -> None:
    """Losses, and the metric on validation, by epoch.

    Args:
        path: the PNG file to write.
        title: of the picture.
        metric: as it is called in the records.
        name: as it is called in the picture.
        course: the records of metrics.jsonl, one an epoch.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in course]
    for part, colour in (("train", TRAIN), ("validation", VALIDATION)):
        left.plot(epochs, [record[f"{part}_loss"] for record in course], color=colour, lw=2, label=part)
    right.plot(epochs, [record[f"validation_{metric}"] for record in course], color=VALIDATION, lw=2)
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel=f"{name} on validation")
    left.legend(frameon=False)
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", lw=0.8)
    with common.replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


def edge_weights(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Edges and the attention of the last layer along them, the mean of its heads; None for a model without attention along edges."""
    passing = [module.conv for module in model.modules() if isinstance(module, graph.GPSLayer)]
    layers: list[Any] = [conv for conv in passing if isinstance(conv, graph.EdgeAttention)]
    layers += [module for module in model.modules() if isinstance(module, GATv2Conv)]
    if not layers:
        return None
    found: list[tuple[Tensor, Tensor]] = []

    def look(layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        handle.remove()  # what is asked of the layer now is no call of the model's
        edge_index, weights = layer(*args, **options, return_attention_weights=True)[1]
        found.append((edge_index, weights.mean(1)))

    handle = layers[-1].register_forward_pre_hook(look, with_kwargs=True)
    model.eval()
    with torch.no_grad():
        model(batch)
    return found[0]


def attention(path: Path, batch: Batch, places: Tensor, weights: tuple[Tensor, Tensor], titles: list[str]) -> None:
    """Each graph of a batch, with edges as strong as the attention along them.

    Args:
        path: the PNG file to write.
        batch: the graphs; the first feature of a node is how dark it is.
        places: (nodes, 2), across and down.
        weights: edges and weights, as ``edge_weights`` gives them.
        titles: of the graphs.
    """
    edges, share = (part.cpu() for part in weights)
    owner, dark, places = batch.batch.cpu(), batch.x[:, 0].cpu(), places.cpu()
    columns = min(4, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows), layout="constrained")
    for number, (ax, title) in enumerate(zip(figure.subplots(rows, columns, squeeze=False).flat, titles, strict=False)):
        own = (owner[edges[0]] == number) & (edges[0] != edges[1]) & (share > FAINT)
        nodes = owner == number
        # Two edges between the same nodes lie side by side: each is drawn a little to its right.
        ends = places[edges[:, own]].movedim(0, 1)
        along = ends[:, 1] - ends[:, 0]
        aside = 0.08 * torch.stack([-along[:, 1], along[:, 0]], 1) / along.norm(dim=1, keepdim=True)
        strength = share[own] / share[own].max().clamp(min=1e-9) if own.any() else share[own]
        colours = [(0.82, 0.29, 0.36, float(value)) for value in strength]
        ax.add_collection(
            LineCollection(list((ends + aside[:, None]).numpy()), colors=colours, linewidths=2 * strength)
        )
        ax.scatter(
            *places[nodes].T, c=dark[nodes], cmap="Greys", vmin=0, vmax=1, s=45, edgecolors="0.5", lw=0.5, zorder=2
        )
        ax.set_title(title, fontsize=9)
        ax.set_aspect("equal")
        ax.invert_yaxis()
        ax.axis("off")
    with common.replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
