"""Tiles of few keys: the weights of the forward are kept, so that the backward computes none of them again.

With p the weights of a query, o = p v, and do the gradient of o,

    dv = p' do,   dp = do v',   ds = p (dp - sum(p dp)),   dq = scale ds k,   dk = scale ds' q.

A token that meets few others has few weights: they take no more memory than its vectors do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._merge import Gradients
from ._scores import Scores
from ._tile_pairs import TilePairs

if TYPE_CHECKING:
    from ._tiled import TiledPart

# What is kept of each call.
_KEPT = 4


class KeptWeights(torch.autograd.Function):
    """The attention of one part, whose tiles hold every token once, as a query and as a key."""

    @staticmethod
    def forward(
        ctx: Any, part: TiledPart, scores: Scores, query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor
    ) -> Tensor:
        calls = part.calls_of(scores.using(tensors), query)
        vectors = part.ready(query, key, value)
        found = [_forward(pairs, *pairs.tiles.vectors(*vectors)) for pairs in calls]
        ctx.part, ctx.scores, ctx.inputs = part, scores, [(x.shape, x.dtype) for x in (query, key, value)]
        ctx.save_for_backward(*(x for _, kept in found for x in kept), *tensors)
        return _put(part, (out for out, _ in found), query.shape).to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        part, saved, count = ctx.part, ctx.saved_tensors, _KEPT * len(ctx.part.calls)
        tensors, into = saved[count:], Gradients.of(saved[count:], ctx.needs_input_grad[5:])
        grad = part.calls[0].ready(grad)
        calls = enumerate(part.calls_of(ctx.scores.using(tensors), grad))
        found = [_backward(pairs, saved[_KEPT * i : _KEPT * (i + 1)], grad, into.biases) for i, pairs in calls]
        grads = (
            _put(part, tiles, shape).to(dtype)
            for tiles, (shape, dtype) in zip(zip(*found, strict=True), ctx.inputs, strict=True)
        )
        return None, None, *grads, *into.biases


def _forward(pairs: TilePairs, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output of tiles, and what their backward needs: queries times the scale, keys, values and weights, (tiles and heads, rows, _)."""
    batch, n, heads, rows, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    vectors = pairs.without_hidden(query, key, value)
    q, k, v = (x.to(wide).reshape(batch * n * key.shape[2], -1, x.shape[-1]) for x in vectors)
    q = q * pairs.scores.scale
    s = torch.bmm(q, k.transpose(1, 2))
    mask = pairs.additive(*pairs.bias(pairs.scores), wide)
    if mask is not None:
        s.view(batch, n, heads, rows, -1).add_(mask)
    p = torch.softmax(s, -1)
    if pairs.has_empty_rows:
        assert pairs.allowed is not None
        p.view(batch, n, heads, rows, -1).masked_fill_(~pairs.allowed.any(-1, keepdim=True), 0)  # they are NaN
    return torch.bmm(p, v).view(batch, n, heads, rows, -1), (q, k, v, p)


def _backward(
    pairs: TilePairs, kept: SequenceOf[Tensor], grad: Tensor, biases: list[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the tiles' queries, keys and values, from that of the output; those of the biases are added to ``biases``."""
    q, k, v, p = kept
    there, rows = pairs.tiles.query_there, pairs.tiles.queries(grad)
    batch, n, heads, count, _ = rows.shape
    # What only fills a tile repeats a token, whose gradient must not count twice.
    rows = rows if there is None else rows.masked_fill(~there[:, None, :, None], 0)
    do = rows.to(p.dtype).reshape(len(p), -1, v.shape[-1])
    ds = torch._softmax_backward_data(torch.bmm(do, v.transpose(1, 2)), p, -1, p.dtype)
    if any(total is not None for total in biases):

        def add(_bias: Tensor, _hidden: bool, bias_grad: Tensor) -> None:
            bias_grad += ds.view(batch, n, heads, count, -1).sum_to_size(bias_grad.shape)

        pairs.with_bias_gradients(biases, add)
    dq = torch.bmm(ds, k).mul_(pairs.scores.scale).view(batch, n, heads, count, -1)
    dk, dv = torch.bmm(ds.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), do)
    shape = batch, n, len(k) // (batch * n)
    return dq, dk.view(*shape, *dk.shape[1:]), dv.view(*shape, *dv.shape[1:])


def _put(
    part: TiledPart, tiles: Iterable[Float[Tensor, "_ _ heads _ dim"]], shape: SequenceOf[int]
) -> Float[Tensor, "batch heads tokens dim"]:
    """The tokens of all tiles, each where it stands."""
    (batch, _, tokens, _), by_token = shape, [tile.transpose(2, 3).flatten(1, 2).flatten(2) for tile in tiles]
    every = by_token[0] if len(by_token) == 1 else torch.cat(by_token, 1)
    every = every if part.order is None else every.index_select(1, part.order)
    return every.view(batch, tokens, shape[1], -1).transpose(1, 2)
