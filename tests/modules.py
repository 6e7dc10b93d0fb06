"""Every public module of the package, small, with a call: what torch's users do to any model is tried on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import xformerlib as xf
from xformerlib import graph, masks, positions, time_series as ts, vision

EDGES = torch.tensor([[0, 1, 1, 2, 3, 4, 5], [1, 0, 2, 1, 4, 3, 3]])
BATCH = torch.tensor([0, 0, 0, 1, 1, 1])
GRAPH = xf.Graph(EDGES, 6, batch=BATCH)
KINDS = (["a", "b"], [("a", "to", "b"), ("b", "to", "b"), ("b", "to", "a")])
POINTS = xf.Points(torch.tensor([[0.0, 0.1], [1.0, 0.3], [0.5, 2.0], [3.0, 1.0]]))


class Case(NamedTuple):
    """A module and a call of it; the sum of what it returns reaches every parameter."""

    make: Callable[[], nn.Module]
    call: Callable[[Any], Any]


def _tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _attention(position: Callable[[], positions.Position], domain: xf.Domain) -> Case:
    """A position in the layer that it acts in."""
    return Case(lambda: xf.Attention(8, 2, position=position()), lambda m: m(_tokens(domain.num_tokens, 8), domain))


def _forecaster(model: type[ts.ForecastModel], lookback: int = 24, **options: Any) -> Case:
    return Case(lambda: model(2, lookback, 6, **options), lambda m: m(_tokens(3, lookback, 2)))


def _images() -> Tensor:
    return _tokens(2, 3, 16, 16)


VIT: dict[str, Any] = {"size": 16, "patch": 4, "dim": 8, "depth": 2, "heads": 2}
SMALL: dict[str, Any] = {"dim": 8, "depth": 1, "heads": 2, "hidden": 16, "dropout": 0.0}
GATED: dict[str, Any] = {"activation": "swiglu", "gate": True, "sinks": True, "qk_norm": "rms", "kv_heads": 1}

CASES: dict[str, Case] = {
    "Attention": Case(
        lambda: xf.Attention(8, 2, gate=True, sinks=True, qk_norm="layer", out_norm="rms"), lambda m: m(_tokens(2, 5, 8))
    ),
    "Attention, structured": Case(
        lambda: xf.Attention(8, 2, mask=masks.Local(2) | masks.Global(1), kernel="windowed"), lambda m: m(_tokens(2, 40, 8))
    ),
    "Attention, cross": Case(lambda: xf.Attention(8, 2), lambda m: m(_tokens(2, 5, 8), context=_tokens(2, 7, 8))),
    "Block": Case(lambda: xf.Block(8, 2, norm="sandwich", layer_scale=0.5, **GATED), lambda m: m(_tokens(2, 5, 8))),
    "Encoder": Case(lambda: xf.Encoder(8, 2, 2, norm="post"), lambda m: m(_tokens(2, 5, 8))),
    "Encoder, last": Case(lambda: xf.Encoder(8, 2, 2), lambda m: m(_tokens(2, 5, 8), last=2)),
    "Decoder": Case(lambda: xf.Decoder(8, 2, 2), lambda m: m(_tokens(2, 5, 8), context=_tokens(2, 3, 8))),
    "EncoderDecoder": Case(
        lambda: xf.EncoderDecoder(8, 2, encoder_depth=1, decoder_depth=1, hidden=16),
        lambda m: m(_tokens(2, 5, 8), _tokens(2, 4, 8)),
    ),
    "FeedForward": Case(lambda: xf.FeedForward(8, activation="geglu", norm="layer"), lambda m: m(_tokens(2, 5, 8))),
    "DropPath": Case(lambda: xf.DropPath(0.5).eval(), lambda m: m(_tokens(2, 5, 8), xf.Sequence(5))),
    "Pooling": Case(lambda: xf.Pooling(8, "attention", heads=2), lambda m: m(_tokens(2, 5, 8), xf.Sequence(5))),
    "MultiheadPooling": Case(lambda: xf.MultiheadPooling(8, 2), lambda m: m(_tokens(2, 5, 8), xf.Sequence(5))),
    # positions
    "ContinuousBias, grid": _attention(lambda: positions.ContinuousBias(2, hidden=8, axes=2), xf.Grid(2, 3)),
    "ContinuousBias, points": _attention(lambda: positions.ContinuousBias(2, hidden=8), POINTS),
    "ContinuousBias, graph": _attention(lambda: positions.ContinuousBias(2, hidden=8, axes=2), GRAPH),
    "RelativeBias": _attention(lambda: positions.RelativeBias(2, size=(2, 3)), xf.Grid(2, 3)),
    "DistanceDecay": _attention(lambda: positions.DistanceDecay(2, learned=True), xf.Sequence(5)),
    "Rotary": _attention(lambda: positions.Rotary(4, mixed=True, heads=2), xf.Grid(2, 3)),
    "RandomWalk": Case(lambda: positions.RandomWalk(8, 3), lambda m: m(_tokens(6, 8), GRAPH)),
    "Learned": Case(lambda: positions.Learned(8, 5), lambda m: m(_tokens(2, 5, 8), xf.Sequence(5))),
    "Sinusoidal": Case(lambda: positions.Sinusoidal(8), lambda m: m(_tokens(2, 5, 8), xf.Sequence(5))),
    "Sum": Case(
        lambda: positions.Learned(8, 5) + positions.Sinusoidal(8), lambda m: m.embeddings[0](_tokens(2, 5, 8), xf.Sequence(5))
    ),
    # images
    "ViT": Case(lambda: vision.ViT(3, **VIT), lambda m: m(_images())),
    "ViT, rotary": Case(lambda: vision.ViT(3, position=positions.Rotary(4), **VIT), lambda m: m(_images())),
    "ViT, list": Case(lambda: vision.ViT(3, **VIT), lambda m: m([_images()[0], _images()[1, :, :8]])),
    "Swin": Case(
        lambda: vision.Swin(3, patch=2, window=4, dim=8, depths=(2, 2), heads=(2, 2)), lambda m: m(_images())
    ),
    "Swin, version 2": Case(
        lambda: vision.Swin(3, patch=2, window=4, dim=8, depths=(2, 1), heads=(2, 2), version=2), lambda m: m(_images())
    ),
    "MaskedAutoencoder": Case(
        lambda: vision.MaskedAutoencoder(vision.ViT(3, **VIT), decoder_dim=8, decoder_depth=1, decoder_heads=2),
        lambda m: m(_images()).loss,
    ),
    "PatchEmbed": Case(lambda: vision.PatchEmbed(8, 4, norm="layer"), lambda m: m(_images())),
    "ConvStem": Case(lambda: vision.ConvStem(8), lambda m: m(_images())),
    "PatchMerging": Case(lambda: vision.PatchMerging(8, 12), lambda m: m(_tokens(2, 16, 8), xf.Grid(4, 4)).tokens),
    "PatchDropout": Case(lambda: vision.PatchDropout(0.5).eval(), lambda m: m(vision.Features(_tokens(2, 4, 8), xf.Grid(2, 2))).tokens),
    # graphs
    "EdgeAttention": Case(
        lambda: graph.EdgeAttention(8, 4, heads=2, edge_dim=3, beta=True), lambda m: m(_tokens(6, 8), EDGES, _tokens(7, 3))
    ),
    "HeteroAttention": Case(
        lambda: graph.HeteroAttention({"a": 4, "b": 8}, 8, KINDS, heads=2, relation_bias=True),
        lambda m: sum(
            x.sum() for x in m({"a": _tokens(3, 4), "b": _tokens(4, 8)}, dict.fromkeys(KINDS[1], EDGES[:, :2])).values()
        ),
    ),
    "GPSLayer": Case(
        lambda: graph.GPSLayer(8, graph.EdgeAttention(8, 4, heads=2), heads=2), lambda m: m(_tokens(6, 8), EDGES, batch=BATCH)
    ),
    "GPS": Case(
        lambda: graph.GPS(8, 8, 3, num_layers=1, heads=2, edge_dim=3, pool="mean", position=positions.RandomWalk(8, 3)),
        lambda m: m(_tokens(6, 8), EDGES, _tokens(7, 3), BATCH),
    ),
    "GraphTransformer": Case(
        lambda: graph.GraphTransformer(8, 8, 3, num_layers=1, heads=2, position=graph.RandomWalkBias(2, 3)),
        lambda m: m(_tokens(6, 8), EDGES, batch=BATCH),
    ),
    "Graphormer": Case(
        lambda: graph.Graphormer(8, 8, 3, num_layers=1, heads=2, edge_dim=3), lambda m: m(_tokens(6, 8), EDGES, _tokens(7, 3), BATCH)
    ),
    "Exphormer": Case(
        lambda: graph.Exphormer(8, 8, 3, num_layers=1, heads=2), lambda m: m(_tokens(6, 8), EDGES, batch=BATCH)
    ),
    "SGFormer": Case(lambda: graph.SGFormer(8, 8, 3), lambda m: m(_tokens(6, 8), EDGES)),
    "AGNN": Case(lambda: graph.AGNN(8, 8, 3), lambda m: m(_tokens(6, 8), EDGES)),
    "PerformerAttention": Case(lambda: graph.PerformerAttention(8, 2), lambda m: m(_tokens(6, 8), GRAPH)),
    "PolynormerAttention": Case(lambda: graph.PolynormerAttention(8, 2), lambda m: m(_tokens(6, 8), GRAPH)),
    "SGFormerAttention": Case(lambda: graph.SGFormerAttention(8, 2), lambda m: m(_tokens(6, 8), GRAPH)),
    "SignNet": Case(lambda: graph.SignNet(8, 3), lambda m: m(_tokens(6, 8), GRAPH)),
    "GaussianBias": Case(lambda: xf.Attention(8, 2, position=graph.GaussianBias(2, 8)), lambda m: m(_tokens(4, 8), POINTS)),
    "AtomEncoder": Case(lambda: graph.AtomEncoder(8, [3, 2]), lambda m: m(torch.tensor([[0, 1], [2, 0]]))),
    "EdgeReadout": Case(
        lambda: graph.EdgeReadout(8, edge_dim=3), lambda m: m(_tokens(6, 8), EDGES, _tokens(7, 3))
    ),
    # time series
    "PatchTST": _forecaster(ts.PatchTST, patch=8, stride=4, **SMALL),
    "DLinear": _forecaster(ts.DLinear, kernel=5),
    "ITransformer": _forecaster(ts.ITransformer, **SMALL),
    "TimeXer": _forecaster(ts.TimeXer, patch=8, **SMALL),
    "Crossformer": _forecaster(ts.Crossformer, segment=6, **SMALL),
    "Informer": _forecaster(ts.Informer, **SMALL),
    "GroupTransformer": _forecaster(ts.GroupTransformer, patch=8, **SMALL),
    "CausalTransformer": _forecaster(ts.CausalTransformer, **SMALL),
    "EncoderDecoderTransformer": _forecaster(ts.EncoderDecoderTransformer, **SMALL),
    "TCN": _forecaster(ts.TCN, dim=4),
    "WaveNet": _forecaster(ts.WaveNet, dim=4, depth=3),
    "RNN": _forecaster(ts.RNN, dim=4),
    "AttentionPoolingRNN": _forecaster(ts.AttentionPoolingRNN, dim=4),
    "AutoregressiveRNN": _forecaster(ts.AutoregressiveRNN, dim=4),
    "SeriesClassifier": Case(lambda: ts.SeriesClassifier(2, 3, **SMALL), lambda m: m(_tokens(3, 12, 2))),
    "Imputer": Case(
        lambda: ts.Imputer(2, **SMALL), lambda m: m(_tokens(3, 12, 2), observed=_tokens(3, 12, 2) > 0)
    ),
    "MaskedPatches": Case(lambda: ts.MaskedPatches(ts.PatchTST(2, 24, 6, patch=8, stride=8, **SMALL)), lambda m: m(_tokens(3, 24, 2))),
}  # fmt: skip


def tensors_of(found: Any) -> list[Tensor]:
    """The floating-point tensors among what a module returns."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    return [tensor for each in values for tensor in tensors_of(each)]


def total(found: Any) -> Tensor:
    """One number out of whatever a module returns."""
    parts = []
    for x in tensors_of(found):
        weights = torch.arange(x.numel()).double().cos().view_as(x)  # a norm makes plain sums of its outputs constant
        parts.append((x * weights.to(x.dtype)).sum())
    return sum(parts[1:], parts[0])


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.Embedding)


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that torch's users act on."""
    return {name: part for name, part in module.named_modules() if isinstance(part, LAYERS)}
