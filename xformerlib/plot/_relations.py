"""Masks, biases, rotations and attention between queries and keys; what is added to tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..domains import Domain
from ..masks import Mask
from ..positions import Position, Rotary
from ._drawing import axes_on, centred, draw_matrix, draw_tokens, titled, two_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    ax, _ = draw_matrix(allowed, domain, keys, ax, **two_colours())
    return titled(ax, repr(mask))


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
    ax, drawn = draw_matrix(scores, domain, keys, ax, **centred(scores))
    return titled(ax, f"{_names(position)}, head {head}", drawn, "score")


def rotation(position: Rotary, domain: Domain, *, row: int = 0, head: int = 0, ax: Axes | None = None) -> Axes:
    """How alike a rotary position leaves equal tokens: the cosine between the vector of ones turned at i and turned at j.

    It is the mean cosine of the angles between the two places, 1 on the diagonal. A query that is equal to a key everywhere would
    have these scores.

    Example:
        >>> picture = plot.rotation(Rotary(32), Sequence(16))
    """
    ax, drawn = draw_matrix(_alike(position, domain, row, head), domain, domain, ax, cmap="RdBu_r", vmin=-1, vmax=1)
    return titled(ax, f"{_names(position)}, head {head}", drawn, "cosine")


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
    ax, drawn = draw_matrix(_pick(weights, row, head), domain, keys, ax, cmap="Blues", vmin=0.0)
    return titled(ax, f"attention weights, head {head}", drawn, "weight")


def embedding(position: Position, domain: Domain, *, dim: int, row: int = 0, ax: Axes | None = None) -> Axes:
    """What the embeddings of a position add to tokens: one line per token, one column for each of ``dim`` channels.

    Example:
        >>> picture = plot.embedding(Sinusoidal(32), Sequence(16), dim=32)
    """
    added = torch.zeros(domain.batch_size or 1, domain.num_tokens, dim)
    with torch.no_grad():
        for part in position.embeddings:
            added = part(added, domain)
    ax = axes_on(ax)
    drawn = ax.imshow(added[row].numpy(), aspect="auto", interpolation="nearest", **centred(added[row]))
    ax.set(xlabel="channel", ylabel=f"token: {domain!r}")
    return titled(ax, _names(position), drawn, "added")


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
    ax, _ = draw_tokens(domain, tokens, allowed.expand(tokens.shape), query, row, ax, **two_colours())
    return titled(ax, repr(mask))


def bias_on(
    position: Position, domain: Domain, *, query: int, row: int = 0, head: int = 0, ax: Axes | None = None
) -> Axes:
    """What the biases of a position add to the scores of one query, drawn where the keys are.

    Example:
        >>> picture = plot.bias_on(DistanceDecay(heads=8), Grid(7, 7), query=24)
    """
    tokens = _item(domain, query, row)
    scores = _scores(position, domain, domain, torch.tensor(query), row, head)[tokens]
    ax, drawn = draw_tokens(domain, tokens, scores, query, row, ax, **centred(scores))
    return titled(ax, f"{_names(position)}, head {head}", drawn, "score")


def rotation_on(
    position: Rotary, domain: Domain, *, query: int, row: int = 0, head: int = 0, ax: Axes | None = None
) -> Axes:
    """How alike a rotary position leaves one query to an equal token at each place; see ``rotation``.

    Example:
        >>> picture = plot.rotation_on(Rotary(32), Grid(7, 7), query=24)
    """
    tokens = _item(domain, query, row)
    alike = _alike(position, domain, row, head)[query, tokens]
    ax, drawn = draw_tokens(domain, tokens, alike, query, row, ax, cmap="RdBu_r", vmin=-1, vmax=1)
    return titled(ax, f"{_names(position)}, head {head}", drawn, "cosine")


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
    ax, drawn = draw_tokens(
        domain, tokens, _pick(weights, row, head)[query, tokens], query, row, ax, cmap="Blues", vmin=0.0
    )
    return titled(ax, f"attention weights, head {head}", drawn, "weight")


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
