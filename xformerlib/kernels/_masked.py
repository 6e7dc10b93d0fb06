"""Products of matrices in which a pair that does not count contributes nothing, whatever stands there.

In an ordinary product a weight of 0 times NaN is NaN: one bad token then reaches tokens that may not see it. The two functions are each
other's derivatives, so that the same holds in gradients of any order. Under ``torch.func`` and in forward mode they are ordinary products:
torch does not differentiate the forward derivative of a custom function.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._autograd import is_transformed


def masked_scores(
    rows: Float[Tensor, "*batch m d"], columns: Float[Tensor, "*batch n d"], allowed: Bool[Tensor, "..."]
) -> Float[Tensor, "*batch m n"]:
    """``rows @ columns'`` at allowed pairs, and 0 elsewhere."""
    if is_transformed():
        return (rows @ columns.mT).masked_fill(~allowed, 0)
    result: Tensor = _Scores.apply(rows, columns, allowed)
    return result


def masked_sums(
    weights: Float[Tensor, "*batch m n"], columns: Float[Tensor, "*batch n d"], allowed: Bool[Tensor, "..."]
) -> Float[Tensor, "*batch m d"]:
    """``weights @ columns``, where weights are 0 at pairs that are not allowed; NaN and infinities arrive only over allowed ones."""
    if is_transformed():
        return weights.masked_fill(~allowed, 0) @ columns
    result: Tensor = _Sums.apply(weights, columns, allowed)
    return result


class _Scores(torch.autograd.Function):
    """``masked_scores``; the derivative in each argument is a ``_Sums``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, allowed: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns, allowed)
        return (rows @ columns.mT).masked_fill(~allowed, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, columns, allowed = ctx.saved_tensors
        grad = grad.masked_fill(~allowed, 0)
        return _Sums.apply(grad, columns, allowed), _Sums.apply(grad.mT, rows, allowed.mT), None


class _Sums(torch.autograd.Function):
    """``masked_sums``; its derivatives are a ``_Scores`` and a ``_Sums``."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, columns: Tensor, allowed: Tensor) -> Tensor:
        ctx.save_for_backward(weights, columns, allowed)
        weights = weights.masked_fill(~allowed, 0)
        out = weights @ columns.nan_to_num(0, 0, 0)
        up, down = columns == torch.inf, columns == -torch.inf
        nan = (columns != columns).to(weights.dtype)
        positive, negative = (weights > 0).to(weights.dtype), (weights < 0).to(weights.dtype)
        signs = torch.cat([up, down], -1).to(weights.dtype)
        over, under = (positive @ signs).chunk(2, -1), (negative @ signs).chunk(2, -1)
        rises, falls = (over[0] + under[1]) > 0, (over[1] + under[0]) > 0
        seen = allowed.expand(weights.shape).to(weights.dtype) @ nan > 0
        out = out + torch.where(rises, torch.inf, 0.0) - torch.where(falls, torch.inf, 0.0)
        return out.masked_fill(seen, torch.nan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, columns, allowed = ctx.saved_tensors
        weights = weights.masked_fill(~allowed, 0)
        return _Scores.apply(grad, columns, allowed), _Sums.apply(weights.mT, grad, allowed.mT), None
