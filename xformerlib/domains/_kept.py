"""What domains keep: facts that are found once, plans, and the numbers by which compiled graphs name domains."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .._autograd import constants, is_compiling, is_exporting, is_transformed, keeping

if TYPE_CHECKING:
    from typing_extensions import Self

Fact = TypeVar("Fact")

# Facts that equal domains share, of the values that were asked last: a domain made anew for each call must not start from nothing.
MOST_SHARED = 64
SHARED: dict[Hashable, tuple[dict[Hashable, Any], dict[Hashable, Any]]] = {}

# Living domains by number: so a compiled graph names one that is more than a few sizes. (0 and 1 would be constants to the compiler.)
LIVING: WeakValueDictionary[int, Any] = WeakValueDictionary()
ANCHORS: WeakValueDictionary[int, Any] = WeakValueDictionary()  # and their anchors, which may live a little longer
_NUMBERS = itertools.count(2)


# Attributes that no copy has.
OF_ITS_OWN = ("_bound", "_anchor", "_anchored")


def are_known(values: Iterable[Any]) -> bool:
    """Check that sizes and tensors in ``values``, and in what these hold, are plain ones that do not belong to a trace."""
    return all(
        isinstance(x, int) or (type(x) in (Tensor, nn.Parameter) and not x.is_meta)
        for each in values
        for x in _sizes_and_tensors(each)
    )


def _sizes_and_tensors(x: Any) -> Iterator[Any]:
    if isinstance(x, (Tensor, torch.SymInt)):
        yield x
    elif isinstance(x, (tuple, list)):
        for each in x:
            yield from _sizes_and_tensors(each)
    elif isinstance(x, dict):
        yield from _sizes_and_tensors(list(x.values()))
    elif isinstance(x, Kept):
        yield from _sizes_and_tensors([value for name, value in vars(x).items() if name not in ("_facts", *OF_ITS_OWN)])
    elif hasattr(x, "__dataclass_fields__"):
        yield from _sizes_and_tensors([getattr(x, name) for name in x.__dataclass_fields__])


class Kept:
    """Base of domains: what they keep, so that it is freed with their last name.

    Facts are values that do not refer to the domain. What does, such as a plan, is kept apart and refers to the domain's anchor instead.
    """

    _settled = False
    # What refers to the domain, and so must not be among its facts: that would be a circle, which only the garbage collector undoes.
    _bound: dict[Hashable, Any] | None = None
    # The anchor of the domain, and for an anchor a weak reference to its domain.
    _anchor: Kept | None = None
    _anchored: weakref.ref[Kept] | None = None

    _facts: dict[Hashable, Any] | None
    _number: int
    learned: Tensor | None = None

    def _begin(self) -> None:
        """Keep nothing yet."""
        self._facts = None
        self._number = 0 if is_compiling() else self._enlisted()

    def _value(self) -> Hashable:
        """What makes two domains equal; None where only the same object is."""
        return None

    def fact(self, key: Hashable, make: Callable[[], Fact]) -> Fact:
        """A value that depends on the domain alone: made at the first call, kept for the next ones, and by equal domains."""
        # A compiled graph must neither depend on what is kept nor leave anything behind, unless it is for this domain.
        if is_compiling() and not (self._settled and self._facts is not None and key in self._facts):
            with constants() if is_exporting() and self.is_known() else nullcontext():
                return make()
        facts = self._known_facts()
        if key not in facts:
            if self.learned is not None and is_transformed():
                return make()  # of coordinates that belong to the transform
            with keeping():
                facts[key] = make()
        return facts[key]

    def is_known(self) -> bool:
        """Check that the domain holds plain numbers and tensors only: no symbolic sizes, no inputs of a graph that is traced."""
        return are_known([self])

    def is_looked_up(self) -> bool:
        """Check that facts must be operators of a compiled graph, which look the domain up when the graph runs."""
        return is_compiling() and not (is_exporting() and self.is_known())

    def bound_fact(self, key: Hashable, make: Callable[[Self], Fact]) -> Fact:
        """A value that refers to the domain, such as a plan: made at the first call and kept with the domain, as ``fact`` keeps others.

        ``make`` is given the domain's anchor, which it must refer to in place of the domain.
        """
        if self._anchored is not None:
            return make(self)  # kept here it would refer back
        self._known_facts()
        assert self._bound is not None
        if key not in self._bound:
            with keeping():
                self._bound[key] = make(self.anchor)
        return self._bound[key]

    @property
    def anchor(self) -> Self:
        """The domain for those that it keeps: the same tokens and facts, but nothing that is bound to it.

        A domain is freed when its last name goes, since nothing that it keeps refers back to it.
        """
        if self._anchored is not None:
            return self
        if self._anchor is None:
            facts, anchor = self._known_facts(), copy.copy(self)
            anchor._facts, anchor._anchored = facts, weakref.ref(self)
            anchor._settled, anchor._number = self._settled, self._number
            if not is_compiling():
                ANCHORS[self._number] = anchor
            self._anchor = anchor
        return self._anchor  # type: ignore[return-value]

    def settle(self) -> None:
        """Let compiled code read the facts that are kept: for kernels that are compiled for this domain, after they were asked once."""
        other = self._anchor if self._anchored is None else self._anchored()
        for domain in (self, other):
            if domain is not None:
                domain._settled = True

    def _known_facts(self) -> dict[Hashable, Any]:
        if self._facts is None:
            value = self._value()
            if value is None:
                self._facts, self._bound = {}, {}
            else:
                shared = SHARED.pop((type(self), value), ({}, {}))
                while len(SHARED) >= MOST_SHARED:
                    SHARED.pop(next(iter(SHARED)), None)
                self._facts, self._bound = SHARED[type(self), value] = shared  # behind the others: the last to go
        elif self._bound is None:
            self._bound = {}
        return self._facts

    def _own_facts(self) -> dict[Hashable, Any]:
        """The facts without copies on other devices."""
        return {
            key: fact for key, fact in (self._facts or {}).items() if not (isinstance(key, tuple) and key[0] == "to")
        }

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in OF_ITS_OWN}
        return {**state, "_facts": self._own_facts() if self._value() is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._number = self._enlisted()

    # -- in compiled graphs ----------------------------------------------------------------------------------------

    def _enlisted(self) -> int:
        number = next(_NUMBERS)
        LIVING[number] = self
        return number

    def ticket(self) -> list[int]:
        """The domain as whole numbers, for operators of compiled graphs: ``domain_of`` gives the domain for it."""
        return [0, self._number]

    def ticket_tensors(self) -> list[Tensor]:
        """The tensors that go with the ticket, of a domain that is made in the compiled graph."""
        return []
