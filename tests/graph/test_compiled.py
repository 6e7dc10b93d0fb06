"""Graph models and layers in one compiled graph, on edges and batches that are its inputs: equal to eager, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.closeness import assert_close, largest
from xformerlib import graph, masks, positions

pytestmark = pytest.mark.usefixtures("double")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "nodes": lambda: graph.GraphTransformer(8, 8, 3, 2, 2, mask=masks.Edges() | masks.Local(0)),
    "hops": lambda: graph.GraphTransformer(8, 8, 3, 1, 2, position=positions.RelativeBias(2) + positions.RandomWalk(8, 4)),
    "eigenvectors": lambda: graph.GraphTransformer(8, 8, 3, 1, 2, position=positions.Sinusoidal(8)),
    "pooled": lambda: graph.GraphTransformer(8, 8, 3, 1, 2, pool="mean"),
    "virtual nodes": lambda: graph.GraphTransformer(8, 8, 3, 1, 2, pool="token", virtual_nodes=1),
    "edges": lambda: graph.GraphTransformer(8, 8, 3, 1, 2, pool="edge"),
    "GPS": lambda: graph.GPS(8, 8, 3, 2, 2, edge_dim=4, virtual_nodes=1),
    "SGFormer": lambda: graph.SGFormer(8, 8, 3),
    "AGNN": lambda: graph.AGNN(8, 8, 3),
}  # fmt: skip
# What they read of a batch breaks the graph.
BROKEN: dict[str, Callable[[], nn.Module]] = {
    "attention pooling": lambda: graph.GraphTransformer(8, 8, 3, 1, 2, pool="attention"),
    "Exphormer": lambda: graph.Exphormer(8, 8, 3, 1, 2),
    "Graphormer": lambda: graph.Graphormer(8, 8, 3, 1, 2),
}
COUNTED = {"pooled", "virtual nodes", "GPS", *BROKEN}


def batch_of(*sizes: int, shuffled: bool) -> dict[str, Any]:
    """The inputs of a model: graphs with loops and parallel edges, one after the other or mixed."""
    begin = [sum(sizes[:i]) for i in range(len(sizes))]
    edges = torch.cat([torch.randint(0, n, (2, 3 * n)) + first for n, first in zip(sizes, begin, strict=True)], 1)
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order = torch.randperm(len(batch)) if shuffled else torch.arange(len(batch))
    return {"x": torch.randn(len(batch), 8), "edge_index": order.argsort()[edges], "batch": batch[order]}


def gradients(model: nn.Module, run: Callable[..., Tensor], x: Tensor, **given: Any) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    out = run(x, **given)
    found = torch.autograd.grad(out.square().sum(), [x, *model.parameters()], allow_unused=True)
    return out.detach(), [g for g in found if g is not None]


def check(name: str, make: Callable[[], nn.Module], **options: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    compiled = torch.compile(model, backend="aot_eager", **options)
    for sizes, shuffled in (((5, 7, 4), False), ((6, 3, 8), True), ((4, 4, 9, 2), True)):
        given = batch_of(*sizes, shuffled=shuffled)
        if name == "GPS":
            given["edge_attr"] = torch.randn(given["edge_index"].shape[1], 4)
        if name in COUNTED:
            given["num_graphs"] = len(sizes)
        want, wanted = gradients(model, model, **given)
        got, found = gradients(model, compiled, **given)
        assert_close(got, want, name, depth=10)
        assert_close(found, wanted, "gradients", depth=20, scale=largest(wanted))


@pytest.mark.parametrize("name", MODELS)
def test_models_are_one_graph(name: str) -> None:
    check(name, MODELS[name], fullgraph=True)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's, where one graph gives to the next
def test_models_that_read_their_inputs_compile_in_several_graphs(name: str) -> None:
    check(name, BROKEN[name])


@pytest.mark.parametrize("options", [{}, {"edge_dim": 4}, {"edge_dim": 4, "beta": True, "concat": False}], ids=str)
def test_edge_attention_is_one_graph(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer = graph.EdgeAttention(8, 4, 2, **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for sizes in ((9,), (5, 8)):
        given = batch_of(*sizes, shuffled=True)
        edges = given["edge_index"]
        features = {"edge_attr": torch.randn(edges.shape[1], 4)} if options else {}
        want, wanted = gradients(layer, layer, given["x"], edge_index=edges, **features)
        got, found = gradients(layer, compiled, given["x"], edge_index=edges, **features)
        assert_close(got, want, "layer", depth=4)
        assert_close(found, wanted, "gradients", depth=8, scale=largest(wanted))
    with pytest.raises(ValueError, match="edge_index must index the 13 sources"):
        compiled(given["x"], edges + 13, **features)


def test_dropout_along_edges_is_drawn_again_in_the_backward() -> None:
    torch._dynamo.reset()
    layer = graph.EdgeAttention(8, 4, 2, dropout=0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = batch_of(9, shuffled=False)
    x, weight = given["x"], layer.key_value.weight

    def energy() -> Tensor:
        torch.manual_seed(1)
        return compiled(x, given["edge_index"]).sin().sum()

    (slope,) = torch.autograd.grad(energy(), weight)
    direction, step = torch.randn_like(weight), 1e-6
    with torch.no_grad():
        weight += step * direction
        above = energy()
        weight -= 2 * step * direction
        below = energy()
        weight += step * direction
    assert_close(
        (slope * direction).sum(), (above - below) / (2 * step), "finite differences", scale=float(above.abs()) / step
    )


def test_kinds_of_nodes_are_one_graph() -> None:
    torch._dynamo.reset()
    kinds = (["a", "b"], [("a", "x", "b"), ("b", "y", "a"), ("a", "z", "a")])
    layer, sizes = graph.HeteroAttention(8, 8, kinds, heads=2), {"a": 5, "b": 7}
    x = {kind: torch.randn(n, 8) for kind, n in sizes.items()}
    edges = {
        each: torch.stack([torch.randint(0, sizes[each[0]], (20,)), torch.randint(0, sizes[each[2]], (20,))])
        for each in kinds[1]
    }
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    want, got = layer(x, edges), compiled(x, edges)
    assert_close([*got.values()], [*want.values()], "nodes of both kinds", depth=4)
    with pytest.raises(RuntimeError, match="nodes of kind 'a'"):
        compiled(x, {**edges, kinds[1][2]: edges[kinds[1][2]] + 3})


def test_an_unknown_number_of_graphs_is_told() -> None:
    torch._dynamo.reset()
    model = graph.GraphTransformer(8, 8, 3, 1, 2, pool="mean")
    given = batch_of(3, 4, shuffled=False)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="give num_graphs"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(**given)
    torch._dynamo.reset()
    assert_close(torch.compile(model, backend="aot_eager")(**given), model(**given), "in several graphs", depth=4)
    assert model(**given, num_graphs=4).shape == (4, 3)
    with pytest.raises(ValueError, match="num_graphs must exceed every entry of batch"):
        model(**given, num_graphs=1)
