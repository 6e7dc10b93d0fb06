"""Pictures of masks, positions and attention, drawn with matplotlib.

Two views of everything that relates queries to keys: the matrix (``mask``, ``bias``, ``attention``, ``rotation``), and one query's
row of it laid out on the domain itself (``mask_on``, ``bias_on``, ``attention_on``): cells of a grid, nodes of a graph, points of a
plane, moments on a time axis. Each function draws on ``ax``, or on a new figure without it, and returns the axes.

matplotlib comes with the extra ``xformerlib[examples]``; it is imported when the first picture is drawn. Matrices are Tq x Tk, and
the layout of a graph needs all its hop distances: pictures are for small domains.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .domains import Domain, Graph, Grid, Points, Sequence, Timeline
from .masks import Mask
from .positions import Bias, Embedding, Rotation

if TYPE_CHECKING:
    import matplotlib.axes

__all__ = ["attention", "attention_on", "bias", "bias_on", "embedding", "mask", "mask_on", "rotation"]

SEEN, UNSEEN, QUERY = "#2a6f97", "#e9edf0", "#d1495b"


# -- matrices --------------------------------------------------------------------------------------------------------


def mask(
    mask: Mask,
    domain: Domain,
    key_domain: Domain | None = None,
    *,
    row: int = 0,
    head: int = 0,
    ax: matplotlib.axes.Axes | None = None,
) -> matplotlib.axes.Axes:
    """The mask as a picture: one line per query, one column per key, dark where the query may attend.

    Args:
        mask: what to draw.
        domain: where queries live.
        key_domain: where keys live; ``domain`` if not given.
        row, head: which row of the batch and which head, where the mask differs between them.
        ax: the axes to draw on.

    Example:
        >>> mask(Causal() & Local(3), Sequence(16)).get_title()
        'Causal() & Local(3)'
    """
    keys = domain if key_domain is None else key_domain
    allowed = _one(mask.dense(domain, keys), row, head)
    ax = _matrix(allowed, domain, keys, ax, cmap=_two_colours(), vmin=0, vmax=1)
    ax.set_title(repr(mask))
    return ax


def bias(
    position: Bias,
    domain: Domain,
    key_domain: Domain | None = None,
    *,
    row: int = 0,
    head: int = 0,
    ax: matplotlib.axes.Axes | None = None,
) -> matplotlib.axes.Axes:
    """What a relative position adds to the scores of one head: one line per query, one column per key.

    Red raises a score, blue lowers it. Arguments as in ``mask``.

    Example:
        >>> picture = bias(DistanceDecay(heads=8), Sequence(16), head=2)
    """
    keys = domain if key_domain is None else key_domain
    scores = _scores(position, domain, keys, torch.arange(domain.num_tokens)[:, None], row, head)
    ax = _matrix(scores, domain, keys, ax, cmap="RdBu_r", **_centred(scores))
    _colorbar(ax.images[0], "score")
    ax.set_title(f"{type(position).__name__}, head {head}")
    return ax


def attention(
    weights: Float[Tensor, "*batch_heads queries keys"],
    domain: Domain,
    key_domain: Domain | None = None,
    *,
    row: int = 0,
    head: int = 0,
    ax: matplotlib.axes.Axes | None = None,
) -> matplotlib.axes.Axes:
    """Attention weights, as ``Attention.weights`` returns them: one line per query, one column per key.

    Args:
        weights: ``(Tq, Tk)``, ``(H, Tq, Tk)`` or ``(B, H, Tq, Tk)``.

    The other arguments are those of ``mask``.

    Example:
        >>> picture = attention(torch.eye(16), Sequence(16))
    """
    keys = domain if key_domain is None else key_domain
    values = _one(weights, row, head)
    ax = _matrix(values, domain, keys, ax, cmap="Blues", vmin=0)
    _colorbar(ax.images[0], "weight")
    ax.set_title(f"attention weights, head {head}")
    return ax


def rotation(
    position: Rotation, domain: Domain, *, heads: int = 1, head: int = 0, ax: matplotlib.axes.Axes | None = None
) -> matplotlib.axes.Axes:
    """How alike a rotary position leaves two equal tokens: the mean cosine of the angles between them.

    Draws ``<R_i x, R_j x> / <x, x>`` for the vector of ones; the diagonal is 1, and what falls off with distance is what attention
    can use.

    Args:
        position: the rotation, with its ``head_dim``.
        domain: where tokens live.
        heads, head: how many heads to rotate, and which to draw, where they differ (mixed frequencies).
        ax: the axes to draw on.

    Example:
        >>> picture = rotation(Rotary(32), Grid(4, 4))
    """
    ones = torch.ones(1, heads, domain.num_tokens, position.head_dim)
    with torch.no_grad():
        query, key = position.rotate(ones, ones, domain, domain)
    alike = (query @ key.mT)[0, head] / position.head_dim
    ax = _matrix(alike, domain, domain, ax, cmap="RdBu_r", vmin=-1, vmax=1)
    _colorbar(ax.images[0], "mean cosine")
    ax.set_title(f"{type(position).__name__}, head {head}")
    return ax


def embedding(
    position: Embedding, domain: Domain, *, dim: int, ax: matplotlib.axes.Axes | None = None
) -> matplotlib.axes.Axes:
    """What an absolute position adds to tokens of zeros: one line per token, one column per channel.

    Example:
        >>> picture = embedding(Sinusoidal(32), Sequence(16), dim=32)
    """
    with torch.no_grad():
        added = position(torch.zeros(1, domain.num_tokens, dim), domain)[0]
    ax = _axes(ax)
    image = ax.imshow(added, cmap="RdBu_r", aspect="auto", interpolation="nearest", **_centred(added))
    ax.set(xlabel="channel", ylabel=f"token of {domain!r}", title=type(position).__name__)
    _colorbar(image, "added")
    return ax


# -- one query, on the domain itself ---------------------------------------------------------------------------------


def mask_on(
    mask: Mask, domain: Domain, *, query: int, row: int = 0, head: int = 0, ax: matplotlib.axes.Axes | None = None
) -> matplotlib.axes.Axes:
    """Which tokens one query may attend to, drawn where they are; the query is ringed in red.

    Prefix tokens, which have no place, stand apart on the left. Of a packed domain only the query's own item is drawn. A graph is
    laid out so that distances on paper follow hop distances.

    Args:
        mask: what to draw.
        domain: where the tokens live.
        query: index of the query.
        row, head: which row of the batch and which head, where the mask differs between them.
        ax: the axes to draw on.

    Raises:
        IndexError: the domain has no such query.

    Example:
        >>> picture = mask_on(Local(2) | Global(1), Grid(7, 7, prefix=1), query=25)
    """
    tokens = _item(domain, query, row)
    b, h = torch.tensor(row), torch.tensor(head)
    allowed = mask.bind(domain)(b, h, torch.tensor(query), tokens).expand(len(tokens))
    ax, _ = _tokens(domain, tokens, allowed, query, row, ax, cmap=_two_colours(), vmin=0, vmax=1)
    ax.set_title(repr(mask))
    return ax


def bias_on(
    position: Bias, domain: Domain, *, query: int, row: int = 0, head: int = 0, ax: matplotlib.axes.Axes | None = None
) -> matplotlib.axes.Axes:
    """What a relative position adds to the scores of one query, drawn where the keys are. Arguments as in ``mask_on``.

    Example:
        >>> picture = bias_on(DistanceDecay(heads=8), Grid(7, 7), query=24)
    """
    tokens = _item(domain, query, row)
    scores = _scores(position, domain, domain, torch.tensor(query), row, head)[tokens]
    ax, drawn = _tokens(domain, tokens, scores, query, row, ax, cmap="RdBu_r", **_centred(scores))
    _colorbar(drawn, "score")
    ax.set_title(f"{type(position).__name__}, head {head}")
    return ax


def attention_on(
    weights: Float[Tensor, "*batch_heads queries keys"],
    domain: Domain,
    *,
    query: int,
    row: int = 0,
    head: int = 0,
    ax: matplotlib.axes.Axes | None = None,
) -> matplotlib.axes.Axes:
    """The attention weights of one query, drawn where the keys are. Arguments as in ``attention`` and ``mask_on``.

    Example:
        >>> picture = attention_on(torch.eye(49), Grid(7, 7), query=24)
    """
    tokens = _item(domain, query, row)
    values = _one(weights, row, head)[query][tokens]
    ax, drawn = _tokens(domain, tokens, values, query, row, ax, cmap="Blues", vmin=0)
    _colorbar(drawn, "weight")
    ax.set_title(f"attention weights, head {head}")
    return ax


# -- drawing ---------------------------------------------------------------------------------------------------------


def _axes(ax: matplotlib.axes.Axes | None) -> matplotlib.axes.Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'xformerlib.plot draws with matplotlib, which is not installed: pip install "xformerlib[examples]"'
        ) from error
    return pyplot.subplots(layout="constrained")[1]


def _two_colours() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([UNSEEN, SEEN])


def _centred(values: Tensor) -> dict[str, float]:
    """Colour limits with 0 in the middle."""
    finite = values[values.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return {"vmin": -largest or -1.0, "vmax": largest or 1.0}


def _colorbar(drawn: Any, label: str) -> None:
    drawn.axes.figure.colorbar(drawn, ax=drawn.axes, label=label)


def _one(values: Shaped[Tensor, "*batch_heads queries keys"], row: int, head: int) -> Shaped[Tensor, "queries keys"]:
    """One row of the batch and one head; an axis of size 1 stands for all."""
    values = values.detach().cpu()
    values = values.reshape(*(1,) * (4 - values.ndim), *values.shape)
    return values[row if values.shape[0] > 1 else 0, head if values.shape[1] > 1 else 0]


def _scores(position: Bias, domain: Domain, keys: Domain, query: Tensor, row: int, head: int) -> Tensor:
    """Scores of one row and head, for some queries against all keys; masked pairs included."""
    with torch.no_grad():
        scores = position.pair(domain, keys).at(query, torch.arange(keys.num_tokens))
    return _one(scores if scores.ndim > 2 else scores[:, None], row, head).squeeze(0)


def _matrix(
    values: Shaped[Tensor, "queries keys"],
    domain: Domain,
    keys: Domain,
    ax: matplotlib.axes.Axes | None,
    **colours: Any,
) -> matplotlib.axes.Axes:
    ax = _axes(ax)
    ax.imshow(values.float() if values.dtype == torch.bool else values, interpolation="nearest", **colours)
    ax.set(xlabel=f"key: {keys!r}", ylabel=f"query: {domain!r}")
    if max(values.shape) <= 40:  # lines between the cells while they can be told apart
        ax.set_xticks(torch.arange(values.shape[1] + 1) - 0.5, minor=True)
        ax.set_yticks(torch.arange(values.shape[0] + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=0.8)
        ax.tick_params(which="minor", length=0)
    for where, line in ((domain, ax.axhline), (keys, ax.axvline)):
        for boundary in [] if where.offsets is None else where.offsets[1:-1].tolist():
            line(boundary - 0.5, color=QUERY, linewidth=0.8)
    return ax


def _item(domain: Domain, query: int, row: int) -> Int[Tensor, " tokens"]:
    """The tokens that exist in the query's item."""
    if not 0 <= query < domain.num_tokens:
        raise IndexError(f"query must be a token of {domain!r}, 0 to {domain.num_tokens - 1}; got query={query}")
    tokens = torch.arange(domain.num_tokens)
    together = domain.together(domain, torch.tensor(row), torch.tensor(query), tokens)
    return tokens if together is None else tokens[together | (tokens == query)]


