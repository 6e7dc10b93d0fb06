"""Series with holes, filled: what was observed stays, and what is missing is estimated from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence as SequenceOf

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from .._arguments import Rate, Size, check_options, check_size
from .._autograd import is_compiling
from .._dropout import Dropout
from .._options import EncoderOptions
from .._recorded import Recorded
from ..blocks import Encoder
from ..domains import Sequence, Timeline
from ..masks import Keys, Mask
from ..positions import Position, Rotary
from ._checks import check_finite, check_times, check_values, seen_of
from ._losses import mse
from ._parts import Affine, instance_norm


class Imputer(Recorded):
    """Every value of a series, from those that were observed before, after and beside it.

        z, inverse = instance_norm(x);   token_t = W [z_t, missing_t] + b;   y = inverse(W_out Encoder(tokens) + b_out)
        filled     = x where observed, y elsewhere

    The masked imputation task of SAITS (Du et al. 2022, arXiv:2202.08516) and of the Transformer of Zerveas et al. (2020,
    arXiv:2010.02803): in training, some observed values are hidden, and the loss is of these alone (``loss``). Different from SAITS: one
    encoder in place of two whose outputs are weighed, and no second loss that reproduces what it was shown. Its diagonal mask, by which no
    step sees itself, is ``mask=~masks.Local(0)``.

    A step of which nothing was observed is filled from the others, and none of them attends to it. So rows of unequal length may be
    padded with NaN, and a series may be asked for values at ``times`` at which nothing was measured: what is asked changes no answer
    elsewhere. Where nothing at all was observed of a channel, its level is taken to be 0 and its scale 1, the units of standardised data.

    Args:
        channels: values of a step.
        dim, depth, heads, hidden: channels, blocks, attention heads, and the width of the feed-forward layers (``4 * dim`` if not given).
        dropout: of tokens, branches and feed-forward layers.
        mask: who may attend to whom: everybody to every step of which something was observed, if not given.
        position: how tokens know when they are; ``Rotary(dim // heads, theta=1000)`` if not given, which suits series of up to some
            thousand steps, and times in about their units.
        block: further arguments of ``Encoder``, such as ``{"norm_layer": "rms"}``.

    Example:
        >>> x = torch.randn(8, 96, 3)
        >>> x[:, 40:50, 0] = torch.nan
        >>> model = Imputer(3, dim=32)
        >>> model.loss(x).backward()
        >>> filled = model(x)
        >>> filled.isnan().any().item(), torch.equal(filled[:, :, 1:], x[:, :, 1:])
        (False, True)
    """

    def __init__(
        self,
        channels: Size,
        *,
        dim: Size = 64,
        depth: Size = 2,
        heads: Size = 4,
        hidden: Size | None = None,
        dropout: Rate = 0.1,
        mask: Mask | SequenceOf[Mask | None] | None = None,
        position: Position | Callable[[], Position] | None = None,
        block: EncoderOptions | None = None,
    ) -> None:
        super().__init__()
        self.channels = check_size("channels", channels)
        self.embed = nn.Linear(2 * channels, check_size("dim", dim))
        position = Rotary(dim // heads, theta=1000.0) if position is None else position
        options = check_options(type(self).__name__, block, EncoderOptions, "block")
        self.encoder = Encoder(
            dim,
            depth,
            heads,
            mask=mask,
            position=position,
            hidden=hidden,
            dropout=dropout,
            **options,
        )
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(dim, channels)

    def forward(
        self,
        x: Float[Tensor, "batch steps channels"],
        observed: Bool[Tensor, "batch steps channels"] | None = None,
        times: Shaped[Tensor, "*batch steps"] | None = None,
    ) -> Float[Tensor, "batch steps channels"]:
        """``x`` with every missing value filled; what was observed is returned as it came.

        Args:
            x: NaN is a missing value.
            observed: False where a value is missing, besides NaN; what stands there changes nothing.
            times: of the steps, (L,) or one row for each series; they need not be regular. Steps are counted unless given.

        Raises:
            ValueError, TypeError: an input that does not fit what was declared, or the others.
        """
        seen = self._check(x, observed)
        return torch.where(seen, x, self._estimates(x, seen, times))

    def loss(
        self,
        x: Float[Tensor, "batch steps channels"],
        *,
        observed: Bool[Tensor, "batch steps channels"] | None = None,
        times: Shaped[Tensor, "*batch steps"] | None = None,
        share: float = 0.2,
        hidden: Bool[Tensor, "batch steps channels"] | None = None,
    ) -> Float[Tensor, ""]:
        """The squared error of observed values that the model is not shown, in units of each series' own scale.

            mean over hidden (b, t, c) of ((y - x) / scale_bc)^2,   scale as in ``instance_norm`` of all that was observed

        Args:
            x, observed, times: as in a call.
            share: of the observed values, drawn at random, that are hidden.
            hidden: which ones are hidden instead, where the data will miss them in another pattern (whole stretches, whole channels).
        """
        seen = self._check(x, observed)
        if hidden is None:
            if not 0 < share < 1:
                raise ValueError(f"share must be in (0, 1); got share={share}")
            hidden = torch.rand(x.shape, device=x.device) < share
        elif not isinstance(hidden, Tensor) or hidden.dtype != torch.bool or hidden.shape != x.shape:
            raise ValueError(f"hidden must be a bool tensor in the shape of x, {tuple(x.shape)}; got {hidden}")
        units = instance_norm(x, seen)[1].scale
        error = (self._estimates(x, seen & ~hidden, times) - x.masked_fill(~seen, 0)) / units
        return mse(error, torch.zeros_like(error), seen & hidden)

    def _check(self, x: Tensor, observed: Tensor | None) -> Bool[Tensor, "batch steps channels"]:
        check_values(x)
        if x.ndim != 3 or x.shape[2] != self.channels:
            raise ValueError(f"x must be (batch, steps, {self.channels}); got {tuple(x.shape)}")
        return seen_of(x, observed)

    def _estimates(self, x: Tensor, seen: Tensor, times: Tensor | None) -> Float[Tensor, "batch steps channels"]:
        """What the model takes every value to be, from those seen."""
        z, inverse = instance_norm(x, seen)
        inverse = Affine(inverse.level, inverse.scale.masked_fill(~seen.any(1, keepdim=True), 1))
        tokens = self.dropout(self.embed(torch.cat([z, (~seen).to(z.dtype)], -1)))
        told = seen.any(-1)  # the steps that have something to tell
        whole = told.is_meta or (not is_compiling() and bool(told.all()))
        encoded = self.encoder(tokens, _domain(x, times), mask=None if whole else Keys(told))
        return inverse(self.output(encoded))


def _domain(x: Tensor, times: Tensor | None) -> Sequence | Timeline:
    """Where the steps live."""
    if times is None:
        return Sequence(x.shape[1])
    check_times(times)
    if times.shape not in (x.shape[:2], x.shape[1:2]):
        raise ValueError(
            f"times must be {tuple(x.shape[:2])} or {tuple(x.shape[1:2])}, one for each step of x; got {tuple(times.shape)}"
        )
    check_finite("times", times)
    return Timeline(times)
