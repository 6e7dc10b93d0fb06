"""The cache beside an edge_index: what is derived once, when it is derived again, its bound, and how it is switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from xformerlib import Graph, graph
from xformerlib.domains import _made_once
from xformerlib.graph._edges import sorted_edges
from xformerlib.graph._inputs import place_nodes


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    before = graph.keep_edges(0)
    graph.keep_edges(before)
    yield
    graph.keep_edges(before)


def edges(seed: int = 0) -> Tensor:
    return torch.randint(0, 9, (2, 30), generator=torch.Generator().manual_seed(seed))


def in_place(change: str, x: Tensor) -> None:
    if change == "index":
        x[0, 0] = (x[0, 0] + 1) % 9
    elif change == "copy_":
        x.copy_((x + 1) % 9)
    elif change == "view":
        x[1].add_(1).remainder_(9)
    elif change == "data":
        x.data[0, 3] = (x[0, 3] + 1) % 9
    elif change == "numpy":
        x.numpy()[0, 5] = (int(x[0, 5]) + 1) % 9
    else:
        with torch.inference_mode():
            x[0, 0] = (x[0, 0] + 1) % 9


@pytest.mark.parametrize("change", ["index", "copy_", "view", "data", "numpy", "inference"])
@pytest.mark.parametrize(
    "model",
    [
        lambda: graph.GraphTransformer(4, 16, 2, 2, 2, mask=graph_mask(), position=graph.RandomWalkBias(2, 3)),
        lambda: graph.GPS(4, 16, 2, num_layers=1, heads=2),
        lambda: graph.EdgeAttention(4, 4, heads=2),
    ],
    ids=["transformer", "gps", "layer"],
)
def test_changes_in_place_are_seen(change: str, model: Callable[[], torch.nn.Module], double: torch.dtype) -> None:
    one, x, edge_index = model().eval(), torch.randn(9, 4), edges()
    one(x, edge_index)
    in_place(change, edge_index)
    assert_close(one(x, edge_index), one(x, edge_index.clone()), "the same edges")


def graph_mask() -> object:
    from xformerlib import masks

    return masks.Edges(self_loops=True)


def test_a_batch_that_changes_is_seen() -> None:
    edge_index, batch = torch.zeros(2, 0).long(), torch.tensor([0, 0, 1, 1])
    assert place_nodes(edge_index, 4, batch).graph.sizes.tolist() == [2, 2]
    batch[1] = 1
    assert place_nodes(edge_index, 4, batch).graph.sizes.tolist() == [1, 3]
    batch.data[2] = 2  # which torch does not count
    batch.data[3] = 2
    assert place_nodes(edge_index, 4, batch).graph.sizes.tolist() == [1, 1, 2]


def test_what_is_derived_is_kept() -> None:
    edge_index = edges()
    assert place_nodes(edge_index, 9).graph is place_nodes(edge_index, 9).graph
    assert sorted_edges(edge_index, 9, 9) is sorted_edges(edge_index, 9, 9)
    assert place_nodes(edge_index, 9).graph is not place_nodes(edge_index.clone(), 9).graph


def test_the_cache_has_a_bound() -> None:
    graph.keep_edges(3)
    kept = [edges(seed) for seed in range(5)]
    placed = [place_nodes(edge_index, 9).graph for edge_index in kept]
    assert len(_made_once._MADE) == 3
    assert place_nodes(kept[2], 9).graph is placed[2]  # now the last to go
    place_nodes(kept[0], 9)
    assert place_nodes(kept[2], 9).graph is placed[2]
    assert place_nodes(kept[3], 9).graph is not placed[3]
    for nodes in range(9, 40):
        place_nodes(kept[0], nodes)
    assert len(_made_once._MADE[kept[0]]) == _made_once.MOST_VALUES
    graph.keep_edges(1)
    assert len(_made_once._MADE) == 1


def test_the_cache_can_be_switched_off() -> None:
    edge_index = edges()
    first = place_nodes(edge_index, 9).graph
    assert graph.keep_edges(0) == 128
    assert len(_made_once._MADE) == 0
    assert place_nodes(edge_index, 9).graph is not first
    assert len(_made_once._MADE) == 0
    with pytest.raises(ValueError, match=r"most must be >= 0; got most=-1"):
        graph.keep_edges(-1)


def test_entries_go_with_their_tensors() -> None:
    edge_index = edges()
    place_nodes(edge_index, 9)
    assert len(_made_once._MADE) == 1
    del edge_index
    assert len(_made_once._MADE) == 0


def test_facts_in_single_precision_are_not_kept_in_double() -> None:
    where = Graph(edges(), 9)
    bias = graph.RandomWalkBias(2, 4)
    bias.pair(where, dtype=torch.float32)
    sizes = {fact.dtype for fact in where._known_facts().values() if isinstance(fact, Tensor) and fact.shape == (81, 4)}
    assert sizes == {torch.float32}
    assert where.walks(4).dtype == torch.float64
    assert torch.equal(where.walks(4, torch.float32), where.walks(4).float())
