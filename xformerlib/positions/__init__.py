"""Where tokens are, told to a Transformer: embeddings, rotations and biases, which combine with ``+``."""

from .._config import register as register
from ._absolute import Learned as Learned, Sinusoidal as Sinusoidal
from ._base import (
    Bias as Bias,
    Embedding as Embedding,
    Position as Position,
    Rotation as Rotation,
    Sum as Sum,
)
from ._bias import ContinuousBias as ContinuousBias, RelativeBias as RelativeBias
from ._decay import DistanceDecay as DistanceDecay
from ._graph import RandomWalk as RandomWalk
from ._pairs import PairBias as PairBias
from ._rotary import Rotary as Rotary
from ._scaling import NTK as NTK, Interpolation as Interpolation, Scaling as Scaling, YaRN as YaRN

from_config = Position.from_config
