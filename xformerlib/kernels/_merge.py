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
from torch.utils.checkpoint import checkpoint

from ._scores import Scores


@dataclass
class Gradients:
    """Where the parts of a mask add what they compute: gradients of the inputs, and of the tensors of the biases."""

    query: Tensor
    key: Tensor
    value: Tensor
    biases: list[Tensor | None]


@dataclass(frozen=True)
class Merged:
    """What the forward made and the backward needs, per query: output, its log-sum-exp (+inf for empty rows), the output's gradient,
    and the inner product of the two."""

    out: Float[Tensor, "*tiles batch heads queries value_dim"]
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
    """

    kernel: str
    what: str
    pairs: float
    differentiable: bool = False

    @abstractmethod
    def forward(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output (0 in rows that see nothing here) and log-sum-exp (-inf there), in the precision of accumulation."""

    @abstractmethod
    def backward(
        self, scores: Scores, query: Tensor, key: Tensor, value: Tensor, merged: Merged, into: Gradients
    ) -> None:
        """Add this part's share of every gradient."""


def attend(
    parts: SequenceOf[tuple[Part, Scores]], query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention over the union of disjoint parts, each with the scores that its predicate leaves."""
    tensors = parts[0][1].tensors
    if any(part.differentiable for part, _ in parts):
        alone = [(part if part.differentiable else _Differentiable(part), scores) for part, scores in parts]
        return _merged(alone, query, key, value, sinks)[0].to(value.dtype)
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        # Compiled code cannot differentiate a bias within a backward: it differentiates the formulas, computed twice.
        return checkpoint(_merged, parts, query, key, value, sinks, use_reentrant=False)[0].to(value.dtype)
    return _Attend.apply(parts, query, key, value, sinks, *tensors)


def _merged(
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
        out, lse = _merged([(part, scores.using(tensors)) for part, scores in parts], query, key, value, sinks)
        ctx.parts = parts
        # In the precision of accumulation: delta in the backward is a difference of what rounding would lose.
        ctx.save_for_backward(query, key, value, sinks, out, lse, *tensors)
        return out.to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, sinks, out, lse, *tensors = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        delta = (grad.to(wide) * out.to(wide)).sum(-1)
        merged = Merged(out, lse.masked_fill(lse == -torch.inf, torch.inf), grad, delta)
        into = _no_gradients(query, key, value, tensors, ctx.needs_input_grad[5:])
        for part, scores in ctx.parts:
            part.backward(scores.using(tuple(tensors)), query, key, value, merged, into)
        sink_grad = None
        if sinks is not None:
            share = torch.exp(sinks.to(wide)[:, None] - merged.lse)
            sink_grad = -(share * delta).sum((0, 2)).to(sinks.dtype)
        return (
            None,
            into.query.to(query.dtype),
            into.key.to(key.dtype),
            into.value.to(value.dtype),
            sink_grad,
            *into.biases,
        )


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
        into = _no_gradients(query, key, value, tensors, ctx.needs_input_grad[5:])
        ctx.part.backward(ctx.scores.using(tuple(tensors)), query, key, value, merged, into)
        vectors = (g.to(x.dtype) for g, x in ((into.query, query), (into.key, key), (into.value, value)))
        return None, None, *vectors, *into.biases


def _no_gradients(
    query: Tensor, key: Tensor, value: Tensor, tensors: SequenceOf[Tensor], needed: SequenceOf[bool]
) -> Gradients:
    wide = torch.promote_types(query.dtype, torch.float32)
    return Gradients(
        torch.zeros_like(query, dtype=wide),
        torch.zeros_like(key, dtype=wide),
        torch.zeros_like(value, dtype=wide),
        [torch.zeros_like(t) if need else None for t, need in zip(tensors, needed, strict=True)],
    )


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    # A row that is empty in both stays out of the logarithm, whose derivative there is 0 / 0.
    empty = (lse == -torch.inf) & (more_lse == -torch.inf)
    safe = torch.logaddexp(lse.masked_fill(empty, 0), more_lse.masked_fill(empty, 0))
    total = safe.masked_fill(empty, -torch.inf)
    return out * torch.exp(lse - safe)[..., None] + more * torch.exp(more_lse - safe)[..., None], total
