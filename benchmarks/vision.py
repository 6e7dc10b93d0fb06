"""Whole Vision Transformers beside timm's, with the same weights; and images of mixed sizes, packed and padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import xformerlib as xf
from xformerlib import masks, positions
from xformerlib.domains import Domain

from ._measure import Call, Line, Setting, Side, Target, Work

BATCH, CLASSES, PATCH = 8, 10, 16
DEPTH = 4  # for mixed sizes: the ratio is that of a block, and 64 padded images take their time
# Weights whose rows and columns mean the same on both sides: their gradients are compared.
NAMES = (
    ("up.weight", "down.weight", "attention.out.weight", "head.weight"),
    ("fc1.weight", "fc2.weight", "attn.proj.weight", "head.weight", "head.fc.weight"),
)
NAVIT = (
    ("patches.1.weight", "up.weight", "down.weight", "out.weight", "head.1.weight"),
    (".1.weight", ".4.weight", "to_out.0.weight"),
)


class Training(Side):
    """A step of training, the gradients of all weights; those of the first ``compared`` are its result beside the output."""

    def __init__(self, model: nn.Module, forward: Callable[[], Tensor], grad: Tensor, names: Sequence[str]) -> None:
        named = list(model.named_parameters())
        first = [p for name, p in named if name.endswith(tuple(names)) and "rel_pos" not in name]
        chosen = {id(p) for p in first}
        super().__init__(forward, first + [p for _, p in named if id(p) not in chosen], grad)
        object.__setattr__(self, "compared", len(first))

    compared: int

    def step(self) -> tuple[Tensor, ...]:
        return super().step()[: 1 + self.compared]


def sides(
    setting: Setting, ours: nn.Module, theirs: nn.Module, train: bool, x: Any, y: tuple[Any, ...], names: Any = NAMES
) -> tuple[Side, Side]:
    """Training steps, or forwards without gradients."""
    if not train:
        return Call(torch.no_grad()(lambda: ours(x))), Call(torch.no_grad()(lambda: theirs(*y)))
    grad = setting.random(len(x), CLASSES, seed=1)
    return Training(ours, lambda: ours(x), grad, names[0]), Training(theirs, lambda: theirs(*y), grad, names[1])


def drawn(model: nn.Module) -> nn.Module:
    """Weights under which every part has its share in the output, which at initialisation many have not."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "logit_scale" not in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()  # without dropout, on both sides


def against_timm(
    setting: Setting, name: str, train: bool, mask: Any = None, images: int = BATCH, **options: Any
) -> Work:
    """A model of timm and what ``from_timm`` makes of it, on images of one size."""
    import timm

    from xformerlib.interop.timm import from_timm

    theirs = drawn(timm.create_model(name, num_classes=CLASSES, **options)).to(setting.device, setting.dtype)
    ours = from_timm(theirs)
    size = options.get("img_size") or theirs.patch_embed.img_size[0]  # type: ignore[union-attr, index]
    x = setting.random(setting.size(images, 2), 3, size, size)
    domain = xf.Grid(*ours.embed.grid((size, size)))
    kernel = xf.plan(mask, domain, batch=len(x), head_dim=32, dtype=setting.dtype, device=setting.device).kernel
    return Work(*sides(setting, ours, theirs, train, x, (x,)), kernel, 0.0, 0.0)


def vit(setting: Setting, name: str, train: bool, **options: Any) -> Work:
    small = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32} if setting.quick else {}
    return against_timm(setting, name, train, **(options | small))


def swin(setting: Setting, name: str, train: bool, window: int) -> Work:
    small = {"depths": (2, 1, 1, 1), "embed_dim": 24, "img_size": 16 * window} if setting.quick else {}
    return against_timm(setting, name, train, masks.Windows(window), **small)


# -- images of mixed sizes -----------------------------------------------------------------------------------------------


