"""Torch's flash attention for CPU (Dao 2023, arXiv:2307.08691), on tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ._merge import Merged

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Queries = Float[Tensor, "batch n heads rows dim"]
Keys = Float[Tensor, "batch n kv_heads columns dim"]
Values = Float[Tensor, "batch n kv_heads columns value_dim"]
Additive = Float[Tensor, "#batch #n #heads #rows #columns"]


def fits(device: str, capped: bool, dropout_p: float) -> bool:
    """Whether flash attention can compute tiles, where there is something in them and autograd does not look on."""
    return device == "cpu" and not capped and not dropout_p


def forward(
    query: Queries, key: Keys, value: Values, mask: Additive | None, in_order: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, in the precision of accumulation; that of a row that sees nothing is not to be relied on.

    Args:
        mask: is added to the scores.
        in_order: whether query i sees the keys up to i; then there is no mask.
    """
    wide, group = torch.promote_types(query.dtype, torch.float32), query.shape[2] // key.shape[2]
    if mask is None and group > 1:
        return forward(query, _repeated(key, group), _repeated(value, group), mask, in_order, scale)
    vectors, mask = _prepared(query, key, value, mask, group)
    axis = _loop_axis(vectors, mask)
    found = [
        _FORWARD(q, k, v, 0.0, in_order, attn_mask=m, scale=scale) for (q, k, v), m in _batches(vectors, mask, axis)
    ]
    out = _joined([o for o, _ in found], axis, query)[..., : value.shape[-1]]
    lse = _joined([lse[..., None] for _, lse in found], axis, query)[..., 0]
    return _ungrouped(out, group).to(wide), _ungrouped(lse[..., None], group)[..., 0].to(wide)


def backward(
    query: Queries, key: Keys, value: Values, mask: Additive | None, in_order: bool, scale: float, rows: Merged
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, in the precision of accumulation: they are summed over tiles."""
    wide, group = torch.promote_types(query.dtype, torch.float32), query.shape[2] // key.shape[2]
    if mask is None and group > 1:
        dq, dk, dv = backward(query, _repeated(key, group), _repeated(value, group), mask, in_order, scale, rows)
        return dq, *(x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))
    vectors, mask = _prepared(query, key, value, mask, group)
    dim = vectors[0].shape[-1]
    assert rows.out is not None
    more = [_grouped(_widened(x.to(query.dtype), dim), group) for x in (rows.grad, rows.out)]
    more.append(_grouped(rows.lse[..., None], group))
    every = [*vectors, *more]
    axis = _loop_axis(every, mask)
    found = [
        _BACKWARD(grad, q, k, v, out, lse[..., 0], 0.0, in_order, attn_mask=m, scale=scale)
        for (q, k, v, grad, out, lse), m in _batches(every, mask, axis)
    ]
    dq, dk, dv = (_joined([grads[i] for grads in found], axis, query).to(wide) for i in range(3))
    return _ungrouped(dq, group)[..., : query.shape[-1]], dk[..., : key.shape[-1]], dv[..., : value.shape[-1]]


def _prepared(
    query: Queries, key: Keys, value: Values, mask: Additive | None, group: int
) -> tuple[list[Tensor], Tensor | None]:
    """Vectors of one width and with the same heads, and a mask for them."""
    dim = max(query.shape[-1], value.shape[-1])
    vectors = [_grouped(_widened(query, dim), group), _widened(key, dim), _widened(value, dim)]
    if mask is None:
        return vectors, None
    if group > 1:
        heads, rows = mask.shape[2], query.shape[3]
        mask = mask.expand(*mask.shape[:2], heads if heads == 1 else query.shape[2], rows, mask.shape[4])
        mask = mask.repeat(1, 1, 1, group, 1) if heads == 1 else _grouped(mask, group)
    return vectors, mask.expand(*mask.shape[:2], *vectors[0].shape[2:4], key.shape[3])


def _widened(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


def _repeated(x: Tensor, group: int) -> Tensor:
    """Each key head once for every query head that it serves; as rows of a group these would not be in the order of the keys."""
    return x.repeat_interleave(group, 2)


def _grouped(x: Tensor, group: int) -> Tensor:
    """A group's query heads as further rows of the key head that they share."""
    return x if group == 1 else x.unflatten(2, (-1, group)).flatten(3, 4)


def _ungrouped(x: Tensor, group: int) -> Tensor:
    """The inverse of ``_grouped``."""
    return x if group == 1 else x.unflatten(3, (group, -1)).flatten(2, 3)


def _loop_axis(vectors: list[Tensor], mask: Tensor | None) -> int | None:
    """Rows of the batch and tiles are one axis of a call where that needs no copy (None); or else the shorter of the two is looped over."""
    batch, n = vectors[0].shape[:2]
    shared = mask is None or mask.shape[0] == mask.shape[1] == 1
    if batch == 1 or n == 1 or (shared and all(x.stride(0) == n * x.stride(1) for x in vectors)):
        return None
    return 0 if batch <= n else 1


def _batches(
    vectors: list[Tensor], mask: Tensor | None, axis: int | None
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """The arguments of each call, ``(batch, heads, tokens, dim)``."""
    batch, n = vectors[0].shape[:2]
    if axis is None:
        if mask is not None:
            mask = (mask[:, 0] if n == 1 else mask[0]).expand(batch * n, -1, -1, -1)
        yield [x.flatten(0, 1) for x in vectors], mask
        return
    for i in range(vectors[0].shape[axis]):
        at = None if mask is None else mask.select(axis, i if mask.shape[axis] > 1 else 0)
        yield (
            [x.select(axis, i) for x in vectors],
            None if at is None else at.expand(n if axis == 0 else batch, -1, -1, -1),
        )


def _joined(found: list[Tensor], axis: int | None, query: Queries) -> Tensor:
    """The results of the calls as one tensor of tiles; what belongs to a token stays side by side."""
    if axis is None:
        return found[0].unflatten(0, query.shape[:2])
    return torch.stack([x.transpose(1, 2) for x in found], axis).transpose(2, 3)
