"""Recurrent networks: a latent state that is carried from step to step, and attention over the states it went through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .._arguments import Rate, Size, check_size
from .._dropout import Dropout
from ._inputs import ForecastModel, Inputs, Series
from ._pooling import AttentionPooling
from ._steps import Advance, DirectOutput, Steps, StepwiseModel, steps_of, width_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Cell = Literal["lstm", "gru"]


class RNN(ForecastModel):
    """A latent-state recurrent network that forecasts all steps at once from its last state.

        h_t = cell(h_(t-1), [x_t, observed_t, future_t, static]),   y = W h_L + b     (and the future covariates of each step ahead)

    The encoder of MQ-RNN (Wen et al. 2017, arXiv:1711.11053), with LSTM (Hochreiter and Schmidhuber 1997) or GRU cells (Cho et al. 2014,
    arXiv:1406.1078). Different from there, series are normalised one by one (``instance_norm``). A step's way to the forecast is as
    long as it is old: L - t cells.

    Any length of look-back works. Steps in front of the first that was observed are left out: the state begins where the series does.

    Args:
        channels, lookback, horizon, **inputs: as in ``ForecastModel``.
        dim: channels of the state.
        depth: layers of cells.
        cell: ``"lstm"`` or ``"gru"``.
        dropout: between the layers and before the output, in training.

    Example:
        >>> RNN(3, 96, 24, future=2)(torch.randn(8, 96, 3), future=torch.randn(8, 120, 2)).shape
        torch.Size([8, 24, 3])
    """

    any_length: ClassVar[bool] = True

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        dim: Size = 64,
        depth: Size = 2,
        cell: Cell = "lstm",
        dropout: Rate = 0.0,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.rnn = _recurrent(width_of(self), dim, depth, cell, dropout)
        self.dropout = Dropout(dropout)
        self.output = DirectOutput(self, dim)

    def forecast(self, series: Series) -> Any:
        steps = steps_of(self, series, ahead=0)
        states, exist, _ = _states(self.rnn, steps)
        raw = self.output(self.dropout(_last(states, exist)), steps.later)
        return self.head.forecast(raw, steps.inverse)


class AutoregressiveRNN(StepwiseModel):
    """A recurrent network that forecasts one step after the other, each fed back into its state.

        h_t = cell(h_(t-1), [x_t, observed_t, future_(t+1), static]),   y_(t+1) = W h_t + b

    DeepAR (Salinas et al. 2017, arXiv:1704.04110). Different from there, series are normalised by level and scale, not by scale alone,
    and the loss is of the horizon. Use ``head=StudentT()`` and ``sample`` for paths as in the paper.

    Any length of look-back works; arguments and missing steps as in ``RNN``, calls as in ``StepwiseModel``.

    Example:
        >>> model, y = AutoregressiveRNN(3, 96, 24), torch.randn(8, 24, 3)
        >>> model(torch.randn(8, 96, 3), target=y).shape, model(torch.randn(8, 96, 3)).shape
        (torch.Size([8, 24, 3]), torch.Size([8, 24, 3]))
    """

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        dim: Size = 64,
        depth: Size = 2,
        cell: Cell = "lstm",
        dropout: Rate = 0.0,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.rnn = _recurrent(width_of(self), dim, depth, cell, dropout)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(dim, channels * self.head.size)

    def hidden(self, steps: Steps, later: Float[Tensor, "batch later width"]) -> Float[Tensor, "batch horizon dim"]:
        states, exist, state = _states(self.rnn, steps)
        states = _last(states, exist)[:, None]
        if later.shape[1]:
            states = torch.cat([states, self.rnn(later, state)[0]], 1)
        return self.dropout(states)

    def start(self, steps: Steps, samples: int) -> tuple[Float[Tensor, "batch 1 dim"], Advance]:
        states, exist, state = _states(self.rnn, steps)
        if samples > 1:
            parts = [part.repeat_interleave(samples, 1) for part in (state if isinstance(state, tuple) else (state,))]
            state = tuple(parts) if isinstance(state, tuple) else parts[0]

        def advance(vector: Tensor) -> Tensor:
            nonlocal state
            out, state = self.rnn(vector, state)
            return self.dropout(out)

        return self.dropout(_last(states, exist)[:, None].repeat_interleave(samples, 0)), advance


class AttentionPoolingRNN(ForecastModel):
    """A recurrent network that forecasts all steps at once from all of its states, not from the last alone.

        h_t as in ``RNN``,   w = softmax_t(theta' h_t),   y = W [h_L, sum_t w_t h_t] + b

    So a step's way to the forecast is one step long, however old it is; the temporal attention of Qin et al. (2017, DA-RNN,
    arXiv:1704.02971), with the learned direction of ``AttentionPooling`` in the place of a query from a decoder.

    Any length of look-back works; arguments and missing steps as in ``RNN``.

    Example:
        >>> AttentionPoolingRNN(3, 96, 24)(torch.randn(8, 96, 3)).shape
        torch.Size([8, 24, 3])
    """

    any_length: ClassVar[bool] = True

    def __init__(
        self,
        channels: Size,
        lookback: Size,
        horizon: Size,
        *,
        dim: Size = 64,
        depth: Size = 2,
        cell: Cell = "lstm",
        dropout: Rate = 0.0,
        **inputs: Unpack[Inputs],
    ) -> None:
        super().__init__(channels, lookback, horizon, **inputs)
        self.rnn = _recurrent(width_of(self), dim, depth, cell, dropout)
        self.pooling = AttentionPooling(dim)
        self.dropout = Dropout(dropout)
        self.output = DirectOutput(self, 2 * dim)

    def forecast(self, series: Series) -> Any:
        steps = steps_of(self, series, ahead=0)
        states, exist, _ = _states(self.rnn, steps)
        pooled = torch.cat([_last(states, exist), self.pooling(states, exist)], -1)
        return self.head.forecast(self.output(self.dropout(pooled), steps.later), steps.inverse)


def _recurrent(width: int, dim: int, depth: int, cell: Cell, dropout: float) -> nn.RNNBase:
    """Layers of cells, which torch has."""
    if cell not in ("lstm", "gru"):
        raise ValueError(f"cell must be 'lstm' or 'gru'; got cell={cell!r}")
    dim, depth = check_size("dim", dim), check_size("depth", depth)
    kind = nn.LSTM if cell == "lstm" else nn.GRU
    return kind(width, dim, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)


def _states(rnn: nn.RNNBase, steps: Steps) -> tuple[Tensor, Tensor | None, Any]:
    """All states of the last layer, those of each series in front; where they exist (None: everywhere); the state to go on from.

    Steps before a series begins are left out, by packing: no state can be computed from nothing and then count for nothing.
    """
    if steps.begun is None:
        states, state = rnn(steps.vectors)
        return states, None, state
    lookback = steps.vectors.shape[1]
    step = torch.arange(lookback, device=steps.seen.device)
    moved = (step + steps.first[:, None]).clamp(max=lookback - 1)
    vectors = steps.vectors.gather(1, moved[..., None].expand_as(steps.vectors))
    lengths = lookback - steps.first
    packed, state = rnn(pack_padded_sequence(vectors, lengths.cpu(), batch_first=True, enforce_sorted=False))
    states, _ = pad_packed_sequence(packed, batch_first=True, total_length=lookback)
    return states, step < lengths[:, None], state


def _last(states: Float[Tensor, "batch steps dim"], exist: Bool[Tensor, "batch steps"] | None) -> Tensor:
    """The last state of each series."""
    if exist is None:
        return states[:, -1]
    return states[torch.arange(len(states), device=states.device), exist.sum(1) - 1]
