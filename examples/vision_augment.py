"""What training sees of images: cropped, flipped and altered, as whole batches on the device, or one by one with timm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augment:
    """How training images are altered.

    Attributes:
        size: pixels on each side that the model sees.
        shift: a batch is shifted by up to so many pixels, each image by its own number.
        flip: whether every second image, at random, is mirrored.
        magnitude: of RandAugment (Cubuk et al. 2019, arXiv:1909.13719), from 0 (none) to 10.
        erase: probability of random erasing (Zhong et al. 2017, arXiv:1708.04896).
        mean, std: of the training images' channels, which are scaled to 0 and 1.
    """

    size: int
    shift: int
    flip: bool
    magnitude: int
    erase: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """A batch of training images with values from 0 to 1, altered and scaled."""
        images = flipped(shifted(images, self.shift), self.flip)
        if self.magnitude:
            images = rand_augment(images, self.magnitude)
        return erased(self.normalised(images), self.erase)

    def normalised(self, images: Tensor) -> Tensor:
        """A batch, scaled."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def timm(self, train: bool) -> Callable[[Any], Tensor]:
        """What timm makes of one image: in training a random part of it, resized; else its middle."""
        from timm.data.transforms_factory import create_transform

        return create_transform(
            self.size,
            is_training=train,
            hflip=0.5 if self.flip else 0.0,
            auto_augment=f"rand-m{self.magnitude}-mstd0.5-inc1" if self.magnitude else None,
            re_prob=self.erase,
            re_mode="pixel",
            interpolation="bicubic",
            mean=self.mean,
            std=self.std,
        )


def shifted(images: Tensor, most: int) -> Tensor:
    """Each image moved by up to ``most`` pixels on each axis, 0 where it has left: a random crop of the padded image."""
    if not most:
        return images
    count, _, height, width = images.shape
    padded = F.pad(images, (most, most, most, most))
    top, left = torch.randint(2 * most + 1, (2, count, 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=images.device))[:, None, None, :]
    items = torch.arange(count, device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return padded[items, channels, rows, columns]


def flipped(images: Tensor, flip: bool) -> Tensor:
    """Every second image, at random, mirrored left to right."""
    if not flip:
        return images
    return torch.where(_coin(images, 0.5), images.flip(-1), images)


def erased(images: Tensor, probability: float) -> Tensor:
    """A rectangle of each image, of 2 to 33 % of it, replaced by noise, with a probability."""
    if not probability:
        return images
    count, _, height, width = images.shape
    area = torch.empty(count, device=images.device).uniform_(0.02, 1 / 3)
    aspect = torch.empty_like(area).uniform_(math.log(0.3), math.log(1 / 0.3)).exp()
    inside = torch.ones(count, 1, 1, 1, dtype=torch.bool, device=images.device)
    for size, share, axis in ((height, (area * aspect).sqrt(), 2), (width, (area / aspect).sqrt(), 3)):
        length = (share.clamp(max=1) * size).round()
        start = (torch.rand_like(length) * (size - length + 1)).floor()
        place = torch.arange(size, device=images.device).view([-1 if a == axis else 1 for a in range(4)])
        start, length = start.view(-1, 1, 1, 1), length.view(-1, 1, 1, 1)
        inside = inside & (place >= start) & (place < start + length)
    return torch.where(inside & _coin(images, probability), torch.randn_like(images), images)


def rand_augment(images: Tensor, magnitude: int, changes: int = 2) -> Tensor:
    """Each image changed twice, each time in one of twelve ways of about the same strength, with values from 0 to 1.

    RandAugment for a whole batch: the changes of its paper but equalisation, which has no short form for batches.
    """
    for _ in range(changes):
        strength = magnitude / 10 + 0.05 * torch.randn(len(images), device=images.device)  # as mstd0.5 in timm
        strength = strength.clamp(0, 1)
        way = torch.randint(12, (len(images),), device=images.device)
        images = _coloured(_moved(images, way, strength), way - 5, strength)
    return images


def _moved(images: Tensor, way: Tensor, strength: Tensor) -> Tensor:
    """Ways 0 to 4: turned (30 degrees at most), sheared (0.3) or moved (0.45) along either axis. Grey where nothing is."""
    signed = torch.where(torch.rand_like(strength) < 0.5, -strength, strength)
    angle = torch.where(way == 0, signed * math.pi / 6, 0)
    matrix = torch.zeros(len(images), 2, 3, device=images.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 0, 1] = torch.where(way == 1, 0.3 * signed, angle.sin())
    matrix[:, 1, 0] = torch.where(way == 2, 0.3 * signed, -angle.sin())
    matrix[:, 0, 2] = torch.where(way == 3, 0.9 * signed, 0)  # in halves of the width
    matrix[:, 1, 2] = torch.where(way == 4, 0.9 * signed, 0)
    places = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 0.5, places, align_corners=False) + 0.5
    return torch.where((way < 5).view(-1, 1, 1, 1), moved, images)


def _coloured(images: Tensor, way: Tensor, strength: Tensor) -> Tensor:
    """Ways 0 to 6: brightness, contrast, colour, sharpness, solarised, posterised, stretched to the whole range."""
    strength, way = strength.view(-1, 1, 1, 1), way.view(-1, 1, 1, 1)
    factor = 1 + 0.9 * torch.where(_coin(images, 0.5), -strength, strength)
    grey = images.mean(1, keepdim=True)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    levels = 2 ** (8 - (4 * strength).round())
    results = (
        factor * images,
        grey.mean((2, 3), keepdim=True).lerp(images, factor),
        grey.lerp(images, factor),
        F.avg_pool2d(images, 3, 1, 1, count_include_pad=False).lerp(images, factor),
        torch.where(images >= 1 - strength, 1 - images, images),
        (images * levels).floor().clamp(max=levels - 1) / (levels - 1),
        (images - low) / (high - low).clamp(min=1 / 255),
    )
    for index, result in enumerate(results):
        images = torch.where(way == index, result.clamp(0, 1), images)
    return images


def _coin(images: Tensor, probability: float) -> Tensor:
    """True for some of the images, at random, in a shape that fits them."""
    return torch.rand(len(images), 1, 1, 1, device=images.device) < probability
