"""Cache of values derived from an edge_index, for all layers and calls that are given the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._arguments import check_count
from .._autograd import constants, is_exporting, is_jit_tracing, keeping

Made = TypeVar("Made")

# Values of one tensor that are kept: for numbers of nodes, virtual nodes and graphs that go with it.
MOST_VALUES = 8


class _Entry(NamedTuple):
    versions: list[int | None]
    copies: list[Tensor | None]
    others: list[Callable[[], Tensor | None]]
    made: Any


# An LRU cache: the tensors used last are behind. An entry lives no longer than the first of the tensors that it was made of.
_MADE: Any = WeakTensorKeyDictionary()
_most = 128


def keep_edges(most: int) -> int:
    """Set for how many ``edge_index`` tensors the models and layers of this package keep what they derive from them; 0 for none.

    A model derives a ``Graph`` from ``edge_index`` and ``batch``, and a layer sorts edges, when it is first given them. The result is
    kept beside the tensors: until they are freed, are changed in place, or ``most`` others were used since. In a training loop over the
    same batches nothing is derived twice. Set 0 where memory matters more.

    Args:
        most: the number of ``edge_index`` tensors, >= 0; 128 unless set.

    Returns:
        The number that was set before.

    Example:
        >>> before = keep_edges(0)
        >>> keep_edges(before)
        0
    """
    global _most
    before, _most = _most, check_count("most", most)
    _forget()
    return before


def _forget() -> None:
    """Drop what was used longest ago, down to the bound."""
    while len(_MADE) > _most:
        _MADE.pop(next(iter(_MADE.keys())), None)


def made_once(what: Hashable, given: Sequence[Any], make: Callable[[], Made]) -> Made:
    """Return ``make()``, derived from ``given``; kept beside the first of these tensors, and derived again once one has changed.

    Changes in place are seen by torch's count of them and, on the CPU, by what is in the tensors, since ``.data`` and NumPy do not count.
    Nothing is kept of other things than tensors, of tensors of inference mode, which have no such count, and of inputs of a trace.
    ``None`` may stand for tensors that are not there, but for the first. What is made must not hold on to the first tensor.
    """
    if torch.compiler.is_dynamo_compiling():
        return make()
    if is_exporting() and all(x is None or (type(x) is Tensor and not x.is_meta) for x in given):
        with constants():
            return make()
    if is_exporting():
        raise ValueError(
            "edge_index and batch must be known when a model is exported, since what a graph is like is found by reading them; got "
            "inputs of the export. Make a Graph of them first, keep it in a module, and call the model on it."
        )
    if _most == 0 or is_jit_tracing() or not all(x is None or _can_be_kept(x) for x in given):
        return make()
    first, *rest = given
    entries = _MADE.pop(first, None) or {}
    found = entries.pop(what, None)
    if found is None or not _is_same(found, given):
        with keeping():
            versions = [None if x is None else x._version for x in given]
            others: list[Callable[[], Tensor | None]] = [_nothing if x is None else ref(x) for x in rest]
            found = _Entry(versions, [_copy(x) for x in given], others, make())
    entries[what] = found  # behind the others: the last to go
    while len(entries) > MOST_VALUES:
        entries.pop(next(iter(entries)))
    _MADE[first] = entries
    _forget()
    return found.made


def _can_be_kept(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_inference() and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _is_same(found: _Entry, given: Sequence[Tensor | None]) -> bool:
    """Check that these are the tensors that an entry was made of, unchanged."""
    if any(other() is not x for other, x in zip(found.others, given[1:], strict=True)):
        return False
    if found.versions != [None if x is None else x._version for x in given]:
        return False
    return all(
        copy is None or torch.equal(copy, x) for copy, x in zip(found.copies, given, strict=True) if x is not None
    )


def _copy(x: Tensor | None) -> Tensor | None:
    """A copy to compare with, where that takes no waiting for a GPU."""
    return x.detach().as_subclass(Tensor).clone() if x is not None and x.is_cpu and x.layout == torch.strided else None


def _nothing() -> None:
    """In place of a reference to a tensor that is not there."""
