"""iTransformer: whole series are the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .._arguments import Rate, Size, check_options
from .._dropout import Dropout
from .._options import EncoderOptions
from ..blocks import Encoder
from ._inputs import ForecastModel, Inputs, Series
from ._parts import instance_norm
from ._variates import VariateTokens, keys_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ITransformer(ForecastModel):
    """Each variable's whole look-back is one token; attention is among variables (Liu et al. 2023, arXiv:2310.06625).

        z, inverse = instance_norm(x);   token_c = W z[:, c] + b;   y = inverse(W_out encoder(tokens) + b_out)

    As in the paper: post-norm blocks, no position (variables have no order), the same embedding for all variables of a kind. The paper's
    time marks are tokens too; here every covariate can be: past-only ones as the targets are, known-future ones over look-back and horizon
    (not only the look-back, as the paper's marks), all static ones in one token. A variable of which nothing was observed is attended to
    by nobody, and still gets a forecast from the others. Missing values are at the level of their series.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        dim, depth, heads, hidden: channels, blocks, attention heads, and the width of the feed-forward layers. For ETTh1 the paper uses
            dim=256, depth=2, hidden=256.
        dropout: of tokens, branches and feed-forward layers.
        block: further arguments of ``Encoder``, such as ``{"norm": "pre"}``.

    Example:
        >>> model = ITransformer(7, 96, 24, future=2, dim=64, depth=2, heads=4, hidden=64)
        >>> model(torch.randn(2, 96, 7), future=torch.randn(2, 120, 2)).shape
        torch.Size([2, 24, 7])
    """

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        dim: Size = 512,
        depth: Size = 3,
        heads: Size = 8,
        hidden: Size | None = 512,
        dropout: Rate = 0.1,
        block: EncoderOptions | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.variates = VariateTokens(self, channels + self.past, dim)
        self.dropout = Dropout(dropout)
        # The paper's code has a norm after the last block, although its blocks end in one.
        options: dict[str, Any] = {
            "norm": "post",
            "final_norm": True,
            **check_options(type(self).__name__, block, EncoderOptions, "block"),
        }
        self.encoder = Encoder(dim, depth, heads, hidden=hidden, dropout=dropout, **options)
        self.project = nn.Linear(dim, horizon * self.head.size)

    def forecast(self, series: Series) -> Any:
        """Normalise, embed, attend, project."""
        z, inverse = instance_norm(series.values, series.observed)
        tokens, known = self.variates(z, series.observed, series)
        encoded = self.encoder(self.dropout(tokens), mask=keys_of(known))[:, : self.channels]
        y = self.project(encoded).unflatten(2, (self.horizon, -1)).transpose(1, 2)
        return self.head.forecast(y, inverse.first(self.channels))
