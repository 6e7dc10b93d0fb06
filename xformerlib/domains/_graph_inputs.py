"""What a graph is made of, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._arguments import check_count
from ._base import as_lengths


def check_edges(edge_index: Any, num_nodes: int) -> Tensor:
    """``edge_index`` as a plain int64 tensor, or an error that names it."""
    if (
        not isinstance(edge_index, Tensor)
        or edge_index.is_floating_point()
        or edge_index.is_complex()
        or edge_index.dtype == torch.bool
    ):
        came = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise TypeError(
            f"edge_index must be a (2, edges) tensor of integers; got {came}. Without edges: torch.empty(2, 0).long()."
        )
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(
            f"edge_index must be (2, edges), sources above targets; got {tuple(edge_index.shape)}. Transpose a list of pairs."
        )
    if type(edge_index) is not Tensor and hasattr(edge_index, "as_tensor"):  # PyTorch Geometric's EdgeIndex
        edge_index = edge_index.as_tensor()
    if edge_index.is_meta:
        raise ValueError(
            "edge_index must hold data, which the domain reads; got a tensor on the meta device. Keep it on the CPU."
        )
    edge_index = edge_index.long()
    if not is_dynamo_compiling() and edge_index.numel():
        low, high = (int(end) for end in edge_index.aminmax())
        if low < 0 or high >= num_nodes:
            raise ValueError(
                f"edge_index must hold node numbers from 0 to num_nodes - 1 = {num_nodes - 1}; got {low if low < 0 else high}. Count "
                f"nodes without edges in num_nodes too."
            )
    return edge_index


def check_edge_attr(edge_attr: Any, edge_index: Tensor) -> Tensor | None:
    """``edge_attr`` with a row for each edge, or an error that says what is amiss."""
    if edge_attr is None:
        return None
    if not isinstance(edge_attr, Tensor) or edge_attr.ndim == 0 or edge_attr.shape[0] != edge_index.shape[1]:
        came = tuple(edge_attr.shape) if isinstance(edge_attr, Tensor) else type(edge_attr).__name__
        raise ValueError(
            f"edge_attr must be a tensor with one row for each of the {edge_index.shape[1]} edges; got {came}"
        )
    if edge_attr.device != edge_index.device:
        raise ValueError(
            f"edge_attr must be on the device of edge_index; got {edge_attr.device} and {edge_index.device}"
        )
    return edge_attr


def check_batch(batch: Any, num_graphs: int | None, num_nodes: int, edge_index: Tensor) -> tuple[Tensor, Tensor]:
    """The graph of each node and the size of each graph."""
    device = edge_index.device
    count = None if num_graphs is None else check_count("num_graphs", num_graphs)
    if batch is None:
        if count not in (None, 1):
            raise ValueError(
                f"num_graphs must come with batch, which says the graph of each node; got num_graphs={count} without it"
            )
        return torch.zeros(num_nodes, dtype=torch.long, device=device), torch.full((1,), num_nodes, device=device)
    if isinstance(batch, Tensor) and batch.device != device:
        raise ValueError(f"batch must be on the device of edge_index; got {batch.device} and {device}")
    if is_dynamo_compiling():
        # A compiled graph cannot read its inputs: the operators that make the graph anew check them. Graphs without nodes do no harm.
        sizes = batch.new_zeros(num_nodes if count is None else count, dtype=torch.long)
        return batch.long(), sizes.index_add(0, batch.long(), torch.ones_like(batch, dtype=torch.long))
    batch = as_lengths("batch", batch).to(device)
    if batch.numel() != num_nodes:
        raise ValueError(
            f"batch must name the graph of each of the num_nodes={num_nodes} nodes; got {batch.numel()} entries"
        )
    if bool((batch.diff() < 0).any()):
        raise ValueError("batch must not fall: the nodes of a graph stand together. Sort the nodes by batch first.")
    source, target = batch[edge_index]
    if bool((source != target).any()):
        edge = int((source != target).nonzero()[0, 0])
        raise ValueError(
            f"edge_index must join nodes of the same graph; got edge {edge} from graph {int(source[edge])} to graph {int(target[edge])}. "
            f"Shift the node numbers of each graph by the nodes before it, as PyTorch Geometric's Batch does."
        )
    least = int(batch[-1]) + 1 if batch.numel() else 0
    if count is not None and count < least:
        raise ValueError(
            f"num_graphs must exceed every entry of batch; got num_graphs={count} and a node of graph {least - 1}"
        )
    return batch, torch.bincount(batch, minlength=least if count is None else count)
