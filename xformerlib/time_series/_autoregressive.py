"""Transformers that forecast one step after the other, with the keys and values of earlier steps in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .._cache import Cache
from ..blocks import Block, Decoder, EncoderDecoder
from ..domains import Sequence
from ..masks import Keys, Mask
from ..positions import Sinusoidal
from ._checks import check_size
from ._inputs import Inputs
from ._steps import Advance, Steps, StepwiseModel, width_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CausalTransformer(StepwiseModel):
    """A decoder-only Transformer: each step attends to itself and those before it, and forecasts the next.

        h = Decoder(E [x_t, observed_t, future_(t+1), static] + PE(t)),   y_(t+1) = W h_t + b

    The masked self-attention of Vaswani et al. (2017, arXiv:1706.03762) with their sinusoids PE, in pre-norm blocks as in GPT-2. A step's
    way to any later one is one attention long. Series are normalised one by one (``instance_norm``) by their look-back. Steps of which
    nothing was observed are not attended to.

    Any length of look-back works. Steps are numbered so that the horizon begins at ``lookback``: a shorter look-back is the same as
    one that is missing in front. Calls as in ``StepwiseModel``; without ``target``, each step is computed once (``Cache``).

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        dim, depth, heads: channels, blocks, attention heads.
        hidden: channels inside the feed-forward layers; ``4 * dim`` if not given.
        dropout: after each branch of a block, in training.

    Example:
        >>> model, y = CausalTransformer(3, 96, 24), torch.randn(8, 24, 3)
        >>> model(torch.randn(8, 96, 3), target=y).shape, model(torch.randn(8, 96, 3)).shape
        (torch.Size([8, 24, 3]), torch.Size([8, 24, 3]))
    """

    def __init__(
        self,
        channels: int,
        lookback: int,
        horizon: int,
        *,
        dim: int = 64,
        depth: int = 3,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.1,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.embed = nn.Linear(width_of(self), check_size("dim", dim))
        self.decoder = Decoder(dim, depth, heads, cross=False, position=Sinusoidal(dim), hidden=hidden, dropout=dropout)
        self.output = nn.Linear(dim, channels * self.head.size)

    def hidden(self, steps: Steps, later: Float[Tensor, "batch later width"]) -> Float[Tensor, "batch horizon dim"]:
        lookback = steps.vectors.shape[1]
        tokens = self.embed(torch.cat([steps.vectors, later], 1))
        domain = Sequence(tokens.shape[1], start=_start(self, steps))
        return self.decoder(tokens, domain, mask=_seen(steps, tokens.shape[1]))[:, lookback - 1 :]

    def start(self, steps: Steps, samples: int) -> tuple[Float[Tensor, "batch 1 dim"], Advance]:
        lookback, start = steps.vectors.shape[1], _start(self, steps)
        cache, mask = Cache(), _seen(steps, lookback)
        tokens = self.embed(steps.vectors)
        hidden = self.decoder(tokens, Sequence(lookback, start=start), mask=mask, cache=cache)[:, -1:]
        if samples > 1:
            cache, steps = cache.repeated(samples), steps.repeated(samples)
        count = lookback

        def advance(vector: Tensor) -> Tensor:
            nonlocal count
            here, count = Sequence(1, start=start + count), count + 1
            return self.decoder(self.embed(vector), here, mask=_seen(steps, count), cache=cache)

        return hidden.repeat_interleave(samples, 0), advance


class EncoderDecoderTransformer(StepwiseModel):
    """The Transformer of Vaswani et al. (2017, arXiv:1706.03762) on numbers: the look-back is encoded, the horizon decoded beside it.

        context = Encoder(E [x_t, observed_t, future_(t+1), static] + PE(t)),  t <= L
        h       = Decoder(E [...] + PE(t), context),  t >= L,     y_(t+1) = W h_t + b

    The decoder begins with the last step of the look-back, where the paper has a start symbol, and shares E with the encoder. The
    defaults of the blocks are the paper's: post-norm, ReLU, dropout 0.1. Series are normalised one by one (``instance_norm``) by their
    look-back. Steps of the look-back of which nothing was observed are not attended to.

    Any length of look-back works. Steps are numbered so that the horizon begins at ``lookback``: a shorter look-back is the same as
    one that is missing in front. Calls as in ``StepwiseModel``; without ``target``, the look-back is encoded once and each step decoded
    once (``Cache``); all samples of a series share the keys and values of its context.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        dim, depth, heads: channels, blocks of the encoder and of the decoder, attention heads.
        hidden: channels inside the feed-forward layers; ``4 * dim`` if not given.
        dropout: after each branch of a block, in training.

    Example:
        >>> from xformerlib.time_series import StudentT
        >>> model = EncoderDecoderTransformer(3, 96, 24, head=StudentT()).eval()
        >>> model(torch.randn(8, 96, 3)).mean.shape, model.sample(torch.randn(8, 96, 3), 100).shape
        (torch.Size([8, 24, 3]), torch.Size([100, 8, 24, 3]))
    """

    def __init__(
        self,
        channels: int,
        lookback: int,
        horizon: int,
        *,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.1,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.embed = nn.Linear(width_of(self), check_size("dim", dim))
        self.transformer = EncoderDecoder(
            dim, heads, encoder_depth=depth, decoder_depth=depth, position=Sinusoidal(dim), hidden=hidden, dropout=dropout
        )  # fmt: skip
        self.output = nn.Linear(dim, channels * self.head.size)

    def hidden(self, steps: Steps, later: Float[Tensor, "batch later width"]) -> Float[Tensor, "batch horizon dim"]:
        tokens = torch.cat([steps.vectors[:, -1:], later], 1)
        domain = Sequence(tokens.shape[1], start=_start(self, steps) + steps.vectors.shape[1] - 1)
        source, seen = self._source(steps), _seen(steps, steps.vectors.shape[1])
        return self.transformer(
            self.embed(steps.vectors), self.embed(tokens), source, domain, source_mask=seen, context_mask=seen
        )

    def start(self, steps: Steps, samples: int) -> tuple[Float[Tensor, "batch 1 dim"], Advance]:
        source, seen = self._source(steps), _seen(steps, steps.vectors.shape[1])
        context = self.transformer.encoder(self.embed(steps.vectors), source, mask=seen)
        cache, first = Cache(), source.start + source.length - 1
        hidden = self.transformer.decoder(
            self.embed(steps.vectors[:, -1:]), Sequence(1, start=first), context=context, context_domain=source,
            context_mask=seen, cache=cache,
        )  # fmt: skip
        cache = cache if samples == 1 else cache.repeated(samples)
        count = 0

        def advance(vector: Tensor) -> Tensor:
            nonlocal count
            count += 1
            here, decoder = Sequence(1, start=first + count), self.transformer.decoder
            if samples == 1:
                return decoder(self.embed(vector), here, context_mask=seen, cache=cache)
            assert decoder.position is not None
            x = self.embed(vector)
            for embedding in decoder.position.embeddings:
                x = embedding(x, here)
            for block in decoder.blocks:
                assert isinstance(block, Block)
                x = _shared_step(block, x, here, seen, cache, samples)
            return decoder.norm(x)

        return hidden.repeat_interleave(samples, 0), advance

    def _source(self, steps: Steps) -> Sequence:
        return Sequence(steps.vectors.shape[1], start=_start(self, steps))


def _shared_step(
    block: Block, x: Float[Tensor, "rows 1 dim"], here: Sequence, seen: Mask | None, cache: Cache, samples: int
) -> Float[Tensor, "rows 1 dim"]:
    """One step of a decoder block on all samples, which are so many queries of one context in cross attention: its keys stand once.

    They may, since the block's cross attention has no mask or position that tells queries apart.
    """
    cross, residual, feed_forward = block.cross_attention, block.cross_residual, block.feed_forward_residual
    assert cross is not None and residual is not None and feed_forward is not None
    together = Sequence(samples)

    def attend(y: Tensor) -> Tensor:
        queries = y.unflatten(0, (-1, samples)).squeeze(2)
        return cross(queries, together, mask=seen, cache=cache).flatten(0, 1)[:, None]

    x = block.attention_residual(x, lambda y: block.attention(y, here, cache=cache), here)
    x = residual(x, attend, here)
    return feed_forward(x, block.feed_forward, here)


def _start(model: StepwiseModel, steps: Steps) -> int:
    """The position of the first step, such that the horizon begins at the declared look-back."""
    return max(model.lookback - steps.vectors.shape[1], 0)


def _seen(steps: Steps, count: int) -> Mask | None:
    """Which of the first ``count`` steps may be attended to: those of which something was observed, and those of the horizon."""
    if steps.complete:
        return None
    seen: Bool[Tensor, "batch count"] = nn.functional.pad(steps.seen, (0, count - steps.seen.shape[1]), value=True)
    return Keys(seen)
