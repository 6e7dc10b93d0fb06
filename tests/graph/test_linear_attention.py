"""Linear attention: PyTorch Geometric's on each graph alone, whatever else is in the batch, and what it stands for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv
from torch_geometric.nn.attention import (
    PerformerAttention as TheirPerformer,
    PolynormerAttention as TheirPolynormer,
    SGFormerAttention as TheirSGFormerAttention,
)
from torch_geometric.nn.models import SGFormer as TheirSGFormer

import xformerlib as xf
from tests.closeness import assert_close
from tests.graph.test_edge_attention import largest, redrawn
from xformerlib import graph
from xformerlib.graph import GPSLayer, PerformerAttention, PolynormerAttention, SGFormer, SGFormerAttention

SIZES = (5, 0, 1, 70, 33, 32, 2)  # less than a block of tokens, just one, and several


pytestmark = pytest.mark.usefixtures("double")  # theirs makes tensors of the default dtype


def copied(own: nn.Linear, *theirs: Any) -> None:
    with torch.no_grad():
        own.weight.copy_(torch.cat([layer.weight for layer in theirs]))
        if own.bias is not None:
            own.bias.copy_(torch.cat([layer.bias for layer in theirs]))


def sgformer() -> tuple[Any, Any]:
    theirs = redrawn(TheirSGFormerAttention(8, 2, 6, qkv_bias=True))
    ours = SGFormerAttention(8, 2, 6, qkv_bias=True)
    copied(ours.qkv, theirs.q, theirs.k, theirs.v)
    return ours, theirs


def performer() -> tuple[Any, Any]:
    theirs = redrawn(TheirPerformer(8, 2, 6))
    ours = PerformerAttention(8, 2, 6, features="relu")
    copied(ours.qkv, theirs.q, theirs.k, theirs.v)
    copied(ours.out, theirs.attn_out)
    ours.projection.copy_(theirs.fast_attn.projection_matrix)
    return ours, theirs


def polynormer(qk_shared: bool = True) -> tuple[Any, Any]:
    theirs = redrawn(TheirPolynormer(8, 1, 6, qk_shared=qk_shared, qkv_bias=True))
    ours = PolynormerAttention(8, 1, 6, qk_shared=qk_shared, qkv_bias=True)
    copied(ours.qkv, *(() if qk_shared else (theirs.q,)), theirs.k, theirs.v)
    for own, other in ((ours.gate, theirs.h_lins), (ours.norm, theirs.lns), (ours.out, theirs.lin_out)):
        own.load_state_dict(other.state_dict())
    return ours, theirs


PAIRS = {
    "SGFormer": sgformer, "Performer": performer, "Polynormer": polynormer, "Polynormer, q": lambda: polynormer(False)
}  # fmt: skip
ALONE: dict[str, Any] = {
    "FAVOR+": lambda: PerformerAttention(8, 2, 6),
    "Polynormer, 2 heads": lambda: PolynormerAttention(8, 2, 6),
}


def batch_of(sizes: tuple[int, ...]) -> tuple[Tensor, xf.Graph]:
    item = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    graph = xf.Graph(torch.zeros(2, 0).long(), sum(sizes), batch=item, num_graphs=len(sizes))
    return torch.randn(sum(sizes), 8, requires_grad=True), graph


@pytest.mark.parametrize("name", PAIRS)
def test_parity_with_pytorch_geometric_on_each_graph_alone(name: str, precision: torch.dtype) -> None:
    ours, theirs = (module.to(precision) for module in PAIRS[name]())
    x, graph = batch_of(SIZES)
    wanted = torch.cat([theirs(part[None])[0] for part in x.split(SIZES) if len(part)])
    got = ours(x, graph)
    assert_close(got, wanted)
    weight = torch.randn_like(got)
    ((a,), (b,)) = (torch.autograd.grad((y * weight).sum(), [x]) for y in (got, wanted))
    assert_close(a, b, depth=2)


@pytest.mark.parametrize("name", [*PAIRS, *ALONE])
def test_the_rest_of_a_batch_changes_nothing(name: str) -> None:
    ours = PAIRS[name]()[0] if name in PAIRS else redrawn(ALONE[name]())
    x, graph = batch_of(SIZES)
    together = ours(x, graph).split(SIZES)
    for part, y in zip(x.split(SIZES), together, strict=True):
        assert_close(ours(part, xf.Graph(torch.zeros(2, 0).long(), len(part))), y)


def test_random_features_approach_softmax() -> None:
    torch.manual_seed(1)
    layer = PerformerAttention(8, 2, 4, count=100_000)
    x, graph = batch_of((7, 12))
    x = x.detach() / 2  # the longer queries and keys, the more features it takes
    q, k, v = layer.projected(x, graph)
    shown, even = [], []
    for part in (slice(0, 7), slice(7, 19)):
        weights = torch.einsum("ihd,jhd->hij", q[part], k[part]).div(math.sqrt(4)).softmax(-1)
        shown.append(torch.einsum("hij,jhd->ihd", weights, v[part]).flatten(1))
        even.append(v[part].mean(0).flatten().expand(len(shown[-1]), -1))
    wanted, plain = layer.out(torch.cat(shown)), layer.out(torch.cat(even))
    assert largest(layer(x, graph), wanted) < 0.15 * largest(plain, wanted)
    before = layer.projection.clone()
    layer.redraw()
    assert largest(before, layer.projection) > 0.1


def test_random_features_stay_in_range() -> None:
    layer, (x, graph) = PerformerAttention(8, 2, 4).float(), batch_of((7, 12))
    y = layer(1e3 * x.float(), graph)
    assert y.isfinite().all()
    assert torch.autograd.grad(y.sum(), layer.qkv.weight)[0].isfinite().all()


def test_gradients_of_gradients() -> None:
    layer, (x, graph) = SGFormerAttention(8, 1, 3), batch_of((3, 2))
    assert torch.autograd.gradgradcheck(lambda y: layer(y, graph), [x])


def test_in_place_of_attention_in_a_gps_layer() -> None:
    layer = redrawn(GPSLayer(8, GCNConv(8, 8), attention=PerformerAttention(8, 2))).eval()
    graphs = [Data(x=torch.randn(n, 8), edge_index=torch.randint(n, (2, 2 * n))) for n in (4, 40, 9)]
    batch = Batch.from_data_list(graphs)
    together = layer(batch.x, batch.edge_index, batch=batch.batch)
    assert_close(together, torch.cat([layer(graph.x, graph.edge_index) for graph in graphs]))


@pytest.mark.parametrize("aggregate", ["add", "cat"])
def test_sgformer_equals_pytorch_geometrics_on_each_graph_alone(aggregate: Any, precision: torch.dtype) -> None:
    theirs = redrawn(TheirSGFormer(7, 8, 3, 2, 2, 0.5, 3, 0.5, 0.3, aggregate)).to(precision).eval()
    ours = SGFormer(7, 8, 3, 2, 2, 0.5, 3, 0.5, 0.3, aggregate).eval()
    copied(ours.attention_in, theirs.trans_conv.fcs[0])
    copied(ours.conv_in, theirs.graph_conv.fcs[0])
    copied(ours.head, theirs.fc)
    for own, other in zip(ours.attentions, theirs.trans_conv.attns, strict=True):
        copied(own.qkv, other.q, other.k, other.v)
    ours.attention_norms.load_state_dict(theirs.trans_conv.bns.state_dict())
    ours.conv_norms.load_state_dict(theirs.graph_conv.bns.state_dict())
    ours.convs.load_state_dict(theirs.graph_conv.convs.state_dict())
    graphs = [Data(x=torch.randn(n, 7), edge_index=torch.randint(n, (2, 2 * n))) for n in (4, 40, 9)]
    wanted = [theirs(graph.x, graph.edge_index, torch.zeros(graph.num_nodes).long()) for graph in graphs]
    got = ours(Batch.from_data_list(graphs)).log_softmax(-1)
    assert_close(got, torch.cat(wanted), depth=5)  # two attentions beside three convolutions


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SGFormerAttention(8, 3), "heads must divide channels=8"),
        (lambda: PerformerAttention(8, features="elu"), "features must be 'softmax' or 'relu'"),
        (lambda: PerformerAttention(8, count=0), "count must be >= 1"),
        (lambda: SGFormerAttention(8)(torch.randn(3, 8), batch_of((4,))[1]), r"x must be \(tokens, channels\) = \(4, 8\)"),
        (lambda: SGFormer(7, 8, 3, aggregate="mean"), "aggregate must be 'add' or 'cat'"),
        (lambda: SGFormer(7, 8, 3, graph_weight=2.0), r"graph_weight must be in \[0, 1\]"),
        (lambda: SGFormer(7, 8, 3)(torch.randn(3, 7), torch.zeros(2, 1).long(), torch.randn(1, 2)), "edge_attr has no use"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


LINEAR = {
    "SGFormer": lambda: graph.SGFormerAttention(8, 2),
    "Performer": lambda: graph.PerformerAttention(8, 2),
    "Performer, relu": lambda: graph.PerformerAttention(8, 2, features="relu"),
    "Polynormer": lambda: graph.PolynormerAttention(8, 2),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", LINEAR)
def test_transforms_give_what_backward_gives(name: str) -> None:
    layer, x, direction = LINEAR[name](), torch.randn(5, 8), torch.randn(5, 8)
    where = xf.Graph(torch.tensor([[0, 1, 3], [1, 2, 4]]), 5, batch=torch.tensor([0, 0, 0, 1, 1]))

    def energy(x: torch.Tensor) -> torch.Tensor:
        return layer(x, where).sin().sum()

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(leaf), leaf)
    assert_close(torch.func.grad(energy)(x), slope, "grad", depth=4)
    assert_close(torch.func.jvp(energy, (x,), (direction,))[1], (slope * direction).sum(), "jvp", depth=4, scale=1.0)
    wanted = torch.autograd.functional.hessian(energy, x)
    assert_close(torch.func.hessian(energy)(x), wanted, "hessian", depth=8, scale=1.0)
    rows = torch.func.vmap(torch.func.grad(energy))(torch.stack([x, x.flip(0)]))
    assert_close(rows[0], slope, "vmap of grad", depth=4)


def test_models_run_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert graph.SGFormer(8, 8, 3)(torch.randn(3, 8), torch.tensor([[0, 1], [1, 2]])).isfinite().all()
