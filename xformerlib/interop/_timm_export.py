"""Our plain Vision Transformers as timm's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.layers.norm import LayerNorm, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .._pooling import MultiheadPooling
from .._sublayers import FeedForward, Residual
from ..attention import Attention
from ..blocks import Block
from ..positions import Learned
from ..vision import PatchEmbed, ViT
from ._timm_vit import POOLS


class _Parts(NamedTuple):
    """What a plain model is made of, checked."""

    blocks: list[Block]
    residuals: list[Residual]
    embed: PatchEmbed
    position: Learned
    pool: MultiheadPooling | None
    class_token: bool


def exported(model: ViT) -> VisionTransformer:
    """A plain ``ViT`` as timm's ``VisionTransformer``."""
    parts = _plain(model)
    options = _options(model, parts)
    weight = parts.embed.proj.weight
    theirs = VisionTransformer(**options, weight_init="skip", device=weight.device, dtype=weight.dtype)
    # Theirs has no bias of patches where a norm follows them.
    bias = None if parts.embed.proj.bias is None else nn.Parameter(torch.empty_like(parts.embed.proj.bias))
    theirs.patch_embed.proj.register_parameter("bias", bias)
    state = dict(_state(model, parts))
    theirs.load_state_dict({name: value.detach() for name, value in state.items()})
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(state[name].requires_grad)
    _set_rates(theirs, parts)
    theirs.set_grad_checkpointing(model.encoder.checkpoint)
    return theirs.train(model.training)


def _plain(model: ViT) -> _Parts:
    """The parts of the model, if timm's has a place for each of them."""
    if type(model) is not ViT:
        raise TypeError(f"model must be a vision.ViT; got {type(model).__name__}")
    blocks = [part for part in model.encoder.blocks if isinstance(part, Block)]
    attentions = [part.attention for part in blocks]
    embed, position, pool = model.embed, model.encoder.position, model.pool.attention
    residuals = [
        part for one in blocks for part in (one.attention_residual, one.feed_forward_residual) if part is not None
    ]
    refused = {
        "embed": type(embed) is not PatchEmbed or embed.ndim != 2,
        "position": type(position) is not Learned or not isinstance(position.size, tuple),
        "distillation": model.distillation_head is not None,
        "norm": any(one.parallel for one in blocks)
        or any(part.norm_after_sum or part.branch_norm is not None for part in residuals),
        "mask": any(one.mask is not None for one in attentions),
        "position of each block": any(one.position is not None for one in attentions),
        "kv_heads": any(one.kv_heads != one.heads for one in attentions),
        "head_dim": any(one.head_dim * one.heads != one.dim for one in attentions),
        "sinks": any(one.sinks is not None for one in attentions),
        "softcap": any(one.softcap is not None for one in attentions),
        "gate": any(one.gate is not None for one in attentions),
        "pool": model.pool.pool not in POOLS.values(),
        "activation": any(one.feed_forward.activation == "geglu" for one in blocks)
        or (pool is not None and pool.feed_forward.gated),
    }
    names = [name for name, wrong in refused.items() if wrong]
    if names:
        raise ValueError(
            f"to_timm is for plain models: patches of images, learned positions, pre-norm blocks; got another {', '.join(names)}"
        )
    assert isinstance(embed, PatchEmbed) and isinstance(position, Learned)
    class_token = model.class_token or model.pool.pool == "token"
    return _Parts(blocks, residuals, embed, position, pool, class_token)


