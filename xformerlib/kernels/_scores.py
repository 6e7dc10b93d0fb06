"""What every kernel computes: the scores of a tile of queries and keys, and which of them count.

This is the one place where a mask's predicate, biases, scale, soft cap and dropout come together; kernels differ in which tiles they
visit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..domains._base import both
from ..masks._algebra import Predicate
from ..positions import PairBias

Recall = Callable[[PairBias, Callable[[], Tensor]], tuple[Tensor, bool]]


class Pairs(NamedTuple):
    """Indices of the pairs of a tile, broadcastable to ``(..., batch, heads, rows, columns)``."""

    b: Int[Tensor, "..."]
    h: Int[Tensor, "..."]
    q: Int[Tensor, "..."]
    k: Int[Tensor, "..."]

    @staticmethod
    def of(
        batch: int, heads: int, q_index: Int[Tensor, "*tiles rows"], k_index: Int[Tensor, "*tiles columns"]
    ) -> Pairs:
        """The pairs that the queries and keys of each tile make, in every row of the batch and every head."""
        b = torch.arange(batch, device=q_index.device)[:, None, None, None]
        h = torch.arange(heads, device=q_index.device)[:, None, None]
        return Pairs(b, h, q_index[..., None, None, :, None], k_index[..., None, None, None, :])


@dataclass(frozen=True)
class Scores:
    """How queries score keys: ``softcap(scale * q . k) + bias`` where the mask allows it, and minus infinity elsewhere.

    Attributes:
        predicate: ``(b, h, q, k) -> bool``, or None where every pair is allowed.
        biases: tensors ``(B|1, H|1, Tq|1, Tk|1)``, and bound biases that score index pairs.
        scale: factor of the dot products.
        softcap: c in ``c tanh(s / c)``, or None.
        dropout_p: probability with which a weight is dropped.
        seed: what dropout hashes with the indices of a pair, one number; so a weight that is computed again is dropped again.
        reflexive: whether every query may attend to itself, so that no row is empty.
        clean: whether nothing stands where it must not count: queries that see nothing and keys that nobody sees, or that are no tokens,
            are surely not there or 0. Otherwise they may be NaN.
    """

    predicate: Predicate | None
    biases: tuple[Tensor | PairBias, ...]
    scale: float
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: Int[Tensor, ""] | None = None
    reflexive: bool = False
    clean: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that the biases are differentiable in."""
        return tuple(t for bias in self.biases for t in ((bias,) if isinstance(bias, Tensor) else bias.tensors))

    def using(self, tensors: tuple[Tensor, ...]) -> Scores:
        """The same scores with other ``tensors``, of the same shapes."""
        rest = list(tensors)
        biases: list[Tensor | PairBias] = []
        for bias in self.biases:
            if isinstance(bias, Tensor):
                biases.append(rest.pop(0))
            else:
                biases.append(bias.using(tuple(rest[: len(bias.tensors)])))
                del rest[: len(bias.tensors)]
        return replace(self, biases=tuple(biases))

    def allowed(self, pairs: Pairs) -> Bool[Tensor, "..."] | None:
        """Which pairs count; None where all do."""
        result = None if self.predicate is None else self.predicate(*pairs)
        for bias in self.biases:  # a tensor of minus infinities is a mask too, and rows full of them are empty
            if isinstance(bias, Tensor):
                result = both(result, _at(bias, pairs) != float("-inf"))  # a NaN is seen
        return result

    def bias(self, pairs: Pairs) -> Float[Tensor, "..."] | None:
        """The sum of the biases at these pairs, or None."""
        return self.bias_by(lambda: pairs, lambda _, rows: (rows(), False))

    def bias_by(self, pairs: Callable[[], Pairs], recall: Recall) -> Float[Tensor, "..."] | None:
        """``bias`` at pairs that are asked for only if they are needed: ``recall(bias, rows)`` may know the rows of a table already, and
        says whether pairs that do not count have the row behind the last one."""
        total = None
        for bias in self.biases:
            part = _at(bias, pairs()) if isinstance(bias, Tensor) else _scored(bias, pairs, recall)
            total = part if total is None else total + part
        return total

    def kept(self, pairs: Pairs) -> Bool[Tensor, "..."]:
        """Which weights dropout keeps: a hash of the pair's indices and the seed, the same for every kernel."""
        assert self.seed is not None
        h = self.seed
        for index in pairs:
            h = _mixed(h ^ index)
        return (h & 0xFFFFFF) >= int(self.dropout_p * (1 << 24))