def mixed(setting: Setting) -> list[Tensor]:
    """Images of 64 to 384 pixels a side, each side evenly drawn from the multiples of a patch."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(4, setting.size(24, 6) + 1, (setting.size(64, 4), 2), generator=generator) * PATCH
    return [setting.random(3, *size, seed=seed) for seed, size in enumerate(sides.tolist())]


def packed_and_padded(setting: Setting, train: bool) -> Work:
    """A ViT without a table of places, which timm has for images of one size only; its mask says which patches are padding."""
    import timm

    from xformerlib.interop.timm import from_timm

    small = {"depth": 1, "embed_dim": 48} if setting.quick else {"depth": DEPTH}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", num_classes=CLASSES, pos_embed="none", dynamic_img_size=True, **small
    )
    theirs = drawn(theirs).to(setting.device, setting.dtype)
    images = mixed(setting)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = torch.stack([nn.functional.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images])
    exists = torch.zeros(len(images), height // PATCH, width // PATCH, dtype=torch.bool, device=setting.device)
    for row, image in zip(exists, images, strict=True):
        row[: image.shape[1] // PATCH, : image.shape[2] // PATCH] = True
    keys = nn.functional.pad(exists.flatten(1), (1, 0), value=True)[:, None, None]
    kernel = xf.plan(None, packed_grid(images), head_dim=64, dtype=setting.dtype, device=setting.device).kernel

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = theirs

        def forward(self, x: Tensor, keys: Tensor) -> Tensor:
            return self.net(x, attn_mask=keys.expand(-1, -1, keys.shape[-1], -1))

    return Work(*sides(setting, from_timm(theirs), Masked(), train, images, (padded, keys)), kernel, 0.0, 0.0)


def packed_grid(images: Sequence[Tensor]) -> xf.Grid:
    grids = [tuple(side // PATCH for side in image.shape[1:]) for image in images]
    return xf.Grid.packed(grids).to(images[0].device)


class Factorised(positions.Embedding):
    """A learned vector for each row and each column (NaViT, arXiv:2307.06304)."""

    def __init__(self, height: Tensor, width: Tensor) -> None:
        super().__init__()
        self.dim = height.shape[1]
        self.height, self.width = nn.Parameter(height.detach().clone()), nn.Parameter(width.detach().clone())

    def rows(self, domain: Domain, x: Tensor) -> Tensor:
        row, column = domain.coordinates.unbind(-1)
        return self.height[row] + self.width[column]


class Packed(nn.Module):
    """The model of vit-pytorch's ``NaViT`` from our parts, with its weights."""

    def __init__(self, theirs: Any, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, bias=False)
        options = {"head_dim": dim // heads, "qk_norm": "rms", "qkv_bias": False, "out_bias": False}
        self.patches = nn.Sequential(norm(3 * PATCH**2), nn.Linear(3 * PATCH**2, dim), norm(dim))
        place = Factorised(theirs.pos_embed_height, theirs.pos_embed_width)
        self.encoder = xf.Encoder(dim, depth, heads, position=place, norm_layer=norm, **options)
        self.query, self.query_norm = nn.Parameter(theirs.attn_pool_queries.detach().clone()), norm(dim)
        self.pool = xf.Attention(dim, heads, **options)  # type: ignore[arg-type]
        self.head = nn.Sequential(norm(dim), nn.Linear(dim, CLASSES, bias=False))
        pairs = [(self.patches, theirs.to_patch_embedding), (self.head, theirs.mlp_head)]
        pairs += [(self.encoder.norm, theirs.transformer.norm), (self.query_norm, theirs.attn_pool.norm)]
        self._take_attention(self.pool, theirs.attn_pool)
        for block, (attention, mlp) in zip(self.encoder.blocks, theirs.transformer.layers, strict=True):
            self._take_attention(block.attention, attention)
            pairs += [(block.attention_residual.norm, attention.norm), (block.feed_forward_residual.norm, mlp[0])]
            pairs += [(block.feed_forward.up, mlp[1]), (block.feed_forward.down, mlp[4])]
        with torch.no_grad():
            for mine, other in pairs:
                for a, b in zip(mine.parameters(), other.parameters(), strict=True):
                    a.copy_(b)

    @torch.no_grad()
    def _take_attention(self, mine: xf.Attention, other: Any) -> None:
        mine.qkv.weight.copy_(torch.cat([other.to_q.weight, other.to_kv.weight]))
        mine.out.weight.copy_(other.to_out[0].weight)
        for norm, factor in (
            (mine.query_norm, mine.head_dim**0.5),
            (mine.key_norm, 1.0),
        ):  # theirs are not divided by it
            nn.init.constant_(norm.weight, factor)  # type: ignore[arg-type]

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        patches = [
            image.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
            for image in images
        ]
        domain = packed_grid(images)
        x = self.encoder(self.patches(torch.cat(patches)), domain)
        queries = xf.Sequence.packed(torch.ones(len(images), dtype=torch.long, device=x.device))
        latent = self.query.expand(len(images), -1)
        return self.head(latent + self.pool(self.query_norm(latent), queries, context=x, context_domain=domain))


def against_navit(setting: Setting, train: bool, grouped: bool) -> Work:
    """NaViT that puts images into rows of at most 2,048 patches, or as it is called without options: all of them into one row."""
    from vit_pytorch.na_vit import NaViT

    dim, depth, heads = setting.size(192, 48), setting.size(DEPTH, 1), 3
    torch.manual_seed(0)
    theirs = NaViT(
        image_size=384, patch_size=PATCH, num_classes=CLASSES, dim=dim, depth=depth, heads=heads, mlp_dim=4 * dim,
        dim_head=dim // heads,
    ).to(setting.device, setting.dtype).eval()  # fmt: skip
    images = mixed(setting)
    ours = Packed(theirs, dim, depth, heads).to(setting.device, setting.dtype).eval()
    kernel = xf.plan(None, packed_grid(images), head_dim=64, dtype=setting.dtype, device=setting.device).kernel
    return Work(*sides(setting, ours, theirs, train, images, (images, grouped), NAVIT), kernel, 0.0, 0.0)


def lines(name: str, what: str, peer: str, build: Callable[..., Work], faster: float) -> tuple[Line, Line]:
    """A step of training, and the forward alone."""
    train, alone = partial(build, train=True), partial(build, train=False)
    return (
        Line(name, what, peer, train, Target(faster=faster)),
        Line(f"{name}-forward", "the same, forward alone", peer, alone, Target(faster=faster)),
    )


RELPOS, BEIT = "vit_relpos_small_patch16_224", "beit_base_patch16_224"
LINES = (
    *lines("vit-tiny", "ViT-Ti, 8 images of 224 x 224", "timm", partial(vit, name="vit_tiny_patch16_224"), 1),
    *lines("vit-small", "ViT-S, the same images", "timm", partial(vit, name="vit_small_patch16_224"), 1),
    Line(
        "vit-many", "ViT-S, 32 images, training step", "timm", partial(vit, name="vit_small_patch16_224", train=True, images=32),
        Target(faster=1),
    ),
    *lines("vit-rotary", "ViT-S, axial rotary positions", "timm", partial(vit, name="vit_small_patch16_rope_224"), 1),
    *lines("vit-table", "ViT-S, a bias table in each block (BEiT)", "timm", partial(vit, name=BEIT, embed_dim=384, num_heads=6), 1.1),
    *lines("vit-network", "ViT-S, a bias network in each block", "timm", partial(vit, name=RELPOS), 1.1),
    *lines("swin-tiny", "Swin-T, 8 images of 224 x 224", "timm", partial(swin, name="swin_tiny_patch4_window7_224", window=7), 1.2),
    *lines("swin2-tiny", "Swin v2-T, 8 images of 256 x 256", "timm", partial(swin, name="swinv2_tiny_window8_256", window=8), 1.5),
    *lines("mixed-sizes", "64 images of 64 to 384 pixels a side, 4 blocks of ViT-Ti", "timm, padded, attn_mask", packed_and_padded, 2),
    *lines("mixed-sizes-navit", "the same images, NaViT", "vit-pytorch, group_images=True", partial(against_navit, grouped=True), 8),
    Line(
        "mixed-sizes-navit-default", "the same, forward alone", "vit-pytorch, its default: one row of all images",
        partial(against_navit, grouped=False, train=False), Target(faster=8),
    ),
)  # fmt: skip
