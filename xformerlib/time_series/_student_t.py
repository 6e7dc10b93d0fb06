"""Student's t distribution as a forecast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class StudentTForecast:
    """Student's t distribution of each step and channel: ``y = loc + scale t``, t with ``df`` degrees of freedom.

        p(y) = Gamma((df + 1) / 2) / (Gamma(df / 2) sqrt(pi df) scale) (1 + ((y - loc) / scale)^2 / df)^(-(df + 1) / 2)

    Attributes:
        df: degrees of freedom, >= 2.
        loc: the mean, which is also the median.
        scale: > 0; the variance is ``scale^2 df / (df - 2)``.

    Example:
        >>> forecast = StudentTForecast(df=torch.full((1,), 4.0), loc=torch.zeros(1), scale=torch.ones(1))
        >>> forecast.quantile(0.975)
        tensor([2.7764])
    """

    df: Float[Tensor, "*shape"]
    loc: Float[Tensor, "*shape"]
    scale: Float[Tensor, "*shape"]

    @property
    def mean(self) -> Float[Tensor, "*shape"]:
        """The mean."""
        return self.loc

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "n *shape"]:
        """``n`` draws for each step and channel, each by itself.

        Drawn as ``sqrt(df (u^(-2 / df) - 1)) cos(2 pi v)`` with u and v uniform (Bailey 1994), so that a generator can be given.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a whole number >= 1; got n={n!r}")
        u, v = torch.rand(2, n, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device, generator=generator)
        radius = (self.df * torch.expm1(-2 / self.df * torch.log1p(-u))).sqrt()
        return self.loc + self.scale * radius * torch.cos(2 * math.pi * v)

    def quantile(self, q: float) -> Float[Tensor, "*shape"]:
        """The value below which a share ``q`` of the distribution lies."""
        if not 0 < q < 1:
            raise ValueError(f"q must be between 0 and 1; got q={q}")
        return self.loc + self.scale * _standard_quantile(self.df.double(), q).to(self.loc.dtype)

    def log_prob(self, y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The logarithm of the density at ``y``."""
        z = (y - self.loc) / self.scale
        half = self.df.double() / 2  # in single precision the difference of the two would be lost at a large df
        constant = torch.lgamma(half + 0.5) - torch.lgamma(half) - 0.5 * (2 * math.pi * half).log()
        return constant.to(z.dtype) - self.scale.log() - (self.df + 1) / 2 * torch.log1p(z.square() / self.df)


@torch.no_grad()
def _standard_quantile(df: Float64[Tensor, "*shape"], q: float) -> Float64[Tensor, "*shape"]:
    """The quantile of t, df >= 2: its logarithm is a smooth function of 1 / df, interpolated between exact values."""
    if q == 0.5:
        return torch.zeros_like(df)
    count = 40
    nodes = torch.cos(math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count)  # Chebyshev's, on [-1, 1]
    logs = _upper_quantile(4 / (nodes + 1), abs(q - 0.5)).log()
    transform = torch.cos(torch.arange(count)[:, None] * torch.acos(nodes)) * (2 / count)
    first, *others = (transform @ logs).tolist()
    x = 4 / df - 1
    this, last = torch.zeros_like(x), torch.zeros_like(x)
    for coefficient in reversed(others):  # Clenshaw's sum
        this, last = coefficient + 2 * x * this - last, this
    return math.copysign(1, q - 0.5) * (first / 2 + x * this - last).exp()


def _upper_quantile(df: Float64[Tensor, " points"], area: float) -> Float64[Tensor, " points"]:
    """Where the integral of the density of t from 0 on is ``area``, by Newton's method from below.

    With t = sqrt(df) tan(a), it is C * integral of cos(u)^(df - 1) from 0 to a, which is concave: no step overshoots. The integrand is
    smooth, so a few Gauss-Legendre nodes integrate it exactly for what floats hold.
    """
    constant = (torch.lgamma(df / 2 + 0.5) - torch.lgamma(df / 2)).exp() / math.sqrt(math.pi)
    nodes, weights = _gauss_legendre(32)
    angle = torch.zeros_like(df)
    for _ in range(100):
        integral = angle * (torch.cos(angle[:, None] * nodes) ** (df[:, None] - 1) @ weights)
        step = (area / constant - integral) / torch.cos(angle) ** (df - 1)
        angle = angle + step
        if bool((step.abs() <= 1e-14 * angle).all()):
            break
    return df.sqrt() * torch.tan(angle)


@cache
def _gauss_legendre(count: int) -> tuple[Float64[Tensor, " nodes"], Float64[Tensor, " nodes"]]:
    """Nodes and weights on [0, 1], from the eigenvalues of the Jacobi matrix (Golub and Welsch 1969)."""
    i = torch.arange(1, count, dtype=torch.float64)
    beside = i / (4 * i * i - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (values + 1) / 2, vectors[0].square()
