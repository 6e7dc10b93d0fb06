"""Our layers as PyTorch Geometric's: the way back, tools that need it, and its containers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch_geometric.explain import AttentionExplainer, Explainer, GNNExplainer
from torch_geometric.nn import GPSConv, HeteroConv, Sequential, TransformerConv, to_hetero

from tests.closeness import assert_close
from xformerlib.graph import GPS, EdgeAttention, Exphormer, GPSLayer, GraphTransformer
from xformerlib.interop.pyg import from_pyg, to_pyg

pytestmark = pytest.mark.usefixtures("double")
EDGES = torch.tensor([[0, 1, 2, 2, 3, 0, 4], [1, 0, 0, 2, 4, 1, 4]])


def redrawn(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return module


@given(
    concat=st.booleans(), root=st.booleans(), beta=st.booleans(), edge_dim=st.sampled_from([None, 3]), bias=st.booleans(),
    bipartite=st.booleans(),
)  # fmt: skip
def test_there_and_back(
    concat: bool, root: bool, beta: bool, edge_dim: int | None, bias: bool, bipartite: bool
) -> None:
    channels = (5, 4) if bipartite else 5
    ours = redrawn(
        EdgeAttention(channels, 3, 2, concat=concat, root_weight=root, beta=beta and root, edge_dim=edge_dim, bias=bias)
    )
    theirs = to_pyg(ours)
    assert type(theirs) is TransformerConv
    x: Any = torch.randn(5, 5)
    x = (x, torch.randn(5, 4)) if bipartite else x
    e = None if edge_dim is None else torch.randn(7, edge_dim)
    assert_close(theirs(x, EDGES, e), ours(x, EDGES, e), "nodes", depth=2)  # attention, and a map of the node itself
    back = from_pyg(theirs).state_dict()
    assert all(torch.equal(back[name], value) for name, value in ours.state_dict().items())


@pytest.mark.usefixtures("precision")
def test_a_model_and_what_is_left_as_it_is() -> None:
    for model in (GPS(5, 8, 3, 2, 2, norm="layer"), Exphormer(5, 8, 3, 2, 2, norm="layer")):
        before, x = copy.deepcopy(model.state_dict()), torch.randn(5, 5)
        other = to_pyg(model)
        assert_close(other(x, EDGES), model(x, EDGES), f"{type(model).__name__} of PyG's layers", depth=2 * 2 + 2)
        assert sum(isinstance(m, TransformerConv) for m in other.modules()) == 2
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="must be an EdgeAttention or have one in it; got GraphTransformer"):
        to_pyg(GraphTransformer(5, 8, 3, 2, 2))
    with pytest.raises(ValueError, match="in_channels must be known"):
        to_pyg(EdgeAttention(-1, 8))


@pytest.mark.parametrize("algorithm", [lambda: GNNExplainer(epochs=3), AttentionExplainer], ids=["masks", "attention"])
def test_explanations_of_edges(algorithm: Any) -> None:
    torch.manual_seed(0)
    asked: dict[str, Any] = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}
    explainer = Explainer(
        to_pyg(GPS(5, 8, 3, 2, 2, norm="layer")), algorithm(), explanation_type="model", edge_mask_type="object",
        model_config=asked,
    )  # fmt: skip
    mask = explainer(torch.randn(5, 5), EDGES).edge_mask
    assert mask.shape == (7,) and float(mask.std()) > 0


def test_inside_its_containers() -> None:
    torch.manual_seed(0)
    x, e, inside = torch.randn(5, 5), torch.randn(5, 3), torch.tensor([[0, 1, 2, 3, 3], [2, 0, 0, 4, 4]])
    batch = torch.tensor([0, 0, 0, 1, 1])
    own, last = GPSLayer(5, EdgeAttention(5, 5, edge_dim=3), norm="layer"), EdgeAttention(5, 4, 2, edge_dim=3)
    steps = [(own, "x, edge_index, edge_attr, batch -> x"), (last, "x, edge_index, edge_attr -> x"), nn.ReLU()]
    chain = Sequential("x, edge_index, edge_attr, batch", steps)
    assert_close(chain(x, inside, e, batch), last(own(x, inside, e, batch), inside, e).relu(), "chain", depth=3)
    theirs = GPSConv(5, EdgeAttention(5, 5, edge_dim=3), norm=None)
    theirs.reset_parameters()
    assert_close(theirs(x, inside, batch, edge_attr=e), from_pyg(theirs)(x, inside, e, batch), "GPS", depth=2)


def test_inside_its_models_of_several_kinds() -> None:
    x = {"a": torch.randn(5, 6), "b": torch.randn(3, 6)}
    edges = {("a", "to", "b"): torch.tensor([[0, 4], [1, 2]]), ("b", "to", "a"): torch.tensor([[0, 2], [1, 2]])}

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = EdgeAttention((6, 6), 4, 2)

        def forward(self, x: Any, edge_index: Any) -> Any:
            return self.conv(x, edge_index)

    # Which of a model's layers pass messages to_hetero tells by their class.
    converted = to_hetero(to_pyg(Network()), (list(x), list(edges)))
    together = HeteroConv({kind: EdgeAttention((-1, -1), 4, 2) for kind in edges})
    for out in (converted(x, edges), together(x, edges)):
        assert {kind: tuple(y.shape) for kind, y in out.items()} == {"a": (5, 8), "b": (3, 8)}
