"""The oracle: attention as its formula, in double precision, dense."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ._problem import Problem
from ._scores import Scores


def refuse(problem: Problem) -> str | None:
    """Why this kernel cannot compute the problem, or None."""
    return None


def run(
    problem: Problem,
    scores: Scores,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
) -> Float[Tensor, "batch heads queries value_dim"]:
    """``softmax(softcap(scale q k') + bias) v``, one dense fp64 product after the other; differentiable twice."""
    group = problem.heads // problem.kv_heads
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) * scores.scale
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    q_index = torch.arange(q.shape[2], device=q.device)
    k_index = torch.arange(k.shape[2], device=q.device)
    bias = scores.bias(query, q_index, k_index)
    allowed = scores.allowed(query, q_index, k_index)
    allowed = torch.ones_like(s, dtype=torch.bool) if allowed is None else allowed.expand_as(s)
    if bias is not None:
        s = s + bias.double().masked_fill(~allowed, 0)
    s = s.masked_fill(~allowed, -torch.inf)
    top = s.detach().amax(-1, keepdim=True).nan_to_num(neginf=0) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    if scores.sinks is not None:
        total = total + torch.exp(scores.sinks.double()[:, None, None] - top)
    p = e / total.masked_fill(total == 0, 1)
    if problem.dropout_p:
        p = torch.nn.functional.dropout(p, problem.dropout_p)
    return torch.einsum("bhqk,bhkd->bhqd", p, v).to(value.dtype)
