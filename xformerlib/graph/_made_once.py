"""What is made of edges once, for all layers and calls that are given the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


class _Entry(NamedTuple):
    versions: list[int | None]
    others: list[Callable[[], Tensor | None]]
    made: Any


# Lives as long as the first of the tensors that something was made of.
_MADE: Any = WeakTensorKeyDictionary()


def made_once(what: Hashable, given: Sequence[Any], make: Callable[[], Made]) -> Made:
    """What ``make`` makes of ``given``, kept beside the first of these tensors, and made anew where one is another or changed in place.

    Nothing is kept of what is no tensor, or a tensor of inference mode, which does not tell that it was changed. ``None`` may stand for
    tensors that are not there, but for the first. What is made must not hold on to the first tensor.
    """
    if not all(x is None or (isinstance(x, Tensor) and not x.is_inference()) for x in given):
        return make()
    versions = [None if x is None else x._version for x in given]
    entries = _MADE.setdefault(given[0], {})
    found = entries.get(what)
    same = found is not None and found.versions == versions
    if not same or any(other() is not x for other, x in zip(found.others, given[1:], strict=True)):
        with torch.inference_mode(False):  # what is kept may be needed in training later
            others: list[Callable[[], Tensor | None]] = [_nothing if x is None else ref(x) for x in given[1:]]
            found = entries[what] = _Entry(versions, others, make())
    return found.made


def _nothing() -> None:
    """In place of a reference to a tensor that is not there."""
