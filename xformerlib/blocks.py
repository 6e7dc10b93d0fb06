"""Transformer blocks and stacks of them: encoder, decoder, and both."""

from __future__ import annotations

import copy
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._arguments import Rate, Size
from ._cache import Cache
from ._inputs import (
    Masks,
    Positions,
    check_heads,
    check_last,
    check_mask,
    masks_of_layers,
    place,
    positions_of_layers,
    rates_of_layers,
)
from ._options import BlockOptions, EncoderBlockOptions, LayerOptions, NormPlace as NormPlace, StackOptions
from ._projection import check_dtype
from ._recorded import Recorded
from ._sublayers import (
    Activation as Activation,
    DropPath as DropPath,
    FeedForward as FeedForward,
    NormLayer,
    Residual,
    norm_factory,
    normed,
)
from .attention import Attention
from .domains import Domain
from .masks import Causal, Mask
from .positions import Position

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Block(Recorded):
    """A Transformer block: attention, optionally cross attention, and a feed-forward layer, each with a residual connection.

        pre       x + f(norm(x))                     each branch f in turn; GPT-2, ViT
        post      norm(x + f(x))                     Vaswani et al. 2017 (arXiv:1706.03762)
        sandwich  x + norm(f(norm(x)))               Gemma 2 (arXiv:2408.00118), CogView (arXiv:2105.13290)
        res-post  x + norm(f(x))                     Swin v2 (arXiv:2111.09883)
        parallel  x + f(norm(x)) + g(norm(x))        all branches at once, one norm; GPT-J, PaLM (arXiv:2204.02311)

    Args:
        dim, heads: as in ``Attention``.
        norm: where norms stand: ``"pre"``, ``"post"``, ``"sandwich"``, ``"res-post"``, ``"parallel"``.
        norm_layer: ``"layer"``, ``"rms"`` (arXiv:1910.07467), or a callable that makes a module from ``dim``.
        layer_scale: initial value of a learned factor per channel on each branch (arXiv:2103.17239); none if not given.
        drop_path: probability with which a branch is dropped for an item.
        cross: adds attention to a context between the two branches (``cross_attention``); it has no mask or position of its own.
        hidden, activation: of the feed-forward layer.
        dropout: after each branch and inside the feed-forward layer, in training.
        attention_dropout: of attention weights.
        bias: whether the feed-forward layer has biases.
        hidden_norm: a norm of its hidden channels.
        **attention: further arguments of ``Attention``: mask, position, kv_heads, head_dim, qk_norm, out_norm, qkv_bias, out_bias, gate,
            sinks, softcap, kernel.

    Example:
        >>> Block(32, 4, norm="post", activation="relu", mask=masks.Causal())(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        norm: NormPlace = "pre",
        norm_layer: NormLayer = "layer",
        layer_scale: float | None = None,
        drop_path: Rate = 0.0,
        cross: bool = False,
        hidden: Size | None = None,
        activation: Activation = "gelu",
        dropout: Rate = 0.0,
        attention_dropout: Rate = 0.0,
        bias: bool = True,
        hidden_norm: NormLayer | None = None,
        **attention: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        if norm not in get_args(NormPlace):
            raise ValueError(f"norm must be one of {', '.join(map(repr, get_args(NormPlace)))}; got norm={norm!r}")
        make = norm_factory(norm_layer)
        self.parallel = norm == "parallel"

        def residual() -> Residual:
            return Residual(dim, norm, make, layer_scale, dropout, drop_path)

        self.attention = Attention(dim, heads, dropout=attention_dropout, **attention)
        self.attention_residual = residual()
        own: dict[str, Any] = {name: value for name, value in attention.items() if name not in ("mask", "position")}
        self.cross_attention = Attention(dim, heads, dropout=attention_dropout, **own) if cross else None
        self.cross_residual = residual() if cross and not self.parallel else None
        self.feed_forward = FeedForward(
            dim, hidden=hidden, activation=activation, dropout=dropout, bias=bias, norm=hidden_norm
        )
        self.feed_forward_residual = None if self.parallel else residual()

    def forward(
        self,
        x: Float[Tensor, "*batch tokens dim"],
        domain: Domain | None = None,
        context: Float[Tensor, "*batch keys dim"] | None = None,
        context_domain: Domain | None = None,
        mask: Mask | None = None,
        context_mask: Mask | None = None,
        position: Position | None = None,
        cache: Cache | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "*batch last dim"]:
        """Map tokens to tokens; ``context`` is what a block with ``cross=True`` attends to (arguments as in ``Attention``)."""
        domain = place("x", x, self.attention.dim, domain)
        check_dtype("x", x, self.attention.qkv, self.attention_residual.norm)
        here = domain if last is None else check_last(last, domain)
        self._check_context(context, context_domain, context_mask, cache)
        x = domain.zero_padding(x)

        def attend(y: Tensor) -> Tensor:
            return self.attention(y, domain, mask=mask, position=position, cache=cache, last=last)

        def attend_context(y: Tensor) -> Tensor:
            assert self.cross_attention is not None
            return self.cross_attention(
                y, here, context=context, context_domain=context_domain, mask=context_mask, cache=cache
            )

        if self.parallel:

            def all_at_once(y: Tensor) -> Tensor:
                own = y if last is None else y[..., -last:, :]
                cross = 0 if self.cross_attention is None else attend_context(own)
                return attend(y) + cross + self.feed_forward(own)

            x = self.attention_residual(x, all_at_once, domain, None if last is None else here)
        else:
            x = self.attention_residual(x, attend, domain, None if last is None else here)
            if self.cross_residual is not None:
                x = self.cross_residual(x, attend_context, here)
            assert self.feed_forward_residual is not None
            # As a function: what moves the arguments of modules to their device would move a module, weights and all.
            x = self.feed_forward_residual(x, lambda y: self.feed_forward(y), here)
        return here.zero_padding(x)

    def _check_context(self, context: Any, domain: Any, mask: Any, cache: Any) -> None:
        if self.cross_attention is None:
            for name, value in (("context", context), ("context_domain", domain), ("context_mask", mask)):
                if value is not None:
                    raise ValueError(
                        f"{name} is for blocks with cross attention, and this one has none; build it with cross=True"
                    )
        if mask is not None:
            check_mask(mask, "context_mask")
        if domain is not None and not isinstance(domain, Domain):
            raise TypeError(f"context_domain must be a domain such as Sequence(length); got {type(domain).__name__}")
        if (
            self.cross_attention is not None
            and context is None
            and not (isinstance(cache, Cache) and cache.holds_context(self.cross_attention))
        ):
            raise ValueError(
                "context must be given to a block with cross=True, at least at the first call with a cache; got None"
            )


class _Stack(Recorded):
    """Blocks one after the other: the position's embeddings before them, a norm behind."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        mask: Masks,
        position: Positions,
        norm: str,
        norm_layer: NormLayer,
        final_norm: bool | None,
        drop_path: Rate | SequenceOf[Rate],
        checkpoint: bool,
        **block: Any,
    ) -> None:
        super().__init__()
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be a whole number >= 1; got depth={depth!r}")
        layer_masks = masks_of_layers(mask, depth)
        self.dim = dim
        check_heads(dim, heads, heads, block.get("head_dim"))
        head_dim = block.get("head_dim") or dim // heads
        self.position, own = positions_of_layers(position, depth, heads, head_dim, dim)
        self.checkpoint = checkpoint
        self.blocks = nn.ModuleList(
            Block(
                dim, heads, mask=layer_mask, position=layer_position, norm=norm, norm_layer=norm_layer,  # type: ignore[arg-type]
                drop_path=rate, **copy.deepcopy(block),  # an activation that learns is each block's own
            )
            for layer_mask, layer_position, rate in zip(layer_masks, own, rates_of_layers(drop_path, depth), strict=True)
        )  # fmt: skip
        last = norm != "post" if final_norm is None else final_norm
        self.norm = norm_factory(norm_layer)(dim) if last else nn.Identity()

    def embed(
        self, x: Float[Tensor, "*batch tokens dim"], domain: Domain | None = None
    ) -> Float[Tensor, "*batch tokens dim"]:
        """What the first block sees: tokens plus the embeddings of the position."""
        domain = place("x", x, self.dim, domain)
        x = domain.zero_padding(x)
        if self.position is not None:
            for embedding in self.position.embeddings:
                x = embedding(x, domain)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what goes from block to block for the backward, and compute the rest again (``checkpoint``)."""
        self.checkpoint = bool(enable)

    def layer(
        self, index: int, x: Float[Tensor, "*batch tokens dim"], domain: Domain | None = None, **block: Any
    ) -> Float[Tensor, "*batch last dim"]:
        """One block, with the position that all share; further arguments are those of ``Block.forward``."""
        run = partial(self.blocks[index], domain=domain, position=self.position, **block)
        if self.checkpoint and torch.is_grad_enabled() and block.get("cache") is None:
            return checkpoint(run, x, use_reentrant=False)
        return run(x)

    def _run(
        self, x: Tensor, domain: Domain | None, mask: Masks, cache: Cache | None, last: int | None, **cross: Any
    ) -> Tensor:
        domain = place("x", x, self.dim, domain)
        x = self.embed(x, domain)
        layer_masks = masks_of_layers(mask, len(self.blocks))
        for index, layer_mask in enumerate(layer_masks):
            asked = last if index + 1 == len(layer_masks) else None
            x = self.layer(index, x, domain, mask=layer_mask, cache=cache, last=asked, **cross)
        domain = domain if last is None else domain.last(last)
        return domain.zero_padding(normed(self.norm, x, domain))


class Encoder(_Stack):
    """A stack of blocks over a domain.

    Args:
        dim, depth, heads: channels, number of blocks, attention heads.
        mask: one mask for all blocks, or a list of one for each (such as windows and, now and then, ``Full()``).
        position: how tokens know where they are. A position is shared by all blocks (T5) and its embeddings are added to the input; a
            function that makes one, such as ``lambda: positions.RelativeBias(heads)``, gives each block its own (Swin). Or a list of
            both kinds, which are used together.
        norm, norm_layer: as in ``Block``.
        final_norm: whether a norm follows the last block; unless given, yes except after post-norm blocks, which end in one.
        drop_path: rate of the last block; it rises linearly from 0 at the first. Or a list of one for each.
        checkpoint: keep only what goes from block to block for the backward, and compute the rest again (Chen et al. 2016,
            arXiv:1604.06174): less memory for a third more time. An attribute, too, which may be set at any time.
        **block: further arguments of ``Block`` and ``Attention``.

    Example:
        >>> encoder = Encoder(32, 2, 4, mask=masks.Local(3) | masks.Global(1), position=positions.Rotary(8))
        >>> encoder(torch.randn(2, 197, 32), Grid(14, 14, prefix=1)).shape
        torch.Size([2, 197, 32])
        >>> encoder(torch.randn(2, 64, 32), Sequence(64)).shape
        torch.Size([2, 64, 32])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        mask: Masks = None,
        position: Positions = None,
        norm: NormPlace = "pre",
        norm_layer: NormLayer = "layer",
        final_norm: bool | None = None,
        drop_path: Rate | SequenceOf[Rate] = 0.0,
        checkpoint: bool = False,
        **block: Unpack[EncoderBlockOptions],
    ) -> None:
        if block.get("cross"):
            raise ValueError("cross is for a Decoder: an Encoder is given no context to attend to; got cross=True")
        super().__init__(
            dim, depth, heads, mask=mask, position=position, norm=norm, norm_layer=norm_layer, final_norm=final_norm,
            drop_path=drop_path, checkpoint=checkpoint, **block,
        )  # fmt: skip

    def forward(
        self,
        x: Float[Tensor, "*batch tokens dim"],
        domain: Domain | None = None,
        mask: Masks = None,
        cache: Cache | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "*batch last dim"]:
        """Encode tokens; ``mask`` further restricts every block (or a list of masks each its own), ``cache`` continues a sequence.

        With ``last`` only so many tokens at the end are returned, and the last block computes no others.
        """
        return self._run(x, domain, mask, cache, last)