def _tokens(
    domain: Domain,
    tokens: Int[Tensor, " tokens"],
    values: Shaped[Tensor, " tokens"],
    query: int,
    row: int,
    ax: matplotlib.axes.Axes | None,
    *,
    cmap: Any,
    vmin: float,
    vmax: float | None = None,
) -> tuple[matplotlib.axes.Axes, Any]:
    """Draw one mark per token where it is, coloured by its value; return the axes and the marks."""
    ax = _axes(ax)
    places = _places(domain, tokens, row)
    ring = [token == query for token in tokens.tolist()]
    style = {"edgecolors": [QUERY if r else "white" for r in ring], "linewidths": [2.5 if r else 0.8 for r in ring]}
    if isinstance(domain, Sequence | Grid):
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        cells = [Rectangle((x - 0.45, y - 0.45), 0.9, 0.9) for x, y in places.tolist()]
        marks: Any = ax.add_collection(PatchCollection(cells, **style))
        ax.autoscale_view()
    else:
        if isinstance(domain, Graph):
            _edges(ax, domain, tokens, places)
        marks = ax.scatter(*places.T, s=90, zorder=2, **style)
        ax.margins(0.15)
    marks.set(array=values.detach().cpu().double().numpy(), cmap=cmap, clim=(vmin, vmax))
    _frame(ax, domain)
    return ax, marks


