"""Attention in which only queries with a peaked score attend, as in Informer."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._arguments import Positive, checked
from .._inputs import check_values
from ..attention import attention
from ..domains import Sequence
from ..masks import Causal, Dense, Full, Keys, Mask

_GOLDEN = (math.sqrt(5) - 1) / 2


@checked
def prob_sparse_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    *,
    factor: Positive = 5.0,
    causal: bool = False,
    visible: Bool[Tensor, "batch tokens"] | None = None,
    random: bool = False,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """ProbSparse self attention (Zhou et al. 2020, arXiv:2012.07436): tokens whose scores have a peak attend, the others get the mean.

        M_i = max_(j in J_i) q_i . k_j - mean_(j in J_i) q_i . k_j      J_i: c ln T tokens, drawn from those that i may see
        o_i = attention(q_i, K, V)                                      for the u = c ln T tokens of the largest M_i
        o_i = mean_j v_j, over the tokens that i may see                for the others

    Each row and head by itself, in O(T ln T) time and memory. If u >= T, this is ``attention``.

    With ``causal``, a token attends if its M is among the u largest *so far*: in the paper all tokens of a row compete, so that whether one
    attends hangs on later ones. These are u (1 + ln(T / u)) tokens where the order of the M is random, and all at worst. Different from
    the authors' code, too: the mean in M is over the tokens drawn (there their sum is divided by T), and a causal token that does not
    attend gets the mean of what it may see (there the sum).

    Args:
        query, key, value: by head; as many heads of keys as of queries, of the same tokens.
        factor: c, > 0.
        causal: token i may see those up to i.
        visible: False where a token may be seen by nobody; it does not compete, either.
        random: draw tokens anew at each call, for training; otherwise they are the same at each call, evenly spread.

    Raises:
        ValueError: shapes that do not fit each other, a factor that is not positive.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 96, 8)
        >>> prob_sparse_attention(q, k, v, causal=True).shape
        torch.Size([2, 4, 96, 8])
    """
    _check(query, key, value, visible)
    tokens = query.shape[2]
    count = math.ceil(check_factor(factor) * math.log(max(tokens, 2)))
    domain, keys = Sequence(tokens), Full() if visible is None else Keys(visible)
    if count >= tokens:
        return attention(query, key, value, mask=keys & Causal() if causal else keys, domain=domain)
    seen = torch.ones(1, tokens, dtype=torch.bool, device=key.device) if visible is None else visible
    number = seen.cumsum(1) if causal else seen.sum(1, keepdim=True)  # of tokens that each may see
    with torch.no_grad():
        measure = _sparsity(query, key, _drawn(seen, number.expand(-1, tokens), count, random))
        measure = measure.masked_fill(~seen[:, None], -torch.inf)
        chosen = (_largest_so_far if causal else _largest)(measure, count) & seen[:, None]
        most = int(chosen.sum(-1).max()) if causal else count
        index = chosen.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
        upto = torch.arange(tokens, device=key.device) <= index[..., None] if causal else None
    mask: Mask = keys if upto is None else Dense(upto & seen[:, None, None])
    active = attention(_at(query, index), key, value, mask=mask, domain=Sequence(most), key_domain=domain)
    held = value.masked_fill(~seen[:, None, :, None], 0).to(torch.promote_types(value.dtype, torch.float32))
    total = held.cumsum(2) if causal else held.sum(2, keepdim=True)
    mean = (total / number.clamp(min=1)[:, None, :, None]).to(value.dtype).expand(*query.shape[:3], -1)
    attended = mean.scatter(2, index[..., None].expand_as(active), active)
    # Not all of ``active`` are chosen, where another row or head has more that are.
    return torch.where(chosen[..., None], attended, mean)


def _check(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_values(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, tokens, dim); got {tuple(tensor.shape)}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have the dim of query, {query.shape[-1]}; got {key.shape[-1]}")
    if visible is not None and visible.dtype != torch.bool:
        raise TypeError(f"visible must be a bool tensor, False where a token may not be seen; got {visible.dtype}")
    if not query.shape[:3] == key.shape[:3] == value.shape[:3]:
        raise ValueError(
            "query, key and value must have the same rows, heads and tokens; got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if visible is not None and visible.shape != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"visible must be (batch, tokens), {(query.shape[0], query.shape[2])}; got {tuple(visible.shape)}"
        )


def check_factor(factor: float) -> float:
    """The factor, which must be > 0."""
    if not factor > 0:
        raise ValueError(f"factor must be > 0; got factor={factor}")
    return factor


def _drawn(
    seen: Bool[Tensor, "rows tokens"], number: Int[Tensor, "rows tokens"], samples: int, random: bool
) -> Int[Tensor, "rows tokens samples"]:
    """For each token, some of the first ``number`` that are seen; more than once where those are few."""
    shape = (number.shape[1], samples)
    if random:
        share = torch.rand(shape, dtype=torch.float64, device=seen.device)
    else:  # multiples of the golden ratio, which are spread evenly however many one takes
        share = torch.arange(math.prod(shape), dtype=torch.float64, device=seen.device).mul(_GOLDEN).frac().view(shape)
    rank = torch.minimum((share * number[..., None]).long(), number[..., None] - 1).clamp(min=0)
    first_seen = seen.byte().argsort(dim=1, descending=True, stable=True)
    return first_seen.gather(1, rank.flatten(1)).view_as(rank)


def _sparsity(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    drawn: Int[Tensor, "rows tokens samples"],
) -> Float[Tensor, "batch heads tokens"]:
    """M; one sample at a time, so that no (tokens, samples, dim) tensor is held."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    top, total = query.new_full(query.shape[:3], -torch.inf), query.new_zeros(query.shape[:3])
    for index in drawn.unbind(-1):
        score = (query * _at(key, index[:, None].expand(query.shape[:3]))).sum(-1)
        top, total = torch.maximum(top, score), total + score
    return top - total / drawn.shape[-1]


def _largest(measure: Float[Tensor, "*batch tokens"], count: int) -> Bool[Tensor, "*batch tokens"]:
    index = measure.argsort(dim=-1, descending=True, stable=True)[..., :count]  # of equal ones the earlier
    return torch.zeros_like(measure, dtype=torch.bool).scatter(-1, index, True)


def _largest_so_far(measure: Float[Tensor, "*batch tokens"], count: int) -> Bool[Tensor, "*batch tokens"]:
    """Where fewer than ``count`` before are as large: in pieces, beside which only the largest before them are kept."""
    past, chosen = measure[..., :0], []
    for piece in measure.split(count, -1):
        known = torch.cat([past, piece], -1)
        before = measure.new_ones(piece.shape[-1], known.shape[-1], dtype=torch.bool).tril(past.shape[-1] - 1)
        chosen.append(((known[..., None, :] >= piece[..., None]) & before).sum(-1) < count)
        past = known.topk(min(count, known.shape[-1]), -1).values
    return torch.cat(chosen, -1)


def _at(x: Tensor, index: Int[Tensor, "batch heads chosen"]) -> Tensor:
    """The tokens of ``x``, (batch, heads, tokens, dim), at an index of each row and head."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))
