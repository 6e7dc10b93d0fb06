"""Masks in compiled graphs, which hold a number for the structure of a mask, and the numbers and tensors that it is made with."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor

from ._algebra import Mask

Recipe = tuple[Any, ...]

# Masks by number, as what they are made of: classes, and which of the numbers and tensors that come with a call is which field. A
# compiled graph may need any of them at any time.
_RECIPES: list[Recipe] = []
_NUMBERS: dict[Recipe, int] = {}

# Masks made with the tensors of the last calls: so their plans are found again.
MOST_MADE = 16
_MADE: dict[tuple[Any, ...], tuple[list[ref[Tensor]], Mask]] = {}


class Ingredients(NamedTuple):
    """What a mask is made of besides its structure: inputs of the graph, which may vary from call to call."""

    sizes: list[int]
    reals: list[float]
    tensors: list[Tensor]


def number_of(mask: Mask) -> tuple[int, Ingredients]:
    """The number of a mask's structure, equal for equal masks, and the rest."""
    rest = Ingredients([], [], [])
    things: list[Any] = []
    recipe = _recipe(mask, rest, things)
    return _numbered(recipe, *things), rest


def mask_of(number: int, rest: Ingredients) -> Mask:
    """The mask with this number and these ingredients."""
    key = (number, *rest.sizes, *rest.reals, *(id(tensor) for tensor in rest.tensors))
    refs, mask = _MADE.pop(key, ([], None))
    if mask is None or any(known() is not tensor for known, tensor in zip(refs, rest.tensors, strict=True)):
        refs, mask = [ref(tensor) for tensor in rest.tensors], _made(_RECIPES[number], rest)
    while len(_MADE) >= MOST_MADE:
        _MADE.pop(next(iter(_MADE)), None)
    _MADE[key] = refs, mask
    return mask


def _recipe(part: Any, rest: Ingredients, things: list[Any]) -> Recipe:
    """A mask as ``("mask", class, recipes of its fields)``; numbers, tensors and functions as their places in lists."""
    if isinstance(part, Mask) and hasattr(type(part), "__match_args__"):  # the fields of a dataclass
        fields = [_recipe(getattr(part, name), rest, things) for name in type(part).__match_args__]  # type: ignore[attr-defined]
        return ("mask", type(part), *fields)
    if isinstance(part, tuple):
        return ("tuple", *(_recipe(item, rest, things) for item in part))
    if part is None or isinstance(part, (bool, str)):
        return ("constant", part)
    kind, found = (
        ("size", rest.sizes)
        if isinstance(part, int)
        else ("real", rest.reals)
        if isinstance(part, float)
        else ("tensor", rest.tensors)
        if isinstance(part, Tensor)
        else ("thing", things)
    )
    found.append(part)
    return (kind, len(found) - 1)


def _numbered(recipe: Recipe, *things: Any) -> int:
    """The number of a recipe: asked while a graph is made, of the very functions that it is made for."""
    recipe = (recipe, things)
    if recipe not in _NUMBERS:
        _NUMBERS[recipe] = len(_RECIPES)
        _RECIPES.append(recipe)
    return _NUMBERS[recipe]


# A constant of the graph. torch.compiler.assume_constant_result would load the compiler, for seconds, when the package is imported.
_numbered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _made(recipe: Recipe, rest: Ingredients) -> Mask:
    steps, things = recipe
    found = {"size": rest.sizes, "real": rest.reals, "tensor": rest.tensors, "thing": things}

    def make(step: Recipe) -> Any:
        kind, *parts = step
        if kind == "mask":
            return parts[0](*(make(field) for field in parts[1:]))
        if kind == "tuple":
            return tuple(make(item) for item in parts)
        return parts[0] if kind == "constant" else found[kind][parts[0]]

    return make(steps)