def _frame(ax: matplotlib.axes.Axes, domain: Domain) -> None:
    """Axes that say as much as the domain does: coordinates where there are any, and equal units where there are two."""
    if domain.ndim == 1 and not isinstance(domain, Graph):
        ax.spines[["left", "right", "top"]].set_visible(False)
        ax.set_yticks([])
        ax.set_xlabel("time" if isinstance(domain, Timeline) else "position")
    elif not isinstance(domain, Points):
        ax.set_axis_off()
    if isinstance(domain, Grid) and not ax.yaxis_inverted():
        ax.invert_yaxis()  # row 0 on top, as images are shown
    if not isinstance(domain, Timeline):
        ax.set_aspect("equal")


def _places(domain: Domain, tokens: Int[Tensor, " tokens"], row: int) -> Float[Tensor, "tokens 2"]:
    """Where to draw each token: by its coordinates, and prefix tokens in a column on the left."""
    b = torch.tensor(row)
    prefix = domain.is_prefix(b, tokens)
    if prefix is None:
        return _layout(domain, b, tokens)
    ordinary = _layout(domain, b, tokens[~prefix])
    low, high = (ordinary.amin(0), ordinary.amax(0)) if len(ordinary) else (torch.zeros(2), torch.zeros(2))
    step = 1.0 if isinstance(domain, Sequence | Grid) else 0.15 * max(float((high - low).max()), 1e-6)
    places = torch.empty(len(tokens), 2, dtype=torch.float64)
    places[~prefix] = ordinary
    places[prefix, 0] = float(low[0]) - 1.5 * step
    rank = torch.arange(int(prefix.sum()))
    places[prefix, 1] = float(low[1] + high[1]) / 2 + step * (rank - (len(rank) - 1) / 2)
    return places


