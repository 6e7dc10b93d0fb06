"""Series of unequal length."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import xformerlib as xf
from xformerlib import masks

from ._measure import Line, Setting, Side, Target, Work, attention_bytes, attention_flops
from .windows import ours

HEADS, DIM = 4, 32


def series(setting: Setting, dense: bool) -> Work:
    """Ours has the series one behind the other, the peer padded at the end; where, with a causal mask, no key mask is needed."""
    longest = setting.size(1000, 60)
    lengths = torch.randint(10, longest + 1, (setting.size(256, 8),), generator=torch.Generator().manual_seed(0))
    lengths[0] = longest
    domain = xf.Sequence.packed(lengths.to(setting.device))
    inputs, grad = setting.qkv(1, HEADS, domain.num_tokens, DIM)
    side, kernel = ours(setting, masks.Causal(), domain, inputs, grad)
    there = (torch.arange(longest) < lengths[:, None]).to(setting.device)

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros(lengths.numel(), longest, HEADS, DIM)
        rows[there] = x.detach()[0].transpose(0, 1)
        return rows.transpose(1, 2)

    q, k, v = own = [padded(x).requires_grad_() for x in inputs]
    causal = torch.ones(longest, longest, dtype=torch.bool, device=setting.device).tril()
    mask = there[:, None, None] & causal if dense else None
    peer = Side(
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None), own, padded(grad),
        lambda x: x.transpose(1, 2)[there].transpose(0, 1)[None], [] if mask is None else [mask],
    )  # fmt: skip
    pairs = int((lengths * (lengths + 1) // 2).sum())
    return Work(side, peer, kernel, attention_flops(pairs, HEADS, DIM), attention_bytes(grad))


def beside_varlen(setting: Setting) -> Work:
    """Packed beside packed: torch's flash attention over items of unequal length."""
    longest = setting.size(1000, 60)
    lengths = torch.randint(10, longest + 1, (setting.size(256, 8),), generator=torch.Generator().manual_seed(0))
    domain = xf.Sequence.packed(lengths.to(setting.device))
    inputs, grad = setting.qkv(1, HEADS, domain.num_tokens, DIM)
    side, kernel = ours(setting, masks.Causal(), domain, inputs, grad)

    def peer() -> Side:
        from torch.nn.attention.varlen import varlen_attn

        bounds = F.pad(lengths.cumsum(0), (1, 0)).int().to(setting.device)
        q, k, v = own = tuple(x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in inputs)
        most = int(lengths.max())
        return Side(
            lambda: varlen_attn(q, k, v, bounds, bounds, most, most, window_size=(-1, 0)), own, grad[0].transpose(0, 1),
            lambda x: x.transpose(0, 1)[None],
        )  # fmt: skip

    half = setting.device != "cpu" and setting.dtype != torch.float32
    theirs = peer() if half else "varlen_attn computes in half precision on CUDA only"
    pairs = int((lengths * (lengths + 1) // 2).sum())
    return Work(side, theirs, kernel, attention_flops(pairs, HEADS, DIM), attention_bytes(grad))


RAGGED = "256 series of 10 to 1,000 steps, even odds, causal, 4 heads x 32"
LINES = (
    Line("series", RAGGED, "padded SDPA, causal and padding mask", partial(series, dense=True), Target(faster=3)),
    Line("series-causal", RAGGED, "padded SDPA, is_causal", partial(series, dense=False), Target(faster=3)),
    Line("series-varlen", RAGGED, "varlen_attn, on CUDA", beside_varlen, Target(faster=0.95)),
)
