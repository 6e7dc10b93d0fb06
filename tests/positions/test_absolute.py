"""Sinusoids and learned tables, against the formulas of the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor

from tests.closeness import InDefaultPrecision, assert_close
from xformerlib import Grid, Points, Sequence, Timeline
from xformerlib.positions import Learned, Sinusoidal

from .cases import redrawn


def added(embedding: torch.nn.Module, domain: object, dim: int, rows: int | None = None) -> Tensor:
    shape = (domain.num_tokens, dim) if rows is None else (rows, domain.num_tokens, dim)
    return embedding(torch.zeros(shape, dtype=torch.float64), domain)


def vaswani(position: float, dim: int, theta: float) -> list[float]:
    row = []
    for channel in range(dim):
        angle = position / theta ** (2 * (channel // 2) / dim)
        row.append(math.cos(angle) if channel % 2 else math.sin(angle))
    return row


@given(
    length=st.integers(0, 12),
    start=st.sampled_from([0, 1, 500, 1_000_000]),
    dim=st.integers(2, 17),
    theta=st.sampled_from([10.0, 10_000.0]),
)
def test_sequence_is_the_formula_of_vaswani(length: int, start: int, dim: int, theta: float) -> None:
    expected = torch.tensor([vaswani(start + t, dim, theta) for t in range(length)], dtype=torch.float64).reshape(
        length, dim
    )
    result = added(Sinusoidal(dim, theta=theta), Sequence(length, start=start), dim)
    assert_close(
        result, expected, condition=max(start + length, 1)
    )  # the largest angle: as many digits fewer has its sine


@given(times=st.lists(st.floats(-1e4, 1e4), max_size=6), scale=st.sampled_from([1.0, 0.25]))
def test_timeline_is_the_formula_of_vaswani_at_real_times(times: list[float], scale: float) -> None:
    domain = Timeline(torch.tensor(times, dtype=torch.float64))
    expected = torch.tensor([vaswani(scale * t, 8, 100.0) for t in times], dtype=torch.float64).reshape(-1, 8)
    angle = max([1.0, *map(abs, times)])  # as many digits as it has fewer has its sine
    assert_close(added(Sinusoidal(8, theta=100.0, scale=scale), domain, 8), expected, condition=angle)


def test_a_timeline_of_whole_times_is_a_sequence() -> None:
    times = Timeline(torch.arange(5.0))
    assert_close(added(Sinusoidal(6), times, 6), added(Sinusoidal(6), Sequence(5), 6))


def mae(dim: int, height: int, width: int) -> np.ndarray:
    """What MAE's ``get_2d_sincos_pos_embed`` computes: the column in the first half, the row in the second."""

    def one_axis(where: np.ndarray) -> np.ndarray:
        angles = np.outer(where.reshape(-1), 1 / 10_000 ** (np.arange(dim // 4) / (dim / 4)))
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)

    columns, rows = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    return np.concatenate([one_axis(columns), one_axis(rows)], 1)


@given(height=st.integers(1, 6), width=st.integers(1, 6), quarter=st.integers(1, 6), prefix=st.integers(0, 2))
def test_grid_is_mae(height: int, width: int, quarter: int, prefix: int) -> None:
    dim = 4 * quarter
    result = added(Sinusoidal(dim), Grid(height, width, prefix=prefix), dim)
    assert (result[:prefix] == 0).all()
    assert_close(result[prefix:], torch.from_numpy(mae(dim, height, width)))


@pytest.mark.usefixtures("double")
def test_grid_has_the_features_of_timm_in_another_order() -> None:
    ours = added(Sinusoidal(16), Grid(3, 5), 16).unflatten(-1, (2, 2, 4))  # axis (column first), sine or cosine, band
    with InDefaultPrecision():
        theirs = build_sincos2d_pos_embed([3, 5], 16).unflatten(-1, (2, 2, 4))  # sine or cosine, axis (row first), band
    assert_close(ours.flip(-3), theirs.transpose(-3, -2))


@pytest.mark.parametrize(("sizes", "dim"), [((4,), 6), ((2, 3), 9), ((2, 3, 2), 15)])
def test_leftover_channels_of_a_grid_are_zero(sizes: tuple[int, ...], dim: int) -> None:
    result = added(Sinusoidal(dim), Grid(*sizes), dim)
    used = dim // (2 * len(sizes)) * 2 * len(sizes)
    assert (result[:, used:] == 0).all()
    assert (result[:, :used] != 0).any(0).all()


def test_each_packed_grid_is_as_it_is_alone() -> None:
    packed = added(Sinusoidal(8), Grid.packed([(2, 3), (4, 1)], prefix=1), 8)
    alone = [added(Sinusoidal(8), Grid(*size, prefix=1), 8) for size in [(2, 3), (4, 1)]]
    assert_close(packed, torch.cat(alone))


def test_points_on_a_grid_have_its_features_axis_by_axis() -> None:
    grid = Grid(3, 4)
    points = added(Sinusoidal(8), Points(grid.coordinates.double()), 8)
    assert_close(points, added(Sinusoidal(8), grid, 8).unflatten(-1, (2, 4)).flip(-2).flatten(-2))


def test_tables_are_kept_on_the_domain_for_equal_settings_only() -> None:
    domain = Grid(3, 3)
    settings = [{}, {"theta": 10.0}, {"scale": 2.0}]
    results = [added(Sinusoidal(8, **setting), domain, 8) for setting in settings]
    kept = len(domain._facts)
    for setting, result in zip(settings, results, strict=True):
        assert torch.equal(result, added(Sinusoidal(8, **setting), Grid(3, 3), 8))
        added(Sinusoidal(8, **setting), domain, 8)
    assert len(domain._facts) == kept
    assert not torch.equal(results[0], results[1])


# -- learned -----------------------------------------------------------------------------------------------------------


@given(start=st.integers(0, 4), length=st.integers(0, 5), prefix=st.integers(0, 2))
def test_sequence_takes_the_rows_of_its_positions(start: int, length: int, prefix: int) -> None:
    embedding = redrawn(Learned(4, 9, prefix=prefix)).double()
    result = added(embedding, Sequence(length, start=start, prefix=prefix), 4)
    rows = embedding.table[start : start + length]
    expected = rows if embedding.prefix_table is None else torch.cat([embedding.prefix_table, rows])
    assert_close(result, expected)


def test_packed_sequences_each_begin_anew() -> None:
    embedding = redrawn(Learned(4, 4, prefix=1)).double()
    result = added(embedding, Sequence.packed([2, 0, 4], prefix=1), 4)
    t, p = embedding.table, embedding.prefix_table
    assert_close(result, torch.cat([p, t[:2], p, p, t[:4]]))


def test_padding_may_reach_beyond_the_table() -> None:
    embedding = redrawn(Learned(4, 3)).double()
    result = added(embedding, Sequence.padded([3, 2], 6), 4, rows=2)
    assert_close(result[:, :3], embedding.table.expand(2, 3, 4))


def test_a_grid_of_the_tables_size_takes_it_as_it_is() -> None:
    embedding = redrawn(Learned(4, (2, 3)))
    assert torch.equal(added(embedding.double(), Grid(2, 3), 4), embedding.table)


# Not to one column: there torch's own resampling, which timm uses, is wrong on the CPU (2.15).
@pytest.mark.usefixtures("double")
@given(old=st.tuples(st.integers(1, 6), st.integers(1, 6)), new=st.tuples(st.integers(1, 9), st.integers(2, 9)))
def test_another_size_is_resampled_as_timm_does(old: tuple[int, int], new: tuple[int, int]) -> None:
    embedding = redrawn(Learned(5, old, prefix=1))
    result = embedding(torch.zeros(1 + new[0] * new[1], 5), Grid(*new, prefix=1))
    posemb = torch.cat([embedding.prefix_table, embedding.table])[None]
    with InDefaultPrecision():
        expected = resample_abs_pos_embed(posemb, list(new), list(old), num_prefix_tokens=1)[0]
    assert_close(result, expected)


def test_a_table_of_the_same_number_of_rows_but_another_shape_is_resampled() -> None:
    embedding = redrawn(Learned(4, (2, 8))).double()
    assert not torch.allclose(added(embedding, Grid(4, 4), 4), embedding.table)


def test_packed_grids_are_resampled_each_to_its_own_size() -> None:
    embedding = redrawn(Learned(4, (3, 3), prefix=1)).double()
    sizes = [(2, 5), (3, 3), (2, 5), (1, 1)]
    alone = torch.cat([added(embedding, Grid(*size, prefix=1), 4) for size in sizes])
    assert_close(added(embedding, Grid.packed(sizes, prefix=1), 4), alone)


@given(old=st.integers(1, 6), new=st.integers(1, 9))
def test_an_axis_is_resampled_whatever_the_others_are(old: int, new: int) -> None:
    embedding = redrawn(Learned(3, (old, 2))).double()
    wide = added(embedding, Grid(new, 2), 3).reshape(new, 2, 3)
    for column in range(2):
        narrow = Learned(3, (old,)).double()
        with torch.no_grad():
            narrow.table.copy_(embedding.table.reshape(old, 2, 3)[:, column])
        assert_close(added(narrow, Grid(new), 3), wide[:, column])


def test_a_constant_table_stays_constant() -> None:
    embedding = Learned(2, (3, 4, 5)).double()
    torch.nn.init.ones_(embedding.table)
    assert_close(added(embedding, Grid(5, 1, 7), 2), torch.ones(35, 2, dtype=torch.float64))


def linear_in_place(*sizes: int) -> Tensor:
    """A table whose channels are the coordinates of the cells' centres, from 0 to 1."""
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


@pytest.mark.parametrize("new", [(24,), (16, 18), (12, 20, 14)])
def test_resampling_keeps_directions_apart(new: tuple[int, ...]) -> None:
    ndim = len(new)
    embedding = Learned(ndim, (8, 10, 12)[:ndim]).double()
    with torch.no_grad():
        embedding.table.copy_(linear_in_place(*embedding.size).reshape(-1, ndim))
    result = added(embedding, Grid(*new), ndim).reshape(*new, ndim)
    inner = tuple(slice(n // 4, n - n // 4) for n in new)  # the rim is bent by the border
    assert (result[inner] - linear_in_place(*new)[inner]).abs().max() < 5e-3


def test_gradients_reach_a_resampled_table() -> None:
    embedding = redrawn(Learned(2, (3, 2), prefix=1)).double()
    domain = Grid.packed([(2, 2), (4, 3)], prefix=1)

    def run(*parameters: Tensor) -> Tensor:
        names = [name for name, _ in embedding.named_parameters()]
        return torch.func.functional_call(
            embedding, dict(zip(names, parameters, strict=True)), (torch.zeros(18, 2).double(), domain)
        )

    assert torch.autograd.gradcheck(run, tuple(embedding.parameters()))


def test_tables_start_small() -> None:
    embedding = Learned(64, 512, prefix=8)
    for parameter in embedding.parameters():
        assert abs(parameter.std().item() - 0.02) < 6 * 0.02 / (2 * parameter.numel()) ** 0.5  # six standard errors
