"""Attention over disjoint parts of a mask, merged exactly by their log-sum-exp.

With o_p the output of part p alone and l_p the log-sum-exp of its scores, the whole is

    l = log sum_p exp(l_p),   o = sum_p exp(l_p - l) o_p,

a learned sink being one more part, without a value. In the backward every part takes the merged o and l, for the weight of a pair is
exp(s - l) wherever the pair stands, and so computes its share of the gradients on its own (the identity behind FlashAttention-2, Dao
2023, arXiv:2307.08691). Beside inputs and output only l is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._autograd import no_autocast
from ._problem import Problem
from ._scores import Scores


@dataclass
class Gradients:
    """Where the parts of a mask add what they compute: gradients of the tensors of the biases, and of the inputs (None: nothing yet)."""

    biases: list[Tensor | None]
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    sinks: Tensor | None = None

    @staticmethod
    def of(tensors: SequenceOf[Tensor], needed: SequenceOf[bool]) -> Gradients:
        """No gradients yet; ``needed`` says which tensors of the biases want one."""
        return Gradients([torch.zeros_like(t) if need else None for t, need in zip(tensors, needed, strict=True)])

    def add(self, query: Tensor | None, key: Tensor | None, value: Tensor | None) -> None:
        """Add to the gradients of the inputs."""
        self.query, self.key, self.value = (
            more if total is None else total if more is None else total.add_(more)
            for total, more in ((self.query, query), (self.key, key), (self.value, value))
        )

    def buffers(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the inputs, in the precision of accumulation and 0 where nothing came, to add to in place."""
        wide = torch.promote_types(query.dtype, torch.float32)
        self.query = torch.zeros_like(query, dtype=wide) if self.query is None else self.query
        self.key = torch.zeros_like(key, dtype=wide) if self.key is None else self.key
        self.value = torch.zeros_like(value, dtype=wide) if self.value is None else self.value
        return self.query, self.key, self.value

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the inputs, in their dtypes."""
        grads = self.buffers(query, key, value)
        return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


@dataclass(frozen=True)
class Merged:
    """What the forward made and the backward needs, per query: output (None in tiles that do without), its log-sum-exp (+inf for empty
    rows), the output's gradient, and the inner product of the two."""

    out: Float[Tensor, "*tiles batch heads queries value_dim"] | None
    lse: Float[Tensor, "*tiles batch heads queries"]
    grad: Float[Tensor, "*tiles batch heads queries value_dim"]
    delta: Float[Tensor, "*tiles batch heads queries"]


