"""Attention over sparse sets of keys: a part of a mask whose pairs are listed.

For each entry (i, j) of the list, s_ij = q_i . k_j; softmax over each query's entries; o_i = sum_j p_ij v_j. The backward computes s_ij
again, or p_ij is kept where that is little, and sums what belongs to a key over the entries sorted by key, so that nothing is added by
atomics and results are the same bit by bit. Beside input and output there are numbers for each entry, never vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._autograd import is_leaving, is_transformed, no_autocast, twice_differentiable
from ..domains._neighbours import Neighbours
from ..masks._algebra import Predicate
from . import _plain, _sparse_torch, _sparse_triton
from ._merge import Gradients, Merged, Part
from ._pattern import Pattern
from ._problem import Problem
from ._scores import Pairs, Scores
from ._sparse_torch import Call, Features, Made
from ._stack import RUN_ENTRIES

# Entries whose mask and biases are computed at a time: an MLP holds hundreds of numbers for each. A GPU wants more work in a call.
BIAS_ENTRIES, BIAS_ENTRIES_ON_GPU = 2**14, 2**18

# Tokens whose inner products of output and gradient are computed at a time.
INNER_TOKENS, INNER_TOKENS_ON_GPU = 2**11, 2**17


class SparsePart(Part):
    """Pairs that are listed: a graph's edges, the tokens within some hops, the links of an expander.

    Args:
        neighbours: the keys of each query. A pair that is listed twice counts once.
        what: the part, for people.
        num_keys: Tk; as many as queries if not given.
        rows: where each row of the batch has neighbours of its own: their number. Query q of row b is then row ``b * Tq + q`` of the
            neighbours, and keys are still numbered from 0 to Tk - 1.
        predicate: what the pairs must fulfil besides. It is asked once, here; pairs that no row of the batch and head allows are left
            out, and only where rows or heads differ is it asked again at every call.
        batch, heads: how many rows and heads the predicate is asked about.
    """

    kernel = "sparse"
    isolates = True

    def __init__(
        self,
        neighbours: Neighbours,
        what: str,
        *,
        num_keys: int | None = None,
        rows: int | None = None,
        predicate: Predicate | None = None,
        batch: int = 1,
        heads: int = 1,
    ) -> None:
        self.what, self.asks = what, False
        count = 1 if rows is None else max(rows, 1)
        num_queries = neighbours.num_rows // count
        num_keys = num_queries if num_keys is None else num_keys
        row, col = neighbours.row, neighbours.col
        if rows is not None:
            col = col + num_keys * torch.div(row, max(num_queries, 1), rounding_mode="floor")
        keep = torch.ones_like(col, dtype=torch.bool)
        keep[1:] = (row.diff() != 0) | (col.diff() != 0)
        self.pattern = Pattern(row[keep], col[keep], num_queries, num_keys, rows)
        if predicate is not None:
            allowed = _by_entry(self.pattern, batch, heads, lambda pairs: predicate(*pairs))
            assert allowed is not None
            keep = allowed.flatten(0, 1).any(0)
            self.asks = not bool(allowed[..., keep].all())
            self.pattern = Pattern(self.pattern.row[keep], self.pattern.col[keep], num_queries, num_keys, rows)
        self.pairs = self.pattern.num_entries / count

    def held(self, problem: Problem) -> int:
        width, planes = max(4, problem.dtype.itemsize), problem.heads * (1 if self.pattern.rows else problem.batch)
        entries = self.pattern.num_entries
        added = entries * (width * problem.heads * (problem.bias is not None) + planes * self.asks)
        # A score, and what is added to it or taken from it, of the entries that are computed at a time.
        return added + (0 if problem.device == "cuda" else 2 * width * min(entries * planes, RUN_ENTRIES))

    def forward(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        call = _call(self.pattern, self._left(scores), query, key, value)
        made = _forward(call)
        return made.out, made.lse

    def alone(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _EdgeAttention.apply(self.pattern, self._left(scores), query, key, value, None, None, *scores.tensors)[0]

    def backward(
        self, scores: Scores, query: Tensor, key: Tensor, value: Tensor, merged: Merged, into: Gradients
    ) -> None:
        _backward(_call(self.pattern, self._left(scores), query, key, value), merged, into)

    def plain(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found = _plainly(self.pattern, self._left(scores), query, key, value)
        return found.out, found.lse

    def _left(self, scores: Scores) -> Scores:
        """What is still to be asked of the pairs."""
        return scores if self.asks else replace(scores, predicate=None)


def edge_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    pattern: Pattern,
    scores: Scores,
    edge_query: Float[Tensor, "batch heads queries features"] | None = None,
    edge_attr: Float[Tensor, "entries features"] | None = None,
    *,
    reference: bool = False,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries features"] | None]:
    """Attention along edges that have features: ``p = softmax(scale * (q . k + u . e) + bias)``, and the two sums ``p v`` and ``p e``.

    For features e and projections W and W' of them that a head adds to its keys and values, ``q . (k + W e) = q . k + (W^T q) . e`` and
    ``sum p (v + W' e) = sum p v + W' sum p e``: with ``edge_query = W^T q``, and W' applied to the second result, no edge needs a vector
    for each head.

    Args:
        pattern: the edges; parallel ones count apart.
        scores: how they score, besides; it has no predicate.
        edge_query: u, for each query and head.
        edge_attr: e, for each entry of the pattern, in its order. Without features the second sum is None.
        reference: compute by torch's own operations.
    """

    def again(q: Any, k: Any, v: Any, u: Tensor | None, e: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        features = None if u is None or e is None else Features(u, e)
        out, _, sums = _plainly(pattern, scores.using(tensors), q, k, v, features)
        return tuple(x.to(v.dtype) for x in (out, sums) if x is not None)

    inputs = (query, key, value, edge_query, edge_attr, *scores.tensors)
    if is_transformed() or reference or is_leaving(query):
        found = again(*inputs)
    else:
        out, sums = _EdgeAttention.apply(pattern, scores, *inputs)
        found = twice_differentiable((out,) if sums is None else (out, sums), again, inputs)
    return found[0], found[1] if len(found) > 1 else None


def _plainly(
    pattern: Pattern, scores: Scores, query: Tensor, key: Tensor, value: Tensor, features: Features | None = None
) -> _plain.Entries:
    """The attention by torch's own operations."""
    batch, heads = query.shape[:2]
    bias, allowed = (_by_entry(pattern, batch, heads, what) for what in (scores.bias, scores.allowed))
    kept = _by_entry(pattern, batch, heads, scores.kept) if scores.dropout_p else None
    return _plain.entries(query, key, value, pattern, scores, bias, allowed, kept, features)


class _EdgeAttention(torch.autograd.Function):
    """Attention over a pattern alone, with features or without, which need not be merged with that over others."""

    @staticmethod
    def forward(
        ctx: Any,
        pattern: Pattern,
        scores: Scores,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        u: Tensor | None,
        e: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        features = None if u is None or e is None else Features(u, e)
        made = _forward(_call(pattern, scores.using(tensors), query, key, value, features), keep=True)
        ctx.pattern, ctx.scores, ctx.tensors = pattern, scores, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, u, e, made.out, made.lse, made.sums, *tensors, *made.weights)
        return made.out.to(value.dtype), None if made.sums is None else made.sums.to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, sums_grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None and sums_grad is None:  # gradients took another way (``twice_differentiable``)
            return (None,) * len(ctx.needs_input_grad)
        query, key, value, u, e, out, lse, sums, *rest = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        if sums is not None and sums_grad is None:
            sums_grad = torch.zeros_like(sums)
        tensors, weights = rest[: ctx.tensors], rest[ctx.tensors :]
        delta, wanted, features = _inner(grad, out), None, None
        if sums_grad is not None and sums is not None:
            features = Features(u, e)
            delta += _inner(sums_grad, sums)
            du, de = (torch.zeros_like(x, dtype=lse.dtype) for x in features)
            wanted = _sparse_torch.FeatureGradients(sums_grad, du, de if ctx.needs_input_grad[6] else None)
        call = _call(ctx.pattern, ctx.scores.using(tuple(tensors)), query, key, value, features)
        merged = Merged(out, lse.masked_fill(lse == float("-inf"), float("inf")), grad, delta)
        into = Gradients.of(tensors, ctx.needs_input_grad[7:])
        with no_autocast(query.device):
            _backward(call, merged, into, wanted, weights)
        made = (None, None) if wanted is None else (wanted.query.to(u.dtype), de.to(e.dtype))
        return None, None, *into.inputs(query, key, value), *made, *into.biases


def _inner(x: Float[Tensor, "batch heads tokens dim"], y: Float[Tensor, "batch heads tokens dim"]) -> Tensor:
    """The inner products of vectors, some tokens at a time: all products at once would be one more tensor of their size."""
    count = INNER_TOKENS_ON_GPU if x.is_cuda else INNER_TOKENS
    parts = zip(x.split(count, 2), y.split(count, 2), strict=True)
    return torch.cat([(a.to(b.dtype) * b).sum(-1) for a, b in parts], 2)


def _call(
    pattern: Pattern, scores: Scores, query: Tensor, key: Tensor, value: Tensor, features: Features | None = None
) -> Call:
    bias, allowed = (_by_entry(pattern, query.shape[0], query.shape[1], what) for what in (scores.bias, scores.allowed))
    # The fused kernel does not read what is hidden.
    if allowed is not None and not scores.clean and not _is_fused(query):
        query = _seen_only(query, allowed, pattern, pattern.row)
        key, value = (_seen_only(x, allowed, pattern, pattern.col) for x in (key, value))
    return Call(pattern, scores, query, key, value, bias, allowed, features)


def _is_fused(query: Tensor) -> bool:
    """Whether the fused kernel can run."""
    return query.is_cuda and _sparse_triton.AVAILABLE


def _forward(call: Call, *, keep: bool = False) -> Made:
    """The attention; with ``keep`` the weights too, where it is worth it."""
    return _sparse_triton.forward(call) if _is_fused(call.query) else _sparse_torch.forward(call, keep=keep)


def _backward(
    call: Call,
    merged: Merged,
    into: Gradients,
    wanted: _sparse_torch.FeatureGradients | None = None,
    kept: SequenceOf[Tensor] = (),
) -> None:
    trained = call.bias is not None and any(grad is not None for grad in into.biases)
    bias_grad = torch.zeros_like(call.bias) if trained and call.bias is not None else None
    if _is_fused(call.query):
        _sparse_triton.backward(call, merged, into, bias_grad, wanted)
    else:
        _sparse_torch.backward(call, merged, into, bias_grad, wanted, kept)
    if bias_grad is not None:
        _add_bias_gradients(call, bias_grad, into.biases)


def _chunks(pattern: Pattern) -> Iterator[slice]:
    count = BIAS_ENTRIES_ON_GPU if pattern.col.is_cuda else BIAS_ENTRIES
    return (slice(a, a + count) for a in range(0, max(pattern.num_entries, 1), count))


def _by_entry(
    pattern: Pattern, batch: int, heads: int, what: Callable[[Pairs], Tensor | None]
) -> Shaped[Tensor, "#batch #heads entries"] | None:
    """What a function of pairs says of every entry, for each row of the batch and head where they differ."""
    parts = []
    for entries in _chunks(pattern):
        x = what(pattern.pairs(batch, heads, entries))
        if x is None:
            return None
        parts.append(_as_entries(x, pattern.row[entries].numel()))
    return torch.cat(parts, -1)


def _as_entries(x: Tensor, count: int) -> Tensor:
    x = x.reshape((1,) * (5 - x.ndim) + x.shape)[0, :, :, 0]
    return x.expand(*x.shape[:2], count)


def _seen_only(x: Tensor, allowed: Tensor, pattern: Pattern, index: Tensor) -> Tensor:
    """0 where a query sees nothing or a key is seen by nobody: a NaN there would survive as 0 * NaN."""
    b, h, entry = allowed.nonzero().unbind(1)
    plane = x.shape[2] if pattern.rows is None else x.shape[2] * pattern.rows
    seen = torch.zeros(*allowed.shape[:2], plane, dtype=torch.bool, device=x.device)
    seen[b, h, index[entry]] = True
    if seen.shape[1] > 1:
        seen = seen.unflatten(1, (x.shape[1], -1)).any(2)
    if pattern.rows is not None:
        seen = seen[0].unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)
    return x.masked_fill(~seen[..., None], 0)


def _add_bias_gradients(call: Call, grad: Tensor, into: list[Tensor | None]) -> None:
    """Pass the gradient of the entries' biases on to what they are made from, computing them again some entries at a time."""
    tensors = call.scores.tensors
    leaves = {i: tensors[i].detach().requires_grad_() for i, total in enumerate(into) if total is not None}
    scores = call.scores.using(tuple(leaves.get(i, t) for i, t in enumerate(tensors)))
    for entries in _chunks(call.pattern):
        part = grad[..., entries]
        with torch.enable_grad():
            bias = scores.bias(call.pattern.pairs(call.query.shape[0], call.query.shape[1], entries))
            assert bias is not None
            bias = _as_entries(bias, part.shape[-1])
        if not bias.requires_grad:
            continue
        for i, more in zip(
            leaves,
            torch.autograd.grad(bias, list(leaves.values()), part.to(bias.dtype), allow_unused=True),
            strict=True,
        ):
            total = into[i]
            if more is not None and total is not None:
                total += more
