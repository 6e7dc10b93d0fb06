"""Swin: stages of windows, shifted in turns; images of any size, alone, in a batch, in a list, with holes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import xformerlib as xf
from tests.closeness import assert_close
from tests.vision.cases import (
    assert_a_padded_rim_does_not_count,
    assert_only_valid_patches_count,
    images,
    redrawn,
)
from xformerlib import vision
from xformerlib.positions import ContinuousBias, RelativeBias

pytestmark = pytest.mark.usefixtures("double")

SMALL: dict[str, Any] = {"window": 3, "patch": 2, "dim": 8, "depths": (2, 2, 1), "heads": (2, 4, 2)}
DEPTH = 5  # blocks of the three stages
VARIANTS: dict[str, dict[str, Any]] = {
    "1": {},
    "2": {"version": 2},
    "2, windows of its own": {"version": 2, "window": [(2, 4), 3, 2], "pretrained_window": 5},
    "largest": {"pool": "max", "norm_layer": "rms", "activation": "swiglu", "window": (4, 2)},
}


def made(name: str, **more: Any) -> vision.Swin:
    torch.manual_seed(0)
    return redrawn(vision.Swin(5, **{**SMALL, **VARIANTS[name], **more}))


SIDES = st.integers(1, 9).map(lambda n: 2 * n)


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=3, deadline=None)
@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4))
def test_images_in_a_list_give_what_each_gives_alone(name: str, sizes: list[tuple[int, int]]) -> None:
    model = made(name)
    several = images(*sizes)
    assert_close(model(several), torch.cat([model(image[None]) for image in several]), depth=DEPTH)
    for packed, *alone in zip(
        model.intermediates(several), *(model.intermediates(image[None]) for image in several), strict=True
    ):
        for mine, theirs in zip(packed.maps, alone, strict=True):
            assert_close(mine, theirs.maps[0], depth=DEPTH)


@pytest.mark.parametrize("name", VARIANTS)
def test_patches_that_are_not_valid_do_not_exist(name: str) -> None:
    assert_only_valid_patches_count(made(name, checkpoint=True), (5, 7), 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_image_with_a_padded_rim_is_the_image_without(name: str, precision: torch.dtype) -> None:
    assert_a_padded_rim_does_not_count(made(name, window=2), (11, 9), (3, 7), 2, DEPTH)


def test_the_first_block_looks_into_windows_and_the_second_across_their_borders() -> None:
    x = torch.randn(1, 3, 12, 12)
    other = x.clone()
    other[..., 4:6, 4:6] += 1  # the token (2, 2) of 6 x 6
    for depth, changed in ((1, slice(0, 3)), (2, slice(0, 4))):
        model = made("1", depths=(depth,), heads=(2,))
        a, b = (model.intermediates(y)[0].maps[0] for y in (x, other))
        away = (a - b).abs().amax(0) > 1e-9
        wanted = torch.zeros(6, 6, dtype=torch.bool)
        wanted[changed, changed] = True
        assert torch.equal(away, wanted)


def test_windows_that_cover_an_axis_are_not_shifted_along_it() -> None:
    x = torch.randn(1, 3, 6, 12)
    other = x.clone()
    other[..., 0:2, 0:2] += 1
    model = made("1", depths=(2,), heads=(2,))
    model.stages[0].blocks[0].attention.out.weight.data.zero_()  # leaves the second
    a, b = (model.intermediates(y)[0].maps[0] for y in (x, other))
    away = ((a - b).abs().amax(0) > 1e-9).tolist()
    assert away == [[True] + [False] * 5] * 3  # the first column alone, since 3 // 2 = 1, and all of its rows


@pytest.mark.parametrize("norm", ["pre", "res-post"])
def test_merging_concatenates_four_tokens_column_by_column(norm: Any) -> None:
    merge = vision.PatchMerging(3, 5, norm=norm)
    x = torch.randn(2, 15, 3)
    tokens, domain = merge(x, xf.Grid(3, 5))
    assert domain == xf.Grid(2, 3)
    grid = nn.functional.pad(x.unflatten(1, (3, 5)), (0, 0, 0, 1, 0, 1))
    four = torch.cat([grid[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
    wanted = merge.reduction(merge.norm(four)) if norm == "pre" else merge.out_norm(merge.reduction(four))
    assert_close(tokens, wanted.flatten(1, 2))


def test_features_are_the_last_stage_normalised() -> None:
    model, x = made("2"), torch.randn(2, 3, 20, 12)
    first, last = model.intermediates(x, [0, -1])
    assert first.maps.shape == (2, 8, 10, 6) and last.maps.shape == (2, 32, 3, 2)
    features = model.features(x)
    assert_close(features.tokens, model.norm(last.tokens))
    assert_close(model(x), model.head(features.tokens.mean(1)))
    with pytest.raises(ValueError, match="stages must be indices of the 3 stages"):
        model.intermediates(x, [3])


def test_a_model_begins_as_published() -> None:
    model = vision.Swin(None, **{**SMALL, "version": 2}).eval()
    x = torch.randn(1, 3, 12, 12)
    tokens = model.embed(x).flatten(1, 2)
    assert torch.equal(model.intermediates(x, [0])[0].tokens, tokens)  # every block is the identity
    assert model(x).shape == (1, 32)
    assert isinstance(model.stages[0].blocks[1].attention.position, ContinuousBias)
    one = vision.Swin(None, **SMALL, drop_path=0.4)
    assert isinstance(one.stages[0].blocks[1].attention.position, RelativeBias)
    rates = [block.attention_residual.drop_path.p for stage in one.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vision.Swin(5, version=3), "version must be 1 or 2; got version=3"),
        (lambda: vision.Swin(5, pretrained_window=7), "pretrained_window is for version=2"),
        (lambda: vision.Swin(5, heads=(3, 6)), "one number for each stage"),
        (lambda: vision.Swin(5, window=[7, 7]), "window must be a size >= 1.*each of 4 stages"),
        (lambda: vision.Swin(5, **{**SMALL, "window": 0}), "window must be a size >= 1"),
        (lambda: vision.Swin(5, **SMALL)(torch.randn(1, 3, 12, 13)), r"multiples of patch=\(2, 2\); got \(12, 13\)"),
        (lambda: vision.PatchMerging(8, 16)(torch.randn(1, 9, 8), xf.Sequence(9)), "Grid of two axes without prefix"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
