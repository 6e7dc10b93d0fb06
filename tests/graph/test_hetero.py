"""Several kinds of nodes and edges: parity with PyTorch Geometric's HGTConv, and what must hold on any graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import HGTConv

from tests.closeness import assert_close
from xformerlib.graph import HeteroAttention
from xformerlib.interop.pyg import from_pyg

WRITES, CITES, READS = ("author", "writes", "paper"), ("paper", "cites", "paper"), ("paper", "read by", "author")
ABOUT = ("paper", "about", "topic")
KINDS = (["author", "paper", "topic"], [WRITES, CITES, READS, ABOUT])
SIZES = {"author": 4, "paper": 7, "topic": 3}
CHANNELS = {"author": 6, "paper": 8, "topic": 5}


def redrawn(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return module


def nodes(channels: dict[str, int]) -> dict[str, Tensor]:
    return {kind: torch.randn(SIZES[kind], width) for kind, width in channels.items()}


def edges(count: int = 9) -> dict[Any, Tensor]:
    """Parallel edges included."""
    return {
        kind: torch.stack([torch.randint(SIZES[kind[0]], (count,)), torch.randint(SIZES[kind[2]], (count,))])
        for kind in KINDS[1]
    }


pytestmark = pytest.mark.usefixtures("double")


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and all(a[kind].shape == b[kind].shape for kind in a)
    return max(float((a[kind] - b[kind]).detach().abs().max()) for kind in a)


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for kind in want:
        assert_close(got[kind], want[kind], kind)


@pytest.mark.parametrize("channels", [CHANNELS, dict.fromkeys(SIZES, 8)], ids=["some gated", "all gated"])
@pytest.mark.parametrize("left_out", [[], [CITES, ABOUT]], ids=["all kinds", "two missing"])
def test_parity_with_hgt_conv(channels: dict[str, int], left_out: list[Any], precision: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = redrawn(HGTConv(channels, 8, KINDS, heads=2))
    ours, x = from_pyg(theirs), nodes(channels)
    given = {kind: index for kind, index in edges().items() if kind not in left_out}
    got, wanted = ours(x, given), theirs(x, given)
    close(got, wanted)
    sum(out.square().sum() for out in got.values()).backward()
    sum(out.square().sum() for out in wanted.values()).backward()
    lin = theirs.kqv_lin.lins["paper"].weight.grad
    assert_close(
        ours.key_query_value[1].weight.grad, lin, depth=4
    )  # two maps and the attention between them, there and back
    maps = theirs.k_rel.weight.grad.view(2, 4, 4, 4).transpose(0, 1)
    assert_close(ours.key_map.grad, maps, depth=4)
    with torch.no_grad():
        ours.value_map.zero_()
    assert largest(theirs(x, given), wanted) == 0


def test_scores_of_relations_are_added() -> None:
    torch.manual_seed(0)
    layer = redrawn(HeteroAttention(8, 8, (["a"], [("a", "r", "a"), ("a", "s", "a")]), heads=2, relation_bias=True))
    x = torch.randn(5, 8)
    index = {("a", r, "a"): torch.randint(5, (2, 7)) for r in "rs"}
    key, query, value = layer.key_query_value[0](x).view(5, 3, 2, 4).unbind(1)
    wanted = torch.zeros(5, 2, 4)
    for i in range(5):
        for h in range(2):
            scores, values = [], []
            for r, (source, target) in enumerate(index.values()):
                for j in source[target == i].tolist():
                    score = layer.factor[r, h] * (query[i, h] @ (key[j, h] @ layer.key_map[r, h])) / math.sqrt(4)
                    scores.append(score + layer.bias[r, h])
                    values.append(value[j, h] @ layer.value_map[r, h])
            if scores:
                wanted[i, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    gate = torch.sigmoid(layer.skip[0])
    wanted = gate * layer.out[0](nn.functional.gelu(wanted.flatten(1))) + (1 - gate) * x
    got = layer(x_dict := {"a": x}, index)
    assert_close(got["a"], wanted)
    got["a"].sum().backward()
    assert float(layer.bias.grad.abs().max()) > 1e-6
    same = dict(reversed(index.items()))
    assert_close(layer(x_dict, same)["a"], got["a"])  # in whatever order kinds come


def test_permuted_nodes_give_permuted_nodes_and_nothing_is_stale() -> None:
    torch.manual_seed(0)
    layer, x, index = redrawn(HeteroAttention(CHANNELS, 8, KINDS, heads=4)), nodes(CHANNELS), edges()
    plain = layer(x, index)
    order = {kind: torch.randperm(size) for kind, size in SIZES.items()}
    moved = {
        kind: torch.stack([order[kind[0]].argsort()[e[0]], order[kind[2]].argsort()[e[1]]]) for kind, e in index.items()
    }
    permuted = layer({kind: x[kind][order[kind]] for kind in x}, moved)
    close(permuted, {kind: out[order[kind]] for kind, out in plain.items()})
    index[CITES][0, 0] = (index[CITES][0, 0] + 1) % 7
    assert largest(layer(x, index), layer(x, {kind: e.clone() for kind, e in index.items()})) == 0
    assert largest(layer(x, index | {ABOUT: edges()[ABOUT]}), layer(x, index)) > 1e-9


def test_without_edges() -> None:
    layer, x = redrawn(HeteroAttention(CHANNELS, 8, KINDS)), nodes(CHANNELS)
    none = {kind: torch.empty(2, 0, dtype=torch.long) for kind in KINDS[1]}
    close(layer(x, none), layer(x, {}))
    assert layer(x, {})["topic"].shape == (3, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HeteroAttention(8, 6, KINDS, heads=4), "heads must divide out_channels"),
        (lambda: HeteroAttention({"paper": 8}, 8, KINDS), "in_channels must be of the kinds"),
        (lambda: HeteroAttention(8, 8, (["a"], [("a", "r", "b")])), "kinds of edges between"),
        (lambda: HeteroAttention(CHANNELS, 8, KINDS)({"paper": torch.ones(7, 8)}, {}), "none of kind 'author'"),
        (lambda: HeteroAttention(8, 8, KINDS)(nodes(CHANNELS), {}), r"x_dict\['author'\] must be \(nodes, 8\)"),
        (
            lambda: HeteroAttention(CHANNELS, 8, KINDS)(nodes(CHANNELS), {CITES: torch.full((2, 1), 7)}),
            "must index the 7 nodes of kind 'paper'",
        ),
        (
            lambda: HeteroAttention(CHANNELS, 8, KINDS)(nodes(CHANNELS), {("a", "b", "c"): torch.ones(2, 1)}),
            "of the kinds of edges",
        ),
        (lambda: from_pyg(HGTConv(-1, 8, KINDS)), "in_channels must be known"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
