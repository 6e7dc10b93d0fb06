"""Checks of arguments by their annotations: types, ranges and names are refused where they are given, by the class that was called."""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor

Kind = TypeVar("Kind", bound=type)
Function = TypeVar("Function", bound="Callable[..., Any]")


class Within(NamedTuple):
    """The range of a number, as metadata of ``Annotated``: ``least <= value``, or ``< value`` if ``above``; and ``value < below``."""

    least: float
    below: float = math.inf
    above: bool = False

    def holds(self, value: Any) -> bool:
        """Check that a number is in the range; a symbolic size is, and none is guessed."""
        if isinstance(value, torch.SymInt):
            return True
        return (value > self.least if self.above else value >= self.least) and value < self.below

    def __str__(self) -> str:
        if self.below < math.inf:
            return f"in {'(' if self.above else '['}{self.least:g}, {self.below:g})"
        return f"{'>' if self.above else '>='} {self.least:g}"


ELSEWHERE = "checked where it is used, with a message of its own"
Size = Annotated[int, Within(1)]
Count = Annotated[int, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
NonNegative = Annotated[float, Within(0)]
Rate = Annotated[float, Within(0, 1)]


class Rule(NamedTuple):
    """The check that an annotation stands for.

    Attributes:
        fit: returns the value, numpy's and other whole numbers as ``int``; raises ``_Misfit``.
        says: the rule in words, after "must be".
        choices: whether the words are a list of choices, which stands after "one of".
    """

    fit: Callable[[Any], Any]
    says: str
    choices: bool = False


class _Misfit(Exception):
    """A value that breaks a rule; ``type_fits`` where only its value does, with what is to be said of that."""

    def __init__(self, type_fits: bool = False, says: str | None = None) -> None:
        self.type_fits, self.says = type_fits, says


def check_count(name: str, value: object, *, least: int = 0, says: str = "an integer") -> int:
    """Return a whole number as an int, or a symbolic size as it is; raise an error that names the argument for anything else."""
    # A symbolic size stays one, so that a graph is compiled or exported for all sizes.
    if type(value) is not int:
        try:
            value = _whole(value)
        except _Misfit:
            raise TypeError(f"{name} must be {says}; got {name}={shown(value)}") from None
    number: int = value  # type: ignore[assignment]
    if number < least:
        raise ValueError(f"{name} must be >= {least}; got {name}={number}")
    return number


def check_size(name: str, value: object, *, least: int = 1) -> int:
    """Return a whole number >= ``least``; see ``check_count``."""
    return check_count(name, value, least=least, says="a whole number")


def check_number(name: str, value: object, within: Within | None = None) -> float:
    """Return a finite number within a range, or raise an error that names the argument."""
    try:
        number = _real(value)
    except _Misfit as misfit:
        error = ValueError if misfit.type_fits else TypeError
        raise error(
            f"{name} must be a finite number{'' if within is None else f' {within}'}; got {name}={shown(value)}"
        ) from None
    if within is not None and not within.holds(number):
        kind = "" if within.below < math.inf else "a finite number "
        raise ValueError(f"{name} must be {kind}{within}; got {name}={shown(value)}")
    return number


def as_tensor(name: str, value: Any, says: str) -> Tensor:
    """Return numbers in a list or array as a tensor, or raise an error that names the argument."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be {says}; got {name}={shown(value)}") from None


def check_device(device: Any) -> torch.device:
    """Return a ``torch.device``, or raise an error that names ``device``."""
    try:
        return torch.device(device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"device must be a torch.device or its name, such as 'cpu' or 'cuda:0'; got device={shown(device)}"
        ) from None


def as_number(value: object) -> Any:
    """Return a number as an ``int`` or ``float``, NaN and infinity among them; None for anything else."""
    if isinstance(value, float):
        return float(value)
    try:
        return _real(value)
    except _Misfit:
        return None


def check_positive(name: str, value: object) -> float:
    """Return a finite number above 0; see ``check_number``."""
    return float(check_number(name, value, Within(0, above=True)))


def shown(value: object) -> str:
    """Describe a value in a message: a short ``repr``, or what kind of tensor it is."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_names(owner: str, given: Mapping[str, Any], known: collections.abc.Iterable[str]) -> None:
    """Raise unless every keyword is known, with the name that is most like it."""
    names = set(known) - {"self"}
    for name in given:
        if name not in names:
            raise TypeError(f"{owner}() got an unexpected keyword argument {name!r}{_meant(name, names)}")


def _meant(name: object, known: collections.abc.Iterable[str]) -> str:
    """The end of a message about a name that is not known: the one that is most like it, or all that there are."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; it takes {', '.join(names) or 'none'}"


def check_options(owner: str, options: Mapping[str, Any] | None, kind: type, name: str) -> dict[str, Any]:
    """Return a mapping of options that go on to another class, checked against a ``TypedDict``, or raise in the name of ``owner``."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"{name} must be a mapping of options, such as dict(norm='pre'); got {name}={shown(options)}")
    rules = _rules_of_options(kind)
    for key in options:
        if key not in rules:
            raise TypeError(f"{owner}() got an unexpected option {key!r} in {name}{_meant(key, rules)}")
    return {key: _fitted(key, value, rules[key]) for key, value in options.items()}


def checked(function: Function) -> Function:
    """Check the arguments of a function by its annotations before it runs; for functions that are not called on a hot path."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            args, kwargs = fit_arguments(wrapper.__name__, function, args, kwargs)
        return function(*args, **kwargs)

    wrapper._checks_arguments = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


def checked_class(kind: Kind) -> Kind:
    """Check the arguments of a constructor by its annotations; a decorator for classes that are not made on a hot path."""
    init = kind.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            (_, *args), kwargs = fit_arguments(type(self).__name__, init, (self, *args), kwargs)  # type: ignore[assignment]
        init(self, *args, **kwargs)

    kind.__init__ = __init__  # type: ignore[misc]
    return kind


def checked_names(kind: Kind) -> Kind:
    """Check the number and names of the arguments of a constructor; a decorator for dataclasses that check values themselves."""
    init = kind.__init__  # type: ignore[misc]
    names = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not torch.compiler.is_compiling() and (kwargs or len(args) > len(names)):
            owner = type(self).__name__
            check_names(owner, kwargs, names)
            if len(args) > len(names):
                takes = f"at most {len(names)}, {', '.join(names)}" if names else "none"
                raise TypeError(f"{owner}() got {len(args)} arguments by place; it takes {takes}")
        init(self, *args, **kwargs)

    kind.__init__ = __init__  # type: ignore[misc]
    return kind


def made_by(name: str, maker: Any, *given: Any, kind: Any = torch.nn.Module) -> Any:
    """Return the module that a function makes of ``given``, or raise an error that names the argument that the function was."""
    what = "a module" if kind is torch.nn.Module else f"a {kind.__name__}"
    takes = "one number" if given else "no arguments"
    rule = f"{name} must be a function of {takes} that makes {what}"
    if isinstance(maker, torch.nn.Module):
        raise TypeError(f"{rule}; got the module {type(maker).__name__}. Give its class, or a lambda that makes it.")
    if not torch.compiler.is_compiling():
        try:
            inspect.signature(maker).bind(*given)
        except ValueError:  # written in C: it has no signature
            pass
        except TypeError as error:
            said = getattr(maker, "__name__", shown(maker))
            raise TypeError(f"{rule}; got {said}, which cannot be called so: {error}") from None
    made = maker(*given)
    if not isinstance(made, kind):
        raise TypeError(f"{rule}; got {getattr(maker, '__name__', shown(maker))}, which makes {shown(made)}")
    return made


def fit_arguments(
    owner: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, whole numbers as ``int``; raise where one breaks the rule of its annotation, or has no name.

    Args:
        owner: the function or class that the user called, for messages.
        function: the function that is to be called, ``self`` included in ``args`` for constructors.
    """
    plan = _plan(function)
    if plan is None:
        return args, kwargs
    if not plan.open_ended and not kwargs.keys() <= plan.named.keys():
        check_names(owner, kwargs, plan.named)
    found = [_fitted(name, value, rule) for (name, rule), value in zip(plan.positional, args, strict=False)]
    if plan.rest is not None:
        found += [_fitted(plan.rest[0], value, plan.rest[1]) for value in args[len(found) :]]
    else:
        found += args[len(found) :]  # too many, as Python says
    return tuple(found), {name: _fitted(name, value, plan.named.get(name)) for name, value in kwargs.items()}


class _Plan(NamedTuple):
    """The rules of a function's parameters, by place and by name."""

    positional: list[tuple[str, Rule | None]]
    rest: tuple[str, Rule | None] | None
    named: dict[str, Rule | None]
    open_ended: bool


@functools.cache
def _plan(function: Callable[..., Any]) -> _Plan | None:
    own = inspect.unwrap(function)
    names = getattr(own, "__globals__", None)
    if names is None:
        return None
    positional, rest, named, open_ended = [], None, {}, False
    for one in inspect.signature(own).parameters.values():
        annotation = _evaluated(one.annotation, names)
        if one.kind is one.VAR_KEYWORD:
            options = annotation.kind if isinstance(annotation, _Unpacked) else None
            open_ended = options is None
            named.update({} if options is None else _rules_of_options(options))
            continue
        rule = None if one.name == "self" else rule_of(annotation)
        if one.default is None and rule is not None:
            rule = _either([rule, _NONE])
        if one.kind is one.VAR_POSITIONAL:
            rest = (one.name, rule)
            continue
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD):
            positional.append((one.name, rule))
        if one.kind is not one.POSITIONAL_ONLY:
            named[one.name] = rule
    return _Plan(positional, rest, named, open_ended)


