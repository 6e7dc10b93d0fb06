"""Values as plain JSON and back: masks, positions, domains, and models with the arguments that they were made with.

A config is a dict with the public name of a class and the arguments of its constructor. Reading one calls constructors of public classes
and of classes and functions that the user registered by name; it imports nothing else and runs no code from the config.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._names import Reference, name_of, named, register as register

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = 1

# Keys that mark a dict as something else than a dict. "class" is no name that an argument could have.
VERSION, CLASS = "xformerlib", "class"
TAGS = {CLASS, VERSION, "tuple", "dict", "float", "dtype", "tensor", "function", "partial"}

# Of these the classes hold data alone: torch.load reads them with weights_only=True, which is its default.
PLAIN = ("masks", "positions", "domains")


class Described:
    """Base of values that are described by the arguments of their constructor: they go to JSON and back."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.startswith(tuple(f"{__package__}.{part}." for part in PLAIN)):
            torch.serialization.add_safe_globals([cls])

    def to_config(self) -> dict[str, Any]:
        """Return the value as plain JSON: the name of its class and the arguments of its constructor, for ``from_config``.

        Tensors become nested lists with their dtype, and come back on the CPU, or the device of a surrounding ``torch.device(...)``.

        Raises:
            TypeError: something in it has no name, such as a function; ``register`` gives it one.

        Example:
            >>> masks.Local(3).to_config()
            {'xformerlib': 1, 'class': 'masks.Local', 'radius': 3, 'border': 'cut'}
        """
        return to_config(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuild the value that ``to_config`` described.

        Raises:
            TypeError, ValueError: a config of another kind of value, or one that ``to_config`` did not write.

        Example:
            >>> masks.Mask.from_config((masks.Causal() & masks.Local(3)).to_config())
            Causal() & Local(3)
        """
        made = from_config(config)
        if not isinstance(made, cls):
            raise TypeError(
                f"config must describe a {cls.__name__}; got a {type(made).__name__}. Use xformerlib.from_config for any kind."
            )
        return made

    def _described(self) -> dict[str, Any]:
        """The arguments of the constructor by name: attributes of the same names."""
        names = _parameters(type(self))
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise TypeError(
                f"{type(self).__name__} must keep the arguments of its constructor as attributes to be written; got none named "
                f"{', '.join(missing)}"
            )
        return {name: getattr(self, name) for name in names}

    def _class(self) -> type:
        """The class that the config names."""
        return type(self)

    def _verify(self) -> None:
        """Raise where the arguments do not describe the value any more."""

    @classmethod
    def _rebuilt(cls, arguments: dict[str, Any]) -> Self:
        """The value with these arguments."""
        known = inspect.signature(cls).parameters.values()
        open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known)
        unknown = [] if open_ended else sorted(arguments.keys() - _parameters(cls).keys())
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = {one.name for one in known if one.default is one.empty and one.kind not in variable}
        missing = sorted(needed - arguments.keys())
        if unknown or missing:
            wrong = f"{', '.join(unknown)} beyond them" if unknown else f"no {', '.join(missing)}"
            raise ValueError(
                f"config must have the arguments of {cls.__name__}, {', '.join(_parameters(cls))}; got {wrong}"
            )
        several = next((one.name for one in known if one.kind is inspect.Parameter.VAR_POSITIONAL), None)
        rest = dict(arguments)
        return cls(*rest.pop(several, ()), **rest) if several else cls(**rest)


def to_config(value: Any) -> Any:
    """Return a mask, position, domain or model as plain JSON; or numbers, strings, tensors, and lists and dicts of all these.

    The way to keep the arguments of a model in a file that is only data: a JSON file, the hyperparameters of a trainer, or a checkpoint
    that is read with ``weights_only=True``.

    Raises:
        TypeError: something that has no name, such as a function that is not registered; the message names it.

    Example:
        >>> kwargs = {"mask": masks.Causal() | masks.Global(1), "position": positions.Rotary(8)}
        >>> xf.to_config(kwargs)["position"]
        {'xformerlib': 1, 'class': 'positions.Rotary', 'head_dim': 8}
        >>> again = xf.from_config(xf.to_config(kwargs))
        >>> again["mask"] == kwargs["mask"]
        True
    """
    return _written(value, True)


def from_config(config: Any) -> Any:
    """Rebuild what ``to_config`` described.

    Classes are looked up among the public ones and the registered ones; functions among the registered ones. Nothing else is called or
    imported, so that a config from elsewhere is no more than data.

    Raises:
        TypeError, ValueError: a class or function that is not known, a config of another version, arguments that do not fit.

    Example:
        >>> xf.from_config(Sequence.padded([2, 3]).to_config())
        Sequence.padded(<2 lengths>, length=3)
    """
    return _read(config, True)


# -- writing ---------------------------------------------------------------------------------------------------------------


def _written(value: Any, top: bool = False) -> Any:
    """A value as JSON; ``top`` adds the version of the format to descriptions."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, int):  # a member of an IntEnum
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Described):
        return _description(value, top)
    if isinstance(value, list):
        return [_written(item, top) for item in value]
    if type(value) is tuple:
        return {"tuple": [_written(item, top) for item in value]}
    if isinstance(value, dict):
        if value.keys() & TAGS or not all(isinstance(key, str) for key in value):
            return {"dict": [[_written(key), _written(item, top)] for key, item in value.items()]}
        return {key: _written(item, top) for key, item in value.items()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor):
        return _tensor_written(value)
    reference = value if isinstance(value, Reference) else Reference(value)
    if reference.bound is None:
        return {"function": _named_by(reference)}
    args, keywords = reference.bound
    return {"partial": _named_by(reference), "arguments": _written(list(args)), "keywords": _written(keywords)}


