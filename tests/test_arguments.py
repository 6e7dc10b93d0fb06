"""Wrong arguments are refused where they are given: every parameter of every public class and function, with values of many kinds."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

import xformerlib as xf
from xformerlib import domains, graph, masks, positions, time_series as ts, vision
from xformerlib.time_series import _inputs

from .modules import BATCH, CASES, EDGES, GRAPH

# Of each kind one value; a parameter takes it, or refuses it by name.
WRONG: dict[str, Callable[[], Any]] = {
    "a string": lambda: "x", "None": lambda: None, "a float": lambda: 1.5, "a negative number": lambda: -1, "a large one": lambda: -1e9,
    "NaN": lambda: math.nan, "infinity": lambda: math.inf, "a bool": lambda: True, "an empty list": list, "a list": lambda: [1, "x"],
    "a dict": dict, "an object": object, "a tensor": lambda: torch.randn(2, 3), "no dimension": lambda: torch.tensor(1.5),
    "another dtype": lambda: torch.ones(2, 5, 8, dtype=torch.int64), "double": lambda: torch.zeros(2, 5, 8).double(),
    "an empty tensor": lambda: torch.empty(0), "bool tensor": lambda: torch.ones(2, 5, dtype=torch.bool),
    "a domain": lambda: xf.Sequence(5),
    "complex": lambda: 1j, "five axes": lambda: torch.randn(1, 1, 1, 1, 1), "numpy": lambda: np.ones(3),
    "zero": lambda: 0, "many": lambda: (1, 2, 3, 4, 5),
}  # fmt: skip

Q = torch.randn(1, 2, 4, 8)
SERIES = torch.randn(60, 1)
WINDOWS = ts.Windows(SERIES, 24, 6)
IMAGES = torch.randn(1, 3, 16, 16)
VIT = {"size": 16, "patch": 4, "dim": 8, "depth": 1, "heads": 2}
STACK: dict[str, Any] = {"dim": 8, "depth": 2, "heads": 2}
NODES: dict[str, Any] = {"in_channels": 8, "hidden_channels": 8, "out_channels": 3, "num_layers": 1, "heads": 2}
FORECAST: dict[str, Any] = {"channels": 1, "lookback": 24, "horizon": 6}
SMALL: dict[str, Any] = {"dim": 8, "depth": 1, "heads": 2}

# Constructors and functions with arguments that work.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Attention": (xf.Attention, {"dim": 8, "heads": 2}),
    "Block": (xf.Block, {"dim": 8, "heads": 2}),
    "Encoder": (xf.Encoder, STACK),
    "Decoder": (xf.Decoder, STACK),
    "EncoderDecoder": (xf.EncoderDecoder, {"dim": 8, "heads": 2, "encoder_depth": 1, "decoder_depth": 1}),
    "FeedForward": (xf.FeedForward, {"dim": 8}),
    "DropPath": (xf.DropPath, {"p": 0.1}),
    "Pooling": (xf.Pooling, {"dim": 8, "pool": "attention", "heads": 2}),
    "MultiheadPooling": (xf.MultiheadPooling, {"dim": 8, "heads": 2}),
    "attention": (xf.attention, {"query": Q, "key": Q, "value": Q}),
    "plan": (xf.plan, {"mask": None, "domain": xf.Sequence(5)}),
    "Sequence": (xf.Sequence, {"length": 5}),
    "Sequence.padded": (xf.Sequence.padded, {"lengths": [2, 3]}),
    "Sequence.packed": (xf.Sequence.packed, {"lengths": [2, 3]}),
    "Timeline": (xf.Timeline, {"times": torch.arange(4.0)}),
    "Grid.packed": (xf.Grid.packed, {"sizes": [(2, 2), (1, 3)]}),
    "Graph": (xf.Graph, {"edge_index": EDGES, "num_nodes": 6}),
    "Points": (xf.Points, {"coordinates": torch.randn(4, 2)}),
    "Local": (masks.Local, {"radius": 2}),
    "Dilated": (masks.Dilated, {"radius": 2, "step": 2}),
    "Windows mask": (masks.Windows, {"size": 2}),
    "Axial": (masks.Axial, {"axis": 0}),
    "Expander": (masks.Expander, {"degree": 2}),
    "Global": (masks.Global, {"tokens": 1}),
    "Prefix": (masks.Prefix, {"n": 1}),
    "Segments": (masks.Segments, {"ids": torch.zeros(4).long()}),
    "Keys": (masks.Keys, {"valid": torch.ones(4).bool()}),
    "Dense": (masks.Dense, {"allowed": torch.ones(4, 4).bool()}),
    "Where": (masks.Where, {"fn": lambda b, h, q, k: q >= k}),
    "Edges": (masks.Edges, {}),
    "Sinusoidal": (positions.Sinusoidal, {"dim": 8}),
    "Learned": (positions.Learned, {"dim": 8, "size": 5}),
    "RandomWalk": (positions.RandomWalk, {"dim": 8, "steps": 3}),
    "Rotary": (positions.Rotary, {"head_dim": 4}),
    "RelativeBias": (positions.RelativeBias, {"heads": 2}),
    "ContinuousBias": (positions.ContinuousBias, {"heads": 2}),
    "DistanceDecay": (positions.DistanceDecay, {"heads": 2}),
    "NTK": (positions.NTK, {"factor": 2.0}),
    "Interpolation": (positions.Interpolation, {"factor": 2.0}),
    "YaRN": (positions.YaRN, {"factor": 2.0, "original_length": 32}),
    "ViT": (vision.ViT, {"classes": 3, **VIT}),
    "Swin": (vision.Swin, {"classes": 3, "patch": 2, "window": 4, "dim": 8, "depths": (1, 1), "heads": (2, 2)}),
    "PatchEmbed": (vision.PatchEmbed, {"dim": 8}),
    "ConvStem": (vision.ConvStem, {"dim": 8}),
    "PatchMerging": (vision.PatchMerging, {"dim": 8, "out_dim": 12}),
    "PatchDropout": (vision.PatchDropout, {"share": 0.5}),
    "MaskedAutoencoder": (
        vision.MaskedAutoencoder, {"encoder": vision.ViT(3, **VIT), "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}),  # type: ignore[arg-type]
    "parameter_groups": (vision.parameter_groups, {"model": vision.ViT(3, **VIT), "weight_decay": 0.1}),  # type: ignore[arg-type]
    "EdgeAttention": (graph.EdgeAttention, {"in_channels": 8, "out_channels": 4}),
    "GPSLayer": (graph.GPSLayer, {"channels": 8, "conv": None, "heads": 2}),
    "GPS": (graph.GPS, NODES),
    "GraphTransformer": (graph.GraphTransformer, NODES),
    "Graphormer": (graph.Graphormer, NODES),
    "Exphormer": (graph.Exphormer, NODES),
    "SGFormer": (graph.SGFormer, {"in_channels": 8, "hidden_channels": 8, "out_channels": 3}),
    "AGNN": (graph.AGNN, {"in_channels": 8, "hidden_channels": 8, "out_channels": 3}),
    "PerformerAttention": (graph.PerformerAttention, {"channels": 8, "heads": 2}),
    "PolynormerAttention": (graph.PolynormerAttention, {"channels": 8, "heads": 2}),
    "SGFormerAttention": (graph.SGFormerAttention, {"channels": 8, "heads": 2}),
    "SignNet": (graph.SignNet, {"dim": 8, "eigenvectors": 3}),
    "GaussianBias": (graph.GaussianBias, {"heads": 2}),
    "RandomWalkBias": (graph.RandomWalkBias, {"heads": 2, "steps": 3}),
    "PathBias": (graph.PathBias, {"heads": 2, "edge_dim": 3}),
    "ExpanderAttention": (graph.ExpanderAttention, {"channels": 8, "heads": 2}),
    "HeteroAttention": (graph.HeteroAttention, {"in_channels": 8, "out_channels": 8, "metadata": (["a"], [("a", "to", "a")]), "heads": 2}),
    "AtomEncoder": (graph.AtomEncoder, {"dim": 8, "sizes": [3, 2]}),
    "EdgeReadout": (graph.EdgeReadout, {"dim": 8}),
    "AddRandomWalk": (graph.AddRandomWalk, {"steps": 3}),
    "AddLaplacian": (graph.AddLaplacian, {"k": 3}),
    "DLinear": (ts.DLinear, FORECAST), "SeasonalNaive": (ts.SeasonalNaive, FORECAST),
    "PatchTST": (ts.PatchTST, {**FORECAST, **SMALL}), "ITransformer": (ts.ITransformer, {**FORECAST, **SMALL}),
    "TimeXer": (ts.TimeXer, {**FORECAST, **SMALL, "patch": 8}), "Crossformer": (ts.Crossformer, {**FORECAST, **SMALL, "segment": 6}),
    "Informer": (ts.Informer, {**FORECAST, **SMALL}), "GroupTransformer": (ts.GroupTransformer, {**FORECAST, **SMALL, "patch": 8}),
    "CausalTransformer": (ts.CausalTransformer, {**FORECAST, **SMALL}),
    "EncoderDecoderTransformer": (ts.EncoderDecoderTransformer, {**FORECAST, **SMALL}),
    "TCN": (ts.TCN, {**FORECAST, "dim": 4}), "WaveNet": (ts.WaveNet, {**FORECAST, "dim": 4}), "RNN": (ts.RNN, {**FORECAST, "dim": 4}),
    "AttentionPoolingRNN": (ts.AttentionPoolingRNN, {**FORECAST, "dim": 4}),
    "AutoregressiveRNN": (ts.AutoregressiveRNN, {**FORECAST, "dim": 4}),
    "SeriesClassifier": (ts.SeriesClassifier, {"channels": 1, "classes": 3, **SMALL}), "Imputer": (ts.Imputer, {"channels": 1, **SMALL}),
    "MaskedPatches": (ts.MaskedPatches, {"model": ts.PatchTST(1, 24, 6, patch=8, stride=8, **SMALL)}),
    "Windows": (ts.Windows, {"values": SERIES, "lookback": 24, "horizon": 6}),
    "Quantile": (ts.Quantile, {"levels": (0.1, 0.9)}),
    "train": (ts.train, {"model": ts.DLinear(1, 24, 6), "windows": WINDOWS, "steps": 1, "batch_size": 2}),
    "evaluate": (ts.evaluate, {"model": ts.DLinear(1, 24, 6), "windows": WINDOWS}),
    "Forecaster": (ts.Forecaster, {"model": ts.DLinear, "lookback": 24, "horizon": 6}),
}  # fmt: skip


def _parameters(function: Callable[..., Any]) -> list[str]:
    signature = inspect.signature(function)
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, one in signature.parameters.items() if one.kind not in variable]


# What no parameter takes.
NEVER = ("an object", "complex")
# How messages say the rule; those without "must" are of arguments that have no use in the call.
RULE = re.compile(r"must|takes |has no |is for |is used by|is the row of|live nowhere|no context came")


def _refusals(
    call: Callable[..., Any], arguments: dict[str, Any], names: list[str], never: tuple[str, ...] = NEVER
) -> Iterator[str]:
    """Each wrong value that gives an error that does not name its argument and a rule; and of the kinds ``never`` each that gives none."""
    for name in names:
        for kind, make in WRONG.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call(**{**arguments, name: make()})
            except TypeCheckError:  # the annotation speaks, in tests alone: the library let it pass
                if kind in never:
                    yield f"{name}={kind}: accepted"
            except (TypeError, ValueError) as error:
                if name not in str(error) or not RULE.search(str(error)):
                    yield f"{name}={kind}: {type(error).__name__}: {str(error)[:100]}"
            except Exception as error:
                yield f"{name}={kind}: {type(error).__name__}: {str(error)[:100]}"
            else:
                if kind in never:
                    yield f"{name}={kind}: accepted"


@pytest.mark.parametrize("name", CALLS)
def test_every_wrong_argument_is_refused_by_name(name: str) -> None:
    function, arguments = CALLS[name]
    try:
        function(**arguments)
    except TypeError as error:  # the table is wrong
        raise AssertionError(f"{name}: {error}; it takes {_parameters(function)}") from error
    assert not list(_refusals(function, arguments, _parameters(function)))


def test_the_sweep_sees_what_is_accepted_silently() -> None:
    def takes_all(size: object) -> None: ...

    def says_nothing(size: object) -> None:
        raise ValueError("size")

    assert list(_refusals(takes_all, {}, ["size"])) == [f"size={kind}: accepted" for kind in NEVER]
    assert len(list(_refusals(says_nothing, {}, ["size"]))) == len(WRONG)


OWN = {name for name in CALLS if inspect.isclass(CALLS[name][0]) and issubclass(CALLS[name][0], nn.Module)}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(OWN - {"DropPath", "PatchDropout"}))
def test_a_misspelt_argument_names_the_class_that_was_called(name: str) -> None:
    function, arguments = CALLS[name]
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument 'bais'"):
        function(**arguments, bais=True)


def test_the_name_that_was_meant_is_said() -> None:
    with pytest.raises(
        TypeError, match=r"^Encoder\(\) got an unexpected keyword argument 'droput'; did you mean 'dropout'\?"
    ):
        xf.Encoder(8, 1, 2, droput=0.1)  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"^PatchTST\(\) got an unexpected option 'nrom' in block; did you mean 'norm'\?"
    ):
        ts.PatchTST(1, 24, 6, block={"nrom": "pre"})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize("name", sorted(OWN))
def test_whole_numbers_of_numpy_are_whole_numbers(name: str) -> None:
    function, arguments = CALLS[name]
    own = {key: np.int64(x) if type(x) is int else x for key, x in arguments.items()}
    function(**own)


@pytest.mark.parametrize(
    ("option", "value"),
    [("gate", "head"), ("sinks", "no"), ("softcap", -1), ("softcap", math.nan), ("dropout", math.nan), ("heads", 0), ("heads", True),
     ("layer_scale", math.nan), ("kernel", "fastest"), ("hidden", 0), ("qk_norm", "l2"), ("kv_heads", 1.0), ("drop_path", math.nan)],
)  # fmt: skip
@pytest.mark.parametrize("model", [xf.Encoder, xf.Decoder])
def test_options_are_refused_by_the_class_that_was_called(model: Callable[..., Any], option: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=option):
        model(**{"dim": 8, "depth": 1, "heads": 2, option: value})


CALLABLE = sorted(name for name in CASES if name not in ("Sum", "AtomEncoder", "EdgeReadout", "EncoderDecoder"))


def _forward(name: str) -> Iterator[str]:
    """Each wrong first argument that gives an error that does not name it."""
    module = CASES[name].make()
    if not hasattr(module, "forward") or isinstance(module, positions.Bias | positions.Rotation):
        return
    names = _parameters(module.forward)
    if not names:
        return
    rest: dict[str, Any] = {}
    if isinstance(module, graph.GraphModel | graph.EdgeAttention | graph.GPSLayer | graph.SGFormer | graph.AGNN):
        rest = {"edge_index": EDGES}
        if isinstance(module, graph.EdgeAttention):
            rest["edge_attr"] = torch.randn(7, 3)
    elif isinstance(module, positions.RandomWalk | graph.SignNet) or "domain" in names or "graph" in names:
        key = "domain" if "domain" in names else "graph"
        needs = GRAPH if key == "graph" or isinstance(module, positions.RandomWalk | graph.SignNet) else xf.Sequence(5)
        rest = {key: needs}
    elif len([x for x in inspect.signature(module.forward).parameters.values() if x.default is x.empty]) > 1:
        return
    yield from _refusals(module, rest, names[:1])


@pytest.mark.parametrize("name", CALLABLE)
def test_wrong_inputs_of_calls_are_refused_by_name(name: str) -> None:
    assert not list(_forward(name))


@pytest.mark.parametrize(
    "name", ["GPS", "GraphTransformer", "Graphormer", "Exphormer", "SGFormer", "AGNN", "EdgeAttention", "GPSLayer"]
)
def test_wrong_graphs_are_refused_by_name(name: str) -> None:
    module, x = CASES[name].make(), torch.randn(6, 8)
    given = {"edge_attr": torch.randn(7, 3)} if name == "EdgeAttention" else {}
    assert not list(_refusals(module, {"x": x, "edge_index": EDGES, **given}, ["edge_index"]))
    if "batch" in _parameters(module.forward):
        arguments = {"x": x, "edge_index": EDGES, "batch": BATCH}
        if name in ("GPS", "Graphormer"):
            arguments["edge_attr"] = torch.randn(7, 3)
        assert not list(_refusals(module, arguments, ["batch"]))


ENCODER = xf.Encoder(8, 1, 2)
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Encoder.forward": (ENCODER, {"x": torch.randn(2, 5, 8)}),
    "Decoder.forward": (xf.Decoder(8, 1, 2), {"x": torch.randn(2, 5, 8), "context": torch.randn(2, 3, 8)}),
    "Attention.forward": (xf.Attention(8, 2), {"x": torch.randn(2, 5, 8)}),
    "Attention.weights": (xf.Attention(8, 2).weights, {"x": torch.randn(2, 5, 8)}),
    "Block.forward": (xf.Block(8, 2), {"x": torch.randn(2, 5, 8)}),
    "Mask.dense": (masks.Causal().dense, {"domain": xf.Sequence(4)}),
    "Mask.bind": (masks.Causal().bind, {"domain": xf.Sequence(4)}),
    "Sequence.last": (xf.Sequence(5).last, {"count": 2}),
    "DLinear.forward": (ts.DLinear(1, 24, 6), {"x": torch.randn(2, 24, 1)}),
    "ViT.forward": (vision.ViT(3, **VIT), {"images": IMAGES}),  # type: ignore[arg-type]
    "ViT.intermediates": (vision.ViT(3, **VIT).intermediates, {"images": IMAGES}),  # type: ignore[arg-type]
}


def _parameters_of_call(call: Any) -> list[str]:
    return _parameters(call.forward if isinstance(call, nn.Module) else call)


@pytest.mark.parametrize("name", METHODS)
def test_wrong_arguments_of_methods_are_refused_by_name(name: str) -> None:
    call, arguments = METHODS[name]
    assert not list(_refusals(call, arguments, _parameters_of_call(call)))


def test_another_dtype_says_so() -> None:
    for module in (xf.Attention(8, 2), xf.Block(8, 2), xf.Encoder(8, 1, 2)):
        with pytest.raises(
            TypeError, match=r"^x must have the dtype of the weights, torch\.float32; got torch\.float64"
        ):
            module(torch.zeros(1, 5, 8).double())
        with torch.autocast("cpu", torch.bfloat16):
            module(torch.zeros(1, 5, 8, dtype=torch.bfloat16))


def test_nested_tensors_are_refused_with_the_way_out() -> None:
    x = torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)], layout=torch.jagged)
    for module in (xf.Attention(8, 2), xf.Encoder(8, 1, 2), xf.Pooling(8)):
        with pytest.raises(TypeError, match=r"x must not be a nested tensor.*Sequence\.packed\(lengths\)"):
            module(x)


X = torch.randn(6, 8)
KV = (torch.randn(1, 2, 40, 8),) * 3
KINDS = (["a"], [("a", "to", "a")])
Y = torch.randn(2, 5, 4)
ONES = torch.ones(3, dtype=torch.bool)
EDGE_DIM: dict[str, Any] = {**NODES, "edge_dim": 4}
LOCAL = masks.Local(2).to_config()


def _vit(**options: Any) -> vision.ViT:
    return vision.ViT(3, **{**VIT, **options})  # type: ignore[arg-type]


# Calls that are refused: how, and what the message says: the argument, the rule and what came.
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: masks.And((masks.Causal(), 5)), TypeError, "parts must be a mask, such as masks.Causal(); got int"),
    (lambda: masks.And(()), ValueError, "parts must be a tuple of at least one mask; got parts=()"),
    (lambda: masks.And(masks.Causal()), TypeError, "parts must be a tuple of masks; got parts=Causal()"),
    (lambda: masks.Or((5,)), TypeError, "parts must be a mask"),
    (lambda: masks.Not(5), TypeError, "part must be a mask"),
    (lambda: masks.Expander(-1), ValueError, "degree must be >= 0; got degree=-1"),
    (lambda: graph.Exphormer(**NODES, degree=-1), ValueError, "degree must be >= 0; got degree=-1"),
    (lambda: masks.Dilated((1, 2), (1, 2, 3)), ValueError, "radius and step must have one number each, or one per axis"),
    (lambda: masks.Windows((2, 2), (1,)), ValueError, "size and shift must have one number each, or one per axis"),
    (lambda: masks.Local(raduis=1), TypeError, "Local() got an unexpected keyword argument 'raduis'; did you mean 'radius'?"),
    (lambda: masks.Windows(8, shfit=2), TypeError, "Windows() got an unexpected keyword argument 'shfit'; did you mean 'shift'?"),
    (lambda: masks.Causal(1), TypeError, "Causal() got 1 arguments by place; it takes none"),
    (lambda: masks.Local(1, "cut", 2), TypeError, "Local() got 3 arguments by place; it takes at most 2, radius, border"),
    (lambda: xf.attention(*KV, mask=masks.Where(lambda b, h, q, k: ONES)), ValueError, "fn must return a tensor that broadcasts"),
    (lambda: masks.Where(lambda b, h, q, k: ONES).dense(xf.Sequence(4)), ValueError, "fn must return a tensor that broadcasts"),
    (lambda: masks.Segments(None), TypeError, "ids must be a tensor of integers; got NoneType"),
    (lambda: domains.Subset(xf.Sequence(5), torch.tensor([7])), ValueError, "index must hold tokens from 0 to 4"),
    (lambda: domains.Subset(xf.Sequence(5), torch.tensor([-1])), ValueError, "index must hold tokens from 0 to 4"),
    (lambda: domains.Subset(xf.Sequence(5), torch.tensor([1.0])), TypeError, "index must be a tensor of integers; got torch.float32"),
    (lambda: domains.Subset(xf.Sequence(5), torch.tensor([[1, 1]])), ValueError, "index must name no token twice"),
    (lambda: domains.Subset(xf.Sequence(5), [1]), TypeError, "index must be a tensor of integers; got list"),
    (lambda: domains.Subset(5, torch.tensor([1])), TypeError, "whole must be a domain, and no subset; got whole=5"),
    (lambda: xf.Sequence(5).subset(torch.tensor([7])), ValueError, "index must hold tokens from 0 to 4"),
    (lambda: xf.Points(torch.zeros(3, 2, dtype=torch.complex64)), TypeError, "coordinates must be real numbers"),
    (
        lambda: xf.plan(None, xf.Sequence(4), heads=3, kv_heads=2),
        ValueError, "heads must be divisible by kv_heads; got heads=3 and kv_heads=2",
    ),
    (lambda: xf.plan(None, xf.Sequence(4), dtype=torch.int64), ValueError, "dtype must be a floating-point dtype"),
    (lambda: xf.attention(Q.to_sparse(), Q, Q), TypeError, "query must be a dense tensor; got query of torch.sparse_coo"),
    (lambda: graph.AGNN(8, 8, 3, mask=5), TypeError, "mask must be a mask such as masks.Causal(); got int"),
    (lambda: graph.SGFormer(8, 8, 3, trans_num_layers=-1), ValueError, "trans_num_layers must be >= 0; got trans_num_layers=-1"),
    (lambda: graph.SGFormer(8, 8, 3, gnn_num_layers=-1), ValueError, "gnn_num_layers must be >= 0; got gnn_num_layers=-1"),
    (lambda: graph.SGFormer(8, 8, 3, conv=lambda: None), TypeError, "conv must be a function of no arguments that makes a module"),
    (lambda: graph.GPS(**{**NODES, "in_channels": 0}), ValueError, "in_channels must be >= 1, or -1"),
    (lambda: graph.GPS(**NODES, edge_dim=0), ValueError, "edge_dim must be >= 1, or -1"),
    (lambda: graph.EdgeAttention((8, 0), 4), ValueError, "in_channels must be >= 1, or -1"),
    (lambda: graph.GPS(**NODES, conv=lambda: None), TypeError, "conv must be a function of no arguments that makes a module"),
    (lambda: graph.Exphormer(**NODES, conv=lambda: None), TypeError, "conv must be a function of no arguments that makes a module"),
    (lambda: graph.GPS(**NODES, norm=lambda d: 1), TypeError, "norm must be a function of one number that makes a module"),
    (lambda: xf.Attention(8, 2, out_norm=lambda d: 1), TypeError, "out_norm must be a function of one number that makes a module"),
    (lambda: xf.Attention(8, 2, qk_norm=lambda: 1), TypeError, "qk_norm must be a function of one number that makes a module"),
    (lambda: xf.Attention(8, 2, qk_norm=lambda d: 1), TypeError, "qk_norm must be a function of one number that makes a module"),
    (lambda: xf.Block(8, 2, norm_layer=lambda d: 1), TypeError, "norm_layer must be a function of one number that makes a module"),
    (lambda: xf.Block(8, 2, norm_layer=nn.LayerNorm(8)), TypeError, "norm_layer must be a function of one number that makes a module"),
    (lambda: xf.Block(8, 2, hidden_norm=lambda d: 1), TypeError, "hidden_norm of a block) must be a function of one number"),
    (lambda: xf.Encoder(8, 1, 2, position=lambda: None), TypeError, "position must be a function of no arguments that makes a Position"),
    (
        lambda: xf.Encoder(8, 1, 2, position=positions.Rotary),
        TypeError, "position must be a function of no arguments that makes a Position",
    ),
    (lambda: positions.Sum(), ValueError, "positions must be at least one position"),
    (
        lambda: ts.CausalTransformer(1, 24, 6, dim=8, heads=2, position=positions.Rotary(8)),
        ValueError, "position must turn the channels of a head, head_dim=4",
    ),
    (lambda: xf.from_config({**LOCAL, "xformerlib": 1.0}), ValueError, "config must have 'xformerlib': 1"),
    (lambda: masks.from_config(5), TypeError, "config must describe a Mask; got a int"),
    (lambda: masks.from_config("masks.Local"), TypeError, "config must describe a Mask; got a str"),
    (lambda: masks.from_config(xf.Sequence(4).to_config()), TypeError, "config must describe a Mask; got a Sequence"),
    (lambda: positions.from_config(LOCAL), TypeError, "config must describe a Position; got a Local"),
    (lambda: domains.from_config(LOCAL), TypeError, "config must describe a Domain; got a Local"),
    *(
        (lambda config=config: xf.from_config(config), ValueError, "config must be as to_config writes it; got {")  # type: ignore[misc]
        for config in (
            {"float": "x"}, {"tuple": 5}, {"dict": 3}, {"dict": [[[1], 2]]}, {"dict": [1]},
            {"tensor": ["x"], "dtype": "float32", "shape": [1]}, {"tensor": [1.0], "dtype": "float32", "shape": [3]},
        )
    ),
    (lambda: graph.GPS(**EDGE_DIM)(X, EDGES, torch.randn(3, 5)), ValueError, "edge_attr must be (7, 4), a row for each edge; got (3, 5)"),
    (lambda: graph.GPS(**EDGE_DIM)(X, EDGES, torch.randn(3, 4)), ValueError, "edge_attr must be (7, 4), a row for each edge; got (3, 4)"),
    (lambda: graph.Exphormer(**EDGE_DIM)(X, EDGES, torch.randn(7, 5)), ValueError, "edge_attr must be (7, 4)"),
    (
        lambda: graph.Graphormer(**EDGE_DIM)(X, EDGES, torch.randn(6, 4)),
        ValueError, "edge_attr must be (7, ...), a row for each edge; got (6, 4)",
    ),
    (
        lambda: graph.EdgeAttention(8, 4, edge_dim=4)(X, EDGES, torch.randn(6, 4)),
        ValueError, "edge_attr must have a row for each of the 7 edges",
    ),
    (lambda: graph.EdgeAttention(8, 4, edge_dim=4)(X, EDGES, "x"), TypeError, "edge_attr must be a tensor"),
    (lambda: graph.EdgeReadout(8)(X, torch.tensor([[0, 9], [1, 2]])), ValueError, "edge_index must index the 6 sources"),
    (lambda: graph.EdgeReadout(8)(torch.randn(6, 7), EDGES), ValueError, "x must be (nodes, dim=8); got (6, 7)"),
    (lambda: graph.EdgeReadout(8, edge_dim=3)(X, EDGES, torch.randn(7, 4)), ValueError, "edge_attr must be (7, 3)"),
    (lambda: graph.ExpanderAttention(8, 2)(X, "x"), TypeError, "graph must be a Graph, where the tokens live; got graph='x'"),
    (lambda: graph.HeteroAttention(8, 8, KINDS, 2)(X, EDGES), TypeError, "x_dict must be a dict of tensors by kind"),
    (lambda: graph.HeteroAttention(8, 8, KINDS, 2)({"a": X}, EDGES), TypeError, "edge_index_dict must be a dict of tensors by kind"),
    (lambda: graph.FlipSigns()(5), TypeError, "data must have edge_index"),
    (lambda: _vit()(IMAGES.half()), TypeError, "images must have the dtype of the weights, torch.float32; got torch.float16"),
    (lambda: _vit()([IMAGES[0].half()]), TypeError, "images must have the dtype of the weights, torch.float32; got torch.float16"),
    (lambda: _vit(embed=vision.ConvStem(8))(IMAGES.half()), TypeError, "images must have the dtype of the weights, torch.float32"),
    (
        lambda: _vit(patch=(4, 4, 4))(torch.randn(2, 3, 16, 16)),
        ValueError, "The batch is there, but an axis of the images is not: they have 3",
    ),
    (lambda: _vit()(IMAGES[0]), ValueError, "Add the batch axis"),
    (lambda: vision.attention_maps(5, IMAGES), TypeError, "model must be a module made of blocks, such as a ViT; got model=5"),
    (lambda: vision.attention_maps(nn.Linear(1, 1), IMAGES), ValueError, "model must be made of blocks"),
    (lambda: vision.attention_maps(_vit(), IMAGES, layers="x"), TypeError, "layers must be a list of indices of the 1 blocks; got 'x'"),
    (
        lambda: vision.attention_maps(_vit(), IMAGES, bogus=1),
        TypeError, "got an unexpected keyword argument 'bogus'; it takes images, valid",
    ),
    (lambda: vision.rollout(5), TypeError, "maps must be a list of maps, as attention_maps returns them; got maps=5"),
    (lambda: vision.rollout([5]), TypeError, "maps must be a list of maps, as attention_maps returns them; got maps=[5]"),
    (lambda: vision.PatchDropout(0.5)(torch.randn(2, 5, 8)), TypeError, "features must be Features(tokens, domain)"),
    (lambda: ts.instance_norm(Y, eps=-1), ValueError, "eps must be a finite number >= 0; got eps=-1"),
    (lambda: ts.instance_norm("x"), TypeError, "x must be a tensor; got x='x'"),
    (lambda: ts.instance_norm(Y[0]), ValueError, "x must be (batch, steps, channels); got (5, 4)"),
    (lambda: ts.fill_forward("x", Y.isnan()), TypeError, "x must be a tensor; got x='x'"),
    (lambda: ts.fill_forward(Y, Y), TypeError, "observed must be a bool tensor"),
    (lambda: ts.quantile_loss(Y[..., :1], Y[..., 0], [1.5]), ValueError, "levels must be in (0, 1); got levels=1.5"),
    (lambda: ts.quantile_loss(Y[..., :1], Y[..., 0], "x"), TypeError, "levels must be a list of numbers in (0, 1)"),
    (lambda: ts.patches(Y, 4, 2, pad_end="x"), TypeError, "pad_end must be True or False; got pad_end='x'"),
    (lambda: ts.patches("x", 4, 2), TypeError, "x must be a tensor; got x='x'"),
    (lambda: ts.prob_sparse_attention(*KV, causal="x"), TypeError, "causal must be True or False; got causal='x'"),
    (lambda: ts.prob_sparse_attention("x", *KV[:2]), TypeError, "query must be a tensor; got query='x'"),
    (lambda: ts.prob_sparse_attention(KV[0][..., :4], *KV[:2]), ValueError, "key must have the dim of query, 4; got 8"),
    (lambda: ts.Windows(SERIES, 24, 6, first=-1), ValueError, "first must be >= 0; got first=-1"),
    (lambda: ts.Windows(SERIES, 24, 6, first=[61]), ValueError, "first must be <= 60, the steps of series 0; got first=61"),
    (lambda: ts.Windows(SERIES, 24, 6, first=61), ValueError, "values must hold a window of lookback=24 and horizon=6 steps"),
    (lambda: ts.Windows(SERIES[:20], 24, 6), ValueError, "values must hold a window of lookback=24 and horizon=6 steps"),
    (lambda: ts.Conformal(torch.randn(3)), ValueError, "widths must be floating-point (999, horizon)"),
    (lambda: ts.Conformal.of(torch.randn(3)), ValueError, "errors must be (windows, horizon, channels), and not empty; got (3,)"),
    (lambda: ts.Forecaster(ts.DLinear, 24, 6, freq=-1), ValueError, "freq must be >= 1; got freq=-1"),
    (lambda: ts.Forecaster.load(5), TypeError, "path must be the path of a file"),
    (lambda: ts.train(ts.DLinear(1, 24, 6), WINDOWS, seed=-1), ValueError, "seed must be >= 0; got seed=-1"),
    (lambda: ts.CausalConvolution(0, 2, 3), ValueError, "inputs must be >= 1; got inputs=0"),
    (lambda: ts.CausalConvolution(2, 2, 3)("x"), TypeError, "input must be a floating-point tensor; got input='x'"),
    (lambda: ts.CausalConvolution(2, 2, 3)(torch.randn(2, 3, 5)), ValueError, "input must be (batch, inputs=2, steps); got (2, 3, 5)"),
    (lambda: ts.PatchTST(1, 24, 6, patch=8, stride=9), ValueError, "stride must be <= patch"),
    (lambda: ts.mse("x", Y), TypeError, "forecast must be a tensor; got forecast='x'"),
    (lambda: ts.mae(Y, "x"), TypeError, "target must be a tensor; got target='x'"),
    (lambda: ts.mse(Y, Y, Y), TypeError, "observed must be a bool tensor, False where a value is missing; got torch.float32"),
    (lambda: ts.negative_log_likelihood("x", Y), TypeError, "forecast must be a StudentTForecast; got forecast='x'"),
    (lambda: ts.AttentionPooling(4)("x"), TypeError, "h must be a floating-point tensor; got str"),
    (lambda: ts.AttentionPooling(4)(Y[..., :3]), ValueError, "h must have dim=4 channels on its last axis; got (2, 5, 3)"),
    (lambda: ts.TokenBatchNorm(4)("x"), TypeError, "x must be a floating-point tensor; got str"),
    (lambda: ts.TokenBatchNorm(4)(Y[..., :3]), ValueError, "x must have 4 channels on its last axis; got (2, 5, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "says"), REFUSED, ids=[f"{i}: {row[2][:40]}" for i, row in enumerate(REFUSED)]
)
def test_a_call_that_cannot_be_is_refused(call: Callable[[], Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=re.escape(says)) as caught:
        call()
    assert type(caught.value) is kind


def test_a_step_that_pandas_does_not_know_is_refused() -> None:
    pytest.importorskip("pandas")
    with pytest.raises(ValueError, match=r"^freq must be a step of pandas .* got freq='x'"):
        ts.Forecaster(ts.DLinear, 24, 6, freq="x")
    assert ts.Forecaster(ts.DLinear, 24, 6, freq="MS").freq == "MS"


def test_every_public_class_is_in_the_sweep() -> None:
    swept = {getattr(function, "__name__", "") for function, _ in CALLS.values()}
    public = {
        name
        for package in (xf, masks, positions, vision, graph, ts)
        for name, thing in vars(package).items()
        if inspect.isclass(thing) and issubclass(thing, nn.Module) and not inspect.isabstract(thing)
    }
    bases = {
        "Position",
        "Embedding",
        "Rotation",
        "Bias",
        "Sum",
        "GraphModel",
        "ForecastModel",
        "StepwiseModel",
        "Classifier",
        "Tokenizer",
    }
    parts = {
        "Affine",
        "Time2Vec",
        "TokenBatchNorm",
        "AttentionPooling",
        "CausalConvolution",
        "Head",
        "BondEncoder",
        "Point",
        "StudentT",
    }
    assert public - bases - parts <= swept, public - bases - parts - swept
    assert _inputs.Inputs.__annotations__.keys() == {"past", "future", "static", "head"}
