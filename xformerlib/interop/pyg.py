"""Layers of PyTorch Geometric as ours, and back: the same weights, the same nodes.

>>> from torch_geometric.nn import TransformerConv
>>> from xformerlib.interop.pyg import from_pyg
>>> theirs = TransformerConv(16, 8, heads=4, edge_dim=3)
>>> ours, nodes = from_pyg(theirs), torch.randn(3, 16)
>>> edges = torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.randn(3, 3)
>>> torch.allclose(ours(nodes, *edges), theirs(nodes, *edges), atol=1e-6)
True
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch_geometric.nn import GPSConv, HGTConv, TransformerConv
from torch_geometric.nn.dense import Linear as TheirLinear

from ..graph import EdgeAttention, ExpanderAttention, GPSLayer, HeteroAttention
from .torch_nn import from_torch


def from_pyg(conv: nn.Module) -> Any:
    """Our layer with copies of the weights of one of PyTorch Geometric's, which is left as it is.

    ``TransformerConv`` becomes an ``EdgeAttention``, ``HGTConv`` a ``HeteroAttention``, ``GPSConv`` a ``GPSLayer``; what passes messages in
    this one is taken over if it is a ``TransformerConv``, and copied otherwise, like the norms.

    Raises:
        TypeError: another layer.
        ValueError: what ours cannot express, by name; a layer whose sizes are not known before its first call.
    """
    if type(conv) is TransformerConv:
        return _edge_attention(conv)
    if type(conv) is GPSConv:
        return _gps_layer(conv)
    if type(conv) is HGTConv:
        return _hetero_attention(conv)
    raise TypeError(f"conv must be a TransformerConv, a GPSConv or an HGTConv; got {type(conv).__name__}")


def _edge_attention(conv: TransformerConv) -> EdgeAttention:
    if conv.aggr != "add" or conv.flow != "source_to_target":
        raise ValueError(
            f"aggr must be 'add' and flow 'source_to_target', as everywhere here; got aggr={conv.aggr!r}, flow={conv.flow!r}"
        )
    linear = [layer for layer in conv.modules() if isinstance(layer, TheirLinear)]
    if any(layer.in_channels < 1 for layer in linear):
        raise ValueError("in_channels must be known; got -1. Call conv once, then take it over")
    ours = EdgeAttention(
        (conv.lin_key.in_channels, conv.lin_query.in_channels), conv.out_channels, conv.heads, concat=conv.concat,
        beta=conv.lin_beta is not None, dropout=conv.dropout, edge_dim=conv.edge_dim, bias=conv.lin_key.bias is not None,
        root_weight=conv.root_weight,
    ).to(conv.lin_key.weight)  # fmt: skip
    _copy(ours.query, conv.lin_query)
    _copy(ours.key_value, conv.lin_key, conv.lin_value)
    for own, theirs in ((ours.edge, conv.lin_edge), (ours.root, conv.lin_skip), (ours.gate, conv.lin_beta)):
        if own is not None:
            _copy(own, theirs)
    return ours.train(conv.training)


def _gps_layer(conv: GPSConv) -> GPSLayer:
    if conv.attn_type != "multihead":
        raise ValueError(f"attn_type must be 'multihead'; got attn_type={conv.attn_type!r}")
    up, activation, _, down, _ = conv.mlp
    passing = _edge_attention(conv.conv) if type(conv.conv) is TransformerConv else copy.deepcopy(conv.conv)
    norms = [norm for norm in (conv.norm2, conv.norm3, conv.norm1) if norm is not None]
    waiting = iter(copy.deepcopy(norms))
    ours = GPSLayer(
        conv.channels, passing, dropout=conv.dropout, activation=copy.deepcopy(activation),
        norm=(lambda _: next(waiting)) if norms else None, attention=from_torch(conv.attn),
    ).to(up.weight)  # fmt: skip
    _copy(ours.feed_forward.up, up)
    _copy(ours.feed_forward.down, down)
    return ours.train(conv.training)


def _hetero_attention(conv: HGTConv) -> HeteroAttention:
    if conv.aggr != "add" or conv.flow != "source_to_target":
        raise ValueError(
            f"aggr must be 'add' and flow 'source_to_target', as everywhere here; got aggr={conv.aggr!r}, flow={conv.flow!r}"
        )
    if any(layer.in_channels < 1 for layer in conv.kqv_lin.lins.values()):
        raise ValueError("in_channels must be known; got -1. Call conv once, then take it over")
    channels = {kind: conv.kqv_lin.lins[kind].in_channels for kind in conv.node_types}
    ours = HeteroAttention(channels, conv.out_channels, (conv.node_types, conv.edge_types), conv.heads)
    ours = ours.to(conv.k_rel.weight)
    with torch.no_grad():
        for i, kind in enumerate(conv.node_types):
            _copy(ours.key_query_value[i], conv.kqv_lin.lins[kind])
            _copy(ours.out[i], conv.out_lin.lins[kind])
            ours.skip[i] = conv.skip[kind].squeeze()
        relations = len(conv.edge_types)
        ours.key_map.copy_(conv.k_rel.weight.unflatten(0, (-1, relations)).transpose(0, 1))
        ours.value_map.copy_(conv.v_rel.weight.unflatten(0, (-1, relations)).transpose(0, 1))
        for r, relation in enumerate(conv.edge_types):
            ours.factor[r] = conv.p_rel["__".join(relation)].squeeze(0)
    return ours.train(conv.training)


def to_pyg(module: nn.Module) -> Any:
    """A copy in which every ``EdgeAttention`` is PyTorch Geometric's ``TransformerConv``, with the same weights and outputs.

    For tools that ask for layers which pass messages: masks of edges (``GNNExplainer``) and weights along them (``AttentionExplainer``)
    then reach the layers along edges, and ``to_hetero`` knows them for what they are. An ``ExpanderAttention``, whose links are not the
    graph's edges, stays what it is, as does all else. Speed and memory are those of PyTorch Geometric.

    Args:
        module: an ``EdgeAttention``, or a model or layer that has some in it.

    Raises:
        ValueError: nothing along edges in it; channels that are not known before the first call.

    Example:
        >>> from xformerlib.graph import GPS
        >>> model, graph = GPS(16, 32, 2, num_layers=2, heads=4).eval(), (torch.randn(3, 16), torch.tensor([[0, 1], [1, 2]]))
        >>> torch.allclose(to_pyg(model)(*graph), model(*graph), atol=1e-5)
        True
    """
    if isinstance(module, EdgeAttention):
        return _transformer_conv(module)
    other = copy.deepcopy(module)
    found = _put_in_place(other)
    if not found:
        raise ValueError(f"module must be an EdgeAttention or have one in it; got {type(module).__name__} without")
    return other


def _put_in_place(module: nn.Module) -> int:
    """Replace layers along edges, and say how many there were."""
    found = 0
    for name, part in module.named_children():
        if isinstance(part, EdgeAttention):
            setattr(module, name, _transformer_conv(part))
            found += 1
        elif not isinstance(part, ExpanderAttention):
            found += _put_in_place(part)
    return found


def _transformer_conv(layer: EdgeAttention) -> TransformerConv:
    if any(isinstance(part, nn.LazyLinear) for part in (layer.query, layer.key_value)):
        raise ValueError("in_channels must be known; got -1. Call the layer once, then take it over")
    theirs = TransformerConv(
        (layer.key_value.in_features, layer.query.in_features), layer.out_channels, layer.heads, layer.concat,
        layer.gate is not None, layer.dropout, None if layer.edge is None else layer.edge.in_features,
        layer.query.bias is not None, layer.root is not None,
    ).to(layer.query.weight)  # fmt: skip
    with torch.no_grad():
        for parts, own in (
            ((theirs.lin_query,), layer.query), ((theirs.lin_key, theirs.lin_value), layer.key_value),
            ((theirs.lin_edge,), layer.edge), ((theirs.lin_skip,), layer.root), ((theirs.lin_beta,), layer.gate),
        ):  # fmt: skip
            if own is None:
                continue
            weights = own.weight.chunk(len(parts))
            biases = [None] * len(parts) if own.bias is None else own.bias.chunk(len(parts))
            for part, weight, bias in zip(parts, weights, biases, strict=True):
                part.weight.copy_(weight)
                if bias is not None:
                    part.bias.copy_(bias)
    return theirs.train(layer.training)


def _copy(own: Any, *theirs: Any) -> None:
    """The rows of one linear map, or of several one below the other."""
    with torch.no_grad():
        own.weight.copy_(torch.cat([layer.weight for layer in theirs]))
        if own.bias is not None:
            own.bias.copy_(torch.cat([layer.bias for layer in theirs]))
