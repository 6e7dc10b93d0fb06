"""Modules that remember the arguments they were made with, so that they can be described as JSON and made again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._arguments import fit_arguments
from ._config import Described, from_config, to_config, understood
from ._names import Reference

_RECORD = "_made_with"
_OURS = f"{__package__}."


class Recorded(nn.Module, Described):
    """Base of modules whose config is the arguments of their constructor, which may be given as configs, too.

    Weights are no part of a config: they are what ``state_dict`` holds. A subclass that also derives from huggingface_hub's
    ``PyTorchModelHubMixin`` saves its config there.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls, cls.__init__)  # type: ignore[method-assign]
        if hasattr(cls, "save_pretrained") and hasattr(cls, "from_pretrained"):
            cls.save_pretrained = _with_config(cls.save_pretrained)

    def _described(self) -> dict[str, Any]:
        return _arguments(type(self), vars(self).get(_RECORD))

    def _verify(self) -> None:
        """Compare the modules, by names, kinds, options and shapes, with those of a module that is made of the config."""
        arguments = {name: from_config(to_config(value)) for name, value in self._described().items()}
        fresh, own = _outline(_made_empty(type(self), arguments)), _outline(self)
        other = [name for name in {**fresh, **own} if not _agree(fresh.get(name, ""), own.get(name, ""))]
        if other:
            raise TypeError(
                f"{type(self).__name__} cannot be written as the arguments that it was made with: parts were replaced since "
                f"({', '.join(other[:3])}{', ...' if len(other) > 3 else ''}). Save it whole, with torch.save."
            )


def _made_empty(kind: type[Recorded], arguments: dict[str, Any]) -> Recorded:
    """The module without memory for its weights, or where its constructor reads data with them."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return kind._rebuilt(arguments)
        except (NotImplementedError, RuntimeError):
            return kind._rebuilt(arguments)


def _outline(module: nn.Module) -> dict[str, Any]:
    """The kind and options of each module in a module, and the shape of each parameter and buffer; None where these wait for a call."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        tensors = {**part._parameters, **part._buffers}
        waits = any(is_lazy(x) for x in tensors.values())
        found[path or "itself"] = _WAITS if waits else (type(part).__name__, part.extra_repr())
        for name, x in tensors.items():
            found[f"{path}.{name}".lstrip(".")] = _WAITS if waits else None if x is None else tuple(x.shape)
    return found


_WAITS = object()  # for the first call, of a lazy layer


def _agree(fresh: Any, own: Any) -> bool:
    return fresh is _WAITS or own is _WAITS or fresh == own


class _Record:
    """The arguments of a constructor, as they were given.

    Attributes:
        owner: the class whose constructor it was.
        why: why the arguments do not describe the module; None where they do.
    """

    def __init__(
        self, owner: type, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, why: str | None = None
    ) -> None:
        self.owner, self.args, self.kwargs, self.why = owner, args, kwargs or {}, why


class _Part(Described):
    """A module among the arguments of another, as it was made."""

    def __init__(self, kind: type, record: _Record | None) -> None:
        self.kind, self.record = kind, record

    def _class(self) -> type:
        return self.kind

    def _described(self) -> dict[str, Any]:
        return _arguments(self.kind, self.record)


def _recording(owner: type, init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a class, which takes configs for values, and notes what it is called with."""

    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            init(self, *args, **kwargs)
            return
        args = tuple(map(understood, args))
        kwargs = {name: understood(value) for name, value in kwargs.items()}
        if owner.__module__.startswith(_OURS) and _called(type(self)) is owner:  # type: ignore[arg-type]
            (_, *args), kwargs = fit_arguments(type(self).__name__, init, (self, *args), kwargs)  # type: ignore[assignment]
            args = tuple(args)
        if _RECORD not in vars(self):  # by the class itself, not by one that it derives from
            vars(self)[_RECORD] = _Record(
                owner, tuple(map(_kept, args)), {name: _kept(x) for name, x in kwargs.items()}
            )
        init(self, *args, **kwargs)

    return __init__


@functools.cache
def _called(kind: type) -> type:
    """The first class of this library whose constructor making a ``kind`` calls: it speaks for those beneath it."""
    ours = (base for base in kind.__mro__ if "__init__" in vars(base) and base.__module__.startswith(_OURS))
    return next(ours)


def _kept(value: Any) -> Any:
    """An argument as a record keeps it: no module, which may change, and nothing that would not pickle."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor, torch.dtype)):
        return value
    if isinstance(value, Recorded):
        return _Part(type(value), vars(value).get(_RECORD))
    if isinstance(value, Described):
        return value
    if type(value) in (list, tuple):
        return type(value)(map(_kept, value))
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return Reference(value.func, (_kept(value.args), _kept(value.keywords)), repr(value))
    return Reference(None, said=f"the module {value!r}") if isinstance(value, nn.Module) else Reference(value)


def _arguments(kind: type, record: _Record | None) -> dict[str, Any]:
    """The recorded arguments by name, those of ``**kwargs`` among the others."""
    owner = next(base for base in kind.__mro__ if "__init__" in vars(base))
    if record is None or record.why is not None or record.owner is not owner:
        why = "it does not know them" if record is None or record.why is None else record.why
        raise TypeError(
            f"{kind.__name__} cannot be written as the arguments that it was made with: {why}. Save it whole, with torch.save."
        )
    signature = inspect.signature(owner.__init__)  # type: ignore[misc]
    found: dict[str, Any] = {}
    for name, value in list(signature.bind(None, *record.args, **record.kwargs).arguments.items())[1:]:
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = list(value) if parameter.kind is inspect.Parameter.VAR_POSITIONAL else value
    return found


def describe(module: nn.Module, **arguments: Any) -> None:
    """Note arguments that were changed after the module was made."""
    record = vars(module).get(_RECORD)
    if record is None or record.why is not None:
        return
    if not arguments.keys() <= inspect.signature(type(module)).parameters.keys():
        not_described(module, f"{' and '.join(arguments)} changed since")
        return
    vars(module)[_RECORD] = _Record(record.owner, (), {**_arguments(type(module), record), **arguments})


def not_described(module: nn.Module, why: str) -> None:
    """Note that the arguments do not describe a module, whose parts were replaced."""
    vars(module)[_RECORD] = _Record(type(module), why=why)


def _with_config(save: Callable[..., Any]) -> Callable[..., Any]:
    """huggingface_hub's ``save_pretrained``, told what it could not find out: arguments that are masks, positions and modules."""
    if hasattr(save, "_with_config"):
        return save

    @functools.wraps(save)
    def save_pretrained(self: Recorded, save_directory: Any, *, config: Any = None, **options: Any) -> Any:
        """Save weights and arguments, for ``from_pretrained``; arguments that cannot be written are refused before anything is."""
        if config is None:
            self._verify()
            config = {name: to_config(value) for name, value in self._described().items()}
        return save(self, save_directory, config=config, **options)

    save_pretrained._with_config = True  # type: ignore[attr-defined]
    return save_pretrained


# What positions are made of: torch.load reads them, too, with weights_only=True.
torch.serialization.add_safe_globals([_Record, _Part, Reference, nn.Linear, nn.ModuleList])
