"""Tokens in another order for a while: that in which the groups of a mask stand one behind the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .domains import Domain, Subset
from .kernels._structure import order_of_slices
from .masks import Axial, Mask, Windows


class Arrangement(NamedTuple):
    """An order of the tokens of a domain.

    Attributes:
        domain: where the tokens live in that order.
        order: which token of the domain each one is.
        back: where each token of the domain stands.
    """

    domain: Subset
    order: Int[Tensor, " tokens"]
    back: Int[Tensor, " tokens"]


def arrangement(mask: Mask | None, domain: Domain, device: torch.device) -> Arrangement | None:
    """The order in which attention within windows, or along an axis, finds its groups as slices; None where it does without, or cannot.

    Moving tokens before queries, keys and values are made of them is one copy, and one of the result, where attention would fetch each of
    queries, keys and values for itself.
    """
    if not isinstance(mask, (Windows, Axial)) or domain.whole is not domain or torch.compiler.is_compiling():
        return None

    def make(domain: Domain) -> Arrangement | None:
        order = order_of_slices(mask, domain, device)
        return None if order is None else Arrangement(domain.subset(order), order, order.argsort())

    return domain.bound_fact(("arrangement", mask, device), make)


def moved(
    x: Float[Tensor, "*batch tokens dim"], order: Int[Tensor, " tokens"], back: Int[Tensor, " tokens"]
) -> Float[Tensor, "*batch tokens dim"]:
    """Tokens in an order, of which ``back`` is the inverse."""
    return _Moved.apply(x, order, back)


class _Moved(torch.autograd.Function):
    """Tokens in another order, which takes no sum in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(-2, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(-2, ctx.back), None, None
