"""Attention on tiles by its formulas, some tiles and heads at a time, so that their scores stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ._merge import Merged

# Scores of a piece.
PIECE = 2**18

Queries = Float[Tensor, "batch n heads rows dim"]
Keys = Float[Tensor, "batch n kv_heads columns dim"]
Values = Float[Tensor, "batch n kv_heads columns value_dim"]
Additive = Float[Tensor, "#batch #n #heads #rows #columns"]


class Parameters(NamedTuple):
    """What scores are made of, besides the vectors: ``softcap(scale * q . k) + mask``, and ``kept`` of the weights after dropout."""

    scale: float
    softcap: float | None
    mask: Additive | None
    has_empty_rows: bool
    dropout_p: float
    kept: Callable[[], Bool[Tensor, "batch n heads rows columns"]] | None


class Piece(NamedTuple):
    """Some rows of the batch, some tiles, and some key heads with the query heads that they serve."""

    rows: slice
    tiles: slice
    kv_heads: slice
    heads: slice

    def of(self, x: Tensor) -> Tensor:
        """The piece of what there is for each query head, or for fewer where they share it."""
        if self is WHOLE:
            return x
        axes = zip(x.shape[:3], (self.rows, self.tiles, self.heads), strict=True)
        return x[tuple(slice(None) if size == 1 else at for size, at in axes)]

    def of_keys(self, x: Tensor) -> Tensor:
        """The piece of what there is for each key head."""
        return x if self is WHOLE else x[self.rows, self.tiles, self.kv_heads]


WHOLE = Piece(*[slice(None)] * 4)


def is_one_piece(query: Queries, key: Keys) -> bool:
    """Whether a call is not worth being divided."""
    return query.shape[:4].numel() * key.shape[3] <= 2 * PIECE


def pieces(query: Queries, key: Keys) -> Iterator[Piece]:
    """The pieces of a call, of some tiles each, and of all heads if there is room."""
    if 0 in query.shape[:3]:
        return
    if is_one_piece(query, key):
        yield WHOLE
        return
    (batch, n, heads, rows, _), kv_heads, columns = query.shape, key.shape[2], key.shape[3]
    group = heads // max(kv_heads, 1)
    room = PIECE // max(group * rows * columns, 1)
    steps = [batch, n, kv_heads]
    for axis in (2, 1, 0):
        size, steps[axis] = steps[axis], max(1, min(steps[axis], room))
        room = room // max(size, 1) if steps[axis] == size else 1
    for b in range(0, batch, steps[0]):
        for t in range(0, n, steps[1]):
            for h in range(0, kv_heads, steps[2]):
                last = min(h + steps[2], kv_heads)
                yield Piece(
                    slice(b, b + steps[0]), slice(t, t + steps[1]), slice(h, last), slice(h * group, last * group)
                )


def held(scores: int, width: int, dropout_p: float) -> int:
    """Bytes that so many scores of ``width`` bytes take: some numbers for each of a piece, and what dropout hashes for each of all."""
    return 5 * width * min(scores, 2 * PIECE) + (25 * scores if dropout_p else 0)


def forward(query: Queries, key: Keys, value: Values, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Output (0 in rows that see nothing) and log-sum-exp (minus infinity there), in the precision of accumulation."""
    wide = torch.promote_types(query.dtype, torch.float32)
    shape = (*query.shape[:3], query.shape[3])
    lse = query.new_empty(shape, dtype=wide)
    out = query.new_empty(*shape[:2], shape[3], shape[2], value.shape[-1], dtype=wide).transpose(2, 3)
    if key.shape[3] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    kept = None if parameters.kept is None else parameters.kept()
    for piece in pieces(query, key):
        q, k, v = (x.to(wide) for x in (piece.of(query), piece.of_keys(key), piece.of_keys(value)))
        s, _ = _scored(q, k, piece, parameters)
        top = s.amax(-1)
        empty = top == float("-inf") if parameters.has_empty_rows else None
        if empty is not None:
            s = s.masked_fill_(empty[..., None], 0)
        p = torch.softmax(s, -1)
        log = top - p.amax(-1).log()  # the largest weight is at least 1 / columns
        if kept is not None:
            p = p * piece.of(kept) / (1 - parameters.dropout_p)
        o = _by_head(by_key_head(p, k) @ v.flatten(0, 2), q)
        piece.of(out).copy_(o if empty is None else o.masked_fill(empty[..., None], 0))
        piece.of(lse).copy_(log if empty is None else log.masked_fill(empty, float("-inf")))
    return out, lse


def backward(
    query: Queries, key: Keys, value: Values, parameters: Parameters, rows: Merged, bias_grad: Additive | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; that of what is added to the scores is added to ``bias_grad``."""
    wide = torch.promote_types(query.dtype, torch.float32)
    dq, dk, dv = (_like(x, wide) for x in (query, key, value))
    kept = None if parameters.kept is None else parameters.kept()
    for piece in pieces(query, key):
        q, k, v = (x.to(wide) for x in (piece.of(query), piece.of_keys(key), piece.of_keys(value)))
        grad = by_key_head(piece.of(rows.grad).to(wide), k)
        s, tanh = _scored(q, k, piece, parameters)
        p = s.sub_(piece.of(rows.lse)[..., None]).exp_()
        dp = _by_head(grad @ v.flatten(0, 2).transpose(-2, -1), p)
        weights = p
        if kept is not None:
            factor = piece.of(kept) / (1 - parameters.dropout_p)
            weights, dp = p * factor, dp.mul_(factor)
        piece.of_keys(dv).copy_((by_key_head(weights, k).transpose(-2, -1) @ grad).view_as(v))
        ds = dp.sub_(piece.of(rows.delta)[..., None]).mul_(p)
        if bias_grad is not None:
            total = piece.of(bias_grad)
            total += ds.sum_to_size(total.shape)
        if tanh is not None:
            ds = ds.mul_(1 - tanh.square_())
        ds = by_key_head(ds, k)
        piece.of(dq).copy_(_by_head((ds @ k.flatten(0, 2)).mul_(parameters.scale), q))
        piece.of_keys(dk).copy_((ds.transpose(-2, -1) @ by_key_head(q, k)).mul_(parameters.scale).view_as(k))
    return dq, dk, dv


def _scored(q: Tensor, k: Tensor, piece: Piece, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
    """Scores, minus infinity where a pair does not count, and the tanh of the soft cap."""
    s = by_key_head(q * parameters.scale, k) @ k.flatten(0, 2).transpose(-2, -1)
    s, tanh = s.view(*q.shape[:4], k.shape[3]), None
    if parameters.softcap is not None:
        tanh = torch.tanh(s / parameters.softcap)
        s = parameters.softcap * tanh
    return (s if parameters.mask is None else s.add_(piece.of(parameters.mask))), tanh


def by_key_head(x: Float[Tensor, "b n heads rows _"], k: Tensor) -> Float[Tensor, "b_n_kv_heads group_rows _"]:
    """Rows of all query heads of a key head one after the other: what the head's keys are shared by."""
    return x.reshape(k.shape[0] * k.shape[1] * k.shape[2], -1, x.shape[-1])


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``by_key_head``."""
    return x.view(*like.shape[:4], x.shape[-1])


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of tiles in which the heads of a token stand side by side."""
    batch, n, heads, tokens, dim = x.shape
    return x.new_empty(batch, n, tokens, heads, dim, dtype=dtype).transpose(2, 3)
