"""Attention maps: what each block really attends to, whatever its kernel, norm and mask; and their product over layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.closeness import assert_close
from xformerlib import Grid, masks, positions, vision

pytestmark = pytest.mark.usefixtures("double")

SMALL: dict[str, Any] = {"size": 16, "patch": 4, "dim": 16, "depth": 3, "heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "post": {"norm": "post"},
    "res-post": {"norm": "res-post", "qk_norm": "cosine"},
    "parallel": {"norm": "parallel", "registers": 2},
    "sandwich": {"norm": "sandwich", "class_token": False},
    "neighbourhood": {"mask": masks.Local(1) | masks.Global(1)},
    "windows": {"mask": [masks.Windows(2), masks.Windows(2, shift=1), None], "class_token": False},
    "rotary": {"position": positions.Rotary(8), "kv_heads": 1},
    "bias": {"position": lambda: positions.RelativeBias(2, size=(4, 4)), "sinks": True},
    "checkpoint": {"checkpoint": True, "pool": "attention"},
}


def made(name: str) -> vision.ViT:
    torch.manual_seed(0)
    model = vision.ViT(5, **SMALL, **VARIANTS[name]).eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_maps_give_the_output_of_attention(name: str, precision: torch.dtype) -> None:
    """The weights times the values, seen through hooks on the layers themselves, are what each attention returned."""
    model, x = made(name), torch.randn(2, 3, 16, 12)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    for block in model.encoder.blocks:
        block.attention.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0], out)))
    maps = vision.attention_maps(model, x)
    assert len(maps) == 3
    for (layer, tokens, out), (weights, domain) in zip(seen, maps, strict=True):
        value = layer.qkv(tokens)[..., -layer.kv_heads * layer.head_dim :].unflatten(-1, (layer.kv_heads, -1))
        value = value.transpose(1, 2).repeat_interleave(layer.heads // layer.kv_heads, 1)
        wanted = layer.out((weights @ value).transpose(1, 2).flatten(2))
        assert_close(out, wanted)
        assert domain == maps[0].domain
        if name != "bias":
            assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_layers_and_rows_are_chosen() -> None:
    model, x = made("parallel"), torch.randn(2, 3, 16, 12)
    every = vision.attention_maps(model, x)
    last, first = vision.attention_maps(model, x, [-1, 0], rows=[0, 5])
    assert_close(last.weights, every[2].weights[:, :, [0, 5]])
    assert_close(first.weights, every[0].weights[:, :, [0, 5]])
    assert_close(last.of(1), every[2].of(5))
    assert last.of(0).shape == (2, 2, 4, 3)
    assert torch.equal(every[2].of(5).flatten(2), every[2].weights[:, :, 5, 3:])


def test_nothing_is_left_behind() -> None:
    model = made("plain")
    before = model(torch.ones(1, 3, 16, 16))
    with pytest.raises(ValueError, match="multiples of patch"):
        vision.attention_maps(model, torch.randn(1, 3, 16, 18))
    for block in model.encoder.blocks:
        assert not block.attention._forward_pre_hooks
    assert torch.equal(model(torch.ones(1, 3, 16, 16)), before)


@pytest.mark.parametrize("name", ["plain", "rotary", "windows"])
def test_images_in_a_list_have_the_maps_that_each_has_alone(name: str) -> None:
    model = made(name)
    images = [torch.randn(3, *size) for size in ((16, 16), (8, 20))]
    together = vision.attention_maps(model, images)
    alone = [vision.attention_maps(model, image[None]) for image in images]
    layers = [(layer, [maps[index] for maps in alone]) for index, layer in enumerate(together)]
    layers.append((vision.rollout(together), [vision.rollout(maps) for maps in alone]))
    for layer, singles in layers:
        for one, single in zip(layer.of(2), singles, strict=True):
            assert one.shape == single.of(2).shape[1:]
            assert_close(one, single.of(2)[0], depth=3)
    with pytest.raises(ValueError, match="leave rows out"):
        vision.attention_maps(model, images, rows=[0])[0].of()


def test_patches_that_do_not_exist_are_not_seen() -> None:
    model, valid = made("plain"), torch.ones(1, 4, 4, dtype=torch.bool)
    valid[:, 2:] = False
    images = torch.randn(1, 3, 16, 16)
    for layer in vision.attention_maps(model, images, valid=valid):
        assert not layer.of(0)[:, :, 2:].any()
        assert_close(layer.weights[:, :, 0].sum(-1), torch.ones(1, 2))


def test_rollout_is_the_product_of_the_layers() -> None:
    maps = vision.attention_maps(made("parallel"), torch.randn(2, 3, 16, 16))
    found = vision.rollout(maps)
    eye = torch.eye(19)
    a, b, c = ((layer.weights.mean(1) + eye) / 2 for layer in maps)
    assert_close(found.weights[:, 0], c @ b @ a)
    assert_close(found.weights.sum(-1), torch.ones(2, 1, 19))
    sinks = vision.rollout(vision.attention_maps(made("bias"), torch.randn(2, 3, 16, 16)))
    assert_close(sinks.weights.sum(-1), torch.ones(2, 1, 17))


def test_a_model_that_takes_images_apart_is_given_them_one_by_one() -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = made("plain")

        def forward(self, images: list[Tensor]) -> Tensor:
            return torch.cat([self.model(image[None]) for image in images])

    images = [torch.randn(3, 8, 8) for _ in range(2)]
    assert len(vision.attention_maps(OneByOne(), images[:1])) == 3
    with pytest.raises(ValueError, match="OneByOne runs images in several groups; ask for the maps of one image"):
        vision.attention_maps(OneByOne(), images)


@pytest.mark.parametrize("layers", [[], [3], [-4]])
def test_layers_that_there_are_not(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="layers must be indices of the 3 blocks"):
        vision.attention_maps(made("plain"), torch.randn(1, 3, 16, 16), layers)


def test_rollout_needs_all_tokens() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        vision.rollout([])
    some = vision.attention_maps(made("plain"), torch.randn(1, 3, 16, 16), rows=[0])
    with pytest.raises(ValueError, match="maps must be of all tokens"):
        vision.rollout(some)


def test_maps_of_patches_that_were_left_out_are_refused() -> None:
    model = vision.ViT(5, size=16, patch=4, dim=32, depth=1, heads=4, patch_dropout=0.5).train()
    (layer,) = vision.attention_maps(model, torch.randn(2, 3, 16, 16))
    assert layer.weights.shape == (2, 4, 9, 9)
    with pytest.raises(ValueError, match=r"some were left out.*Call model.eval\(\) first"):
        layer.of(0)


def test_maps_of_swin_are_in_the_order_of_the_image() -> None:
    torch.manual_seed(0)
    model = vision.Swin(5, window=2, patch=2, dim=16, depths=(2,), heads=(2,)).eval()
    images = torch.randn(1, 3, 8, 8)
    plain, shifted = vision.attention_maps(model, images)
    assert plain.domain == Grid(4, 4)
    for layer, mask in ((plain, masks.Windows(2)), (shifted, masks.Windows(2, shift=1))):
        assert torch.equal(layer.weights[0, 0] > 0, mask.dense(Grid(4, 4)))
        assert_close(layer.weights.sum(-1), torch.ones(1, 2, 16))
    (some,) = vision.attention_maps(model, images, [1], rows=[5, 0])
    assert_close(some.weights, shifted.weights[:, :, [5, 0]])
