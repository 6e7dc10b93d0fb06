"""Sparse attention by products of matrices, some heads at a time: sampled products, softmax of segments, weighted sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ._merge import Gradients, Merged
from ._pattern import Pattern, Stack
from ._scores import Scores

# Scores of features that are held at a time; they are computed for several heads at once.
FEATURE_SCORES = 2**22


class Features(NamedTuple):
    """Features of the entries, shared by all rows of the batch and heads, and the vectors by which queries score them."""

    query: Float[Tensor, "batch heads queries features"]
    attr: Float[Tensor, "entries features"]


class FeatureGradients(NamedTuple):
    """The gradient that came for the sums of features, and where those of ``Features`` are added (None: not wanted)."""

    sums: Float[Tensor, "batch heads queries features"]
    query: Float[Tensor, "batch heads queries features"]
    attr: Float[Tensor, "entries features"] | None


@dataclass(frozen=True)
class Call:
    """What there is to compute: the inputs, what every entry's score is increased by, and whether it counts (None: 0, and yes)."""

    pattern: Pattern
    scores: Scores
    query: Float[Tensor, "batch heads queries dim"]
    key: Float[Tensor, "batch kv_heads keys dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    bias: Float[Tensor, "#batch #heads entries"] | None
    allowed: Bool[Tensor, "#batch #heads entries"] | None
    features: Features | None

    @property
    def wide(self) -> torch.dtype:
        """The precision of accumulation."""
        return torch.promote_types(self.query.dtype, torch.float32)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, log-sum-exp, and the sums of features."""
    (batch, heads, tokens), like = call.query.shape[:3], call.query.new_empty((), dtype=call.wide)
    by_token = call.query.stride(1) < call.query.stride(2)  # then a model will want to merge the heads again
    out = like.new_zeros(batch, *((tokens, heads) if by_token else (heads, tokens)), call.value.shape[-1])
    out = out.transpose(1, 2) if by_token else out
    lse = like.new_full((batch, heads, tokens, 1), 0 if call.pattern.num_entries else float("-inf"))
    sums = None if call.features is None else like.new_zeros(batch, heads, tokens, call.features.attr.shape[1])
    features = None if call.features is None else _FeatureProducts(call, *call.features)
    for some in _heads_in_turn(call, features):
        stack = some.stack
        s, _ = some.scored(some.of(call.query), some.of_keys(call.key))
        top = stack.max(s)
        p = s.sub_(stack.spread(top.masked_fill(top == float("-inf"), 0))).exp_()
        total = stack.sum(p)
        some.add(lse, (top + total.log())[:, None])
        kept = some.kept()
        p = p if kept is None else p.mul_(kept)
        share = 1 / total.clamp(min=1)[:, None]  # less than 1 only where nothing counts
        some.add(out, stack.sums(p, some.of_keys(call.value)).mul_(share))
        if sums is not None and features is not None:
            some.add(sums, stack.sums_of_entries(p, features.attr).mul_(share))
    return out, lse[..., 0], sums


def backward(
    call: Call, merged: Merged, into: Gradients, bias_grad: Tensor | None, wanted: FeatureGradients | None
) -> None:
    """Add every gradient, that of the entries' biases to ``bias_grad``."""
    scale, lse, delta = call.scores.scale, merged.lse[..., None], merged.delta[..., None]
    features = sums = None
    if wanted is not None and call.features is not None:
        features, sums = _FeatureProducts(call, *call.features), _FeatureProducts(call, wanted.sums, call.features.attr)
    for some in _heads_in_turn(call, features):
        stack, query, key, grad = some.stack, some.of(call.query), some.of_keys(call.key), some.of(merged.grad)
        s, tanh = some.scored(query, key)
        p = s.sub_(stack.spread(some.of(lse)[:, 0])).exp_()
        ds = stack.products(grad, some.of_keys(call.value))
        ds = ds if sums is None else ds.add_(sums.of(some))
        kept = some.kept()
        weights = p if kept is None else p * kept
        ds = ds if kept is None else ds.mul_(kept)
        ds = ds.sub_(stack.spread(some.of(delta)[:, 0])).mul_(p)
        if bias_grad is not None:
            bias_grad.flatten(0, 1).index_add_(0, some.places(bias_grad), ds.view(stack.count, -1))
        ds = ds if tanh is None else ds.mul_(1 - tanh.square_())
        some.add_keys(into.value, stack.sums_by_key(weights, grad))
        some.add_keys(into.key, stack.sums_by_key(ds, query), scale)
        some.add(into.query, stack.sums(ds, key), scale)
        if wanted is not None and features is not None and sums is not None:
            some.add(wanted.query, stack.sums_of_entries(ds, features.attr), scale)
            if wanted.attr is not None:
                some.add_to_entries(wanted.attr, ds, features.vectors, scale)
                some.add_to_entries(wanted.attr, weights, sums.vectors)


class _FeatureProducts:
    """The products of queries' vectors with entries' features, computed for several heads at once, shortly before they are needed."""

    def __init__(
        self,
        call: Call,
        vectors: Float[Tensor, "batch heads queries features"],
        attr: Float[Tensor, "entries features"],
    ) -> None:
        self.vectors = vectors.flatten(0, 1) if call.pattern.rows is None else vectors.transpose(0, 1).flatten(1, 2)
        self.attr, self._pattern = attr.to(call.wide), call.pattern
        self._first, self._ready = 0, attr.new_empty(0, 0)

    def of(self, some: _Heads) -> Float[Tensor, " entries"]:
        """Those of some heads; called for one after the other."""
        count = some.stack.count
        if some.first + count > self._first + len(self._ready):
            several = max(FEATURE_SCORES // max(self._pattern.num_entries, 1) // count, 1) * count
            self._first = some.first
            self._ready = self._pattern.products_with_entries(
                self.vectors[some.first : some.first + several], self.attr
            )
        return self._ready[some.first - self._first :][:count].flatten()


def _heads_in_turn(call: Call, features: _FeatureProducts | None) -> Iterator[_Heads]:
    """As many heads as a stack computes at once, until all are done."""
    pattern, (batch, heads) = call.pattern, call.query.shape[:2]
    stack = pattern.stack(batch, heads, heads // max(call.key.shape[1], 1))
    planes = heads if pattern.rows is not None else batch * heads
    for first in range(0, planes if pattern.num_entries else 0, stack.count):
        yield _Heads(call, features, stack, first)


class _Heads(NamedTuple):
    """The heads that a stack computes at once: the planes from ``first`` on."""

    call: Call
    features: _FeatureProducts | None
    stack: Stack
    first: int

    def _of(self, x: Tensor) -> Tensor:
        return self.call.pattern.planes(x, self.first, self.stack.count)

    def _of_keys(self, x: Tensor) -> Tensor:
        return self.call.pattern.planes(x, self.first // self._group, max(self.stack.count // self._group, 1))

    @property
    def _group(self) -> int:
        return self.call.query.shape[1] // self.call.key.shape[1]

    def of(self, x: Float[Tensor, "batch heads queries dim"]) -> Float[Tensor, "stack_queries dim"]:
        """The part of ``x`` that belongs to these heads, as one table."""
        return self._of(x).flatten(0, 2).to(self.call.wide).contiguous()

    def of_keys(self, x: Float[Tensor, "batch kv_heads keys dim"]) -> Float[Tensor, "stack_keys dim"]:
        """The part of ``x`` that belongs to these heads, as one table: that of a key head once for each of its query heads."""
        planes = self._of_keys(x)
        if self.stack.count > 1 and self._group > 1:
            planes = planes.repeat_interleave(self._group, 0 if self.call.pattern.rows is not None else 1)
        return planes.flatten(0, 2).to(self.call.wide).contiguous()

    def add(self, x: Tensor, table: Float[Tensor, "stack_queries dim"], scale: float = 1.0) -> None:
        """Add ``scale * table`` to ``x`` where ``of`` fetches it from."""
        planes = self._of(x)
        planes.add_(table.view(planes.shape), alpha=scale)

    def add_keys(self, x: Tensor, table: Float[Tensor, "stack_keys dim"], scale: float = 1.0) -> None:
        """Add ``scale * table`` to ``x`` where ``of_keys`` fetches it from."""
        planes, group = self._of_keys(x), self._group
        if self.stack.count > 1 and group > 1:
            table = table.view(self.stack.count // group, group, -1).sum(1)
        planes.add_(table.view(planes.shape), alpha=scale)

    def add_to_entries(
        self,
        x: Float[Tensor, "entries dim"],
        factors: Float[Tensor, " stack_entries"],
        vectors: Float[Tensor, "planes rows dim"],
        scale: float = 1.0,
    ) -> None:
        """Add to each entry ``scale`` times the sum over these heads of ``factor * vectors[query]``."""
        for i, factor in enumerate(factors.view(self.stack.count, -1)):
            rows = vectors[self.first + i].index_select(0, self.call.pattern.row)
            x.addcmul_(factor[:, None], rows, value=scale)

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """The row of the batch and the head of each plane; 0 and the head where a plane is a head of all rows."""
        plane, heads = (
            torch.arange(self.first, self.first + self.stack.count, device=self.call.query.device),
            self.call.query.shape[1],
        )
        return torch.div(plane, heads, rounding_mode="floor"), plane % heads

    def places(self, x: Shaped[Tensor, "#batch #heads entries"]) -> Int[Tensor, " stack"]:
        """Where the planes stand in ``x``, its rows of the batch and heads taken as one axis."""
        b, h = self._numbers()
        return b * (x.shape[1] if x.shape[0] > 1 else 0) + (h if x.shape[1] > 1 else 0)

    def _at(self, x: Shaped[Tensor, "#batch #heads entries"]) -> Shaped[Tensor, "_ entries"]:
        return x[0] if x.shape[0] == x.shape[1] == 1 else x.flatten(0, 1)[self.places(x)]

    def scored(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores of the entries, minus infinity where one does not count, and the tanh of the soft cap."""
        scores, bias, allowed, tanh = self.call.scores, self.call.bias, self.call.allowed, None
        s = self.stack.products(query, key, scores.scale)
        if self.features is not None:
            s.add_(self.features.of(self), alpha=scores.scale)
        if scores.softcap is not None:
            tanh = torch.tanh(s / scores.softcap)
            s = scores.softcap * tanh
        by_plane = s.view(self.stack.count, -1)
        if bias is not None:
            by_plane += self._at(bias)
        if allowed is not None:
            by_plane.masked_fill_(~self._at(allowed), float("-inf"))
        return s, tanh

    def kept(self) -> Tensor | None:
        """What dropout multiplies the weights of the entries by."""
        scores, pattern = self.call.scores, self.call.pattern
        if not scores.dropout_p:
            return None
        b, h = (number[:, None, None, None, None] for number in self._numbers())
        pairs = pattern.pairs(1, 1)
        kept = scores.kept(pairs._replace(b=b if pattern.rows is None else pairs.b, h=h))
        return kept.flatten().to(self.call.wide).div_(1 - scores.dropout_p)
