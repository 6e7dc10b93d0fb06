"""Graphs as a domain: layout, relations, moving, errors."""

from __future__ import annotations

import pickle
import warnings
from types import SimpleNamespace

import networkx as nx
import pytest
import torch
from hypothesis import given

import xformerlib as xf
from tests.closeness import assert_close
from tests.domains.graphs import as_networkx, permuted, random_graph, together, undirected
from tests.strategies import randoms
from xformerlib.masks import Causal, Edges, Local

ZERO = torch.zeros((), dtype=torch.long)
PATH = torch.tensor([[0, 1, 2], [1, 2, 3]])  # 0 -> 1 -> 2 -> 3


def ints(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.long)


def related(graph: xf.Graph, what: str, *args: object) -> torch.Tensor:
    """A relation of all pairs of tokens."""
    index = torch.arange(graph.num_tokens)
    return getattr(graph, what)(graph, *args, ZERO, index[:, None], index)


# -- layout ------------------------------------------------------------------------------------------------------


def test_one_graph_is_packed_too():
    graph = xf.Graph(PATH, 5)
    assert graph.offsets.tolist() == [0, 5] and graph.num_tokens == 5 and graph.num_graphs == graph.num_items == 1
    assert graph.items is None and graph.valid is None and graph.batch_size is None


def test_virtual_nodes_stand_in_front_of_their_graph():
    graph = xf.Graph(ints([0, 3], [1, 4]), 5, batch=torch.tensor([0, 0, 2, 2, 2]), virtual_nodes=2, num_graphs=4)
    assert graph.offsets.tolist() == [0, 4, 6, 11, 13] and graph.num_tokens == 13 and graph.prefix == 2
    assert graph.node_tokens.tolist() == [2, 3, 8, 9, 10]
    index = torch.arange(13)
    prefix = graph.is_prefix(ZERO, index)
    assert sorted(graph.node_tokens.tolist()) == (~prefix).nonzero()[:, 0].tolist()
    assert graph.items[graph.node_tokens].tolist() == graph.batch.tolist()
    assert graph.csr.row.tolist() == [3, 10] and graph.csr.col.tolist() == [2, 9]


@given(rng=randoms)
def test_node_tokens_are_the_ordinary_tokens_in_order(rng):
    graph = random_graph(rng)
    prefix = graph.is_prefix(ZERO, torch.arange(graph.num_tokens))
    ordinary = torch.ones(graph.num_tokens, dtype=torch.bool) if prefix is None else ~prefix
    assert graph.node_tokens.tolist() == ordinary.nonzero()[:, 0].tolist()
    assert graph.num_tokens == graph.num_nodes + graph.prefix * graph.num_graphs


