"""The oracle: attention as its formula, in double precision, dense."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ._masked import masked_scores, masked_sums
from ._scores import Pairs, Scores


def run(
    scores: Scores,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    sinks: Float[Tensor, " heads"] | None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """``softmax(softcap(scale q k') + bias) v``, one dense fp64 product after the other; differentiable twice."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    pairs = Pairs.of(*q.shape[:2], *(torch.arange(x.shape[2], device=x.device) for x in (q, k)))
    bias, allowed = scores.bias(pairs), scores.allowed(pairs)
    allowed = torch.ones((), dtype=torch.bool, device=q.device) if allowed is None else allowed
    allowed = allowed.expand(*q.shape[:3], k.shape[2])
    s = masked_scores(q, k, allowed) * scores.scale
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    if bias is not None:
        s = s + bias.double().expand_as(s).masked_fill(~allowed, 0)
    s = s.masked_fill(~allowed, -torch.inf)
    top = s.detach().amax(-1, keepdim=True).nan_to_num(neginf=0) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.double()[:, None, None] - top)
    p = e / total.masked_fill(total == 0, 1)
    if scores.dropout_p:
        p = p * scores.kept(pairs) / (1 - scores.dropout_p)
    return masked_sums(p, v, allowed).to(value.dtype)
