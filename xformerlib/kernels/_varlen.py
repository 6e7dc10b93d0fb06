"""On CUDA in half precision: packed items by torch's flash attention over items of unequal length."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..domains import Grid, Sequence
from ..masks import Causal, Full
from ._merge import Part
from ._problem import Problem
from ._scores import Scores

# What the kernel takes: channels of a head at most, and of which they must be a multiple.
MOST_DIM, DIM_STEP = 256, 8


def refuse(problem: Problem) -> str | None:
    """Why this kernel cannot compute the problem, or None."""
    if problem.mask not in (Full(), Causal()) or problem.domain.items is None or problem.domain != problem.keys:
        return "only whole items, or causal ones, are computed by varlen"
    ordered = isinstance(problem.domain, Sequence) or (isinstance(problem.domain, Grid) and problem.domain.prefix == 0)
    if problem.mask == Causal() and not ordered:
        return "varlen takes causality in the order of the tensors"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"varlen does not compute in {problem.dtype}"
    if problem.bias is not None or problem.softcap or problem.dropout_p:
        return "varlen has no bias, no soft cap and no dropout"
    if problem.sinks:
        return "varlen has no gradient of its log-sum-exp, which sinks need"
    if max(problem.head_dim, problem.value_dim) > MOST_DIM:
        return f"varlen has heads of no more than {MOST_DIM} channels"
    return None


class VarlenPart(Part):
    """The items of a packed domain, whole or causal, where they are all that there is to compute; ``kernel`` names the structure."""

    differentiable = True
    isolates = True

    def __init__(self, kernel: str, problem: Problem, device: torch.device) -> None:
        self.kernel = kernel
        self.what = f"{problem.mask!r} on {problem.domain!r}, by varlen"
        self.causal = problem.mask == Causal()
        offsets = problem.domain.offsets
        assert offsets is not None
        sizes, offsets = offsets.diff(), offsets.to(device)
        self.longest = int(sizes.max())
        self.pairs = float(sizes.double().square().sum()) * (0.5 if self.causal else 1)
        first = problem.num_queries * torch.arange(problem.batch, device=device)[:, None]
        end = offsets.new_tensor([problem.batch * problem.num_queries])
        self.bounds = torch.cat([(first + offsets[:-1]).flatten(), end]).int()

    def forward(self, scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        width = max(query.shape[-1], value.shape[-1])
        width += -width % DIM_STEP
        q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out, lse = _varlen_attn(q, k, v, self.bounds, self.longest, self.causal, scores.scale)
        out = out.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)[..., : value.shape[-1]]
        return out, lse.unflatten(1, (query.shape[0], query.shape[2])).transpose(0, 1)


def _varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``(tokens, heads, dim)`` and log-sum-exp ``(heads, tokens)``."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn  # slow to load, and seldom needed

    options: dict[str, Any] = {"scale": scale, "return_aux": AuxRequest(lse=True)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # older ones take grouped heads as they come
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    window = (-1, 0) if causal else (-1, -1)
    result: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=window, **options)
    return result
