"""Sparse attention by products of matrices, some planes at a time: sampled products, softmax of segments, weighted sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ._merge import Gradients, Merged
from ._pattern import Pattern
from ._scores import Pairs, Scores
from ._stack import Run, Stack, products_with_entries, stack_of

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

    @property
    def has_few_weights(self) -> bool:
        """Whether the weights are fewer numbers than the output, and all that the backward needs of the scores."""
        pattern = self.pattern
        return self.scores.softcap is None and pattern.num_entries <= pattern.num_rows * self.value.shape[-1]


class Made(NamedTuple):
    """Output, log-sum-exp, the sums of features, and the weights of each group of planes, if the backward is to have them again."""

    out: Float[Tensor, "batch heads queries value_dim"]
    lse: Float[Tensor, "batch heads queries"]
    sums: Float[Tensor, "batch heads queries features"] | None
    weights: tuple[Float[Tensor, " entries"], ...]


def forward(call: Call, *, keep: bool = False) -> Made:
    """The attention of all planes; with ``keep`` the weights too, if they are few."""
    keep = keep and call.has_few_weights
    batch, heads, tokens = call.query.shape[:3]
    like, rows = call.query.new_empty((), dtype=call.wide), batch * tokens
    out = like.new_empty(rows, heads, call.value.shape[-1])
    lse = like.new_empty(rows, heads)
    features = None if call.features is None else _FeatureProducts(call, *call.features)
    sums = None if call.features is None else like.new_empty(rows, heads, call.features.attr.shape[1])
    query, key, value = (_by_token(x) for x in (call.query, call.key, call.value))
    kept, lowest = [], torch.finfo(call.wide).min
    for some in _groups(call):
        q, k, v = some.of(query), some.of_keys(key), some.of_keys(value)
        weights = like.new_empty(some.stack.num_entries if keep else 0)
        for run in some.stack.by_query:
            s, _ = some.scored(run, q[run.rows], k, features)
            top = run.max(s)
            p = s.sub_(top.clamp(min=lowest).index_select(0, run.at)).exp_()
            total = run.sum(p)
            p.mul_(total.clamp(min=1).reciprocal_().index_select(0, run.at))  # less than 1 only where nothing counts
            some.put(lse, run, top.add_(total.log_()))
            if keep:
                weights[run.entries] = p
            factor = some.dropout(run)
            p = p if factor is None else p.mul_(factor)
            some.put(out, run, run.sums(p, v))
            if sums is not None and features is not None:
                some.put(sums, run, run.sums(p, features.attr, some.stack.entry[run.entries]))
        kept.append(weights)
    sums = None if sums is None else _by_head(sums, batch)
    return Made(_by_head(out, batch), _by_head(lse, batch), sums, tuple(kept) if keep else ())


def backward(
    call: Call,
    merged: Merged,
    into: Gradients,
    bias_grad: Tensor | None,
    wanted: FeatureGradients | None,
    kept: SequenceOf[Tensor] = (),
) -> None:
    """Add every gradient, that of the entries' biases to ``bias_grad``; ``kept`` are the weights of a forward with the same log-sum-exp."""
    dq, dk, dv = (_table_like(x, call.wide) for x in (call.query, call.key, call.value))
    du = None if wanted is None else _table_like(wanted.query, call.wide)
    features = sums = None
    if wanted is not None and call.features is not None:
        features, sums = _FeatureProducts(call, *call.features), _FeatureProducts(call, wanted.sums, call.features.attr)
    query, key, value, grad = (_by_token(x) for x in (call.query, call.key, call.value, merged.grad))
    lse, delta = (_by_token(x[..., None]) for x in (merged.lse, merged.delta))
    for i, some in enumerate(_groups(call)):
        stack, q, k, v, g = some.stack, some.of(query), some.of_keys(key), some.of_keys(value), some.of(grad)
        row_lse, row_delta = some.of(lse)[:, 0], some.of(delta)[:, 0]
        weights, slopes = q.new_empty(stack.num_entries), q.new_empty(stack.num_entries)
        for run in stack.by_query:
            p, tanh = (kept[i][run.entries], None) if kept else some.scored(run, q[run.rows], k, features)
            p = p if kept else p.sub_(row_lse[run.rows].index_select(0, run.at)).exp_()
            ds = run.products(g[run.rows], v)
            ds = ds if sums is None else ds.add_(sums.of(some, run))
            factor = some.dropout(run)
            ds = ds if factor is None else ds.mul_(factor)
            weights[run.entries] = p if factor is None else factor.mul_(p)
            ds = ds.sub_(row_delta[run.rows].index_select(0, run.at)).mul_(p)
            if bias_grad is not None:
                some.add_to_entries(bias_grad, run, ds)
            ds = ds if tanh is None else ds.mul_(1 - tanh.square_())
            slopes[run.entries] = ds.mul_(call.scores.scale)
            some.put(dq, run, run.sums(ds, k))
            if features is not None and du is not None:
                some.put(du, run, run.sums(ds, features.attr, stack.entry[run.entries]))
        for run in stack.by_key:
            some.add_of_keys(dv, run, run.sums(weights.index_select(0, run.at), g))
            some.add_of_keys(dk, run, run.sums(slopes.index_select(0, run.at), q))
        if wanted is not None and wanted.attr is not None and features is not None and sums is not None:
            some.add_to_features(wanted.attr, slopes, some.of(features.vectors))
            some.add_to_features(wanted.attr, weights, some.of(sums.vectors))
    batch = call.query.shape[0]
    into.add(*(_by_head(x, batch) for x in (dq, dk, dv)))
    if wanted is not None and du is not None:
        wanted.query.add_(_by_head(du, batch))


