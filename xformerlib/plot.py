"""Pictures of masks, positions and attention, drawn with matplotlib.

What relates queries to keys has two views. The matrix, one line per query and one column per key: ``mask``, ``bias``, ``rotation``,
``attention``. And one query's line of it, drawn where the keys are - on cells of a grid, nodes of a graph, points of a plane, moments of
a timeline: ``mask_on``, ``bias_on``, ``rotation_on``, ``attention_on``. ``embedding`` shows what is added to tokens.

Every function draws on the axes ``ax``, or on a new figure if there are none, and returns the axes. ``row`` and ``head`` choose a row of
the batch and a head, where these differ. Pictures are for small domains: matrices are Tq x Tk, and the layout of a graph needs the hop
distances of all its nodes.

matplotlib comes with the extra ``xformerlib[examples]``, and is imported when the first picture is drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .domains import Domain, Graph, Grid, Points, Sequence, Timeline
from .masks import Mask
from .positions import Position, Rotary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEEN, UNSEEN, MARK, EDGE = "#2a6f97", "#e3e8ec", "#f2a900", "#a9b4bc"


# -- one line per query, one column per key --------------------------------------------------------------------------


def mask(
    mask: Mask, domain: Domain, key_domain: Domain | None = None, *, row: int = 0, head: int = 0, ax: Axes | None = None
) -> Axes:
    """The mask of queries on ``domain`` and keys on ``key_domain`` (``domain`` if not given): dark where a query may attend.

    Example:
        >>> plot.mask(Causal() & Local(3), Sequence(16)).get_title()
        'Causal() & Local(3)'
    """
    keys = domain if key_domain is None else key_domain
    allowed = _pick(mask.dense(domain, keys), row, head)
    ax, _ = _matrix(allowed, domain, keys, ax, **_two_colours())
    return _titled(ax, repr(mask))


def bias(
    position: Position,
    domain: Domain,
    key_domain: Domain | None = None,
    *,
    row: int = 0,
    head: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """What the biases of a position add to the scores of one head: red raises a score, blue lowers it.

    Example:
        >>> picture = plot.bias(DistanceDecay(heads=8), Sequence(16), head=2)
    """
    keys = domain if key_domain is None else key_domain
    scores = _scores(position, domain, keys, torch.arange(domain.num_tokens)[:, None], row, head)
    ax, drawn = _matrix(scores, domain, keys, ax, **_centred(scores))
    return _titled(ax, f"{_names(position)}, head {head}", drawn, "score")


def rotation(position: Rotary, domain: Domain, *, row: int = 0, head: int = 0, ax: Axes | None = None) -> Axes:
    """How alike a rotary position leaves equal tokens: the cosine between the vector of ones turned at i and turned at j.

    It is the mean cosine of the angles between the two places, 1 on the diagonal. A query that is equal to a key everywhere would
    have these scores.

    Example:
        >>> picture = plot.rotation(Rotary(32), Sequence(16))
    """
    ax, drawn = _matrix(_alike(position, domain, row, head), domain, domain, ax, cmap="RdBu_r", vmin=-1, vmax=1)
    return _titled(ax, f"{_names(position)}, head {head}", drawn, "cosine")


def attention(
    weights: Float[Tensor, "*batch_heads queries keys"],
    domain: Domain,
    key_domain: Domain | None = None,
    *,
    row: int = 0,
    head: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Attention weights, as ``Attention.weights`` returns them; of shape ``(Tq, Tk)``, ``(H, Tq, Tk)`` or ``(B, H, Tq, Tk)``.

    Example:
        >>> layer = Attention(16, heads=2, mask=Causal())
        >>> picture = plot.attention(layer.weights(torch.randn(1, 9, 16), Sequence(9)), Sequence(9), head=1)
    """
    keys = domain if key_domain is None else key_domain
    ax, drawn = _matrix(_pick(weights, row, head), domain, keys, ax, cmap="Blues", vmin=0.0)
    return _titled(ax, f"attention weights, head {head}", drawn, "weight")


def embedding(position: Position, domain: Domain, *, dim: int, row: int = 0, ax: Axes | None = None) -> Axes:
    """What the embeddings of a position add to tokens: one line per token, one column for each of ``dim`` channels.

    Example:
        >>> picture = plot.embedding(Sinusoidal(32), Sequence(16), dim=32)
    """
    added = torch.zeros(domain.batch_size or 1, domain.num_tokens, dim)
    with torch.no_grad():
        for part in position.embeddings:
            added = part(added, domain)
    ax = _axes(ax)
    drawn = ax.imshow(added[row].numpy(), aspect="auto", interpolation="nearest", **_centred(added[row]))
    ax.set(xlabel="channel", ylabel=f"token: {domain!r}")
    return _titled(ax, _names(position), drawn, "added")


# -- one query, drawn where the keys are -----------------------------------------------------------------------------


def mask_on(mask: Mask, domain: Domain, *, query: int, row: int = 0, head: int = 0, ax: Axes | None = None) -> Axes:
    """Which tokens one query may attend to, drawn where they are; the query has an orange rim.

    Prefix tokens, which have no place, stand on the left. Of a packed domain the query's own item is drawn. A graph is laid out so
    that distances on paper follow hop distances.

    Raises:
        IndexError: the domain has no token ``query``.

    Example:
        >>> picture = plot.mask_on(Local(2) | Global(1), Grid(7, 7, prefix=1), query=25)
    """
    tokens = _item(domain, query, row)
    allowed = mask.bind(domain)(torch.tensor(row), torch.tensor(head), torch.tensor(query), tokens)
    ax, _ = _tokens(domain, tokens, allowed.expand(tokens.shape), query, row, ax, **_two_colours())
    return _titled(ax, repr(mask))