@functools.cache
def _rules_of_options(kind: type) -> dict[str, Rule | None]:
    """The rules of the keys of a ``TypedDict``, those of its bases among them."""
    found: dict[str, Rule | None] = {}
    for base in (*getattr(kind, "__orig_bases__", ()), kind):
        if base is not kind and typing.is_typeddict(base):
            found.update(_rules_of_options(base))
    names = vars(sys.modules[kind.__module__])
    for key, annotation in vars(kind).get("__annotations__", {}).items():
        if key not in found:
            found[key] = rule_of(_evaluated(annotation, names))
    return found


class _Unpacked(NamedTuple):
    kind: type


class _Unpack:
    """``Unpack``, which the library imports for type checkers only."""

    def __class_getitem__(cls, kind: type) -> _Unpacked:
        return _Unpacked(kind)


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    """An annotation as an object; ``Any`` where it holds names that exist for type checkers only."""
    if annotation is inspect.Parameter.empty:
        return Any
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {**names, "Unpack": _Unpack})
    except (NameError, TypeError, AttributeError):
        return Any


def _fitted(name: str, value: Any, rule: Rule | None) -> Any:
    if rule is None:
        return value
    try:
        return rule.fit(value)
    except _Misfit as misfit:
        error = ValueError if misfit.type_fits else TypeError
        raise error(
            f"{name} must be {misfit.says or 'one of ' * rule.choices + rule.says}; got {name}={shown(value)}"
        ) from None


