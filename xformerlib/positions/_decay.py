"""A position that is added to attention scores: decay with distance."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from .._arguments import Positive, check_positive, check_size
from ..domains import Domain, Grid
from ._base import Bias, at_least_fp32, in_steps
from ._pairs import PairBias, PlacePair
from ._tables import rows_of_batch


class DistanceDecay(Bias):
    """Scores that fall with distance: ALiBi (Press et al. 2021, arXiv:2108.12409),

        -m_h distance(query, key),   m_h = 2^(-8 h / H) for h = 1, ..., H

    and, where H is not a power of two, the slopes of the next lower one and then every second slope of the next higher one, as published.

    - ``Sequence``: |i - j|. ``Timeline``: |t_i - t_j|. ``Points``: Euclidean.
    - ``Grid``: Euclidean, as in 2-D ALiBi (CROMA, Fuller et al. 2023, arXiv:2311.00566).
    - ``Graph``: hops; the number of nodes where there is no path.

    Pairs with prefix tokens score 0.

    Args:
        heads: attention heads, of the queries.
        learned: train the slopes, which start as above and stay positive.
        scale: what distances are multiplied by.

    Weights:
        ``log_slopes`` (heads,), if ``learned``.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> pair = DistanceDecay(2).pair(Sequence(4))
        >>> pair.at(torch.tensor(3), torch.arange(4))
        tensor([[-0.1875, -0.1250, -0.0625, -0.0000],
                [-0.0117, -0.0078, -0.0039, -0.0000]])
    """

    steps: Int[Tensor, " heads"]

    def __init__(self, heads: int, *, learned: bool = False, scale: Positive = 1.0) -> None:
        super().__init__()
        self.heads = check_size("heads", heads)
        self.scale = check_positive("scale", scale)
        # The slope of a head is 2^(-4 step / base): integers, which no change of the model's dtype makes less exact.
        self.base = 2 ** (heads.bit_length() - 1)
        steps = [2 * h for h in range(1, self.base + 1)] + [2 * h - 1 for h in range(1, heads - self.base + 1)]
        self.register_buffer("steps", torch.tensor(steps), persistent=False)
        self.log_slopes = nn.Parameter(torch.empty(heads)) if learned else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set learned slopes to those of ALiBi."""
        if self.log_slopes is not None:
            with torch.no_grad():
                self.log_slopes.copy_(self._published().log())

    def _published(self) -> Float64[Tensor, " heads"]:
        return torch.exp2(self.steps.double() * (-4 / self.base))

    def is_pointwise(self, domain: Domain) -> bool:
        return True

    def between(self, domain: Domain, keys: Domain, dtype: torch.dtype | None) -> PairBias:
        default = torch.get_default_dtype() if self.log_slopes is None else self.log_slopes.dtype
        dtype = at_least_fp32(dtype or default)
        slopes = self._published().to(dtype) if self.log_slopes is None else self.log_slopes.to(dtype).exp()
        return _DecayPair(domain, keys, slopes * self.scale)

    def extra_repr(self) -> str:
        return f"{self.heads}, learned={self.log_slopes is not None}" + (
            f", scale={self.scale:g}" if self.scale != 1 else ""
        )


class _DecayPair(PlacePair):
    """A slope for each head."""

    def __init__(self, domain: Domain, keys: Domain, slopes: Float[Tensor, " heads"]) -> None:
        rows = None if in_steps(domain) else rows_of_batch(domain, keys)
        super().__init__(domain, keys, (slopes,), heads=slopes.numel(), batch_size=rows)

    def scores(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = self._distance(b, q, k)
        return -self.weights[0].reshape(-1, *(1,) * distance.ndim) * distance

    def of_head(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return -self.weights[0][h if self.heads > 1 else torch.zeros_like(h)] * self._distance(b, q, k)

    def _distance(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = self._metric(b, q, k)
        prefix = self.domain.touches_prefix(self.keys, b, q, k)
        return distance if prefix is None else torch.where(prefix, 0.0, distance)

    def _metric(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        dtype = self.weights[0].dtype
        if not isinstance(self.domain, Grid):
            return self.domain.distance(self.keys, b, q, k).to(dtype)
        squares = self.domain.offset(0, self.keys, b, q, k) ** 2
        for axis in range(1, self.domain.ndim):
            squares = squares + self.domain.offset(axis, self.keys, b, q, k) ** 2
        return squares.to(dtype).sqrt()
