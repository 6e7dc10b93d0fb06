"""Few keys: the weights of the forward are kept, so that the backward computes none of them again.

With p the weights of a query, o = p v, and do the gradient of o,

    dv = p' do,   dp = do v',   ds = p (dp - sum(p dp)),   dq = scale ds k,   dk = scale ds' q.

A token that meets few others has few weights: they take about the memory that its vectors do.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._autograd import no_autocast
from ._formulas import Piece, by_key_head, is_one_piece, pieces
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
        ctx: Any,
        part: TiledPart,
        scores: Scores,
        keep: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        calls, vectors = part.calls_of(scores.using(tensors), query), part.ready(query, key, value)
        tiles = [_ready(*pairs.without_hidden(*pairs.tiles.vectors(*vectors))) for pairs in calls]
        out = _Places(part, query.shape[:3], tiles[0][2])
        kept = [_forward(pairs, *own, into, keep) for pairs, own, into in zip(calls, tiles, out.by_call, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.part, ctx.scores, ctx.inputs = part, scores, [(x.shape[:3], x.dtype) for x in (query, key, value)]
        if keep:
            ctx.save_for_backward(*(x for own, p in zip(tiles, kept, strict=True) for x in (*own, p)), *tensors)
        return out.tokens().to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:  # gradients took another way (``twice_differentiable``)
            return (None,) * len(ctx.needs_input_grad)
        part, saved, count = ctx.part, ctx.saved_tensors, _KEPT * len(ctx.part.calls)
        tensors, into = saved[count:], Gradients.of(saved[count:], ctx.needs_input_grad[6:])
        grad = part.calls[0].ready(grad)
        kept = [saved[i : i + _KEPT] for i in range(0, count, _KEPT)]
        found = [_Places(part, shape, x) for (shape, _), x in zip(ctx.inputs, kept[0], strict=False)]
        for i, pairs in enumerate(part.calls_of(ctx.scores.using(tensors), grad)):
            with no_autocast(grad.device):
                _backward(pairs, kept[i], grad, into.biases, tuple(places.by_call[i] for places in found))
        grads = (places.tokens().to(dtype) for places, (_, dtype) in zip(found, ctx.inputs, strict=True))
        return None, None, None, *grads, *into.biases


class _Places:
    """Room for the vectors of all tiles of a part, one tile after the other, the heads of a token side by side.

    Attributes:
        by_call: the room of each call.
    """

    def __init__(self, part: TiledPart, shape: SequenceOf[int], like: Float[Tensor, "batch n heads rows dim"]) -> None:
        self._part, self._shape, heads = part, shape, shape[1]
        sizes = [tiles.n * tiles.rows for tiles in part.calls]
        self._every = like.new_empty(len(like), sum(sizes), heads * like.shape[-1], dtype=_wide(like))
        self.by_call = [
            some.unflatten(2, (heads, -1)).unflatten(1, (tiles.n, tiles.rows)).transpose(2, 3)
            for tiles, some in zip(part.calls, self._every.split(sizes, 1), strict=True)
        ]

    def tokens(self) -> Float[Tensor, "batch heads tokens dim"]:
        """Each where it stands."""
        order, (batch, heads, tokens) = self._part.order, self._shape
        every = self._every if order is None else self._every.index_select(1, order)
        return every.view(batch, tokens, heads, -1).transpose(1, 2)


def _ready(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A call's vectors, in one piece if that is what they are computed in, so that they are brought together once."""
    if not is_one_piece(query, key):
        return query, key, value
    return query.contiguous(), key.contiguous(), value.contiguous()


def _forward(
    pairs: TilePairs, query: Tensor, key: Tensor, value: Tensor, out: Tensor, keep: bool
) -> Float[Tensor, "batch n heads rows columns"] | None:
    """Write the output of tiles; the weights, if they are to be kept."""
    mask = pairs.additive(*pairs.bias(pairs.scores), _wide(query))
    empty = ~pairs.allowed.any(-1, keepdim=True) if pairs.has_empty_rows and pairs.allowed is not None else None
    p = query.new_empty(*query.shape[:4], key.shape[3], dtype=_wide(query)) if keep else None
    for piece in pieces(query, key):
        q, k, v = _vectors(piece, query, key, value)
        o = piece.of(out)
        s = _product(q, k.transpose(1, 2), pairs.scores.scale).view(*o.shape[:4], -1)
        s = s if mask is None else s.add_(piece.of(mask))
        weights = torch.softmax(s, -1) if p is None else torch.softmax(s, -1, out=piece.of(p))
        if empty is not None:
            weights.masked_fill_(piece.of(empty), 0)  # they are NaN
        o.copy_(torch.bmm(by_key_head(weights, piece.of_keys(key)), v).view(o.shape))
    return p


def _backward(
    pairs: TilePairs, kept: SequenceOf[Tensor], grad: Tensor, biases: list[Tensor | None], into: SequenceOf[Tensor]
) -> None:
    """Write the gradients of the tiles' queries, keys and values; those of the biases are added to ``biases``."""
    query, key, value, p = kept
    there, rows, scale = pairs.tiles.query_there, pairs.tiles.queries(grad), pairs.scores.scale
    # What only fills a tile repeats a token, whose gradient must not count twice.
    rows = rows if there is None else rows.masked_fill(~there[:, None, :, None], 0)

    def compute(_bias: Tensor | None, _hidden: bool, bias_grad: Tensor | None) -> None:
        for piece in pieces(query, key):
            _write_gradients(piece, (query, key, value), rows, p, scale, into, bias_grad)

    if any(total is not None for total in biases):
        pairs.with_bias_gradients(biases, compute)
    else:
        compute(None, False, None)


def _write_gradients(
    piece: Piece,
    vectors: tuple[Tensor, Tensor, Tensor],
    rows: Float[Tensor, "batch n heads rows value_dim"],
    p: Float[Tensor, "batch n heads rows columns"],
    scale: float,
    into: SequenceOf[Tensor],
    bias_grad: Tensor | None,
) -> None:
    """Write the gradients of a piece's queries, keys and values, from those of its outputs; add that of the bias."""
    key = vectors[1]
    q, k, v = _vectors(piece, *vectors)
    do, weights = (by_key_head(piece.of(x).to(p.dtype), piece.of_keys(key)) for x in (rows, p))
    dq, dk, dv = piece.of(into[0]), piece.of_keys(into[1]), piece.of_keys(into[2])
    dv.copy_(torch.bmm(weights.transpose(1, 2), do).view(dv.shape))
    ds = torch._softmax_backward_data(torch.bmm(do, v.transpose(1, 2)), weights, -1, p.dtype)
    if bias_grad is not None:
        total = piece.of(bias_grad)
        total += ds.view(piece.of(p).shape).sum_to_size(total.shape)
    dq.copy_(_product(ds, k, scale).view(dq.shape))
    dk.copy_(_product(ds.transpose(1, 2), q, scale).view(dk.shape))


def _vectors(piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a piece, by key head, in the precision of accumulation."""
    found = (piece.of(query), piece.of_keys(key), piece.of_keys(value))
    q, k, v = (by_key_head(x.to(_wide(x)), found[1]) for x in found)
    return q, k, v


def _product(a: Float[Tensor, "tiles m n"], b: Float[Tensor, "tiles n p"], scale: float) -> Float[Tensor, "tiles m p"]:
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _wide(x: Tensor) -> torch.dtype:
    """The precision of accumulation."""
    return torch.promote_types(x.dtype, torch.float32)
