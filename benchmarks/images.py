"""Neighbourhoods and windows in images."""

from __future__ import annotations

from functools import partial

import torch

import xformerlib as xf
from xformerlib import masks, positions

from ._measure import Line, Setting, Side, Target, Work, attention_flops, installed
from .windows import beside_dense_mask

HEADS, DIM, SIDE, WINDOW = 4, 32, 56, 7


def neighbourhood(setting: Setting) -> Work:
    side = setting.size(SIDE, 14)
    return beside_dense_mask(setting, masks.Local(WINDOW // 2), xf.Grid(side, side), HEADS, DIM)


def swin(setting: Setting, fused: bool) -> Work:
    """The whole layer, from tokens to tokens, with the same weights; timm's as its block calls it."""
    side, batch, shift, channels = setting.size(SIDE, 14), setting.size(8, 2), WINDOW // 2, HEADS * DIM
    domain, mask = xf.Grid(side, side), masks.Windows(WINDOW, shift=shift)
    bias = positions.RelativeBias(HEADS, size=(WINDOW, WINDOW))
    layer = xf.Attention(channels, HEADS, mask=mask, position=bias).to(setting.device, setting.dtype)
    x, grad = (setting.random(batch, side * side, channels, seed=seed) for seed in range(2))
    x.requires_grad_()
    ours = Side(lambda: layer(x, domain), (x, bias.table, layer.qkv.weight, layer.out.weight), grad)

    def peer() -> Side:
        from timm.models.swin_transformer import SwinTransformerBlock

        block = SwinTransformerBlock(channels, (side, side), HEADS, window_size=WINDOW, shift_size=shift)
        block.to(setting.device, setting.dtype)
        theirs = block.attn
        theirs.fused_attn = fused
        with torch.no_grad():
            theirs.relative_position_bias_table.copy_(bias.table)
            for mine, linear in ((layer.qkv, theirs.qkv), (layer.out, theirs.proj)):
                linear.load_state_dict(mine.state_dict())
        image = x.detach().unflatten(1, (side, side)).requires_grad_()
        inputs = (image, theirs.relative_position_bias_table, theirs.qkv.weight, theirs.proj.weight)
        return Side(
            lambda: block._attn(image),
            inputs,
            grad.unflatten(1, (side, side)),
            lambda y: y.flatten(1, 2),
            [block.get_buffer("attn_mask")],
        )

    plan = xf.plan(
        mask, domain, batch=batch, heads=HEADS, head_dim=DIM, dtype=setting.dtype, device=setting.device, bias=bias
    )
    pairs = batch * int(mask.dense(domain).sum())
    projections = (
        3 * 2.0 * batch * side**2 * channels * 4 * channels
    )  # as many products again for each of two gradients
    moved = 2 * 12.0 * x.numel() * x.element_size()
    return Work(ours, installed(peer), plan.kernel, attention_flops(pairs, HEADS, DIM) + projections, moved)


SWIN = "Swin layer: windows of 7 x 7, shifted, bias table, on 8 images of 56 x 56"
LINES = (
    Line(
        "neighbourhood",
        "neighbourhood of 7 x 7 on 56 x 56, 4 heads x 32",
        "SDPA, dense mask",
        neighbourhood,
        Target(faster=4),
    ),
    Line("swin", SWIN, "timm, its SDPA path off", partial(swin, fused=False), Target(faster=1.3)),
    Line("swin-sdpa", SWIN, "timm, its SDPA path on", partial(swin, fused=True), Target(faster=1.1)),
)