def _scored(bias: PairBias, pairs: Callable[[], Pairs], recall: Recall) -> Float[Tensor, "..."]:
    """A bound bias at these pairs."""

    def rows() -> Tensor:
        b, _, q, k = pairs()
        return bias.index(b if bias.batch_size is not None else q.new_zeros(()), q, k)

    if bias.rows_key is not None:
        index, hides = recall(bias, rows)
        if hides:  # by a row behind those of the table
            (table,) = bias.tensors
            bias = bias.using((torch.cat([table, table.new_full((1, table.shape[1]), float("-inf"))]),))
        part = bias.from_rows(index)
    else:
        b, _, q, k = pairs()
        part = bias.at(q, k, None if bias.batch_size is None else b)
    return part.squeeze(-3).movedim(0, -3)  # heads where the index has an axis of 1 for them


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers in which every bit of the input reaches every bit of the output (lowbias32, C. Wellons)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _at(bias: Tensor, pairs: Pairs) -> Tensor:
    """A tensor bias at these pairs."""
    if pairs.q.ndim == 4:  # one tile: whole rows and columns
        for axis, index in ((-2, pairs.q), (-1, pairs.k)):
            if bias.shape[axis] != 1:
                bias = bias.index_select(axis, index.flatten())
        return bias
    return bias[tuple(i if n > 1 else i.new_zeros(()) for i, n in zip(pairs, bias.shape, strict=True))]


def grouped_matmul(
    a: Float[Tensor, "batch heads m n"], b: Float[Tensor, "batch kv_heads n p"]
) -> Float[Tensor, "batch heads m p"]:
    """``a @ b`` where each head of ``b`` serves a group of consecutive heads of ``a``, without repeating it."""
    batch, heads, m, n = a.shape
    kv_heads = b.shape[1]
    if heads == kv_heads:
        return a @ b
    return (a.reshape(batch, kv_heads, heads // kv_heads * m, n) @ b).reshape(batch, heads, m, b.shape[-1])


def probabilities(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    scores: Scores,
    q_index: Int[Tensor, " rows"],
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads rows keys"]:
    """Attention weights of a block of queries over all keys; 0 in rows that see nothing."""
    pairs = Pairs.of(query.shape[0], query.shape[1], q_index, torch.arange(key.shape[2], device=key.device))
    s = grouped_matmul(query, key.transpose(-2, -1)) * scores.scale
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    bias, allowed = scores.bias(pairs), scores.allowed(pairs)
    s = s if bias is None else s + bias.to(s.dtype)
    s = s if allowed is None else s.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)
    weights = torch.softmax(s, -1)[..., : key.shape[2]]
    return weights if allowed is None else weights.masked_fill(~allowed, 0)


def without_hidden(
    query: Tensor, key: Tensor, value: Tensor, allowed: Bool[Tensor, "... #batch #heads rows columns"]
) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of a tile with 0 in queries that see nothing here, and in keys and values that nobody here sees.

    A masked NaN would otherwise survive as 0 * NaN in the product with the values and in every gradient.
    """
    queries, hidden = ~allowed.any(-1)[..., None], ~allowed.any(-2)
    if hidden.shape[-2] > 1:  # a key head is hidden if it is from each query head that it serves
        hidden = hidden.unflatten(-2, (key.shape[-3], -1)).all(-2)
    hidden = hidden[..., None]
    return query.masked_fill(queries, 0), key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
