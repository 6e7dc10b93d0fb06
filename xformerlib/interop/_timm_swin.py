"""timm's Swin Transformers, versions 1 and 2, as ours."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.swin_transformer import PatchMerging as TheirPatchMerging
from timm.models.swin_transformer_v2 import PatchMerging as TheirPatchMergingV2, SwinTransformerV2
from torch import nn

from .._pooling import Pool, Pooling
from .._sublayers import Cosine
from ..blocks import Block
from ..positions import ContinuousBias, RelativeBias
from ..vision import PatchMerging, Swin
from ._timm_blocks import block
from ._timm_vit import patch_embed
from ._timm_weights import Weights, parameter

POOLS: dict[str, Pool] = {"avg": "mean", "max": "max", "avgmax": "mean-max"}


def swin(model: Any) -> Swin:
    """A ``SwinTransformer`` or ``SwinTransformerV2`` as ours.

    The logits are the same where windows divide the grids of all stages: elsewhere theirs attends to the zeros that fill the last windows,
    and ours to what exists. Windows are shifted where theirs are for the size of images that it was built for.
    """
    weights, stages = Weights(model), list(model.layers)
    version = 2 if isinstance(model, SwinTransformerV2) else 1
    windows: list[Any] = [tuple(stage.blocks[0].window_size) for stage in stages]
    trained = [_trained(stage.blocks[0].attn) for stage in stages] if version == 2 else None
    width = stages[0].blocks[0].attn.dim
    with torch.device("meta"):
        ours = Swin(
            None, patch=model.patch_embed.patch_size, window=windows, dim=width, depths=[len(stage.blocks) for stage in stages],
            heads=[1] * len(stages), version=version, pretrained_window=trained,  # type: ignore[arg-type]
        )  # fmt: skip
    ours.embed = patch_embed(weights, model.patch_embed)
    for encoder, stage in zip(ours.stages, stages, strict=True):
        encoder.blocks = nn.ModuleList(_block(weights, index, theirs) for index, theirs in enumerate(stage.blocks))
        encoder.checkpoint = stage.grad_checkpointing
    for merge, stage in zip(ours.merges, stages[1:], strict=True):
        _merge(weights, merge, stage.downsample)  # type: ignore[arg-type]
    ours.norm = weights.norm(model.norm)
    kind = model.head.global_pool.pool_type
    if kind not in POOLS:
        raise ValueError(
            f"global_pool must be one of {', '.join(map(repr, POOLS))}, which are all that ours has; got {kind!r}. Without a head, tokens "
            "are what features(images) returns."
        )
    ours.pool, ours.head_dropout = Pooling(model.num_features, POOLS[kind]), weights.dropout(model.head.drop)
    ours.head = nn.Identity() if isinstance(model.head.fc, nn.Identity) else weights.linear(model.head.fc)
    weights.finish()
    return ours.train(model.training)


def _block(weights: Weights, index: int, theirs: Any) -> Block:
    """A block with its position."""
    ours, heads, window = block(weights, theirs, None), theirs.attn.num_heads, tuple(theirs.window_size)
    sides = tuple(zip(theirs.input_resolution, window, strict=True))
    if tuple(theirs.shift_size) != tuple(size // 2 * (index % 2) * (side > size) for side, size in sides):
        weights.refuse(theirs, f"shifts windows of {window} by {tuple(theirs.shift_size)} (always_partition)")
    with torch.device("meta"):
        position = _position(weights, theirs.attn, heads, window)
    ours.attention.position = position
    if isinstance(position, ContinuousBias):
        query, key = Cosine(ours.attention.head_dim, heads), Cosine(ours.attention.head_dim, None)
        query.temperature = parameter(weights.take(theirs.attn.logit_scale).flatten())
        ours.attention.query_norm, ours.attention.key_norm = query, key
    return ours


def _position(weights: Weights, attn: Any, heads: int, window: tuple[int, ...]) -> RelativeBias | ContinuousBias:
    if hasattr(attn, "relative_position_bias_table"):
        table = RelativeBias(heads, size=window)
        table.table = parameter(weights.take(attn.relative_position_bias_table))
        return table
    inner, _, outer = attn.cpb_mlp
    scale = tuple(8 / max(size - 1, 1) for size in _trained(attn))
    network = ContinuousBias(heads, hidden=inner.out_features, axes=2, size=window, scale=scale)
    network.inner, network.outer = weights.linear(inner), weights.linear(outer)
    with torch.no_grad():
        network.inner.weight /= math.log2(8)  # theirs divides the logarithm
    return network


def _trained(attn: Any) -> tuple[int, ...]:
    """The window whose offsets are mapped to -8 ... 8."""
    trained = tuple(attn.pretrained_window_size)
    return trained if trained[0] > 0 else tuple(attn.window_size)


def _merge(weights: Weights, ours: PatchMerging, theirs: Any) -> None:
    if type(theirs) not in (TheirPatchMerging, TheirPatchMergingV2):
        weights.refuse(theirs, "is no PatchMerging")
    ours.reduction = weights.linear(theirs.reduction)
    name = "norm" if type(theirs) is TheirPatchMerging else "out_norm"
    setattr(ours, name, weights.norm(theirs.norm))
