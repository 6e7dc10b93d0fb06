"""Every variable of a call: as one token, or as a series of segments over look-back and horizon."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Size
from .._autograd import is_compiling
from .._recorded import Recorded
from ..masks import Keys
from ._inputs import ForecastModel, Series
from ._parts import instance_norm, patches


class VariateTokens(Recorded):
    """One token for each variable, made of its whole series, and one for all static covariates together, as in iTransformer.

    token_c = W x[:, c] + b,  with a W and b of its own for each kind of variable

    Args:
        model: what the covariates are declared with. Known-future ones are seen over look-back and horizon.
        columns: series that are known over the look-back alone.
        dim: channels of a token.
    """

    def __init__(self, model: ForecastModel, columns: int, dim: Size) -> None:
        super().__init__()
        self.embed = nn.Linear(model.lookback, dim) if columns else None
        self.embed_future = nn.Linear(model.lookback + model.horizon, dim) if model.future else None
        self.embed_static = nn.Linear(model.static, dim) if model.static else None

    def forward(
        self,
        x: Float[Tensor, "batch lookback columns"],
        observed: Bool[Tensor, "batch lookback columns"],
        series: Series,
    ) -> tuple[Float[Tensor, "batch variables dim"], Bool[Tensor, "batch variables"]]:
        """The tokens, of the columns first, and of which of them something is known."""
        tokens = []
        if self.embed is not None:
            tokens.append(self.embed(x.transpose(1, 2)))
        if self.embed_future is not None:
            tokens.append(self.embed_future(series.future.transpose(1, 2)))
        if self.embed_static is not None:
            tokens.append(self.embed_static(series.static)[:, None])
        joined, known = torch.cat(tokens, 1), observed.any(1)
        return joined, F.pad(known, (0, joined.shape[1] - known.shape[1]), value=True)


def keys_of(known: Bool[Tensor, "batch tokens"]) -> Keys | None:
    """The mask under which only tokens of which something is known are attended to; None where that is all of them."""
    # Whether it is all of them is known only to the data, which a graph cannot ask.
    return None if known.is_meta or (not is_compiling() and known.all()) else Keys(known)


@dataclass(frozen=True)
class VariableSegments:
    """Each variable cut into segments of the same steps: targets, past-only covariates, known-future ones.

    Attributes:
        values: normalised; 0 where nothing is known.
        known: where the values are known; of targets and past-only covariates nothing of the horizon is.
        exists: whether something is known in a segment, or it is to be filled: the horizon of targets and of past-only covariates
            of which something was observed, which pass on there what is known of them.
    """

    values: Float[Tensor, "batch variables segments size"]
    known: Bool[Tensor, "batch variables segments size"]
    exists: Bool[Tensor, "batch variables segments"]


def segments_of(
    series: Series, z: Float[Tensor, "batch lookback columns"], channels: int, horizon: int, size: int
) -> VariableSegments:
    """Segments over look-back and horizon, one of which begins with the horizon.

    Where ``size`` does not divide the look-back, unknown steps stand in front; where not the horizon, at the end. Known-future
    covariates are normalised over all their steps.
    """
    lookback, columns = z.shape[1:]
    future, _ = instance_norm(series.future)
    values = torch.cat([F.pad(z, (0, 0, 0, horizon)), future], 2).transpose(1, 2)
    known = torch.cat([F.pad(series.observed, (0, 0, 0, horizon)), torch.ones_like(future, dtype=torch.bool)], 2)
    around = (-lookback % size, -horizon % size)
    values, known = (patches(F.pad(x, around), size, size) for x in (values, known.transpose(1, 2)))
    exists, filled = known.any(-1), series.observed.any(1)
    filled[:, :channels] = True
    exists[:, :columns, (lookback + around[0]) // size :] = filled[..., None]
    return VariableSegments(values, known, exists)


def segments_in(steps: int, size: int) -> int:
    """How many segments hold so many steps."""
    return -(-steps // size)
