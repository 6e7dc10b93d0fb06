"""Positions of timm's Vision Transformers as ours."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from timm.layers.pos_embed_rel import RelPosBias, RelPosMlp
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from timm.models.beit import RelativePositionBias
from torch import Tensor, nn

from ..positions import Bias, ContinuousBias, Learned, RelativeBias, Rotary
from ._timm_weights import Weights, linear, parameter


def learned(weights: Weights, table: Tensor, grid: tuple[int, int], prefix: int) -> Learned:
    """A table of embeddings, with rows for prefix tokens in front or without."""
    values = weights.take(table)[0]
    own = len(values) - math.prod(grid)
    if own not in (0, prefix):
        raise ValueError(f"pos_embed must have {math.prod(grid)} rows, or {prefix} more; got {len(values)}")
    with torch.device("meta"):
        ours = Learned(values.shape[1], grid, prefix=own)
    ours.table = parameter(values[own:])
    ours.prefix_table = parameter(values[:own]) if own else None
    return ours


def rotary(weights: Weights, rope: Any, head_dim: int) -> Rotary | list[Rotary]:
    """Rotary positions in the half layout, the row's channels first; one for each block where frequencies are learned."""
    if type(rope) is RotaryEmbeddingMixed:
        return _mixed(weights, rope, head_dim)
    coordinates: Literal["index", "resized", "normalized"]
    if type(rope) is RotaryEmbeddingDinoV3:
        if rope.normalize_coords != "separate" or rope.min_period is not None:
            weights.refuse(rope, "has periods from min_period, or coordinates normalized by one size for both axes")
        coordinates, reference = "normalized", None
    elif type(rope) is RotaryEmbeddingCat:
        if rope.in_pixels or getattr(rope, "grid_type", "index") != "index":
            weights.refuse(rope, "has coordinates in pixels")
        reference = None if rope.ref_feat_shape is None else tuple(rope.ref_feat_shape)
        coordinates = "index" if reference is None else "resized"
    else:
        weights.refuse(rope, "turns channels in a way that Rotary does not")
    return Rotary(
        head_dim, theta=rope.temperature, coordinates=coordinates, reference=reference, offset=rope.grid_offset
    )


def _mixed(weights: Weights, rope: Any, head_dim: int) -> list[Rotary]:
    frequencies = weights.take(rope.freqs)  # axes, depth, heads, pairs
    rows = frequencies.flip(0) if rope.grid_indexing == "xy" else frequencies
    made = []
    for values in rows.unbind(1):
        with torch.device("meta"):
            ours = Rotary(head_dim, mixed=True, heads=values.shape[1], theta=rope.temperature)
        third = values.new_zeros(values.shape[1], 1, values.shape[2])
        ours.frequencies = parameter(torch.cat([values.transpose(0, 1), third], 1))
        made.append(ours)
    return made


def channel_order(rope: Any, head_dim: int, half: bool) -> Tensor:
    """For each channel of a head of ours, which of theirs it is.

    The same order for queries and keys leaves scores as they are, so axes that come as (x, y) and interleaved pairs need no options.
    """
    pair = torch.arange(head_dim // 2)
    if rope.grid_indexing == "xy" and not isinstance(rope, RotaryEmbeddingMixed):
        pair = pair.roll(head_dim // 4)
    return torch.cat([pair, pair + head_dim // 2] if half else [2 * pair, 2 * pair + 1])


def bias(weights: Weights, theirs: Any) -> Bias | None:
    """Biases of scores: of a module of its own, or a table that is attention's own."""
    if type(theirs) is RelPosMlp:
        return _continuous(weights, theirs)
    if getattr(theirs, "relative_position_bias_table", None) is None:
        return None
    if type(theirs) in (RelPosBias, RelativePositionBias) or hasattr(theirs, "qkv"):
        return _relative(weights, theirs.relative_position_bias_table, tuple(theirs.window_size))
    weights.refuse(theirs, "is no bias of scores that ours can express")


def _relative(weights: Weights, table: Tensor, size: tuple[int, int]) -> RelativeBias:
    values = weights.take(table)
    rows = math.prod(2 * n - 1 for n in size)
    with torch.device("meta"):
        ours = RelativeBias(values.shape[1], size=size, prefix=len(values) > rows)
    ours.table = parameter(values[:rows])
    ours.prefix_table = parameter(values[rows:]) if len(values) > rows else None
    return ours


def _continuous(weights: Weights, theirs: Any) -> ContinuousBias:
    if type(theirs.mlp.act) is not nn.ReLU:
        weights.refuse(theirs, f"has a network with {type(theirs.mlp.act).__name__}, ours ReLU")
    weight, inner = weights.affine(theirs.mlp.fc1)
    outer = weights.affine(theirs.mlp.fc2)
    swin = theirs.mode == "swin"
    trained = theirs.pretrained_window_size if theirs.pretrained_window_size[0] > 0 else theirs.window_size
    with torch.device("meta"):
        ours = ContinuousBias(
            outer[0].shape[0], hidden=weight.shape[0], axes=2, bound=16.0 if swin else None,
            scale=[8 / (size - 1) for size in trained] if swin else 1.0,
        )  # fmt: skip
    # Theirs has logarithms of base 8, or natural ones, where ours has base 2.
    ours.inner = linear(weight / 3 if swin else weight * math.log(2), inner)
    ours.outer = linear(*outer)
    return ours
