"""Linear maps in inference on a CPU: bias and activation within the matrix product, and no more of the result than is soon used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

# Below so many numbers the checks cost more than they gain.
SMALL = 2**13
# Hidden channels of so many numbers fit a cache, and new memory is not asked for again and again.
PIECE = 2**20
# Activations that a product can apply, by their name there too.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


def applied(
    layer: nn.Linear, x: Float[Tensor, "*batch inner"], activation: str | None = None
) -> Float[Tensor, "*batch outer"]:
    """A layer's linear map, and an activation of it; by ``linear`` where the layer is nothing else: no adapter, no hook."""
    if type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks:
        return linear(x, layer.weight, layer.bias, activation)
    y = layer(x)
    return y if activation is None else ACTIVATIONS[activation](y)


def linear(
    x: Float[Tensor, "*batch inner"],
    weight: Float[Tensor, "outer inner"],
    bias: Float[Tensor, " outer"] | None = None,
    activation: str | None = None,
) -> Float[Tensor, "*batch outer"]:
    """``activation(x W' + b)``; where no gradient is wanted, by oneDNN, which adds the bias and applies the activation on the fly.

    ``torch.nn.functional.linear`` first copies the bias to every token, and the activation takes another pass.
    """
    if not torch.compiler.is_compiling() and x.numel() >= SMALL and _is_inference(x, weight):
        return torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, activation or "none", [], "none" if activation == "gelu" else ""
        )
    y = F.linear(x, weight, bias)
    return y if activation is None else ACTIVATIONS[activation](y)


def in_pieces(
    rows_to_rows: Callable[[Tensor], Tensor], x: Float[Tensor, "*batch inner"], hidden: int
) -> Float[Tensor, "*batch outer"]:
    """A map of each token alone, which needs ``hidden`` numbers for each in between, some tokens at a time where that is faster."""
    step = max(PIECE // hidden, 1)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu or x.numel() // x.shape[-1] <= step:
        return rows_to_rows(x)
    pieces = [rows_to_rows(rows) for rows in x.flatten(0, -2).split(step)]
    return torch.cat(pieces).unflatten(0, x.shape[:-1])


def _is_inference(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
    )
