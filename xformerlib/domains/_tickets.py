"""Domains in compiled graphs.

A compiled graph cannot hold a domain, whose facts are found by reading data. It holds whole numbers, the domain's ticket, and operators
that look the domain up when the graph runs: sizes that may vary, or the number of a domain that is alive.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from ._base import Domain
from ._grid import Grid
from ._kept import ANCHORS, LIVING
from ._sequence import Sequence


def domain_of(ticket: SequenceOf[int]) -> Domain:
    """The domain with this ticket, or one equal to it, which shares its facts."""
    kind, *numbers = ticket
    if kind == 1:
        length, start, prefix, rank_offset = numbers
        return Sequence(length, start=start, prefix=prefix)._ranked_from(rank_offset)
    if kind == 2:
        prefix, *sizes = numbers
        return Grid(*sizes, prefix=prefix)
    domain = LIVING.get(numbers[0]) or ANCHORS.get(numbers[0])
    if domain is None:
        raise RuntimeError(
            "a compiled call needs a domain that is no longer there: make domains of tensors outside of the compiled function, and keep "
            "them until the backward pass is done"
        )
    return domain


@torch.library.custom_op("xformerlib::domain_fact", mutates_args=())
def domain_fact(
    ticket: SequenceOf[int], name: str, argument: int | None, shape: SequenceOf[int], dtype: torch.dtype, like: Tensor
) -> Tensor:
    """A fact of the domain, found when the graph runs: the attribute ``name``, or the result of the method for ``argument``.

    It is a tensor of the given shape and dtype, which the compiler must know beforehand, on the device of ``like``.
    """
    fact = getattr(domain_of(ticket), name)
    return (fact if argument is None else fact(argument)).to(like.device, dtype, copy=True)


@domain_fact.register_fake
def _(
    ticket: SequenceOf[int], name: str, argument: int | None, shape: SequenceOf[int], dtype: torch.dtype, like: Tensor
) -> Tensor:
    return like.new_empty(tuple(shape), dtype=dtype)
