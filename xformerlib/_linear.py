"""Linear maps on a CPU: by oneDNN, in inference with bias and activation within the product and no more of the result than is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ._unwatched import unwatched

# Below so many numbers the checks cost more than they gain.
SMALL = 2**13
# Nor does a product in training gain anything that takes fewer multiplications.
SMALL_PRODUCT = 2**26
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
    """``activation(x W' + b)``, by oneDNN where that is faster.

    ``torch.nn.functional.linear`` first copies the bias to every token, an activation takes another pass, and the products of its
    backward are slower too.
    """
    if not torch.compiler.is_compiling() and x.numel() >= SMALL and _fits(x, weight):
        if not torch.is_grad_enabled():
            return _product(x, weight, bias, activation)
        if x.numel() * len(weight) >= SMALL_PRODUCT:
            y: Tensor = _Linear.apply(x, weight, bias)
            return y if activation is None else ACTIVATIONS[activation](y)
    y = F.linear(x, weight, bias)
    return y if activation is None else ACTIVATIONS[activation](y)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """A linear map and its activation in one call of oneDNN, of which autograd knows nothing."""
    approximation = "none" if activation == "gelu" else ""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation or "none", [], approximation)


class _Linear(torch.autograd.Function):
    """A linear map whose products are oneDNN's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad = grad.reshape(-1, len(weight)).contiguous()
        to_x = None
        if of_x:  # by a product of torch's where it will be differentiated in its turn
            to_x = (grad @ weight if torch.is_grad_enabled() else _product(grad, weight.T)).view(x.shape)
        to_weight = grad.T @ x.reshape(-1, x.shape[-1]) if of_weight else None
        return to_x, to_weight, grad.sum(0) if of_bias else None


def in_pieces(
    rows_to_rows: Callable[[Tensor], Tensor], x: Float[Tensor, "*batch inner"], hidden: int
) -> Float[Tensor, "*batch outer"]:
    """A map of each token alone, which needs ``hidden`` numbers for each in between, some tokens at a time where that is faster."""
    step = max(PIECE // hidden, 1)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu or x.numel() // x.shape[-1] <= step:
        return rows_to_rows(x)
    pieces = [rows_to_rows(rows) for rows in x.flatten(0, -2).split(step)]
    return torch.cat(pieces).unflatten(0, x.shape[:-1])


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may compute a product."""
    return (
        unwatched(x, weight)
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )
