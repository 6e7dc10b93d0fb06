"""Graph Transformers on PyTorch Geometric's interface, with attention that costs what the graph costs."""

from ._edge_attention import EdgeAttention as EdgeAttention
from ._model import GraphModel as GraphModel, GraphTransformer as GraphTransformer
