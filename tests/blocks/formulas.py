"""The formulas of feed-forward layers and blocks, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import xformerlib as xf

DIM, HEADS, HIDDEN = 16, 4, 20
NORMS = ["pre", "post", "sandwich", "res-post", "parallel"]


def redrawn(module: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The module in fp64, or the precision that is asked for, every parameter drawn anew, so that norms, biases and scales count."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module.to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, DIM, dtype=dtype)


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    if isinstance(norm, nn.RMSNorm):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def attended(layer: xf.Attention, x: Tensor, context: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
    """softmax(Q K' / sqrt(d)) V for each head, and the output projection."""
    source, d = x if context is None else context, layer.head_dim
    rows = layer.heads * d, layer.kv_heads * d, layer.kv_heads * d
    (w_q, w_k, w_v), (b_q, b_k, b_v) = layer.qkv.weight.split(rows), layer.qkv.bias.split(rows)
    q, k, v = x @ w_q.T + b_q, source @ w_k.T + b_k, source @ w_v.T + b_v
    heads = []
    for h in range(layer.heads):
        own, shared = slice(h * d, (h + 1) * d), h // (layer.heads // layer.kv_heads)
        from_ = slice(shared * d, (shared + 1) * d)
        scores = q[..., own] @ k[..., from_].transpose(-2, -1) / d**0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        heads.append(torch.softmax(scores, -1) @ v[..., from_])
    return torch.cat(heads, -1) @ layer.out.weight.T + layer.out.bias


def fed_forward(layer: xf.FeedForward, x: Tensor) -> Tensor:
    h = x @ layer.up.weight.T + (0 if layer.up.bias is None else layer.up.bias)
    if layer.gated:
        gate, h = h[..., : layer.hidden], h[..., layer.hidden :]
        h = (gate * torch.sigmoid(gate) if layer.activation == "swiglu" else exact_gelu(gate)) * h
    else:
        h = {"relu": lambda h: h.clamp(min=0), "gelu": exact_gelu}[layer.activation](h)
    return h @ layer.down.weight.T + (0 if layer.down.bias is None else layer.down.bias)


def exact_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def block_formula(block: xf.Block, kind: str, x: Tensor, context: Tensor | None, allowed: Tensor | None) -> Tensor:
    branches: list[tuple[Callable[[Tensor], Tensor], Any]] = [
        (lambda y: attended(block.attention, y, None, allowed), block.attention_residual)
    ]
    if context is not None:
        branches.append((lambda y: attended(block.cross_attention, y, context), block.cross_residual))
    branches.append((lambda y: fed_forward(block.feed_forward, y), block.feed_forward_residual))
    if kind == "parallel":
        first = branches[0][1]
        y = normed(x, first.norm)
        return x + sum(f(y) for f, _ in branches) * (1 if first.scale is None else first.scale)
    for f, residual in branches:
        y = f(x if kind == "post" else normed(x, residual.norm))
        y = normed(y, residual.branch_norm) if kind in ("sandwich", "res-post") else y
        x = x + y * (1 if residual.scale is None else residual.scale)
        x = normed(x, residual.norm) if kind == "post" else x
    return x
