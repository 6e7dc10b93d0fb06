"""The Vision Transformer: images of any size, alone, in a batch, in a list, with holes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import xformerlib as xf
from tests.closeness import assert_close
from tests.vision.cases import (
    assert_a_padded_rim_does_not_count,
    assert_only_valid_patches_count,
    images,
    redrawn,
)
from xformerlib import masks, positions, vision

pytestmark = pytest.mark.usefixtures("double")

SMALL: dict[str, Any] = {"size": 16, "patch": 4, "dim": 32, "depth": 2, "heads": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean": {"class_token": False, "pool": "mean"},
    "max": {"pool": "max", "registers": 2},
    "mean and max": {"pool": "mean-max", "position": None},
    "attention": {
        "pool": "attention",
        "class_token": False,
        "position": lambda: positions.RelativeBias(4, size=(4, 4)),
    },
    "distilled": {"distillation": True},
    "rotary": {"registers": 3, "position": positions.Rotary(8, coordinates="normalized", theta=100)},
    "mixed": {"position": ["learned", positions.Rotary(8), lambda: positions.RelativeBias(4, size=(4, 4))]},
    "sin-cos": {"position": positions.Sinusoidal(32), "norm": "sandwich"},
    "continuous": {"position": lambda: positions.ContinuousBias(4), "qk_norm": "cosine", "norm": "res-post"},
    "windows": {"mask": [masks.Windows(2) | masks.Global(1), None], "layer_scale": 0.1},
    "neighbourhood": {"mask": masks.Local(1) | masks.Global(1), "activation": "swiglu", "norm": "parallel"},
    "clip": {"embed_norm": "layer", "norm_layer": "rms", "registers": 1},
    "stem": {"embed": "stem"},
}


def made(name: str, **more: Any) -> vision.ViT:
    torch.manual_seed(0)
    options = {**SMALL, **VARIANTS[name], **more}
    if options.get("embed") == "stem":
        options["embed"] = vision.ConvStem(32, layers=2, hidden=8)
    return redrawn(vision.ViT(5, **options))


@pytest.mark.parametrize("name", VARIANTS)
def test_images_in_a_list_give_what_each_gives_alone(name: str, precision: torch.dtype) -> None:
    model = made(name)
    several = images((16, 16), (8, 24), (16, 16), (4, 4), (20, 12))
    alone = torch.cat([model(image[None]) for image in several])
    assert_close(model(several), alone, depth=2)
    assert_close(model(torch.stack(several[::2][:2])), alone[[0, 2]], depth=2)
    assert float((alone[0] - alone[2]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_patches_that_are_not_valid_do_not_exist(name: str) -> None:
    assert_only_valid_patches_count(made(name, checkpoint=True), (4, 4), 4)


def test_an_image_with_a_padded_rim_is_the_image_without() -> None:
    model = made("neighbourhood")
    model.encoder.position = None  # a learned position depends on the size of the grid
    assert_a_padded_rim_does_not_count(model, (2, 3), (2, 1), 4, 2)


@pytest.mark.parametrize(("sizes", "patch"), [((64,), (4,)), ((16, 12), 4), ((4, 8, 8), (2, 4, 4))])
def test_signals_images_and_videos(sizes: tuple[int, ...], patch: Any) -> None:
    model = vision.ViT(5, size=sizes, patch=patch, channels=2, dim=24, depth=1, heads=2).eval()
    x = torch.randn(3, 2, *sizes)
    features = model.features(x)
    each = (patch,) * 2 if isinstance(patch, int) else patch
    grid = tuple(size // p for size, p in zip(sizes, each, strict=True))
    assert features.domain == xf.Grid(*grid, prefix=1)
    assert features.maps.shape == (3, 24, *grid)
    assert model(x).shape == (3, 5)


def test_patches_are_a_convolution() -> None:
    embed = vision.PatchEmbed(7, (2, 3), channels=4)
    x = torch.randn(2, 4, 8, 9)
    wanted = nn.functional.conv2d(x, embed.proj.weight.unflatten(1, (4, 2, 3)), embed.proj.bias, stride=(2, 3))
    assert_close(embed(x), wanted.movedim(1, -1))
    packed = embed.packed([x[0], x[1, :, :4]])
    assert_close(packed[:12], wanted[0].flatten(1).T)
    assert_close(packed[12:], wanted[1, :, :2].flatten(1).T)


def test_a_tokenizer_that_is_given_keeps_its_weights() -> None:
    embed = vision.PatchEmbed(32, 4)
    nn.init.constant_(embed.proj.weight, 3.0)
    model = vision.ViT(5, embed=embed, pool=xf.Pooling(32, "attention", heads=2), **SMALL)
    assert bool((model.embed.proj.weight == 3).all())
    assert 0.01 < float(model.head.weight.detach().std()) < 0.03
    assert 0.015 < float(vision.PatchEmbed(64, 8).proj.weight.detach().std()) < 0.025


def test_intermediates_are_what_lies_between_the_blocks() -> None:
    model, x = made("class token"), torch.randn(2, 3, 16, 12)
    first, last = model.intermediates(x, [0, -1], norm=True)
    assert_close(last.tokens, model.features(x).tokens)
    plain = model.intermediates(x)
    assert len(plain) == 2
    assert_close(first.tokens, model.encoder.norm(plain[0].tokens))
    assert_close(model.encoder.layer(1, plain[0].tokens, plain[0].domain), plain[1].tokens)
    ragged = model.intermediates(images((16, 16), (4, 8)), [1])[0]
    assert [m.shape for m in ragged.maps] == [(32, 4, 4), (32, 1, 2)]
    with pytest.raises(ValueError, match="layers must be indices of the 2 blocks"):
        model.intermediates(x, [2])


def test_distillation_has_a_head_for_each_of_two_tokens() -> None:
    model, several = made("distilled"), images((16, 16), (4, 8))
    features = model.features(several)
    one, two = model.logits(features)
    assert_close(model(several), (one + two) / 2)
    starts = [0, 2 + 16]
    assert_close(one, model.head(features.tokens[starts]))
    assert_close(two, model.distillation_head(features.tokens[[start + 1 for start in starts]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.randn(2, 3, 16, 18)), r"multiples of patch=\(4, 4\); got \(16, 18\)"),
        (lambda m: m(torch.randn(2, 1, 16, 16)), r"images must be \(batch, 3, height, width\); got \(2, 1, 16, 16\)"),
        (lambda m: m([torch.randn(3, 16)]), "must be"),
        (lambda m: m(torch.randn(1, 3, 16, 16), valid=torch.ones(1, 4, 3).bool()), "valid must be bool of shape"),
        (lambda m: m([torch.randn(3, 16, 16)], valid=torch.ones(1, 4, 4).bool()), "valid is for a batch"),
        (lambda m: vision.ViT(5, class_token=False, distillation=True), "distillation adds a token"),
        (lambda m: vision.ViT(5, dim=24, embed=vision.ConvStem(32), heads=2), "tokens of dim=24 channels; got 32"),
        (lambda m: vision.ViT(5, **{**SMALL, "size": 18}), "multiples of patch"),
        (lambda m: vision.ViT(5, class_token=False, pool="token", **SMALL), "takes the class token"),
        (lambda m: vision.PatchEmbed(8, 0), "patch must be one size >= 1"),
        (lambda m: vision.ConvStem(8, kernel=2), "kernel odd; got .*kernel=2"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(vision.ViT(5, **SMALL))


def test_images_must_be_real_numbers() -> None:
    with pytest.raises(TypeError, match=r"floating dtype.*Divide by 255"):
        vision.ViT(5, **SMALL)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match="images must be a tensor, or a list of at least one"):
        vision.ViT(5, **SMALL)([])
