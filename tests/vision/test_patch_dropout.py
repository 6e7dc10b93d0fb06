"""Patches left out in training: which, and that those that are left keep their places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xformerlib as xf
from tests.closeness import assert_close
from tests.vision.cases import images
from tests.vision.test_vit import VARIANTS, made
from xformerlib import masks, vision
from xformerlib.vision._kept import random_tokens

pytestmark = pytest.mark.usefixtures("double")

NAMES = [name for name in VARIANTS if name != "stem"]


def drawn(model: vision.ViT, x: Any, **options: Any) -> tuple[vision.Features, Tensor]:
    """All tokens of images, and those that the next call of the model leaves when torch's generator is seeded alike."""
    tokens = model.tokens(x, **options)
    torch.manual_seed(7)
    index = random_tokens(tokens, model.patch_dropout.share)
    torch.manual_seed(7)
    return tokens, index


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_is_what_it_is_in_the_whole_where_nobody_looks_at_the_others(name: str) -> None:
    """Each kept token after one block is what it is where the others are there, but nobody may look at them."""
    model = made(name, patch_dropout=0.5).train()
    del model.encoder.blocks[1]
    tokens, index = drawn(model, x := torch.randn(2, 3, 16, 16))
    left = model.features(x)
    assert left.tokens.shape[1] == model.prefix + 8 and torch.equal(left.domain.index, index)
    seen = torch.zeros(tokens.tokens.shape[:2], dtype=torch.bool).scatter_(1, index, True)
    every = model.embed_norm(model.encoder.embed(*tokens))
    every = model.encoder.norm(model.encoder.layer(0, every, tokens.domain, mask=masks.Keys(seen)))
    wanted = every.gather(1, index[..., None].expand(-1, -1, 32))
    assert_close(left.tokens, wanted)
    pooled = model.pooled(left)
    assert pooled.shape == (2, 32) and pooled.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_images_in_a_list_lose_patches_each_for_itself(name: str) -> None:
    model = made(name, patch_dropout=0.6).train()
    several = images((16, 16), (8, 24), (4, 4), (20, 12))
    tokens, index = drawn(model, several)
    left = model.features(several)
    assert torch.equal(left.domain.index, index)
    p, bounds = model.prefix, left.domain.offsets
    assert (bounds.diff() - p).tolist() == [6, 4, 1, 6]
    # What is left of each image is what it gives alone.
    starts = tokens.domain.offsets
    for image, begin, end, start in zip(several, bounds, bounds[1:], starts, strict=False):
        alone = model.tokens(image[None])
        own = model.encode(alone.kept((index[begin:end] - start)[None]))
        assert_close(own.tokens[0], left.tokens[begin:end], depth=2)
    torch.manual_seed(7)
    assert torch.equal(model(several).detach(), sum(model.logits(left)).detach() / len(model.logits(left)))


@pytest.mark.parametrize("name", NAMES)
def test_only_valid_patches_count(name: str) -> None:
    model = made(name, patch_dropout=0.5).train()
    x, valid = torch.randn(3, 3, 16, 16), torch.ones(3, 4, 4, dtype=torch.bool)
    valid[0, :, 2:] = valid[1, 1:] = False
    valid[1, 0, 1:] = False
    _, index = drawn(model, x, valid=valid)
    left = model.features(x, valid=valid)
    assert left.domain.valid.sum(1).tolist() == [model.prefix + n for n in (4, 1, 8)]
    assert not left.tokens[~left.domain.valid].any()
    torch.manual_seed(7)
    logits = model(x, valid=valid)
    other = torch.where(valid.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None], x, torch.nan)
    torch.manual_seed(7)
    assert torch.equal(logits, model(other, valid=valid))
    # A row alone, with as many of its patches, gives the same.
    alone = model.encode(model.tokens(x[:1], valid=valid[:1]).kept(index[:1][left.domain.valid[:1]][None]))
    assert_close(model.pooled(alone), model.pooled(left)[:1], depth=2)


def test_how_many_are_left() -> None:
    for patches, share, left in ((196, 0.75, 49), (100, 0.9, 10), (10, 0.99, 1), (1, 0.5, 1), (7, 0.5, 3), (9, 0.0, 9)):
        features = vision.Features(torch.zeros(3, patches, 4), xf.Grid(1, patches))
        index = random_tokens(features, share)
        assert index.shape == (3, left) and (index.diff(dim=-1) > 0).all()
        valid = torch.ones(2, 1, patches, dtype=torch.bool)
        features = vision.Features(torch.zeros(2, patches, 4), xf.Grid(1, patches, valid=valid))
        assert random_tokens(features, share).shape == (2, left)
        packed = vision.Features(torch.zeros(patches, 4), xf.Grid.packed([(1, patches)]))
        assert random_tokens(packed, share).shape == (left,)


def test_every_patch_is_left_as_often() -> None:
    torch.manual_seed(0)
    grid = xf.Grid(2, 3, prefix=1)
    index = random_tokens(vision.Features(torch.zeros(6000, 7, 1), grid), 0.5)
    share = torch.bincount(index.flatten(), minlength=7) / 6000
    assert share[0] == 1 and (share[1:] - 0.5).abs().max() < 6 * (0.25 / 6000) ** 0.5  # standard errors
    packed = xf.Grid.packed([(2, 3)] * 2000, prefix=1)
    tokens = random_tokens(vision.Features(torch.zeros(packed.num_tokens, 1), packed), 0.5)
    share = torch.bincount(tokens % 7, minlength=7) / 2000
    assert share[0] == 1 and (share[1:] - 0.5).abs().max() < 6 * (0.25 / 2000) ** 0.5


def test_in_evaluation_nothing_is_left_out_and_seeds_decide_in_training() -> None:
    model, x = made("class token", patch_dropout=0.5), torch.randn(2, 3, 16, 16)
    without = made("class token")
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(x), without(x))
    assert model.intermediates(x)[0].maps.shape == (2, 32, 4, 4)
    model.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(x))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    results[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_there_is_no_map_of_what_was_left_out() -> None:
    model = made("class token", patch_dropout=0.5).train()
    found = model.intermediates(torch.randn(1, 3, 16, 16))[0]
    with pytest.raises(ValueError, match=r"maps need every patch, .*Call eval\(\), or set patch_dropout=0"):
        _ = found.maps


def test_bad_share() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"patch_dropout must be in \[0, 1\)"):
            vision.ViT(5, patch_dropout=share)


def test_compiled() -> None:
    model = vision.ViT(
        5, size=16, patch=4, dim=24, depth=1, heads=2, patch_dropout=0.5, position=xf.positions.Rotary(12)
    ).train()
    x = torch.randn(2, 3, 16, 16)
    torch.manual_seed(3)
    wanted = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.manual_seed(3)
    got = compiled(x)
    nn.functional.mse_loss(got, torch.zeros_like(got)).backward()
    assert_close(got, wanted)
