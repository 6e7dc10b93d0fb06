"""From images to tokens, for models of every kind."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..domains import Grid
from ._kept import Features
from ._patches import Images, Tokenizer, check_list


def tokens_of(
    embed: Tokenizer,
    images: Images,
    valid: Bool[Tensor, "batch *grid"] | None = None,
    front: Float[Tensor, "prefix dim"] | None = None,
) -> Features:
    """The tokens of a batch of images, or of a list of them, packed; in front of those of each image the same ``front``."""
    prefix = 0 if front is None else len(front)
    if isinstance(images, Tensor):
        if valid is not None and not isinstance(valid, Tensor):
            raise TypeError(f"valid must be a bool tensor, True where a patch exists; got {type(valid).__name__}")
        domain = Grid(*embed.grid(embed.sizes(images, True)), prefix=prefix, valid=valid)
        x = embed(images if valid is None else without_holes(images, valid)).flatten(1, -2)
        if front is not None:
            x = torch.cat([front.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
        return Features(domain.zero_padding(x), domain)
    check_list(images, valid)
    grids = [embed.grid(embed.sizes(image, False)) for image in images]
    x = embed.packed(images)
    if front is not None:
        front = front.to(x.dtype)
        x = torch.cat([part for image in x.split([math.prod(grid) for grid in grids]) for part in (front, image)])
    return Features(x, Grid.packed(grids, prefix=prefix).to(x.device))


def without_holes(images: Tensor, valid: Bool[Tensor, "batch *grid"]) -> Tensor:
    """Images with 0 in the patches that do not exist, whatever stood there."""
    for axis, size in enumerate(images.shape[2:], 1):
        patch = torch.arange(size, device=valid.device) * valid.shape[axis] // size
        valid = valid.index_select(axis, patch)
    return images.masked_fill(~valid[:, None], 0)


def places_among(name: str, what: str, given: SequenceOf[int] | None, depth: int) -> list[int]:
    """Which of ``depth`` layers or stages are asked for, counted from the front: all, or indices that may count from the end."""
    if given is not None and not (isinstance(given, SequenceOf) and all(isinstance(index, int) for index in given)):
        raise TypeError(f"{name} must be a list of indices of the {depth} {what}; got {given!r}")
    asked = list(range(depth)) if given is None else [index + depth * (index < 0) for index in given]
    if not asked or min(asked) < 0 or max(asked) >= depth:
        raise ValueError(f"{name} must be indices of the {depth} {what}; got {given}")
    return asked
