"""PatchTST: patches of one series are the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .._arguments import Rate, Size, check_options, check_size
from .._autograd import is_compiling
from .._dropout import Dropout
from .._inputs import check_values
from .._options import EncoderOptions
from .._sublayers import TokenNorm
from ..blocks import Encoder
from ..domains import Domain, Sequence, Timeline
from ..masks import Keys
from ..positions import Learned
from ._inputs import ForecastModel, Inputs, Series
from ._parts import instance_norm, patches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TokenBatchNorm(nn.BatchNorm1d, TokenNorm):
    """Batch normalisation of each channel over all tokens, (B, T, C) or (N, C), as PatchTST has it in place of layer norm.

    Given a domain, which blocks do, tokens that do not exist are left out of the statistics.

    Example:
        >>> TokenBatchNorm(8)(torch.randn(4, 42, 8)).shape
        torch.Size([4, 42, 8])
    """

    def forward(self, x: Float[Tensor, "*batch dim"], domain: Domain | None = None) -> Float[Tensor, "*batch dim"]:
        """Normalise; in evaluation by running statistics, so that no item depends on another."""
        check_values("x", x)
        if x.ndim == 0 or x.shape[-1] != self.num_features:
            raise ValueError(f"x must have {self.num_features} channels on its last axis; got {tuple(x.shape)}")
        valid = None if domain is None else domain.valid
        if valid is None or not (self.training or self.running_mean is None):
            return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)
        # How many tokens exist is known only to the data, so that they are weighted, not picked: a compiled graph holds this.
        exists = valid[..., None].to(x.dtype)
        count = exists.sum()
        mean = x.masked_fill(~valid[..., None], 0).sum((0, 1)) / count.clamp(min=1)
        centred = (x - mean).masked_fill(~valid[..., None], 0)
        square = centred.square().sum((0, 1))
        if self.training:
            self._track(mean, square / (count - 1).clamp(min=1), count > 0)
        normal = centred * (square / count.clamp(min=1) + self.eps).rsqrt()
        return normal * self.weight + self.bias * exists if self.affine else normal

    @torch.no_grad()
    def _track(self, mean: Float[Tensor, " dim"], var: Float[Tensor, " dim"], any_exists: Bool[Tensor, ""]) -> None:
        """Take the statistics of a batch into the running ones, if there are any, unless it is empty."""
        batches = self.num_batches_tracked
        if batches is None:
            return
        batches += any_exists
        share = any_exists * (1 / batches.clamp(min=1) if self.momentum is None else self.momentum)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            if running is not None:
                running += share * (new.to(running.dtype) - running)


class _Patches(Sequence):
    """Patches in order, some of which do not exist."""

    def __init__(self, exists: Bool[Tensor, "series patches"]) -> None:
        super().__init__(exists.shape[1])
        self.valid, self._batch_size, self._device = exists, exists.shape[0], exists.device

    def _value(self) -> None:
        return None


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
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        patch: Size = 16,
        stride: Size = 8,
        dim: Size = 128,
        depth: Size = 3,
        heads: Size = 16,
        hidden: Size | None = 256,
        dropout: Rate = 0.2,
        head_dropout: Rate = 0.0,
        block: EncoderOptions | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.patch, self.stride = check_size("patch", patch), check_size("stride", stride)
        if patch > lookback:
            raise ValueError(f"patch must be <= lookback; got patch={patch} and lookback={lookback}")
        if stride > patch:
            raise ValueError(
                f"stride must be <= patch, or steps between patches are lost; got stride={stride} and patch={patch}"
            )
        tokens = (lookback - patch) // stride + 2
        self.embed = nn.Linear(patch, dim)
        self.position = Learned(dim, tokens)
        self.dropout = Dropout(dropout)
        options: dict[str, Any] = {
            "norm": "post",
            "norm_layer": TokenBatchNorm,
            **check_options(type(self).__name__, block, EncoderOptions, "block"),
        }
        self.encoder = Encoder(dim, depth, heads, hidden=hidden, dropout=dropout, **options)
        self.head_dropout = Dropout(head_dropout)
        self.project = nn.Linear(tokens * dim, horizon * self.head.size)

    def forecast(self, series: Series) -> Any:
        """Normalise, cut, attend, project."""
        z, inverse = instance_norm(series.values, series.observed)
        tokens = self.encode(z, series.observed)
        y = self.project(self.head_dropout(tokens.flatten(1)))
        y = y.view(-1, self.channels, self.horizon, self.head.size).transpose(1, 2)
        return self.head.forecast(y, inverse)

    def encode(
        self, z: Float[Tensor, "batch lookback channels"], observed: Bool[Tensor, "batch lookback channels"]
    ) -> Float[Tensor, "series tokens dim"]:
        """What the encoder makes of the patches of normalised values: one row for each channel of each series, 0 where no patch exists."""
        cut = patches(z.transpose(1, 2).flatten(0, 1), self.patch, self.stride, pad_end=True)
        tokens = self.dropout(self.position(self.embed(cut), Sequence(cut.shape[1])))
        if z.is_meta or (not is_compiling() and observed.all()):
            return self.encoder(tokens)
        seen = patches(observed.transpose(1, 2).flatten(0, 1), self.patch, self.stride, pad_end=True)
        exists = seen.any(-1)
        if is_compiling():
            # How many exist is known only to the data. A graph knows a domain by its sizes alone, and of a mask the tensors too.
            return self.encoder(tokens, _Patches(exists), mask=Keys(exists))
        if exists.all():
            return self.encoder(tokens)
        series, place = exists.nonzero(as_tuple=True)
        encoded = self.encoder(tokens[series, place], Timeline.packed(place, exists.sum(1)))
        return encoded.new_zeros(tokens.shape).masked_scatter(exists[..., None], encoded)
