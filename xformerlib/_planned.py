"""From what is asked of attention to what kernels compute: plans, kept on the domain, and scores."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from . import kernels
from ._autograd import keeping
from ._inputs import BiasLike
from .kernels import Plan, Problem, Scores
from .kernels._plan import check_strict
from .masks._algebra import Predicate
from .positions import Bias, PairBias

MOST_PLANS, MOST_FLEETING_PLANS = 64, 4  # kept on one domain


def planned(problem: Problem, kernel: str, device: torch.device) -> Plan:
    """The plan, kept on the domain of the queries: the last few, since a problem keeps its mask and facts of its keys in memory."""
    # A mask of tensors compares by identity: one that is made anew for each call must not pile up.
    fleeting = getattr(problem.mask, "device", None) is not None
    plans: dict[tuple[Problem, str, torch.device], Plan] = problem.domain.bound_fact(("plan", fleeting), lambda _: {})
    problem = problem.anchored()
    key = (problem, kernel, device)
    known = plans.get(key)
    if known is None:
        while len(plans) >= (MOST_FLEETING_PLANS if fleeting else MOST_PLANS):
            plans.pop(next(iter(plans)))
        problem.mask.check(problem.domain.whole, problem.keys.whole)  # before lowering reads the mask's structure
        with keeping():
            known = plans[key] = kernels.choose(problem, kernel, device)
    check_strict(known, problem, kernel)
    return known


def bound_biases(problem: Problem, terms: SequenceOf[BiasLike], device: torch.device) -> tuple[Tensor | PairBias, ...]:
    """The biases bound to the domains; tensors as (B|1, H|1, Tq|1, Tk|1)."""
    shape = (problem.batch, problem.heads, problem.num_queries, problem.num_keys)
    dtype = torch.promote_types(problem.dtype, torch.float32)
    bound: list[Tensor | PairBias] = []
    for term in terms:
        if isinstance(term, Bias):
            if term.heads not in (1, problem.heads):
                raise ValueError(
                    f"bias must score as many heads as query has, {problem.heads}; got {term!r} of {term.heads}"
                )
            bound.append(term.pair(problem.domain, problem.keys, dtype=dtype))
            continue
        if (
            term.ndim < 2
            or term.ndim > 4
            or any(n not in (1, want) for n, want in zip(term.shape[::-1], shape[::-1], strict=False))
        ):
            raise ValueError(f"bias must broadcast to (B, H, Tq, Tk) = {shape}; got {tuple(term.shape)}")
        if not term.is_floating_point() or term.device != device:
            raise TypeError(
                f"bias must be floating-point on {device}; got {term.dtype} on {term.device}. Use masks.Dense for a bool mask."
            )
        bound.append(term.reshape((1,) * (4 - term.ndim) + term.shape))
    return tuple(bound)


def check_extent(problem: Problem) -> None:
    """Raise unless the mask varies over the rows and heads that there are."""
    extent = problem.mask.extent()
    for what, varies, size in (("rows", extent.batch, problem.batch), ("heads", extent.heads, problem.heads)):
        if varies not in (None, 1, size):
            raise ValueError(f"mask must have 1 or {size} {what}, as query has; got {varies} in {problem.mask!r}")


def scores_of(
    problem: Problem,
    predicate: Predicate | None,
    biases: tuple[Tensor | PairBias, ...],
    scale: float,
    softcap: float | None,
    seed: Tensor | None,
) -> Scores:
    """What every kernel is given."""
    only_mask = not any(isinstance(bias, Tensor) for bias in biases)  # a tensor of minus infinities hides keys too
    return Scores(
        predicate=predicate,
        biases=biases,
        scale=scale,
        softcap=softcap,
        dropout_p=problem.dropout_p,
        seed=seed,
        reflexive=problem.is_reflexive and only_mask,
        clean=problem.is_clean and only_mask,
    )


def without_padding(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs with 0 at tokens that do not exist."""
    if problem.domain.valid is not None:
        query = query.masked_fill(~problem.domain.valid[:, None, :, None], 0)
    if problem.keys.valid is not None:
        hidden = ~problem.keys.valid[:, None, :, None]
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    return query, key, value
