"""Attention drawn over the image that it is of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ._drawing import axes_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def attention_on_image(
    image: Shaped[Tensor, "channels height width"],
    attention: Float[Tensor, "rows columns"],
    *,
    strength: float = 0.7,
    smooth: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """An image, and over it in colour how much attention each of its patches gets.

    Where a patch gets least the image is seen as it is, in grey; where it gets most the colour covers it.

    Args:
        image: one channel or three, bytes or numbers of any range, such as a normalised image; what is no byte is scaled to its own range.
        attention: one number for each patch: a map of ``vision.AttentionMap.of``, or a mean of several.
        strength: how much the colour covers where attention is greatest, from 0 to 1.
        smooth: interpolate between patches; if not, each has one colour.

    Example:
        >>> picture = plot.attention_on_image(torch.rand(3, 32, 32), torch.rand(8, 8))
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or attention.ndim != 2:
        raise ValueError(
            "image must be (1 or 3 channels, height, width), and attention a map (rows, columns); "
            f"got {tuple(image.shape)} and {tuple(attention.shape)}"
        )
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1]; got strength={strength}")
    ax = axes_on(ax)
    height, width = image.shape[1:]
    grey, weight = _scaled(image).mean(0), _scaled(attention)
    ax.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    ax.imshow(
        weight.numpy(),
        cmap="inferno",
        vmin=0,
        vmax=1,
        alpha=(strength * weight).numpy(),
        interpolation="bilinear" if smooth else "nearest",
        extent=(0, width, height, 0),
    )
    ax.set_axis_off()
    return ax


def _scaled(values: Tensor) -> Tensor:
    """Between 0 and 1: bytes as they are, others from their least to their greatest."""
    if values.dtype == torch.uint8:
        return values.cpu() / 255
    values = values.detach().cpu().float()
    low, high = values.aminmax()
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
