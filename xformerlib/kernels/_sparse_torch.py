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
    shape, like = call.query.shape[:3], call.query.new_empty((), dtype=call.wide)
    out, lse = like.new_zeros(*shape, call.value.shape[-1]), like.new_zeros(*shape, 1)
    sums = None if call.features is None else like.new_zeros(*shape, call.features.attr.shape[1])
    tables = _Tables(call)
    for heads in tables.heads():
        stack = heads.stack
        s, _ = heads.scored(heads.of(tables.query), heads.of_keys(tables.key))
        top = stack.max(s)
        p = s.sub_(stack.spread(top.masked_fill(top == float("-inf"), 0))).exp_()
        total = stack.sum(p)
        heads.add(lse, (top + total.log())[:, None])
        kept = heads.kept()
        p = p if kept is None else p.mul_(kept)
        share = 1 / total.clamp(min=1)[:, None]  # less than 1 only where nothing counts
        heads.add(out, stack.sums(p, heads.of_keys(tables.value)).mul_(share))
        if sums is not None and tables.features is not None:
            heads.add(sums, stack.sums_of_entries(p, tables.features.attr).mul_(share))
    return out, lse[..., 0] if call.pattern.num_entries else lse[..., 0].fill_(float("-inf")), sums


def backward(call: Call, merged: Merged, into: Gradients, bias_grad: Tensor | None, wanted: FeatureGradients | None) -> None:
    """Add every gradient, that of the entries' biases to ``bias_grad``."""
    planes, scale = call.pattern.planes, call.scores.scale
    lse, delta, grads = planes(merged.lse[..., None]), planes(merged.delta[..., None]), planes(merged.grad)
    tables = _Tables(call)
    sums = None if wanted is None or call.features is None else _FeatureProducts(call, wanted.sums, call.features.attr)
    for heads in tables.heads():
        stack, query, key, grad = heads.stack, heads.of(tables.query), heads.of_keys(tables.key), heads.of(grads)
        s, tanh = heads.scored(query, key)
        p = s.sub_(stack.spread(heads.of(lse)[:, 0])).exp_()
        ds = stack.products(grad, heads.of_keys(tables.value))
        ds = ds if sums is None else ds.add_(sums.of(heads))
        kept = heads.kept()
        weights = p if kept is None else p * kept
        ds = ds if kept is None else ds.mul_(kept)
        ds = ds.sub_(stack.spread(heads.of(delta)[:, 0])).mul_(p)
        if bias_grad is not None:
            bias_grad.flatten(0, 1).index_add_(0, heads.places(bias_grad), ds.view(stack.count, -1))
        ds = ds if tanh is None else ds.mul_(1 - tanh.square_())
        heads.add_keys(into.value, stack.sums_by_key(weights, grad))
        heads.add_keys(into.key, stack.sums_by_key(ds, query), scale)
        heads.add(into.query, stack.sums(ds, key), scale)
        if wanted is not None and sums is not None and tables.features is not None:
            heads.add(wanted.query, stack.sums_of_entries(ds, sums.attr), scale)
            if wanted.attr is not None:
                heads.add_to_entries(wanted.attr, ds, tables.features.planes, scale)
                heads.add_to_entries(wanted.attr, weights, sums.planes)


class _Tables:
    """A call's inputs as planes."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.query, self.key, self.value = (call.pattern.planes(x) for x in (call.query, call.key, call.value))
        self.features = None if call.features is None else _FeatureProducts(call, *call.features)

    def heads(self) -> Iterator[_Heads]:
        """Some heads after others, until all are done."""
        pattern, heads = self.call.pattern, self.call.query.shape[1]
        stack = pattern.stack(len(self.query), heads // max(self.call.key.shape[1], 1))
        for first in range(0, len(self.query) if pattern.num_entries else 0, stack.count):
            yield _Heads(self, stack, first)


class _FeatureProducts:
    """The products of queries' vectors with entries' features, computed for several heads at once, shortly before they are needed."""

    def __init__(self, call: Call, vectors: Float[Tensor, "batch heads queries features"], attr: Float[Tensor, "entries features"]) -> None:
        self._pattern, self.planes, self.attr = call.pattern, call.pattern.planes(vectors).to(call.wide), attr.to(call.wide)
        self._first, self._ready = 0, self.planes.new_empty(0, 0)

    def of(self, heads: _Heads) -> Float[Tensor, " entries"]:
        """Those of some heads; called for one after the other."""
        if heads.first + heads.stack.count > self._first + len(self._ready):
            several = max(FEATURE_SCORES // max(self._pattern.num_entries, 1), 1) // heads.stack.count * heads.stack.count
            several = max(several, heads.stack.count)
            self._first = heads.first
            self._ready = self._pattern.products_with_entries(self.planes[self._first : self._first + several], self.attr)
        first = heads.first - self._first
        return self._ready[first : first + heads.stack.count].flatten()


class _Heads(NamedTuple):
    """The heads that a stack computes at once: the planes from ``first`` on."""

    tables: _Tables
    stack: Stack
    first: int

    @property
    def call(self) -> Call:
        """What is computed."""
        return self.tables.call

    def of(self, planes: Float[Tensor, "planes tokens dim"]) -> Float[Tensor, "stack_tokens dim"]:
        """These planes of queries as one table."""
        return planes[self.first : self.first + self.stack.count].flatten(0, 1).to(self.call.wide).contiguous()

    def of_keys(self, planes: Float[Tensor, "planes tokens dim"]) -> Float[Tensor, "stack_tokens dim"]:
        """These planes of keys or values as one table, those of a key head once for each of its query heads."""
        group, count = self.call.query.shape[1] // self.call.key.shape[1], self.stack.count
        planes = planes[self.first // group :][: max(count // group, 1)]
        planes = planes if count == 1 or group == 1 else planes.repeat_interleave(group, 0)
        return planes.flatten(0, 1).to(self.call.wide).contiguous()

    def add(self, x: Tensor, table: Float[Tensor, "stack_tokens dim"], scale: float = 1.0) -> None:
        """Add ``scale * table`` to ``x`` where ``of`` would fetch from it."""
        self.call.pattern.add(x, self.first, table.unflatten(0, (self.stack.count, -1)), scale)

    def add_keys(self, x: Tensor, table: Float[Tensor, "stack_tokens dim"], scale: float = 1.0) -> None:
        """Add ``scale * table`` to ``x`` where ``of_keys`` would fetch from it."""
        group, tables = self.call.query.shape[1] // self.call.key.shape[1], table.unflatten(0, (self.stack.count, -1))
        if self.stack.count > 1 and group > 1:
            tables = tables.unflatten(0, (-1, group)).sum(1)
        self.call.pattern.add(x, self.first // group, tables, scale)

    def add_to_entries(
        self, x: Float[Tensor, "entries dim"], factors: Float[Tensor, " stack_entries"], planes: Float[Tensor, "planes rows dim"], scale: float = 1.0
    ) -> None:
        """Add to each entry ``scale`` times the sum over these heads of ``factor * planes[query]``."""
        for factor, rows in zip(factors.view(self.stack.count, -1), planes[self.first : self.first + self.stack.count], strict=True):
            x.addcmul_(factor[:, None], rows.index_select(0, self.call.pattern.row), value=scale)

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """The row of the batch and the head of each plane; 0 and the head where a plane is a head of all rows."""
        plane, heads = torch.arange(self.first, self.first + self.stack.count, device=self.call.query.device), self.call.query.shape[1]
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
        if self.tables.features is not None:
            s.add_(self.tables.features.of(self), alpha=scores.scale)
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