def _by_token(x: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "rows heads dim"]:
    return x.transpose(1, 2).flatten(0, 1)


def _by_head(x: Float[Tensor, "rows heads *dim"], batch: int) -> Float[Tensor, "batch heads tokens *dim"]:
    return x.unflatten(0, (batch, len(x) // max(batch, 1))).transpose(1, 2)


def _table_like(x: Float[Tensor, "batch heads tokens dim"], dtype: torch.dtype) -> Float[Tensor, "rows heads dim"]:
    return x.new_empty(x.shape[0] * x.shape[2], x.shape[1], x.shape[3], dtype=dtype)


class _FeatureProducts:
    """The products of queries' vectors with entries' features, computed for several heads at once, shortly before they are needed."""

    def __init__(
        self,
        call: Call,
        vectors: Float[Tensor, "batch heads queries features"],
        attr: Float[Tensor, "entries features"],
    ) -> None:
        self.vectors, self.attr = _by_token(vectors), attr.to(call.wide)
        self._pattern, self._first, self._ready = call.pattern, (0, 0), attr.new_empty(0, 0, 0)

    def of(self, some: _Group, run: Run) -> Float[Tensor, " entries"]:
        """Those of a run of entries of some planes; called for one group after the other."""
        (blocks, heads), first = (some.stack.blocks, some.stack.heads), self._first
        there = (
            first[0] == some.block and first[1] <= some.head and some.head + heads <= first[1] + self._ready.shape[1]
        )
        if not there or self._ready.shape[0] != blocks:
            size, rows = max(self._pattern.num_entries, 1), self._pattern.num_rows
            several = max(FEATURE_SCORES // size // (blocks * heads), 1) * heads
            planes = self.vectors[some.block * rows :][: blocks * rows, some.head : some.head + several]
            planes = planes.unflatten(0, (blocks, rows)).transpose(1, 2)
            found = products_with_entries(self._pattern, planes.flatten(0, 1).to(self.attr.dtype), self.attr)
            self._first, self._ready = (some.block, some.head), found.unflatten(0, planes.shape[:2])
        return some.entries(self._ready, run, *self._first)


def _groups(call: Call) -> Iterator[_Group]:
    """As many planes as a stack computes at once, until all are done."""
    pattern, (batch, heads) = call.pattern, call.query.shape[:2]
    stack = stack_of(pattern, batch, heads, heads // max(call.key.shape[1], 1))
    for block in range(0, batch if pattern.rows is None else 1, stack.blocks):
        for head in range(0, heads, stack.heads):
            yield _Group(call, stack, block, head)


class _Group(NamedTuple):
    """The planes that a stack computes at once: heads from ``head`` on, of the rows of the batch from ``block`` on (or of all)."""

    call: Call
    stack: Stack
    block: int
    head: int

    def of(self, x: Float[Tensor, "rows heads dim"]) -> Float[Tensor, "stack_rows dim"]:
        """The part of ``x`` that belongs to these planes, as one table."""
        rows, stack = self.call.pattern.num_rows, self.stack
        part = x[self.block * rows : (self.block + stack.blocks) * rows, self.head : self.head + stack.heads]
        return part.flatten(0, 1).to(self.call.wide).contiguous()

    def of_keys(self, x: Float[Tensor, "rows kv_heads dim"]) -> Float[Tensor, "stack_rows dim"]:
        """The part of what there is for keys that belongs to these planes, as one table."""
        rows, stack = self.call.pattern.num_cols, self.stack
        part = x[self.block * rows : (self.block + stack.blocks) * rows, self._kv_head :][:, : stack.kv_heads]
        return part.flatten(0, 1).to(self.call.wide).contiguous()

    @property
    def _kv_head(self) -> int:
        return self.head // (self.call.query.shape[1] // self.call.key.shape[1])

    def place(self, x: Shaped[Tensor, "rows heads *dim"], run: Run) -> Shaped[Tensor, "run_rows stack_heads *dim"]:
        """Where the rows of a run lie in ``x``."""
        first, heads = self.block * self.call.pattern.num_rows, self.stack.heads
        rows = slice(first + run.rows.start // heads, first + run.rows.stop // heads)
        return x[rows, self.head : self.head + heads]

    def place_of_keys(
        self, x: Float[Tensor, "rows kv_heads dim"], run: Run
    ) -> Float[Tensor, "run_rows stack_heads dim"]:
        """Where the rows of a run of keys lie in ``x``."""
        first, heads = self.block * self.call.pattern.num_cols, self.stack.kv_heads
        rows = slice(first + run.rows.start // heads, first + run.rows.stop // heads)
        return x[rows, self._kv_head : self._kv_head + heads]

    def put(self, x: Shaped[Tensor, "rows heads *dim"], run: Run, rows: Shaped[Tensor, "run_rows *dim"]) -> None:
        """Write the rows of a run, which nobody else does."""
        self.place(x, run).copy_(rows.unflatten(0, (-1, self.stack.heads)))

    def add_of_keys(self, x: Float[Tensor, "rows kv_heads dim"], run: Run, rows: Float[Tensor, "run_rows dim"]) -> None:
        """Write the rows of a run of keys, or add to what the heads before have written that share a key head."""
        place, rows = self.place_of_keys(x, run), rows.unflatten(0, (-1, self.stack.kv_heads))
        is_first = self.head % (self.call.query.shape[1] // self.call.key.shape[1]) == 0
        (place.copy_ if is_first else place.add_)(rows)

    def entries(
        self, x: Shaped[Tensor, "#batch #heads entries"], run: Run, block: int = 0, head: int = 0
    ) -> Shaped[Tensor, " run_entries"]:
        """What there is for the entries of a run in ``x``, whose first plane is that of ``block`` and ``head``."""
        plane = self._plane(x, block, head)
        return x.flatten().index_select(0, self._places(x, run, block, head)) if plane is None else plane[run.entries]

    def add_to_entries(
        self, x: Float[Tensor, "#batch #heads entries"], run: Run, more: Float[Tensor, " run_entries"]
    ) -> None:
        """Add to ``x`` what there is for the entries of a run; heads that share a number add to it one after the other."""
        plane = self._plane(x, 0, 0)
        if plane is None:
            x.view(-1).index_add_(0, self._places(x, run, 0, 0), more.to(x.dtype))
        else:
            plane[run.entries] += more

    def _plane(self, x: Tensor, block: int, head: int) -> Tensor | None:
        if self.stack.blocks * self.stack.heads > 1:
            return None
        return x[self.block - block if x.shape[0] > 1 else 0, self.head - head if x.shape[1] > 1 else 0]

    def _places(self, x: Tensor, run: Run, block: int, head: int) -> Int[Tensor, " run_entries"]:
        """Where the entries of a run stand in ``x``, taken as one axis."""
        blocks, heads = self._planes(run)
        plane = (blocks - block) * (x.shape[1] if x.shape[0] > 1 else 0) + (heads - head) * (x.shape[1] > 1)
        return plane * x.shape[2] + self.stack.entry[run.entries]

    def _planes(self, run: Run) -> tuple[Tensor, Tensor]:
        """The row of the batch, or 0 where a plane is a head of all rows, and the head of each entry of a run."""
        row = run.at.long() + run.rows.start
        block = torch.div(row, self.stack.heads * max(self.call.pattern.num_rows, 1), rounding_mode="floor")
        return self.block + block, self.head + row % self.stack.heads

    def add_to_features(
        self,
        x: Float[Tensor, "pattern_entries dim"],
        factors: Float[Tensor, " entries"],
        vectors: Float[Tensor, "stack_rows dim"],
    ) -> None:
        """Add to each entry of the pattern the sum over these planes of ``factor * vectors[query]``."""
        for block in range(self.stack.blocks):
            for head in range(self.stack.heads):
                place, row = self.stack.plane(block, head)
                of_plane = factors if len(factors) == self.call.pattern.num_entries else factors.index_select(0, place)
                x.addcmul_(of_plane[:, None], vectors.index_select(0, row))

    def scored(
        self, run: Run, rows: Tensor, key: Tensor, features: _FeatureProducts | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of the entries of a run, minus infinity where one does not count, and the tanh of the soft cap."""
        scores, bias, allowed, tanh = self.call.scores, self.call.bias, self.call.allowed, None
        s = run.products(rows, key, scores.scale)
        if features is not None:
            s.add_(features.of(self, run), alpha=scores.scale)
        if scores.softcap is not None:
            tanh = torch.tanh(s / scores.softcap)
            s = scores.softcap * tanh
        if bias is not None:
            s.add_(self.entries(bias, run))
        if allowed is not None:
            s.masked_fill_(~self.entries(allowed, run), float("-inf"))
        return s, tanh

    def dropout(self, run: Run) -> Tensor | None:
        """What dropout multiplies the weights of the entries of a run by."""
        scores, pattern, stack = self.call.scores, self.call.pattern, self.stack
        if not scores.dropout_p:
            return None
        h = self._planes(run)[1]
        token = torch.div(run.at.long() + run.rows.start, stack.heads, rounding_mode="floor")
        b = self.block + torch.div(token, max(pattern.num_queries, 1), rounding_mode="floor")
        key = torch.div(run.other.long(), stack.kv_heads, rounding_mode="floor")
        kept = scores.kept(Pairs(b, h, token % max(pattern.num_queries, 1), key % max(pattern.num_keys, 1)))
        return kept.to(self.call.wide).div_(1 - scores.dropout_p)
