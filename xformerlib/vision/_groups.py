"""Parameters in groups for an optimiser: with and without weight decay, and each layer with a learning rate of its own."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import nn

from .._arguments import checked
from ..blocks import Block
from ..positions import Embedding, Position
from ._patches import Tokenizer
from ._swin import Swin


@checked
def parameter_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float | None = None, lr: float | None = None
) -> list[dict[str, Any]]:
    """All parameters of a model, each in one group, as ``torch.optim`` takes them.

    Weight decay is for the weights of linear maps and convolutions. Biases, norms, tokens, all of positions, temperatures and scales have
    none (Dosovitskiy et al. 2020, arXiv:2010.11929, and timm). With ``layer_decay`` d, for fine-tuning, layers learn the faster the
    closer they are to the output (BEiT, Bao et al. 2021, arXiv:2106.08254):

        lr of block i of L = lr d^(L - i),  i = 0 ... L - 1;   of tokens, patches, embeddings of positions  lr d^(L + 1);   of the rest  lr

    The rest are the last norm, the pooling, the heads, and rotations and biases that all blocks share. Where a ``Swin`` merges patches,
    it does so with the rate of the block before. Parameters that are frozen have their group, too: an optimiser leaves alone
    what has no gradient, and they may be thawed at any time.

    Args:
        model: a ``ViT``, or any module made of ``Block``.
        weight_decay: of weights.
        layer_decay: d above, in (0, 1]; needs ``lr``. None: one learning rate for all, which is the optimiser's unless ``lr`` is given.
        lr: the highest learning rate.

    Returns:
        Dicts of ``params``, ``weight_decay``, a ``name`` and, with ``lr``, ``lr``. A schedule of torch or timm scales each group's own.

    Example:
        >>> from xformerlib.vision import ViT
        >>> model = ViT(10, size=32, patch=4, dim=64, depth=2, heads=4)
        >>> groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5, lr=1.0)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups][:3]
        [('tokens', 0.125, 0.05), ('tokens, no decay', 0.125, 0.0), ('block 0', 0.25, 0.05)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be >= 0; got weight_decay={weight_decay}")
    if layer_decay is not None and (not 0 < layer_decay <= 1 or lr is None):
        raise ValueError(
            "layer_decay must be in (0, 1], and lr, which it scales, must be given with it; "
            f"got layer_decay={layer_decay}, lr={lr}"
        )
    layers, undecayed = _layers(model), _undecayed(model)
    last = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer = last if layer_decay is None else layers[name]
        decays = parameter.ndim > 1 and name.endswith("weight") and id(parameter) not in undecayed
        if (layer, decays) not in groups:
            where = "all" if layer_decay is None else _name(layer, last)
            group = {"params": [], "weight_decay": weight_decay if decays else 0.0}
            group["name"] = where if decays else f"{where}, no decay"
            groups[layer, decays] = group | ({} if lr is None else {"lr": lr * (layer_decay or 1.0) ** (last - layer)})
        groups[layer, decays]["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def _layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter by its name: 0 for what makes tokens, i + 1 for block i, and one more for what follows."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    places = {name: index + 1 for index, name in enumerate(blocks)} | _merges(model) | _front(model)
    last = len(blocks) + 1
    return {name: _place(name, places, last) for name, _ in model.named_parameters()}


def _front(model: nn.Module) -> dict[str, int]:
    """What makes tokens: tokenizers, embeddings of positions, and the tokens that the model itself holds."""
    found = [name for name, _ in model.named_parameters(recurse=False)]
    for name, module in model.named_modules():
        if isinstance(module, Tokenizer | Embedding) or name.rpartition(".")[2].startswith("embed"):
            found.append(name)
    return dict.fromkeys(found, 0)


def _merges(model: nn.Module) -> dict[str, int]:
    """The merging of patches of a ``Swin``: each with the block that comes before it."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, Swin):
            ends = accumulate(len(stage.blocks) for stage in module.stages)  # type: ignore[arg-type]
            names = [".".join(filter(None, (name, "merges", str(stage)))) for stage in range(len(module.merges))]
            found |= dict(zip(names, ends, strict=False))
    return found


def _place(name: str, places: dict[str, int], last: int) -> int:
    """The layer of the innermost module that has one."""
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places.get(name, last)


def _undecayed(model: nn.Module) -> set[int]:
    """The parameters of positions and of tables of vectors, which no decay pulls towards zero, matrices or not."""
    modules = [module for module in model.modules() if isinstance(module, Position | nn.Embedding)]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _name(layer: int, last: int) -> str:
    return "tokens" if layer == 0 else "head" if layer == last else f"block {layer - 1}"
