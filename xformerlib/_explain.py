"""How a model's attention layers will be computed, and a guard against slow ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .attention import Attention, plan
from .domains import Domain
from .kernels import Plan
from .masks import Mask
from .positions import Position


class Explanation(dict[str, Plan]):
    """The plan of each attention layer, by the layer's name; ``str()`` shows layers of the same plan together."""

    def __str__(self) -> str:
        named: dict[str, list[str]] = {}
        for name, each in self.items():
            named.setdefault(str(each), []).append(name)
        return "\n\n".join("\n".join([", ".join(names), text]) for text, names in named.items())


def explain(
    module_or_mask: nn.Module | Mask, domain: Domain, key_domain: Domain | None = None, **options: Any
) -> Plan | Explanation:
    """How attention over ``domain`` will be computed, and why not faster, without computing it.

    Args:
        module_or_mask: a mask, explained as by ``plan``; or a model, of which each attention layer is.
        domain: where the tokens live.
        key_domain: where the context of the model's cross-attention layers lives, or a mask's keys.
        **options: as in ``plan``: batch, dtype, device; for a mask also heads, head_dim, bias and the others.

    Returns:
        A ``Plan`` for a mask; for a model a dict of them by the names of the layers.

    Raises:
        ValueError, TypeError: a mask that is not defined on the domain, a model without attention layers.

    Example:
        >>> encoder = Encoder(64, 2, 4, mask=masks.Causal() & masks.Local(127))
        >>> {name: plan.kernel for name, plan in explain(encoder, Sequence(8192)).items()}
        {'blocks.0.attention': 'windowed', 'blocks.1.attention': 'windowed'}
    """
    if isinstance(module_or_mask, Mask):
        return plan(module_or_mask, domain, key_domain, **options)
    if not isinstance(module_or_mask, nn.Module):
        raise TypeError(f"module_or_mask must be a model or a mask; got {type(module_or_mask).__name__}")
    plans = Explanation()
    for name, layer, shared in _layers(module_or_mask):
        cross = name.rpartition(".")[2] == "cross_attention"
        keys, position = (key_domain, None) if cross else (None, shared)
        plans[name] = layer._plan(domain, keys, position=position, **options)
    if not plans:
        raise ValueError(f"module_or_mask must have attention layers; {type(module_or_mask).__name__} has none")
    return plans


def _layers(
    module: nn.Module, name: str = "", shared: Position | None = None
) -> Iterator[tuple[str, Attention, Position | None]]:
    """Each attention layer, its name, and the position that the model around it shares among its layers."""
    if isinstance(module, Attention):
        yield name, module, shared
        return
    own = getattr(module, "position", None)
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        yield from _layers(child, path, own if isinstance(own, Position) else shared)
