"""One attention core with pluggable masks and positions, for sequences, irregular time, images, graphs and points."""

from . import masks as masks, positions as positions
from ._cache import Cache as Cache
from ._config import from_config as from_config, register as register, to_config as to_config
from ._explain import explain as explain
from ._pooling import MultiheadPooling as MultiheadPooling, Pooling as Pooling
from .attention import Attention as Attention, attention as attention, plan as plan
from .blocks import (
    Block as Block,
    Decoder as Decoder,
    DropPath as DropPath,
    Encoder as Encoder,
    EncoderDecoder as EncoderDecoder,
    FeedForward as FeedForward,
)
from .domains import (
    Domain as Domain,
    Graph as Graph,
    Grid as Grid,
    Points as Points,
    Sequence as Sequence,
    Timeline as Timeline,
)
from .kernels import Plan as Plan, strict as strict, using as using

__version__ = "0.1.0"
