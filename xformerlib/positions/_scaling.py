"""How rotary frequencies are stretched to sequences longer than those of training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._arguments import checked_class
from .._config import Described


@dataclass(frozen=True)
class Scaling(Described, ABC):
    """How a rotary position trained on short sequences is stretched to sequences ``factor`` times as long.

    Attributes:
        factor: how many times longer, >= 1.
    """

    factor: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ValueError(f"factor must be a finite number >= 1; got factor={self.factor}")

    @property
    def temperature(self) -> float:
        """What queries and keys are each multiplied by."""
        return 1.0

    @abstractmethod
    def frequencies(self, theta: float, bands: int) -> Float[Tensor, " bands"]:
        """The frequencies of one axis in fp64, from the highest, 1, down."""


@checked_class
@dataclass(frozen=True)
class Interpolation(Scaling):
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): every position is divided by ``factor``.

    Example:
        >>> Interpolation(4.0).frequencies(10_000.0, 2).tolist()
        [0.25, 0.0025]
    """

    def frequencies(self, theta: float, bands: int) -> Float[Tensor, " bands"]:
        return frequencies(theta, bands) / self.factor


@checked_class
@dataclass(frozen=True)
class NTK(Scaling):
    """NTK-aware scaling (bloc97 2023; arXiv:2309.00071, section 3.1): a larger base, theta' = theta * factor^(d / (d - 2)).

    ``d`` is the number of channels that turn with one axis. The highest frequency stays, the lowest is divided by ``factor``.

    Example:
        >>> [round(f, 6) for f in NTK(4.0).frequencies(10_000.0, 2).tolist()]
        [1.0, 0.0025]
    """

    def frequencies(self, theta: float, bands: int) -> Float[Tensor, " bands"]:
        if bands == 1:  # the only frequency is the highest one
            return frequencies(theta, bands)
        return frequencies(theta * self.factor ** (bands / (bands - 1)), bands)


@checked_class
@dataclass(frozen=True)
class YaRN(Scaling):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): fast bands stay, slow bands are interpolated, those between are blended.

        f'_i = (1 - r_i) f_i + r_i f_i / factor,   r_i = clip((i - low) / (high - low), 0, 1)

    where ``low`` and ``high`` are the bands that turn ``beta_fast`` and ``beta_slow`` times over ``original_length``, rounded outwards:
    the ramp is linear in the band's index, as in the authors' code and every model trained with it (the paper's text has it linear in
    the number of turns). Queries and keys are both multiplied by 0.1 ln(factor) + 1, the square root of the attention's inverse
    temperature.

    Attributes:
        original_length: the length that the model was trained on, in the units of the coordinates, > 0.
        beta_fast: bands that turn more often than this over ``original_length`` stay as they are.
        beta_slow: bands that turn less often than this are interpolated.

    Raises:
        ValueError: an attribute out of range, or ``beta_fast`` <= ``beta_slow``.

    Example:
        >>> round(YaRN(8.0, original_length=4096).temperature, 4)
        1.2079
    """

    original_length: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.original_length > 0:
            raise ValueError(f"original_length must be > 0; got original_length={self.original_length}")
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"beta_fast must be > beta_slow > 0; got beta_fast={self.beta_fast} and beta_slow={self.beta_slow}"
            )

    @property
    def temperature(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0

    def frequencies(self, theta: float, bands: int) -> Float[Tensor, " bands"]:
        low = max(math.floor(self._band(self.beta_fast, theta, bands)), 0)
        high = min(math.ceil(self._band(self.beta_slow, theta, bands)), 2 * bands - 1)
        index = torch.arange(bands, dtype=torch.float64)
        ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
        plain = frequencies(theta, bands)
        return plain * (1 - ramp) + plain / self.factor * ramp

    def _band(self, turns: float, theta: float, bands: int) -> float:
        """The band, a real number, that turns ``turns`` times over ``original_length``."""
        return bands * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)


def frequencies(theta: float, bands: float) -> Float[Tensor, " bands"]:
    """theta^(-i / bands) for i = 0, 1, ... below ``bands``, in fp64."""
    return theta ** (-torch.arange(bands, dtype=torch.float64) / bands)
