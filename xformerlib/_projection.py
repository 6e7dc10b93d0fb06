"""Linear layers as their owners use them: called, like any module; some of their columns, or their weights, only where that is the same."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_plain(layer: nn.Module) -> bool:
    """Check that a layer is an ``nn.Linear`` and nothing else, so that its weights may be used without calling it.

    No subclass (parametrisations, FSDP), no replaced ``forward`` (offloading), no hook of its own or global, no compiled call, no weight
    that is no ordinary parameter (``functional_call``, quantisation, DTensor) or is on the meta device.
    """
    if type(layer) is not nn.Linear:
        return False
    own = layer.__dict__
    watched = (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
        or torch_module._has_any_global_hook()
    )
    return not watched and type(layer.weight) is nn.Parameter and not layer.weight.is_meta


def columns_of(
    layer: nn.Module, x: Float[Tensor, "*batch inner"], first: int, last: int | None
) -> Float[Tensor, "*batch columns"]:
    """``layer(x)[..., first:last]``; a plain linear layer computes only these columns."""
    if isinstance(layer, nn.Linear) and is_plain(layer):
        bias = None if layer.bias is None else layer.bias[first:last]
        return F.linear(x, layer.weight[first:last], bias)
    found: Tensor = layer(x)[..., first:last]
    return found


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's floating-point parameters; torch's default where it has none."""
    found = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(found, torch.get_default_dtype())


def check_dtype(name: str, x: Tensor, layer: nn.Module, norm: nn.Module | None = None) -> None:
    """Raise where a linear layer or convolution, perhaps behind a layer norm, cannot take the dtype of ``x``; not where it was replaced."""
    if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)) or layer.weight.dtype == x.dtype:
        return
    if not is_plain(layer) and type(layer) not in _CONVOLUTIONS:
        return
    if norm is not None and type(norm) is not nn.LayerNorm:
        return
    if not torch.is_autocast_enabled(x.device.type):
        dtype = layer.weight.dtype
        raise TypeError(
            f"{name} must have the dtype of the weights, {dtype}; got {x.dtype}. Use {name}.to({dtype}), model.to({x.dtype}), or autocast."
        )
