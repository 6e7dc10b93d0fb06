"""Causal dilated convolutions: the temporal convolutional network, and WaveNet with queues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .._arguments import Rate, Size, check_size, shown
from .._dropout import Dropout
from ._inputs import ForecastModel, Inputs, Series
from ._steps import Advance, DirectOutput, Steps, StepwiseModel, steps_of, width_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CausalConvolution(nn.Conv1d):
    """A convolution that sees a step and those before it, ``dilation`` steps apart: zeros stand before the first step.

        y_t = b + sum_(i < kernel_size) W_i x_(t - (kernel_size - 1 - i) dilation)

    Args:
        inputs, outputs: channels.
        kernel_size: taps; with 1, a linear map of each step.
        dilation: steps between taps.

    Shapes:
        (B, inputs, T) to (B, outputs, T).

    Example:
        >>> CausalConvolution(1, 4, 3, dilation=8)(torch.randn(2, 1, 5)).shape
        torch.Size([2, 4, 5])
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: Size, *, dilation: int = 1) -> None:
        inputs, outputs = check_size("inputs", inputs), check_size("outputs", outputs)
        kernel_size = check_size("kernel_size", kernel_size)
        super().__init__(inputs, outputs, kernel_size, dilation=check_size("dilation", dilation))

    @property
    def reach(self) -> int:
        """How many steps it looks back."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def forward(
        self, input: Float[Tensor, "batch inputs steps"], *, only_taps: bool = False
    ) -> Float[Tensor, "batch outputs _"]:
        """Convolve; with ``only_taps`` the input holds the steps at the taps of one output and no others, (B, inputs, kernel_size)."""
        if not isinstance(input, Tensor) or not input.is_floating_point():
            raise TypeError(f"input must be a floating-point tensor; got input={shown(input)}")
        if input.ndim not in (2, 3) or input.shape[-2] != self.in_channels:
            raise ValueError(f"input must be (batch, inputs={self.in_channels}, steps); got {tuple(input.shape)}")
        if only_taps:
            return F.conv1d(input, self.weight, self.bias)
        return super().forward(F.pad(input, (self.reach, 0)))


class TCN(ForecastModel):
    """A temporal convolutional network that forecasts all steps at once.

        block l:   u = drop(relu(conv_d(x))),  v = drop(relu(conv_d(u))),  x <- relu(v + x),     d = 2^l
        y = W x_L + b                                           (and the future covariates of each step ahead)

    Bai, Kolter and Koltun (2018, arXiv:1803.01271): weight-normalised convolutions, each block's dilation twice that of the one before, a
    1 x 1 convolution where a residual changes its channels. A step's way to the forecast is ``depth`` blocks long at most. Different
    from there: weights are drawn from N(0, 0.01^2), as the paper's code means to, while there weight normalisation overwrites them; series
    are normalised one by one (``instance_norm``).

    Any length of look-back works: steps before the first observed one are as the zeros that a convolution begins with.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        dim: channels of a block.
        depth: blocks; unless given, as many as it takes to see the whole look-back.
        kernel_size: taps of a convolution.
        dropout: after each convolution, in training.

    Attributes:
        receptive_field: steps that the last one sees, itself included: ``1 + 2 (kernel_size - 1) (2^depth - 1)``.

    Example:
        >>> model = TCN(3, 96, 24)
        >>> model(torch.randn(8, 96, 3)).shape, model.receptive_field
        (torch.Size([8, 24, 3]), 125)
    """

    any_length: ClassVar[bool] = True

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        dim: Size = 64,
        depth: Size | None = None,
        kernel_size: Size = 3,
        dropout: Rate = 0.0,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        check_size("dim", dim), check_size("kernel_size", kernel_size)
        reach = 2 * (kernel_size - 1)
        depth = _depth(lookback, reach, cycle=lookback) if depth is None else check_size("depth", depth)
        dilations = [2**layer for layer in range(depth)]
        self.receptive_field = 1 + reach * sum(dilations)
        self.blocks = nn.ModuleList(
            _Residual(dim if layer else width_of(self), dim, kernel_size, dilation, dropout)
            for layer, dilation in enumerate(dilations)
        )
        self.output = DirectOutput(self, dim)

    def forecast(self, series: Series) -> Any:
        steps = steps_of(self, series, ahead=0)
        x, begun = steps.vectors.mT, _begun(steps)
        x = x if begun is None else x * begun
        for block in self.blocks:
            x = block(x, begun)
        return self.head.forecast(self.output(x[..., -1], steps.later), steps.inverse)


class WaveNet(StepwiseModel):
    """Gated dilated convolutions that forecast one step after the other.

        layer l:  z = tanh(F_l * x) sigmoid(G_l * x),   x <- x + R_l z,   s <- s + S_l z,     dilation 2^(l mod cycle)
        y_(t+1) = W relu(V relu(s_t)) + b

    van den Oord et al. (2016, arXiv:1609.03499), for numbers: what a step is made of enters by a linear map, not as a class of 256, and
    the head takes the place of the softmax. Steps of the horizon are computed one by one with a queue of earlier inputs in each layer
    (Paine et al. 2016, arXiv:1611.09482): a step costs ``depth`` small products, whatever the receptive field.

    Any length of look-back works: steps before the first observed one are as the zeros that a convolution begins with. Calls as in
    ``StepwiseModel``.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        dim: channels of a layer.
        depth: layers; unless given, as many as it takes to see the whole look-back.
        cycle: layers until dilations begin again at 1; the paper's ten reach to 512.
        kernel_size: taps of a convolution.
        skip_dim: channels of the sum s and after it; ``dim`` if not given.
        dropout: after the gate, in training; the paper has none.

    Attributes:
        receptive_field: steps that a step sees, itself included: ``1 + (kernel_size - 1) * sum of dilations``.

    Example:
        >>> model, y = WaveNet(3, 96, 24), torch.randn(8, 24, 3)
        >>> model(torch.randn(8, 96, 3), target=y).shape, model.receptive_field
        (torch.Size([8, 24, 3]), 128)
    """

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        dim: Size = 32,
        depth: Size | None = None,
        cycle: int = 10,
        kernel_size: Size = 2,
        skip_dim: int | None = None,
        dropout: Rate = 0.0,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        check_size("dim", dim), check_size("cycle", cycle), check_size("kernel_size", kernel_size)
        skip_dim = dim if skip_dim is None else check_size("skip_dim", skip_dim)
        depth = _depth(lookback, kernel_size - 1, cycle) if depth is None else check_size("depth", depth)
        dilations = [2 ** (layer % cycle) for layer in range(depth)]
        self.receptive_field = 1 + (kernel_size - 1) * sum(dilations)
        self.embed = nn.Conv1d(width_of(self), dim, 1)
        self.layers = nn.ModuleList(
            _Gated(dim, skip_dim, kernel_size, dilation, dropout, last=layer == depth - 1)
            for layer, dilation in enumerate(dilations)
        )
        self.mix = nn.Conv1d(skip_dim, skip_dim, 1)
        self.output = nn.Linear(skip_dim, channels * self.head.size)

    def hidden(self, steps: Steps, later: Float[Tensor, "batch later width"]) -> Float[Tensor, "batch horizon dim"]:
        begun = _begun(steps)
        if begun is not None:
            begun = F.pad(begun, (0, later.shape[1]), value=1)
        hidden, _ = self._run(torch.cat([steps.vectors, later], 1), begun)
        return hidden[:, steps.vectors.shape[1] - 1 :]

    def start(self, steps: Steps, samples: int) -> tuple[Float[Tensor, "batch 1 dim"], Advance]:
        hidden, queues = self._run(steps.vectors, _begun(steps))
        queues = [[x.repeat_interleave(samples, 0) for x in queue] for queue in queues]
        step = 0

        def advance(vector: Tensor) -> Tensor:
            nonlocal step
            x = self.embed(vector.mT)
            skips = []
            for layer, queue in zip(self.layers, queues, strict=True):
                assert isinstance(layer, _Gated)
                x, skip = layer.step(x, queue, step)
                skips.append(skip)
            step += 1
            return self._mixed(torch.stack(skips).sum(0))

        return hidden[:, -1:].repeat_interleave(samples, 0), advance

    def _run(
        self, vectors: Float[Tensor, "batch steps width"], begun: Tensor | None
    ) -> tuple[Float[Tensor, "batch steps skip_dim"], list[list[Tensor]]]:
        """Every step at once, and what each layer will need to go on: its last inputs, oldest first."""
        x = self.embed(vectors.mT)
        x = x if begun is None else x * begun
        skips, queues = [], []
        for layer in self.layers:
            assert isinstance(layer, _Gated)
            queues.append(layer.queue(x))
            x, skip = layer(x)
            x = x if begun is None else x * begun
            skips.append(skip)
        return self._mixed(torch.stack(skips).sum(0)), queues

    def _mixed(self, skip: Tensor) -> Tensor:
        return F.relu(self.mix(F.relu(skip))).mT


class _Residual(nn.Module):
    """Two dilated convolutions beside a residual connection."""

    def __init__(self, inputs: int, outputs: int, kernel_size: Size, dilation: int, dropout: Rate) -> None:
        super().__init__()
        convolutions = [
            CausalConvolution(inputs, outputs, kernel_size, dilation=dilation),
            CausalConvolution(outputs, outputs, kernel_size, dilation=dilation),
        ]
        for (
            convolution
        ) in convolutions:  # before weight_norm takes the weights apart: afterwards it would have no effect
            nn.init.normal_(convolution.weight, std=0.01)
        self.convolutions = nn.ModuleList(weight_norm(convolution) for convolution in convolutions)
        self.dropout = Dropout(dropout)
        self.residual = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, begun: Tensor | None) -> Tensor:
        y = x
        for convolution in self.convolutions:
            y = self.dropout(F.relu(convolution(y)))
            y = y if begun is None else y * begun
        x = F.relu(y + self.residual(x))
        return x if begun is None else x * begun


class _Gated(nn.Module):
    """A gated convolution with a residual and a skip connection. Nothing follows the residual of the last one: it has none."""

    def __init__(
        self, dim: Size, skip_dim: int, kernel_size: Size, dilation: int, dropout: Rate, *, last: bool
    ) -> None:
        super().__init__()
        self.convolution = CausalConvolution(dim, 2 * dim, kernel_size, dilation=dilation)
        self.dropout = Dropout(dropout)
        self.residual = None if last else nn.Conv1d(dim, dim, 1)
        self.skip = nn.Conv1d(dim, skip_dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._after(x, self.convolution(x))

    def queue(self, x: Tensor) -> list[Tensor]:
        """The inputs (B, dim, 1) of the steps that later ones look back to, oldest first."""
        reach = self.convolution.reach
        return list(F.pad(x, (reach, 0))[..., -reach:].split(1, -1)) if reach else []

    def step(self, x: Tensor, queue: list[Tensor], step: int) -> tuple[Tensor, Tensor]:
        """The outputs of one step, the ``step``-th after the queue was made; its input takes the place of the oldest."""
        reach, dilation = self.convolution.reach, self.convolution.dilation[0]
        taps = [queue[(step + offset) % reach] for offset in range(0, reach, dilation)]
        if reach:
            queue[step % reach] = x
        return self._after(x, self.convolution(torch.cat([*taps, x], -1), only_taps=True))

    def _after(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        values, gate = y.chunk(2, 1)
        z = self.dropout(values.tanh() * gate.sigmoid())
        return x if self.residual is None else x + self.residual(z), self.skip(z)


def _begun(steps: Steps) -> Float[Tensor, "batch 1 lookback"] | None:
    """1 where a series has begun and 0 before; None where all begin at once."""
    return None if steps.begun is None else steps.begun[:, None].to(steps.vectors.dtype)


def _depth(lookback: int, reach: int, cycle: int) -> int:
    """The fewest layers, each with dilation 2^(layer mod cycle), that see the look-back; with nothing to reach, 1."""
    depth, seen = 1, 1 + reach
    while reach and seen < lookback:
        seen += reach * 2 ** (depth % cycle)
        depth += 1
    return depth
