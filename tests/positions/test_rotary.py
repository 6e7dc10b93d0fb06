"""Rotary positions: what they promise, and the layouts and frequencies of published models."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given, strategies as st
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    apply_rot_embed_cat,
)
from torch import Tensor

from tests.closeness import InDefaultPrecision, assert_close
from xformerlib import Domain, Grid, Points, Sequence, Timeline
from xformerlib.positions import NTK, Interpolation, Rotary, Scaling, YaRN

from .cases import redrawn

SCALINGS: list[Scaling | None] = [None, Interpolation(4.0), NTK(4.0), YaRN(4.0, original_length=64.0)]


def scores(rotary: Rotary, q: Tensor, k: Tensor, domain: Domain, keys: Domain | None = None) -> Tensor:
    """Products of rotated queries and keys, head h of q with head h // group of k."""
    q, k = rotary.rotate(q, k, domain, keys)
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-2, -1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


options = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(["half", "interleaved"]),
        "fraction": st.sampled_from([1.0, 0.75, 0.5]),
        "theta": st.sampled_from([10.0, 10_000.0]),
        "scaling": st.sampled_from(SCALINGS),
    }
)


@given(head_dim=st.sampled_from([8, 10, 16]), start=st.integers(0, 10_000), options=options)
def test_scores_on_a_sequence_depend_on_offsets_only(head_dim: int, start: int, options: dict) -> None:
    rotary = Rotary(head_dim, **options)
    q, k = draw(1, 2, 5, head_dim), draw(1, 2, 5, head_dim)
    here, there = scores(rotary, q, k, Sequence(5)), scores(rotary, q, k, Sequence(5, start=start))
    assert_close(here, there, condition=start + 5)  # the largest angle: as many digits fewer has its sine
    assert not torch.allclose(here, q @ k.transpose(-2, -1))


@given(ndim=st.integers(1, 5), head_dim=st.integers(5, 12).map(lambda n: 2 * n), options=options, mixed=st.booleans())
def test_scores_of_points_depend_on_differences_only(ndim: int, head_dim: int, options: dict, mixed: bool) -> None:
    if mixed:
        ndim, options = min(ndim, 3), options | {"scaling": None}
    if ndim > int(head_dim * options["fraction"] / 2):
        return
    rotary = redrawn(Rotary(head_dim, mixed=mixed, **options))
    places, q, k = 5 * draw(4, ndim), draw(1, 2, 4, head_dim), draw(1, 2, 4, head_dim)
    moved = places + 7 * draw(ndim)
    here, there = scores(rotary, q, k, Points(places)), scores(rotary, q, k, Points(moved))
    assert_close(here, there, condition=max(1.0, float(moved.norm(dim=-1).max())))  # about the largest angle


@given(shift=st.floats(-1e5, 1e5))
def test_scores_on_a_timeline_depend_on_gaps_only(shift: float) -> None:
    times, q, k = 30 * draw(2, 6), draw(2, 1, 6, 8), draw(2, 1, 6, 8)
    rotary = Rotary(8, scale=0.2)
    here, there = scores(rotary, q, k, Timeline(times)), scores(rotary, q, k, Timeline(times + shift))
    assert_close(
        here, there, condition=100 + abs(shift)
    )  # the largest time: as many digits fewer have differences of times


@given(options=options)
def test_lengths_are_kept_up_to_the_temperature(options: dict) -> None:
    rotary, x = Rotary(12, **options), draw(2, 3, 6, 12)
    length = x.norm(dim=-1) * (1.0 if options["scaling"] is None else options["scaling"].temperature)
    assert_close(rotary.rotate_one(x, Grid(2, 3)).norm(dim=-1), length)


def test_interleaved_pairs_are_multiplied_by_a_complex_number() -> None:
    x = draw(1, 1, 4, 6)
    result, expected = Rotary(6, layout="interleaved", theta=100.0).rotate_one(x, Sequence(4, start=2)), x.clone()
    for t in range(4):
        for i in range(3):
            z = complex(x[0, 0, t, 2 * i], x[0, 0, t, 2 * i + 1]) * cmath.exp(1j * (t + 2) * 100.0 ** (-2 * i / 6))
            expected[0, 0, t, 2 * i], expected[0, 0, t, 2 * i + 1] = z.real, z.imag
    assert_close(result, expected)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_two_layouts_differ_in_the_order_of_channels(fraction: float) -> None:
    x, width = draw(1, 2, 5, 8), int(8 * fraction)
    order = torch.cat([torch.arange(width).view(2, -1).T.flatten(), torch.arange(width, 8)])
    half = Rotary(8, fraction=fraction).rotate_one(x, Sequence(5))
    interleaved = Rotary(8, fraction=fraction, layout="interleaved").rotate_one(x[..., order], Sequence(5))
    assert_close(interleaved, half[..., order])
    assert_close(half[..., width:], x[..., width:])


