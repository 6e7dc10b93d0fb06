"""The Transformer modules of ``torch.nn`` as ours: the same weights, and their masks translated.

    >>> from xformerlib.interop.torch_nn import from_torch, from_torch_mask
    >>> theirs = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    >>> x, ignored = torch.randn(2, 5, 32), torch.ones(5, 5, dtype=torch.bool).triu(1)
    >>> ours = from_torch(theirs)
    >>> torch.allclose(ours(x, mask=from_torch_mask(ignored)), theirs(x, src_mask=ignored), atol=1e-5)
    True

Ours are always batch-first: ``(B, T, C)``, or ``(T, C)`` for one item, whatever ``batch_first`` was.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeVar, overload

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import Attention
from ..blocks import Activation, Block, Decoder, Encoder, EncoderDecoder
from ..masks import Causal, Dense, Full, Keys, Mask

Stack = TypeVar("Stack", Encoder, Decoder)


@overload
def from_torch(module: nn.MultiheadAttention) -> Attention:
    """Attention with its weights."""


@overload
def from_torch(module: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> Block:
    """A block with its weights."""


@overload
def from_torch(module: nn.TransformerEncoder) -> Encoder:
    """An encoder with its weights."""


@overload
def from_torch(module: nn.TransformerDecoder) -> Decoder:
    """A decoder with its weights."""


@overload
def from_torch(module: nn.Transformer) -> EncoderDecoder:
    """An encoder and a decoder with its weights."""


def from_torch(module: nn.Module) -> nn.Module:
    """Our module with copies of the weights of a ``torch.nn`` Transformer module, which is left as it is.

        nn.MultiheadAttention                             Attention(...)
        nn.TransformerEncoderLayer, ...DecoderLayer       Block(..., cross=False), Block(..., cross=True)
        nn.TransformerEncoder, nn.TransformerDecoder      Encoder(...), Decoder(...)
        nn.Transformer                                    EncoderDecoder(...)

    dtypes, devices, ``requires_grad``, dropout rates, training or evaluation mode and the tying of weights carry over. Like theirs, the
    result has no mask of its own, not even a decoder: masks come with each call (see ``from_torch_mask``). Cross attention, theirs of
    ``query, key, value``, is ours with ``context``, both key and value.

    Three things differ. A query that may see nothing gets NaN from most of their code paths, and nothing, heads of 0, from ours. At
    padded places a ``TransformerEncoder`` outputs 0 (before its norm) in evaluation without gradients, and something else otherwise: with
    ``from_torch_mask`` ours is the latter in both modes. And in evaluation without gradients they take any ``nn.GELU`` for the exact
    one: ours is what the activation says in both modes.

    Raises:
        TypeError: another module, a subclass that changes what is computed, or weights that are not plain parameters.
        ValueError: ``add_bias_kv``, ``kdim`` or ``vdim`` other than ``embed_dim``, and stacks of no layers, which ours cannot express.

    Example:
        >>> from_torch(torch.nn.Transformer(32, 4, 2, 2, dim_feedforward=64, batch_first=True)).decoder.blocks[0].feed_forward.hidden
        64
    """
    for kind, convert in _CONVERTERS.items():
        if isinstance(module, kind):
            return convert(module, {})
    names = ", ".join(f"nn.{kind.__name__}" for kind in _CONVERTERS)
    raise TypeError(f"module must be one of {names}; got {type(module).__name__}")


def from_torch_mask(
    attn_mask: Shaped[Tensor, "*rows_and_heads queries keys"] | None = None,
    key_padding_mask: Shaped[Tensor, "*batch keys"] | None = None,
    is_causal: bool = False,
    *,
    heads: int | None = None,
) -> Mask:
    """The masks of a ``torch.nn`` module, in which True means "ignore", as one of ours, in which True means "may attend".

    Floating-point masks of 0 and minus infinity, such as ``nn.Transformer.generate_square_subsequent_mask`` makes, are masks too. Any
    other number in one is a bias of the scores, which a mask cannot say, and is refused.

    Args:
        attn_mask: ``(Tq, Tk)``, or ``(B * H, Tq, Tk)``, for which ``heads`` is needed.
        key_padding_mask: ``(B, Tk)`` or ``(Tk,)``. Becomes a mask of keys, as it is there: the hidden tokens still get outputs. Where
            the padding is at the end, a domain, ``Sequence.padded(lengths)``, says more, and costs less.
        is_causal: the mask is ``Causal()``; an ``attn_mask`` given beside it must be the same.
        heads: attention heads, where ``attn_mask`` has three axes.

    Raises:
        ValueError: a bias in the place of a mask, three axes without ``heads``, an ``attn_mask`` that is not causal with ``is_causal``.
        TypeError: a mask that is neither bool nor floating-point.

    Example:
        >>> from_torch_mask(key_padding_mask=torch.tensor([[False, False, True]]), is_causal=True)
        Causal() & Keys(<1 x 3 valid>)
    """
    mask: Mask = Full()
    if attn_mask is not None:
        mask = _pairs(_allowed("attn_mask", attn_mask), heads)
    if is_causal:
        if isinstance(mask, Dense) and not bool((mask.allowed == torch.ones_like(mask.allowed).tril()).all()):
            raise ValueError(
                "is_causal says that attn_mask is the causal mask, but it is another one; leave out is_causal or attn_mask"
            )
        mask = Causal()
    if key_padding_mask is not None:
        mask = mask & Keys(_allowed("key_padding_mask", key_padding_mask))
    return mask


def _allowed(name: str, mask: Tensor) -> Bool[Tensor, "*shape"]:
    """Where a mask of theirs lets attention through."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(
            f"{name} must be a bool or floating-point tensor; got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    if mask.dtype == torch.bool:
        return ~mask
    allowed = mask == 0
    others = mask[~allowed & (mask != float("-inf"))]
    if others.numel():
        raise ValueError(
            f"{name} must be 0 or -inf everywhere to be a mask; got {others[0].item()}, which is a bias of the scores. Give it to "
            f"xformerlib.attention as bias, or drop it: from_torch_mask({name}={name} == -torch.inf)."
        )
    return allowed


