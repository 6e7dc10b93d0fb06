"""Parts of models: instance normalisation, patches, what was seen last, features of dates and times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """The map ``y * scale + level``, one for each series: from normalised values back to the units of the data.

    Example:
        >>> Affine(level=torch.tensor([[[10.0]]]), scale=torch.tensor([[[2.0]]]))(torch.ones(1, 3, 1)).flatten()
        tensor([12., 12., 12.])
    """

    level: Float[Tensor, "batch 1 channels"]
    scale: Float[Tensor, "batch 1 channels"]

    def __call__(self, y: Float[Tensor, "batch steps channels"]) -> Float[Tensor, "batch steps channels"]:
        return y * self.scale + self.level


def instance_norm(
    x: Float[Tensor, "batch steps channels"],
    observed: Bool[Tensor, "batch steps channels"] | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "batch steps channels"], Affine]:
    """Take every series off its own level and scale, and return with it the inverse, for the forecasts.

        level = mean_t x_t,   scale = sqrt(mean_t (x_t - level)^2 + eps),   z_t = (x_t - level) / scale      (t observed)

    RevIN (Kim et al. 2022, openreview cGDAkQo1C0p) without its learned map; nothing is kept between calls. Where ``x`` is missing
    (``observed`` False, or NaN), z is 0 and the value does not count. A series of which nothing was observed has level 0.

    Example:
        >>> z, inverse = instance_norm(torch.tensor([[[1.0], [3.0], [float("nan")]]]))
        >>> z.flatten().round(decimals=3), inverse(z).flatten()
        (tensor([-1.,  1.,  0.]), tensor([1., 3., 2.]))
    """
    seen = ~x.isnan() if observed is None else observed & ~x.isnan()
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = x.masked_fill(~seen, 0).to(dtype)
    count = seen.sum(1, keepdim=True).clamp(min=1)
    level = values.sum(1, keepdim=True) / count
    centred = (values - level).masked_fill(~seen, 0)
    scale = (centred.square().sum(1, keepdim=True) / count + eps).sqrt()
    return (centred / scale).to(x.dtype), Affine(level.to(x.dtype), scale.to(x.dtype))
