"""Images cut into tokens: linear patches and convolutional stems, for signals, images, volumes and videos."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import Size
from .._projection import check_dtype
from .._recorded import Recorded
from .._sublayers import NormLayer, norm_factory

Images = Tensor | SequenceOf[Tensor]


class Tokenizer(Recorded, ABC):
    """What makes a grid of tokens of an image. Its result has the grid's sizes as axes: nothing is guessed from a number of tokens.

    Attributes:
        channels, dim: of an image, and of a token.
        ndim: axes of an image: 1 for signals, 2 for images, 3 for volumes and videos.
    """

    channels: int
    dim: int
    ndim: int

    def sizes(self, x: Tensor, batched: bool) -> tuple[int, ...]:
        """The sizes of an image, or of each in a batch, checked."""
        self.check(x, batched)
        return tuple(x.shape[1 + batched :])

    @abstractmethod
    def grid(self, sizes: SequenceOf[int]) -> tuple[int, ...]:
        """The grid of an image of these sizes, or an error where there is none."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch channels *sizes"]) -> Float[Tensor, "batch *grid dim"]:
        """Tokens of a batch of images of one size."""

    def packed(self, images: SequenceOf[Float[Tensor, "channels ..."]]) -> Float[Tensor, "tokens dim"]:
        """Tokens of images of any sizes, one image behind the other, row-major in each. Images of one size go together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(tuple(image.shape), []).append(index)
        tokens: list[Tensor] = [images[0]] * len(images)
        for group in groups.values():
            for index, x in zip(group, self(torch.stack([images[index] for index in group])), strict=True):
                tokens[index] = x.flatten(0, -2)
        return torch.cat(tokens)

    def check(self, x: Tensor, batched: bool) -> None:
        """Raise unless ``x`` is an image, or a batch of images, of the right channels and axes."""
        if not isinstance(x, Tensor):
            raise TypeError(f"images x must be a floating-point tensor; got {type(x).__name__}")
        if x.is_nested:
            raise TypeError("images must not be a nested tensor; give a list of images, list(images.unbind())")
        shape = x.shape[1:] if batched else x.shape
        if not x.is_floating_point():
            raise TypeError(
                f"images must be of a floating dtype, with values around 0; got {x.dtype} as x. Divide by 255 first."
            )
        if x.ndim != self.ndim + 1 + batched or shape[0] != self.channels:
            axes = ", ".join([*["batch"] * batched, str(self.channels), *("depth", "height", "width")[3 - self.ndim :]])
            hints = {
                -1: " Add the batch axis, images[None]." if batched else "",
                1: "" if batched else " A list holds images one by one.",
            }
            missing = self.ndim + 1 + batched - x.ndim
            hint = hints.get(-missing, "")
            if batched and missing == 1 and shape[0] == self.channels and x.shape[0] != self.channels:
                hint = f" The batch is there, but an axis of the images is not: they have {self.ndim}."
            raise ValueError(f"images must be ({axes}); got {tuple(x.shape)} as x.{hint}")


class PatchEmbed(Tokenizer):
    """Each patch is a token: ``W vec(patch) + b`` (ViT, Dosovitskiy et al. 2020, arXiv:2010.11929).

    With three sizes a patch is a block of a volume, or a tubelet of a video (ViViT, Arnab et al. 2021, arXiv:2103.15691); with one, a
    stretch of a signal.

    Args:
        dim: channels of a token.
        patch: size of a patch on each axis; one number is that of a square.
        channels: of an image.
        bias: b above.
        norm: a norm of the tokens.

    Weights:
        ``proj.weight`` (dim, channels * patch), each row the row-major weights of a convolution.

    Shapes:
        ``forward(x)``: x (B, channels, *sizes), each size a multiple of the patch's; returns (B, *grid, dim).

    Example:
        >>> PatchEmbed(8, (2, 16, 16))(torch.randn(1, 3, 4, 32, 48)).shape
        torch.Size([1, 2, 2, 3, 8])
        >>> PatchEmbed(8, (10,), channels=1)(torch.randn(1, 1, 100)).shape
        torch.Size([1, 10, 8])
    """

    def __init__(
        self,
        dim: Size,
        patch: int | SequenceOf[int] = 16,
        *,
        channels: Size = 3,
        bias: bool = True,
        norm: NormLayer | None = None,
    ) -> None:
        super().__init__()
        self.patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        if not 1 <= len(self.patch) <= 3 or any(size < 1 for size in self.patch):
            raise ValueError(f"patch must be one size >= 1 for each of 1 to 3 axes; got patch={patch}")
        self.dim, self.channels, self.ndim = dim, channels, len(self.patch)
        self.proj = nn.Linear(channels * math.prod(self.patch), dim, bias=bias)
        self.norm = nn.Identity() if norm is None else norm_factory(norm, "norm")(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        draw_linear(self.proj)

    def grid(self, sizes: SequenceOf[int]) -> tuple[int, ...]:
        if len(sizes) != self.ndim or any(size % patch for size, patch in zip(sizes, self.patch, strict=True)):
            raise ValueError(
                f"the sizes of an image must be multiples of patch={self.patch}; got {tuple(sizes)}. Resize, crop or pad it."
            )
        return tuple(size // patch for size, patch in zip(sizes, self.patch, strict=True))

    def forward(self, x: Float[Tensor, "batch channels *sizes"]) -> Float[Tensor, "batch *grid dim"]:
        self.check(x, batched=True)
        check_dtype("images", x, self.proj)
        self.grid(x.shape[2:])
        return self.norm(self.proj(self._patches(x)))

    def packed(self, images: SequenceOf[Float[Tensor, "channels ..."]]) -> Float[Tensor, "tokens dim"]:
        for image in images:
            self.check(image, batched=False)
            check_dtype("images", image, self.proj)
            self.grid(image.shape[1:])
        patches = torch.cat([self._patches(image[None]).flatten(0, -2) for image in images])
        return self.norm(self.proj(patches))

    def _patches(self, x: Tensor) -> Tensor:
        """(B, C, *sizes) to (B, *grid, C * patch)."""
        for axis, size in enumerate(self.patch):
            x = x.unflatten(2 + 2 * axis, (-1, size))  # B, C, grid, patch, grid, patch, ...
        axes = range(self.ndim)
        x = x.permute(0, *(2 + 2 * axis for axis in axes), 1, *(3 + 2 * axis for axis in axes))
        return x.flatten(-self.ndim - 1)

    def extra_repr(self) -> str:
        return f"{self.dim}, patch={self.patch}, channels={self.channels}"


class ConvStem(Tokenizer):
    """Convolutions instead of patches: neighbouring tokens share pixels, which helps where there is little data.

        x <- max_pool_3/2(relu(conv(x)))     ``layers`` times; a token is what is left at a place

    The tokenizer of the compact convolutional Transformer (Hassani et al. 2021, arXiv:2104.05704).

    Args:
        dim: channels of a token.
        layers: convolutions.
        kernel: size of a convolution, odd.
        stride: of the convolutions.
        pool: whether each is followed by a maximum over 3 places with stride 2.
        hidden: channels between the convolutions.
        channels: of an image.
        ndim: axes of an image.

    Example:
        >>> ConvStem(8)(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 16, 16, 8])
    """

    def __init__(
        self,
        dim: Size,
        *,
        layers: Size = 1,
        kernel: Size = 3,
        stride: Size = 1,
        pool: bool = True,
        hidden: Size = 64,
        channels: Size = 3,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        if ndim not in (1, 2, 3):
            raise ValueError(f"ndim must be 1, 2 or 3; got ndim={ndim}")
        if layers < 1 or kernel < 1 or kernel % 2 == 0 or stride < 1:
            raise ValueError(
                f"layers and stride must be >= 1, and kernel odd; got layers={layers}, stride={stride}, kernel={kernel}"
            )
        self.dim, self.channels, self.ndim, self.pool = dim, channels, ndim, pool
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
        widths = [channels, *[hidden] * (layers - 1), dim]
        self.convolutions = nn.ModuleList(
            conv(a, b, kernel, stride, kernel // 2, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.kernel, self.stride = kernel, stride
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (He et al. 2015, arXiv:1502.01852)."""
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight)  # type: ignore[arg-type]

    def grid(self, sizes: SequenceOf[int]) -> tuple[int, ...]:
        for _ in self.convolutions:
            sizes = [(size - 1) // self.stride + 1 for size in sizes]
            sizes = [(size - 1) // 2 + 1 for size in sizes] if self.pool else sizes
        return tuple(sizes)

    def forward(self, x: Float[Tensor, "batch channels *sizes"]) -> Float[Tensor, "batch *grid dim"]:
        self.check(x, batched=True)
        check_dtype("images", x, self.convolutions[0])
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[self.ndim - 1]
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
            x = pool(x, 3, 2, 1) if self.pool else x
        return x.movedim(1, -1)


def check_list(images: SequenceOf[Tensor], valid: Tensor | None) -> None:
    """Raise unless these are images in a list, which need no ``valid``."""
    if not isinstance(images, (list, tuple)) or not images or not all(isinstance(x, Tensor) for x in images):
        raise TypeError(f"images must be a tensor, or a list of at least one tensor; got {type(images).__name__}")
    if valid is not None:
        raise ValueError("valid is for a batch of images; in a list each image has the size that it has")


def draw_linear(module: nn.Module) -> None:
    """Draw a linear map anew as Vision Transformers do: truncated normal of std 0.02, bias 0. Other modules stay as they are."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
