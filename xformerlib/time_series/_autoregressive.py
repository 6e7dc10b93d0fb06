"""Transformers that forecast one step after the other, with the keys and values of earlier steps in a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .._arguments import Rate, Size, check_size
from .._cache import Cache
from .._inputs import check_mask
from ..attention import Attention
from ..blocks import Block, Decoder, EncoderDecoder
from ..domains import Domain, Sequence, Timeline
from ..masks import Causal, Keys, Mask
from ..positions import Position, Sinusoidal
from ._inputs import Inputs
from ._steps import Advance, Steps, StepwiseModel, width_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CausalTransformer(StepwiseModel):
    """A decoder-only Transformer: each step attends to itself and those before it, and forecasts the next.

        h = Decoder(E [x_t, observed_t, future_(t+1), static, gap_(t+1)] + PE(t)),   y_(t+1) = W h_t + b
        gap_t = log(1 + time_t - time_(t-1))

    The masked self-attention of Vaswani et al. (2017, arXiv:1706.03762) with their sinusoids PE, in pre-norm blocks as in GPT-2. A step's
    way to any later one is one attention long. Series are normalised one by one (``instance_norm``) by their look-back. Steps of which
    nothing was observed are not attended to.

    Any length of look-back works. Steps are numbered so that the horizon begins at ``lookback``: a shorter look-back is the same as
    one that is missing in front. Calls as in ``StepwiseModel``; without ``target``, each step is computed once (``Cache``).

    With ``times`` steps stand at real times, which count from the last step of the look-back, and each also knows how long it is to the
    next: the times 0, 1, 2, ... are the same as none, and a shift of all changes nothing.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        dim, depth, heads: channels, blocks, attention heads.
        hidden: channels inside the feed-forward layers; ``4 * dim`` if not given.
        dropout: after each branch of a block, in training.
        mask: further restricts which earlier steps a step attends to, such as ``masks.Local(24)``: in steps, or in units of ``times``.
        position: how steps know where they are, such as ``positions.Rotary(dim // heads)`` or ``positions.DistanceDecay(heads)``, or a
            function that makes one for each block; ``positions.Sinusoidal(dim)`` if not given.

    Example:
        >>> model, y = CausalTransformer(3, 96, 24), torch.randn(8, 24, 3)
        >>> model(torch.randn(8, 96, 3), target=y).shape, model(torch.randn(8, 96, 3)).shape
        (torch.Size([8, 24, 3]), torch.Size([8, 24, 3]))
    """

    takes: ClassVar[frozenset[str]] = StepwiseModel.takes | {"times"}

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        dim: Size = 64,
        depth: Size = 3,
        heads: Size = 4,
        hidden: Size | None = None,
        dropout: Rate = 0.1,
        mask: Mask | None = None,
        position: Position | Callable[[], Position] | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.embed = nn.Linear(width_of(self), check_size("dim", dim))
        self.decoder = Decoder(
            dim, depth, heads, cross=False, mask=_causal(mask), position=Sinusoidal(dim) if position is None else position,
            hidden=hidden, dropout=dropout,
        )  # fmt: skip
        self.output = nn.Linear(dim, channels * self.head.size)

    def hidden(self, steps: Steps, later: Float[Tensor, "batch later width"]) -> Float[Tensor, "batch horizon dim"]:
        lookback = steps.vectors.shape[1]
        tokens = self.embed(torch.cat([steps.vectors, later], 1))
        where = _place(self, steps, 0, tokens.shape[1])
        asked = tokens.shape[1] - lookback + 1
        return self.decoder(tokens, where, mask=_seen(steps, tokens.shape[1]), last=asked)

    def start(self, steps: Steps, samples: int) -> tuple[Float[Tensor, "batch 1 dim"], Advance]:
        count = steps.vectors.shape[1]
        cache, mask = Cache(), _seen(steps, count)
        tokens = self.embed(steps.vectors)
        hidden = self.decoder(tokens, _place(self, steps, 0, count), mask=mask, cache=cache, last=1)
        if samples > 1:
            cache, steps = cache.repeated(samples), steps.repeated(samples)

        def advance(vector: Tensor) -> Tensor:
            nonlocal count
            here, count = _place(self, steps, count, 1), count + 1
            return self.decoder(self.embed(vector), here, mask=_seen(steps, count), cache=cache)

        return hidden.repeat_interleave(samples, 0), advance


class EncoderDecoderTransformer(StepwiseModel):
    """The Transformer of Vaswani et al. (2017, arXiv:1706.03762) on numbers: the look-back is encoded, the horizon decoded beside it.

        context = Encoder(E [x_t, observed_t, future_(t+1), static, gap_(t+1)] + PE(t)),  t <= L
        h       = Decoder(E [...] + PE(t), context),  t >= L,     y_(t+1) = W h_t + b

    The decoder begins with the last step of the look-back, where the paper has a start symbol, and shares E with the encoder. The
    defaults of the blocks are the paper's: post-norm, ReLU, dropout 0.1. Series are normalised one by one (``instance_norm``) by their
    look-back. Steps of the look-back of which nothing was observed are not attended to.

    Any length of look-back works. Steps are numbered so that the horizon begins at ``lookback``: a shorter look-back is the same as
    one that is missing in front. Calls as in ``StepwiseModel``; without ``target``, the look-back is encoded once and each step decoded
    once (``Cache``); all samples of a series share the keys and values of its context. Times as in ``CausalTransformer``.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        dim, depth, heads: channels, blocks of the encoder and of the decoder, attention heads.
        hidden: channels inside the feed-forward layers; ``4 * dim`` if not given.
        dropout: after each branch of a block, in training.
        mask: further restricts which steps of its own sequence a step of the look-back or the horizon attends to, such as
            ``masks.Local(24)``: in steps, or in units of ``times``. What is decoded attends to the whole look-back.
        position: how steps know where they are, such as ``positions.Rotary(dim // heads)`` or ``positions.DistanceDecay(heads)``, or a
            function that makes one for each block; ``positions.Sinusoidal(dim)`` if not given.

    Example:
        >>> from xformerlib.time_series import StudentT
        >>> model = EncoderDecoderTransformer(3, 96, 24, head=StudentT()).eval()
        >>> model(torch.randn(8, 96, 3)).mean.shape, model.sample(torch.randn(8, 96, 3), 100).shape
        (torch.Size([8, 24, 3]), torch.Size([100, 8, 24, 3]))
    """

    takes: ClassVar[frozenset[str]] = StepwiseModel.takes | {"times"}

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        dim: Size = 64,
        depth: Size = 2,
        heads: Size = 4,
        hidden: Size | None = None,
        dropout: Rate = 0.1,
        mask: Mask | None = None,
        position: Position | Callable[[], Position] | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.embed = nn.Linear(width_of(self), check_size("dim", dim))
        self.transformer = EncoderDecoder(
            dim, heads, encoder_depth=depth, decoder_depth=depth, mask=mask, decoder_mask=_causal(mask),
            position=Sinusoidal(dim) if position is None else position, hidden=hidden, dropout=dropout,
        )  # fmt: skip
        self.output = nn.Linear(dim, channels * self.head.size)

    def hidden(self, steps: Steps, later: Float[Tensor, "batch later width"]) -> Float[Tensor, "batch horizon dim"]:
        lookback = steps.vectors.shape[1]
        tokens = torch.cat([steps.vectors[:, -1:], later], 1)
        source, where = _place(self, steps, 0, lookback), _place(self, steps, lookback - 1, tokens.shape[1])
        seen = _seen(steps, lookback)
        return self.transformer(
            self.embed(steps.vectors), self.embed(tokens), source, where, source_mask=seen, context_mask=seen
        )

    def start(self, steps: Steps, samples: int) -> tuple[Float[Tensor, "batch 1 dim"], Advance]:
        at = steps.vectors.shape[1] - 1
        source, seen = _place(self, steps, 0, at + 1), _seen(steps, at + 1)
        context = self.transformer.encoder(self.embed(steps.vectors), source, mask=seen)
        cache, decoder = Cache(), self.transformer.decoder
        hidden = decoder(
            self.embed(steps.vectors[:, -1:]), _place(self, steps, at, 1), context=context, context_domain=source,
            context_mask=seen, cache=cache,
        )  # fmt: skip
        if samples > 1:
            cache, steps = cache.repeated(samples), steps.repeated(samples)

        def advance(vector: Tensor) -> Tensor:
            nonlocal at
            at += 1
            here = _place(self, steps, at, 1)
            if samples == 1:
                return decoder(self.embed(vector), here, context_mask=seen, cache=cache)
            return _shared_step(decoder, self.embed(vector), here, seen, cache, samples)

        return hidden.repeat_interleave(samples, 0), advance


def _shared_step(
    decoder: Decoder, x: Float[Tensor, "rows 1 dim"], here: Domain, seen: Mask | None, cache: Cache, samples: int
) -> Float[Tensor, "rows 1 dim"]:
    """One step of a decoder on all samples, which are so many queries of one context in cross attention: its keys stand once.

    They may, since the cross attention of blocks has no mask or position that tells queries apart.
    """
    together = Sequence(samples)
    for embedding in () if decoder.position is None else decoder.position.embeddings:
        x = embedding(x, here)
    for block in decoder.blocks:
        assert isinstance(block, Block)
        cross, residual, feed_forward = block.cross_attention, block.cross_residual, block.feed_forward_residual
        assert cross is not None and residual is not None and feed_forward is not None
        own = partial(block.attention, domain=here, position=decoder.position, cache=cache)

        def attend(y: Tensor, cross: Attention = cross) -> Tensor:
            queries = y.unflatten(0, (-1, samples)).squeeze(2)
            return cross(queries, together, mask=seen, cache=cache).flatten(0, 1)[:, None]

        x = block.attention_residual(x, own, here)
        x = residual(x, attend, here)
        x = feed_forward(x, block.feed_forward, here)
    return decoder.norm(x)


def _causal(mask: Mask | None) -> Mask:
    return Causal() if mask is None else Causal() & check_mask(mask)


def _place(model: StepwiseModel, steps: Steps, first: int, count: int) -> Sequence | Timeline:
    """Where ``count`` steps from ``first`` on are: at their times, or numbered such that the horizon begins at the declared look-back."""
    if steps.times is not None:
        return Timeline(steps.times[..., first : first + count])
    return Sequence(count, start=max(model.lookback - steps.vectors.shape[1], 0) + first)


def _seen(steps: Steps, count: int) -> Mask | None:
    """Which of the first ``count`` steps may be attended to: those of which something was observed, and those of the horizon."""
    if steps.complete:
        return None
    seen: Bool[Tensor, "batch count"] = nn.functional.pad(steps.seen, (0, count - steps.seen.shape[1]), value=True)
    return Keys(seen)