def _pairs(allowed: Tensor, heads: int | None) -> Dense:
    if allowed.ndim == 2:
        return Dense(allowed)
    if allowed.ndim != 3:
        raise ValueError(f"attn_mask must be (Tq, Tk) or (B * H, Tq, Tk); got {tuple(allowed.shape)}")
    if heads is None or heads < 1 or len(allowed) % heads:
        raise ValueError(
            f"attn_mask of shape {tuple(allowed.shape)} has one table for each row and head: give heads, a divisor of {len(allowed)}; "
            f"got heads={heads}"
        )
    return Dense(allowed.unflatten(0, (-1, heads)))


# -- modules. ``memo`` is deepcopy's: what two modules of theirs share, ours share too --------------------------------------


def _attention(theirs: nn.MultiheadAttention, memo: dict[int, Any]) -> Attention:
    _check_unchanged(theirs, nn.MultiheadAttention)
    if theirs.bias_k is not None or theirs.bias_v is not None:
        raise ValueError(
            "add_bias_kv=True cannot be taken over: our Attention has no learned key and value beside those of tokens"
        )
    if theirs.kdim != theirs.embed_dim or theirs.vdim != theirs.embed_dim:
        raise ValueError(
            f"kdim and vdim must be embed_dim={theirs.embed_dim}, since our Attention projects tokens and context by one matrix; got "
            f"kdim={theirs.kdim} and vdim={theirs.vdim}"
        )
    with torch.device("meta"):
        ours = Attention(
            theirs.embed_dim, theirs.num_heads, qkv_bias=theirs.in_proj_bias is not None, out_bias=theirs.out_proj.bias is not None,
            dropout=theirs.dropout, sinks=theirs.add_zero_attn,
        )  # fmt: skip
    ours.qkv.weight = _parameter("in_proj_weight", theirs.in_proj_weight, memo)
    if theirs.in_proj_bias is not None:
        ours.qkv.bias = _parameter("in_proj_bias", theirs.in_proj_bias, memo)
    if theirs.add_zero_attn:  # a key of zeros scores 0 and its value adds nothing: a sink whose logit stays 0
        ours.sinks = nn.Parameter(theirs.in_proj_weight.new_zeros(theirs.num_heads), requires_grad=False)
    ours.out = _linear("out_proj", theirs.out_proj, memo)
    return ours.train(theirs.training)


def _block(theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, memo: dict[int, Any]) -> Block:
    decoder = isinstance(theirs, nn.TransformerDecoderLayer)
    _check_unchanged(theirs, nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer)
    up, down = _linear("linear1", theirs.linear1, memo), _linear("linear2", theirs.linear2, memo)
    with torch.device("meta"):
        ours = Block(
            up.in_features, theirs.self_attn.num_heads, norm="pre" if theirs.norm_first else "post", cross=decoder,
            hidden=up.out_features, activation=_activation(theirs.activation, memo),
        ).train(theirs.training)  # fmt: skip
    ours.attention = _attention(theirs.self_attn, memo)
    ours.feed_forward.up, ours.feed_forward.down = up, down
    ours.feed_forward.dropout = copy.deepcopy(theirs.dropout, memo)
    residuals = [ours.attention_residual, ours.feed_forward_residual]
    if isinstance(theirs, nn.TransformerDecoderLayer):
        ours.cross_attention = _attention(theirs.multihead_attn, memo)
        residuals.insert(1, ours.cross_residual)
    for number, residual in enumerate(residuals, start=1):
        assert residual is not None
        residual.norm = copy.deepcopy(getattr(theirs, f"norm{number}"), memo)
        residual.dropout = copy.deepcopy(getattr(theirs, f"dropout{number}"), memo)
    return ours