def _layout(domain: Domain, b: Tensor, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens 2"]:
    if isinstance(domain, Graph):
        return _stress_layout(domain.distance(domain, b, tokens[:, None], tokens).double())
    axes = [domain.coordinate(axis, b, tokens).double() for axis in range(domain.ndim)]
    if isinstance(domain, Grid):
        axes.reverse()  # the last axis of a grid runs to the right
        if domain.ndim == 3:  # slices side by side
            width = domain.sizes[-1] + 1
            axes = [axes[0] + width * axes[2], axes[1]]
    return torch.stack([axes[0], axes[1] if len(axes) > 1 else torch.zeros_like(axes[0])], -1)


def _stress_layout(hops: Float[Tensor, "nodes nodes"], rounds: int = 200) -> Float[Tensor, "nodes 2"]:
    """Places on the plane whose distances come close to hop distances, near ones above all.

    Minimises ``sum_ij (|x_i - x_j| - d_ij)^2 / d_ij^2`` by majorisation (Gansner, Koren and North 2005, "Graph drawing by stress
    majorization"), from a circle.
    """
    nodes = len(hops)
    apart = torch.minimum(hops, hops.mT)
    near = apart[apart.isfinite()]
    apart = apart.clamp(max=float(near.max()) + 1 if near.numel() else 1.0)
    weight = torch.where(apart > 0, apart**-2, 0.0)
    solve = torch.linalg.pinv(torch.diag(weight.sum(1)) - weight)
    angle = torch.arange(nodes, dtype=torch.float64) * (2 * math.pi / max(nodes, 1))
    places = torch.stack([angle.cos(), angle.sin()], -1) * nodes / 6
    for _ in range(rounds):
        drawn = torch.cdist(places, places)
        pull = torch.where(drawn > 1e-9, weight * apart / drawn, 0.0)
        places = solve @ ((torch.diag(pull.sum(1)) - pull) @ places)
    return places


def _edges(
    ax: matplotlib.axes.Axes, graph: Graph, tokens: Int[Tensor, " tokens"], places: Float[Tensor, "tokens 2"]
) -> None:
    """The graph's edges as lines; with arrow heads where not every edge has its reverse."""
    order = torch.full((graph.num_tokens,), -1)
    order[tokens] = torch.arange(len(tokens))
    source, target = order[graph.edge_index.cpu()]
    here = (source >= 0) & (target >= 0) & (source != target)
    start, end = places[source[here]], places[target[here]]
    drawn = set(zip(source[here].tolist(), target[here].tolist(), strict=True))
    both_ways = all((j, i) in drawn for i, j in drawn)
    heads = {"headwidth": 0, "headlength": 0, "headaxislength": 0} if both_ways else {"headwidth": 5.0}
    along = (end - start) * (1 if both_ways else 0.85)
    ax.quiver(
        *start.T, *along.T, angles="xy", scale_units="xy", scale=1, width=0.004, color="#b8c1c8", zorder=1, **heads
    )