class Decoder(_Stack):
    """A stack of blocks that attend to what came before and, with ``cross=True``, to a context (Vaswani et al. 2017).

    Arguments that are not listed are those of ``Encoder``.

    Args:
        mask: of self attention; ``Causal()`` if not given.
        cross: whether the blocks attend to a context. Without it the stack is a decoder-only model.

    Example:
        >>> decoder = Decoder(32, 2, 4)
        >>> decoder(torch.randn(2, 5, 32), context=torch.randn(2, 9, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        mask: Mask | SequenceOf[Mask | None] = Causal(),  # noqa: B008  (a frozen value)
        cross: bool = True,
        position: Positions = None,
        norm: NormPlace = "pre",
        norm_layer: NormLayer = "layer",
        final_norm: bool | None = None,
        drop_path: Rate | SequenceOf[Rate] = 0.0,
        checkpoint: bool = False,
        **block: Unpack[BlockOptions],
    ) -> None:
        super().__init__(
            dim, depth, heads, mask=mask, position=position, norm=norm, norm_layer=norm_layer, final_norm=final_norm,
            drop_path=drop_path, checkpoint=checkpoint, cross=cross, **block,
        )  # fmt: skip

    def forward(
        self,
        x: Float[Tensor, "*batch tokens dim"],
        domain: Domain | None = None,
        context: Float[Tensor, "*batch keys dim"] | None = None,
        context_domain: Domain | None = None,
        mask: Mask | None = None,
        context_mask: Mask | None = None,
        cache: Cache | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "*batch last dim"]:
        """Decode tokens beside a context; with a cache, one piece after the other, the context at the first call.

        With ``last`` only so many tokens at the end are returned, and the last block computes no others.
        """
        return self._run(
            x, domain, mask, cache, last, context=context, context_domain=context_domain, context_mask=context_mask
        )


class EncoderDecoder(Recorded):
    """The Transformer of Vaswani et al. 2017 (arXiv:1706.03762): an encoder of the source, and a decoder of the target beside it.

    Works on embedded tokens; the embedding of symbols or values and the output layer are the model's around it. The defaults are the
    paper's: post-norm blocks, ReLU, six blocks each.

    Args:
        dim, heads: channels and heads of both.
        encoder_depth, decoder_depth: blocks of each.
        mask, decoder_mask: self-attention masks of encoder and decoder.
        position: a position, of which encoder and decoder each have a copy, or a function that makes one for each block.
        **stack: further arguments of ``Encoder`` and ``Decoder``.

    Example:
        >>> model = EncoderDecoder(32, 4, encoder_depth=2, decoder_depth=2, position=positions.Sinusoidal(32))
        >>> model(torch.randn(2, 9, 32), torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int = 512,
        heads: int = 8,
        *,
        encoder_depth: Size = 6,
        decoder_depth: Size = 6,
        mask: Mask | None = None,
        decoder_mask: Mask = Causal(),  # noqa: B008  (a frozen value)
        position: Positions = None,
        norm: NormPlace = "post",
        activation: Activation = "relu",
        **stack: Unpack[StackOptions],
    ) -> None:
        super().__init__()
        if not isinstance(decoder_mask, Mask):
            raise TypeError(
                f"decoder_mask must be a mask such as masks.Causal(); got {type(decoder_mask).__name__}. For no mask: masks.Full()."
            )
        options: dict[str, Any] = {"position": position, "norm": norm, "activation": activation, **stack}
        self.encoder = Encoder(dim, encoder_depth, heads, mask=mask, **options)
        # Each has a position of its own, as in T5: what source and target learn of distance differs.
        own = {**options, "position": copy.deepcopy(position)}
        self.decoder = Decoder(dim, decoder_depth, heads, mask=decoder_mask, **own)

    def forward(
        self,
        source: Float[Tensor, "*batch source_tokens dim"],
        target: Float[Tensor, "*batch tokens dim"],
        source_domain: Domain | None = None,
        domain: Domain | None = None,
        source_mask: Mask | None = None,
        mask: Mask | None = None,
        context_mask: Mask | None = None,
    ) -> Float[Tensor, "*batch tokens dim"]:
        """Teacher forcing: all targets at once. To decode step by step, call ``encoder`` once and ``decoder`` with a ``Cache``."""
        context = self.encoder(source, source_domain, mask=source_mask)
        return self.decoder(
            target, domain, context=context, context_domain=source_domain, mask=mask, context_mask=context_mask
        )
