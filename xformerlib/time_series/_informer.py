"""Informer: an encoder-decoder Transformer that forecasts all steps at once, with sparse attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Rate, Size, check_size
from .._dropout import Dropout
from ..blocks import Block
from ..domains import Sequence
from ..masks import Keys, Mask
from ..positions import Sinusoidal
from ._convolution import CausalConvolution
from ._inputs import ForecastModel, Inputs, Series
from ._parts import instance_norm
from ._prob_sparse import check_factor, prob_sparse_attention

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Informer(ForecastModel):
    """An encoder of the look-back and a decoder that forecasts all steps at once (Zhou et al. 2020, arXiv:2012.07436).

        context = blocks with ProbSparse attention; between them  max_pool(elu(batch_norm(conv(x))))  halves the steps
        decoder: the last ``label`` steps of the look-back, then 0 for each step of the horizon; causal ProbSparse attention,
                 attention to the context;     y = inverse(W h + b) of the horizon
        a step   = conv(z) + W [future, static] + PE(t)

    ``prob_sparse_attention`` says what it does, and where it differs. Different here, too: convolutions do not go round from the last
    step to the first (that of the embedding looks back alone); series are normalised one by one (the paper: by the whole training
    set); the decoder counts time on from the look-back; covariates take the place of the paper's embeddings of month, day and hour.
    Values may be missing: they are at the level of their series, and steps of which nothing was observed are not attended to. Keys are
    drawn at random in training, and always the same ones in evaluation.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        label: steps of the look-back that the decoder begins with; half of it if not given.
        dim, depth, decoder_depth, heads, hidden: channels, blocks of the encoder and of the decoder, attention heads, and the width of the
            feed-forward layers.
        factor: c of ``prob_sparse_attention``.
        distil: whether the steps are halved from one block of the encoder to the next.
        dropout: of tokens, branches and feed-forward layers.

    Example:
        >>> model = Informer(7, 96, 24, future=4, dim=32, heads=4, hidden=64)
        >>> model(torch.randn(2, 96, 7), future=torch.randn(2, 120, 4)).shape
        torch.Size([2, 24, 7])
    """

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        label: int | None = None,
        dim: Size = 512,
        depth: Size = 2,
        decoder_depth: Size = 1,
        heads: Size = 8,
        hidden: Size = 2048,
        factor: float = 5.0,
        distil: bool = True,
        dropout: Rate = 0.05,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.label = lookback // 2 if label is None else check_size("label", label, least=0)
        if self.label > lookback:
            raise ValueError(f"label must be <= lookback; got label={label} and lookback={lookback}")
        self.factor = check_factor(factor)
        check_size("decoder_depth", decoder_depth)
        self.embed, self.embed_decoder = (_Embedding(self, dim, dropout) for _ in range(2))

        def blocks(count: int, **options: Any) -> nn.ModuleList:
            return nn.ModuleList(
                Block(dim, heads, norm="post", hidden=hidden, dropout=dropout, **options) for _ in range(count)
            )

        self.encoder, self.decoder = blocks(check_size("depth", depth)), blocks(decoder_depth, cross=True)
        self.distil = nn.ModuleList(_Distil(dim) for _ in range(depth - 1)) if distil else None
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.project = nn.Linear(dim, channels * self.head.size)

    def forecast(self, series: Series) -> Any:
        """Normalise, encode, decode all steps at once."""
        z, inverse = instance_norm(series.values, series.observed)
        marks = torch.cat([series.future, series.static[:, None].expand(-1, series.future.shape[1], -1)], -1)
        seen = None if series.complete else series.observed.any(-1)
        context, context_seen = self._encode(self.embed(z, marks[:, : self.lookback], 0), seen)
        first = self.lookback - self.label
        x = self.embed_decoder(F.pad(z[:, first:], (0, 0, 0, self.horizon)), marks[:, first:], first)
        visible = None if seen is None else F.pad(seen[:, first:], (0, self.horizon), value=True)
        mask = None if context_seen is None else Keys(context_seen)
        for block in self.decoder:
            assert isinstance(block, Block)
            x = self._run(block, x, visible, causal=True, context=context, context_mask=mask)
        y = self.project(self.decoder_norm(x[:, self.label :])).unflatten(-1, (self.channels, -1))
        return self.head.forecast(y, inverse.first(self.channels))

    def _encode(self, x: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The context, and of which of its steps something was observed; None where of all."""
        for layer, block in enumerate(self.encoder):
            assert isinstance(block, Block)
            if layer and self.distil is not None:
                x = self.distil[layer - 1](x)
                seen = None if seen is None else _halved(seen.to(x.dtype)) > 0
            x = self._run(block, x, seen, causal=False)
        return self.encoder_norm(x), seen

    def _run(
        self,
        block: Block,
        x: Float[Tensor, "batch steps dim"],
        visible: Bool[Tensor, "batch steps"] | None,
        *,
        causal: bool,
        context: Float[Tensor, "batch context dim"] | None = None,
        context_mask: Mask | None = None,
    ) -> Float[Tensor, "batch steps dim"]:
        """A block, with ProbSparse attention between the projections of its self attention."""
        layer, cross, where = block.attention, block.cross_attention, Sequence(x.shape[1])

        def attend(y: Tensor) -> Tensor:
            q, k, v = layer.qkv(y).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
            heads = prob_sparse_attention(
                q, k, v, factor=self.factor, causal=causal, visible=visible, random=self.training
            )
            return layer.out(heads.transpose(1, 2).flatten(2))

        x = block.attention_residual(x, attend, where)
        if cross is not None and block.cross_residual is not None:
            x = block.cross_residual(x, lambda y: cross(y, context=context, mask=context_mask), where)
        assert block.feed_forward_residual is not None
        return block.feed_forward_residual(x, block.feed_forward, where)


class _Embedding(nn.Module):
    """Steps to tokens: values and their two predecessors, what is known of the step, and its position."""

    def __init__(self, model: ForecastModel, dim: Size, dropout: Rate) -> None:
        super().__init__()
        self.values = CausalConvolution(model.channels + model.past, dim, 3)
        marks = model.future + model.static
        self.marks = nn.Linear(marks, dim) if marks else None
        self.position, self.dropout = Sinusoidal(dim), Dropout(dropout)

    def forward(self, z: Tensor, marks: Tensor, start: int) -> Float[Tensor, "batch steps dim"]:
        x = self.values(z.transpose(1, 2)).transpose(1, 2)
        x = x if self.marks is None else x + self.marks(marks)
        return self.dropout(self.position(x, Sequence(x.shape[1], start=start)))


class _Distil(nn.Module):
    """Halves the steps: convolution, batch norm, ELU, maximum of three steps every two."""

    def __init__(self, dim: Size) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(dim, dim, 3, padding=1), nn.BatchNorm1d(dim)

    def forward(self, x: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch half dim"]:
        return _halved(F.elu(self.norm(self.convolution(x.transpose(1, 2)))).transpose(1, 2))


def _halved(x: Float[Tensor, "batch steps *dim"]) -> Float[Tensor, "batch half *dim"]:
    """The maximum of three steps, every two."""
    steps = x if x.ndim == 2 else x.transpose(1, 2)
    pooled = F.max_pool1d(steps, 3, stride=2, padding=1)
    return pooled if x.ndim == 2 else pooled.transpose(1, 2)
