"""How tokens and matrices are drawn: axes, colours, and where tokens are on paper."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..domains import Domain, Graph, Grid, Points, Sequence, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEEN, UNSEEN, MARK, EDGE = "#2a6f97", "#e3e8ec", "#f2a900", "#a9b4bc"


# -- drawing ---------------------------------------------------------------------------------------------------------


def axes_on(ax: Axes | None) -> Axes:
    """The axes that were given, or new ones."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'xformerlib.plot draws with matplotlib, which is not installed: pip install "xformerlib[plot]"'
        ) from error
    return pyplot.subplots(layout="constrained")[1]


def titled(ax: Axes, title: str, drawn: Any = None, unit: str = "") -> Axes:
    """The axes with a title and, where ``drawn`` needs one to be read, a scale of colours."""
    ax.set_title(title)
    if drawn is not None:
        ax.figure.colorbar(drawn, ax=ax, label=unit)
    return ax


def two_colours() -> dict[str, Any]:
    """Colours of pairs that count and pairs that do not."""
    from matplotlib.colors import ListedColormap

    return {"cmap": ListedColormap([UNSEEN, SEEN]), "vmin": 0.0, "vmax": 1.0}


def centred(values: Tensor) -> dict[str, Any]:
    """Colours with white at 0."""
    finite = values[values.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() and finite.any() else 1.0
    return {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}


def draw_matrix(
    values: Shaped[Tensor, "queries keys"], domain: Domain, keys: Domain, ax: Axes | None, **colours: Any
) -> tuple[Axes, Any]:
    """Draw one cell per pair, coloured by its value; return the axes and the image."""
    ax = axes_on(ax)
    drawn = ax.imshow(values.double().numpy(), interpolation="nearest", **colours)
    ax.set(xlabel=f"key: {keys!r}", ylabel=f"query: {domain!r}")
    ax.locator_params(integer=True)
    if max(values.shape) <= 40:  # lines between cells while cells can be told apart
        ax.set_xticks([column - 0.5 for column in range(1, values.shape[1])], minor=True)
        ax.set_yticks([line - 0.5 for line in range(1, values.shape[0])], minor=True)
        ax.grid(which="minor", color="white", linewidth=0.8)
        ax.tick_params(which="minor", length=0)
    for where, line in ((domain, ax.axhline), (keys, ax.axvline)):
        for boundary in [] if where.offsets is None else where.offsets[1:-1].tolist():
            line(boundary - 0.5, color=MARK, linewidth=0.8)
    return ax, drawn


def draw_tokens(
    domain: Domain,
    tokens: Int[Tensor, " tokens"],
    values: Shaped[Tensor, " tokens"],
    query: int,
    row: int,
    ax: Axes | None,
    *,
    cmap: Any,
    vmin: float,
    vmax: float | None = None,
) -> tuple[Axes, Any]:
    """Draw one mark per token where it is, coloured by its value; return the axes and the marks."""
    ax = axes_on(ax)
    places = _places(domain, tokens, row)
    if isinstance(domain, Sequence | Grid):
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        cells = [Rectangle((x - 0.45, y - 0.45), 0.9, 0.9) for x, y in places.tolist()]
        marks: Any = ax.add_collection(PatchCollection(cells))
        ax.autoscale_view()
    else:
        if isinstance(domain, Graph):
            _edges(ax, domain, tokens, places)
        marks = ax.scatter(places[:, 0].numpy(), places[:, 1].numpy(), s=90, zorder=2)
        ax.margins(0.15)
    own = (tokens == query).tolist()
    marks.set(edgecolors=[MARK if o else "white" for o in own], linewidths=[2.5 if o else 0.8 for o in own])
    marks.set(array=values.detach().cpu().double().numpy(), cmap=cmap, clim=(vmin, vmax))
    _frame(ax, domain)
    return ax, marks


def _frame(ax: Axes, domain: Domain) -> None:
    """Axes that say as much as the domain does: coordinates where there are any, equal units where there are two."""
    if isinstance(domain, Sequence | Timeline):
        ax.spines[["left", "right", "top"]].set_visible(False)
        ax.set_yticks([])
        ax.set_xlabel("time" if isinstance(domain, Timeline) else "position")
    elif not isinstance(domain, Points):
        ax.set_axis_off()
    if isinstance(domain, Grid) and not ax.yaxis_inverted():
        ax.invert_yaxis()  # row 0 on top, as images are shown
    if not isinstance(domain, Timeline):
        ax.set_aspect("equal", adjustable="box" if isinstance(domain, Sequence | Grid) else "datalim")


def _edges(ax: Axes, graph: Graph, tokens: Int[Tensor, " tokens"], places: Float[Tensor, "tokens 2"]) -> None:
    """The edges between ``tokens`` as lines; with heads where not every edge has its reverse."""
    pairs = set(map(tuple, _links(graph, tokens).T.tolist()))
    undirected = all((j, i) in pairs for i, j in pairs)
    style = {"arrowstyle": "-" if undirected else "-|>", "color": EDGE, "shrinkA": 0, "shrinkB": 0 if undirected else 6}
    for i, j in sorted(pairs):
        if not (undirected and i > j):
            ax.annotate("", tuple(places[j].tolist()), tuple(places[i].tolist()), arrowprops=style, zorder=1)


def _links(graph: Graph, tokens: Int[Tensor, " tokens"]) -> Int[Tensor, "2 links"]:
    """The edges between different ones of ``tokens``, as places in that list."""
    order = torch.full((graph.num_tokens,), -1)
    order[tokens] = torch.arange(len(tokens))
    links = order[graph.node_tokens[graph.edge_index].cpu()]
    return links[:, (links >= 0).all(0) & (links[0] != links[1])]


# -- where tokens are on paper ---------------------------------------------------------------------------------------


def _places(domain: Domain, tokens: Int[Tensor, " tokens"], row: int) -> Float[Tensor, "tokens 2"]:
    """By their coordinates, and prefix tokens in a column on the left."""
    b = torch.tensor(row)
    prefix = domain.is_prefix(b, tokens)
    if prefix is None:
        return _layout(domain, b, tokens)
    places = torch.zeros(len(tokens), 2, dtype=torch.float64)
    places[~prefix] = ordinary = _layout(domain, b, tokens[~prefix])
    low, high = (ordinary.amin(0), ordinary.amax(0)) if len(ordinary) else (places[0], places[0])
    step = 1.0 if isinstance(domain, Sequence | Grid) else 0.15 * (float((high - low).max()) or 1.0)
    rank = torch.arange(int(prefix.sum()), dtype=torch.float64)
    places[prefix, 0] = low[0] - 1.5 * step
    places[prefix, 1] = (low[1] + high[1]) / 2 + step * (rank - (len(rank) - 1) / 2)
    return places


def _layout(domain: Domain, b: Tensor, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens 2"]:
    if isinstance(domain, Graph):
        return _stress_layout(_links(domain, tokens), len(tokens))
    axes = [domain.coordinate(axis, b, tokens).double() for axis in range(domain.ndim)]
    if isinstance(domain, Grid):
        axes.reverse()  # the last axis of a grid runs to the right
        if domain.ndim == 3:  # slices side by side
            axes[0] = axes[0] + (domain.sizes[-1] + 1) * axes[2]
    return torch.stack([axes[0], axes[1] if len(axes) > 1 else torch.zeros_like(axes[0])], -1)


def _stress_layout(links: Int[Tensor, "2 links"], nodes: int, rounds: int = 200) -> Float[Tensor, "nodes 2"]:
    """Places on the plane whose distances come close to hop distances on the undirected graph, short ones above all.

    Minimises ``sum_ij (|x_i - x_j| - d_ij)^2 / d_ij^2`` by majorisation, from a circle (Gansner, Koren and North 2005, Graph drawing
    by stress majorization).
    """
    apart = torch.full((nodes, nodes), torch.inf, dtype=torch.float64).fill_diagonal_(0)
    apart[links[0], links[1]] = apart[links[1], links[0]] = 1
    for via in range(nodes):  # Floyd and Warshall
        apart = torch.minimum(apart, apart[:, via, None] + apart[via])
    finite = apart[apart.isfinite()]
    apart = apart.clamp(max=float(finite.max()) + 1 if nodes else 1.0)
    weight = torch.where(apart > 0, apart**-2, 0.0)
    solve = torch.linalg.pinv(torch.diag(weight.sum(1)) - weight)
    angle = torch.arange(nodes, dtype=torch.float64) * (2 * math.pi / max(nodes, 1))
    places = torch.stack([angle.cos(), angle.sin()], -1) * nodes / 6
    for _ in range(rounds):
        drawn = torch.cdist(places, places)
        pull = torch.where(drawn > 1e-9, weight * apart / drawn, 0.0)
        places = solve @ ((torch.diag(pull.sum(1)) - pull) @ places)
    return places @ torch.linalg.eigh(places.mT @ places).eigenvectors.flip(1)  # the longest way runs to the right
