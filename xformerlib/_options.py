"""Options that models pass on to their blocks and to attention, for ``Unpack``: one place for names and types."""

from __future__ import annotations

from collections.abc import Callable, Sequence as SequenceOf
from typing import Literal, NoReturn, TypedDict

from torch import nn

from ._arguments import Positive, Rate, Size
from ._inputs import Masks, Positions
from ._sublayers import Activation, NormLayer
from .masks import Mask
from .positions import Position

NormPlace = Literal["pre", "post", "sandwich", "res-post", "parallel"]
QKNorm = Literal["rms", "layer", "cosine"] | Callable[[int], nn.Module]


class AttentionOptions(TypedDict, total=False):
    """Options of ``Attention`` beside mask, position and dropout."""

    kv_heads: Size | None
    head_dim: Size | None
    qk_norm: QKNorm | None
    out_norm: NormLayer | None
    qkv_bias: bool
    out_bias: bool
    gate: bool
    sinks: bool
    softcap: Positive | None
    kernel: str


class LayerOptions(AttentionOptions, total=False):
    """Options that ``Block`` passes on to ``Attention``."""

    mask: Mask | None
    position: Position | None


class BranchOptions(AttentionOptions, total=False):
    """Options of ``Block`` for its branches, but for the activation, the hidden channels and dropout."""

    layer_scale: float | None
    attention_dropout: Rate
    bias: bool
    hidden_norm: NormLayer | None


class BlockOptions(BranchOptions, total=False):
    """Options that a ``Decoder`` passes on to its blocks."""

    hidden: Size | None
    activation: Activation
    dropout: Rate


class EncoderBlockOptions(BlockOptions, total=False):
    """Options that an ``Encoder`` passes on to its blocks; ``cross`` is refused by name."""

    cross: NoReturn


class SwinOptions(BranchOptions, total=False):
    """Options that ``Swin`` passes on to its encoders."""

    activation: Activation
    mask: Masks
    norm: NormPlace
    final_norm: bool | None
    checkpoint: bool


class ViTOptions(BranchOptions, total=False):
    """Options that ``ViT`` passes on to its encoder."""

    hidden: Size | None
    activation: Activation
    mask: Masks
    norm: NormPlace
    drop_path: Rate | SequenceOf[Rate]
    checkpoint: bool


class GraphEncoderOptions(BlockOptions, total=False):
    """Options that ``GraphTransformer`` passes on to its encoder."""

    norm: NormPlace
    final_norm: bool | None
    drop_path: Rate | SequenceOf[Rate]
    checkpoint: bool


class DecoderOptions(GraphEncoderOptions, total=False):
    """Options that ``MaskedAutoencoder`` passes on to its decoder."""

    mask: Masks
    norm_layer: NormLayer


class EncoderOptions(DecoderOptions, total=False):
    """All options of an ``Encoder``: the mapping ``block=`` of models of time series."""

    position: Positions


class StackOptions(BranchOptions, total=False):
    """Options that ``EncoderDecoder`` passes on to both of its stacks."""

    hidden: Size | None
    dropout: Rate
    norm_layer: NormLayer
    final_norm: bool | None
    drop_path: Rate | SequenceOf[Rate]
    checkpoint: bool


class GraphormerOptions(BlockOptions, total=False):
    """Options that ``Graphormer`` passes on to its blocks."""

    norm: NormPlace
    drop_path: Rate
    mask: Mask | None


class GPSBranchOptions(TypedDict, total=False):
    """Options of a ``GPSLayer`` beside its attention."""

    dropout: Rate
    activation: Activation
    norm: NormLayer | str | None
    drop_path: Rate


class GPSOptions(GPSBranchOptions, AttentionOptions, total=False):
    """Options that ``GPS`` passes on to its layers."""

    attention: nn.Module | None
    attention_dropout: Rate
    mask: Mask | None


class ExphormerOptions(GPSBranchOptions, total=False):
    """Options that ``Exphormer`` passes on to its layers; other attention is refused by name."""

    mask: NoReturn
    attention: NoReturn


class PoolingOptions(TypedDict, total=False):
    """Options of ``MultiheadPooling`` beside its channels."""

    heads: Size
    hidden: Size | None
    norm_layer: NormLayer
    activation: Activation
    qk_norm: QKNorm | None
    prefix: bool
