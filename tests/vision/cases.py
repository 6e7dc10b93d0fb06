"""What models of images are tested by, whatever their kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.closeness import assert_close


def redrawn(model: Any) -> Any:
    """The model in evaluation, its parameters drawn anew: at initialisation many parts have no share in the output."""
    model = model.eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(3, *size) for size in sizes]


def assert_only_valid_patches_count(model: nn.Module, grid: tuple[int, int], patch: int) -> None:
    """Whatever stands in patches that are not valid: the same output and gradients, which are not those of the whole images."""
    model.train()
    x = torch.randn(2, 3, grid[0] * patch, grid[1] * patch)
    valid = torch.ones(2, *grid, dtype=torch.bool)
    valid[0, :, 3] = valid[1, 2:] = False
    other = torch.where(valid.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None], x, torch.nan)
    results = []
    for content in (x, other):
        model.zero_grad()
        y = model(content, valid=valid)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert float((model(x) - results[0][0]).detach().abs().max()) > 1e-4


def assert_a_padded_rim_does_not_count(
    model: nn.Module, grid: tuple[int, int], more: tuple[int, int], patch: int, depth: int
) -> None:
    """An image with patches added below and beside it that are not valid gives what it gives without."""
    small = torch.randn(1, 3, grid[0] * patch, grid[1] * patch)
    valid = torch.ones(1, *grid, dtype=torch.bool)
    padded = nn.functional.pad(small, (0, more[1] * patch, 0, more[0] * patch), value=7.0)
    valid = nn.functional.pad(valid, (0, more[1], 0, more[0]))
    assert_close(model(padded, valid=valid), model(small), depth=depth)