def _options(model: ViT, parts: _Parts) -> dict[str, Any]:
    attentions, feed_forwards = [one.attention for one in parts.blocks], [one.feed_forward for one in parts.blocks]
    layer = feed_forwards[0]
    size, patch = parts.position.size, parts.embed.patch
    assert isinstance(size, tuple)
    final, pooled = (not isinstance(norm, nn.Identity) for norm in (model.encoder.norm, model.pool_norm))
    if final and pooled:
        raise ValueError("final_norm and pool_norm cannot both be there in timm; got both")
    biases = {
        part.bias is not None
        for one, other in zip(attentions, feed_forwards, strict=True)
        for part in (one.out, other.up, other.down)
    }
    hidden = _one("hidden", (one.hidden for one in feed_forwards)) * (2 if layer.gated else 1)
    pool = parts.pool
    if pool is not None:
        _one("heads, of blocks and pool", [pool.attention.heads, attentions[0].heads])
        _one("hidden, of blocks and pool", [pool.feed_forward.hidden, hidden])
        _one("activation, of blocks and pool", [_kind(pool.feed_forward), _kind(layer)])
    return {
        "img_size": tuple(n * p for n, p in zip(size, patch, strict=True)), "patch_size": patch, "in_chans": parts.embed.channels,
        "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        "global_pool": next(name for name, ours in POOLS.items() if ours == model.pool.pool),
        "embed_dim": parts.embed.dim, "depth": len(parts.blocks), "num_heads": _one("heads", (one.heads for one in attentions)),
        "mlp_ratio": (hidden + 0.5) / parts.embed.dim,
        "qkv_bias": _one("qkv_bias", (one.qkv.bias is not None for one in attentions)),
        "qk_norm": _one("qk_norm", (_is_there(one.query_norm) for one in attentions)),
        "scale_attn_norm": _one("out_norm", (_is_there(one.out_norm) for one in attentions)),
        "scale_mlp_norm": _one("hidden_norm", (_is_there(one.norm) for one in feed_forwards)),
        "proj_bias": _one("bias and out_bias", biases),
        "init_values": 1.0 if _one("layer_scale", (part.scale is not None for part in parts.residuals)) else None,
        "class_token": parts.class_token, "reg_tokens": model.prefix - parts.class_token,
        "no_embed_class": parts.position.prefix_table is None,
        "pre_norm": _is_there(model.embed_norm), "final_norm": final or pooled, "fc_norm": pooled,
        "pool_include_prefix": pool is not None and pool.prefix, "dynamic_img_size": True,
        "patch_drop_rate": model.patch_dropout.share,
        "drop_rate": model.head_dropout.p, "pos_drop_rate": model.position_dropout.p,
        "embed_norm_layer": _norm_layer([parts.embed.norm]) if _is_there(parts.embed.norm) else None,
        "norm_layer": _norm_layer(norm for norm in _norms(model, parts) if _is_there(norm)),
        "act_layer": _act_layer(layer), "mlp_layer": SwiGLUPacked if layer.gated else Mlp,
    }  # fmt: skip


def _state(model: ViT, parts: _Parts) -> Iterator[tuple[str, Tensor]]:
    """The parameters, by the names that they have in timm."""
    prefix = model.prefix_tokens
    if prefix is not None:
        if parts.class_token:
            yield "cls_token", prefix[None, :1]
        if len(prefix) > parts.class_token:
            yield "reg_token", prefix[None, parts.class_token :]
    front = parts.position.prefix_table
    table = parts.position.table if front is None else torch.cat([front, parts.position.table])
    yield "pos_embed", table[None]
    yield "patch_embed.proj.weight", parts.embed.proj.weight.unflatten(1, (parts.embed.channels, *parts.embed.patch))
    if parts.embed.proj.bias is not None:
        yield "patch_embed.proj.bias", parts.embed.proj.bias
    modules: dict[str, nn.Module] = {
        "patch_embed.norm": parts.embed.norm, "norm_pre": model.embed_norm, "norm": model.encoder.norm, "fc_norm": model.pool_norm,
        "head": model.head,
    }  # fmt: skip
    for index, block in enumerate(parts.blocks):
        residual = block.feed_forward_residual
        assert residual is not None
        modules |= {
            f"blocks.{index}.{name}": part for name, part in _block(block.attention, block.feed_forward).items()
        }
        for number, part in enumerate((block.attention_residual, residual), 1):
            modules[f"blocks.{index}.norm{number}"] = part.norm
            if part.scale is not None:
                yield f"blocks.{index}.ls{number}.gamma", part.scale
    for name, module in modules.items():
        for leaf, parameter in module.named_parameters():
            yield f"{name}.{leaf}", parameter
    if parts.pool is not None:
        yield from _pool_state(parts.pool)


def _block(attention: Attention, feed_forward: FeedForward) -> dict[str, nn.Module]:
    activation = feed_forward.activation
    return {
        "attn.qkv": attention.qkv,
        "attn.q_norm": attention.query_norm,
        "attn.k_norm": attention.key_norm,
        "attn.norm": attention.out_norm,
        "attn.proj": attention.out,
        "mlp.fc1": feed_forward.up,
        "mlp.act": activation if isinstance(activation, nn.Module) else nn.Identity(),
        "mlp.norm": feed_forward.norm,
        "mlp.fc2": feed_forward.down,
    }


