"""Any mask, any bias, in memory that is linear in tokens: blocks of queries, recomputed in the backward."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ._problem import Problem
from ._scores import Scores, grouped_matmul, probabilities

# Scores held at a time. Larger blocks save launches, smaller ones stay in cache.
BLOCK_SCORES = 2**21


def refuse(problem: Problem) -> str | None:
    """Why this kernel cannot compute the problem, or None."""
    return None


def rows_per_block(problem: Problem) -> int:
    """Queries of one block, so that its scores number about ``BLOCK_SCORES``."""
    return max(1, BLOCK_SCORES // max(problem.batch * problem.heads * problem.num_keys, 1))


def run(
    problem: Problem,
    scores: Scores,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Each block of queries meets all keys at once; autograd keeps its inputs and computes its scores again in the backward."""
    dtype = value.dtype
    if dtype.itemsize < 4:
        query, key, value = query.float(), key.float(), value.float()
    if key.shape[2] == 0:  # softmax over nothing: every output is 0, and depends on the inputs in name only
        return (grouped_matmul(query @ key.transpose(-2, -1).sum(1, keepdim=True), value[:, :1])).to(dtype)
    k_index = torch.arange(key.shape[2], device=key.device)

    def block(q: Tensor, k: Tensor, v: Tensor, q_index: Tensor) -> Tensor:
        p, kept = probabilities(q, k, scores, q_index, k_index)
        out = grouped_matmul(F.dropout(p, problem.dropout_p), v)
        return out if kept is None else out * kept[..., None]

    rows = rows_per_block(problem)
    outputs = []
    for q_index in torch.arange(query.shape[2], device=query.device).split(rows):
        first = len(outputs) * rows
        q = query[:, :, first : first + q_index.numel()]
        if torch.is_grad_enabled():
            outputs.append(checkpoint(block, q, key, value, q_index, use_reentrant=False, preserve_rng_state=problem.dropout_p > 0))
        else:
            outputs.append(block(q, key, value, q_index))
    return (torch.cat(outputs, 2) if outputs else query.new_zeros(*query.shape[:3], value.shape[-1])).to(dtype)
