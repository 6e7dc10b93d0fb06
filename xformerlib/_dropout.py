"""Dropout whose random numbers do not cost more than the layers around it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ._autograd import is_compiling

LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """Set each value to 0 with probability ``p`` in training, and scale the others by 1 / (1 - p) (Srivastava et al. 2014, JMLR 15).

    ``torch.nn.Dropout``, except that on a CPU in eager mode a value takes 16 random bits of a shared 64, where torch draws a number of
    double precision for each, which in a small Transformer shows. ``p`` is then rounded to a multiple of 2^-16.

    Example:
        >>> Dropout(0.5)(torch.ones(1000)).unique()
        tensor([0., 2.])
    """

    def forward(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Drop values."""
        dropped = round(self.p * LEVELS)
        if not self.training or dropped == 0:
            return input
        if dropped == LEVELS or input.device.type != "cpu" or is_compiling():
            return F.dropout(input, self.p)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: input.numel()].view(input.shape)
        kept = (bits >= dropped - LEVELS // 2).to(input.dtype)
        return input * kept.mul_(LEVELS / (LEVELS - dropped))