def _encoder(theirs: nn.TransformerEncoder, memo: dict[int, Any]) -> Encoder:
    _check_unchanged(theirs, nn.TransformerEncoder)
    blocks = _blocks(theirs, nn.TransformerEncoderLayer, memo)
    with torch.device("meta"):
        ours = Encoder(blocks[0].attention.dim, len(blocks), blocks[0].attention.heads, final_norm=False)
    return _filled(ours, blocks, theirs, memo)


def _decoder(theirs: nn.TransformerDecoder, memo: dict[int, Any]) -> Decoder:
    _check_unchanged(theirs, nn.TransformerDecoder)
    blocks = _blocks(theirs, nn.TransformerDecoderLayer, memo)
    with torch.device("meta"):
        ours = Decoder(blocks[0].attention.dim, len(blocks), blocks[0].attention.heads, mask=Full(), final_norm=False)
    return _filled(ours, blocks, theirs, memo)


def _filled(
    ours: Stack, blocks: list[Block], theirs: nn.TransformerEncoder | nn.TransformerDecoder, memo: dict[int, Any]
) -> Stack:
    ours.train(theirs.training)
    for number, block in enumerate(blocks):
        ours.blocks[number] = block
    if theirs.norm is not None:
        ours.norm = copy.deepcopy(theirs.norm, memo)
    return ours


def _encoder_decoder(theirs: nn.Transformer, memo: dict[int, Any]) -> EncoderDecoder:
    _check_unchanged(theirs, nn.Transformer)
    for name, part, kind in (
        ("custom_encoder", theirs.encoder, nn.TransformerEncoder),
        ("custom_decoder", theirs.decoder, nn.TransformerDecoder),
    ):
        if not isinstance(part, kind):
            raise TypeError(f"{name} must be an nn.{kind.__name__} to be taken over; got {type(part).__name__}")
    encoder, decoder = _encoder(theirs.encoder, memo), _decoder(theirs.decoder, memo)
    with torch.device("meta"):
        ours = EncoderDecoder(theirs.d_model, theirs.nhead, encoder_depth=1, decoder_depth=1).train(theirs.training)
    ours.encoder, ours.decoder = encoder, decoder
    return ours


_CONVERTERS: dict[type[nn.Module], Any] = {
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _block,
    nn.TransformerDecoderLayer: _block,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoder: _decoder,
    nn.Transformer: _encoder_decoder,
}


def _blocks(
    theirs: nn.TransformerEncoder | nn.TransformerDecoder, kind: type[nn.Module], memo: dict[int, Any]
) -> list[Block]:
    if len(theirs.layers) == 0:
        raise ValueError("num_layers must be >= 1; got a stack of no layers")
    for number, layer in enumerate(theirs.layers):
        if not isinstance(layer, kind):
            raise TypeError(
                f"layers[{number}] must be an nn.{kind.__name__} to be taken over; got {type(layer).__name__}"
            )
    return [_block(layer, memo) for layer in theirs.layers]


def _linear(name: str, theirs: nn.Module, memo: dict[int, Any]) -> nn.Linear:
    if not isinstance(theirs, nn.Linear):
        raise TypeError(f"{name} must be an nn.Linear to be taken over; got {type(theirs).__name__}")
    ours = nn.Linear(theirs.in_features, theirs.out_features, bias=theirs.bias is not None, device="meta")
    ours.weight = _parameter(f"{name}.weight", theirs.weight, memo)
    if theirs.bias is not None:
        ours.bias = _parameter(f"{name}.bias", theirs.bias, memo)
    return ours.train(theirs.training)


def _parameter(name: str, theirs: Tensor, memo: dict[int, Any]) -> nn.Parameter:
    if not isinstance(theirs, nn.Parameter):
        raise TypeError(
            f"{name} must be a plain parameter to be taken over; got {type(theirs).__name__}. Remove its parametrization first."
        )
    return copy.deepcopy(theirs, memo)


def _activation(theirs: Any, memo: dict[int, Any]) -> Activation:
    if theirs is F.relu or type(theirs) is nn.ReLU:
        return "relu"
    if theirs is F.gelu or (type(theirs) is nn.GELU and theirs.approximate == "none"):
        return "gelu"
    return copy.deepcopy(theirs, memo)


def _check_unchanged(module: nn.Module, base: type[nn.Module]) -> None:
    """Raise where a subclass, or the object itself, replaces a method of ``base``: nobody knows what it computes."""
    for name, method in inspect.getmembers(base, inspect.isfunction):
        own = name in vars(base) and name != "__init__"
        if own and (getattr(type(module), name) is not method or name in vars(module)):
            raise TypeError(
                f"{type(module).__name__} has a {name} of its own, so it may compute something else than nn.{base.__name__}"
            )
