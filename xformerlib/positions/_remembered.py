"""Tables that small networks make of places, kept between calls without gradients as long as the weights hold the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence as SequenceOf
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._autograd import keeping, unwatched

# Tables of one network that are kept, and their numbers.
MOST_TABLES = 4
MOST_NUMBERS = 2**18


class _Table(NamedTuple):
    weights: tuple[Tensor, ...]
    values: Tensor


_TABLES: WeakKeyDictionary[nn.Module, dict[Hashable, _Table]] = WeakKeyDictionary()


def remembered(
    owner: nn.Module, key: Hashable, weights: SequenceOf[Tensor], make: Callable[[], Float[Tensor, "rows heads"]]
) -> Float[Tensor, "rows heads"]:
    """``make()``, a table that depends on the ``weights`` of a module and on ``key`` alone; without gradients, what it was before.

    Weights are compared by what is in them, number by number: they can be changed in ways that leave no trace (``.data``), and a
    comparison takes a small part of the time of the network. On a GPU it would wait for all that was asked of it before.
    """
    if not weights or torch.is_grad_enabled() or not unwatched(*weights):
        return make()
    tables = _TABLES.setdefault(owner, {})
    known = tables.get(key)
    if known is None or not all(_same(a, b) for a, b in zip(known.weights, weights, strict=True)):
        with keeping(), torch.no_grad():
            known = _Table(tuple(weight.clone() for weight in weights), make())
        tables.pop(key, None)
        if known.values.numel() <= MOST_NUMBERS:
            while len(tables) >= MOST_TABLES:
                tables.pop(next(iter(tables)))
            tables[key] = known
    return known.values


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