class Part(ABC):
    """A part of a mask, disjoint from the others, and the kernel that computes it. Keeps nothing of a call.

    Attributes:
        kernel: name of the kernel.
        what: the part, for people.
        pairs: query-key pairs that the kernel visits, for each row of the batch and head.
        differentiable: whether autograd differentiates ``forward``, in output and log-sum-exp, so that ``backward`` is not needed.
        isolates: whether a pair that does not count is never computed, so that a NaN reaches only queries that may see it.
    """

    kernel: str
    what: str
    pairs: float
    differentiable: bool = False
    isolates: bool = False

    @abstractmethod
    def forward(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output (0 in rows that see nothing here) and log-sum-exp (-inf there), in the precision of accumulation."""

    def plain(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """``forward`` by torch's own operations; only for parts that are not ``differentiable``."""
        raise AssertionError(f"{self.kernel} is differentiated by autograd, but not twice")

    def alone(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """The output where this part is all there is, if the kernel has a way of its own to make and to differentiate it."""
        return None

    def held(self, problem: Problem) -> int:
        """Bytes of scores, masks and biases of pairs that the forward holds at a time; a fused kernel holds none."""
        return 0

    def backward(
        self, scores: Scores, query: Tensor, key: Tensor, value: Tensor, merged: Merged, into: Gradients
    ) -> None:
        """Add this part's share of every gradient; where autograd differentiates the forward, by computing that again."""
        tensors = scores.tensors
        needed = [i for i, total in enumerate(into.biases) if total is not None]
        vectors = [x.detach().requires_grad_() for x in (query, key, value)]
        leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        with torch.enable_grad():
            out, lse = self.forward(scores.using(tuple(leaves)), *vectors)
        share = torch.exp(lse.detach() - merged.lse)
        grad = merged.grad * share[..., None]
        made = [(out, grad.to(out.dtype)), (lse, (grad * out.detach()).sum(-1) - share * merged.delta)]
        outputs, grads = zip(*(pair for pair in made if pair[0].requires_grad), strict=True)
        found = torch.autograd.grad(outputs, [*vectors, *(leaves[i] for i in needed)], grads, materialize_grads=True)
        into.add(*found[:3])
        for i, more in zip(needed, found[3:], strict=True):
            total = into.biases[i]
            assert total is not None
            total += more


def attend(
    parts: SequenceOf[tuple[Part, Scores]], query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention over the union of disjoint parts, each with the scores that its predicate leaves."""
    tensors = parts[0][1].tensors
    if len(parts) == 1 and sinks is None:
        out = parts[0][0].alone(parts[0][1], query, key, value)
        if out is not None:
            return out
    if any(part.differentiable for part, _ in parts):
        alone = [(part if part.differentiable else _Differentiable(part), scores) for part, scores in parts]
        return merged_parts(alone, query, key, value, sinks)[0].to(value.dtype)
    return _Attend.apply(parts, query, key, value, sinks, *tensors)


def merged_parts(
    parts: SequenceOf[tuple[Part, Scores]], query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of all parts and the sinks."""
    first, scores = parts[0]
    out, lse = first.forward(scores, query, key, value)
    for part, scores in parts[1:]:
        out, lse = _merge(out, lse, *part.forward(scores, query, key, value))
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None].expand_as(lse))
        out, lse = out * torch.exp(lse - total)[..., None], total
    return out, lse


def gradients(
    parts: SequenceOf[tuple[Part, Scores]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    needed: SequenceOf[bool],
) -> Gradients:
    """The gradients of everything from that of the output, which ``merged_parts`` made, in the precision of accumulation, with ``lse``.

    ``needed`` says which tensors of the biases want one.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    delta = (grad.to(wide) * out.to(wide)).sum(-1)
    merged = Merged(out, lse.masked_fill(lse == -torch.inf, torch.inf), grad, delta)
    into = Gradients.of(parts[0][1].tensors, needed)
    for part, scores in parts:
        part.backward(scores, query, key, value, merged, into)
    if sinks is not None:
        share = torch.exp(sinks.to(wide)[:, None] - merged.lse)
        into.sinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    into.query, into.key, into.value = into.inputs(query, key, value)
    return into


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: SequenceOf[tuple[Part, Scores]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        out, lse = merged_parts([(part, scores.using(tensors)) for part, scores in parts], query, key, value, sinks)
        ctx.parts = parts
        ctx.set_materialize_grads(False)
        # In the precision of accumulation: delta in the backward is a difference of what rounding would lose.
        ctx.save_for_backward(query, key, value, sinks, out, lse, *tensors)
        return out.to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:  # gradients took another way (``twice_differentiable``)
            return (None,) * len(ctx.needs_input_grad)
        query, key, value, sinks, out, lse, *tensors = ctx.saved_tensors
        parts = [(part, scores.using(tuple(tensors))) for part, scores in ctx.parts]
        with no_autocast(query.device):
            grads = gradients(parts, query, key, value, sinks, out, lse, grad, ctx.needs_input_grad[5:])
        return None, grads.query, grads.key, grads.value, grads.sinks, *grads.biases


class _Differentiable(Part):
    """A part that computes its own backward, as one that autograd differentiates."""

    differentiable = True

    def __init__(self, part: Part) -> None:
        self.part = part
        self.kernel, self.what, self.pairs = part.kernel, part.what, part.pairs

    def forward(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return _Alone.apply(self.part, scores, query, key, value, *scores.tensors)

    def backward(
        self, scores: Scores, query: Tensor, key: Tensor, value: Tensor, merged: Merged, into: Gradients
    ) -> None:
        self.part.backward(scores, query, key, value, merged, into)


class _Alone(torch.autograd.Function):
    """One part, in output and log-sum-exp l: with p the weights and dp the gradient of the output times the values,

        ds = p (dp - (delta - dl)),

    so that the backward of the part serves with delta less the gradient of l."""

    @staticmethod
    def forward(
        ctx: Any, part: Part, scores: Scores, query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = part.forward(scores.using(tensors), query, key, value)
        ctx.part, ctx.scores = part, scores
        ctx.save_for_backward(query, key, value, out, lse, *tensors)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, lse_grad: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse, *tensors = ctx.saved_tensors
        delta = (grad * out).sum(-1) - lse_grad.masked_fill(lse == -torch.inf, 0)
        merged = Merged(out, lse.masked_fill(lse == -torch.inf, torch.inf), grad, delta)
        into = Gradients.of(tensors, ctx.needs_input_grad[5:])
        with no_autocast(query.device):
            ctx.part.backward(ctx.scores.using(tuple(tensors)), query, key, value, merged, into)
        return None, None, *into.inputs(query, key, value), *into.biases


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    # A row that is empty in both stays out of the logarithm, whose derivative there is 0 / 0.
    empty = (lse == -torch.inf) & (more_lse == -torch.inf)
    safe = torch.logaddexp(lse.masked_fill(empty, 0), more_lse.masked_fill(empty, 0))
    total = safe.masked_fill(empty, -torch.inf)
    return out * torch.exp(lse - safe)[..., None] + more * torch.exp(more_lse - safe)[..., None], total
