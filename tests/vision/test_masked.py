"""Masked autoencoders: the recipe of the paper, on images, signals and videos of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xformerlib as xf
from tests.closeness import assert_close
from tests.vision.test_vit import VARIANTS, made
from xformerlib import vision

pytestmark = pytest.mark.usefixtures("double")

DECODER: dict[str, Any] = {"decoder_dim": 24, "decoder_depth": 2, "decoder_heads": 3}


def autoencoder(name: str = "sin-cos", seed: int = 0, encoder: Any = None, **options: Any) -> vision.MaskedAutoencoder:
    encoder = made(name) if encoder is None else encoder
    model = vision.MaskedAutoencoder(encoder, **{**DECODER, **options}).eval()
    torch.manual_seed(seed)
    for parameter in [*model.embed.parameters(), *model.decoder.parameters(), *model.out.parameters()]:
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the recipe, written out plainly after the paper and its code -----------------------------------------------------------


def plain_block(x: Tensor, block: nn.Module, heads: int) -> Tensor:
    """Pre-norm attention and feed-forward layer of a published ViT."""
    y = block.attention_residual.norm(x)
    batch, tokens, dim = y.shape
    q, k, v = block.attention.qkv(y).reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / (dim // heads) ** 0.5).softmax(-1)
    x = x + block.attention.out((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))
    y = block.feed_forward_residual.norm(x)
    return x + block.feed_forward(y)


def sin_cos(dim: int, height: int, width: int) -> Tensor:
    """The position table of the published code: half of the channels for the column, half for the row; a row of 0 in front."""

    def axis(place: Tensor) -> Tensor:
        omega = 1 / 10_000 ** (torch.arange(dim // 4) / (dim / 4))
        return torch.cat([(place[:, None] * omega).sin(), (place[:, None] * omega).cos()], 1)

    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([torch.zeros(1, dim), torch.cat([axis(column.flatten()), axis(row.flatten())], 1)])


def plain(model: vision.MaskedAutoencoder, images: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and restored patches, of images of which the patches ``shown`` (B, K) are seen."""
    vit, (batch, _, height, width), p = model.encoder, images.shape, 4
    h, w = height // p, width // p
    patches = images.reshape(batch, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, 3 * p * p)
    x = vit.embed.proj(patches) + sin_cos(32, h, w)[1:]
    x = torch.stack([row[keep] for row, keep in zip(x, shown, strict=True)])
    x = torch.cat([vit.prefix_tokens.expand(batch, -1, -1), x], 1)
    for block in vit.encoder.blocks:
        x = plain_block(x, block, 4)
    x = model.embed(vit.encoder.norm(x))
    every = model.hidden_token.expand(batch, h * w, -1).clone()
    for row, keep in enumerate(shown):
        every[row, keep] = x[row, 1:]
    y = torch.cat([x[:, :1], every], 1) + sin_cos(24, h, w)
    for block in model.decoder.blocks:
        y = plain_block(y, block, 3)
    restored = model.out(model.decoder.norm(y))[:, 1:]
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = ((restored - target) ** 2).mean(-1)
    hidden = torch.ones(batch, h * w)
    for row, keep in enumerate(shown):
        hidden[row, keep] = 0
    return (error * hidden).sum() / hidden.sum(), restored


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_it_is_the_recipe_of_the_paper(size: tuple[int, int], precision: torch.dtype) -> None:
    encoder = vision.ViT(5, size=16, patch=4, dim=32, depth=2, heads=4, position=xf.positions.Sinusoidal(32))
    model, images = autoencoder(encoder=encoder), torch.randn(3, 3, *size)
    got = model(images, seeded())
    h, w = size[0] // 4, size[1] // 4
    assert got.mask.shape == (3, h, w) and got.mask.flatten(1).sum(1).tolist() == [h * w * 3 // 4] * 3
    shown = torch.stack([(~row).nonzero()[:, 0] for row in got.mask.flatten(1)])
    wanted, restored = plain(model, images, shown)
    assert_close(got.loss, wanted, depth=4)  # two blocks, and two of the decoder
    # Pictures are in the units of the image: what is restored is put back to the level and scale of its patch.
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)
    pictures = F.unfold(got.reconstruction, 4, stride=4).transpose(1, 2)
    units = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = torch.where(got.mask.flatten(1)[..., None], restored * units + patches.mean(-1, keepdim=True), patches)
    assert_close(pictures, expected, depth=4)


def covered(mask: Tensor) -> Tensor:
    """The pixels of hidden patches."""
    return mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "stem"])
