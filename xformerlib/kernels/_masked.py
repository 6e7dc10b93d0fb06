"""Products of matrices in which a pair that does not count contributes nothing, whatever stands there.

In an ordinary product a weight of 0 times NaN is NaN: one bad token then reaches tokens that may not see it. Both functions are each
other's derivatives, so that the same holds in gradients of any order, in forward mode and under ``vmap``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_scores(
    rows: Float[Tensor, "*batch m d"], columns: Float[Tensor, "*batch n d"], allowed: Bool[Tensor, "..."]
) -> Float[Tensor, "*batch m n"]:
    """``rows @ columns'`` at allowed pairs, and 0 elsewhere."""
    result: Tensor = _Scores.apply(rows, columns, allowed)
    return result


def masked_sums(
    weights: Float[Tensor, "*batch m n"], columns: Float[Tensor, "*batch n d"], allowed: Bool[Tensor, "..."]
) -> Float[Tensor, "*batch m d"]:
    """``weights @ columns``, where weights are 0 at pairs that are not allowed; NaN and infinities arrive only over allowed ones."""
    result: Tensor = _Sums.apply(weights, columns, allowed)
    return result


class _Scores(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, columns: Tensor, allowed: Tensor) -> Tensor:
        return (rows @ columns.mT).masked_fill(~allowed, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, columns, allowed = ctx.saved_tensors
        grad = grad.masked_fill(~allowed, 0)
        return _Sums.apply(grad, columns, allowed), _Sums.apply(grad.mT, rows, allowed.mT), None

    @staticmethod
    def jvp(ctx: Any, rows_t: Tensor | None, columns_t: Tensor | None, _: None) -> Tensor:
        rows, columns, allowed = ctx.saved_tensors
        parts = [] if rows_t is None else [_Scores.apply(rows_t, columns, allowed)]
        parts += [] if columns_t is None else [_Scores.apply(rows, columns_t, allowed)]
        return sum(parts[1:], parts[0])


class _Sums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, columns: Tensor, allowed: Tensor) -> Tensor:
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
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, columns, allowed = ctx.saved_tensors
        weights = weights.masked_fill(~allowed, 0)
        return _Scores.apply(grad, columns, allowed), _Sums.apply(weights.mT, grad, allowed.mT), None

    @staticmethod
    def jvp(ctx: Any, weights_t: Tensor | None, columns_t: Tensor | None, _: None) -> Tensor:
        weights, columns, allowed = ctx.saved_tensors
        parts = [] if weights_t is None else [_Sums.apply(weights_t, columns, allowed)]
        parts += [] if columns_t is None else [_Sums.apply(weights, columns_t, allowed)]
        return sum(parts[1:], parts[0])
