"""Domains of coordinates: layout, facts, moving, growing, errors."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given

import xformerlib as xf
from tests.closeness import assert_close
from tests.strategies import DOMAINS, domain, randoms

S, T, G, P = xf.Sequence, xf.Timeline, xf.Grid, xf.Points


def test_sequence_layouts():
    assert S(3, start=41, prefix=1).coordinates[:, 0].tolist() == [0, 41, 42, 43]
    padded = S.padded([2, 0, 3], 4, prefix=1)
    assert padded.num_tokens == 5 and padded.batch_size == 3 and padded.offsets is None
    assert padded.valid.sum(1).tolist() == [3, 1, 4]
    packed = S.packed(torch.tensor([2, 0, 3]), prefix=1)
    assert packed.offsets.tolist() == [0, 3, 4, 8] and packed.items.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert packed.coordinates[:, 0].tolist() == [0, 0, 1, 0, 0, 0, 1, 2]


def test_timeline_layouts():
    times = torch.tensor([[0.0, 0.5, 9.0], [1.0, 2.0, float("nan")]])
    where = T(times, valid=times.isfinite(), prefix=1)
    assert where.valid.tolist() == [[True] * 4, [True, True, True, False]]
    assert where.coordinates[..., 0].tolist() == [[0, 0, 0.5, 9], [0, 1, 2, 0]]
    assert T([1, 2, 3]).coordinates.dtype == torch.float64
    assert T.packed(torch.arange(5.0), [2, 3]).items.tolist() == [0, 0, 1, 1, 1]


def test_grid_layouts():
    assert G(2, 3).coordinates.tolist() == torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist()
    volume = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4))
    assert torch.equal(G(2, 3, 4, prefix=2).coordinates[2:], volume)
    packed = G.packed([(2, 3), (1, 2)], prefix=1)
    assert torch.equal(packed.coordinates, torch.cat([G(2, 3, prefix=1).coordinates, G(1, 2, prefix=1).coordinates]))


def test_points_layouts():
    places = torch.randn(5, 3, dtype=torch.float64)
    packed = P(places, batch=torch.tensor([0, 0, 2, 2, 2]))
    assert packed.offsets.tolist() == [0, 2, 2, 5] and packed.num_items == 3
    assert torch.equal(packed.coordinates, places)
    one = torch.zeros((), dtype=torch.long)
    index = torch.arange(5)
    assert_close(P(places).distance(P(places), one, index[:, None], index), torch.cdist(places, places))


@given(rng=randoms)
def test_items_and_ranks_agree_with_offsets(rng):
    where = domain(rng)
    b, i = torch.zeros((), dtype=torch.long), torch.arange(where.num_tokens)
    bounds = [0, where.num_tokens] if where.offsets is None else where.offsets.tolist()
    assert bounds[0] == 0 and bounds[-1] == where.num_tokens and bounds == sorted(bounds)
    assert where.place(i).tolist() == [n for a, z in zip(bounds, bounds[1:], strict=False) for n in range(z - a)]
    if where.prefix:
        assert where.is_prefix(b, i).tolist() == [n < where.prefix for n in where.place(i).tolist()]


@pytest.mark.parametrize("kind", DOMAINS)
@given(rng=randoms)
def test_domains_move_and_pickle(kind, rng):
    where = DOMAINS[kind](rng)
    copy = pickle.loads(pickle.dumps(where))
    assert repr(copy) == repr(where) and torch.equal(copy.coordinates, where.coordinates)
    assert where.to("cpu") is where
    if where.device is not None:
        moved = where.to("meta")
        assert moved.device.type == "meta" and moved.num_tokens == where.num_tokens and where.to("meta") is moved
        assert moved.coordinates.shape == where.coordinates.shape


def test_domains_of_numbers_are_values_and_those_of_tensors_are_not():
    assert S(4) == S(4) and hash(S(4)) == hash(S(4)) and S(4) != S(4, start=1) and S(4) != G(4)
    assert G(2, 3) == G(2, 3) and G(2, 3) != G(3, 2) and G(2, 3) != G(2, 3, prefix=1)
    assert S.padded([1, 2]) != S.padded([1, 2]) and T([0.0]) != T([0.0])


def test_facts_are_computed_once():
    where, calls = S(3), []
    for _ in range(2):
        assert where.fact("answer", lambda: calls.append(1) or 42) == 42
    assert calls == [1]
    assert where.coordinates is where.coordinates


def test_growing():
    assert S(3, start=2, prefix=1).extended(S(2, start=5)) == S(5, start=2, prefix=1)
    assert S(5, start=2).last(2) == S(2, start=5)
    assert T([0.0, 1.5]).extended(T([4.0])).times.tolist() == [0.0, 1.5, 4.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S(-1), "length must be >= 0; got length=-1"),
        (lambda: S(2.0), "length must be an integer"),
        (lambda: S(2, start=-1), "start must be >= 0"),
        (lambda: S(True), "length must be an integer"),
        (lambda: S.padded([2, 5], 4), "lengths must be <= length; got a row of 5 tokens and length=4"),
        (lambda: S.padded([2, -1]), "lengths must be >= 0"),
        (lambda: S.packed([1.5]), "lengths must be a vector of integers"),
        (lambda: S.packed([[1, 2]]), "lengths must be a vector of integers"),
        (lambda: T([0.0, float("nan")]), "times must be finite"),
        (lambda: T(torch.zeros(1, 2, 3)), "times must be"),
        (lambda: T([0.0], valid=torch.tensor([1])), "valid must be a bool tensor"),
        (lambda: T([0.0], valid=torch.tensor([True, True])), "valid must be"),
        (lambda: T.packed(torch.zeros(3), [1, 1]), "lengths must add up"),
        (lambda: G(), "1 to 3 sizes"),
        (lambda: G(1, 1, 1, 1), "1 to 3 sizes"),
        (lambda: G(2, -1), "sizes must be >= 0"),
        (lambda: G.packed([2, 3]), "list of"),
        (lambda: G.packed([(2, -3)]), "sizes must be >= 0"),
        (lambda: P(torch.zeros(3)), "coordinates must be a tensor"),
        (lambda: P(torch.tensor([[float("inf")]])), "coordinates must be finite"),
        (lambda: P(torch.zeros(3, 2), batch=torch.tensor([0, 1, 0])), "batch must not fall"),
        (lambda: P(torch.zeros(3, 2), batch=torch.tensor([0, 1])), "batch must name the item"),
        (lambda: P(torch.zeros(3, 2), batch=torch.tensor([0.0, 0, 1])), "batch must be a vector of integers"),
        (lambda: S(3).extended(S(1, start=5)), r"Sequence\(n, start=3\)"),
        (lambda: S.packed([1, 2]).extended(S(1)), "shared by the whole batch"),
        (lambda: T([0.0]).extended(S(1)), "Timeline of as many rows"),
    ],
)  # fmt: skip
def test_bad_domains_say_what_is_wrong(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