def bias_on(
    position: Position, domain: Domain, *, query: int, row: int = 0, head: int = 0, ax: Axes | None = None
) -> Axes:
    """What the biases of a position add to the scores of one query, drawn where the keys are.

    Example:
        >>> picture = plot.bias_on(DistanceDecay(heads=8), Grid(7, 7), query=24)
    """
    tokens = _item(domain, query, row)
    scores = _scores(position, domain, domain, torch.tensor(query), row, head)[tokens]
    ax, drawn = _tokens(domain, tokens, scores, query, row, ax, **_centred(scores))
    return _titled(ax, f"{_names(position)}, head {head}", drawn, "score")


def rotation_on(
    position: Rotary, domain: Domain, *, query: int, row: int = 0, head: int = 0, ax: Axes | None = None
) -> Axes:
    """How alike a rotary position leaves one query to an equal token at each place; see ``rotation``.

    Example:
        >>> picture = plot.rotation_on(Rotary(32), Grid(7, 7), query=24)
    """
    tokens = _item(domain, query, row)
    alike = _alike(position, domain, row, head)[query, tokens]
    ax, drawn = _tokens(domain, tokens, alike, query, row, ax, cmap="RdBu_r", vmin=-1, vmax=1)
    return _titled(ax, f"{_names(position)}, head {head}", drawn, "cosine")


def attention_on(
    weights: Float[Tensor, "*batch_heads queries keys"],
    domain: Domain,
    *,
    query: int,
    row: int = 0,
    head: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """The attention weights of one query, drawn where the keys are.

    Example:
        >>> picture = plot.attention_on(torch.eye(49), Grid(7, 7), query=24)
    """
    tokens = _item(domain, query, row)
    ax, drawn = _tokens(
        domain, tokens, _pick(weights, row, head)[query, tokens], query, row, ax, cmap="Blues", vmin=0.0
    )
    return _titled(ax, f"attention weights, head {head}", drawn, "weight")


# -- what is drawn ---------------------------------------------------------------------------------------------------


def _pick(values: Shaped[Tensor, "*batch_heads queries keys"], row: int, head: int) -> Shaped[Tensor, "queries keys"]:
    """One row of the batch and one head; an axis of size 1, or none, stands for all."""
    values = values.detach().cpu()
    values = values.reshape(*(1,) * (4 - values.ndim), *values.shape)
    return values[row if values.shape[0] > 1 else 0, head if values.shape[1] > 1 else 0]


def _scores(position: Position, domain: Domain, keys: Domain, query: Tensor, row: int, head: int) -> Tensor:
    if not position.biases:
        raise ValueError(
            f"position must have a bias to draw; got {_names(position)}. Draw it with embedding or rotation."
        )
    k_index = torch.arange(keys.num_tokens)
    with torch.no_grad():
        terms = [part.pair(domain, keys).at(query, k_index, torch.tensor(row))[head] for part in position.biases]
    return torch.stack(terms).sum(0)


def _alike(position: Rotary, domain: Domain, row: int, head: int) -> Float[Tensor, "tokens tokens"]:
    ones = torch.ones(domain.batch_size or 1, position.heads, domain.num_tokens, position.head_dim)
    with torch.no_grad():
        turned = position.rotate_one(ones, domain)[row, head]
    turned = torch.nn.functional.normalize(turned, dim=-1)
    return turned @ turned.mT


def _names(position: Position) -> str:
    return " + ".join(type(part).__name__ for part in position.parts)


def _item(domain: Domain, query: int, row: int) -> Int[Tensor, " tokens"]:
    """The tokens that exist in the query's item."""
    if not 0 <= query < domain.num_tokens:
        raise IndexError(f"query must be one of the {domain.num_tokens} tokens of {domain!r}; got query={query}")
    tokens = torch.arange(domain.num_tokens)
    together = domain.together(domain, torch.tensor(row), torch.tensor(query), tokens)
    return tokens if together is None else tokens[together | (tokens == query)]


# -- drawing ---------------------------------------------------------------------------------------------------------


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'xformerlib.plot draws with matplotlib, which is not installed: pip install "xformerlib[examples]"'
        ) from error
    return pyplot.subplots(layout="constrained")[1]


def _titled(ax: Axes, title: str, drawn: Any = None, unit: str = "") -> Axes:
    """The axes with a title and, where ``drawn`` needs one to be read, a scale of colours."""
    ax.set_title(title)
    if drawn is not None:
        ax.figure.colorbar(drawn, ax=ax, label=unit)
    return ax


def _two_colours() -> dict[str, Any]:
    from matplotlib.colors import ListedColormap

    return {"cmap": ListedColormap([UNSEEN, SEEN]), "vmin": 0.0, "vmax": 1.0}


def _centred(values: Tensor) -> dict[str, Any]:
    """Colours with white at 0."""
    finite = values[values.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() and finite.any() else 1.0
    return {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}


def _matrix(
    values: Shaped[Tensor, "queries keys"], domain: Domain, keys: Domain, ax: Axes | None, **colours: Any
) -> tuple[Axes, Any]:
    ax = _axes(ax)
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


def _tokens(
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
    ax = _axes(ax)
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
