"""Masks in compiled graphs, which hold a number for a mask, and the tensors that it is made with."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any
from weakref import ref

from torch import Tensor

from ._algebra import Mask

Recipe = tuple[Any, ...]

# Masks by number, as what they are made of: class and fields. A compiled graph may need any of them at any time.
_RECIPES: list[Recipe] = []
_NUMBERS: dict[Recipe, int] = {}
_MASKS: dict[int, Mask] = {}

# Masks made with the tensors of the last calls: so their plans are found again.
MOST_MADE = 16
_MADE: dict[tuple[int, ...], tuple[list[ref[Tensor]], Mask]] = {}


def number_of(mask: Mask) -> tuple[int, list[Tensor]]:
    """The number of a mask, equal for equal masks, and the tensors in it, which are inputs of the graph."""
    tensors: list[Tensor] = []
    things: list[Any] = []
    recipe = _recipe(mask, tensors, things)
    return _numbered(recipe, *things), tensors


def mask_of(number: int, tensors: SequenceOf[Tensor]) -> Mask:
    """The mask with this number, holding these tensors."""
    if not tensors:
        if number not in _MASKS:
            _MASKS[number] = _made(_RECIPES[number], ())
        return _MASKS[number]
    key = (number, *(id(tensor) for tensor in tensors))
    refs, mask = _MADE.pop(key, ([], None))
    if mask is None or any(known() is not tensor for known, tensor in zip(refs, tensors, strict=True)):
        refs, mask = [ref(tensor) for tensor in tensors], _made(_RECIPES[number], tensors)
    while len(_MADE) >= MOST_MADE:
        _MADE.pop(next(iter(_MADE)), None)
    _MADE[key] = refs, mask
    return mask


def _recipe(part: Any, tensors: list[Tensor], things: list[Any]) -> Recipe:
    """What a mask is made of, in constants: ``("mask", class, recipes of its fields)``; tensors and functions by their place in a list."""
    if isinstance(part, Mask) and hasattr(type(part), "__match_args__"):  # the fields of a dataclass
        fields = [_recipe(getattr(part, name), tensors, things) for name in type(part).__match_args__]  # type: ignore[attr-defined]
        return ("mask", type(part), *fields)
    if isinstance(part, Tensor):
        tensors.append(part)
        return ("tensor", len(tensors) - 1)
    if isinstance(part, tuple):
        return ("tuple", *(_recipe(item, tensors, things) for item in part))
    if part is None or isinstance(part, (bool, int, float, str)):
        return ("constant", part)
    things.append(part)
    return ("thing", len(things) - 1)


def asked_once(fn: Any) -> None:
    """Mark a function to be called while a graph is made, its result being a constant of the graph.

    As ``torch.compiler.assume_constant_result`` does, which would load the compiler, for seconds, when the package is imported.
    """
    fn._dynamo_marked_constant = True


def _numbered(recipe: Recipe, *things: Any) -> int:
    """The number of a recipe: asked while a graph is made, of the very functions that it is made for."""
    recipe = (recipe, things)
    if recipe not in _NUMBERS:
        _NUMBERS[recipe] = len(_RECIPES)
        _RECIPES.append(recipe)
    return _NUMBERS[recipe]


asked_once(_numbered)


def _made(recipe: Any, tensors: SequenceOf[Tensor]) -> Mask:
    steps, things = recipe

    def make(step: Any) -> Any:
        kind, *rest = step
        if kind == "mask":
            return rest[0](*(make(field) for field in rest[1:]))
        if kind == "tuple":
            return tuple(make(item) for item in rest)
        return {"tensor": tensors, "thing": things}[kind][rest[0]] if kind != "constant" else rest[0]

    return make(steps)