def test_channels_left_over_by_the_axes_do_not_turn() -> None:
    x = draw(1, 1, 8, 10)  # five pairs, three axes: two pairs are left
    turned = Rotary(10, layout="interleaved").rotate_one(x, Grid(2, 2, 2))
    assert_close(turned[..., 6:], x[..., 6:])
    assert (turned[0, 0, -1, :6] != x[0, 0, -1, :6]).all()


def test_prefix_tokens_do_not_turn() -> None:
    x = draw(2, 1, 14, 8)
    domain = Grid(3, 4, prefix=2)
    for rotary in (Rotary(8), Rotary(8, coordinates="normalized"), redrawn(Rotary(8, mixed=True))):
        assert_close(rotary.rotate_one(x, domain)[:, :, :2], x[:, :, :2])
        assert_close(rotary.rotate_one(x, domain)[:, :, 2:], rotary.rotate_one(x[:, :, 2:], Grid(3, 4)))


def test_tokens_may_be_turned_piece_by_piece() -> None:
    rotary, x = Rotary(8), draw(1, 2, 9, 8)
    pieces = [
        rotary.rotate_one(x[:, :, first:last], Sequence(last - first, start=first))
        for first, last in [(0, 4), (4, 5), (5, 9)]
    ]
    assert_close(torch.cat(pieces, 2), rotary.rotate_one(x, Sequence(9)))


