"""Where tokens live: sequences, irregular time, grids, graphs and points."""

from .._config import register as register
from ._base import Domain as Domain
from ._graph import Graph as Graph
from ._grid import Grid as Grid
from ._points import Points as Points
from ._sequence import Sequence as Sequence, Timeline as Timeline
from ._subset import Subset as Subset

from_config = Domain.from_config
