"""Pictures show what the library computes: the drawn data is compared, not the pixels."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import matplotlib
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.axes import Axes
from torch import Tensor

import xformerlib as xf
from tests.closeness import assert_close
from xformerlib import masks, plot, positions

matplotlib.use("Agg")
from matplotlib import pyplot

EDGES = torch.tensor([[0, 1, 1, 2, 2, 3, 4], [1, 0, 2, 1, 3, 4, 2]])
RING = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6])
DOMAINS = {
    "sequence": xf.Sequence(7),
    "sequence with prefix": xf.Sequence(5, start=3, prefix=2),
    "padded": xf.Sequence.padded([4, 6]),
    "packed": xf.Sequence.packed([3, 5], prefix=1),
    "timeline": xf.Timeline(torch.tensor([0.0, 0.5, 2.0, 2.25, 7.0])),
    "timelines": xf.Timeline(torch.rand(2, 5, generator=torch.Generator().manual_seed(0)).cumsum(1)),
    "row": xf.Grid(6),
    "grid": xf.Grid(3, 4, prefix=1),
    "grids": xf.Grid.packed([(2, 3), (4, 2)]),
    "volume": xf.Grid(2, 3, 2),
    "graph": xf.Graph(EDGES, 5),
    "graphs": xf.Graph(torch.cat([EDGES, EDGES + 6], 1), 11, batch=torch.tensor([0] * 6 + [1] * 5), virtual_nodes=1),
    "points": xf.Points(torch.randn(6, 2, generator=torch.Generator().manual_seed(0))),
    "points in space": xf.Points(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))),
    "points on a line": xf.Points(torch.randn(4, 1, generator=torch.Generator().manual_seed(0))),
}
MASKS = [masks.Full(), masks.Local(1), masks.Local(2) | masks.Global(1), ~masks.Prefix(2)]


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


def image(ax: Axes) -> Tensor:
    """The matrix that was drawn."""
    return torch.as_tensor(ax.images[0].get_array().data)


def marks(ax: Axes) -> Tensor:
    """The values of the tokens that were drawn."""
    return torch.as_tensor(ax.collections[-1].get_array().data)


def one_row(allowed: Tensor, row: int) -> Tensor:
    return allowed if allowed.ndim == 2 else allowed[row, 0]


@settings(max_examples=15)
@given(st.sampled_from(sorted(DOMAINS)), st.sampled_from(MASKS), st.data())
def test_a_mask_is_drawn_as_it_is(name: str, mask: masks.Mask, data: st.DataObject) -> None:
    pyplot.close("all")
    domain = DOMAINS[name]
    row = data.draw(st.integers(0, (domain.batch_size or 1) - 1))
    allowed = one_row(mask.dense(domain), row)
    ax = plot.mask(mask, domain, row=row)
    assert torch.equal(image(ax), allowed.double())
    assert ax.get_title() == repr(mask)


@settings(max_examples=30)
@given(st.sampled_from(sorted(DOMAINS)), st.sampled_from(MASKS), st.data())
def test_a_query_on_its_domain_shows_its_line_of_the_mask(name: str, mask: masks.Mask, data: st.DataObject) -> None:
    pyplot.close("all")
    domain = DOMAINS[name]
    row = data.draw(st.integers(0, (domain.batch_size or 1) - 1))
    query = data.draw(st.integers(0, domain.num_tokens - 1))
    shown = one_row(masks.Full().dense(domain), row)[query]  # the query's own item
    shown[query] = True
    ax = plot.mask_on(mask, domain, query=query, row=row)
    assert torch.equal(marks(ax), one_row(mask.dense(domain), row)[query][shown].double())


def test_keys_may_live_elsewhere() -> None:
    new, past = xf.Sequence(2, start=3), xf.Sequence(5)
    ax = plot.mask(masks.Causal(), new, past)
    assert torch.equal(image(ax), masks.Causal().dense(new, past).double())
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("query: Sequence(2, start=3)", "key: Sequence(5)")


def test_rows_and_heads_are_chosen() -> None:
    allowed = torch.rand(2, 3, 4, 4) > 0.5
    ax = plot.mask(masks.Dense(allowed), xf.Sequence(4), row=1, head=2)
    assert torch.equal(image(ax), allowed[1, 2].double())
    ax = plot.mask_on(masks.Dense(allowed), xf.Sequence(4), row=1, head=2, query=3)
    assert torch.equal(marks(ax), allowed[1, 2, 3].double())


def test_cells_of_a_grid_are_drawn_where_they_are() -> None:
    ax = plot.mask_on(masks.Local(1), xf.Grid(2, 3), query=0)
    centres = [path.vertices[:4].mean(0).tolist() for path in ax.collections[-1].get_paths()]
    expected = torch.tensor([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]])  # x to the right, y down
    assert_close(torch.tensor(centres), expected.float())
    assert ax.yaxis_inverted()


def test_points_and_times_are_drawn_where_they_are() -> None:
    for name in ("points", "timeline"):
        ax = plot.mask_on(masks.Full(), DOMAINS[name], query=0)
        offsets = torch.as_tensor(ax.collections[-1].get_offsets().data)
        places = DOMAINS[name].coordinates.double()
        assert_close(offsets[:, : places.shape[1]], places)


def test_prefix_tokens_stand_left_of_the_others() -> None:
    ax = plot.mask_on(masks.Full(), xf.Grid(3, 3, prefix=2), query=0)
    left = [path.vertices[:, 0].min() for path in ax.collections[-1].get_paths()]
    assert max(left[:2]) < min(left[2:]) - 1


def test_distances_on_paper_follow_hops() -> None:
    graph = xf.Graph(torch.cat([RING, RING.flip(0)], 1), 6)
    ax = plot.mask_on(masks.Full(), graph, query=0)
    places = torch.as_tensor(ax.collections[-1].get_offsets().data)
    apart = torch.cdist(places, places)
    for hops in (1, 2, 3):  # the ring is drawn as a regular hexagon
        same = apart.diagonal(hops)
        assert ((same / same[0] - 1).abs() < 0.02).all()
    assert apart[0, 1] < apart[0, 2] < apart[0, 3]


def test_edges_are_lines_from_source_to_target() -> None:
    def ends(graph: xf.Graph) -> set[tuple[int, int]]:
        ax = plot.mask_on(masks.Full(), graph, query=graph.prefix)
        places = torch.as_tensor(ax.collections[-1].get_offsets().data)
        nearest = [
            [(places - torch.tensor(end)).norm(dim=1).argmin().item() for end in (t.xyann, t.xy)] for t in ax.texts
        ]
        return {(source, target) for source, target in nearest}

    assert ends(xf.Graph(RING, 6)) == {(i, (i + 1) % 6) for i in range(6)}
    assert len(ends(xf.Graph(torch.cat([RING, RING.flip(0)], 1), 6))) == 6  # both directions in one line
    assert ends(xf.Graph(RING, 6, virtual_nodes=2)) == {(i + 2, (i + 1) % 6 + 2) for i in range(6)}


@pytest.mark.parametrize(
    "graph",
    [
        xf.Graph(torch.zeros(2, 0, dtype=torch.long), 3),
        xf.Graph(torch.zeros(2, 0, dtype=torch.long), 1),
        xf.Graph(torch.tensor([[0, 0], [0, 1]]), 4),
    ],
    ids=["no edges", "one node", "self-loop, disconnected"],
)
def test_odd_graphs_are_drawn(graph: xf.Graph) -> None:
    ax = plot.mask_on(masks.Full(), graph, query=0)
    places = torch.as_tensor(ax.collections[-1].get_offsets().data)
    assert places.shape == (graph.num_tokens, 2)
    assert places.isfinite().all()
    assert places.unique(dim=0).shape == places.shape  # no two nodes on top of each other


@pytest.mark.parametrize("name", ["sequence", "timelines", "grid", "graph", "points"])
def test_a_bias_is_drawn_as_it_is(name: str) -> None:
    domain, q = DOMAINS[name], torch.arange(DOMAINS[name].num_tokens)
    position = positions.DistanceDecay(4) + positions.Rotary(8)  # the rotation has no scores, and is left out
    expected = position.biases[0].pair(domain).at(q[:, None], q, torch.tensor(0))[2]
    ax = plot.bias(position, domain, head=2)
    assert_close(image(ax), expected.double())
    ax = plot.bias_on(position, domain, head=2, query=1)
    assert_close(marks(ax), expected[1].double())


def test_biases_that_are_added_are_drawn_added() -> None:
    decay = positions.DistanceDecay(4)
    once, twice = (plot.bias(position, xf.Sequence(5)) for position in (decay, decay + positions.DistanceDecay(4)))
    assert_close(image(twice), 2 * image(once))


def test_a_position_without_bias_has_none_to_draw() -> None:
    with pytest.raises(ValueError, match="position must have a bias to draw; got Rotary"):
        plot.bias(positions.Rotary(8), xf.Sequence(4))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["sequence", "timelines", "grid", "points"])
@pytest.mark.parametrize("mixed", [False, True])
def test_rotation_is_the_cosine_of_turned_tokens(name: str, mixed: bool) -> None:
    domain = DOMAINS[name]
    position = positions.Rotary(12, mixed=mixed, heads=2 if mixed else 1)
    alike = image(plot.rotation(position, domain, head=1 if mixed else 0))
    assert_close(alike.diagonal(), torch.ones(domain.num_tokens, dtype=alike.dtype))
    assert_close(alike, alike.T)
    assert (alike.abs() <= 1 + 1e-5).all()
    assert_close(marks(plot.rotation_on(position, domain, head=1 if mixed else 0, query=2)), alike[2])


@pytest.mark.usefixtures("double")
def test_rotation_of_one_pair_is_the_cosine_of_the_offset() -> None:
    alike = image(plot.rotation(positions.Rotary(2), xf.Sequence(6)))
    assert_close(alike[0], torch.arange(6.0).cos().double())


def test_embedding_is_what_is_added() -> None:
    domain, position = xf.Grid(3, 3), positions.Sinusoidal(8) + positions.Learned(8, (3, 3))
    added = position(torch.zeros(1, 9, 8), domain)[0].detach()
    assert_close(image(plot.embedding(position, domain, dim=8)), added)


def test_attention_weights_are_drawn_as_they_are() -> None:
    layer = xf.Attention(8, heads=2, mask=masks.Causal())
    weights = layer.weights(torch.randn(3, 6, 8), xf.Sequence(6))
    ax = plot.attention(weights, xf.Sequence(6), row=2, head=1)
    assert_close(image(ax), weights[2, 1].double())
    ax = plot.attention_on(weights, xf.Sequence(6), row=2, head=1, query=4)
    assert_close(marks(ax), weights[2, 1, 4].double())


def test_pictures_are_drawn_where_they_are_asked_for() -> None:
    _, axes = pyplot.subplots(1, 2)
    assert plot.mask(masks.Causal(), xf.Sequence(4), ax=axes[0]) is axes[0]
    assert plot.mask_on(masks.Causal(), xf.Sequence(4), query=2, ax=axes[1]) is axes[1]
    assert len(pyplot.get_fignums()) == 1


def test_a_query_that_does_not_exist_is_refused() -> None:
    with pytest.raises(IndexError, match="query must be one of the 4 tokens of Sequence\\(4\\); got query=4"):
        plot.mask_on(masks.Causal(), xf.Sequence(4), query=4)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(ImportError, match="pip install"):
        plot.embedding(positions.Sinusoidal(8), xf.Sequence(4), dim=8)


@pytest.mark.parametrize("channels", [1, 3])
def test_attention_is_drawn_over_its_image(channels: int) -> None:
    given, attention = torch.randn(channels, 8, 12), torch.rand(2, 3)
    ax = plot.attention_on_image(given, attention, strength=0.5)
    below, above = (torch.as_tensor(drawn.get_array().data) for drawn in ax.images)
    scaled = (attention - attention.min()) / (attention.max() - attention.min())
    assert_close(above, scaled)
    assert_close(torch.as_tensor(ax.images[1].get_alpha()), 0.5 * scaled)
    grey = ((given - given.min()) / (given.max() - given.min())).mean(0)
    assert_close(below, grey)
    assert {tuple(drawn.get_extent()) for drawn in ax.images} == {(0, 12, 8, 0)}


def test_an_image_of_bytes_keeps_its_brightness_and_equal_attention_covers_nothing() -> None:
    ax = plot.attention_on_image(torch.full((3, 4, 4), 51, dtype=torch.uint8), torch.full((2, 2), 0.25), smooth=False)
    assert_close(torch.as_tensor(ax.images[0].get_array().data), torch.full((4, 4), 0.2))
    assert not ax.images[1].get_alpha().any()


@pytest.mark.parametrize(
    ("shape", "attention", "strength", "message"),
    [
        ((2, 4, 4), (2, 2), 0.5, r"image must be \(1 or 3 channels, height, width\).*got \(2, 4, 4\)"),
        ((3, 4, 4), (4, 2, 2), 0.5, r"attention a map \(rows, columns\).*\(4, 2, 2\)"),
        ((3, 4, 4), (2, 2), 1.5, r"strength must be in \[0, 1\]; got strength=1.5"),
    ],
)
@pytest.mark.parametrize("name", ["attention_on_image"])
def test_attention_without_an_image_is_refused(
    name: str, shape: tuple[int, ...], attention: tuple[int, ...], strength: float, message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(plot, name)(torch.rand(shape), torch.rand(attention), strength=strength)
