"""Crossformer: segments of all series on a grid, attention along time and along variables in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .._arguments import Rate, Size, check_options, check_size
from .._options import EncoderOptions
from ..blocks import Encoder
from ..domains import Grid
from ..masks import Axial
from ..positions import Learned
from ._inputs import ForecastModel, Inputs, Series
from ._parts import instance_norm
from ._variates import keys_of, segments_in, segments_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Crossformer(ForecastModel):
    """Segments of all variables on a grid; attention along time and along variables, in turn (Zhang and Yan 2023, openreview vSVLM2j9eie).

        token_(v, s) = norm(W z[v, s segment : (s + 1) segment] + position_(v, s)) (+ W_static static)
        one layer:     a block with Axial(1), each variable over time;   a block with Axial(0), each segment over variables
        y_(c, s)     = inverse(W_out token_(c, s) + b_out),   s in the horizon

    The paper's two-stage attention as two masks on ``Grid(variables, segments)`` in one ``Encoder``: post-norm blocks, a learned position
    for each variable and segment. Past-only and known-future covariates are variables of the grid, static ones are added to each token.

    Different here: segments of the horizon stand on the same grid, beginning as their positions alone (the start of the paper's
    decoder), and pass through the same blocks, so that known-future covariates are simply there; without a decoder, and without the
    merging of segments from layer to layer that goes with it. Variables attend to each other directly, not through the paper's
    routers, which save time with hundreds of them. Series are normalised one by one. Values may be missing: they are at the
    level of their series, and nobody attends to a segment of which nothing was observed.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        segment: steps in a segment.
        dim, depth, heads, hidden: channels, layers (of two blocks each), attention heads, and the width of the feed-forward layers.
        dropout: of branches and feed-forward layers.
        block: further arguments of ``Encoder``, such as ``{"norm": "pre"}``.

    Example:
        >>> model = Crossformer(7, 96, 24, future=2, dim=32, depth=2, hidden=64)
        >>> model(torch.randn(2, 96, 7), future=torch.randn(2, 120, 2)).shape
        torch.Size([2, 24, 7])
    """

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        segment: Size = 12,
        dim: Size = 256,
        depth: Size = 3,
        heads: Size = 4,
        hidden: Size | None = 512,
        dropout: Rate = 0.2,
        block: EncoderOptions | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.segment = check_size("segment", segment)
        count = segments_in(lookback, segment) + segments_in(horizon, segment)
        self.grid = Grid(channels + self.past + self.future, count)
        self.embed = nn.Linear(segment, dim, bias=False)
        self.position = Learned(dim, self.grid.sizes)
        self.norm = nn.LayerNorm(dim)
        self.embed_static = nn.Linear(self.static, dim) if self.static else None
        options: dict[str, Any] = {"norm": "post", **check_options(type(self).__name__, block, EncoderOptions, "block")}
        masks = [Axial(1), Axial(0)] * check_size("depth", depth)
        self.encoder = Encoder(dim, 2 * depth, heads, mask=masks, hidden=hidden, dropout=dropout, **options)
        self.project = nn.Linear(dim, segment * self.head.size)

    def forecast(self, series: Series) -> Any:
        """Normalise, cut, attend along both axes, project."""
        z, inverse = instance_norm(series.values, series.observed)
        cut = segments_of(series, z, self.channels, self.horizon, self.segment)
        tokens = self.norm(self.position(self.embed(cut.values).flatten(1, 2), self.grid))
        if self.embed_static is not None:
            tokens = tokens + self.embed_static(series.static)[:, None]
        encoded = self.encoder(tokens, self.grid, mask=keys_of(cut.exists.flatten(1))).unflatten(1, self.grid.sizes)
        ahead = encoded[:, : self.channels, -segments_in(self.horizon, self.segment) :]
        y = self.project(ahead).unflatten(-1, (self.segment, -1)).flatten(2, 3)[:, :, : self.horizon]
        return self.head.forecast(y.transpose(1, 2), inverse.first(self.channels))