def rule_of(annotation: Any) -> Rule | None:
    """The rule of an annotation; None where anything goes, or where a check would have to guess."""
    if annotation in (Any, object, NoReturn) or isinstance(annotation, TypeVar):
        return None
    if annotation is None or annotation is type(None):
        return _NONE
    if annotation in _SIMPLE:
        return _SIMPLE[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        rules = [rule_of(part) for part in args]
        return None if None in rules else _either(rules)  # type: ignore[arg-type]
    if origin is Annotated and ELSEWHERE in args:
        return None
    if origin is Annotated:
        return _ranged(rule_of(args[0]), next((x for x in args[1:] if isinstance(x, Within)), None))
    if origin is Literal:
        return _one_of(args)
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return Rule(lambda value: value if callable(value) else _misfit(), "a callable")
    if origin in (list, tuple, collections.abc.Sequence):
        return _several(origin, args)
    if origin in (dict, collections.abc.Mapping):
        return Rule(lambda value: value if isinstance(value, Mapping) else _misfit(), "a mapping")
    if getattr(annotation, "__name__", None) in _NAMED_ELSEWHERE:
        return None
    if hasattr(annotation, "array_type") and hasattr(annotation, "dims"):  # jaxtyping
        return _instance(annotation.array_type)
    if (
        inspect.isclass(annotation)
        and origin is None  # type[...] is a class to Python 3.10
        and not getattr(annotation, "_is_protocol", False)
        and not typing.is_typeddict(annotation)
    ):
        return _instance(annotation)
    return None


def _misfit() -> NoReturn:
    raise _Misfit


def _whole(value: Any) -> Any:
    """A whole number: an int, numpy's, a 0-dim tensor of integers, a symbolic size; no bool."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or (
        isinstance(value, Tensor) and (value.dtype == torch.bool or value.is_floating_point())
    ):
        raise _Misfit
    try:
        return value.__index__()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise _Misfit from None


def _real(value: Any) -> Any:
    """A finite number: an int or a float, numpy's, a 0-dim tensor; no bool, no str, not NaN."""
    if type(value) not in (int, float):
        if isinstance(value, (bool, str, bytes, complex)) or type(value).__name__ in ("bool_", "bool", "str_"):
            raise _Misfit
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return value
        if isinstance(value, Tensor) and (value.ndim or value.is_complex() or value.dtype == torch.bool):
            raise _Misfit
        try:
            value = value.__index__() if hasattr(value, "__index__") and not isinstance(value, Tensor) else float(value)
        except (TypeError, ValueError, RuntimeError):
            raise _Misfit from None
    if not math.isfinite(value):
        raise _Misfit(type_fits=True)
    return value


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool_", "bool") and type(value).__module__ == "numpy":
        return bool(value)
    raise _Misfit


def _instance(kind: Any) -> Rule:
    says = _ARTICLES.get(kind, f"a {kind.__name__}" if kind.__name__[0] not in "AEIOU" else f"an {kind.__name__}")
    return Rule(lambda value: value if isinstance(value, kind) else _misfit(), says)


def _one_of(choices: tuple[Any, ...]) -> Rule:
    kinds = {type(choice) for choice in choices}

    def fit(value: Any) -> Any:
        if type(value) not in kinds and kinds == {int}:
            value = _whole(value)
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return value
        raise _Misfit(type_fits=type(value) in kinds)

    words = " or ".join(map(repr, choices)) if len(choices) == 2 else ", ".join(map(repr, choices))
    return Rule(fit, words, choices=len(choices) > 2)


def _either(rules: list[Rule]) -> Rule:
    def fit(value: Any) -> Any:
        closest = _Misfit()
        for rule in rules:
            try:
                return rule.fit(value)
            except _Misfit as misfit:
                closest = misfit if misfit.type_fits and not closest.type_fits else closest
        raise closest

    parts = (word for rule in rules for word in rule.says.removesuffix(" or None").split(" or None"))
    words = list(dict.fromkeys(word.replace("' or '", "', '") for word in parts))
    if any(rule is _NONE or rule.says.endswith(" or None") for rule in rules):
        words = [word for word in words if word != "None"] + ["None"]
    return Rule(fit, ", ".join(words[:-1]) + f" or {words[-1]}")


def _ranged(rule: Rule | None, within: Within | None) -> Rule | None:
    if rule is None or within is None:
        return rule

    def fit(value: Any) -> Any:
        value = rule.fit(value)
        if not within.holds(value):
            raise _Misfit(
                type_fits=True,
                says=f"{rule.says} {within}"
                if rule.says == "a finite number" and within.below == math.inf
                else str(within),
            )
        return value

    return Rule(fit, f"{rule.says} {within}")


def _several(kind: Any, args: tuple[Any, ...]) -> Rule:
    """A list or tuple; of a tuple of fixed length only its parts' common rule is checked."""
    parts = [rule_of(part) for part in args if part is not Ellipsis]
    part = parts[0] if len(set(args) - {Ellipsis}) == 1 else None

    def fit(value: Any) -> Any:
        if isinstance(value, (str, bytes)) or not isinstance(value, collections.abc.Sequence):
            raise _Misfit
        if part is None:
            return value
        found = [part.fit(each) for each in value]
        if all(new is old for new, old in zip(found, value, strict=True)):
            return value
        return tuple(found) if isinstance(value, tuple) else found

    return Rule(fit, "a list or tuple" + (f" of which each is {part.says}" if part is not None else ""))


_NONE = Rule(lambda value: value if value is None else _misfit(), "None")
_SIMPLE: dict[Any, Rule] = {
    bool: Rule(_truth, "True or False"),
    int: Rule(_whole, "a whole number"),
    float: Rule(_real, "a finite number"),
    str: Rule(lambda value: value if isinstance(value, str) else _misfit(), "a string"),
}
# Who takes these has a message of its own, which says what to do.
_NAMED_ELSEWHERE = ("Mask", "Position", "Head")
_ARTICLES: dict[Any, str] = {
    Tensor: "a tensor", torch.nn.Module: "a module", torch.dtype: "a torch.dtype, such as torch.float32",
    torch.device: "a torch.device",
}  # fmt: skip
