"""AGNN beside PyTorch Geometric's layers, and what its teleport does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import AGNNConv

from tests.closeness import assert_close
from xformerlib import masks
from xformerlib.graph import AGNN

pytestmark = pytest.mark.usefixtures("double")

EDGES = torch.tensor([[0, 1, 1, 2, 3, 4, 4, 0], [1, 0, 2, 1, 4, 3, 0, 4]])


def made(**options: Any) -> AGNN:
    model = AGNN(7, 8, 3, **options).eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return model


def nodes(count: int = 6) -> Tensor:  # the last one is alone
    return torch.randn(count, 7, requires_grad=True)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_without_teleport_it_is_the_layers_of_pyg(num_layers: int, precision: torch.dtype) -> None:
    model, x = made(num_layers=num_layers), nodes()
    layers = [AGNNConv() for _ in range(num_layers)]
    for layer, temperature in zip(layers, model.temperature, strict=True):
        layer.beta.data.copy_(temperature.detach())
    z = model.embed(x).relu()
    for layer in layers:
        z = layer(z, EDGES)
    ours, theirs = model(x, EDGES), model.head(z)
    assert_close(ours, theirs, depth=2 + num_layers)
    weights = [x, model.embed.weight, model.head.weight]
    for got, want in zip(
        torch.autograd.grad(ours.cos().sum(), [*weights, model.temperature]),
        [
            *torch.autograd.grad(theirs.cos().sum(), weights, retain_graph=True),
            torch.cat(torch.autograd.grad(theirs.cos().sum(), [layer.beta for layer in layers])),
        ],
        strict=True,
    ):
        assert_close(got, want, depth=2 * (2 + num_layers))


def test_with_teleport_and_temperature_0_it_is_personalised_pagerank() -> None:
    model, x, share = made(num_layers=200, teleport=0.3), nodes(), 0.3
    nn.init.zeros_(model.temperature)
    mean = torch.eye(6).index_put((EDGES[1], EDGES[0]), torch.ones(8))
    mean = mean / mean.sum(1, keepdim=True)
    far = share * torch.linalg.inv(torch.eye(6) - (1 - share) * mean)
    assert_close(model(x, EDGES), model.head(far @ model.embed(x).relu()))


def test_a_node_looks_as_far_as_there_are_layers() -> None:
    path = torch.stack([torch.arange(9), torch.arange(1, 10)])
    model, x = made(num_layers=4), nodes(10)
    (grad,) = torch.autograd.grad(model(x, path)[9].sum(), x)
    assert (grad.abs().sum(1) > 0).tolist() == [False] * 5 + [True] * 5
    (grad,) = torch.autograd.grad(made(num_layers=1, mask=masks.Full())(x, path)[9].sum(), x)
    assert grad.abs().sum(1).all()


def test_in_training_it_drops_and_its_weights_are_drawn_anew() -> None:
    torch.manual_seed(0)
    model, x = made(dropout=0.5), nodes()
    assert torch.equal(model(x, EDGES), model(x, EDGES))
    assert not torch.equal(model.train()(x, EDGES), model(x, EDGES))
    model.reset_parameters()
    assert torch.equal(model.temperature, torch.ones(2)) and model.embed.weight.abs().max() < 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AGNN(7, 8, 3, 0), "num_layers must be >= 1; got num_layers=0"),
        (lambda: AGNN(7, 8, 3, teleport=1.0), r"teleport must be in \[0, 1\); got teleport=1.0"),
        (lambda: made()(nodes(), EDGES, torch.randn(8, 2)), "edge_attr has no use in AGNN"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
