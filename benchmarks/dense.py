"""Attention of all to all: with a learned bias, as plain as torch's own, and what planning costs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import xformerlib as xf
from xformerlib import masks, positions

from ._measure import Call, Line, Setting, Side, Target, Work, attention_bytes, attention_flops


def t5(setting: Setting) -> Work:
    tokens, heads, dim, buckets = setting.size(4096, 128), 8, 32, 32
    domain = xf.Sequence(tokens)
    qkv, grad = setting.qkv(1, heads, tokens, dim)
    bias = positions.RelativeBias(heads, buckets=buckets).to(setting.device)
    numbered = positions.RelativeBias(1, buckets=buckets)
    with torch.no_grad():
        numbered.table.copy_(torch.arange(buckets)[:, None])
        at = torch.arange(tokens)
        rows = numbered.pair(domain, domain).at(at[:, None], at[None])[0].long().to(setting.device)

    def peer() -> Tensor:
        dense = F.embedding(rows, bias.table).permute(2, 0, 1)[None].to(setting.dtype)
        return F.scaled_dot_product_attention(*qkv, attn_mask=dense)

    inputs = (*qkv, bias.table)
    plan = xf.plan(None, domain, heads=heads, head_dim=dim, dtype=setting.dtype, device=setting.device, bias=bias)
    ours = Side(lambda: xf.attention(*qkv, bias=bias, domain=domain), inputs, grad)
    flops = attention_flops(tokens**2, heads, dim)
    return Work(ours, Side(peer, inputs, grad, held=[rows]), plan.kernel, flops, attention_bytes(grad))


def plain(setting: Setting, batch: int, heads: int, tokens: int, dim: int, causal: bool) -> Work:
    batch, tokens = setting.size(batch, 2), setting.size(tokens, 50)
    inputs, grad = setting.qkv(batch, heads, tokens, dim)
    mask, domain = masks.Causal() if causal else None, xf.Sequence(tokens)
    plan = xf.plan(mask, domain, batch=batch, heads=heads, head_dim=dim, dtype=setting.dtype, device=setting.device)
    ours = Side(lambda: xf.attention(*inputs, mask=mask, domain=domain), inputs, grad)
    peer = Side(lambda: F.scaled_dot_product_attention(*inputs, is_causal=causal), inputs, grad)
    pairs = batch * (tokens * (tokens + 1) // 2 if causal else tokens**2)
    return Work(ours, peer, plan.kernel, attention_flops(pairs, heads, dim), attention_bytes(grad))


def cached_plan(setting: Setting) -> Work:
    """The plan of a mask that is built anew, as in a model's forward, on a domain that is kept."""
    domain, nothing = xf.Sequence(8192), torch.empty(0)

    def call() -> Tensor:
        xf.plan(
            masks.Causal() & masks.Local(127), domain, heads=8, head_dim=32, dtype=setting.dtype, device=setting.device
        )
        return nothing

    kernel = xf.plan(masks.Causal() & masks.Local(127), domain, heads=8, head_dim=32).kernel
    return Work(Call(call), None, kernel, 0, 0)


LINES = (
    Line("t5", "T5 bias with gradient, T = 4,096, 8 heads x 32", "SDPA, dense bias", t5, Target(faster=1, smaller=4)),
    Line("plan", "a cached plan, of a mask built anew", "-", cached_plan, Target(seconds=30e-6)),
    Line(
        "dense-vit", "all pairs, 8 images of 197 tokens, 6 heads x 64 (ViT-S)", "SDPA",
        partial(plain, batch=8, heads=6, tokens=197, dim=64, causal=False), Target(faster=0.97),
    ),
    Line(
        "dense-causal", "causal, 4 sequences of 1,024 tokens, 6 heads x 64", "SDPA",
        partial(plain, batch=4, heads=6, tokens=1024, dim=64, causal=True), Target(faster=0.97),
    ),
)  # fmt: skip
