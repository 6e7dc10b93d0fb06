"""Linear maps on a CPU: by oneDNN, in inference with bias and activation within the product, and hidden channels no longer than they are
used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ._twice import differentiable
from ._unwatched import unwatched

# Below so many numbers the checks cost more than they gain.
SMALL = 2**13
# Nor does a product in training gain anything that takes fewer multiplications.
SMALL_PRODUCT = 2**26
# Hidden channels of so many numbers fit a cache, and new memory is not asked for again and again. In inference, where nothing else is
# done with them, pieces are larger: oneDNN brings the weights into its own order for each.
PIECE, LEARNED_PIECE = 2**22, 2**20
# Tensors of more than 32 MiB are new pages of the system each time (glibc's ``M_MMAP_THRESHOLD``), which take longer than to fill them.
LARGE = 2**23
# Activations that a product can apply, by their name there too.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


def applied(
    layer: nn.Linear, x: Float[Tensor, "*batch inner"], activation: str | None = None
) -> Float[Tensor, "*batch outer"]:
    """A layer's linear map, and an activation of it; by ``linear`` where the layer is nothing else."""
    if _plain(layer):
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


def learned_in_pieces(
    x: Float[Tensor, "*batch inner"], up: nn.Linear, activation: Callable[[Tensor], Tensor], down: nn.Linear
) -> Float[Tensor, "*batch outer"] | None:
    """``down(activation(up(x)))`` with gradients, some tokens at a time; None where that is not faster, or a layer is more than its map.

    ``activation`` maps each row alone and has no parameters. What it makes of the hidden channels is not kept, but made again in the
    backward, which takes less time than to fetch it from memory.
    """
    wide = x.numel() // max(x.shape[-1], 1) * up.out_features if x.ndim else 0
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or wide < LARGE:
        return None
    if not (_plain(up) and _plain(down) and _fits(x, up.weight) and _fits(x, down.weight)):
        return None
    y: Tensor = _Hidden.apply(x, up.weight, up.bias, down.weight, down.bias, activation)
    return y


class _Hidden(torch.autograd.Function):
    """Two linear maps and what is between, for one piece of the tokens after the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: Any
    ) -> Tensor:
        step = max(LEARNED_PIECE // len(up), 1)
        hidden = [_product(rows, up, up_bias) for rows in x.reshape(-1, x.shape[-1]).split(step)]
        ctx.save_for_backward(x, up, up_bias, down, down_bias, *hidden)
        ctx.step, ctx.activation = step, activation
        return torch.cat([_product(activation(h), down, down_bias) for h in hidden]).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, up_bias, down, down_bias, *hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated in its turn
            y = F.linear(ctx.activation(F.linear(x, up, up_bias)), down, down_bias)
            return *differentiable(y, (x, up, up_bias, down, down_bias), ctx.needs_input_grad[:5], grad), None
        of_x, of_up, of_up_bias, of_down, of_down_bias, _ = ctx.needs_input_grad
        grad = grad.reshape(-1, len(down)).contiguous()
        to_x, to_up, to_up_bias, to_down = [], None, None, None
        pieces = zip(x.reshape(-1, x.shape[-1]).split(ctx.step), hidden, grad.split(ctx.step), strict=True)
        for rows, h, g in pieces:
            with torch.enable_grad():
                a = ctx.activation(h := h.detach().requires_grad_())
            if of_down:
                to_down = _added(to_down, g, a.detach())
            (h,) = torch.autograd.grad(a, h, _product(g, down.T))
            if of_up:
                to_up = _added(to_up, h, rows)
            if of_up_bias:
                to_up_bias = h.sum(0) if to_up_bias is None else to_up_bias.add_(h.sum(0))
            if of_x:
                to_x.append(_product(h, up.T))
        whole = torch.cat(to_x).view(x.shape) if of_x else None
        return whole, to_up, to_up_bias, to_down, grad.sum(0) if of_down_bias else None, None


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left' right``, in place."""
    return left.T @ right if total is None else total.addmm_(left.T, right)


def _plain(layer: nn.Linear) -> bool:
    """Whether a layer is nothing but its linear map: no adapter, no hook."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may compute a product."""
    return (
        unwatched(x, weight)
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )
