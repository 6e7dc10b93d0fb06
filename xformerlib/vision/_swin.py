"""Hierarchical Vision Transformers with shifted windows: Swin, versions 1 and 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence as SequenceOf
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Positive, Rate, Size
from .._dropout import Dropout
from .._inputs import place, rates_of_layers
from .._options import SwinOptions
from .._pooling import Pooling
from .._recorded import Recorded
from .._sublayers import NormLayer, Residual, norm_factory
from ..blocks import Encoder
from ..domains import Grid
from ..masks import Windows
from ..positions import ContinuousBias, Position, RelativeBias
from ._classifier import Classifier
from ._kept import Features
from ._patches import Images, PatchEmbed, check_list, draw_linear
from ._tokens import places_among, tokens_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Window = int | tuple[int, int]


class PatchMerging(Recorded):
    """Each 2 x 2 patches become one, of twice the channels; the grid of an odd side is completed by zeros.

        y = W norm([x_00, x_10, x_01, x_11])     ``norm="pre"``, Swin
        y = norm(W [x_00, x_10, x_01, x_11])     ``norm="res-post"``, Swin v2

    Args:
        dim, out_dim: channels before and after.
        norm: where the norm stands.
        norm_layer: as in ``Block``.

    Shapes:
        ``forward(x, domain)``: x (B, T, dim), or (N, dim) of a packed grid; returns ``Features`` of half the height and width.

    Example:
        >>> PatchMerging(8, 16)(torch.randn(2, 35, 8), Grid(5, 7)).domain
        Grid(3, 4)
    """

    def __init__(
        self,
        dim: Size,
        out_dim: Size,
        *,
        norm: Literal["pre", "res-post"] = "pre",
        norm_layer: NormLayer = "layer",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        make = norm_factory(norm_layer)
        self.norm = make(4 * dim) if norm == "pre" else nn.Identity()
        self.out_norm = nn.Identity() if norm == "pre" else make(out_dim)

    def forward(self, x: Float[Tensor, "*batch tokens dim"], domain: Grid) -> Features:
        place("x", x, self.dim, domain)
        if domain.prefix or domain.ndim != 2:
            raise ValueError(f"domain must be a Grid of two axes without prefix; got {domain!r}")
        x = domain.zero_padding(x)
        if domain.offsets is None:
            merged, half = _merged(x, domain.sizes), _halved(domain)
        else:
            items = x.split([math.prod(size) for size in domain.size_of_items])
            merged = torch.cat([_merged(item, size) for item, size in zip(items, domain.size_of_items, strict=True)])
            half = Grid.packed([_half(size) for size in domain.size_of_items]).to(x.device)
        return Features(half.zero_padding(self.out_norm(self.reduction(self.norm(merged)))), half)


class Swin(Classifier):
    """Swin Transformer (Liu et al. 2021, arXiv:2103.14030) and, with ``version=2``, Swin v2 (Liu et al. 2021, arXiv:2111.09883).

    A Vision Transformer in stages, each on half the height and width of the one before: an ``Encoder`` whose blocks attend within
    ``masks.Windows(window)`` and within windows shifted by half their size, in turns; no shift along an axis on which one window
    covers the grid.

        version   position                                   attention    blocks
        1         ``RelativeBias`` of each block             q . k        ``norm="pre"``
        2         ``ContinuousBias`` of each block           cosine       ``norm="res-post"``

    An image may be of another size at each call, any multiple of ``patch``: windows at the rim are smaller. A list of images of
    different sizes is packed, without padding, and gives what each image gives alone. Patches that are not ``valid`` do not exist.

    Args:
        classes: logits; None for a model whose output is the pooled vector.
        patch: size of a patch.
        window: size of windows, one number (square) or (height, width); or a list of one of these for each stage.
        channels: of an image.
        dim: channels of the first stage, twice as many in each later one.
        depths, heads: blocks and attention heads of each stage. The defaults are Swin-T.
        version: 1 or 2.
        pretrained_window: the window that a network of version 2 was trained on, whose scale of offsets it keeps; as ``window``.
        mlp_ratio: hidden channels of feed-forward layers, over channels.
        drop_path: rate of the last block of all; it rises linearly from 0 at the first. Or a list of one for each.
        dropout, head_dropout: in blocks, before the head.
        pool: what the head sees of all tokens, as in ``Pooling``.
        norm_layer, **encoder: further arguments of ``Encoder`` and ``Block``: qkv_bias, activation, checkpoint, ...

    Shapes:
        images (B, channels, height, width), or a list of (channels, height, width); ``valid`` (B, height / patch, width / patch).
        Returns (B, classes).

    Example:
        >>> model = Swin(10, window=4, dim=16, depths=(2, 2), heads=(2, 4))
        >>> model(torch.randn(2, 3, 32, 48)).shape
        torch.Size([2, 10])
        >>> model([torch.randn(3, 32, 64), torch.randn(3, 20, 8)]).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: Size | None,
        *,
        patch: Size | SequenceOf[Size] = 4,
        window: Window | list[Window] = 7,
        channels: Size = 3,
        dim: Size = 96,
        depths: SequenceOf[Size] = (2, 2, 6, 2),
        heads: SequenceOf[Size] = (3, 6, 12, 24),
        version: Literal[1, 2] = 1,
        pretrained_window: Window | list[Window] | None = None,
        mlp_ratio: Positive = 4.0,
        drop_path: Rate | SequenceOf[Rate] = 0.0,
        dropout: Rate = 0.0,
        head_dropout: Rate = 0.0,
        pool: Literal["mean", "max", "mean-max"] = "mean",
        norm_layer: NormLayer = "layer",
        **encoder: Unpack[SwinOptions],
    ) -> None:
        super().__init__()
        _check_version(version, pretrained_window)
        if len(depths) != len(heads) or not depths:
            raise ValueError(f"depths and heads must have one number for each stage; got {depths} and {heads}")
        self.version = version
        self.windows = _of_stages("window", window, len(depths))
        trained = (
            self.windows
            if pretrained_window is None
            else _of_stages("pretrained_window", pretrained_window, len(depths))
        )
        widths = [dim * 2**stage for stage in range(len(depths))]
        rates = rates_of_layers(drop_path, sum(depths))
        ends = [0, *accumulate(depths)]
        norm: Literal["pre", "res-post"] = "pre" if version == 1 else "res-post"
        options: dict[str, Any] = {
            "norm": norm,
            "norm_layer": norm_layer,
            "dropout": dropout,
            "final_norm": False,
            **encoder,
        }
        if version == 2:
            options.setdefault("qk_norm", "cosine")
        self.embed = PatchEmbed(dim, patch, channels=channels, norm=norm_layer)
        self.merges = nn.ModuleList(PatchMerging(a, b, norm=norm, norm_layer=norm_layer) for a, b in pairwise(widths))
        self.stages = nn.ModuleList(
            Encoder(
                widths[stage], depths[stage], heads[stage], hidden=int(mlp_ratio * widths[stage]),
                position=_position(version, heads[stage], self.windows[stage], trained[stage]),
                drop_path=rates[ends[stage] : ends[stage + 1]], **options,
            )
            for stage in range(len(depths))
        )  # fmt: skip
        self.norm = norm_factory(norm_layer)(widths[-1])
        self.pool, self.head_dropout = Pooling(widths[-1], pool), Dropout(head_dropout)
        self.head = nn.Identity() if classes is None else nn.Linear(widths[-1], classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw linear maps anew, truncated normal of std 0.02, biases 0; in version 2 every block begins as the identity."""
        for module in self.modules():
            draw_linear(module)
            if self.version == 2 and isinstance(module, Residual) and module.branch_norm is not None:
                nn.init.zeros_(module.branch_norm.weight)  # type: ignore[arg-type]

    def forward(
        self, images: Images, valid: Bool[Tensor, "batch *grid"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """The logits of each image."""
        return self.head(self.head_dropout(self.pooled(self.features(images, valid=valid))))

    def features(self, images: Images, *, valid: Bool[Tensor, "batch *grid"] | None = None) -> Features:
        """The tokens after the last stage and norm."""
        x, domain = self.intermediates(images, [-1], valid=valid)[0]
        return Features(domain.zero_padding(self.norm(x)), domain)

    def forward_features(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        """The tokens of ``features`` by row and column of the grid, as timm has them."""
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a tensor; got {type(images).__name__}. Of a list of images: features(images)."
            )
        x, domain = self.features(images)
        return x.unflatten(1, domain.sizes)  # type: ignore[union-attr]

    def forward_head(
        self, x: Float[Tensor, "batch *tokens dim"] | Features, pre_logits: bool = False
    ) -> Float[Tensor, "batch classes"]:
        """The logits of ``forward_features`` or ``features``; with ``pre_logits`` the vector that the head sees."""
        return super().forward_head(x if isinstance(x, Features) else x.flatten(1, -2), pre_logits)

    def _heads(self) -> list[str]:
        return ["head"]

    def pooled(self, features: Features) -> Float[Tensor, "batch dim"]:
        """One vector for each image, which the head sees."""
        return self.pool(*features)

    def intermediates(
        self,
        images: Images,
        stages: SequenceOf[int] | None = None,
        *,
        valid: Bool[Tensor, "batch *grid"] | None = None,
    ) -> list[Features]:
        """The tokens after each of ``stages`` (from 0, negative from the end; all if not given), for heads of dense tasks.

        ``maps`` makes a map of the tokens, for each image.
        """
        asked = places_among("stages", "stages", stages, len(self.stages))
        if isinstance(images, Tensor):
            found = self._run(*tokens_of(self.embed, images, valid), asked)  # type: ignore[arg-type]
        else:
            check_list(images, valid)
            found = self._run_list(images, asked)
        return [found[stage] for stage in asked]

    def _run_list(self, images: SequenceOf[Tensor], asked: SequenceOf[int]) -> dict[int, Features]:
        """Images whose windows shift alike are packed together."""
        grids = [self.embed.grid(image.shape[1:]) for image in images]
        groups: dict[object, list[int]] = {}
        for index, grid in enumerate(grids):
            groups.setdefault(self._shifts(grid), []).append(index)
        runs = []
        for group in groups.values():
            tokens = tokens_of(self.embed, [images[index] for index in group])
            runs.append(self._run(tokens.tokens, tokens.grid, asked))
        order = [index for group in groups.values() for index in group]
        return {stage: _in_order([run[stage] for run in runs], order) for stage in asked}

    def _run(self, x: Tensor, domain: Grid, asked: SequenceOf[int]) -> dict[int, Features]:
        shifts, found = self._shifts(domain.size_of_items[0]), {}
        for stage in range(max(asked) + 1):
            if stage:
                x, domain = self.merges[stage - 1](x, domain)
            encoder, size = self.stages[stage], self.windows[stage]
            turns = (Windows(size), Windows(size, shift=shifts[stage]))
            x = encoder(x, domain, mask=[turns[block % 2] for block in range(len(encoder.blocks))])  # type: ignore[arg-type]
            if stage in asked:
                found[stage] = Features(x, domain)
        return found

    def _shifts(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """How far the windows of every second block are shifted in each stage: not along an axis that one window covers."""
        shifts = []
        for window in self.windows:
            shifts.append(tuple(w // 2 if size > w else 0 for size, w in zip(grid, window, strict=True)))
            grid = _half(grid)
        return tuple(shifts)


def _check_version(version: int, pretrained_window: object) -> None:
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2; got version={version!r}")
    if version == 1 and pretrained_window is not None:
        raise ValueError("pretrained_window is for version=2: the table of version 1 counts whole steps. Leave it out")


def _position(version: int, heads: int, window: tuple[int, ...], trained: tuple[int, ...]) -> Callable[[], Position]:
    """What makes the position of each block."""
    if version == 1:
        return partial(RelativeBias, heads, size=window)
    scale = tuple(8 / max(size - 1, 1) for size in trained)
    return partial(ContinuousBias, heads, axes=len(window), size=window, scale=scale)


def _of_stages(name: str, given: Window | list[Window], stages: int) -> tuple[tuple[int, int], ...]:
    """(height, width) for each stage, of one number, a pair, or a list of these."""
    each = given if isinstance(given, list) else [given] * stages
    sizes = tuple((size, size) if isinstance(size, int) else size for size in each)
    if len(sizes) != stages or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(
            f"{name} must be a size >= 1, a tuple (height, width), or a list of these for each of {stages} stages; got {given}"
        )
    return sizes


def _half(size: SequenceOf[int]) -> tuple[int, ...]:
    return tuple((n + 1) // 2 for n in size)


def _halved(domain: Grid) -> Grid:
    """The grid of merged tokens; one exists where one of its four does."""
    if domain.valid is None:
        return Grid(*_half(domain.sizes))
    valid = _completed(domain.valid.unflatten(1, domain.sizes)[..., None])
    return Grid(*_half(domain.sizes), valid=valid.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).any(4).any(2)[..., 0])


def _completed(x: Shaped[Tensor, "*batch height width dim"]) -> Shaped[Tensor, "*batch even_height even_width dim"]:
    """With a row or column of zeros where a side is odd."""
    height, width = x.shape[-3:-1]
    return F.pad(x, (0, 0, 0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x


def _merged(x: Float[Tensor, "*batch tokens dim"], size: tuple[int, ...]) -> Float[Tensor, "*batch quarter four_dim"]:
    """Four tokens one behind the other, column by column as in the published models."""
    x = _completed(x.unflatten(-2, size)).unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2))  # ..., h, 2, w, 2, dim
    return x.movedim(-4, -2).flatten(-3).flatten(-3, -2)


def _in_order(runs: SequenceOf[Features], order: SequenceOf[int]) -> Features:
    """One pack of items in the order that they were asked for."""
    if len(runs) == 1:
        return runs[0]
    sizes = [size for run in runs for size in run.grid.size_of_items]
    tokens = [item for run in runs for item in run.tokens.split([math.prod(n) for n in run.grid.size_of_items])]
    back = sorted(range(len(order)), key=order.__getitem__)
    domain = Grid.packed([sizes[index] for index in back]).to(tokens[0].device)
    return Features(torch.cat([tokens[index] for index in back]), domain)
