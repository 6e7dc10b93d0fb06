"""What layers share of scores of pairs and of features of links is worked out once, and changes nothing."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import xformerlib as xf
from tests.closeness import assert_close
from tests.graph.test_edge_attention import largest, redrawn
from xformerlib import positions
from xformerlib.graph import GPS, Exphormer, GraphTransformer, PathBias, RandomWalkBias, _exphormer, _gps, _model

LAYERS = 3


def position() -> positions.Position:
    return positions.RandomWalk(16, 3) + RandomWalkBias(2, 4) + positions.RelativeBias(2) + positions.Rotary(8)


MODELS: dict[str, Any] = {
    "transformer": lambda: GraphTransformer(5, 16, 3, LAYERS, 2, position=position()),
    "virtual node": lambda: GraphTransformer(5, 16, 3, LAYERS, 2, position=position(), virtual_nodes=1),
    "checkpointed": lambda: GraphTransformer(5, 16, 3, LAYERS, 2, position=position(), checkpoint=True),
    "each its own": lambda: GraphTransformer(5, 16, 3, LAYERS, 2, position=lambda: RandomWalkBias(2, 4)),
    "some of each": lambda: GraphTransformer(
        5, 16, 3, LAYERS, 2, position=[position(), lambda: positions.RelativeBias(2)]
    ),
    "GPS": lambda: GPS(5, 16, 3, LAYERS, 2, edge_dim=2, position=position(), norm="layer"),
}
TIMES = {"checkpointed": 2 * LAYERS, "each its own": LAYERS}


def step(model: Any, *given: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    out = model(*given)
    return [out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), [*model.parameters()])]


def largest_of(tensors: list[torch.Tensor]) -> float:
    """The scale of all gradients: one that softmax makes 0, of a number added to all scores, is rounding of the others."""
    return max(float(tensor.detach().abs().max()) for tensor in tensors)


@pytest.mark.parametrize("name", MODELS)
def test_scores(name: str) -> None:
    torch.manual_seed(0)
    model = redrawn(MODELS[name]()).train()
    edge_index = torch.randint(6, (2, 14))
    given = [torch.randn(6, 5, dtype=torch.float64), edge_index]
    if name == "GPS":
        given.append(torch.randn(14, 2, dtype=torch.float64))
    with mock.patch.object(RandomWalkBias, "table", autospec=True, side_effect=RandomWalkBias.table) as table:
        got = step(model, *given)
    assert table.call_count == TIMES.get(name, 1)
    with (
        mock.patch.object(_gps, "worked_out_once", lambda shared: shared),
        mock.patch.object(_model, "worked_out_once", lambda shared: shared),
        mock.patch.object(RandomWalkBias, "table", autospec=True, side_effect=RandomWalkBias.table) as table,
    ):
        wanted = step(model, *given)
    assert table.call_count == TIMES.get(name, LAYERS)
    assert_close(got, wanted, depth=LAYERS, scale=largest_of(wanted))
    assert step(model, *given)[0].equal(got[0])  # nothing is left from the call before


def test_features_of_links() -> None:
    torch.manual_seed(0)
    model = redrawn(Exphormer(5, 8, 3, LAYERS, 2, edge_dim=2, norm="layer")).train()
    given = torch.randn(6, 5, dtype=torch.float64), torch.randint(6, (2, 14)), torch.randn(14, 2, dtype=torch.float64)
    features = _exphormer.Links.features
    with mock.patch.object(_exphormer.Links, "features", autospec=True, side_effect=features) as made:
        got = step(model, *given)
        assert made.call_count == 1
        with mock.patch.object(Exphormer, "shared", return_value={}):
            wanted = step(model, *given)
        assert made.call_count == 1 + LAYERS
    assert_close(got, wanted, depth=LAYERS, scale=largest_of(wanted))


def test_a_bias_that_scores_pairs_of_nodes_scores_virtual_nodes_0() -> None:
    graph = xf.Graph(torch.tensor([[0, 1], [1, 2]]), 3, edge_attr=torch.ones(2, 1), virtual_nodes=1)
    i = torch.arange(4)
    for bias in (PathBias(2, 1), RandomWalkBias(2, 3)):
        scores = redrawn(bias).pair(graph).at(i[:, None], i[None])
        assert largest(scores[:, 0], torch.zeros(2, 4)) == 0 and largest(scores[:, :, 0], torch.zeros(2, 4)) == 0
        assert float(scores[:, 2, 1].detach().abs().min()) > 0
