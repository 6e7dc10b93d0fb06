"""Models leave Python: torch.export, ONNX, torch.jit.trace, shapes on the meta device; one compiled graph, autocast. Equal to eager."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

import xformerlib as xf
from tests.closeness import assert_close
from xformerlib import graph, masks, positions, time_series, vision

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the exporters
]


class On(nn.Module):
    """An encoder on a domain of its own."""

    def __init__(self, domain: xf.Domain, **options: Any) -> None:
        super().__init__()
        self.domain, self.encoder = domain, xf.Encoder(8, 2, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, self.domain)


class OnGraph(nn.Module):
    """A model of graphs on two of its own."""

    def __init__(self, model: nn.Module, virtual_nodes: int = 0) -> None:
        super().__init__()
        edges = torch.tensor([[0, 1, 2, 3, 5, 6, 7], [1, 2, 3, 0, 6, 7, 8]])
        batch = torch.tensor([0] * 5 + [1] * 4)
        self.graph = xf.Graph(torch.cat([edges, edges.flip(0)], 1), 9, batch=batch, virtual_nodes=virtual_nodes)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x, self.graph)
        return out


class Model:
    """A model and its input; ``depth`` layers."""

    def __init__(self, make: Callable[[], nn.Module], *shape: int, depth: int = 2) -> None:
        self.make, self.shape, self.depth = make, shape, depth


SMALL: dict[str, Any] = {"patch": 2, "dim": 8, "window": 4, "depths": (2, 2), "heads": (2, 2)}
VIT: dict[str, Any] = {"size": 32, "patch": 4, "dim": 8, "depth": 2, "heads": 2}
MODELS: dict[str, Model] = {
    "ViT": Model(lambda: vision.ViT(3, **VIT), 2, 3, 32, 32),
    "ViT, windows": Model(lambda: vision.ViT(3, mask=masks.Windows(4), **VIT), 2, 3, 32, 32),
    "ViTDet: windows and all": Model(lambda: vision.ViT(3, mask=[masks.Windows(4), None], **VIT), 2, 3, 32, 32),
    "Swin": Model(lambda: vision.Swin(3, **SMALL), 2, 3, 32, 32, depth=4),
    "Swin v2": Model(lambda: vision.Swin(3, version=2, **SMALL), 2, 3, 32, 32, depth=4),
    "neighbourhoods": Model(lambda: On(xf.Grid(16, 16), mask=masks.Local(2), position=positions.RelativeBias(2, size=(16, 16))), 2, 256, 8),
    "axial": Model(lambda: On(xf.Grid(24, 24), mask=masks.Axial(0)), 2, 576, 8),
    "window | global": Model(lambda: On(xf.Sequence(300), mask=masks.Local(8) | masks.Global(1), position=positions.Rotary(4)), 2, 300, 8),
    "causal window, sinks": Model(
        lambda: On(xf.Sequence(300), mask=masks.Causal() & masks.Local(8), position=positions.DistanceDecay(2), sinks=True), 2, 300, 8
    ),
    "expander": Model(lambda: On(xf.Sequence(300), mask=masks.Expander(4, 0)), 2, 300, 8),
    "soft cap": Model(lambda: On(xf.Sequence(20), softcap=5.0), 2, 20, 8),
    "padded": Model(lambda: On(xf.Sequence.padded([20, 30])), 2, 30, 8),
    "PatchTST": Model(lambda: time_series.PatchTST(2, 48, 12, dim=8, depth=2, heads=2, patch=8, stride=4), 2, 48, 2),
    "GraphTransformer, edges": Model(lambda: OnGraph(graph.GraphTransformer(8, 8, 3, 2, 2, mask=masks.Edges())), 9, 8),
    "GPS, pooled": Model(lambda: OnGraph(graph.GPS(8, 8, 3, 2, 2, pool="mean")), 9, 8),
    "SGFormer": Model(lambda: OnGraph(graph.SGFormer(8, 8, 3)), 9, 8),
    "AGNN": Model(lambda: OnGraph(graph.AGNN(8, 8, 3)), 9, 8),
    "GraphTransformer, virtual nodes and walks": Model(
        lambda: OnGraph(graph.GraphTransformer(8, 8, 3, 2, 2, virtual_nodes=1, position=positions.RandomWalk(8, 3)), 1), 9, 8
    ),
    "Graphormer": Model(lambda: OnGraph(graph.Graphormer(8, 8, 3, 2, 2), 1), 9, 8),
    "Exphormer": Model(lambda: OnGraph(graph.Exphormer(8, 8, 3, 2, 2), 1), 9, 8),
    "ITransformer": Model(lambda: time_series.ITransformer(3, 24, 6, dim=8, depth=1, heads=2, hidden=16), 2, 24, 3),
}  # fmt: skip
# Each row of the batch has a length of its own, or the graphs are given, so that another batch is another domain.
GRAPHS = {name for name, model in MODELS.items() if isinstance(model.make(), OnGraph)}
FIXED_BATCH = {"padded", *GRAPHS}
ALL = pytest.mark.parametrize("name", MODELS)
BATCH = ({0: Dim("batch", min=2, max=64)},)


def _made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODELS[name].make().eval(), torch.randn(MODELS[name].shape)


def _check(name: str, run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    """The same as eager, on the input of the trace and on other batches."""
    with torch.no_grad():
        others = [x] if name in FIXED_BATCH else [x, torch.cat([x, x.flip(1), 2 * x])]
        for each in others:
            assert_close(run(each), model(each), name, depth=10 * MODELS[name].depth)


@ALL
def test_export(name: str) -> None:
    model, x = _made(name)
    program = export(model, (x,), dynamic_shapes=None if name in FIXED_BATCH else BATCH, strict=False)
    custom = {str(node.target) for node in program.graph.nodes if "xformerlib" in str(node.target)}
    assert not custom, f"operators that others do not have: {custom}"
    _check(name, program.module(), model, x)
    assert_close(model(x), _made(name)[0](x), "afterwards", depth=10)  # nothing of the trace was left behind


# What is found by reading data, which strict export cannot.
READ = {"expander", *GRAPHS}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in READ])
def test_strict_export_computes_masks_in_the_graph(name: str) -> None:
    model, x = _made(name)
    _check(
        name, export(model, (x,), dynamic_shapes=None if name in FIXED_BATCH else BATCH, strict=True).module(), model, x
    )


@pytest.mark.parametrize(
    "name",
    ["ViT", "Swin v2", "window | global", "causal window, sinks", "padded", "PatchTST", "GPS, pooled", "Graphormer"],
)
def test_onnx(name: str) -> None:
    import onnxruntime

    model, x = _made(name)
    shapes = None if name in FIXED_BATCH else BATCH
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    _check(name, lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), model, x)


@pytest.mark.parametrize("name", ["ViT", "window | global"])
def test_onnx_of_old(name: str, tmp_path: Any) -> None:
    import onnxruntime

    model, x = _made(name)
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        assert_close(got, model(x), name, depth=10 * MODELS[name].depth)


@ALL
def test_jit_trace(name: str) -> None:
    model, x = _made(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
    _check(name, traced, model, x)


# What these models read of a graph is read when they run.
READING = {"Graphormer", "Exphormer", "SGFormer"}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in READING])
def test_shapes_and_operations_on_the_meta_device(name: str) -> None:
    model, x = _made(name)
    with torch.no_grad():
        want = model(x)
    model = copy.deepcopy(model).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        assert model(x.to("meta")).shape == want.shape
    assert counted.get_total_flops() > 0


@pytest.mark.parametrize("name", [name for name in MODELS if name not in {"Graphormer", "Exphormer"}])
def test_one_compiled_graph(name: str) -> None:
    torch._dynamo.reset()
    model, x = _made(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), model(x), name, depth=10 * MODELS[name].depth)


@ALL
def test_autocast(name: str) -> None:
    model, x = _made(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    with torch.no_grad():
        assert_close(got.bfloat16(), model(x), name, depth=MODELS[name].depth + 2)


def test_holes_are_an_input_of_an_exported_model() -> None:
    model, x = _made("ViT")
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[1, 4:] = False
    program = export(model, (x, valid), strict=False).module()
    for seen in (valid, valid.flip(0)):
        with torch.no_grad():
            assert_close(program(x, seen), model(x, seen), "with holes", depth=20)


def test_an_exported_window_is_linear_in_tokens() -> None:
    tokens = 2048
    model = On(xf.Sequence(tokens), mask=masks.Local(8)).eval()
    program = export(model, (torch.randn(1, tokens, 8),), strict=False)
    largest = max(node.meta["val"].numel() for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    assert largest < tokens * tokens / 16


def test_the_reference_is_exported_in_double_precision() -> None:
    model, x = _made("window | global")
    for layer in model.modules():
        if isinstance(layer, xf.Attention):
            layer.kernel = "reference"
    program = export(model, (x,), strict=False)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    values = [node.meta.get("val") for graph in graphs for node in graph.nodes]
    assert torch.float64 in {value.dtype for value in values if isinstance(value, Tensor)}
    with torch.no_grad():
        assert_close(program.module()(x), model(x), "reference", depth=20)


@pytest.mark.filterwarnings("default")
def test_a_trace_of_edges_says_that_it_keeps_them() -> None:
    model = graph.GPS(8, 8, 3, 2, 2).eval()
    x, edges = torch.randn(5, 8), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    with torch.no_grad(), pytest.warns(torch.jit.TracerWarning, match="trace once for each graph"):  # type: ignore[attr-defined]
        traced = torch.jit.trace(model, (x, edges))
    with torch.no_grad():
        assert_close(traced(x, edges.flip(1)), model(x, edges.flip(1)), "other edges", depth=20)
