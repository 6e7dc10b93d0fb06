"""TimeXer: patches of the series that are forecast, beside whole other series."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Rate, Size, check_options, check_size
from .._dropout import Dropout
from .._options import EncoderOptions
from ..blocks import Decoder
from ..domains import Grid, Sequence
from ..masks import Axial, Mask, Segments
from ..positions import Sinusoidal
from ._inputs import ForecastModel, Inputs, Series
from ._parts import instance_norm, patches
from ._variates import VariateTokens, keys_of, segments_in

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TimeXer(ForecastModel):
    """Patches of a series attend to each other, and through a global token to other series (Wang et al. 2024, arXiv:2402.19072).

        tokens_c = [W z_c[p patch : (p + 1) patch] + PE(p) for p], g_c        of each target c, g_c learned
        others   = one token for each exogenous series                          (as in ``ITransformer``)
        each block:   tokens_c attend to tokens_c;  g_c attends to others;  feed-forward
        y_c      = inverse(W_head flatten(encoded tokens_c))

    Attention as masks on the core: the tokens of all targets are a ``Grid(channels, patches + 1)`` with ``Axial(1)``, and in the cross
    attention only global tokens see anything. Which series are exogenous is as in the paper: all covariates and, with more than one
    target or without covariates, the targets (its multivariate mode). Past-only covariates are tokens of their look-back, known-future
    ones of look-back and horizon (the paper's marks: of the look-back), all static ones are one token.

    Different here: the output bias of the cross attention reaches patches too; where ``patch`` does not divide the look-back, the first
    patch is filled up (the authors' code drops the last steps); the forecast has no dropout; and values may be missing. Those are at the
    level of their series; nobody attends to a patch, or an exogenous series, of which nothing was observed.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        patch: steps in a patch.
        dim, depth, heads, hidden: channels, blocks, attention heads, and the width of the feed-forward layers, ``4 * dim`` if not given.
            For ETTh1 and 96 steps the authors use hidden=2048; for electricity prices patch=24, dim=512, depth=3, hidden=512.
        dropout: of tokens, branches and feed-forward layers.
        block: further arguments of ``Decoder``, such as ``{"norm": "pre"}``.

    Example:
        >>> model = TimeXer(1, 168, 24, past=2, patch=24, dim=64, hidden=64)
        >>> model(torch.randn(2, 168, 1 + 2)).shape
        torch.Size([2, 24, 1])
    """

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        patch: Size = 16,
        dim: Size = 256,
        depth: Size = 1,
        heads: Size = 8,
        hidden: Size | None = None,
        dropout: Rate = 0.1,
        block: EncoderOptions | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        count = segments_in(lookback, check_size("patch", patch))
        self.patch, self.grid = patch, Grid(channels, count + 1)
        self.embed = nn.Linear(patch, dim, bias=False)
        self.position = Sinusoidal(dim)
        self.global_token = nn.Parameter(torch.randn(channels, 1, dim))
        covariates = self.past + self.future + self.static
        self.first = 0 if channels > 1 or not covariates else channels  # column of x at which exogenous series begin
        self.variates = VariateTokens(self, channels + self.past - self.first, dim)
        self.dropout = Dropout(dropout)
        options: dict[str, Any] = {
            "norm": "post",
            "final_norm": True,
            **check_options(type(self).__name__, block, EncoderOptions, "block"),
        }
        self.decoder = Decoder(dim, depth, heads, mask=Axial(1), hidden=hidden, dropout=dropout, **options)
        self.project = nn.Linear((count + 1) * dim, horizon * self.head.size)

    def forecast(self, series: Series) -> Any:
        """Normalise, cut, attend, project."""
        z, inverse = instance_norm(series.values, series.observed)
        cut = self._cut(z)
        tokens = self.position(self.embed(cut).flatten(0, 1), Sequence(cut.shape[2])).unflatten(0, cut.shape[:2])
        tokens = torch.cat([tokens, self.global_token.expand(len(z), -1, -1, -1)], 2)
        exists = F.pad(self._cut(series.observed).any(-1), (0, 1), value=True)  # patches, and the global token
        others, known = self.variates(z[..., self.first :], series.observed[..., self.first :], series)
        encoded = self.decoder(
            self.dropout(tokens).flatten(1, 2), self.grid, mask=keys_of(exists.flatten(1)), context=self.dropout(others),
            context_mask=self._global_alone(known),
        )  # fmt: skip
        y = self.project(encoded.unflatten(1, self.grid.sizes).flatten(2))
        y = y.unflatten(2, (self.horizon, -1)).transpose(1, 2)
        return self.head.forecast(y, inverse.first(self.channels))

    def _cut(self, x: Tensor) -> Tensor:
        """(batch, steps, columns) to the patches of the targets, (batch, channels, patches, patch)."""
        targets = x[..., : self.channels].transpose(1, 2)
        return patches(F.pad(targets, (-self.lookback % self.patch, 0)), self.patch, self.patch)

    def _global_alone(self, known: Bool[Tensor, "batch variables"]) -> Mask:
        """The last token of each row of the grid sees the series of which something is known; other tokens see nothing."""
        channels, count = self.grid.sizes
        is_global = (torch.arange(count, device=known.device) == count - 1).long().repeat(channels)
        return Segments(is_global.expand(len(known), -1), torch.where(known, 1, 2))
