"""The names that classes and functions have in configs: public classes have theirs, others get one when they are registered."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

# The modules whose public classes have names in configs: "masks.Local", "Sequence", "vision.ViT".
MODULES = ("masks", "positions", "graph", "time_series", "vision", "domains", "")

# What users registered, by name.
_REGISTERED: dict[str, Any] = {}

Thing = TypeVar("Thing", bound="Callable[..., Any]")


def register(thing: Thing, name: str | None = None) -> Thing:
    """Give a function or a class of your own the name by which configs know it; the program that reads them must register it, too.

    A registered class is also one that ``torch.load`` reads with ``weights_only=True``.

    Args:
        thing: a function, such as that of ``Where``; a frozen dataclass that derives from ``Leaf``; or a class that derives from
            ``Position`` or a model of this library.
        name: by default the name that it has in Python.

    Returns:
        ``thing``, so that this may be a decorator.

    Raises:
        TypeError, ValueError: no function or class, or a name that something else has.

    Example:
        >>> def even(b, h, q, k):
        ...     return (q + k) % 2 == 0
        >>> masks.register(even, name="even")  # doctest: +ELLIPSIS
        <function even at ...>
        >>> masks.Where(even).to_config()
        {'xformerlib': 1, 'class': 'masks.Where', 'fn': {'function': 'even'}}
    """
    if not callable(thing):
        raise TypeError(f"thing must be a function or a class; got {type(thing).__name__}")
    name = getattr(thing, "__name__", "") if name is None else name
    if not isinstance(name, str) or not name or name == "<lambda>":
        raise ValueError(
            f"name must be a string that names {thing!r}; got name={name!r}. Give register(..., name='...')."
        )
    old = _REGISTERED.get(name)
    if _public(name) is not None or (old is not None and old is not thing and _source(old) != _source(thing)):
        raise ValueError(f"name must be new; got name={name!r}, which {old or _public(name)!r} has. Choose another.")
    _REGISTERED[name] = thing
    if inspect.isclass(thing):
        torch.serialization.add_safe_globals([thing])
    return thing


def _source(thing: Any) -> tuple[Any, ...]:
    """Where a function or class was written: the same for one that is defined again, as in a notebook."""
    name = getattr(thing, "__qualname__", "<lambda>")
    return getattr(thing, "__module__", None), id(thing) if "<lambda>" in name else name


def name_of(thing: Any) -> str | None:
    """The name of a class or function in configs; None where it has none."""
    for name, known in _REGISTERED.items():
        if known is thing:
            return name
    if not inspect.isclass(thing):
        return None
    name = thing.__name__
    if issubclass(thing, nn.Module) and getattr(nn, name, None) is thing:
        return f"torch.nn.{name}"
    for module in MODULES:
        full = f"{module}.{name}" if module else name
        # Of a module that is not loaded nobody can have a class.
        if thing.__module__.startswith(f"{__package__}.{module}") and _public(full) is thing:
            return full
    return None


def _public(name: str) -> Any:
    """The public class of this name, of ours or torch's; None where there is none."""
    module, _, last = name.rpartition(".")
    if module == "torch.nn":
        found = getattr(nn, last, None)
        return found if inspect.isclass(found) and issubclass(found, nn.Module) else None
    if module not in MODULES or last.startswith("_"):
        return None
    found = vars(importlib.import_module(f"{__package__}.{module}" if module else str(__package__))).get(last)
    return found if inspect.isclass(found) and found.__module__.startswith(f"{__package__}.") else None


def named(name: Any, what: str) -> Any:
    """The class or function of this name, or an error."""
    found = (_REGISTERED.get(name) or _public(name)) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"config must name a public or registered {what}; got {name!r}. If it is your own, xformerlib.register it before reading."
        )
    return found


class Reference:
    """A function or class among the arguments of a model: pickled by its name, so that a model pickles whatever it was made with.

    Attributes:
        thing: the function or class; of a partial what it calls.
        bound: of a partial the arguments that it holds.
        said: how messages call it.
    """

    def __init__(
        self, thing: Any, bound: tuple[Any, Any] | None = None, said: str | None = None, name: str | None = None
    ) -> None:
        if isinstance(thing, functools.partial):
            thing, bound, said = thing.func, (thing.args, thing.keywords), repr(thing)
        self.thing, self.bound, self.said = thing, bound, repr(thing) if said is None else said
        self._name = name

    @property
    def name(self) -> str | None:
        """Its name in configs, if it has one by now."""
        return self._name or name_of(self.thing)

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Reference, (None, self.bound, self.said, self.name)