@pytest.mark.parametrize("virtual_nodes", [0, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_graphs_without_nodes_have_all_facts(virtual_nodes, batched):
    batch = torch.zeros(0, dtype=torch.long) if batched else None
    graph = xf.Graph(torch.zeros(2, 0, dtype=torch.long), 0, batch=batch, virtual_nodes=virtual_nodes)
    graphs = 0 if batched else 1
    assert graph.num_graphs == graphs and graph.num_tokens == graphs * virtual_nodes
    assert graph.laplacian_eigenvectors(3)[0].shape == (graphs, 3) and graph.laplacian_eigenvectors(3)[1].shape == (
        0,
        3,
    )
    assert graph.random_walk(4).shape == (0, 4) and graph.coordinates.shape == (graph.num_tokens, 3)
    assert [degree.tolist() for degree in graph.degrees] == [[], []]
    for mask in (Edges(), Local(0), Local(1), Local(3), Causal()):
        assert mask.dense(graph).shape == (graph.num_tokens, graph.num_tokens)
    assert related(graph, "distance").sum() == 0


@given(rng=randoms)
def test_degrees_count_parallel_edges_and_self_loops(rng):
    graph = random_graph(rng)
    reference = as_networkx(graph)
    inward, outward = graph.degrees
    assert inward.tolist() == [d for _, d in sorted(reference.in_degree)]
    assert outward.tolist() == [d for _, d in sorted(reference.out_degree)]


def test_edges_are_copied_to_int64_and_features_kept():
    features = torch.randn(3, 2)
    graph = xf.Graph(PATH.int(), 4, edge_attr=features)
    assert graph.edge_index.dtype == torch.long and graph.edge_attr is features and graph.num_edges == 3


def test_parallel_edges_keep_their_features():
    graph = xf.Graph(ints([2, 0, 2, 1], [1, 1, 1, 0]), 3, edge_attr=torch.arange(4.0))
    assert graph.csr.rowptr.tolist() == [0, 1, 4, 4] and graph.csr.col.tolist() == [1, 0, 2, 2]
    assert graph.edge_attr[graph.csr.origin].tolist() == [3, 1, 0, 2]
    by_source = graph.csr_transpose
    assert by_source.col.tolist() == [1, 0, 1, 1] and graph.edge_attr[graph.csr.origin[by_source.origin]].tolist() == [
        1,
        3,
        0,
        2,
    ]


# -- relations, against networkx -----------------------------------------------------------------------------------


@given(rng=randoms)
def test_distance_is_the_fewest_edges_from_key_to_query(rng):
    graph = random_graph(rng)
    paths = dict(nx.all_pairs_shortest_path_length(as_networkx(graph)))
    got = related(graph, "distance")[graph.node_tokens][:, graph.node_tokens]
    for i in range(graph.num_nodes):
        for j in range(graph.num_nodes):
            assert got[i, j] == paths[j].get(i, int(graph.sizes[graph.batch[i]]))


@given(rng=randoms)
def test_within_is_distance_at_most(rng):
    graph = random_graph(rng)
    reached = related(graph, "distance")[graph.node_tokens][:, graph.node_tokens]
    unreachable = reached == graph.sizes[graph.batch][:, None]
    for radius in (0, 1, 2, 3, 5, 100):
        got = related(graph, "within", (radius,))[graph.node_tokens][:, graph.node_tokens]
        assert torch.equal(got, (reached <= radius) & ~unreachable)


@given(rng=randoms)
def test_order_is_that_of_directed_paths(rng):
    graph = random_graph(rng, acyclic=True)
    reference = as_networkx(graph)
    got = related(graph, "precedes")[graph.node_tokens][:, graph.node_tokens]
    for i in range(graph.num_nodes):
        assert got[i].nonzero()[:, 0].tolist() == sorted(nx.ancestors(reference, i) | {i})


@given(rng=randoms)
def test_a_cycle_has_no_order(rng):
    graph = random_graph(rng, virtual_nodes=rng.choice([0, 1]))
    reference = as_networkx(graph)
    if nx.is_directed_acyclic_graph(reference):
        assert Causal().dense(graph).shape == (graph.num_tokens, graph.num_tokens)
        return
    with pytest.raises(ValueError, match="acyclic graphs only; got the cycle") as error:
        Causal().bind(graph)
    cycle = [int(node) for node in str(error.value).partition("cycle ")[2].partition(".")[0].split(" -> ")]
    assert cycle[0] == cycle[-1] and all(reference.has_edge(a, b) for a, b in zip(cycle, cycle[1:], strict=False))


def test_a_long_cycle_is_named_in_short():
    nodes = torch.arange(50)
    with pytest.raises(ValueError, match=r"cycle \d+ -> \d+ -> \d+ -> \d+ -> \.\.\. -> "):
        _ = xf.Graph(torch.stack([nodes, nodes.roll(-1)]), 50).ancestors


def test_a_self_loop_is_a_cycle():
    with pytest.raises(ValueError, match="got the cycle 1 -> 1"):
        Causal().bind(xf.Graph(ints([0, 1], [1, 1]), 2, virtual_nodes=3))


@given(rng=randoms)
def test_masks_are_those_of_the_definitions(rng):
    graph = random_graph(rng, acyclic=True)
    reference, tokens = as_networkx(graph), graph.node_tokens.tolist()
    paths = dict(nx.all_pairs_shortest_path_length(reference))
    item = [0] * graph.num_tokens if graph.items is None else graph.items.tolist()
    place = graph.place(torch.arange(graph.num_tokens)).tolist()
    radius = rng.randint(0, 3)
    local, causal = Local(radius).dense(graph), Causal().dense(graph)
    for i in range(graph.num_tokens):
        for j in range(graph.num_tokens):
            if item[i] != item[j]:
                assert not local[i, j] and not causal[i, j]
            elif place[i] < graph.prefix or place[j] < graph.prefix:
                assert local[i, j]
                assert causal[i, j] == (place[j] <= place[i] if place[i] < graph.prefix else True)
            else:
                hops = paths[tokens.index(j)].get(tokens.index(i), 1_000)
                assert local[i, j] == (hops <= radius) and causal[i, j] == (hops < 1_000)


# -- coordinates ---------------------------------------------------------------------------------------------------


def test_coordinates_are_scaled_eigenvectors():
    graph = xf.Graph(
        ints([0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]), 5, batch=torch.tensor([0, 0, 0, 1, 1]), virtual_nodes=1
    )
    _, vectors = graph.laplacian_eigenvectors(3)
    assert graph.coordinates.shape == (7, 3)
    assert (graph.coordinates[[0, 4]] == 0).all()
    sizes = torch.tensor([3.0, 3, 3, 2, 2], dtype=torch.float64)
    assert_close(graph.coordinates[graph.node_tokens], vectors * sizes[:, None].sqrt())
    index = torch.arange(7)
    for axis in range(3):
        assert torch.equal(graph.coordinate(axis, ZERO, index), graph.coordinates[:, axis])
        offset = related_offset(graph, axis)
        assert torch.equal(offset, graph.coordinates[:, None, axis] - graph.coordinates[:, axis])


def related_offset(graph: xf.Graph, axis: int) -> torch.Tensor:
    index = torch.arange(graph.num_tokens)
    return graph.offset(axis, graph, ZERO, index[:, None], index)


# -- invariants ----------------------------------------------------------------------------------------------------


@given(rng=randoms)
def test_company_changes_nothing(rng):
    graphs = [random_graph(rng, virtual_nodes=0) for _ in range(3)]
    graphs += [undirected(nx.cycle_graph(6)), undirected(nx.complete_graph(4))]  # with multiple eigenvalues
    alone, batch = graphs[rng.randrange(5)], None
    alone = xf.Graph(alone.edge_index, alone.num_nodes)
    batch = together([*graphs, alone])
    first = batch.num_nodes - alone.num_nodes
    own = slice(first, None)
    assert_close(batch.random_walk(5)[own], alone.random_walk(5), "random walk", scale=1.0)
    assert_close(batch.laplacian_eigenvectors(4)[1][own], alone.laplacian_eigenvectors(4)[1], "eigenvectors", scale=1.0)
    assert torch.equal(related(batch, "distance")[own, own], related(alone, "distance"))
    assert torch.equal(
        batch.within_hops(2).contains(
            torch.arange(first, batch.num_nodes)[:, None], torch.arange(first, batch.num_nodes)
        ),
        related(alone, "within", (2,)),
    )


@given(rng=randoms)
def test_renaming_nodes_renames_facts(rng):
    graph = random_graph(rng, virtual_nodes=0)
    graph = xf.Graph(graph.edge_index, graph.num_nodes)
    order = torch.randperm(graph.num_nodes)
    renamed = permuted(graph, order)
    assert_close(renamed.random_walk(4)[order], graph.random_walk(4), "random walk", scale=1.0)
    assert torch.equal(related(renamed, "distance")[order][:, order], related(graph, "distance"))
    assert torch.equal(related(renamed, "within", (2,))[order][:, order], related(graph, "within", (2,)))
    assert_close(renamed.laplacian_eigenvectors(3)[0], graph.laplacian_eigenvectors(3)[0], "eigenvalues", scale=2.0)


def test_facts_are_kept_and_move_along():
    graph = xf.Graph(PATH, 4, edge_attr=torch.ones(3), virtual_nodes=1)
    assert graph.hops is graph.hops and graph.csr is graph.csr and graph.within_hops(9) is graph.within_hops(4)
    assert graph.laplacian_eigenvectors(2) is graph.laplacian_eigenvectors(2)
    moved = graph.to("meta")
    assert moved.to("meta") is moved and graph.to("cpu") is graph
    for tensor in (
        moved.edge_index,
        moved.edge_attr,
        moved.offsets,
        moved.csr.col,
        moved.hops.table,
        moved.laplacian_eigenvectors(2)[1],
    ):
        assert tensor.device.type == "meta"


def test_pickle_and_repr():
    graph = xf.Graph(PATH, 4, edge_attr=torch.ones(3), virtual_nodes=1)
    assert repr(graph) == "Graph(<3 edges>, 4, edge_attr=..., virtual_nodes=1)"
    copy = pickle.loads(pickle.dumps(graph))
    assert torch.equal(related(copy, "distance"), related(graph, "distance")) and copy != graph
    assert repr(xf.Graph(PATH, 4, batch=torch.zeros(4).long(), num_graphs=2)) == "Graph(<3 edges>, 4, batch=<2 graphs>)"


@pytest.mark.parametrize("virtual_nodes", [0, 1])
def test_masks_under_flex_attention(virtual_nodes):
    from torch.nn.attention.flex_attention import create_mask

    for mask in (Edges(), Local(0), Local(1), Local(2), Causal()):
        graph = xf.Graph(PATH, 5, batch=torch.tensor([0, 0, 0, 0, 1]), virtual_nodes=virtual_nodes)  # nothing known yet
        n = graph.num_tokens
        assert torch.equal(create_mask(mask.bind(graph), 1, 1, n, n, device="cpu")[0, 0], mask.dense(graph))


def test_relations_compile_without_a_break():
    graph = xf.Graph(PATH, 5, batch=torch.tensor([0, 0, 0, 0, 1]), virtual_nodes=1)
    index = torch.arange(graph.num_tokens)
    relations = [(Local(2) & Causal() & Edges()).bind(graph), lambda b, h, q, k: graph.distance(graph, b, q, k)]
    for relation in relations:
        expected = relation(ZERO, ZERO, index[:, None], index)  # computes the facts
        compiled = torch.compile(relation, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ZERO, ZERO, index[:, None], index), expected)


# -- from elsewhere --------------------------------------------------------------------------------------------------


def test_from_anything_with_edges():
    data = SimpleNamespace(
        edge_index=PATH, num_nodes=4, edge_attr=torch.ones(3, 2), batch=torch.zeros(4).long(), num_graphs=2
    )
    graph = xf.Graph.from_pyg(data, virtual_nodes=1)
    assert graph.num_graphs == 2 and graph.num_tokens == 6 and graph.edge_attr is data.edge_attr
    with pytest.raises(TypeError, match="without num_nodes"):
        xf.Graph.from_pyg(SimpleNamespace(edge_index=PATH))
    with pytest.raises(TypeError, match="without edge_index"):
        xf.Graph.from_pyg(SimpleNamespace(num_nodes=3))


def test_from_pytorch_geometric():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the import itself warns of is not ours
        geometric = pytest.importorskip("torch_geometric")
        from torch_geometric.data import Batch, Data
    one = Data(edge_index=PATH, num_nodes=4, edge_attr=torch.randn(3, 2))
    empty = Data(edge_index=PATH[:, :0], num_nodes=0, edge_attr=torch.zeros(0, 2))
    assert repr(xf.Graph.from_pyg(one)) == "Graph(<3 edges>, 4, edge_attr=...)"
    graph = xf.Graph.from_pyg(Batch.from_data_list([one, empty, one, empty]), virtual_nodes=1)
    assert (
        graph.offsets.tolist() == [0, 5, 6, 11, 12]
        and graph.edge_index.tolist() == torch.cat([PATH, PATH + 4], 1).tolist()
    )
    index = geometric.EdgeIndex(PATH, sparse_size=(4, 4))
    assert type(xf.Graph(index, 4).edge_index) is torch.Tensor


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: xf.Graph([[0], [1]], 2), "edge_index must be a .2, edges. tensor of integers; got list"),
        (lambda: xf.Graph(torch.zeros(2, 0), 2), "tensor of integers; got torch.float32"),
        (lambda: xf.Graph(torch.zeros(2, 1).bool(), 2), "tensor of integers; got torch.bool"),
        (lambda: xf.Graph(PATH.T, 4), r"edge_index must be \(2, edges\), sources above targets; got \(3, 2\)"),
        (lambda: xf.Graph(PATH[0], 4), "edge_index must be"),
        (lambda: xf.Graph(PATH, 3), "from 0 to num_nodes - 1 = 2; got 3"),
        (lambda: xf.Graph(PATH - 1, 4), "got -1"),
        (lambda: xf.Graph(PATH, -1), "num_nodes must be >= 0"),
        (lambda: xf.Graph(PATH, 4.0), "num_nodes must be an integer"),
        (lambda: xf.Graph(PATH, 4, virtual_nodes=-1), "virtual_nodes must be >= 0"),
        (lambda: xf.Graph(PATH, 4, edge_attr=torch.zeros(4, 2)), r"one row for each of the 3 edges; got \(4, 2\)"),
        (lambda: xf.Graph(PATH, 4, edge_attr=[1, 2, 3]), "edge_attr must be a tensor"),
        (lambda: xf.Graph(PATH, 4, edge_attr=torch.zeros(3, device="meta")), "edge_attr must be on the device of edge_index"),
        (lambda: xf.Graph(PATH, 4, batch=torch.zeros(3).long()), "num_nodes=4 nodes; got 3 entries"),
        (lambda: xf.Graph(PATH, 4, batch=torch.tensor([0, 0, 1, 0])), "batch must not fall"),
        (lambda: xf.Graph(PATH, 4, batch=torch.tensor([0, 0, 1, 1])), "got edge 1 from graph 0 to graph 1"),
        (lambda: xf.Graph(PATH, 4, batch=torch.tensor([-1, 0, 0, 0])), "batch must be >= 0"),
        (lambda: xf.Graph(PATH, 4, batch=torch.zeros(4)), "batch must be a vector of integers"),
        (lambda: xf.Graph(PATH, 4, batch=torch.ones(4).long(), num_graphs=1), "num_graphs=1 and a node of graph 1"),
        (lambda: xf.Graph(PATH, 4, num_graphs=2), "num_graphs must come with batch"),
        (lambda: xf.Graph(PATH, 4).within_hops(-1), "radius must be >= 0"),
        (lambda: xf.Graph(PATH, 4).laplacian_eigenvectors(-1), "k must be >= 0"),
        (lambda: xf.Graph(PATH, 4).random_walk(1.5), "steps must be an integer"),
        (lambda: xf.Graph(PATH, 20_000).hops, "at most 268,435,456; got 400,000,000"),
        (lambda: Local(1.5).bind(xf.Graph(PATH, 4)), "radius on a graph is a number of hops"),
        (lambda: Local(1).bind(xf.Graph(PATH, 4), xf.Graph(PATH, 4)), "must be on the same Graph object"),
        (lambda: Causal().bind(xf.Graph(PATH, 4), xf.Sequence(4)), "same kind of domain"),
    ],
)  # fmt: skip
def test_bad_graphs_say_what_is_wrong(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_batch_on_another_device():
    with pytest.raises(ValueError, match="batch must be on the device of edge_index; got meta and cpu"):
        xf.Graph(PATH, 4, batch=torch.zeros(4, dtype=torch.long, device="meta"))
