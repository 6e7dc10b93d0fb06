"""torch's fused dense attention, where nothing or only causality is masked, or where mask and bias are small."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..masks import Full
from ._problem import Problem
from ._scores import Pairs, Scores, without_hidden

# Up to this many query-key pairs a dense mask or bias is small: 1,024 x 1,024.
SMALL_PAIRS = 2**20


def refuse(problem: Problem) -> str | None:
    """Why this kernel cannot compute the problem, or None."""
    if problem.softcap:
        return "it has no soft cap"
    if problem.sinks:
        return "it returns no log-sum-exp, which sinks need"
    if problem.bias is not None and problem.dtype.itemsize < 4 and (problem.bias != "fixed" or problem.device != "cpu"):
        return f"it would add the bias in {problem.dtype}"
    if problem.num_queries * problem.num_keys <= SMALL_PAIRS:
        return None
    size = f"{problem.num_queries:,} x {problem.num_keys:,}"
    if problem.bias is not None:
        return f"a dense bias of {size} is not small"
    if not (problem.is_full or problem.is_causal):
        return f"a dense mask of {size} is not small, and {problem.mask!r} on {problem.domain!r} is neither full nor plainly causal"
    if problem.dropout_p and problem.device == "cpu":
        return f"on the CPU it computes dropout through dense scores of {size}"
    return None


def is_best(problem: Problem) -> bool:
    """Whether nothing can be faster: no mask or a causal one, and no padding that could be left out."""
    return problem.bias is None and problem.domain.valid is None and (problem.is_full or problem.is_causal)


def isolates(problem: Problem) -> bool:
    """Whether nothing is hidden but padding, or only later tokens, which are left to torch's kernel."""
    together = problem.domain.items is None and problem.keys.items is None
    return problem.bias != "dense" and together and (isinstance(problem.mask, Full) or is_best(problem))


def held(problem: Problem) -> int:
    """Bytes of scores, masks and biases of pairs that the forward holds."""
    pairs, width = problem.num_queries * problem.num_keys, max(4, problem.dtype.itemsize)
    every, scores = pairs * problem.batch * problem.heads, 0
    if problem.device == "cpu" and (problem.dropout_p or problem.bias == "trained"):  # torch's plain formulas
        scores = (2 if problem.dropout_p == 0 else 1) * every * width
    if problem.bias is None and (problem.is_causal or problem.is_full):
        return scores
    extent = problem.mask.extent()
    heads = 1 if problem.bias is None and not extent.heads else problem.heads
    return scores + pairs * (problem.batch if extent.batch else 1) * heads * (width + 1)


def run(
    problem: Problem,
    scores: Scores,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
) -> Float[Tensor, "batch heads queries value_dim"]:
    """``scaled_dot_product_attention`` with ``is_causal``, a dense mask, or neither."""
    options: dict[str, Any] = {
        "dropout_p": scores.dropout_p,
        "scale": scores.scale,
        "enable_gqa": problem.heads != problem.kv_heads,
    }
    if scores.biases == () and (problem.is_full or problem.is_causal):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=problem.is_causal and not problem.is_full, **options
        )
        return out if problem.domain.valid is None else out.masked_fill(~problem.domain.valid[:, None, :, None], 0)
    pairs = Pairs.of(*query.shape[:2], *(torch.arange(x.shape[2], device=x.device) for x in (query, key)))
    allowed, bias = scores.allowed(pairs), scores.bias(pairs)
    empty = None
    if allowed is not None:
        allowed = allowed.expand(*allowed.shape[:2], query.shape[2], key.shape[2])
        if not scores.clean:
            query, key, value = without_hidden(query, key, value, allowed)
        if not scores.reflexive:
            empty = ~allowed.any(-1, keepdim=True)
            allowed = allowed | empty  # such a row is set to 0 below, on every backend alike
    if bias is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, **options)
    else:
        bias = bias.to(
            torch.promote_types(query.dtype, torch.float32)
        )  # the CPU takes an fp32 bias beside half-precision inputs
        if empty is not None:
            bias = bias.masked_fill(empty, 0)
        if allowed is not None:
            bias = bias.masked_fill(~allowed, float("-inf"))
        bias = bias.expand(*bias.shape[:2], query.shape[2], key.shape[2])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, **options)
    return out if empty is None else out.masked_fill(empty, 0)
