"""Biases against the formulas of the papers, and against the tables of published models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from timm.layers.pos_embed_rel import RelPosBias, RelPosMlp
from torch import Tensor

from tests.closeness import InDefaultPrecision, assert_close
from xformerlib import Domain, Grid, Points, Sequence, Timeline
from xformerlib.positions import Bias, ContinuousBias, DistanceDecay, RelativeBias

from .cases import redrawn


def scores(bias: Bias, domain: Domain, keys: Domain | None = None, row: int | None = None) -> Tensor:
    q, k = torch.arange(domain.num_tokens), torch.arange((keys or domain).num_tokens)
    b = None if row is None else torch.tensor(row)
    return bias.double().pair(domain, keys, dtype=torch.float64).at(q[:, None], k[None, :], b)


# -- tables ------------------------------------------------------------------------------------------------------------


def t5_bucket(ahead: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """The bucket of ``ahead`` = key - query, as the code of T5 computes it, for one pair."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if ahead > 0 else 0
        distance = abs(ahead)
    else:
        distance = max(-ahead, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    ratio = torch.log(torch.tensor(distance).float() / exact) / math.log(max_distance / exact)
    return first + min(exact + int(ratio * (buckets - exact)), buckets - 1)


@given(
    length=st.integers(1, 12), start=st.integers(0, 400), bidirectional=st.booleans(),
    shape=st.sampled_from([(32, 128), (8, 20), (64, 1000)]),
)  # fmt: skip
def test_sequence_has_the_buckets_of_t5(length: int, start: int, bidirectional: bool, shape: tuple[int, int]) -> None:
    bias = redrawn(RelativeBias(3, buckets=shape[0], max_distance=shape[1], bidirectional=bidirectional))
    queries, keys = Sequence(length, start=start), Sequence(200, start=100)
    table = bias.double().table
    rows = [[t5_bucket(k - q, bidirectional, *shape) for k in range(100, 300)] for q in range(start, start + length)]
    assert torch.equal(scores(bias, queries, keys), table[torch.tensor(rows)].movedim(-1, 0))


@given(
    times=st.lists(st.floats(-300, 300), min_size=1, max_size=8),
    scale=st.sampled_from([1.0, 10.0]),
    bidirectional=st.booleans(),
)
def test_timeline_has_the_buckets_of_gaps_rounded_down(times: list[float], scale: float, bidirectional: bool) -> None:
    bias = redrawn(RelativeBias(2, scale=scale, bidirectional=bidirectional)).double()
    domain = Timeline(torch.tensor(times, dtype=torch.float64))
    rows = torch.zeros(len(times), len(times), dtype=torch.long)
    for i, query in enumerate(times):
        for j, key in enumerate(times):
            ahead = scale * (key - query)
            whole = math.floor(abs(ahead)) if abs(ahead) < 8 else abs(ahead)
            side = 16 if bidirectional and ahead > 0 else 0
            if not bidirectional and ahead > 0:
                whole = 0
            n = 16 if bidirectional else 32
            exact = n // 2
            if whole >= exact:
                ratio = torch.log(torch.tensor(whole).float() / exact) / math.log(128 / exact)
                whole = min(exact + int(ratio * (n - exact)), n - 1)
            rows[i, j] = side + int(whole)
    assert torch.equal(scores(bias, domain), bias.table[rows].movedim(-1, 0))


def test_a_timeline_of_whole_times_is_a_sequence() -> None:
    bias = redrawn(RelativeBias(2))
    assert_close(scores(bias, Timeline(torch.arange(40.0))), scores(bias, Sequence(40)))


def test_each_row_of_a_timeline_has_its_own_gaps() -> None:
    times = torch.tensor([[0.0, 1.0, 50.0], [0.0, 20.0, 21.0]])
    domain = Timeline(times)
    for bias in (redrawn(RelativeBias(2)), redrawn(ContinuousBias(2)), DistanceDecay(2)):
        together = (
            bias.double()
            .pair(domain, dtype=torch.float64)
            .at(torch.arange(3)[:, None], torch.arange(3)[None], torch.arange(2)[:, None, None])
        )
        assert together.shape == (2, 2, 3, 3)
        for row in range(2):
            assert_close(together[:, row], scores(bias, Timeline(times[row])))


def test_points_share_a_row_at_equal_distance() -> None:
    bias = redrawn(RelativeBias(2, buckets=8, max_distance=16)).double()
    places = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.5], [100.0, 0.0]])
    result = scores(bias, Points(places))
    rows = torch.tensor([0, 4, 1, 7])  # 0, 5 in the first range beyond 4, 1.5, far away
    assert_close(result[:, 0], bias.table[rows].T)
    assert_close(result, result.transpose(-2, -1))


