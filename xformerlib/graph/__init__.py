"""Graph Transformers on PyTorch Geometric's interface, with attention that costs what the graph costs."""

from ..domains._made_once import keep_edges as keep_edges
from ._agnn import AGNN as AGNN
from ._edge_attention import EdgeAttention as EdgeAttention
from ._encodings import (
    AtomEncoder as AtomEncoder,
    BondEncoder as BondEncoder,
    GaussianBias as GaussianBias,
    RandomWalkBias as RandomWalkBias,
)
from ._exphormer import ExpanderAttention as ExpanderAttention, Exphormer as Exphormer
from ._gps import GPS as GPS, GPSLayer as GPSLayer
from ._graphormer import Graphormer as Graphormer, PathBias as PathBias
from ._hetero import HeteroAttention as HeteroAttention
from ._linear_attention import (
    PerformerAttention as PerformerAttention,
    PolynormerAttention as PolynormerAttention,
    SGFormerAttention as SGFormerAttention,
)
from ._model import GraphModel as GraphModel, GraphTransformer as GraphTransformer
from ._readout import EdgeReadout as EdgeReadout
from ._sampler import NeighborSampler as NeighborSampler
from ._sgformer import SGFormer as SGFormer
from ._signnet import SignNet as SignNet
from ._transforms import (
    AddDegree as AddDegree,
    AddLaplacian as AddLaplacian,
    AddRandomWalk as AddRandomWalk,
    FlipSigns as FlipSigns,
)
