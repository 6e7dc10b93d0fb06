"""Who may look at whom: small frozen values that combine with ``&``, ``|`` and ``~``."""

from .._config import register as register
from ._algebra import And as And, Full as Full, Leaf as Leaf, Mask as Mask, Not as Not, Or as Or
from ._general import (
    Dense as Dense,
    Global as Global,
    Keys as Keys,
    Prefix as Prefix,
    Segments as Segments,
    Where as Where,
)
from ._graph import Edges as Edges, Expander as Expander
from ._grid import Axial as Axial
from ._sequence import (
    Causal as Causal,
    Dilated as Dilated,
    Local as Local,
    SpatialLeaf as SpatialLeaf,
    Windows as Windows,
)

from_config = Mask.from_config
