"""Attention by torch's own operations: the formulas of the other kernels, which have derivatives of any order and can be traced.

Kernels compute outputs and first derivatives. A second derivative, ``torch.func``, forward-mode AD and a nonfinite number that must not
spread take this way, part by part as planned, so that memory grows with the pairs that the parts visit.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._autograd import is_leaving
from ._masked import masked_scores, masked_sums
from ._scores import Pairs, Scores

if TYPE_CHECKING:
    from ._pattern import Pattern
    from ._sparse_torch import Features


class Weights(NamedTuple):
    """Softmax over the last axis: the weights, and the log-sum-exp of each row (-inf where it is empty)."""

    values: Float[Tensor, "*rows columns"]
    lse: Float[Tensor, "*rows"]


def tile(
    query: Float[Tensor, "batch n heads rows dim"],
    key: Float[Tensor, "batch n kv_heads columns dim"],
    value: Float[Tensor, "batch n kv_heads columns value_dim"],
    scores: Scores,
    allowed: Bool[Tensor, "#batch #n #heads #rows #columns"] | None,
    bias: Float[Tensor, "#batch #n #heads #rows #columns"] | None,
    kept: Bool[Tensor, "#batch #n #heads rows columns"] | None,
) -> tuple[Float[Tensor, "batch n heads rows value_dim"], Float[Tensor, "batch n heads rows"]]:
    """Output (0 in rows that see nothing) and log-sum-exp (-inf there) of tiles, in the precision of accumulation."""
    wide, group = torch.promote_types(query.dtype, torch.float32), query.shape[2] // max(key.shape[2], 1)
    q, k, v = query.to(wide), *(x.to(wide).repeat_interleave(group, 2) for x in (key, value))
    allowed = None if allowed is None else allowed.expand(*q.shape[:4], k.shape[3])
    apart = None if is_leaving(query) else allowed  # a graph that leaves Python is made of plain products
    s = (q @ k.mT if apart is None else masked_scores(q, k, apart)) * scores.scale
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    s = s if bias is None else s + bias.to(wide)
    weights = softmax(s, allowed)
    p = weights.values
    if kept is not None:
        p = p * kept / (1 - scores.dropout_p)
    return p @ v if apart is None else masked_sums(p, v, apart), weights.lse


def dense(
    scores: Scores,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """All pairs as one tile."""
    pairs = Pairs.of(*query.shape[:2], *(torch.arange(x.shape[2], device=x.device) for x in (query, key)))
    kept = scores.kept(pairs) if scores.dropout_p else None
    of_pairs = (None if x is None else x[:, None] for x in (scores.allowed(pairs), scores.bias(pairs), kept))
    out, lse = tile(query[:, None], key[:, None], value[:, None], scores, *of_pairs)
    return out[:, 0], lse[:, 0]


def softmax(s: Float[Tensor, "*rows columns"], allowed: Bool[Tensor, "*#rows #columns"] | None) -> Weights:
    """Softmax over the allowed columns of each row."""
    if s.shape[-1] == 0:
        return Weights(s, s.new_full(s.shape[:-1], -torch.inf))
    s = s if allowed is None else s.masked_fill(~allowed, -torch.inf)
    top = s.detach().amax(-1, keepdim=True)
    empty = top == -torch.inf
    e = torch.exp(s - top.masked_fill(empty, 0))
    total = e.sum(-1, keepdim=True).masked_fill(empty, 1)
    return Weights(e / total, (top.masked_fill(empty, 0) + total.log()).masked_fill(empty, -torch.inf)[..., 0])


def gathered(
    found: SequenceOf[Float[Tensor, "_ _ _ _ _"]], index: Int[Tensor, "_ tokens"], fill: float
) -> Float[Tensor, "batch heads tokens dim"]:
    """Each token's vector out of those of all tiles, one call's behind the other; ``fill`` where ``index`` is behind the last."""
    every = torch.cat([x.transpose(2, 3).flatten(1, 2) for x in found], 1)
    every = torch.cat([every, every.new_full((every.shape[0], 1, *every.shape[2:]), fill)], 1)
    picked = every.index_select(1, index.flatten())
    return picked.reshape(picked.shape[0] * index.shape[0], index.shape[1], *picked.shape[2:]).transpose(1, 2)


def merged(
    parts: SequenceOf[tuple[Float[Tensor, "batch heads queries dim"], Float[Tensor, "batch heads queries"]]],
    sinks: Float[Tensor, " heads"] | None,
) -> Float[Tensor, "batch heads queries dim"]:
    """Outputs of disjoint parts and the sinks, weighted by the exponentials of their log-sum-exps.

    Written with exponentials of differences, since the second derivative of ``logaddexp`` is NaN where both are -inf.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0][0]
    logs = [lse for _, lse in parts] + (
        [] if sinks is None else [sinks.to(parts[0][1].dtype)[:, None].expand_as(parts[0][1])]
    )
    top = torch.stack([log.detach() for log in logs]).amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    shares = [torch.exp(log - top) for log in logs]
    total = sum(shares[1:], shares[0])
    total = total.masked_fill(total == 0, 1)
    outs = [out * (share / total)[..., None] for (out, _), share in zip(parts, shares, strict=False)]
    return sum(outs[1:], outs[0])


