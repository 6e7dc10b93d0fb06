"""The Vision Transformer."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .._arguments import Count, Rate, Size, shown
from .._dropout import Dropout
from .._inputs import Positions
from .._options import ViTOptions
from .._pooling import Pool, Pooling
from .._sublayers import NormLayer, norm_factory
from ..blocks import Encoder
from ..positions import Learned
from ._classifier import Classifier
from ._kept import Features as Features, PatchDropout
from ._patches import Images, PatchEmbed, Tokenizer, draw_linear
from ._tokens import places_among, tokens_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

# As in the published models.
LAYER_NORM: NormLayer = partial(nn.LayerNorm, eps=1e-6)


class ViT(Classifier):
    """Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929), of images of any size and aspect ratio.

        x = [class, registers, patches] + positions;   x = Encoder(x);   logits = W pool(norm(x)) + b

    An image may be of another size at each call: the positions follow. A list of images of different sizes is packed, without padding
    (NaViT, Dehghani et al. 2023, arXiv:2307.06304), and gives what each image gives alone. Patches that are not ``valid`` do not exist.
    With other masks this is other models: ``mask=[masks.Windows(14)] * 3 + [None]`` for each four layers is ViTDet (arXiv:2203.16527),
    ``masks.Local(3) | masks.Global(1)`` neighbourhood attention (arXiv:2204.07143), ``masks.Axial`` axial attention.

    Args:
        classes: logits; None for a model whose output is the pooled vector.
        size: of the images, for which learned positions have a place each; of others they are resampled.
        patch: size of a patch: one number (square), or one for each axis: (16,) for signals, (2, 16, 16) for videos.
        channels: of an image.
        dim, depth, heads: channels, blocks, attention heads. The defaults are ViT-S.
        class_token: put a learned token in front of the patches.
        distillation: put another one behind it, with a head of its own (DeiT, Touvron et al. 2020, arXiv:2012.12877); see ``logits``.
        registers: further learned tokens (Darcet et al. 2023, arXiv:2309.16588).
        pool: what the head sees, as in ``Pooling``; default ``"token"``, or ``"mean"`` without a class token.
        position: ``"learned"`` (``Learned`` on the grid of ``size``), None, or as in ``Encoder``; of a list, too: EVA-02 (Fang et al. 2023,
            arXiv:2303.11331) has ``["learned", positions.Rotary(dim // heads)]``.
        embed: makes tokens of images in place of patches, such as ``ConvStem(dim)``.
        embed_norm: a norm of the tokens before the first block (CLIP).
        pool_norm: whether the last norm follows the pooling; default: where tokens are averaged.
        dropout, position_dropout, head_dropout: in blocks, after positions, before the head.
        patch_dropout: share of the patches that is left out in training, see ``PatchDropout``.
        mask, norm_layer, **encoder: further arguments of ``Encoder`` and ``Block``: drop_path, layer_scale, hidden, activation="swiglu",
            qk_norm, norm="parallel", checkpoint, ...

    Shapes:
        images (B, channels, *sizes), or a list of (channels, *sizes); ``valid`` (B, *grid). Returns (B, classes).

    Example:
        >>> model = ViT(10, size=32, patch=4, dim=64, depth=2, heads=4)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> model([torch.randn(3, 32, 64), torch.randn(3, 20, 8)]).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: Size | None,
        *,
        size: Size | SequenceOf[Size] = 224,
        patch: int | SequenceOf[int] = 16,
        channels: Size = 3,
        dim: Size = 384,
        depth: Size = 12,
        heads: Size = 6,
        class_token: bool = True,
        distillation: bool = False,
        registers: Count = 0,
        pool: Pool | Pooling | None = None,
        position: Positions | Literal["learned"] | SequenceOf[Positions | Literal["learned"]] = "learned",
        embed: Tokenizer | None = None,
        embed_norm: NormLayer | None = None,
        pool_norm: bool | None = None,
        norm_layer: NormLayer = LAYER_NORM,
        final_norm: bool = True,
        dropout: Rate = 0.0,
        position_dropout: Rate = 0.0,
        head_dropout: Rate = 0.0,
        patch_dropout: Rate = 0.0,
        **encoder: Unpack[ViTOptions],
    ) -> None:
        super().__init__()
        if pool == "token" and not class_token:
            raise ValueError("pool='token' takes the class token; got class_token=False. Use pool='mean'.")
        if distillation and not class_token:
            raise ValueError("distillation adds a token beside the class token; got class_token=False")
        self.embed = PatchEmbed(dim, patch, channels=channels) if embed is None else embed
        if self.embed.dim != dim:
            raise ValueError(f"embed must make tokens of dim={dim} channels; got {self.embed.dim}")
        self.class_token, prefix = class_token, class_token + distillation + registers
        self.prefix_tokens = nn.Parameter(torch.empty(prefix, dim)) if prefix else None
        if position is not None and not (isinstance(position, (str, list, tuple)) or callable(position)):
            raise TypeError(
                f"position must be 'learned', None, a position, or a list of these; got {type(position).__name__}"
            )
        every = position if isinstance(position, (list, tuple)) else [] if position is None else [position]
        if "learned" in every:
            sizes = (size,) * self.embed.ndim if isinstance(size, int) else tuple(size)
            learned = Learned(dim, self.embed.grid(sizes), prefix=prefix)
            every = [learned if each == "learned" else each for each in every]
        pool = ("token" if class_token else "mean") if pool is None else pool
        self.pool = pool if isinstance(pool, Pooling) else _pooling(dim, heads, pool, norm_layer)
        after = self.pool.pool in ("mean", "max", "mean-max") if pool_norm is None else pool_norm
        self.encoder = Encoder(
            dim, depth, heads, position=every, norm_layer=norm_layer, dropout=dropout,  # type: ignore[arg-type]
            final_norm=final_norm and not after, **encoder,
        )  # fmt: skip
        self.embed_norm = nn.Identity() if embed_norm is None else norm_factory(embed_norm, "embed_norm")(dim)
        self.pool_norm = norm_factory(norm_layer)(dim) if final_norm and after else nn.Identity()
        self.position_dropout, self.head_dropout = Dropout(position_dropout), Dropout(head_dropout)
        self.patch_dropout = PatchDropout(patch_dropout)
        self.head = nn.Identity() if classes is None else nn.Linear(dim, classes)
        self.distillation_head = nn.Linear(dim, classes) if distillation and classes is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw learned tokens, blocks and heads anew: truncated normal of std 0.02, biases 0. Tokenizer and pooling draw their own."""
        if self.prefix_tokens is not None:
            nn.init.normal_(self.prefix_tokens, std=0.02)
        for part in (self.encoder, self.head, self.distillation_head):
            if part is not None:
                part.apply(draw_linear)

    def forward(
        self, images: Images, valid: Bool[Tensor, "batch *grid"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """The logits of each image; with distillation, the mean of those of both heads."""
        logits = self.logits(self.features(images, valid=valid))
        return logits[0] if len(logits) == 1 else (logits[0] + logits[1]) / 2

    def features(self, images: Images, *, valid: Bool[Tensor, "batch *grid"] | None = None) -> Features:
        """The tokens after the last block and norm."""
        return self.encode(self.patch_dropout(self.tokens(images, valid=valid)))

    def encode(self, tokens: Features) -> Features:
        """``features`` of ``tokens``, or of those that are kept of them."""
        x, domain = self._placed(tokens)
        for index in range(len(self.encoder.blocks)):
            x = self.encoder.layer(index, x, domain)
        return Features(domain.zero_padding(self.encoder.norm(x)), domain)

    def intermediates(
        self,
        images: Images,
        layers: SequenceOf[int] | None = None,
        *,
        norm: bool = False,
        valid: Bool[Tensor, "batch *grid"] | None = None,
    ) -> list[Features]:
        """The tokens after each of the blocks ``layers`` (from 0, negative from the end; all if not given), for heads of dense tasks.

        ``norm`` applies the last norm to each. ``maps`` makes a map of the tokens, for each image.
        """
        if not isinstance(norm, bool):
            raise TypeError(f"norm must be True or False; got {shown(norm)}")
        asked = places_among("layers", "blocks", layers, len(self.encoder.blocks))
        x, domain = self.begin(images, valid=valid)
        found = {}
        for index in range(max(asked) + 1):
            x = self.encoder.layer(index, x, domain)
            if index in asked:
                found[index] = Features(domain.zero_padding(self.encoder.norm(x)) if norm else x, domain)
        return [found[layer] for layer in asked]

    def logits(self, features: Features) -> tuple[Float[Tensor, "batch classes"], ...]:
        """The logits of each head: one, or with distillation those of the class token and of the token that learns from a teacher."""
        return tuple(getattr(self, name)(x) for name, x in zip(self._heads(), self._vectors(features), strict=True))

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches."""
        return 0 if self.prefix_tokens is None else len(self.prefix_tokens)

    def _heads(self) -> list[str]:
        return ["head"] if self.distillation_head is None else ["head", "distillation_head"]

    def _vectors(self, features: Features) -> list[Tensor]:
        first = super()._vectors(features)
        return first if self.distillation_head is None else [*first, self.head_dropout(_second(features))]

    def pooled(self, features: Features) -> Float[Tensor, "batch dim"]:
        """One vector for each image, which the head sees."""
        return self.pool_norm(self.pool(*features))

    def begin(self, images: Images, *, valid: Bool[Tensor, "batch *grid"] | None = None) -> Features:
        """What the first block sees: tokens of the patches and in front of them, and positions."""
        return self._placed(self.patch_dropout(self.tokens(images, valid=valid)))

    def _placed(self, tokens: Features) -> Features:
        x, domain = tokens
        x = self.position_dropout(self.encoder.embed(x, domain))
        return Features(self.embed_norm(x), domain)

    def tokens(self, images: Images, *, valid: Bool[Tensor, "batch *grid"] | None = None) -> Features:
        """The tokens of the patches, and in front of them the learned ones; without positions."""
        return tokens_of(self.embed, images, valid, self.prefix_tokens)


def _second(features: Features) -> Float[Tensor, "batch dim"]:
    tokens, domain = features
    if domain.offsets is None:
        return tokens[..., 1, :]
    return tokens.index_select(0, domain.offsets[:-1] + 1)


def _pooling(dim: int, heads: int, pool: Pool, norm_layer: NormLayer) -> Pooling:
    return Pooling(dim, pool, heads=heads, norm_layer=norm_layer) if pool == "attention" else Pooling(dim, pool)
