"""What every kernel computes: the scores of a tile of queries and keys, and which of them count.

This is the one place where a mask's predicate, biases, scale, soft cap and sinks come together; kernels differ in which tiles they visit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..domains._base import both
from ..masks._algebra import Predicate
from ..positions._base import PairBias


@dataclass(frozen=True)
class Scores:
    """How queries score keys: ``softcap(scale * q . k) + bias`` where the mask allows it, and minus infinity elsewhere.

    Attributes:
        predicate: ``(b, h, q, k) -> bool``, or None where every pair is allowed.
        biases: tensors that broadcast to ``(B, H, Tq, Tk)``, and bound biases that score index pairs.
        scale: factor of the dot products.
        softcap: c in ``c tanh(s / c)``, or None.
        sinks: ``(H,)`` logits that take part in each softmax without a value, or None.
        reflexive: whether every query that exists may attend to itself, so that no row is empty and no key is hidden from everybody.
    """

    predicate: Predicate | None
    biases: tuple[Tensor | PairBias, ...]
    scale: float
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None
    reflexive: bool = False

    def allowed(
        self, query: Tensor, q_index: Int[Tensor, " rows"], k_index: Int[Tensor, " columns"]
    ) -> Bool[Tensor, "#batch #heads rows columns"] | None:
        """Which pairs of a tile count, for ``query`` of shape (B, H, ...); None where all do."""
        result = None
        if self.predicate is not None:
            b = torch.arange(query.shape[0], device=query.device)[:, None, None, None]
            h = torch.arange(query.shape[1], device=query.device)[:, None, None]
            result = self.predicate(b, h, q_index[:, None], k_index[None, :])
            result = result.expand(*result.shape[:-2], q_index.numel(), k_index.numel())
            result = result.reshape((1,) * (4 - result.ndim) + result.shape)
        for bias in self.biases:  # a tensor of minus infinities is a mask too, and rows full of them are empty
            if isinstance(bias, Tensor):
                result = both(result, (_part(bias, q_index, k_index) > float("-inf")).reshape(_four(bias, q_index, k_index)))
        return result

    def bias(
        self, query: Tensor, q_index: Int[Tensor, " rows"], k_index: Int[Tensor, " columns"]
    ) -> Float[Tensor, "#batch #heads rows columns"] | None:
        """The sum of the biases on a tile, or None."""
        total = None
        for bias in self.biases:
            if isinstance(bias, Tensor):
                part = _part(bias, q_index, k_index).reshape(_four(bias, q_index, k_index))
            elif bias.batch_size is None:
                part = bias.at(q_index[:, None], k_index[None, :])[None]
            else:
                rows = torch.arange(query.shape[0], device=query.device)[:, None, None]
                part = bias.at(q_index[:, None], k_index[None, :], rows).transpose(0, 1)
            total = part if total is None else total + part
        return total


def _part(bias: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    """The tile of a tensor bias, whose last two axes may be 1."""
    if bias.shape[-2] != 1:
        bias = bias.index_select(-2, q_index)
    return bias.index_select(-1, k_index) if bias.shape[-1] != 1 else bias


def _four(bias: Tensor, q_index: Tensor, k_index: Tensor) -> tuple[int, ...]:
    rows = 1 if bias.shape[-2] == 1 else q_index.numel()
    columns = 1 if bias.shape[-1] == 1 else k_index.numel()
    return (1,) * (4 - bias.ndim) + tuple(bias.shape[:-2]) + (rows, columns)


def probabilities(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    scores: Scores,
    q_index: Int[Tensor, " rows"],
    k_index: Int[Tensor, " keys"],
) -> tuple[Float[Tensor, "batch heads rows keys"], Float[Tensor, "batch heads rows"] | None]:
    """Softmax of a block of queries over all their keys; 0 in rows that see nothing. Also the factor that sinks leave of each row."""
    s = grouped_matmul(query, key.transpose(-2, -1)) * scores.scale
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    bias = scores.bias(query, q_index, k_index)
    if bias is not None:
        s = s + bias.to(s.dtype)
    allowed = scores.allowed(query, q_index, k_index)
    seen = None
    if allowed is not None and scores.reflexive:
        s = s.masked_fill(~allowed, float("-inf"))
    elif allowed is not None:
        # A row that sees nothing keeps its scores, so that softmax stays finite forward and backward, and is set to 0 afterwards.
        seen = allowed.any(-1, keepdim=True)
        s = s.masked_fill(~allowed & seen, float("-inf"))
        # What is infinite in an empty row (a bias of minus infinities) must not reach softmax either.
        s = s.masked_fill(~seen, 0.0)
    p = torch.softmax(s, -1)
    if seen is not None:
        p = p.masked_fill(~seen, 0.0)
    if scores.sinks is None:
        return p, None
    # With a sink the row's weights shrink by e^lse / (e^lse + e^sink).
    return p, torch.sigmoid(torch.logsumexp(s, -1) - scores.sinks.to(s.dtype)[:, None])


def grouped_matmul(a: Float[Tensor, "batch heads m n"], b: Float[Tensor, "batch kv_heads n p"]) -> Float[Tensor, "batch heads m p"]:
    """``a @ b`` where each head of ``b`` serves a group of consecutive heads of ``a``, without repeating it."""
    batch, heads, m, n = a.shape
    kv_heads = b.shape[1]
    if heads == kv_heads:
        return a @ b
    return (a.reshape(batch, kv_heads, heads // kv_heads * m, n) @ b).reshape(batch, heads, m, b.shape[-1])


@torch.no_grad()
def seen(
    query: Float[Tensor, "batch heads queries dim"], num_keys: int, scores: Scores, rows: int
) -> tuple[Bool[Tensor, "#batch #heads queries"], Bool[Tensor, "#batch #heads keys"]]:
    """Which queries see any key, and which keys are seen by any query; the mask is evaluated ``rows`` queries at a time."""
    k_index = torch.arange(num_keys, device=query.device)
    queries, keys = [], None
    for q_index in torch.arange(query.shape[2], device=query.device).split(max(rows, 1)):
        allowed = scores.allowed(query, q_index, k_index)
        assert allowed is not None
        queries.append(allowed.any(-1))
        keys = allowed.any(-2) if keys is None else keys | allowed.any(-2)
    if keys is None:
        nothing = torch.zeros(1, 1, 0, dtype=torch.bool, device=query.device)
        return nothing, torch.zeros(1, 1, num_keys, dtype=torch.bool, device=query.device)
    return torch.cat(queries, -1), keys


def hide_unseen(query: Tensor, key: Tensor, value: Tensor, scores: Scores, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs with 0 in queries that see nothing and in keys and values that nobody sees.

    A masked NaN would otherwise survive as 0 * NaN in the product with the values and in every gradient.
    """
    queries, keys = seen(query, key.shape[2], scores, rows)
    group = query.shape[1] // key.shape[1]
    if keys.shape[1] > 1:
        keys = keys.unflatten(1, (-1, group)).any(2)
    hidden = ~keys[..., None]
    return query.masked_fill(~queries[..., None], 0), key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)

