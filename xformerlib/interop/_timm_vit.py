"""timm's plain Vision Transformers, with whatever positions and blocks, as ours."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_embed import PatchEmbed as TheirPatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .._pooling import MultiheadPooling, Pool, Pooling
from ..attention import Attention
from ..blocks import Block
from ..positions import Position
from ..positions._base import together
from ..vision import PatchDropout, PatchEmbed, ViT
from . import _timm_positions as positions
from ._timm_blocks import block, feed_forward_of
from ._timm_weights import Weights, joined, linear, parameter

POOLS: dict[str, Pool] = {"token": "token", "avg": "mean", "max": "max", "avgmax": "mean-max", "map": "attention"}
ATTENTION_POOLS = (AttentionPoolLatent,)


def vit(model: Any) -> ViT:
    """A ``VisionTransformer``, ``VisionTransformerDistilled``, ``Eva``, ``Beit`` or ``VisionTransformerRelPos`` as ours."""
    weights = Weights(model)
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    counts = [0 if token is None else token.shape[1] for token in tokens]
    prefix = sum(counts)
    if prefix != model.num_prefix_tokens:
        raise ValueError(f"num_prefix_tokens must be the number of tokens, {prefix}; got {model.num_prefix_tokens}")
    blocks, shared = _blocks(weights, model, prefix)
    pool = _pool(weights, model, prefix)
    with torch.device("meta"):
        ours = ViT(
            None, patch=model.patch_embed.patch_size, dim=blocks[0].attention.dim, depth=1, heads=1,
            class_token=counts[0] > 0, distillation=counts[1] > 0, registers=counts[2], pool="mean", position=None,
            final_norm=False, checkpoint=model.grad_checkpointing,
        )  # fmt: skip
    ours.embed = patch_embed(weights, model.patch_embed)
    if prefix:
        ours.prefix_tokens = parameter(torch.cat([weights.take(token)[0] for token in tokens if token is not None]))
    ours.encoder.blocks = nn.ModuleList(blocks)
    ours.encoder.position = shared
    ours.encoder.norm, ours.pool_norm = weights.norm(model.norm), weights.norm(model.fc_norm)
    ours.embed_norm = weights.norm(getattr(model, "norm_pre", nn.Identity()))
    ours.pool = pool
    _dropouts(weights, ours, model)
    ours.head = nn.Identity() if isinstance(model.head, nn.Identity) else weights.linear(model.head)
    if counts[1] and isinstance(model.head_dist, nn.Linear):
        ours.distillation_head = weights.linear(model.head_dist)
    weights.finish()
    return ours.train(model.training)


def _blocks(weights: Weights, model: Any, prefix: int) -> tuple[list[Block], Position | None]:
    """The blocks, each with the positions of its own, and the positions that all share."""
    first = model.blocks[0]
    rope = getattr(model, "rope", None)
    order, turned = None, None
    if rope is not None:
        dim = len(first.attn.proj.weight[0]) // first.attn.num_heads
        half = bool(getattr(first.attn, "rotate_half", False))
        if half != bool(getattr(rope, "rotate_half", False)) or first.attn.num_prefix_tokens != prefix:
            weights.refuse(rope, "and attention do not agree on the layout of channels, or on tokens that do not turn")
        turned = positions.rotary(weights, rope, dim)
        order = positions.channel_order(rope, dim, half).to(first.attn.proj.weight.device)
    blocks = []
    for index, theirs in enumerate(model.blocks):
        ours = block(weights, theirs, order)
        attn = getattr(theirs, "attn", None)
        relative = None if attn is None else positions.bias(weights, getattr(attn, "rel_pos", None) or attn)
        ours.attention.position = together(turned[index] if isinstance(turned, list) else None, relative)
        blocks.append(ours)
    table = getattr(model, "pos_embed", None)
    shared = together(
        None if table is None else positions.learned(weights, table, model.patch_embed.grid_size, prefix),
        None if isinstance(turned, list) else turned,
        *(positions.bias(weights, getattr(model, name, None)) for name in ("rel_pos_bias", "shared_rel_pos")),
    )
    return blocks, shared


def patch_embed(weights: Weights, theirs: Any) -> PatchEmbed:
    """Patches as ours."""
    if type(theirs) is not TheirPatchEmbed:
        weights.refuse(theirs, "makes tokens in a way that PatchEmbed does not")
    weight, bias = weights.affine(theirs.proj)
    if theirs.proj.stride != theirs.proj.kernel_size or theirs.proj.padding != (0, 0):
        weights.refuse(theirs, "has patches that overlap or are padded")
    with torch.device("meta"):
        ours = PatchEmbed(weight.shape[0], tuple(theirs.patch_size), channels=weight.shape[1])
    ours.proj, ours.norm = linear(weight.flatten(1), bias), weights.norm(theirs.norm)
    return ours


def _dropouts(weights: Weights, ours: ViT, model: Any) -> None:
    # A VisionTransformer without a table returns before it drops.
    drops = not isinstance(model, VisionTransformer) or model.pos_embed is not None
    ours.position_dropout = weights.dropout(getattr(model, "pos_drop", None) if drops else None)
    ours.head_dropout = weights.dropout(model.head_drop)
    ours.patch_dropout = PatchDropout(getattr(getattr(model, "patch_drop", None), "prob", 0.0))


def _pool(weights: Weights, model: Any, prefix: int) -> Pooling:
    """What the head sees."""
    dim, kind = model.embed_dim, model.global_pool
    if kind not in POOLS:
        raise ValueError(
            f"global_pool must be one of {', '.join(map(repr, POOLS))}, which are all that ours has; got {kind!r}. Without a head, tokens "
            "are what features(images) returns."
        )
    # Eva lets its attention pooling see all tokens.
    with_prefix = isinstance(model, Eva) if kind == "map" else False
    with_prefix = with_prefix or bool(getattr(model, "pool_include_prefix", False))
    if kind == "map":
        return _attention_pool(weights, model.attn_pool, dim, with_prefix)
    if with_prefix and prefix and kind != "token":
        raise ValueError(
            "pool_include_prefix=True is for attention pooling: ours takes the mean of ordinary tokens only"
        )
    return Pooling(dim, POOLS[kind])


def _attention_pool(weights: Weights, theirs: Any, dim: int, with_prefix: bool) -> Pooling:
    if type(theirs) not in ATTENTION_POOLS:
        weights.refuse(theirs, "is no pooling that ours can express")
    if theirs.latent.shape != (1, 1, dim) or theirs.pos_embed is not None or theirs.mlp is None:
        weights.refuse(theirs, "has several queries, places of its own, or no feed-forward layer")
    latent = weights.take(theirs.latent)[0, 0]
    feed_forward, after = feed_forward_of(weights, theirs.mlp)
    if after or feed_forward.dropout.p or weights.rate(theirs.proj_drop):
        weights.refuse(theirs, "has dropout")
    query = (torch.eye(dim).to(latent), None) if isinstance(theirs.q, nn.Identity) else weights.affine(theirs.q)
    with torch.device("meta"):
        ours = Pooling(dim, "attention", heads=theirs.num_heads, prefix=with_prefix)
        attention = Attention(dim, theirs.num_heads)
    inner = ours.attention
    assert isinstance(inner, MultiheadPooling)
    attention.qkv = linear(*joined([query, weights.affine(theirs.kv)]))
    attention.query_norm, attention.key_norm = weights.norm(theirs.q_norm), weights.norm(theirs.k_norm)
    attention.out = weights.linear(theirs.proj)
    inner.latent, inner.attention, inner.feed_forward = parameter(latent), attention, feed_forward
    inner.norm = weights.norm(theirs.norm)
    return ours
