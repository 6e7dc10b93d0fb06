"""PatchTST: patches of one series are the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..blocks import Encoder
from ..domains import Sequence
from ..positions import Learned
from ._checks import check_size
from ._inputs import ForecastModel, Inputs, Series
from ._parts import instance_norm, patches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of each channel over all tokens, (B, T, C) or (N, C), as PatchTST has it in place of layer norm.

    Example:
        >>> TokenBatchNorm(8)(torch.randn(4, 42, 8)).shape
        torch.Size([4, 42, 8])
    """

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Normalise; in evaluation by running statistics, so that no item depends on another."""
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class PatchTST(ForecastModel):
    """Each channel by itself, cut into patches that attend to each other (Nie et al. 2022, arXiv:2211.14730).

        z, inverse = instance_norm(x)
        token_p    = W z[p stride : p stride + patch] + position_p
        y          = inverse(W_head flatten(encoder(tokens)))

    As in the paper: channels share all weights and do not see each other; the last value is repeated by one stride, so 336 steps
    make 42 tokens of 16 steps, 8 apart; learned positions; post-norm blocks with batch norm; one linear map from all tokens. The
    defaults are those of its larger data sets; for the small ones (ETTh1) it has dim=16, heads=4, hidden=128, dropout=0.3.

    Different here: attention scores are not added from layer to layer (the paper's code does, which no fused kernel can), and values may
    be missing. Those do not count in the normalisation, are at the level of the series in a patch, and a patch of which nothing was
    observed does not exist: nobody attends to it, and its output is 0.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        patch, stride: steps in a patch, and from one to the next.
        dim, depth, heads, hidden: channels, blocks, attention heads, and the width of the feed-forward layers.
        dropout: of tokens, branches and feed-forward layers.
        head_dropout: before the last linear map.
        block: further arguments of ``Encoder``, such as ``{"norm_layer": "layer", "norm": "pre"}``.

    Example:
        >>> model = PatchTST(7, 336, 96, dim=16, heads=4, hidden=128, dropout=0.3)  # the paper's for ETTh1
        >>> model(torch.randn(2, 336, 7)).shape, sum(p.numel() for p in model.parameters())
        (torch.Size([2, 96, 7]), 81728)
    """

    takes: ClassVar[frozenset[str]] = frozenset({"head"})

    def __init__(
        self,
        channels: int,
        lookback: int,
        horizon: int,
        *,
        patch: int = 16,
        stride: int = 8,
        dim: int = 128,
        depth: int = 3,
        heads: int = 16,
        hidden: int | None = 256,
        dropout: float = 0.2,
        head_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.patch, self.stride = check_size("patch", patch), check_size("stride", stride)
        if patch > lookback:
            raise ValueError(f"patch must be <= lookback; got patch={patch} and lookback={lookback}")
        tokens = (lookback - patch) // stride + 2
        self.embed = nn.Linear(patch, dim)
        self.position = Learned(dim, tokens)
        self.dropout = nn.Dropout(dropout)
        options: dict[str, Any] = {"norm": "post", "norm_layer": TokenBatchNorm, **(block or {})}
        self.encoder = Encoder(dim, depth, heads, hidden=hidden, dropout=dropout, **options)
        self.head_dropout = nn.Dropout(head_dropout)
        self.project = nn.Linear(tokens * dim, horizon * self.head.size)

    def forecast(self, series: Series) -> Any:
        """Normalise, cut, attend, project."""
        z, inverse = instance_norm(series.values, series.observed)
        cut = patches(z.transpose(1, 2).flatten(0, 1), self.patch, self.stride, pad_end=True)
        tokens = self.position(self.embed(cut), Sequence(cut.shape[1]))
        tokens = self._encode(self.dropout(tokens), series)
        y = self.project(self.head_dropout(tokens.flatten(1)))
        y = y.view(-1, self.channels, self.horizon, self.head.size).transpose(1, 2)
        return self.head.forecast(y, inverse)

    def _encode(self, tokens: Float[Tensor, "series tokens dim"], series: Series) -> Float[Tensor, "series tokens dim"]:
        if series.complete:
            return self.encoder(tokens)
        seen = series.observed.transpose(1, 2).flatten(0, 1)
        exists = patches(seen, self.patch, self.stride, pad_end=True).any(-1)
        return self.encoder(tokens) if exists.all() else self._encode_packed(tokens, exists)

    @torch.compiler.disable  # how many tokens there are is known only to the data
    def _encode_packed(
        self, tokens: Float[Tensor, "series tokens dim"], exists: Bool[Tensor, "series tokens"]
    ) -> Float[Tensor, "series tokens dim"]:
        """Packed: what does not exist takes no time, and has no part in the statistics of batch norm."""
        encoded = self.encoder(tokens[exists], Sequence.packed(exists.sum(1)))
        return encoded.new_zeros(tokens.shape).masked_scatter(exists[..., None], encoded)
