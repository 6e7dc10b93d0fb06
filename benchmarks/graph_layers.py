"""Whole layers on graphs beside PyTorch Geometric's, with the same weights: gradients of nodes and of all weights."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import xformerlib as xf
from xformerlib import graph, masks

from ._measure import Line, Setting, Target, Work, attention_flops
from .graphs import molecules, protein_sizes, unique_edges, zinc_sizes
from .vision import Training, drawn

CHANNELS, HEADS = 64, 4
# Weights whose rows and columns mean the same on both sides: their gradients are compared.
GPS_NAMES = (
    ("x", "qkv.weight", "attention.out.weight", "up.weight", "down.weight"),
    ("x", "in_proj_weight", "attn.out_proj.weight", "mlp.0.weight", "mlp.3.weight"),
)
CONV_NAMES = (
    ("x", "query.weight", "edge.weight", "root.weight"),
    (
        "x",
        "lin_query.weight",
        "lin_edge.weight",
        "lin_skip.weight",
    ),
)


class Fed(nn.Module):
    """A layer on nodes that are trained with it."""

    def __init__(self, layer: nn.Module, x: Tensor, *edges: Tensor, **more: Any) -> None:
        super().__init__()
        self.x, self.layer, self.edges, self.more = nn.Parameter(x.clone()), layer, edges, more

    def forward(self) -> Tensor:
        return self.layer(self.x, *self.edges, **self.more)


class OfKinds(Fed):
    """The same with nodes of several kinds, one kind behind the other."""

    def __init__(
        self, layer: nn.Module, x: Tensor, counts: list[int], edges: dict[tuple[str, str, str], Tensor]
    ) -> None:
        super().__init__(layer, x)
        self.counts, self.of_kinds = counts, edges

    def forward(self) -> Tensor:
        return torch.cat([*self.layer(dict(zip("ab", self.x.split(self.counts), strict=True)), self.of_kinds).values()])


def beside(
    setting: Setting, theirs: nn.Module, fed: tuple[Fed, Fed], names: Any, kernel: str, pairs: int, heads: int, dim: int
) -> Work:
    """Steps of both layers; operations are those of the weights and of the pairs."""
    ours, peer = (model.to(setting.device, setting.dtype) for model in fed)
    grad = torch.randn_like(ours().detach())
    flops = 6.0 * len(ours.x) * sum(p.numel() for p in theirs.parameters() if p.ndim == 2)
    sides = [Training(model, model, grad, own) for model, own in zip((ours, peer), names, strict=True)]
    return Work(sides[0], sides[1], kernel, flops + attention_flops(pairs, heads, dim), 0.0)


def gps(setting: Setting, sizes: Any, count: int) -> Work:
    """Both sides pass messages by the same module, PyTorch Geometric's GINE."""
    from torch_geometric.nn import GINEConv, GPSConv

    from xformerlib.interop.pyg import from_pyg

    sizes = sizes(count).clamp(max=60)[-16:] if setting.quick else sizes(count)
    graph = molecules(sizes).to(setting.device)
    x, e = setting.random(graph.num_nodes, CHANNELS), setting.random(graph.num_edges, CHANNELS, seed=1)
    mlp = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, CHANNELS))
    theirs = drawn(GPSConv(CHANNELS, GINEConv(mlp), heads=HEADS)).train().to(setting.device, setting.dtype)
    ours = Fed(from_pyg(theirs), x, graph.edge_index, e, graph.batch)
    peer = Fed(theirs, x, graph.edge_index, graph.batch, edge_attr=e)
    plan = xf.plan(
        None, graph, heads=HEADS, head_dim=CHANNELS // HEADS, dtype=setting.dtype, device=setting.device
    ).kernel
    return beside(setting, theirs, (ours, peer), GPS_NAMES, plan, int((sizes**2).sum()), HEADS, CHANNELS // HEADS)


def transformer_conv(setting: Setting) -> Work:
    from torch_geometric.nn import TransformerConv

    from xformerlib.interop.pyg import from_pyg

    nodes, count, features = setting.size(20_000, 200), setting.size(200_000, 2000), 4
    heads, dim = 8, 32
    edge_index = unique_edges(nodes, count).to(setting.device)
    x, e = setting.random(nodes, CHANNELS), setting.random(count, features, seed=1)
    theirs = drawn(TransformerConv(CHANNELS, dim, heads=heads, edge_dim=features))
    theirs = theirs.to(setting.device, setting.dtype)
    ours, peer = Fed(from_pyg(theirs), x, edge_index, e), Fed(theirs, x, edge_index, e)
    return beside(setting, theirs, (ours, peer), CONV_NAMES, "sparse", count, heads, dim)


def hetero(setting: Setting) -> Work:
    """Two kinds of nodes, three of edges."""
    from torch_geometric.nn import HGTConv

    from xformerlib.interop.pyg import from_pyg

    counts = [setting.size(5000, 50), setting.size(8000, 80)]
    edges, pairs = {}, setting.size(40_000, 200)
    for number, (source, target) in enumerate(((0, 1), (1, 0), (1, 1))):
        ends = [
            torch.randint(counts[i], (pairs,), generator=torch.Generator().manual_seed(number))
            for i in (source, target)
        ]
        edges["ab"[source], str(number), "ab"[target]] = torch.stack(ends).to(setting.device)
    theirs = drawn(HGTConv(CHANNELS, CHANNELS, (["a", "b"], list(edges)), heads=HEADS))
    x = setting.random(sum(counts), CHANNELS)
    fed = OfKinds(from_pyg(theirs), x, counts, edges), OfKinds(theirs, x, counts, edges)
    names = ("x", "layer.out.1.weight"), ("x", "layer.out_lin.lins.b.weight")
    return beside(setting, theirs, fed, names, "sparse", 3 * pairs, HEADS, CHANNELS // HEADS)


class AgnnLayers(nn.Module):
    """PyTorch Geometric's layers between the ends of ours, with the same weights."""

    def __init__(self, ours: graph.AGNN) -> None:
        from torch_geometric.nn import AGNNConv

        super().__init__()
        self.embed, self.head = copy.deepcopy(ours.embed), copy.deepcopy(ours.head)
        self.layers = nn.ModuleList(AGNNConv() for _ in ours.temperature)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        z = self.embed(x).relu()
        for layer in self.layers:
            z = layer(z, edge_index)
        return self.head(z)


def agnn(setting: Setting) -> Work:
    """Attention by likeness alone, ten layers."""
    nodes, count, layers = setting.size(20_000, 200), setting.size(200_000, 2000), 10
    model = graph.AGNN(CHANNELS, CHANNELS, CHANNELS, layers, dropout=0.0).to(setting.device, setting.dtype)
    x, edge_index = setting.random(nodes, CHANNELS), unique_edges(nodes, count).to(setting.device)
    grad, placed = setting.random(nodes, CHANNELS, seed=1), xf.Graph(edge_index, nodes)
    plan = xf.plan(model.mask, placed, head_dim=CHANNELS, dtype=setting.dtype, device=setting.device)
    flops = layers * attention_flops(count + nodes, 1, CHANNELS) + 12.0 * nodes * CHANNELS**2
    ours, theirs = (
        Training(side, partial(side, x, edge_index), grad, ("embed.weight", "head.weight"))
        for side in (model, AgnnLayers(model).to(setting.device, setting.dtype))
    )
    return Work(ours, theirs, plan.kernel, flops, 0.0)


def million_edges(setting: Setting) -> Work:
    """The graph whole: nothing is sampled."""
    nodes, count, layers = setting.size(100_000, 200), setting.size(1_000_000, 2000), 3
    mask = masks.Edges(self_loops=True)
    model = graph.GraphTransformer(16, CHANNELS, 8, layers, HEADS, mask=mask).to(setting.device, setting.dtype)
    x, edge_index = setting.random(nodes, 16), unique_edges(nodes, count).to(setting.device)
    placed = xf.Graph(edge_index, nodes)
    dim = CHANNELS // HEADS
    plan = xf.plan(mask, placed, heads=HEADS, head_dim=dim, dtype=setting.dtype, device=setting.device)
    flops = 6.0 * nodes * sum(p.numel() for p in model.parameters() if p.ndim == 2)
    flops += layers * attention_flops(count + nodes, HEADS, dim)
    side = Training(model, lambda: model(x, edge_index), setting.random(nodes, 8, seed=1), ())
    return Work(side, None, plan.kernel, flops, 0.0)


GPS_WORK = "GPS layer (GINE, batch norm, {} channels, {} heads): 128 {}".format(CHANNELS, HEADS, "{}")
LINES = (
    Line(
        "gps-molecules", GPS_WORK.format("molecules (sizes as in ZINC)"), "PyG GPSConv", partial(gps, sizes=zinc_sizes, count=128),
        Target(faster=1.5),
    ),
    Line(
        "gps-proteins", GPS_WORK.format("protein graphs (sizes as in PROTEINS)"), "PyG GPSConv",
        partial(gps, sizes=protein_sizes, count=128), Target(faster=4),
    ),
    Line(
        "transformer-conv", "whole layer, 20,000 nodes of 64 channels, 200,000 random edges with 4 features, 8 heads x 32",
        "PyG TransformerConv", transformer_conv, Target(faster=6),
    ),
    Line(
        "hgt", "whole layer, 5,000 and 8,000 nodes of 64 channels, 3 kinds of 40,000 random edges, 4 heads x 16", "PyG HGTConv", hetero,
        Target(faster=2),
    ),
    Line(
        "agnn", f"AGNN, 10 layers: 20,000 nodes of {CHANNELS} channels, 200,000 random edges", "PyG AGNNConv", agnn, Target(faster=6),
    ),
    Line(
        "million-edges",
        f"GraphTransformer along edges, 3 layers of {CHANNELS} channels, {HEADS} heads, a step of training: 100,000 nodes, a million edges",
        "-", million_edges, Target(bytes=2e9),
    ),
)  # fmt: skip