def _pool_state(pool: MultiheadPooling) -> Iterator[tuple[str, Tensor]]:
    dim = pool.latent.numel()
    yield "attn_pool.latent", pool.latent[None, None]
    for leaf, parameter in pool.attention.qkv.named_parameters():
        yield f"attn_pool.q.{leaf}", parameter[:dim]
        yield f"attn_pool.kv.{leaf}", parameter[dim:]
    modules = {
        "proj": pool.attention.out,
        "norm": pool.norm,
        "mlp.fc1": pool.feed_forward.up,
        "mlp.fc2": pool.feed_forward.down,
    }
    for name, module in modules.items():
        for leaf, parameter in module.named_parameters():
            yield f"attn_pool.{name}.{leaf}", parameter


def _set_rates(theirs: VisionTransformer, parts: _Parts) -> None:
    """Dropout and stochastic depth, which each block has its own of."""
    blocks: Iterable[Any] = theirs.blocks
    for block, ours in zip(blocks, parts.blocks, strict=True):
        assert ours.feed_forward_residual is not None
        block.attn.attn_drop.p = ours.attention.dropout
        block.attn.proj_drop.p = ours.attention_residual.dropout.p
        block.mlp.drop1.p, block.mlp.drop2.p = ours.feed_forward.dropout.p, ours.feed_forward_residual.dropout.p
        for number, residual in enumerate((ours.attention_residual, ours.feed_forward_residual), 1):
            if residual.drop_path.p:
                setattr(block, f"drop_path{number}", DropPath(residual.drop_path.p))


def _norms(model: ViT, parts: _Parts) -> Iterator[nn.Module]:
    """Every norm but that of patches."""
    yield from (model.embed_norm, model.encoder.norm, model.pool_norm)
    for block in parts.blocks:
        yield from (
            block.attention.query_norm,
            block.attention.key_norm,
            block.attention.out_norm,
            block.feed_forward.norm,
        )
    yield from (part.norm for part in parts.residuals)
    if parts.pool is not None:
        yield parts.pool.norm


def _norm_layer(norms: Iterable[nn.Module]) -> Callable[..., nn.Module]:
    """What makes these norms, which timm has one kind of."""
    found = {(type(norm), _eps(norm)) for norm in norms}
    if len(found) > 1 or not {kind for kind, _ in found} <= {nn.LayerNorm, nn.RMSNorm}:
        kinds = ", ".join(sorted(f"{kind.__name__}(eps={eps})" for kind, eps in found))
        raise ValueError(f"norm_layer must be one for all: nn.LayerNorm or nn.RMSNorm with one eps; got {kinds}")
    kind, eps = found.pop()
    return partial(LayerNorm if kind is nn.LayerNorm else RmsNorm, eps=eps)


def _eps(norm: nn.Module) -> float:
    """The eps of a norm; torch's RMS norm without one takes that of the dtype."""
    eps, weight = getattr(norm, "eps", None), getattr(norm, "weight", None)
    return float(torch.finfo(torch.float32 if weight is None else weight.dtype).eps if eps is None else eps)


def _act_layer(layer: FeedForward) -> Callable[..., nn.Module]:
    if isinstance(layer.activation, str):
        return {"gelu": nn.GELU, "relu": nn.ReLU, "swiglu": nn.SiLU}[layer.activation]
    if not isinstance(layer.activation, nn.Module):
        raise ValueError(f"activation must be a name or a module to be taken over; got {layer.activation!r}")
    return partial(copy.deepcopy, layer.activation)


def _kind(layer: FeedForward) -> str:
    """What the nonlinearity of a layer is called in timm."""
    return type(_act_layer(layer)()).__name__


def _is_there(norm: nn.Module) -> bool:
    return not isinstance(norm, nn.Identity)


def _one(name: str, values: Iterable[Any]) -> Any:
    """The value that all blocks have."""
    found = set(values)
    if len(found) != 1:
        raise ValueError(f"{name} must be the same in all blocks; got {sorted(found, key=str)}")
    return found.pop()