def _description(value: Described, top: bool) -> dict[str, Any]:
    name = name_of(value._class())
    if name is None:
        kind = value._class().__name__
        raise TypeError(
            f"{kind} must be registered by name to be written; got {value!r}. Use xformerlib.register({kind}, name='...')."
        )
    if top:
        value._verify()
    version = {VERSION: FORMAT} if top else {}
    return {**version, CLASS: name, **{key: _written(item) for key, item in value._described().items()}}


def _named_by(reference: Reference) -> str:
    """The name of a class or function, or an error that says how it gets one."""
    if reference.name is None:
        raise TypeError(
            f"functions, and classes of your own, must be registered by name to be written as JSON; got {reference.said}. Use "
            "xformerlib.register(fn, name='...')."
        )
    return reference.name


def _tensor_written(value: Tensor) -> dict[str, Any]:
    if value.is_complex() or value.layout != torch.strided or value.is_quantized:
        raise TypeError(
            f"tensors must be dense and real to be written as JSON; got {value.dtype}, {value.layout}. Save it with torch.save."
        )
    numbers = value.detach().cpu()
    values = numbers.tolist()
    wide = numbers.float() if value.dtype.itemsize == 1 else numbers  # float8 knows no isfinite
    if value.is_floating_point() and not bool(wide.isfinite().all()):
        values = _each(values, lambda number: number if math.isfinite(number) else repr(number))
    return {"tensor": values, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def _each(values: Any, change: Callable[[Any], Any]) -> Any:
    return [_each(item, change) for item in values] if isinstance(values, list) else change(values)


# -- reading ---------------------------------------------------------------------------------------------------------------


def is_config(value: Any) -> bool:
    """Whether a value is a description, written by ``to_config``."""
    return isinstance(value, dict) and VERSION in value and CLASS in value


def understood(value: Any) -> Any:
    """An argument, where descriptions in it are replaced by what they describe."""
    if isinstance(value, dict):
        if is_config(value) or _is_tagged(value):
            return _read(value, True)
        return {key: understood(item) for key, item in value.items()}
    if type(value) in (list, tuple) and any(isinstance(item, (dict, list, tuple)) for item in value):
        return type(value)(understood(item) for item in value)
    return value


def _is_tagged(value: dict[str, Any]) -> bool:
    """Whether a dict is exactly what is written for something that JSON has no word for."""
    return any(value.keys() == keys.keys() and isinstance(value[next(iter(keys))], (str, list)) for keys in _TAGGED)


def _read(config: Any, top: bool = False) -> Any:
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    if isinstance(config, (list, tuple)):
        return [_read(item, top) for item in config]
    if not isinstance(config, dict):
        raise TypeError(f"config must be plain JSON, as to_config writes it; got {type(config).__name__}")
    if CLASS in config:
        return _described_by(config, top)
    for tag, read in _READERS.items():
        if tag in config:
            try:
                return read(config, top)
            except (KeyError, AttributeError, IndexError, _Malformed) as error:
                raise ValueError(f"config must be as to_config writes it; got {config!r}") from error
    return {key: _read(item, top) for key, item in config.items()}


def _described_by(config: dict[str, Any], top: bool) -> Any:
    version = config.get(VERSION, None if top else FORMAT)
    if type(version) is not int or version != FORMAT:
        raise ValueError(
            f"config must have {VERSION!r}: {FORMAT}, the version of the format that this release reads; got {version!r}. Write it again "
            "with to_config, or use the release that wrote it."
        )
    kind = named(config[CLASS], "class")
    if not inspect.isclass(kind) or not issubclass(kind, Described) or _is_abstract(kind):
        raise ValueError(f"config must name a class that can be made; got {config[CLASS]!r}")
    return kind._rebuilt({name: _read(item) for name, item in config.items() if name not in (CLASS, VERSION)})


def _is_abstract(kind: type) -> bool:
    """Whether a class lacks methods that its subclasses have."""
    return any(getattr(getattr(kind, name), "__isabstractmethod__", False) for name in dir(kind) if name[0] != "_")


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """The arguments of a constructor by name; those of ``**kwargs`` are not among them."""
    return {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


class _Malformed(Exception):
    """What stands for a value is not as ``to_config`` writes it."""


def _tensor_read(config: dict[str, Any], top: bool) -> Tensor:
    dtype = _dtype(config["dtype"])
    try:
        values = _each(config["tensor"], lambda number: float(number) if isinstance(number, str) else number)
        return torch.tensor(values, dtype=dtype).reshape(config["shape"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise _Malformed from error


def _list_read(items: Any, top: bool) -> list[Any]:
    if not isinstance(items, (list, tuple)):
        raise _Malformed
    return [_read(item, top) for item in items]


def _dict_read(config: dict[str, Any], top: bool) -> dict[Any, Any]:
    items = config["dict"]
    if not isinstance(items, (list, tuple)) or not all(isinstance(x, (list, tuple)) and len(x) == 2 for x in items):
        raise _Malformed
    pairs = [(_read(key), _read(item, top)) for key, item in items]
    try:
        return dict(pairs)
    except TypeError as error:  # a key that has no hash
        raise _Malformed from error


def _float_read(config: dict[str, Any], top: bool) -> float:
    try:
        return float(config["float"])
    except (TypeError, ValueError) as error:
        raise _Malformed from error


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"config must name a dtype of torch, such as 'float32'; got {name!r}")
    return found


def _partial_read(config: dict[str, Any], top: bool) -> Any:
    keywords = _read(config["keywords"])
    if not isinstance(keywords, dict) or not all(isinstance(key, str) for key in keywords):
        raise _Malformed
    return functools.partial(named(config["partial"], "function"), *_list_read(config["arguments"], False), **keywords)


_READERS: dict[str, Callable[[dict[str, Any], bool], Any]] = {
    "tensor": _tensor_read,  # which has a dtype, too
    "partial": _partial_read,
    "tuple": lambda config, top: tuple(_list_read(config["tuple"], top)),
    "dict": _dict_read,
    "float": _float_read,
    "dtype": lambda config, top: _dtype(config["dtype"]),
    "function": lambda config, top: named(config["function"], "function"),
}
_TAGGED: list[dict[str, None]] = [
    *(dict.fromkeys([tag]) for tag in ("tuple", "dict", "float", "dtype", "function")),
    dict.fromkeys(["tensor", "dtype", "shape"]),
    dict.fromkeys(["partial", "arguments", "keywords"]),
]
