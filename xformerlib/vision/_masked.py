"""Self-supervision: a Vision Transformer that sees some patches of an image, and a decoder that restores the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .._arguments import Size
from .._autograd import touching
from .._inputs import Positions
from .._options import DecoderOptions
from .._recorded import Recorded
from ..blocks import Encoder
from ..domains import Grid
from ..positions import Sinusoidal
from ._kept import Features, random_tokens
from ._patches import PatchEmbed
from ._tokens import without_holes
from ._vit import LAYER_NORM, ViT

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Restored(NamedTuple):
    """What a ``MaskedAutoencoder`` makes of images.

    Attributes:
        loss: mean squared error on hidden patches.
        reconstruction: the images, (B, channels, *sizes), with what was restored in place of the hidden patches.
        mask: (B, *grid), True where a patch was hidden.
    """

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, "batch channels *sizes"]
    mask: Bool[Tensor, "batch *grid"]


class MaskedAutoencoder(Recorded):
    """Masked autoencoder, MAE (He et al. 2021, arXiv:2111.06377): hide most patches of an image, and restore them from the others.

        z        = encoder(patches shown);   y_i = W z_i + b where patch i is shown, m where it is hidden
        restored = V decoder(y + positions) + c
        loss     = mean over hidden patches of ||restored_i - target_i||^2 / values of a patch

    The patches are hidden anew at each call. The encoder computes the others alone, each at its place (see ``domains.Subset``); its class
    token and registers go on to the decoder. A target is a patch, standardised by its own
    mean and variance. The encoder is a ``ViT``, not a copy: trained, it goes on to whatever is next, and the decoder is thrown away.

    Args:
        encoder: a ViT of patches, of signals, images or videos. Its ``patch_dropout`` is not used here.
        decoder_dim, decoder_depth, decoder_heads: channels, blocks, attention heads of the decoder. The defaults are the paper's.
        ratio: share of the patches that is hidden, in (0, 1); at least one is shown.
        norm_targets: whether targets are standardised, with the variance + 1e-6; if not, they are the values.
        position: of the decoder, as in ``Encoder``; default ``Sinusoidal(decoder_dim)``.
        **decoder: further arguments of ``Encoder`` for the decoder.

    Shapes:
        images (B, channels, *sizes), of another size at each call if need be; ``valid`` (B, *grid), patches that exist.

    Raises:
        ValueError, TypeError: a ratio out of range, an encoder that has no patches.

    Example:
        >>> encoder = ViT(10, size=32, patch=4, dim=64, depth=2, heads=4)
        >>> model = MaskedAutoencoder(encoder, decoder_dim=32, decoder_depth=1, decoder_heads=4)
        >>> loss, reconstruction, mask = model(torch.randn(2, 3, 32, 32))
        >>> reconstruction.shape, mask.sum((1, 2))
        (torch.Size([2, 3, 32, 32]), tensor([48, 48]))
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        decoder_dim: Size = 512,
        decoder_depth: Size = 8,
        decoder_heads: Size = 16,
        ratio: float = 0.75,
        norm_targets: bool = True,
        position: Positions = None,
        **decoder: Unpack[DecoderOptions],
    ) -> None:
        super().__init__()
        if not isinstance(encoder, ViT) or not isinstance(encoder.embed, PatchEmbed):
            raise TypeError(
                "encoder must be a ViT whose tokens are patches, which are what is hidden and restored; got "
                f"{type(getattr(encoder, 'embed', encoder)).__name__}"
            )
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must be in (0, 1); got ratio={ratio}")
        self.encoder, self.ratio, self.norm_targets = encoder, ratio, norm_targets
        self.embed = nn.Linear(encoder.embed.dim, decoder_dim)
        self.hidden_token = nn.Parameter(torch.empty(decoder_dim))
        options: dict[str, Any] = {"norm_layer": LAYER_NORM, **decoder}
        self.decoder = Encoder(
            decoder_dim, decoder_depth, decoder_heads, **options,
            position=Sinusoidal(decoder_dim) if position is None else position,
        )  # fmt: skip
        self.out = nn.Linear(decoder_dim, encoder.embed.proj.in_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the decoder anew, as published: linear maps uniform (Glorot and Bengio 2010), biases 0. The encoder stays as it is."""
        nn.init.normal_(self.hidden_token, std=0.02)
        for part in (self.embed, *self.decoder.modules(), self.out):
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(
        self,
        images: Float[Tensor, "batch channels *sizes"],
        generator: torch.Generator | None = None,
        valid: Bool[Tensor, "batch *grid"] | None = None,
    ) -> Restored:
        """Hide patches, drawn from ``generator`` or torch's own, and restore them."""
        images = images if valid is None else without_holes(images, valid)
        tokens = self.encoder.tokens(images, valid=valid)
        grid = tokens.grid
        index = random_tokens(tokens, self.ratio, generator)
        latent = self.encoder.encode(tokens.kept(index))
        hidden = torch.ones(tokens.tokens.shape[:2], dtype=torch.bool, device=index.device).scatter_(1, index, False)
        hidden = hidden if grid.valid is None else hidden & grid.valid
        patches = self._patches(images)
        level, scale = _standard(patches) if self.norm_targets else (0.0, 1.0)
        hidden = hidden[:, grid.prefix :]
        restored = self._decoded(latent, grid)
        error = (restored - (patches - level) / scale).square().mean(-1)
        loss = error.masked_fill(~hidden, 0).sum() / hidden.sum().clamp(min=1)
        unused = (self.encoder.pool, self.encoder.head, self.encoder.distillation_head)
        loss = touching(loss, [p for part in unused if part is not None for p in part.parameters()])
        with torch.no_grad():
            pictures = torch.where(hidden[..., None], restored * scale + level, patches)
        return Restored(loss, self._joined(pictures, grid), hidden.unflatten(1, grid.sizes))

    def _decoded(self, latent: Features, grid: Grid) -> Float[Tensor, "batch patches values"]:
        """All patches, from the encoder's tokens and from tokens that stand for what is hidden."""
        shown = self.embed(latent.tokens)
        index = latent.domain.index[..., None].expand_as(shown)  # type: ignore[union-attr]
        every = self.hidden_token.to(shown.dtype).expand(len(shown), grid.num_tokens, -1)
        return self.out(self.decoder(every.scatter(1, index, shown), grid)[:, grid.prefix :])

    def _patches(self, images: Tensor) -> Float[Tensor, "batch patches values"]:
        return self.encoder.embed._patches(images).flatten(1, -2)  # type: ignore[operator]

    def _joined(self, patches: Float[Tensor, "batch patches values"], grid: Grid) -> Tensor:
        """Images of their patches."""
        size: tuple[int, ...] = self.encoder.embed.patch  # type: ignore[assignment]
        axes = len(size)
        x = patches.unflatten(2, (-1, *size)).unflatten(1, grid.sizes)  # B, *grid, C, *patch
        order = [part for axis in range(axes) for part in (1 + axis, 2 + axes + axis)]
        x = x.permute(0, 1 + axes, *order)
        return x.reshape(*x.shape[:2], *(n * p for n, p in zip(grid.sizes, size, strict=True)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks of encoder and decoder again in the backward, as ``Encoder(checkpoint=True)``."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.set_grad_checkpointing(enable)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, norm_targets={self.norm_targets}"


def _standard(patches: Float[Tensor, "batch patches values"]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch; of the variance, as published, the unbiased estimate."""
    variance, mean = torch.var_mean(patches, -1, keepdim=True, correction=min(1, patches.shape[-1] - 1))
    return mean, (variance + 1e-6).sqrt()