class Entries(NamedTuple):
    """Output and log-sum-exp of each query over its entries, and the weighted sums of the entries' features."""

    out: Float[Tensor, "batch heads queries value_dim"]
    lse: Float[Tensor, "batch heads queries"]
    sums: Float[Tensor, "batch heads queries features"] | None


def entries(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    pattern: Pattern,
    scores: Scores,
    bias: Float[Tensor, "#batch #heads entries"] | None,
    allowed: Bool[Tensor, "#batch #heads entries"] | None,
    kept: Bool[Tensor, "#batch #heads entries"] | None,
    features: Features | None = None,
) -> Entries:
    """Attention over listed pairs, with vectors for each of them."""
    wide, group = torch.promote_types(query.dtype, torch.float32), query.shape[1] // max(key.shape[1], 1)
    row, col = (index.long().to(query.device) for index in (pattern.row, pattern.col))
    batch, rows = query.shape[0], query.shape[2]
    q = _planes(query.to(wide), pattern).index_select(2, row)
    k, v = (_planes(x.to(wide).repeat_interleave(group, 1), pattern).index_select(2, col) for x in (key, value))
    if allowed is not None:  # an entry that does not count may hold anything
        q, k, v = (x.masked_fill(~allowed[..., None], 0) for x in (q, k, v))
    s = (q * k).sum(-1)
    if features is not None:
        e = features.attr.to(wide)
        s = s + (_planes(features.query.to(wide), pattern).index_select(2, row) * e).sum(-1)
    s = s * scores.scale
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    s = s if bias is None else s + bias.to(wide)
    s = s if allowed is None else s.masked_fill(~allowed, -torch.inf)
    nothing = s.new_full((*s.shape[:2], pattern.num_rows), -torch.inf)
    top = nothing.scatter_reduce(2, row.expand_as(s), s.detach(), "amax")
    empty = top == -torch.inf
    p = torch.exp(s - top.masked_fill(empty, 0).index_select(2, row))
    total = torch.zeros_like(nothing).index_add(2, row, p).masked_fill(empty, 1)
    lse = (top.masked_fill(empty, 0) + total.log()).masked_fill(empty, -torch.inf)
    p = p / total.index_select(2, row)
    if kept is not None:
        p = p * kept / (1 - scores.dropout_p)

    def summed(x: Tensor) -> Tensor:
        return _tokens(
            p.new_zeros(*p.shape[:2], pattern.num_rows, x.shape[-1]).index_add(2, row, p[..., None] * x), batch, rows
        )

    sums = None if features is None else summed(features.attr.to(wide))
    return Entries(summed(v), _tokens(lse[..., None], batch, rows)[..., 0], sums)


def _planes(x: Float[Tensor, "batch heads tokens dim"], pattern: Pattern) -> Float[Tensor, "planes heads tokens dim"]:
    """Tokens as the pattern numbers them: those of all rows of the batch through, where rows have entries of their own."""
    return x if pattern.rows is None else x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _tokens(x: Tensor, batch: int, tokens: int) -> Float[Tensor, "batch heads tokens dim"]:
    """The inverse of ``_planes``."""
    return (
        x
        if x.shape[0] == batch and x.shape[2] == tokens
        else x[0].transpose(0, 1).unflatten(0, (batch, tokens)).transpose(1, 2)
    )
