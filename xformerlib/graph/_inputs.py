"""What models are given, PyTorch Geometric's way, as nodes that live on a ``Graph``."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .._arguments import check_size, shown
from .._autograd import is_jit_tracing, outside_graphs
from .._projection import check_dtype
from ..domains import Graph
from ..domains._made_once import made_once
from ._edges import Adjacency, as_pairs


class Placed(NamedTuple):
    """A batch of graphs whose nodes stand graph by graph.

    Attributes:
        graph: where the nodes live; built once for a batch, and kept beside its ``edge_index``.
        order: the nodes in that order, as they were given; None where they came so.
    """

    graph: Graph
    order: Int[Tensor, " nodes"] | None

    def sorted(self, x: Tensor) -> Tensor:
        """Features of nodes, graph by graph."""
        return x if self.order is None else x.index_select(0, self.order)

    def restored(self, x: Tensor) -> Tensor:
        """Results for nodes in the order in which these were given."""
        return x if self.order is None else x.index_select(0, self.order.argsort())


def place_nodes(
    edge_index: Adjacency,
    num_nodes: int,
    batch: Int[Tensor, " nodes"] | None = None,
    *,
    virtual_nodes: int = 0,
    num_graphs: int | None = None,
    by_graph: bool = False,
) -> Placed:
    """Where nodes live, made at the first call with an ``edge_index`` and ``batch`` and kept while they are not changed in place.

    ``by_graph`` says that results have a row for each graph, so that their number must be known.
    """
    if isinstance(edge_index, Graph):
        if batch is not None:
            raise ValueError(f"a Graph says itself which nodes are in which graph; got {edge_index!r} and batch")
        if edge_index.prefix != virtual_nodes:
            raise ValueError(
                f"a Graph says itself how many virtual nodes each graph has, and here there are {virtual_nodes}; got {edge_index!r}. "
                f"Make it with Graph(..., virtual_nodes={virtual_nodes})."
            )
        return Placed(edge_index, None)
    if not isinstance(edge_index, Tensor):
        raise TypeError(f"edge_index must be a tensor (2, edges), or a Graph; got {type(edge_index).__name__}")
    if batch is not None and (
        not isinstance(batch, Tensor) or batch.ndim != 1 or batch.is_floating_point() or batch.is_complex()
    ):
        raise TypeError(f"batch must be the graph of each node, integers (nodes,); got {shown(batch)}")
    if torch.compiler.is_dynamo_compiling():
        place = _placed
        if batch is not None and num_graphs is None and (virtual_nodes or by_graph):
            place = outside_graphs(_placed, "the number of graphs is found by reading batch; give num_graphs")
        return place(as_pairs(edge_index), num_nodes, batch, virtual_nodes, num_graphs)
    return made_once(
        ("placed", num_nodes, virtual_nodes, num_graphs),
        [edge_index, batch],
        lambda: _placed(as_pairs(edge_index), num_nodes, batch, virtual_nodes, num_graphs),
    )


def check_nodes(x: object, embed: nn.Module | None, name: str = "x") -> None:
    """Raise unless ``x`` has a row for each node, of features that ``embed`` takes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of node features, (nodes, channels); got {type(x).__name__}")
    if x.ndim == 0:
        raise ValueError(f"{name} must be (nodes, channels); got a 0-dim tensor")
    if isinstance(embed, nn.Linear) and not isinstance(embed, nn.LazyLinear):
        if not x.is_floating_point():
            raise TypeError(
                f"{name} must be floating-point node features; got {x.dtype}. Use x.float(), or AtomEncoder(...) as in_channels."
            )
        if x.ndim != 2 or x.shape[1] != embed.in_features:
            raise ValueError(f"{name} must be (nodes, in_channels={embed.in_features}); got {tuple(x.shape)}")
        check_dtype(name, x, embed)
    if isinstance(embed, nn.Embedding) and x.ndim != 1:
        raise ValueError(
            f"{name} must be (nodes,) where in_channels is an nn.Embedding; got {tuple(x.shape)}. Use x.squeeze(-1), or AtomEncoder for "
            "several columns."
        )


def _placed(
    edge_index: Tensor, num_nodes: int, batch: Tensor | None, virtual_nodes: int, num_graphs: int | None
) -> Placed:
    if is_jit_tracing():
        warnings.warn(
            "structure that is read from edge_index (masks, encodings, which graph a node is in) becomes a constant of the trace: trace "
            "once for each graph",
            torch.jit.TracerWarning,  # type: ignore[attr-defined]
            stacklevel=2,
        )
    order = None
    in_graph = torch.compiler.is_dynamo_compiling()
    if batch is not None and batch.numel() == num_nodes and (in_graph or bool((batch.diff() < 0).any())):
        order = torch.argsort(batch, stable=True)
        batch, edge_index = batch[order], order.argsort()[edge_index]
    graph = Graph(edge_index, num_nodes, batch=batch, virtual_nodes=virtual_nodes, num_graphs=num_graphs)
    return Placed(graph, order)


def linear_from(in_channels: int, out_channels: int, *, bias: bool = True, name: str = "in_channels") -> nn.Linear:
    """A linear map; of -1 channels, as in PyTorch Geometric, one that takes as many as come at the first call."""
    if check_size(name, in_channels, least=-1) == 0:
        raise ValueError(f"{name} must be >= 1, or -1 for as many as come at the first call; got {name}=0")
    if in_channels == -1:
        return nn.LazyLinear(out_channels, bias=bias)
    return nn.Linear(in_channels, out_channels, bias=bias)