@pytest.mark.parametrize(("window", "prefix"), [((4, 4), 0), ((3, 5), 0), ((3, 5), 1)])
def test_grid_has_the_table_of_swin_and_beit(window: tuple[int, int], prefix: int) -> None:
    theirs = redrawn(RelPosBias(window, num_heads=3, prefix_tokens=prefix)).double()
    ours = RelativeBias(3, size=window, prefix=bool(prefix)).double()
    table = theirs.relative_position_bias_table.detach()
    with torch.no_grad():
        ours.table.copy_(table[: len(ours.table)])
        if prefix:
            ours.prefix_table.copy_(table[len(ours.table) :])
    assert torch.equal(scores(ours, Grid(*window, prefix=prefix)), theirs.get_bias()[0])


@given(size=st.tuples(st.integers(1, 4), st.integers(1, 4)), grid=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_offsets_beyond_the_table_share_its_outermost_entry(size: tuple[int, int], grid: tuple[int, int]) -> None:
    bias = redrawn(RelativeBias(2, size=size)).double()
    table = bias.table.reshape(2 * size[0] - 1, 2 * size[1] - 1, 2)
    places = Grid(*grid).coordinates
    offset = places[:, None] - places[None, :]
    row, column = (offset[..., a].clamp(1 - size[a], size[a] - 1) + size[a] - 1 for a in range(2))
    assert torch.equal(scores(bias, Grid(*grid)), table[row, column].movedim(-1, 0))


@pytest.mark.parametrize("size", [5, (5,)])
def test_a_table_of_offsets_on_a_sequence(size: int | tuple[int]) -> None:
    bias = redrawn(RelativeBias(2, size=size)).double()
    offset = torch.arange(4, 10)[:, None] - torch.arange(12)[None, :]
    result = scores(bias, Sequence(6, start=4), Sequence(12))
    assert torch.equal(result, bias.table[offset.clamp(-4, 4) + 4].movedim(-1, 0))


def test_queries_and_keys_may_have_grids_of_different_size() -> None:
    for bias in (redrawn(RelativeBias(2, size=(3, 4))), redrawn(ContinuousBias(2)), DistanceDecay(2)):
        all_pairs = scores(bias, Grid(4, 6)).reshape(2, 4, 6, 4, 6)
        part = scores(bias, Grid(2, 5), Grid(4, 6)).reshape(2, 2, 5, 4, 6)
        assert_close(part, all_pairs[:, :2, :5])


def test_rows_are_kept_on_the_domain_for_equal_settings_only() -> None:
    domain = Sequence(20)
    settings = [
        {},
        {"buckets": 8},
        {"max_distance": 17},
        {"bidirectional": False},
        {"scale": 3.0},
        {"size": 3},
        {"size": 4},
    ]
    for setting in settings:
        bias = redrawn(RelativeBias(2, **setting))
        assert torch.equal(scores(bias, domain), scores(bias, Sequence(20)))
        assert torch.equal(scores(bias, Sequence(3), domain), scores(bias, Sequence(20))[:, :3])


def test_the_gradient_of_a_table_is_accurate_over_many_pairs() -> None:
    bias = RelativeBias(1)
    n = 1024
    i = torch.arange(n)
    weight = torch.rand(1, n, n)
    grads = []
    for dtype in (torch.float32, torch.float64):
        total = torch.zeros(32, 1, dtype=torch.float64)
        pair = bias.to(dtype).pair(Sequence(n))
        for rows in i.split(128):
            score = pair.at(rows[:, None], i[None, :])
            total += torch.autograd.grad((score * weight[:, rows].to(dtype)).sum(), bias.table, retain_graph=True)[0]
        grads.append(total)
    assert_close(grads[0].float(), grads[1], "gradient in single precision")


# -- network -----------------------------------------------------------------------------------------------------------


def network(bias: ContinuousBias, offset: Tensor) -> Tensor:
    """The formula, for offsets (..., ndim)."""
    u = offset.sign() * torch.log2(1 + offset.abs())
    hidden = torch.relu(u @ bias.inner.weight[:, : u.shape[-1]].T + bias.inner.bias)
    return (16 / (1 + torch.exp(-hidden @ bias.outer.weight.T))).movedim(-1, 0)


@pytest.mark.parametrize(
    "domain",
    [
        Sequence(6, start=3), Grid(7), Grid(3, 4), Grid(2, 3, 2), Timeline(torch.rand(6).double()),
        Points(torch.randn(6, 1).double()), Points(torch.randn(6, 3).double()),
    ],
    ids=str,
)  # fmt: skip
def test_continuous_bias_is_the_formula(domain: Domain) -> None:
    bias = redrawn(ContinuousBias(3, hidden=16)).double()
    places = domain.coordinates.double()
    assert_close(scores(bias, domain), network(bias, places[:, None] - places[None, :]))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("window", [(4, 4), (3, 6)])
def test_continuous_bias_is_that_of_swin_v2(window: tuple[int, int]) -> None:
    with InDefaultPrecision():
        theirs = redrawn(RelPosMlp(window, num_heads=3, hidden_dim=32, mode="swin")).eval()
    ours = ContinuousBias(3, hidden=32, axes=2, scale=tuple(8 / (n - 1) for n in window))
    with torch.no_grad():
        ours.inner.weight.copy_(theirs.mlp.fc1.weight / 3)  # log base 8
        ours.inner.bias.copy_(theirs.mlp.fc1.bias)
        ours.outer.weight.copy_(theirs.mlp.fc2.weight)
    assert_close(scores(ours, Grid(*window)), theirs.get_bias()[0])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("window", [(4, 4), (3, 6)])
def test_a_bias_without_a_bound_is_that_of_timm(window: tuple[int, int]) -> None:
    with InDefaultPrecision():
        theirs = redrawn(RelPosMlp(window, num_heads=3, hidden_dim=32, prefix_tokens=1, mode="cr")).eval()
    ours = ContinuousBias(3, hidden=32, axes=2, bound=None)
    with torch.no_grad():
        ours.inner.weight.copy_(theirs.mlp.fc1.weight * math.log(2))  # natural logarithm
        ours.inner.bias.copy_(theirs.mlp.fc1.bias)
        ours.outer.weight.copy_(theirs.mlp.fc2.weight)
        ours.outer.bias.copy_(theirs.mlp.fc2.bias)
    assert_close(scores(ours, Grid(*window, prefix=1)), theirs.get_bias()[0])


def test_the_size_of_windows_changes_no_score_within_them() -> None:
    whole, windows = (
        ContinuousBias(2, hidden=8, axes=2).double(),
        ContinuousBias(2, hidden=8, axes=2, size=(3, 4)).double(),
    )
    redrawn(whole)
    windows.load_state_dict(whole.state_dict())
    domain, i = Grid(5, 7), torch.arange(35)
    a, b = (bias.pair(domain).at(i[:, None], i[None, :]) for bias in (whole, windows))
    down, along = ((i[:, None] // 7 - i[None, :] // 7), (i[:, None] % 7 - i[None, :] % 7))
    near = (down.abs() < 3) & (along.abs() < 4)
    assert_close(a[:, near], b[:, near])
    rim = b[:, 0, 14 + 3]  # the offset (-2, -3)
    assert_close(b[:, 0, 34], rim)
    assert float((a[:, 0, 34] - rim).detach().abs().max()) > 1e-3
    with pytest.raises(ValueError, match="one number for each axis"):
        windows.pair(Sequence(3))


def test_one_network_serves_domains_of_all_dimensions() -> None:
    bias = redrawn(ContinuousBias(2, hidden=8))
    line = scores(bias, Sequence(5))
    assert_close(scores(bias, Grid(5, 1)), line)  # an axis of one step has no offsets
    assert_close(scores(bias, Grid(5, 1, 1)), line)
    assert_close(scores(bias, Points(torch.arange(5.0)[:, None])), line)


def test_many_pairs_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = Points(torch.randn(7, 2))
    bias = redrawn(ContinuousBias(2, hidden=8)).double()
    results = []
    for block in (1000, 10):
        monkeypatch.setattr("xformerlib.positions._bias.BLOCK_PAIRS", block)
        result = scores(bias, domain)
        results.append((result, *torch.autograd.grad(result.square().sum(), list(bias.parameters()))))
        with torch.no_grad():
            assert_close(scores(bias, domain), result)
    assert_close(*results)


# -- decay -------------------------------------------------------------------------------------------------------------


def published_slopes(heads: int) -> list[float]:
    """The rule of the ALiBi paper's code."""
    closest = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / closest) for h in range(closest)]
    return slopes if closest == heads else slopes + published_slopes(2 * closest)[0::2][: heads - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 20])
