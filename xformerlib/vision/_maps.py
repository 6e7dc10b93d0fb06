"""What a model attends to: maps of every layer and head, whatever kernel computes them, and their product over layers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence as SequenceOf
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._arguments import check_names, shown
from ..attention import Attention
from ..blocks import Block
from ..domains import Grid, Subset
from ._patches import Images
from ._tokens import places_among

OPTIONS = inspect.signature(Attention.weights).parameters


class AttentionMap(NamedTuple):
    """The attention weights of one layer, and where queries and keys live.

    Attributes:
        weights: (B, heads, T, T); of a list of images (1, heads, N, N), 0 between images; with ``rows`` those of these queries alone.
        domain: a ``Grid``, packed for a list of images; a ``Subset`` of it where patches were left out.
    """

    weights: Float[Tensor, "batch heads rows keys"]
    domain: Grid | Subset

    def of(self, row: int = 0) -> Float[Tensor, "batch heads *grid"] | list[Float[Tensor, "heads *grid"]]:
        """What one query gives to each patch, as a map for each image. Its row in each image: 0 is the class token where there is one.

        What it gives to tokens that are no patches is left out, so that a map sums to less than 1.
        """
        weights, domain = self
        if not isinstance(domain, Grid):
            raise ValueError(f"a map needs every patch, and some were left out: {domain!r}. Call model.eval() first")
        if domain.offsets is None:
            return weights[:, :, row, domain.prefix :].unflatten(-1, domain.sizes)
        if weights.shape[2] != weights.shape[3]:
            raise ValueError("of needs the weights of all tokens of a list of images; leave rows out")
        starts = domain.offsets.tolist()
        return [
            weights[0, :, start + row, start + domain.prefix : end].unflatten(-1, sizes)
            for (start, end), sizes in zip(pairwise(starts), domain.size_of_items, strict=True)
        ]


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    images: Images,
    layers: SequenceOf[int] | None = None,
    *,
    rows: SequenceOf[int] | None = None,
    **inputs: Any,
) -> list[AttentionMap]:
    """The attention weights of the blocks ``layers`` of a model, for each image and head.

    The model runs as it is, on whatever kernels; each block that was asked for is then asked for its ``Attention.weights``.

    Args:
        model: a ``ViT``, or any module made of ``Block``. In training its dropout is at work here, too.
        images: a batch, or a list of images of different sizes.
        layers: indices of blocks, in the order in which they come; negative ones count from the end. All if not given.
        rows: only the weights of these queries: ``[0]`` is the class token where there is one. For large images.
        **inputs: further inputs of the model, such as ``valid``.

    Example:
        >>> from xformerlib.vision import ViT
        >>> model = ViT(10, size=32, patch=4, dim=64, depth=2, heads=4).eval()
        >>> last = attention_maps(model, torch.randn(2, 3, 32, 32), [-1])[0]
        >>> last.weights.shape, last.of(0).shape
        (torch.Size([2, 4, 65, 65]), torch.Size([2, 4, 8, 8]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module made of blocks, such as a ViT; got model={shown(model)}")
    known = inspect.signature(model.forward).parameters
    if all(one.kind is not one.VAR_KEYWORD for one in known.values()):
        check_names(f"{type(model).__name__}.forward", inputs, known)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(f"model must be made of blocks, xformerlib.Block; got {type(model).__name__}, which has none")
    asked = places_among("layers", "blocks", layers, len(blocks))
    found: dict[int, AttentionMap] = {}

    def look(index: int, attention: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert isinstance(attention, Attention)
        if index in found:
            raise ValueError(
                f"{type(model).__name__} runs images in several groups; ask for the maps of one image at a time"
            )
        tokens, domain = args
        options = {name: value for name, value in options.items() if name in OPTIONS}
        found[index] = AttentionMap(attention.weights(tokens, domain, rows, **options), domain)

    hooks = [
        blocks[index].attention.register_forward_pre_hook(partial(look, index), with_kwargs=True)
        for index in set(asked)
    ]
    try:
        model(images, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[index] for index in asked]


def rollout(maps: SequenceOf[AttentionMap]) -> AttentionMap:
    """How much of each token reaches each output, through all layers: attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928).

        A_l = normalised (W_l + I) / 2,   R = A_L ... A_2 A_1

    W_l is the mean of layer l over its heads, and I stands for the connection around it. Rows of A_l are scaled to sum to 1, also
    those of tokens that give a share to sinks or see nothing.

    Args:
        maps: of all layers, in their order, on one domain: what ``attention_maps`` returns.

    Returns:
        A map with one head: (B, 1, T, T).

    Example:
        >>> from xformerlib.vision import ViT
        >>> model = ViT(10, size=32, patch=4, dim=64, depth=2, heads=4).eval()
        >>> rollout(attention_maps(model, torch.randn(2, 3, 32, 32))).of(0).shape
        torch.Size([2, 1, 8, 8])
    """
    if not isinstance(maps, SequenceOf) or not all(isinstance(layer, AttentionMap) for layer in maps):
        raise TypeError(f"maps must be a list of maps, as attention_maps returns them; got maps={shown(maps)}")
    if not maps:
        raise ValueError("maps must be those of at least one layer; got none")
    shapes = {tuple(layer.weights.shape[2:]) for layer in maps}
    if len(shapes) > 1 or any(rows != keys for rows, keys in shapes):
        raise ValueError(
            f"maps must be of all tokens, and of as many in each layer; got {sorted(shapes)} queries and keys"
        )
    product = None
    for weights, _ in maps:
        mean = weights.mean(1, keepdim=True)
        layer = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        layer = layer / layer.sum(-1, keepdim=True)
        product = layer if product is None else layer @ product
    assert product is not None
    return AttentionMap(product, maps[-1].domain)
