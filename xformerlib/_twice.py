"""Gradients that are differentiated in their turn, for functions whose own backward is not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def differentiable(
    y: Tensor, inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of ``y``, computed anew from ``inputs`` by torch's own operations: one for each input that ``needed`` says."""
    asked = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
    return [next(found) if need else None for need in needed]