def test_padding_and_packing_change_nothing() -> None:
    rotary, x = Rotary(8), draw(2, 1, 5, 8)
    padded = rotary.rotate_one(x, Sequence.padded([5, 3]))
    assert_close(padded, rotary.rotate_one(x, Sequence(5)))
    packed = rotary.rotate_one(torch.cat([x[:1], x[1:, :, :3]], 2), Sequence.packed([5, 3]))
    assert_close(packed[:, :, 5:], padded[1:, :, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_right_far_out(dtype: torch.dtype) -> None:
    position, dim = 1_000_003, 8
    x = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=dtype).expand(1, 1, 1, 8)
    result = Rotary(dim).rotate_one(x, Sequence(1, start=position))[0, 0, 0]
    angles = [position * 10_000 ** (-2 * i / dim) for i in range(dim // 2)]
    expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    assert_close(result, expected)


# -- scaling -----------------------------------------------------------------------------------------------------------


def test_interpolation_divides_positions() -> None:
    x = draw(1, 1, 4, 8)
    stretched = Rotary(8, scaling=Interpolation(3.0)).rotate_one(x, Points(3 * torch.arange(4.0).double()[:, None]))
    assert_close(stretched, Rotary(8).rotate_one(x, Sequence(4)))


@given(factor=st.floats(1.0, 64.0), bands=st.integers(2, 64), theta=st.sampled_from([100.0, 10_000.0, 500_000.0]))
def test_ntk_keeps_the_fastest_band_and_stretches_the_slowest(factor: float, bands: int, theta: float) -> None:
    dim = 2 * bands
    base = theta * factor ** (dim / (dim - 2))
    expected = torch.tensor([base ** (-2 * i / dim) for i in range(bands)], dtype=torch.float64)
    result = NTK(factor).frequencies(theta, bands)
    assert_close(result.log(), expected.log())
    last = torch.tensor([theta ** (-2 * (bands - 1) / dim) / factor], dtype=torch.float64)
    assert_close(result[-1:].log(), last.log())


def published_yarn(theta: float, dim: int, factor: float, length: float, fast: float, slow: float) -> Tensor:
    """The inverse frequencies of the code that the authors published, step by step."""

    def dim_of(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dim_of(fast)), 0), min(math.ceil(dim_of(slow)), dim - 1)
    high = high + 0.001 if low == high else high
    result = []
    for i in range(dim // 2):
        keep = 1 - min(max((i - low) / (high - low), 0), 1)
        plain = 1 / theta ** (2 * i / dim)
        result.append(plain / factor * (1 - keep) + plain * keep)
    return torch.tensor(result, dtype=torch.float64)


@given(
    dim=st.sampled_from([16, 64, 128]), factor=st.sampled_from([1.0, 4.0, 40.0]), length=st.sampled_from([512, 4096, 32768]),
    theta=st.sampled_from([10_000.0, 1_000_000.0]), fast=st.sampled_from([32.0, 8.0]),
)  # fmt: skip
def test_yarn_is_the_published_code(dim: int, factor: float, length: int, theta: float, fast: float) -> None:
    scaling = YaRN(factor, original_length=length, beta_fast=fast)
    expected = published_yarn(theta, dim, factor, length, fast, 1.0)
    assert_close(scaling.frequencies(theta, dim // 2).log(), expected.log())


def test_yarn_makes_attention_sharper_everywhere() -> None:
    rotary, scaling = Rotary(8, scaling=YaRN(16.0, original_length=32)), YaRN(16.0, original_length=32)
    q, k, domain = draw(1, 1, 4, 8), draw(1, 1, 4, 8), Sequence(3, prefix=1)
    result = scores(rotary, q, k, domain)
    factor = (0.1 * math.log(16.0) + 1) ** 2
    assert scaling.temperature**2 == pytest.approx(factor)
    assert_close(result[..., 0, 0], factor * (q[..., 0, :] * k[..., 0, :]).sum(-1))
    assert_close(result.diagonal(dim1=-2, dim2=-1), factor * (q * k).sum(-1))


# -- grids -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("size", [(4, 4), (3, 7)])
def test_index_coordinates_are_eva02_at_the_size_of_training(size: tuple[int, int]) -> None:
    with InDefaultPrecision():
        theirs = RotaryEmbeddingCat(16, in_pixels=False, feat_shape=None, ref_feat_shape=None).get_embed(list(size))
    x = torch.randn(2, 3, math.prod(size), 16)
    assert_close(Rotary(16, layout="interleaved").rotate_one(x, Grid(*size)), apply_rot_embed_cat(x, theirs))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("size", "reference"), [((4, 4), 16), ((3, 7), 16), ((3, 7), (8, 5))])
def test_resized_coordinates_are_eva02(size: tuple[int, int], reference: int | tuple[int, int]) -> None:
    shape = [reference, reference] if isinstance(reference, int) else list(reference)
    with InDefaultPrecision():
        theirs = RotaryEmbeddingCat(16, in_pixels=False, ref_feat_shape=shape).get_embed(list(size))
    x = torch.randn(2, 3, 1 + math.prod(size), 16)
    ours = Rotary(16, layout="interleaved", coordinates="resized", reference=reference).rotate_one(
        x, Grid(*size, prefix=1)
    )
    assert_close(ours[:, :, 1:], apply_rot_embed_cat(x[:, :, 1:], theirs))
    assert_close(ours[:, :, :1], x[:, :, :1])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("reference", [None, (6, 5)])
def test_offset_is_that_of_perception_encoders(reference: tuple[int, int] | None) -> None:
    with InDefaultPrecision():
        theirs = RotaryEmbeddingCat(16, in_pixels=False, ref_feat_shape=reference, grid_offset=1.0).get_embed([3, 4])
    x = torch.randn(2, 3, 2 + 12, 16)
    how = {"coordinates": "index"} if reference is None else {"coordinates": "resized", "reference": reference}
    ours = Rotary(16, layout="interleaved", offset=1.0, **how).rotate_one(x, Grid(3, 4, prefix=2))
    assert_close(ours[:, :, 2:], apply_rot_embed_cat(x[:, :, 2:], theirs))
    assert_close(ours[:, :, :2], x[:, :, :2])


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("size", [(4, 4), (3, 7)])
def test_normalized_coordinates_are_dinov3(size: tuple[int, int]) -> None:
    with InDefaultPrecision():
        theirs = RotaryEmbeddingDinoV3(16, temperature=100.0).get_embed(list(size))
    x = torch.randn(2, 3, math.prod(size), 16)
    ours = Rotary(16, theta=100.0, coordinates="normalized").rotate_one(x, Grid(*size))
    assert_close(ours, apply_rot_embed_cat(x, theirs, half=True))


@pytest.mark.parametrize("coordinates", ["resized", "normalized"])
def test_packed_grids_each_have_their_own_size(coordinates: str) -> None:
    rotary, sizes = Rotary(8, coordinates=coordinates), [(2, 3), (4, 1), (3, 3)]
    domain = Grid.packed(sizes, prefix=1)
    x = draw(1, 2, domain.num_tokens, 8)
    bounds = domain.offsets.tolist()
    alone = [
        rotary.rotate_one(x[:, :, a:b], Grid(*s, prefix=1)) for s, a, b in zip(sizes, bounds, bounds[1:], strict=False)
    ]
    assert_close(rotary.rotate_one(x, domain), torch.cat(alone, 2))


# -- mixed frequencies -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("precision")
def test_mixed_is_rope_mixed() -> None:
    with InDefaultPrecision():
        theirs = RotaryEmbeddingMixed(3 * 8, depth=1, num_heads=3, grid_indexing="ij")
    ours = Rotary(8, mixed=True, heads=3, layout="interleaved")
    with torch.no_grad():
        torch.nn.init.normal_(theirs.freqs)
        ours.frequencies[:, :2].copy_(theirs.freqs[:, 0].transpose(0, 1))
    x = torch.randn(2, 3, 15, 8)
    with InDefaultPrecision():
        angles = theirs.get_embed([3, 5])[0]
    assert_close(ours.rotate_one(x, Grid(3, 5)), apply_rot_embed_cat(x, angles))


@pytest.mark.usefixtures("double")
def test_mixed_frequencies_start_as_in_the_paper() -> None:
    rotary = Rotary(16, mixed=True, heads=64, theta=10.0)
    f = rotary.frequencies.detach()
    lengths = torch.tensor([10.0 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    assert_close(f[:, :2].norm(dim=1), lengths.repeat(2).expand(64, 8))
    first, second = f[:, :2, :4], f[:, :2, 4:]
    assert_close((first * second).sum(1), torch.zeros(64, 4), scale=1.0)
    angles = torch.atan2(f[:, 1, 0], f[:, 0, 0])
    assert angles.std() > 1  # all around the circle, each head its own
    assert not torch.equal(Rotary(16, mixed=True).frequencies, Rotary(16, mixed=True).frequencies)


@pytest.mark.parametrize(("heads", "kv_heads", "sets"), [(4, 4, 4), (4, 2, 2), (6, 2, 1), (8, 4, 2)])
def test_a_query_and_its_key_share_mixed_frequencies(heads: int, kv_heads: int, sets: int) -> None:
    rotary = redrawn(Rotary(8, mixed=True, heads=sets))
    places = draw(5, 2)
    q, k = draw(1, heads, 5, 8), draw(1, kv_heads, 5, 8)
    assert_close(scores(rotary, q, k, Points(places)), scores(rotary, q, k, Points(places + 3.0)))
    if sets > 1:
        same = draw(1, 1, 5, 8)
        alike = scores(rotary, same.expand(1, heads, 5, 8), same.expand(1, kv_heads, 5, 8), Points(places))
        assert not torch.allclose(alike[:, 0], alike[:, -1])


def test_rotations_can_be_compared_across_domains_of_a_kind() -> None:
    rotary, q, k = Rotary(8), draw(1, 2, 3, 8), draw(1, 2, 9, 8)
    part = scores(rotary, q, k, Sequence(3, start=6), Sequence(9))
    padded = torch.cat([draw(1, 2, 6, 8), q], 2)
    assert_close(part, scores(rotary, padded, k, Sequence(9))[:, :, 6:])


def test_angles_are_kept_on_the_domain_and_shared_by_equal_settings() -> None:
    domain, x = Grid(4, 4), draw(1, 1, 16, 8)
    settings = [
        {},
        {"theta": 50.0},
        {"fraction": 0.5},
        {"scale": 2.0},
        {"offset": 1.0},
        {"coordinates": "resized"},
        {"coordinates": "resized", "reference": 8},
        {"coordinates": "normalized"},
        *({"scaling": scaling} for scaling in SCALINGS[1:]),
    ]
    results = [Rotary(8, **setting).rotate_one(x, domain) for setting in settings]
    kept = len(domain._facts)
    for setting, result in zip(settings, results, strict=True):
        assert torch.equal(result, Rotary(8, **setting).rotate_one(x, Grid(4, 4)))
        Rotary(8, layout="interleaved", **setting).rotate_one(x, domain)
    assert len(domain._facts) == kept


def test_repr_says_what_is_not_usual() -> None:
    assert repr(Rotary(8)) == "Rotary(8, theta=10000, layout='half')"
    assert "scaling=NTK(factor=2.0)" in repr(Rotary(8, scaling=NTK(2.0)))
    assert "channels=4" in repr(Rotary(8, fraction=0.5))
    assert "offset=-2" in repr(Rotary(8, offset=-2))
