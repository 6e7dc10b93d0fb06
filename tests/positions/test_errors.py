"""Bad input is refused at once, and the message says what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from xformerlib import Domain, Graph, Grid, Points, Sequence, Timeline
from xformerlib.positions import (
    NTK,
    ContinuousBias,
    DistanceDecay,
    Interpolation,
    Learned,
    Position,
    RandomWalk,
    RelativeBias,
    Rotary,
    Sinusoidal,
    YaRN,
)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Sinusoidal(1), "dim must be >= 2; got dim=1"),
        (lambda: Sinusoidal(8, theta=0.0), "theta must be a finite number > 0"),
        (lambda: Sinusoidal(8, scale=float("nan")), "scale must be a finite number > 0"),
        (lambda: Sinusoidal(8, eigenvectors=0), "eigenvectors must be >= 1"),
        (lambda: Learned(0, 4), "dim must be >= 1"),
        (lambda: Learned(4, 0), "size must be >= 1"),
        (lambda: Learned(4, (3, 0)), "size must be >= 1"),
        (lambda: Learned(4, ()), "one to three"),
        (lambda: Learned(4, 4, prefix=-1), "prefix must be >= 0; got prefix=-1"),
        (lambda: Learned(4, (3, 3), directed=True), "directed=True is for the degrees of a Graph"),
        (lambda: RandomWalk(4, 0), "steps must be >= 1"),
        (lambda: Rotary(7), "head_dim must be even"),
        (lambda: Rotary(0), "head_dim must be >= 2"),
        (lambda: Rotary(8, theta=1.0), "theta must be > 1"),
        (lambda: Rotary(8, fraction=0.1), "fraction must be in"),
        (lambda: Rotary(8, fraction=1.5), "fraction must be in"),
        (lambda: Rotary(8, layout="both"), "layout must be 'half' or 'interleaved'; got layout='both'"),
        (lambda: Rotary(8, coordinates="pixels"), "coordinates must be one of"),
        (lambda: Rotary(8, reference=16), "reference is used by coordinates='resized' only"),
        (lambda: Rotary(8, coordinates="resized", reference=0), "reference must be one size >= 1"),
        (lambda: Rotary(8, heads=4), "needs mixed=True"),
        (lambda: Rotary(8, offset=float("inf")), "offset must be a finite number; got offset=inf"),
        (lambda: ContinuousBias(2, bound=0.0), "bound must be a finite number > 0"),
        (lambda: Rotary(8, mixed=True, scaling=NTK(2.0)), "leave out one of the two"),
        (lambda: Interpolation(0.5), "factor must be a finite number >= 1"),
        (lambda: YaRN(4.0, original_length=0), "original_length must be > 0"),
        (lambda: YaRN(4.0, original_length=64, beta_fast=1.0), "beta_fast must be > beta_slow"),
        (lambda: RelativeBias(0), "heads must be >= 1"),
        (lambda: RelativeBias(2, size=(3, 3), buckets=16), "a table with size= has none"),
        (lambda: RelativeBias(2, size=(3, -1)), "size must be >= 1"),
        (lambda: RelativeBias(2, size=(1, 2, 3, 4)), "one to three"),
        (lambda: RelativeBias(2, buckets=7), "buckets must be even"),
        (lambda: RelativeBias(2, buckets=2), "buckets must be >= 4"),
        (lambda: RelativeBias(2, max_distance=16), "max_distance must be > buckets / 2 = 16; got max_distance=16"),
        (lambda: ContinuousBias(2, hidden=0), "hidden must be >= 1"),
        (lambda: ContinuousBias(2, scale=(1.0, 2.0)), "scale must be one number or one for each of the 3 axes"),
        (lambda: DistanceDecay(2, scale=-1.0), "scale must be a finite number > 0"),
        (lambda: DistanceDecay(2) + RelativeBias(3), r"same number of heads; got \[2, 3\]"),
    ],
)
def test_bad_options(make: Callable[[], Position], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sinusoidal(8.0),
        lambda: Learned(8, "many"),
        lambda: Rotary(True),
        lambda: Rotary(8, scaling=2.0),
        lambda: RelativeBias(2.0),
        lambda: Sinusoidal(8) + torch.nn.Identity(),
    ],
)
def test_bad_types(make: Callable[[], Position]) -> None:
    with pytest.raises(TypeError):
        make()


EDGES = torch.tensor([[0, 1], [1, 2]])
WHERE: dict[str, Domain] = {
    "Sequence": Sequence(3),
    "Timeline": Timeline(torch.rand(3)),
    "Grid": Grid(1, 3),
    "Points": Points(torch.rand(3, 4)),
    "Graph": Graph(EDGES, 3),
}


@pytest.mark.parametrize(
    ("position", "where", "instead"),
    [
        (Learned(8, 16), "Timeline", "Sinusoidal"),
        (Learned(8, 16), "Points", "Sinusoidal"),
        (Learned(8, 16), "Grid", "a size for each axis"),
        (Learned(8, (3, 3)), "Sequence", "give one number"),
        (Learned(8, (3, 3)), "Graph", "give one number"),
        (Learned(8, (3, 3)), "Timeline", "Sinusoidal"),
        (Learned(8, 16, directed=True), "Sequence", "use a Graph"),
        (RandomWalk(8, 4), "Sequence", "Sinusoidal"),
        (RandomWalk(8, 4), "Timeline", "Sinusoidal"),
        (RandomWalk(8, 4), "Grid", "Sinusoidal"),
        (RandomWalk(8, 4), "Points", "Sinusoidal"),
        (RelativeBias(2), "Grid", r"size=\(1, 3\)"),
        (RelativeBias(2, size=3), "Timeline", "leave it out"),
        (RelativeBias(2, size=3), "Points", "leave it out"),
        (RelativeBias(2, size=3), "Graph", "leave it out"),
    ],
)
def test_a_domain_that_a_position_is_not_defined_on(position: Position, where: str, instead: str) -> None:
    on = WHERE[where]
    with pytest.raises(ValueError, match=rf"{type(position).__name__} is not defined on a {where}; got .*{instead}"):
        position.pair(on) if position.biases else position(torch.zeros(3, 8), on)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (
            lambda: Learned(8, 16)(torch.zeros(17, 8), Sequence(17)),
            r"size=16 positions; got Sequence\(17\), which reaches position 16",
        ),
        (lambda: Learned(8, 16)(torch.zeros(1, 8), Sequence(1, start=16)), "reaches position 16. Raise size"),
        (lambda: Learned(8, 16)(torch.zeros(19, 8), Sequence.packed([2, 17])), "reaches position 16"),
        (lambda: Learned(8, 16, prefix=1)(torch.zeros(4, 8), Sequence(2, prefix=2)), "prefix=1 rows"),
        (lambda: Learned(8, (3, 3))(torch.zeros(8, 8), Grid(2, 2, 2)), "size must have one number for each axis"),
        (
            lambda: Sinusoidal(4)(torch.zeros(8, 4), Grid(2, 2, 2)),
            "dim must be at least 2 channels for each of the 3 axes",
        ),
        (lambda: Sinusoidal(4)(torch.zeros(8, 6), Sequence(8)), r"x of shape \(..., 8, 4\).* got \(8, 6\)"),
        (lambda: Sinusoidal(4)(torch.zeros(3, 8, 4), Sequence.padded([8, 2])), "x must have the 2 rows"),
        (
            lambda: Rotary(4).rotate_one(torch.zeros(1, 1, 8, 4), Grid(2, 2, 2)),
            "2 pairs of channels to turn, fewer than the 3 axes",
        ),
        (
            lambda: Rotary(8, mixed=True).rotate_one(torch.zeros(1, 1, 3, 8), WHERE["Points"]),
            "mixed frequencies for 3 axes",
        ),
        (lambda: Rotary(8).rotate_one(torch.zeros(1, 1, 3, 6), Sequence(3)), r"\(..., 3, 8\)"),
        (
            lambda: Rotary(8, mixed=True, heads=4).rotate_one(torch.zeros(1, 2, 3, 8), Sequence(3)),
            "give heads=kv_heads",
        ),
        (
            lambda: Rotary(8, coordinates="normalized").rotate_one(torch.zeros(1, 1, 3, 8), Sequence(3)),
            "need the size of a Grid",
        ),
        (
            lambda: Rotary(8, coordinates="resized", reference=(4, 4, 4)).rotate_one(
                torch.zeros(1, 1, 3, 8), Grid(1, 3)
            ),
            "reference must be one size or one for each axis",
        ),
        (lambda: Rotary(8).rotate(*torch.zeros(2, 1, 1, 3, 8), Sequence(3), WHERE["Timeline"]), "same kind of domain"),
        (lambda: RelativeBias(2, size=(3, 3)).pair(Sequence(3)), "size must have one number for each axis"),
        (lambda: ContinuousBias(2).pair(WHERE["Points"]), "needs 4. Raise axes"),
        (lambda: DistanceDecay(2).pair(Sequence(3), Grid(3)), "same kind of domain"),
        (lambda: DistanceDecay(2).pair(Sequence.packed([1, 2]), Sequence.packed([1, 1, 1])), "same number of items"),
        (lambda: (Sinusoidal(8) + Rotary(8)).pair(Sequence(3)), "no bias"),
    ],
)
def test_tokens_and_domains_that_do_not_fit(act: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        act()


def test_integer_tokens() -> None:
    with pytest.raises(TypeError, match=r"floating dtype; got torch\.int64"):
        Sinusoidal(4)(torch.zeros(3, 4, dtype=torch.long), Sequence(3))
