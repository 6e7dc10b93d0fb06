"""Blocks of timm's Vision Transformers as ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.attention import Attention as TheirAttention, AttentionRope
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models import beit, eva, swin_transformer, swin_transformer_v2, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn

from .._sublayers import FeedForward, Residual
from ..attention import Attention
from ..blocks import Block
from ._timm_weights import Weights, joined, linear, parameter

# For each channel of a head of ours, which of theirs it is; None where the order stays.
Order = Tensor | None

ATTENTIONS = (
    TheirAttention,
    AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    vision_transformer_relpos.RelPosAttention,
    swin_transformer.WindowAttention,
    swin_transformer_v2.WindowAttention,
)
PRE_NORM = (
    vision_transformer.Block,
    eva.EvaBlock,
    beit.Block,
    vision_transformer_relpos.RelPosBlock,
    swin_transformer.SwinTransformerBlock,
)
RES_POST_NORM = (
    vision_transformer.ResPostBlock,
    eva.EvaBlockPostNorm,
    vision_transformer_relpos.ResPostRelPosBlock,
    swin_transformer_v2.SwinTransformerV2Block,
)


def block(weights: Weights, theirs: Any, order: Order) -> Block:
    """A block of timm as ours; ``order`` is that of the channels of heads, which rotary positions ask for."""
    if type(theirs) in PRE_NORM:
        return _sequential(weights, theirs, "pre", order)
    if type(theirs) in RES_POST_NORM:
        return _sequential(weights, theirs, "res-post", order)
    if type(theirs) is vision_transformer.ParallelScalingBlock:
        return _parallel_scaling(weights, theirs)
    if type(theirs) is vision_transformer.ParallelThingsBlock:
        return _parallel_things(weights, theirs)
    weights.refuse(theirs, "has no counterpart among our blocks")


def _sequential(weights: Weights, theirs: Any, norm: str, order: Order) -> Block:
    """Attention and then a feed-forward layer."""
    attention, after_attention = attention_of(weights, theirs.attn, order)
    feed_forward, after_feed_forward = feed_forward_of(weights, theirs.mlp)
    if norm == "res-post" and max(after_attention, after_feed_forward) > 0:
        weights.refuse(theirs, "drops channels before the norm of a branch (proj_drop_rate), ours after it")
    residuals = [
        residual(weights, attention.dim, norm, weights.norm(theirs.norm1), _scale(theirs, 1), after_attention, theirs.drop_path1),
        residual(weights, attention.dim, norm, weights.norm(theirs.norm2), _scale(theirs, 2), after_feed_forward, theirs.drop_path2),
    ]  # fmt: skip
    return assembled(norm, attention, feed_forward, residuals)


def _parallel_scaling(weights: Weights, theirs: Any) -> Block:
    """Attention and a feed-forward layer of one norm, their projections fused (ViT-22B)."""
    weight, bias = weights.affine(theirs.in_proj)
    hidden, dim = theirs.in_split[0], weight.shape[1]
    up_bias = weights.take(theirs.mlp_bias) if bias is None else bias[:hidden]
    if theirs.out_proj is None:
        out, down = weights.affine(theirs.attn_out_proj), weights.affine(theirs.mlp_out_proj)
    else:
        both, out_bias = weights.affine(theirs.out_proj)
        out, down = (both[:, :dim], out_bias), (both[:, dim:], None)
    with torch.device("meta"):
        attention = Attention(dim, theirs.num_heads, dropout=weights.rate(theirs.attn_drop))
    attention.qkv = linear(weight[hidden:], None if bias is None else bias[hidden:])
    attention.query_norm, attention.key_norm = weights.norm(theirs.q_norm), weights.norm(theirs.k_norm)
    attention.out = linear(*out)
    feed_forward = assembled_feed_forward(
        weights, (weight[:hidden], up_bias), down, weights.activation(theirs.mlp_act), theirs.mlp_drop
    )
    norm = weights.norm(theirs.in_norm)
    first = residual(weights, dim, "parallel", norm, getattr(theirs.ls, "gamma", None), 0.0, theirs.drop_path)
    return assembled("parallel", attention, feed_forward, [first])


def _parallel_things(weights: Weights, theirs: Any) -> Block:
    """Several attentions side by side and then several feed-forward layers: one of each, with as many times the heads and channels.

    What is affine in their norms goes into the maps that follow, and the layer scales into those before.
    """
    attentions = [attention_of(weights, branch.attn, None) for branch in theirs.attns]
    feed_forwards = [feed_forward_of(weights, branch.mlp) for branch in theirs.ffns]
    for branches, made in ((theirs.attns, attentions), (theirs.ffns, feed_forwards)):
        for branch, (module, after) in zip(branches, made, strict=True):
            if after or weights.rate(branch.drop_path):
                weights.refuse(theirs, "drops each of its branches apart (proj_drop_rate, drop_path_rate)")
            inner = [getattr(module, name, None) for name in ("query_norm", "key_norm", "out_norm", "norm")]
            if not all(norm is None or isinstance(norm, nn.Identity) for norm in inner):
                weights.refuse(theirs, "has norms in its branches (qk_norm, scale_attn_norm, scale_mlp_norm)")
    dim = attentions[0][0].dim
    qkv = [_fed(weights, branch.norm, one.qkv) for branch, (one, _) in zip(theirs.attns, attentions, strict=True)]
    up = [_fed(weights, branch.norm, one.up) for branch, (one, _) in zip(theirs.ffns, feed_forwards, strict=True)]
    first, layer = attentions[0][0], feed_forwards[0][0]
    with torch.device("meta"):
        attention = Attention(dim, first.heads * len(qkv), head_dim=first.head_dim, dropout=first.dropout)
    attention.qkv = linear(*_interleaved(qkv, 3))
    attention.out = linear(*_summed(weights, theirs.attns, [one.out for one, _ in attentions]))
    down = _summed(weights, theirs.ffns, [one.down for one, _ in feed_forwards])
    feed_forward = assembled_feed_forward(
        weights, _interleaved(up, 2 if layer.gated else 1), down, layer.activation, layer.dropout
    )
    norms = [_plain(weights, branches[0].norm, dim) for branches in (theirs.attns, theirs.ffns)]
    residuals = [residual(weights, dim, "pre", norm, None, 0.0, None) for norm in norms]
    return assembled("pre", attention, feed_forward, residuals)


# -- parts -----------------------------------------------------------------------------------------------------------------


def attention_of(weights: Weights, theirs: Any, order: Order) -> tuple[Attention, float]:
    """Attention, and the rate of the dropout behind it."""
    if type(theirs) not in ATTENTIONS:
        weights.refuse(theirs, "is no attention that ours can express")
    heads, kv_heads = theirs.num_heads, getattr(theirs, "num_kv_heads", theirs.num_heads)
    weight, bias = _qkv(weights, theirs)
    head_dim = len(weight) // (heads + 2 * kv_heads)
    norm, gate = getattr(theirs, "norm", nn.Identity()), getattr(theirs, "gate", None)
    if gate is not None and not isinstance(norm, nn.Identity):
        weights.refuse(theirs, "puts its gate behind the norm of the heads, ours before it")
    if order is not None:
        weight = _reordered(weight, heads + kv_heads, order)
        bias = None if bias is None else _reordered(bias, heads + kv_heads, order)
    with torch.device("meta"):
        ours = Attention(
            weight.shape[1], heads, kv_heads=kv_heads, head_dim=head_dim, dropout=weights.rate(theirs.attn_drop)
        )
    ours.qkv = linear(weight, bias)
    ours.query_norm = weights.norm(getattr(theirs, "q_norm", nn.Identity()), order)
    ours.key_norm = weights.norm(getattr(theirs, "k_norm", nn.Identity()), order)
    ours.out_norm = weights.norm(norm)
    ours.gate = None if gate is None else weights.linear(gate)
    ours.out = weights.linear(theirs.proj)
    return ours, weights.rate(theirs.proj_drop)


def feed_forward_of(weights: Weights, theirs: Any) -> tuple[FeedForward, float]:
    """A feed-forward layer, and the rate of the dropout behind it."""
    if type(theirs) is Mlp:
        up, activation = weights.affine(theirs.fc1), weights.activation(theirs.act)
    elif type(theirs) is SwiGLU:
        up = joined([weights.affine(theirs.fc1_g), weights.affine(theirs.fc1_x)])
        activation = _gate(weights, theirs)
    elif type(theirs) is GluMlp:
        weight, bias = weights.affine(theirs.fc1)
        if theirs.gate_last:
            weight, bias = weight.roll(len(weight) // 2, 0), None if bias is None else bias.roll(len(bias) // 2, 0)
        up, activation = (weight, bias), _gate(weights, theirs)
    else:
        weights.refuse(theirs, "is no feed-forward layer that ours can express")
    down = weights.affine(theirs.fc2)
    ours = assembled_feed_forward(weights, up, down, activation, theirs.drop1)
    ours.norm = weights.norm(theirs.norm)
    return ours, weights.rate(theirs.drop2)


def residual(
    weights: Weights, dim: int, place: str, norm: nn.Module, scale: Tensor | None, dropout: float, drop_path: Any
) -> Residual:
    """What is around a branch."""
    ours = Residual(dim, place, lambda _: norm, None, dropout, weights.rate(drop_path))
    if scale is not None:
        ours.scale = parameter(weights.take(scale))
    return ours


def assembled(norm: Any, attention: Attention, feed_forward: FeedForward, residuals: list[Residual]) -> Block:
    """A block of these parts."""
    with torch.device("meta"):
        ours = Block(attention.dim, attention.heads, head_dim=attention.head_dim, norm=norm)
    ours.attention, ours.feed_forward = attention, feed_forward
    ours.attention_residual = residuals[0]
    ours.feed_forward_residual = residuals[1] if len(residuals) > 1 else None
    return ours


def assembled_feed_forward(
    weights: Weights,
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    activation: Any,
    dropout: nn.Module,
) -> FeedForward:
    """A feed-forward layer with these weights."""
    with torch.device("meta"):
        ours = FeedForward(up[0].shape[1], hidden=down[0].shape[1], activation=activation)
    ours.up, ours.down, ours.dropout = linear(*up), linear(*down), weights.dropout(dropout)
    return ours


def _qkv(weights: Weights, theirs: Any) -> tuple[Tensor, Tensor | None]:
    if theirs.qkv is None:
        return joined([weights.affine(part) for part in (theirs.q_proj, theirs.k_proj, theirs.v_proj)])
    weight, bias = weights.affine(theirs.qkv)
    if getattr(theirs, "q_bias", None) is not None:
        bias = torch.cat([weights.take(theirs.q_bias), theirs.k_bias.detach(), weights.take(theirs.v_bias)])
    return weight, bias


def _reordered(rows: Tensor, heads: int, order: Tensor) -> Tensor:
    """Rows of queries and keys with the channels of each head in another order, which leaves scores as they are."""
    turned = rows[: heads * len(order)].unflatten(0, (heads, -1))[:, order].flatten(0, 1)
    return torch.cat([turned, rows[heads * len(order) :]])


def _scale(theirs: Any, number: int) -> Tensor | None:
    """The layer scale of a branch, which has one of two names."""
    inner = getattr(theirs, f"ls{number}", None)
    return getattr(theirs, f"gamma_{number}", None) if inner is None else getattr(inner, "gamma", None)


def _gate(weights: Weights, theirs: Any) -> str:
    if type(theirs.act) is nn.SiLU:
        return "swiglu"
    if weights.activation(theirs.act) == "gelu":
        return "geglu"
    weights.refuse(theirs, f"has a gate of {type(theirs.act).__name__}; ours are SiLU and GELU")


# -- branches side by side -------------------------------------------------------------------------------------------------


def _fed(weights: Weights, norm: Any, after: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """A linear map that has taken over what is affine in the norm before it."""
    weight = after.weight.double()
    bias: Tensor | None = after.bias
    if getattr(norm, "bias", None) is not None:
        shift = weight @ weights.take(norm.bias).double()
        bias = (shift if bias is None else bias + shift).to(after.weight.dtype)
    return (weight * weights.take(norm.weight)).to(after.weight.dtype), bias


def _plain(weights: Weights, norm: Any, dim: int) -> nn.Module:
    """The norm with weight 1 and bias 0."""
    like: Callable[..., nn.Module] = nn.LayerNorm if isinstance(norm, nn.LayerNorm) else nn.RMSNorm
    return like(dim, eps=norm.eps, device=norm.weight.device, dtype=norm.weight.dtype)


def _interleaved(parts: list[tuple[Tensor, Tensor | None]], kinds: int) -> tuple[Tensor, Tensor | None]:
    """Maps side by side whose rows are of several kinds: all of the first kind first."""
    weight, bias = joined(parts)

    def sort(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (len(parts), kinds, -1)).transpose(0, 1).flatten(0, 2)

    return sort(weight), None if bias is None else sort(bias)


def _summed(weights: Weights, branches: Any, last: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One map for the sum of the branches' last maps, each times its layer scale."""
    columns: list[Tensor] = []
    bias: Tensor | None = None
    for branch, module in zip(branches, last, strict=True):
        gamma = getattr(branch.ls, "gamma", None)
        scale = module.weight.new_ones(()) if gamma is None else weights.take(gamma)
        columns.append(module.weight * scale.reshape(-1, 1))
        if module.bias is not None:
            bias = module.bias.double() * scale if bias is None else bias + module.bias.double() * scale
    return torch.cat(columns, 1), None if bias is None else bias.to(last[0].weight.dtype)