@pytest.mark.parametrize("learned", [False, True])
def test_slopes_are_those_of_alibi(heads: int, learned: bool) -> None:
    bias = DistanceDecay(heads, learned=learned).double()
    bias.reset_parameters()
    expected = -torch.tensor(published_slopes(heads), dtype=torch.float64)
    assert_close(bias.pair(Sequence(4), dtype=torch.float64).at(torch.tensor(3), torch.tensor(1)), 2 * expected)


PLACES = torch.arange(12.0, dtype=torch.float64).reshape(4, 3) ** 1.5


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("domain", "places"),
    [
        (Sequence(6, start=2), torch.arange(6.0)[:, None]),
        (Timeline(torch.tensor([0.0, 0.5, 0.25, 9.0])), torch.tensor([[0.0], [0.5], [0.25], [9.0]])),
        (Grid(3, 4), Grid(3, 4).coordinates),
        (Grid(2, 3, 2), Grid(2, 3, 2).coordinates),
        (Points(PLACES), PLACES),
    ],
    ids=["Sequence", "Timeline", "Grid 2-D", "Grid 3-D", "Points"],
)
def test_scores_fall_with_euclidean_distance(domain: Domain, places: Tensor) -> None:
    distance = torch.cdist(places.double(), places.double(), compute_mode="donot_use_mm_for_euclid_dist")
    slopes = torch.tensor(published_slopes(3), dtype=torch.float64)
    assert_close(scores(DistanceDecay(3, learned=True), domain), -slopes[:, None, None] * distance)
    fixed = DistanceDecay(3, scale=2.0).pair(domain, dtype=torch.float64)
    i = torch.arange(domain.num_tokens)
    assert_close(fixed.at(i[:, None], i[None]), -2 * slopes[:, None, None] * distance)


def test_half_precision_models_keep_their_slopes() -> None:
    bias = DistanceDecay(12).to(torch.bfloat16)
    result = bias.pair(Sequence(2), dtype=torch.float64).at(torch.tensor(1), torch.tensor(0))
    assert_close(result, -torch.tensor(published_slopes(12), dtype=torch.float64))


@given(start=st.integers(0, 1000), length=st.integers(0, 6))
def test_shifting_a_sequence_changes_no_bias(start: int, length: int) -> None:
    for bias in (
        redrawn(RelativeBias(2)),
        redrawn(RelativeBias(2, size=3)),
        redrawn(ContinuousBias(2, hidden=4)),
        DistanceDecay(2),
    ):
        assert torch.equal(scores(bias, Sequence(length, start=start)), scores(bias, Sequence(length)))


def test_one_row_of_scores_is_as_cheap_as_its_keys() -> None:
    domain = Sequence(1_000_000)
    pair = DistanceDecay(2).pair(domain)
    assert pair.at(torch.tensor([999_999]), torch.tensor([0])).shape == (2, 1)
    assert RelativeBias(2).pair(Sequence(1, start=50_000), Sequence(50_001)).at(
        torch.tensor([0]), torch.arange(50_001)
    ).shape == (2, 50_001)
