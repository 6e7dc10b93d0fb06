"""Patches left out at random: for training at less cost, and for models that learn to restore them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._arguments import Rate, shown
from .._recorded import Recorded
from ..domains import Grid, Subset


class Features(NamedTuple):
    """Tokens and where they live.

    Attributes:
        tokens: (B, prefix + grid, dim), or (N, dim) of a list of images, one behind the other.
        domain: a ``Grid``, packed for a list of images; a ``Subset`` of it where patches were left out.
    """

    tokens: Float[Tensor, "*batch tokens dim"]
    domain: Grid | Subset

    @property
    def maps(self) -> Float[Tensor, "batch dim *grid"] | list[Float[Tensor, "dim *grid"]]:
        """The tokens of patches as a map for each image, without those in front."""
        tokens, domain = self.tokens, self.grid
        if domain.offsets is None:
            return tokens[:, domain.prefix :].unflatten(1, domain.sizes).movedim(-1, 1)
        images = tokens.tensor_split(domain.offsets[1:-1].cpu())
        return [
            image[domain.prefix :].unflatten(0, size).movedim(-1, 0)
            for image, size in zip(images, domain.size_of_items, strict=True)
        ]

    @property
    def grid(self) -> Grid:
        """The domain, if no patch was left out.

        Raises:
            ValueError: patches were left out, so that there is no map of them.
        """
        if not isinstance(self.domain, Grid):
            raise ValueError(
                f"maps need every patch, and some were left out: {self.domain!r}. Call eval(), or set patch_dropout=0."
            )
        return self.domain

    def kept(self, index: Int[Tensor, "*batch kept"]) -> Features:
        """The tokens ``index`` alone, as drawn by ``random_tokens``: not checked."""
        x = self.tokens
        tokens = x[index] if index.ndim == 1 else x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        return Features(tokens, Subset.of(self.domain, index))


class PatchDropout(Recorded):
    """In training, keep only some of the patches of each image, drawn anew at each call (FLIP, Li et al. 2022, arXiv:2212.00794).

    Of n patches n (1 - share) rounded down, but at least one; patches that are not valid are not counted. The tokens in front of them
    stay. Those that are left keep their places: see ``domains.Subset``.

    Args:
        share: of patches left out, in [0, 1).

    Example:
        >>> features = Features(torch.randn(2, 17, 8), Grid(4, 4, prefix=1))
        >>> PatchDropout(0.75)(features).tokens.shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, share: Rate) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"patch_dropout must be a share in [0, 1); got {share}")
        self.share = share

    def forward(self, features: Features) -> Features:
        """What is left of the tokens; in evaluation, and with a share of 0, all."""
        if not isinstance(features, Features):
            raise TypeError(
                f"features must be Features(tokens, domain), of a ViT's tokens; got features={shown(features)}"
            )
        if not self.training or self.share == 0:
            return features
        return features.kept(random_tokens(features, self.share))

    def extra_repr(self) -> str:
        return f"{self.share}"


def random_tokens(
    features: Features, share: float, generator: torch.Generator | None = None
) -> Int[Tensor, "*batch kept"]:
    """The tokens that are left of each image when a share of its patches is left out, in their order.

    (kept,) of a list of images, and otherwise (batch, kept). Where rows have different numbers of valid patches, those that have fewer
    are filled up with patches that do not exist.
    """
    x, domain = features.tokens, features.grid
    device = x.device if generator is None else generator.device
    shape = x.shape[:1] if domain.offsets is not None else (x.shape[0], domain.num_tokens - domain.prefix)
    noise = torch.rand(shape, generator=generator, device=device, dtype=torch.float64).to(x.device)
    if domain.offsets is not None:
        return _of_items(noise, domain, share)
    patches = _of_rows(noise, domain, share) + domain.prefix
    front = torch.arange(domain.prefix, device=x.device).expand(len(patches), -1)
    return torch.cat([front, patches], 1)


def _of_rows(noise: Float[Tensor, "batch patches"], domain: Grid, share: float) -> Int[Tensor, "batch kept"]:
    if domain.valid is None:
        count = _left(noise.shape[1], share)
        return noise.argsort(1)[:, :count].sort(1).values
    valid = domain.valid[:, domain.prefix :]
    counts = _left(valid.sum(1), share)
    rank = (noise + ~valid).argsort(1).argsort(1)
    # First those that are left, then what fills up, which are no patches at all.
    order = torch.where(rank < counts[:, None], 0, torch.where(valid, 2, 1)).argsort(dim=1, stable=True)
    return order[:, : int(counts.max())].sort(1).values


def _of_items(noise: Float[Tensor, " tokens"], domain: Grid, share: float) -> Int[Tensor, " kept"]:
    assert domain.offsets is not None
    tokens = torch.arange(len(noise), device=noise.device)
    item = torch.zeros_like(tokens) if domain.items is None else domain.items
    prefix = domain.is_prefix(tokens.new_zeros(()), tokens)
    noise = noise if prefix is None else noise.masked_fill(prefix, -1)
    # By item, and within each by chance, prefix tokens in front.
    order = noise.argsort(stable=True)
    order = order[item[order].argsort(stable=True)]
    left = domain.prefix + _left(domain.offsets.diff() - domain.prefix, share)
    return order[domain.place(tokens) < left[item]].sort().values


def _left(patches: int | Tensor, share: float):  # type: ignore[no-untyped-def]
    """How many of so many patches are left."""
    if isinstance(patches, Tensor):
        return torch.floor(patches * (1 - share) + 1e-6).long().clamp(min=1).minimum(patches)
    return min(max(int(patches * (1 - share) + 1e-6), 1), patches)
