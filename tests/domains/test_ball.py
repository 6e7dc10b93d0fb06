"""Tokens within a radius, against all distances."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings, strategies as st

import xformerlib as xf
from xformerlib import masks
from xformerlib.domains._ball import within_ball

randoms = st.integers(0, 2**32).map(Random)


def domain(rng: Random) -> xf.Domain:
    count, ndim = rng.randint(1, 60), rng.randint(1, 3)
    scale, dtype = rng.choice([1.0, 1e-3, 1e4]), rng.choice([torch.float32, torch.float64])
    shift = rng.choice([0.0, -0.5, 7.0])
    points = ((torch.rand(2, count, ndim) + shift) * scale).to(dtype)
    if rng.random() < 0.3:
        points = (points * 8).round() / 8  # many distances that equal the radius, and points that coincide
    items = torch.tensor(sorted(rng.randint(0, 2) for _ in range(count)))
    return rng.choice(
        [
            lambda: xf.Points(points[0]),
            lambda: xf.Points(points),
            lambda: xf.Points(points[0], batch=items),
            lambda: xf.Points(points, valid=torch.rand(2, count) < 0.7),
            lambda: xf.Timeline(points[0, :, 0]),
            lambda: xf.Timeline(points[..., 0], prefix=1),
        ]
    )()


@settings(max_examples=80)
@given(randoms)
def test_lists_hold_all_that_is_near_and_hardly_more(rng: Random) -> None:
    where = domain(rng)
    places = where.coordinates.double()
    places = places if places.ndim == 3 else places[None]
    radius = rng.choice([0.125, 0.3, 1.0]) * float(places.abs().max()) / rng.choice([1, 4])
    near = within_ball(where, radius)
    if near is None:
        return  # most are near each other
    listed = torch.zeros(*places.shape[:2], places.shape[1], dtype=torch.bool)
    listed[near.row // places.shape[1], near.row % places.shape[1], near.col] = True
    allowed = masks.Local(radius).dense(where)
    ordinary = torch.arange(places.shape[1]) >= where.prefix
    allowed = allowed.reshape(-1, *allowed.shape[-2:]) & ordinary & ordinary[:, None]
    assert not (allowed & ~listed).any()
    distance = (places[:, :, None] - places[:, None]).norm(dim=-1)
    slack = 1e-4 * radius + 1e-5 * float(places.abs().max())
    assert not (listed & (distance > radius + slack)).any()
    if where.valid is not None:
        assert not (listed & ~(where.valid[:, :, None] & where.valid[:, None])).any()


def test_crowds_are_not_listed() -> None:
    assert within_ball(xf.Points(torch.rand(100, 2)), 2.0) is None
    assert within_ball(xf.Points(torch.zeros(0, 2)), 1.0) is None


@pytest.mark.parametrize("where", [xf.Points(torch.rand(5000, 3)), xf.Timeline(torch.rand(5000) * 50)], ids=repr)
def test_balls_of_few_points_are_sparse(where: xf.Domain) -> None:
    assert xf.plan(masks.Local(0.05), where, heads=4).kernel == "sparse"
