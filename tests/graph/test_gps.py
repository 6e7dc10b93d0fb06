"""GPS layers: parity with PyTorch Geometric, norms that see their graph, virtual nodes, and any kind of message passing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv, GINEConv, GPSConv, TransformerConv

import xformerlib as xf
from tests.closeness import assert_close
from tests.graph.test_edge_attention import redrawn
from xformerlib import masks, positions
from xformerlib.graph import GPS, EdgeAttention, GPSLayer
from xformerlib.interop.pyg import from_pyg

pytestmark = pytest.mark.usefixtures("double")


def gine() -> nn.Module:
    return GINEConv(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), edge_dim=3)


CONVS: dict[str, Any] = {
    "GINE": gine,
    "UniMP": lambda: TransformerConv(8, 4, heads=2, edge_dim=3, beta=True),
    "none": lambda: None,
}


def drawn(nodes: int, edges: int) -> Data:
    return Data(
        x=torch.randn(nodes, 8), edge_index=torch.randint(nodes, (2, edges)), edge_attr=torch.randn(edges, 3)
    )  # fmt: skip


def given(theirs: GPSConv, data: Any) -> Any:
    more = {} if theirs.conv is None else {"edge_attr": data.edge_attr}
    # Without a batch their norms over graphs add epsilon elsewhere.
    batch = data.x.new_zeros(len(data.x)).long() if getattr(data, "batch", None) is None else data.batch
    return theirs(data.x, data.edge_index, batch, **more)


def graphs() -> list[Data]:
    return [drawn(5, 9), drawn(2, 1), drawn(11, 30)]


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "graph_norm", None])
@pytest.mark.parametrize("conv", CONVS)
def test_parity_with_pytorch_geometric_run_graph_by_graph(conv: str, norm: str | None, precision: torch.dtype) -> None:
    theirs = redrawn(GPSConv(8, CONVS[conv](), heads=2, norm=norm, act="gelu")).to(precision).eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    ours, data = from_pyg(theirs), graphs()
    batch = Batch.from_data_list(data)
    edge_attr = None if ours.conv is None else batch.edge_attr
    got = ours(batch.x, batch.edge_index, edge_attr, batch.batch)
    assert_close(got, torch.cat([given(theirs, graph) for graph in data]))
    order = torch.randperm(batch.num_nodes)
    permuted = ours(batch.x[order], order.argsort()[batch.edge_index], edge_attr, batch.batch[order])
    assert_close(permuted, got[order])


@pytest.mark.parametrize("conv", ["GINE", "UniMP"])
def test_parity_in_training(conv: str) -> None:
    theirs = redrawn(GPSConv(8, CONVS[conv](), heads=4))
    ours, batch = from_pyg(theirs), Batch.from_data_list(graphs())
    got, wanted = ours(batch.x, batch.edge_index, batch.edge_attr, batch.batch), given(theirs, batch)
    assert_close(got, wanted)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert_close(ours.attention.qkv.weight.grad, theirs.attn.in_proj_weight.grad, depth=2)
    assert_close(ours.feed_forward.up.weight.grad, theirs.mlp[0].weight.grad, depth=2)
    own, other = ours.conv_residual.norm.module, theirs.norm1.module
    assert_close(own.weight.grad, other.weight.grad, depth=2)
    assert_close(own.running_var, other.running_var)


def test_virtual_nodes_take_part_in_attention_and_not_in_messages() -> None:
    passed = []

    class Remembering(EdgeAttention):
        def forward(self, x: Any, *edges: Any, **more: Any) -> Any:
            passed.append(x)
            return super().forward(x, *edges, **more)

    layer = redrawn(GPSLayer(8, Remembering(8, 4, heads=2), heads=2))
    batch = Batch.from_data_list(graphs())
    graph = xf.Graph.from_pyg(batch, virtual_nodes=1)
    x = torch.randn(graph.num_tokens, 8, dtype=torch.float64)
    y = layer(x, graph)
    assert torch.equal(passed[0], x[graph.node_tokens])
    changed = x.clone()
    changed[0] += 1  # the virtual node of the first graph
    moved = (layer.eval()(changed, graph) - layer(x, graph)).detach().abs().amax(1) > 1e-9
    assert torch.equal(moved, graph.items == 0) and y.shape == x.shape


def test_mask_and_position_reach_the_attention() -> None:
    chain = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    layer = redrawn(GPSLayer(8, None, 2, norm="layer", mask=masks.Local(1), position=positions.RelativeBias(2)))
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    layer(x, chain)[3].sum().backward()
    assert x.grad is not None and torch.equal(x.grad.abs().amax(1) > 0, torch.tensor([False, False, True, True, False]))
    assert layer.attention.position.table.grad.abs().amax(1).nonzero().flatten().tolist() == [0, 1]


def test_a_model_shares_its_position_and_edge_features_among_layers() -> None:
    position = positions.RandomWalk(16, 4) + positions.RelativeBias(2) + positions.Rotary(8)
    model = GPS(8, 16, 3, 3, 2, conv=gine_of_width_16, edge_dim=3, position=position, pool="sum", norm="layer")
    batch = Batch.from_data_list(graphs())
    model(batch).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert position.biases[0].table.grad.abs().sum() > 0


def gine_of_width_16() -> nn.Module:
    return GINEConv(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))


def test_dropped_paths_drop_whole_graphs() -> None:
    layer = GPSLayer(8, GCNConv(8, 8), heads=2, norm=None, drop_path=0.9)
    batch = Batch.from_data_list(graphs())
    same = layer(batch.x, batch.edge_index, batch=batch.batch) == batch.x
    assert not same.all()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(layer(batch.x, batch.edge_index, batch=batch.batch), 2 * batch.x)


def test_nothing_at_all() -> None:
    none, features = torch.zeros(2, 0).long(), torch.zeros(0, 8)
    layer = GPSLayer(8, EdgeAttention(8, 4, heads=2), heads=2).eval()
    assert layer(features, none).shape == (0, 8)
    assert layer(torch.randn(1, 8), none).shape == (1, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GPSLayer(8, None, norm="group"), "norm must be 'batch'"),
        (lambda: GPSLayer(8, None, attention=nn.Identity(), mask=masks.Local(1)), "an attention that is given has its own"),
        (lambda: GPS(7, 8, 3, 0, 2), "num_layers must be >= 1"),
        (lambda: GPS(7, 8, 3, 1, 3), "heads must divide hidden_channels=8"),
        (lambda: GPS(7, 8, 3, 1, 2)(torch.randn(3, 7), torch.zeros(2, 1).long(), torch.randn(1, 3)), "if and only if"),
        (lambda: GPS(7, 8, 3, 1, 2, edge_dim=3)(torch.randn(3, 7), torch.zeros(2, 1).long()), "if and only if"),
        (lambda: from_pyg(GPSConv(8, None, attn_type="performer")), "attn_type must be 'multihead'"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
