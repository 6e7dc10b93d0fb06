"""Which class a series is of: an encoder over its steps, as many as there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence as SequenceOf
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from .._arguments import Rate, Size, check_options, check_size
from .._dropout import Dropout
from .._options import EncoderOptions
from .._pooling import Pooling
from .._recorded import Recorded
from ..blocks import Encoder
from ..masks import Mask
from ..positions import Position, Rotary
from ._inputs import covariates
from ._packed import packed
from ._pooling import AttentionPooling

Pool = Literal["mean", "max", "attention"]


class SeriesClassifier(Recorded):
    """The class of a whole series, from an encoder over its steps and a pool over what it makes of them.

        token_p = W [x_p, missing_p] + b,   h = Encoder(tokens),   logits = W_out [pool_p(h_p), static] + b_out

    The Transformer classifier of Zerveas et al. (2020, arXiv:2010.02803). Different from there: blocks are pre-norm with layer norm;
    positions are rotations by time; tokens are pooled, where theirs are padded to one length and put side by side in one linear map, so
    that here series of any length have the same weights. With ``patch`` steps in a token (Nie et al. 2022, arXiv:2211.14730, not
    overlapping) a long series is a short sequence.

    **Unequal lengths** take no padding work. ``x`` is rows (B, L, C), of which ``lengths`` says how many steps exist; or series one behind
    the other (N, C), with ``lengths``. Steps of which nothing was observed do not exist: rows that are padded with NaN need no ``lengths``,
    and a hole takes no work. The logits of a series do not depend on the others, nor on the padding.

    **Times**, if given, are where tokens live: rotations, decay and ``Local`` then mean spans of time, from step to step regular or not;
    otherwise they count steps. A patch stands at the time of its first step.

    Series are not normalised one by one: unlike in forecasting, level and scale often tell classes apart. Standardise by the training
    set, or give ``instance_norm(x)[0]`` where they must not matter.

    Args:
        channels: values of a step.
        classes: logits of a series, for ``cross_entropy``. One number for each series is as good for regression.
        patch: steps in a token.
        dim, depth, heads, hidden: channels, blocks, attention heads, and the width of the feed-forward layers (``4 * dim`` if not given).
        dropout: of tokens, branches and feed-forward layers, and of what is pooled.
        pool: ``"mean"``, ``"max"``, or ``"attention"`` (``AttentionPooling``).
        mask: who may attend to whom, on a ``Timeline``: everybody to everybody if not given.
        position: how tokens know when they are; ``Rotary(dim // heads, scale=1 / patch)`` if not given, which suits times that count
            steps. In other units, ``scale`` is one over the time between tokens.
        static: numbers that are known of a series beside its steps.
        block: further arguments of ``Encoder``, such as ``{"norm_layer": "rms"}``.

    Example:
        >>> model = SeriesClassifier(12, 9, dim=32, depth=2)
        >>> utterances = [torch.randn(n, 12) for n in (7, 29, 15)]
        >>> model(torch.cat(utterances), lengths=[7, 29, 15]).shape
        torch.Size([3, 9])
        >>> padded = torch.nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=torch.nan)
        >>> torch.allclose(model.eval()(padded), model(torch.cat(utterances), lengths=[7, 29, 15]), atol=1e-5)
        True
    """

    def __init__(
        self,
        channels: Size,
        classes: Size,
        *,
        patch: Size = 1,
        dim: Size = 64,
        depth: Size = 3,
        heads: Size = 4,
        hidden: Size | None = None,
        dropout: Rate = 0.1,
        pool: Pool = "mean",
        mask: Mask | SequenceOf[Mask | None] | None = None,
        position: Position | Callable[[], Position] | None = None,
        static: int = 0,
        block: EncoderOptions | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.classes = check_size("channels", channels), check_size("classes", classes)
        self.patch, self.static = check_size("patch", patch), check_size("static", static, least=0)
        self.embed = nn.Linear(2 * patch * channels, check_size("dim", dim))
        position = Rotary(dim // heads, scale=1 / patch) if position is None else position
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
        if pool not in get_args(Pool):
            raise ValueError(f"pool must be one of {', '.join(map(repr, get_args(Pool)))}; got pool={pool!r}")
        self.pooling = AttentionPooling(dim) if pool == "attention" else Pooling(dim, pool)
        self.output = nn.Linear(dim + static, classes)

    def forward(
        self,
        x: Float[Tensor, "*batch steps channels"],
        observed: Bool[Tensor, "*batch steps channels"] | None = None,
        times: Shaped[Tensor, "*steps"] | None = None,
        lengths: SequenceOf[int] | Int[Tensor, " series"] | None = None,
        static: Shaped[Tensor, "series constants"] | None = None,
    ) -> Float[Tensor, "series classes"]:
        """The logits of each series.

        Args:
            x: (B, L, channels), or packed (N, channels). NaN is a missing value.
            observed: False where a value is missing, besides NaN; what stands there changes nothing.
            times: of the steps, in the shape of ``x`` without channels, or (L,) for all rows. They need not be regular.
            lengths: steps of each series: those in front of its row (all if not given), or how packed ``x`` is shared out.
            static: (B, static), each value known.

        Raises:
            ValueError, TypeError: an input that does not fit what was declared, or the others.
        """
        tokens = packed(x, self.channels, observed, times, lengths).patches(self.patch).existing()
        missing = (~tokens.observed).to(tokens.values.dtype)
        embedded = self.embed(torch.cat([tokens.values, missing], -1).flatten(1))
        domain = tokens.domain
        encoded = self.encoder(self.dropout(embedded), domain)
        known = covariates(type(self).__name__, "static", static, (len(tokens.lengths), self.static), x)
        if isinstance(self.pooling, AttentionPooling):
            pooled = self.pooling(encoded, lengths=tokens.lengths)
        else:
            pooled = self.pooling(encoded, domain)
        return self.output(torch.cat([self.dropout(pooled), known], 1))
