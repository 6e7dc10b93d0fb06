"""Windows over long sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import xformerlib as xf
from xformerlib import masks
from xformerlib.domains import Domain
from xformerlib.masks import Mask

from ._measure import Line, Setting, Side, Target, Work, attention_bytes, attention_flops, installed

HEADS, DIM, WINDOW = 8, 32, 128


def ours(
    setting: Setting, mask: Mask, domain: Domain, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> tuple[Side, str]:
    """The attention, and the kernel that the plan chose."""
    batch, heads, _, dim = grad.shape
    plan = xf.plan(mask, domain, batch=batch, heads=heads, head_dim=dim, dtype=setting.dtype, device=setting.device)
    return Side(lambda: xf.attention(*inputs, mask=mask, domain=domain), inputs, grad), plan.kernel


def dense_mask(mask: Mask, domain: Domain, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> Side:
    """What SDPA users do: the mask as a T x T tensor, made once."""
    allowed = mask.dense(domain).to(grad.device)
    return Side(lambda: F.scaled_dot_product_attention(*inputs, attn_mask=allowed), inputs, grad, held=[allowed])


def beside_dense_mask(setting: Setting, mask: Mask, domain: Domain, heads: int, dim: int) -> Work:
    inputs, grad = setting.qkv(1, heads, domain.num_tokens, dim)
    side, kernel = ours(setting, mask, domain, inputs, grad)
    peer = dense_mask(mask, domain, inputs, grad)
    flops = attention_flops(int(peer.held[0].sum()), heads, dim)
    return Work(side, peer, kernel, flops, attention_bytes(grad))


def causal_window(setting: Setting) -> Work:
    domain = xf.Sequence(setting.size(8192, 512))
    return beside_dense_mask(setting, masks.Causal() & masks.Local(WINDOW - 1), domain, HEADS, DIM)


def local_attention(setting: Setting) -> Work:
    # Its window of 128 with exact_windowsize is the query itself and 128 keys before it.
    tokens = setting.size(8192, 512)
    inputs, grad = setting.qkv(1, HEADS, tokens, DIM)
    side, kernel = ours(setting, masks.Causal() & masks.Local(WINDOW), xf.Sequence(tokens), inputs, grad)

    def peer() -> Side:
        from local_attention import LocalAttention

        layer = LocalAttention(WINDOW, causal=True, exact_windowsize=True, use_rotary_pos_emb=False)
        return Side(lambda: layer(*inputs), inputs, grad)

    return Work(
        side, installed(peer), kernel, attention_flops(tokens * (WINDOW + 1), HEADS, DIM), attention_bytes(grad)
    )


def long_window(setting: Setting) -> Work:
    tokens = setting.size(65_536 if setting.device == "cpu" else 1_000_000, 1024)
    inputs, grad = setting.qkv(1, HEADS, tokens, DIM)
    side, kernel = ours(setting, masks.Causal() & masks.Local(WINDOW - 1), xf.Sequence(tokens), inputs, grad)
    return Work(side, None, kernel, attention_flops(tokens * WINDOW, HEADS, DIM), attention_bytes(grad))


def beside_flex_attention(setting: Setting) -> Work:
    """The call that a user of FlexAttention would write, compiled, its block mask made once."""
    tokens = setting.size(8192, 512)
    inputs, grad = setting.qkv(1, HEADS, tokens, DIM)
    side, kernel = ours(setting, masks.Causal() & masks.Local(WINDOW - 1), xf.Sequence(tokens), inputs, grad)

    def peer() -> Side:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (q - k < WINDOW)

        blocks = create_block_mask(window, None, None, tokens, tokens, device=setting.device)
        compiled = torch.compile(flex_attention)
        return Side(lambda: compiled(*inputs, block_mask=blocks), inputs, grad)

    theirs = "FlexAttention has no backward on the CPU" if setting.device == "cpu" else peer()
    return Work(side, theirs, kernel, attention_flops(tokens * WINDOW, HEADS, DIM), attention_bytes(grad))


def window_and_globals(setting: Setting) -> Work:
    mask = masks.Local(WINDOW // 2) | masks.Global(16)
    return beside_dense_mask(setting, mask, xf.Sequence(setting.size(8192, 512)), HEADS, DIM)


LINES = (
    Line(
        "causal-window",
        "causal window of 128, T = 8,192, 8 heads x 32",
        "SDPA, dense mask",
        causal_window,
        Target(faster=15, smaller=3),
    ),
    Line("causal-window-local", "the same", "local-attention", local_attention, Target(faster=1.5)),
    Line("causal-window-flex", "the same", "FlexAttention, on CUDA", beside_flex_attention, Target(faster=0.95)),
    Line("causal-window-long", "the same at T = 65,536 (CUDA: 1,000,000)", "-", long_window, Target(bytes=2e9)),
    Line(
        "window-global",
        "window of 128 and 16 global tokens, T = 8,192",
        "SDPA, dense mask",
        window_and_globals,
        Target(faster=10),
    ),
)
