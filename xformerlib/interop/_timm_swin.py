"""Swin Transformers of timm, versions 1 and 2, as ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..positions import ContinuousBias, RelativeBias
from ..vision import PatchMerging, Swin

_POOLS = {"avg": "mean", "max": "max", "avgmax": "mean-max"}


def swin(model: Any) -> Swin:
    """Our ``Swin`` with copies of the weights of timm's ``SwinTransformer`` or ``SwinTransformerV2``, which is left as it is.

    On grids that its windows do not divide ours attends to what exists, theirs to zeros as well. And ours takes no shift where one window
    covers the grid of this call; theirs, of the grid that it was built for.

    Raises:
        ValueError: what ours cannot express, by the name that it has there.
    """
    stages = list(model.layers)
    version = 2 if hasattr(stages[0].blocks[0].attn, "cpb_mlp") else 1
    ours = Swin(model.num_classes or None, version=version, **_options(model, stages, version))  # type: ignore[arg-type]
    ours.to(model.norm.weight.device, model.norm.weight.dtype)
    with torch.no_grad():
        for mine, theirs in _pairs(ours, model, stages):
            mine.copy_(theirs.reshape(mine.shape))
            mine.requires_grad_(theirs.requires_grad)
    return ours.train(model.training)


def _options(model: Any, stages: list[Any], version: int) -> dict[str, Any]:
    first = stages[0].blocks[0]
    widths = [block.attn.dim for stage in stages for block in stage.blocks[:1]]
    _require("embed_dim", [width // widths[0] for width in widths], [2**stage for stage in range(len(stages))])
    ratios = [stage.blocks[0].mlp.fc1.out_features / width for stage, width in zip(stages, widths, strict=True)]
    _require("mlp_ratio", ratios, ratios[:1] * len(stages))
    head_dims = [(_projected(stage.blocks[0]) // stage.blocks[0].attn.num_heads) for stage in stages]
    natural = [width // stage.blocks[0].attn.num_heads for width, stage in zip(widths, stages, strict=True)]
    if head_dims != natural:
        _require("head_dim", head_dims, head_dims[:1] * len(stages))
    for stage in stages:
        for index, block in enumerate(stage.blocks):
            _require("always_partition", block.always_partition, False)
            wanted = [
                window // 2 * (index % 2) * (size > window)
                for size, window in zip(block.input_resolution, block.window_size, strict=True)
            ]
            _require("shift_size", list(block.shift_size), wanted)
    if model.head.global_pool.pool_type not in _POOLS:
        raise ValueError(f"global_pool must be one of {', '.join(_POOLS)}; got {model.head.global_pool.pool_type!r}")
    if not all(isinstance(norm, nn.LayerNorm) for norm in (model.norm, model.patch_embed.norm, first.norm1)):
        raise ValueError(f"norm_layer must be nn.LayerNorm, after patches too; got {type(first.norm1).__name__}")
    options = {
        "patch": tuple(model.patch_embed.patch_size), "channels": model.patch_embed.proj.in_channels, "dim": widths[0],
        "window": [tuple(stage.blocks[0].window_size) for stage in stages],
        "depths": [len(stage.blocks) for stage in stages],
        "heads": [stage.blocks[0].attn.num_heads for stage in stages],
        "mlp_ratio": ratios[0],
        "head_dim": None if head_dims == natural else head_dims[0],
        "drop_path": [getattr(block.drop_path1, "drop_prob", 0.0) for stage in stages for block in stage.blocks],
        "dropout": first.mlp.drop1.p,
        "attention_dropout": first.attn.attn_drop.p,
        "head_dropout": model.head.drop.p,
        "pool": _POOLS[model.head.global_pool.pool_type],
        "norm_layer": partial(nn.LayerNorm, eps=model.norm.eps),
        "activation": "gelu" if _is_exact_gelu(first.mlp.act) else copy.deepcopy(first.mlp.act),
        "qkv_bias": (first.attn.qkv.bias if version == 1 else first.attn.q_bias) is not None,
    }  # fmt: skip
    if version == 2:
        trained = [stage.blocks[0].attn.pretrained_window_size for stage in stages]
        options["pretrained_window"] = [
            tuple(size) if size[0] > 0 else window for size, window in zip(trained, options["window"], strict=True)
        ]
    return options


def _pairs(ours: Swin, model: Any, stages: list[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Our parameters and their values."""
    yield from _module(ours.embed.proj, model.patch_embed.proj)
    yield from _module(ours.embed.norm, model.patch_embed.norm)
    for encoder, stage in zip(ours.stages, stages, strict=True):
        for mine, theirs in zip(encoder.blocks, stage.blocks, strict=True):  # type: ignore[arg-type]
            yield from _block(mine, theirs)
    for merge, stage in zip(ours.merges, stages[1:], strict=True):
        assert isinstance(merge, PatchMerging)
        yield merge.reduction.weight, stage.downsample.reduction.weight
        norm = merge.norm if isinstance(merge.out_norm, nn.Identity) else merge.out_norm
        yield from _module(norm, stage.downsample.norm)
    yield from _module(ours.norm, model.norm)
    if not isinstance(ours.head, nn.Identity):
        yield from _module(ours.head, model.head.fc)


def _block(mine: Block, theirs: Any) -> Iterator[tuple[Tensor, Tensor]]:
    attention, attn = mine.attention, theirs.attn
    yield attention.qkv.weight, attn.qkv.weight
    position = attention.position
    if isinstance(position, RelativeBias):
        if attn.qkv.bias is not None:
            yield attention.qkv.bias, attn.qkv.bias
        yield position.table, attn.relative_position_bias_table
    else:
        assert isinstance(position, ContinuousBias)
        if attn.q_bias is not None:
            yield attention.qkv.bias, torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        yield attention.query_norm.temperature, attn.logit_scale  # type: ignore[misc]
        yield position.inner.weight, attn.cpb_mlp[0].weight / math.log2(8)
        yield position.inner.bias, attn.cpb_mlp[0].bias
        yield position.outer.weight, attn.cpb_mlp[2].weight
    yield from _module(attention.out, attn.proj)
    assert mine.feed_forward_residual is not None
    for residual, norm in ((mine.attention_residual, theirs.norm1), (mine.feed_forward_residual, theirs.norm2)):
        yield from _module(residual.norm if residual.branch_norm is None else residual.branch_norm, norm)
    yield from _module(mine.feed_forward.up, theirs.mlp.fc1)
    yield from _module(mine.feed_forward.down, theirs.mlp.fc2)


def _module(mine: nn.Module, theirs: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    values = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        yield parameter, values.pop(name)


def _projected(block: Any) -> int:
    return block.attn.proj.in_features


def _is_exact_gelu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.GELU) and activation.approximate == "none"


def _require(name: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise ValueError(f"{name} must be {wanted}, which is all that Swin expresses; got {got}")
