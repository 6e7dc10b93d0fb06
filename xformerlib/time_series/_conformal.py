"""Intervals around point forecasts, from the errors made on windows that were not trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._arguments import checked_class, shown

TENTHS = 1000  # widths are kept for each tenth of a percent


@checked_class
@dataclass(frozen=True)
class Conformal:
    """How far forecasts were off, as widths of intervals around others: split conformal prediction, for each step ahead by itself.

        width(level) = the ceil((n + 1) level)-th smallest of n errors |y - forecast|

    Of exchangeable errors, a share >= level of new ones is then within their width, whatever the model (Papadopoulos et al. 2002;
    Lei et al. 2016, arXiv:1604.04173). Errors of a series follow each other and are not quite exchangeable, nor are those by which
    weights were chosen; so count the share yourself where it matters. Each step of the horizon has the level, not all of them together.

    Args:
        widths: (999, horizon), of the levels 0.1%, 0.2%, ..., 99.9%; infinite where there were too few errors.

    Example:
        >>> from xformerlib.time_series import Conformal
        >>> errors = torch.arange(1.0, 100.0)[:, None, None]  # 99 errors of one step, from 1 to 99
        >>> Conformal.of(errors).width(80), Conformal.of(-errors).width(95)
        (tensor([80.]), tensor([95.]))
    """

    widths: Float[Tensor, "999 horizon"]

    def __post_init__(self) -> None:
        if not self.widths.is_floating_point() or self.widths.ndim != 2 or len(self.widths) != TENTHS - 1:
            raise ValueError(
                f"widths must be floating-point ({TENTHS - 1}, horizon); got {shown(self.widths)}. Conformal.of(errors) makes them."
            )

    @classmethod
    def of(cls, errors: Float[Tensor, "windows horizon channels"]) -> Conformal:
        """From errors, NaN where none could be seen; channels count alike."""
        if not isinstance(errors, Tensor) or not errors.is_floating_point():
            raise TypeError(f"errors must be a floating-point tensor; got errors={shown(errors)}")
        if errors.ndim != 3 or not errors.numel():
            raise ValueError(f"errors must be (windows, horizon, channels), and not empty; got {tuple(errors.shape)}")
        by_step = errors.abs().transpose(1, 2).flatten(0, 1)  # (errors, horizon)
        count = (~by_step.isnan()).sum(0)
        rising = by_step.nan_to_num(nan=torch.inf).sort(0).values
        ranks = -(torch.arange(1, TENTHS)[:, None] * (count + 1) // -TENTHS)  # rounded up
        infinite = rising.new_full((1, rising.shape[1]), torch.inf)
        return cls(torch.cat([rising, infinite]).gather(0, (ranks - 1).clamp(max=len(rising))))

    def width(self, level: float) -> Float[Tensor, " horizon"]:
        """Half the width of the interval of a level in percent, at each step ahead.

        Raises:
            ValueError: there were too few errors for this level, or it is no level.
        """
        tenth = math.ceil(round(level * TENTHS / 100, 6))
        if not 1 <= tenth < TENTHS:
            raise ValueError(f"level must be > 0 and <= 99.9; got level={level:g}")
        widths = self.widths[tenth - 1]
        if widths.isinf().any():
            raise ValueError(
                f"level={level:g} needs more errors than there were on validation windows: {math.ceil(level / (100 - level))} "
                "at each step ahead. Give a longer validation part, or ask for lower levels"
            )
        return widths