def test_the_encoder_sees_nothing_of_hidden_patches(name: str) -> None:
    model, images = autoencoder(name), torch.randn(2, 3, 16, 16)
    seen: list[Tensor] = []
    hook = model.encoder.encoder.blocks[-1].register_forward_hook(lambda _, inputs, out: seen.append(out))
    first = model(images, seeded())
    other = torch.where(covered(first.mask), torch.randn_like(images), images)
    second = model(other, seeded())
    hook.remove()
    assert torch.equal(first.mask, second.mask) and torch.equal(*seen)
    assert seen[0].shape == (2, model.encoder.prefix + 4, 32)  # only what is shown is computed
    assert not torch.equal(first.loss, second.loss)
    assert torch.equal(first.reconstruction, images) is False
    assert torch.equal(
        first.reconstruction[~covered(first.mask).expand_as(images)], images[~covered(first.mask).expand_as(images)]
    )


def test_the_loss_is_of_hidden_patches_alone() -> None:
    model, images = autoencoder(norm_targets=False), torch.randn(2, 3, 16, 16)
    loss, reconstruction, mask = model(images, seeded())
    of_hidden = (reconstruction - images)[covered(mask).expand_as(images)].square().mean()
    assert_close(loss, of_hidden)


def test_seeds_reproduce_and_gradients_reach_all_that_is_used() -> None:
    model, images = autoencoder("class token").train(), torch.randn(2, 3, 16, 16)
    first, again, other = (model(images, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.loss, again.loss) and torch.equal(first.mask, again.mask)
    assert not torch.equal(first.mask, other.mask)
    torch.manual_seed(3)
    default = model(images).mask
    torch.manual_seed(3)
    assert torch.equal(default, model(images).mask) and not torch.equal(default, model(images).mask)
    first.loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == set()
    asked = {name: p.grad for name, p in model.named_parameters() if not name.startswith("encoder.head.")}
    assert all(g is not None and g.isfinite().all() and g.any() for g in asked.values())
    assert not model.encoder.head.weight.grad.any()  # the head is not asked, but distributed training waits for it


def test_the_encoder_is_the_model_that_is_used_next() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "size": 16,
        "patch": 4,
        "dim": 32,
        "depth": 2,
        "heads": 4,
        "position": xf.positions.Rotary(8),
    }
    model = vision.MaskedAutoencoder(vision.ViT(5, **options), **DECODER, norm_targets=False)
    phase = torch.rand(32, 3, 1, 1) * 6.3 + torch.linspace(0, 4, 16)
    images = phase.sin().expand(-1, -1, 16, -1).contiguous()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for step in range(60):
        loss = model(images, seeded(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    next_model = vision.ViT(5, **options).eval()
    next_model.load_state_dict(model.encoder.state_dict())
    assert torch.equal(next_model(images), model.encoder.eval()(images))


@pytest.mark.parametrize(("sizes", "patch"), [((64,), (4,)), ((12, 20), 4), ((4, 8, 8), (2, 4, 4))])
def test_signals_images_and_videos(sizes: tuple[int, ...], patch: Any) -> None:
    encoder = vision.ViT(None, size=sizes, patch=patch, channels=2, dim=24, depth=1, heads=2)
    model = vision.MaskedAutoencoder(encoder, **DECODER, ratio=0.6)
    images = torch.randn(2, 2, *sizes)
    loss, reconstruction, mask = model(images, seeded())
    each = (patch,) * 2 if isinstance(patch, int) else patch
    grid = tuple(size // p for size, p in zip(sizes, each, strict=True))
    assert reconstruction.shape == images.shape and mask.shape == (2, *grid) and loss.isfinite()
    pixels = mask
    for axis, p in enumerate(each, 1):
        pixels = pixels.repeat_interleave(p, axis)
    same = (reconstruction == images).all(1)
    assert same[~pixels].all() and not same[pixels].any()


def test_patches_that_do_not_exist_are_neither_shown_nor_asked_for() -> None:
    model, images = autoencoder("mean"), torch.randn(2, 3, 16, 16)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, 2:] = False
    first = model(images, seeded(), valid=valid)
    assert not first.mask[~valid].any() and first.mask.flatten(1).sum(1).tolist() == [6, 12]
    second = model(torch.where(covered(valid), images, torch.nan), seeded(), valid=valid)
    assert torch.equal(first.loss, second.loss) and second.reconstruction.isfinite().all()
    second.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\); got ratio=1"):
        vision.MaskedAutoencoder(made("class token"), ratio=1)
    with pytest.raises(TypeError, match=r"tokens are patches, .*; got ConvStem"):
        vision.MaskedAutoencoder(made("stem"))
    with pytest.raises(TypeError, match="encoder must be a ViT"):
        vision.MaskedAutoencoder(nn.Linear(2, 2))
